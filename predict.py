"""Checkpoint -> text.

    python predict.py --prompt "Once upon a time"       one answer, streamed as it is drawn
    python predict.py                                   a prompt to type at (:help says what it understands)

A prompt begins a document: it is put behind an end-of-text token, as in training. When prompt and answer fill the context,
generation goes on from the newer half of it (--when_full slide) or ends (--when_full stop); a prompt that is longer than
the context is read from its last tokens on. What was printed stays printed.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from config_model import check_fields, option
from model import LLM, generate
from runtime import cli
from runtime.checkpoint import Checkpoint, load_model
from runtime.data import MANIFEST, TokenShards
from runtime.device import choose_device, choose_dtype, choose_kernels, explained_out_of_memory
from runtime.text import UntilText, visible
from runtime.tokenizer import NAMED, Tokenizer, TokenStream, load_tokenizer


@dataclass(frozen=True)
class PredictConfig:
    """How text is generated."""
    ckpt: str = option("checkpoints/latest.pt", "checkpoint to load, ours or the reference's format")
    max_new_tokens: int = option(200, "most tokens in an answer", minimum=1, maximum=100_000_000)
    temperature: float = option(0.9, "0 takes the likeliest token; 1 draws from the model's own distribution", minimum=0.0, maximum=1e30)
    top_k: int = option(50, "draw from the k likeliest tokens only; 0 = all", minimum=0)
    top_p: float = option(1.0, "draw from the fewest tokens whose probabilities reach p", minimum=1e-9, maximum=1.0)
    min_p: float = option(0.0, "draw only from tokens at least this many times as likely as the likeliest; 0 = off", minimum=0.0, maximum=1.0)
    repetition_penalty: float = option(1.0, "above 1: tokens that are in the context already are less likely; 1 = off", minimum=1e-3, maximum=1e3)
    stop: tuple = option((), "end an answer before this text; may be given more than once")
    seed: int = option(-1, "the same seed and settings give the same text; -1 = another each time", minimum=-1, maximum=2**63 - 1)
    when_full: str = option("slide", "at the end of the context: slide (forget its older half and go on) or stop", choices=("slide", "stop"))
    context_length: int = option(0, "tokens to attend over, also beyond the trained context if the model has no position table; 0 = as trained", minimum=0, maximum=16_777_216)
    rope_scaling: str = option("none", "with a longer context_length: none, linear (position interpolation) or yarn", choices=("none", "linear", "yarn"))
    tokenizer: str = option("", "tokenizer for a checkpoint that carries none (o200k_base, byte, ..., or a folder of prepare_data.py); default: the checkpoint's")
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option("auto", "weights and arithmetic; auto = the best for the device", choices=("auto", "bfloat16", "float16", "float32"))

    def __post_init__(self):
        check_fields(self)
        if self.rope_scaling != "none" and not self.context_length:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs a context_length to stretch to")


COMMANDS = {  # REPL command -> (field, what it does)
    ":t": ("temperature", "temperature, 0 = greedy"),
    ":k": ("top_k", "draw from the k likeliest, 0 = all"),
    ":p": ("top_p", "draw from the likeliest that reach p"),
    ":m": ("min_p", "draw from those at least m times as likely as the likeliest"),
    ":r": ("repetition_penalty", "above 1: repeat less"),
    ":n": ("max_new_tokens", "most tokens in an answer"),
    ":stop": ("stop", r"end an answer before this text, \n a line break, \"\" no text"),
    ":seed": ("seed", "seed, -1 = another each time"),
}
HELP = "\n".join([f"  {name + ' <value>':16} {text}" for name, (_, text) in COMMANDS.items()] + [
    "  :help            this", "  :q               leave (so does end-of-file, Ctrl-D)", "  Ctrl-C           stop the answer",
    "  anything else is a prompt; one that begins with a colon can be typed after a space"])


class Predictor:
    """A model, its tokenizer, and how to draw from it."""

    def __init__(self, config: PredictConfig):
        if config.ckpt == PredictConfig.ckpt and not os.path.exists(config.ckpt):
            raise ValueError(f"there is no {config.ckpt} yet: train a model first (python train.py, or make demo), or give --ckpt FILE")
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, device)
        with explained_out_of_memory(device, "use --dtype bfloat16, another --device or a smaller model"):
            self.model, checkpoint = load_model(config.ckpt, device, dtype)
            choose_kernels(self.model, device, dtype)
        self.tokenizer = _tokenizer(config, checkpoint)
        if config.context_length:
            _set_context(self.model, config)
        self.device = device
        vocabulary = self.model.config.vocabulary_size
        self.banned_ids = [i for i in self.tokenizer.undecodable_ids if i < vocabulary] + list(range(self.tokenizer.vocabulary_size, vocabulary))

    def stream(self, prompt: str, config: PredictConfig, note=lambda line: None) -> Iterator[str]:
        """The answer to `prompt` in pieces of whole characters. `note` is told, in a line, what the context's limit did."""
        ids, context = [self.tokenizer.end_of_text_id] + self.tokenizer.encode(prompt), self.model.config.context_length
        if len(ids) > context:
            note(f"the prompt has {len(ids)} tokens and the context {context}: reading its last {context}")
        if min(len(ids), context) + config.max_new_tokens - 1 > context:
            then = "older text is forgotten" if config.when_full == "slide" else "the answer ends there"
            note(f"prompt and answer may fill the context of {context} tokens: {then} if they do")
        return self._pieces(ids, config)

    def _pieces(self, ids: list[int], config: PredictConfig) -> Iterator[str]:
        generator = torch.Generator(self.device)
        if config.seed < 0:
            generator.seed()
        else:
            generator.manual_seed(config.seed)
        text, until = TokenStream(self.tokenizer), UntilText(config.stop)
        drawn = generate(self.model, torch.tensor([ids], device=self.device), config.max_new_tokens, temperature=config.temperature, top_k=config.top_k,
                         top_p=config.top_p, stop_ids=[self.tokenizer.end_of_text_id], banned_ids=self.banned_ids, generator=generator,
                         slide=config.when_full == "slide", min_p=config.min_p, repetition_penalty=config.repetition_penalty)
        for token in drawn:
            if token.item() != self.tokenizer.end_of_text_id:
                piece, stopped = until.push(text.push(token.item()))
                yield piece
                if stopped:
                    return
        piece, stopped = until.push(text.flush())
        yield piece if stopped else piece + until.held


def _tokenizer(config: PredictConfig, checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer; --tokenizer only where it carries none. Raises ValueError if they do not go together."""
    vocabulary = checkpoint.model_config.vocabulary_size
    if checkpoint.tokenizer_state:
        tokenizer = Tokenizer.from_state(checkpoint.tokenizer_state)
        if config.tokenizer and _named_tokenizer(config.tokenizer).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{config.ckpt} was trained with tokenizer {tokenizer.name}, not {config.tokenizer}: leave --tokenizer out")
    elif config.tokenizer or vocabulary == 200_019:  # the reference's checkpoints name none and always are o200k_base
        tokenizer = _named_tokenizer(config.tokenizer or "o200k_base")
    else:
        raise ValueError(f"{config.ckpt} does not say which tokenizer it was trained with (vocabulary {vocabulary:,}): name it with --tokenizer")
    if tokenizer.vocabulary_size > vocabulary:
        raise ValueError(f"tokenizer {tokenizer.name} has {tokenizer.vocabulary_size:,} ids and the model in {config.ckpt} {vocabulary:,}: give the one that it was trained with")
    return tokenizer


def _named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, or that of the shards in the folder `name` (data, or data/train)."""
    if name in (*NAMED, "byte") or not os.path.isdir(name):
        return load_tokenizer(name)
    folder = Path(name)
    shards = TokenShards(folder if (folder / MANIFEST).exists() else folder / "train", verify=False)
    return Tokenizer.from_state(shards.tokenizer_state)


def _set_context(model: LLM, config: PredictConfig) -> None:
    """Let the model attend over config.context_length tokens. Raises ValueError where a learned table has no more positions."""
    c = model.config
    if config.context_length > c.context_length and c.use_attention_bias:
        raise ValueError(f"context_length {config.context_length} is beyond the trained {c.context_length}, and this model has a learned bias for each pair of positions "
                         "(use_attention_bias), none further out: only a model without that table can be stretched")
    trained = c.context_length / c.rope_scaling_factor
    changes = {"context_length": config.context_length}
    if config.rope_scaling != "none":
        if config.context_length <= trained:
            raise ValueError(f"rope_scaling {config.rope_scaling} stretches a context, and {config.context_length} is not more than the trained {trained:.0f} tokens")
        changes |= {"rope_scaling": config.rope_scaling, "rope_scaling_factor": config.context_length / trained}
    elif c.rope_scaling == "yarn" and config.context_length != c.context_length:  # its frequencies depend on the context's length
        raise ValueError(f"this model's positions are yarn-scaled from {trained:.0f} to {c.context_length} tokens: with context_length, say --rope_scaling yarn or linear")
    model.config = dataclasses.replace(c, **changes)


def answer(predictor: Predictor, prompt: str, config: PredictConfig) -> None:
    """Stream one answer to stdout, prompt first; what is about it, to stderr."""
    terminal = sys.stdout.isatty()
    started, first, pieces = time.perf_counter(), None, 0

    def show(text: str) -> None:
        print(visible(text) if terminal else text, end="", flush=True)

    stream = predictor.stream(prompt, config, lambda line: print(f"note: {line}", file=sys.stderr, flush=True))
    show(prompt)
    try:
        with explained_out_of_memory(predictor.device, "lower --context_length or use --dtype bfloat16"):
            for piece in stream:
                first = first or time.perf_counter()
                pieces += 1
                show(piece)
    finally:
        print(flush=True)
    if sys.stderr.isatty() and pieces > 2:
        print(f"\x1b[2m[{pieces - 1} tokens, {(pieces - 2) / max(time.perf_counter() - first, 1e-9):.1f} tokens/s, first after {first - started:.2f} s]\x1b[0m", file=sys.stderr)


def repl(predictor: Predictor, config: PredictConfig) -> None:
    """Prompts and commands from stdin until :q or end-of-file. Nothing else ends it."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401  line editing and history for input()
        print("Type the beginning of a text; :help for commands.")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            if line.startswith(":"):
                command, *arguments = line.split()
                if command == ":q" and not arguments:
                    return
                config = set_stop(config, line) if command == ":stop" else command_result(config, command, arguments)
            elif line.strip():
                answer(predictor, line[1:] if line.startswith(" :") else line, config)
        except KeyboardInterrupt:
            continue
        except (ValueError, RuntimeError) as error:  # out of memory, say: the model is loaded, the next answer may work
            print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)


def set_stop(config: PredictConfig, line: str) -> PredictConfig:
    """The settings after `:stop TEXT`, which answers with a line; without TEXT nothing changes."""
    text = line.removeprefix(":stop").removeprefix(" ")
    if text.strip():
        config = dataclasses.replace(config, stop=() if text.strip() == '""' else (text.replace("\\n", "\n"),))
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
                    raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, not {visible(arguments[0])!r}") from None
                config = dataclasses.replace(config, **{name: value})
            print(f"{name} = {getattr(config, name)}")
        except (ValueError, OverflowError) as error:
            print(f"{error}; it stays {getattr(config, name)}")
    return config


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--prompt", help="text to continue; without it, a prompt to type at")
    cli.add_fields(parser, PredictConfig)
    args = vars(parser.parse_args(argv))
    prompt = args.pop("prompt")
    config = PredictConfig(**args)
    predictor = Predictor(config)
    if prompt is None:
        repl(predictor, config)
    else:
        answer(predictor, prompt, config)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
