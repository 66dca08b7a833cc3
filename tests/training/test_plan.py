"""Settings that follow one another, epochs, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal

import pytest
import torch

import predict
import train
from config_model import PRESETS, ModelConfig, TrainConfig
from runtime.base import cli
from runtime.base.following import follow
from runtime.base.process import StopRequest
from runtime.base.ranks import Ranks, sharding_ranks
from runtime.base.text import human_bytes
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.data.shards import open_data
from runtime.training import plan as plan_module
from runtime.training.plan import describe, initial_state, make_plan
from runtime.training.task import Task
from runtime.training.traffic import step_collectives
from tests.builders_checkpoint import forge
from tests.builders_runs import MODEL, SPEED, Run, assert_same, parsed, settings_of

# So that a step is a sum over its tokens, however they are cut.
UNCUT = ["--aux_loss_coef", "0"]


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere):
    """Plans have the default folders."""


@pytest.fixture
def run(data, tmp_path) -> Run:
    return Run(data, tmp_path)


def planned(data, *flags):
    return make_plan(settings_of("--data_dir", str(data), *map(str, flags)), train.pretraining)


def said(plan) -> str:
    return "\n".join(plan.notes + describe(plan, plan_module.check_memory(plan)))


# ------------------------------------------------------------------------------------- many ranks
class EightRanks(Ranks):
    """One of eight, that needs nothing of the others to plan."""

    world = local_world = 8

    def arrange(self, expert_parallel: int, shard: str, num_experts: int, *_) -> None:
        sharding_ranks(self.world, self.local_world, expert_parallel, shard, num_experts)


def planned_for_ranks(data, *flags):
    settings = settings_of("--data_dir", str(data), "--device", "cpu", *map(str, flags))
    return make_plan(settings, train.pretraining, ranks=EightRanks())


@pytest.mark.parametrize("shared", [1, 4])
def test_a_run_on_ranks_announces_the_memory_of_one_and_the_disk_of_all(data, shared):
    """A rank was said to hold the whole model, and eight of them did not fit one machine.

    A checkpoint has what all hold.
    """
    flags = ("--preset", "nano", "--grad_accum", 8, "--batch_size", 2)
    many = planned_for_ranks(data, *flags, "--expert_parallel", shared)
    one = planned(data, *flags, "--device", "cpu")
    ours, whole = plan_module.check_memory(many), plan_module.check_memory(one)
    state = whole["optimizer state"]
    assert state / 8 <= ours["optimizer state"] < state / 7
    assert ours["gathered"] > 0 == whole["gathered"]
    assert plan_module.saved_bytes(many) == whole["weights"] + state
    lines = said(many)
    assert f"{human_bytes(sum(ours.values()))} on each rank" in lines
    experts = "; 4 share the experts" if shared == 4 else ""
    assert f"ranks    8 on one node, weights sharded over 8{experts}; each takes 1 of 8" in lines
    sent = [c.sent_bytes[0] for c in step_collectives(*_priced(many))]
    assert f"sends {human_bytes(sum(sent))} a step in its node" in lines
    assert "ranks    " not in said(one) and "on each rank" not in said(one)


def _priced(plan) -> tuple:
    placement = plan_module.placement_of(plan)
    return plan.model_config, plan.config, placement, plan.dtype.itemsize


def test_ranks_on_a_machine_share_its_memory(data, monkeypatch):
    """Each rank fitted the machine, and all of them together did not."""
    plan = planned_for_ranks(data, "--preset", "nano", "--grad_accum", 8)
    needed = plan_module.check_memory(plan)
    fixed = 2 * needed["weights"] + needed["optimizer state"]
    for total in (8 * fixed, 8 * fixed - 1):
        monkeypatch.setattr(plan_module, "memory_bytes", lambda device, all=total: (all, all))
        if total == 8 * fixed:
            plan_module.check_memory(plan)
        else:
            with pytest.raises(ValueError, match="on each of 8 ranks, and cpu"):
                plan_module.check_memory(plan)


# ----------------------------------------------------------------------------- values that follow
@pytest.mark.parametrize(
    "flags, expected, lines",
    [
        (["--max_steps", "10"], {"warmup_steps": 1}, ["warmup_steps 1,000 -> 1, a tenth of"]),
        (["--max_steps", "1000"], {"warmup_steps": 100}, ["warmup_steps 1,000 -> 100, a tenth"]),
        (["--max_steps", "1001"], {"warmup_steps": 1000}, []),
        (["--max_steps", "1"], {"warmup_steps": 0}, ["warmup_steps 1,000 -> 0"]),
        (["--lr", "1e-5"], {"min_lr": 1e-6}, ["min_lr 3e-05 -> 1e-06, a tenth of lr 1e-05"]),
        (["--lr", "3e-5"], {"min_lr": 3e-5}, []),
        (["--lr", "1"], {"min_lr": 3e-5, "warmup_steps": 1000}, []),
        (
            ["--preset", "nano", "--max_steps", "50", "--lr", "1e-5"],
            {"min_lr": 1e-6, "warmup_steps": 5},
            ["min_lr 0.0001 -> 1e-06", "warmup_steps 50 -> 5"],
        ),
        (["--preset", "nano", "--max_steps", "51"], {"warmup_steps": 50}, []),
        # A constant schedule would otherwise end within its warm-up.
        (
            ["--schedule", "constant", "--max_steps", "500"],
            {"warmup_steps": 50},
            ["warmup_steps 1,000 -> 50"],
        ),
    ],
)
def test_what_was_not_given_follows_what_was(flags, expected, lines):
    """`--max_steps 10` alone was an error about a warm-up of 1000 steps that nobody had given.

    So was `--lr 1e-5` alone. Where a default or a preset's value fits, it stays.
    """
    settings = settings_of(*flags)
    config = dataclasses.asdict(settings.build(TrainConfig))
    assert {name: config[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert len(settings.notes) == len(lines)
    assert all(note.startswith(line) for note, line in zip(settings.notes, lines, strict=True))


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_without_flags_the_published_numbers_stay(preset):
    settings = settings_of(*(["--preset", preset] if preset else []))
    assert settings.notes == ()
    own = PRESETS[preset].train if preset else {}
    assert settings.build(TrainConfig) == TrainConfig(**own)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_steps", "10", "--warmup_steps", "10"], "warmup_steps 10 must be less than"),
        (["--preset", "nano", "--warmup_steps", "1000"], "warmup_steps 1000 must be less than"),
        (["--lr", "1e-5", "--min_lr", "2e-5"], "min_lr 2e-05 must not exceed lr 1e-05"),
        (["--min_lr", "1"], "min_lr 1.0 must not exceed lr"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--max_steps", "-5"], "max_steps must be at least 1"),
    ],
)
def test_a_given_value_that_does_not_fit_is_still_an_error(flags, message):
    with pytest.raises(ValueError, match=message):
        settings_of(*flags).build(TrainConfig)


@pytest.mark.parametrize("line", ['lr = "fast"', "max_steps = true", "warmup_steps = [1]"])
def test_a_file_s_value_of_another_type_is_named_as_before(tmp_path, line):
    (tmp_path / "run.toml").write_text(line)
    settings = cli.settings_from(
        parsed("--config", str(tmp_path / "run.toml")), ModelConfig, TrainConfig
    )
    with pytest.raises(ValueError, match=f"{line.split()[0]} must be of type"):
        settings.build(TrainConfig)


def test_following_changes_nothing_that_fits():
    values = {"lr": 1e-3, "min_lr": 1e-3, "max_steps": 7, "warmup_steps": 6, "d_model": 8}
    assert follow(values, ()) == (values, ())


def test_a_short_run_says_what_followed_and_a_resume_keeps_it(run, capsys):
    flags = [flag for flag in SPEED if flag not in ("--warmup_steps", "3")]
    assert train.main([*MODEL, *flags, *run.folders, "--max_steps", "20"]) == 0
    assert "warmup_steps 1,000 -> 2, a tenth of max_steps 20" in capsys.readouterr().out
    assert run("--resume", "--max_steps", 30, fresh=False) == 0
    saved = run.final().train_config
    assert (saved["max_steps"], saved["warmup_steps"]) == (30, 2)
    assert "warmup_steps" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- epochs
def test_epochs_become_steps_that_see_every_window(data):
    """`--epochs 2` sees each window twice, and the last step's rest; the steps are stored."""
    plan = planned(data, *MODEL, *SPEED, "--epochs", 2)
    windows = plan.task.samples_per_epoch(plan.model_config)
    assert windows == -(-(open_data(data)[0].num_tokens - 1) // 16)
    steps = -(-2 * windows // 4)
    assert (plan.config.max_steps, plan.config.epochs) == (steps, 0.0)
    assert f"epochs 2 of {windows:,} sequences: max_steps {steps:,}" in plan.notes
    loader = plan.task.loader(plan.model_config, plan.config)
    seen = [loader.window(sample) for sample in range(4 * steps)]
    assert all(seen.count(window) >= 2 for window in range(windows))
    assert 4 * (steps - 1) < 2 * windows


@pytest.mark.parametrize("epochs, windows, steps", [(1.1, 40, 11), (0.01, 40, 1), (3, 41, 31)])
def test_epochs_are_rounded_up_to_whole_steps(data, monkeypatch, epochs, windows, steps):
    monkeypatch.setattr(train.Pretraining, "samples_per_epoch", lambda *_: windows)
    plan = planned(data, *MODEL, *SPEED, "--warmup_steps", 0, "--epochs", epochs)
    assert plan.config.max_steps == steps


def test_the_warm_up_follows_epochs_only_after_the_data_is_open(data):
    """The steps of `--epochs` are not known when the flags are read.

    An explicit warm-up above a preset's steps is fine if the epochs are longer.
    """
    own = ["--data_dir", data, "--batch_size", 1, "--grad_accum", 1, *MODEL]
    plan = planned(data, "--preset", "nano", *own[2:], "--warmup_steps", 1_500, "--epochs", 9)
    assert plan.config.max_steps > 1_500 == plan.config.warmup_steps
    plan = planned(data, *own[2:], "--epochs", 0.1)
    assert plan.config.warmup_steps == plan.config.max_steps // 10
    assert sum("warmup_steps 1,000 ->" in note for note in plan.notes) == 1
    with pytest.raises(ValueError, match="warmup_steps 1500 must be less than max_steps"):
        planned(data, *own[2:], "--warmup_steps", 1_500, "--epochs", 0.1)


def test_epochs_and_steps_exclude_each_other(data):
    with pytest.raises(ValueError, match="either --epochs or --max_steps, not both"):
        planned(data, *MODEL, "--epochs", 2, "--max_steps", 20)


def test_epochs_of_a_task_without_an_end_are_refused():
    class Endless(Task):
        vocabulary_size = 257

    with pytest.raises(ValueError, match="the data has no end, so give --max_steps"):
        make_plan(settings_of(*MODEL, "--epochs", "2"), lambda config, source: Endless())


def test_a_run_may_be_extended_by_epochs_and_not_cut_short(run):
    assert run("--max_steps", 5) == 0
    with pytest.raises(ValueError, match=r"at step 5, beyond --max_steps 1\b"):
        run("--resume", "--epochs", "0.001", fresh=False)
    assert run("--resume", "--epochs", "0.1", fresh=False) == 0
    saved = run.final()
    assert saved.train_config["epochs"] == 0 and saved.step == saved.train_config["max_steps"] > 5


def test_more_than_ten_epochs_are_said_with_what_to_type(data):
    """The default of 50,000 steps on a small file was thousands of epochs, without a word."""
    few = planned(data, *MODEL, *SPEED, "--epochs", 9)
    assert "note " not in said(few)
    many = planned(data, *MODEL, *SPEED, "--epochs", 11)
    assert "note     more than 10 epochs teach little new" in said(many)
    assert "take --epochs 10" in said(many)


def test_an_embedding_that_is_most_of_the_model_is_said(data):
    """nano on o200k_base has 29 M parameters, 25.6 M of them the embedding."""
    large = planned(data, "--preset", "nano", "--vocabulary_size", 200_019)
    assert re.search(
        r"note     25.6 M of 29 M parameters are the embedding of 200,019 ids: .*prepare the "
        r"text with --tokenizer bpe:4096",
        said(large),
    )
    assert "embedding of" not in said(planned(data, "--preset", "nano"))


def test_a_trace_into_a_folder_that_is_not_utf8_is_refused_at_the_start(data, tmp_path):
    """PyTorch's profiler raised a TypeError about it after the steps it had recorded."""
    graphs = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match="UTF-8 paths alone, .*: give another --graph_dir"):
        planned(data, *MODEL, *SPEED, "--max_steps", 20, "--profile", "--graph_dir", graphs)


# --------------------------------------------------------------------- the same sequences, cut anew
def stopped_after(monkeypatch, steps: int):
    """Ask a run to stop after some steps, as a signal does."""
    calls = []

    def requested(self):
        calls.append(1)
        if len(calls) == steps:
            self.signal = signal.SIGTERM
        return self.signal is not None

    monkeypatch.setattr(StopRequest, "requested", requested)


def recorded(monkeypatch) -> list[torch.Tensor]:
    """Return a list that will hold the tokens of each step, in the order of reading."""
    steps: list[torch.Tensor] = []
    real = train.train_step

    def train_step(model, task, batches, *args, **settings):
        steps.append(torch.cat([torch.stack(batch, dim=1) for batch in batches]))
        return real(model, task, batches, *args, **settings)

    monkeypatch.setattr(train, "train_step", train_step)
    return steps


@pytest.mark.parametrize("cut", [(1, 4), (4, 1)])
def test_a_resume_may_cut_its_sequences_otherwise(data, tmp_path, monkeypatch, capsys, cut):
    """A run of 4 x 2 sequences a step could not continue on a smaller device as 2 x 4.

    The tokens of each step are the same, bit for bit; without the balance loss, weights and losses
    differ by rounding alone.
    """
    straight, other = Run(data, tmp_path / "a"), Run(data, tmp_path / "b")
    with monkeypatch.context() as patch:
        whole = recorded(patch)
        assert straight("--max_steps", 8, *UNCUT) == 0
    with monkeypatch.context() as patch:
        steps = recorded(patch)
        with patch.context() as inner:
            stopped_after(inner, 4)
            assert other("--max_steps", 8, *UNCUT) == 128 + signal.SIGTERM
        capsys.readouterr()
        flags = ["--batch_size", cut[0], "--grad_accum", cut[1]]
        assert other("--resume", *flags, fresh=False) == 0
    output = capsys.readouterr().out
    assert f"batch    {cut[0]} x {cut[1]} sequences a step instead of 2 x 2: the same" in output
    assert "load-balance" not in output
    assert len(steps) == len(whole) == 8
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(steps, whole, strict=True))
    mine, theirs = other.final(), straight.final()
    assert mine.run["samples_seen"] == theirs.run["samples_seen"] == 32
    for name, tensor in theirs.model.items():
        # Eight steps of AdamW, whose update is at most lr 1e-2 in size; rounding moves it a little.
        torch.testing.assert_close(mine.model[name], tensor, rtol=1e-3, atol=1e-4)
    lr = [[r["lr"] for r in one.records() if r["kind"] == "train"] for one in (other, straight)]
    assert lr[0] == lr[1]
    loss = [[r["loss"] for r in one.records()] for one in (other, straight)]
    assert loss[0] == pytest.approx(loss[1], rel=1e-4)
    # The next resume continues as the last one did, and says nothing.
    assert (mine.train_config["batch_size"], mine.train_config["grad_accum"]) == cut
    assert other("--resume", "--max_steps", 9, fresh=False) == 0
    assert "batch    " not in capsys.readouterr().out


def test_a_resume_with_the_run_s_own_cut_is_the_straight_run(data, tmp_path, monkeypatch):
    straight, other = Run(data, tmp_path / "a"), Run(data, tmp_path / "b")
    assert straight("--max_steps", 6) == 0
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        assert other("--max_steps", 6) == 128 + signal.SIGTERM
    assert other("--resume", "--batch_size", 2, "--grad_accum", 2, fresh=False) == 0
    assert_same(other.final(), straight.final())


def test_what_a_micro_batch_does_by_itself_is_named(run, capsys):
    assert run("--max_steps", 4, "--dropout", "0.1", "--capacity_factor", 2) == 0
    assert run("--resume", "--batch_size", 1, "--grad_accum", 4, "--max_steps", 5, fresh=False) == 0
    parts = "load-balance loss and capacity and dropout are per micro-batch"
    assert parts in capsys.readouterr().out


def test_a_resume_on_another_number_of_ranks_is_said(run, capsys):
    assert run("--max_steps", 4) == 0
    source = run.final().path
    forge(source, source, lambda contents: contents.update(world=2, train_cfg=sharded(contents)))
    assert run("--resume", "--max_steps", 6, fresh=False) == 0
    assert "ranks    1 instead of 2: the same data" in capsys.readouterr().out
    assert run.final().world == 1


def sharded(contents: dict) -> dict:
    """Return settings of a run on ranks, which one process does not take over."""
    return contents["train_cfg"] | {"checkpoint": "sharded"}


def test_one_process_writes_no_folder(run):
    with pytest.raises(ValueError, match="--checkpoint sharded is for runs on several ranks"):
        run("--max_steps", 4, "--checkpoint", "sharded")


def test_a_resume_finds_the_largest_micro_batch(run, monkeypatch, capsys):
    """`--resume --micro_batch auto`, as after a move to a machine with more memory."""
    assert run("--max_steps", 4) == 0
    assert run("--resume", "--micro_batch", "auto", "--max_steps", 6, fresh=False) == 0
    output, saved = capsys.readouterr().out, run.final().train_config
    assert "micro-batch 4 x 1 is the largest that fits, of 4 sequences a step" in output
    assert "batch    4 x 1 sequences a step instead of 2 x 2" in output
    assert (saved["batch_size"], saved["grad_accum"]) == (4, 1)
    assert run.final().run["samples_seen"] == 24


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", 4], "--batch_size 4 differs .* 2 x 2 sequences .* product is 4"),
        (["--grad_accum", 1], "--grad_accum 1 differs .* 2 x 2 sequences .* product is 4"),
        (["--batch_size", 4, "--grad_accum", 4], "(batch_size|grad_accum) 4 differs"),
        (["--batch_size", -1, "--grad_accum", -4], "must be at least 1, not -"),
    ],
)
def test_another_number_of_sequences_per_step_is_refused(run, flags, message):
    assert run("--max_steps", 4) == 0
    with pytest.raises(ValueError, match=message):
        run("--resume", *flags, fresh=False)


@pytest.mark.parametrize(
    "flags, val_steps, keeps",
    [
        # 2 x 2 windows were averaged.
        (["--batch_size", 1, "--grad_accum", 4], 4, True),
        (["--batch_size", 4, "--grad_accum", 1], 1, True),
        (["--batch_size", 4, "--grad_accum", 1, "--val_steps", 2], 2, False),
        (["--val_steps", 3], 3, False),
        ([], 2, True),
    ],
)
def test_the_best_validation_is_kept_while_its_windows_are(run, flags, val_steps, keeps):
    """Cut otherwise, a validation averages the same windows, so the best so far still counts."""
    assert run("--max_steps", 4) == 0
    best = run.final().run["best_val_loss"]
    resume = ["--resume", *run.folders, *map(str, flags)]
    plan = make_plan(settings_of(*resume), train.pretraining)
    assert plan.config.val_steps == val_steps
    state = initial_state(plan)
    assert (state.best_val_loss, state.best_step) == ((best, 4) if keeps else (None, 0))


# -------------------------------------------------------------------------------------------- dtype
def auto_run(run: Run) -> int:
    flags = [flag for flag in SPEED if flag not in ("--dtype", "float32")]
    return train.main([*MODEL, *flags, *run.folders, "--max_steps", "4"])


def test_a_dtype_that_auto_chose_may_be_another_on_resume(run, capsys):
    """A run begun on a GPU in bfloat16 could not continue in float32, although nobody chose it."""
    assert auto_run(run) == 0
    before = run.final()
    assert before.run["auto_dtype"] and before.train_config["dtype"] in ("float32", "bfloat16")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[before.train_config["dtype"]]
    capsys.readouterr()
    assert run("--resume", "--dtype", other, "--max_steps", 6, fresh=False) == 0
    line = f"dtype    {other} instead of {before.train_config['dtype']}\n"
    assert line in capsys.readouterr().out
    assert run.final().train_config["dtype"] == other
    # Without the flag the run continues as it is, and auto may choose again.
    assert run("--resume", "--max_steps", 7, fresh=False) == 0
    assert run.final().train_config["dtype"] == other
    assert "dtype    " not in capsys.readouterr().out
    assert run("--resume", "--dtype", "auto", "--max_steps", 8, fresh=False) == 0
    assert run.final().train_config["dtype"] == before.train_config["dtype"]


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_dtype_that_was_given_stays(run, dtype):
    assert run("--max_steps", 4) == 0
    with pytest.raises(ValueError, match=f"--dtype {dtype} differs from the run"):
        run("--resume", "--dtype", dtype, fresh=False)


def test_a_balance_over_ranks_needs_them(run, monkeypatch):
    """One process cannot count what other ranks see: it says so, and what to take instead."""
    with pytest.raises(ValueError, match="--balance_over global is for runs on several ranks"):
        run("--balance_over", "global", "--max_steps", 4)
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "arrange", lambda *_: None)
        assert run("--balance_over", "global", "--max_steps", 4) == 0
    with pytest.raises(ValueError, match="take --balance_over micro_batch"):
        run("--resume", "--max_steps", 5, fresh=False)
    more = ("--balance_over", "micro_batch", "--max_steps", 5)
    assert run("--resume", *more, fresh=False) == 0
    assert run.final().train_config["balance_over"] == "micro_batch"


def test_a_run_of_an_earlier_version_resumes(run):
    """Its checkpoints lack the step of the best validation, and who chose the dtype."""
    assert run("--max_steps", 4) == 0
    source = run.final()
    plan = make_plan(settings_of("--resume", *run.folders), train.pretraining)
    model, optimizer, _ = train.set_up(plan, train.forward_backward)
    old = {k: v for k, v in source.run.items() if k not in ("best_step", "auto_dtype")}
    config = {k: v for k, v in source.train_config.items() if k != "epochs"}
    save_checkpoint(
        run.ckpt_dir,
        4,
        model,
        optimizer,
        train_config=TrainConfig(**config),
        tokenizer_state=source.tokenizer_state,
        data_fingerprint=source.data_fingerprint,
        run=old,
        val_loss=source.val_loss,
    )
    with pytest.raises(ValueError, match="--dtype bfloat16 differs"):
        run("--resume", "--dtype", "bfloat16", fresh=False)
    assert run("--resume", "--max_steps", 5, fresh=False) == 0
    assert run.final().step == 5


# ----------------------------------------------------------------------------------- the last lines
def test_the_end_names_the_best_validation_and_the_next_command(run, data, tmp_path, capsys):
    """The last lines said where the checkpoints are, and not how good or what to type."""
    spaced = Run(data, tmp_path / "my run's")
    assert spaced("--max_steps", 8, "--save_interval", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    best = read_checkpoint(spaced.ckpt_dir / "best.pt")
    assert f"best     validation loss {best.val_loss:.4f} at step {best.step}" in lines
    assert best.run["best_step"] == best.step
    words = shlex.split(lines[-1])
    assert words[:3] == ["next", "python", "predict.py"]
    more = ["--prompt", "tom saw", "--max_new_tokens", "3", "--device", "cpu", "--quiet"]
    assert predict.main([*words[3:], *more]) == 0


def test_a_run_without_validation_or_tokenizer_says_neither(tmp_path, capsys):
    from tests.training.test_task import Bare, carry_out

    assert carry_out(Bare(), tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("done: 4 steps")
    assert json.loads((tmp_path / "graphs" / "metrics.jsonl").read_text().splitlines()[0])
