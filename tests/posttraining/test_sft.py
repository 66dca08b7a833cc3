"""Supervised fine-tuning as a user runs it: files in, checkpoints, scores and a resume out."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import train
from runtime.checkpoint.changed import with_config
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data.loader import validation_batches
from runtime.data.shards import open_data
from runtime.data.tokenizers import tokenizer_from_state
from runtime.posttraining.tuning import BASE_BATCHES
from scripts import sft
from tests.builders_posttraining import QUICK, chats, in_folder, tiny_base
from tests.builders_runs import prepared


def run(folder, *flags: object, base=None) -> int:
    start = ["--init_from", str(base)] if base else []
    return sft.main([*start, *in_folder(folder), *QUICK, *map(str, flags)])


def records(folder) -> list[dict]:
    lines = (folder / "graphs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_learns_its_answers_and_says_so(tmp_path, capsys):
    base = tiny_base(tmp_path / "base")
    data = chats(tmp_path / "chats.jsonl")
    assert run(tmp_path, "--data", data, "--max_steps", 30, base=base) == 0
    losses = [r["loss"] for r in records(tmp_path) if r["kind"] == "train"]
    assert losses[-1] < losses[0] / 2
    steps = [r["step"] for r in records(tmp_path) if r["kind"] == "score"]
    assert steps[0] == 0 and steps[-1] == 30
    output = capsys.readouterr().out
    assert "40 conversations (messages)" in output
    assert "[1<|end|>]" in output, "one example shows what is learned"
    assert "python predict.py --chat --ckpt" in output
    found = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert found.stage["kind"] == "sft" and found.stage["base"]["path"] == str(base)
    assert tokenizer_from_state(found.tokenizer_state).chat is not None


def test_a_run_of_many_epochs_says_so(tmp_path, capsys):
    """The default 1,000 steps on a file of two conversations were 4,000 epochs, without a word."""
    base, data = tiny_base(tmp_path / "base"), chats(tmp_path / "chats.jsonl", 12)
    for folder, steps in (("few", 4), ("many", 60)):
        assert run(tmp_path / folder, "--data", data, "--max_steps", steps, base=base) == 0
        said = "more than 10 epochs teach little new" in capsys.readouterr().out
        assert said is (folder == "many")


def test_new_rows_of_the_vocabulary_begin_as_the_mean_of_the_old(tmp_path):
    """Rows of random numbers, or of zeros, are far from every trained row."""
    base = read_checkpoint(tiny_base(tmp_path))
    old = base.model["embed.weight"]
    V = base.model_config.vocabulary_size
    grown = with_config(
        base, base.model_config.__class__(**_fields(base, vocabulary_size=V + 3)), [V, V + 1, V + 2]
    )
    new = grown.model["embed.weight"]
    torch.testing.assert_close(new[:V], old, rtol=0, atol=0)
    mean_C = old.double().mean(dim=0).float()
    assert torch.equal(new[V:], mean_C.expand(3, -1))


def test_ids_in_a_hole_of_the_vocabulary_begin_as_the_mean_of_the_others(tmp_path):
    """o200k_base has harmony's ids in its hole: rows that decayed and were never trained."""
    base = read_checkpoint(tiny_base(tmp_path))
    old = base.model["embed.weight"]
    same = with_config(base, base.model_config, [5, 9])
    new = same.model["embed.weight"]
    others = [i for i in range(len(old)) if i not in (5, 9)]
    torch.testing.assert_close(new[others], old[others], rtol=0, atol=0)
    torch.testing.assert_close(new[5], old[others].double().mean(dim=0).float(), rtol=1e-6, atol=0)
    assert torch.equal(base.model["embed.weight"], old), "the checkpoint stays as it is"


def _fields(checkpoint, **changes) -> dict:
    import dataclasses

    return dataclasses.asdict(checkpoint.model_config) | changes


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "4"]], ids=["full", "lora"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, flags):
    base, data = tiny_base(tmp_path / "base"), chats(tmp_path / "chats.jsonl")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, "--data", data, "--optimizer", "adamw", *flags, base=base)
    # The schedule depends on max_steps, so it stays, and the second half is lost.
    run(parts, "--data", data, "--optimizer", "adamw", *flags, base=base)
    for name in ("latest.pt", "best.pt", "step_0000006.pt"):
        (parts / "ckpt" / name).unlink()
    assert sft.main(["--resume", *in_folder(parts)]) == 0
    one, other = (read_checkpoint(f / "ckpt" / "latest.pt", optimizer=True) for f in (whole, parts))
    assert one.step == other.step == 6
    for group in (lambda c: c.trained or c.model, lambda c: c.optimizer):
        assert group(one).keys() == group(other).keys()
        for name, tensor in group(one).items():
            assert torch.equal(tensor, group(other)[name]), name
    scores = [[r for r in records(f) if r["kind"] == "score"] for f in (whole, parts)]
    assert [r["score"] for r in scores[0]] == [r["score"] for r in scores[1]]


def test_adapters_are_scored_merged_and_saved_alone(tmp_path):
    base, data = tiny_base(tmp_path / "base"), chats(tmp_path / "chats.jsonl")
    flags = ("--data", data, "--optimizer", "adamw", "--lora_rank", 4)
    assert run(tmp_path, *flags, base=base) == 0
    path = tmp_path / "ckpt" / "latest.pt"
    found = read_checkpoint(path)
    assert found.adapter is not None and found.adapter.rank == 4
    assert path.stat().st_size < base.stat().st_size
    assert any(r["kind"] == "score" and r["step"] == 6 for r in records(tmp_path))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], r"starts from trained weights: give --init_from"),
        (["--data", "x.jsonl", "--dataset", "toy"], "either --dataset toy or --data"),
        (["--columns", "prompt=q"], "--columns has no effect without --data"),
        (["--lora_alpha", "8"], "--lora_alpha has no effect without --lora_rank"),
        (["--document_mask"], "document_mask is for pre-training"),
        # It would change nothing: validation takes all that is held out.
        (["--val_steps", "5"], "unrecognized arguments: --val_steps"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, flags, line):
    with pytest.raises(ValueError, match=line):
        sft.main([*in_folder(tmp_path), *flags])


def test_a_resumed_run_needs_its_own_data(tmp_path):
    base, data = tiny_base(tmp_path / "base"), chats(tmp_path / "chats.jsonl")
    run(tmp_path, "--data", data, base=base)
    other = chats(tmp_path / "other.jsonl", seed=500)
    with pytest.raises(ValueError, match=r"other\.jsonl is not the text that .* was trained on"):
        sft.main(["--resume", *in_folder(tmp_path), "--max_steps", "8", "--data", str(other)])


def test_a_learned_attention_bias_has_one_example_a_row(tmp_path):
    """Its numbers belong to positions of a row: an example further back would get others'."""
    base = tiny_base(tmp_path / "base", use_attention_bias=True)
    assert run(tmp_path, "--data", chats(tmp_path / "chats.jsonl"), base=base) == 0
    last = [r for r in records(tmp_path) if r["kind"] == "train"][-1]
    assert last["loss"] < 6


@pytest.mark.parametrize(("flags", "tokens"), [([], 128), (["--row_tokens", 64], 64)])
def test_a_row_holds_two_contexts_unless_told_otherwise(tmp_path, capsys, flags, tokens):
    """Rows of one context are a third padding where conversations take more than half of it."""
    base, data = tiny_base(tmp_path / "base"), chats(tmp_path / "chats.jsonl")
    assert run(tmp_path, "--data", data, "--max_steps", 2, *flags, base=base) == 0
    assert f" of {tokens} tokens, " in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "ckpt" / "latest.pt").run["tokens_seen"] == 2 * 2 * tokens


@pytest.mark.parametrize("tokens", [32, 63])
def test_a_row_shorter_than_the_context_is_refused(tmp_path, tokens):
    base = tiny_base(tmp_path / "base")
    with pytest.raises(ValueError, match="less than the model's context of 64"):
        run(tmp_path, "--data", chats(tmp_path / "c.jsonl"), "--row_tokens", tokens, base=base)


def test_rows_of_another_length_need_examples_that_share_them(tmp_path):
    base = tiny_base(tmp_path / "base", use_attention_bias=True)
    with pytest.raises(ValueError, match="share no rows"):
        run(tmp_path, "--data", chats(tmp_path / "c.jsonl"), "--row_tokens", 128, base=base)


def test_answers_without_a_layout_end_with_the_text_of_a_chat_model_too(tmp_path, capsys):
    """Only the end of a message counted: what such a run learned was never seen to end.

    And it said to try the model in a chat, which it was not taught.
    """
    base = tiny_base(tmp_path / "base", chats=True)
    data = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(tmp_path, "--data", data, "--raw", "--max_steps", 40, base=base) == 0
    scores = [r["score"]["ended"] for r in records(tmp_path) if r["kind"] == "score"]
    assert scores[0] == 0.0 and scores[-1] == 1.0
    found = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert tokenizer_from_state(found.tokenizer_state).stop_ids == (257 + 1,), "as before"
    assert "next     python predict.py --ckpt" in capsys.readouterr().out


def test_what_tuning_cost_is_told_where_nothing_is_held_out(tmp_path):
    """The loss on the base's text was taken before the first step, and never again."""
    base = tiny_base(tmp_path / "base")
    row = {"prompt": "Who is Pip?", "completion": "A rabbit."}
    data = tmp_path / "one.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)), encoding="utf-8")
    assert run(tmp_path, "--data", data, "--data_dir", prepared(tmp_path), base=base) == 0
    steps = [r["step"] for r in records(tmp_path) if "base loss" in r.get("score", {})]
    assert steps == [0, 3, 6]


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_base_loss_is_that_of_pre_training(tmp_path, document_mask):
    """A base that had never seen other documents was judged on text with them.

    So the demo's base had a loss of 1.12 before its first step, and one of 0.57 at the end of its
    own training; what tuning cost was measured from there.
    """
    base = tiny_base(tmp_path / "base", chats=True, document_mask=document_mask)
    data = chats(tmp_path / "chats.jsonl")
    folder = prepared(tmp_path)
    flags = ("--data", data, "--data_dir", folder, "--max_steps", 2)
    assert run(tmp_path, *flags, base=base) == 0
    model = load_model(base)[0]
    _, val = open_data(folder)
    batches = validation_batches(val, 64, 8, BASE_BATCHES)
    masked = functools.partial(train.packed_documents_loss, end_of_text_id=val.end_of_text_id)
    losses = [train.evaluate(model, batches, loss) for loss in (train.next_token_loss, masked)]
    assert abs(losses[0] - losses[1]) > 1e-4, "the text must hold several documents a row"
    first = next(r["score"]["base loss"] for r in records(tmp_path) if r["kind"] == "score")
    assert first == pytest.approx(losses[document_mask], rel=1e-5)
    # What is tuned further keeps it.
    found = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert found.stage["base"]["document_mask"] == document_mask


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--toy_examples", 20), "--toy_examples has no effect with --data"),
        (("--raw", "--train_on", "last"), "--train_on has no effect with --raw"),
    ],
)
def test_flags_without_effect_are_refused(tmp_path, flags, line):
    base = tiny_base(tmp_path / "base")
    with pytest.raises(ValueError, match=line):
        run(tmp_path, "--data", chats(tmp_path / "chats.jsonl"), *flags, base=base)
