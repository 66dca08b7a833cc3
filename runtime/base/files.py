"""Crash-safe file operations, for checkpoints, manifests and metrics.

A file is written under a temporary name in the same folder, flushed to disk and renamed over the
final name; then the folder is flushed. After a kill or a power loss a reader sees the old file or
the new one, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"


def is_utf8(path: str | Path) -> bool:
    """Return whether a path is UTF-8. Others exist on Linux: old archives, old file servers."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power loss.

    Does nothing on systems that cannot flush a folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        # Windows.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE mounts raise these three.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and flush their names.

    Without the flush a power loss could remove a new folder with everything flushed in it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        fsync_folder(path.parent)


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file and rename it to `path`.

    On any error the old file stays, and no temporary file does.
    """
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
    """Write UTF-8 text with `write_atomic`."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def link_atomic(target: Path, link: Path) -> None:
    """Make `link` a second name of the file `target` in the same folder; replace an old `link`.

    A hard link if the file system has them (deleting one name then keeps the other), else a
    relative symbolic link, else a copy (exFAT, some network drives).
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
        # POSIX: renaming one hard link over another of the same file does nothing.
        temporary.unlink(missing_ok=True)
    fsync_folder(link.parent)


def sha256_of_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path, missing: dict | None = None) -> dict:
    """Return a file's JSON object; `missing` if there is no file. Raise a one-line ValueError."""
    if missing is not None and not path.is_file():
        return missing
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data
