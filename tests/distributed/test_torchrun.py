"""Runs that torchrun starts. tests/promises/rank_faults.py does its part faster, and more often."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from runtime.checkpoint.folder import find_latest
from tests.conftest import REPO
from tests.promises.rank_faults import FLAGS, Fault, RanksRun, difference

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the expected run is forked")


def torchrun(run: RanksRun, fault: Fault, *flags: str) -> subprocess.Popen:
    """Start a run on two ranks by torchrun."""
    rank = ["-m", "tests.promises.rank_faults", json.dumps(asdict(fault)), str(run.folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [*flags, *rank, *run.argv()],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def left(run: RanksRun) -> list[str]:
    """Return the processes of a run that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            # It has just ended.
            continue
        if str(run.ckpt_dir) in words:
            found.append(" ".join(words))
    return found


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_a_killed_rank_is_restarted_and_the_run_is_the_same():
    """PyTorch's ranks met under the keys of the ranks before them, and died of it.

    With those keys a restart after SIGKILL ended in "Connection refused". And torchrun repeats the
    command, which refused a folder that holds a run: its own.
    """
    run = RanksRun()
    process = torchrun(run, Fault("kill", 1, 6), "--max_restarts", "1")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("lost rank 1: ") == output.count("resuming ") == 1, output
    assert "at step 4" in output and output.count("done: 16 steps") == 1, output
    assert not difference(run), difference(run)
    assert not left(run)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are found in /proc")
def test_torchrun_passes_sigterm_on_and_the_ranks_save():
    """As a scheduler ends a job: torchrun itself then leaves with a traceback of its own."""
    run = RanksRun(flags=[*FLAGS, "--max_steps", "100000"])
    process = torchrun(run, Fault())
    end = time.monotonic() + 120
    while not (run.ckpt_dir / "latest.pt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.count("SIGTERM: finishing") == output.count("stopped after step") == 1, output
    assert "torchrun --standalone --nproc_per_node 2 train.py --resume" in output, output
    step = find_latest(run.ckpt_dir)[0].step
    assert f"stopped after step {step:,}," in output and not left(run)
