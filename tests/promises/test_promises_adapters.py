"""Check that the guarantees of tests/promises/adapters.py can be broken."""

import pytest

from runtime.checkpoint import adapter as checkpoint
from runtime.interop import adapters as files
from runtime.posttraining import lora
from tests.promises import adapters


def test_experts_in_another_order_are_noticed(monkeypatch):
    """B by expert and then rank: each expert would get a mixture of all of them."""
    pytest.importorskip("peft")
    monkeypatch.setattr(
        files, "_stacked", lambda a, b: (a.flatten(0, 1), b.permute(1, 0, 2).flatten(1))
    )
    tally = adapters.same_in_peft(6)
    # gpt-oss alone is stacked, and with rank 1 both orders are one.
    assert tally.failures and all("gpt_oss" in line for line in tally.failures)


def test_another_factor_is_noticed(monkeypatch):
    """In a decoder's weights, and in a file's."""
    for module in (lora, checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(module, "merged", lambda w, a, b, scale: w + scale**2 * b @ a)
            assert adapters.merged_is_the_same(3).held == 0


def test_a_base_that_moves_is_noticed(monkeypatch):
    """A router that learns with its adapters."""
    real = lora.attach

    def attach(model, *given):
        real(model, *given)
        for block in model.layers:
            block.moe.router.weight.requires_grad_(True)

    monkeypatch.setattr(adapters, "attach", attach)
    assert adapters.merged_is_the_same(3).held == 0
