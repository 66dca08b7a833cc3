"""Fine-tuning on two ranks is fine-tuning in one process, to the bit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data.chat import with_chat
from runtime.data.tokenizers import load_tokenizer
from runtime.posttraining import score
from runtime.posttraining.flags import settings_of
from runtime.posttraining.policy import Grpo, GrpoConfig
from runtime.posttraining.reference import FILE
from runtime.posttraining.score import Exam, shared_out
from runtime.posttraining.tuning import BASE_LOSS
from runtime.training.plan import check_memory, make_plan
from runtime.training.setup import set_up
from tests import children
from tests.builders_posttraining import QUICK, chats, in_folder, pairs, tiny_base
from tests.builders_runs import comparable
from tests.builders_tuned import differing, planned, tuned
from tests.conftest import REPO
from tests.nightly import nightly_but
from tests.ranks import run_on

# Half of each tensor fills vector registers: kernels round what does not in another way.
FULL_REGISTERS = dict(d_model=32, head_dim=32, d_ff=32)
# An odd number of prompts of each form, and of parts that are answered at a time.
PROMPTS = 5
# Of losses over six steps of Adam, whose first steps blow rounding up.
EXPERTS_APART = 1e-5


def flags_of(folder: Path, kind: str, *flags: object) -> list[str]:
    """Return the flags of a quick run on files in a folder, which are made if need be."""
    base, data = folder / "base" / "latest.pt", folder / f"{kind}.jsonl"
    if not base.exists():
        tiny_base(folder / "base", **FULL_REGISTERS)
    if not data.exists():
        (chats if kind == "sft" else pairs)(data, 450)
    start = ["--init_from", base, "--data", data, "--row_tokens", 64]
    split = ["--batch_size", 1, "--grad_accum", 2]
    return [*QUICK, *map(str, (*start, *split, *flags))]


@pytest.mark.parametrize(
    ("kind", "flags", "shard"),
    nightly_but(
        [
            ("sft", ["--dropout", "0.1"], "full"),
            ("sft", ["--lora_rank", "4", "--optimizer", "adamw"], "full"),
            ("dpo", ["--optimizer", "muon"], "full"),
            ("dpo", ["--lora_rank", "4", "--sft_coef", "0.5"], "none"),
        ],
        3,
    ),
    ids=["sft", "sft with adapters", "dpo", "dpo with adapters"],
)
def test_two_ranks_are_one_process(tmp_path, data, kind, flags, shard):
    """Weights, moments, losses, and the scores before, during and after the run.

    With adapters too, whose rows of new ids are no longer in the memory of the vocabulary: the head
    read the rows of the start.
    """
    common = [*flags_of(tmp_path, kind, *flags), *in_folder(tmp_path / "1")]
    common += ["--data_dir", str(data)]
    one = tuned(ONE_PROCESS, kind, common)
    others = run_on(2, tuned, kind, [*common, *in_folder(tmp_path / "2")[:4], "--shard", shard])
    assert {r["kind"] for r in one.records} == {"train", "val", "score"}
    scores = [record["score"] for record in one.records if record["kind"] == "score"]
    assert len(scores) == 3 and all(BASE_LOSS in numbers for numbers in scores)
    for other in others:
        assert differing(one, other) == []
    plan = planned(ONE_PROCESS, kind, [*common, *in_folder(tmp_path)])
    held_out = len(plan.task.validation(plan.model_config, plan.config))
    assert held_out > 2 and held_out % 2, "a rank gets a batch that does not count"
    if kind == "dpo":
        first, second = ((tmp_path / name / "ckpt" / FILE).read_bytes() for name in "12")
        assert first == second


def close_to_one_process(ranks: Ranks, flags: list[str]) -> tuple[dict, list[dict]]:
    """Return the weights that the first score asks, and the records of a short run."""
    plan = planned(ranks, "sft", flags)
    model, optimizer, _ = set_up(plan, train.forward_backward)
    # The base's, as long as B is 0: also what scores do with the weights of experts elsewhere.
    before = {n: t.clone() for n, t in plan.task.plain(model).state_dict().items()}
    records: list[dict] = []
    given = dict(optimizer=optimizer, ranks=ranks)
    train.fit(model, plan.task, plan.config, train.Hooks(records.append), **given)
    return before, comparable(records)


def test_adapters_of_experts_that_ranks_share(tmp_path):
    """Rows then come back from other ranks in another order of sums: close, and not to the bit."""
    flags = flags_of(tmp_path, "sft", "--lora_rank", 4, "--log_interval", 1)
    before, expected = close_to_one_process(ONE_PROCESS, [*flags, *in_folder(tmp_path / "1")])
    flags += [*in_folder(tmp_path / "2"), "--expert_parallel", "2"]
    for weights, records in run_on(2, close_to_one_process, flags):
        assert [name for name in before if not torch.equal(before[name], weights[name])] == []
        assert len(records) == len(expected)
        for own, one in zip(records, expected, strict=True):
            if one["kind"] != "score":
                assert own["loss"] == pytest.approx(one["loss"], rel=EXPERTS_APART), own["step"]


# ---------------------------------------------------------------------------------------- its files
def finished(ranks: Ranks, kind: str, flags: list[str]) -> int:
    """Carry out a run with its files."""
    return train.run(planned(ranks, kind, flags))


def saved(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / "ckpt" / "latest.pt", optimizer=True)


@pytest.mark.parametrize("more", nightly_but([[], ["--lora_rank", "4"]], 1), ids=["full", "lora"])
def test_a_run_resumes_on_any_number_of_ranks(tmp_path, more):
    """Two ranks stop and resume, then one process does: the weights and files of one whole run.

    The reference is lost on the way, so that the ranks compute it from the start's weights again.
    """
    flags = [*flags_of(tmp_path, "dpo", "--schedule", "constant"), *more]
    whole, parts = ([*flags, *in_folder(tmp_path / name)] for name in ("whole", "parts"))
    assert finished(ONE_PROCESS, "dpo", whole) == 0
    assert run_on(2, finished, "dpo", [*parts, "--max_steps", "2"]) == [0, 0]
    first = saved(tmp_path / "parts")
    assert (first.step, first.world, first.stage["kind"]) == (2, 2, "dpo")
    (tmp_path / "parts" / "ckpt" / FILE).unlink()
    resume = ["--resume", *in_folder(tmp_path / "parts"), "--max_steps"]
    assert run_on(2, finished, "dpo", [*resume, "4"]) == [0, 0]
    assert finished(ONE_PROCESS, "dpo", [*resume, "6"]) == 0
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert one.step == other.step == 6 and one.adapter == other.adapter
    for own, theirs in ((one.trained or one.model, other.trained or other.model),):
        assert [name for name in own if not torch.equal(own[name], theirs[name])] == []
    assert one.optimizer is not None and other.optimizer is not None
    for name, tensor in one.optimizer.items():
        assert torch.equal(tensor, other.optimizer[name]), name
    first, second = ((tmp_path / name / "ckpt" / FILE).read_bytes() for name in ("whole", "parts"))
    assert first == second


@pytest.mark.nightly
def test_torchrun_tunes_a_model_that_then_talks(tmp_path):
    """As a user types it: the embedded tasks on two ranks, then a chat with what they saved."""
    base = tiny_base(tmp_path / "base", context_length=768)
    flags = ["--init_from", base, "--toy_examples", 40, "--max_steps", 2, "--lora_rank", 4]
    ranks = ["--standalone", "--nproc_per_node", 2, "-m", "scripts.sft"]
    words = ["-m", "torch.distributed.run", *ranks, *QUICK, *in_folder(tmp_path), *flags]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("lora     trains") == done.stdout.count("done: 2 steps") == 1
    assert done.stdout.count("requests pass@1") == 3, "two scores and the table"
    path = tmp_path / "ckpt" / "latest.pt"
    assert f"python predict.py --chat --ckpt {path.with_name('best.pt')}" in done.stdout
    assert read_checkpoint(path).world == 2
    chat = ["predict.py", "--chat", "--ckpt", path, "--max_new_tokens", 4]
    answer = children.run([*chat, "--prompt", "Who is Tom?"])
    assert answer.returncode == 0, answer.stdout + answer.stderr


# --------------------------------------------------------------------------------------- the score
def examined(ranks: Ranks, base: Path) -> tuple[dict[str, float], int]:
    """Return a score of a base model, and how many answers were generated here."""
    torch.set_num_threads(1)
    exam = Exam(with_chat(load_tokenizer("byte")), PROMPTS, max_new_tokens=6)
    answer, made = score._answer, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "MOST_ROWS", 2)
        patch.setattr(score, "_answer", lambda *given: made.append(given) or answer(*given))
        numbers = exam.score(load_model(base)[0], samples=2, seed=3, ranks=ranks).numbers()
    return numbers, len(made)


def test_the_ranks_share_out_what_a_score_asks(tmp_path):
    """Each would answer all of it else, in the time of one process."""
    base = tiny_base(tmp_path, vocabulary_size=260, context_length=512)
    expected, in_all = examined(ONE_PROCESS, base)
    # Of two forms, greedy and two samples.
    assert in_all == 2 * PROMPTS * 3
    found = run_on(2, examined, base)
    assert [numbers for numbers, _ in found] == [expected, expected]
    assert sum(own for _, own in found) == in_all and min(own for _, own in found) > in_all / 3


def failing(ranks: Ranks) -> str:
    def do(part: int) -> list[int]:
        if part == 1:
            raise ValueError("the model's logits are not finite")
        return [part]

    try:
        shared_out(ranks, range(4), do)
    except ValueError as error:
        return str(error)
    return ""


def test_what_fails_on_one_rank_fails_on_all():
    """The others would wait for its answers until the time-out."""
    assert run_on(2, failing) == ["rank 1: the model's logits are not finite"] * 2


def scored_without_shards(ranks: Ranks, flags: list[str], data: str) -> list[str]:
    """Return the names of the first score where only the first rank has the base's shards."""
    plan = planned(ranks, "sft", [*flags, "--data_dir", data if ranks.is_first else "nowhere"])
    model, *_ = set_up(plan, train.forward_backward)
    return [*plan.task.score(model.eval())]


def test_the_loss_of_the_base_needs_its_shards_on_every_rank(tmp_path, data):
    """A rank without them would leave the others in a forward pass that never ends."""
    flags = [*flags_of(tmp_path, "sft"), *in_folder(tmp_path)]
    for names in run_on(2, scored_without_shards, flags, str(data)):
        assert "exact match" in names and BASE_LOSS not in names


# ----------------------------------------------------------------------------------- the reference
def beyond_the_plan(ranks: Ranks, flags: list[str]) -> np.ndarray | None:
    """Return the reference of pairs that the run was not to use; made on the last rank alone."""
    plan = planned(ranks, "dpo", flags)
    set_up(plan, train.forward_backward)
    if ranks.rank < ranks.world - 1:
        return None
    loader = plan.task.loader(plan.model_config, plan.config)
    first = plan.config.max_steps * plan.config.batch_size * plan.config.grad_accum
    assert plan.task.reference.lacks(loader.loader.batch(first)[5].numpy())
    return loader.batch(first)[6].numpy()


def test_batches_made_ahead_take_no_part_in_what_the_ranks_do(tmp_path):
    """A run that went back meets pairs without a reference in the thread that makes its batches.

    What the ranks do together from two threads has no order: it would hang, or mix numbers up.
    """
    flags = flags_of(tmp_path, "dpo", "--max_steps", 2, "--lora_rank", 4)
    expected = beyond_the_plan(ONE_PROCESS, [*flags, *in_folder(tmp_path / "1")])
    _, found = run_on(2, beyond_the_plan, [*flags, *in_folder(tmp_path / "2")])
    assert expected is not None and np.array_equal(found, expected)


# ------------------------------------------------------------------------------- before it starts
class TwoRanks(Ranks):
    world = local_world = 2


def memory(ranks: Ranks, flags: list[str]) -> dict[str, int]:
    """Return the estimate of a run of the flags with experts that are most of its model."""
    plan = planned(ranks, "sft", flags)
    shape = dict(num_experts=64, d_ff=4096, transformer_blocks=12)
    config = dataclasses.replace(plan.model_config, **shape)
    return check_memory(dataclasses.replace(plan, model_config=config))


def test_the_estimate_counts_whole_weights_for_a_score(tmp_path):
    """A model that fits in shards alone would run out of memory before its first step."""
    flags = [*flags_of(tmp_path, "sft", "--lora_rank", 4), *in_folder(tmp_path)]
    name = "whole weights for a score"
    needed = memory(TwoRanks(), flags)
    kept = sum(needed[part] for part in ("program", "weights", "optimizer state"))
    in_shards = needed["frozen weights"]
    assert needed[name] > in_shards
    assert sum(needed.values()) == pytest.approx(kept + in_shards + 2 * in_shards, rel=1e-3)
    assert name not in memory(TwoRanks(), [*flags, "--score_prompts", "0"])
    assert name not in memory(ONE_PROCESS, flags)


def test_rewards_are_for_one_process(tmp_path):
    """Each rank would sample from its shard of the weights."""
    flags = ["--init_from", str(tiny_base(tmp_path, context_length=512)), *in_folder(tmp_path)]
    settings = settings_of("", flags, GrpoConfig)
    with pytest.raises(ValueError, match=r"scripts.grpo is for one process, and these are 2 ranks"):
        make_plan(settings, Grpo, GrpoConfig, TwoRanks())
