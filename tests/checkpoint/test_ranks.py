"""Checkpoints of several ranks: one file, the same as one process's, that any number opens."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib
import os
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint import write as write_module
from runtime.checkpoint.folder import find_latest
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import read_checkpoint
from tests.builders_rank_checkpoints import loaded_and_saved, new_run, same, save, saved
from tests.ranks import run_on

FORMATS = ("file", "sharded")


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory) -> str:
    return saved(ONE_PROCESS, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    "world, reads, checkpoint, placing",
    [
        (1, 2, "file", {}),
        (2, 4, "file", {}),
        (4, 1, "file", dict(expert_parallel=2)),
        (1, 4, "sharded", {}),
        (2, 1, "sharded", dict(shard="none")),
        (4, 2, "sharded", dict(expert_parallel=2)),
    ],
)
def test_any_number_of_ranks_writes_and_reads_the_checkpoint_of_one_process(
    world, reads, checkpoint, placing, of_one_process, tmp_path
):
    """A run may continue on another number of ranks than it was started on."""
    path = Path(run_on(world, partial(saved, **placing), tmp_path / "a", checkpoint)[0])
    assert path.is_dir() == (checkpoint == "sharded")
    assert same(path, of_one_process)
    assert read_checkpoint(path).world == world
    again = run_on(reads, loaded_and_saved, path, tmp_path / "b", checkpoint)[0]
    assert same(again, of_one_process)
    names = {Path(again).name, "latest.pt", "best.pt"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == names
    third = loaded_and_saved(ONE_PROCESS, Path(again), tmp_path / "c")
    assert Path(third).read_bytes() == Path(of_one_process).read_bytes()


@pytest.mark.parametrize("checkpoint, other", [FORMATS, FORMATS[::-1]])
def test_a_step_is_there_in_one_form(checkpoint, other, tmp_path):
    """A run that is resumed further back may write its steps in the other form.

    step_0000007.pt and the folder step_0000007 were then both there, and a resume took the file,
    also where it was the older one.
    """
    run_on(2, saved, tmp_path, other)
    path = Path(run_on(2, saved, tmp_path, checkpoint)[0])
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "latest.pt", "best.pt"}
    assert all((tmp_path / name).samefile(path) for name in ("latest.pt", "best.pt"))


def without_world(ranks: Ranks, folder: Path) -> None:
    """Save with a header that does not say how many ranks there are."""
    header = write_module._header

    def plain(*args, world=0, **values):
        return header(*args, **values)

    with mock.patch.object(write_module, "_header", plain):
        saved(ranks, folder)


def test_the_file_is_the_same_to_the_byte_from_1_2_and_4_ranks(tmp_path):
    files = []
    for world in (1, 2, 4):
        run_on(world, without_world, tmp_path / str(world))
        files.append((tmp_path / str(world) / "latest.pt").read_bytes())
    assert files[0] == files[1] == files[2]


# ------------------------------------------------------------------------------------------- faults
def failing(ranks: Ranks, folder: Path, fault: str, checkpoint: str) -> tuple[str, list[str]]:
    """Save step 7, then let the save of step 8 fail; return its error and what the folder holds."""
    model, optimizer = new_run(ranks)
    save(ranks, folder, model, optimizer, checkpoint)
    patch: contextlib.AbstractContextManager = contextlib.nullcontext()
    if fault == "nan":
        ranks.local(model.layers[1].norm1.weight.detach())[-1:] = float("nan")
    elif fault == "full disk":
        patch = full_disk_after(4) if checkpoint == "file" else full_disk_on(ranks, 2)
    elif fault == "no room":
        patch = mock.patch.object(write_module, "check_disk_space", side_effect=ValueError("full"))
    with patch:
        try:
            save(ranks, folder, model, optimizer, checkpoint, step=8)
            error = ""
        except CheckpointError as raised:
            error = str(raised)
    # All ranks still answer each other.
    assert ranks.sum_on_host(1) == (ranks.world,)
    return error, sorted(path.name for path in folder.iterdir())


def full_disk_after(writes: int):
    """Let the file of a checkpoint have room for so many tensors only."""
    stream = write_module.stream

    class Full:
        def __init__(self, file):
            self.file, self.left = file, writes
            self.name = file.name

        def write(self, data):
            if len(data) > 1000 and not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= len(data) > 1000
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full(file, *rest):
        return stream(Full(file), *rest)

    return mock.patch.object(write_module, "stream", full)


def full_disk_on(ranks: Ranks, rank: int):
    """Let one rank have no room for its part of a folder."""
    if ranks.rank != rank:
        return contextlib.nullcontext()
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return mock.patch("torch.distributed.checkpoint.filesystem.os.fsync", side_effect=error)


@pytest.mark.parametrize("checkpoint", FORMATS)
@pytest.mark.parametrize(
    "fault, said",
    [
        ("nan", "model tensor layers.1.norm1.weight holds NaN"),
        ("full disk", "No space left on device"),
        ("no room", "not written: full"),
    ],
)
def test_a_save_that_fails_on_one_rank_ends_on_all_of_them(fault, said, checkpoint, tmp_path):
    """The first rank left in the middle, and the others waited for it until their time-out."""
    (first, files), *others = run_on(4, failing, tmp_path, fault, checkpoint)
    assert said in first and "step_0000008" in first and "\n" not in first
    assert [error for error, _ in others] == [first] * 3
    end = ".pt" if checkpoint == "file" else ""
    assert files == ["best.pt", "latest.pt", f"step_0000007{end}"]
    assert find_latest(tmp_path)[0].step == 7


def saved_slowly(ranks: Ranks, folder: Path, checkpoint: str) -> tuple[str, float]:
    """Save where one rank's disk needs longer than ranks wait; return the path and their wait."""
    model, optimizer = new_run(ranks)
    name = "runtime.checkpoint.write.write_atomic"
    if checkpoint == "sharded":
        name = "runtime.distributed.sharded_checkpoint.fsync_folder"
    module, _, function = name.rpartition(".")
    real = getattr(importlib.import_module(module), function)

    def slow(*args):
        real(*args)
        time.sleep(1.5)

    slows = ranks.rank == (checkpoint == "sharded")
    ranks.wait_at_most(1.0)
    with mock.patch(name, slow) if slows else contextlib.nullcontext():
        path = save(ranks, folder, model, optimizer, checkpoint)
    return str(path), ranks.wait_at_most(60.0)


@pytest.mark.parametrize("checkpoint", FORMATS)
def test_ranks_wait_for_a_slow_disk(checkpoint, tmp_path):
    """A file of 44 GB can take its disk minutes, at its end alone.

    The other ranks waited for the first as long as in a step. So the run ended in its first save,
    and again after each restart.
    """
    (path, waits), other = run_on(2, saved_slowly, tmp_path, checkpoint)
    assert other == (path, waits) and waits == 1.0
    assert find_latest(tmp_path)[0].step == 7


def test_ranks_can_send_each_other_the_error_of_a_checkpoint():
    """It was made of a path and a reason, and read back from its line alone: a TypeError."""
    error = CheckpointError("a.pt", "is gone")
    error.innermost = "x"
    again = copy.deepcopy(error)
    assert type(again) is CheckpointError
    assert (str(again), again.innermost) == ("a.pt: is gone", "x")
