"""Check that the guarantees of tests/promises/numbers.py can be broken."""

import torch

import train
from runtime.training.state import RecentLoss
from tests.promises import numbers


def test_a_step_that_is_taken_all_the_same_is_noticed(monkeypatch):
    monkeypatch.setattr(
        train.torch,
        "isfinite",
        lambda t, real=torch.isfinite: real(torch.zeros_like(t)) if t.dim() == 0 else real(t),
    )
    assert numbers.not_finite(3).held < 3


def test_a_deaf_detector_is_noticed(monkeypatch):
    monkeypatch.setattr(RecentLoss, "is_spike", lambda self, loss: torch.tensor(False))
    assert numbers.spikes(5).held == 0
