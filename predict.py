"""Checkpoint -> text.

    python predict.py --prompt "Once upon a time"       one answer, streamed as it is drawn
    python predict.py                                   a prompt to type at (:help says what it understands)
    echo "Once upon a time" | python predict.py         the prompt comes through a pipe
    python predict.py --prompt_file prompts.jsonl --num_samples 4 --json

A prompt begins a document: it is put behind an end-of-text token, as in training (an imported model: behind what its tokenizer puts there). When prompt and answer fill the context,
generation goes on from the newer half of it (--when_full slide) or ends (--when_full stop); a prompt that is longer than
the context is read from its last tokens on. What was printed stays printed. Text goes to stdout, what is about it to stderr.
"""

from __future__ import annotations

from runtime import process

process.before_torch()  # here, for PyTorch reads it when it loads
# ruff: noqa: E402

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from config_model import check_fields, option
from model import LLM
from runtime import cli, cpu_decode
from runtime.checkpoint import load_model, tokenizer_of
from runtime.device import choose_device, choose_dtype, choose_kernels, explained_out_of_memory
from runtime.expert_map import html_page, text_map
from runtime.files import write_text_atomic
from runtime.inference import Decoder, Text, generate, router_choices
from runtime.quantize import quantize_
from runtime.text import UntilText, human_bytes, visible
from runtime.tokenizer import TokenStream


@dataclass(frozen=True)
class PredictConfig:
    """How text is generated."""

    ckpt: str = option(
        "checkpoints/latest.pt", "checkpoint to load, ours or the reference's format"
    )
    # what is drawn
    max_new_tokens: int = option(200, "most tokens in an answer", minimum=1, maximum=100_000_000)
    temperature: float = option(
        0.9,
        "0 takes the likeliest token; 1 draws from the model's own distribution",
        minimum=0.0,
        maximum=1e30,
    )
    top_k: int = option(50, "draw from the k likeliest tokens only; 0 = all", minimum=0)
    top_p: float = option(
        1.0, "draw from the fewest tokens whose probabilities reach p", minimum=1e-9, maximum=1.0
    )
    min_p: float = option(
        0.0,
        "draw only from tokens at least this many times as likely as the likeliest; 0 = off",
        minimum=0.0,
        maximum=1.0,
    )
    repetition_penalty: float = option(
        1.0,
        "above 1: tokens that are in the context already are less likely; 1 = off",
        minimum=1e-3,
        maximum=1e3,
    )
    stop: tuple = option((), "end an answer before this text; may be given more than once")
    seed: int = option(
        -1,
        "the same seed and settings give the same text; -1 = another each time",
        minimum=-1,
        maximum=2**63 - 1,
    )
    # many answers
    prompt_file: str = option(
        "", 'file of prompts: a line each, or .jsonl with {"prompt": ...} or {"text": ...}'
    )
    num_samples: int = option(
        1,
        "answers to each prompt; with a seed, answer i has seed + i",
        minimum=1,
        maximum=1_000_000,
    )
    batch_size: int = option(
        8, "answers that are generated at the same time", minimum=1, maximum=4_096
    )
    # the context
    when_full: str = option(
        "slide",
        "at the end of the context: slide (forget its older half and go on) or stop",
        choices=("slide", "stop"),
    )
    context_length: int = option(
        0,
        "tokens to attend over, also beyond the trained context if the model has no position table; 0 = as trained",
        minimum=0,
        maximum=16_777_216,
    )
    rope_scaling: str = option(
        "none",
        "with a longer context_length: none, linear (position interpolation) or yarn",
        choices=("none", "linear", "yarn"),
    )
    tokenizer: str = option(
        "",
        "tokenizer for a checkpoint that carries none (o200k_base, byte, ..., a folder of prepare_data.py or of a published model); default: the checkpoint's",
    )
    # how it runs
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option(
        "auto",
        "weights and arithmetic; auto = the best for the device",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantize: str = option(
        "none",
        "int8: experts, attention and head in 8 bits; faster on a CPU, less memory everywhere",
        choices=("none", "int8"),
    )
    lookup: int = option(
        0,
        "guess up to this many tokens at once from earlier text, and check them in one pass; the same answer, sooner where text repeats; 0 = off",
        minimum=0,
        maximum=64,
    )
    c_kernel: bool = option(True, "on a CPU: decode by C code, where it gives the model's logits")
    compile: bool = option(
        False,
        "on a GPU: also compile the step of the CUDA graph, which takes a while before the first token",
    )
    num_threads: int = option(
        0, "CPU threads; 0 = the cores that this process may use", minimum=0, maximum=4_096
    )
    # what is shown
    json: bool = option(False, "one JSON object a line for each answer, when it is complete")
    quiet: bool = option(False, "text alone: no notes, no figures, no greeting")
    show_experts: bool = option(
        False, "after an answer: which experts each of its tokens went to, block by block"
    )
    experts_html: str = option("", "write a page that shows the same, token by token, to this file")
    interactive: bool = option(False, "a prompt to type at even where stdin is a pipe")

    def __post_init__(self):
        check_fields(self)
        if self.rope_scaling != "none" and not self.context_length:
            raise ValueError(
                f"rope_scaling {self.rope_scaling} needs a context_length to stretch to"
            )
        if (
            self.num_samples > 1
            and (self.experts_html or self.show_experts)
            or self.prompt_file
            and (self.experts_html or self.show_experts)
        ):
            raise ValueError(
                "show_experts and experts_html are for one answer: leave prompt_file and num_samples out, or these"
            )


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


@dataclass
class Answer:
    """An answer, while and after it is generated."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)  # drawn so far, end-of-text included
    text: str = ""
    ended: str = "interrupted"  # or: end of text, stop text, length, context
    first_s: float | None = None  # seconds to the first token
    last_s: float = 0.0  # seconds to the last token

    @property
    def tokens_per_sec(self) -> float | None:
        """After the first token; None where there are not two."""
        return (
            (len(self.ids) - 1) / max(self.last_s - self.first_s, 1e-9)
            if len(self.ids) > 1
            else None
        )


class Predictor:
    """A model, its tokenizer, and how to draw from it."""

    def __init__(self, config: PredictConfig):
        if config.ckpt == PredictConfig.ckpt and not os.path.exists(config.ckpt):
            raise ValueError(
                f"there is no {config.ckpt} yet: train a model first (python train.py, or make demo), or give --ckpt FILE"
            )
        self.device = device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        if (
            config.dtype == "auto"
            and device.type == "cpu"
            and (not config.c_kernel or config.quantize != "none" or cpu_decode.library()[0])
        ):
            dtype = torch.float32  # what runtime/cpu_decode.c reads; bfloat16 products, where a CPU has them, are for training
        if config.compile and device.type != "cuda":
            raise ValueError(f"compile is for CUDA graphs, and this runs on {device}: leave it out")
        torch.set_num_threads(
            config.num_threads or min(torch.get_num_threads(), process.usable_cores())
        )
        with explained_out_of_memory(
            device, "use --dtype bfloat16, --quantize int8, another --device or a smaller model"
        ):
            self.model, checkpoint = load_model(config.ckpt, device, dtype)
            choose_kernels(self.model, device, dtype)
            if config.quantize == "int8":
                quantize_(self.model)
        self.tokenizer = tokenizer_of(checkpoint, config.tokenizer)
        if config.context_length:
            _set_context(self.model, config)
        if config.lookup and any(
            self.model.config.window(block) for block in range(self.model.config.transformer_blocks)
        ):
            raise ValueError(
                "lookup takes back tokens, and this model's windowed blocks keep only their window: leave lookup out"
            )
        self.decoder = Decoder(self.model, config.c_kernel, config.compile, checkpoint.digest)
        if self.decoder.note and not config.quiet:
            print(f"note: {self.decoder.note}", file=sys.stderr)
        self.texts: list[Text] = []
        self.last: Answer | None = None
        vocabulary = self.model.config.vocabulary_size
        self.banned_ids = [i for i in self.tokenizer.undecodable_ids if i < vocabulary] + list(
            range(self.tokenizer.vocabulary_size, vocabulary)
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """A prompt as the beginning of a document. (Something is always before the first token that is drawn.)"""
        start = self.tokenizer.start_id
        return ([] if start is None else [start]) + self.tokenizer.encode(prompt) or [
            self.tokenizer.end_of_text_id
        ]

    def stream(
        self,
        prompt: str | list[int],
        config: PredictConfig,
        note: Callable[[str], object] = lambda line: None,
    ) -> Iterator[str]:
        """The answer to a prompt (or to ids, as they are) in pieces of whole characters. `note` is told, in a line, what the context's limit did."""
        ids, context = (
            self.prompt_ids(prompt) if isinstance(prompt, str) else prompt,
            self.model.config.context_length,
        )
        if len(ids) > context:
            note(
                f"the prompt has {len(ids)} tokens and the context {context}: reading its last {context}"
            )
        if min(len(ids), context) + config.max_new_tokens - 1 > context:
            then = (
                "older text is forgotten"
                if config.when_full == "slide"
                else "the answer ends there"
            )
            note(f"prompt and answer may fill the context of {context} tokens: {then} if they do")
        self.last = Answer(ids)
        return (piece for _, piece in self.answer([self.last], config, [config.seed]))

    def answer(
        self, answers: Sequence[Answer], config: PredictConfig, seeds: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Generate some answers at the same time: (which, piece of text) as they come. A token gives a piece, which may be empty, and an answer's end another."""
        generators = [torch.Generator(self.device) for _ in answers]
        for generator, seed in zip(generators, seeds, strict=True):
            generator.seed() if seed < 0 else generator.manual_seed(seed)
        texts = self._texts(
            len(answers), max(len(a.prompt_ids) for a in answers) + config.max_new_tokens
        )
        streams, untils = (
            [TokenStream(self.tokenizer) for _ in answers],
            [UntilText(config.stop) for _ in answers],
        )
        ends, finished, started = self.tokenizer.stop_ids, set(), time.perf_counter()
        for step in generate(
            self.decoder,
            texts,
            [a.prompt_ids for a in answers],
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop_ids=list(ends),
            banned_ids=self.banned_ids,
            generators=generators,
            slide=config.when_full == "slide",
            lookup=config.lookup,
            finished=finished,
        ):
            now = time.perf_counter() - started
            for row, token in step:
                a, until = answers[row], untils[row]
                a.ids.append(token)
                a.first_s, a.last_s = a.first_s or now, now
                piece, stopped = (
                    until.push(streams[row].push(token)) if token not in ends else ("", False)
                )
                a.text += piece
                if token not in ends:
                    yield row, piece
                if stopped:
                    a.ended = "stop text"
                    finished.add(row)
                elif row in finished:
                    a.ended = (
                        "end of text"
                        if token in ends
                        else "length"
                        if len(a.ids) == config.max_new_tokens
                        else "context"
                    )
                    piece, stopped = until.push(streams[row].flush())
                    piece += "" if stopped else until.held
                    a.text += piece
                    yield row, piece

    def _texts(self, count: int, tokens: int) -> list[Text]:
        """Texts with room for so many tokens: those of the last answer, which may hold the beginning of this one, if they have it."""
        context = self.model.config.context_length
        tokens = context if self.decoder.compiles else min(tokens, context)
        if len(self.texts) != count or self.texts[0].cache.max_tokens < tokens:
            self.texts = []  # first, so that both are never there at once
            self.texts = self.decoder.texts(count, min(context, 1 << (tokens - 1).bit_length()))
        return self.texts


def _set_context(model: LLM, config: PredictConfig) -> None:
    """Let the model attend over config.context_length tokens. Raises ValueError where a learned table has no more positions."""
    c = model.config
    if config.context_length > c.context_length and c.use_attention_bias:
        raise ValueError(
            f"context_length {config.context_length} is beyond the trained {c.context_length}, and this model has a learned bias for each pair of positions "
            "(use_attention_bias), none further out: only a model without that table can be stretched"
        )
    trained = c.context_length / c.rope_scaling_factor
    changes = {"context_length": config.context_length}
    if config.rope_scaling != "none":
        if config.context_length <= trained:
            raise ValueError(
                f"rope_scaling {config.rope_scaling} stretches a context, and {config.context_length} is not more than the trained {trained:.0f} tokens"
            )
        changes |= {
            "rope_scaling": config.rope_scaling,
            "rope_scaling_factor": config.context_length / trained,
        }
        changes |= (
            {} if config.rope_scaling == "yarn" else {"yarn_truncate": True}
        )  # of no meaning there
    elif (
        c.rope_scaling == "yarn" and config.context_length != c.context_length
    ):  # its frequencies depend on the context's length
        raise ValueError(
            f"this model's positions are yarn-scaled from {trained:.0f} to {c.context_length} tokens: with context_length, say --rope_scaling yarn or linear"
        )
    model.config = dataclasses.replace(c, **changes)


# ---------------------------------------------------------------------------------------------------------------- one shot
def show_answer(
    predictor: Predictor, prompt: str, config: PredictConfig, ids: list[int] | None = None
) -> None:
    """Stream one answer to stdout, prompt first; what is about it, to stderr. ids: what the model is to continue, if that is more than the prompt."""
    terminal = sys.stdout.isatty()

    def show(text: str, style: str = "") -> None:
        text = visible(text) if terminal else text
        print(styled(text, style, sys.stdout) if text else "", end="", flush=True)

    def note(line: str) -> None:
        if not config.quiet:
            print(f"note: {line}", file=sys.stderr, flush=True)

    stream = predictor.stream(prompt if ids is None else ids, config, note)
    if not config.json:
        show(prompt, BOLD)
    try:
        with explained_out_of_memory(
            predictor.device, "lower --context_length or use --dtype bfloat16"
        ):
            for piece in stream:
                if not config.json:
                    show(piece)
    except KeyboardInterrupt:
        if config.json:
            print_json(predictor, prompt, predictor.last, config, config.seed)
        raise
    finally:
        if not config.json:
            print(flush=True)
    if config.json:
        print_json(predictor, prompt, predictor.last, config, config.seed)
    elif (
        not config.quiet
        and sys.stderr.isatty()
        and predictor.last
        and (rate := predictor.last.tokens_per_sec)
    ):
        print(
            styled(
                f"[{len(predictor.last.ids)} tokens, {rate:.1f} tokens/s, first after {1000 * predictor.last.first_s:.0f} ms]",
                DIM,
                sys.stderr,
            ),
            file=sys.stderr,
        )
    if config.show_experts and not config.json:
        print(experts_map(predictor))
    if config.experts_html:
        write_experts_page(predictor, config)


def show_answers(predictor: Predictor, prompts: Sequence[str], config: PredictConfig) -> None:
    """Answers to many prompts, batch_size at a time, in the prompts' order: JSON lines, or texts with an empty line between them."""
    jobs = [
        (prompt, config.seed if config.seed < 0 else (config.seed + i) % 2**63)
        for prompt in prompts
        for i in range(config.num_samples)
    ]
    for first in range(0, len(jobs), config.batch_size):
        batch = jobs[first : first + config.batch_size]
        answers = [Answer(predictor.prompt_ids(prompt)) for prompt, _ in batch]
        started, shown = time.perf_counter(), 0

        def show(all_of_them: bool, batch=batch, answers=answers, first=first) -> None:
            """Those that have ended, as far as all before them have too."""
            nonlocal shown
            while shown < len(answers) and (all_of_them or answers[shown].ended != "interrupted"):
                (prompt, seed), a = batch[shown], answers[shown]
                if config.json:
                    print_json(predictor, prompt, a, config, seed)
                else:
                    text = prompt + a.text
                    print(
                        ("\n" if first + shown else "")
                        + (visible(text) if sys.stdout.isatty() else text),
                        flush=True,
                    )
                shown += 1

        try:
            with explained_out_of_memory(
                predictor.device, "lower --batch_size or --context_length, or use --dtype bfloat16"
            ):
                for _ in predictor.answer(answers, config, [seed for _, seed in batch]):
                    show(False)
        except KeyboardInterrupt:
            show(True)
            raise
        seconds = time.perf_counter() - started
        show(True)
        if not config.quiet and sys.stderr.isatty():
            print(
                styled(
                    f"[{len(batch)} answers, {sum(len(a.ids) for a in answers) / seconds:.1f} tokens/s together]",
                    DIM,
                    sys.stderr,
                ),
                file=sys.stderr,
            )


def print_json(
    predictor: Predictor, prompt: str, a: Answer, config: PredictConfig, seed: int
) -> None:
    """One line: the answer, and what is about it. Everything outside ASCII is escaped, so any console can take it."""
    record = {
        "prompt": prompt,
        "text": a.text,
        "ended": a.ended,
        "seed": seed,
        "prompt_tokens": len(a.prompt_ids),
        "new_tokens": len(a.ids),
        "seconds_to_first_token": a.first_s,
        "tokens_per_sec": a.tokens_per_sec,
    }
    if config.show_experts:
        experts, gates = router_choices(predictor.model, last_text_ids(predictor))
        record |= {"experts": experts.tolist(), "gates": gates.tolist()}
    print(json.dumps(record), flush=True)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file; empty lines are none. ValueError, naming the line, for what is no text or no such JSON."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}"
        ) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip() and path.endswith(".jsonl"):
            try:
                record = json.loads(line)
                line = record["prompt"] if "prompt" in record else record["text"]
                if not isinstance(line, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(
                    f'{path}, line {number}: not a JSON object with a string as "prompt" or "text"'
                ) from None
            prompts.append(line)
        elif line.strip():
            prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


# -------------------------------------------------------------------------------------------------------------- the experts
def last_text_ids(predictor: Predictor) -> list[int]:
    """Prompt and answer of the last text, as far as the context holds them."""
    return (predictor.last.prompt_ids + predictor.last.ids)[
        -predictor.model.config.context_length :
    ]


def experts_map(predictor: Predictor) -> str:
    """The last text's tokens and their experts, for stdout."""
    ids = last_text_ids(predictor)
    return text_map(
        [predictor.tokenizer.decode([i]) for i in ids],
        *router_choices(predictor.model, ids),
        predictor.model.config.num_experts,
        has_colour(sys.stdout),
        shutil.get_terminal_size((100, 24)).columns,
    )


def write_experts_page(predictor: Predictor, config: PredictConfig) -> None:
    """Write config.experts_html."""
    ids = last_text_ids(predictor)
    answer = predictor.last
    page = html_page(
        "Which experts a text went to",
        [predictor.tokenizer.decode([i]) for i in ids],
        *router_choices(predictor.model, ids),
        predictor.model.config.num_experts,
        max(0, len(ids) - len(answer.ids)),
        f"{os.path.basename(config.ckpt)}, temperature {config.temperature:g}",
    )
    try:
        write_text_atomic(Path(config.experts_html), page)
    except OSError as error:
        raise ValueError(
            f"{config.experts_html} cannot be written: {error.strerror or error}"
        ) from error
    if not config.quiet:
        print(f"wrote {config.experts_html}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- the terminal
BOLD, DIM = "1", "2"


def has_colour(stream) -> bool:
    """Whether a stream is a terminal that takes colours (https://no-color.org)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def styled(text: str, style: str, stream) -> str:
    """`text` in a style, on a terminal that has styles."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and has_colour(stream) else text


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


def main(argv: list[str] | None = None) -> int:
    gc.freeze()  # what is imported stays: to look for garbage in it takes a tenth of a second
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--prompt",
        help="text to continue; without it, stdin if that is a pipe, else a prompt to type at",
    )
    cli.add_fields(parser, PredictConfig)
    args = vars(parser.parse_args(argv))
    prompt = args.pop("prompt")
    config = PredictConfig(**args)
    if prompt is not None and config.prompt_file:
        raise ValueError("give either prompt or prompt_file, not both")
    prompts = read_prompts(config.prompt_file) if config.prompt_file else [prompt]
    if config.interactive and prompts != [None]:
        raise ValueError("interactive asks for prompts itself: leave prompt and prompt_file out")
    if prompts == [None] and config.num_samples > 1 and (config.interactive or sys.stdin.isatty()):
        raise ValueError(
            "num_samples is for a prompt or a prompt_file, not for a prompt to type at"
        )
    if (
        config.experts_html
        and (
            folder := next(
                p for p in Path(os.path.abspath(config.experts_html)).parents if os.path.lexists(p)
            )
        )
        and not (folder.is_dir() and os.access(folder, os.W_OK))
    ):
        raise ValueError(
            f"{config.experts_html} cannot be written: {folder} is no folder that can be written to"
        )
    predictor = Predictor(config)
    if prompts == [None] and not config.interactive and not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        prompts = [sys.stdin.read().removesuffix("\n").removesuffix("\r")]
    if prompts == [None]:
        repl(predictor, config)
    elif len(prompts) > 1 or config.num_samples > 1 or config.prompt_file:
        show_answers(predictor, prompts, config)
    else:
        show_answer(predictor, prompts[0], config)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
