"""Preference optimization as a user runs it: files in, checkpoints and warnings out, resumes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import train
from runtime.checkpoint.read import read_checkpoint
from runtime.posttraining.preference import Preference
from runtime.posttraining.reference import FILE
from runtime.training.state import TrainingDiverged
from scripts import dpo
from tests.builders_posttraining import QUICK, chats, in_folder, pairs, tiny_base

HALF_LIFE = ("latest.pt", "best.pt", "step_0000006.pt")


def run(folder, *flags: object, base=None) -> int:
    start = ["--init_from", str(base)] if base else []
    return dpo.main([*start, *in_folder(folder), *QUICK, *map(str, flags)])


def records(folder, kind: str) -> list[dict]:
    lines = (folder / "graphs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def base(tmp_path):
    return tiny_base(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    return pairs(tmp_path / "pairs.jsonl", 120)


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "4"]], ids=["full", "lora"])
def test_a_run_begins_at_the_reference_and_learns_the_pairs(tmp_path, capsys, base, data, flags):
    """Margins are 0 to the bit at first: the reference is made of the very batches of the run.

    With adapters too, whose model computes what the start did as long as B is 0.
    """
    more = ("--data", data, "--max_steps", 40, "--log_interval", 1, "--batch_size", 4)
    assert run(tmp_path, *more, *flags, base=base) == 0
    steps = records(tmp_path, "train")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["metrics"]["rewards/margins"] == 0.0
    assert steps[0]["metrics"]["logps/chosen_change"] == 0.0
    assert steps[-1]["metrics"]["rewards/accuracies"] > 0.9
    assert steps[-1]["loss"] < 0.6 and "perplexity" not in steps[-1]
    scores = [(r["step"], r["score"]) for r in records(tmp_path, "score")]
    assert scores[0][0] == 0 and scores[-1][0] == 40
    first, last = scores[0][1], scores[-1][1]
    assert first["margin"] == first["chosen change"] == first["rejected change"] == 0.0
    assert first["accuracy"] == 0.5 and last["accuracy"] > 0.9
    output = capsys.readouterr().out
    assert "120 pairs (prompt, chosen, rejected)" in output
    assert "[1<|end|>]" in output and "[0, or more<|end|>]" in output
    found = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert found.stage["kind"] == "dpo" and found.stage["start"]["path"] == str(base)
    assert (tmp_path / "ckpt" / FILE).is_file()


def test_a_fall_of_the_chosen_answers_is_said_once(tmp_path, capsys, monkeypatch, base, data):
    """The margin can grow while both answers become unlikely."""
    changes = iter([0.0, -0.05, -0.06])

    def held_out(task, model):
        return {"accuracy": 0.9, "chosen change": next(changes), "rejected change": -0.4}

    monkeypatch.setattr(Preference, "_held_out_numbers", held_out)
    run(tmp_path, "--data", data, base=base)
    output = capsys.readouterr().out
    assert output.count("warning  chosen answers are less likely than at the start, by 0.05") == 1
    assert output.count("warning") == 1 and next(changes, None) is None


# ------------------------------------------------------------------------------------------- resume
def same_weights(one, other) -> None:
    first, second = (
        read_checkpoint(f / "ckpt" / "latest.pt", optimizer=True) for f in (one, other)
    )
    assert first.step == second.step
    for group in (lambda c: c.trained or c.model, lambda c: c.optimizer):
        assert group(first).keys() == group(second).keys()
        for name, tensor in group(first).items():
            assert torch.equal(tensor, group(second)[name]), name
    scores = [[r["score"] for r in records(f, "score")] for f in (one, other)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "4"]], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["kept", "lost", "damaged"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, capsys, base, data, flags, reference):
    """A reference of the tuned weights would have margins of 0 again, and no error would say so.

    Without the file it is that of the start, read again.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        run(folder, "--data", data, *flags, base=base)
    for name in HALF_LIFE:
        (parts / "ckpt" / name).unlink()
    file = parts / "ckpt" / FILE
    if reference == "lost":
        file.unlink()
    elif reference == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    assert dpo.main(["--resume", *in_folder(parts)]) == 0
    same_weights(whole, parts)
    assert file.read_bytes() == (whole / "ckpt" / FILE).read_bytes()


def test_without_file_and_start_a_resume_is_refused(tmp_path, base, data):
    run(tmp_path, "--data", data, base=base)
    (tmp_path / "ckpt" / FILE).unlink()
    tiny_base(tmp_path / "base", seed=1)
    with pytest.raises(
        ValueError, match="is missing, and .* is not the file that this run started"
    ):
        dpo.main(["--resume", *in_folder(tmp_path), "--max_steps", "8"])
    base.unlink()
    with pytest.raises(ValueError, match="is missing, and they cannot be computed again"):
        dpo.main(["--resume", *in_folder(tmp_path), "--max_steps", "8"])


def test_more_steps_take_the_reference_of_more_pairs_from_the_start(tmp_path, base, data):
    """Only the pairs of the planned steps have one at first."""
    short, long = tmp_path / "short", tmp_path / "long"
    run(short, "--data", data, "--schedule", "constant", base=base)
    before = (short / "ckpt" / FILE).read_bytes()
    assert dpo.main(["--resume", *in_folder(short), "--max_steps", "9"]) == 0
    assert (short / "ckpt" / FILE).read_bytes() != before
    run(long, "--data", data, "--schedule", "constant", "--max_steps", 9, base=base)
    assert (short / "ckpt" / FILE).read_bytes() == (long / "ckpt" / FILE).read_bytes()
    same_weights(short, long)


def test_a_run_that_goes_back_uses_pairs_beyond_its_plan(tmp_path, monkeypatch, base, data):
    """It continues after the data already used, for which no reference was planned."""
    failed, real = [], train._check_progress

    def diverge(state, config, scaler):
        if state.step == 5 and not failed:
            failed.append(state.step)
            raise TrainingDiverged("6 steps in a row were skipped: test")
        real(state, config, scaler)

    monkeypatch.setattr(train, "_check_progress", diverge)
    added, compute = [], Preference._reference_of
    monkeypatch.setattr(
        Preference,
        "_reference_of",
        lambda task, model, batch: added.append(batch) or compute(task, model, batch),
    )
    more = ("--data", data, "--max_rollbacks", 1, "--log_interval", 1)
    assert run(tmp_path, *more, base=base) == 0
    assert failed and read_checkpoint(tmp_path / "ckpt" / "latest.pt").step == 6
    values = [r["metrics"]["rewards/margins"] for r in records(tmp_path, "train")]
    assert all(math.isfinite(value) for value in values)
    assert len(added) > 7, "6 batches, validation, and those after the rollback"


# ----------------------------------------------------------------------------------------- refusals
def test_a_model_with_dropout_is_refused_unless_it_is_off(tmp_path, data):
    base = tiny_base(tmp_path / "base", dropout=0.1)
    with pytest.raises(
        ValueError, match=r"dropout 0\.1 \(of .*\) would make answers .*--dropout 0"
    ):
        run(tmp_path, "--data", data, base=base)
    assert run(tmp_path, "--data", data, "--dropout", 0, base=base) == 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], r"python -m scripts.dpo starts from trained weights: give --init_from"),
        (["--dpo_loss", "ipo", "--label_smoothing", "0.1"], "--label_smoothing has no effect"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, flags, line):
    with pytest.raises(ValueError, match=line):
        dpo.main([*in_folder(tmp_path), *flags])


def test_conversations_are_no_pairs(tmp_path, base):
    with pytest.raises(ValueError, match="pairs"):
        run(tmp_path, "--data", chats(tmp_path / "chats.jsonl"), base=base)


def test_a_learned_attention_bias_has_one_pair_a_row(tmp_path, data):
    base = tiny_base(tmp_path / "base", use_attention_bias=True)
    assert run(tmp_path, "--data", data, base=base) == 0
    assert records(tmp_path, "score")[0]["score"]["margin"] == 0.0


def test_the_embedded_pairs_are_the_default_and_are_scored(tmp_path):
    base = tiny_base(tmp_path / "base", context_length=768)
    flags = ("--toy_examples", 60, "--max_steps", 2, "--max_new_tokens", 4, "--batch_size", 1)
    assert run(tmp_path, *flags, base=base) == 0
    scores = [r["score"] for r in records(tmp_path, "score")]
    assert {"requests", "accuracy", "margin", "story loss"} <= scores[0].keys()
    found = read_checkpoint(tmp_path / "ckpt" / "latest.pt").run
    assert found["best_score"] == max(score["requests"] for score in scores[1:])


def test_epochs_are_of_pairs(tmp_path, base, data):
    """Their steps are settled after the task is made, which computes the reference of all pairs."""
    quick = [flag for flag in QUICK if flag not in ("--max_steps", "6")]
    flags = ["--data", str(data), "--epochs", "1", "--init_from", str(base)]
    assert dpo.main([*in_folder(tmp_path), *quick, *flags]) == 0
    trained = records(tmp_path, "train")[-1]
    # 120 pairs, of which four or five fit into a row, and two rows a step.
    assert 10 < trained["step"] < 25


def test_the_configs_fields_are_all_used():
    """A flag that is parsed and ignored is worse than none."""
    from pathlib import Path

    import runtime.posttraining.preference as module

    own = {f.name for f in dataclasses.fields(module.DpoConfig)}
    own -= {f.name for f in dataclasses.fields(module.PostTrainConfig)}
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert own and all(f"config.{name}" in text for name in own)
