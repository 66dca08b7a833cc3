"""How a rank ends that has failed, and how the others learn of it.

A rank that fails notes its error in the store, says it and ends. The others look there once a
second: none waits for it in vain, and of errors that all ranks have only one is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback

import torch.distributed as dist

from runtime.base import cli, process

WATCH_SECONDS = 1.0
# From a rank's failure to the end of those that have not noticed it themselves.
GRACE_SECONDS = 5.0
# A rank that has lost another waits so long for what the others say of it.
ANSWER_SECONDS = 3.0
# In the store: the error that no restart would mend. It outlives these processes.
FINAL_KEY = "gptoss/final"
# What has failed in this generation, a line of JSON for each rank.
FAILED_KEY = "failed"


def value_of(store: dist.Store, key: str) -> str:
    """Return what a store holds under a key now, or ""."""
    return store.get(key).decode() if store.check([key]) else ""


def watch(store: dist.Store, ended: threading.Event) -> None:
    """End this process after another's failure, or torchrun's, unless it ends by itself."""
    failed = False
    while not failed and not ended.wait(WATCH_SECONDS):
        try:
            failed = store.check([FAILED_KEY])
        except RuntimeError:
            # The store is torchrun's, which has been killed.
            failed = True
    if failed and not ended.wait(GRACE_SECONDS):
        os._exit(1)


def note(store: dist.Store, rank: int, line: str, is_lost: bool) -> None:
    """Tell all ranks of an error of one. is_lost: it is that another cannot be reached."""
    told = json.dumps([rank, line, is_lost]) + "\n"
    store.append(FAILED_KEY, told)  # type: ignore[attr-defined]  # torch's stubs lack it


class Report:
    """What a rank says when it fails, and then its end.

    store: of this generation; lasting: of all. None where the rank failed before it had them.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.store: dist.Store | None = None
        self.lasting: dist.Store | None = None

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks and the user about an error, and end the process.

        It never waits for other ranks' collectives, as Python's own exit would.
        """
        # torchrun ends the others as soon as one has ended; they are to say why, first.
        for number in process.STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        code, line, is_lost = _explained(error)
        others: dict[int, list] = {}
        # The machine of the store may be gone.
        with contextlib.suppress(RuntimeError):
            others = self._exchanged(line, is_lost)
            if (
                isinstance(error, ValueError)
                and self.lasting
                and not value_of(self.lasting, FINAL_KEY)
            ):
                self.lasting.set(FINAL_KEY, line)
        if text := self._said(line, is_lost, others):
            is_bug = line and not is_lost and not isinstance(error, cli.MISTAKES)
            if is_bug or os.environ.get("GPTOSS_TRACEBACK"):
                text = "".join(traceback.format_exception(error)) + text
            print(text, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)

    def _exchanged(self, line: str, is_lost: bool) -> dict[int, list]:
        """Note an error in the store; return those of other ranks, [line, whether it lost one]."""
        if self.store is None:
            return {}
        note(self.store, self.rank, line, is_lost)
        others = set(range(self.world)) - {self.rank}
        waits_for = others if is_lost else {0} & others
        end = time.monotonic() + ANSWER_SECONDS
        while True:
            # One key, because a thousand ranks may ask for it at once.
            notes = map(json.loads, value_of(self.store, FAILED_KEY).splitlines())
            found = {rank: rest for rank, *rest in notes if rank != self.rank}
            if waits_for <= set(found) or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def _said(self, line: str, is_lost: bool, others: dict[int, list]) -> str:
        """Return what to print, or "" where another rank says it."""
        if not line:
            return ""
        if not is_lost:
            if others.get(0) == [line, False]:
                return ""
            return line if self.rank == 0 else f"rank {self.rank}: {line}"
        if any(not other_lost for _, other_lost in others.values()):
            return ""
        if any(rank < self.rank for rank in others):
            return ""
        return f"error: lost {self._missing(others)} ({_cause(line)})"

    def _missing(self, others: dict[int, list]) -> str:
        """Return which ranks have said nothing, and what may have become of them."""
        if self.store is None:
            return "torchrun: it was killed or cannot be reached"
        missing = [str(r) for r in range(self.world) if r != self.rank and r not in others]
        if not missing:
            return "the connection between the ranks"
        if len(missing) == 1:
            return f"rank {missing[0]}: it was killed, hangs or cannot be reached"
        more = f" and {len(missing) - 8} more" * (len(missing) > 8)
        return f"ranks {', '.join(missing[:8])}{more}: they were killed, hang or cannot be reached"


def _cause(message: str) -> str:
    """Return what a library says of a lost connection, without its own places and advice."""
    return re.sub(r"^\[.*?\] ", "", message).partition(". ")[0]


def _explained(error: BaseException) -> tuple[int, str, bool]:
    """Return an exit code, a line for the user, and whether another rank has been lost."""
    is_lost = isinstance(error, RuntimeError) and "gloo" in str(error)
    if is_lost or isinstance(error, dist.DistError):
        return 1, " ".join(str(error).split()), True
    if isinstance(error, SystemExit):
        return int(error.code or 0) if isinstance(error.code, (int, type(None))) else 1, "", False
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE, "", False
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted", False
    code = cli.exit_code(error) if isinstance(error, cli.MISTAKES) else 1
    return code, cli.error_line(error), False
