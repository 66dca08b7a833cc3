"""Write a report as one HTML page that needs nothing else and runs no script."""

from __future__ import annotations

from pathlib import Path

from runtime.base.page import clean, fill, read_template
from runtime.evaluation.drawing import legend, svg
from runtime.evaluation.report import Figure, Section, Table
from runtime.evaluation.writing import figure_cells, plain_numbers, sections_of, shown, subject

TEMPLATE = Path(__file__).with_name("page.html")
# Figures that stand first, large: their address, and what they are called.
FIRST = {
    ("text", "bits_per_byte"): "bits per byte",
    ("comparison", "difference"): "difference in bits per byte",
    ("text", "accuracy"): "next tokens right",
    ("calibration", "expected_calibration_error"): "calibration error",
}
# Rows up to which a table is open; of a section whose figures are not.
OPEN_ROWS, MOST_OPEN_ROWS = 12, 40


def as_page(report: dict) -> str:
    """Return the report as a page. Whatever names and texts say, they stay text."""
    report = plain_numbers(report)
    template, policy = read_template(TEMPLATE)
    parts = [_first(report)]
    parts += [_section(address, one) for address, one in sections_of(report)]
    data = report["data"]
    facts = [report["checkpoint"]["computed_by"]["line"]]
    if data:
        facts.append(f"texts: sha256 {data['sha256'][:16]}")
    if report["commit"]:
        facts.append(f"commit {report['commit'][:12]}")
    return fill(
        template,
        policy=policy,
        title=clean(f"Evaluation of {report['checkpoint']['name']}"),
        about=clean(subject(report)),
        facts=" &middot; ".join(clean(fact) for fact in facts),
        sections="\n".join(part for part in parts if part),
    )


def _first(report: dict) -> str:
    """Return the most important figures, large."""
    items = []
    for (part, key), name in FIRST.items():
        if part in report:
            value, interval, _, _ = figure_cells(report[part]["figures"][key])
            small = f"<small>{clean(interval)}</small>" if interval else ""
            items.append(f"<div><dt>{name}</dt><dd>{clean(value)}{small}</dd></div>")
    return f'<section class="card"><dl class="first">{"".join(items)}</dl></section>' * bool(items)


def _section(address: str, section: Section) -> str:
    """Return a section: its figures, plots, table and notes."""
    parts = [_figures(section["figures"])]
    for plot in section.get("plots", []):
        if drawing := svg(plot):
            parts.append(
                f"<figure><figcaption>{clean(plot['title'])}</figcaption>{legend(plot)}"
                f'<div class="scroll" tabindex="0" role="group" aria-label="'
                f'{clean(plot["title"])}">{drawing}</div></figure>'
            )
    if rows := section.get("rows"):
        most = OPEN_ROWS if len(section["figures"]) <= OPEN_ROWS else MOST_OPEN_ROWS
        parts.append(_rows(section["name"], rows, most))
    parts += [f'<p class="note">{clean(note)}</p>' for note in section.get("notes", [])]
    return (
        f'<section class="card"><h2>{clean(section["name"])}'
        f'<span class="address">{clean(address)}</span></h2>{"".join(parts)}</section>'
    )


def _figures(figures: dict[str, Figure]) -> str:
    if not figures:
        return ""
    head = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in (
            ("figure", ""),
            ("value", ' class="n"'),
            ("95 % interval", ' class="n"'),
            ("n", ' class="n"'),
            ("unit", ""),
        )
    )
    rows = []
    for key, one in figures.items():
        value, interval, n, unit = map(clean, figure_cells(one))
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in (value, interval, n))
        rows.append(f'<tr><th scope="row">{clean(key)}</th>{numbers}<td>{unit}</td></tr>')
    return _folded("Figures", len(rows), _scrolling("figures", head, rows), len(rows) <= OPEN_ROWS)


def _rows(name: str, table: Table, most_open: int) -> str:
    """Return a section's table, which opens on demand if it is long."""
    rows = [
        "<tr>" + "".join(f"<td{_kind(cell)}>{clean(shown(cell))}</td>" for cell in row) + "</tr>"
        for row in table["rows"]
    ]
    numeric = [any(not isinstance(row[i], str) for row in table["rows"]) for i in _columns(table)]
    head = "".join(
        f'<th scope="col"{" class=n" if numeric[i] else ""}>{clean(table["columns"][i])}</th>'
        for i in _columns(table)
    )
    return _folded("Table", len(rows), _scrolling(name, head, rows), len(rows) <= most_open)


def _folded(what: str, rows: int, table: str, is_open: bool) -> str:
    """Return a table as it is if it is short, else closed until a reader opens it."""
    if is_open:
        return table
    return f"<details><summary>{what}: {rows:,} rows</summary>{table}</details>"


def _columns(table: Table) -> range:
    return range(len(table["columns"]))


def _kind(cell: object) -> str:
    return "" if isinstance(cell, str) else ' class="n"'


def _scrolling(name: str, head: str, rows: list[str]) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{clean(name)}"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
