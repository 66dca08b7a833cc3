"""Write a report: as JSON, and as Markdown for a model card or a pull request.

Nothing in it says when or how fast it was made: the same checkpoint and texts give the same bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from runtime.base.text import visible
from runtime.evaluation.report import Figure, Section

FORMAT, VERSION = "gptoss evaluation", 1
# The parts of a report that hold sections by name, and those that are one section.
GROUPS = ("tasks", "compared_tasks", "experts", "chat")
SECTIONS = ("text", "comparison", "calibration", "loss", "stories")


def sections_of(report: dict) -> Iterator[tuple[str, Section]]:
    """Yield (address, section) in the order in which a reader wants them."""
    for name in SECTIONS[:2]:
        if name in report:
            yield name, report[name]
    for group in GROUPS:
        for name, section in report.get(group, {}).items():
            yield f"{group}.{name}", section
    for name in SECTIONS[2:]:
        if name in report:
            yield name, report[name]


def plain_numbers(node):
    """Return a report with None in place of numbers that are not finite, which JSON lacks."""
    if isinstance(node, dict):
        return {key: plain_numbers(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [plain_numbers(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def as_json(report: dict) -> str:
    """Return the report as JSON, one byte for byte for one report."""
    return json.dumps(plain_numbers(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------ numbers
def shown(value: object, width: float | None = None) -> str:
    """Return a number for readers: whole ones with commas, others as exact as they are known.

    width: of its interval; the last digit shown is about a hundredth of it. "" for None.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return ""
    scale = width if width else abs(value)
    if not scale:
        return "0"
    places = min(max((2 if width else 3) - math.floor(math.log10(scale)), 0), 6)
    return f"{value:,.{places}f}"


def figure_cells(figure: Figure) -> tuple[str, str, str, str]:
    """Return a figure's value, interval, n and unit, as text."""
    low, high = figure.get("low"), figure.get("high")
    width = None if low is None or high is None else high - low
    interval = "" if width is None else f"{shown(low, width)} to {shown(high, width)}"
    value = shown(figure["value"], width) or "not defined"
    return value, interval, shown(figure["n"]), figure.get("unit", "")


# ----------------------------------------------------------------------------------- Markdown
def plain(value: object) -> str:
    """Return a text for a cell of a Markdown table: one line, no markup."""
    text = " ".join(visible(shown(value)).split())
    return re.sub(r"[\\`*_\[\]|~#<>&!$]", r"\\\g<0>", text)


def table(columns: list[str], rows: list[list]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [f"| {' | '.join(map(plain, columns))} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(map(plain, row))} |" for row in rows]


def as_markdown(report: dict) -> str:
    """Return the report's figures and tables as Markdown."""
    report = plain_numbers(report)
    name = report["checkpoint"]["name"]
    lines = [f"# Evaluation of {plain(name)}", "", plain(subject(report)), ""]
    for address, section in sections_of(report):
        lines += [f"## {plain(section['name'])}", ""]
        rows = [[key, *figure_cells(one)] for key, one in section["figures"].items()]
        if rows:
            lines += table([address, "value", "95 % interval", "n", "unit"], rows) + [""]
        if held := section.get("rows"):
            lines += table(held["columns"], held["rows"]) + [""]
        for note in section.get("notes", []):
            lines += [plain(note), ""]
    if report["data"]:
        lines += [f"Texts: sha256 {report['data']['sha256']}.", ""]
    lines += [plain(f"How it was computed: {report['checkpoint']['computed_by']['line']}.")]
    return "\n".join(lines) + "\n"


def subject(report: dict) -> str:
    """Return what was judged on what, in a line."""
    ckpt, data = report["checkpoint"], report["data"]
    line = (
        f"{ckpt['name']} (step {ckpt['step']:,}, {ckpt['parameters']:,} parameters, "
        f"{ckpt['active_parameters']:,} active)"
    )
    if data:
        sources = ", ".join(data["sources"][:3]) + ", ..." * (len(data["sources"]) > 3)
        first = "" if data.get("are_all", True) else "the first "
        line += f" on {first}{data['documents']:,} documents, {data['bytes']:,} bytes, of {sources}"
    if other := report.get("other_checkpoint"):
        line += f"; against {other['name']} (step {other['step']:,})"
    return line


# ------------------------------------------------------------------------------------ terminal
def as_lines(report: dict) -> list[str]:
    """Return each figure as `key  value`, for a terminal; tables are in the other forms."""
    lines = []
    for address, section in sections_of(report):
        figures = section["figures"]
        start = "" if address == "text" else f"{address}."
        width = max((len(key) for key in figures), default=0) + len(start)
        for key, one in figures.items():
            value, interval, n, unit = figure_cells(one)
            between = f" ({interval})" if interval else ""
            lines.append(f"{start + key:<{width}}  {value}{between} {unit}".rstrip() + f", n {n}")
    return [visible(line) for line in lines]
