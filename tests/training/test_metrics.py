"""runtime/training/metrics.py: strict JSON lines that survive kills, resumes and damage.

Also other runs' files.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from runtime.training.metrics import MetricsLog, flatten, make_loggers, read_records
from tests.conftest import REPO


def record(step, kind="train", **more):
    return {
        "step": step,
        "kind": kind,
        "tokens_seen": step * 1024,
        "loss": 5.0 - step / 100,
        **more,
    }


def strict(text):
    """json.loads that rejects NaN and Infinity, as other languages' parsers do."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def filled(folder, steps=(10, 20, 30, 40), **options):
    log = MetricsLog(folder, **options)
    for step in steps:
        log.append(record(step))
    return log


def steps(log):
    return [r["step"] for r in log.records()]


# ------------------------------------------------------------------------------------------ writing
def test_a_record_is_in_the_file_when_append_returns(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (10, 20):
        log.append(record(step))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step // 10 and strict(lines[-1]) == record(step)


def test_a_killed_process_loses_no_record(tmp_path):
    code = (
        "import os, signal, sys; from runtime.training.metrics import MetricsLog; log = "
        "MetricsLog(sys.argv[1])\n"
        "for step in range(1, 4): log.append({'step': step, 'kind': 'train', 'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPO)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_non_finite_numbers_become_null_and_are_marked(tmp_path):
    """The original implementation wrote NaN into metrics.json, which is not JSON (fault T8)."""
    log = MetricsLog(tmp_path, run_info={"best": math.inf})
    log.append(record(1, loss=math.nan, grad_norm=math.inf, expert_load=[[1.0, -math.inf]]))
    log.append(record(2))
    log.finish()
    first, second = (strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (
        first["loss"] is None
        and first["grad_norm"] is None
        and first["expert_load"] == [[1.0, None]]
    )
    assert first["non_finite"] is True and "non_finite" not in second
    assert strict((tmp_path / "metrics.json").read_text())["train"] == [first, second]


def test_arrays_and_tensors_become_numbers_and_lists(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(
        record(
            1,
            loss=torch.tensor(2.5),
            grad_norm=np.float32(0.5),
            expert_load=torch.ones(2, 3) / 3,
            router_entropy=np.array([1.0, np.nan]),
        )
    )
    (r,) = log.records()
    assert (
        r["loss"] == 2.5
        and r["grad_norm"] == 0.5
        and r["router_entropy"] == [1.0, None]
        and r["non_finite"] is True
    )
    # Short: there are blocks x experts of them in each record.
    assert r["expert_load"] == [[0.333333] * 3] * 2


def test_scalars_keep_all_their_digits(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(record(1, loss=1 / 3))
    assert log.records()[0]["loss"] == 1 / 3


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"step": 1.5, "kind": "train"}, "step"),
        ({"step": -1, "kind": "train"}, "step"),
        ({"step": True, "kind": "train"}, "step"),
        ({"kind": "train"}, "step"),
        ({"step": 1, "kind": "test"}, "kind"),
        ({"step": 1, "kind": "train", "loss": object()}, "metric"),
    ],
)
def test_bad_records_are_refused_and_leave_no_trace(tmp_path, bad, words):
    log = filled(tmp_path, steps=(0,))
    with pytest.raises(ValueError, match=words):
        log.append(bad)
    assert steps(log) == [0]


def test_a_step_is_recorded_once_per_kind(tmp_path):
    """T17: the original implementation validated step 20 two or three times on different sequences.

    It kept every result.
    """
    log = filled(tmp_path, steps=(10, 20))
    log.append(record(20, "val"))
    for kind in ("train", "val"):
        with pytest.raises(ValueError, match="already"):
            log.append(record(20, kind))
    log.finish()
    log = MetricsLog(tmp_path, resume_step=20)
    with pytest.raises(ValueError, match="already"):
        log.append(record(20, "val"))


def test_a_full_disk_leaves_no_half_line(tmp_path):
    """A line cut off by a full disk must not be glued to the record after it."""
    log = filled(tmp_path, steps=(1, 2))

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, line):
            return self.file.write(line[:7])

        def __getattr__(self, name):
            return getattr(self.file, name)

    real, log._file = log._file, FullDisk(log._file)
    with pytest.raises(OSError, match="disk full"):
        log.append(record(3))
    log._file = real
    log.append(record(3))
    assert steps(log) == [1, 2, 3]


def test_metrics_json_splits_train_and_val_and_carries_the_run(tmp_path):
    log = MetricsLog(tmp_path, run_info={"preset": "nano", "device": "cpu"})
    assert strict((tmp_path / "metrics.json").read_text()) == {
        "run": {"preset": "nano", "device": "cpu"},
        "train": [],
        "val": [],
    }
    log.append(record(10))
    log.append(record(10, "val", bits_per_byte=1.0))
    log.append(record(20))
    log.write_json()
    whole = strict((tmp_path / "metrics.json").read_text())
    assert whole == {
        "run": {"preset": "nano", "device": "cpu"},
        "train": [record(10), record(20)],
        "val": [record(10, "val", bits_per_byte=1.0)],
    }
    assert not list(tmp_path.glob("*.partial"))
    log.finish()
    log.finish()
    # Still readable afterwards.
    assert log.records() == [
        record(10),
        record(10, "val", bits_per_byte=1.0),
        record(20),
    ]


def test_metrics_json_is_replaced_whole(tmp_path, monkeypatch):
    """A crash while metrics.json is written leaves the old one."""
    log = filled(tmp_path, steps=(1,))
    log.write_json()
    before = (tmp_path / "metrics.json").read_text()
    log.append(record(2))

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.base.files.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        log.write_json()
    assert (tmp_path / "metrics.json").read_text() == before


# ------------------------------------------------------------------------------------------- resume
def test_resume_drops_what_will_be_made_again(tmp_path):
    """T15: kill at step 40 with the checkpoint at 20: steps 30 and 40 come again.

    They must not be there twice.
    """
    log = filled(tmp_path)
    log.append(record(40, "val"))
    log = MetricsLog(tmp_path, resume_step=20)
    assert steps(log) == [10, 20]
    for step in (30, 40, 50):
        log.append(record(step))
    log.append(record(40, "val"))
    assert steps(log) == [10, 20, 30, 40, 50, 40]
    assert [r["tokens_seen"] for r in log.records()] == [
        s * 1024 for s in (10, 20, 30, 40, 50, 40)
    ]  # T14
    assert any("3 records after step 20" in m for m in log.take_messages()) and log.messages == []


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 50, "kind": "tr',
        b"\x00" * 40,
        b"\xff\xfe{",
        b'{"step": 50, "kind": "train"',
        b'{"step": 5, "kind": "train", "loss": NaN}',
    ],
)
def test_resume_drops_a_torn_last_line_and_says_so(tmp_path, tail):
    filled(tmp_path).finish()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    log = MetricsLog(tmp_path, resume_step=100)
    assert any("cut off" in m for m in log.messages) and len(log.messages) == 1
    log.append(record(110))
    assert steps(log) == [10, 20, 30, 40, 110]
    assert not list(tmp_path.glob("metrics-*"))


def test_resume_keeps_a_last_line_that_lacks_only_its_end(tmp_path):
    filled(tmp_path).finish()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    log = MetricsLog(tmp_path, resume_step=40)
    log.append(record(50))
    assert steps(log) == [10, 20, 30, 40, 50] and log.messages == []


@pytest.mark.parametrize(
    "damage, kept",
    [
        (lambda lines: lines[:1] + [b'{"step": 20, "ki'] + lines[2:], [10, 30, 40]),
        (
            lambda lines: (
                lines[:2] + [b"", b"[1, 2]", b'{"step": 31, "kind": "nonsense"}'] + lines[2:]
            ),
            [10, 20, 30, 40],
        ),
        (lambda lines: [b"\x89PNG\r", b"\x00\xff", b"\x01"], []),
        (lambda lines: [b"[" * 100_000] + lines, [10, 20, 30, 40]),
    ],
)
def test_damaged_metrics_never_stop_a_resume(tmp_path, damage, kept):
    """T16: a truncated metrics.json ended the original implementation's resume.

    It was a JSONDecodeError, with a good checkpoint at hand.
    """
    filled(tmp_path).finish()
    path = tmp_path / "metrics.jsonl"
    damaged = b"\n".join(damage(path.read_bytes().splitlines())) + b"\n"
    path.write_bytes(damaged)
    (tmp_path / "metrics.json").write_text('{"train": [{"st')
    log = MetricsLog(tmp_path, resume_step=40)
    assert steps(log) == kept
    # Nothing is lost.
    assert (tmp_path / "metrics-damaged-1.jsonl").read_bytes() == damaged
    assert "metrics-damaged-1.jsonl" in log.messages[0] and f"{len(kept)} record" in log.messages[0]
    log.append(record(50))
    log.finish()
    assert [r["step"] for r in strict((tmp_path / "metrics.json").read_text())["train"]] == [
        *kept,
        50,
    ]
    path.write_bytes(damaged)
    assert "metrics-damaged-2.jsonl" in MetricsLog(tmp_path, resume_step=40).messages[0]


def test_a_metrics_file_that_is_no_file_is_moved_aside(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    log = MetricsLog(tmp_path, resume_step=5)
    log.append(record(6))
    assert (tmp_path / "metrics-damaged-1.jsonl").is_dir() and steps(log) == [6] and log.messages


def test_resume_without_metrics_begins_anew_and_says_so(tmp_path):
    log = MetricsLog(tmp_path / "new", resume_step=500)
    log.append(record(510))
    assert steps(log) == [510] and "not found" in log.messages[0]


def test_reading_a_damaged_file_names_file_and_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki\n{"step": 3, "kind": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        list(read_records(path))
    path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    assert [r["step"] for r in read_records(path)] == [1]


# --------------------------------------------------------------------------------------- other runs
def test_a_fresh_run_never_appends_to_another_runs_metrics(tmp_path):
    """T15: a fresh --ckpt_dir with the same graph_dir gave wrong records.

    The original implementation wrote steps [4, 8, 4, 8] and the old run's tokens.
    """
    for run in (1, 2, 3):
        log = filled(tmp_path, steps=(run, 10 * run), run_info={"run": run})
        assert steps(log) == [run, 10 * run]
        log.finish()
    assert "metrics-2.jsonl" in log.messages[0]
    for run in (1, 2):
        assert [r["step"] for r in read_records(tmp_path / f"metrics-{run}.jsonl")] == [
            run,
            10 * run,
        ]
        assert strict((tmp_path / f"metrics-{run}.json").read_text())["run"] == {"run": run}


def test_a_fresh_run_that_measured_nothing_leaves_nothing_aside(tmp_path):
    MetricsLog(tmp_path)
    (tmp_path / "metrics.json").unlink()
    log = MetricsLog(tmp_path)
    assert log.messages == [] and not list(tmp_path.glob("metrics-*"))


def test_resuming_one_run_over_anothers_metrics_keeps_both_apart(tmp_path):
    """Train A, train B into the same graph_dir, resume A.

    B's records after A's step must not be cut off, nor pass for A's.
    """
    filled(tmp_path, run_info={"run_id": "aaaa"}).finish()
    filled(tmp_path, run_info={"run_id": "bbbb"}).finish()
    log = MetricsLog(tmp_path, resume_step=20, run_info={"run_id": "aaaa"})
    log.append(record(30))
    assert steps(log) == [10, 20, 30] and {r["run_id"] for r in log.records()} == {"aaaa"}
    assert [r["run_id"] for r in read_records(tmp_path / "metrics-2.jsonl")] == ["bbbb"] * 4
    log.finish()
    log = MetricsLog(tmp_path, resume_step=30, run_info={"run_id": "aaaa"})
    assert steps(log) == [10, 20, 30] and log.messages == []


def test_resuming_over_anothers_metrics_where_its_own_are_gone(tmp_path):
    filled(tmp_path, run_info={"run_id": "bbbb"}).finish()
    log = MetricsLog(tmp_path, resume_step=20, run_info={"run_id": "aaaa"})
    log.append(record(30))
    assert steps(log) == [30] and "bbbb" in log.messages[0]
    assert [r["run_id"] for r in read_records(tmp_path / "metrics-1.jsonl")] == ["bbbb"] * 4


def test_repeated_steps_in_a_file_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(s)) + "\n" for s in (4, 8, 4, 8)))
    log = MetricsLog(tmp_path, resume_step=8)
    assert steps(log) == [4, 8] and "2 records" in log.messages[0]


@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_folder_that_is_a_file_is_one_clear_line(tmp_path, resume_step):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "graphs"):
        with pytest.raises(ValueError, match="give another folder"):
            MetricsLog(folder, resume_step=resume_step)


# ------------------------------------------------------------------------ interference during a run
def test_deleting_the_folder_does_not_stop_the_run(tmp_path):
    folder = tmp_path / "graphs"
    log = filled(folder, steps=(10, 20))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    log.append(record(30))
    assert steps(log) == [30] and "not found" in log.take_messages()[0]
    (folder / "metrics.jsonl").unlink()
    log.write_json()
    assert strict((folder / "metrics.json").read_text())["train"] == []
    with pytest.raises(ValueError, match="already"):
        log.append(record(30))


def test_damage_from_outside_does_not_stop_the_run(tmp_path):
    log = filled(tmp_path, steps=(10, 20))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"oops\n" + path.read_bytes())
    log.append(record(30))
    log.write_json()
    assert [r["step"] for r in strict((tmp_path / "metrics.json").read_text())["train"]] == [
        10,
        20,
        30,
    ]
    assert "line 1" in log.messages[0] and (tmp_path / "metrics-damaged-1.jsonl").exists()


# -------------------------------------------------------------------------------------------- sinks
RICH = record(
    20,
    expert_load=[[0.5, 1.5], [1.0, None]],
    router_entropy=[0.6, 0.5],
    dropped_share=[0.0, 0.1],
    grad_norm=None,
    non_finite=True,
)
FLAT = {
    "train/tokens_seen": 20480,
    "train/loss": 4.8,
    "router/block_00/load_min": 0.5,
    "router/block_00/load_max": 1.5,
    "router/block_01/load_min": 1.0,
    "router/block_01/load_max": 1.0,
    "router/block_00/entropy": 0.6,
    "router/block_01/entropy": 0.5,
    "router/block_00/dropped_share": 0.0,
    "router/block_01/dropped_share": 0.1,
}


def test_flatten_names_every_number():
    assert flatten(RICH) == pytest.approx(FLAT)


def fake_wandb(monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *args, **options):
            calls.append(("define", args, options))

        def log(self, data):
            calls.append(("log", data))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        assert os.path.isdir(options["dir"])
        calls.append(("init", options))
        return Run()

    class Error(Exception):
        pass

    module = types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=Error))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module, calls


def test_wandb_gets_every_record(tmp_path, monkeypatch):
    _, calls = fake_wandb(monkeypatch)
    info = {"run_id": "abcd", "lr": 1e-3, "train": {"run_name": "muon"}}
    log = MetricsLog(
        tmp_path, run_info=info, sinks=make_loggers(tmp_path / "graphs", wandb=True, run_info=info)
    )
    log.append(RICH)
    log.finish()
    log.finish()
    assert (
        calls[0][1]["config"] == info
        and calls[0][1]["id"] == "abcd"
        and calls[0][1]["name"] == "muon"
        and calls[0][1]["resume"] == "allow"
    )
    assert ("define", ("*",), {"step_metric": "step"}) in calls
    assert (
        calls[-2] == ("log", {"step": 20, **FLAT})
        and calls[-1] == ("finish",)
        and calls.count(("finish",)) == 1
    )


def test_wandb_that_does_not_start_is_one_clear_line(tmp_path, monkeypatch):
    module, _ = fake_wandb(monkeypatch)

    def init(**_):
        raise module.errors.Error("no API key")

    module.init = init
    with pytest.raises(ValueError, match="no API key.*wandb login"):
        make_loggers(tmp_path, wandb=True)


def test_tensorboard_gets_every_record(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append((log_dir, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    sinks = make_loggers(tmp_path, tensorboard=True, run_info={"run_id": "abcd"}, resume_step=10)
    log = MetricsLog(tmp_path, sinks=sinks)
    log.append(RICH)
    log.finish()
    assert calls[0] == (str(tmp_path / "tensorboard" / "abcd"), 11)
    assert {c[:2] for c in calls[1:] if isinstance(c, tuple)} == set(FLAT.items()) and all(
        c[2] == 20 for c in calls[1:] if isinstance(c, tuple)
    )
    assert calls[-2:] == ["flush", "close"]
    make_loggers(tmp_path, tensorboard=True)
    # Another run's events in the folder are hidden.
    assert calls[-1] == (
        str(tmp_path / "tensorboard" / "run"),
        0,
    )


@pytest.mark.parametrize(
    "name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        make_loggers(tmp_path, **{name: True})


def test_nothing_optional_is_imported_unless_asked_for(tmp_path):
    code = (
        "import sys; from runtime.training.metrics import MetricsLog, make_loggers; log = "
        "MetricsLog(sys.argv[1], sinks=make_loggers(sys.argv[1]))\n"
        "log.append({'step': 1, 'kind': 'train'}); log.finish()\n"
        "bad = {'torch', 'wandb', 'tensorboard', 'matplotlib', 'model', 'numpy'} & "
        "set(sys.modules); assert not bad, bad"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPO,
        check=True,
    )


def test_a_resumed_run_finds_its_metrics_again(tmp_path):
    """Two runs in one graph_dir: the second moved the first one's metrics aside.

    The first, resumed, began a new curve at its step.
    """
    first = MetricsLog(tmp_path, run_info={"run_id": "a"})
    for step in (10, 20):
        first.append(record(step))
    first.finish()
    second = MetricsLog(tmp_path, run_info={"run_id": "b"})
    second.append(record(10))
    second.finish()
    again = MetricsLog(tmp_path, resume_step=20, run_info={"run_id": "a"})
    assert "metrics-1.jsonl is this run's: taken up again" in again.take_messages()[0]
    again.append(record(30))
    assert [(r["run_id"], r["step"]) for r in again.records()] == [("a", 10), ("a", 20), ("a", 30)]
    again.finish()
    back = MetricsLog(tmp_path, resume_step=10, run_info={"run_id": "b"})
    assert [r["run_id"] for r in back.records()] == ["b"]
