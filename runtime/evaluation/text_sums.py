"""One pass over the documents: the sums of each that every figure on held-out text comes from.

Nothing of single tokens is kept, so memory does not grow with what the model says of them.

# D documents  B bins
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Confidence is cut into so many bins of equal width (Guo et al. 2017, "On Calibration of Modern
# Neural Networks", section 4).
CONFIDENCE_BINS = 15
# Positions are cut at powers of 2: 1, 2 to 3, 4 to 7, ...
POSITION_BINS = 25
# Parts of a document, each with the same share of its tokens.
PARTS = 4
# How often a token occurs in the documents, in powers of 10: once to 9 times, 10 to 99, ...
FREQUENCY_BINS = 8
# Columns of each, by name.
WIDTHS = {
    "nats": 1,
    "bytes": 1,
    "tokens": 1,
    "right": 1,
    "position_nats": POSITION_BINS,
    "position_tokens": POSITION_BINS,
    # Of x = log2(position) and y = nats: x, x^2, x y. Their slope is that of the loss.
    "slope": 3,
    "part_nats": PARTS,
    "part_tokens": PARTS,
    "frequency_nats": FREQUENCY_BINS,
    "frequency_tokens": FREQUENCY_BINS,
    "confidence": CONFIDENCE_BINS,
    "confidence_right": CONFIDENCE_BINS,
    "confidence_tokens": CONFIDENCE_BINS,
}

Sums = dict[str, NDArray[np.float64]]


def empty_sums(num_documents: int) -> Sums:
    """Return the sums [D, columns] of nothing, by name."""
    return {name: np.zeros((num_documents, width)) for name, width in WIDTHS.items()}


def add_document(
    sums: Sums,
    d: int,
    ids_T: NDArray[np.int64],
    num_bytes: int,
    log_probs_T: NDArray[np.floating],
    best_T: NDArray[np.floating],
    right_T: NDArray[np.bool_],
    counts_V: NDArray[np.int64],
) -> None:
    """Put document number d into the sums.

    ids [T]: what is scored. log_probs [T]: of each, in nats; best [T]: of the most likely token at
    each place; right [T]: whether that is the id. counts [V]: how often each id is scored.
    """
    T = len(ids_T)
    sums["bytes"][d] = num_bytes
    sums["tokens"][d] = T
    if not T:
        return
    nats_T = -log_probs_T.astype(np.float64)
    sums["nats"][d] = nats_T.sum()
    sums["right"][d] = right_T.sum()
    positions_T = np.arange(1, T + 1)
    steps_T = np.log2(positions_T)
    sums["slope"][d] = steps_T.sum(), (steps_T**2).sum(), (steps_T * nats_T).sum()

    def spread(name: str, bins_T: NDArray[np.int64]) -> None:
        width = WIDTHS[f"{name}_tokens"]
        sums[f"{name}_nats"][d] = np.bincount(bins_T, nats_T, width)
        sums[f"{name}_tokens"][d] = np.bincount(bins_T, minlength=width)

    # Exact at powers of 2, which a rounded logarithm need not be.
    spread("position", np.minimum(np.frexp(positions_T)[1] - 1, POSITION_BINS - 1))
    spread("part", (positions_T - 1) * PARTS // T)
    tens = 10 ** np.arange(1, FREQUENCY_BINS)
    spread("frequency", np.searchsorted(tens, counts_V[ids_T], side="right"))
    sure_T = np.exp(np.minimum(best_T.astype(np.float64), 0.0))
    bins_T = np.minimum((sure_T * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    for name, weights_T in (
        ("confidence", sure_T),
        ("confidence_right", right_T),
        ("confidence_tokens", None),
    ):
        sums[name][d] = np.bincount(bins_T, weights_T, CONFIDENCE_BINS)
