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
from runtime.training.closing import score_table
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


def test_scores_are_records_of_their_own_before_the_first_step_too(model):
    class Scored(GivenTask):
        def score(self, model):
            asked.append((model.training, torch.is_grad_enabled()))
            return {"pass_at_1": 0.25}

    task = parts(model, val=1)
    asked: list[tuple[bool, bool]] = []
    scored = Scored(task.given_loader, task.loss_fn, task.val_batches)
    kinds = []
    for one in (task, scored):
        records: list[dict] = []
        train.fit(model, one, config_of(max_steps=1), train.Hooks(on_log=records.append))
        kinds.append([(record["kind"], record["step"]) for record in records])
    assert kinds[0] == [("train", 1), ("val", 1)]
    assert kinds[1] == [("score", 0), *kinds[0], ("score", 1)]
    assert flatten(records[-1])["score/pass_at_1"] == 0.25
    assert asked == [(False, False)] * 2 and model.training, "no dropout, and no graph is kept"


@pytest.mark.parametrize("by_score", [False, True])
def test_best_goes_by_the_score_that_a_task_names(model, by_score):
    """The loss falls at each step. The score is highest at the second, and equal at the third."""

    class Scored(GivenTask):
        best_score = "pass_at_1" if by_score else ""

        def score(self, model):
            return {"pass_at_1": scores.pop(0)}

    scores = [0.9, 0.1, 0.5, 0.5, 0.2]
    loader = Numbered(model.config.vocabulary_size)
    batch = loader.batch(0)
    loader.batch = lambda first: batch
    task = Scored(loader, train.next_token_loss, [batch])
    saved: list[tuple[int, bool]] = []
    hooks = train.Hooks(
        on_save=lambda state, loss, is_best: saved.append((state.step, is_best)),
    )
    state = train.fit(model, task, config_of(max_steps=4, save_interval=1), hooks)
    expected = [1, 2] if by_score else [1, 2, 3, 4]
    assert [step for step, is_best in saved if is_best] == expected
    assert state.best_step == expected[-1] and state.best_score == (0.5 if by_score else None)


@pytest.mark.parametrize("names", [dict(best_score="reward"), dict(scores=True)])
def test_a_task_without_validation_is_scored_as_often(model, names):
    """best.pt may go by a score alone, and a score of no model is compared with the first one."""

    class Scored(GivenTask):
        best_score = names.get("best_score", "")
        scores = True

        def score(self, model):
            return {"reward": 1.0}

    task = Scored(Numbered(model.config.vocabulary_size), train.next_token_loss)
    records: list[dict] = []
    config = config_of(max_steps=4, val_interval=2)
    train.fit(model, task, config, train.Hooks(on_log=records.append))
    assert [r["step"] for r in records if r["kind"] == "score"] == [0, 2, 4]
    assert not any(r["kind"] == "val" for r in records)


def test_metrics_of_a_task_are_means_over_what_it_counts(model):
    """Two micro-batches of 2 and of 6 units: the mean over 8 units, not a mean of two means."""

    class Measured(GivenTask):
        is_likelihood = False

        def count(self, batch):
            return next(units)

        def loss(self, model, batch):
            value = torch.tensor(next(sums))
            out = super().loss(model, batch)
            return out._replace(metrics={"margin": value, "length_per_step": value / 2})

    units, sums = iter([2, 6, 1, 1]), iter([2.0, 12.0, 3.0, 1.0])
    task = Measured(Numbered(model.config.vocabulary_size), train.next_token_loss)
    task.fetch_ahead = False
    records: list[dict] = []
    config = config_of(max_steps=2, grad_accum=2, log_interval=2)
    train.fit(model, task, config, train.Hooks(on_log=records.append))
    (record,) = records
    assert record["metrics"] == {"margin": 18 / 10, "length": 9 / 2}
    assert flatten(record)["train/margin"] == 18 / 10
    assert "perplexity" not in record, "the exponential of such a loss means nothing"


def test_an_idle_step_moves_nothing_and_is_no_failure(model):
    """A step whose batches teach nothing still decayed the weights, and 26 of them ended the run.

    Sampled answers that all earn the same are such batches.
    """

    class Idle(GivenTask):
        def is_idle(self, batches):
            return True

    task = Idle(Numbered(model.config.vocabulary_size), train.next_token_loss)
    model = LLM(tiny_config(router_bias_rate=0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = train.MOST_SKIPPED_IN_A_ROW + 2
    records: list[dict] = []
    state = train.fit(model, task, config_of(max_steps=steps), train.Hooks(on_log=records.append))
    assert state.step == steps and state.skipped_steps == 0
    assert all(math.isfinite(record["loss"]) for record in records)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("balances", [False, True])
def test_a_task_may_keep_the_expert_biases(balances):
    class Still(GivenTask):
        pass

    torch.manual_seed(0)
    model = LLM(tiny_config(router_bias_rate=0.1))
    task = Still(Numbered(model.config.vocabulary_size), train.next_token_loss)
    task.balances = balances
    train.fit(model, task, config_of(max_steps=1))
    assert bool(model.layers[0].moe.router.selection_bias.any()) == balances


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
    return train.run(
        make_plan(cli.settings_from(args, ModelConfig, TrainConfig), lambda config, source: task)
    )


def carry_out_resumed(task: Task, folder, *flags: str) -> int:
    parser = cli.parser("test")
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    folders = ["--ckpt_dir", str(folder / "ckpt"), "--graph_dir", str(folder / "graphs")]
    settings = cli.settings_from(
        parser.parse_args(["--resume", *folders, *flags]), ModelConfig, TrainConfig
    )
    return train.run(make_plan(settings, lambda config, source: task))


@pytest.mark.parametrize("task", [Bare(), Judged()], ids=["bare", "judged"])
def test_a_run_of_any_task_trains_logs_and_saves(task, tmp_path, capsys):
    assert carry_out(task, tmp_path) == 0
    checkpoint = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert checkpoint.step == 4 and checkpoint.tokenizer_state is None
    lines = (tmp_path / "graphs" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    val = [record for record in records if record["kind"] == "val"]
    assert [r["step"] for r in records if r["kind"] == "train"] == [2, 4]
    assert [record["step"] for record in val] == [4] * isinstance(task, Judged)
    scores = [(r["step"], r["score"]) for r in records if r["kind"] == "score"]
    expected = [(0, {"pass_at_1": 0.25}), (4, {"pass_at_1": 0.25})]
    assert scores == expected * isinstance(task, Judged)
    output = capsys.readouterr().out
    assert ("pass_at_1 0.2500" in output) == isinstance(task, Judged)
    assert "bits/byte" not in output and "bits_per_byte" not in str(records)


class Remembers(Bare):
    """Counts its batches, and says so in each checkpoint."""

    kind, command = "remembering", "python -m scripts.remember"

    def __init__(self):
        self.restored: list[dict] = []

    def state(self):
        return {"seen": [1, 2]}

    def restore(self, state):
        self.restored.append(state)

    def stage(self, model):
        return {"kind": self.kind, "base": "abc"}


def test_a_task_continues_with_the_state_that_it_saved(tmp_path):
    assert carry_out(Remembers(), tmp_path) == 0
    checkpoint = read_checkpoint(tmp_path / "ckpt" / "latest.pt")
    assert checkpoint.run["task"] == {"seen": [1, 2]}
    assert checkpoint.stage == {"kind": "remembering", "base": "abc"}
    again = Remembers()
    carry_out_resumed(again, tmp_path, "--max_steps", "6")
    assert again.restored and all(state == {"seen": [1, 2]} for state in again.restored)


def test_another_kind_of_training_does_not_resume_a_run(tmp_path):
    """train.py --resume would have continued a fine-tuning with another loss and other data."""
    carry_out(Remembers(), tmp_path)
    with pytest.raises(ValueError, match=r"another kind of training \(remembering\).*train\.py"):
        carry_out_resumed(Bare(), tmp_path)


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


# -------------------------------------------------------------------------------- what is said last
def test_the_last_lines_compare_the_score_before_and_after():
    first = {"right": 0.1, "right_low": 0.05, "right_high": 0.2, "story loss": 1.25}
    last = {"right": 0.75, "right_low": 0.7, "right_high": 0.8, "story loss": 1.5, "new": 2.0}
    records = [
        {"kind": "score", "step": 0, "score": first},
        {"kind": "train", "step": 10},
        {"kind": "score", "step": 20, "score": {"right": 0.9}},
        {"kind": "score", "step": 1000, "score": last},
    ]
    assert score_table(records) == [
        "score       step 0                  step 1,000",
        "right       0.100 (0.050 to 0.200)  0.750 (0.700 to 0.800)",
        "story loss  1.250                   1.500",
        "new         -                       2.000",
    ]
    assert score_table(records[:2]) == [] and score_table([]) == []
