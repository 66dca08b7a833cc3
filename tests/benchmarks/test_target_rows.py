"""benchmarks/target_rows.py: its sides compute one loss, and one that does not is refused."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import common, target_rows
from runtime.kernels.linear_cross_entropy import IGNORE

SIZES = ("--vocabulary_sizes", "301,64", "--d_model", "16", "--tokens", "40", "--device", "cpu")


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(target_rows.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(target_rows.process, "keep_freed_memory", lambda: None)


def test_the_figures_are_stored(tmp_path, capsys):
    assert target_rows.main([*SIZES, "--name", "tiny", "--repeats", "2"]) == 0
    stored = json.loads((tmp_path / "target_rows_tiny.json").read_text())
    assert stored["tokens"] == 40 and stored["share"] == 0.2
    assert list(stored["vocabulary_sizes"]) == ["301", "64"]
    for figures in stored["vocabulary_sizes"].values():
        assert figures["targets"] == 8 and set(figures["sides"]) == set(target_rows.SIDES)
        seconds = {name: side["seconds"]["median"] for name, side in figures["sides"].items()}
        for name, side in figures["sides"].items():
            expected = seconds["all_rows"] / seconds[name]
            assert side["speed_against_all_rows"] == pytest.approx(expected)
    assert "x all rows" in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "share", "targets"), [(40, 0.2, 8), (7, 1.0, 7), (3, 0.01, 3)])
def test_the_share_is_what_was_asked_for(tokens, share, targets):
    device = torch.device("cpu")
    problem = target_rows.make_problem(tokens, 4, 9, share, device, torch.float32)
    assert len(problem.rows_M) == targets == int((problem.targets_N != IGNORE).sum())
    assert (problem.targets_N[problem.rows_M] != IGNORE).all()


def test_a_side_with_another_gradient_is_not_measured(monkeypatch):
    monkeypatch.setitem(target_rows.SIDES, "target_rows", lambda p: 2 * target_rows.target_rows(p))
    with pytest.raises(ValueError, match="target_rows has another gradient than all_rows"):
        target_rows.main([*SIZES])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--vocabulary_sizes", "8,x"], "must be whole numbers with commas"),
        (["--share", "0"], "--share must be above 0"),
        (["--tokens", "0"], "--tokens must be at least 1, not 0"),
    ],
)
def test_bad_flags_are_refused(flags, line):
    with pytest.raises(ValueError, match=line):
        target_rows.main([*SIZES, *flags])
