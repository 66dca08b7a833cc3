"""Guarantees about reading text: documents in = documents out, whatever form the file has."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

from runtime.data.file_sets import find_files
from runtime.data.sources import FileSource
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, folder

WORDS = [
    "cat",
    "dog's",
    "café",
    '"Hi,"',
    'a "b" c',
    "ran\nfast",
    "tree.",
    "1,234",
    "x;y",
    "a\tb",
    "  two  spaces",
    "\n\n",
    "back\\slash \\n \\",
    "ﬁ",
    "日本語",
    "😀",
]
LATIN = [word for word in WORDS if word.isascii() or word == "café"]


def texts(r: random.Random, words: list[str], count: int = 12) -> list[str]:
    """Return distinct documents, stripped, with all that is hard in them."""
    return [
        f"story {i} {' '.join(r.choices(words, k=r.randrange(3, 20)))} end" for i in range(count)
    ]


# ------------------------------------------------------------------- writers: texts -> file's text
def _txt(documents: list[str]) -> str:
    return "\n<|endoftext|>\n".join(documents) + "\n<|endoftext|>\n"


def _form_feeds(documents: list[str]) -> str:
    return "\f".join(documents)


def _json_lines(documents: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))


def _json_raw(documents: list[str]) -> str:
    rows = ({"data": {"text": text}} for text in documents)
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def _json_array(documents: list[str]) -> str:
    return json.dumps([{"text": text, "n": 1.5} for text in documents], indent=1)


def _json_strings(documents: list[str]) -> str:
    return json.dumps(documents)


def _json_sequence(documents: list[str]) -> str:
    return "\n".join(json.dumps({"text": text}, indent=2) for text in documents)


def _table(delimiter: str = ",", before: str = "", quoting: int = csv.QUOTE_MINIMAL) -> Callable:
    def write(documents: list[str]) -> str:
        file = io.StringIO()
        rows = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting)
        rows.writerows([["id", "text", "label"], *((i, t, "") for i, t in enumerate(documents))])
        return before + file.getvalue()

    return write


def _plain_table(documents: list[str]) -> str:
    """Return tab-separated text without any quoting: one line a document."""
    return "text\tid\n" + "".join(f"{text}\t{i}\n" for i, text in enumerate(documents))


# Name of the file, its writer, flags of FileSource.
FORMS: list[tuple[str, Callable[[list[str]], str], dict]] = [
    ("a.txt", _txt, {}),
    ("a.TEXT", _form_feeds, {"separator": "\f"}),
    ("notes.md", _txt, {"text_format": "txt"}),
    ("a.jsonl", _json_lines, {}),
    ("a.NDJSON", _json_raw, {"text_column": "data.text"}),
    ("a.json", _json_array, {}),
    ("strings.json", _json_strings, {}),
    ("sequence.json", _json_sequence, {}),
    ("lines.json", _json_lines, {}),
    ("a.csv", _table(), {}),
    ("quoted.csv", _table(quoting=csv.QUOTE_ALL), {}),
    ("semicolon.csv", _table(";"), {}),
    ("excel.csv", _table(";", "sep=;\n"), {}),
    ("a.tsv", _table("\t"), {}),
    ("plain.tsv", _plain_table, {}),
]
# Name, words that it can write, --encoding that it needs.
ENCODINGS = [
    ("utf-8", WORDS, "utf-8"),
    ("utf-8-sig", WORDS, "utf-8"),
    ("utf-16", WORDS, "utf-8"),
    ("utf-16-be", WORDS, "utf-8"),
    ("utf-32", WORDS, "utf-8"),
    ("utf-16-le", WORDS, "utf-16-le"),
    ("cp1252", LATIN, "cp1252"),
    ("gb18030", WORDS, "gb18030"),
]
NEWLINES = ["\n", "\r\n", "\r"]


def _zstd(data: bytes) -> bytes:
    import pyarrow

    half = len(data) // 2
    # Two frames, as tools that compress in parallel write.
    return b"".join(
        pyarrow.Codec("zstd").compress(part).to_pybytes() for part in (data[:half], data[half:])
    )


COMPRESSIONS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("", bytes),
    (".gz", gzip.compress),
    # Two members, as `cat a.gz b.gz` makes; and a name that does not say it.
    ("", lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:])),
    (".BZ2", bz2.compress),
    (".xz", lzma.compress),
    (".zst", _zstd),
]


def documents_in_and_out(count: int) -> Tally:
    """Write files in `count` of the combinations of form, encoding, newline and compression.

    Each must give the documents that it was written from, to the character.
    """
    tally = Tally()
    cases = list(itertools.product(FORMS, ENCODINGS, NEWLINES, COMPRESSIONS))
    r = random.Random(FIRST_SEED)
    r.shuffle(cases)
    with folder() as at:
        for i, case in enumerate(itertools.islice(itertools.cycle(cases), count)):
            (name, write, options), (codec, words, encoding), newline, (ending, pack) = case
            documents = texts(random.Random(FIRST_SEED + i), words)
            if write is _plain_table:
                documents = [" ".join(text.split()) for text in documents]
            text = write(documents).replace("\n", newline)
            mark = "\ufeff" if codec == "utf-16-be" else ""
            path = at / (name + ending)
            path.write_bytes(pack((mark + text).encode(codec)))
            tally.add(*_compared(path, documents, encoding, options, (codec, newline)))
            path.unlink()
    tally.detail = {"combinations": min(count, len(cases))}
    return tally


def _compared(
    path: Path, documents: list[str], encoding: str, options: dict, what: tuple
) -> tuple[bool, str]:
    """Return whether a file gives these documents, and the case with what it gave."""
    case = f"{path.name} {what!r} {encoding}"
    try:
        files = find_files([str(path)], options.get("text_format"))
        read = list(FileSource(files, encoding=encoding, **options).documents())
    except Exception as error:
        return False, f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found = [text for text, _ in read if text.strip()]
    if found == documents and all(ends for _, ends in read):
        return True, case
    different = sum(a != b for a, b in zip(found, documents, strict=False))
    return False, f"{case}: {len(found)} of {len(documents)} documents, {different} differ"


# ------------------------------------------------------------------------------- broken tables
def _without_a_quote(text: str, r: random.Random) -> str:
    at = r.choice([i for i, c in enumerate(text) if c == '"'])
    return text[:at] + text[at + 1 :]


def _with_a_quote(text: str, r: random.Random) -> str:
    at = r.randrange(text.index("\n") + 1, len(text))
    return text[:at] + '"' + text[at:]


def _with_a_delimiter(text: str, r: random.Random) -> str:
    at = r.randrange(text.index("\n") + 1, len(text))
    return text[:at] + "," + text[at:]


def _without_a_delimiter(text: str, r: random.Random) -> str:
    at = r.choice([i for i, c in enumerate(text) if c == "," and i > text.index("\n")])
    return text[:at] + text[at + 1 :]


def _backslash(text: str, r: random.Random) -> str:
    return text.replace('""', '\\"')


def broken_tables(count: int) -> Tally:
    """Break a CSV file: a quote or delimiter too many or missing, quotes escaped by backslashes.

    Held: rejected in a line with the file and a line number, or every document but the one that was
    touched is there, unchanged.
    """
    tally, rejected = Tally(), 0
    faults = [_without_a_quote, _with_a_quote, _with_a_delimiter, _without_a_delimiter, _backslash]
    with folder() as at:
        for i in range(count):
            r = random.Random(FIRST_SEED + i)
            documents = texts(r, WORDS)
            # A table as a spreadsheet writes it: quotes where they are needed, text in lines.
            if i % 2:
                documents = [text.replace("\n", " ") for text in documents]
            file = io.StringIO()
            rows = csv.writer(file, lineterminator="\n")
            rows.writerows([["id", "text"], *enumerate(documents)])
            text = faults[i % len(faults)](file.getvalue(), r)
            (at / "a.csv").write_text(text, encoding="utf-8")
            case = f"case {i}, {faults[i % len(faults)].__name__}"
            try:
                source = FileSource(find_files([str(at / "a.csv")]))
                found = [text for text, _ in source.documents()]
            except ValueError as error:
                rejected += 1
                said = str(error)
                tally.add("a.csv line " in said and "\n" not in said, f"{case}: says {said}")
                continue
            lost = set(documents) - set(found)
            tally.add(
                len(found) == len(documents) and len(lost) <= 1,
                f"{case}: {len(found)} documents of {len(documents)}, {len(lost)} lost or changed",
            )
    tally.detail = {"rejected": rejected}
    return tally


PROMISES: list[Promise] = [
    Promise(
        20,
        "Documents in = documents out: formats x encodings x newlines x compressions",
        documents_in_and_out,
        540,
        len(FORMS) * len(ENCODINGS) * len(NEWLINES) * len(COMPRESSIONS),
        len(FORMS) * len(ENCODINGS) * len(NEWLINES) * len(COMPRESSIONS),
    ),
    Promise(
        20,
        "A broken table is rejected with its line, or loses no row but the broken one",
        broken_tables,
        300,
        2000,
        2000,
    ),
]
