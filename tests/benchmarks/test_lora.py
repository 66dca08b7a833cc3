"""benchmarks/lora.py: both sides train on the same rows, and what it counts is what is there."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import common, lora
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizers import load_tokenizer
from tests.builders import random_model, tiny_config
from tests.builders_checkpoint import TRAIN


@pytest.mark.nightly
def test_the_figures_are_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    # In this process: another would import everything again.
    monkeypatch.setattr(
        lora,
        "run_worker",
        lambda module, flags, **_: lora.worker(lora.make_parser().parse_args(flags)),
    )
    tokenizer = load_tokenizer("byte")
    model = random_model(tiny_config(context_length=512, vocabulary_size=257))
    state = tokenizer.to_state()
    ckpt = save_checkpoint(tmp_path, 1, model, None, train_config=TRAIN, tokenizer_state=state)
    flags = ["--ckpt", str(ckpt), "--lora_rank", "2", "--batch_size", "1", "--repeats", "1"]
    assert lora.main([*flags, "--name", "mine", "--device", "cpu", "--num_threads", "1"]) == 0
    stored = json.loads((tmp_path / "lora_mine.json").read_text())
    full, ours = stored["sides"]["full"], stored["sides"]["lora"]
    assert full["times_full"] == 1 and full["trained_parameters"] == stored["parameters"]
    # Two moments and a counter of 4 bytes for each tensor.
    for side in (full, ours):
        moments = 8 * side["trained_parameters"]
        assert moments < side["optimizer_bytes"] < moments + 4000
        assert side["checkpoint_bytes"] >= side["optimizer_bytes"] + moments / 2
    assert ours["trained_parameters"] < full["trained_parameters"] / 3
    assert "x full" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--lora_rank must be at least 1, not 0"):
        lora.main(["--lora_rank", "0"])
