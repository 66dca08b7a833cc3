"""runtime/posttraining/policy_loss.py against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.posttraining.policy_loss import Clip, advantages_of, kl_terms, policy_loss


# ------------------------------------------------------------------------------------- advantages
@pytest.mark.parametrize(
    ("rewards", "by_std", "expected"),
    [
        ([1.0, 0.0, 0.0, 1.0], False, [0.5, -0.5, -0.5, 0.5]),
        ([3.0, 0.0, 0.0], False, [2.0, -1.0, -1.0]),
        ([1.0, 0.0, 0.0, 1.0], True, [1.0, -1.0, -1.0, 1.0]),
        ([4.0, 0.0], True, [1.0, -1.0]),
        ([-2.0, -1.0], False, [-0.5, 0.5]),
    ],
)
def test_advantages_by_hand(rewards, by_std, expected):
    assert advantages_of(rewards, by_std) == expected


@pytest.mark.parametrize("by_std", [False, True])
def test_equal_rewards_have_no_advantage_at_all(by_std):
    """The mean of ten times 0.1 is not 0.1: the rest would be an advantage, and over its standard
    deviation a large one.
    """
    assert sum([0.1] * 10) / 10 != 0.1
    assert advantages_of([0.1] * 10, by_std) == [0.0] * 10


# -------------------------------------------------------------------------------------- the loss
def loss_and_gradient(log_probs, advantages, segments, old=None, clip=None):
    log_probs_M = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    old_M = None if old is None else torch.tensor(old, dtype=torch.float64)
    advantages_S = torch.tensor(advantages, dtype=torch.float64)
    total, clipped = policy_loss(log_probs_M, advantages_S, torch.tensor(segments), old_M, clip)
    (gradient,) = torch.autograd.grad(total, log_probs_M)
    return total.item(), gradient.tolist(), clipped.item()


def test_an_answer_above_the_mean_becomes_likelier():
    """The gradient of the loss with respect to each token's log-probability is -A."""
    total, gradient, clipped = loss_and_gradient([-1.0, -2.0, -3.0], [0.5, -0.25], [0, 0, 1])
    assert total == 0.5 * 3 - 0.25 * 3 and gradient == [-0.5, -0.5, 0.25] and clipped == 0


@pytest.mark.parametrize("per_sequence", [False, True])
def test_at_ratio_one_the_gradient_is_that_without_a_ratio(per_sequence):
    log_probs, advantages, segments = [-1.0, -2.0, -3.0, -0.5], [0.5, -0.25], [0, 0, 1, 1]
    _, plain, _ = loss_and_gradient(log_probs, advantages, segments)
    clip = Clip(0.2, 0.28, per_sequence)
    _, ours, clipped = loss_and_gradient(log_probs, advantages, segments, log_probs, clip)
    assert ours == pytest.approx(plain, rel=1e-15) and clipped == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "has_gradient"),
    [
        # Likelier is good: no further than 1.28.
        (1.2, 1.0, 1.2, True),
        (1.5, 1.0, 1.28, False),
        (0.5, 1.0, 0.5, True),
        # Likelier is bad: no further down than 0.8, and always back.
        (0.9, -1.0, -0.9, True),
        (0.5, -1.0, -0.8, False),
        (1.5, -1.0, -1.5, True),
    ],
)
def test_the_table_of_clips(ratio, advantage, gain, has_gradient):
    total, (gradient,), clipped = loss_and_gradient(
        [math.log(ratio) - 1.0], [advantage], [0], [-1.0], Clip(0.2, 0.28)
    )
    assert -total == pytest.approx(gain, rel=1e-12)
    expected = -ratio * advantage if has_gradient else 0.0
    assert gradient == pytest.approx(expected, rel=1e-12) and clipped == (not has_gradient)


def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens():
    """GSPO, equation 7: tokens of 2.0 and 0.5 are a sequence of 1.0, and nothing is clipped."""
    log_2 = math.log(2.0)
    clip = Clip(0.2, 0.28, per_sequence=True)
    total, gradient, clipped = loss_and_gradient(
        [log_2, -log_2, log_2, log_2], [1.0, 1.0], [0, 0, 1, 1], [0.0] * 4, clip
    )
    # Each answer counts once for each of its tokens; the second is clipped at 1.28.
    assert total == pytest.approx(-2 * 1.0 - 2 * 1.28, rel=1e-12)
    assert gradient == pytest.approx([-1.0, -1.0, 0.0, 0.0], rel=1e-12) and clipped == 2


# ---------------------------------------------------------------------------------------- the KL
def test_the_terms_mean_is_the_divergence():
    """Under the policy, exactly: a sum over all ids by their probability. None is negative."""
    torch.manual_seed(0)
    policy_V, reference_V = torch.randn(2, 50, dtype=torch.float64).log_softmax(dim=1)
    terms_V = kl_terms(policy_V, reference_V)
    divergence = (policy_V.exp() * (policy_V - reference_V)).sum()
    assert (policy_V.exp() * terms_V).sum().item() == pytest.approx(divergence.item(), rel=1e-12)
    assert (terms_V >= 0).all() and (kl_terms(policy_V, policy_V) == 0).all()
