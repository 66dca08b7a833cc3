"""Files of text: their compression, encoding and newlines, and errors that say the place."""

from __future__ import annotations

import bz2
import gzip
import io
import tarfile
import zipfile

import pytest

from runtime.data.text_files import known_encoding, open_text


def read(data: bytes, encoding: str = "utf-8") -> str:
    with open_text(lambda: io.BytesIO(data), "a.txt", encoding) as file:
        return file.read()


TEXT = "Ein Löwe,\nzwei 日本.\n"


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(mark):
    """UTF-16 with its mark was refused with a position inside a buffer."""
    assert read(TEXT.encode(mark)) == TEXT
    # Even if another one is given: files of a folder may differ.
    assert read(TEXT.encode(mark), "cp1252") == TEXT


@pytest.mark.parametrize("order", ["be", "le"])
@pytest.mark.parametrize("width", [16, 32])
def test_both_byte_orders_with_and_without_a_mark(width, order):
    """UTF-16 without its mark is valid UTF-8: it was trained on as text full of NULs."""
    name = f"utf-{width}-{order}"
    assert read(("\ufeff" + TEXT).encode(name)) == TEXT
    with pytest.raises(
        ValueError, match=f"a.txt holds NUL bytes: it looks like {name} without .*give --encoding"
    ):
        read("plain words in a row".encode(name))
    assert read(TEXT.encode(name), name) == TEXT


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match="holds NUL bytes: it is not text in UTF-8"):
        read(bytes(range(8)) * 50)
    # A single NUL in a long text is a character.
    assert read(b"a\0" + b"b" * 500) == "a\0" + "b" * 500


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_newlines_become_one(newline):
    assert read(TEXT.replace("\n", newline).encode()) == TEXT


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("before", [0, 65_530, 200_000])
def test_a_wrong_byte_is_located(pack, before):
    """The position was one inside the reader's buffer, and the line was missing."""
    data = b"line one \xc3\xa9\r\n" * (before // 13) + b"caf" + b"\xe9 au lait\n"
    at, line = data.index(b"\xe9"), data.count(b"\n", 0, data.index(b"\xe9")) + 1
    with pytest.raises(ValueError) as error:
        read(pack(data))
    said = str(error.value)
    assert f"a.txt line {line}, byte {at:,}: 0xe9 is not utf-8 (cp1252 gives" in said
    assert "café au lait" in said and said.endswith("or convert the file with iconv")


def test_a_text_that_ends_within_a_character():
    with pytest.raises(ValueError, match="line 2, byte 3: 0xc3 is not utf-8"):
        read(b"ab\n\xc3")
    with pytest.raises(ValueError, match="0x81 is not cp1252"):
        read(b"ab\x81", "cp1252")


def test_words_that_begin_like_a_compressed_file_are_text():
    """A book that began with BZh was refused as damaged bzip2."""
    assert read(b"BZhou is a town.") == "BZhou is a town."
    assert read(bz2.compress(b"")) == "" and read(bz2.compress(b"text")) == "text"


def test_archives_say_how_to_unpack_them():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match="is a zip archive: unpack it .unzip a.txt"):
        read(buffer.getvalue())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(ValueError, match="is a tar archive: unpack it .tar -xf a.txt"):
        read(buffer.getvalue())


def test_encodings_have_names():
    assert known_encoding("Latin-1") == "iso8859-1" and known_encoding("UTF8") == "utf-8"
    for name in ("nope", "base64", "rot13", ""):
        with pytest.raises(ValueError, match="--encoding .* is unknown: give a name such as"):
            known_encoding(name)
