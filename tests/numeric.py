"""Comparisons of numbers whose last bits depend on the machine.

The bounds are those of runtime/checks/rounding.py, whose text derives them. A router that meets two
nearly equal scores may send a token to either expert, on another CPU to the other: the logits from
there on differ by far more than rounding. Tests over many random models compare what comes before
such a tie (before_ties).

Not for what must be equal to the bit (torch.equal), nor for Python floats with a closed form
(pytest.approx).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import LLM
from runtime.checks.rounding import MARGIN, gradients_bound, logits_bound, rounding, size_of
from runtime.inference.quantize import INPUT_EPS, is_packed

__all__ = [
    "assert_close",
    "before_ties",
    "gradients_bound",
    "is_close",
    "logits_bound",
    "packed_bound",
    "rounding",
    "share_of",
    "size_of",
]


def share_of(actual, expected, bound: float, size: float | None = None) -> float:
    """The largest difference over what `bound` allows; above 1 is too much.

    NaN if one of them holds NaN or infinities. size: what the bound is relative to (default: the
    root mean square of `expected`).
    """
    actual, expected = (torch.as_tensor(x).detach().cpu().double() for x in (actual, expected))
    assert actual.shape == expected.shape, f"shapes {list(actual.shape)} and {list(expected.shape)}"
    difference = (actual - expected).abs().max().item()
    allowed = bound * (size_of(expected) if size is None else size)
    if allowed:
        return difference / allowed
    return float("inf") if difference > 0 else difference


def is_close(actual, expected, bound: float, size: float | None = None) -> bool:
    return share_of(actual, expected, bound, size) <= 1


def assert_close(
    actual: Tensor, expected: Tensor, bound: float, what: str = "", size: float | None = None
) -> None:
    """Raise AssertionError unless the largest difference is within `bound` of `expected`'s size.

    See share_of.
    """
    share = share_of(actual, expected, bound, size)
    assert share <= 1, (
        f"{what or 'values'}: {share:.3g} times the difference that rounding explains "
        f"({bound:.2g} of their size)"
    )


def packed_bound(model: LLM) -> float:
    """Return what is added to `logits_bound` where C multiplies with packed weights.

    It rounds the inputs of each product to 16 bits; next to weights of 4 bits if
    NativeModel.planes is 2. The products of a block follow one another.
    """
    products = 4 * model.config.transformer_blocks + 1
    return MARGIN * INPUT_EPS * products**0.5 if is_packed(model) else 0.0


@torch.no_grad()
def before_ties(model: LLM, ids_BT: Tensor, extra: float = 0.0) -> Tensor:
    """Return a bool [B, T]: no router has met a near tie at this token or before it.

    Every implementation then chooses the same experts. A near tie: the score of the last expert
    that is chosen is above that of the first that is not by no more than rounding may make, and
    `extra`.
    """
    B, T = ids_BT.shape
    gaps = [torch.full((B * T,), float("inf"), dtype=torch.float64)]

    def watch(router, given, out) -> None:
        scores_NE = (
            out[2].double()
            if router.selection_bias is None
            else out[2].double() + router.selection_bias
        )
        if router.top_k < router.num_experts:
            best = scores_NE.topk(router.top_k + 1, dim=-1).values
            gaps.append(best[:, -2] - best[:, -1])

    handles = [block.moe.router.register_forward_hook(watch) for block in model.layers]
    try:
        model(ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    # Scores are probabilities: an error of a router's logits moves them by a fraction of it.
    is_clear = torch.stack(gaps).amin(0) > logits_bound(model.config, T) + extra
    return is_clear.view(B, T).cumprod(1).bool()
