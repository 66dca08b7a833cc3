"""Guarantees about numbers that are not finite, and about losses that jump."""

from __future__ import annotations

import math
import random

import numpy as np
import torch

import train
from config_model import TrainConfig
from runtime.training.state import RecentLoss, RunState
from tests import builders_runs
from tests.builders import random_model, tiny_config
from tests.promises import Promise, Tally

STEPS = 10


class _Batches:
    """Endless samples of a small regular text."""

    def batch(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack(
            [(torch.arange(13) * (1 + i % 3) + i) % 61 for i in range(first, first + 2)]
        )
        return rows[:, :-1], rows[:, 1:]


def _fit(
    poison: dict[int, str],
) -> tuple[RunState, list[dict], dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Run a short training where some loss calls (two per step) are damaged in some place.

    Return its state, records, weights, and what it saved.
    """
    model, records, saved, call = random_model(tiny_config(), 1), [], [], iter(range(10**6))

    def loss_fn(model, batch):
        out, where = train.next_token_loss(model, batch), poison.get(next(call))
        loss = out.cross_entropy_sum
        if where in ("nan loss", "inf loss"):
            loss = loss * (math.nan if where == "nan loss" else math.inf)
        elif where in (
            "nan gradient",
            "inf gradient",
        ):
            # The loss stays what it is, one weight's gradient does not.
            weight = model.layers[0].moe.experts.w_in[0, 0, 0]
            gradient = torch.tensor(math.nan if where == "nan gradient" else math.inf)
            weight.register_hook(lambda g: gradient)
            loss = loss + 0.0 * weight
        elif where == "nan router":
            return out._replace(aux_loss=out.aux_loss * math.nan)
        return out._replace(cross_entropy_sum=loss)

    config = TrainConfig(
        batch_size=2,
        grad_accum=2,
        max_steps=STEPS,
        warmup_steps=1,
        lr=3e-3,
        log_interval=1,
        save_interval=1,
        device="cpu",
    )
    state = builders_runs.fit(
        model,
        _Batches(),
        config,
        loss_fn,
        on_log=records.append,
        on_save=lambda state, val_loss, is_best: saved.append(
            {n: p.detach().clone() for n, p in model.state_dict().items()}
        ),
    )
    return state, records, dict(model.state_dict()), saved


def not_finite(count: int) -> Tally:
    """Make something non-finite at a random call: that step changes nothing and is counted.

    Nothing non-finite is saved, and the loss ends where it would have.
    """
    tally, r = Tally(), random.Random(9)
    _, clean, _, _ = _fit({})
    for i in range(count):
        call, where = (
            r.randrange(2 * (STEPS - 2)),
            r.choice(["nan loss", "inf loss", "nan gradient", "inf gradient", "nan router"]),
        )
        state, records, _, saved = _fit({call: where})
        step = call // 2
        finite = all(torch.isfinite(t).all() for weights in saved for t in weights.values())
        counted = state.skipped_steps == 1 and [
            j for j, record in enumerate(records) if not math.isfinite(record["loss"])
        ] == [step]
        learned = abs(records[-1]["loss"] - clean[-1]["loss"]) < 0.1 * clean[0]["loss"]
        tally.add(
            finite and counted and learned and len(saved) == STEPS - 1,
            f"try {i}: {where} at call {call}: finite {finite}, counted {counted}, last loss "
            f"{records[-1]['loss']:.3f} and {clean[-1]['loss']:.3f}",
        )
    return tally


def spikes(count: int) -> Tally:
    """Losses that fall, level off and are noisy, with a few jumps.

    Each is noticed at its own step, and nothing else in 10,000 steps.
    """
    tally, r = Tally(), np.random.default_rng(10)
    t, alarms, places = np.arange(10_000), 0, set()
    losses = 2 + 6 * np.exp(-t / 800) + (0.05 + 0.2 * np.exp(-t / 500)) * r.standard_normal(10_000)
    recent = RecentLoss(RunState(), 6.0, torch.device("cpu"))
    places.update(r.choice(np.arange(100, 10_000), count, replace=False).tolist())
    for step, loss in enumerate(losses.tolist()):
        if step in places:
            jump = torch.tensor(loss + 1.5)
            tally.add(bool(recent.is_spike(jump)), f"the jump at step {step} was not seen")
            recent.add(jump, torch.tensor(True))
        alarms += bool(recent.is_spike(torch.tensor(loss)))
        recent.add(torch.tensor(loss), torch.tensor(False))
    tally.detail = {"false alarms in 10,000 steps": alarms}
    if alarms:
        tally.add(False, f"{alarms} false alarms")
    return tally


PROMISES = [
    Promise(
        9,
        "A NaN or Inf in loss, gradient or router: the step changes nothing and is counted, "
        "nothing not finite is saved",
        not_finite,
        10,
        1000,
        200,
        "NaN in 54 of 58 tensors on disk, exit code 0",
    ),
    Promise(
        10,
        "`--spike_sigmas 6`: a jump of the loss is skipped at its own step, and no step is "
        "skipped without one",
        spikes,
        20,
        200,
        20,
        "no such thing",
    ),
]
