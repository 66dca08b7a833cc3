"""What a process sets for itself: spinning, malloc, cores."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from config_model import TrainConfig
from runtime.base import process
from runtime.training import reporter
from runtime.training.reporter import Reporter
from tests.conftest import REPO


def python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, check=True
    ).stdout


def test_train_sets_the_spin_count_before_torch_is_loaded():
    """Set OpenMP's wait policy before torch is imported; the library reads it once, when it loads.

    Threads that wait spin: two threads next to one busy neighbour fell to a twentieth of their
    speed.
    """
    code = """
import builtins, os, sys
original = builtins.__import__
def watching(name, *args, **kwargs):
    if name == "torch" and "torch" not in sys.modules:
        print("seen", os.environ.get("GOMP_SPINCOUNT"), flush=True)
        # What comes after is no part of this test, and takes seconds.
        os._exit(0)
    return original(name, *args, **kwargs)
builtins.__import__ = watching
import train
"""
    assert python(code).split() == ["seen", process.SPIN_COUNT]
    # A setting that is there stays.
    assert python(code, GOMP_SPINCOUNT="7").split() == [
        "seen",
        "7",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    """Count page faults instead of timing.

    PyTorch's large temporaries were mapped and cleared again each time: 16,384 page faults for 64
    MB.
    """
    code = """
import resource, sys
from runtime.base import process
assert not (len(sys.argv) > 1) or process.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
use()
before = faults()
for _ in range(4):
    use()
print(faults() - before)
"""
    asked = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, *flags],
                cwd=REPO,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for flags in ([], ["keep"])
    ]
    if asked[0] < 1000:
        pytest.skip("this system maps large pages, or its malloc is not glibc's")
    assert asked[1] < 0.1 * asked[0]


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "damaged"}, 64),
        ({"cpu.max": "100000 0"}, 64),
    ],
)
def test_cores_are_no_more_than_the_container_s_quota(tmp_path, monkeypatch, files, expected):
    """A container with two of 64 cores would otherwise get 64 threads that wait for each other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert process.usable_cores(str(tmp_path)) == expected


CHILD = """
from runtime.base import process
process.keep_freed_memory()
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10
pieces = [bytearray(20_000) for _ in range(5_000)]
del pieces[::2], pieces[1::2]
print(anonymous(), process.give_back_memory(), anonymous())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_small_pieces_hold_apart_is_given_back():
    """Each drawing of plots left pieces all over a heap that keeps what is freed.

    A run of nano held 490 MiB after its first save and 630 after the sixth, 760 at its peak, where
    541 had been announced.
    """
    before, told, after = python(CHILD).split()
    # 100 MB in pieces of 5 pages, of which three in four were freed.
    assert told == "True" and int(before) - int(after) > 40e6


def test_plots_give_back_what_they_took(monkeypatch):
    called = []
    monkeypatch.setattr(reporter, "draw_plots", lambda *_, **__: called.append("draw"))
    monkeypatch.setattr(process, "give_back_memory", lambda: called.append("give back"))
    config = TrainConfig(graph_dir="")
    run = types.SimpleNamespace(
        can_plot=True,
        plan=types.SimpleNamespace(config=config),
        log=types.SimpleNamespace(stream=lambda: []),
    )
    Reporter.plots(run, 1)
    assert called == ["draw", "give back"]
