"""The interactive session: read a line, carry out a command or answer a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

from config_model import PredictConfig
from runtime.base.files import write_text_atomic
from runtime.base.text import human_bytes, visible
from runtime.inference.console import (
    experts_map,
    show_answer,
)
from runtime.inference.predictor import Answer, Predictor

COMMANDS = {  # REPL command -> (field, what it does)
    ":t": ("temperature", "temperature, 0 = greedy"),
    ":k": ("top_k", "draw from the k likeliest, 0 = all"),
    ":p": ("top_p", "draw from the likeliest that reach p"),
    ":m": ("min_p", "draw from those at least m times as likely as the likeliest"),
    ":r": ("repetition_penalty", "above 1: repeat less"),
    ":n": ("max_new_tokens", "most tokens in an answer"),
    ":stop": ("stop", r'end an answer before this text, \n a line break, "" no text'),
    ":seed": ("seed", "seed, -1 = another each time"),
}


VERBS = {
    "+<text>": "go on with the text so far, after this (or nothing) more of it",
    ":undo": "take the last answer and its prompt back",
    ":reset": "forget the text so far",
    ":save <file>": "write all texts of this session to a new file",
    ":stats": "tokens, speed, memory",
    ":experts": "which experts the last text's tokens went to",
    ":help": "this",
    ":q": "leave (so does end-of-file, Ctrl-D)",
    "Ctrl-C": "stop the answer",
}


HELP = "\n".join(
    [
        *(f"  {name + ' <value>':16} {text}" for name, (_, text) in COMMANDS.items()),
        *(f"  {name:16} {text}" for name, text in VERBS.items()),
        "  anything else is a prompt that begins a new text; one that begins with a colon or a plus can be typed after a space,",
        "  and a line that ends in a backslash goes on in the next",
    ]
)


class Session:
    """What is typed at the prompt, and what was said so far."""

    def __init__(self, predictor: Predictor, config: PredictConfig):
        self.predictor, self.config = predictor, config
        self.turns: list[
            tuple[list[int], str]
        ] = []  # of the text so far, before each turn: its ids, and it as shown
        self.ids: list[int] = []
        self.shown = ""
        self.saved: list[str] = []  # earlier texts
        self.tokens_read = self.tokens_drawn = 0
        self.seconds = 0.0

    def line(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        if line.startswith(":"):
            command, *arguments = line.split()
            if command == ":q" and not arguments:
                return False
            with (
                contextlib.redirect_stdout(sys.stderr)
                if self.config.json
                else contextlib.nullcontext()
            ):  # JSON lines stay by themselves
                if command == ":stop":
                    self.config = set_stop(self.config, line)
                elif command in (":undo", ":reset", ":save", ":stats", ":experts"):
                    self.verb(command, line.removeprefix(command).strip())
                else:
                    self.config = command_result(self.config, command, arguments)
        elif line.startswith("+"):
            if self.ids:
                self.turn(line[1:], self.ids)
            else:
                print("there is no text to go on with: type a prompt")
        elif line.strip():
            self.begin()
            self.turn(line[1:] if line.startswith((" :", " +")) else line, None)
        return True

    def begin(self) -> None:
        """Put the text so far among the earlier ones."""
        if self.shown:
            self.saved.append(self.shown)
        self.turns, self.ids, self.shown = [], [], ""

    def turn(self, prompt: str, before: list[int] | None) -> None:
        """One answer, to a new text or after `before`."""
        predictor = self.predictor
        ids = None
        if before is not None:
            ids = (
                before[:-1]
                if before[-1] in predictor.tokenizer.stop_ids and len(before) > 1
                else before
            )  # go on where it ended
            ids = ids + predictor.tokenizer.encode_continuation(prompt)
        self.turns.append((self.ids, self.shown))
        predictor.last = None
        try:
            show_answer(predictor, prompt, self.config, ids)
        finally:
            if a := predictor.last:
                # of what was drawn, only what is before the stop counts
                drawn = (
                    predictor.tokenizer.encode_continuation(a.text)
                    if a.ended == "stop text"
                    else a.ids
                )
                self.ids, self.shown = a.prompt_ids + drawn, self.shown + prompt + a.text
                self.tokens_read, self.tokens_drawn, self.seconds = (
                    self.tokens_read + len(a.prompt_ids),
                    self.tokens_drawn + len(a.ids),
                    self.seconds + a.last_s,
                )
            else:
                self.turns.pop()

    def verb(self, verb: str, argument: str) -> None:
        """:undo, :reset, :save, :stats and :experts; each answers with a line."""
        if argument and verb != ":save":
            print(f"{verb} takes no value")
        elif verb == ":save":
            self.save(argument)
        elif verb == ":reset":
            self.begin()
            print("the next text begins anew")
        elif verb == ":stats":
            self.stats()
        elif not self.ids:
            print("there is no text yet")
        elif verb == ":undo":
            self.ids, self.shown = self.turns.pop()
            print(
                f"taken back; the text so far: {visible(self.shown[-60:])!r}"
                if self.ids
                else "taken back; there is no text now"
            )
        else:
            self.predictor.last = Answer(self.ids)
            print(experts_map(self.predictor))

    def save(self, name: str) -> None:
        """Write the session's texts to a file that is not there yet."""
        texts, name = [text for text in (*self.saved, self.shown) if text], os.path.expanduser(name)
        if not name or os.path.lexists(name) or not texts:
            print(
                "name a file: :save story.txt"
                if not name
                else "there is no text yet"
                if not texts
                else f"{visible(name)} is there already: name another file"
            )
            return
        try:
            write_text_atomic(
                Path(name), "\n\n".join(texts).encode("utf-8", "replace").decode() + "\n"
            )
            print(f"saved {len(texts)} text{'s' if len(texts) > 1 else ''} in {visible(name)}")
        except (OSError, ValueError) as error:
            print(f"{visible(name)} cannot be written: {getattr(error, 'strerror', None) or error}")

    def stats(self) -> None:
        """Tokens, speed, memory."""
        model, texts = self.predictor.model, self.predictor.texts
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        rate = (
            f", {self.tokens_drawn / self.seconds:.1f} tokens/s, reading included"
            if self.seconds
            else ""
        )
        print(f"{self.tokens_drawn} tokens drawn for {self.tokens_read} read{rate}")
        decoder = self.predictor.decoder
        print(
            f"{len(self.ids)} tokens of text, of which the model sees {min(len(self.ids), model.config.context_length)}; weights {human_bytes(weights)}, cache {human_bytes(sum(t.cache.num_bytes() for t in texts))}"
            + (
                "; C decoder"
                if decoder.native
                else f"; {decoder.note or 'PyTorch decodes, as asked for'}"
            )
        )


def repl(predictor: Predictor, config: PredictConfig) -> None:
    """Prompts and commands from stdin until :q or end-of-file. Nothing else ends it."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    history = (
        Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
        / "gptoss"
        / "history"
    )
    if interactive:
        read_history(history)
        if not config.quiet:
            print("Type the beginning of a text; :help for commands.")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    session = Session(predictor, config)
    try:
        while True:
            try:
                line = input("> " if interactive else "")
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + input(". " if interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            try:
                if not session.line(line):
                    return
            except KeyboardInterrupt:
                continue
            except (
                ValueError,
                RuntimeError,
            ) as error:  # out of memory, say: the model is loaded, the next answer may work
                print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    finally:
        if interactive:
            write_history(history)


def read_history(path: Path) -> None:
    """Line editing for input(), and what was typed in earlier sessions."""
    with contextlib.suppress(
        ImportError, OSError
    ):  # Windows has its own; the first session has none
        import readline

        readline.set_history_length(1000)
        readline.read_history_file(path)


def write_history(path: Path) -> None:
    """Keep what was typed, for this user's eyes; a folder that cannot be written is no reason to complain."""
    with contextlib.suppress(ImportError, OSError):
        import readline

        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)


def set_stop(config: PredictConfig, line: str) -> PredictConfig:
    """The settings after `:stop TEXT`, which answers with a line; without TEXT nothing changes."""
    text = line.removeprefix(":stop").removeprefix(" ")
    if text.strip():
        config = dataclasses.replace(
            config, stop=() if text.strip() == '""' else (text.replace("\\n", "\n"),)
        )
    print(f"stop = {', '.join(map(repr, config.stop)) or 'no text'}")
    return config


def command_result(config: PredictConfig, command: str, arguments: list[str]) -> PredictConfig:
    """The settings after a REPL command, which answers with a line; a mistake changes nothing."""
    if command == ":help":
        print(HELP)
    elif command not in COMMANDS:
        print(f"unknown command {visible(command)}; :help lists them")
    else:
        name = COMMANDS[command][0]
        try:
            if len(arguments) > 1:
                raise ValueError(f"{command} takes one value, not {len(arguments)}")
            if arguments:
                kind = type(getattr(config, name))
                try:
                    value = kind(arguments[0])
                except ValueError:
                    raise ValueError(
                        f"{name} must be {'a whole number' if kind is int else 'a number'}, not {visible(arguments[0])!r}"
                    ) from None
                config = dataclasses.replace(config, **{name: value})
            print(f"{name} = {getattr(config, name)}")
        except (ValueError, OverflowError) as error:
            print(f"{error}; it stays {getattr(config, name)}")
    return config
