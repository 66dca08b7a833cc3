"""Writes that a crash cannot tear: what is under a name before, during and after."""

from __future__ import annotations

import errno
import hashlib
import os
import stat

import pytest

from runtime.base import files
from runtime.base.files import (
    fsync_folder,
    link_atomic,
    sha256_of_file,
    write_atomic,
    write_text_atomic,
)

posix_only = pytest.mark.skipif(os.name != "posix", reason="folders can be flushed on POSIX only")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(error):
    def write(file):
        file.write(b"half a ")
        file.flush()
        raise error

    return write


# ------------------------------------------------------------------------------------- write_atomic
def test_a_new_file_and_its_folders_are_made(tmp_path):
    write_atomic(tmp_path / "a/b/file.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "a/b/file.bin").read_bytes() == b"new" and names(tmp_path / "a/b") == [
        "file.bin"
    ]
    write_atomic(str(tmp_path / "a/b/file.bin"), lambda file: file.write(b""))
    assert (tmp_path / "a/b/file.bin").read_bytes() == b""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
        SystemExit(1),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_error_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_atomic(path, fail_half_way(error))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]
    with pytest.raises(type(error)):
        write_atomic(tmp_path / "other.bin", fail_half_way(error))
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_an_error_while_committing_keeps_the_old_file(tmp_path, monkeypatch, operation):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, operation, refuse)
        write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_the_old_file_is_whole_under_its_name_until_the_new_one_is(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write(file):
        for _ in range(3):
            file.write(b"x" * 100_000)
            file.flush()
            assert path.read_bytes() == b"old"

    # And whoever has it open keeps reading the old one.
    with open(path, "rb") as reader:
        write_atomic(path, write)
        assert reader.read() == b"old"
    assert path.read_bytes() == b"x" * 300_000


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ("file.bin" + files.TEMPORARY_SUFFIX)).write_bytes(b"torn" * 1000)
    write_atomic(tmp_path / "file.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "file.bin").read_bytes() == b"new" and names(tmp_path) == ["file.bin"]


def test_a_folder_under_that_name_is_an_error_and_stays(tmp_path):
    (tmp_path / "name").mkdir()
    (tmp_path / "name/inside").write_bytes(b"kept")
    with pytest.raises(OSError):
        write_atomic(tmp_path / "name", lambda file: file.write(b"new"))
    assert names(tmp_path) == ["name"] and (tmp_path / "name/inside").read_bytes() == b"kept"


@posix_only
def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    """The order is what a power loss needs: bytes are flushed before the rename.

    The other way round leaves an empty file.
    """
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(
            "fsync folder" if is_folder else f"fsync file of {os.fstat(descriptor).st_size}"
        )
        fsync(descriptor)

    def spy_replace(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_text_atomic(tmp_path / "file.txt", "grün")
    assert events == ["fsync file of 5", "replace", "fsync folder"]
    assert (tmp_path / "file.txt").read_bytes() == "grün".encode()
    events.clear()
    link_atomic(tmp_path / "file.txt", tmp_path / "latest.txt")
    assert events == ["replace", "fsync folder"]


# ------------------------------------------------------------------------------------- fsync_folder
@posix_only
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP])
def test_a_mount_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch, code):
    """CIFS and some FUSE mounts answer EINVAL to fsync on a folder.

    Every checkpoint there ended in an error, after it was written.
    """
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_atomic(tmp_path / "file.bin", lambda file: file.write(b"new"))
    assert (tmp_path / "file.bin").read_bytes() == b"new"


@posix_only
def test_a_disk_error_while_flushing_a_folder_is_one(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_folder(tmp_path)
    # The folder was closed again.
    assert len(os.listdir("/dev/fd")) == before


def test_a_system_that_cannot_open_folders_skips_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    fsync_folder(tmp_path)


# -------------------------------------------------------------------------------------- link_atomic
@pytest.fixture
def two(tmp_path):
    (tmp_path / "step_1.pt").write_bytes(b"one")
    (tmp_path / "step_2.pt").write_bytes(b"two")
    return tmp_path


def test_a_hard_link_is_the_same_file_and_outlives_the_other_name(two):
    link = two / "latest.pt"
    link_atomic(two / "step_1.pt", link)
    assert link.samefile(two / "step_1.pt") and not link.is_symlink()
    link_atomic(two / "step_2.pt", link)
    assert link.samefile(two / "step_2.pt") and names(two) == [
        "latest.pt",
        "step_1.pt",
        "step_2.pt",
    ]
    (two / "step_2.pt").unlink()
    assert link.read_bytes() == b"two"


def test_linking_again_to_the_same_file_leaves_nothing_over(two):
    """POSIX: renaming one hard link over another of the same file does nothing.

    The temporary name would stay.
    """
    for _ in range(2):
        link_atomic(two / "step_1.pt", two / "latest.pt")
    assert names(two) == ["latest.pt", "step_1.pt", "step_2.pt"] and (two / "latest.pt").samefile(
        two / "step_1.pt"
    )


def refuse(*_, **__):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_without_hard_links_it_is_a_relative_symbolic_link(two, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 2):
        link_atomic(two / f"step_{step}.pt", two / "latest.pt")
        assert (two / "latest.pt").is_symlink() and os.readlink(
            two / "latest.pt"
        ) == f"step_{step}.pt"
    moved = two.rename(two.with_name("moved"))
    assert (moved / "latest.pt").read_bytes() == b"two" and names(moved) == [
        "latest.pt",
        "step_1.pt",
        "step_2.pt",
    ]


def test_without_any_links_it_is_a_copy(two, monkeypatch):
    """exFAT disks and some network drives support neither kind of link.

    Every save raised there, so training died at its first checkpoint.
    """
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    for step, content in ((1, b"one"), (2, b"two")):
        link_atomic(two / f"step_{step}.pt", two / "latest.pt")
        assert (two / "latest.pt").read_bytes() == content and not (two / "latest.pt").is_symlink()
    assert names(two) == ["latest.pt", "step_1.pt", "step_2.pt"]


def test_a_link_that_cannot_be_renamed_leaves_the_old_one_and_nothing_over(two, monkeypatch):
    """The temporary name stayed: a second name of a 44 GB file, which `rm` would not free."""
    link_atomic(two / "step_1.pt", two / "latest.pt")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="not supported"):
        link_atomic(two / "step_2.pt", two / "latest.pt")
    assert (two / "latest.pt").read_bytes() == b"one" and names(two) == [
        "latest.pt",
        "step_1.pt",
        "step_2.pt",
    ]


def test_what_a_killed_process_left_of_a_link_is_replaced(two):
    (two / ("latest.pt" + files.TEMPORARY_SUFFIX)).symlink_to("nowhere")
    link_atomic(two / "step_1.pt", two / "latest.pt")
    assert (two / "latest.pt").read_bytes() == b"one" and names(two) == [
        "latest.pt",
        "step_1.pt",
        "step_2.pt",
    ]


def test_sha256_of_file(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_of_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()
