"""Process settings from before and after PyTorch loads, so that a CPU trains at full speed.

Measured by `python -m benchmarks.train --allocator_row`. PyTorch takes each large temporary from
the system and gives it back, so the kernel clears the same pages again and again. Its threads spin
while they wait; on a machine with other work that costs more than it saves.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
from typing import Any

# Turns of GNU OpenMP's waiting loop before a thread sleeps; its default is at least 100 times that.
SPIN_COUNT = "1000"
# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# The largest int that mallopt takes, and 256 MiB.
KEEP_BYTES, TOP_PAD_BYTES = 2**31 - 1, 1 << 28


def before_torch() -> None:
    """Let idle threads sleep early, unless the user has set this already.

    The OpenMP library reads it once, when PyTorch loads it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def has_ranks() -> bool:
    """Return whether torchrun started this process, as one of its ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Return this process's number among the ranks that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if has_ranks() else 0


def local_rank() -> int:
    """Return this process's number among the ranks on this machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")) if has_ranks() else 0


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next use; return whether that worked.

    glibc only. A large allocation then comes from the heap, not from a new mapping, so its pages
    are cleared once per run.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # Another C library.
        return False
    return bool(
        mallopt(M_MMAP_MAX, 0)
        and mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
        and mallopt(M_TOP_PAD, TOP_PAD_BYTES)
    )


def give_back_memory() -> bool:
    """Make malloc return its free memory to the system; return whether that worked.

    Call this after work that leaves many small pieces in a heap that keeps freed memory. Large
    tensors find no room between them: the heap grew with every drawing of plots.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        # Another C library.
        return False


def usable_cores(root: str = "/sys/fs/cgroup") -> int:
    """Return how many cores this process may use: those it is bound to, within its cgroup's quota.

    Reads the CPU quota of a container as cgroup v2 and v1 write it.
    """
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


# Wrappers pass Ctrl-C on to a child that the terminal has already told: treat a repeat within a
# second as the same Ctrl-C.
SAME_SIGNAL_SECONDS = 1.0


# Signals that a rank at its end ignores, and what heard them before.
_ignored: dict[int, Any] = {}


class StopRequest:
    """Asks a run to finish its step, save and stop: at SIGINT, SIGTERM, SIGUSR1 or SIGHUP.

    A later signal ends the run at once. A signal that the run was told to ignore (SIGHUP under
    nohup) stays ignored. Of several ranks the first says so, and all of them must agree to stop.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self):
        # A run that has gone back to a checkpoint begins again, and may be stopped again.
        while _ignored:
            signal.signal(*_ignored.popitem())
        self._before = {
            s: signal.signal(s, self._on_signal)
            for s in STOP_SIGNALS
            if signal.getsignal(s) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            if has_ranks():
                # torchrun ends it as soon as it has seen another's end: first it says why it
                # failed, or prints its last lines and leaves with the code of a stopped run.
                _ignored[s] = handler
            signal.signal(s, signal.SIG_IGN if has_ranks() else handler)

    def _on_signal(self, number, frame):
        if self.signal is not None:
            if time.monotonic() - self._asked > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self._asked = number, time.monotonic()
        if rank():
            return
        os.write(
            2,
            f"\n{signal.Signals(number).name}: finishing this step, then saving; "
            "repeat to stop at once\n".encode(),
        )

    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Return the exit code of a stopped run. A rank may not have had the signal itself."""
        return 128 + (self.signal or signal.SIGTERM)
