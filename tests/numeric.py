"""Comparisons of numbers whose last bits depend on the machine: the bounds are those of runtime/rounding.py, whose text derives them.

Not for what must be equal to the bit (torch.equal), nor for Python floats with a closed form (pytest.approx).
"""
from __future__ import annotations

import torch
from torch import Tensor

from runtime.rounding import gradients_bound, logits_bound, rounding, size_of

__all__ = ["assert_close", "gradients_bound", "is_close", "logits_bound", "rounding", "share_of", "size_of"]


def share_of(actual, expected, bound: float, size: float | None = None) -> float:
    """The largest difference over what `bound` allows; above 1 is too much. NaN if one of them holds NaN or infinities.

    size: what the bound is relative to (default: the root mean square of `expected`).
    """
    actual, expected = (torch.as_tensor(x).detach().cpu().double() for x in (actual, expected))
    assert actual.shape == expected.shape, f"shapes {list(actual.shape)} and {list(expected.shape)}"
    difference = (actual - expected).abs().max().item()
    allowed = bound * (size_of(expected) if size is None else size)
    return difference / allowed if allowed else 0.0 if difference == 0 else float("inf") if difference > 0 else difference


def is_close(actual, expected, bound: float, size: float | None = None) -> bool:
    return share_of(actual, expected, bound, size) <= 1


def assert_close(actual: Tensor, expected: Tensor, bound: float, what: str = "", size: float | None = None) -> None:
    """AssertionError unless the largest difference is within `bound` of the size of `expected` (see share_of)."""
    share = share_of(actual, expected, bound, size)
    assert share <= 1, f"{what or 'values'}: {share:.3g} times the difference that rounding explains ({bound:.2g} of their size)"
