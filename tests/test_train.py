"""Training: the step, the schedule, resuming, stopping, refusing."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch

import prepare_data
import train
from config_model import ModelConfig, TrainConfig, total_parameters
from model import LLM
from runtime.base import cli, process
from runtime.base.device import to_device
from runtime.base.process import StopRequest
from runtime.base.ranks import Ranks
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data.loader import WindowLoader, validation_batches
from runtime.data.shards import open_data
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.training import plan as plan_module
from runtime.training import reporter, setup
from runtime.training.diary import Diary
from runtime.training.memory import training_memory_bytes
from runtime.training.optimizer import build_optimizer
from runtime.training.plan import (
    TrainPlan,
    check_memory,
    checkpoint_bytes,
    describe,
    make_plan,
    with_largest_micro_batch,
    with_loss_rows,
)
from runtime.training.plots import draw_plots
from runtime.training.reporter import Reporter
from runtime.training.setup import dry_run
from runtime.training.state import RecentLoss, RunState, Totals, TrainingDiverged, train_record
from runtime.training.task import Pretraining
from tests import builders_runs, children
from tests.builders import random_model, tiny_config
from tests.builders_runs import (
    MODEL,
    SPEED,
    Fixed,
    Run,
    assert_same,
    comparable,
    parsed,
    poison,
    poisoned,
    settings_of,
    write_text,
)
from tests.conftest import REPO
from tests.nightly import nightly_but
from tests.numeric import assert_close, gradients_bound, logits_bound, rounding, size_of


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere):
    """Plans have the default folders."""


@pytest.fixture
def run(data, tmp_path) -> Run:
    return Run(data, tmp_path)


# ------------------------------------------------------------------------------------- the schedule
def test_learning_rates():
    cosine = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert [train.learning_rate(s, cosine) for s in (0, 4, 9, 10)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0]
    )
    assert train.learning_rate(109, cosine) == pytest.approx(0.1)
    assert train.learning_rate(10 + 99 / 2, cosine) == pytest.approx(0.55)
    wsd = dataclasses.replace(cosine, schedule="wsd", decay_fraction=0.2)
    assert [train.learning_rate(s, wsd) for s in (9, 50, 88)] == pytest.approx([1.0, 1.0, 1.0])
    assert (
        train.learning_rate(109, wsd) == pytest.approx(0.1)
        and 0.1 < train.learning_rate(100, wsd) < 1.0
    )
    constant = dataclasses.replace(cosine, schedule="constant")
    assert train.learning_rate(4, constant) == 0.5 and train.learning_rate(109, constant) == 1.0
    assert (
        train.learning_rate(0, TrainConfig(warmup_steps=0, schedule="constant", lr=0.5, min_lr=0.1))
        == 0.5
    )
    assert math.isfinite(train.learning_rate(1, TrainConfig(max_steps=2, warmup_steps=1)))


# ----------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradient_accumulation_equals_the_big_batch(accumulation):
    """Also with ignored targets, unevenly spread.

    The mean is over all valid targets of the step.
    """
    torch.manual_seed(0)
    inputs, targets = torch.randint(0, 61, (8, 12)), torch.randint(0, 61, (8, 12))
    targets[0, :11] = IGNORE
    targets[5] = IGNORE
    results = []
    for batch_size, grad_accum in ((8, 1), (8 // accumulation, accumulation)):
        model = random_model(tiny_config(aux_loss_coef=0.0, z_loss_coef=0.01), 1, torch.float64)
        config = TrainConfig(
            batch_size=batch_size,
            grad_accum=grad_accum,
            max_steps=3,
            warmup_steps=1,
            lr=1e-2,
            device="cpu",
        )
        builders_runs.fit(model, Fixed(inputs, targets, batch_size), config)
        results.append(model.state_dict())
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], rtol=0, atol=1e-6), name


def test_loss_function_is_a_seam():
    """fit minimises any loss, through the same interface.

    Here only each sequence's second half counts.
    """

    def second_half(model, batch):
        inputs, targets = batch
        targets = targets.clone()
        targets[:, :6] = IGNORE
        return model(inputs, targets)

    torch.manual_seed(0)
    inputs = torch.randint(0, 61, (4, 12))
    model, records = random_model(tiny_config(), 1), []
    config = TrainConfig(
        batch_size=4,
        grad_accum=1,
        max_steps=30,
        warmup_steps=1,
        lr=1e-2,
        log_interval=30,
        device="cpu",
    )
    builders_runs.fit(
        model, Fixed(inputs, inputs.roll(1, 1), 4), config, second_half, on_log=records.append
    )
    with torch.no_grad():
        logits = model(inputs).logits
    loss = (
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), inputs.roll(1, 1).flatten(), reduction="none"
        )
        .view(4, 12)
        .mean(0)
    )
    assert loss[6:].mean() < loss[:6].mean() - 1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    """T8: one NaN micro-batch made 54 of 58 tensors NaN in the original implementation.

    It then continued to the end.
    """
    inputs = torch.randint(0, 61, (4, 12))
    config = TrainConfig(
        batch_size=4,
        grad_accum=1,
        max_steps=6,
        warmup_steps=1,
        lr=1e-2,
        log_interval=1,
        device="cpu",
    )
    model, before, records = random_model(tiny_config(), 1), {}, []

    def on_log(record):
        before[record["step"]] = {n: p.clone() for n, p in model.state_dict().items()}
        records.append(record)

    state = builders_runs.fit(
        model, Fixed(inputs, inputs, 4), config, poisoned({2, 3}, where), on_log=on_log
    )
    assert state.skipped_steps == 2 and state.skipped_in_a_row == 0 and state.step == 6
    assert all(torch.equal(before[2][n], before[4][n]) for n in before[2]) and not all(
        torch.equal(before[4][n], before[5][n]) for n in before[4]
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [math.isfinite(r["loss"]) for r in records] == [True, True, False, False, True, True]


def test_a_run_that_never_recovers_ends():
    inputs = torch.randint(0, 61, (4, 12))
    config = TrainConfig(batch_size=4, grad_accum=1, max_steps=100, warmup_steps=1, device="cpu")
    with pytest.raises(TrainingDiverged, match="lower --lr") as error:
        builders_runs.fit(
            random_model(tiny_config()),
            Fixed(inputs, inputs, 4),
            config,
            poisoned(set(range(100)), "loss"),
        )
    assert error.value.exit_code == 3


def test_after_many_bad_steps_the_run_goes_back_and_on_behind_the_data(
    run, data, tmp_path, monkeypatch, capsys
):
    """It used to end at once, and --resume read the same data again.

    Now the steps since the checkpoint are undone, except that their data is not read again.
    """
    # Steps 11 to 40 of 2 micro-batches.
    poison(monkeypatch, range(20, 80))
    assert run("--max_steps", "60", "--save_interval", "5") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"\d\d steps in a row were skipped \(step \d\d\), because their gradients were not finite: "
        r"back to step 10, continuing after the data already used \(rollback 1 of at most 2\)",
        out,
    )
    final = run.final()
    assert final.step == 60 and final.run["rollbacks"] == 1 and final.run["skipped_in_a_row"] == 0
    assert (
        final.run["samples_seen"] - 60 * 4 in range(25 * 4, 33 * 4, 4)
        and final.run["tokens_seen"] == 60 * 4 * 16
    )
    steps = [r["step"] for r in run.records() if r["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 60
    assert all(torch.isfinite(t).all() for t in final.model.values())
    # A later resume knows of it.
    for path in run.ckpt_dir.glob("*.pt"):
        if path.name not in ("step_0000050.pt", "step_0000055.pt"):
            path.unlink()
    assert run("--resume", fresh=False) == 0
    assert_same(run.final(), final)


@pytest.mark.parametrize(("allowed", "said"), [(0, 0), (1, 1), (2, 2)])
def test_going_back_has_a_limit_and_an_exit_code(run, monkeypatch, capsys, allowed, said):
    poison(monkeypatch, range(20, 10_000))
    with pytest.raises(
        TrainingDiverged, match="steps in a row were skipped .* lower --lr"
    ) as error:
        run("--max_steps", "500", "--save_interval", "5", "--max_rollbacks", allowed)
    assert error.value.exit_code == 3 and capsys.readouterr().out.count("back to step 10") == said
    assert all(torch.isfinite(t).all() for t in run.final().model.values())


@pytest.mark.slow
def test_going_back_passes_over_damage_and_never_takes_another_run(run, monkeypatch, capsys):
    """The newest good checkpoint is the one before it; without any of this run's it must end."""
    poison(monkeypatch, range(40, 100))
    real = train.rolled_back

    def damaged(*arguments):
        path = run.ckpt_dir / "step_0000020.pt"
        if path.exists():
            path.write_bytes(path.read_bytes()[:-100])
        return real(*arguments)

    monkeypatch.setattr(train, "rolled_back", damaged)
    assert run("--max_steps", "80", "--save_interval", "10", "--keep_last", "0") == 0
    assert "back to step 10," in capsys.readouterr().out
    plan = make_plan(
        settings_of(
            *MODEL, *SPEED, *run.folders[:2], "--ckpt_dir", run.folders[3] + "2", *run.folders[4:]
        ),
        train.pretraining,
    )
    plan = dataclasses.replace(
        plan, config=dataclasses.replace(plan.config, ckpt_dir=run.folders[3])
    )
    with pytest.raises(TrainingDiverged, match="stop"):
        real(plan, RunState(run_id="another"), TrainingDiverged("stop"))


@pytest.mark.slow
@pytest.mark.parametrize("step", nightly_but([75, 95], 1))
def test_a_spike_is_skipped_at_once(run, data, tmp_path, monkeypatch, step):
    """The step with the spike changes nothing, and only it.

    The run continues as one that never took that step.
    """
    flags = ["--max_steps", "100", "--log_interval", "1", "--spike_sigmas", "6"]
    clean = Run(data, tmp_path / "clean")
    assert clean(*flags) == 0 and clean.final().run["skipped_steps"] == 0
    poison(monkeypatch, range(2 * step, 2 * step + 1), lambda loss: 20 * loss)
    assert run(*flags) == 0
    records = [r for r in run.records() if r["kind"] == "train"]
    skipped = [
        r["step"]
        for before, r in zip(records, records[1:], strict=False)
        if r["skipped_steps"] > before["skipped_steps"]
    ]
    assert skipped == [step + 1] and run.final().run["skipped_steps"] == 1


def test_spikes_are_told_from_noise():
    """0 false alarms in 10,000 steps of a loss that falls, plateaus and is noisy.

    Each of 20 spikes is seen at its own step, and leaves no trace.
    """
    r = np.random.default_rng(0)
    t = np.arange(10_000)
    losses = 2 + 6 * np.exp(-t / 800) + (0.05 + 0.2 * np.exp(-t / 500)) * r.standard_normal(10_000)
    recent, alarms = RecentLoss(RunState(), 6.0, torch.device("cpu")), 0
    spikes = set(r.choice(np.arange(100, 10_000), 20, replace=False).tolist())
    for step, loss in enumerate(losses.tolist()):
        if step in spikes:
            before = recent.numbers.clone()
            high = torch.tensor(loss + 1.5)
            assert recent.is_spike(high), step
            recent.add(high, torch.tensor(True))
            assert torch.equal(recent.numbers, before)
        alarms += bool(recent.is_spike(torch.tensor(loss)))
        recent.add(torch.tensor(loss), torch.tensor(False))
    assert alarms == 0
    assert recent.numbers[1].item() == pytest.approx(losses[-50:].mean(), abs=0.02)
    assert RecentLoss(RunState(), 0.0, torch.device("cpu")).is_spike(torch.tensor(1e9)) is None


def test_recent_losses_survive_a_resume(run, data, tmp_path):
    flags = ["--max_steps", "70", "--spike_sigmas", "5"]
    assert run(*flags, "--save_interval", "60") == 0
    whole = run.final()
    assert whole.run["recent_loss"][0] == 70
    for path in run.ckpt_dir.glob("*.pt"):
        if path.name != "step_0000060.pt":
            path.unlink()
    assert run("--resume", fresh=False) == 0
    assert_same(run.final(), whole)
    with pytest.raises(
        ValueError, match="spike_sigmas skips steps that float16's loss scaler would take"
    ):
        Run(data, tmp_path / "half")("--spike_sigmas", "5", "--dtype", "float16")


def test_validation_is_the_loss_and_draws_nothing(data):
    """Validation repeats to the last bit, in any order.

    It is the mean over targets, recomputed here in float64.
    """
    _, val = open_data(data)
    model = random_model(tiny_config(vocabulary_size=257, dropout=0.5), 2).train()
    batches = validation_batches(val, 16, 4, 3)
    torch.manual_seed(1)
    first = train.evaluate(model, batches)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn and model.training
    assert train.evaluate(model, batches) == first
    model.eval()
    with torch.no_grad():
        losses = [
            -torch.log_softmax(model(x).logits.double(), -1).gather(2, y[..., None])
            for x, y in batches
        ]
    assert_close(
        first, torch.cat([v.flatten() for v in losses]).mean(), logits_bound(model.config, 16)
    )


def test_selection_bias_is_moved_by_training():
    inputs = torch.randint(0, 61, (4, 12))
    model = random_model(tiny_config(router_bias_rate=0.01), 1)
    before = model.layers[0].moe.router.selection_bias.clone()
    builders_runs.fit(
        model,
        Fixed(inputs, inputs, 4),
        TrainConfig(batch_size=4, grad_accum=1, max_steps=3, warmup_steps=1, device="cpu"),
    )
    moved = (model.layers[0].moe.router.selection_bias - before).abs()
    assert moved.max() > 0 and (moved < 0.03 + 1e-6).all()


def test_the_host_waits_once_per_log_line(monkeypatch):
    """T7: the original implementation read the loss back after every micro-batch.

    That idles a GPU each time. The plain expert path also reads counts, but only on a CPU, so that
    is not counted here.
    """
    reads, training = [], str(REPO / "runtime" / "training")

    def counting(name, original):
        def method(self, *args):
            caller = sys._getframe(1)
            if (
                caller.f_code.co_filename.startswith((train.__file__, training))
                # The targets of a batch are counted in the host's memory, in another thread.
                and caller.f_code.co_name not in ("<genexpr>", "count")
            ):
                reads.append((caller.f_code.co_name, name))
            return original(self, *args)

        return method

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    inputs = torch.randint(0, 61, (4, 12))
    config = TrainConfig(
        batch_size=2,
        grad_accum=2,
        max_steps=20,
        warmup_steps=1,
        log_interval=5,
        save_interval=1000,
        device="cpu",
    )
    for changes in ({}, {"optimizer": "muon"}):
        reads.clear()
        builders_runs.fit(
            random_model(tiny_config()),
            Fixed(inputs, inputs, 2),
            dataclasses.replace(config, **changes),
        )
        assert reads == [("wait", "tolist")] * 4


def test_a_window_s_numbers_are_means_over_its_steps():
    """The same run logged at every step and at every fourth, also where a step was skipped.

    Losses are averaged by valid targets, loads by steps.
    """
    inputs, targets = torch.randint(0, 61, (4, 12)), torch.randint(0, 61, (4, 12))
    targets[:2, :7] = IGNORE
    records = {}
    for interval in (1, 4):
        config = TrainConfig(
            batch_size=2,
            grad_accum=1,
            max_steps=8,
            warmup_steps=1,
            lr=1e-2,
            log_interval=interval,
            device="cpu",
        )
        records[interval] = []
        builders_runs.fit(
            random_model(tiny_config(z_loss_coef=0.1)),
            Fixed(inputs, targets, 2),
            config,
            poisoned({5}, "loss"),
            on_log=records[interval].append,
        )
    counts = [
        sum(int((targets[(2 * i + j) % 4] != IGNORE).sum()) for j in range(2)) for i in range(8)
    ]
    for one, steps in zip(records[4], ([0, 1, 2, 3], [4, 6, 7]), strict=True):
        every = [records[1][i] for i in steps]
        weights = [counts[i] for i in steps]
        mean = sum(r["loss"] * w for r, w in zip(every, weights, strict=True)) / sum(weights)
        bound = rounding(torch.float32, len(every))
        assert_close(one["loss"], mean, bound)
        for key in ("aux_loss", "z_loss", "expert_load"):
            assert_close(one[key], np.mean([r[key] for r in every], axis=0), bound, key)
        assert (
            one["grad_norm"] == records[1][one["step"] - 1]["grad_norm"]
            and 0 <= one["waiting_share"] < 1
        )
    assert records[4][-1]["skipped_steps"] == 1


def test_clipping_is_by_the_norm_of_the_whole_gradient(monkeypatch):
    """Clipping happens inside the optimizer's kernel.

    The update must equal PyTorch's own clipping.
    """
    inputs = torch.randint(0, 61, (4, 12))
    config = TrainConfig(
        batch_size=4,
        grad_accum=1,
        max_steps=3,
        warmup_steps=1,
        lr=1e-2,
        grad_clip=0.3,
        adam_eps=1e-2,
        device="cpu",
    )
    ours, theirs, records = random_model(tiny_config()), random_model(tiny_config()), []
    builders_runs.fit(
        ours,
        Fixed(inputs, inputs, 4),
        dataclasses.replace(config, log_interval=1),
        on_log=records.append,
    )
    assert records[0]["grad_norm"] > 0.3
    optimizer = train.build_optimizer(theirs, config)
    for step in range(3):
        out = theirs(inputs, inputs)
        (out.cross_entropy_sum / out.num_targets + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = train.learning_rate(
            step, config
        )
        optimizer.step()
        optimizer.zero_grad()
    # AdamW moves by lr g / (sqrt(g^2) + eps): where gradients are small, by lr / eps times an error
    # of theirs, and never by more than lr.
    T = inputs.shape[1]
    bound = gradients_bound(tiny_config(), T, rows=len(inputs))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Clipped: at most this large.
        gradient = 0.3 / math.sqrt(p.numel())
        allowed = 3 * config.lr * bound * gradient / config.adam_eps
        assert_close(p, q, 1.0, name, size=allowed + rounding(torch.float32, 3) * size_of(q))


def test_packed_documents_loss_is_that_of_each_document_behind_its_end_of_text():
    """Three documents in a row of 16 tokens.

    Each token's loss is what it is when the row holds only its own document, as in predict.py.
    """
    model, eot = random_model(tiny_config()), 60
    row = torch.tensor([[5, 6, 7, eot, 8, 9, 10, 11, eot, 12, 13, 14, 15, 16, 17, eot]])
    targets = torch.cat((row[:, 1:], torch.tensor([[20]])), dim=1)
    with torch.no_grad():
        packed = train.packed_documents_loss(model, (row, targets), eot).cross_entropy_sum
        alone = sum(
            model(row[:, a:b], targets[:, a:b]).cross_entropy_sum
            for a, b in ((0, 3), (3, 8), (8, 15), (15, 16))
        )
        assert_close(packed, alone, logits_bound(model.config, 16))
        assert packed.item() != pytest.approx(
            model(row, targets).cross_entropy_sum.item(), rel=1e-3
        )


# ------------------------------------------------------------------------------- resuming, stopping
STEPS = 11


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory) -> Run:
    """A run of STEPS uninterrupted steps, with dropout, so that random numbers matter."""
    run = Run(data, tmp_path_factory.mktemp("straight"))
    assert run("--max_steps", STEPS, "--dropout", "0.1", "--router_bias_rate", "1e-3") == 0
    return run


@pytest.mark.parametrize("stop_after", range(1, STEPS))
def test_resuming_after_every_step_equals_the_straight_run(straight, run, monkeypatch, stop_after):
    """Weights, optimizer, data position and metrics, bit for bit.

    The original implementation's resumed run re-read its first 80 sequences (T2), halved its first
    logged loss (T13) and lost count of its tokens (T14).
    """

    def requested(self):
        steps.append(1)
        if len(steps) == stop_after:
            self.signal = signal.SIGTERM
        return self.signal is not None

    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", requested)
        assert (
            run("--max_steps", STEPS, "--dropout", "0.1", "--router_bias_rate", "1e-3")
            == 128 + signal.SIGTERM
        )
    assert run.final().step == stop_after
    assert run("--resume", fresh=False) == 0
    assert_same(run.final(), straight.final())
    assert comparable(run.records()) == comparable(straight.records())


def test_metrics_of_a_run(straight):
    """Steps strictly increase, tokens are steps x tokens per step, the file is strict JSON.

    metrics.json says the same.
    """
    records = straight.records()
    rows = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in rows] == [2, 4, 6, 8, 10, 11] and [
        r["step"] for r in records if r["kind"] == "val"
    ] == [4, 8, 11]
    assert all(r["tokens_seen"] == r["step"] * 2 * 2 * 16 for r in records)
    for r in rows:
        assert (
            r["perplexity"] == pytest.approx(math.exp(r["loss"])) and len(r["expert_load"][0]) == 4
        )
        assert sum(r["expert_load"][0]) == pytest.approx(4, abs=1e-4) and r[
            "aux_loss"
        ] == pytest.approx(0.01, rel=0.5)
    saved = json.loads((straight.graph_dir / "metrics.json").read_text())
    assert comparable(saved["train"] + saved["val"]) == comparable(
        rows + [r for r in records if r["kind"] == "val"]
    )
    final = straight.final()
    assert final.val_loss == [r for r in records if r["kind"] == "val"][-1]["loss"]


def test_best_is_the_lowest_validation(straight):
    best = read_checkpoint(straight.ckpt_dir / "best.pt")
    assert best.val_loss == best.run["best_val_loss"]


def test_plots_are_drawn(run, pictures):
    assert run("--max_steps", 4) == 0
    names = {p.name for p in run.graph_dir.glob("latest_*.png")}
    assert {
        f"latest_{n}.png"
        for n in (
            "loss",
            "perplexity",
            "lr",
            "tokens_per_sec",
            "tokens_seen",
            "expert_load",
            "router",
            "grad_norm",
        )
    } <= names
    assert not list(run.graph_dir.glob("step_*.png"))


def test_plots_of_each_save_are_kept_if_asked_for_and_in_the_theme(run, pictures):
    flags = ("--max_steps", 4, "--save_interval", 2, "--keep_plots", "--plot_theme", "light")
    assert run(*flags) == 0
    kept = {p.name for p in run.graph_dir.glob("step_*_loss.png")}
    assert kept == {"step_0000002_loss.png", "step_0000004_loss.png"}
    latest = run.graph_dir / "latest_loss.png"
    assert latest.read_bytes() == (run.graph_dir / "step_0000004_loss.png").read_bytes()
    records = run.records()
    draw_plots(records, run.graph_dir / "again", 4, ["loss"], theme="light")
    assert (run.graph_dir / "again" / "latest_loss.png").read_bytes() == latest.read_bytes()
    # How a run reports may change when it continues.
    assert run("--resume", "--max_steps", 6, "--no-keep_plots", fresh=False) == 0
    assert run.final().step == 6 and not (run.graph_dir / "step_0000006_loss.png").exists()


def test_a_run_with_a_name_has_its_folders_and_is_found_again(run, capsys):
    """Two runs needed two --ckpt_dir and two --graph_dir, or the plots of one were replaced."""
    for name in ("one", "two"):
        assert run("--run_name", name, "--max_steps", 4) == 0
    assert f"checkpoints in {run.ckpt_dir / 'two'}, plots in {run.graph_dir / 'two'}" in (
        capsys.readouterr().out
    )
    assert not list(run.ckpt_dir.glob("*.pt")) and not list(run.graph_dir.glob("*.json*"))
    names = sorted(path.name for path in run.ckpt_dir.iterdir())
    assert names == ["one", "two"] == sorted(path.name for path in run.graph_dir.iterdir())
    # Without the name the error says which there are; a mistake changes nothing.
    with pytest.raises(ValueError, match=r"it has the runs one, two: say --run_name"):
        run("--resume", "--max_steps", 6, fresh=False)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        run("--run_name", "one", "--max_steps", 6)
    # By its name, and by its folder, as the line at the end of a stopped run says.
    assert run("--resume", "--run_name", "one", "--max_steps", 6, fresh=False) == 0
    flags = ["--resume", "--ckpt_dir", str(run.ckpt_dir / "one"), "--max_steps", "8"]
    assert train.main(flags) == 0
    one = Run(run.folders[1], run.ckpt_dir.parent)
    one.ckpt_dir, one.graph_dir = run.ckpt_dir / "one", run.graph_dir / "one"
    assert one.final().step == 8 and one.final().train_config["run_name"] == "one"
    steps = [r["step"] for r in one.records() if r["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    # A folder that was given another name is the run's all the same.
    os.rename(run.ckpt_dir / "one", run.ckpt_dir / "first")
    assert run("--resume", "--run_name", "first", "--max_steps", 9, fresh=False) == 0


def test_log_lines_are_shown_above_the_progress_bar_too(run, monkeypatch, capsys):
    """On a terminal only the bar told the loss, so nothing of it was left to scroll back to.

    `python train.py | tee log` wrote none either: the bar follows stderr, the lines go to stdout.
    """
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run("--max_steps", 4, "--log_interval", 2) == 0
    out, err = capsys.readouterr()
    lines = re.findall(r"^step +(\d+)  loss .*  ETA \d", out, re.MULTILINE)
    assert lines == ["2", "4"] and "4/4" in err


def test_missing_matplotlib_costs_the_plots_only(run, pictures, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    assert run("--max_steps", 4, "--save_interval", 2) == 0
    assert (
        capsys.readouterr().out.count("no plots") == 1
        and not list(run.graph_dir.glob("*.png"))
        and run.final().step == 4
    )


def test_how_often_it_validates_does_not_change_training(straight, run):
    assert (
        run(
            "--max_steps",
            STEPS,
            "--dropout",
            "0.1",
            "--router_bias_rate",
            "1e-3",
            "--val_interval",
            "1",
            "--log_interval",
            "1",
            "--save_interval",
            "3",
            "--keep_last",
            "2",
        )
        == 0
    )
    assert_same(
        dataclasses.replace(run.final(), run=run.final().run | {"best_val_loss": 0}),
        dataclasses.replace(straight.final(), run=straight.final().run | {"best_val_loss": 0}),
    )
    assert len(list(run.ckpt_dir.glob("step_*.pt"))) == 2


def wait_for(condition, process, seconds: float = 120.0) -> None:
    """Poll until something has happened; a hang guard, not a timing."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


# train.py without its plots, which take twice as long as these runs.
PLAIN = """
import train
from runtime.base import cli
from runtime.training import reporter
reporter.draw_plots = lambda *_, **__: None
cli.run_main(train.main)
"""


def start(run: Run, *flags: str) -> children.Child:
    return children.start(["-c", PLAIN, *run.folders, *flags], merge=True)


def logged(run: Run) -> int:
    path = run.graph_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


LONG = [
    "--max_steps",
    "150",
    "--save_interval",
    "50",
    "--num_threads",
    "1",
    "--val_interval",
    "1000",
]


@pytest.fixture(scope="session")
def long_straight(data, tmp_path_factory) -> Run:
    run = Run(data, tmp_path_factory.mktemp("long"))
    assert run(*LONG) == 0
    return run


@pytest.mark.nightly
@pytest.mark.slow
def test_sigkill_in_the_middle_and_resume_equals_the_straight_run(long_straight, run):
    process = start(run, *MODEL, *SPEED, *LONG)
    wait_for(lambda: (run.ckpt_dir / "latest.pt").exists() and logged(run) > 30, process)
    process.kill()
    process.communicate()
    assert run.final().step in range(50, 150)
    # As a user starts it: a process of its own, with its plots.
    command = [sys.executable, str(REPO / "train.py"), *run.folders, "--resume"]
    resumed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_same(run.final(), long_straight.final())
    assert comparable(run.records()) == comparable(long_straight.records())


@pytest.mark.slow
@pytest.mark.parametrize("number", nightly_but([signal.SIGINT, signal.SIGTERM], 1))
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(long_straight, run, number):
    process = start(run, *MODEL, *SPEED, *LONG)
    wait_for(lambda: logged(run) > 10, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number and "Traceback" not in output
    assert f"continue with: python train.py --resume --ckpt_dir {run.ckpt_dir}" in output
    stopped = run.final().step
    assert f"stopped after step {stopped}," in output and 0 < stopped < 150
    resumed = start(run, "--resume")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert_same(run.final(), long_straight.final())


def test_a_damaged_latest_checkpoint_falls_back_and_says_so(run, capsys):
    assert run("--max_steps", 6, "--save_interval", 2) == 0
    whole = run.final()
    newest = run.ckpt_dir / "step_0000006.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    capsys.readouterr()
    assert run("--resume", fresh=False) == 0
    out = capsys.readouterr().out
    assert "skipped a checkpoint that cannot be read" in out and "step_0000004.pt at step 4" in out
    assert_same(run.final(), whole)


def test_float16_keeps_its_scaler_over_a_resume(run, data, tmp_path):
    """T12: and is float16 indeed; the original implementation's was float32 on a CPU."""
    flags = ["--dtype", "float16", "--max_steps", "6", "--save_interval", "3"]
    assert run(*flags) == 0
    whole = run.final()
    assert whole.run["scaler"]["scale"] > 0 and whole.train_config["dtype"] == "float16"
    plain = Run(data, tmp_path / "fp32")
    assert plain("--max_steps", "6") == 0
    assert not torch.equal(plain.final().model["embed.weight"], whole.model["embed.weight"])
    for name in ("latest.pt", "best.pt", "step_0000006.pt"):
        (run.ckpt_dir / name).unlink()
    assert run("--resume", fresh=False) == 0
    assert_same(run.final(), whole)


def test_bfloat16_is_honoured_and_remembered(run):
    assert run("--dtype", "bfloat16", "--max_steps", "4") == 0
    assert run.final().train_config["dtype"] == "bfloat16"
    assert all(t.dtype == torch.float32 for t in run.final().model.values())


@pytest.mark.slow
def test_compiled_and_plain_runs_resume_each_other(run):
    """The original implementation's compiled checkpoints did not load uncompiled (T1)."""
    assert run("--max_steps", "4", "--compile") == 0
    assert run("--resume", "--no-compile", "--max_steps", "5", fresh=False) == 0
    assert run.final().step == 5


# ----------------------------------------------------------------------------------------- refusing
def test_a_used_folder_needs_a_word(run):
    assert run("--max_steps", 4) == 0
    before = (run.ckpt_dir / "latest.pt").read_bytes()
    with pytest.raises(ValueError, match="--resume, or give this run another --ckpt_dir"):
        run("--max_steps", 4)
    assert (run.ckpt_dir / "latest.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lr", "0.5"], "--lr 0.5 differs"),
        (["--d_model", "32"], "--d_model 32 differs"),
        (["--batch_size", "4"], "--batch_size 4 differs"),
        (["--dropout", "0.3"], "--dropout 0.3 differs"),
        (["--seed", "1"], "--seed 1 differs"),
        (["--top_k", "1"], "--top_k 1 differs"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 differs"),
        (["--preset", "nano"], "leave out --preset nano"),
        (["--max_steps", "3", "--warmup_steps", "1"], "--warmup_steps 1 differs"),
        (["--init_from", "x.pt"], "not both"),
    ],
)
def test_resuming_with_other_settings_is_refused(run, flags, message):
    """T7, T10: a resume with another top_k, coefficient or dropout is rejected.

    The original implementation silently accepted it, and rewrote history below its step.
    """
    assert run("--max_steps", 4) == 0
    with pytest.raises(ValueError, match=message):
        run("--resume", *flags, fresh=False)


def test_fewer_steps_than_taken_are_refused_and_as_many_are_done(run, capsys):
    assert run("--max_steps", 8) == 0
    with pytest.raises(ValueError, match="at step 8, beyond --max_steps 5"):
        run("--resume", "--max_steps", "5", fresh=False)
    before = (run.ckpt_dir / "latest.pt").read_bytes()
    # Scripts that resume until a run is done get their 0.
    assert run("--resume", fresh=False) == 0
    assert (
        "training is already complete" in capsys.readouterr().out
        and (run.ckpt_dir / "latest.pt").read_bytes() == before
    )


def test_extending_a_run_says_what_the_learning_rate_does(run, capsys):
    assert run("--max_steps", 8) == 0
    assert run("--resume", "--max_steps", "16", fresh=False) == 0
    assert re.search(
        r"max_steps 8 -> 16: the learning rate continues at 0.00\d+ .before: 0.001",
        capsys.readouterr().out,
    )


def test_metrics_that_cannot_be_written_cost_the_metrics_only(run, monkeypatch, capsys):
    """A full disk under graph_dir ended the run before its first checkpoint was written."""

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporter.MetricsLog, "append", full)
    assert run("--max_steps", 4, "--save_interval", 2) == 0
    assert capsys.readouterr().out.count("no more metrics") == 1 and run.final().step == 4


def test_a_disk_without_room_for_one_checkpoint_is_told_at_the_start(run, monkeypatch):
    """It came at the first save, a thousand steps later."""
    monkeypatch.setattr(setup, "LLM", None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match="a checkpoint needs .* delete old checkpoints"):
        run("--max_steps", 4)


def test_a_validation_that_is_not_finite_is_not_the_best(monkeypatch):
    """NaN first: nothing is less than NaN, so best.pt stayed unchanged for the rest of the run."""
    losses, best = iter([math.nan, 3.0, 2.0, 2.5]), []
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    inputs = torch.randint(0, 61, (4, 12))
    config = TrainConfig(
        batch_size=4, grad_accum=1, max_steps=4, warmup_steps=1, save_interval=1, device="cpu"
    )
    builders_runs.fit(
        random_model(tiny_config()),
        Fixed(inputs, inputs, 4),
        config,
        val_batches=[1],
        on_save=lambda state, loss, is_best: best.append(is_best),
    )
    assert best == [False, True, True, False]


def test_one_wish_may_come_as_two_signals(monkeypatch):
    """A wrapper forwards the Ctrl-C that the terminal sent to both: the run ended at once, unsaved.

    A later one means it.
    """
    now, left = [100.0], []
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(process.os, "_exit", left.append)
    monkeypatch.setattr(process.os, "write", lambda *_: None)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested() and stop.signal == signal.SIGINT and left == []
        now[0] += 5
        signal.raise_signal(signal.SIGINT)
        assert left == [130]


def test_resume_may_repeat_the_run_s_own_flags_and_extend_it(run):
    assert run("--max_steps", 4) == 0
    assert run("--resume", "--max_steps", "6", "--lr", "1e-2", fresh=False) == 0
    assert run.final().step == 6 and run.final().train_config["max_steps"] == 6


def test_resume_with_other_text_is_refused(run, tmp_path):
    assert run("--max_steps", 4) == 0
    prepare_data.main(
        [
            "--files",
            str(write_text(tmp_path / "o.jsonl", 5)),
            "--val_ratio",
            "0.2",
            "--tokenizer",
            "byte",
            "--out_dir",
            str(tmp_path / "other"),
        ]
    )
    with pytest.raises(ValueError, match="is not the text that"):
        run("--resume", "--max_steps", "6", "--data_dir", str(tmp_path / "other"), fresh=False)


def test_nothing_to_resume(run):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        run("--resume", fresh=False)


def test_vocabulary_comes_from_the_data_unless_it_is_given(run, tmp_path, data):
    assert run("--max_steps", 4) == 0
    assert run.final().model_config.vocabulary_size == 257
    wider = Run(data, tmp_path / "wider")
    assert wider("--max_steps", 4, "--vocabulary_size", 300) == 0
    assert wider.final().model_config.vocabulary_size == 300
    with pytest.raises(ValueError, match="vocabulary_size 100 is smaller than the data's 257"):
        Run(data, tmp_path / "narrow")("--vocabulary_size", 100)


def test_a_model_beyond_the_machine_is_refused_before_it_is_made(run, monkeypatch):
    monkeypatch.setattr(setup, "LLM", None)
    with pytest.raises(
        ValueError, match="4.23 T parameters need .* choose a smaller model, e.g. --preset"
    ):
        train.main(
            [
                *run.folders,
                "--d_model",
                "65536",
                "--num_heads",
                "64",
                "--d_ff",
                "8192",
                "--transformer_blocks",
                "96",
                "--no-use_attention_bias",
            ]
        )


@pytest.mark.parametrize("where", ["dry run", "step"])
def test_out_of_memory_is_one_line_that_says_what_to_lower(run, monkeypatch, where):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if where == "dry run" or len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return model(*batch)

    monkeypatch.setattr(train, "next_token_loss", loss)
    with pytest.raises(ValueError, match="out of memory on cpu.*lower --batch_size .now 2"):
        run("--max_steps", 4)


@pytest.mark.parametrize("grad_accum, world", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_the_dry_run_changes_nothing(data, grad_accum, world):
    """It always met gradients with its second micro-batch.

    On a GPU that asked for 13 GiB more than any step of 16 x 1 sequences, and the run ended before
    step 1 on a card that it fits. Of two ranks that share two micro-batches, each has one.
    """
    _train, _ = open_data(data)
    ranks = Ranks()
    ranks.world = world
    model = random_model(tiny_config(vocabulary_size=257, context_length=16))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    config = TrainConfig(batch_size=2, grad_accum=grad_accum, device="cpu", dtype="float32")
    optimizer = train.build_optimizer(model, config)
    task = Pretraining(_train, _train, train.next_token_loss)
    plan = TrainPlan(model.config, config, torch.device("cpu"), torch.float32, task, None, [])
    plan = dataclasses.replace(plan, ranks=ranks)
    modes = []
    model.layers[0].register_forward_hook(
        lambda module, *_: modes.append((module.training, module.norm1.weight.grad is not None))
    )
    assert dry_run(model.eval(), optimizer, plan, train.forward_backward) > 0
    # As in a step: training mode, and the second meets the first one's gradients where a step has
    # two.
    assert modes == [(True, False), (True, grad_accum > world)]
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items()) and all(
        p.grad is None for p in model.parameters()
    )
    assert all(s["step"] == 0 for s in optimizer.state.values()) and len(optimizer.state) == len(
        list(model.parameters())
    )


def test_what_is_printed_before_step_1(data, capsys):
    """The default says what half of it is; tokens and epochs are computed."""
    plan = make_plan(
        cli.settings_from(
            parsed("--data_dir", str(data), "--device", "cpu", "--vocabulary_size", "200019"),
            ModelConfig,
            TrainConfig,
        ),
        train.pretraining,
    )
    lines = "\n".join(describe(plan, training_memory_bytes(plan.model_config, plan.config)))
    assert (
        "3.66 B parameters, 542 M active per token (2.05 B + 1.61 B learned attention "
        "bias; see --preset gptoss-modern)" in lines
    )
    assert (
        "50,000 steps of 2 x 8 sequences x 2048 = 32,768 tokens: 1.64 B tokens" in lines
        and "float32" in lines
    )


# ---------------------------------------------------------------------------------------- init_from
def test_a_new_run_from_old_weights(run, data, tmp_path):
    assert run("--max_steps", 4) == 0
    new = Run(data, tmp_path / "new")
    assert (
        new(
            *SPEED,
            "--init_from",
            str(run.ckpt_dir / "latest.pt"),
            "--max_steps",
            "4",
            "--dropout",
            "0.1",
            "--lr",
            "1e-9",
            "--min_lr",
            "0",
            "--weight_decay",
            "0",
            fresh=False,
        )
        == 0
    )
    start, end = run.final(), new.final()
    assert end.step == 4 and end.model_config.dropout == 0.1 and end.model_config.d_model == 16
    assert all(torch.allclose(start.model[n], end.model[n], atol=1e-6) for n in start.model)
    biased = Run(data, tmp_path / "biased")
    assert (
        biased(
            *SPEED,
            "--init_from",
            str(run.ckpt_dir / "latest.pt"),
            "--max_steps",
            "4",
            "--router_bias_rate",
            "1e-3",
            fresh=False,
        )
        == 0
    )
    # A raw RuntimeError once, in both directions.
    assert "layers.0.moe.router.selection_bias" in biased.final().model
    plain = Run(data, tmp_path / "plain")
    assert (
        plain(
            *SPEED,
            "--init_from",
            str(biased.ckpt_dir / "latest.pt"),
            "--max_steps",
            "4",
            "--router_bias_rate",
            "0",
            fresh=False,
        )
        == 0
    )
    assert "layers.0.moe.router.selection_bias" not in plain.final().model
    with pytest.raises(ValueError, match="--d_ff does not fit the weights"):
        Run(data, tmp_path / "wrong")(
            "--init_from", str(run.ckpt_dir / "latest.pt"), "--d_ff", "24", fresh=False
        )


@pytest.mark.parametrize("name", ["bias_gqa", "nobias_qkvbias"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_training_goes_on_from_the_reference_s_checkpoints(
    shared_dir, data, tmp_path, name, prefix
):
    """Directly, compiled or not: the first step's loss is that of the converted weights."""
    path = shared_dir / "upstream" / f"{name}.pt"
    if prefix:
        content = torch.load(path, weights_only=True)
        content["model"] = {prefix + key: value for key, value in content["model"].items()}
        path = tmp_path / "prefixed.pt"
        torch.save(content, path)
    run = Run(data, tmp_path / "run")
    assert (
        run(
            *SPEED,
            "--init_from",
            str(path),
            "--max_steps",
            "4",
            "--log_interval",
            "1",
            "--dropout",
            "0",
            "--lr",
            "1e-9",
            "--min_lr",
            "0",
            fresh=False,
        )
        == 0
    )
    model, _ = load_model(path)
    train_shards, _ = open_data(data)
    batches = [
        WindowLoader(train_shards, model.config.context_length, 2, 42).batch(i) for i in (0, 2)
    ]
    assert_close(
        run.records()[0]["loss"],
        train.evaluate(model, batches),
        logits_bound(model.config, model.config.context_length),
    )


def test_the_reference_s_runs_cannot_be_resumed(shared_dir, data, tmp_path):
    (tmp_path / "latest.pt").write_bytes((shared_dir / "upstream" / "bias_gqa.pt").read_bytes())
    with pytest.raises(ValueError, match="--init_from"):
        train.main(["--resume", "--ckpt_dir", str(tmp_path), "--data_dir", str(data)])


# ---------------------------------------------------------------------------------------- real text
@pytest.mark.slow
def test_it_learns_real_text(shared_dir, tmp_path):
    """250 steps on TinyStories: far below guessing, and below the frequency of single tokens."""
    stories = [
        json.loads(line)["text"]
        for line in (shared_dir / "tinystories" / "train.jsonl").read_text().splitlines()[:1500]
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in stories))
    prepare_data.main(
        [
            "--files",
            str(tmp_path / "t.jsonl"),
            "--val_ratio",
            "0.05",
            "--tokenizer",
            "bpe:512",
            "--out_dir",
            str(tmp_path / "set"),
        ]
    )
    run = Run(tmp_path / "set", tmp_path)
    assert (
        run(
            "--preset",
            "nano",
            "--d_model",
            "64",
            "--transformer_blocks",
            "2",
            "--context_length",
            "64",
            "--num_experts",
            "4",
            "--d_ff",
            "64",
            "--max_steps",
            "250",
            "--batch_size",
            "16",
            "--warmup_steps",
            "20",
            "--val_interval",
            "125",
            "--lr",
            "1e-2",
            "--device",
            "cpu",
            fresh=False,
        )
        == 0
    )
    val = [r["loss"] for r in run.records() if r["kind"] == "val"]
    shards, _ = open_data(tmp_path / "set")
    counts = np.bincount(shards.read(0, shards.num_tokens), minlength=512) / shards.num_tokens
    unigram = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    assert val[-1] < val[0] < math.log(512) and val[-1] < unigram - 0.5
    assert total_parameters(run.final().model_config) == sum(
        p.numel() for p in LLM(run.final().model_config).parameters()
    )


def test_document_mask_reaches_training_and_validation(data, tmp_path):
    records = []
    for i, flags in enumerate(([], ["--document_mask"])):
        one = Run(data, tmp_path / str(i))
        # Documents have about 70 bytes.
        assert one("--max_steps", "4", "--context_length", "128", *flags) == 0
        records.append(comparable(one.records()))
    assert {r["kind"] for r in records[0]} == {"train", "val"}
    assert all(a["loss"] != b["loss"] for a, b in zip(*records, strict=True))


@pytest.mark.parametrize("room_for, expected", [(8, (8, 1)), (4, (4, 2)), (2, (2, 4)), (0, None)])
def test_largest_micro_batch_keeps_the_sequences_per_step(
    run, data, monkeypatch, capsys, room_for, expected
):
    """On a CPU the estimate chooses what fits, and the effective batch stays.

    The checkpoint stores the numbers, not "auto".
    """
    plan = make_plan(
        settings_of(
            *MODEL,
            *SPEED,
            "--data_dir",
            str(data),
            "--batch_size",
            str(room_for or 1),
            "--grad_accum",
            "1" if room_for == 8 else "2",
        ),
        train.pretraining,
    )
    needed = check_memory(plan)
    free = (sum(needed.values()) - needed["program"]) / 0.8 + (1 if room_for else -1)
    monkeypatch.setattr(plan_module, "memory_bytes", lambda device: (free, 1 << 40))
    flags = [
        "--batch_size",
        "1",
        "--grad_accum",
        "8",
        "--micro_batch",
        "auto",
        "--max_steps",
        "2",
        "--warmup_steps",
        "1",
    ]
    if expected is None:
        with pytest.raises(ValueError, match="not even one sequence"):
            run(*flags)
        return
    assert run(*flags) == 0
    saved = run.final().train_config
    assert (saved["batch_size"], saved["grad_accum"], saved["micro_batch"]) == (
        *expected,
        "batch_size",
    )
    assert (
        f"micro-batch {expected[0]} x {expected[1]} is the largest that fits"
        in capsys.readouterr().out
    )
    assert run.final().run["samples_seen"] == 16


def runs(plan) -> bool:
    """Try a plan as train.run does."""
    return setup.runs(plan, train.forward_backward)


def _on_a_gpu(monkeypatch, set_up, free: int) -> None:
    """train.py's questions about a GPU with so many bytes free, answered without one."""
    answers = {
        "set_up": set_up,
        "memory_bytes": lambda device: (free, free),
        "has_room": lambda device: True,
        "release_memory": lambda device: None,
        "device_name": lambda device: "a GPU",
    }
    for name, value in answers.items():
        users = [module for module in (plan_module, setup) if hasattr(module, name)]
        assert users, f"nobody asks {name}"
        for module in users:
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(
    "preset, sequences, found", [("gptoss-modern", 64, 16), ("gptoss", 16, 16)]
)
def test_a_gpu_of_80_gb_is_tried_once_and_uncompiled(data, monkeypatch, preset, sequences, found):
    """Each try of a compiled model took a minute.

    What the estimate called too large was tried, up to 1.25 times of what was free: 32 sequences of
    the modern preset need 94 GiB.
    """
    flags = [
        "--batch_size",
        str(sequences),
        "--grad_accum",
        "1",
        "--micro_batch",
        "auto",
        "--compile",
    ]
    plan = make_plan(
        settings_of(
            "--preset", preset, "--data_dir", str(data), "--vocabulary_size", "200019", *flags
        ),
        train.pretraining,
    )
    plan, tried = dataclasses.replace(plan, device=torch.device("cuda"), dtype=torch.bfloat16), []
    _on_a_gpu(
        monkeypatch,
        lambda plan, _: tried.append((plan.config.batch_size, plan.config.compile)),
        79 << 30,
    )
    config = with_largest_micro_batch(plan, runs).config
    assert tried == [(found, False)] and config.compile
    assert (config.batch_size, config.grad_accum) == (found, sequences // found)


@pytest.mark.parametrize("free_gib, expected", [(60, 2048), (79, 4096), (139, 8192)])
def test_a_gpu_with_room_holds_more_rows_of_logits(data, monkeypatch, free_gib, expected):
    """Each chunk of 2,048 rows is a pass over the head's gradient.

    26 ms a step of 32,768 tokens, where 8,192 rows take 16. The announced estimate counts them; a
    run that must repeat its bits does not ask what is free.
    """
    plan = make_plan(
        settings_of(
            "--preset",
            "gptoss-modern",
            "--data_dir",
            str(data),
            "--vocabulary_size",
            "200019",
            "--batch_size",
            "16",
        ),
        train.pretraining,
    )
    plan = dataclasses.replace(plan, device=torch.device("cuda"), dtype=torch.bfloat16)
    _on_a_gpu(monkeypatch, None, free_gib << 30)
    chosen = with_loss_rows(plan)
    assert chosen.loss_rows == expected
    more = sum(check_memory(chosen).values()) - sum(check_memory(plan).values())
    assert more == 6 * (expected - 2048) * 200_019
    same_bits = dataclasses.replace(
        plan, config=dataclasses.replace(plan.config, deterministic=True)
    )
    assert with_loss_rows(same_bits).loss_rows == 0


def test_the_rows_of_a_plan_reach_the_model(data):
    plan = make_plan(settings_of(*MODEL, *SPEED, "--data_dir", str(data)), train.pretraining)
    assert (
        setup.set_up(dataclasses.replace(plan, loss_rows=7), train.forward_backward)[0].loss_rows
        == 7
    )


def test_announced_and_measured_peak_stand_in_one_line(run, capsys):
    assert run("--max_steps", 4) == 0
    out = capsys.readouterr().out
    announced = re.search(r"memory   about ([\d.]+ \w+) ", out)[1]
    line = re.search(
        r"memory   peak [\d.]+ \w+ measured, ([\d.]+ \w+) announced .the whole process.\n", out
    )
    assert line[1] == announced


def test_on_a_gpu_the_largest_micro_batch_is_found_by_trying(data, monkeypatch):
    """Trials that run out of memory (at 8 and 4 sequences here) are skipped.

    Other faults are raised.
    """
    plan = make_plan(
        settings_of(
            *MODEL,
            *SPEED,
            "--data_dir",
            str(data),
            "--batch_size",
            "8",
            "--grad_accum",
            "1",
            "--micro_batch",
            "auto",
        ),
        train.pretraining,
    )
    plan, tried = dataclasses.replace(plan, device=torch.device("cuda")), []

    def set_up(plan, forward_backward):
        tried.append(plan.config.batch_size)
        if plan.config.batch_size > 2:
            raise ValueError("out of memory on it: lower") from torch.OutOfMemoryError(
                "CUDA out of memory"
            )
        if plan.config.seed:
            return
        raise ValueError("another fault")

    _on_a_gpu(monkeypatch, set_up, 1 << 40)
    found = with_largest_micro_batch(plan, runs)
    assert tried == [8, 4, 2] and (found.config.batch_size, found.config.grad_accum) == (2, 4)
    assert found.config.val_steps * 2 == plan.config.val_steps * 8, (
        "as many windows of validation as were asked for"
    )
    with pytest.raises(ValueError, match="another fault"):
        with_largest_micro_batch(
            dataclasses.replace(plan, config=dataclasses.replace(plan.config, seed=0)), runs
        )


def test_profile_writes_a_trace_of_three_steps(run, data, tmp_path, capsys):
    assert run("--max_steps", "10", "--profile") == 0
    events = json.loads((run.graph_dir / "trace.json").read_text())["traceEvents"]
    assert (
        sum(
            e.get("name", "").startswith("ProfilerStep#") and e.get("cat") == "user_annotation"
            for e in events
        )
        == 3
    )
    # In C, or without a compiler in Python.
    operations = (run.graph_dir / "trace.txt").read_text()
    assert "_RoutedExperts" in operations or "gptoss::feed_forward" in operations
    assert "profile  of steps 7 to 9" in capsys.readouterr().out
    metrics = (run.graph_dir / "metrics.jsonl").read_bytes()
    short = Run(data, tmp_path / "short")
    short.folders[-1] = str(run.graph_dir)
    with pytest.raises(ValueError, match="--profile needs 9 steps"):
        short("--max_steps", "8", "--profile")
    assert (run.graph_dir / "metrics.jsonl").read_bytes() == metrics, (
        "refused before another run's metrics are put aside"
    )


def test_profile_is_not_a_wish_for_the_rest_of_the_run(run, capsys):
    """--profile was stored with the run, so such a run could not be resumed for its last steps.

    Other resumes wrote the trace again.
    """
    assert run("--max_steps", "10", "--profile") == 0
    assert run("--resume", "--max_steps", "12", fresh=False) == 0
    assert run.final().step == 12 and capsys.readouterr().out.count("profile  of steps") == 1


def test_sums_of_a_log_window_survive_a_resume_to_the_last_bit():
    """They came back as float32: losses logged after a resume inside an interval differed."""
    state, cpu = RunState(), torch.device("cpu")
    totals = Totals(state, cpu)
    names = ("cross_entropy", "targets", "steps", "aux_loss", "z_loss", "entropy")
    for i in range(7):
        sums = {name: torch.rand(()) for name in names} | {"expert_load": torch.rand(2, 4)}
        totals.add(sums, torch.rand(()), torch.tensor(False))
        totals.add_on_host(tokens=64, seconds=0.1, waiting_seconds=0.01)
        assert i or totals.flat.dtype == torch.float64
    totals.wait()
    totals.store(state)
    again = Totals(RunState(**json.loads(json.dumps(dataclasses.asdict(state)))), cpu)
    assert torch.equal(again.flat, totals.flat) and again.shapes == totals.shapes
    assert again.host == totals.host
    again.add(sums, torch.rand(()), torch.tensor(True))
    assert torch.equal(again.flat, totals.flat), "a skipped step adds nothing"


def test_sums_that_an_older_version_saved_by_position_are_read():
    """The first versions saved five losses and a row per block: a run of theirs resumes."""
    old = {
        "tokens": 64,
        "seconds": 0.5,
        "waiting_seconds": 0.1,
        "losses": [10.0, 5.0, 2.0, 0.5, 0.25],
        "router": [[1.0, 3.0, 0.5, 0.0], [2.0, 2.0, 0.75, 0.5]],
    }
    state = RunState(window=old)
    totals = Totals(state, torch.device("cpu"))
    totals.wait()
    totals.store(state)
    record = train_record(state, 0.1, 0.0)
    assert record["loss"] == 2.0 and record["aux_loss"] == 0.25 and record["z_loss"] == 0.125
    assert record["expert_load"] == [[0.5, 1.5], [1.0, 1.0]]
    assert record["router_entropy"] == [0.25, 0.375] and record["dropped_share"] == [0.0, 0.25]
    assert record["tokens_per_sec"] == 128


@pytest.mark.parametrize("device, expected", [("cuda", True), ("mps", False), ("cpu", False)])
def test_only_cuda_reads_a_batch_while_the_host_goes_on(device, expected):
    """MPS read a batch's memory after it was freed (PyTorch issue 139550).

    Wrong ids, and no error.
    """
    asked = []

    class Ids:
        def to(self, device, non_blocking):
            asked.append(non_blocking)

    to_device((Ids(), Ids()), torch.device(device))
    assert asked == [expected] * 2


def test_mps_skips_a_bad_step_under_loss_scaling_too():
    """Its fused kernel ignores found_inf: the first float16 overflow made all weights NaN."""

    class OnMPS(torch.Tensor):
        device = property(lambda self: torch.device("mps"))

    class Deaf(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, *_):
            steps.append(1)

    steps, weight = [], torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = Deaf([weight], lr=1.0), torch.amp.GradScaler("cpu")
    for gradient, expected in ((math.inf, 0), (1.0, 1)):
        scaler.scale(torch.ones(()))
        weight.grad = torch.full((2,), gradient)
        with mock.patch(
            "train.total_norm",
            lambda gradients, ranks: torch.stack(gradients).norm().as_subclass(OnMPS),
        ):
            train._update(optimizer, scaler, [weight], torch.ones(()), 0.0)
        assert len(steps) == expected


def test_fit_refuses_an_optimizer_that_cannot_skip(data):
    model = random_model(tiny_config())
    with pytest.raises(
        ValueError, match="fit cannot tell SGD to skip a step .* make it with fused=True"
    ):
        builders_runs.fit(
            model,
            None,
            TrainConfig(max_steps=1, warmup_steps=0),
            optimizer=torch.optim.SGD(model.parameters()),
        )


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "muon"}, {"optimizer": "muon", "state_dtype": "bfloat16"}]
)
def test_size_of_a_checkpoint_is_that_of_its_tensors(changes):
    """The disk check asked for 12 bytes a parameter, whatever the optimizer keeps.

    Muon with bfloat16 moments was denied room that it does not need.
    """
    config, train_config = tiny_config(), TrainConfig(**changes)
    model = LLM(config)
    optimizer = build_optimizer(model, train_config)
    initialise_state(optimizer)
    moments = sum(
        t.nbytes
        for state in optimizer.state.values()
        for name, t in state.items()
        if name != "step"
    )
    assert checkpoint_bytes(training_memory_bytes(config, train_config)) == moments + sum(
        p.nbytes for p in model.parameters()
    )


def test_activation_checkpointing_changes_no_bit_of_a_run(straight, run):
    assert (
        run(
            "--max_steps",
            STEPS,
            "--dropout",
            "0.1",
            "--router_bias_rate",
            "1e-3",
            "--activation_checkpointing",
        )
        == 0
    )
    assert_same(run.final(), straight.final())


def test_deterministic_asks_pytorch_for_it(run):
    try:
        assert run("--max_steps", "4", "--deterministic") == 0
        assert (
            torch.are_deterministic_algorithms_enabled()
            and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "muon"],
        ["--state_dtype", "bfloat16"],
        ["--optimizer", "muon", "--state_dtype", "bfloat16"],
    ],
)
def test_every_optimizer_resumes_bit_for_bit(run, data, tmp_path, flags):
    """Its state is in the checkpoint, in its own dtypes; a step after a resume is the step due."""
    assert run("--max_steps", "6", *flags) == 0
    other = Run(data, tmp_path / "other")
    assert other("--max_steps", "6", *flags, "--save_interval", "3", "--keep_last", "0") == 0
    for path in other.ckpt_dir.glob("*"):
        if "0003" not in path.name:
            path.unlink()
    assert other("--resume", fresh=False) == 0
    assert_same(run.final(), other.final())
    assert any(t.dtype == torch.bfloat16 for t in run.final().optimizer.values()) == (
        "bfloat16" in flags
    )
    assert any(name.startswith("momentum.") for name in run.final().optimizer) == ("muon" in flags)


def test_starved_and_crowded_experts_are_told_once_each_way(capsys):
    """After the warm-up no expert should get under 25 or over 400 % of its fair share.

    Until now only the plot showed it.
    """
    reporter = Reporter.__new__(Reporter)
    reporter.healthy, reporter.say, reporter.diary = True, print, Diary(None, "", print)
    for step, loads in (
        (1, [[1.0, 1.0]]),
        (2, [[0.2, 1.8], [1.0, 1.0]]),
        (3, [[0.1, 1.9], [1.0, 1.0]]),
        (4, [[1.1, 0.9], [1.0, 1.0]]),
        (5, [[0.3, 4.5]]),
    ):
        reporter._watch_experts({"step": step, "expert_load": loads})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert (
        "step       2" in lines[0]
        and "1 of 4 experts" in lines[0]
        and "expert 0 of block 0 20 %" in lines[0]
        and "--aux_loss_coef" in lines[0]
    )
    assert "step       4" in lines[1] and "back" in lines[1]
    assert "step       5" in lines[2] and "expert 1 of block 0 450 %" in lines[2]


def test_the_threads_that_are_printed_are_those_asked_for(run, capsys):
    """The device line came before --num_threads was obeyed: it said 2 threads for a run with 1."""
    before = torch.get_num_threads()
    try:
        assert run("--max_steps", "4", "--num_threads", "2") == 0
    finally:
        torch.set_num_threads(before)
    assert "cpu (2 threads)" in capsys.readouterr().out
