"""Fine-tunings on several ranks, and in one process, for comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import train
from runtime.base.ranks import Ranks
from runtime.posttraining.flags import settings_of
from runtime.posttraining.preference import DpoConfig, Preference
from runtime.posttraining.sft import Sft, SftConfig
from runtime.training.plan import TrainPlan, initial_state, make_plan
from runtime.training.setup import set_up
from tests.builders_runs import comparable

KINDS = {"sft": (Sft, SftConfig), "dpo": (Preference, DpoConfig)}


class Tuned(NamedTuple):
    """What a run ends with, as whole tensors by name, and what it logged but for times.

    plain: the weights of the plain model that a score asks.
    """

    weights: dict[str, Tensor]
    plain: dict[str, Tensor]
    moments: dict[str, Tensor]
    records: list[dict]


def planned(ranks: Ranks, kind: str, flags: list[str]) -> TrainPlan:
    """Return the plan of a run of KINDS, on one thread."""
    task_of, config_class = KINDS[kind]
    torch.set_num_threads(1)
    return make_plan(settings_of("", flags, config_class), task_of, config_class, ranks)


def tuned(ranks: Ranks, kind: str, flags: list[str]) -> Tuned:
    """Carry out a run of KINDS, but for its saves."""
    plan = planned(ranks, kind, flags)
    state = initial_state(plan)
    model, optimizer, _ = set_up(plan, train.forward_backward)
    records: list[dict] = []
    train.fit(
        model,
        plan.task,
        plan.config,
        train.Hooks(records.append),
        optimizer=optimizer,
        state=state,
        ranks=ranks,
    )
    plain = {name: t.clone() for name, t in plan.task.plain(model).state_dict().items()}
    parameters = dict(model.named_parameters())
    return Tuned(
        {name: ranks.whole(p.detach()).clone() for name, p in parameters.items()},
        plain,
        {
            f"{key}.{name}": ranks.whole(value).clone()
            for name, p in parameters.items()
            for key, value in optimizer.state.get(p, {}).items()
        },
        comparable(records),
    )


def differing(one: Tuned, other: Tuned) -> list[str]:
    """Return the names of what is not the same to the last bit."""
    names = []
    for kind in ("weights", "plain", "moments"):
        own, theirs = getattr(one, kind), getattr(other, kind)
        names += [f"{kind} {name}" for name in own.keys() ^ theirs.keys()]
        names += [
            f"{kind} {name}"
            for name in own.keys() & theirs.keys()
            if not own[name].equal(theirs[name])
        ]
    return names + ([] if one.records == other.records else ["records"])
