"""Fine-tuning on two ranks is fine-tuning in one process, to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import train
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.posttraining.flags import settings_of
from runtime.posttraining.preference import DpoConfig, Preference
from runtime.posttraining.reference import FILE
from runtime.posttraining.sft import Sft, SftConfig
from runtime.training.plan import initial_state, make_plan
from runtime.training.setup import set_up
from tests.builders_posttraining import QUICK, chats, in_folder, pairs, tiny_base
from tests.ranks import run_on

KINDS = {"sft": (Sft, SftConfig), "dpo": (Preference, DpoConfig)}
# Of the clock.
MEASURED = {"seconds", "tokens_per_sec", "waiting_share"}


def tuned(ranks: Ranks, kind: str, flags: list[str]) -> tuple[dict, dict, list[dict]]:
    """Return the weights, the optimizer's state and the records of a run, with its saves left out."""
    torch.set_num_threads(1)
    task_of, config_class = KINDS[kind]
    plan = make_plan(settings_of("", flags, config_class), task_of, config_class, ranks)
    state = initial_state(plan)
    plan.task.restore(state.task)
    model, optimizer, _ = set_up(plan, train.forward_backward)
    records: list[dict] = []
    train.fit(
        model,
        plan.task,
        plan.config,
        train.Hooks(records.append),
        optimizer=optimizer,
        state=state,
        ranks=ranks,
    )
    parameters = dict(model.named_parameters())
    weights = {name: ranks.whole(p.detach()).clone() for name, p in parameters.items()}
    moments = {
        f"{key}.{name}": ranks.whole(value).clone()
        for name, p in parameters.items()
        for key, value in optimizer.state.get(p, {}).items()
    }
    return weights, moments, [{k: r[k] for k in r.keys() - MEASURED} for r in records]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sft", ["--dropout", "0.1"]),
        ("sft", ["--lora_rank", "4", "--optimizer", "adamw"]),
        ("dpo", ["--optimizer", "muon"]),
        ("dpo", ["--lora_rank", "4", "--sft_coef", "0.5"]),
    ],
    ids=["sft", "sft with adapters", "dpo", "dpo with adapters"],
)
def test_two_ranks_are_one_process(tmp_path, kind, flags):
    base = tiny_base(tmp_path / "base")
    data = chats(tmp_path / "data.jsonl") if kind == "sft" else pairs(tmp_path / "data.jsonl", 120)
    common = [*QUICK, "--init_from", str(base), "--data", str(data), "--grad_accum", "2", *flags]
    found = [
        (tuned(ONE_PROCESS, kind, [*common, *in_folder(tmp_path / "one")])),
        *run_on(2, tuned, kind, [*common, *in_folder(tmp_path / "two")]),
    ]
    (weights, moments, records), *others = found
    assert {r["kind"] for r in records} == {"train", "val", "score"}
    for own_weights, own_moments, own_records in others:
        for own, other in ((weights, own_weights), (moments, own_moments)):
            different = [name for name in own if not torch.equal(own[name], other[name])]
            assert own.keys() == other.keys() and different == []
        assert own_records == records
    if kind == "dpo":
        one, two = ((tmp_path / name / "ckpt" / FILE).read_bytes() for name in ("one", "two"))
        assert one == two
