"""File operations that a crash cannot tear. Everything that must survive one (checkpoints, manifests, metrics) is written here.

A file is written under a temporary name in the same folder, flushed to the disk, renamed over the final name, and the
folder is flushed too: a reader sees the old file or the new one, never half of one, after a kill or a power loss.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power loss. Systems that cannot flush folders skip it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.ENOTSUP,
        ):  # some network and FUSE mounts
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are not there. Their names are flushed too: a power loss could take a new folder with all
    that was flushed in it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        fsync_folder(path.parent)


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file and rename it to `path`. On any error what was there before stays, and nothing else."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text_atomic(path: str | Path, text: str) -> None:
    """`write_atomic` for UTF-8 text."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def link_atomic(target: Path, link: Path) -> None:
    """Make `link` a second name of the file `target` in the same folder, replacing what was there.

    A hard link where the file system has them (deleting one name then keeps the other), else a relative symbolic link, and a
    copy where it has neither (exFAT, some network drives).
    """
    temporary = link.with_name(link.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(target, temporary)
        except OSError:
            os.symlink(target.name, temporary)
    except OSError:
        with open(target, "rb") as source:
            write_atomic(link, lambda file: shutil.copyfileobj(source, file, 1 << 20))
        return
    try:
        os.replace(temporary, link)
    finally:
        temporary.unlink(
            missing_ok=True
        )  # POSIX: renaming one hard link over another of the same file does nothing
    fsync_folder(link.parent)


def sha256_of_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
