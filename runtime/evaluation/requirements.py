"""Requirements on a report, such as "bits_per_byte<=0.80": what a model must reach."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
EXAMPLE = 'such as "bits_per_byte<=0.80" or "tasks.own.ending_sum.low>0.5"'
# What a figure without a dot after it means.
VALUE_KEYS = ("value", "difference")


@dataclass(frozen=True)
class Requirement:
    """A figure's address in the report, a comparison and a bound."""

    address: str
    comparison: str
    bound: float

    def is_met(self, value: float) -> bool:
        return COMPARISONS[self.comparison](value, self.bound)

    def __str__(self) -> str:
        return f"{self.address}{self.comparison}{self.bound:g}"


def read_requirement(text: str, parts: set[str]) -> Requirement:
    """Return the requirement that a text says. Raise ValueError for any other text.

    parts: what this evaluation's report will have. An address begins with one of them.
    """
    match = re.fullmatch(r"\s*(\S.*?)\s*(<=|>=|<|>)\s*(\S+)\s*", text)
    bound = math.nan
    if match:
        try:
            bound = float(match[3])
        except ValueError:
            match = None
    if not match or not math.isfinite(bound):
        raise ValueError(
            f"--require {text!r} must be a figure, <=, >=, < or >, and a number, {EXAMPLE}"
        )
    address = match[1]
    if address.split(".")[0] not in parts:
        raise ValueError(
            f"--require {text!r}: this report will have no {address.split('.')[0]!r}, only "
            f"{', '.join(sorted(parts))}; give the flag that measures it"
        )
    return Requirement(address, match[2], bound)


def addresses(node: object, before: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield (address, number) of every figure of a report, of its low and high and n, too.

    A figure's own address means its value. Of a section, the figures come without "figures".
    """
    if not isinstance(node, dict):
        return
    for key in VALUE_KEYS:
        if key in node and before:
            yield before, node[key]
    for key, value in node.items():
        inner = before if key == "figures" else f"{before}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from addresses(value, inner)
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield inner, value


def value_of(requirement: Requirement, report: dict) -> float:
    """Return the number at a requirement's address. Raise ValueError where there is none."""
    found = dict(addresses(report))
    address = requirement.address
    if address not in found:
        close = difflib.get_close_matches(address, found, 3)
        raise ValueError(
            f"--require {requirement}: the report has no number {address!r}"
            f"{'; did you mean ' + ' or '.join(close) if close else ''}"
        )
    value = found[address]
    if value is None:
        raise ValueError(
            f"--require {requirement}: {address} is not defined here, because too little was "
            "measured or it is not finite"
        )
    return value


def verdicts(required: list[Requirement], report: dict) -> tuple[list[str], bool]:
    """Return a line for each requirement, and whether all are met. Raise ValueError."""
    lines, all_met = [], True
    for requirement in required:
        value = value_of(requirement, report)
        is_met = requirement.is_met(value)
        all_met = all_met and is_met
        lines.append(f"required  {requirement}  {'met' if is_met else 'NOT MET'} ({value:.6g})")
    return lines, all_met
