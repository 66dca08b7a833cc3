"""Ranks for tests: processes that run a function together, in a gloo group of their own.

    run_on(2, function, argument)  ->  [result of rank 0, result of rank 1]

To start a rank takes seconds, to call one milliseconds. So they are forked once for each pytest
worker, by a server that has imported PyTorch and computed nothing, and stay until pytest ends.
Every call makes a new group through a file: no ports, and nothing of the call before.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

# A call may last this long. Every call that a test makes takes a few seconds on an idle core.
SECONDS = 60.0
# When a rank has failed, the others meet its absence soon, or wait for it in vain.
SECONDS_AFTER_A_FAILURE = 3.0
# What StopRequest leaves alone.
DUMP_SIGNAL = getattr(signal, "SIGUSR2", 0)
# torch.optim imports torch._dynamo with its first optimizer, and it takes as long as torch itself.
PRELOADED = ["torch._dynamo", "runtime.distributed.parallel", "train", "pytest", "tests.builders"]


class Rank(NamedTuple):
    """A process that waits for calls."""

    process: BaseProcess
    connection: Connection


_pool: list[Rank] = []


def run_on(
    world: int,
    function: Callable,
    *arguments,
    seconds: float = SECONDS,
    local_world: int | None = None,
) -> list:
    """Return what `function(ranks, *arguments)` returns on each of `world` ranks.

    function: known by name, at the top level of a module. ranks: a Parallel on CPUs. local_world:
    ranks on each node that the ranks play, all of them by default. Raise AssertionError with every
    rank's traceback if one fails or all have not ended after `seconds`; these ranks are killed.
    """
    if not hasattr(os, "fork"):
        pytest.skip("ranks are forked")
    call, ranks = pickle.dumps((function, arguments)), _ranks(world)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        for rank, (_, connection) in enumerate(ranks):
            where = (rank, world, local_world or world, folder, seconds)
            connection.send_bytes(pickle.dumps((where, call)))
        results, failures = _outcomes(ranks, seconds)
        if failures:
            end_ranks()
            raise AssertionError("\n".join(_report(failures, Path(folder))))
    return [results[rank] for rank in range(world)]


def _ranks(world: int) -> list[Rank]:
    """Return `world` ranks that wait for a call; start those that are missing."""
    if not all(process.is_alive() for process, _ in _pool):
        end_ranks()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    while len(_pool) < world:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _pool.append(Rank(process, ours))
    return _pool[:world]


@atexit.register
def end_ranks() -> None:
    """Kill all ranks; the next call starts others."""
    for process, connection in _pool:
        process.kill()
        process.join()
        connection.close()
    _pool.clear()


def _outcomes(ranks: list[Rank], seconds: float) -> tuple[dict[int, object], dict[int, str]]:
    """Return what ranks returned and what failed, by rank; all are in one of the two."""
    results: dict[int, object] = {}
    failures: dict[int, str] = {}
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    end = time.monotonic() + seconds
    while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[arg-type]  # wait returns what it got
            try:
                succeeded, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ranks[rank].process.join()
                succeeded, value = False, f"ended, with code {ranks[rank].process.exitcode}"
            (results if succeeded else failures)[rank] = value
        if failures:
            end = min(end, time.monotonic() + SECONDS_AFTER_A_FAILURE)
    for rank in waiting.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank].process.pid or 0, DUMP_SIGNAL)
        failures[rank] = "still ran and was killed"
    if waiting:
        # The signal's handler writes within milliseconds.
        time.sleep(0.3)
    return results, failures


def _report(failures: dict[int, str], folder: Path) -> list[str]:
    """Return what happened on the ranks that failed, with what they printed."""
    lines = []
    for rank, failure in sorted(failures.items()):
        lines.append(f"rank {rank}: {failure}")
        with contextlib.suppress(FileNotFoundError):
            lines.append(_log(folder, rank).read_text(encoding="utf-8", errors="replace"))
    return lines


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.txt"


# ------------------------------------------------------------------------------------- in the ranks
def _serve(connection: Connection) -> None:
    """Answer calls until pytest has gone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    import torch

    from runtime.training import reporter

    torch.set_num_threads(1)
    # As in conftest's `no_pictures`.
    reporter.draw_plots = lambda *_, **__: []
    while True:
        try:
            where, call = pickle.loads(connection.recv_bytes())
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = (True, _answer(*where, call))
            sent = pickle.dumps(answer)
        except BaseException:
            sent = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(sent)


def _answer(
    rank: int, world: int, local_world: int, folder: str, seconds: float, call: bytes
) -> object:
    """Return what a call returns in a new group."""
    import torch
    import torch.distributed as dist

    from runtime.distributed.parallel import Parallel

    with _log(Path(folder), rank).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    # Ends a rank that hangs where pytest was killed and so cannot do it.
    signal.alarm(int(seconds) + 10)
    function, arguments = pickle.loads(call)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    # Longer than the pool waits, which then tells where each rank is.
    timeout = timedelta(seconds=seconds + 5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        result = function(Parallel(torch.device("cpu"), local_world), *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    signal.alarm(0)
    return result
