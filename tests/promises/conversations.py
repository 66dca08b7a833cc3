"""Guarantees about reading chats: a damaged or wrong file is refused with its line, or counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.posttraining.conversations import ExampleFiles
from runtime.posttraining.forms import (
    ANSWER_LAST,
    EQUAL_ANSWERS,
    NO_ANSWER,
    NO_PROMPT,
    NO_TARGET,
    USER_LAST,
)
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, folder

Row = dict[str, Any]


# ------------------------------------------------------------------------------- good rows
def _said(name: str, i: int) -> str:
    return f'{name} {i}: "a, b"\nc; d'


def _openai(i: int) -> Row:
    return {
        "messages": [
            {"role": "user", "content": _said("ask", i)},
            {"role": "assistant", "content": _said("answer", i)},
        ]
    }


def _sharegpt(i: int) -> Row:
    turns = (("human", "ask"), ("gpt", "answer"))
    return {"conversations": [{"from": who, "value": _said(name, i)} for who, name in turns]}


def _alpaca(i: int) -> Row:
    return {"instruction": _said("ask", i), "input": "", "output": _said("answer", i)}


def _completion(i: int) -> Row:
    return {"prompt": _said("ask", i), "completion": _said("answer", i)}


def _pair(i: int) -> Row:
    names = {"prompt": "ask", "chosen": "answer", "rejected": "worse"}
    return {key: _said(name, i) for key, name in names.items()}


def _two_conversations(i: int) -> Row:
    worse = _openai(i)["messages"]
    worse[-1]["content"] = _said("worse", i)
    return {"chosen": _openai(i)["messages"], "rejected": worse}


def _prompt(i: int) -> Row:
    return {"prompt": _said("ask", i), "number": str(i)}


# By form: how a row is made, and the kind.
FORMS: dict[str, tuple[Callable[[int], Row], str]] = {
    "messages": (_openai, "conversations"),
    "conversations": (_sharegpt, "conversations"),
    "instruction": (_alpaca, "conversations"),
    "completion": (_completion, "conversations"),
    "pair": (_pair, "pairs"),
    "two": (_two_conversations, "pairs"),
    "prompt": (_prompt, "prompts"),
}
TABLES = ("instruction", "completion", "pair", "prompt")


# ------------------------------------------------------------------------ damage of one row
def _at_message(change: Callable[[Row], object], which: int = -1) -> Callable[[Row], object]:
    """Return a damage of a row's messages that changes one of them."""

    def damage(row: Row) -> None:
        change(next(value for value in row.values() if isinstance(value, list))[which])

    return damage


def _set(**values) -> Callable[[Row], object]:
    return lambda row: row.update(values)


def _content(value) -> Callable[[Row], object]:
    return _at_message(lambda m: m.update({"value" if "value" in m else "content": value}))


def _role(value) -> Callable[[Row], object]:
    return _at_message(lambda m: m.update({"from" if "from" in m else "role": value}))


def _answer(value) -> Callable[[Row], object]:
    """Return a damage that sets the answer of a row, in whichever form."""

    def damage(row: Row) -> None:
        for key in ("output", "completion", "chosen"):
            if isinstance(row.get(key), str):
                row[key] = value
                return
        _content(value)(row)

    return damage


def _drop_last(row: Row) -> None:
    next(value for value in row.values() if isinstance(value, list)).pop()


def _no_list(row: Row) -> None:
    key = next(key for key, value in row.items() if isinstance(value, list))
    row[key] = "a text"


def _misspelt(row: Row) -> None:
    key = next(iter(row))
    row["x" + key] = row.pop(key)


def _dialogue(row: Row) -> None:
    row["chosen"] = "\n\nHuman: Who?\n\nAssistant: I."


def _same(row: Row) -> None:
    row["rejected"] = row["chosen"]


def _other_user(row: Row) -> None:
    row["rejected"] = [{"role": "user", "content": "another"}, row["rejected"][1]]


LISTS = ("messages", "conversations", "two")
ANSWERS = ("messages", "conversations", "instruction", "completion", "pair", "two")
IMAGE = [{"type": "image_url", "image_url": {"url": "a.png"}}]
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@dataclass(frozen=True)
class Damage:
    """Damage of one row. reason: with which it is dropped; empty: a line of error says `words`."""

    name: str
    forms: tuple[str, ...]
    damage: Callable[[Row], object]
    words: str = ""
    reason: str = ""
    # Only JSON has such values.
    json_only: bool = True


ROW_DAMAGES = [
    Damage("empty answer", ANSWERS, _answer(""), reason=NO_ANSWER, json_only=False),
    Damage("blank answer", ANSWERS, _answer(" \n "), reason=NO_ANSWER, json_only=False),
    Damage("null answer", ANSWERS, _answer(None), reason=NO_ANSWER),
    Damage("user last", ("messages",), _role("user"), reason=NO_ANSWER),
    Damage("no answer", ("messages", "conversations"), _drop_last, reason=NO_ANSWER),
    Damage("nothing", ("messages",), _set(messages=[]), reason=NO_ANSWER),
    Damage("null", ("messages",), _set(messages=None), reason=NO_ANSWER),
    Damage(
        "one more question",
        ("messages",),
        lambda row: row["messages"].append({"role": "user", "content": "and?"}),
        reason=USER_LAST,
    ),
    Damage(
        "empty question",
        ("messages", "conversations"),
        _at_message(lambda m: m.update({"value" if "value" in m else "content": ""}), 0),
        reason=NO_PROMPT,
    ),
    Damage("empty prompt", ("prompt", "pair"), _set(prompt=""), reason=NO_PROMPT, json_only=False),
    Damage(
        "untrained", ("messages",), _at_message(lambda m: m.update(train=False)), reason=NO_TARGET
    ),
    Damage("equal answers", ("pair", "two"), _same, reason=EQUAL_ANSWERS, json_only=False),
    Damage(
        "answered prompt",
        ("prompt",),
        _set(prompt=[{"role": "assistant", "content": "a"}]),
        reason=ANSWER_LAST,
    ),
    Damage(
        "mixed keys", ANSWERS, lambda row: (row.clear(), row.update({"a": 1, "b": 2})), "mixed keys"
    ),
    Damage("misspelt", (*ANSWERS, "prompt"), _misspelt, "mixed keys"),
    Damage("two forms", ("messages",), _set(prompt="a", completion="b"), "mixed keys"),
    Damage(
        "many columns",
        (*ANSWERS, "prompt"),
        lambda row: (row.clear(), row.update({f"column\n{i}" * 9: i for i in range(300)})),
        "mixed keys",
    ),
    Damage("no keys", (*ANSWERS, "prompt"), dict.clear, "no columns"),
    Damage("tools", ANSWERS, _set(tools=[{"name": "f"}]), "tools"),
    Damage("images", (*ANSWERS, "prompt"), _set(images=["a.png"]), "images"),
    Damage("tool calls", LISTS, _at_message(lambda m: m.update(tool_calls=CALL)), "tool_calls"),
    Damage("tool's answer", LISTS, _role("tool"), "tools"),
    Damage("image part", LISTS, _content(IMAGE), "image_url"),
    Damage("KTO", ("completion",), _set(label=True), "KTO", json_only=False),
    Damage("dialogue as text", ("pair",), _dialogue, "HH-RLHF", json_only=False),
    Damage("other questions", ("two",), _other_user, "one prompt"),
    Damage("unknown role", LISTS, _role("narrator"), "must be one of"),
    Damage("role is a list", LISTS, _role(["user"]), "must be one of"),
    Damage("no role", LISTS, _role(None), "must be one of"),
    Damage("a number", LISTS, _content(3), "must be text"),
    Damage("a number for an answer", ("completion", "instruction", "pair"), _answer(3), "be text"),
    Damage("text for messages", ("messages", "conversations"), _no_list, "list of messages"),
    Damage("train", ("messages", "two"), _at_message(lambda m: m.update(train="yes")), "train"),
    Damage("weight", ("messages", "two"), _at_message(lambda m: m.update(weight=3)), "weight"),
    Damage("trained user", ("messages",), _at_message(lambda m: m.update(weight=1), 0), "trained"),
    Damage("both styles", ("messages",), _at_message(lambda m: m.update({"from": "gpt"})), "mixed"),
    Damage(
        "other style",
        ("messages",),
        lambda row: row["messages"].append({"from": "gpt", "value": "b"}),
        "use one form",
    ),
    Damage(
        "a string",
        ("messages", "conversations"),
        lambda row: next(iter(row.values())).append("hi"),
        "role and content",
    ),
    Damage("history", ("instruction",), _set(history=[["one"]]), "history"),
    Damage("NULs", ANSWERS, _answer("\0" * 9), "NUL"),
]


# ------------------------------------------------------------------------ damage of a file
def _cut(data: bytes, r: random.Random) -> bytes:
    return data[: len(data) * 2 // 3]


def _bad_byte(data: bytes, r: random.Random) -> bytes:
    at = data.index(b"answer 3")
    return data[:at] + b"\xff" + data[at:]


def _bad_line(data: bytes, r: random.Random) -> bytes:
    lines = data.split(b"\n")
    lines[3] = b'{"messages": [}'
    return b"\n".join(lines)


def _a_list(data: bytes, r: random.Random) -> bytes:
    lines = data.split(b"\n")
    lines[3] = b'["a", "b"]'
    return b"\n".join(lines)


def _unquoted(data: bytes, r: random.Random) -> bytes:
    at = data.index(b'"', data.index(b"ask 3"))
    return data[:at] + data[at + 1 :]


def _short_row(data: bytes, r: random.Random) -> bytes:
    return data.rstrip(b"\n") + b"\na\n"


def _comma(data: bytes, r: random.Random) -> bytes:
    # More fields than any header here has.
    return data.rstrip(b"\n") + b"\nWhy, oh, why, oh why?,Because\n"


def _column_twice(data: bytes, r: random.Random) -> bytes:
    header, rest = data.split(b"\n", 1)
    names = header.split(b",")
    return b",".join([*names[:-1], names[0]]) + b"\n" + rest


def _zip(data: bytes, r: random.Random) -> bytes:
    return b"PK\x03\x04" + data


# Name, endings of files, damage, whether the error has a line or a row.
FILE_DAMAGES: list[tuple[str, tuple[str, ...], Callable, bool]] = [
    ("cut", (".jsonl", ".json", ".csv"), _cut, True),
    ("cut", (".jsonl.gz", ".parquet"), _cut, False),
    ("a byte that is no UTF-8", (".jsonl", ".json", ".csv", ".tsv"), _bad_byte, True),
    ("a line that is no JSON", (".jsonl", ".txt"), _bad_line, False),
    ("a list for a row", (".jsonl",), _a_list, True),
    ("a quote too few", (".csv", ".tsv"), _unquoted, True),
    ("a short row", (".csv",), _short_row, True),
    ("a comma without quotes", (".csv",), _comma, True),
    ("a column twice", (".csv",), _column_twice, False),
    ("empty", (".jsonl", ".json", ".csv", ".parquet"), lambda *_: b"", False),
    ("blank lines", (".jsonl",), lambda *_: b"\n\n", False),
    ("an empty array", (".json",), lambda *_: b"[]", False),
    ("a header alone", (".csv",), lambda data, _: data.split(b"\n")[0], False),
    (
        "UTF-16 without its mark",
        (".jsonl", ".csv"),
        lambda data, _: data.decode().encode("utf-16-le"),
        False,
    ),
    ("an archive", (".jsonl", ".zip"), _zip, False),
    ("plain text", (".txt", ".jsonl", ".parquet"), lambda *_: b"Once upon a time", False),
    ("other columns", (".jsonl",), lambda *_: b'{"question": "a", "answer": "b"}', True),
    ("text for pre-training", (".jsonl",), lambda *_: b'{"text": "a"}', True),
    ("an object of rows", (".json",), lambda data, _: b'{"data": ' + data + b"}", True),
]


# --------------------------------------------------------------------------------- writers
def written(rows: list[Row], ending: str) -> bytes:
    """Return the bytes of a file with these rows."""
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    if ending == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if ending in (".csv", ".tsv"):
        table = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        delimiter = "\t" if ending == ".tsv" else ","
        writer = csv.DictWriter(table, names, delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return table.getvalue().encode()
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return gzip.compress(data) if ending.endswith(".gz") else data


def damaged_files(count: int) -> Tally:
    """Write `count` files of chats with one fault each, a row's or the file's.

    Held: refused in one line with the file, and the line or row where there is one; or the row is
    counted with its reason, and every other row is read as it was written.
    """
    tally = Tally()
    refused = 0
    with folder() as at:
        for i in range(count):
            r = random.Random(FIRST_SEED + i)
            if i % 3:
                damage = ROW_DAMAGES[(i - i // 3) % len(ROW_DAMAGES)]
                what, was_refused = _damaged_row(at, damage, r)
                case = f"case {i}, {damage.name}"
            else:
                name, endings, change, has_line = FILE_DAMAGES[i // 3 % len(FILE_DAMAGES)]
                what, was_refused = _damaged_file(at, endings, change, has_line, r)
                case = f"case {i}, {name}"
            refused += was_refused
            tally.add(not what, f"{case}: {what}")
    tally.detail = {"refused": refused}
    return tally


def _damaged_row(at: Path, damage: Damage, r: random.Random) -> tuple[str, bool]:
    """Return what is wrong with how one damaged row was read, and whether it was refused."""
    form = r.choice(damage.forms)
    make, kind = FORMS[form]
    # Parquet files have one type in a column.
    endings = [".jsonl", ".json", ".jsonl.gz"]
    if not damage.json_only and form in TABLES:
        endings += [".csv", ".tsv"]
    ending = r.choice(endings)
    rows = [make(i) for i in range(r.randint(6, 30))]
    # The first row says what the file is.
    k = r.randrange(1, len(rows))
    damage.damage(rows[k])
    path = at / f"a{ending}"
    path.write_bytes(written(rows, ending))
    files = ExampleFiles(path, kind)
    try:
        examples = list(files)
    except ValueError as error:
        if damage.reason:
            return f"refused, not counted: {error}", True
        return _refusal(str(error), path, damage.words, _line_of(rows, k, ending)), True
    if not damage.reason:
        return "it was accepted", False
    report = files.report
    if report.dropped != {damage.reason: 1} or report.total != len(rows):
        return f"counted {report.total}: {dict(report.dropped)}", False
    # Each row's texts hold its number.
    found = [int(re.search(r"(\d+):", str(example))[1]) for example in examples]
    others = [i for i in range(len(rows)) if i != k]
    return ("" if found == others else f"read rows {found}"), False


def _damaged_file(
    at: Path, endings: tuple[str, ...], change: Callable, has_line: bool, r: random.Random
) -> tuple[str, bool]:
    """Return what is wrong with how a damaged file was read, and whether it was refused."""
    ending = r.choice(endings)
    form = r.choice(TABLES if ending in (".csv", ".tsv") else [*FORMS])
    # The damage looks for an answer.
    form = "completion" if form == "prompt" else form
    make, kind = FORMS[form]
    path = at / f"a{ending}"
    good = ".jsonl" if ending in (".txt", ".zip") else ending
    path.write_bytes(change(written([make(i) for i in range(8)], good), r))
    try:
        list(ExampleFiles(path, kind))
    except ValueError as error:
        return _refusal(str(error), path, "", "" if not has_line else r" (line|row) \d+"), True
    return "it was accepted", False


def _refusal(said: str, path: Path, words: str, where: str) -> str:
    """Return what is wrong with an error line; empty: nothing."""
    if "\n" in said or len(said) > 1000:
        return f"not one line: {said!r}"
    if path.name not in said or words not in said:
        return f"says {said!r}, without {words!r}"
    return "" if not where or re.search(where, said) else f"says {said!r}, without {where!r}"


def _line_of(rows: list[Row], k: int, ending: str) -> str:
    """Return a pattern of where row k begins in the file."""
    before = written(rows[:k], ending.removesuffix(".gz"))
    return rf" line {before.count(bytes([10])) + 1}\b"


PROMISES: list[Promise] = [
    Promise(
        43,
        "A damaged or wrong file of chats is refused with its line, or the row is counted; no "
        "other row is lost",
        damaged_files,
        200,
        2000,
        2000,
    ),
]
