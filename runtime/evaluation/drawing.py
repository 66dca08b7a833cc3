"""Draw the plots of a report as SVG: no script, and colours of the page's style in dark and light.

A point's numbers are in its title, which a pointer or a screen reader finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from runtime.base.page import clean
from runtime.evaluation.report import Plot
from runtime.evaluation.writing import shown

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 46
# Colours of the page's style, and marks, so that colour alone tells nothing.
COLOURS = 8
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5l5 9h-10z",
    "M0 -5.5l5 5.5l-5 5.5l-5 -5.5z",
    "M0 5l5 -9h-10z",
)
# Labels of names under the axis, up to which they stand straight.
MOST_LABELS = 12


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers that cover low to high; the first is at most low, the last >= high."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def svg(plot: Plot) -> str:
    """Return a plot as an SVG element; "" if it has no point."""
    series = plot["series"]
    numbers = [y for one in series for y in _all_y(one) if y is not None and math.isfinite(y)]
    if not numbers:
        return ""
    is_diagonal = plot["kind"] == "diagonal"
    names = _names(series)
    lines_y = ticks(0.0, 1.0) if is_diagonal else ticks(min(numbers), max(numbers))
    if names:
        lines_x: list[float] = []
        low_x, high_x = -0.5, len(names) - 0.5
    else:
        across = [float(x) for one in series for x in one["x"]]
        lines_x = ticks(0.0, 1.0) if is_diagonal else ticks(min(across), max(across))
        low_x, high_x = lines_x[0], lines_x[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        share_x = (x - low_x) / (high_x - low_x)
        share_y = (y - lines_y[0]) / (lines_y[-1] - lines_y[0])
        return (
            round(LEFT + share_x * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - share_y * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [_axes(plot, lines_x, lines_y, names, at)]
    if is_diagonal:
        (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
        parts.append(f'<path class="ideal" d="M{x1} {y1}L{x2} {y2}"/>')
    for i, one in enumerate(series):
        # Series stand next to each other where they share a name.
        shift = (i - (len(series) - 1) / 2) * 0.7 / max(len(series), 2) if names else 0.0
        xs = [names.index(x) + shift for x in one["x"]] if names else one["x"]
        parts.append(_points(plot, i, one, xs, at))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{clean(plot["title"])}">'
        f"{''.join(parts)}</svg>"
    )


def _all_y(one) -> list:
    return [*one["y"], *one.get("low", []), *one.get("high", [])]


def _names(series: Sequence) -> list[str]:
    """Return the names on the x axis in order; [] if x are numbers."""
    values = [x for one in series for x in one["x"]]
    return list(dict.fromkeys(values)) if any(isinstance(x, str) for x in values) else []


def _axes(plot: Plot, lines_x: list[float], lines_y: list[float], names: list[str], at) -> str:
    """Return the grid, its labels and the names of both axes."""
    parts = []
    left, right = LEFT, WIDTH - RIGHT
    for y in lines_y:
        _, v = at(0, y)
        kind = "zero" if y == 0 else "axis"
        parts.append(f'<path class="{kind}" d="M{left} {v}H{right}"/>')
        parts.append(f'<text x="{left - 7}" y="{v + 4}" text-anchor="end">{_tick(y)}</text>')
    base = HEIGHT - BOTTOM
    for x in lines_x:
        u, _ = at(x, lines_y[0])
        parts.append(f'<text x="{u}" y="{base + 17}" text-anchor="middle">{_tick(x)}</text>')
    every = math.ceil(len(names) / MOST_LABELS) if names else 1
    for i, name in enumerate(names):
        if i % every == 0:
            u, _ = at(i, lines_y[0])
            label = clean(name if len(name) <= 14 else name[:13] + "…")
            parts.append(f'<text x="{u}" y="{base + 17}" text-anchor="middle">{label}</text>')
    middle = (left + right) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{clean(plot["x_label"])}</text>'
    )
    half = (TOP + base) / 2
    parts.append(
        f'<text transform="translate(14 {half}) rotate(-90)" text-anchor="middle">'
        f"{clean(plot['y_label'])}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:.10g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def _points(plot: Plot, i: int, one, xs: list, at) -> str:
    """Return the marks of a series, with their intervals, or its line."""
    colour, mark = f"c{i % COLOURS}", MARKS[i % len(MARKS)]
    none = [None] * len(xs)
    parts, line = [], []
    rows = zip(xs, one["x"], one["y"], one.get("low", none), one.get("high", none), strict=True)
    for x, name, y, low, high in rows:
        if y is None or not math.isfinite(y):
            continue
        u, v = at(x, y)
        line.append(f"{u} {v}")
        title = f"{one['name']}, {shown(name) if isinstance(name, float) else name}: {shown(y)}"
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
            (_, bottom), (_, top) = at(x, low), at(x, high)
            parts.append(f'<path class="e" d="M{u} {bottom}V{top}"/>')
            title += f" ({shown(low)} to {shown(high)})"
        if plot["kind"] != "line":
            parts.append(
                f'<path class="m" d="{mark}" transform="translate({u} {v})">'
                f"<title>{clean(title)}</title></path>"
            )
    if plot["kind"] == "line":
        parts.append(f'<path class="w" d="M{"L".join(line)}"/>')
    return f'<g class="{colour}">{"".join(parts)}</g>'


def legend(plot: Plot) -> str:
    """Return the names of the series with their marks; "" for a single one."""
    if len(plot["series"]) < 2:
        return ""
    items = [
        f'<li><svg class="c{i % COLOURS}" viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path class="m" d="{MARKS[i % len(MARKS)]}"/></svg>{clean(one["name"])}</li>'
        for i, one in enumerate(plot["series"])
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'
