"""The curves of one run: columns of numbers by step, axes, experts over time.

Numbers are columns of float64, and of the experts a fixed number of records is kept, so that a long
run takes little memory. Neither torch nor NumPy is imported. `runtime.training.curves` reads them.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from config_model import ModelConfig, flops_per_token

AXES = ("step", "tokens", "seconds", "flops")
# What a record of training says per block, or per block and expert.
ROUTER_KEYS = ("expert_load", "router_entropy", "dropped_share")
# Of a curve on a page, and of the experts over time.
MOST_POINTS, MOST_ROUTER_RECORDS = 1_000, 400
# A file that is no run's may have any number of them.
MOST_COLUMNS = 200


class Table:
    """The records of one kind: their steps, which rise, and a column of float64 per number.

    NaN: a record says nothing of it, or it was not finite. `not_finite` holds the steps of records
    with such a number.
    """

    def __init__(self):
        self.steps = array("q")
        self.columns: dict[str, array] = {}
        self.not_finite: list[int] = []

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, numbers: dict[str, float], is_finite: bool = True) -> None:
        for name in numbers.keys() - self.columns.keys():
            if len(self.columns) < MOST_COLUMNS:
                self.columns[name] = array("d", [math.nan]) * len(self.steps)
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(numbers.get(name, math.nan))
        if not is_finite:
            self.not_finite.append(step)

    def cut(self, step: int) -> None:
        """Drop the records from `step` on."""
        first = bisect_left(self.steps, step)
        del self.steps[first:]
        for column in self.columns.values():
            del column[first:]
        self.not_finite = [bad for bad in self.not_finite if bad < step]

    def column(self, name: str) -> array:
        """Return a number of each record, NaN where there is none."""
        return self.columns.get(name) or array("d", [math.nan]) * len(self.steps)

    def last(self, name: str) -> float:
        """Return the newest number of a column; NaN without one."""
        known = (value for value in reversed(self.column(name)) if not math.isnan(value))
        return next(known, math.nan)


@dataclass
class Run:
    """One run's curves.

    path: its metrics file. info: "run" of its metrics.json, {} where that is missing.
    train, val, score: tables. Score records give their numbers under their own names.
    routers: (step, what the routers did) of at most 2 x MOST_ROUTER_RECORDS records (`router`).
    events, samples: of runtime.training.diary, in the order of the file.
    messages: what could not be read. version: rises when records that were there have changed.
    modified: when its file was last written, seconds since 1970.
    """

    path: Path
    run_id: str = ""
    info: dict = field(default_factory=dict)
    train: Table = field(default_factory=Table)
    val: Table = field(default_factory=Table)
    score: Table = field(default_factory=Table)
    routers: list[tuple[int, dict]] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    version: int = 0
    modified: float = 0.0
    # Whether its losses are cross-entropies, which have a perplexity.
    is_likelihood: bool = True
    _stride: int = 1
    _seen: int = 0

    @property
    def name(self) -> str:
        """Return --run_name, or else the folder's name; of a run that was moved aside its file."""
        name = self.settings("train").get("run_name")
        name = name if isinstance(name, str) and name else self.path.parent.resolve().name
        return name if self.path.stem == "metrics" else f"{name} ({self.path.stem})"

    def settings(self, part: str) -> dict:
        """Return the stored settings of "model" or "train"; {} where there are none."""
        settings = self.info.get(part)
        return settings if isinstance(settings, dict) else {}

    @property
    def last_step(self) -> int:
        """Return the newest step with a record; -1 without one."""
        tables = (self.train, self.val, self.score)
        return max((table.steps[-1] for table in tables if table.steps), default=-1)

    @property
    def model_config(self) -> ModelConfig | None:
        """Return the model's settings; None if they are missing or another version's."""
        try:
            return ModelConfig(**self.settings("model")) if self.settings("model") else None
        except (TypeError, ValueError):
            return None

    @property
    def flops_per_token(self) -> int:
        """Return the FLOPs of training on one token (forward and backward); 0 = not known."""
        config = self.model_config
        return 3 * flops_per_token(config) if config else 0

    def take(self, record: dict) -> None:
        """Take the file's next record.

        Steps that fall were made again after a resume: what was there from them on is dropped.
        """
        kind, step = record["kind"], record["step"]
        table = getattr(self, kind)
        if step < self.last_step or (table.steps and step == table.steps[-1]):
            self.cut(step)
        table.add(step, _numbers(record), not record.get("non_finite"))
        if record.get("is_likelihood") is False:
            self.is_likelihood = False
        router = {key: record[key] for key in ROUTER_KEYS if record.get(key)}
        if router:
            self._keep(step, router)

    def restart(self) -> None:
        """Drop all records, because their file is another one now."""
        self.cut(0)
        self.is_likelihood, self._stride, self._seen = True, 1, 0

    def cut(self, step: int) -> None:
        """Drop the records from `step` on."""
        self.version += 1
        for table in (self.train, self.val, self.score):
            table.cut(step)
        self.routers = [one for one in self.routers if one[0] < step]

    def _keep(self, step: int, router: dict) -> None:
        # The newest always; of the others every one, every second, every fourth, ...
        if self.routers and (self._seen - 1) % self._stride:
            self.routers.pop()
        self.routers.append((step, router))
        self._seen += 1
        if len(self.routers) > 2 * MOST_ROUTER_RECORDS:
            self.routers, self._stride, self._seen = self.routers[::2], 2 * self._stride, 1

    def router(self, most: int = MOST_ROUTER_RECORDS, after: int = -1) -> list[tuple[int, dict]]:
        """Return (step, numbers) of at most `most` records, evenly spaced, the newest included.

        after: leave out the records up to this step, and do not parse them.

        Numbers, where a record has them: expert_load [L][E] in fair shares; router_entropy (nats)
        and dropped_share, both [L]. None: not finite.
        """
        count = len(self.routers)
        chosen = list(range(count))
        if count > most:
            chosen = sorted({count - 1 - i * count // most for i in range(most)})
        new = [self.routers[i] for i in chosen if self.routers[i][0] > after]
        return [(step, _parsed(router)) for step, router in new]

    # ---- axes
    def axis(self, name: str, kind: str = "train") -> array:
        """Return the x of each record on an axis of AXES; NaN where it is not known.

        "seconds" are those of training, without validation and saving. Records that lack them get
        them from the training records around theirs, by their steps.
        """
        table: Table = getattr(self, kind)
        if name == "step":
            return array("d", table.steps)
        column = "seconds" if name == "seconds" else "tokens_seen"
        values = table.column(column)
        if kind != "train" and any(map(math.isnan, values)):
            values = _between(table.steps, self.train.steps, self.train.column(column))
        if name == "flops":
            flops = self.flops_per_token or math.nan
            values = array("d", (flops * value for value in values))
        return values


def _numbers(record: dict) -> dict[str, float]:
    """Return a record's numbers by name, those of its task and of its score included."""
    parts = [record.get(part) for part in ("metrics", "score")]
    numbers = {}
    for part in (record, *parts):
        for name, value in part.items() if isinstance(part, dict) else ():
            if type(value) in (int, float) and name != "step":
                try:
                    numbers[name] = float(value)
                except OverflowError:
                    numbers[name] = math.nan
    return numbers


def _parsed(router: dict) -> dict:
    """Return a record's router numbers, as lists of the right shape."""
    parsed = {}
    for key, value in router.items():
        if isinstance(value, bytes):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        rows = value if key == "expert_load" else [value]
        if isinstance(rows, list) and all(map(_are_numbers, rows)):
            parsed[key] = value
    return parsed


def _are_numbers(row: object) -> bool:
    return isinstance(row, list) and all(n is None or type(n) in (int, float) for n in row)


def _between(steps: array, known_steps: array, known: array) -> array:
    """Return the values at `steps` of a line through the known ones; NaN beyond its end."""
    values = array("d")
    for step in steps:
        right = bisect_left(known_steps, step)
        if right == len(known_steps):
            values.append(math.nan)
        elif known_steps[right] == step:
            values.append(known[right])
        else:
            # A run begins at 0 in all of them.
            left_step = known_steps[right - 1] if right else 0
            left = known[right - 1] if right else 0.0
            share = (step - left_step) / (known_steps[right] - left_step)
            values.append(left + share * (known[right] - left))
    return values
