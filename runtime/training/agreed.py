"""What the ranks of a run agree on before it starts: their settings and the run in a folder.

What reads a folder that is written to is decided by the first rank. What each of them reads by
itself fails on all, with one line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from runtime.base import cli
from runtime.base.files import make_folder
from runtime.base.ranks import Ranks
from runtime.checkpoint.folder import find_latest, folder_has_run
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import check_disk_space, is_in_shards
from runtime.training.task import Task

# Settings that each machine of a run may have its own of.
OF_A_MACHINE = {"data_dir", "data", "num_threads"}


def check_settings(settings: cli.Settings, ranks: Ranks) -> None:
    """Raise ValueError, which names the rank and the flag, if a rank has other settings."""
    values = {n: v for n, v in settings.values.items() if n not in OF_A_MACHINE}
    what: dict[str, object] = {f"--{name}": value for name, value in values.items()}
    ranks.check_equal(what)
    # A flag may be given with the value that it had without.
    ranks.check_equal({"list of flags": sorted(settings.explicit - OF_A_MACHINE)})


def check_data(task: Task, source: Checkpoint | None, ranks: Ranks) -> None:
    """Raise ValueError, which names the rank, if a rank has other data or other weights."""
    tokenizer = (task.tokenizer_state or {}).get("fingerprint")
    weights = source and (source.digest or source.step)
    ranks.check_equal({"data": task.fingerprint, "tokenizer": tokenizer, "checkpoint": weights})


def newest_checkpoint(ckpt_dir: str, ranks: Ranks) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint that a run in a folder continues, and a line for each damaged one."""
    source, skipped = checkpoint_found(lambda: find_latest(ckpt_dir), ranks)
    assert source is not None, "find_latest raises where there is none"
    return source, skipped


def restarted_run(ckpt_dir: str, ranks: Ranks) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint of the run that restarted ranks are to continue, or None.

    Raise ValueError if the folder holds another run.
    """

    def find() -> tuple[Checkpoint | None, list[str]]:
        if not folder_has_run(ckpt_dir):
            return None, []
        if ranks.run_before:
            source, skipped = find_latest(ckpt_dir)
            if source.run.get("run_id") == ranks.run_before:
                return source, skipped
        raise ValueError(
            f"{ckpt_dir} holds the checkpoints of another run: continue it with --resume, or give "
            "this run another --ckpt_dir"
        )

    return checkpoint_found(find, ranks)


def checkpoint_found(
    find: Callable[[], tuple[Checkpoint | None, list[str]]], ranks: Ranks
) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that the first rank finds, read on every rank, and the lines."""
    found: list[Checkpoint | None] = []

    def look() -> tuple[Path | None, list[str]]:
        source, skipped = find()
        found.append(source)
        return None if source is None else source.path, skipped

    path, skipped = ranks.from_first(look)
    if path is None:
        return None, skipped

    def read() -> Checkpoint | None:
        return found[0] if found else _read_here(path, ranks, optimizer=True)

    return ranks.together(read), skipped


def weights_to_start_from(path: str, ranks: Ranks) -> Checkpoint:
    """Return what --init_from names, read on every rank, and checked on each machine."""
    source = ranks.together(lambda: _read_here(path, ranks))
    # Of a folder, only ranks that check it know this.
    digest = ranks.from_first(lambda: source.weights_digest)
    return dataclasses.replace(source, weights_digest=digest)


def _read_here(path: str | Path, ranks: Ranks, optimizer: bool = False) -> Checkpoint:
    """Return a checkpoint; of the ranks of a machine, one reads all of it to compare digests."""
    return read_checkpoint(path, optimizer, is_checked=not ranks.checks_files)


def of_a_restart(settings: cli.Settings, free: set[str]) -> cli.Settings:
    """Return the settings with which a restarted run is resumed: those that are free to change.

    All others are the run's, because torchrun gives the same command again.
    """
    values = settings.values | {"resume": True, "init_from": ""}
    explicit = settings.explicit & free - {"profile"}
    return dataclasses.replace(settings, values=values, explicit=explicit, preset=None)


def check_data_and_disk(plan, checkpoint_bytes: int) -> None:
    """Raise ValueError, on every rank, if a rank's data or disk is too small for a plan."""

    def check() -> None:
        check_disk_space(plan.config.ckpt_dir, checkpoint_bytes)
        # Data too short for one sequence is an error before the model is built.
        plan.task.loader(plan.model_config, plan.config)
        plan.task.validation(plan.model_config, plan.config)

    plan.ranks.together(check)
    if is_in_shards(plan.config.checkpoint, checkpoint_bytes, plan.ranks):
        check_is_shared(plan.config.ckpt_dir, plan.ranks)


def check_is_shared(ckpt_dir: str, ranks: Ranks) -> None:
    """Raise ValueError, on every rank, if a rank has another folder of that name."""
    folder = Path(ckpt_dir)

    def begin() -> str:
        make_folder(folder)
        name = f".shared-{os.urandom(8).hex()}"
        (folder / name).touch()
        return name

    def look() -> None:
        if not (folder / name).exists():
            raise ValueError(
                f"{ckpt_dir} is another folder than that of rank 0, and a checkpoint in shards "
                "needs one that all nodes share: give another --ckpt_dir, or --checkpoint file"
            )

    name = ranks.from_first(begin)
    try:
        ranks.together(look)
    finally:
        if ranks.is_first:
            (folder / name).unlink()
