"""Draw the architecture of a model, with its own numbers.

    python -m scripts.draw_architecture [--preset NAME] [model flags]

Boxes, options and parameter counts all come from the ModelConfig. No number in the picture is
written here.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import io
from pathlib import Path

from config_model import ModelConfig, TrainConfig, kv_cache_bytes_per_token, parameter_counts
from runtime.base.cli import add_config_flags, parser, run_main, settings_from
from runtime.base.files import write_atomic
from runtime.checkpoint.format import meta_model
from runtime.checks.known import (
    ATTENTION,
    EXPERTS,
    OUTSIDE,
    POSITIONS,
    SIZES,
    TRAINING,
    Known,
    counts,
)
from runtime.training.plots import (
    BACKGROUND,
    BLUE,
    EDGE,
    GREEN,
    GRID,
    MUTED,
    ORANGE,
    PANEL,
    PURPLE,
    STYLE,
    TEAL,
    TEXT,
    YELLOW,
    human,
)

# Inches. All coordinates below are inches from the lower left.
WIDTH, HEIGHT = 13.0, 9.7
# Pixels per inch.
DPI = 150
PART_COLORS = {
    "embedding": TEAL,
    "attention": BLUE,
    "attention bias table": PURPLE,
    "router": YELLOW,
    "experts": ORANGE,
    "norms": MUTED,
    "head": GREEN,
    "not drawn": TEXT,
}
KNOWS = Known(
    "the drawing",
    SIZES | ATTENTION | POSITIONS | EXPERTS | OUTSIDE | TRAINING,
)
# Where the sheet begins.
BOTTOM = 0.25
# More experts are not drawn; a line under them says so.
EXPERTS_DRAWN = 64
EXPERT_NAMES = {"gelu": "GELU", "swiglu": "SwiGLU", "swiglu_clamped": "clamped SwiGLU"}


class Sheet:
    """A dark sheet of paper in inches, and the few shapes that the diagram is made of."""

    def __init__(self):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(BOTTOM, BOTTOM + HEIGHT))
        self.axes.set_axis_off()

    def text(self, x, y, words, size=12.0, color=TEXT, width=None, **options):
        """Write text, shrunk until it is at most `width` inches wide.

        It is centred on (x, y) unless `ha` or `va` say otherwise.
        """
        made = self.axes.text(
            x,
            y,
            words,
            **{"fontsize": size, "color": color, "ha": "center", "va": "center", "zorder": 6}
            | options,
        )
        if width is not None:
            wide = made.get_window_extent(self.canvas.get_renderer()).width / DPI
            if wide > width:
                made.set_fontsize(size * width / wide * 0.99)
        return made

    def rectangle(self, x, y, w, h, face, edge, radius=0.09, **options):
        from matplotlib.patches import FancyBboxPatch

        self.axes.add_patch(
            FancyBboxPatch(
                (x, y),
                w,
                h,
                boxstyle=f"round,pad=0,rounding_size={radius}",
                facecolor=face,
                edgecolor=edge,
                **{"linewidth": 1.4, "zorder": 4} | options,
            )
        )

    def box(self, x, y, w, h, color, title, *lines, size=12.5):
        """Draw a box tinted in `color`, with a title and smaller lines inside."""
        self.rectangle(x, y, w, h, mix(color, PANEL, 0.16), color)
        pitch = 0.225
        top = y + h / 2 + (pitch / 2 - 0.01) * len(lines)
        self.text(x + w / 2, top, title, size, width=w - 0.16, fontweight="bold")
        for i, line in enumerate(lines, 1):
            self.text(
                x + w / 2,
                top - pitch * i - 0.01,
                line,
                10.5,
                mix(TEXT, MUTED, 0.45),
                width=w - 0.16,
            )

    def panel(self, x, y, w, h, title, note="", color=EDGE):
        """Draw a frame that explains one part: title at the upper left, note at the upper right."""
        self.rectangle(
            x, y, w, h, PANEL, mix(color, BACKGROUND, 0.6), radius=0.14, zorder=1, linewidth=1.2
        )
        made = self.text(x + 0.2, y + h - 0.26, title, 14, color, ha="left", fontweight="bold")
        used = made.get_window_extent(self.canvas.get_renderer()).width / DPI
        if note:
            self.text(x + w - 0.2, y + h - 0.26, note, 11, MUTED, width=w - used - 0.6, ha="right")

    def arrow(self, *points, color=MUTED):
        """Draw a line through `points` with an arrow head at its end."""
        from matplotlib.patches import FancyArrowPatch

        for start, end in zip(points[:-2], points[1:-1], strict=True):
            self.axes.plot(
                *zip(start, end, strict=True),
                color=color,
                linewidth=1.6,
                zorder=3,
                solid_capstyle="round",
            )
        self.axes.add_patch(
            FancyArrowPatch(
                points[-2],
                points[-1],
                arrowstyle="-|>",
                mutation_scale=13,
                color=color,
                linewidth=1.6,
                shrinkA=0,
                shrinkB=0,
                zorder=3,
            )
        )

    def dot(self, x, y, color=MUTED):
        self.axes.plot(x, y, "o", color=color, markersize=5.5, zorder=4)

    def plus(self, x, y):
        self.axes.plot(
            x,
            y,
            "o",
            markersize=21,
            markerfacecolor=BACKGROUND,
            markeredgecolor=MUTED,
            markeredgewidth=1.5,
            zorder=5,
        )
        self.axes.plot(x, y, "+", markersize=11, color=TEXT, markeredgewidth=1.8, zorder=6)

    def zoom(self, left_x, bottom, top, right_x, right_bottom, right_top, color):
        """Draw a pale wedge from a box to the panel that shows its inside."""
        from matplotlib.patches import Polygon

        self.axes.add_patch(
            Polygon(
                [(left_x, bottom), (left_x, top), (right_x, right_top), (right_x, right_bottom)],
                closed=True,
                facecolor=mix(color, BACKGROUND, 0.13),
                edgecolor="none",
                zorder=0.5,
            )
        )


def mix(color: str, other: str, share: float) -> tuple:
    """Return a color of `share` parts `color`, the rest `other`."""
    from matplotlib.colors import to_rgb

    return tuple(
        share * a + (1 - share) * b for a, b in zip(to_rgb(color), to_rgb(other), strict=True)
    )


# ----------------------------------------------------------------------------------------- parts
def draw_model(sheet: Sheet, c: ModelConfig) -> None:
    """Draw the whole model at the left, top to bottom."""
    x, w, middle = 0.3, 2.55, 0.3 + 2.55 / 2
    sheet.text(middle, 9.0, "token ids", 12, MUTED)
    sheet.arrow((middle, 8.84), (middle, 8.58))
    sheet.box(
        x, 7.88, w, 0.68, TEAL, "Embedding", f"{plural(c.vocabulary_size, 'token')} × {c.d_model:,}"
    )
    cards = min(c.transformer_blocks, 3)
    sheet.arrow((middle, 7.88), (middle, 7.24 + 0.09 * (cards - 1)))
    # A pile of cards, the front one in full.
    for i in reversed(range(cards)):
        sheet.rectangle(
            x + 0.09 * i,
            5.8 + 0.09 * i,
            w - 0.09 * (cards - 1),
            1.42,
            mix(TEXT, BACKGROUND, 0.10 - 0.02 * i),
            mix(TEXT, BACKGROUND, 0.55 - 0.15 * i),
            zorder=4 - 0.1 * i,
        )
    front = w - 0.09 * (cards - 1)
    sheet.text(
        x + front / 2,
        6.78,
        f"{c.transformer_blocks:,} × block",
        15,
        width=front - 0.2,
        fontweight="bold",
    )
    sheet.text(x + front / 2, 6.43, "attention", 12, BLUE)
    sheet.text(
        x + front / 2,
        6.15,
        f"{plural(c.num_experts, 'expert')}, {c.top_k:,} at work",
        12,
        ORANGE,
        width=front - 0.2,
    )
    sheet.arrow((middle, 5.8), (middle, 5.3))
    sheet.box(x, 4.78, w, 0.5, MUTED, "RMSNorm")
    sheet.arrow((middle, 4.78), (middle, 4.3))
    matrix = f"{c.d_model:,} → {c.vocabulary_size:,}"
    sheet.box(
        x,
        3.38,
        w,
        0.9,
        GREEN,
        "Output head",
        matrix + (" + bias" if c.head_bias else ""),
        "tied to the embedding" if c.tie_embeddings else "not tied to the embedding",
    )
    sheet.arrow((middle, 3.38), (middle, 2.9))
    sheet.text(middle, 2.74, "logits of the next token", 12, MUTED)


def draw_block(sheet: Sheet, c: ModelConfig) -> list[tuple[float, float]]:
    """Draw one block in the middle.

    Return bottom and top of the attention box and of the experts box, for the wedges.
    """
    x, y, w, h = 3.45, 2.3, 2.75, 6.86
    sheet.zoom(0.3 + 2.55, 5.98, 7.22, x, y, y + h, TEXT)
    sheet.panel(x, y, w, h, "Block", f"width {c.d_model:,}", mix(TEXT, MUTED, 0.7))
    left, box_x, box_w = x + 0.34, x + 0.68, w - 0.93
    middle, wedges = box_x + box_w / 2, []
    sheet.arrow((middle, y + h - 0.52), (middle, 7.99))
    for split, color, title, line in (
        (8.36, BLUE, "Attention", f"{plural(c.num_heads, 'head')} × {c.attention_head_dim:,}"),
        (5.36, ORANGE, "Experts", f"{c.top_k:,} of {c.num_experts:,}, {c.d_ff:,} wide"),
    ):
        norm, part, plus = split - 0.86, split - 1.96, split - 2.5
        sheet.dot(middle, split)
        # The residual stream goes round the part.
        sheet.arrow((middle, split), (left, split), (left, plus), (middle - 0.16, plus))
        sheet.box(box_x, norm, box_w, 0.48, MUTED, "RMSNorm")
        sheet.arrow((middle, norm), (middle, part + 0.77))
        sheet.box(box_x, part, box_w, 0.76, color, title, line)
        sheet.arrow((middle, part), (middle, plus + 0.16))
        sheet.plus(middle, plus)
        wedges.append((part, part + 0.76))
    sheet.arrow((middle, 5.7), (middle, 4.99))
    sheet.arrow((middle, 2.70), (middle, 2.4))
    return wedges


def draw_attention(sheet: Sheet, c: ModelConfig, box: tuple[float, float]) -> None:
    """Draw attention at the upper right, with the KV cache next to it."""
    x, y, w, h, D = 6.85, 5.62, 5.85, 3.54, c.attention_head_dim
    sheet.zoom(6.2 - 0.25, *box, x, y, y + h, BLUE)
    group = c.num_heads // c.num_kv_heads
    sheet.panel(
        x,
        y,
        w,
        h,
        "Grouped-query attention" if group > 1 else "Multi-head attention",
        f"{group} query heads per key head" if group > 1 else "",
        BLUE,
    )
    bias = " + bias" if c.qkv_bias else ""
    columns = {
        "Queries": (x + 0.2, 1.3, c.num_heads),
        "Keys": (x + 1.62, 1.08, c.num_kv_heads),
        "Values": (x + 2.82, 1.08, c.num_kv_heads),
    }
    scaling = [] if c.rope_scaling == "none" else [f"{c.rope_scaling} × {c.rope_scaling_factor:g}"]
    treatment = "  ·  ".join(
        ["QK-norm"] * c.qk_norm
        + ([f"RoPE {'base ' * (not scaling)}{c.rope_theta:,.0f}", *scaling] if c.use_rope else [])
    )
    core, core_w, bus = y + 0.84, 3.7, y + 1.56
    for name, (left, width, heads) in columns.items():
        middle = left + width / 2
        sheet.box(left, y + 2.38, width, 0.62, BLUE, name, f"{heads:,} × {D:,}{bias}", size=12)
        if treatment and name != "Values":
            sheet.arrow((middle, y + 2.38), (middle, y + 2.15))
            sheet.arrow((middle, y + 1.76), (middle, core + 0.57))
        else:
            sheet.arrow((middle, y + 2.38), (middle, core + 0.57))
    if treatment:
        sheet.box(x + 0.2, y + 1.76, 2.5, 0.37, TEAL, treatment, size=11.5)
    # The cache: new keys and values go in, all so far come out.
    cache_x, keys_x, values_x = x + 4.3, x + 1.62 + 1.08 / 2, x + 2.82 + 1.08 / 2
    kept = (
        f"last {c.sliding_window:,} only"
        if c.sliding_window and c.window_pattern == "all"
        else "bf16, all blocks"
    )
    sheet.box(
        cache_x,
        y + 1.66,
        1.35,
        1.34,
        PURPLE,
        "KV cache",
        f"{plural(c.num_kv_heads, 'head')} × {D:,}",
        f"{binary(kv_cache_bytes_per_token(c))} / token",
        kept,
        size=12,
    )
    sheet.dot(keys_x, bus, PURPLE)
    sheet.dot(values_x, bus, PURPLE)
    sheet.arrow(
        (keys_x, bus),
        (values_x + 0.74, bus),
        (values_x + 0.74, y + 1.86),
        (cache_x - 0.01, y + 1.86),
        color=PURPLE,
    )
    sheet.arrow(
        (cache_x + 0.675, y + 1.66),
        (cache_x + 0.675, core + 0.28),
        (x + 0.2 + core_w + 0.02, core + 0.28),
        color=PURPLE,
    )
    added = " + bias" * c.use_attention_bias + ", sink" * c.attention_sinks
    reach = "every token sees itself and all before it"
    if c.sliding_window:
        reach = f"every token sees the last {c.sliding_window:,}" + (
            ", in blocks 0, 2, 4, …" if c.window_pattern == "alternating" else ""
        )
    sheet.box(
        x + 0.2, core, core_w, 0.56, BLUE, f"softmax( q · k / √{D:,}{added} ) · v", reach, size=12
    )
    left, width = x + 0.2, core_w
    if c.use_attention_bias:
        sheet.box(
            left,
            y + 0.13,
            1.78,
            0.52,
            PURPLE,
            "Learned bias",
            f"{c.num_heads:,} × {c.context_length:,} × {c.context_length:,}",
            size=11,
        )
        sheet.arrow((left + 0.93, y + 0.65), (left + 0.93, core), color=PURPLE)
        left, width = x + 2.12, 1.78
    sheet.box(
        left,
        y + 0.13,
        width,
        0.52,
        BLUE,
        "Output projection",
        f"{c.num_heads * D:,} → {c.d_model:,}" + " + bias" * c.out_proj_bias,
        size=11,
    )
    sheet.arrow((left + width / 2, core), (left + width / 2, y + 0.66))
    draw_mask(sheet, c, x + 4.595, y + 0.13, 0.76)


def draw_mask(sheet: Sheet, c: ModelConfig, x: float, y: float, side: float) -> None:
    """Draw the mask: rows are queries, columns are keys, and what a query sees is bright.

    A sliding window is drawn as the last four keys.
    """
    cells, window = 9, 4 if c.sliding_window else 9
    step = side / cells
    for q in range(cells):
        for k in range(cells):
            seen = 0 <= q - k < window
            sheet.rectangle(
                x + k * step + 0.01,
                y + (cells - 1 - q) * step + 0.01,
                step - 0.02,
                step - 0.02,
                BLUE if seen else GRID,
                "none",
                radius=0.01,
            )


def draw_experts(sheet: Sheet, c: ModelConfig, box: tuple[float, float]) -> None:
    """Draw router, experts and weighted sum at the lower right."""
    x, y, w, h = 6.85, 2.3, 5.85, 3.12
    sheet.zoom(6.2 - 0.25, *box, x, y, y + h, ORANGE)
    capacity = (
        f"each takes {c.capacity_factor:g} × its fair share at most"
        if c.capacity_factor
        else "dropless"
    )
    sheet.panel(
        x, y, w, h, "Mixture of experts", f"{c.top_k:,} of {c.num_experts:,}, {capacity}", ORANGE
    )
    # The router and its choice.
    sheet.box(
        x + 0.2,
        y + 1.86,
        2.2,
        0.76,
        YELLOW,
        "Router",
        f"{c.d_model:,} → {c.num_experts:,}" + " + bias" * c.router_bias,
        "softmax in fp32",
        size=12,
    )
    sheet.arrow((x + 2.4, y + 2.24), (x + 2.76, y + 2.24), color=YELLOW)
    sheet.box(
        x + 2.78,
        y + 1.86,
        w - 2.98,
        0.76,
        YELLOW,
        f"Top {c.top_k:,}",
        "their weights sum to 1",
        balance(c),
        size=12,
    )
    # The experts, the chosen ones bright.
    drawn = min(c.num_experts, EXPERTS_DRAWN)
    rows = 1 if drawn <= 32 else 2
    across = -(-drawn // rows)
    cell = min((w - 0.4) / across, 1.2)
    left, bottom, tall = x + w / 2 - cell * across / 2, y + 1.17, 0.46 / rows
    gap = min(0.05, 0.2 * cell)
    first, second = (
        (int(min(max((at - left) / cell, 0), across - 1)) + across * (rows - 1)) % drawn
        for at in (x + 1.7, x + 4.3)
    )
    # Choose it so that the arrows from the router and to the expert can both go straight down.
    if c.top_k == 1:
        first = second = (
            int(min(max((x + 3.2 - left) / cell, 0), across - 1)) + across * (rows - 1)
        ) % drawn
    chosen = {first, second}
    # Spread the others out: multiples of the golden section.
    for i in range(1, drawn * 4):
        if len(chosen) < min(c.top_k, drawn):
            chosen.add(int(i * 0.618 % 1 * drawn))
    chosen |= set(range(drawn)) if c.top_k >= drawn else set()
    for i in range(drawn):
        row, column = divmod(i, across)
        sheet.rectangle(
            left + column * cell + gap / 2,
            bottom + (rows - 1 - row) * tall + 0.02,
            cell - gap,
            tall - 0.04,
            ORANGE if i in chosen else mix(ORANGE, PANEL, 0.22),
            "none",
            radius=min(0.04, cell / 5),
        )
    first_x, second_x = (left + (i % across + 0.5) * cell for i in (first, second))
    sheet.arrow((second_x, y + 1.86), (second_x, bottom + 0.46), color=YELLOW)
    # One of them, and the sum.
    gated = c.expert_activation != "gelu"
    biases = "biases" if c.expert_bias else "no biases"
    inside = f"{c.d_model:,} → {'2 × ' * gated}{c.d_ff:,} → {c.d_model:,}, {biases}"
    sheet.arrow((first_x, bottom), (first_x, y + 0.81), color=ORANGE)
    sheet.box(
        x + 0.2,
        y + 0.14,
        3.3,
        0.66,
        ORANGE,
        f"One expert: {EXPERT_NAMES[c.expert_activation]}",
        inside,
        size=12,
    )
    sheet.arrow((x + 3.5, y + 0.47), (x + 3.84, y + 0.47), color=ORANGE)
    if second_x > x + 3.9:
        sheet.arrow((second_x, bottom), (second_x, y + 0.81), color=ORANGE)
    sheet.box(
        x + 3.86,
        y + 0.14,
        w - 4.06,
        0.66,
        ORANGE,
        "Weighted sum",
        "by the router's weights",
        size=12,
    )
    if drawn < c.num_experts:
        sheet.text(
            x + 0.22,
            y + 0.99,
            f"{drawn} of {c.num_experts:,} drawn",
            10.5,
            MUTED,
            ha="left",
            width=first_x - x - 0.36,
        )


def balance(c: ModelConfig) -> str:
    """Return what keeps the load of the experts even."""
    terms = {"balance loss": c.aux_loss_coef, "z-loss": c.z_loss_coef, "bias": c.router_bias_rate}
    return (
        ", ".join(
            f"{name} × {value:g}" if name != "bias" else f"bias ± {value:g}"
            for name, value in terms.items()
            if value
        )
        or "nothing balances the load"
    )


def binary(count: float) -> str:
    """Return a number of bytes in a unit of 1,024."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + "s" * (count != 1)


def draw_parameters(sheet: Sheet, c: ModelConfig) -> None:
    """Draw at the bottom where the parameters are, to scale."""
    real = counts(c)
    parts = {
        part: count
        for part, count in (parameter_counts(c) | {"not drawn": real.uncounted}).items()
        if count > 0
    }
    names = {"attention bias table": "learned bias"}
    total, x, w = real.total, 0.3, WIDTH - 0.6
    sheet.text(x, 1.86, "Where the parameters are", 14, ha="left", fontweight="bold")
    position = x
    for part, count in parts.items():
        length = w * count / total
        sheet.rectangle(
            position, 1.26, length, 0.34, PART_COLORS[part], BACKGROUND, radius=0.0, linewidth=0.8
        )
        if length > 0.75:
            sheet.text(
                position + length / 2,
                1.425,
                f"{100 * count / total:.0f} %",
                12,
                BACKGROUND,
                fontweight="bold",
            )
        position += length
    pitch = w / len(parts)
    for i, (part, count) in enumerate(parts.items()):
        sheet.rectangle(x + i * pitch, 0.83, 0.16, 0.16, PART_COLORS[part], "none", radius=0.03)
        sheet.text(
            x + i * pitch + 0.26,
            0.91,
            names.get(part, part),
            12,
            MUTED,
            width=pitch - 0.34,
            ha="left",
        )
        sheet.text(
            x + i * pitch + 0.26,
            0.62,
            human(count),
            13.5,
            width=pitch - 0.34,
            ha="left",
            fontweight="bold",
        )


def draw(config: ModelConfig, name: str = ""):
    """Return the figure of `config`. name: its title."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        sheet = Sheet()
        title = sheet.text(0.3, 9.58, name or "gptoss", 22, ha="left", fontweight="bold", width=5.0)
        used = title.get_window_extent(sheet.canvas.get_renderer()).width / DPI
        table = parameter_counts(config)["attention bias table"]
        real = counts(config)
        sizes = f"{human(real.total)} parameters" + (
            f", {human(table)} of them learned bias" if table else ""
        )
        active, context = human(real.active), f"{config.context_length:,}"
        summary = f"{sizes}   ·   {active} active per token   ·   context {context}"
        sheet.text(WIDTH - 0.3, 9.56, summary, 13.5, MUTED, width=WIDTH - used - 1.0, ha="right")
        draw_model(sheet, config)
        attention, experts = draw_block(sheet, config)
        draw_attention(sheet, config, attention)
        draw_experts(sheet, config, experts)
        draw_parameters(sheet, config)
    return sheet.figure


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__.splitlines()[0])
    p.add_argument(
        "--out",
        default="public/architecture.png",
        help="picture to write (default: public/architecture.png)",
    )
    p.add_argument("--title", default="", help="title of the picture (default: the preset's name)")
    add_config_flags(p, ModelConfig)
    args = p.parse_args(argv)
    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file, not {args.out!r}")
    if Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a folder: name a file in it")
    # TrainConfig: --config may be a run's TOML file.
    config = settings_from(args, ModelConfig, TrainConfig).build(ModelConfig)
    try:
        figure = draw(config, args.title or args.preset or "gptoss")
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}): pip install matplotlib") from error
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=BACKGROUND, metadata={"Software": None})
    write_atomic(args.out, lambda file: file.write(buffer.getvalue()))
    real, why = counts(config), KNOWS.why_not(meta_model(config))
    print(f"{args.out}: {human(real.total)} parameters, {human(real.active)} active per token")
    if why:
        print(f"note: {why}: the picture is without it")
    return 0


if __name__ == "__main__":
    run_main(main)
