"""scripts/draw_architecture.py: the figure says what the config says, and all of it can be read."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tests.conftest import REPO

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402

from config_model import PRESETS, ModelConfig, active_parameters, parameter_counts, total_parameters  # noqa: E402
from runtime.training.plots import human
from scripts import draw_architecture  # noqa: E402
from scripts.draw_architecture import PART_COLORS, draw, main  # noqa: E402
from tests import children  # noqa: E402

MODERN = PRESETS["gptoss-modern"].model
ODD = {
    "all options": MODERN
    | dict(
        num_experts=256,
        top_k=8,
        sliding_window=1024,
        window_pattern="alternating",
        rope_scaling="yarn",
        rope_scaling_factor=4.0,
        qkv_bias=True,
        capacity_factor=1.25,
        z_loss_coef=1e-3,
        router_bias_rate=1e-3,
        tie_embeddings=True,
    ),
    "smallest": dict(
        d_model=2,
        num_heads=1,
        num_kv_heads=1,
        num_experts=1,
        top_k=1,
        transformer_blocks=1,
        d_ff=1,
        vocabulary_size=1,
        context_length=1,
        use_attention_bias=False,
        head_bias=False,
    ),
    "no positions": dict(use_rope=False, use_attention_bias=False, aux_loss_coef=0.0),
    "huge": dict(
        d_model=65_536,
        num_heads=512,
        num_kv_heads=512,
        num_experts=4_096,
        top_k=4_096,
        d_ff=262_144,
        transformer_blocks=1_024,
        vocabulary_size=16_777_216,
        context_length=16_777_216,
    ),
}


def words(**fields):
    return " | ".join(t.get_text() for t in draw(ModelConfig(**fields)).axes[0].texts)


@pytest.mark.parametrize("name", [*PRESETS, *ODD])
def test_no_text_is_clipped_overlapping_or_tiny(name):
    config = ModelConfig(**(PRESETS[name].model if name in PRESETS else ODD[name]))
    figure = draw(config, name)
    figure.draw_without_rendering()
    texts = [(t.get_text(), t.get_window_extent(), t.get_fontsize()) for t in figure.axes[0].texts]
    assert len(texts) > 40
    for text, box, size in texts:
        assert (
            box.x0 >= 0
            and box.y0 >= 0
            and box.x1 <= figure.bbox.width
            and box.y1 <= figure.bbox.height
        ), f"{text!r} is clipped"
        assert size >= (9 if name in PRESETS else 5.5), f"{text!r} has only {size:.1f} points"
    for (text, box, _), (other, other_box, _) in itertools.combinations(texts, 2):
        assert not box.overlaps(other_box), f"{text!r} overlaps {other!r}"


@pytest.mark.parametrize("name", PRESETS)
def test_all_parameters_are_the_closed_forms(name):
    config = ModelConfig(**PRESETS[name].model)
    shown = [t.get_text() for t in draw(config).axes[0].texts]
    legend = shown[shown.index("Where the parameters are") :]
    for part, count in parameter_counts(config).items():
        label = {"attention bias table": "learned bias"}.get(part, part)
        assert (
            (legend[legend.index(label) + 1] == human(count)) if count else (label not in legend)
        ), part
    assert any(
        human(total_parameters(config)) in t and human(active_parameters(config)) in t
        for t in shown
    )


def test_the_bar_is_to_scale():
    config = ModelConfig()
    bars = {
        to_hex(p.get_facecolor()): p.get_width()
        for p in draw(config).axes[0].patches
        if hasattr(p, "get_width") and p.get_height() == 0.34
    }
    # A part that a model lacks has no bar.
    counts = {part: count for part, count in parameter_counts(config).items() if count}
    assert len(counts) == 7
    for part, count in counts.items():
        assert bars[to_hex(PART_COLORS[part])] == pytest.approx(
            12.4 * count / total_parameters(config)
        )


@pytest.mark.parametrize(
    "field, value, with_it, without_it",
    [
        ("use_attention_bias", True, "32 × 2,048 × 2,048", ""),
        ("use_attention_bias", False, "", "Learned bias"),
        ("qk_norm", True, "QK-norm", ""),
        ("qk_norm", False, "", "QK-norm"),
        ("use_rope", False, "", "RoPE"),
        ("rope_theta", 500_000.0, "RoPE base 500,000", "10,000"),
        ("expert_activation", "swiglu", "SwiGLU", "GELU |"),
        ("expert_activation", "gelu", "One expert: GELU", "SwiGLU"),
        ("expert_bias", False, "no biases", ", biases"),
        ("out_proj_bias", False, "1,024 → 1,024 |", "1,024 → 1,024 + bias"),
        ("head_bias", False, "1,024 → 200,019 |", "200,019 + bias"),
        ("qkv_bias", True, "32 × 32 + bias", ""),
        ("tie_embeddings", True, "| tied to the embedding", "not tied"),
        ("sliding_window", 512, "sees the last 512", "all before it"),
        ("sliding_window", 512, "last 512 only", "bf16, all blocks"),
        ("capacity_factor", 1.5, "1.5 × its fair share", "dropless"),
        ("top_k", 5, "Top 5", "Top 2"),
        ("num_experts", 77, "77 experts, 2 at work", "32 experts"),
        ("num_experts", 77, "64 of 77 drawn", ""),
        ("num_kv_heads", 1, "1 head × 32 | 1.5 KiB / token", "heads per key heads"),
        ("transformer_blocks", 7, "7 × block", "12 × block"),
        ("d_ff", 999, "1,024 → 999 → 1,024", "2,048 → 1,024"),
        ("num_kv_heads", 4, "8 query heads per key head", "4 query heads"),
        ("num_kv_heads", 32, "Multi-head attention", "Grouped"),
        ("head_dim", 48, "√48", "√32"),
        ("vocabulary_size", 4_096, "4,096 tokens × 1,024", "200,019"),
        ("context_length", 512, "context 512", "2,048 × 2,048"),
        ("aux_loss_coef", 0.5, "balance loss × 0.5", "0.01"),
        ("aux_loss_coef", 0.0, "nothing balances", "balance loss"),
        ("router_bias_rate", 0.25, "bias ± 0.25", ""),
        ("z_loss_coef", 0.125, "z-loss × 0.125", ""),
    ],
)
def test_options_are_reflected(field, value, with_it, without_it):
    shown = words(**{field: value})
    assert with_it in shown
    assert not without_it or without_it not in shown


def test_scaled_and_alternating_positions_are_reflected():
    shown = words(
        rope_scaling="yarn",
        rope_scaling_factor=4.0,
        sliding_window=128,
        window_pattern="alternating",
    )
    assert "yarn × 4" in shown and "in blocks 0, 2, 4" in shown and "bf16, all blocks" in shown


@pytest.mark.parametrize(
    "experts, top_k",
    [(1, 1), (2, 1), (3, 3), (8, 2), (8, 8), (16, 4), (32, 1), (32, 2), (33, 2), (64, 8), (64, 63)],
)
def test_as_many_experts_are_bright_as_are_chosen(experts, top_k):
    figure = draw(ModelConfig(num_experts=experts, top_k=top_k))
    inside = [
        p
        for p in figure.axes[0].patches
        if hasattr(p, "get_x")
        and p.get_y() > 3
        and p.get_y() < 4.2
        and p.get_x() > 6.9
        and p.get_height() < 0.43
    ]
    bright = [p for p in inside if to_hex(p.get_facecolor()) == draw_architecture.ORANGE]
    assert len(inside) == experts and len(bright) == top_k


def test_the_mask_is_causal_and_the_window_a_band():
    def seen(**fields):
        cells = [
            p
            for p in draw(ModelConfig(**fields)).axes[0].patches
            if hasattr(p, "get_x") and 0 < p.get_width() < 0.1 and p.get_y() > 5.6
        ]
        assert len(cells) == 81
        return [to_hex(p.get_facecolor()) == draw_architecture.BLUE for p in cells]

    assert seen() == [k <= q for q in range(9) for k in range(9)]
    assert seen(sliding_window=64) == [q - 4 < k <= q for q in range(9) for k in range(9)]


@pytest.mark.nightly
def test_every_field_that_changes_the_parameters_changes_the_figure():
    base = ModelConfig(**ODD["no positions"])
    drawn = [t.get_text() for t in draw(base).axes[0].texts]
    for f in dataclasses.fields(ModelConfig):
        value = getattr(base, f.name)
        # Which changes no parameter, and needs yarn.
        if isinstance(value, bool) and f.name != "yarn_truncate":
            other = dataclasses.replace(base, **{f.name: not value})
            if parameter_counts(other) != parameter_counts(base):
                changed = [t.get_text() for t in draw(other).axes[0].texts]
                assert changed != drawn, f.name


# ------------------------------------------------------------------------------------- command line
def test_the_command_writes_the_figure(tmp_path, capsys):
    out = tmp_path / "figures" / "model.png"
    assert main(["--preset", "nano", "--out", str(out)]) == 0
    assert "3.88M parameters, 1.12M active" in capsys.readouterr().out
    from matplotlib.image import imread

    image = imread(out)
    assert image.shape[:2] == (1455, 1950) and image[..., :3].mean() < 0.25
    first = out.read_bytes()
    main(["--preset", "nano", "--out", str(out)])
    # The same config, the same file: no noise in version control.
    assert out.read_bytes() == first
    main(["--preset", "nano", "--no-qk_norm", "--out", str(out)])
    assert out.read_bytes() != first and [p.name for p in out.parent.iterdir()] == ["model.png"]


def test_a_training_runs_toml_file_is_understood(tmp_path):
    (tmp_path / "run.toml").write_text("[model]\nnum_experts = 4\ntop_k = 1\n[train]\nlr = 1e-3\n")
    assert main(["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--top_k", "99"], "top_k 99"),
        (["--preset", "nope"], "nope"),
        (["--out", "figure.jpg"], ".png"),
        (["--out", "{tmp}/folder.png"], "is a folder"),
        (["--out", "{tmp}/file/a.png"], "file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, arguments, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    out = tmp_path / "a.png"
    done = children.run(["-m", "scripts.draw_architecture", "--out", out, *arguments])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_committed_figure_is_the_default_model(tmp_path):
    """public/architecture.png is what the script draws today.

    If the drawing or the default changes, it must be drawn again.
    """
    from matplotlib.image import imread

    main(["--out", str(tmp_path / "now.png")])
    committed, now = imread(REPO / "public" / "architecture.png"), imread(tmp_path / "now.png")
    # Another version of matplotlib may move an edge.
    assert committed.shape == now.shape and abs(committed - now).mean() < 0.01
