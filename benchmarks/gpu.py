"""The first quarter of an hour on one GPU: a command of 585 seconds at most, a second one of 120.

    python prepare_data.py --files a.jsonl --val_files b.jsonl --out_dir carried/data      (before)
    export GPTOSS_DATA=carried/data
    python -m benchmarks.gpu --name h100 --out results_of_the_gpu
    python -m benchmarks.gpu --name h100 --out results_of_the_gpu --second
    python -m benchmarks.gpu --name h100 --out results_of_the_gpu --third
    python -m benchmarks.gpu --name h100 --out results_of_the_gpu --stages modern latency

To carry: the checkout, and 10 MB of o200k_base shards in an ignored folder of it, which GPTOSS_DATA
names (2.5 M tokens are enough). Without them training runs on random ids, and its losses mean
nothing. Nothing is installed or downloaded. The second command reads the first's JSON in OUT, or in
.gpu/ of the checkout, where the first leaves a copy: on a fresh machine carry .gpu/NAME.json too.

The first command: a probe of the machine, the GPU's tests, training steps of three models (no
table, modern with Muon, the default) with the time by kernel, decoding one text, the loss, Hugging
Face's Qwen3-MoE. The second: what failed in the tests, with long tracebacks; a run that is resumed,
bit for bit; the tests that compile a decoder. The third, of another session: attention with the
learned bias by Triton, which is off by default: its tests, its speed, the default model's steps
with it. Sizes follow the memory of the GPU, stages and
predictions are in benchmarks/gpu_plan.py. A stage has seconds of its own and those that earlier
ones left; at its end, or when they are up, it is killed with all its children, and the next one
starts. OUT/NAME.log (NAME_second.log) is all that they print. OUT/NAME.json is written at each
figure: the command may be killed at any time. The table at the end shows each figure, what was
predicted, and a mark where they are more than 1.4 times apart. --tiny replaces every size by one
that a CPU does in seconds, to try the command itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from benchmarks import gpu_plan
from benchmarks.common import REPO, environment
from benchmarks.gpu_plan import CARDS, GIB, OFF, Stage
from benchmarks.measures import measures_of
from config_model import ModelConfig
from runtime.base import cli
from runtime.base.files import write_text_atomic
from runtime.data.shards import open_data

# How long a stage's program has, of its own seconds, to print where it hangs before it is killed.
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.25
LEAST_SECONDS = 3.0
# What a stage may take with --tiny, over its own seconds.
TINY_TIMES = 10
TIMED_OUT = 124
# The first command's JSON is also kept here for the second, whose OUT may be another folder. Git
# ignores it.
KEPT = REPO / ".gpu"
# Of torch 2.11; a stage's own settings in the environment win.
STAGE_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    "PYTHONUNBUFFERED": "1",
    # SIGABRT then prints where each thread is.
    "PYTHONFAULTHANDLER": "1",
}
SMALLEST_MEMORY = 79 * GIB
TAIL_LINES = 12
PR_SET_PDEATHSIG = 1
# Loaded here, for between fork and exec as little as possible should run.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


# ---------------------------------------------------------------------------------------- processes
def _die_with_parent() -> None:
    """In a new process: be killed when the command is, so that nothing holds the GPU after it."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have, in any session (from /proc;
    elsewhere none).
    """
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold anything; after it: state, parent.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def kill_all(process: subprocess.Popen, known: list[int]) -> None:
    """Kill a program that leads a group, its group, and descendants that left it; `known` are such
    of an earlier look.
    """
    for pid in {*known, *descendants(process.pid)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs in the driver cannot be waited for.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)


def run_command(
    command: list[str],
    log: BinaryIO,
    env: dict[str, str],
    seconds: float,
    on_poll: Callable[[], None],
) -> int:
    """Run a program for at most so many seconds, its output in `log`; its exit code, or TIMED_OUT.

    When its time is up it gets SIGABRT, for which Python prints where it is, and at the end of
    GRACE_SECONDS it is killed with its descendants; so are those that outlive it. They are killed
    too where this raises.
    """
    until = time.monotonic() + seconds
    grace = min(GRACE_SECONDS, seconds / 3)
    process = subprocess.Popen(
        command,
        cwd=REPO,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    known: list[int] = []
    try:
        while process.poll() is None and time.monotonic() < until - grace:
            known = descendants(process.pid)
            on_poll()
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            return process.returncode
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0.1))
        return TIMED_OUT
    finally:
        kill_all(process, known)
        on_poll()


def time_for(stages: dict[str, Stage], stage: str, left: float) -> float:
    """Seconds that a stage may take of those that are left: all but the ones that belong to the
    stages after it.
    """
    names = list(stages)
    return left - sum(stages[after].seconds for after in names[names.index(stage) + 1 :])


# ------------------------------------------------------------------------------------------- record
class Record:
    """Everything that a command knows, in one JSON file that is written again whenever there is
    more.
    """

    def __init__(self, path: Path, which: str):
        self.path = path
        self.stages: dict[str, dict] = {}
        self.about = {"which": which, "environment": environment()}

    def read_results(self, stage: str, folder: Path) -> None:
        """Take over the JSON files that a stage has written by now; store them if any is new."""
        found = {}
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            content = json.loads(path.read_text(encoding="utf-8"))
            known = content.pop("environment", {})
            self.about.setdefault(
                "stages_ran_with",
                {"hardware": known.get("hardware"), "versions": known.get("versions")},
            )
            found[path.stem] = content
        if found != self.stages[stage].get("results"):
            self.stages[stage]["results"] = found
            self.write()

    def probe(self) -> dict:
        """What the probe said of the machine, or nothing."""
        return next(iter(self.stages.get("probe", {}).get("results", {}).values()), {})

    def write(self) -> None:
        """Store it all, the table included."""
        content = self.about | {
            "machine": {k: v for k, v in self.probe().items() if k != "measures"},
            "stages": self.stages,
            "table": table(self.stages, self.probe().get("device", "")),
        }
        write_text_atomic(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def table(stages: dict[str, dict], device: str) -> list[dict]:
    """A row for each figure: stage, measure, value and unit (or why there is none), and the
    prediction with the ratio to it.
    """
    rows, card = [], gpu_plan.card_of(device)
    for stage, record in stages.items():
        for results in record.get("results", {}).values():
            for measure, figure in measures_of(results).items():
                row = {"stage": stage, "measure": measure, **figure}
                prediction = gpu_plan.predicted(stage, measure, results.get("size", ""), card)
                if prediction and "value" in figure:
                    expected = prediction.of(CARDS[card])
                    row |= {
                        "predicted": expected,
                        "ratio": figure["value"] / expected,
                        "how": prediction.how,
                    }
                    row["off"] = not 1 / OFF <= row["ratio"] <= OFF
                rows.append(row)
    return rows


def print_table(stages: dict[str, dict], rows: list[dict]) -> None:
    """The stages with how each ended, and their figures next to what was predicted."""
    print(f"{'stage':15}{'measure':32}{'value':>14} {'unit':9}{'predicted':>12}{'ratio':>8}")
    for stage, record in stages.items():
        print(f"{stage:15}{ending(record)}")
        for row in (row for row in rows if row["stage"] == stage):
            if "why" in row:
                print(f"{'':15}{row['measure']:32}none: {row['why'][:90]}")
                continue
            line = f"{'':15}{row['measure']:32}{row['value']:>14,.5g} {row['unit']:9}"
            if "predicted" in row:
                line += (
                    f"{row['predicted']:>12,.5g}{row['ratio']:>8.2f}"
                    + f"  <-- more than {OFF} x off" * row["off"]
                )
            print(line.rstrip())


def ending(record: dict) -> str:
    """How a stage ended, in a few words."""
    if "exit_code" not in record:
        return record.get("why", "running")
    how = {0: "done", TIMED_OUT: f"out of time ({record['limit_s']:.0f} s)"}.get(
        record["exit_code"], f"exit code {record['exit_code']}"
    )
    return f"{how}, {record['seconds']:.1f} s"


# --------------------------------------------------------------------------------------- the stages
def run_stage(
    name: str, stage: Stage, limit: float, record: Record, log: BinaryIO, work: Path
) -> None:
    """Run a stage's commands, also after one that fails, until `limit` seconds are up; all about it
    goes to the record.
    """
    started, results = time.monotonic(), work / name
    results.mkdir()
    env = STAGE_ENVIRONMENT | os.environ | stage.environment | {"GPTOSS_RESULTS": str(results)}
    if "GPTOSS_DATA" in env:
        env["GPTOSS_DATA"] = os.path.abspath(env["GPTOSS_DATA"])
    own = record.stages[name] = {
        "limit_s": round(limit, 1),
        "commands": [shlex.join(command) for command in stage.commands],
        "environment": stage.environment,
    }
    record.write()
    code = 0
    for command in stage.commands:
        begins = os.fstat(log.fileno()).st_size
        log.write(f"\n=== {name}: {shlex.join(command)}\n".encode())
        log.flush()
        left = limit - (time.monotonic() - started)
        ended = run_command(
            command, log, env, max(left, 1.0), lambda: record.read_results(name, results)
        )
        if ended:
            code = ended
            own["tail"] = own.get("tail", []) + tail_of(log, begins)
        if ended == TIMED_OUT:
            break
    own |= {"exit_code": code, "seconds": round(time.monotonic() - started, 1)}
    record.write()


def tail_of(log: BinaryIO, begins: int) -> list[str]:
    """The last lines of a log since a place in it."""
    log.seek(begins)
    lines = log.read().decode("utf-8", "replace").splitlines()
    return [line[:300] for line in lines[-TAIL_LINES:]]


def stages_of(
    args: argparse.Namespace, which: str, memory: float, out: Path, work: Path
) -> dict[str, Stage]:
    """The chosen stages of a command. ValueError for one that it does not have."""
    if which == "first":
        stages = gpu_plan.first(args.name, memory, args.tiny)
    elif which == "third":
        stages = gpu_plan.third(args.name, args.tiny)
    else:
        first_json = next(
            (
                folder / f"{args.name}.json"
                for folder in (out, KEPT)
                if (folder / f"{args.name}.json").is_file()
            ),
            out / f"{args.name}.json",
        )
        stages = gpu_plan.second(args.name, args.tiny, str(first_json), str(work / "checkpoints"))
    if unknown := set(args.stages or []) - stages.keys():
        raise ValueError(
            f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages)}"
        )
    chosen = {name: stages[name] for name in stages if not args.stages or name in args.stages}
    # A CPU that other programs share needs longer.
    times = TINY_TIMES if args.tiny else 1
    return {n: dataclasses.replace(s, seconds=times * s.seconds) for n, s in chosen.items()}


def run_all(
    args: argparse.Namespace, which: str, record: Record, log: BinaryIO, work: Path
) -> None:
    """All stages of a command, each in its own seconds and those that earlier ones left."""
    began = time.monotonic()
    stages = stages_of(args, which, SMALLEST_MEMORY, record.path.parent, work)
    total = sum(stage.seconds for stage in stages.values())
    for name in stages:
        # The probe has asked the GPU by now, and sizes follow it.
        memory = record.probe().get("memory_bytes") or SMALLEST_MEMORY
        stage = stages_of(args, which, memory, record.path.parent, work)[name]
        limit = time_for(stages, name, total - (time.monotonic() - began))
        if limit < LEAST_SECONDS:
            record.stages[name] = {"why": "no time was left"}
            record.write()
        else:
            run_stage(name, stage, limit, record, log, work)
        if which == "first":
            keep(record.path)
        print(f"{name:15}{ending(record.stages[name])}", flush=True)


def keep(path: Path) -> None:
    """Where the second command finds the first's record, if it can be written there."""
    with contextlib.suppress(OSError):
        KEPT.mkdir(exist_ok=True)
        shutil.copy(path, KEPT / path.name)


def check_data(data_dir: str | None, tiny: bool) -> None:
    """ValueError now, not in each stage, for shards that cannot be read, or that another vocabulary
    than the models' made.
    """
    if data_dir is None:
        return
    vocabulary, expected = open_data(data_dir)[0].vocabulary_size, ModelConfig().vocabulary_size
    if not tiny and vocabulary != expected:
        raise ValueError(
            f"GPTOSS_DATA {data_dir} has {vocabulary:,} ids, and sizes and predictions are for "
            f"{expected:,}: "
            "prepare the text with --tokenizer o200k_base, or leave GPTOSS_DATA out"
        )


def leave_on(number: int, frame) -> None:
    """A signal's handler: the stage is killed and the record written on the way out."""
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="of the machine: results go to OUT/NAME.json and OUT/NAME.log"
    )
    parser.add_argument("--out", required=True, help="folder for them")
    later = parser.add_mutually_exclusive_group()
    later.add_argument(
        "--second",
        action="store_true",
        help="the second command, after the first (NAME_second.json)",
    )
    later.add_argument(
        "--third",
        action="store_true",
        help="the third command: kernels that are off by default (NAME_third.json)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help="only these stages (default: all of the command)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for a CPU, to try the command itself"
    )
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+", args.name, re.ASCII):
        raise ValueError(f"name must be letters, digits, '.', '_' and '-', not {args.name!r}")
    check_data(os.environ.get("GPTOSS_DATA"), args.tiny)
    which = "second" if args.second else "third" if args.third else "first"
    out, stem = Path(args.out).resolve(), args.name + (f"_{which}" if which != "first" else "")
    with tempfile.TemporaryDirectory(prefix="gptoss_gpu_", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        # A stage that there is not is refused before anything is written.
        stages_of(args, which, SMALLEST_MEMORY, out, work)
        out.mkdir(parents=True, exist_ok=True)
        record = Record(out / f"{stem}.json", which)
        before = {
            number: signal.signal(number, leave_on) for number in (signal.SIGTERM, signal.SIGHUP)
        }
        try:
            (out / f"{stem}.log").write_bytes(b"")
            # Appended to, for the stages' programs write to it too.
            with open(out / f"{stem}.log", "a+b") as log:
                run_all(args, which, record, log, work)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            record.write()
            print_table(record.stages, table(record.stages, record.probe().get("device", "")))
    return int(any(stage.get("exit_code") != 0 for stage in record.stages.values()))


if __name__ == "__main__":
    cli.run_main(main)
