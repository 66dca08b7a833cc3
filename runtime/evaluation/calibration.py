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
    error, gap = intervals(columns, _errors, resamples)
    error = _reflected(error)
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
            "error in a sample is too large, because chance parts the bins, too; its interval "
            "allows for that."
        ],
    )


def _reflected(found: Interval) -> Interval:
    """Return the interval of a figure that is never below 0 and that chance makes too large.

    A resample is too large again, by about as much, so its percentiles miss a true value of 0.
    Their distances from the figure are taken to the other side of it (Davison and Hinkley 1997,
    "Bootstrap Methods and their Application", section 5.2, the basic interval).
    """
    value, low, high = found
    if math.isnan(low):
        return found
    return Interval(value, max(0.0, 2 * value - high), max(value, 2 * value - low))


def _errors(sums: Array) -> Array:
    """Return the expected calibration error and the signed gap [..., 2] of sums [..., 3 B]."""
    sure, right, tokens = np.split(sums, 3, axis=-1)
    total = tokens.sum(axis=-1)
    error = ratios(np.abs(sure - right).sum(axis=-1), total)
    return np.stack([error, ratios((sure - right).sum(axis=-1), total)], axis=-1)


def loss_section(sums: Sums, resamples: int = RESAMPLES) -> Section:
    """Return the loss by position, by part of the document and by the token's frequency."""
    tokens = int(sums["tokens"].sum())
    columns = np.concatenate([sums["slope"], sums["nats"], sums["tokens"]], axis=1)
    (slope,) = intervals(columns, _slope, resamples)
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
            "slope_per_doubling is how the loss changes from a position to twice that position: "
            "below 0, context helps. How often a token occurs is counted in these documents."
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
