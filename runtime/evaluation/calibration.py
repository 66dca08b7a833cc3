"""Is the model as often right as it is sure? And where in a text is its loss?"""

from __future__ import annotations

import math

import numpy as np

from runtime.evaluation.bootstrap import (
    RESAMPLES,
    Array,
    Interval,
    intervals,
    ratio_intervals,
    ratios,
)
from runtime.evaluation.report import Plot, Section, Series, figure, section
from runtime.evaluation.text_sums import CONFIDENCE_BINS, PARTS, Sums

# Bins with fewer tokens say nothing that is worth a point.
FEWEST_TOKENS = 20


def calibration_section(sums: Sums, resamples: int = RESAMPLES) -> Section:
    """Return the expected calibration error of the next token, and a reliability table.

    It is the mean gap between the probability of the most likely token and how often that is the
    next one, over CONFIDENCE_BINS bins (Guo et al. 2017, equation 3).
    """
    tokens = int(sums["tokens"].sum())
    names = ("confidence", "confidence_right", "confidence_tokens")
    columns = np.concatenate([sums[name] for name in names], axis=1)
    error, gap = calibration_intervals(columns, resamples)
    sure = ratio_intervals(sums["confidence"], sums["confidence_tokens"], resamples)
    right = ratio_intervals(sums["confidence_right"], sums["confidence_tokens"], resamples)
    counts = sums["confidence_tokens"].sum(axis=0).astype(int).tolist()
    kept = [b for b in range(CONFIDENCE_BINS) if counts[b]]
    rows = [
        [
            f"{b / CONFIDENCE_BINS:.2f} to {(b + 1) / CONFIDENCE_BINS:.2f}",
            sure[b].value,
            right[b].value,
            right[b].low,
            right[b].high,
            counts[b],
        ]
        for b in kept
    ]
    shown = [b for b in kept if counts[b] >= FEWEST_TOKENS]
    plot: Plot = {
        "title": "Reliability of the next token",
        "kind": "diagonal",
        "x_label": "probability of the most likely token",
        "y_label": "share that is right",
        "series": [_series("measured", [sure[b].value for b in shown], [right[b] for b in shown])],
    }
    return section(
        "calibration",
        {
            "expected_calibration_error": figure(error.value, tokens, error.low, error.high),
            "confidence_minus_accuracy": figure(gap.value, tokens, gap.low, gap.high),
        },
        {"columns": ["probability", "mean", "right", "low", "high", "tokens"], "rows": rows},
        [plot],
        [
            "Above 0, confidence_minus_accuracy means that the model is too sure. A calibration "
            "error in a sample is too large, because chance parts the bins, too. Its interval "
            "allows for that: it reaches to 0 where the model may be calibrated."
        ],
    )


def calibration_intervals(
    sums_DK: Array, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Interval, Interval]:
    """Return the expected calibration error and the signed gap. sums [D, 3 B] as in _gaps.

    Chance makes the error of a sample too large: noise of either sign adds to a sum of absolute
    values. So its own percentiles miss a true value of 0. The error is a norm, so it is off by at
    most the norm of what the bins' gaps are off by. That has a bootstrap, centred on the sample,
    and the interval begins so far below the error. The upper end is that of percentiles, or of the
    basic interval if that is higher (Davison and Hinkley 1997, "Bootstrap Methods and their
    Application", section 5.2).
    """
    centre_B = _gaps(sums_DK.sum(axis=0))

    def figures(sums: Array) -> Array:
        gaps = _gaps(sums)
        columns = np.abs(gaps), np.abs(gaps - centre_B), gaps
        return np.stack([one.sum(axis=-1) for one in columns], axis=-1)

    has_tokens_D = sums_DK[:, 2 * CONFIDENCE_BINS :].any(axis=1)
    documents_J = np.full(3, np.count_nonzero(has_tokens_D))
    (value, low, high), off, gap = intervals(sums_DK, figures, resamples, seed, documents_J)
    if math.isnan(low):
        return Interval(value, low, high), gap
    return Interval(value, max(0.0, value - off.high), max(high, 2 * value - low)), gap


def _gaps(sums: Array) -> Array:
    """Return each bin's part [..., B] of confidence minus accuracy, of sums [..., 3 B].

    The sums: of confidence, of right answers and of tokens.
    """
    sure, right, tokens = np.split(sums, 3, axis=-1)
    return ratios(sure - right, tokens.sum(axis=-1)[..., None])


def loss_section(sums: Sums, resamples: int = RESAMPLES) -> Section:
    """Return the loss by position, by part of the document and by the token's frequency."""
    tokens = int(sums["tokens"].sum())
    columns = np.concatenate([sums["slope"], sums["nats"], sums["tokens"]], axis=1)
    # A document of one token says nothing of a slope.
    documents_J = np.array([np.count_nonzero(sums["tokens"] > 1)])
    (slope,) = intervals(columns, _slope, resamples, documents_J=documents_J)
    figures = {
        "slope_per_doubling": figure(slope.value, tokens, slope.low, slope.high, "nats per token")
    }
    rows, plots = [], []
    for name, title, x_label, labels in (
        ("position", "Loss by position in the document", "position, from (tokens)", _positions),
        ("part", "Loss by part of the document", f"part of {PARTS}", _parts),
        ("frequency", "Loss by how often the token occurs", "times, from", _frequencies),
    ):
        counts = sums[f"{name}_tokens"].sum(axis=0).astype(int).tolist()
        losses = ratio_intervals(sums[f"{name}_nats"], sums[f"{name}_tokens"], resamples)
        kept = [b for b, count in enumerate(counts) if count]
        rows += [
            [name, labels(b), losses[b].value, losses[b].low, losses[b].high, counts[b]]
            for b in kept
        ]
        shown = [b for b in kept if counts[b] >= FEWEST_TOKENS]
        firsts = [labels(b).split(" ")[0] for b in shown]
        plots.append(_loss_plot(title, x_label, firsts, [losses[b] for b in shown]))
    return section(
        "loss",
        figures,
        {"columns": ["by", "where", "loss", "low", "high", "tokens"], "rows": rows},
        plots,
        [
            "slope_per_doubling is how the loss changes from a position to twice that position. "
            "Context lowers it, and a text that begins easily raises it: compare it on one text. "
            "How often a token occurs is counted in these documents."
        ],
    )


def _slope(sums: Array) -> Array:
    """Return the least-squares slope [..., 1] of the loss over log2 of the position."""
    x, xx, xy, y, n = np.moveaxis(sums, -1, 0)
    return ratios(n * xy - x * y, n * xx - x * x)[..., None]


def _positions(b: int) -> str:
    return "1" if not b else f"{2**b:,} to {2 ** (b + 1) - 1:,}"


def _parts(b: int) -> str:
    return f"{b + 1} of {PARTS}"


def _frequencies(b: int) -> str:
    return f"{10**b:,} to {10 ** (b + 1) - 1:,}"


def _loss_plot(title: str, x_label: str, firsts: list[str], losses: list[Interval]) -> Plot:
    return {
        "title": title,
        "kind": "points",
        "x_label": x_label,
        "y_label": "nats per token",
        "series": [_series("loss", firsts, losses)],
    }


def _series(name: str, x: list, y: list[Interval]) -> Series:
    return {
        "name": name,
        "x": x,
        "y": [one.value for one in y],
        "low": [one.low for one in y],
        "high": [one.high for one in y],
    }
