"""Samples and events of a run on several ranks: all take part, and the first one writes."""

from __future__ import annotations

import json

import pytest
import torch

import train
from config_model import TrainConfig
from runtime.base.ranks import Ranks
from runtime.training.plan import make_plan
from tests.builders_runs import MODEL, SPEED, prepared, settings_of
from tests.nightly import nightly_but
from tests.ranks import run_on


def trained(ranks: Ranks, flags: list[str]) -> int:
    torch.set_num_threads(1)
    return train.run(make_plan(settings_of(*flags), train.pretraining, TrainConfig, ranks))


@pytest.mark.parametrize(
    "more", nightly_but([[], ["--expert_parallel", "2"]], 0), ids=["sharded", "experts"]
)
def test_ranks_that_share_the_weights_answer_together(tmp_path, more):
    """One rank alone would wait for the others' weights, or experts, without end."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("tom saw\na red ball\n")
    folders = ["--ckpt_dir", str(tmp_path / "ckpt"), "--graph_dir", str(tmp_path / "graphs")]
    flags = [*MODEL, *SPEED, *folders, "--data_dir", str(prepared(tmp_path)), *more]
    flags += ["--max_steps", "4", "--sample_prompts", str(prompts)]
    assert run_on(2, trained, flags, seconds=240) == [0, 0]
    files = [tmp_path / "graphs" / name for name in ("samples.jsonl", "events.jsonl")]
    samples, events = ([json.loads(line) for line in f.read_text().splitlines()] for f in files)
    assert [(s["step"], s["prompt"]) for s in samples] == [(4, "tom saw"), (4, "a red ball")]
    assert all(isinstance(s["text"], str) for s in samples)
    kinds = [event["kind"] for event in events if event["kind"] not in ("starved", "balanced")]
    assert kinds == ["start", "save", "done"]
