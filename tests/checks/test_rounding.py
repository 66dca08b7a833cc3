"""runtime/checks/rounding.py: its bounds hold for other orders of addition and see a small fault.

They are no wider than necessary.
"""

from __future__ import annotations

import copy

import pytest
import torch

from runtime.checks.rounding import gradients_bound, length_of_sums, logits_bound, rounding, size_of
from tests.builders import random_config, random_model, tiny_config
from tests.numeric import assert_close, is_close, share_of


def in_order(terms_NK: torch.Tensor) -> torch.Tensor:
    """Sums over K, one addition after the other."""
    total = torch.zeros_like(terms_NK[:, 0])
    for term in terms_NK.unbind(1):
        total = total + term
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [2, 30, 1000, 20_000])
@pytest.mark.parametrize("positive", [False, True])
def test_sums_in_two_orders_are_within_the_bound_and_not_far_from_it(dtype, length, positive):
    """Forward against backward, which differ more than what libraries do.

    Positive numbers, as softmax adds them, and numbers of both signs.
    """
    draw = torch.rand if positive else torch.randn
    terms = draw(300, length, dtype=dtype, generator=torch.Generator().manual_seed(length))
    share = share_of(in_order(terms), in_order(terms.flip(1)), rounding(dtype, length))
    assert share <= 0.5 and (length == 2 or share > 0.01), share


def test_lengths_of_several_sums_add_up():
    assert (
        rounding(torch.float32, 9, 16)
        == rounding(torch.float32, 25)
        == pytest.approx(5 / 3 * rounding(torch.float32, 9))
    )
    assert rounding(torch.bfloat16, 4) == pytest.approx(2**16 * rounding(torch.float32, 4))


def test_a_deeper_a_wider_and_a_longer_model_may_differ_by_more():
    config = tiny_config()
    for changes, tokens in (
        (dict(transformer_blocks=4), 8),
        (dict(d_model=64), 8),
        (dict(d_ff=500), 8),
        (dict(num_heads=16), 8),
        ({}, 80),
    ):
        assert length_of_sums(tiny_config(**changes), tokens) > 1.2 * length_of_sums(config, 8), (
            changes
        )


@pytest.mark.parametrize("seed", range(12))
def test_float32_is_within_the_bound_of_float64_and_a_small_fault_is_not(seed):
    """Logits and gradients. The fault: a weight of one block off by a thousandth of its size."""
    config = random_config(seed)
    model = random_model(config, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger weights make gradients, and the errors in them, grow from block to block.
            parameter.mul_(0.7)
    exact, off = copy.deepcopy(model).double(), copy.deepcopy(model)
    with torch.no_grad():
        off.layers[-1].moe.experts.w_out.mul_(1.001)
    ids = torch.randint(
        0,
        config.vocabulary_size,
        (2, config.context_length),
        generator=torch.Generator().manual_seed(seed),
    )
    logits, bound = exact(ids).logits, logits_bound(config, config.context_length)
    assert_close(model(ids).logits, logits, bound)
    assert not is_close(off(ids).logits, logits, bound)
    for one in (model, exact):
        out = one(ids, ids)
        (out.cross_entropy_sum / out.num_targets).backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        # The router of one expert takes no part.
        if other.grad is None:
            assert parameter.grad is None and config.num_experts == 1
        # Where nothing but rounding is left, there is nothing to compare with.
        elif size_of(other.grad) > 1e-6:
            assert_close(
                parameter.grad,
                other.grad,
                gradients_bound(config, config.context_length, rows=2),
                name,
            )


def test_nothing_that_is_not_a_number_is_close():
    good, nan, inf = (
        torch.ones(3),
        torch.tensor([1.0, float("nan"), 1.0]),
        torch.tensor([1.0, float("inf"), 1.0]),
    )
    for one, two in ((good, nan), (nan, good), (nan, nan), (inf, inf), (inf, good), (good, inf)):
        assert not is_close(one, two, 1.0)
    assert is_close(torch.zeros(3), torch.zeros(3), 1e-6) and not is_close(
        good, torch.zeros(3), 1e-6
    )
    with pytest.raises(AssertionError, match="shapes"):
        is_close(good, torch.ones(1), 1.0)
    with pytest.raises(AssertionError, match="logits: 2 times"):
        assert_close(1.2 * good, good, 0.1, "logits")
