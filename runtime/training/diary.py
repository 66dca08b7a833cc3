"""What happened to a run and what it wrote, as JSON lines next to its metrics.

    events.jsonl   {"step": 500, "kind": "save", "text": "...", "time": 1764.., "run_id": "..."}
    samples.jsonl  {"step": 500, "kind": "sample", "prompt": "...", "text": "...", "time", "run_id"}

Both are only appended to, also by a resumed run and by the next run of the folder: `run_id` says
whose a line is, and `time` when (seconds since 1970). runtime.training.curves reads them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from runtime.base.files import make_folder

EVENTS, SAMPLES = "events.jsonl", "samples.jsonl"
KINDS = (
    "start",
    "resume",
    # Steps without an update: their loss or gradient was not finite, or a spike.
    "skipped",
    # Experts that leave the healthy range of loads, and all back in it.
    "starved",
    "balanced",
    "save",
    "rollback",
    "diverged",
    # By a signal, and at the last step.
    "stop",
    "done",
)


class Diary:
    """Appends to a run's two files. If that fails it says so once: it must never stop the run.

    folder: None = write nothing, as all ranks but the first.
    """

    def __init__(self, folder: str | Path | None, run_id: str, say: Callable[[str], object]):
        self.folder = None if folder is None else Path(folder)
        self.run_id, self.say = run_id, say

    def event(self, step: int, kind: str, text: str) -> None:
        """Write an event of one of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"an event must be one of {', '.join(KINDS)}, not {kind!r}")
        self._write(EVENTS, [{"step": step, "kind": kind, "text": text}])

    def samples(self, step: int, pairs: Iterable[tuple[str, str]]) -> None:
        """Write what the model continued at a step: (prompt, text) of each."""
        of_step = {"step": step, "kind": "sample"}
        self._write(SAMPLES, [of_step | {"prompt": p, "text": text} for p, text in pairs])

    def _write(self, name: str, notes: Iterable[dict]) -> None:
        if self.folder is None:
            return
        more = {"time": round(time.time(), 3), "run_id": self.run_id}
        lines = b"".join(json.dumps(note | more).encode() + b"\n" for note in notes)
        try:
            make_folder(self.folder)
            with open(self.folder / name, "ab+", buffering=0) as file:
                file.write(_line_end(file) + lines)
        except OSError as error:
            self.say(f"no more {name}: {error} (training continues)")
            self.folder = None


def _line_end(file) -> bytes:
    """Return the line end that a kill has kept from an open file's last line, or nothing."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return b""
    file.seek(size - 1)
    return b"" if file.read(1) == b"\n" else b"\n"
