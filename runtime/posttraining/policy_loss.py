"""The mathematics of group relative policy optimization: advantages, losses, KL.

GRPO is Shao et al. 2024 (arXiv 2402.03300). The loss of a step is a sum over the tokens of its
answers, divided by all of these tokens (DAPO, 2503.14476, equation 8): so a token counts the same
in a short answer and a long one. An answer's advantage is its reward minus its group's mean (Dr.
GRPO, 2503.20783); groups whose rewards are all equal teach nothing.

Shape letters: S answers, M their tokens, G answers to a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def advantages_of(rewards_G: Sequence[float], divide_by_std: bool = False) -> list[float]:
    """Return the advantage of each answer of a group; exactly 0.0 where all rewards are equal.

    divide_by_std: by the standard deviation of the group, as in the first paper; it gives groups
    that nearly always succeed or fail more weight.
    """
    count = len(rewards_G)
    # Not by the mean, whose rounding would leave a tiny advantage.
    if min(rewards_G) == max(rewards_G):
        return [0.0] * count
    mean = sum(rewards_G) / count
    differences = [reward - mean for reward in rewards_G]
    if not divide_by_std:
        return differences
    deviation = (sum(d * d for d in differences) / count) ** 0.5
    return [d / deviation for d in differences]


class Clip(NamedTuple):
    """How far a ratio of probabilities may go from 1 before its gradient ends.

    low, high: the range is 1 - low to 1 + high. per_sequence: the ratio is an answer's, the
    geometric mean of its tokens' (GSPO, Zheng et al. 2025, arXiv 2507.18071).
    """

    low: float
    high: float
    per_sequence: bool = False


def policy_loss(
    log_probs_M: Tensor,
    advantages_S: Tensor,
    segments_M: Tensor,
    old_log_probs_M: Tensor | None = None,
    clip: Clip | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (the sum over tokens that a step minimises, the number of tokens that are clipped).

    log_probs [M] have gradients; segments [M]: the answer of each token. Without old_log_probs the
    weights are those that sampled: -sum A log p, whose gradient is that of the ratio at 1. With
    them, -sum min(r A, clip(r) A) (2402.03300, equation 3). An answer's ratio counts once for each
    of its tokens, so that both kinds have the same gradient at 1.
    """
    advantages_M = advantages_S.to(log_probs_M)[segments_M]
    if old_log_probs_M is None:
        return -(advantages_M * log_probs_M).sum(), torch.zeros_like(advantages_M).sum()
    assert clip is not None, "old log-probabilities come with a clip"
    ratios_M = log_probs_M - old_log_probs_M.to(log_probs_M)
    if clip.per_sequence:
        ratios_M = _means(ratios_M, segments_M, len(advantages_S))[segments_M]
    ratios_M = ratios_M.exp()
    clipped_M = ratios_M.clamp(1 - clip.low, 1 + clip.high)
    gains_M = torch.minimum(ratios_M * advantages_M, clipped_M * advantages_M)
    is_clipped_M = ratios_M * advantages_M > clipped_M * advantages_M
    return -gains_M.sum(), is_clipped_M.sum().to(advantages_M)


def _means(values_M: Tensor, segments_M: Tensor, count: int) -> Tensor:
    """Return the mean of each segment's values, [S]."""
    zeros_S = torch.zeros(count, dtype=values_M.dtype, device=values_M.device)
    sums_S = zeros_S.index_add(0, segments_M, values_M)
    counts_S = zeros_S.index_add(0, segments_M, torch.ones_like(values_M))
    return sums_S / counts_S.clamp(min=1)


def kl_terms(log_probs_M: Tensor, reference_M: Tensor) -> Tensor:
    """Return a term [M] for each sampled token, whose mean is KL(policy, reference).

    exp(d) - d - 1 with d = log reference - log policy: never negative, and unbiased under the
    policy ("k3", Schulman 2020, "Approximating KL Divergence").
    """
    d_M = reference_M.to(log_probs_M) - log_probs_M
    return torch.expm1(d_M) - d_M
