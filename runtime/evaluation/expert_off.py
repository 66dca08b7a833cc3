"""What each expert is worth: the loss without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from tqdm import tqdm

from model import LLM
from model_parts import Block
from runtime.evaluation.bootstrap import RESAMPLES, Interval, difference_intervals
from runtime.evaluation.encoded import Encoded
from runtime.evaluation.held_out import read_documents
from runtime.evaluation.report import Figure, Plot, Section, Series, figure, section
from runtime.evaluation.text_sums import Sums
from runtime.inference.quantize import is_packed
from runtime.inference.scorer import Scorer


@contextlib.contextmanager
def without_expert(model: LLM, block: int, expert: int) -> Iterator[None]:
    """Set an expert's output to zero, in place: its routing weight is not given to others.

    The weights are what they were afterwards, bit for bit, also after an error.
    """
    experts = cast(Block, model.layers[block]).moe.experts
    parts = [p[expert] for p in (experts.w_out, experts.b_out) if p is not None]
    kept = [part.detach().clone() for part in parts]
    with torch.no_grad():
        try:
            for part in parts:
                part.zero_()
            yield
        finally:
            for part, old in zip(parts, kept, strict=True):
                part.copy_(old)


def check_can_switch_off(model: LLM) -> None:
    """Raise ValueError for packed weights, which cannot be set to zero one expert at a time."""
    if is_packed(model):
        raise ValueError("--expert_off needs weights that are not packed: leave out --quantize")


def expert_off_section(scorer: Scorer, documents: Encoded, resamples: int = RESAMPLES) -> Section:
    """Return how the loss rises without each expert, paired over the documents."""
    model, c = scorer.model, scorer.config
    check_can_switch_off(model)
    whole = read_documents(scorer, documents)
    L, E, tokens = c.transformer_blocks, c.num_experts, int(whole["tokens"].sum())
    figures: dict[str, Figure] = {}
    rows, series = [], []
    for block in tqdm(range(L), "blocks", leave=False, disable=None):
        found = []
        for expert in range(E):
            with without_expert(model, block, expert):
                found.append(_rise(read_documents(scorer, documents), whole, resamples))
        rows += [[block, e, one.value, one.low, one.high] for e, one in enumerate(found)]
        most = max(found, key=lambda one: one.value)
        least = min(found, key=lambda one: one.value)
        for name, one in (("most", most), ("least", least)):
            key = f"block_{block}_{name}"
            figures[key] = figure(one.value, tokens, one.low, one.high, "nats per token")
        line: Series = {
            "name": f"block {block}",
            "x": [str(expert) for expert in range(E)],
            "y": [one.value for one in found],
            "low": [one.low for one in found],
            "high": [one.high for one in found],
        }
        series.append(line)
    plot: Plot = {
        "title": "Rise of the loss without an expert",
        "kind": "points",
        "x_label": "expert",
        "y_label": "nats per token",
        "series": series,
    }
    count = len(documents.ids)
    return section(
        "loss without an expert",
        figures,
        {"columns": ["block", "expert", "rise", "low", "high"], "rows": rows},
        [plot],
        [
            f"On {count:,} documents. The expert's output is zero and no other takes its routing "
            "weight. most and least are chosen after the fact, so their intervals are too narrow."
        ],
    )


def _rise(without: Sums, whole: Sums, resamples: int) -> Interval:
    (one,) = difference_intervals(
        without["nats"], without["tokens"], whole["nats"], whole["tokens"], resamples
    )
    return one
