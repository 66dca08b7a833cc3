"""Check that the guarantees of tests/promises/policy.py can be broken."""

import torch

from runtime.inference.decoder import Decoder
from tests.promises import policy


def test_a_stale_cache_is_noticed(monkeypatch):
    """The next prompts are others, so what the first ones left must be found by their ids."""
    monkeypatch.setattr(Decoder, "weights_changed", lambda self: None)
    groups = policy._groups

    def same_prompts(model, sampler, r, seed):
        r.seed(seed)
        return groups(model, sampler, r, seed)

    monkeypatch.setattr(policy, "_groups", same_prompts)
    assert policy.sampler_is_trainer(6).held < 6


def test_ids_that_only_the_sampler_leaves_out_are_noticed(monkeypatch):
    trained = policy._trained
    monkeypatch.setattr(
        policy, "_trained", lambda model, groups, banned, keep: trained(model, groups, [], keep)
    )
    assert policy.sampler_is_trainer(6).held < 6


def test_a_mean_of_means_is_noticed(monkeypatch):
    loss = policy.policy_loss
    monkeypatch.setattr(
        policy,
        "policy_loss",
        lambda log_probs_M, *args: (
            loss(log_probs_M, *args)[0] / len(log_probs_M),
            torch.zeros(()),
        ),
    )
    assert policy.splits(6).held < 6
