"""Check that the guarantees of tests/promises/runs.py can be broken, and bugs that they found."""

from __future__ import annotations

import errno
import os
import signal
from unittest import mock

import pytest

from runtime.checkpoint import write as checkpoint
from runtime.checkpoint.folder import find_latest, restore_names, step_files
from runtime.checkpoint.read import read_checkpoint
from tests.promises import runs
from tests.promises.runs import (
    Disk,
    Faults,
    enumerate_crashes,
    killed_runs,
    same_after_resume,
    signals_save_and_leave,
)

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the runs are children of a fork server"
)


# -------------------------------------------------------------------- they notice what they are for
def in_place(path, write):
    with open(path, "wb") as file:
        write(file)


def without_flushing(path, write):
    temporary = path.with_name(path.name + ".partial")
    in_place(temporary, write)
    os.replace(temporary, path)


def copied(target, link):
    in_place(link, lambda file: file.write(target.read_bytes()))


@pytest.mark.nightly
def test_crash_points_of_the_references_protocol():
    """torch.save under the final name, then a copy of it as latest.pt: torn by a kill already."""
    crashes = enumerate_crashes(1, patches={"write_atomic": in_place, "link_atomic": copied})
    assert (
        crashes.unloadable["kill"] > 10
        and crashes.unloadable["power loss"] > 100
        and crashes.tally.held < crashes.tally.tried
    )


def test_crash_points_of_a_rename_without_a_flush():
    """What a kill cannot show: the page cache survives it."""
    crashes = enumerate_crashes(1, patches={"write_atomic": without_flushing})
    assert (
        crashes.unloadable["kill"] == crashes.lost["kill"] == 0
        and crashes.unloadable["power loss"] > 0
    )


@pytest.mark.parametrize("forgotten, found", [("fsync", "unloadable"), ("fsync folder", "lost")])
def test_crash_points_of_a_disk_that_ignores_a_flush(forgotten, found):
    crashes = enumerate_crashes(1, forget=frozenset([forgotten]))
    assert (
        crashes.unloadable["kill"] == crashes.lost["kill"] == 0
        and getattr(crashes, found)["power loss"] > 0
    )


def test_crash_points_of_a_folder_that_was_not_flushed():
    """As it was: what is flushed in a folder is lost with the folder's own name."""
    crashes = enumerate_crashes(
        1, patches={"make_folder": lambda folder: folder.mkdir(parents=True, exist_ok=True)}
    )
    assert crashes.lost["kill"] == 0 and crashes.lost["power loss"] > 0


def test_what_a_disk_may_hold_after_a_power_loss():
    disk = Disk("/r")
    disk.do("open", "/r/a", "w")
    disk.do("write", "/r/a", b"1234")
    states = {state.entries for state in disk.after_power_loss()}
    assert states == {()} | {
        (("/r/a", (0, content)),) for content in (b"", b"12", b"12\0\0", b"\0\0\0\0", b"1234")
    }
    disk.do("fsync", "/r/a")
    assert {state.entries for state in disk.after_power_loss()} == {(), (("/r/a", (0, b"1234")),)}
    disk.do("fsync folder", "/r")
    disk.do("replace", "/r/a", "/r/b")
    assert {state.entries for state in disk.after_power_loss()} == {
        ((f"/r/{name}", (0, b"1234")),) for name in "ab"
    }
    assert disk.after_kill().entries == (("/r/b", (0, b"1234")),)
    disk.do("link", "/r/b", "/r/c")
    disk.do("replace", "/r/c", "/r/b")
    assert [path for path, _ in disk.after_kill().entries] == ["/r/b", "/r/c"], (
        "of two names of one file, neither goes"
    )


def test_a_resume_that_forgets_its_place_in_the_data_is_noticed():
    """The original implementation's run reads its first sequences again (T2)."""
    states, _ = killed_runs(3, "forgets samples_seen")
    assert states.held < states.tried and "differs" in states.failures[0]


def test_a_resume_that_forgets_its_log_window_is_noticed_in_the_metrics_only():
    """T13: its first logged loss after a resume is half of what it was.

    A kill may hit a moment without a window to forget: then more are tried.
    """
    for kills in (3, 6, 12):
        states, metrics = killed_runs(kills, "forgets window")
        if metrics.held < metrics.tried:
            break
    assert (
        states.held == states.tried
        and metrics.held < metrics.tried
        and "record of step" in metrics.failures[0]
    )


def test_a_run_that_dies_of_a_signal_is_noticed():
    tally = signals_save_and_leave(1, "dies of signals")
    assert tally.held == 0 and "exit code -15" in tally.failures[0]


def test_a_stop_that_loses_a_count_is_noticed():
    tally = same_after_resume(1, "forgets tokens_seen")
    assert tally.held == 0 and "tokens_seen" in tally.failures[0]


def test_a_save_that_a_full_disk_tears_is_noticed(tmp_path):
    for step in (1, 2):
        runs._save(tmp_path / "template", step)
    fault = {"index": 5, "code": errno.ENOSPC, "lasting": False, "short": True}
    assert runs._failing_save(tmp_path / "template", tmp_path / "ours", fault) == ""
    with mock.patch.object(checkpoint, "write_atomic", in_place):
        assert "step_0000003.pt" in runs._failing_save(
            tmp_path / "template", tmp_path / "torn", fault
        )


def test_a_short_write_and_then_a_full_disk(tmp_path):
    """The kernel writes what fits and returns how much; the next write is the one that fails."""
    with (
        Faults(tmp_path, index=2, code=errno.ENOSPC, lasting=True, short=True),
        open(tmp_path / "file", "wb", buffering=0) as file,
    ):
        assert file.write(b"123") == 1
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                file.write(b"23")
        os.unlink(tmp_path / "file")


def test_old_checkpoints_that_cannot_be_deleted_cost_nothing(tmp_path):
    """The new one was saved, and then the run ended with the error of deleting an old one."""

    def refuse(path, *args, **kwargs):
        if os.path.basename(path).startswith("step_"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path, *args, **kwargs)

    real = os.unlink
    with mock.patch.object(os, "unlink", refuse):
        for step in range(1, 5):
            runs._save(tmp_path, step)
    assert find_latest(tmp_path)[0].step == 4 and len(step_files(tmp_path)) == 4
    runs._save(tmp_path, 5)
    assert len(step_files(tmp_path)) == 2


def test_a_kill_while_the_last_save_names_its_file():
    """The last step file was written, but latest.pt still named the one before.

    Every resume said "already complete" and left it so; predict.py then silently used an older
    model.
    """
    run = runs.Run()
    killed = run(
        events="w",
        index=runs.straight()[1].events.count("w") - 6,
        exact=True,
        signal=int(signal.SIGKILL),
    )
    assert (
        killed.code == -signal.SIGKILL
        and killed.in_a_save
        and find_latest(run.ckpt_dir)[0].step == runs.STEPS
    )
    assert read_checkpoint(run.ckpt_dir / "latest.pt").step < runs.STEPS
    assert run().code == 0
    assert runs.difference(run) == ""


@pytest.mark.parametrize("refused", [(), ("link",)])
def test_names_are_restored(tmp_path, monkeypatch, refused):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    runs._save(tmp_path, 1)
    runs._save(tmp_path, 2)
    # A kill before it.
    with mock.patch.object(checkpoint, "link_atomic", lambda *_: None):
        runs._save(tmp_path, 4)
    found, _ = find_latest(tmp_path)
    assert (found.step, read_checkpoint(tmp_path / "latest.pt").step) == (4, 2)
    restore_names(found)
    steps = [read_checkpoint(tmp_path / name).step for name in ("latest.pt", "best.pt")]
    assert steps == [4, 1], "and best.pt stays, for the run does not say that this one is the best"
