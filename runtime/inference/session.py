"""Interactive mode: read a line, then execute a command or complete a prompt.

Read `repl` at the end first: its loop hands each line to `Session.line`. COMMANDS set a field of
the configuration, OTHER_COMMANDS act on the text so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

from config_model import PRESETS, ModelConfig, PredictConfig
from runtime.base.files import write_text_atomic
from runtime.base.text import human_bytes, human_count, visible
from runtime.checks import known
from runtime.data.tokenizer import NoTokenizer
from runtime.inference.console import experts_map, show_completion
from runtime.inference.conversation import Conversation
from runtime.inference.predictor import Completion, Predictor

# Command -> (field of PredictConfig, help).
COMMANDS = {
    ":t": ("temperature", "temperature, 0 = greedy"),
    ":k": ("top_k", "draw from the k likeliest, 0 = all"),
    ":p": ("top_p", "draw from the likeliest that reach p"),
    ":m": ("min_p", "draw from those at least m times as likely as the likeliest"),
    ":r": ("repetition_penalty", "above 1: repeat less"),
    ":n": ("max_new_tokens", "most tokens in an answer"),
    ":stop": ("stop", r'end an answer before this text, \n a line break, "" no text'),
    ":seed": ("seed", "seed, -1 = another each time"),
}

# Other input -> help.
OTHER_COMMANDS = {
    "+<text>": "continue the text so far, after this (or nothing) more of it",
    ":undo": "take the last answer and its prompt back",
    ":reset": "forget the text so far",
    ":save <file>": "write all texts of this session to a new file",
    ":stats": "tokens, speed, memory",
    ":experts": "which experts the last text's tokens went to",
    ":help": "this",
    ":q": "leave (so do exit, quit and end-of-file, Ctrl-D)",
    "Ctrl-C": "stop the answer",
}

# What people type on a terminal, after other programs -> the command.
MEANT = {
    **dict.fromkeys(("exit", "exit()", ":exit", "quit", "quit()", ":quit", "/bye"), ":q"),
    **dict.fromkeys(("help", "help()", "?", "/help"), ":help"),
}

# The same in a chat, where they differ. Without a text there is nothing to continue.
CHAT_COMMANDS = {
    ":system <text>": 'the system message, from the next answer on; "" = none',
    **{name: text for name, text in OTHER_COMMANDS.items() if not name.startswith("+")},
    ":undo": "take the last message and its answer back",
    ":reset": "forget the messages so far, not the system's",
    ":save <file>": "write all chats of this session to a new file, as scripts.sft reads them",
}

IN_NEXT = "  and a line that ends in a backslash continues in the next"
HELP = "\n".join(
    [
        *(f"  {name + ' <value>':16} {text}" for name, (_, text) in COMMANDS.items()),
        *(f"  {name:16} {text}" for name, text in OTHER_COMMANDS.items()),
        "  anything else is a prompt that begins a new text; type a space before a prompt that "
        "begins with a colon or a plus,",
        IN_NEXT,
    ]
)
CHAT_HELP = "\n".join(
    [
        *(f"  {name + ' <value>':16} {text}" for name, (_, text) in COMMANDS.items()),
        *(f"  {name:16} {text}" for name, text in CHAT_COMMANDS.items()),
        "  anything else is a message; type a space before one that begins with a colon,",
        IN_NEXT,
    ]
)


class Session:
    """The text or chat so far, the settings, and what a typed line does to them."""

    def __init__(self, predictor: Predictor, config: PredictConfig):
        self.predictor, self.config = predictor, config
        context = predictor.model.config.context_length
        # None: a line begins a text. Else it is a message.
        self.chat = Conversation(predictor.tokenizer, context) if predictor.chats else None
        # Before each turn of the text so far: its ids, and the text as shown.
        self.turns: list[tuple[list[int], str]] = []
        self.ids: list[int] = []
        self.shown = ""
        # Earlier texts.
        self.saved: list[str] = []
        self.tokens_read = self.tokens_drawn = 0
        self.seconds = 0.0

    def line(self, line: str) -> bool:
        """Do what a line says; return False to leave."""
        if line.startswith(":"):
            command, *arguments = line.split()
            if command == ":q" and not arguments:
                return False
            # With --json, stdout has nothing but JSON lines.
            out = sys.stderr if self.config.json else sys.stdout
            with contextlib.redirect_stdout(out):
                if command == ":stop":
                    self.config = set_stop(self.config, line)
                elif command == ":system" and self.chat is not None:
                    set_system(self.chat, line)
                elif command == ":help" and self.chat is not None:
                    print(CHAT_HELP)
                elif command in (":undo", ":reset", ":save", ":stats", ":experts"):
                    self.command(command, line.removeprefix(command).strip())
                else:
                    self.config = command_result(self.config, command, arguments)
                    note = self.predictor.top_k_note(self.config.top_k)
                    if command == ":k" and arguments and note:
                        print(note)
        elif self.chat is not None:
            if line.strip():
                self.turn(line[1:] if line.startswith(" :") else line, None)
        elif line.startswith("+"):
            if self.ids:
                self.turn(line[1:], self.ids)
            else:
                print("there is no text to continue: type a prompt")
        elif line.strip():
            self.begin()
            self.turn(line[1:] if line.startswith((" :", " +")) else line, None)
        return True

    def begin(self) -> None:
        """Move the text or chat so far to the earlier ones, and start a new one."""
        if self.shown:
            self.saved.append(self.shown)
        self.turns, self.ids, self.shown = [], [], ""
        if self.chat is not None:
            self.chat.turns = []

    def turn(self, prompt: str, before: list[int] | None) -> None:
        """Complete a prompt: of a new text, after the ids `before`, or as a chat's message."""
        predictor = self.predictor
        ids = None
        if self.chat is not None:
            ids, num_left_out = self.chat.ids_for(prompt, self.room())
            if num_left_out and not self.config.quiet:
                print(
                    f"note: chat and answer may fill the context of {self.chat.context_length} "
                    "tokens: the oldest turns are left out "
                    f"({num_left_out} of {len(self.chat.turns)})",
                    file=sys.stderr,
                )
        elif before is not None:
            # Continue where it ended, which is before the end-of-text token.
            has_end = before[-1] in predictor.stop_ids and len(before) > 1
            ids = before[:-1] if has_end else before
            ids = ids + predictor.tokenizer.encode_continuation(prompt)
            if isinstance(predictor.tokenizer, NoTokenizer):
                # Numbers stay apart from the ones before them.
                prompt = " " + prompt.strip() if prompt.strip() else ""
        self.turns.append((self.ids, self.shown))
        predictor.last = None
        try:
            show_completion(predictor, prompt, self.config, ids)
        finally:
            if last := predictor.last:
                new_ids = last.ids
                if last.ended == "stop text":
                    # Only the text before the stop text counts.
                    new_ids = predictor.tokenizer.encode_continuation(last.text)
                self.ids = last.prompt_ids + new_ids
                if self.chat is not None:
                    self.chat.add(prompt, last.text, new_ids)
                    self.shown = self.chat.as_json()
                else:
                    self.shown += prompt + last.text
                self.tokens_read += len(last.prompt_ids)
                self.tokens_drawn += len(last.ids)
                self.seconds += last.last_s
            else:
                self.turns.pop()

    def room(self) -> int:
        """Return how many tokens of the context an answer should find free."""
        return min(self.config.max_new_tokens, self.predictor.model.config.context_length // 2)

    def command(self, command: str, argument: str) -> None:
        """Execute :undo, :reset, :save, :stats or :experts; each prints a line."""
        if argument and command != ":save":
            print(f"{command} takes no value")
        elif command == ":save":
            self.save(argument)
        elif command == ":reset":
            self.begin()
            print("the next prompt starts a new " + ("text" if self.chat is None else "chat"))
        elif command == ":stats":
            self.stats()
        elif not self.ids:
            print("there is no text yet")
        elif command == ":undo":
            self.ids, self.shown = self.turns.pop()
            if self.chat is not None:
                self.chat.turns.pop()
                left = len(self.chat.turns)
                print(f"taken back; {left or 'no'} turn{'' if left == 1 else 's'} left")
            elif self.ids:
                print(f"taken back; the text so far: {visible(self.shown[-60:])!r}")
            else:
                print("taken back; there is no text now")
        else:
            self.predictor.last = Completion(self.ids)
            print(experts_map(self.predictor))

    def save(self, name: str) -> None:
        """Write the session's texts to a new file."""
        texts = [text for text in (*self.saved, self.shown) if text]
        kind, between = ("text", "\n\n") if self.chat is None else ("chat", "\n")
        name = os.path.expanduser(name)
        if not name:
            print("name a file: :save story.txt")
            return
        if not texts:
            print("there is no text yet")
            return
        if os.path.lexists(name):
            print(f"{visible(name)} is there already: name another file")
            return
        try:
            write_text_atomic(
                Path(name), between.join(texts).encode("utf-8", "replace").decode() + "\n"
            )
            print(f"saved {len(texts)} {kind}{'s' if len(texts) > 1 else ''} in {visible(name)}")
        except (OSError, ValueError) as error:
            print(f"{visible(name)} cannot be written: {getattr(error, 'strerror', None) or error}")

    def stats(self) -> None:
        """Print tokens, speed and memory."""
        model, texts = self.predictor.model, self.predictor.texts
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        rate = (
            f", {self.tokens_drawn / self.seconds:.1f} tokens/s, reading included"
            if self.seconds
            else ""
        )
        print(f"{self.tokens_drawn} tokens drawn for {self.tokens_read} read{rate}")
        decoder = self.predictor.decoder
        seen = min(len(self.ids), model.config.context_length)
        cache = sum(text.cache.num_bytes() for text in texts)
        way = "C decoder" if decoder.native else decoder.note or "PyTorch decodes, as asked for"
        print(
            f"{len(self.ids)} tokens of text, of which the model sees {seen}; "
            f"weights {human_bytes(weights)}, cache {human_bytes(cache)}; {way}"
        )


def typed_command(line: str) -> str:
    """Return the command that a person means who types a word of other programs, else the line."""
    return MEANT.get(line.strip().lower(), line)


def greeting(predictor: Predictor) -> str:
    """Return what is loaded: preset or model, its size, its step and the file."""
    origin, config = predictor.origin, predictor.model.config
    count = known.counts(config)
    active = f" ({human_count(count.active)} active)" if count.active < count.total else ""
    parts = [
        origin.run.get("imported_from") or preset_of(origin.model_config),
        f"{human_count(count.total)} parameters{active}",
        f"step {origin.step:,}" if origin.step else "",
        str(origin.path),
    ]
    return visible(", ".join(part for part in parts if part))


def preset_of(config: ModelConfig) -> str:
    """Return the preset that has this architecture; "" for another model.

    The vocabulary may be any, and so may what acts before and in training alone.
    """
    free = ("vocabulary_size", "init_std", "dropout", "aux_loss_coef", "z_loss_coef")
    for name, preset in PRESETS.items():
        changes = {field: getattr(config, field) for field in free}
        if ModelConfig(**preset.model | changes) == config:
            return name
    return ""


def repl(predictor: Predictor, config: PredictConfig) -> None:
    """Read prompts and commands from stdin until :q or end-of-file. Nothing else ends it.

    On a terminal, exit and quit leave too. A pipe is a list of prompts, and any word may be one.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    state = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    history = state / "gptoss" / "history"
    if interactive:
        read_history(history)
        if not config.quiet:
            print(greeting(predictor))
            ask = "a message" if predictor.chats else "the beginning of a text"
            print(f"Type {ask}; exit to leave, :help for commands.")
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
                if not session.line(typed_command(line) if sys.stdin.isatty() else line):
                    return
            except KeyboardInterrupt:
                continue
            except (ValueError, RuntimeError) as error:
                # Out of memory, for example: the model is loaded, and the next prompt may work.
                print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    finally:
        if interactive:
            write_history(history)


def read_history(path: Path) -> None:
    """Turn on line editing for input(), and read what was typed in earlier sessions."""
    # Windows has its own line editing; the first session has no file.
    with contextlib.suppress(ImportError, OSError):
        import readline

        readline.set_history_length(1000)
        readline.read_history_file(path)


def write_history(path: Path) -> None:
    """Write what was typed, readable by this user only; ignore a folder that is not writable."""
    with contextlib.suppress(ImportError, OSError):
        import readline

        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)


def set_system(chat: Conversation, line: str) -> None:
    """Do what `:system TEXT` says, and print the system message; without TEXT nothing changes."""
    if text := line.removeprefix(":system").strip():
        chat.system = "" if text == '""' else text
    print(f"system = {visible(chat.system)!r}" if chat.system else "system = no message")


def set_stop(config: PredictConfig, line: str) -> PredictConfig:
    """Return the settings after `:stop TEXT`, and print them; without TEXT nothing changes."""
    text = line.removeprefix(":stop").removeprefix(" ")
    if text.strip():
        config = dataclasses.replace(
            config, stop=() if text.strip() == '""' else (text.replace("\\n", "\n"),)
        )
    print(f"stop = {', '.join(map(repr, config.stop)) or 'no text'}")
    return config


def command_result(config: PredictConfig, command: str, arguments: list[str]) -> PredictConfig:
    """Return the settings after a command, and print a line; a mistake changes nothing."""
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
                    number = "a whole number" if kind is int else "a number"
                    given = visible(arguments[0])
                    raise ValueError(f"{name} must be {number}, not {given!r}") from None
                config = dataclasses.replace(config, **{name: value})
            print(f"{name} = {getattr(config, name)}")
        except (ValueError, OverflowError) as error:
            print(f"{error}; it stays {getattr(config, name)}")
    return config
