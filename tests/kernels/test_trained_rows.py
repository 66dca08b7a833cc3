"""A head of which some rows are trained: their gradient, and none of all rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import runtime.kernels.choose  # noqa: F401  (hands the loss in C in)
from runtime.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy
from runtime.kernels.target_log_probs import target_log_probs
from runtime.kernels.trained_rows import with_trained_rows
from tests.kernels.test_frozen_weights import Elements
from tests.numeric import rounding

N, V, C, CHUNK, ROWS = 12, 300, 8, 5, slice(40, 43)
LOSSES = {
    "cross-entropy": lambda h, w, targets: linear_cross_entropy(h, w, None, targets, CHUNK),
    "log-probabilities": lambda h, w, targets: (
        -target_log_probs(h, w, None, targets, CHUNK).sum() * 1.0
    ),
    "all logits": lambda h, w, targets: F.cross_entropy(F.linear(h, w), targets, reduction="sum"),
}


def problem(dtype=torch.float64):
    """Hidden states, head and targets, some of them in the trained rows and some ignored."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, C, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=dtype)
    targets = torch.randint(V, (N,), generator=generator)
    targets[:6] = torch.tensor([40, 41, 42, 40, IGNORE, IGNORE])
    return h, weight, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_their_gradient_is_that_of_the_whole_head(loss, dtype):
    """Scaled, as a step divides its loss, and twice if the graph is kept.

    In float32 too, where C has no such rows.
    """
    h, weight, targets = problem(dtype)
    bound = 10 * rounding(dtype, C, V)
    whole = weight.clone().requires_grad_()
    (loss(h, whole, targets) * 0.25).backward()
    expected_h, h.grad = h.grad, None
    rows = torch.nn.Parameter(weight[ROWS])
    result = loss(h, with_trained_rows(weight, rows, ROWS.start), targets) * 0.25
    result.backward(retain_graph=True)
    assert (rows.grad - whole.grad[ROWS]).abs().max() < bound
    assert (h.grad - expected_h).abs().max() < bound
    assert weight.grad is None
    result.backward()
    assert (rows.grad - 2 * whole.grad[ROWS]).abs().max() < bound


@pytest.mark.parametrize("name", ["cross-entropy", "log-probabilities"])
def test_no_gradient_of_all_rows_is_made(name):
    """It was as large as the head: 0.8 GB at full size, for three rows."""
    h, weight, targets = problem()
    rows = torch.nn.Parameter(weight[ROWS])
    with Elements() as seen:
        LOSSES[name](h, with_trained_rows(weight, rows, ROWS.start), targets).backward()
    assert max(seen.made) < V * C


def test_in_half_precision_the_rows_gradient_is_summed_in_float32():
    h, weight, targets = problem(torch.float32)
    rows = torch.nn.Parameter(weight[ROWS])
    with torch.autocast("cpu", torch.bfloat16):
        LOSSES["cross-entropy"](h, with_trained_rows(weight, rows, ROWS.start), targets).backward()
    assert rows.grad.dtype == torch.float32
    whole = weight.clone().requires_grad_()
    LOSSES["cross-entropy"](h, whole, targets).backward()
    # Logits of 8 products of about 1 in bfloat16.
    allowed = 4 * torch.finfo(torch.bfloat16).eps * C**0.5
    assert (rows.grad - whole.grad[ROWS]).abs().max() < allowed * whole.grad[ROWS].abs().max()
