"""Complete prompts with the model of a checkpoint.

Read from the top: `LoadedModel` has model, tokenizer and Decoder, and renders prompts; the server
uses it, too. Of a `Predictor`, `stream` completes one prompt, and `complete` generates several
completions at the same time. A Completion holds what was generated, also while it grows.
runtime/inference/console.py prints it.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from config_model import PredictConfig
from model import LLM
from runtime.base import process
from runtime.base.device import choose_device, choose_dtype, explained_out_of_memory
from runtime.base.text import UntilText
from runtime.checkpoint.read import load_model
from runtime.data.chat import has_chat
from runtime.data.chat import prompt_ids as chat_prompt_ids
from runtime.data.tokenizer import NONE, NoTokenizer, TokenStream
from runtime.data.tokenizers import tokenizer_of
from runtime.inference import cpu_decode
from runtime.inference.decoder import Decoder, Text, generate
from runtime.inference.quantize import quantize_
from runtime.kernels.choose import choose_kernels

# A small trained model that comes with the repository; python -m scripts.make_stories made it.
READY = Path(__file__).parents[2] / "public" / "stories.pt"


# A text, or the messages of a chat.
Prompt = str | list[dict]


@dataclass
class Completion:
    """A completion, while and after it is generated."""

    prompt_ids: list[int]
    # Generated so far, end-of-text included.
    ids: list[int] = field(default_factory=list)
    text: str = ""
    # Or: end of text, stop text, length, context.
    ended: str = "interrupted"
    # Seconds to the first and to the last token.
    first_s: float | None = None
    last_s: float = 0.0

    @property
    def tokens_per_sec(self) -> float | None:
        """Return the rate after the first token; None if there are fewer than two tokens."""
        if len(self.ids) < 2:
            return None
        assert self.first_s is not None
        return (len(self.ids) - 1) / max(self.last_s - self.first_s, 1e-9)


class LoadedModel:
    """A checkpoint's model, its tokenizer, and the decoder that runs it; prints nothing."""

    def __init__(self, config: PredictConfig):
        if config.ckpt == PredictConfig.ckpt and not os.path.exists(config.ckpt):
            ready = f", or try --ckpt {_shown(READY)}" if READY.exists() else ""
            raise ValueError(
                f"there is no {config.ckpt} yet: train a model first (python train.py, or make "
                f"demo), or give --ckpt FILE{ready}"
            )
        if config.tokenizer == NONE:
            _refuse_stop(config)
        self.device = device = choose_device(config.device)
        dtype = _choose_dtype(config, device)
        if config.compile and device.type != "cuda":
            raise ValueError(f"compile is for CUDA graphs, and this runs on {device}: leave it out")
        torch.set_num_threads(
            config.num_threads or min(torch.get_num_threads(), process.usable_cores())
        )
        with explained_out_of_memory(
            device, "use --dtype bfloat16, --quantize int4, another --device or a smaller model"
        ):
            self.model, checkpoint = load_model(config.ckpt, device, dtype)
            choose_kernels(self.model, device, dtype)
            if config.quantize != "none":
                quantize_(self.model, config.quantize)
        self.tokenizer = tokenizer_of(checkpoint, config.tokenizer)
        # Whether a prompt is a message to answer.
        self.chats = bool(config.chat or config.messages)
        if self.chats and not self.has_chat:
            raise ValueError(
                f"{config.ckpt} was not trained on chats, so it has no chat layout: train it with "
                f"python -m scripts.sft --init_from {config.ckpt}, or leave --chat and --messages "
                "out"
            )
        self.stop_ids = list(self.tokenizer.all_stop_ids)
        if config.context_length:
            _set_context(self.model, config)

        c = self.model.config
        if config.lookup and any(c.window(block) for block in range(c.transformer_blocks)):
            raise ValueError(
                "lookup takes back tokens, and this model's windowed blocks keep only their "
                "window: leave lookup out"
            )
        self.decoder = Decoder(self.model, config.c_kernel, config.compile, checkpoint.digest)
        # Where the weights come from, without them.
        self.origin = dataclasses.replace(checkpoint, model={}, optimizer=None)
        # Ids that stand for no text: holes in the tokenizer's ids, and the embedding's padding.
        vocabulary = c.vocabulary_size
        self.banned_ids = [i for i in self.tokenizer.banned_ids if i < vocabulary] + list(
            range(self.tokenizer.vocabulary_size, vocabulary)
        )
        # What a user should know, a line each.
        self.notes = [line for line in (self.decoder.note, self.top_k_note(config.top_k)) if line]

    def top_k_note(self, top_k: int) -> str:
        """Return a line if the vocabulary has fewer than top_k tokens, else an empty string."""
        count = self.model.config.vocabulary_size - len(self.banned_ids)
        if top_k <= count:
            return ""
        return f"top_k {top_k} samples from all tokens, as 0 does: the vocabulary has {count:,}"

    @property
    def has_chat(self) -> bool:
        """Whether messages can be rendered."""
        return has_chat(self.tokenizer)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids: the start of a document, or a chat that asks for an answer.

        There is at least one id, because the first generated token needs one before it. Raise
        ValueError if a model without a tokenizer is given none.
        """
        if self.chats:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self.chat_ids(messages)
        assert isinstance(prompt, str)
        return self.text_ids(prompt)

    def chat_ids(self, messages: list[dict]) -> list[int]:
        """Return the ids of messages that ask for an answer. Raise ValueError for wrong ones."""
        return chat_prompt_ids(messages, self.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text that starts a document. Raise ValueError if there is none."""
        start, end = self.tokenizer.start_id, self.tokenizer.end_of_text_id
        ids = ([] if start is None else [start]) + self.tokenizer.encode(text)
        if ids:
            return ids
        if end is None:
            raise ValueError(
                "the prompt is empty: with --tokenizer none it needs a token id, such as 12 7 99"
            )
        return [end]


class Predictor(LoadedModel):
    """A loaded model that completes prompts."""

    def __init__(self, config: PredictConfig):
        super().__init__(config)
        self.texts: list[Text] = []
        self.last: Completion | None = None
        for line in () if config.quiet else self.notes:
            print(f"note: {line}", file=sys.stderr)

    def stream(
        self,
        prompt: str | list[int],
        config: PredictConfig,
        note: Callable[[str], object] = lambda line: None,
    ) -> Iterator[str]:
        """Return an iterator over the completion of a prompt, in pieces of whole characters.

        prompt: a text, or ids that are read as they are. note: called with a line if prompt or
        completion may exceed the context.
        """
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        context = self.model.config.context_length
        if len(ids) > context:
            note(
                f"the prompt has {len(ids)} tokens and the context {context}: "
                f"reading its last {context}"
            )
        # The last token that is generated is never read.
        if min(len(ids), context) + config.max_new_tokens - 1 > context:
            then = (
                "older text is forgotten"
                if config.when_full == "slide"
                else "the answer ends there"
            )
            note(f"prompt and answer may fill the context of {context} tokens: {then} if they do")
        self.last = Completion(ids)
        return (piece for _, piece in self.complete([self.last], config, [config.seed]))

    def complete(
        self, completions: Sequence[Completion], config: PredictConfig, seeds: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Generate several completions at the same time; yield (row, piece of text).

        Each token yields a piece, which may be empty, and the end of a completion another one.
        """
        if isinstance(self.tokenizer, NoTokenizer):
            _refuse_stop(config)
        generators = [torch.Generator(self.device) for _ in completions]
        for generator, seed in zip(generators, seeds, strict=True):
            generator.seed() if seed < 0 else generator.manual_seed(seed)
        longest = max(len(completion.prompt_ids) for completion in completions)
        texts = self._texts(len(completions), longest + config.max_new_tokens)
        streams = [TokenStream(self.tokenizer) for _ in completions]
        untils = [UntilText(config.stop) for _ in completions]
        stop_ids = self.stop_ids
        # Rows that ended; `generate` adds to it, and so does a stop text here.
        finished: set[int] = set()
        started = time.perf_counter()
        for step in generate(
            self.decoder,
            texts,
            [completion.prompt_ids for completion in completions],
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop_ids=stop_ids,
            banned_ids=self.banned_ids,
            generators=generators,
            slide=config.when_full == "slide",
            lookup=config.lookup,
            finished=finished,
        ):
            now = time.perf_counter() - started
            for row, token in step:
                completion, until = completions[row], untils[row]
                completion.ids.append(token)
                completion.first_s = completion.first_s or now
                completion.last_s = now
                stopped = False
                if token not in stop_ids:
                    piece, stopped = until.push(streams[row].push(token))
                    completion.text += piece
                    yield row, piece
                if stopped:
                    completion.ended = "stop text"
                    finished.add(row)
                elif row in finished:
                    completion.ended = _why_ended(completion, stop_ids, config)
                    # What waited for the rest of a character, or of a stop text, is text now.
                    piece, stopped = until.push(streams[row].flush())
                    piece += "" if stopped else until.held
                    completion.text += piece
                    yield row, piece

    def _texts(self, count: int, tokens: int) -> list[Text]:
        """Return sequences with room for so many tokens each.

        The last completion's sequences are reused if they are large enough, because they may
        hold the start of this one.
        """
        context = self.model.config.context_length
        tokens = context if self.decoder.compiles else min(tokens, context)
        if len(self.texts) != count or self.texts[0].cache.max_tokens < tokens:
            # First, so that old and new caches are never in memory together.
            self.texts = []
            # The next power of two: a somewhat longer text finds room too.
            room = 1 << (tokens - 1).bit_length()
            self.texts = self.decoder.texts(count, min(context, room))
        return self.texts


def _shown(path: Path) -> Path:
    """Return a path as a user types it: relative to the current folder if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _refuse_stop(config: PredictConfig) -> None:
    """Raise ValueError if a stop text is set, which token ids do not have."""
    if config.stop:
        raise ValueError(
            f"stop {', '.join(map(repr, config.stop))} ends an answer before a text, and with "
            '--tokenizer none there are token ids: leave --stop out, or type :stop ""'
        )


def _why_ended(completion: Completion, stop_ids: Collection[int], config: PredictConfig) -> str:
    """Return why `generate` ended a completion."""
    if completion.ids[-1] in stop_ids:
        return "end of text"
    if len(completion.ids) == config.max_new_tokens:
        return "length"
    return "context"


def _choose_dtype(config: PredictConfig, device: torch.device) -> torch.dtype:
    """Return the dtype to load the weights in.

    On a CPU, "auto" is float32, which runtime/inference/cpu_decode.c reads; bfloat16 products,
    where a CPU has them, are for training.
    """
    dtype = choose_dtype(config.dtype, device)
    if config.dtype != "auto" or device.type != "cpu":
        return dtype
    # The library is asked last, because it is compiled at its first use.
    if not config.c_kernel or config.quantize != "none" or cpu_decode.library()[0]:
        return torch.float32
    return dtype


def _set_context(model: LLM, config: PredictConfig) -> None:
    """Let the model attend over config.context_length tokens.

    Raise ValueError if a learned attention bias has no more positions, or if the scaling of
    positions does not fit the length.
    """
    c, length = model.config, config.context_length
    if length > c.context_length and c.use_attention_bias:
        raise ValueError(
            f"context_length {length} is beyond the trained {c.context_length}, and this model "
            "has a learned bias for each pair of positions (use_attention_bias), none further "
            "out: only a model without that table can be stretched"
        )
    trained = c.context_length / c.rope_scaling_factor
    changes: dict[str, Any] = {"context_length": length}
    if config.rope_scaling != "none":
        if length <= trained:
            raise ValueError(
                f"rope_scaling {config.rope_scaling} stretches a context, and {length} is not "
                f"more than the trained {trained:.0f} tokens"
            )
        changes["rope_scaling"] = config.rope_scaling
        changes["rope_scaling_factor"] = length / trained
        if config.rope_scaling != "yarn":
            # Back to its default: it has no meaning without YaRN.
            changes["yarn_truncate"] = True
    elif c.rope_scaling == "yarn" and length != c.context_length:
        # YaRN's frequencies depend on the length of the context.
        raise ValueError(
            f"this model's positions are yarn-scaled from {trained:.0f} to {c.context_length} "
            "tokens: with context_length, say --rope_scaling yarn or linear"
        )
    model.config = dataclasses.replace(c, **changes)
