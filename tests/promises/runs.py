"""What becomes of a run that is killed, stopped, or out of disk: guarantees 1 to 5 and 18.

Whole runs are carried out by children of a fork server (`serve`): a process that has imported torch
and train, so that a restart costs a fraction of a second. A child tells through a pipe what it
begins to do, one character an event:

w a file operation inside save_checkpoint ( save_checkpoint begins s a step is done o any other file
operation ) and has returned

Crash points are not run but enumerated: `Recorder` notes what the real save code asks of the file
system, `Disk` says what may be left of it after every prefix of that, and the real find_latest has
to cope.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import prepare_data
import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base import cli, process
from runtime.base.files import TEMPORARY_SUFFIX
from runtime.base.process import StopRequest
from runtime.checkpoint import write as checkpoint
from runtime.checkpoint.folder import find_latest, folder_has_run
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.training import reporter
from runtime.training.optimizer import build_optimizer
from runtime.training.state import RunState
from tests.builders_runs import MODEL, SPEED, comparable, write_text
from tests.conftest import REPO
from tests.promises import Promise, Tally

STEPS = 40
TOKENS_PER_STEP = 2 * 2 * 16
FLAGS = [
    *MODEL,
    *SPEED,
    "--max_steps",
    str(STEPS),
    "--save_interval",
    "5",
    "--keep_last",
    "2",
    "--dropout",
    "0.1",
    "--router_bias_rate",
    "1e-3",
    "--num_threads",
    "1",
]
# An attempt takes about one.
HANG_SECONDS = 60
MOST_KILLS_A_RUN = 6
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


# ------------------------------------------------------------------------------ the file operations
class Operations:
    """Report every change to files below `roots`: `before` it happens, and `after`.

    Kinds: mkdir, open, write, truncate, fsync, fsync folder, replace, link, symlink, unlink. Reads
    are not reported.
    """

    def __init__(self, *roots: Path):
        self.roots = [os.path.abspath(root) for root in roots]
        # Path by descriptor, of files and folders.
        self.opened: dict[int, str] = {}

    def before(self, kind: str, path: str, half=lambda: None) -> int | None:
        """An operation begins; half() carries out half of a write. May raise.

        A number: only so many bytes are written.
        """

    def after(self, kind: str, path: str, more=None) -> None:
        """The operation is done.

        more: the bytes written, the new length, the second name of replace and link, the text of a
        symlink.
        """

    def ours(self, path) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False
        path = os.path.abspath(path)
        return any(path == root or path.startswith(root + os.sep) for root in self.roots)

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        real = {
            name: getattr(os, name)
            for name in ("mkdir", "unlink", "replace", "link", "symlink", "open", "close", "fsync")
        }

        def of_one(kind):
            def operation(path, *args, **kwargs):
                if not self.ours(path):
                    return real[kind](path, *args, **kwargs)
                self.before(kind, str(path))
                real[kind](path, *args, **kwargs)
                self.after(kind, str(path))

            return operation

        def of_two(kind):
            def operation(source, target, **kwargs):
                if not self.ours(target):
                    return real[kind](source, target, **kwargs)
                self.before(kind, str(target))
                real[kind](source, target, **kwargs)
                self.after(kind, str(source), str(target))

            return operation

        def open_descriptor(path, flags, *args, **kwargs):
            descriptor = real["open"](path, flags, *args, **kwargs)
            if self.ours(path):
                self.opened[descriptor] = str(path)
            return descriptor

        def close(descriptor):
            self.opened.pop(descriptor, None)
            real["close"](descriptor)

        def fsync(descriptor):
            path = self.opened.get(descriptor)
            if path is None:
                return real["fsync"](descriptor)
            kind = "fsync folder" if os.path.isdir(path) else "fsync"
            # The model's flush is the one that counts here: the disk's is left out, it is slow.
            self.before(kind, path)
            self.after(kind, path)

        real_open = builtins.open

        def open_file(path, mode="r", buffering=-1, *args, **kwargs):
            if "b" not in mode or not set(mode) & set("wax+") or not self.ours(path):
                return real_open(path, mode, buffering, *args, **kwargs)
            raw = _File(self, str(path), mode.replace("b", ""))
            return io.BufferedWriter(raw) if buffering else raw

        for name in ("mkdir", "unlink"):
            self._patches.enter_context(mock.patch.object(os, name, of_one(name)))
        for name in ("replace", "link", "symlink"):
            self._patches.enter_context(mock.patch.object(os, name, of_two(name)))
        for name, function in (("open", open_descriptor), ("close", close), ("fsync", fsync)):
            self._patches.enter_context(mock.patch.object(os, name, function))
        self._patches.enter_context(mock.patch.object(builtins, "open", open_file))
        return self

    def __exit__(self, *_):
        self._patches.close()


class _File(io.FileIO):
    """A file whose operations come by `Operations`."""

    def __init__(self, operations: Operations, path: str, mode: str):
        operations.before("open", path)
        super().__init__(path, mode)
        self.operations, self.path = operations, path
        operations.opened[self.fileno()] = path
        operations.after("open", path, mode)

    def write(self, data) -> int:
        data = bytes(data)
        limit = self.operations.before(
            "write", self.path, lambda: super(_File, self).write(data[: len(data) // 2])
        )
        written = super().write(data if limit is None else data[:limit])
        self.operations.after("write", self.path, data[:written])
        return written

    def truncate(self, size=None) -> int:
        self.operations.before("truncate", self.path)
        size = super().truncate(size)
        self.operations.after("truncate", self.path, size)
        return size

    def close(self) -> None:
        if not self.closed:
            self.operations.opened.pop(self.fileno(), None)
        super().close()


class Faults(Operations):
    """Fail operation number `index` (the first is 1) with `code`, and all later ones if `lasting`.

    A full disk lets files be deleted and folders be flushed. `short`: the write that does not fit
    writes its half first.
    """

    NEED_ROOM = {"mkdir", "open", "write", "fsync", "replace", "link", "symlink"}

    def __init__(self, *roots: Path, index: int, code: int, lasting: bool, short: bool):
        super().__init__(*roots)
        self.index, self.code, self.lasting, self.short = index, code, lasting, short
        self.number, self.log = 0, []

    def before(self, kind, path, half=lambda: None):
        self.number += 1
        self.log.append(kind)
        if self.number < self.index or self.number > self.index and not self.lasting:
            return
        if self.code == errno.ENOSPC and kind not in self.NEED_ROOM:
            return
        if kind == "write" and self.short:
            # This one comes back short, the next one fails.
            self.short, self.index = (
                False,
                self.number + 1,
            )
            return 1
        raise OSError(self.code, os.strerror(self.code), path)


# ---------------------------------------------------------------------------------- the fork server
class _Watched(Operations):
    """In a child: tells what begins, and stops for good where the job says so."""

    def __init__(self, job: dict, pipe: int, *roots: Path):
        super().__init__(*roots)
        self.job, self.pipe, self.saving, self.counts = job, pipe, False, dict.fromkeys("wo()s", 0)
        fault = job.get("fault")
        self.faults = Faults(*roots, **fault) if fault else None

    def tell(self, event: str, half=lambda: None) -> None:
        self.counts[event] += 1
        here = (
            self.job.get("exact")
            and event in self.job["events"]
            and sum(self.counts[e] for e in self.job["events"]) == self.job["index"]
        )
        if here:
            half()
        os.write(self.pipe, event.encode())
        if here:
            # Until the kill.
            signal.pause()

    def before(self, kind, path, half=lambda: None):
        self.tell("w" if self.saving else "o", half)
        return self.faults.before(kind, path, half) if self.faults else None


def _mutate(mutant: str) -> None:
    """Break train, for the tests of these tests.

    "forgets NAME": a resume without that part of RunState. Or "dies of signals".
    """
    if mutant == "dies of signals":
        process.STOP_SIGNALS = []
    elif mutant:
        initial_state, name = train.initial_state, mutant.removeprefix("forgets ")
        train.initial_state = lambda plan: dataclasses.replace(
            initial_state(plan), **{name: getattr(RunState(), name)}
        )


def _child(job: dict, pipe: int) -> None:
    """Carry out a job as `python train.py ARGV` would; never returns."""
    code = 70
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (*process.STOP_SIGNALS, signal.SIGPIPE):
            # A shell that started us in the background ignored it.
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        watched = _Watched(job, pipe, *map(Path, job["roots"]))
        requested, save = StopRequest.requested, train.save_checkpoint

        def after_a_step(stop):
            watched.tell("s")
            if watched.counts["s"] == job.get("stop_after"):
                signal.raise_signal(signal.SIGTERM)
            return requested(stop)

        def watched_save(*args, **kwargs):
            watched.tell("(")
            watched.saving = True
            try:
                path = save(*args, **kwargs)
            finally:
                watched.saving = False
            watched.tell(")")
            return path

        StopRequest.requested, train.save_checkpoint = after_a_step, watched_save
        _mutate(job["mutant"])
        sys.argv = [job["module"], *job["argv"]]
        with watched:
            cli.run_main(importlib.import_module(job["module"]).main)
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _attempt(job: dict) -> dict:
    """Fork a child for a job, send it the job's signal at its moment, and wait for its end."""
    reader, pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(job, pipe)
    os.close(pipe)
    events, sent, hung = "", False, False
    while True:
        if not select.select([reader], [], [], HANG_SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
            hung = True
        chunk = os.read(reader, 1 << 16).decode()
        if not chunk:
            break
        events += chunk
        if not sent and "signal" in job and sum(map(events.count, job["events"])) >= job["index"]:
            os.kill(pid, job["signal"])
            sent = True
    os.close(reader)
    return {
        "events": events,
        "code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),
        "hung": hung,
    }


def serve() -> None:
    """Answer a job per line, until stdin ends.

    torch must not have computed anything here: its threads would not exist in the child.
    """
    import torch._dynamo  # noqa: F401 - torch.optim does so when an optimizer is made, and it takes more than all else in a child

    torch.set_num_threads(1)
    reporter.draw_plots = lambda *_, **__: None
    for line in sys.stdin:
        print(json.dumps(_attempt(json.loads(line))), flush=True)


@functools.cache
def home() -> Path:
    """A folder for this process's runs, with prepared data in it."""
    home = Path(tempfile.mkdtemp(prefix="promises-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        assert not prepare_data.main(
            [
                "--files",
                str(write_text(home / "t.jsonl", 0)),
                "--val_files",
                str(write_text(home / "v.jsonl", 1, 20)),
                "--tokenizer",
                "byte",
                "--out_dir",
                str(home / "data"),
                "--num_proc",
                "1",
            ]
        )
    return home


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-c", "from tests.promises import runs; runs.serve()"],
        cwd=REPO,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )

    def end():
        server.stdin.close()
        server.wait(HANG_SECONDS)
        server.stdout.close()

    atexit.register(end)
    return server


@dataclass
class Attempt:
    """What a child did, its exit code (or minus the signal that ended it) and what it printed."""

    events: str
    code: int
    output: str
    hung: bool

    @property
    def in_a_save(self) -> bool:
        """Whether it ended between the beginning and the end of save_checkpoint."""
        return self.events.count("(") > self.events.count(")")


@dataclass(frozen=True)
class Command:
    """What a run is: the module with its main(argv), and the flags of a new run."""

    name: str
    module: str
    flags: Callable[[], list[str]]


PRETRAINING = Command("pre-training", "train", lambda: FLAGS)


class Run:
    """Run in a folder of its own, as a user's script would: with --resume once it can resume."""

    numbers = itertools.count()

    def __init__(self, mutant: str = "", command: Command = PRETRAINING):
        self.folder, self.mutant = home() / f"run-{next(self.numbers)}", mutant
        self.command = command
        self.ckpt_dir, self.graph_dir = self.folder / "ckpt", self.folder / "graphs"
        self.folder.mkdir()

    def __call__(self, **job) -> Attempt:
        folders = [
            "--data_dir",
            str(home() / "data"),
            "--ckpt_dir",
            str(self.ckpt_dir),
            "--graph_dir",
            str(self.graph_dir),
        ]
        flags = ["--resume"] if folder_has_run(self.ckpt_dir) else self.command.flags()
        job |= {
            "module": self.command.module,
            "argv": [*flags, *folders],
            "log": str(self.folder / "log"),
            "roots": [str(self.folder)],
            "mutant": self.mutant,
        }
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        return Attempt(
            answer["events"], answer["code"], (self.folder / "log").read_text(), answer["hung"]
        )

    def records(self) -> list[dict]:
        return [
            json.loads(line, parse_constant=_not_json)
            for line in (self.graph_dir / "metrics.jsonl").read_text().splitlines()
        ]

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def _not_json(name):
    raise ValueError(f"{name} is not JSON")


@functools.cache
def straight(command: Command = PRETRAINING) -> tuple[Run, Attempt]:
    """The run that nothing interrupts."""
    run = Run(command=command)
    attempt = run()
    assert attempt.code == 0, attempt.output
    return run, attempt


def difference(run: Run, expected: Run | None = None) -> str:
    """Return where a run's final checkpoint differs from the uninterrupted run's, or "".

    They are compared bit for bit.
    """
    expected = expected or straight(run.command)[0]
    try:
        mine, theirs = (
            read_checkpoint(one.ckpt_dir / "latest.pt", optimizer=True) for one in (run, expected)
        )
        best, their_best = (
            read_checkpoint(one.ckpt_dir / "best.pt").step for one in (run, expected)
        )
    except CheckpointError as error:
        return str(error)
    if mine.step != theirs.step:
        return f"latest.pt is of step {mine.step}, not {theirs.step}"
    for group in ("model", "trained", "optimizer"):
        a, b = getattr(mine, group), getattr(theirs, group)
        if a.keys() != b.keys():
            return f"{group} has other names"
        for name in a:
            if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name]):
                return f"{group} {name} differs"
    for name, value in theirs.run.items():
        if name not in ("run_id", "train_seconds", "window") and mine.run.get(name) != value:
            return f"{name} is {mine.run.get(name)}, not {value}"
    if (mine.step, mine.val_loss, best) != (theirs.step, theirs.val_loss, their_best):
        return (
            f"latest.pt is of step {mine.step} and best.pt of step {best}, not {theirs.step} and "
            f"{their_best}"
        )
    return ""


def metrics_difference(run: Run, expected: Run | None = None) -> str:
    """Return the same for its metrics, except for clock values.

    Strict JSON, steps that increase, tokens that add up, no record twice.
    """
    try:
        records = run.records()
        saved = json.loads((run.graph_dir / "metrics.json").read_text(), parse_constant=_not_json)
    except (OSError, ValueError) as error:
        return f"metrics cannot be read: {error}"
    for kind in ("train", "val", "score"):
        steps = [record["step"] for record in records if record["kind"] == kind]
        if not all(a < b for a, b in itertools.pairwise(steps)):
            return f"{kind} steps do not increase: {steps}"
        if comparable(saved.get(kind, [])) != comparable(
            [record for record in records if record["kind"] == kind]
        ):
            return f"metrics.json has other {kind} records than metrics.jsonl"
    if bad := [
        record["step"]
        for record in records
        if run.command is PRETRAINING and record["tokens_seen"] != record["step"] * TOKENS_PER_STEP
    ]:
        return f"tokens_seen is not step x {TOKENS_PER_STEP} at step {bad[0]}"
    mine, theirs = comparable(records), comparable((expected or straight(run.command)[0]).records())
    if mine != theirs:
        return next(
            (
                f"the record of step {b['step']} differs"
                for a, b in zip(mine, theirs, strict=False)
                if a != b
            ),
            f"{len(mine)} records, not {len(theirs)}",
        )
    return ""


# ----------------------------------------------------------------------------------- 1, 18: kill -9
def _moment(r: random.Random, in_a_save: bool, command: Command = PRETRAINING) -> dict:
    """Choose when to kill an attempt: at an operation of one of its next saves, or elsewhere.

    As the operation begins, or with half of a write done.
    """
    events = straight(command)[1].events
    operations = events[: events.index(")")].count("w")
    if in_a_save:
        return {"events": "w", "index": r.randint(1, 2 * operations), "exact": r.random() < 0.75}
    if r.random() < 0.4:
        # Metrics: as they are opened, appended to, rewritten.
        return {
            "events": "o",
            "index": r.randint(1, 20),
            "exact": True,
        }
    return {"events": "s", "index": r.randint(1, 12), "exact": False}


@functools.cache
def killed_runs(
    count: int, mutant: str = "", command: Command = PRETRAINING
) -> tuple[Tally, Tally]:
    """Kill runs `count` times in all and restart each until it is done.

    Count the kills that left no trace in the run's result and metrics.
    """
    states, metrics, kills, inside = Tally(), Tally(), 0, 0
    for seed in itertools.count():
        if kills >= count:
            break
        r, run, mine, faults = random.Random(seed), Run(mutant, command), 0, []
        while True:
            killing = kills < count and mine < MOST_KILLS_A_RUN
            attempt = (
                run(**_moment(r, inside * 2 <= kills, command), signal=signal.SIGKILL)
                if killing
                else run()
            )
            if "skipped a checkpoint that cannot be read" in attempt.output:
                faults.append("a damaged checkpoint was left")
            if attempt.code != -signal.SIGKILL or attempt.hung:
                break
            kills, mine, inside = kills + 1, mine + 1, inside + attempt.in_a_save
        if attempt.code or attempt.hung:
            faults.append(f"exit code {attempt.code}: {attempt.output[-300:]}")
        fault = "; ".join(faults) or difference(run)
        metrics_fault = metrics_difference(run)
        for _ in range(mine):
            states.add(not fault, f"seed {seed}, {mine} kills: {fault}")
            metrics.add(not metrics_fault, f"seed {seed}, {mine} kills: {metrics_fault}")
        run.remove()
    states.detail = {"kills": kills, "kills inside a save": inside, "runs": seed}
    metrics.detail = {"records a run": len(straight(command)[0].records())}
    return states, metrics


def same_after_kills(count: int) -> Tally:
    """1. At least a quarter of the kills fall inside a save."""
    states, _ = killed_runs(count)
    if states.detail["kills inside a save"] * 4 < states.detail["kills"]:
        return dataclasses.replace(
            states, held=0, failures=["too few kills fell inside a save to say anything"]
        )
    return states


def same_metrics_after_kills(count: int) -> Tally:
    """18, from the runs of 1."""
    return killed_runs(count)[1]


# ---------------------------------------------------------------------------------------- 2: resume
def same_after_resume(count: int, mutant: str = "") -> Tally:
    """2. Stop after step k, for `count` of the k there are, and continue."""
    tally = Tally()
    for stop_after in sorted(random.Random(0).sample(range(1, STEPS), min(count, STEPS - 1))):
        run = Run(mutant)
        stopped = run(stop_after=stop_after)
        reached = find_latest(run.ckpt_dir)[0].step if folder_has_run(run.ckpt_dir) else 0
        attempt = run()
        fault = (
            f"exit codes {stopped.code} and {attempt.code}: {attempt.output[-300:]}"
            if (stopped.code, attempt.code) != (128 + signal.SIGTERM, 0)
            else f"its checkpoint was of step {reached}"
            if reached != stop_after
            else difference(run) or metrics_difference(run)
        )
        tally.add(not fault, f"stopped after step {stop_after}: {fault}")
        run.remove()
    return tally


# ---------------------------------------------------------------------------------- 3: crash points
GONE, FOLDER = object(), "folder"


@dataclass(frozen=True)
class Link:
    """A symbolic link's text."""

    text: str


class Disk:
    """A file system that keeps exactly what POSIX guarantees.

    Content after fsync, names after fsync of their folder.
    """

    def __init__(self, root: str):
        # A folder that is surely on the disk.
        self.root = root
        # Of each file: as read now, and as surely on the disk.
        self.contents: list[list[bytes]] = []
        # Number of the file that was last opened under a path.
        self.opened: dict[str, int] = {}
        # Path -> number of a file, Link or FOLDER, as seen now.
        self.names: dict[str, object] = {}
        # The same, as surely on the disk.
        self.flushed: dict[str, object] = {}
        # Changes of names between the two, in order.
        self.pending: list[dict[str, object]] = []

    def do(self, kind: str, path: str, more=None) -> None:
        """An operation, as `Operations.after` is told of it."""
        if kind == "open":
            number = self.names.get(path)
            if number is None:
                number = len(self.contents)
                self.contents.append([b"", b""])
                self._change({path: number})
            elif "w" in more:
                self.contents[number][0] = b""
            self.opened[path] = number
        elif kind == "write":
            self.contents[self.opened[path]][0] += more
        elif kind == "truncate":
            self.contents[self.opened[path]][0] = self.contents[self.opened[path]][0][:more]
        elif kind == "fsync":
            self.contents[self.opened[path]][1] = self.contents[self.opened[path]][0]
        elif kind == "fsync folder":
            here = [
                change for change in self.pending if os.path.dirname(next(iter(change))) == path
            ]
            self.pending = [change for change in self.pending if change not in here]
            for change in here:
                self._apply(self.flushed, change)
        elif kind == "mkdir":
            self._change({path: FOLDER})
        elif kind == "link":
            self._change({more: self.names[path]})
        elif kind == "symlink":
            self._change({more: Link(path)})
        elif kind == "replace":
            # POSIX: over another name of the same file it does nothing.
            if self.names[path] != self.names.get(more):
                self._change({path: GONE, more: self.names[path]})
        elif kind == "unlink":
            self._change({path: GONE})
        else:
            raise ValueError(kind)

    def _change(self, change: dict) -> None:
        self.pending.append(change)
        self._apply(self.names, change)

    @staticmethod
    def _apply(names: dict, change: dict) -> None:
        names.update(change)
        for path in [path for path, what in names.items() if what is GONE]:
            del names[path]

    def after_kill(self, half_written: tuple[str, bytes] | None = None) -> State:
        """What a killed process leaves: everything it did, and half of its current write."""
        contents = [now for now, _ in self.contents]
        if half_written:
            contents[self.opened[half_written[0]]] += half_written[1][: len(half_written[1]) // 2]
        return self._state(self.names, contents)

    def after_power_loss(self) -> Iterator[State]:
        """Yield every state that may be left after a power loss.

        Of the name changes that were not flushed, any subset is made (beyond 7: the first so many).
        Of unflushed file content there is nothing, half, half and then zeros, zeros, or all.
        """
        number = len(self.pending)
        kept = (
            itertools.product((True, False), repeat=number)
            if number <= 7
            else ([i < n for i in range(number)] for n in range(number + 1))
        )
        for choice in kept:
            names = dict(self.flushed)
            for change in itertools.compress(self.pending, choice):
                self._apply(names, change)
            files = sorted({what for what in names.values() if isinstance(what, int)})
            for contents in itertools.product(*(self._torn(file) for file in files)):
                yield self._state(names, dict(zip(files, contents, strict=True)))

    def _state(self, names: dict, contents) -> State:
        """Names whose folders are there, and contents by number of the file."""

        def reached(path: str) -> bool:
            return (
                path == self.root or names.get(path) is not None and reached(os.path.dirname(path))
            )

        return State(
            tuple(
                (
                    path,
                    what
                    if not isinstance(what, int)
                    else (what, b"" if path.endswith(TEMPORARY_SUFFIX) else contents[what]),
                )
                for path, what in sorted(names.items())
                if reached(path)
            )
        )

    def _torn(self, file: int) -> list[bytes]:
        now, kept = self.contents[file]
        half = len(now) // 2
        return (
            [now]
            if now == kept
            else list(
                dict.fromkeys(
                    [kept, now[:half], now[:half] + bytes(len(now) - half), bytes(len(now)), now]
                )
            )
        )


@dataclass(frozen=True)
class State:
    """Return a folder that a crash left, sorted: (path, file number and content, Link or FOLDER).

    Files under temporary names are never opened again, so their content makes no other state.
    """

    entries: tuple

    def make(self, root: str, folder: Path) -> None:
        """Make it below `folder`, in place of `root`."""
        made = {}
        for path, what in self.entries:
            path = folder / os.path.relpath(path, root)
            if what is FOLDER:
                path.mkdir()
            elif isinstance(what, Link):
                path.symlink_to(what.text)
            elif path.suffix == TEMPORARY_SUFFIX:
                path.write_bytes(b"")
            elif what[0] in made:
                os.link(made[what[0]], path)
            else:
                path.write_bytes(what[1])
                made[what[0]] = path


class Recorder(Operations):
    """Notes operations, and what it is given between them."""

    def __init__(self, *roots: Path, forget: frozenset[str] = frozenset()):
        super().__init__(*roots)
        self.log, self.forget = [], forget

    def after(self, kind, path, more=None):
        if kind not in self.forget:
            self.log.append((kind, path, more))


@dataclass
class Verdict:
    """The reader's view of a state: step of the newest checkpoint (0: none).

    Also its faults, and whether it can be saved into.
    """

    step: int
    unloadable: str
    recovers: str


@dataclass
class Crashes:
    """Counts of an enumeration."""

    operations: int = 0
    states: dict[str, int] = dataclasses.field(default_factory=lambda: {"kill": 0, "power loss": 0})
    unloadable: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"kill": 0, "power loss": 0}
    )
    lost: dict[str, int] = dataclasses.field(default_factory=lambda: {"kill": 0, "power loss": 0})
    distinct: int = 0
    tally: Tally = dataclasses.field(default_factory=Tally)


@functools.cache
def _tiny() -> tuple[LLM, torch.optim.Optimizer, TrainConfig]:
    torch.manual_seed(0)
    config = TrainConfig(lr=1e-2, min_lr=0.0)
    model = LLM(
        ModelConfig(
            d_model=8,
            transformer_blocks=1,
            context_length=8,
            vocabulary_size=16,
            num_heads=2,
            num_kv_heads=1,
            num_experts=2,
            top_k=1,
            d_ff=4,
        )
    )
    optimizer = build_optimizer(model, config)
    initialise_state(optimizer)
    return model, optimizer, config


def _save(folder: Path, step: int, keep_last: int = 2) -> None:
    """The real thing, of a tiny model whose weights tell the step."""
    model, optimizer, config = _tiny()
    with torch.no_grad():
        model.embed.weight.fill_(step / 1000)
    save_checkpoint(
        folder,
        step,
        model,
        optimizer,
        train_config=config,
        tokenizer_state={"name": "byte"},
        data_fingerprint="abc",
        run={"step": step},
        keep_last=keep_last,
        is_best=step % 2 == 1,
    )


def _judge(folder: Path, good: set[bytes]) -> Verdict:
    """Read a folder as a resume does, and every final name in it, then save into it.

    Skip names whose content was found good before.
    """
    unloadable, step = [], 0
    for path in sorted(folder.glob("*.pt")) if folder.is_dir() else []:
        try:
            if not path.is_file() or (content := path.read_bytes()) not in good:
                read_checkpoint(path, optimizer=True)
                good.add(content)
        except CheckpointError as error:
            unloadable.append(str(error).removeprefix(str(folder)))
    if folder_has_run(folder):
        try:
            found, skipped = find_latest(folder)
            step = found.step
            if float(found.model["embed.weight"][0, 0]) != torch.tensor(step / 1000).item():
                unloadable.append(f"step {step} has another step's weights")
            unloadable += skipped
        except CheckpointError as error:
            unloadable.append(str(error))
    if unloadable:
        return Verdict(step, "; ".join(unloadable), "")
    try:
        _save(folder, 900)
        left = [path.name for path in folder.iterdir() if path.name.endswith(TEMPORARY_SUFFIX)]
        recovers = (
            f"{left[0]} stays"
            if left
            else ""
            if find_latest(folder)[0].step == 900
            else "the next save is not found"
        )
    except CheckpointError as error:
        recovers = str(error)
    return Verdict(step, "", recovers)


# File systems, by what they refuse.
LINKS = {
    "hard links": (),
    "symbolic links": ("link",),
    "no links": ("link", "symlink"),
}


def enumerate_crashes(
    saves: int,
    refused: tuple[str, ...] = (),
    forget: frozenset[str] = frozenset(),
    patches: dict | None = None,
) -> Crashes:
    """Record `saves` consecutive saves and judge what every crash in them may leave.

    refused: operations that the file system does not support. For tests of this test: forget, kinds
    of operations that the disk ignores (an fsync that flushes nothing), and patches, other
    functions in runtime.checkpoint.write.
    """
    crashes, verdicts, good = Crashes(), {}, set()

    def refuse(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with tempfile.TemporaryDirectory(prefix="crashes-") as place, contextlib.ExitStack() as stack:
        root, ckpt_dir = os.path.join(place, "recorded"), Path(place, "recorded", "runs", "ckpt")
        os.mkdir(root)
        for name in refused:
            stack.enter_context(mock.patch.object(os, name, refuse))
        with contextlib.ExitStack() as changed:
            for name, function in (patches or {}).items():
                changed.enter_context(mock.patch.object(checkpoint, name, function))
            with Recorder(Path(root), forget=forget) as recorder:
                for step in range(1, saves + 1):
                    _save(ckpt_dir, step)
                    recorder.log.append(("saved", step, None))

        def judge(crash: str, state: State, committed: int, where: str) -> None:
            if state not in verdicts:
                folder = Path(place, f"state-{len(verdicts)}")
                folder.mkdir()
                state.make(root, folder)
                # Whose flushes cost nothing.
                with Operations(folder):
                    verdicts[state] = _judge(folder / "runs" / "ckpt", good)
                shutil.rmtree(folder)
            verdict = verdicts[state]
            crashes.states[crash] += 1
            crashes.unloadable[crash] += bool(verdict.unloadable)
            crashes.lost[crash] += verdict.step < committed
            fault = verdict.unloadable or (
                f"step {committed} was saved, step {verdict.step} is found"
                if verdict.step < committed
                else verdict.recovers
            )
            crashes.tally.add(not fault, f"{crash} {where}: {fault}")

        disk, committed = Disk(root), 0
        for number, (kind, path, more) in enumerate([*recorder.log, ("end", "", None)]):
            if kind == "saved":
                committed = path
                continue
            where = (
                f"before operation {number}, {kind} {os.path.relpath(path, root) if path else ''}"
            )
            judge("kill", disk.after_kill(), committed, where)
            if kind == "write":
                judge("kill", disk.after_kill((path, more)), committed, where + ", half done")
            for state in dict.fromkeys(disk.after_power_loss()):
                judge("power loss", state, committed, where)
            if kind != "end":
                disk.do(kind, path, more)
                crashes.operations += 1
        crashes.distinct = len(verdicts)
    return crashes


def no_crash_loses_a_checkpoint(count: int) -> Tally:
    """3. Exhaustive over `count` consecutive saves.

    On file systems with hard links, with symbolic links only, and with neither.
    """
    tally, kinds = Tally(), ("kill", "power loss")
    totals = dict.fromkeys(
        (
            "operations",
            *(
                f"{what} after a {crash}"
                for crash in kinds
                for what in ("states", "unloadable", "lost commits")
            ),
            "distinct states",
        ),
        0,
    )
    for name, refused in LINKS.items():
        crashes = enumerate_crashes(count, refused)
        tally.held, tally.tried = tally.held + crashes.tally.held, tally.tried + crashes.tally.tried
        tally.failures += [f"{name}: {failure}" for failure in crashes.tally.failures]
        totals["operations"] += crashes.operations
        totals["distinct states"] += crashes.distinct
        for crash in kinds:
            totals[f"states after a {crash}"] += crashes.states[crash]
            totals[f"unloadable after a {crash}"] += crashes.unloadable[crash]
            totals[f"lost commits after a {crash}"] += crashes.lost[crash]
    tally.detail = totals
    return tally


# --------------------------------------------------------------------------------------- 4: signals
def signals_save_and_leave(count: int, mutant: str = "") -> Tally:
    """4. `count` signals, in turn SIGTERM, SIGINT and SIGUSR1, at random events.

    They fall between the first step and the last save.
    """
    events = straight()[1].events
    first, last = (
        events.index("s") + 1,
        events.rindex("(", 0, events.rindex("(")) - 3 * len(events) // STEPS,
    )
    tally = Tally()
    for seed in range(count):
        run, number, index = (
            Run(mutant),
            SIGNALS[seed % len(SIGNALS)],
            random.Random(seed).randint(first, last),
        )
        stopped = run(events="wo()s", index=index, signal=int(number))
        step = stopped.events.count("s")
        fault = ""
        if stopped.code != 128 + number or "Traceback" in stopped.output or stopped.hung:
            fault = f"exit code {stopped.code}: {stopped.output[-300:]}"
        elif f"stopped after step {step}," not in stopped.output:
            fault = f"step {step} was the last, and it says {stopped.output[-200:]}"
        elif stopped.events[index:].count("s") > 8:
            # It may do a few while the signal is on its way, with two processes for one core.
            fault = f"{stopped.events[index:].count('s')} steps after the signal"
        elif (latest := read_checkpoint(run.ckpt_dir / "latest.pt", optimizer=True)).step != step:
            fault = f"the checkpoint is of step {latest.step}, not {step}"
        else:
            attempt = run()
            fault = (
                f"resumed: exit code {attempt.code}: {attempt.output[-300:]}"
                if attempt.code
                else difference(run) or metrics_difference(run)
            )
        tally.add(not fault, f"seed {seed}, {number.name} at event {index}: {fault}")
        run.remove()
    return tally


# ------------------------------------------------------------------------------------ 5: full disks
def _faults(operations: int) -> list[dict]:
    """Every way in which operations 1 .. n fail here."""
    return [
        {"index": index, "code": code, "lasting": lasting, "short": short}
        for index in range(1, operations + 1)
        for code in (errno.ENOSPC, errno.EIO)
        for lasting in (False, True)
        for short in (False, True)
    ]


def _one_line(text: str) -> bool:
    return text.isprintable() and len(text) < 700


def _failing_save(template: Path, folder: Path, fault: dict) -> str:
    """A third save that meets `fault`: what is wrong with what is then, or ""."""
    shutil.copytree(template, folder, symlinks=True)
    error = None
    try:
        with Faults(folder, **fault):
            _save(folder, 3)
    except CheckpointError as caught:
        error = str(caught)
    except BaseException as caught:
        return f"{type(caught).__name__}: {caught}"
    if error is not None and not (_one_line(error) and str(folder) in error):
        return f"it says {error!r}"
    for path in folder.glob("*.pt"):
        try:
            read_checkpoint(path, optimizer=True)
        except CheckpointError as unreadable:
            return f"after {error}: {unreadable}"
    found, skipped = find_latest(folder)
    if skipped or found.step < (2 if error else 3):
        return f"after {error}: step {found.step} is found, {skipped}"
    _save(folder, 4)
    left = [path.name for path in folder.iterdir() if path.name.endswith(TEMPORARY_SUFFIX)]
    return (
        f"{left[0]} stays"
        if left
        else ""
        if find_latest(folder)[0].step == 4
        else "the next save is not found"
    )


def _failing_run(run: Run, fault: dict) -> str:
    """A run that meets `fault`, and then a resume: what is wrong with them, or ""."""
    attempt = run(fault=fault)
    says = [line for line in attempt.output.splitlines() if line.startswith("error: ")]
    saved = attempt.events.count(")")
    if (
        attempt.code not in (0, 2)
        or attempt.hung
        or "Traceback" in attempt.output
        or len(says) != (attempt.code == 2)
        or not all(map(_one_line, says))
    ):
        return f"exit code {attempt.code}: {attempt.output[-300:]}"
    if saved and (found := find_latest(run.ckpt_dir))[1] or saved and found[0].step < 5 * saved:
        return f"after {saved} saves step {found[0].step} is found, {found[1]}"
    no_metrics = attempt.output.count("no more metrics")
    if attempt.code:
        again = run()
        no_metrics += again.output.count("no more metrics")
        if again.code:
            return f"after {says[0]}, exit code {again.code}: {again.output[-300:]}"
    if no_metrics > 1:
        return f"it says {no_metrics} times that there are no more metrics"
    return difference(run) or ("" if no_metrics else metrics_difference(run))


def full_disks_cost_nothing(count: int) -> Tally:
    """5. In a quarter of `count` runs one operation on checkpoints or metrics fails.

    Or all from there on. The others are saves of a tiny model, which have fewer than 400 ways to
    fail.
    """
    tally, r = Tally(), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="full-") as place:
        template = Path(place, "template")
        for step in (1, 2):
            _save(template, step)
        shutil.copytree(template, Path(place, "counted"))
        with Faults(Path(place, "counted"), index=0, code=0, lasting=False, short=False) as counted:
            _save(Path(place, "counted"), 3)
        cases = [
            fault
            for fault in _faults(counted.number)
            if counted.log[fault["index"] - 1] == "write" or not fault["short"]
        ]
        saves = cases if (wanted := count - count // 4) >= len(cases) else r.sample(cases, wanted)
        for number, fault in enumerate(saves):
            wrong = _failing_save(template, Path(place, str(number)), fault)
            tally.add(not wrong, f"save, {counted.log[fault['index'] - 1]}, {fault}: {wrong}")
    events = straight()[1].events
    operations = events.count("o") + events.count("w")
    runs = r.sample(_faults(operations), count // 4)
    for fault in runs:
        run = Run()
        wrong = _failing_run(run, fault)
        tally.add(not wrong, f"run, {fault}: {wrong}")
        run.remove()
    tally.detail = {"saves": len(saves), "ways for a save to fail": len(cases), "runs": len(runs)}
    return tally


PROMISES = [
    Promise(
        1,
        "Killed (-9) at any moment, also inside a save, and restarted: the same weights and "
        "optimizer state, bit for bit",
        same_after_kills,
        3,
        200,
        50,
        "0 of 1; 3 of 5 kills inside a save leave a run that cannot go on",
    ),
    Promise(
        2,
        "Stopped after any step and resumed: the run that was never stopped, bit for bit",
        same_after_resume,
        3,
        39,
        39,
        "4 of 58 tensors equal",
    ),
    Promise(
        3,
        "No crash of the program or the power, at any operation of a save, costs a finished "
        "checkpoint or leaves a broken one",
        no_crash_loses_a_checkpoint,
        2,
        6,
        4,
        "unloadable: 32 of 73 states after a kill, 7,098 of 9,020 after a power loss",
    ),
    Promise(
        4,
        "SIGTERM, SIGINT, SIGUSR1: finishes the step, saves, leaves with 128 + N; resumed, "
        "the same run bit for bit",
        signals_save_and_leave,
        3,
        90,
        90,
        "0 of 2",
    ),
    Promise(
        5,
        "A full or failing disk, at any write, costs one line: earlier checkpoints load, and "
        "the run can go on",
        full_disks_cost_nothing,
        8,
        600,
        400,
        "a traceback and a torn file",
    ),
    Promise(
        18,
        "Metrics of a killed run are those of the run that was not: no step twice, none "
        "missing, strict JSON",
        same_metrics_after_kills,
        3,
        200,
        50,
        "halved loss, steps 4, 8, 4, 8",
    ),
]
