"""The benchmark that trains, ablations, at a tiny size."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import ablations, common
from benchmarks.ablations import LONGER, ROWS, SETTINGS, SETTINGS_BASE, at_tokens
from tests.conftest import REPO

BLOCKS = ("rows", "longer", "settings", "tokenizers")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "FOLDER", tmp_path / "ablations")
    monkeypatch.setattr(ablations, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    monkeypatch.setattr(ablations, "PAGE", tmp_path / "page.md")
    for name, value in dict(d_model=32, transformer_blocks=1, d_ff=32).items():
        monkeypatch.setitem(ablations.BASE, name, value)
    monkeypatch.setitem(ablations.BASE, "val_steps", 1)
    monkeypatch.setitem(ablations.BASE, "warmup_steps", 1)
    monkeypatch.setitem(ablations.BASE, "log_interval", 1)
    return tmp_path


def test_rows_are_run_timed_and_tabled(results, data):
    """Every figure in the table comes from the stored runs; the base itself is +0 and 1.00x."""
    ablations.main(["--run", "base", "muon", "--steps", "4", "--data_dir", str(data)])
    ablations.main(["--run", "base", "--seeds", "43", "--steps", "4", "--data_dir", str(data)])
    ablations.main(["--run", "muon", "--time", "1", "--data_dir", str(data)])
    (results / "page.md").write_text(
        "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in BLOCKS)
    )
    with pytest.raises(
        ValueError, match="no run of the base: python -m benchmarks.ablations --run longer_lr_6e-3"
    ):
        ablations.main(["--table"])
    ablations.main(["--run", "longer_lr_6e-3", "--steps", "8", "--data_dir", str(data)])
    ablations.main(["--table"])
    assert "| `longer_lr_6e-3` |" in (results / "page.md").read_text()
    (results / "ablations" / "longer_lr_6e-3_42.json").unlink()
    rows = [
        line.split(" | ")
        for line in (results / "page.md").read_text().splitlines()
        if line.startswith("| `") and "longer" not in line
    ]
    assert {row[0] for row in rows} == {"| `base`", "| `muon`"}
    runs = {
        path.stem: json.loads(path.read_text()) for path in (results / "ablations").glob("*.json")
    }
    assert set(runs) == {"base_42", "base_43", "muon_42"} and all(
        run["tokens"] == 4 * 2048 for run in runs.values()
    )
    base = next(row for row in rows if "base" in row[0])
    assert (
        base[2]
        == f"{runs['base_42']['validation_loss']:.4f}, {runs['base_43']['validation_loss']:.4f}"
        and base[3] == "+0.0000"
        and base[4] == "1.00x"
    )
    mean = (runs["base_42"]["validation_loss"] + runs["base_43"]["validation_loss"]) / 2
    assert (
        next(row for row in rows if "muon" in row[0])[3]
        == f"{runs['muon_42']['validation_loss'] - mean:+.4f}"
    )
    assert runs["base_42"]["curve"][-1] == [4 * 2048, round(runs["base_42"]["validation_loss"], 4)]


def test_the_stored_ablations_are_what_the_page_shows():
    """Run `python -m benchmarks.ablations --table` if this fails."""
    page = (REPO / "benchmarks" / "ABLATIONS.md").read_text()
    for name, content in (
        ("rows", ablations.table()),
        ("longer", ablations.longer_table()),
        ("settings", ablations.settings_table()),
        ("tokenizers", ablations.tokenizer_table()),
    ):
        assert (
            re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", page, re.DOTALL).group(1)
            == content
        )


def test_settings_are_timed_against_the_first_of_theirs(results, data):
    name = "settings_8x512"
    flags = ["--steps", "4", "--data_dir", str(data)]
    ablations.main(["--run", SETTINGS_BASE, name, *flags])
    ablations.main(["--run", name, "--time", "1", "--data_dir", str(data)])
    stored = json.loads((results / "ablations_settings_time.json").read_text())
    assert stored["ratio_to_base"][SETTINGS_BASE] == 1.0
    lines = ablations.settings_table().splitlines()
    (line,) = [line for line in lines if name in line]
    run = json.loads((results / "ablations" / f"{name}_42.json").read_text())
    assert f"| {run['bits_per_byte']:.4f} |" in line and f"| {4 * 4096 / 1e6:.2f} M |" in line
    assert f"| {stored['ratio_to_base'][name]:.2f}x |" in line and len(lines) == 4


def test_bad_requests_are_told(results, data):
    with pytest.raises(ValueError, match="no such row: nothing"):
        ablations.main(["--run", "nothing"])
    with pytest.raises(ValueError, match="nothing to do"):
        ablations.main([])
    with pytest.raises(
        ValueError, match="made with byte, and tokenizer_compact wants o200k_base:compact"
    ):
        ablations.main(["--run", "tokenizer_compact", "--data_dir", str(data)])
    with pytest.raises(ValueError, match="made with byte, and settings_4x512_8192 wants bpe:8192"):
        ablations.main(["--run", "settings_4x512_8192", "--data_dir", str(data)])
    with pytest.raises(ValueError, match="time either"):
        ablations.main(["--run", "base", SETTINGS_BASE, "--time", "1", "--data_dir", str(data)])
    with pytest.raises(ValueError, match="no run of the base"):
        ablations.table()


def test_every_row_is_a_model_and_differs_from_the_base(data):
    base = ablations.make_plan("base", 42, str(data), {})
    for name in (ROWS | LONGER | SETTINGS).keys() - {"base"}:
        plan = ablations.make_plan(name, 42, str(data), {})
        assert (plan.model_config, plan.config) != (base.model_config, base.config), name


def test_settings_are_compared_in_equal_time():
    """Each row's steps and what its step costs, as they are stored: at most 600 of the base's."""
    timing = json.loads((REPO / "benchmarks/results/ablations_settings_time.json").read_text())
    ratio = timing["ratio_to_base"]
    stored = {name for name in ablations.results() if name in SETTINGS}
    # A rate costs nothing.
    assert stored == set(SETTINGS) == {name for name in SETTINGS if name in ratio or "_lr_" in name}
    for name in ratio:
        # A shared machine's ratios move by 5 % from run to run, and another timing chose the steps.
        assert 0.8 * 600 < SETTINGS[name][1]["max_steps"] * ratio[name] < 1.05 * 600, name


def test_between_two_points_of_a_curve():
    curve = [[10, 5.0], [20, 4.0], [40, 3.0]]
    assert [at_tokens(curve, t) for t in (10, 15, 30, 40, 99, 1)] == [5.0, 4.5, 3.5, 3.0, 3.0, 5.0]
