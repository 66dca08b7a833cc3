"""Compare runs by the files they left: results, differing settings, and what may be compared.

Two losses are ranked only if they are of one kind, of the same validation text, and of one
vocabulary. Bits per byte do not depend on the vocabulary. Times are ranked only if they were
measured on one kind of device, by one version of PyTorch. `compare` returns JSON's types.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from runtime.base.text import human_count, human_seconds, visible
from runtime.training.curves_page import NAMES_OF_A_RUN, settings_of
from runtime.training.run_curves import AXES, Run, Table

LOSS, BITS = "loss", "bits_per_byte"
# What must agree for a cross-entropy per token to mean the same.
WORDS = {LOSS: "validation loss", BITS: "bits per byte"}


def compare(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """Return the comparison of runs, each with its name.

    runs: results of each, in the order given (`result`). differences: setting -> its value in each
    run, of those that differ. groups: runs that differ in nothing but the seed. ranked_by: "loss",
    "bits_per_byte", or None where no ranking is fair; ranking: names, the best first. target: the
    value that all ranked runs reached, which each run's "until" is about. notes: what is not
    comparable and why.
    """
    notes: list[str] = []
    metric = _ranked_by(runs, notes)
    times = _times_agree(runs, notes)
    results = [result(run, name) for run, name in zip(runs, names, strict=True)]
    ranking, target = [], None
    if metric:
        _note_validation(runs, notes)
        known = [one for one in results if one[metric]["best"] is not None]
        ranking = [one["name"] for one in sorted(known, key=lambda one: one[metric]["best"])]
        target = max((one[metric]["best"] for one in known), default=None)
    if metric and target is not None:
        for run, one in zip(runs, results, strict=True):
            one["until"] = until(run, metric, target)
    return {
        "runs": results,
        "differences": differences(runs),
        "groups": groups(runs, results),
        "ranked_by": metric,
        "ranking": ranking,
        "target": target,
        "times_are_comparable": times,
        "notes": notes,
    }


# ------------------------------------------------------------------------------------------ results
def result(run: Run, name: str) -> dict[str, Any]:
    """Return what a run reached: JSON's types, None where it is not known."""
    tokens = _number(run.train.last("tokens_seen"))
    seconds = _number(run.train.last("seconds"))
    per_token = run.flops_per_token
    steps = run.settings("train").get("max_steps")
    return {
        "name": name,
        "folder": str(run.path.parent),
        "run_id": run.run_id,
        "step": max(run.last_step, 0),
        "max_steps": steps if type(steps) is int else None,
        LOSS: _best_and_final(run.val, LOSS),
        BITS: _best_and_final(run.val, BITS),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_sec": tokens / seconds if tokens and seconds else None,
        "parameters": _count(run.info.get("parameters")),
        "active_parameters": _count(run.info.get("active_parameters")),
        "flops": per_token * tokens if per_token and tokens else None,
        "memory_bytes": _number(run.train.last("memory_bytes")),
        "until": None,
        "messages": list(run.messages),
    }


def _best_and_final(table: Table, name: str) -> dict[str, float | int | None]:
    known = [
        (value, step)
        for value, step in zip(table.column(name), table.steps, strict=True)
        if not math.isnan(value)
    ]
    if not known:
        return {"final": None, "best": None, "best_step": None}
    best, step = min(known)
    return {"final": known[-1][0], "best": best, "best_step": step}


def until(run: Run, metric: str, target: float) -> dict[str, float | None] | None:
    """Return the step, tokens, seconds and FLOPs of the first validation at `target` or below."""
    values = run.val.column(metric)
    found = next((i for i, value in enumerate(values) if value <= target), None)
    if found is None:
        return None
    return {axis: _number(run.axis(axis, "val")[found]) for axis in AXES}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _count(value: object) -> int | None:
    return value if type(value) is int else None


# ----------------------------------------------------------------------------- what may be compared
def _kind(run: Run) -> object:
    return run.info.get("kind", "pretraining"), run.is_likelihood


def _validation_data(run: Run) -> object:
    """Return what a run's validation text was made from, by names of files without folders.

    Where that is not known, it is no other run's.
    """
    source = run.info.get("source")
    held_out = source.get("validation") if isinstance(source, dict) else None
    return _without_folders(held_out or source) or run.path


def _without_folders(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: PurePath(part).name
            if key == "name" and isinstance(part, str)
            else _without_folders(part)
            for key, part in value.items()
        }
    return [_without_folders(part) for part in value] if isinstance(value, list) else value


def _vocabulary(run: Run) -> object:
    """Return what tells a vocabulary from others: a fingerprint; of older runs, the size."""
    tokenizer = run.info.get("tokenizer")
    mark = tokenizer.get("fingerprint") if isinstance(tokenizer, dict) else None
    return mark or run.settings("model").get("vocabulary_size")


def _machine(run: Run) -> object:
    return run.info.get("device"), run.info.get("torch")


def _agree(runs: Sequence[Run], of: Callable[[Run], object]) -> bool:
    """Return whether all runs have the same of something; those without settings differ."""
    values = [of(run) if run.info else run.path for run in runs]
    return all(value == values[0] for value in values)


def _ranked_by(runs: Sequence[Run], notes: list[str]) -> str | None:
    """Return what the runs may be ranked by; add why it is not the loss to notes."""
    if not all(run.info for run in runs):
        notes.append("no ranking: a run has no settings (metrics.json), so its data is not known")
        return None
    if not _agree(runs, _kind):
        notes.append("no ranking: the runs are of different kinds of training")
        return None
    same_data = _agree(runs, lambda run: run.info.get("fingerprint") or run.path)
    if not same_data and not _agree(runs, _validation_data):
        notes.append("no ranking: the validation data differ (see source)")
        return None
    if not _agree(runs, _vocabulary):
        notes.append(
            "the vocabularies differ, so a loss per token means something else in each run: "
            "ranked by bits per byte"
        )
        return BITS
    return LOSS


def _note_validation(runs: Sequence[Run], notes: list[str]) -> None:
    """Say where runs were validated on other parts of the same text, or in another context."""

    def sequences(run: Run) -> list[object]:
        train, model = run.settings("train"), run.settings("model")
        return [train.get("val_steps"), train.get("batch_size"), model.get("context_length")]

    if not _agree(runs, sequences):
        notes.append(
            "val_steps, batch_size or context_length differ, so the validations read other "
            "sequences of the same text: python -m scripts.evaluate reads the same for all"
        )


def _times_agree(runs: Sequence[Run], notes: list[str]) -> bool:
    if _agree(runs, _machine):
        return True
    notes.append("times are not ranked: device or PyTorch differ")
    return False


# ----------------------------------------------------------------------------- settings and groups
def _own_settings(run: Run) -> dict[str, object]:
    return {name: v for name, v in settings_of(run).items() if name not in NAMES_OF_A_RUN}


def differences(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Return the settings that differ, each with its value in each run; None = it has none."""
    settings = [_own_settings(run) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name) for one in settings] for name in names}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}


def groups(runs: Sequence[Run], results: Sequence[dict]) -> list[dict[str, Any]]:
    """Return the groups of runs that differ in nothing but the seed, with mean, low and high.

    A run that has not made all of its steps is in none.
    """
    by_settings: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        settings = {name: v for name, v in _own_settings(run).items() if name != "seed"}
        if run.info and results[i]["step"] == results[i]["max_steps"]:
            by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
    return [_group(runs, results, members) for members in by_settings.values() if len(members) > 1]


def _group(runs: Sequence[Run], results: Sequence[dict], members: list[int]) -> dict[str, Any]:
    group: dict[str, Any] = {
        "runs": [results[i]["name"] for i in members],
        "seeds": [runs[i].settings("train").get("seed") for i in members],
    }
    for metric in (LOSS, BITS):
        values = [results[i][metric]["best"] for i in members]
        known = [value for value in values if value is not None]
        group[metric] = {
            "mean": statistics.fmean(known) if known else None,
            "low": min(known, default=None),
            "high": max(known, default=None),
            "n": len(known),
        }
    return group


# -------------------------------------------------------------------------------------------- lines
def lines(comparison: dict[str, Any]) -> list[str]:
    """Return a comparison as lines to print: results, settings that differ, groups, notes."""
    shown = [*_result_table(comparison), ""]
    if comparison["differences"]:
        shown += ["settings that differ", *_difference_table(comparison), ""]
    else:
        shown += ["all settings are the same", ""]
    for one in comparison["runs"]:
        shown += [f"{one['name']}: {message}" for message in one["messages"]]
    shown += summary(comparison)
    if len(comparison["ranking"]) > 1:
        shown.append(
            "is a small difference real? python -m scripts.evaluate --ckpt X --against Y gives a "
            "paired interval"
        )
    return [visible(line).rstrip() for line in shown]


def summary(comparison: dict[str, Any]) -> list[str]:
    """Return a line for each group, for each thing that is not comparable, and for the ranking."""
    shown = [_group_line(group) for group in comparison["groups"]]
    shown += [f"note: {note}" for note in comparison["notes"]]
    if len(comparison["ranking"]) > 1:
        best = ", ".join(comparison["ranking"])
        shown.append(f"best first, by {WORDS[comparison['ranked_by']]}: {best}")
    return shown


def _result_table(comparison: dict[str, Any]) -> list[str]:
    target, metric = comparison["target"], comparison["ranked_by"]
    head = ["run", "step", "val loss", "best", "at step", "bits/byte", "best", "tokens", "time"]
    head += ["tokens/s", "parameters", "active", "FLOPs"]
    if target is not None:
        head += [f"tokens to {WORDS[metric]} {target:.4f}", "time to it", "FLOPs to it"]
    rows = [head]
    for one in comparison["runs"]:
        loss, bits, reached = one[LOSS], one[BITS], one["until"] or {}
        steps = f"{one['step']:,}"
        if one["max_steps"] not in (None, one["step"]):
            steps += f" of {one['max_steps']:,}"
        row = [one["name"], steps, _four(loss["final"]), _four(loss["best"])]
        row += [_whole(loss["best_step"]), _four(bits["final"]), _four(bits["best"])]
        row += [_size(one["tokens"]), _time(one["seconds"]), _size(one["tokens_per_sec"])]
        row += [_size(one[name]) for name in ("parameters", "active_parameters")]
        row += [_flops(one["flops"])]
        if target is not None:
            row += [_size(reached.get("tokens")), _time(reached.get("seconds"))]
            row += [_flops(reached.get("flops"))]
        rows.append(row)
    return _aligned(rows)


def _difference_table(comparison: dict[str, Any]) -> list[str]:
    head = ["", *(one["name"] for one in comparison["runs"])]
    rows = [[name, *map(_value, row)] for name, row in comparison["differences"].items()]
    return _aligned([head, *rows], left=True)


def _group_line(group: dict[str, Any]) -> str:
    parts = [
        f"best {WORDS[metric]} {one['mean']:.4f} ({one['low']:.4f} to {one['high']:.4f})"
        for metric in (LOSS, BITS)
        if (one := group[metric])["n"]
    ]
    seeds = ", ".join(map(str, group["seeds"]))
    return f"{len(group['runs'])} runs of seeds {seeds}, mean and range: {'; '.join(parts)}"


def _aligned(rows: list[list[str]], left: bool = False) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if left or not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _four(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _size(value: float | None) -> str:
    return "-" if value is None else human_count(value)


def _time(value: float | None) -> str:
    return "-" if value is None else human_seconds(value)


def _flops(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _value(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
