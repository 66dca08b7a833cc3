"""runtime/training/plots.py: pictures that show the data, whole and legible.

For runs of any length and with anything missing.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from tests.conftest import REPO

pytest.importorskip("matplotlib")
import matplotlib  # noqa: E402
import matplotlib.style  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from runtime.training import plots
from runtime.training.plots import (
    PLOTS,
    STYLE,
    THEMES,
    History,
    contrast,
    draw_plots,
    human,
    smooth,
    style,
    thin,
)


def synthetic(
    count=60, blocks=3, experts=8, every=10, val_every=100, scale=1.0, dropped=0.0, seed=0
):
    """Records like a run's: falling loss, warm-up and decay, routers that even out."""
    random, out = np.random.default_rng(seed), []
    skew = np.clip(1 + 0.8 * random.normal(size=(blocks, experts)), 0.05, None)
    for i in range(1, count + 1):
        step, done = i * every, i / count
        loss = scale * (2.2 + 9 * math.exp(-8 * done**0.6)) + 0.05 * random.normal()
        load = 1 + (skew - 1) * math.exp(-2 * done)
        load *= experts / load.sum(1, keepdims=True)
        out.append(
            {
                "step": step,
                "kind": "train",
                "tokens_seen": step * 32_768,
                "loss": loss,
                "perplexity": math.exp(loss),
                "lr": 3e-4 * min(1, 10 * done),
                "grad_norm": 0.5 + 3 * math.exp(-9 * done),
                "tokens_per_sec": 2e5 + 3e3 * random.normal(),
                "mfu": 0.4,
                "expert_load": load.tolist(),
                "router_entropy": [math.log(experts) * 0.8] * blocks,
                "dropped_share": [dropped] * blocks,
            }
        )
        if step % val_every == 0:
            out.append(
                {
                    "step": step,
                    "kind": "val",
                    "tokens_seen": step * 32_768,
                    "loss": loss + 0.05,
                    "perplexity": math.exp(loss + 0.05),
                    "bits_per_byte": loss / 3,
                }
            )
    return out


def scores(last=600, every=100) -> list[dict]:
    """Records of a fine-tuning's score: shares with an interval, a mean, a loss."""
    out = []
    for step in range(0, last + 1, every):
        share = 0.8 * step / last
        ends = {"questions_low": share - 0.05, "questions_high": share + 0.05}
        numbers = {"questions": share, "length": 12.0, "story loss": 1.0 + share, **ends}
        out.append({"kind": "score", "step": step, "score": numbers})
    return out


@pytest.fixture
def coarse(monkeypatch):
    """Fewer pixels, where a test does not look at them: four times as fast."""
    monkeypatch.setattr(plots, "DPI", 40)


def page(name, records, step=600, theme="dark", run_name=""):
    """The figure of one plot, laid out and drawn."""
    history, colors = History(records), THEMES[theme]
    with matplotlib.style.context(["default", style(colors)]):
        figure = PLOTS[name](history, plots._status(history, step, run_name), colors).figure
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def texts(figure):
    """(words, bounding box in pixels) of all text that shows."""
    artists = list(figure.texts)
    for axes in figure.axes:
        legend = axes.get_legend()
        artists += [
            *axes.texts,
            axes.title,
            axes._left_title,
            axes.xaxis.label,
            axes.yaxis.label,
            *(legend.get_texts() if legend else []),
        ]
        for axis, (low, high) in (
            (axes.xaxis, sorted(axes.get_xlim())),
            (axes.yaxis, sorted(axes.get_ylim())),
        ):
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    artists += [
                        label for label in (tick.label1, tick.label2) if label.get_visible()
                    ]
    return [
        (a.get_text(), a.get_window_extent())
        for a in artists
        if a.get_text().strip() and a.get_visible()
    ]


def assert_legible(figure):
    """No text leaves the picture and no two touch."""
    shown = texts(figure)
    assert len(shown) > 3
    width, height = figure.bbox.width, figure.bbox.height
    for words, box in shown:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, (
            f"{words!r} is clipped"
        )
    for (words, box), (other, other_box) in itertools.combinations(shown, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), f"{words!r} overlaps {other!r}"


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


# ---------------------------------------------------------------------------------------- the score
def test_the_score_has_intervals_and_the_losses_a_panel_of_their_own(coarse):
    figure = page("score", scores())
    shares, losses = figure.axes
    assert [line.get_label() for line in shares.lines] == ["questions 0.800"]
    assert len(shares.collections) == 1 and shares.get_ylim() == (-0.02, 1.02)
    assert [line.get_label().split()[0] for line in losses.lines] == ["story"]
    assert "length" not in " ".join(words for words, _ in texts(figure))


def test_a_loss_that_is_no_cross_entropy_has_no_perplexity(coarse, tmp_path):
    """The exponential of a preference's loss was drawn as a perplexity."""
    records = [
        {k: v for k, v in r.items() if k not in ("perplexity", "bits_per_byte")}
        | ({} if r["kind"] == "score" else {"is_likelihood": False})
        for r in synthetic() + scores()
    ]
    assert "latest_perplexity.png" not in {p.name for p in draw_plots(records, tmp_path, 600)}
    assert "nats" not in " ".join(words for words, _ in texts(page("loss", records)))


# ---------------------------------------------------------------------------------------- the files
def test_a_save_leaves_the_latest_plots_and_no_others(tmp_path, coarse):
    """50 saves were 400 pictures, and nobody had asked for 392 of them."""
    for step in (300, 600):
        paths = draw_plots(synthetic() + scores(), tmp_path, step)
    assert {p.name for p in paths} == {f"latest_{name}.png" for name in PLOTS}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths}
    # Those of an earlier version, or of --keep_plots, stay.
    (tmp_path / "step_0000300_loss.png").write_bytes(b"kept")
    draw_plots(synthetic() + scores(), tmp_path, 600)
    assert (tmp_path / "step_0000300_loss.png").read_bytes() == b"kept"


def test_every_plot_is_written_twice_numbered_and_latest(tmp_path):
    paths = draw_plots(synthetic() + scores(), tmp_path, 600, keep=True)
    assert {p.name for p in paths} == {
        f"{which}_{name}.png" for which in ("step_0000600", "latest") for name in PLOTS
    }
    assert set(PLOTS) == {
        "loss",
        "perplexity",
        "lr",
        "tokens_per_sec",
        "tokens_seen",
        "expert_load",
        "router",
        "grad_norm",
        "score",
    }
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths}
    for name in PLOTS:
        assert (tmp_path / f"latest_{name}.png").read_bytes() == (
            tmp_path / f"step_0000600_{name}.png"
        ).read_bytes()
        height, width, _ = pixels(tmp_path / f"latest_{name}.png").shape
        assert width == 1500 and height >= 780


@pytest.mark.nightly
def test_light_pictures_are_light_and_hold_the_same(tmp_path, coarse):
    """On paper and in a light document the dark plots were black boxes."""
    dark = {p.name: pixels(p) for p in draw_plots(synthetic() + scores(), tmp_path / "dark", 600)}
    light = {
        p.name: pixels(p) for p in draw_plots(synthetic() + scores(), tmp_path, 600, theme="light")
    }
    assert dark.keys() == light.keys()
    for name, image in light.items():
        assert image.shape == dark[name].shape
        assert np.median(image[..., :3]) > 0.9 and list(image[0, 0][:3]) == [1, 1, 1]
        # Text, lines and cells: as much of the picture as in the dark one.
        drawn, as_dark = (
            np.mean(np.abs(i[..., :3] - np.median(i[..., :3], axis=(0, 1))).max(-1) > 0.25)
            for i in (image, dark[name])
        )
        assert drawn == pytest.approx(as_dark, rel=0.5), name


@pytest.mark.parametrize("theme", THEMES)
def test_every_colour_of_a_theme_can_be_seen(theme):
    """Contrast with the panel, WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    colors = THEMES[theme]
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("red", "red") == 1
    for ground in (colors.panel, colors.background):
        assert contrast(colors.text, ground) > 10 and contrast(colors.muted, ground) > 4.5
        assert [c for c in (*colors[6:14], *colors.depth) if contrast(c, ground) < 3] == []
    assert contrast(colors.grid, colors.panel) < 1.5
    # A number in a cell of the loads, on each of its colours.
    for load in (0.01, 0.25, 0.5, 1.0, 2.0, 4.0, 9.0):
        figure = page("expert_load", [cell(load)], theme=theme)
        (words,) = figure.axes[0].texts
        image = figure.axes[0].images[0]
        ground = image.cmap(image.norm(image.get_array()[0, 0]))
        assert contrast(words.get_color(), ground) > 4, load


def cell(load: float) -> dict:
    return {"step": 1, "kind": "train", "expert_load": [[load]]}


@pytest.mark.nightly
def test_the_name_of_the_run_is_in_every_plot():
    for name in PLOTS:
        for run_name, shown in (("muon_1", "muon_1"), ("x" * 99 + "end", "xxxxend"), ("", None)):
            figure = page(name, synthetic() + scores(), run_name=run_name)
            (status,) = [t.get_text() for t in figure.texts if "step 600" in t.get_text()]
            assert shown is None or shown in status
            assert_legible(figure)


@pytest.mark.slow
def test_pictures_are_dark_and_hold_something(tmp_path):
    for path in draw_plots(synthetic() + scores(), tmp_path, 600):
        image = pixels(path)[..., :3]
        assert np.median(image) < 0.15 and image[0, 0] == pytest.approx(
            [0x0D / 255, 0x11 / 255, 0x17 / 255], abs=0.01
        )
        assert (image.max(axis=2) > 0.6).mean() > 0.002, f"{path.name} is empty"


@pytest.mark.parametrize("name", PLOTS)
def test_other_data_gives_another_picture_and_the_same_data_the_same(tmp_path, coarse, name):
    def picture(records, folder):
        draw_plots(records, tmp_path / folder, 600, [name])
        return (tmp_path / folder / f"latest_{name}.png").read_bytes()

    records = synthetic(dropped=0.01) + scores()
    changed = [
        {
            **r,
            "loss": r["loss"] + r["step"] / 300,
            "perplexity": r["perplexity"] * (1 + r["step"] / 100),
        }
        if r["kind"] == "val"
        else r | {"score": {k: v / 2 for k, v in r["score"].items()}}
        if r["kind"] == "score"
        else {
            **r,
            "lr": r["lr"] * r["step"],
            "tokens_per_sec": r["tokens_per_sec"] / (1 + r["step"] % 3),
            "tokens_seen": r["step"] ** 2,
            "expert_load": [load[::-1] for load in r["expert_load"]],
            "router_entropy": [e / 2 for e in r["router_entropy"]],
            "grad_norm": r["grad_norm"] * (1 + r["step"] % 3),
        }
        for r in records
    ]
    assert picture(records, "a") == picture(iter(records), "b") != picture(changed, "c")


def test_latest_is_replaced_whole(tmp_path, coarse, monkeypatch):
    """A reader, or a kill, never sees half a picture: it is complete before it takes the name."""
    draw_plots(synthetic(20), tmp_path, 200, ["loss"])
    before = (tmp_path / "latest_loss.png").read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.base.files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        draw_plots(synthetic(40), tmp_path, 400, ["loss"])
    assert (tmp_path / "latest_loss.png").read_bytes() == before and not list(
        tmp_path.glob("*.partial")
    )


# ----------------------------------------------------------------------------------- what they show
def data_of(figure, color):
    return [
        line
        for axes in figure.axes
        for line in axes.lines
        if line.get_color() == color and len(line.get_xdata())
    ]


def words(figure):
    return " | ".join(text for text, _ in texts(figure))


def test_loss_shows_raw_smoothed_and_validation_with_its_best():
    records = synthetic()
    for r in records:
        if r["kind"] == "val":
            r["loss"] = {300: 1.5}.get(r["step"], 4.0 if r["step"] == 600 else 5.0)
    figure = page("loss", records)
    raw, smoothed = sorted(data_of(figure, plots.BLUE), key=lambda line: line.get_linewidth())
    assert list(raw.get_ydata()) == [r["loss"] for r in records if r["kind"] == "train"]
    assert (
        np.abs(np.diff(smoothed.get_ydata()[20:])).mean()
        < np.abs(np.diff(raw.get_ydata()[20:])).mean() / 1.5
    )
    assert any(
        list(line.get_ydata()) == [r["loss"] for r in records if r["kind"] == "val"]
        for line in data_of(figure, plots.ORANGE)
    )
    assert "validation 4.000, best 1.500" in words(figure) and "| best 1.500" in words(figure)
    assert "bits per byte" in words(figure) and "19.7M tokens" in words(figure)
    ring = next(
        line
        for axes in figure.axes
        for line in axes.lines
        if line.get_markeredgecolor() == plots.ORANGE and line.get_markersize() == 12
    )
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (300, 1.5)


def test_steps_whose_loss_was_not_finite_are_marked():
    records = synthetic()
    for index in (30, 31):
        records[index] = records[index] | {
            "loss": None,
            "perplexity": None,
            "grad_norm": None,
            "non_finite": True,
        }
    # Not measured, which is another thing.
    records[40] |= {"grad_norm": None}
    lost = [r["step"] for r in records if r["loss"] is None]
    for name in ("loss", "grad_norm"):
        figure = page(name, records)
        assert "not finite: 2" in words(figure)
        assert any(list(line.get_xdata()) == lost for line in data_of(figure, plots.RED))


def test_perplexity_and_gradient_norm_are_logarithmic():
    for name in ("perplexity", "grad_norm"):
        assert page(name, synthetic()).axes[0].get_yscale() == "log"


@pytest.mark.parametrize(
    "low, high", [(9.0, 9.0), (9, 9.05), (9, 11), (0.4, 3.1), (3, 40), (2, 9e4), (1e-3, 1e12)]
)
def test_a_log_axis_always_has_labels(low, high):
    """matplotlib labels decades only: a perplexity of 11 to 90 had an axis without a number."""
    records = [
        {"step": i, "kind": "train", "perplexity": p}
        for i, p in enumerate(np.geomspace(low, high, 10).tolist())
    ]
    figure = page("perplexity", records)
    axes = figure.axes[0]
    bottom, top = axes.get_ylim()
    assert (
        2
        <= len(
            {
                axes.yaxis.get_major_formatter()(t, 0)
                for t in axes.get_yticks()
                if bottom <= t <= top
            }
        )
        <= 12
    )
    assert_legible(figure)


def test_perplexity_comes_from_the_loss_where_it_is_missing():
    figure = page(
        "perplexity",
        [
            {"step": i, "kind": "train", "loss": loss}
            for i, loss in enumerate((3.0, 2.0, 800.0, 1.0))
        ],
    )
    drawn = np.concatenate([line.get_ydata() for line in data_of(figure, plots.BLUE)])
    assert math.exp(3) in drawn and math.exp(1) in drawn and not np.isinf(drawn).any()


def test_throughput_has_its_median_line_and_mfu():
    records = [
        {"step": i, "kind": "train", "tokens_per_sec": v, "mfu": 0.25}
        for i, v in enumerate((100.0, 2000.0, 2100.0, 2200.0, 50.0), 1)
    ]
    figure = page("tokens_per_sec", records)
    assert list(data_of(figure, plots.YELLOW)[0].get_ydata()) == [2000.0, 2000.0]
    assert "median 2k tokens/s" in words(figure) and "median MFU 25.0 %" in words(figure)


def test_expert_load_shows_the_newest_loads_and_the_extremes_of_each_block_over_time():
    records = [
        {
            "step": step,
            "kind": "train",
            "expert_load": [[1.0, 1.0 - step / 20, 1.0 + step / 20], [1.0, 0.5, 1.5]],
        }
        for step in (1, 5, 10)
    ]
    figure = page("expert_load", records)
    shown = figure.axes[0].images[0].get_array()
    assert np.allclose(2.0**shown, [[1.0, 0.5, 1.5], [1.0, 0.5, 1.5]])
    lines = [list(line.get_ydata()) for line in figure.axes[1].lines]
    for expected in ([0.95, 0.75, 0.5], [1.05, 1.25, 1.5], [0.5] * 3, [1.5] * 3):
        assert any(line == pytest.approx(expected) for line in lines if len(line) == 3)
    assert [0.25, 0.25] in lines and [4.0, 4.0] in lines
    assert "from 50 % to 150 %" in words(figure)


def test_router_entropy_is_normalised_by_the_number_of_experts():
    records = synthetic(20, blocks=2, experts=8, dropped=0.02)
    figure = page("router", records)
    entropy, dropped = figure.axes[:2]
    assert [set(np.round(line.get_ydata(), 9)) for line in entropy.lines] == [{0.8}, {0.8}]
    assert [set(np.round(line.get_ydata(), 9)) for line in dropped.lines] == [{2.0}, {2.0}]
    without = [{k: v for k, v in r.items() if k != "expert_load"} for r in records]
    assert "nats" in words(page("router", without))


def test_tokens_seen_and_lr_read_as_humans_write():
    records = synthetic()
    assert "19.7M tokens" in words(page("tokens_seen", records)) and "15M" in words(
        page("tokens_seen", records)
    )
    assert "now 3e-4, peak 3e-4" in words(page("lr", records)) and "2e-4" in words(
        page("lr", records)
    )


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (7, "7"),
        (950, "950"),
        (999.9, "1k"),
        (1500, "1.5k"),
        (65_536_000, "65.5M"),
        (3.664e9, "3.66B"),
        (999_999, "1M"),
        (0.25, "0.25"),
        (2e12, "2T"),
        (3e15, "3e15"),
        (-1500, "-1.5k"),
    ],
)
def test_human(number, text):
    assert human(number) == text


# ----------------------------------------------------------------------------------------- legible?
@pytest.mark.parametrize(
    "records",
    [
        pytest.param(synthetic(), id="usual"),
        pytest.param(synthetic(1, every=1, val_every=1), id="one record"),
        pytest.param(synthetic(50, blocks=12, experts=32, dropped=0.3), id="default model"),
        pytest.param(synthetic(45, blocks=60, experts=256, every=123_457, val_every=1), id="large"),
        pytest.param(synthetic(30, blocks=1, experts=1), id="one block, one expert"),
        pytest.param(synthetic(30, blocks=16, experts=16, scale=1e-4), id="tiny loss"),
        pytest.param(
            [r | {"tokens_per_sec": 9.87e9, "lr": 1.2345e-9} for r in synthetic(30, scale=40)],
            id="huge numbers",
        ),
    ],
)
def test_no_text_is_clipped_or_overlaps(records):
    for name in PLOTS:
        assert_legible(page(name, records + scores(), records[-1]["step"]))


# -------------------------------------------------------------------------- anything can be missing
def test_one_record_is_enough_and_shows(tmp_path, coarse):
    """A line through one point is invisible: it must become a dot."""
    paths = draw_plots(synthetic(1, blocks=1, experts=1) + scores()[:1], tmp_path, 10)
    assert len(paths) == len(PLOTS)
    assert any(line.get_marker() == "o" for line in page("loss", synthetic(1)).axes[0].lines)


@pytest.mark.parametrize(
    "missing",
    [
        "loss",
        "perplexity",
        "lr",
        "grad_norm",
        "tokens_per_sec",
        "tokens_seen",
        "mfu",
        "expert_load",
        "router_entropy",
        "dropped_share",
    ],
)
def test_keys_may_be_missing_or_null(tmp_path, coarse, missing):
    records = synthetic(12, dropped=0.1)
    absent = [{k: v for k, v in r.items() if k != missing} for r in records]
    null = [r | {missing: None} for r in records]
    some = [r | {missing: None} if i % 3 == 0 else r for i, r in enumerate(records)]
    same = [
        {p.name: p.read_bytes() for p in draw_plots(r, tmp_path / f"{i}", 120, _names(missing))}
        for i, r in enumerate((absent, null))
    ]
    assert same[0] == same[1]
    assert draw_plots(some, tmp_path / "some", 120, _names(missing))


def _names(missing):
    names = {
        "loss": ["loss", "perplexity"],
        "mfu": ["tokens_per_sec"],
        "expert_load": ["expert_load", "router"],
        "router_entropy": ["router"],
        "dropped_share": ["router"],
        "tokens_seen": ["tokens_seen", "loss"],
    }
    return names.get(missing, [missing])


def test_a_plot_with_nothing_to_show_is_left_out(tmp_path, coarse):
    assert draw_plots([], tmp_path, 0) == []
    assert (
        draw_plots([{"step": 1, "kind": "train"} | dict.fromkeys(plots.TRAIN_KEYS)], tmp_path, 1)
        == []
    )
    only_loss = draw_plots([{"step": 1, "kind": "train", "loss": 3.0}], tmp_path, 1)
    assert {p.name for p in only_loss} == {
        "latest_loss.png",
        "latest_perplexity.png",
    }
    # A first validation before any step.
    assert len(draw_plots([{"step": 0, "kind": "val", "loss": 12.2}], tmp_path, 0)) == 2


def test_nulls_inside_the_loads_and_dead_experts(tmp_path, coarse):
    records = synthetic(10, blocks=2, experts=4)
    records[3]["expert_load"] = [[None, 1.0, 2.0, 1.0], [None] * 4]
    records[9]["expert_load"] = [[0.0, 0.0, 0.0, 4.0], [None, 1.0, 1.0, 2.0]]
    assert draw_plots(records, tmp_path, 100, ["expert_load"])
    figure = page("expert_load", records)
    assert "from 0 % to 400 %" in words(figure) and "≤ 1.6 %" in words(figure)
    # Nothing known: the newest known one is shown.
    records[9]["expert_load"] = [[None] * 4] * 2
    assert "load at step 90" in words(page("expert_load", records))


def test_records_out_of_order_are_drawn_in_order():
    records = synthetic(30)
    assert list(History(records[::-1]).train["step"]) == [
        r["step"] for r in records if r["kind"] == "train"
    ]


# ------------------------------------------------------------------------------------- bounded cost
@pytest.mark.nightly
@pytest.mark.slow
def test_long_runs_cost_bounded_memory_and_time(tmp_path):
    """30,000 records with routers of 12 x 32 are over 100 MB as lists.

    Of those read from an iterator a small part is kept.
    """
    base, count = [r for r in synthetic(200, blocks=12, experts=32) if r["kind"] == "train"], 30_000

    def stream():
        for i in range(count):
            yield base[i % 200] | {
                "step": i,
                "expert_load": [list(loads) for loads in base[i % 200]["expert_load"]],
            }

    tracemalloc.start()
    history = History(stream())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6
    assert plots.ROUTER_RECORDS <= len(history.router["entropy"][0]) <= 2 * plots.ROUTER_RECORDS + 1
    # The newest is always there.
    assert history.router["entropy"][0][-1] == count - 1
    start = time.process_time()
    for name in PLOTS.keys() - {"score"}:
        with matplotlib.style.context(["default", STYLE]):
            figure = PLOTS[name](history, "")
            figure.png()
        assert all(
            len(line.get_xdata()) <= 2 * plots.POINTS
            for axes in figure.figure.axes
            for line in axes.lines
        )
    assert time.process_time() - start < 20


def test_thinning_keeps_spikes_gaps_and_ends():
    x = np.arange(100_000.0)
    y = np.sin(x / 5_000)
    y[33_333], y[66_666], y[50_000:50_500] = 9.0, -9.0, np.nan
    thin_x, thin_y = thin(x, y)
    assert (
        len(thin_x) <= 2 * plots.POINTS
        and thin_y[thin_x == 33_333] == 9.0
        and thin_y[thin_x == 66_666] == -9.0
    )
    assert (
        np.isnan(thin_y).any()
        and (np.diff(thin_x) > 0).all()
        and thin_x[0] < 100
        and thin_x[-1] > 99_900
    )


def test_smoothing_is_the_mean_around_each_point():
    random = np.random.default_rng(0)
    y = 3.0 + random.normal(size=4_000)
    y[100:150] = np.nan
    smoothed = smooth(y)
    assert (
        smoothed[2_000] == pytest.approx(y[1_900:2_101].mean())
        and np.isnan(smoothed[100:150]).all()
    )
    # A steep beginning is not blurred.
    assert smoothed[0] == y[0]
    assert np.nanstd(smoothed[500:]) < 0.15 and not np.isnan(smoothed[-1])
    assert smooth(np.array([])).shape == (0,) and list(smooth(np.array([2.0]))) == [2.0]


# ----------------------------------------------------------------------------- a guest in the house
def test_matplotlibs_global_state_is_not_touched(tmp_path):
    """Neither pyplot (a window system, a list of figures that grows) nor the user's style."""
    code = (
        "import sys, matplotlib; matplotlib.rcParams['lines.linewidth'] = 7.5; state = "
        "lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}; "
        "before = state()\n"
        "from runtime.training.plots import draw_plots\n"
        "assert draw_plots([{'step': 1, 'kind': 'train', 'loss': 2.0}], sys.argv[1], 1)\n"
        "assert state() == before and 'matplotlib.pyplot' not in sys.modules and 'torch' not "
        "in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], cwd=REPO, check=True)


def test_a_users_style_does_not_change_the_pictures(tmp_path, coarse):
    records = synthetic(10)
    draw_plots(records, tmp_path / "a", 1, ["loss"])
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "figure.facecolor": "white"}
    ):
        draw_plots(records, tmp_path / "b", 1, ["loss"])
    assert (tmp_path / "a" / "latest_loss.png").read_bytes() == (
        tmp_path / "b" / "latest_loss.png"
    ).read_bytes()


def test_without_matplotlib_the_module_imports_and_drawing_raises_import_error(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom runtime.training.plots import "
        "draw_plots\n"
        "try: draw_plots([], sys.argv[1], 1)\nexcept ImportError: sys.exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPO).returncode == 7
