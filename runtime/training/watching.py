"""The page of a run, next to it: --watch starts `python -m scripts.watch` as a child."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from runtime.training.plan import TrainPlan

REPO = Path(__file__).resolve().parent.parent.parent
# Seconds that the child has to end in.
END_SECONDS = 5.0


@contextlib.contextmanager
def watched(plan: TrainPlan) -> Iterator[None]:
    """Serve the page of a run inside of the block, if --watch asks for it; the first rank does.

    The child prints the page's address. It ends with the block, and with this process however that
    ends. The page must never stop the run: if the child cannot start, it says why and is gone.
    """
    if not (plan.config.watch and plan.ranks.is_first):
        yield
        return
    child = _started(os.path.abspath(plan.config.graph_dir))
    try:
        yield
    finally:
        if child:
            _end(child)


def _started(folder: str) -> subprocess.Popen | None:
    """Return the server of a folder's page; None, after a line that says why, if there is none."""
    command = [sys.executable, "-m", "scripts.watch", folder, "--parent", str(os.getpid())]
    try:
        # In a session of its own: Ctrl-C lets the run finish its step, and the page shows it.
        return subprocess.Popen(command, cwd=REPO, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"no page  {error}: start python -m scripts.watch yourself", flush=True)
        return None


def _end(child: subprocess.Popen) -> None:
    child.terminate()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
