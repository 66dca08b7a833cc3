"""Guarantees about reinforcement learning: the sampler is the trainer, and steps can be split."""

from __future__ import annotations

import random

import torch

from model import LLM
from runtime.posttraining.forms import Prompt
from runtime.posttraining.groups import Group, pack_groups
from runtime.posttraining.packing import can_share_rows
from runtime.posttraining.policy_loss import Clip, advantages_of, policy_loss
from runtime.posttraining.prompts import Asked
from runtime.posttraining.reward import Earned
from runtime.posttraining.rollouts import Sampler, without_ids
from tests.builders import random_architecture, random_model
from tests.numeric import before_ties
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt

# Of the largest logit.
MOST_GAP = 1e-5
# Of the largest gradient, in float64.
MOST_SPLIT = 1e-12


def _rolled(seed: int, dtype: torch.dtype) -> tuple[LLM, Sampler, list[Group], random.Random]:
    """Return a random model, its sampler, and groups of answers with random rewards."""
    r = random.Random(seed)
    config = random_architecture(r)
    model, V = random_model(config, seed, dtype).eval(), config.vocabulary_size
    ids = r.sample(range(V), V)
    banned = ids[2 : 2 + r.randint(0, max(0, V // 3 - 1))]
    sampler = Sampler(model, stop_ids=ids[:1], banned_ids=banned, max_new_tokens=r.randint(1, 12))
    return model, sampler, _groups(model, sampler, r, seed), r


def _groups(model: LLM, sampler: Sampler, r: random.Random, seed: int) -> list[Group]:
    V, size = model.config.vocabulary_size, r.randint(2, 5)
    prompts = [[r.randrange(V) for _ in range(r.randint(1, 20))] for _ in range(r.randint(1, 5))]
    groups = []
    for i, answers in enumerate(sampler.sample(prompts, size, seed)):
        earned = [Earned(r.choice([0.0, 0.5, 1.0]), {}) for _ in answers]
        advantages = advantages_of([one.total for one in earned])
        groups.append(Group(i, Asked(Prompt([]), prompts[i]), answers, earned, advantages))
    return groups


def _trained(model: LLM, groups: list[Group], banned: list[int], keep: bool):
    """Return (the packed batch, the trainer's log-probabilities of its tokens)."""
    config = model.config
    share = can_share_rows(config)
    batch = pack_groups(groups, config.context_length, share, keep).batch(torch.float64)
    ids_BT, targets_BT, starts_BT, rows_M = batch[:4]
    with without_ids(model, torch.tensor(banned, dtype=torch.int64)):
        out = model(ids_BT, targets_BT, starts_BT=starts_BT, rows_M=rows_M, per_token=True)
    return batch, out.log_probs


def sampler_is_trainer(count: int) -> Tally:
    """48. Each sampled id's log-probability, from the decoder, against the packed training pass.

    Over random architectures, prompts, banned ids; before and after the weights changed. Tokens
    after a near tie of a router, where either expert is right, are left out.
    """
    tally, worst, tokens = Tally(), [0.0], [0]
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            model, sampler, groups, r = _rolled(seed, torch.float32)
            for _ in range(2):
                with torch.no_grad():
                    batch, log_probs_M = _trained(model, groups, sampler.banned_ids, True)
                    logits_BTV = model(batch[0], starts_BT=batch[2]).logits
                    sure_M = before_ties(model, batch[0]).flatten()[batch[3]]
                assert log_probs_M is not None
                gap_M = (log_probs_M - batch[6]).abs()[sure_M] / logits_BTV.abs().max().clamp(min=1)
                tokens.append(len(gap_M))
                worst.append(gap_M.max().item() if len(gap_M) else 0.0)
                assert worst[-1] <= MOST_GAP, f"off by {worst[-1]:.2g} of the largest logit"
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.1).add_(0.01)
                groups = _groups(model, sampler, r, seed)

        attempt(tally, f"seed {seed}", check)
    tally.detail = {
        "tokens": sum(tokens),
        "largest difference, as a share of the largest logit": f"{max(worst):.1g}",
    }
    return tally


def splits(count: int) -> Tally:
    """49. A step's gradient in one micro-batch, and split at random: the same, in float64.

    Over random architectures and both kinds of ratio; weights that have changed since the answers
    were sampled. The task's own loss: balance and z losses are taken per micro-batch.
    """
    tally, worst = Tally(), [0.0]
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            model, sampler, groups, r = _rolled(seed, torch.float64)
            clip = Clip(0.2, 0.28, r.random() < 0.5) if r.random() < 0.7 else None
            total = sum(group.num_tokens for group in groups)

            def gradient(parts: list[list[Group]]) -> torch.Tensor:
                model.zero_grad(set_to_none=False)
                for part in parts:
                    batch, log_probs_M = _trained(model, part, sampler.banned_ids, False)
                    old_M = None if clip is None else 0.9 * batch[6]
                    loss, _ = policy_loss(log_probs_M, batch[5], batch[4], old_M, clip)
                    (loss / total).backward()
                return torch.cat([p.grad.flatten() for p in model.parameters()])

            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            whole = gradient([groups]).clone()
            cut = r.randint(1, len(groups))
            split = gradient([part for part in (groups[:cut], groups[cut:]) if part])
            # Where a single id is left to draw, the gradient is 0 but for rounding.
            size = whole.abs().max().clamp(min=1e-3)
            worst.append(((split - whole).abs().max() / size).item())
            assert worst[-1] <= MOST_SPLIT, f"differs by {worst[-1]:.2g}"

        attempt(tally, f"seed {seed}", check)
    tally.detail = {"largest relative difference": f"{max(worst):.1g}"}
    return tally


PROMISES = [
    Promise(
        48,
        "GRPO's sampler is its trainer: the same log-probabilities after each update (fp32, 1e-5)",
        sampler_is_trainer,
        20,
        300,
        300,
    ),
    Promise(
        49,
        "GRPO: any split of a step into micro-batches is the same gradient (fp64 to 1e-12)",
        splits,
        20,
        200,
        200,
    ),
]
