"""Open a file of text, whatever its compression, encoding and newlines.

Compression is recognised by its first bytes, not by the name. A byte order mark says the encoding;
without one it is the given encoding, UTF-8 by default. All newlines become \\n. What cannot be read
so is an error that names the file, the line and the byte.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from runtime.base.text import visible

# Compressions by their first bytes. The endings that their files have.
GZIP, XZ, ZSTD = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
# Its block size and the start of a block, or the end of an empty file: BZh alone begins words.
BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ZIP, TAR, TAR_AT = b"PK\x03\x04", b"ustar", 257

# UTF-32 first: its little-endian mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
# Text has no NUL characters. Above this share it was decoded wrongly.
NUL_SHARE = 0.01
# The start of a file, to recognise what it is.
HEAD_BYTES = 4096
# What prepare_data.py's users can do about bytes in another encoding.
ADVICE = "give --encoding NAME, such as cp1252, or convert the file with iconv"


def known_encoding(name: str) -> str:
    """Return Python's name of a text encoding. Raise ValueError if there is none of that name."""
    with contextlib.suppress(LookupError, ValueError):
        codec = codecs.lookup(name)
        # Others turn bytes into bytes, such as base64.
        if codec._is_text_encoding:  # type: ignore[attr-defined]
            return codec.name
    raise ValueError(
        f"--encoding {name!r} is unknown: give a name such as utf-8, utf-16-le, cp1252, "
        "shift_jis or gb18030"
    )


def archive_fault(name: str, kind: str) -> str:
    """Return the error line for a zip or tar archive."""
    command = f"unzip {name} -d FOLDER" if kind == "zip" else f"tar -xf {name} -C FOLDER"
    return f"{name} is a {kind} archive: unpack it ({command}), and give the folder"


def decompressed(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    """Return a reader of a file's bytes without its compression; ValueError for an archive."""
    head = raw.peek(HEAD_BYTES)
    stream: Any = raw
    if head.startswith(GZIP):
        stream = gzip.GzipFile(fileobj=raw)
    elif BZIP2.match(head):
        stream = bz2.BZ2File(raw)
    elif head.startswith(XZ):
        stream = lzma.LZMAFile(raw)  # noqa: SIM115
    elif head.startswith(ZSTD):
        stream = _Zstandard(raw, name)
    elif head.startswith(ZIP):
        raise ValueError(archive_fault(name, "zip"))
    reader = stream if stream is raw else io.BufferedReader(stream)
    if reader.peek(512)[TAR_AT : TAR_AT + len(TAR)] == TAR:
        raise ValueError(archive_fault(name, "tar"))
    return reader


class _Zstandard(io.RawIOBase):
    """A reader of Zstandard frames, one after the other, with pyarrow's codec."""

    def __init__(self, raw: io.BufferedReader, name: str):
        try:
            import pyarrow
        except ImportError:
            raise ValueError(f"reading {name} needs pyarrow: pip install pyarrow") from None
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def open_text(
    open_file: Callable[[], BinaryIO], name: str, encoding: str = "utf-8", advice: str = ADVICE
) -> Iterator[io.TextIOWrapper]:
    """Enter a reader of a file's text. `open_file` opens its bytes, and is called again to locate
    a byte that cannot be decoded. advice: what to do about such a byte.

    Raise ValueError for such a byte, for an archive, for damaged compression, and for UTF-16 or
    UTF-32 without its mark.
    """
    try:
        with open_file() as raw:
            stream = decompressed(_buffered(raw), name)
            found = _encoding_of(stream.peek(HEAD_BYTES)[:HEAD_BYTES], name, encoding, advice)
            yield io.TextIOWrapper(stream, encoding=found)
    except UnicodeDecodeError:
        with open_file() as raw:
            stream = decompressed(_buffered(raw), name)
            found = _encoding_of(stream.peek(HEAD_BYTES)[:HEAD_BYTES], name, encoding, advice)
            raise ValueError(f"{_decode_fault(stream, name, found)}: {advice}") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{name}: {error}") from error


def _buffered(raw: Any) -> io.BufferedReader:
    return raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)


def _encoding_of(head: bytes, name: str, encoding: str, advice: str) -> str:
    """Return the encoding that a mark at the start of a file says, else the given one."""
    for mark, marked in _MARKS:
        if head.startswith(mark):
            return marked
    if encoding == "utf-8" and head.count(0) > NUL_SHARE * len(head):
        raise ValueError(f"{name} holds NUL bytes: {_likely_encoding(head)}; {advice}")
    return encoding


def _likely_encoding(head: bytes) -> str:
    """Return what NUL bytes tell, by where they are."""
    # Which of the four bytes of a character are mostly NUL, for text of ASCII.
    high = "".join("0" if head[i::4].count(0) > 0.3 * len(head[i::4]) else "x" for i in range(4))
    guess = {
        "x000": "utf-32-le",
        "000x": "utf-32-be",
        "x0x0": "utf-16-le",
        "0x0x": "utf-16-be",
    }.get(high)
    if guess:
        return f"it looks like {guess} without a byte order mark"
    return "it is not text in UTF-8"


def check_nuls(text: str, where: str) -> None:
    """Raise ValueError if more than 1 % of a text's characters are NUL."""
    if "\0" in text and (count := text.count("\0")) > NUL_SHARE * len(text):
        raise ValueError(
            f"{where}: {count:,} of {len(text):,} characters are NUL, so it was not decoded "
            "as it was written: repair the file, or read it in another encoding"
        )


def _decode_fault(stream: io.BufferedReader, name: str, encoding: str) -> str:
    """Return the error line for the first byte of a file that is not in its encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    line, done = 1, 0
    while True:
        chunk = stream.read(1 << 16)
        try:
            line += newlines.decode(decoder.decode(chunk, final=not chunk)).count("\n")
        except UnicodeDecodeError as error:
            # The decoder adds the bytes that it kept from the chunk before.
            data, at = error.object, error.start
            offset = done + len(chunk) - len(data) + at
            before = data[:at].decode(encoding, "replace")
            line += newlines.decode(before, final=True).count("\n")
            return (
                f"{name} line {line}, byte {offset:,}: 0x{data[at]:02x} is not "
                f"{encoding.removesuffix('-sig')}{_as_cp1252(data, at)}"
            )
        if not chunk:
            return f"{name} cannot be decoded as {encoding}"
        done += len(chunk)


def _as_cp1252(data: bytes, at: int) -> str:
    """Return how the place reads in the most common other encoding, in brackets."""
    with contextlib.suppress(UnicodeDecodeError):
        here = data[max(0, at - 12) : at + 12].decode("cp1252")
        return f" (cp1252 gives {visible(' '.join(here.split()))!r})"
    return ""
