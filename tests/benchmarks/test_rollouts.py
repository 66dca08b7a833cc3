"""benchmarks/rollouts.py: its sides do the same work, and it counts what belongs to answers."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, rollouts
from runtime.data.tokenizers import load_tokenizer
from runtime.posttraining.rollouts import Sampler
from tests.builders import random_model, tiny_config
from tests.builders_inference import biased_model, save

PROMPTS = [[1, 2, 3], [4, 5, 6]]


def test_without_forks_the_same_answers_are_drawn():
    model = random_model(tiny_config()).eval()
    settings = dict(stop_ids=[9, 10], max_new_tokens=8)
    ours, other = (
        [
            [answer.ids for answer in group]
            for group in kind(model, **settings).sample(PROMPTS, 4, 7)
        ]
        for kind in (Sampler, rollouts.WithoutFork)
    )
    assert ours == other


def test_what_comes_after_an_end_is_not_counted():
    """model.generate repeats a stop id until all rows have stopped."""
    side = rollouts.Plain(random_model(tiny_config()).eval(), [9, 10, 11, 12, 13, 14], 20)
    (answers,) = side.sample(PROMPTS, 6, 7)
    assert len(answers) == 12 and len({len(answer.ids) for answer in answers}) > 1
    assert all(not set(answer.ids[:-1]) & set(side.stop_ids) for answer in answers)


def test_prompts_are_the_beginnings_of_stories_that_are_long_enough():
    tokenizer = load_tokenizer("byte")
    prompts = rollouts.beginnings(tokenizer, 3, 300)
    assert [len(prompt) for prompt in prompts] == [300] * 3
    assert len({tuple(prompt) for prompt in prompts}) == 3
    with pytest.raises(ValueError, match="prompt_tokens 9999 is more than stories have"):
        rollouts.beginnings(tokenizer, 1, 9999)


def test_the_figures_are_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(rollouts.torch, "set_num_threads", lambda count: None)
    ckpt = save(tmp_path, biased_model(context_length=64))
    sizes = ("--prompts", "2", "--answers", "3", "--prompt_tokens", "8", "--max_new_tokens", "4")
    assert rollouts.main(["--ckpt", ckpt, "--repeats", "1", "--name", "mine", *sizes]) == 0
    stored = json.loads((tmp_path / "rollouts_mine.json").read_text())
    assert set(stored["sides"]) == {"ours", "no_fork", "plain"}
    assert stored["sides"]["plain"]["times_plain"] == 1
    assert stored["sides"]["ours"]["tokens"] == stored["sides"]["no_fork"]["tokens"] <= 2 * 3 * 4
    assert "x plain" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--answers must be at least 1, not 0"):
        rollouts.main(["--ckpt", ckpt, "--answers", "0"])
