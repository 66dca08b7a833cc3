"""benchmarks/tuned.py: it scores what it is given, and its tables say what is stored."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, tuned
from runtime.base.shares import wilson
from scripts import sft
from tests.builders_posttraining import QUICK, chats, in_folder, tiny_base


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(tuned, "RESULTS", tmp_path)


@pytest.mark.nightly
@pytest.mark.slow
def test_stages_are_scored_and_shown(tmp_path, capsys):
    """A base has no chat ids: it gets the rows that the first tuning gives it."""
    base = tiny_base(tmp_path / "base", context_length=1024)
    data = str(chats(tmp_path / "chats.jsonl"))
    flags = ["--init_from", str(base), "--data", data, *in_folder(tmp_path), *QUICK]
    assert sft.main([*flags, "--score_prompts", "0"]) == 0
    tuned_file = tmp_path / "ckpt" / "latest.pt"
    small = ["--prompts", "2", "--pairs", "2", "--num_threads", "1"]
    assert tuned.main([f"base={base}", f"sft={tuned_file}", f"dpo={tuned_file}", *small]) == 0
    stages = json.loads((tmp_path / "tuned.json").read_text())["stages"]
    assert [stage["kind"] for stage in stages.values()] == ["pretraining", "sft", "sft"]
    # Against itself a model prefers nothing.
    accuracy = stages["sft"]["shares"]["preference accuracy"]
    assert accuracy["share"] == 0.5 and accuracy["interval"] == list(wilson(1, 2))
    assert "preference accuracy" not in stages["base"]["shares"]
    table = tuned.scores_table().splitlines()
    assert table[0] == "| | base | SFT | SFT, DPO |"
    assert f"| Story loss | {stages['base']['means']['story loss']:.3f} |" in "\n".join(table)
    listed = tuned.answers_list()
    assert listed.count("| SFT |") == 2 and "> Tell a story about" in listed
    assert capsys.readouterr().out.count("story loss") >= 3


def test_a_stage_without_a_name_is_refused():
    with pytest.raises(ValueError, match="write NAME=CHECKPOINT"):
        tuned.main(["public/stories.pt"])
