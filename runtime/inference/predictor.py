"""Answer prompts with a checkpoint's model."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from config_model import PredictConfig
from model import LLM
from runtime.base import process
from runtime.base.device import choose_device, choose_dtype, explained_out_of_memory
from runtime.base.text import UntilText
from runtime.checkpoint.read import load_model
from runtime.data.tokenizer import TokenStream
from runtime.data.tokenizers import tokenizer_of
from runtime.inference import cpu_decode
from runtime.inference.decoder import Decoder, Text, generate
from runtime.inference.quantize import quantize_
from runtime.kernels.choose import choose_kernels


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
            dtype = torch.float32  # what runtime/inference/cpu_decode.c reads; bfloat16 products, where a CPU has them, are for training
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
