"""Draw a run's metrics.jsonl as eight PNGs, dark or light, that are legible at README size.

`draw_plots` reads records once and keeps little of them (a few numbers per record; of the routers a
fixed number of records), so its memory and time stay bounded for runs of any length. matplotlib is
imported when drawing, through its object API: no global figure, no window, no state of the user's
changed. A plot with nothing to show is not drawn.
"""

from __future__ import annotations

import io
import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.base.files import write_atomic
from runtime.training.metrics import HEALTHY_LOAD, HIGH, LOW


class Theme(NamedTuple):
    """The colours of a figure."""

    background: str
    panel: str
    grid: str
    edge: str
    text: str
    muted: str
    blue: str
    orange: str
    green: str
    purple: str
    red: str
    teal: str
    yellow: str
    pink: str
    # First block ... last block.
    depth: tuple[str, ...]
    # Starved ... fair share, which is close to the panel ... overloaded.
    load: tuple[str, ...]


DARK = Theme(
    background="#0d1117",
    panel="#131a23",
    grid="#222b36",
    edge="#3a4552",
    text="#e6edf3",
    muted="#8b98a7",
    blue="#58a6ff",
    orange="#ff9e57",
    green="#4cc38a",
    purple="#b392f0",
    red="#ff6b6b",
    teal="#3fc1c9",
    yellow="#e3b341",
    pink="#f778ba",
    depth=("#5eead4", "#4ea1ff", "#8b7bff", "#d86bd8", "#ff7a7a"),
    load=("#2f81f7", "#1f4f8f", "#18222e", "#a35a1c", "#ffa657"),
)
# The same hues, dark enough for paper: each line has a contrast of at least 3 with the panel.
LIGHT = Theme(
    background="#ffffff",
    panel="#f8fafc",
    grid="#e1e7ed",
    edge="#aab4bf",
    text="#1b222b",
    muted="#586472",
    blue="#1668d1",
    orange="#c75300",
    green="#1a7f4b",
    purple="#7a4fd0",
    red="#d1303b",
    teal="#0c7f88",
    yellow="#946a00",
    pink="#c2357f",
    depth=("#0a8f80", "#1668d1", "#5b45d6", "#ad3aad", "#cf3a3a"),
    load=("#1259bd", "#8fbdf2", "#eef2f6", "#f7b981", "#c75300"),
)
THEMES = {"dark": DARK, "light": LIGHT}
# One palette for all figures of the project: scripts/draw_architecture.py is always dark.
(BACKGROUND, PANEL, GRID, EDGE, TEXT, MUTED) = DARK[:6]
(BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, YELLOW, PINK) = DARK[6:14]


def style(theme: Theme) -> dict:
    """Return matplotlib's settings for the figures of a theme."""
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 12,
        "text.color": theme.text,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 12,
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.panel,
        "axes.edgecolor": theme.edge,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.edge,
        "ytick.color": theme.edge,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "xtick.labelsize": 11.5,
        "ytick.labelsize": 11.5,
        "legend.frameon": False,
        "legend.fontsize": 12,
        "legend.labelcolor": theme.text,
        "legend.handlelength": 1.5,
        "legend.columnspacing": 1.6,
        "legend.handletextpad": 0.6,
        "lines.linewidth": 2.2,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "agg.path.chunksize": 20_000,
        "mathtext.fontset": "dejavusans",
    }


STYLE = style(DARK)
WIDTH, HEIGHT, DPI = 10.0, 5.2, 150  # inches, inches, pixels per inch
POINTS = 1_500  # bins across a line; each keeps its lowest and highest value
ROUTER_RECORDS = 600  # router statistics kept over time, at least (at most twice as many)
LOWEST_LOAD = 1 / 64  # of a fair share: what the log scale shows for "hardly anything" and nothing

TRAIN_KEYS = ("loss", "perplexity", "lr", "tokens_per_sec", "tokens_seen", "grad_norm", "mfu")
VAL_KEYS = ("loss", "perplexity", "bits_per_byte", "tokens_seen")


def human(number: float, digits: int = 3) -> str:
    """`number` with a unit of thousands: 950, 1.5k, 65.5M, 3.66B."""
    if abs(number) >= 1e15:
        return _scientific(number)
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size * (1 - 0.5 * 10**-digits):
            number, suffix = number / size, unit
            break
    else:
        suffix = ""
    text = f"{number:.{digits}g}"
    return (f"{number:.0f}" if "e" in text and abs(number) >= 1 else text) + suffix


# ------------------------------------------------------------------------------ what is to be shown
def _number(value) -> float:
    """A record's number as float; what is missing, null or no number is NaN."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return math.nan


class History:
    """What the plots need of a run, gathered in one pass over its records.

    train, val: {key: float64 array, one number per record}, sorted by "step", NaN where a record
    says nothing. loads: newest expert_load, [L blocks, E experts] in fair shares, or None. router:
    {"step": [R], "load_min", "load_max", "entropy" (nats), "dropped": [R, L]} at R evenly spaced
    records, the newest included.
    """

    def __init__(self, records: Iterable[dict]):
        import numpy as np

        columns = {
            "train": {k: array("d") for k in ("step", "non_finite", *TRAIN_KEYS)},
            "val": {k: array("d") for k in ("step", *VAL_KEYS)},
        }
        kept, newest, stride, seen = [], None, 1, 0
        # Steps and numbers by name, with a gap where a record lacks one.
        self.scores: list[tuple[int, dict]] = []
        # Whether the loss is a cross-entropy: other tasks log no perplexity.
        self.is_likelihood = True
        for record in records:
            if record["kind"] == "score":
                self.scores.append((record["step"], record["score"]))
                continue
            self.is_likelihood = self.is_likelihood and record.get("is_likelihood", True)
            table = columns[record["kind"]]
            for key, column in table.items():
                column.append(_number(record.get(key)))
            if any(record.get(key) for key in ("expert_load", "router_entropy", "dropped_share")):
                newest = record
                if seen % stride == 0:
                    kept.append(record)
                    if len(kept) >= 2 * ROUTER_RECORDS:
                        kept, stride = kept[::2], stride * 2
                seen += 1
        self.train, self.val = (
            {k: np.frombuffer(c, dtype=np.float64) for k, c in table.items()}
            for table in columns.values()
        )
        for table in (self.train, self.val):
            order = np.argsort(table["step"], kind="stable")
            for key in table:
                table[key] = table[key][order]
            # From the loss, where that can be had.
            if self.is_likelihood and np.isnan(table["perplexity"]).any():
                with np.errstate(over="ignore"):
                    table["perplexity"] = np.where(
                        np.isnan(table["perplexity"]), np.exp(table["loss"]), table["perplexity"]
                    )
            table["perplexity"] = np.where(
                np.isfinite(table["perplexity"]), table["perplexity"], np.nan
            )
        if kept and kept[-1] is not newest:
            kept.append(newest)
        kept = sorted(map(self._router_row, kept), key=lambda row: row["step"])
        self.loads, self.loads_step = None, None
        for row in kept:
            if row["loads"] is not None and np.isfinite(row["loads"]).any():
                self.loads, self.loads_step = row["loads"], row["step"]
        self.router = {}
        for key in ("load_min", "load_max", "entropy", "dropped"):
            rows = [(row["step"], row[key]) for row in kept if row[key] is not None]
            rows = [
                (step, values) for step, values in rows if len(values) == len(rows[-1][1])
            ]  # one model, one number of blocks
            if rows:
                self.router[key] = (
                    np.array([step for step, _ in rows], dtype=float),
                    np.array([values for _, values in rows]),
                )

    @staticmethod
    def _router_row(record: dict) -> dict:
        import numpy as np

        row = {
            "step": record["step"],
            "loads": None,
            "load_min": None,
            "load_max": None,
            "entropy": None,
            "dropped": None,
        }
        if record.get("expert_load"):
            loads = np.array(record["expert_load"], dtype=float)  # null -> NaN
            if loads.ndim == 2 and loads.size:
                row["loads"] = loads
                known = ~np.isnan(loads)
                row["load_min"] = np.where(
                    known.any(1), np.min(np.where(known, loads, np.inf), axis=1), np.nan
                )
                row["load_max"] = np.where(
                    known.any(1), np.max(np.where(known, loads, -np.inf), axis=1), np.nan
                )
        for key, name in (("router_entropy", "entropy"), ("dropped_share", "dropped")):
            if record.get(key):
                row[name] = np.array(record[key], dtype=float)
        return row


def smooth(values):
    """Return a centred moving average over about 1/20 of the points, NaN where a value is NaN.

    It takes as many points before as after, as far as there are: a steep start is not blurred.
    """
    import numpy as np

    n = len(values)
    index, width = np.arange(n), max(1, min(n // 40, 5_000))
    left = np.minimum(index // 4, width)
    right = np.minimum(left, n - 1 - index)
    known = ~np.isnan(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    first, end = index - left, index + right + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, (total[end] - total[first]) / (count[end] - count[first]), np.nan)


def thin(x, y):
    """Return at most about 2 x POINTS points that look like all of them.

    These are the lowest and the highest of each stretch; gaps are kept.
    """
    import numpy as np

    if len(x) <= 2 * POINTS:
        return x, y
    chosen = []
    for stretch in np.array_split(np.arange(len(x)), POINTS):
        known = stretch[~np.isnan(y[stretch])]
        chosen.extend(
            sorted({known[np.argmin(y[known])], known[np.argmax(y[known])]})
            if len(known)
            else stretch[:1]
        )
    return x[chosen], y[chosen]


# ----------------------------------------------------------------------------------- parts of plots
class Page:
    """A figure: a title on the left, the state of the run on the right, and axes below."""

    def __init__(
        self,
        title: str,
        status: str,
        rows: int = 1,
        columns: int = 1,
        width: float = WIDTH,
        height: float = HEIGHT,
        theme: Theme = DARK,
        **grid,
    ):
        from matplotlib.figure import Figure

        self.theme = theme
        self.figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        top = 0.56 / height  # inches for the header
        self.figure.get_layout_engine().set(
            rect=(0.08 / width, 0.06 / height, 1 - 0.2 / width, 1 - top - 0.06 / height),
            h_pad=0.08,
            w_pad=0.06,
        )
        self.figure.text(
            0.2 / width, 1 - 0.36 / height, title, fontsize=17, fontweight="bold", va="center"
        )
        self.figure.text(
            1 - 0.2 / width,
            1 - 0.36 / height,
            status,
            fontsize=12,
            color=theme.muted,
            va="center",
            ha="right",
        )
        self.axes = self.figure.subplots(rows, columns, squeeze=False, **grid)

    def png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        FigureCanvasAgg(self.figure)
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return buffer.getvalue()


def _steps_axis(axes, *steps, label: bool = True) -> None:
    """Set an x axis of steps with few, readable ticks.

    It begins at 0 unless the run was first measured late.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    known = [s for part in steps for s in (part.min(), part.max()) if len(part)]
    low, high = min(known), max(known)
    low = 0 if low <= 0.25 * high else low
    margin = max((high - low) * 0.02, 0.5 if high > low else max(1, high * 0.1))
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if high < 10_000 else human(value))
    )
    if label:
        axes.set_xlabel("step")


def _human_axis(axis) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))


def _log_axis(axes, values, floor: float = 0.0) -> None:
    """Set a log-scaled y axis with a few labelled ticks, even if the data span under a decade."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    values = values[np.isfinite(values) & (values > floor)]
    low, high = values.min(), values.max()
    span = math.log10(high / low) if high > low else 0.0
    pad = max(0.06 * span, 0.04)
    low, high = low * 10**-pad, high * 10**pad
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    subs = next(
        s
        for limit, s in ((4, (1,)), (2, (1, 3)), (0.75, (1, 2, 5)), (0, (1, 1.5, 2, 3, 4, 5, 6, 8)))
        if span >= limit
    )
    if math.log10(high / low) < 0.35:  # all within a factor of two: the steps of a linear axis
        from matplotlib.ticker import MaxNLocator

        axes.yaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))


def _line(axes, x, y, color, label=None, **options):
    """Draw a line, thinned.

    Points without neighbours to be joined with (a single record, between nulls) become dots.
    """
    import numpy as np

    x, y = thin(x, y)
    known = ~np.isnan(y)
    alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    options = {"linewidth": 2.2, "zorder": 3} | options
    (line,) = axes.plot(x, y, color=color, label=label, **options)
    if alone.any():
        axes.plot(
            x[alone],
            y[alone],
            "o",
            color=color,
            markersize=5,
            alpha=options.get("alpha", 1),
            zorder=options["zorder"],
        )
    return line


def _legend(axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, borderaxespad=0.15)


def _note(axes, x, y, text, color, theme: Theme):
    """Write text above a data point (below it, at the top of the axes), with a halo.

    It is turned to the side that has room.
    """
    from matplotlib.patheffects import withStroke

    left, right = axes.get_xlim()
    share = (x - left) / (right - left)
    side = "left" if share < 0.15 else "right" if share > 0.85 else "center"
    above = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1] < 0.85
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 11 if above else -11),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        color=color,
        fontsize=12,
        fontweight="bold",
        zorder=9,
        path_effects=[withStroke(linewidth=3, foreground=theme.panel)],
    )


def _gone(axes, table: dict, key: str, theme: Theme) -> None:
    """Red ticks on the x axis at the steps whose `key` was not finite."""
    import numpy as np

    steps = table["step"][np.isnan(table[key]) & (table["non_finite"] == 1)]
    if len(steps):
        low, high = axes.get_xlim()
        seen = steps[
            np.unique(np.round((steps - low) / (high - low) * POINTS), return_index=True)[1]
        ]
        axes.plot(
            seen,
            [0.012] * len(seen),
            "|",
            color=theme.red,
            markersize=9,
            markeredgewidth=1.6,
            transform=axes.get_xaxis_transform(),
            zorder=8,
            label=f"not finite: {len(steps):,}",
        )


def _status(history: History, step: int, run_name: str = "") -> str:
    import numpy as np

    tokens = np.concatenate([history.train["tokens_seen"], history.val["tokens_seen"]])
    text = f"{_shortened(run_name)}   ·   step {step:,}" if run_name else f"step {step:,}"
    return text if np.isnan(tokens).all() else f"{text}   ·   {human(np.nanmax(tokens))} tokens"


def _shortened(name: str, most: int = 24) -> str:
    """Return a name whose middle is left out if it would run into a plot's title."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


def _has(values) -> bool:
    import numpy as np

    return bool(np.isfinite(values).any())


def _last(values) -> float:
    import numpy as np

    return float(values[np.isfinite(values)][-1])


def _depth_colors(count: int, theme: Theme) -> list:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("depth", theme.depth)
    return [ramp(i / max(count - 1, 1)) for i in range(count)]


def _readable_on(color, theme: Theme) -> str:
    """Return the theme's text or background colour: the one with more contrast on `color`."""
    return max((theme.text, theme.background), key=lambda one: contrast(one, color))


def contrast(one, other) -> float:
    """Return the contrast ratio of two colours, from 1 to 21 (WCAG 2.2, relative luminance)."""
    from matplotlib.colors import to_rgb

    def luminance(color) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _indices(count: int, most: int) -> range:
    """0 to count - 1 in steps of 1, 2, 5, 10, ... so that there are no more than `most`."""
    return range(
        0,
        count,
        next(s for e in range(9) for s in (10**e, 2 * 10**e, 5 * 10**e) if count <= most * s),
    )


def _depth_key(page: Page, axes, count: int) -> None:
    """A colour bar that says which colour is which block."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    if count == 1:
        return
    mappable = ScalarMappable(
        Normalize(-0.5, count - 0.5), ListedColormap(_depth_colors(count, page.theme))
    )
    bar = page.figure.colorbar(mappable, ax=axes, pad=0.015, aspect=32)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_ticks(list(_indices(count, 13)))
    bar.ax.invert_yaxis()
    bar.set_label("block")


# ---------------------------------------------------------------------------------------- the plots
def _curve(
    title: str, key: str, unit: str, history: History, status: str, theme: Theme, log: bool
) -> Page | None:
    """Return a page with training and validation of `key` over the steps.

    The best validation is ringed; the legend has the newest values.
    """
    import numpy as np

    train, val = history.train, history.val
    drawn = [table for table in (train, val) if _has(table[key])]
    if not drawn:
        return None
    page = Page(title, status, theme=theme)
    ((axes,),) = page.axes
    everything = np.concatenate([table[key] for table in drawn])
    if log:
        _log_axis(axes, everything)
    else:
        low, high = np.nanmin(everything), np.nanmax(everything)
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + 1.5 * pad)
    _steps_axis(axes, *(table["step"] for table in drawn))
    if _has(train[key]):
        if len(train[key]) >= 40:
            _line(axes, train["step"], train[key], theme.blue, alpha=0.5, linewidth=1.0, zorder=2)
            smoothed = np.exp(smooth(np.log(train[key]))) if log else smooth(train[key])
            _line(
                axes,
                train["step"],
                smoothed,
                theme.blue,
                f"train {_value(_last(smoothed))} (smoothed)",
            )
        else:
            _line(axes, train["step"], train[key], theme.blue, f"train {_value(_last(train[key]))}")
    if _has(val[key]):
        known = np.isfinite(val[key])
        x, y = val["step"][known], val[key][known]
        best = int(np.argmin(y))
        label = f"validation {_value(y[-1])}" + (
            "" if best == len(y) - 1 else f", best {_value(y[best])}"
        )
        sparse = len(x) <= 60
        _line(
            axes,
            x,
            y,
            theme.orange,
            label,
            zorder=4,
            **(
                {"linewidth": 1.8, "marker": "o", "markersize": 6, "markeredgecolor": theme.panel}
                if sparse
                else {"linewidth": 1.2}
            ),
        )
        axes.plot(
            x[best],
            y[best],
            "o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=theme.orange,
            markeredgewidth=1.8,
            zorder=5,
        )
        _note(axes, x[best], y[best], f"best {_value(y[best])}", theme.orange, theme)
    if key == "loss":
        _gone(axes, train, key, theme)
    axes.set_ylabel(unit)
    _legend(axes)
    return page


def _value(number: float) -> str:
    """Four digits, the zeros at the end included: 2.180 is more than 2.18."""
    if number == 0 or 0.001 <= abs(number) < 1000:
        return f"{number:.{3 - max(0, math.floor(math.log10(abs(number) or 1)))}f}"
    return human(number, 4) if abs(number) >= 1000 else _scientific(number)


def _draw_loss(history, status, theme=DARK):
    unit = "cross-entropy (nats per token)" if history.is_likelihood else "the task's loss"
    if _has(history.val["bits_per_byte"]):
        status = (
            f"{_last(history.val['bits_per_byte']):.3f} validation bits per byte   ·   {status}"
        )
    return _curve("Loss", "loss", unit, history, status, theme, log=False)


def _draw_perplexity(history, status, theme=DARK):
    return _curve(
        "Perplexity", "perplexity", "perplexity (log scale)", history, status, theme, log=True
    )


def _simple(title, key, unit, history, status, theme):
    """Page and axes for one number of the training records, or None if it never was one."""
    steps, values = history.train["step"], history.train[key]
    if not _has(values):
        return None
    page = Page(title, status, theme=theme)
    ((axes,),) = page.axes
    _steps_axis(axes, steps)
    axes.set_ylabel(unit)
    return page, axes, steps, values


def _draw_lr(history, status, theme=DARK):
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if (parts := _simple("Learning rate", "lr", "learning rate", history, status, theme)) is None:
        return None
    page, axes, steps, values = parts
    import numpy as np

    _line(
        axes,
        steps,
        values,
        theme.green,
        f"now {_scientific(_last(values))}, peak {_scientific(np.nanmax(values))}",
        linewidth=2.6,
    )
    axes.fill_between(*thin(steps, values), color=theme.green, alpha=0.12, linewidth=0)
    axes.set_ylim(0, (np.nanmax(values) or 1.0) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
    _legend(axes)
    return page


def _scientific(value: float) -> str:
    """3e-4 rather than 0.0003 or 3.0e-04."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _draw_tokens_per_sec(history, status, theme=DARK):
    import numpy as np

    if _has(history.train["mfu"]):
        status = f"median MFU {100 * np.nanmedian(history.train['mfu']):.1f} %   ·   {status}"
    if (
        parts := _simple(
            "Throughput", "tokens_per_sec", "tokens per second", history, status, theme
        )
    ) is None:
        return None
    page, axes, steps, values = parts
    median = float(np.nanmedian(values))
    _line(axes, steps, values, theme.teal, f"now {human(_last(values))} tokens/s", linewidth=1.6)
    axes.axhline(
        median,
        color=theme.yellow,
        linewidth=1.8,
        linestyle=(0, (5, 4)),
        zorder=5,
        label=f"median {human(median)} tokens/s",
    )
    # The first steps warm up, pauses dip: the axis shows all of them, from zero.
    axes.set_ylim(0, (np.nanmax(values) or 1.0) * 1.1)
    _human_axis(axes.yaxis)
    _legend(axes)
    return page


def _draw_tokens_seen(history, status, theme=DARK):
    import numpy as np

    if (
        parts := _simple("Tokens seen", "tokens_seen", "training tokens", history, status, theme)
    ) is None:
        return None
    page, axes, steps, values = parts
    _line(axes, steps, values, theme.purple, f"{human(_last(values))} tokens", linewidth=2.6)
    axes.fill_between(*thin(steps, values), color=theme.purple, alpha=0.14, linewidth=0)
    axes.set_ylim(0, (np.nanmax(values) or 1.0) * 1.08)
    _human_axis(axes.yaxis)
    _legend(axes)
    return page


def _draw_grad_norm(history, status, theme=DARK):
    import numpy as np

    values = history.train["grad_norm"]
    if not (values > 0).any():
        return None
    page, axes, steps, values = _simple(
        "Gradient norm",
        "grad_norm",
        "gradient norm before clipping (log scale)",
        history,
        status,
        theme,
    )
    values = np.where(values > 0, values, np.nan)
    _log_axis(axes, values)
    if len(values) >= 40:
        _line(axes, steps, values, theme.pink, alpha=0.4, linewidth=1.0, zorder=2)
        smoothed = np.exp(smooth(np.log(values)))
        _line(axes, steps, smoothed, theme.pink, f"{_value(_last(smoothed))} (smoothed)")
    else:
        _line(axes, steps, values, theme.pink, _value(_last(values)))
    top = int(np.nanargmax(values))
    axes.plot(
        steps[top],
        values[top],
        "v",
        color=theme.yellow,
        markersize=8,
        zorder=6,
        linestyle="none",
        label=f"largest {_value(values[top])} at step {steps[top]:,.0f}",
    )
    _gone(axes, history.train, "grad_norm", theme)
    _legend(axes)
    return page


def _draw_expert_load(history, status, theme=DARK):
    """Draw each expert's newest load as a heat map, and each block's extremes over time."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if history.loads is None:
        return None
    loads = history.loads
    blocks, experts = loads.shape
    map_height = min(max(0.34 * blocks, 2.2), 6.0)
    height = map_height + 5.3
    page = Page(
        "Expert load", status, rows=2, height=height, theme=theme, height_ratios=[map_height, 3.2]
    )
    top, bottom = page.axes[:, 0]
    # heat map, in powers of two around the fair share
    image = top.imshow(
        np.log2(np.maximum(loads, LOWEST_LOAD)),
        aspect="auto",
        interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("load", theme.load),
        norm=Normalize(-2, 2),
    )
    top.grid(False)
    top.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
    top.set_yticks(np.arange(blocks + 1) - 0.5, minor=True)
    if experts <= 64 and blocks <= 64:
        top.grid(which="minor", color=theme.background, linewidth=1.6 if experts <= 32 else 0.8)
    top.tick_params(which="both", length=0)
    top.spines[:].set_visible(False)
    top.set_xticks(_indices(experts, 17))
    top.set_yticks(_indices(blocks, 13))
    top.set(xlabel="expert", ylabel="block")
    least, most = np.nanmin(loads), np.nanmax(loads)
    top.set_title(
        f"load at step {history.loads_step:,} in % of a fair share: "
        f"from {_percent(least)} to {_percent(most)}",
        loc="left",
        fontsize=12,
        color=theme.text,
    )
    if experts <= 16 and blocks <= 16:
        for (block, expert), load in np.ndenumerate(loads):
            if math.isfinite(load):
                top.text(
                    expert,
                    block,
                    f"{100 * load:.0f}",
                    ha="center",
                    va="center",
                    fontsize=11,
                    color=_readable_on(
                        image.cmap(image.norm(math.log2(max(load, LOWEST_LOAD)))), theme
                    ),
                )
    bar = page.figure.colorbar(
        image,
        ax=top,
        pad=0.015,
        aspect=max(8, 4 * map_height),
        extend="both",
        ticks=[-2, -1, 0, 1, 2],
    )
    bar.ax.set_yticklabels(["25 %", "50 %", "100 %", "200 %", "400 %"])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    # least and most over time
    step, least = history.router["load_min"]
    _, most = history.router["load_max"]
    colors = _depth_colors(least.shape[1], theme)
    for block, color in enumerate(colors):
        width = 2.0 if blocks <= 8 else 1.3
        _line(
            bottom,
            step,
            np.maximum(least[:, block], LOWEST_LOAD),
            color,
            linewidth=width,
            alpha=0.9,
        )
        _line(
            bottom, step, np.maximum(most[:, block], LOWEST_LOAD), color, linewidth=width, alpha=0.9
        )
    for share, color in (
        (HEALTHY_LOAD[0], theme.red),
        (1.0, theme.muted),
        (HEALTHY_LOAD[1], theme.red),
    ):
        bottom.axhline(
            share, color=color, linewidth=1.4, linestyle=(0, (5, 4)), zorder=2, alpha=0.9
        )
    bottom.set_yscale("log", base=2)
    low, high = (
        max(min(0.25, np.nanmin(least)), LOWEST_LOAD) / 1.25,
        max(4.0, np.nanmax(most)) * 1.25,
    )
    bottom.set_ylim(low, high)
    ticks = [t for t in (2.0 ** np.arange(-6, 13)) if low <= t <= high]
    bottom.yaxis.set_major_locator(
        FixedLocator(
            ticks if len(ticks) <= 9 else [t for t in ticks if round(math.log2(t)) % 2 == 0]
        )
    )
    bottom.yaxis.set_minor_locator(NullLocator())
    bottom.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: ("≤ " if value <= LOWEST_LOAD else "") + _percent(value))
    )
    bottom.set_title(
        "least and most loaded expert of each block; red: a quarter and four times the fair share",
        loc="left",
        fontsize=12,
        color=theme.text,
    )
    bottom.set_ylabel("share of fair (log scale)")
    _steps_axis(bottom, step)
    _depth_key(page, bottom, least.shape[1])
    return page


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.2g} %"


def _draw_router(history, status, theme=DARK):
    """Draw each block's normalised router entropy and share of dropped tokens over the steps."""
    import numpy as np

    entropy, dropped = history.router.get("entropy"), history.router.get("dropped")
    if entropy is None and dropped is None:
        return None
    parts = [part for part in ("entropy", "dropped") if history.router.get(part) is not None]
    page = Page(
        "Router",
        status,
        rows=len(parts),
        height=2.2 + 2.5 * len(parts),
        theme=theme,
        sharex=True,
        height_ratios=[1.5, 1.0][: len(parts)],
    )
    for axes, part in zip(page.axes[:, 0], parts, strict=True):
        step, values = history.router[part]
        if part == "entropy" and history.loads is not None:
            experts = history.loads.shape[1]
            # One expert leaves no choice: its 0 nats are all there is to have.
            values = values / math.log(experts) if experts > 1 else np.ones_like(values)
            title, unit = (
                "entropy as a share of the highest, where all experts are equally likely",
                "router entropy",
            )
            axes.set_ylim(-0.03, 1.06)
        elif part == "entropy":
            title, unit = "entropy of the router's choice", "router entropy (nats)"
            axes.set_ylim(0, 1.1 * (np.nanmax(values) if _has(values) else 1.0) or 1.0)
        else:
            values = 100 * values
            top = np.nanmax(values) if _has(values) else 0.0
            title = "assignments dropped for want of capacity" + (": none" if top == 0 else "")
            unit = "dropped (%)"
            axes.set_ylim(*((-0.06 * top, 1.15 * top) if top > 0 else (-0.06, 1.0)))
        for block, color in enumerate(_depth_colors(values.shape[1], theme)):
            _line(
                axes,
                step,
                values[:, block],
                color,
                linewidth=2.0 if values.shape[1] <= 8 else 1.3,
                alpha=0.95,
            )
        axes.set_title(title, loc="left", fontsize=12, color=theme.text)
        axes.set_ylabel(unit)
        _steps_axis(axes, step, label=part == parts[-1])
    _depth_key(page, list(page.axes[:, 0]), history.router[parts[0]][1].shape[1])
    return page


def _draw_score(history, status, theme=DARK):
    """Shares of right answers with their 95 % intervals; below, losses that are to stay low."""
    import numpy as np

    steps = np.array([step for step, _ in history.scores], dtype=float)
    names = dict.fromkeys(name for _, score in history.scores for name in score)
    shares = [name for name in names if f"{name}{LOW}" in names]
    losses = [name for name in names if name.endswith(" loss")]
    panels = [panel for panel in (shares, losses) if panel]
    if not panels:
        return None

    def column(name: str):
        return np.array([_number(score.get(name)) for _, score in history.scores])

    page = Page("Score", status, rows=len(panels), theme=theme, sharex=True)
    colors = (theme.blue, theme.orange, theme.green, theme.purple, theme.red, theme.teal)
    for axes, panel in zip(page.axes[:, 0], panels, strict=True):
        for name, color in zip(panel, itertools.cycle(colors), strict=False):
            values = column(name)
            _line(axes, steps, values, color, f"{name} {_value(_last(values))}", marker="o")
            if panel is shares:
                low, high = column(f"{name}{LOW}"), column(f"{name}{HIGH}")
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        if panel is shares:
            axes.set_ylim(-0.02, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_ylabel("share of answers" if panel is shares else "nats per token")
        _steps_axis(axes, steps, label=panel is panels[-1])
        _legend(axes)
    return page


PLOTS = {
    "loss": _draw_loss,
    "perplexity": _draw_perplexity,
    "lr": _draw_lr,
    "tokens_per_sec": _draw_tokens_per_sec,
    "tokens_seen": _draw_tokens_seen,
    "expert_load": _draw_expert_load,
    "router": _draw_router,
    "grad_norm": _draw_grad_norm,
    "score": _draw_score,
}


def draw_plots(
    records: Iterable[dict],
    folder: str | Path,
    step: int,
    names: Sequence[str] = tuple(PLOTS),
    *,
    keep: bool = False,
    theme: str = "dark",
    run_name: str = "",
) -> list[Path]:
    """Draw the plots `names` of a run's `records` into `folder`; returns the paths written.

    Each is `latest_NAME.png`, which is replaced atomically. With `keep`, the same picture is also
    written as `step_XXXXXXX_NAME.png`, the original implementation's name. theme: a key of THEMES.
    run_name: written at the top. `records` may be an iterator (`MetricsLog.stream()`), read once.
    Keys may be missing and numbers null; a plot that then has nothing to show is left out. Raises
    ImportError where matplotlib or NumPy is not installed: the caller says so and continues.
    """
    import matplotlib.style

    history, paths, colors = History(records), [], THEMES[theme]
    status = _status(history, step, run_name)
    # The user's own style is not ours to depend on, nor to change.
    with matplotlib.style.context(["default", style(colors)]):
        for name in names:
            page = PLOTS[name](history, status, colors)
            if page is None:
                continue
            png = page.png()
            for which in (f"step_{step:07d}", "latest") if keep else ("latest",):
                path = Path(folder) / f"{which}_{name}.png"
                write_atomic(path, lambda file, png=png: file.write(png))
                paths.append(path)
    return paths
