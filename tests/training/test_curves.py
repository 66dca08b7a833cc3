"""runtime/training/curves.py: one reader of a run's files, while it writes them and after."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from config_model import ModelConfig, flops_per_token
from runtime.training import curves, json_lines, run_curves
from runtime.training.curves import Follower, Run, read_run, read_runs, run_folders
from runtime.training.metrics import KINDS, MetricsLog
from tests.builders_runs import Run as TrainingRun
from tests.builders_runs import prepared
from tests.conftest import REPO

NANO = ModelConfig(d_model=32, transformer_blocks=2, num_heads=2, num_kv_heads=1, num_experts=4)


def record(step: int, kind: str = "train", **more) -> dict:
    loads = {"expert_load": [[1.0, 0.5], [step, 1.5]]} if kind == "train" else {}
    seconds = {"seconds": step / 10} if kind == "train" else {}
    known = {"tokens_seen": step * 64, "loss": 5 - step / 1000, **seconds, **loads}
    return {"step": step, "kind": kind, **known, **more}


def log_of(folder, run_id="a" * 16, resume_step=None) -> MetricsLog:
    info = {"run_id": run_id, "model": dataclasses.asdict(NANO), "train": {"seed": 1}}
    return MetricsLog(folder, resume_step, info)


def filled(folder, steps, **more) -> MetricsLog:
    log = log_of(folder, **more)
    for step in steps:
        log.append(record(step))
    return log


def test_every_kind_of_record_has_a_table():
    run = Run("m")
    assert all(isinstance(getattr(run, kind), run_curves.Table) for kind in KINDS)


# ------------------------------------------------------------------------------- a run that is over
def test_a_real_run_is_read(tmp_path):
    """Of train.main itself: its steps, losses, tokens and settings."""
    train = TrainingRun(prepared(tmp_path), tmp_path)
    assert not train("--max_steps", "8", "--run_name", "mine")
    (folder,) = run_folders(tmp_path / "graphs")
    run = read_run(folder)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = [r for r in logged if r["kind"] == "train"]
    assert run.name == "mine" and run.messages == []
    assert list(run.train.steps) == [2, 4, 6, 8] and list(run.val.steps) == [4, 8]
    assert list(run.train.column("loss")) == [r["loss"] for r in mine]
    assert run.train.last("tokens_seen") == 8 * 2 * 2 * 16
    assert run.settings("train")["max_steps"] == 8
    assert run.model_config.num_experts == 4
    ((step, router),) = run.router(1)
    assert step == 8 and router["expert_load"] == mine[-1]["expert_load"]
    flops = 3 * flops_per_token(run.model_config) * run.train.last("tokens_seen")
    assert run.axis("flops")[-1] == run.axis("flops", "val")[-1] == flops
    assert run.axis("seconds", "val")[-1] == mine[-1]["seconds"]


def test_steps_that_fall_cut_the_curve(tmp_path):
    """A copied file may hold a resume: what came before it is no part of the curve."""
    steps = [10, 20, 30, 40, 25, 35]
    kinds = ["train", "train", "train", "val", "train", "train"]
    lines = [
        json.dumps(record(s, k, loss=i)) for i, (s, k) in enumerate(zip(steps, kinds, strict=True))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    assert list(run.train.steps) == [10, 20, 25, 35] and list(run.train.column("loss")) == [
        0,
        1,
        4,
        5,
    ]
    assert list(run.val.steps) == [] and run.version
    assert [step for step, _ in run.router()] == [10, 20, 25, 35]


def test_a_validation_at_the_same_step_cuts_nothing(tmp_path):
    log = filled(tmp_path, [10])
    log.append(record(10, "val"))
    log.append(record(10, "score", score={"right": 0.5}))
    run = read_run(tmp_path)
    assert [len(t) for t in (run.train, run.val, run.score)] == [1, 1, 1] and not run.version
    assert run.score.last("right") == 0.5


def test_null_is_a_gap_and_a_mark(tmp_path):
    log = filled(tmp_path, [1])
    log.append(record(2, loss=math.nan))
    log.append(record(3))
    train = read_run(tmp_path).train
    assert [math.isnan(loss) for loss in train.column("loss")] == [False, True, False]
    assert train.not_finite == [2] and train.last("loss") == record(3)["loss"]


def test_a_torn_last_line_is_left_out_and_a_whole_one_without_its_end_is_not(tmp_path):
    filled(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert list(read_run(tmp_path).train.steps) == [1] and not read_run(tmp_path).messages
    path.write_bytes(whole[:-1])
    assert list(read_run(tmp_path).train.steps) == [1, 2]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "Expecting"),
        (b'{"step": "\xff"}', "utf-8"),
        (b"[1]", "must be a JSON object"),
        (b'{"step": -1, "kind": "train"}', "step must be"),
        (b'{"step": 1, "kind": "other"}', "kind must be"),
        (b'{"step": 1, "kind": "train", "loss": NaN}', "NaN"),
        (b"[" * 100_000, "recursion"),
        (b'{"step": ' + b"9" * 5_000 + b', "kind": "train"}', "digit"),
        (b'{"step": 99999999999999999999, "kind": "train"}', "at most"),
    ],
)
def test_a_damaged_line_is_a_message(tmp_path, line, reason):
    filled(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((first, line, second, b"")))
    run = read_run(tmp_path)
    (message,) = run.messages
    assert message.startswith("metrics.jsonl, line 2: not a metrics record (")
    assert reason in message and list(run.train.steps) == [1, 2]


def test_many_damaged_lines_are_a_few_messages(tmp_path):
    filled(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("?\n" * 1000)
    messages = read_run(tmp_path).messages
    assert len(messages) == curves.MOST_MESSAGES + 1
    assert messages[-1] == f"{1000 - curves.MOST_MESSAGES} more lines like these"


def test_numbers_that_are_none_are_gaps(tmp_path):
    """A hostile or foreign file: none of these may end a page."""
    odd = {"loss": 10**400, "lr": "high", "metrics": [1], "grad_norm": True}
    lines = [
        record(1, **odd, expert_load="much", router_entropy={"a": 1}),
        record(2, expert_load=[[1, "x"]], dropped_share=[0.5]),
        record(3, expert_load=[[1.0, 2.0], [None, 3.0]]),
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    # Digits that are no number: they are not parsed before they are shown.
    text += '{"step":4,"kind":"train","expert_load":[[1..2]]}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert list(run.train.steps) == [1, 2, 3, 4]
    assert math.isnan(run.train.column("loss")[0]) and "lr" not in run.train.columns
    assert [numbers for _, numbers in run.router()] == [
        {},
        {"dropped_share": [0.5]},
        {"expert_load": [[1.0, 2.0], [None, 3.0]]},
        {},
    ]


def test_a_file_of_anything_takes_little_memory(tmp_path):
    lines = [record(i, run_id=f"run {i}", **{f"n{i}": 1.0}) for i in range(300)]
    lines += [record(i, run_id="run 0", **{f"n{i}": 1.0}) for i in range(300, 600)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs(tmp_path)
    assert len(runs) == curves.MOST_RUNS and len(runs[0].train.columns) == run_curves.MOST_COLUMNS
    assert "of more than 16 runs" in runs[0].messages[0]


def test_a_line_without_an_end_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE_BYTES", 1000)
    monkeypatch.setattr(json_lines, "CHUNK_BYTES", 400)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 5000 + b"\n" + json.dumps(record(7)).encode() + b"\n")
    run = read_run(tmp_path)
    assert list(run.train.steps) == [7] and len(run.messages) == 1
    path.write_bytes(b"x" * 5000)
    follower = Follower(tmp_path)
    follower.poll()
    assert not follower.runs


def test_the_settings_are_read_from_any_json(tmp_path):
    filled(tmp_path, [1]).finish()
    path = tmp_path / "metrics.json"
    info = json.loads(path.read_text())["run"]
    assert read_run(tmp_path).info == info
    for text in (json.dumps({"train": [], "run": info}), json.dumps({"run": info}, indent=2)):
        path.write_text(text)
        assert read_run(tmp_path).info == info
    for text in ("{", '{"run": 5}', '{"run": ' + "[" * 100_000, "[]", '{"run": {"run_id": "b"}}'):
        path.write_text(text)
        run = read_run(tmp_path)
        assert run.info == {} and list(run.train.steps) == [1]
        assert run.flops_per_token == 0 and math.isnan(run.axis("flops")[0])
    path.write_text("{")
    assert read_run(tmp_path).messages[0].startswith("metrics.json: not JSON")


def test_settings_of_another_version_have_no_flops(tmp_path):
    log = MetricsLog(tmp_path, None, {"run_id": "a", "model": {"d_model": 32, "width": 3}})
    log.append(record(1))
    run = read_run(tmp_path)
    assert run.model_config is None and run.flops_per_token == 0


def test_other_runs_of_the_folder_follow(tmp_path):
    filled(tmp_path, [1, 2], run_id="first")
    filled(tmp_path, [1], run_id="second").finish()
    runs = read_runs(tmp_path)
    assert [run.run_id for run in runs] == ["second", "first"]
    assert [run.name for run in runs] == [tmp_path.name, f"{tmp_path.name} (metrics-1)"]
    assert [run.info["run_id"] for run in runs] == ["second", "first"]
    assert read_run(tmp_path).run_id == "second"


def test_what_holds_no_run_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="holds no metrics.jsonl: give the graph_dir of a run$"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        read_run(tmp_path / "no")
    filled(tmp_path / "mine", [1])
    with pytest.raises(ValueError, match="such as .*mine"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        read_run(tmp_path / "mine" / "metrics.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no record"):
        read_run(tmp_path / "empty")
    assert run_folders(tmp_path) == [tmp_path / "empty", tmp_path / "mine"]


# ---------------------------------------------------------------------------- a run that still runs
def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    log = filled(tmp_path, [1, 2])
    follower = Follower(tmp_path)
    assert follower.poll() and not follower.poll()
    (run,) = follower.runs
    seen = []
    real = curves.split_record
    monkeypatch.setattr(curves, "split_record", lambda line: (seen.append(line), real(line))[1])
    log.append(record(3))
    assert follower.poll() and follower.runs == [run] and len(seen) == 1
    assert list(run.train.steps) == [1, 2, 3] and run.version == 0


def test_a_line_that_arrives_in_pieces_is_read_once(tmp_path):
    filled(tmp_path, [1])
    follower = Follower(tmp_path)
    follower.poll()
    line = json.dumps(record(2)).encode() + b"\n"
    for piece in (line[:10], line[10:50], line[50:-1], line[-1:], b"\n", b"{}\n"):
        with open(tmp_path / "metrics.jsonl", "ab") as file:
            file.write(piece)
        follower.poll()
        whole = piece not in (line[:10], line[10:50])
        assert list(follower.runs[0].train.steps) == [1, 2][: 1 + whole]
    (message,) = follower.runs[0].messages
    assert message.startswith("metrics.jsonl, line 4:")


def test_a_resume_is_followed(tmp_path):
    """`MetricsLog` writes the file again by rename and drops what will be made again."""
    filled(tmp_path, [10, 20, 30])
    follower = Follower(tmp_path)
    follower.poll()
    (run,) = follower.runs
    log = log_of(tmp_path, resume_step=20)
    log.append(record(25))
    assert follower.poll() and follower.runs == [run]
    assert list(run.train.steps) == [10, 20, 25] and run.version == 1
    assert [step for step, _ in run.router()] == [10, 20, 25]


def test_files_that_replace_each_other_are_noticed(tmp_path):
    """By inode, by size, and by content where both are the same."""
    path = tmp_path / "metrics.jsonl"

    def write(steps, loss):
        text = "".join(json.dumps(record(s, loss=loss)) + "\n" for s in steps)
        path.write_text(text)

    follower = Follower(tmp_path)
    write([10, 20, 30], 1)
    follower.poll()
    for steps, loss in (([10, 20], 1), ([10, 20, 30, 40], 2), ([10, 20, 30, 40], 3)):
        write(steps, loss)
        assert follower.poll()
        table = follower.runs[0].train
        assert list(table.steps) == steps and set(table.column("loss")) == {loss}
    path.unlink()
    assert follower.poll() and not follower.runs and not follower.poll()
    write([10], 4)
    assert follower.poll() and list(follower.runs[0].train.steps) == [10]


def test_a_run_that_takes_the_folder_over_is_followed(tmp_path):
    filled(tmp_path, [1, 2], run_id="first")
    follower = Follower(tmp_path)
    follower.poll()
    filled(tmp_path, [5], run_id="second")
    follower.poll()
    assert [(run.run_id, run.last_step) for run in follower.runs] == [("second", 5), ("first", 2)]
    log_of(tmp_path, run_id="first", resume_step=2).append(record(3))
    follower.poll()
    assert [(run.run_id, run.last_step) for run in follower.runs] == [("first", 3), ("second", 5)]


def test_a_folder_in_which_runs_begin_again_and_again_is_followed(tmp_path, monkeypatch):
    """After 16 fresh starts in one graph_dir the records of the next were said to be damaged."""
    monkeypatch.setattr(curves, "MOST_RUNS", 3)
    follower = Follower(tmp_path)
    for number in range(6):
        filled(tmp_path, range(1, 4), run_id=f"{number:016d}")
        assert follower.poll()
        newest = follower.runs[0]
        assert newest.run_id == f"{number:016d}" and list(newest.train.steps) == [1, 2, 3]
        assert not newest.messages
        assert len(follower.runs) == number + 1


def test_what_is_no_file_is_a_message_and_no_hang(tmp_path):
    filled(tmp_path, [1])
    follower = Follower(tmp_path)
    follower.poll()
    os.replace(tmp_path / "metrics.jsonl", tmp_path / "away")
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert follower.poll()
    assert follower.runs[0].messages == ["metrics.jsonl: not a file"]


def test_links_out_of_a_folder_are_not_followed(tmp_path):
    filled(tmp_path / "outside", [1]).finish()
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "metrics.json"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "outside" / name)
    free, bound = Follower(tmp_path / "run"), Follower(tmp_path / "run", within=tmp_path / "run")
    free.poll(), bound.poll()
    assert list(free.runs[0].train.steps) == [1] and not bound.runs


def test_events_and_samples_belong_to_their_run(tmp_path):
    filled(tmp_path, [10, 20], run_id="a")
    notes = [
        {"step": 10, "prompt": "p", "text": "old", "run_id": "a"},
        {"step": 20, "prompt": "p", "text": "will be made again", "run_id": "a"},
        {"step": 30, "prompt": "p", "text": "other", "run_id": "b"},
        {"step": 15, "prompt": "p", "text": "new", "run_id": "a", "more": [1]},
        {"step": 15, "prompt": "q", "text": "new", "run_id": "a"},
        {"step": 15, "prompt": "p", "text": "newest", "run_id": "a"},
    ]
    text = "".join(json.dumps(note) + "\n" for note in notes) + "damage\n[]\n"
    (tmp_path / "samples.jsonl").write_text(text)
    (tmp_path / "events.jsonl").write_text(text)
    run = read_run(tmp_path)
    assert [(s["step"], s["prompt"], s["text"]) for s in run.samples] == [
        (10, "p", "old"),
        (15, "p", "newest"),
        (15, "q", "new"),
    ]
    assert "more" not in run.samples[1] and len(run.events) == 5


def test_routers_are_kept_evenly_and_the_newest_too(tmp_path):
    run, most = Run(tmp_path / "metrics.jsonl"), 2 * run_curves.MOST_ROUTER_RECORDS
    for step in range(1, 5_001):
        run.take(record(step))
        assert len(run.routers) <= most + 1 and run.routers[-1][0] == step
    steps = [step for step, _ in run.router(50)]
    gaps = np.diff(steps)
    assert len(steps) == 50 and steps[-1] == 5_000 and gaps.max() <= 2 * gaps.min()
    for step, numbers in run.router():
        assert numbers["expert_load"][1][0] == step


def test_no_torch_and_no_numpy():
    """The live page starts on a machine in use."""
    code = "import sys, runtime.training.curves; sys.exit(len({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
