"""Training settings that were not given follow those that were, where they would not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from config_model import TrainConfig


def follow(
    values: dict, explicit: Iterable[str], config_class: type[TrainConfig] = TrainConfig
) -> tuple[dict, tuple[str, ...]]:
    """Return `values` with what does not fit adapted, and a line for each value that changed.

    Only defaults and a preset's values are adapted, and only where they do not fit what was given:
    the published run's numbers stay. explicit: names of what was given, which is never changed.
    config_class: whose defaults these are.
    """
    known = {f.name: f.default for f in dataclasses.fields(config_class)} | values
    lr, min_lr = known["lr"], known["min_lr"]
    steps, warmup = known["max_steps"], known["warmup_steps"]
    # A file can give anything. TrainConfig says what is wrong with it.
    if not all(type(value) in (int, float) for value in (lr, min_lr, steps, warmup)):
        return values, ()
    changed, notes = {}, []
    if min_lr > lr and "min_lr" not in explicit:
        changed["min_lr"] = lr / 10
        notes.append(f"min_lr {min_lr:g} -> {lr / 10:g}, a tenth of lr {lr:g} (--min_lr sets it)")
    # With epochs the steps are not known before the data is open.
    if warmup >= steps and "warmup_steps" not in explicit and not known["epochs"]:
        changed["warmup_steps"] = tenth = steps // 10
        notes.append(
            f"warmup_steps {warmup:,} -> {tenth:,}, a tenth of max_steps {steps:,} "
            "(--warmup_steps sets it)"
        )
    return values | changed, tuple(notes)
