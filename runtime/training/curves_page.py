"""The page of curves: what it shows of runs, and the page itself, which needs nothing else.

One page serves a comparison and a run that is followed. A finished page has its data inside; a live
one asks a server for what is new (runtime.serving.watch), in the same form.

`run_data` gives, per run, tables of at most MOST_POINTS rows: "train", "val", "score" and "router".
A table is {"step", "tokens", "seconds": [row], "columns": {name: {"mean", "low", "high": [row],
"bad": [step]}}}. low and high are null where each row is one record. bad holds the steps of records
in which the number was not finite; in a row it is then left out, or null.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.base.page import clean, fill, json_in_html, read_template
from runtime.training.metrics import HEALTHY_LOAD
from runtime.training.run_curves import MOST_POINTS, Run, Table

PAGE = Path(__file__).with_name("curves_page.html")
KINDS = ("train", "val", "score")
# Of the experts' loads over time: columns of the heat map.
MOST_COLUMNS = 200
# Seconds between two questions of a live page.
POLL_SECONDS = 2
# A run without a new record for this long, and for so many of its usual intervals, is stale.
STALE_SECONDS, STALE_INTERVALS = 120.0, 10
# The records that the usual interval and the time left are measured over.
RECENT_RECORDS = 20
# What any two runs may differ in without being different.
NAMES_OF_A_RUN = ("run_name", "ckpt_dir", "graph_dir", "resume", "command")
# Of what a file says: a longer text is no name, no setting and no event.
LONGEST_NAME, LONGEST_TEXT, LONGEST_SAMPLE = 200, 500, 4_000
MOST_SETTINGS, MOST_EVENTS, MOST_SAMPLES = 500, 500, 200


# ------------------------------------------------------------------------------------------- tables
def _plain(value: float) -> float | None:
    """Return a number with the 6 digits that a page can show; None if it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _whole(value: float) -> float | None:
    """Return a count with all its digits, without a fraction; None if it is not finite."""
    return round(value) if math.isfinite(value) else None


def _stretches(count: int) -> list[range]:
    """Return which records make each of at most MOST_POINTS rows."""
    rows = min(count, MOST_POINTS)
    return [range(i * count // rows, (i + 1) * count // rows) for i in range(rows)]


def _column(rows: list[range], values: Sequence[float]) -> dict:
    """Return a column's mean, lowest and highest number of each row."""
    if not any(len(row) > 1 for row in rows):
        return {"mean": [_plain(values[row[0]]) for row in rows], "low": None, "high": None}
    column: dict[str, list] = {"mean": [], "low": [], "high": []}
    for row in rows:
        known = [v for v in values[row.start : row.stop] if math.isfinite(v)]
        column["mean"].append(_plain(math.fsum(known) / len(known)) if known else None)
        column["low"].append(_plain(min(known)) if known else None)
        column["high"].append(_plain(max(known)) if known else None)
    return column


def _bad(table: Table, values: Sequence[float], first: int) -> list[int]:
    """Return the steps from record number `first` on at which a number was not finite."""
    at = {step: bisect_left(table.steps, step) for step in table.not_finite}
    bad = [step for step, i in at.items() if i >= first and not math.isfinite(values[i])]
    return bad[-MOST_POINTS:]


def _table(run: Run, kind: str, first: int = 0) -> dict:
    """Return a table of a run's records of one kind, from record number `first` on."""
    table: Table = getattr(run, kind)
    rows = _stretches(len(table.steps) - first)
    ends = [first + row[-1] for row in rows]
    tokens, seconds = run.axis("tokens", kind), run.axis("seconds", kind)
    return {
        "step": [table.steps[i] for i in ends],
        "tokens": [_whole(tokens[i]) for i in ends],
        "seconds": [_plain(seconds[i]) for i in ends],
        "columns": {
            name[:LONGEST_NAME]: _column(rows, values[first:]) | {"bad": _bad(table, values, first)}
            for name, values in table.columns.items()
        },
    }


def _at_steps(run: Run, steps: Sequence[int]) -> dict:
    """Return the tokens and seconds of training records by their steps."""
    tokens, seconds = run.axis("tokens"), run.axis("seconds")
    found = [min(bisect_left(run.train.steps, step), len(run.train.steps) - 1) for step in steps]
    return {
        "step": list(steps),
        "tokens": [_whole(tokens[i]) for i in found],
        "seconds": [_plain(seconds[i]) for i in found],
    }


def _numbers(values: object) -> list[float]:
    """Return the finite numbers of a list, at any depth."""
    if isinstance(values, list):
        return [number for value in values for number in _numbers(value)]
    is_number = type(values) in (int, float) and math.isfinite(values)  # type: ignore[arg-type]
    return [float(values)] if is_number else []  # type: ignore[arg-type]


def _routers(run: Run, after: int) -> list[tuple[int, dict]]:
    """Return what the routers did at the steps after `after` of which a training record tells."""
    steps = run.train.steps

    def is_known(step: int) -> bool:
        at = bisect_left(steps, step)
        return at < len(steps) and steps[at] == step

    return [one for one in run.router(MOST_COLUMNS, after) if is_known(one[0])]


def _router_table(run: Run, routers: list[tuple[int, dict]]) -> dict:
    """Return the routers' numbers as columns: mean, lowest and highest of all blocks.

    entropy: as a share of the highest, where all experts are equally likely. load: the least and
    the most loaded of all experts, in fair shares.
    """
    columns: dict[str, dict] = {
        name: {"mean": [], "low": [], "high": [], "bad": []}
        for name in ("entropy", "dropped", "load")
    }
    for _, numbers in routers:
        load = numbers.get("expert_load") or []
        experts = max(map(len, load), default=0)
        highest = math.log(experts) if experts > 1 else math.nan
        found = {
            "entropy": [value / highest for value in _numbers(numbers.get("router_entropy"))],
            "dropped": _numbers(numbers.get("dropped_share")),
            "load": _numbers(load),
        }
        for name, values in found.items():
            known = [value for value in values if math.isfinite(value)]
            mean = math.fsum(known) / len(known) if known and name != "load" else math.nan
            columns[name]["mean"].append(_plain(mean))
            columns[name]["low"].append(_plain(min(known, default=math.nan)))
            columns[name]["high"].append(_plain(max(known, default=math.nan)))
    steps = [step for step, _ in routers]
    return _at_steps(run, steps) | {"columns": columns}


def loads_data(run: Run, after: int = -1) -> dict:
    """Return the load of each expert over time, after a step: [column][block][expert].

    A load is in hundredths of the fair share, which halves the bytes. None: not finite.
    """
    routers = [(step, one["expert_load"]) for step, one in _routers(run, after)
               if one.get("expert_load")]  # fmt: skip
    loads = [
        [
            [
                min(round(100 * load), 10**6) if load is not None and math.isfinite(load) else None
                for load in row
            ]
            for row in block_rows
        ]
        for _, block_rows in routers
    ]
    return _at_steps(run, [step for step, _ in routers]) | {"load": loads}


# ------------------------------------------------------------------------------------------- status
def _text(value: object, longest: int = LONGEST_TEXT) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _setting(value: object) -> object:
    """Return a setting as a page can show it: a finite number, a bool or a short text."""
    if value is None or type(value) is bool:
        return value
    if type(value) in (int, float):
        return value if abs(value) < 2**53 else _text(f"{value:.17g}")  # type: ignore
    if isinstance(value, str):
        return _text(value)
    try:
        return _text(json.dumps(value))
    except (ValueError, RecursionError):
        return "too deep to be shown"


def settings_of(run: Run) -> dict:
    """Return the settings of a run by name: the model's, training's, the data's, the machine's."""
    source = run.info.get("source")
    parts = [
        run.settings("model"),
        run.settings("train"),
        {f"data: {name}": value for name, value in source.items()}
        if isinstance(source, dict)
        else {"data": source},
        {name: run.info.get(name) for name in ("parameters", "active_parameters", "device")},
        {name: run.info.get(name) for name in ("torch", "command")},
    ]
    every = {
        str(name)[:LONGEST_NAME]: _setting(value)
        for part in parts
        for name, value in part.items()
        if value is not None
    }
    return dict(list(every.items())[:MOST_SETTINGS])


def _max_steps(run: Run) -> int:
    """Return the steps that a run is to make; 0 = not known."""
    value = run.settings("train").get("max_steps")
    return value if type(value) is int and 0 < value < 2**53 else 0


def _pace(run: Run) -> tuple[float, float]:
    """Return the seconds per step and per record of a run's newest records; NaN if unknown."""
    seconds, steps = run.axis("seconds"), run.train.steps
    first = max(len(steps) - 1 - RECENT_RECORDS, 0)
    if len(steps) - first < 2:
        return math.nan, math.nan
    elapsed = seconds[-1] - seconds[first]
    return elapsed / (steps[-1] - steps[first]), elapsed / (len(steps) - 1 - first)


def _is_finite(run: Run) -> bool:
    """Return whether the newest training record has a finite loss."""
    train = run.train
    at_end = bool(train.steps and train.not_finite and train.not_finite[-1] == train.steps[-1])
    return not (at_end and math.isnan(train.column("loss")[-1]))


def _state(run: Run, now: float | None) -> str:
    """Return how a run stands. now: seconds since 1970; None: nobody follows it."""
    steps = _max_steps(run)
    if run.last_step < 0:
        return "empty"
    newest = run.events[-1].get("kind") if run.events else None
    if not _is_finite(run) or newest == "diverged":
        return "diverged"
    if steps and run.last_step >= steps:
        return "done"
    if newest == "stop":
        return "stopped"
    if now is None:
        return "ended"
    interval = _pace(run)[1]
    patience = max(STALE_SECONDS, STALE_INTERVALS * interval if interval > 0 else 0.0)
    return "stale" if now - run.modified > patience else "running"


def _events(run: Run) -> list[dict]:
    """Return what happened to a run, the newest MOST_EVENTS of it."""
    return [
        {
            "step": event["step"],
            "kind": _text(event.get("kind"), LONGEST_NAME),
            "text": _text(event.get("text")),
            "time": _setting(event.get("time")),
        }
        for event in run.events[-MOST_EVENTS:]
        if _is_step(event.get("step"))
    ]


def _samples(run: Run) -> list[dict]:
    """Return what a run wrote, the newest MOST_SAMPLES of it."""
    return [
        {
            "step": sample["step"],
            "prompt": _text(sample.get("prompt"), LONGEST_SAMPLE),
            "text": _text(sample.get("text"), LONGEST_SAMPLE),
        }
        for sample in run.samples[-MOST_SAMPLES:]
        if _is_step(sample.get("step"))
    ]


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def status_data(run: Run, number: int, now: float | None = None) -> dict:
    """Return what changes with each record: few numbers. now: as in `_state`."""
    pace, _ = _pace(run)
    left = (_max_steps(run) - run.last_step) * pace
    return {
        "number": number,
        "version": run.version,
        "step": max(run.last_step, 0),
        "max_steps": _max_steps(run),
        "state": _state(run, now),
        "is_finite": _is_finite(run),
        "modified": _plain(run.modified) and round(run.modified, 1),
        "seconds_left": _plain(left) if left >= 0 else None,
        "messages": [_text(message) for message in run.messages],
        "has_loads": bool(run.routers),
        "notes": _notes_mark(run),
    }


def _notes_mark(run: Run) -> int:
    """Return a number that changes when a run's events, samples or settings do."""
    newest = [notes[-1] if notes else None for notes in (run.events, run.samples)]
    said = repr((len(run.events), len(run.samples), newest, settings_of(run)))
    return zlib.crc32(said.encode("utf-8", "replace"))


def notes_data(run: Run) -> dict:
    """Return a run's events, samples and settings."""
    return {"events": _events(run), "samples": _samples(run), "settings": settings_of(run)}


def run_data(
    run: Run, number: int, name: str = "", where: str = "", now: float | None = None
) -> dict:
    """Return all that a page shows of a run but its experts' loads (`loads_data`).

    number: tells it from the page's other runs and gives it a colour. name, where: shown.
    """
    tables = {kind: _table(run, kind) for kind in KINDS if len(getattr(run, kind))}
    tables["router"] = _router_table(run, _routers(run, -1))
    return {
        **status_data(run, number, now),
        **notes_data(run),
        "name": _text(name or run.name, LONGEST_NAME),
        "where": _text(where or str(run.path.parent)),
        "flops_per_token": run.flops_per_token,
        "tables": tables,
    }


def more_data(run: Run, after: int) -> dict | None:
    """Return the tables of the records from step `after` on; None if they are too many.

    A record of step `after` may come again: the page leaves out what it has.
    """
    tables = {}
    for kind in KINDS:
        first = bisect_left(getattr(run, kind).steps, after)
        if len(getattr(run, kind)) - first > MOST_POINTS:
            return None
        if first < len(getattr(run, kind)):
            tables[kind] = _table(run, kind, first)
    routers = _routers(run, after - 1)
    if routers:
        tables["router"] = _router_table(run, routers)
    return tables


# --------------------------------------------------------------------------------------------- page
def page_data(runs: Iterable[dict], notices: Iterable[str] = (), **more: object) -> dict:
    """Return a page's data. notices: lines to show above the runs."""
    return {
        "runs": list(runs),
        "notices": [_text(line) for line in notices],
        "healthy_load": HEALTHY_LOAD,
        "most_points": MOST_POINTS,
        "most_columns": MOST_COLUMNS,
        "poll_seconds": POLL_SECONDS,
        "names_of_a_run": NAMES_OF_A_RUN,
        **more,
    }


def html_page(title: str, data: dict, about: str = "") -> tuple[str, str]:
    """Return a page with its data inside, and its content security policy.

    about: plain text for under the title.
    """
    template, policy = read_template(PAGE)
    if data.get("live"):
        policy = policy.replace("default-src 'none';", "default-src 'none'; connect-src 'self';")
    policy += "; require-trusted-types-for 'script'"
    page = fill(
        template,
        policy=policy,
        title=clean(title),
        about=f'<p class="about">{clean(about)}</p>\n' if about else "",
        data=json_in_html(data),
    )
    return page, policy


def finished_page(
    title: str, runs: Sequence[Run], names: Sequence[str] = (), about: str = "", **more: object
) -> str:
    """Return the page of runs that are not followed. names: what each is called on it."""
    shown = [
        run_data(run, number, names[number] if names else "") | {"loads": loads_data(run)}
        for number, run in enumerate(runs)
    ]
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    data = page_data(shown, live=False, now=time.time(), made=made, **more)  # type: ignore
    return html_page(title, data, about)[0]
