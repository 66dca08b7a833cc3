"""How the engine reads tokens: by the C kernel, or by PyTorch where that does not know the model.

A reader makes the texts and reads further tokens of some of them in one pass. It never draws. Only
one thread may use it.

Shape letters as in model_parts.py: R rows that have logits, n tokens of a pass, L blocks, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.inference.decoder import Decoder, Text
from runtime.inference.scorer import most_likely, on_host


@dataclass
class Part:
    """What a pass reads of one text: the next `count` of its ids.

    rows: which of these have logits, 0 is the first. wants_best, wants_experts: whether these are
    needed of this part.
    """

    text: Text
    count: int
    rows: Sequence[int]
    wants_best: bool = False
    wants_experts: bool = False

    @property
    def ids(self) -> list[int]:
        """Return the ids to read."""
        first = self.text.cache.length
        return self.text.ids[first : first + self.count]


class Reading(NamedTuple):
    """What a pass gives. Rows and tokens of all parts follow one another."""

    # [R, V] on the device.
    logits_RV: Tensor
    # Of each row, or None where no part wants it: the most likely id, and its log-probability.
    best_R: np.ndarray | None
    best_log_probs_R: np.ndarray | None
    # Of all n tokens, or None where no part wants them. Those of a part that does not want them may
    # be -1.
    experts_LNK: np.ndarray | None
    weights_LNK: np.ndarray | None


class KernelReader:
    """Reads with the C kernel: all parts in one pass.

    What a token gets depends on the tokens before it alone, to the bit.
    """

    is_exact = True
    line = "the C kernel reads: each answer has the same bits alone and in any company"

    def __init__(self, decoder: Decoder):
        self.decoder, self._native = decoder, decoder.native

    def read(self, parts: Sequence[Part]) -> Reading:
        # Experts are counted (Statistics.expert_tokens), and cost the kernel nothing.
        got = self._native.read(
            [part.text.cache for part in parts],
            [part.ids for part in parts],
            [part.rows for part in parts],
            with_experts=True,
            with_best=any(part.wants_best for part in parts),
        )
        return Reading(
            got.logits_RV, got.best_R, got.best_log_probs_R, got.experts_LNK, got.weights_LNK
        )


class TorchReader:
    """Reads with PyTorch, on any device: a chunk of a prompt by itself, then one step for all texts
    that read one token (on a GPU that is the decoder's CUDA graph).

    Last digits depend on the company, so nothing is promised about bits.
    """

    is_exact = False

    def __init__(self, decoder: Decoder):
        self.decoder, self.model = decoder, decoder.model
        why = decoder.why_not_native if decoder.device.type == "cpu" else ""
        reads = f"PyTorch reads on {decoder.device}"
        self.line = f"{reads}: last digits depend on the company{f' ({why})' if why else ''}"

    def read(self, parts: Sequence[Part]) -> Reading:
        logits: dict[int, Tensor] = {}
        chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # A CUDA graph does not say where it sends a token.
        stepped = [i for i, part in enumerate(parts) if part.count == 1 and not part.wants_experts]
        for i, part in enumerate(parts):
            if i not in stepped:
                logits[i], chosen[i] = self._chunk(part)
        if stepped:
            ids_B = torch.tensor([parts[i].ids[0] for i in stepped], device=self.decoder.device)
            logits_BV = self.decoder.step([parts[i].text for i in stepped], ids_B)
            for row, i in enumerate(stepped):
                logits[i] = logits_BV[row : row + 1][: len(parts[i].rows)]
        logits_RV = torch.cat([logits[i] for i in range(len(parts))])
        best = best_log_probs = experts = weights = None
        if any(part.wants_best for part in parts):
            best, best_log_probs = most_likely(on_host(logits_RV))
        if any(part.wants_experts for part in parts):
            none = [self._no_experts(part.count) for part in parts]
            pairs = [chosen.get(i, none[i]) for i in range(len(parts))]
            experts, weights = (np.concatenate(own, axis=1) for own in zip(*pairs, strict=True))
        return Reading(logits_RV, best, best_log_probs, experts, weights)

    def _chunk(self, part: Part) -> tuple[Tensor, tuple[np.ndarray, np.ndarray]]:
        """Return a part's logits [rows, V] and, if wanted, its experts and their weights."""
        ids_1T = torch.tensor([part.ids], device=self.decoder.device)
        is_last_only = list(part.rows) in ([], [part.count - 1])
        chosen: list[tuple[Tensor, Tensor]] = []
        hooks = []
        if part.wants_experts:
            hooks = [
                block.moe.router.register_forward_hook(lambda _, given, out: chosen.append(out[:2]))
                for block in self.model.layers
            ]
        try:
            logits_TV = self.model(
                ids_1T, cache=part.text.cache, last_token_only=is_last_only
            ).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        experts = self._no_experts(part.count)
        if chosen:
            weights_LTK, experts_LTK = (torch.stack(own).cpu() for own in zip(*chosen, strict=True))
            experts = experts_LTK.numpy(), weights_LTK.float().numpy()
        rows = range(len(part.rows)) if is_last_only else part.rows
        return logits_TV[list(rows)], experts

    def _no_experts(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        c = self.decoder.config
        shape = (c.transformer_blocks, tokens, c.top_k)
        return np.full(shape, -1), np.zeros(shape, np.float32)


def reader_of(decoder: Decoder) -> KernelReader | TorchReader:
    """Return the reader for a decoder: the C kernel where it knows the model."""
    return TorchReader(decoder) if decoder.native is None else KernelReader(decoder)
