"""What becomes of a run on ranks when one of them is killed, hangs, fails or differs.

`RanksRun` does torchrun's part, as far as its ranks can tell: it has the store, starts the ranks,
and when one ends early it ends the others and starts all of them again with the same command. They
are forked from a process that has imported PyTorch (tests/ranks.py), so that a start costs a second
or two. tests/distributed/test_torchrun.py has torchrun itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from runtime.checkpoint.folder import find_latest
from tests.builders_runs import MODEL, SPEED
from tests.promises import Promise, Tally, runs
from tests.promises.common import attempt, byte_data
from tests.ranks import PRELOADED

WORLD, STEPS = 2, 16
FLAGS = [
    *MODEL,
    *SPEED,
    *("--max_steps", str(STEPS), "--save_interval", "4", "--keep_last", "2"),
    *("--dropout", "0.1", "--router_bias_rate", "1e-3", "--num_threads", "1"),
]
# How long ranks wait for one that hangs, here: a step takes a hundredth of a second. And for one
# that a busy machine has no time for.
TIMEOUT, LONG_TIMEOUT = 5.0, 60.0
# Beyond the time-out, until all have ended.
MARGIN = 10.0
# torchrun gives 30 seconds to ranks that it ends.
CLOSING_SECONDS = 10.0
HANG_SECONDS = 180.0
MOST_KILLS_A_RUN = 3


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong on a rank (None: on all) in one start.

    kind: see `Injected`. at: the step, or the operation of its saves, that begins it.
    """

    kind: str = ""
    rank: int | None = 1
    at: int = 0


@dataclasses.dataclass
class Ended:
    """How a start of all ranks ended: their exit codes, what they printed, and how long it took.

    seconds: from the fault, if it tells its moment, to the end of the last rank that ends by
    itself.
    """

    codes: list[int]
    outputs: list[str]
    seconds: float

    @property
    def output(self) -> str:
        return "".join(self.outputs)


def _server() -> dist.TCPStore:
    """Return a store as torchrun has one."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class RanksRun(runs.Run):
    """A run on ranks in a folder of its own, and the store that outlives its starts."""

    def __init__(self, world: int = WORLD, flags: list[str] = FLAGS):
        super().__init__()
        self.world, self.flags = world, flags
        self.server = _server()
        self.starts = 0

    def argv(self) -> list[str]:
        folders = ["--data_dir", runs.home() / "data"]
        folders += ["--ckpt_dir", self.ckpt_dir, "--graph_dir", self.graph_dir]
        return [*self.flags, *map(str, folders)]

    def start(
        self, fault: Fault | None = None, flags_of: dict[int, list[str]] | None = None
    ) -> Ended:
        """Start all ranks once and wait for their end. flags_of: further flags of a rank."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        processes: list[BaseProcess] = []
        hangs = fault is not None and fault.kind in ("hang", "freeze")
        for rank in range(self.world):
            environment = {
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.server.port),
                "WORLD_SIZE": str(self.world),
                "LOCAL_WORLD_SIZE": str(self.world),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "STEP_SECONDS": str(TIMEOUT if hangs else LONG_TIMEOUT),
            }
            argv = [*self.argv(), *(flags_of or {}).get(rank, [])]
            given = fault if fault and fault.rank in (rank, None) else None
            arguments = (environment, argv, str(self.folder), self.starts, given)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
        self.starts += 1
        return self._wait(processes)

    def _wait(self, processes: list[BaseProcess]) -> Ended:
        """Do torchrun's part until all ranks have ended."""
        began, moment = time.monotonic(), self.folder / "moment"
        signalled: float | None = None
        while not all(_ended(process) for process in processes):
            wait([p.sentinel for p in processes if not _ended(p)], 0.05)
            now = time.monotonic()
            if moment.exists() and moment.read_text() == "SIGTERM":
                moment.unlink()
                for process in processes:
                    process.terminate()
            if moment.exists() and moment.read_text() == "lost":
                moment.unlink()
                del self.server
            if signalled is None and any(process.exitcode for process in processes):
                signalled = now
                for process in processes:
                    process.terminate()
            late = signalled is not None and now > signalled + CLOSING_SECONDS
            if late or now > began + HANG_SECONDS:
                for process in processes:
                    process.kill()
        seconds = time.monotonic() - began
        for process in processes:
            process.join()
        start = self.starts - 1
        outputs = [(self.folder / f"log-{start}-{rank}").read_text() for rank in range(self.world)]
        if (self.folder / "moment-of-fault").exists():
            seconds = time.time() - float((self.folder / "moment-of-fault").read_text())
            (self.folder / "moment-of-fault").unlink()
        return Ended([process.exitcode or 0 for process in processes], outputs, seconds)


def _ended(process: BaseProcess) -> bool:
    return process.exitcode is not None


# ------------------------------------------------------------------------------------ in the ranks
def _rank(environment: dict, argv: list[str], folder: str, start: int, fault: Fault | None) -> None:
    """Be a rank: run `train.py ARGV`, with a fault or without."""
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo")
    log = os.open(f"{folder}/log-{start}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    with Injected(fault or Fault(), Path(folder)):
        run_train(argv)


def run_train(argv: list[str]) -> None:
    """Run train.py in this process, with time-outs for tests and without plots. Never returns."""
    import torch
    from tqdm import tqdm

    import train
    from runtime.base import cli
    from runtime.distributed import failure
    from runtime.training import reporter, setup

    torch.set_num_threads(1)
    reporter.draw_plots = lambda *_, **__: None
    setup.STEP_SECONDS = float(os.environ.get("STEP_SECONDS", LONG_TIMEOUT))
    failure.ANSWER_SECONDS, failure.WATCH_SECONDS = 0.5, 0.2
    # Its own lock is a system's semaphore, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
    sys.argv = ["train.py", *argv]
    cli.run_main(train.main)


class Injected(runs.Operations):
    """Make a rank of this process do what a fault says, and nothing else differently.

    kill, hang, freeze, bug, error, SIGTERM: after step `at` of this process. kill in a save: before
    operation `at` of its saves; an operation is one of files, or that a tensor is gathered.
    NaN, bad stretch, diverge: the loss of step `at`, of 30 from then on, or of all.
    stop, lost: torchrun gets SIGTERM, or is killed. other code: than that of the other ranks.
    """

    def __init__(self, fault: Fault, folder: Path):
        super().__init__(folder)
        self.fault, self.folder = fault, folder
        self.steps = self.operations = 0
        self.saving = False

    def before(self, kind, path, half=lambda: None):
        self.operation(half)

    def operation(self, half=lambda: None) -> None:
        if not self.saving:
            return
        self.operations += 1
        if self.fault.kind == "kill in a save" and self.operations == self.fault.at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self):
        import train
        from runtime.base.process import StopRequest
        from runtime.distributed import launch
        from runtime.distributed.parallel import Parallel

        requested, save, whole = StopRequest.requested, train.save_checkpoint, Parallel.whole
        loss_fn = train.next_token_loss

        def after_a_step(stop):
            self.steps += 1
            if self.steps == self.fault.at:
                self.act(stop)
            return requested(stop)

        def watched_save(*args, **kwargs):
            self.saving = True
            try:
                return save(*args, **kwargs)
            finally:
                self.saving = False
                (self.folder / f"operations-{os.environ['RANK']}").write_text(str(self.operations))

        def watched_whole(*args, **kwargs):
            self.operation()
            return whole(*args, **kwargs)

        def loss(model, batch):
            out = loss_fn(model, batch)
            is_bad = self.steps + 1 == self.fault.at and self.fault.kind == "NaN"
            is_bad |= self.steps + 1 >= self.fault.at and self.fault.kind == "diverge"
            is_bad |= 0 <= self.steps + 1 - self.fault.at < 30 and self.fault.kind == "bad stretch"
            if not is_bad or not model.training:
                return out
            return out._replace(cross_entropy_sum=out.cross_entropy_sum * math.nan)

        StopRequest.requested, train.save_checkpoint = after_a_step, watched_save
        Parallel.whole, train.next_token_loss = watched_whole, loss
        if self.fault.kind == "other code":
            launch._code_digest = lambda: "0" * 16
        return super().__enter__()

    def act(self, stop: Any) -> None:
        kind = self.fault.kind
        (self.folder / "moment-of-fault").write_text(repr(time.time()))
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "hang":
            time.sleep(10 * HANG_SECONDS)
        elif kind == "bug":
            raise KeyError("a bug")
        elif kind == "error":
            raise OSError(5, "Input/output error", "a file")
        elif kind == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        elif kind in ("stop", "lost"):
            (self.folder / "moment").write_text("SIGTERM" if kind == "stop" else "lost")
            end = time.monotonic() + HANG_SECONDS
            while stop.signal is None and time.monotonic() < end:
                time.sleep(0.01)


def main() -> None:
    """Be a rank that torchrun started: MODULE FAULT_AS_JSON FOLDER FLAGS."""
    fault = Fault(**json.loads(sys.argv[1]))
    is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if str(fault.rank) != os.environ["RANK"] or not is_first_start:
        fault = Fault()
    with Injected(fault, Path(sys.argv[2])):
        run_train(sys.argv[3:])


# ----------------------------------------------------------------------------------- the guarantees
@functools.cache
def straight() -> RanksRun:
    """The run that nothing interrupts."""
    run = RanksRun()
    ended = run.start()
    assert ended.codes == [0] * WORLD, ended.output
    return run


def operations_of(rank: int) -> int:
    """Return how many operations the saves of a whole run have on a rank."""
    return int((straight().folder / f"operations-{rank}").read_text())


def difference(run: RanksRun) -> str:
    """Return where a run's result or metrics differ from the uninterrupted run's, or ""."""
    return runs.difference(run, straight()) or runs.metrics_difference(run, straight())


def _kill(r: random.Random, in_a_save: bool) -> Fault:
    rank = r.randrange(WORLD)
    if in_a_save:
        # In the first half, because a restarted run saves less often.
        return Fault("kill in a save", rank, r.randint(1, max(operations_of(rank) // 2, 1)))
    return Fault("kill", rank, r.randint(1, STEPS // 2))


def same_after_kills(count: int) -> Tally:
    """Kill a rank `count` times in all, a third of the times in a save, and restart all."""
    tally, kills, inside = Tally(), 0, 0
    seed = 0
    while kills < count:
        r, run, mine, faults = random.Random(seed), RanksRun(), 0, []
        while True:
            fault = None
            if kills < count and mine < MOST_KILLS_A_RUN:
                fault = _kill(r, inside * 3 <= kills)
            ended = run.start(fault)
            if "skipped a checkpoint that cannot be read" in ended.output:
                faults.append("a damaged checkpoint was left")
            if -signal.SIGKILL not in ended.codes:
                break
            kills, mine = kills + 1, mine + 1
            inside += fault is not None and "save" in fault.kind
        if any(ended.codes):
            faults.append(f"exit codes {ended.codes}: {ended.output[-300:]}")
        said = "; ".join(faults) or difference(run)
        for _ in range(mine):
            tally.add(not said, f"seed {seed}, {mine} kills: {said}")
        run.remove()
        seed += 1
    tally.detail = {"kills": kills, "kills inside a save": inside, "runs": seed}
    return tally


def _error_lines(ended: Ended) -> list[str]:
    return [line for line in ended.output.splitlines() if "error: " in line]


def _fails(fault: Fault, words: list[str], codes: set[int], most_seconds: float) -> RanksRun:
    """Check that a fault ends all ranks in time, with one line of these words."""
    run = RanksRun()
    ended = run.start(fault)
    said = (ended.codes, round(ended.seconds, 1), ended.output[-1500:])
    assert set(ended.codes) <= codes and 0 not in ended.codes, said
    lines = _error_lines(ended)
    assert len(lines) == 1 and all(word in lines[0] for word in words), said
    assert ended.seconds < most_seconds, said
    return run


def hang() -> None:
    _fails(Fault("hang", 1, 3), ["lost rank 1: ", "hangs"], {1, 130, 143}, TIMEOUT + MARGIN)


def frozen() -> None:
    killed = -signal.SIGKILL
    limit = TIMEOUT + MARGIN + CLOSING_SECONDS
    _fails(Fault("freeze", 0, 3), ["lost rank 0: ", "hangs"], {1, killed}, limit)


def bug() -> None:
    run = _fails(Fault("bug", 1, 3), ["rank 1: ", "a bug"], {1}, MARGIN)
    assert "Traceback" in (run.folder / "log-0-1").read_text()


def error_on_the_first() -> None:
    _fails(Fault("error", 0, 3), ["error: ", "Input/output error"], {1, 2}, MARGIN)


def nan() -> None:
    """The step is skipped on all ranks; tests/distributed has that no bit changes."""
    run = RanksRun()
    ended = run.start(Fault("NaN", 1, 3))
    assert ended.codes == [0, 0], ended.output
    saved = find_latest(run.ckpt_dir)[0].run
    assert (saved["step"], saved["skipped_steps"]) == (STEPS, 1), saved


def stopped(fault: Fault) -> None:
    """SIGTERM: all save one checkpoint of the same step and leave.

    A restart, which torchrun makes of any exit code, leaves at once: once it trained on. A new
    torchrun continues the run.
    """
    run = RanksRun()
    ended = run.start(fault)
    said = (ended.codes, ended.output[-1500:])
    assert ended.codes == [128 + signal.SIGTERM] * WORLD, said
    assert ended.output.count("SIGTERM: finishing") <= 1, said
    assert ended.output.count("stopped after step 3") == 1, said
    assert find_latest(run.ckpt_dir)[0].step == 3, said
    assert ended.seconds < MARGIN, said
    again = run.start()
    said = (again.codes, again.output[-1500:])
    assert 0 not in again.codes and "ready" not in again.output, said
    assert len(_error_lines(again)) == 1 and "told to stop" in again.output, said
    # What was saved is the run's, bit for bit.
    run.server = _server()
    ended = run.start(flags_of=dict.fromkeys(range(WORLD), ["--resume"]))
    assert ended.codes == [0] * WORLD, ended.output
    assert not difference(run), difference(run)


def diverged() -> None:
    """A restart would diverge again: it says so instead."""
    run = RanksRun(flags=[*FLAGS, "--max_steps", "100"])
    ended = run.start(Fault("diverge", 1, 3))
    said = (ended.codes, ended.output[-1500:])
    assert set(ended.codes) <= {3} and len(_error_lines(ended)) == 1, said
    assert "steps in a row were skipped" in _error_lines(ended)[0], said
    again = run.start()
    said = (again.codes, again.output[-1500:])
    assert 0 not in again.codes and "ready" not in again.output, said
    assert len(_error_lines(again)) == 1, said
    assert "no restart" in _error_lines(again)[0] and "steps in a row" in again.output, said


def torchrun_is_killed() -> None:
    """Its ranks stayed, because nobody told them."""
    run = RanksRun()
    ended = run.start(Fault("lost", 0, 3))
    assert ended.codes == [1, 1] and ended.seconds < MARGIN, (ended.codes, ended.seconds)


ENDS = [
    hang,
    bug,
    diverged,
    functools.partial(stopped, Fault("stop", 0, 3)),
    nan,
    frozen,
    error_on_the_first,
    functools.partial(stopped, Fault("SIGTERM", 1, 3)),
    torchrun_is_killed,
]


def every_end(count: int) -> Tally:
    """Try the first `count` of the ways to end."""
    tally = Tally()
    for check in ENDS[:count]:
        attempt(tally, getattr(check, "__name__", str(check)), check)
    return tally


@functools.cache
def _other_data() -> Path:
    with contextlib.redirect_stdout(None):
        return byte_data(runs.home(), seed=7, name="other")


def refused(count: int) -> Tally:
    """Ranks that differ are refused before any work, with a line that names the rank."""
    tally = Tally()
    cases: list[tuple[str, list[str], Fault | None]] = [
        ("another data", ["--data_dir", str(_other_data())], None),
        ("another --lr", ["--lr", "2e-2"], None),
        ("another code", [], Fault("other code", 1)),
        ("another --seed", ["--seed", "8"], None),
    ]
    for words, flags, fault in cases[:count]:

        def check(words=words, flags=flags, fault=fault):
            run = RanksRun()
            ended = run.start(fault, {1: flags})
            lines = _error_lines(ended)
            said = (ended.codes, ended.output[-1000:])
            assert 0 not in ended.codes and len(lines) == 1, said
            assert f"rank 1 has {words} than rank 0" in lines[0], said
            assert not run.ckpt_dir.exists() and "Traceback" not in ended.output, said

        attempt(tally, words, check)
    return tally


PROMISES = [
    Promise(
        65,
        "A rank killed (-9) at any moment, a third in a save, and all restarted: the same run, "
        "bit for bit",
        same_after_kills,
        2,
        50,
        50,
    ),
    Promise(
        66,
        "A hang, a bug, NaN, SIGTERM, divergence on a rank: all end in time, with one line",
        every_end,
        0,
        len(ENDS),
        len(ENDS),
    ),
    Promise(
        67,
        "Ranks with other data, settings or code are refused in one line that names the rank",
        refused,
        4,
        4,
        4,
    ),
]


if __name__ == "__main__":
    main()
