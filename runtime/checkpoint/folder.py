"""The checkpoints in a folder: their names, the newest one, and what a kill can leave."""

from __future__ import annotations

import os
import re
from pathlib import Path

from runtime.base.files import link_atomic
from runtime.checkpoint.format import (
    BEST,
    LATEST,
    Checkpoint,
    CheckpointError,
)
from runtime.checkpoint.read import (
    read_checkpoint,
)

# A file, or a folder of the same step (sharded.py).
STEP_FILE = re.compile(r"step_(\d{7,})(\.pt)?")


def step_files(ckpt_dir: str | Path) -> list[tuple[int, Path]]:
    """Return (step, path) of a folder's step files, and step folders, oldest step first.

    Other files, however similar their names, are not ours.
    """
    if not Path(ckpt_dir).is_dir():
        return []
    return sorted(
        (int(match[1]), path)
        for path in Path(ckpt_dir).iterdir()
        if (match := STEP_FILE.fullmatch(path.name)) and (match[2] or path.is_dir())
    )


def folder_has_run(ckpt_dir: str | Path) -> bool:
    """Return whether a folder holds a run's checkpoints, readable or not."""
    return bool(step_files(ckpt_dir)) or any(
        os.path.lexists(Path(ckpt_dir, name)) for name in (LATEST, BEST)
    )


def _named(folder: Path, most: int = 5) -> str:
    """Return a hint that names the runs in the folders of a folder, or an empty string."""
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [path.name for path in inner if path.is_dir() and folder_has_run(path)]
    more = f" and {len(names) - most} more" * (len(names) > most)
    return f"; it has the runs {', '.join(names[:most])}{more}: say --run_name" * bool(names)


def restore_names(checkpoint: Checkpoint) -> None:
    """Point latest.pt, and best.pt if it is the run's best, to the step file a run continues.

    A save may have ended between writing the file and naming it. If nothing is saved after it,
    those names would stay an older one's.
    """
    if not STEP_FILE.fullmatch(checkpoint.path.name):
        return
    val_loss, best = checkpoint.val_loss, checkpoint.run.get("best_val_loss")
    is_best = val_loss is not None and val_loss == best
    for name in (BEST, LATEST) if is_best else (LATEST,):
        link = checkpoint.path.with_name(name)
        if not (link.exists() and link.samefile(checkpoint.path)):
            link_atomic(checkpoint.path, link)


def find_latest(ckpt_dir: str | Path, optimizer: bool = True) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that passes every check, and a line for each that did not.

    Tried in turn: the step files from the last step down, latest.pt, best.pt. So a kill between
    writing a step file and naming it latest.pt loses nothing. Raise CheckpointError if none can be
    read.
    """
    folder = Path(ckpt_dir)
    tried: list[Path] = []
    skipped: list[str] = []
    if not folder_has_run(folder):
        raise CheckpointError(
            folder, f"holds no checkpoint ({LATEST} or step_*.pt){_named(folder)}"
        )
    for path in [
        *(path for _, path in reversed(step_files(folder))),
        folder / LATEST,
        folder / BEST,
    ]:
        # Another name of a file that was just refused.
        is_tried = any(path.exists() and path.samefile(other) for other in tried if other.exists())
        if not os.path.lexists(path) or is_tried:
            continue
        try:
            return read_checkpoint(path, optimizer), skipped
        except CheckpointError as error:
            tried.append(path)
            skipped.append(str(error))
    raise CheckpointError(folder, f"no checkpoint can be read: {'; '.join(skipped)}")
