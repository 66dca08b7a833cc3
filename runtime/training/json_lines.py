"""Follow a file of JSON lines that a running process appends to, or that another one replaces."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

# No record is as long. What has no end of line until here is damage, and is not kept in memory.
LONGEST_LINE_BYTES = 1 << 24
CHUNK_BYTES = 1 << 20
# The last bytes read, by which a file that was written again in its place is noticed.
MARK_BYTES = 64


class Lines:
    """The lines of a file, each read once, and again from the first if the file was replaced.

    path: of a file that need not be there. within: a folder that it may not link out of; None: it
    may. `rest` holds a last line without its end; `problem` says why the file cannot be read;
    `modified` is the file's time (seconds since 1970). `generation` rises when the lines that were
    read are no more the file's.
    """

    def __init__(self, path: Path, within: Path | None = None):
        self.path, self.within = path, within
        self.problem, self.modified, self.generation = "", 0.0, 0
        self._seen: tuple[int, ...] = ()
        self.forget()

    def forget(self) -> None:
        """Begin again at the first line."""
        self.generation += 1
        self.rest, self.number = b"", 0
        self._file, self._offset, self._mark, self._skips = (0, 0), 0, b"", False

    @property
    def is_there(self) -> bool:
        """Return whether `changed` found a file that may be read."""
        return bool(self._seen)

    def changed(self) -> bool:
        """Return whether there is something to read, or nothing any more."""
        try:
            status = self.path.stat()
        except OSError as error:
            return self._lost("" if isinstance(error, FileNotFoundError) else error.strerror or "")
        if not stat.S_ISREG(status.st_mode):
            return self._lost("not a file")
        if self.within and not self.path.resolve().is_relative_to(self.within.resolve()):
            return self._lost("a link to another folder, which is not followed")
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == self._seen:
            return False
        self._seen = seen
        self.modified = status.st_mtime
        return True

    def _lost(self, problem: str) -> bool:
        was_there, self._seen = bool(self._seen or self._offset), ()
        news = was_there or problem != self.problem
        self.problem = problem
        return news

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, line without its end) of what is new.

        Of a line beyond LONGEST_LINE_BYTES only its beginning.
        """
        if not self.is_there:
            self.forget()
            return
        try:
            with open(self.path, "rb") as file:
                self._find_offset(file)
                while chunk := file.read(CHUNK_BYTES):
                    self._offset += len(chunk)
                    self._mark = (self._mark + chunk)[-MARK_BYTES:]
                    yield from self._split(chunk)
            self.problem = ""
        except OSError as error:
            self._lost(error.strerror or type(error).__name__)
            self.forget()

    def _find_offset(self, file) -> None:
        """Go to what is new of an open file; to its start if it is not the one that was read."""
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        # A number of a file may be given again, and a file may be written again in its place.
        file.seek(max(self._offset - len(self._mark), 0))
        if identity != self._file or file.read(len(self._mark)) != self._mark:
            self.forget()
            file.seek(0)
        self._file, self.modified = identity, status.st_mtime

    def _split(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        *whole, rest = (self.rest + chunk).split(b"\n")
        for line in whole:
            self.number += 1
            if not self._skips:
                yield self.number, line.rstrip(b"\r")
            self._skips = False
        self.rest = rest
        if len(rest) > LONGEST_LINE_BYTES:
            if not self._skips:
                yield self.number + 1, rest[:MARK_BYTES]
            self.rest, self._skips = b"", True

    def take_rest(self) -> None:
        """Count the last line as read: it is whole, and only its end is missing."""
        self.rest, self._skips = b"", True
