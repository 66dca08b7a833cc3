"""The form of what an evaluation found: sections of figures, which JSON holds as they are.

Every part of an evaluation returns one section. A report is sections and what they are about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict


class Figure(TypedDict):
    """A number, with how many things it is of.

    low, high: its 95 % interval. unit: "" for a share or a plain number.
    """

    value: float | None
    n: int
    low: NotRequired[float]
    high: NotRequired[float]
    unit: NotRequired[str]


class Table(TypedDict):
    """Rows under named columns. A cell is a text, a number or None."""

    columns: list[str]
    rows: list[list]


class Series(TypedDict):
    """One line or set of points of a plot. low, high: intervals, one to each point."""

    name: str
    x: list
    y: list
    low: NotRequired[list]
    high: NotRequired[list]


class Plot(TypedDict):
    """A plot of a section. kind: line, points (with their intervals) or diagonal (y should be x).

    x of a line or of points are numbers, or names that stand next to each other.
    """

    title: str
    kind: str
    x_label: str
    y_label: str
    series: list[Series]


class Section(TypedDict):
    """What one part of an evaluation found.

    figures: by key; a key has no dot, because --require joins names with dots. rows: a table that
    says more. notes: what a reader must know of the figures, a sentence each.
    """

    name: str
    figures: dict[str, Figure]
    rows: NotRequired[Table]
    plots: NotRequired[list[Plot]]
    notes: NotRequired[list[str]]


def figure(
    value: float,
    n: int,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
) -> Figure:
    """Return a figure; a value that is not finite becomes None, as JSON has it."""
    result: Figure = {"value": finite(value), "n": int(n)}
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        result |= {"low": float(low), "high": float(high)}
    if unit:
        result["unit"] = unit
    return result


def finite(value: float | None) -> float | None:
    """Return the value as a plain float, None if it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def section(
    name: str,
    figures: dict[str, Figure],
    rows: Table | None = None,
    plots: Sequence[Plot] = (),
    notes: Sequence[str] = (),
) -> Section:
    """Return a section. Raise ValueError for a key with a dot, or a figure without n."""
    for key, one in figures.items():
        if "." in key or not key:
            raise ValueError(f"figure {key!r} of {name} needs a name without dots")
        if "value" not in one or "n" not in one:
            raise ValueError(f"figure {key!r} of {name} needs a value and n")
    result: Section = {"name": name, "figures": figures}
    if rows:
        _check_table(name, rows)
        result["rows"] = rows
    if plots:
        result["plots"] = list(plots)
    if notes:
        result["notes"] = list(notes)
    return result


def _check_table(name: str, table: Table) -> None:
    width = len(table["columns"])
    if wrong := [row for row in table["rows"] if len(row) != width]:
        raise ValueError(
            f"the table of {name} has {width} columns, and a row of {len(wrong[0])}: {wrong[0]}"
        )
