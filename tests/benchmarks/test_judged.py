"""benchmarks/judged.py: it keeps the figures of each report, and its table shows them."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, judged
from runtime.data import toy_stories


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(judged, "RESULTS", tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_model_is_judged_against_the_first(tmp_path):
    """The same model twice differs by nothing, and the table has a column for each."""
    text = tmp_path / "valid.jsonl"
    lines = [json.dumps({"text": toy_stories.story(number)}) for number in range(9)]
    text.write_text("\n".join(lines) + "\n")
    asked = ["--files", str(text), "--documents", "9", "--stories", "1"]
    assert judged.main(["one=public/stories.pt", "two=public/stories.pt", *asked]) == 0
    stored = json.loads((tmp_path / "judged.json").read_text())["reports"]
    one, two = stored["one"]["figures"], stored["two"]["figures"]
    assert one["text.bits_per_byte"] == two["text.bits_per_byte"]
    assert "comparison.difference" not in one
    assert two["comparison.difference"]["value"] == two["comparison.difference"]["high"] == 0
    assert str(tmp_path) not in " ".join(stored["one"]["arguments"])
    table = judged.judged_table().splitlines()
    assert table[0] == "| | one | two | human text |"
    shown = judged.shown(one["text.bits_per_byte"])
    assert f"| bits per byte | {shown} | {shown} |  |" in table


def test_figures_are_named_as_requirements_name_them():
    report = {"tasks": {"own": {"figures": {"ending_sum": {"value": 0.5, "n": 2}}}}, "n": 3}
    assert judged.figures_of(report) == {"tasks.own.ending_sum": {"value": 0.5, "n": 2}}


def test_small_numbers_keep_their_digits():
    assert judged.shown({"value": 0.01234, "n": 9, "low": 0.0, "high": 0.02}) == (
        "0.0123 (0.0000 to 0.0200)"
    )
    assert judged.shown({"value": 2.0, "n": 1}) == "2.000"
    assert judged.shown(None) == judged.shown({"value": None, "n": 0}) == ""


def test_a_model_without_a_name_is_refused():
    with pytest.raises(ValueError, match="write NAME=CHECKPOINT"):
        judged.main(["public/stories.pt", "--files", "valid.jsonl"])
