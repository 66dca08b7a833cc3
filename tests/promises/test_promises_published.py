"""Check that the guarantees of tests/promises/published.py can be broken."""

import torch

import runtime.interop.huggingface
from tests.promises import published


def test_an_export_that_is_another_function_is_noticed(monkeypatch):
    """Gate and up are swapped on the way out and on the way in.

    A round trip alone would not see it.
    """
    other = {
        name: family._replace(gate=family.up, up=family.gate)
        for name, family in runtime.interop.huggingface.FAMILIES.items()
    }
    monkeypatch.setattr(runtime.interop.huggingface, "FAMILIES", other)
    tally = published.same_function(6)
    # gpt-oss's experts are stacked.
    assert tally.held == 2 and tally.tried == 6


def test_a_bit_that_gets_lost_is_noticed(monkeypatch):
    real = published.import_tensor
    monkeypatch.setattr(
        published, "import_tensor", lambda *given: real(*given).to(torch.bfloat16).float()
    )
    assert published.same_function(3).held == 0


def test_shares_of_the_balance_loss_come_back():
    """Twelve digits were kept both ways.

    0.01 for 2 blocks, 7 experts came back as 0.00999999999999.
    """
    for coefficient in (0.01, 0.02, 0.001, 0.9, 0.0, 1e-4, 0.0123):
        for blocks in range(1, 50):
            for top_k in range(1, 9):
                there = runtime.interop.huggingface._scaled(coefficient, blocks / top_k)
                assert runtime.interop.huggingface._scaled(there, top_k / blocks) == coefficient
