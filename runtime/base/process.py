"""What a process should set for itself before and after PyTorch loads, so that a CPU trains at its full speed.

Measured by `python -m benchmarks.train --allocator_row`: PyTorch takes each large temporary from the system and gives it
back, so the kernel clears the same pages again and again; and its threads spin while they wait, which on a machine with
other work costs more than it saves.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time

SPIN_COUNT = "1000"  # turns of GNU OpenMP's waiting loop before a thread sleeps; its own choice is 100 times that or more
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
KEEP_BYTES, TOP_PAD_BYTES = 2**31 - 1, 1 << 28


def before_torch() -> None:
    """Let idle threads sleep early (the OpenMP library reads this once, when PyTorch loads it). A setting that is there stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next use instead of giving it back to the system; True if it could be told so.

    glibc only. A large allocation is then cut from the heap, not mapped afresh, so its pages are cleared once per run.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(
        mallopt(M_MMAP_MAX, 0)
        and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
        and mallopt(M_TOP_PAD, TOP_PAD_BYTES)
    )


def give_back_memory() -> bool:
    """Have malloc give what is free back to the system, also between what is in use; True if it
    could be told so.

    For after work that leaves many small pieces in a heap that keeps what is freed: large tensors
    find no room between them, and the heap grew with every drawing of plots.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        # Another C library.
        return False


def usable_cores(root: str = "/sys/fs/cgroup") -> int:
    """Cores that this process may use: those it is bound to, and no more than the CPU quota of its container (cgroup v2, v1)."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for quota in (
        _read(f"{root}/cpu.max"),
        f"{_read(f'{root}/cpu/cpu.cfs_quota_us')} {_read(f'{root}/cpu/cpu.cfs_period_us')}",
    ):
        numbers = quota.split()
        if len(numbers) == 2 and all(n.isdigit() for n in numbers) and int(numbers[1]) > 0:
            cores = min(cores, max(1, math.ceil(int(numbers[0]) / int(numbers[1]))))
    return cores


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]


SAME_SIGNAL_SECONDS = 1.0  # wrappers pass Ctrl-C on to a child that the terminal has already told: one wish, two signals


class StopRequest:
    """The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP asks the run to finish its step, save and leave; a later one ends it at once.
    What the run was told to ignore (SIGHUP under nohup) stays ignored."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self):
        self._before = {
            s: signal.signal(s, self._on_signal)
            for s in STOP_SIGNALS
            if signal.getsignal(s) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _on_signal(self, number, frame):
        if self.signal is not None:
            if time.monotonic() - self._asked > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self._asked = number, time.monotonic()
        os.write(
            2,
            f"\n{signal.Signals(number).name}: finishing this step, then saving; once more to leave at once\n".encode(),
        )

    def requested(self) -> bool:
        return self.signal is not None
