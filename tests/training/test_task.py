"""The seam between the loop and what it trains: `fit` asks a Task, and computes all gradients."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import threading

import pytest
import torch

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from model_parts import RouterStats
from runtime.base import cli
from runtime.checkpoint.read import read_checkpoint
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.training.memory import OPTIMIZER_MEMORY
from runtime.training.metrics import flatten
from runtime.training.optimizer import OPTIMIZERS
from runtime.training.plan import make_plan
from runtime.training.task import GivenTask, Task
from tests.builders import tiny_config
from tests.builders_runs import MODEL, SPEED
from tests.conftest import REPO

STEPS = 3


class Numbered:
    """Batches of [2, 8] that follow from their number; `made` lists the numbers asked for."""

    def __init__(self, vocabulary_size: int):
        self.vocabulary_size = vocabulary_size
        self.made: list[int] = []
        self.two_are_made = threading.Event()

    def batch(self, first_sample: int):
        self.made.append(first_sample)
        if len(self.made) == 2:
            self.two_are_made.set()
        generator = torch.Generator().manual_seed(first_sample)
        ids_BT = torch.randint(self.vocabulary_size, (2, 9), generator=generator)
        return ids_BT[:, :-1], ids_BT[:, 1:]


def config_of(**changes) -> TrainConfig:
    values = dict(batch_size=2, grad_accum=1, max_steps=STEPS, warmup_steps=0, log_interval=1)
    return TrainConfig(**values | dict(lr=1e-2, min_lr=1e-3, device="cpu") | changes)


@pytest.fixture
def model() -> LLM:
    torch.manual_seed(0)
    return LLM(tiny_config())


def parts(model: LLM, val: int = 0) -> GivenTask:
    loader = Numbered(model.config.vocabulary_size)
    val_batches = [loader.batch(1000 + i) for i in range(val)]
    loader.made.clear()
    return GivenTask(loader, train.next_token_loss, val_batches)


# -------------------------------------------------------------------------- one place for gradients
def backward_calls(source: str) -> int:
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "backward"
        for node in ast.walk(ast.parse(source))
    )


def test_gradients_are_computed_in_train_alone():
    """A second loop is a second place for each fault: fine-tuning brings a Task."""
    paths = [
        *REPO.glob("*.py"),
        *(REPO / "runtime").rglob("*.py"),
        *(REPO / "scripts").rglob("*.py"),
    ]
    assert len(paths) > 60
    found = {p.name: n for p in paths if (n := backward_calls(p.read_text(encoding="utf-8")))}
    assert found == {"train.py": 1}
    assert backward_calls("loss.backward()") == 1 and backward_calls("'.backward('") == 0


# -------------------------------------------------------------------------------- what fit asks for
@pytest.mark.parametrize("ahead", [False, True])
def test_batches_are_made_ahead_only_where_they_may_be(model, ahead):
    """Sampled answers depend on the weights: their batch is made when its step comes."""
    task = parts(model)
    task.fetch_ahead = ahead
    made = task.given_loader.made
    seen = []
    real = task.loss_fn

    def loss_fn(model, batch):
        if ahead:
            # During the first step already: the other thread needs nothing from this one.
            assert task.given_loader.two_are_made.wait(60)
        seen.append(len(made))
        return real(model, batch)

    task.loss_fn = loss_fn
    train.fit(model, task, config_of())
    assert made == [0, 2, 4]
    assert ahead or seen == [1, 2, 3]


def test_count_decides_the_divisor(model):
    """Twice the count halves the loss that is logged; the default counts valid targets."""

    class Doubled(GivenTask):
        def count(self, batch):
            return 2 * super().count(batch)

    task = parts(model)
    inputs_BT, targets_BT = task.given_loader.batch(0)
    targets_BT[:, :3] = IGNORE
    assert task.count((inputs_BT, targets_BT)) == targets_BT.numel() - 6
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for kind in (GivenTask, Doubled):
        model.load_state_dict(weights)
        records = []
        one = kind(Numbered(model.config.vocabulary_size), train.next_token_loss)
        train.fit(model, one, config_of(max_steps=1), train.Hooks(on_log=records.append))
        losses.append(records[0]["loss"])
    assert losses[1] == losses[0] / 2


def test_the_score_of_a_task_is_in_the_validation_record(model):
    class Scored(GivenTask):
        def score(self, model):
            asked.append((model.training, torch.is_grad_enabled()))
            return {"pass_at_1": 0.25}

    task = parts(model, val=1)
    asked: list[tuple[bool, bool]] = []
    records: list[dict] = []
    scored = Scored(task.given_loader, task.loss_fn, task.val_batches)
    for one in (task, scored):
        train.fit(model, one, config_of(max_steps=1), train.Hooks(on_log=records.append))
    without, with_score = (record for record in records if record["kind"] == "val")
    assert "score" not in without and with_score["score"] == {"pass_at_1": 0.25}
    assert flatten(with_score)["val/pass_at_1"] == 0.25
    assert asked == [(False, False)] and model.training, "without dropout, and no graph is kept"


def test_one_more_router_number_is_logged_by_itself(model, monkeypatch):
    real = RouterStats.logged
    monkeypatch.setattr(
        RouterStats, "logged", lambda stats: real(stats) | {"twice_the_load": 2 * stats.load}
    )
    records: list[dict] = []
    train.fit(model, parts(model), config_of(), train.Hooks(on_log=records.append))
    assert len(records) == STEPS
    for record in records:
        twice = torch.tensor(record["twice_the_load"])
        torch.testing.assert_close(twice, 2 * torch.tensor(record["expert_load"]))


def test_a_checkpoint_with_other_sums_resumes_with_a_new_interval(model):
    """Sums are added by name: one more of them must not be added to another's position."""
    stopped = train.fit(
        model, parts(model), config_of(log_interval=100, max_steps=1, schedule="constant")
    )
    assert stopped.window == {}
    state = dataclasses.replace(stopped)
    sums = {"cross_entropy": 1.0, "targets": 1.0, "steps": 1.0, "aux_loss": 0.0, "z_loss": 0.0}
    state.window = {"tokens": 0, "seconds": 0.0, "waiting_seconds": 0.0, "sums": sums}
    records: list[dict] = []
    train.fit(model, parts(model), config_of(), train.Hooks(on_log=records.append), state=state)
    assert math.isfinite(records[0]["loss"]) and records[0]["loss"] > 1.5


# -------------------------------------------------------------------------------------------- a run
class Bare(Task):
    """A task that gives only what a task must: no validation, tokenizer or bytes per token."""

    def loader(self, model_config, config):
        return Numbered(model_config.vocabulary_size)

    def loss(self, model, batch):
        return train.next_token_loss(model, batch)


class Judged(Bare):
    def validation(self, model_config, config):
        return [Numbered(model_config.vocabulary_size).batch(1000)]

    def score(self, model):
        return {"pass_at_1": 0.25}


def carry_out(task: Task, folder, *flags: str) -> int:
    parser = cli.parser("test")
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    folders = ["--ckpt_dir", str(folder / "ckpt"), "--graph_dir", str(folder / "graphs")]
    size = ["--vocabulary_size", "64", "--max_steps", "4", "--num_threads", "1"]
    args = parser.parse_args([*MODEL, *SPEED, *size, *folders, *flags])
    return train.run(make_plan(cli.settings_from(args, ModelConfig, TrainConfig), lambda _: task))


@pytest.mark.parametrize("task", [Bare(), Judged()], ids=["bare", "judged"])
def test_a_run_of_any_task_trains_logs_and_saves(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("runtime.training.reporter.draw_plots", lambda *_, **__: None)
    assert carry_out(task, tmp_path) == 0
    checkpoint = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert checkpoint.step == 4 and checkpoint.tokenizer_state is None
    lines = (tmp_path / "graphs" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    val = [record for record in records if record["kind"] == "val"]
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4]
    assert [record["score"] for record in val] == [{"pass_at_1": 0.25}] * isinstance(task, Judged)
    output = capsys.readouterr().out
    assert ("pass_at_1 0.2500" in output) == isinstance(task, Judged)
    assert "bits/byte" not in output and "bits_per_byte" not in str(records)


def test_a_task_without_a_tokenizer_may_still_have_too_many_ids(tmp_path):
    task = Bare()
    task.vocabulary_size = 65
    with pytest.raises(
        ValueError, match=r"vocabulary_size 64 is smaller than the data's 65: leave"
    ):
        carry_out(task, tmp_path)


# --------------------------------------------------------------------------------------- optimizers
def test_the_registries_of_optimizers_have_the_same_names():
    field = next(f for f in dataclasses.fields(TrainConfig) if f.name == "optimizer")
    assert tuple(OPTIMIZERS) == tuple(OPTIMIZER_MEMORY) == field.metadata["choices"]
