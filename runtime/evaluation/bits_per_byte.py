"""Bits per byte of held-out text, alone and against another checkpoint."""

from __future__ import annotations

import math

from runtime.base.shares import wilson
from runtime.evaluation.bootstrap import (
    RESAMPLES,
    Interval,
    difference_intervals,
    ratio_intervals,
)
from runtime.evaluation.report import Section, figure, section
from runtime.evaluation.text_sums import Sums

DEFINITION = (
    "Bits per byte: the model's bits for the tokens of a text over the text's UTF-8 bytes. A start "
    "token comes first; special tokens are not scored. train.py's validation figure also counts "
    "end-of-text, so it differs. Intervals are 95 %, by bootstrap over documents."
)


def bits_section(sums: Sums, resamples: int = RESAMPLES) -> Section:
    """Return bits per byte, nats per token and accuracy of the next token."""
    documents, tokens = len(sums["nats"]), int(sums["tokens"].sum())
    bits = sums["nats"] / math.log(2)
    (per_byte,) = ratio_intervals(bits, sums["bytes"], resamples)
    (loss,) = ratio_intervals(sums["nats"], sums["tokens"], resamples)
    (accuracy,) = ratio_intervals(sums["right"], sums["tokens"], resamples)
    (size,) = ratio_intervals(sums["bytes"], sums["tokens"], resamples)
    return section(
        "bits per byte",
        {
            "bits_per_byte": figure(*_ordered(per_byte, documents), unit="bits per byte"),
            "loss": figure(*_ordered(loss, tokens), unit="nats per token"),
            "accuracy": figure(*_ordered(accuracy, tokens)),
            "bytes_per_token": figure(*_ordered(size, tokens), unit="bytes"),
        },
        notes=[DEFINITION],
    )


def against_section(sums: Sums, other: Sums, resamples: int = RESAMPLES) -> Section:
    """Return the paired difference in bits per byte: below 0, the first model is better.

    Both are of the same documents in the same order; their tokenizers may differ.
    """
    log_2 = math.log(2)
    (difference,) = difference_intervals(
        sums["nats"] / log_2, sums["bytes"], other["nats"] / log_2, other["bytes"], resamples
    )
    (value,) = ratio_intervals(other["nats"] / log_2, other["bytes"], resamples)
    documents = len(sums["nats"])
    mine = sums["nats"] * other["bytes"]
    theirs = other["nats"] * sums["bytes"]
    # A tie counts half, as in a sign test: against itself a model is better on half of all.
    better = float((mine < theirs).sum() + 0.5 * (mine == theirs).sum())
    return section(
        "against the other checkpoint",
        {
            "difference": figure(*_ordered(difference, documents), unit="bits per byte"),
            "other_bits_per_byte": figure(*_ordered(value, documents), unit="bits per byte"),
            "documents_better": figure(better / documents, documents, *wilson(better, documents)),
        },
        notes=[
            "A difference below 0 means that the first checkpoint needs fewer bits. It is paired: "
            "both are scored on the same documents, and each resample draws the same for both.",
            "documents_better is the share on which the first needs fewer bits; a tie counts half.",
        ],
    )


def _ordered(interval: Interval, n: int) -> tuple[float, int, float, float]:
    return interval.value, n, interval.low, interval.high
