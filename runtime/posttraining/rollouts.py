"""Rollouts: several answers to each of many prompts, sampled by a model that is being trained.

A prompt is read once and its cache copied to its answers (Decoder.fork). Sampling is plain:
temperature 1, no top-k, no top-p. Ids that stand for no text are banned, and the trainer's softmax
leaves them out too (`without_ids`), so both speak of one distribution. Each id comes with its
log-probability from the pass that drew it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import LLM
from runtime.inference.decoder import Decoder, Generation, Text
from runtime.kernels.choose import choose_kernels

# Answers that are sampled at a time: more need memory and are hardly faster.
MOST_ROWS = 256
# Apart from the streams that order the data under the same seed.
STREAM = 0x726F6C6C


@dataclass
class Answer:
    """An answer while and after it is sampled.

    ids: the stop id included. log_probs: of each id, under the weights that drew it, in nats.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    # By a stop id; otherwise it was cut: max_new_tokens, or a full context.
    ended: bool = False


class Sampler:
    """Samples answers with `model`, whose weights may change between two calls.

    model: a plain LLM; left in the mode (train, eval) it was in. dtype: that of the trainer's
    autocast, float32 for none. most_rows: answers at a time. A GPU computes as many rows as it ever
    had, so none should be larger than the others.
    """

    def __init__(
        self,
        model: LLM,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        max_new_tokens: int,
        dtype: torch.dtype = torch.float32,
        most_rows: int = MOST_ROWS,
    ):
        if not stop_ids:
            raise ValueError("answers need a stop id: give this tokenizer a chat layout first")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.model, self.dtype, self.most_rows = model, dtype, most_rows
        self.stop_ids, self.banned_ids = list(stop_ids), list(banned_ids)
        self.max_new_tokens = max_new_tokens
        device, own = model.embed.weight.device, model.embed.weight.dtype
        with _in_eval_mode(model):
            # A decoder is compared with the model in the weights' own dtype, which rounds least.
            choose_kernels(model, device, own)
            self.decoder = Decoder(model)
        self.kernel_dtype = own if dtype == torch.float32 else dtype
        self._texts: list[Text] = []

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Answer]]:
        """Return `count` answers to each prompt (ids, not empty).

        numbers: of each prompt's sample; default 0, 1, 2 ... An answer is a function of the
        weights, the seed, the sample's number and the answer's own, up to the rounding of logits.
        Raise ValueError for a prompt that leaves no room in the context.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        context = self.model.config.context_length
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(
                    f"prompt {numbers[i]} has {len(prompt)} tokens, and a context of "
                    f"{context} allows 1 to {context - 1}: shorten it or leave it out"
                )
        per_pass = max(1, self.most_rows // count)
        answers = []
        # Each time, because a score samples with the same model in another dtype.
        choose_kernels(self.model, self.decoder.device, self.kernel_dtype)
        with _in_eval_mode(self.model), _autocast(self.decoder.device, self.dtype):
            # Nothing that older weights computed may be reused.
            self.decoder.weights_changed()
            for first in range(0, len(prompts), per_pass):
                part = slice(first, first + per_pass)
                answers += self._sample(prompts[part], count, seed, numbers[part])
        return answers

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        seed: int,
        numbers: Sequence[int],
    ) -> list[list[Answer]]:
        texts = self._room(len(prompts) * count, max(map(len, prompts)))
        logits_RV = self.read(texts, prompts, count)
        answers = [Answer() for _ in range(len(prompts) * count)]
        uniforms = answer_noise(numbers, count, self.max_new_tokens, seed)
        each_prompt = [prompt for prompt in prompts for _ in range(count)]
        run = Generation(
            self.decoder,
            texts[: len(answers)],
            each_prompt,
            self.max_new_tokens,
            PlainDraw(self.stop_ids, self.banned_ids, uniforms, [*map(len, each_prompt)]),
            slide=False,
            finished=set(),
            log_probs=[answer.log_probs for answer in answers],
            first_BV=logits_RV,
        )
        for step in run.in_steps(stop_at_one=False):
            for row, token in step:
                answers[row].ids.append(token)
        for answer in answers:
            answer.ended = answer.ids[-1] in self.stop_ids
        return [answers[i : i + count] for i in range(0, len(answers), count)]

    def read(self, texts: Sequence[Text], prompts: Sequence[Sequence[int]], count: int) -> Tensor:
        """Let `count` texts hold each prompt; return the logits [texts, V] after them.

        A prompt is read into the first of its texts, which is copied to the others.
        """
        leads = [texts[i * count] for i in range(len(prompts))]
        # A text keeps the list that it is given.
        logits_PV = self.decoder.read_all(leads, [list(prompt) for prompt in prompts])
        for lead in leads:
            self.decoder.fork(lead, count)
        return logits_PV.repeat_interleave(count, dim=0)

    def _room(self, rows: int, longest_prompt: int) -> list[Text]:
        """Return at least so many texts, those of an earlier call where they are large enough."""
        # The last token that is drawn is never read.
        tokens = min(longest_prompt + self.max_new_tokens, self.model.config.context_length)
        if len(self._texts) < rows or self._texts[0].cache.max_tokens < tokens:
            # First, so that old and new caches are never in memory together.
            self._texts = []
            room = min(1 << (tokens - 1).bit_length(), self.model.config.context_length)
            self._texts = self.decoder.texts(rows, room)
        return self._texts


class PlainDraw:
    """Draws from the softmax over the ids that are not banned, one random number an id.

    uniforms: of each row and each of its new ids, in (0, 1). prompt_lengths: of each row.
    """

    def __init__(
        self,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int],
        uniforms: np.ndarray,
        prompt_lengths: Sequence[int],
    ):
        self.stop_ids, self.uniforms, self.prompt_lengths = stop_ids, uniforms, prompt_lengths
        self.banned = torch.tensor(list(banned_ids), dtype=torch.int64)

    def __call__(
        self, rows: list[int], ids: list[list[int]], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor]:
        numbers = [self.uniforms[row, len(ids[row]) - self.prompt_lengths[row]] for row in rows]
        # Apple's GPUs have no float64.
        wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
        uniform_B = torch.tensor(numbers, dtype=wide).to(logits_BV.device)
        self.banned = self.banned.to(logits_BV.device)
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        return draw_by_uniforms(logits_BV.index_fill(1, self.banned, -torch.inf), uniform_B)


def draw_by_uniforms(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an id per row by inverting the softmax's distribution function.

    Return (ids [B] int64, -1 where logits are not finite; their log-probabilities [B]).
    uniform_B: in (0, 1), of the dtype that sums are taken in. One random number a row instead of
    V, which would take longer than the model's pass. First a block of ids is drawn, then one of
    its ids: no running sum over the vocabulary, whose order a GPU does not fix.
    """
    B, V = logits_BV.shape
    width = math.isqrt(V - 1) + 1
    most_B1 = logits_BV.amax(dim=1, keepdim=True)
    weights_BV = F.pad((logits_BV - most_B1).exp_(), (0, -V % width))
    weights_BNW = weights_BV.view(B, -1, width).to(uniform_B.dtype)
    sums_BN = weights_BNW.sum(dim=2)
    total_B = sums_BN.sum(dim=1)
    block_B, rest_B = _invert(sums_BN, uniform_B * total_B)
    row_B = torch.arange(B, device=logits_BV.device)
    inner_B, _ = _invert(weights_BNW[row_B, block_B], rest_B)
    drawn_B = block_B * width + inner_B
    log_probs_B = (logits_BV[row_B, drawn_B] - most_B1[:, 0]).to(total_B.dtype) - total_B.log()
    return torch.where(torch.isfinite(total_B), drawn_B, -1), log_probs_B.to(logits_BV.dtype)


def _invert(weights_BN: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the index whose share of the running sum holds the level, the level within it).

    Never an index of weight 0, however the sums are rounded.
    """
    N = weights_BN.shape[1]
    # As a product, because a GPU's cumsum may add in another order at each call.
    ones_NN = torch.ones(N, N, dtype=weights_BN.dtype, device=weights_BN.device).triu_()
    sums_BN = weights_BN @ ones_NN
    last_B = (sums_BN < sums_BN[:, -1:]).sum(dim=1)
    index_B = torch.minimum((sums_BN <= level_B[:, None]).sum(dim=1), last_B)[:, None]
    before_B1 = sums_BN.gather(1, index_B) - weights_BN.gather(1, index_B)
    return index_B[:, 0], level_B - before_B1[:, 0]


def answer_noise(numbers: Sequence[int], count: int, tokens: int, seed: int) -> np.ndarray:
    """Return numbers in (0, 1) for each answer's tokens: float64 [samples * count, tokens].

    Row i * count + g is a function of (seed, numbers[i], g): answers of other samples, and other
    numbers of answers or tokens, change nothing.
    """
    rows = []
    for number in numbers:
        for answer in range(count):
            key, counter = np.array([seed, number], np.uint64), [0, 0, answer, STREAM]
            philox = np.random.Philox(key=key, counter=np.array(counter, np.uint64))
            rows.append((philox.random_raw(tokens) >> np.uint64(12)) + 0.5)
    return np.stack(rows) * 2.0**-52


class _HeadWithout:
    """A head with another bias; all else is the head's own."""

    def __init__(self, head, bias_V: Tensor):
        self._head, self.bias = head, bias_V

    def __getattr__(self, name: str):
        return getattr(self._head, name)


@contextlib.contextmanager
def without_ids(model: LLM, ids: Tensor):
    """Within this context the model's softmax leaves out some ids [*]: their bias is -inf.

    Gradients are those of the softmax over the others. Only for forward passes: the head is no
    module meanwhile.
    """
    if not len(ids):
        yield
        return
    head = model.out_head
    bias_V: Tensor | None = head.bias
    if bias_V is None:
        weight = model.head_weight
        bias_V = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    masked: Any = _HeadWithout(head, bias_V.index_fill(0, ids, -torch.inf))
    model._modules["out_head"] = masked
    try:
        yield
    finally:
        model._modules["out_head"] = head


@contextlib.contextmanager
def _in_eval_mode(model: LLM):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _autocast(device: torch.device, dtype: torch.dtype):
    """Return the trainer's autocast, without its memory of cast weights.

    That memory would outlive the context in a CUDA graph, and hold the weights of its capture.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)
