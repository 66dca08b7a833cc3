"""Readers of text files: nothing is cut, glued or lost without a word."""

from __future__ import annotations

import io
import itertools
import json

import pytest

from runtime.data import formats
from runtime.data.file_sets import find_files
from runtime.data.formats import (
    Counts,
    cleaned,
    column_of,
    read_json,
    read_separator,
    read_table,
    read_txt,
    text_of,
)
from runtime.data.sources import FileSource


def table(text: str, column: str = "text", delimiter: str | None = None) -> list[str]:
    return [row for _, row in read_table(io.StringIO(text), "a.csv", column, Counts(), delimiter)]


def read(path, **options) -> list[str]:
    return [text for text, _ in FileSource(find_files([str(path)]), **options).documents()]


# ------------------------------------------------------------------------------------------- tables
def test_unquoted_commas_in_the_last_column_are_text():
    """csv.DictReader put what was too much aside, and the text ended at its first comma."""
    counts = Counts()
    text = 'id,text\n1,Hello, world, again\n2,"a, b"\n3, he said "x, y"\n'
    rows = list(read_table(io.StringIO(text), "a.csv", "text", counts))
    assert [row for _, row in rows] == ["Hello, world, again", "a, b", ' he said "x, y"']
    assert counts.joined == 2 and "2 rows had more fields than the header" in counts.lines()[0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,text,n\n1,Hello, world,3\n", r"line 2 has 4 fields, the header has 3 \(id, text, n\)"),
        # Its text is quoted, so what follows is another column.
        ('id,text\n1,"Hello, world",0\n', "line 2 has 3 fields, the header has 2"),
        ('id,text\n"a,b",c,d\n', "line 2 has 3 fields"),
        ("id,text\n1,x\n0\n2,y\n", "line 3 has 1 field, the header has 2 .*complete the row"),
        ('id,text\n1,x\n2,"y\n3,z\n', "line 3: a quote opens here and is never closed"),
        ('id,text\n1,"He said \\"hi\\" twice"\n', "line 2: a stray quote in .*doubled"),
        ('id,text\n1,"x"y\n', "line 2: a stray quote"),
        ('id,text\n1,The 5" disk\n2,z\n', "line 2: a stray quote"),
        ('id,text\n1,"x\n2,"y"\n', r"line 3: a stray quote in .*the field opens in line 2"),
        # Valid CSV, but the numbers show that a field holds the rows 4 and 5.
        ('id,text\n2,x\n3,"a\n4,b\n5,c"\n6,d\n', "line 3: a quoted field holds the next 2 rows"),
        ("id;body\n1;x\n", r"no column 'text' \(it has id;body\)"),
        ("text,text\na,b\n", "column 'text' twice"),
    ],
)
def test_rows_that_do_not_fit_are_errors(text, message):
    """One quote that is never closed glued 56 rows into a document; short rows vanished."""
    with pytest.raises(ValueError, match=f"a.csv .*{message}|a.csv {message}") as error:
        table(text)
    assert "\n" not in str(error.value)


def test_dialects():
    rows = ["a, b", 'say "x"', "two\nlines"]
    quoted = '1{0}"a, b"\n2{0}"say ""x"""\n\n3{0}"two\nlines"\n'
    for sign in (",", ";", "\t", "|"):
        assert table(f"id{sign}text\n" + quoted.format(sign)) == rows
    assert table("sep=;\nid;text\n" + quoted.format(";")) == rows
    assert table('"sep=|"\nid|text\n' + quoted.format("|")) == rows
    # Blanks after the delimiters belong to them; a name is found with and without its blanks.
    assert table("id, text\n" + quoted.format(", ")) == rows
    assert table('"id", "text"\n' + quoted.format(", ")) == rows
    assert table("id, text\n" + quoted.format(", "), " text") == rows
    assert table("id , text \n1, a\n") == ["a"]
    # One column: commas are text.
    assert table("text\nHello, world\n") == ["Hello, world"]
    # A numbered list in a quoted field is no glued row.
    assert table('id,text\n1,"list:\n2, two\n3, three"\n2,x\n') == ["list:\n2, two\n3, three", "x"]


def test_tables_as_other_tools_write_them():
    """An empty first line, two marks, a header of two lines, a line of blanks, the end of DOS."""
    rows = 'id,text\n1,a\n   \n2,"b\nc"\n\x1a'
    assert table(rows) == table("\n \n" + rows) == table("\ufeff\ufeff" + rows) == ["a", "b\nc"]
    assert table('"my\ntitle",text\n1,a\n') == ["a"]
    # Blanks before the quotes, in the rows alone.
    assert table('id,text\n1, "say ""x"""\n2, "a, b"\n') == ['say "x"', "a, b"]
    assert table('id,text\n1,He said, "hi" to me\n') == ['He said, "hi" to me']


def test_a_field_of_lines_that_look_like_rows_is_said():
    """Two stray quotes make valid CSV of all between them; without numbers no rule can tell."""
    counts = Counts()
    text = 'text,label\nx,0\n"Hello,1\nBye",2\n"a\nb",3\n"He ran, and\nshe sat",well done\n'
    rows = [row for _, row in read_table(io.StringIO(text), "a.csv", "text", counts)]
    assert rows[:3] == ["x", "Hello,1\nBye", "a\nb"] and counts.like_rows == 1
    assert (
        "1 quoted fields hold lines that look like rows (a.csv line 3 first)" in counts.lines()[0]
    )


def test_a_quote_that_is_never_closed_takes_no_more_memory_than_a_row_may(monkeypatch):
    monkeypatch.setattr(formats, "LARGEST_ROW", 1000)
    lines = itertools.chain(["id,text\n", '1,"a\n'], itertools.repeat("more\n"))

    class Endless(io.StringIO):
        def read(self, count=-1):
            return ""

        def readline(self):
            return next(lines) + next(lines)

        def __next__(self):
            return next(lines)

    with pytest.raises(ValueError, match="a.csv line 2: a quote opens here and is never closed"):
        list(read_table(Endless(), "a.csv", "text", Counts()))


def test_tab_separated_text_without_quotes():
    counts = Counts()
    # Read with quotes, the first two rows would be one.
    glued = 'text\tlabel\n"Hello there\t1\nBye now"\t2\nthird\t3\n'
    assert table(glued, delimiter="\t") == ['"Hello there', 'Bye now"', "third"]
    text = 'text\tid\n"Hi" he said\t1\nThe 5" disk\t2\n'
    rows = [row for _, row in read_table(io.StringIO(text), "a.tsv", "text", counts, "\t")]
    assert rows == ['"Hi" he said', 'The 5" disk']
    assert counts.lines() == ["a.tsv: quotes are read as characters, not as marks around a field"]


# --------------------------------------------------------------------------------------------- JSON
def values(text: str, size: int = 7) -> list:
    """What read_json finds, reading a few characters at a time."""

    class Slow(io.StringIO):
        def read(self, count=-1):
            return super().read(min(count, size))

    return [value for _, value in read_json(Slow(text), "a.json")]


def test_json_values_in_any_arrangement():
    rows = [{"text": 'a ] } , \n " \\'}, {"text": "é" * 50, "n": [1, 2.5e3, None]}, "plain", 12345]
    for size in (1, 7, 1000):
        assert values(json.dumps(rows), size) == rows
        assert values(" \n" + json.dumps(rows, indent=3) + "\n", size) == rows
        assert values("\n".join(json.dumps(row, indent=1) for row in rows), size) == rows
    assert values("") == values("[]") == values(" [ ] ") == []


@pytest.mark.parametrize(
    "text, line",
    [
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3),
        ('[{"a": 1},\n{"a": }]', 2),
        ('[{"a": 1},\n', 2),
        ('[{"a": 1}]\n]', 2),
        ('[{"a": "x}]\n', 1),
        ("[" * 100_000, 1),
    ],
)
def test_json_mistakes_have_a_line(text, line):
    with pytest.raises(ValueError, match=f"a.json line {line} is not JSON"):
        values(text, 1000)


def test_a_json_mistake_is_found_without_reading_on(tmp_path):
    """A file is not read to its end to say what is wrong at its start."""

    class Endless(io.StringIO):
        def read(self, count=-1):
            assert self.tell() < 1 << 20
            return super().read(count)

    text = Endless('[{"text": nope}, ' + '{"text": "x"}, ' * 200_000 + "]")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        list(read_json(text, "a.json"))


# ------------------------------------------------------------------------------------ what is text
def test_columns_inside_columns():
    row = {"id": 1, "data": {"text": "x", "more": {"y": "z"}}, "a.b": "dotted"}
    assert column_of(row, "data.text", "") == "x" and column_of(row, "data.more.y", "") == "z"
    assert column_of(row, "a.b", "") == "dotted" and column_of("plain", "text", "") == "plain"
    with pytest.raises(ValueError, match=r"has no 'text' \(it has id, data.text, data.more.y, a.b"):
        column_of(row, "text", "line 1")


def test_messages_are_text_by_role():
    counts = Counts()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    shared = [{"from": "human", "value": "Hi"}]
    assert text_of(chat, "", "m", counts) == "user: Hi\n\nassistant: "
    assert text_of(parts, "", "m", counts) == "user: ab"
    assert text_of(shared, "", "m", counts) == "human: Hi"
    assert counts.conversations == 3 and "3 lists of messages" in counts.lines()[0]
    assert not counts.more_than_content
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert text_of([call], "", "m", counts) == "assistant: "
    assert "1 lists of messages have fields next to role and content" in counts.lines()[0]
    for wrong in (
        [1],
        [{"role": "user"}, 5],
        [{"content": "x"}],
        [{"role": "u", "content": [5]}],
        # Their words are under another name: they would be lost.
        [{"role": "user", "text": "hello"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "contents": "b"}],
    ):
        with pytest.raises(ValueError, match="holds list, not text"):
            text_of(wrong, "line 1", "m", counts)


def test_text_has_one_form_in_every_format():
    counts = Counts()
    assert cleaned("\ufeffa\r\nb\rc", "", counts) == "a\nb\nc"
    assert cleaned("a <|endoftext|>\n", "", counts) == "a "
    assert counts.marks == 0
    assert cleaned("a<|endoftext|>b", "", counts) == "a<|endoftext|>b"
    assert counts.marks == 1 and "1 documents have <|endoftext|> inside" in counts.lines()[0]
    with pytest.raises(ValueError, match="line 1: 4 of 8 characters are NUL"):
        cleaned("a\0b\0c\0d\0", "line 1", counts)


def test_empty_documents_are_counted():
    counts = Counts()
    for value in ("", " \n", None, "x"):
        text_of(value, "", "text", counts)
    assert counts.empty == 3
    assert counts.lines() == ["3 empty documents were left out"]


def test_separators_with_escapes():
    assert read_separator(r"\n===\n") == "\n===\n" and read_separator(r"\f") == "\f"
    # The text has \n for every newline, so the separator has too.
    assert read_separator(r"\r\n\r\n") == read_separator("\r\n\r\n") == "\n\n"
    assert read_separator(r"\x1e\u2029") == "\x1e\u2029" and read_separator(r"\\n") == r"\n"
    assert read_separator(r"\q") == r"\q" and read_separator(r"\0") == r"\0"
    with pytest.raises(ValueError, match="holds a NUL character"):
        read_separator(r"\x00")


def test_a_separator_that_never_occurs_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    source = FileSource(find_files([str(tmp_path / "a.txt")]), separator="===")
    assert [text for text, _ in source.documents()] == ["one\n\ntwo"]
    assert source.notes() == [
        "the separator '===' occurs nowhere: each of the 1 .txt files is one document"
    ]
    # Not after a pass that stopped early.
    source = FileSource(find_files([str(tmp_path / "a.txt")]), separator="===")
    assert next(source.documents()) and source.notes() == []
    source = FileSource(find_files([str(tmp_path / "a.txt")]), separator="\n\n")
    assert [text for text, _ in source.documents()] == ["one", "two"] and source.notes() == []


def test_marks_of_files_that_were_joined(tmp_path):
    """`cat a.txt b.txt` leaves a byte order mark in the middle."""
    file = io.StringIO("a\n<|endoftext|>\n\ufeffb")
    assert [text for text, _ in read_txt(file, "<|endoftext|>")] == ["a", "b"]


def test_json_under_another_name_is_not_taken_as_text(tmp_path):
    path = tmp_path / "a.txt"
    for text in ('[{"text": "a"}, {"text": "b"}]', '{\n "text": "a"\n}\n{\n "text": "b"\n}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds JSON: give --text_format json"):
            read(path)
    # Longer than a piece that is read at a time.
    path.write_text(json.dumps({"text": "w " * 50_000}) + "\n")
    with pytest.raises(ValueError, match="holds JSON lines: give --text_format jsonl"):
        read(path)
    for text in ("{a} is a set", '["', '"Hi," she said', "[1] A note", '{"a": 1} is JSON'):
        path.write_text(text)
        assert read(path) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.text"])
def test_json_lines_under_another_name_are_not_taken_as_text(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    with pytest.raises(ValueError, match="holds JSON lines: give --text_format jsonl"):
        read(path)
    files = find_files([str(path)], "jsonl")
    assert [t for t, _ in FileSource(files, text_format="jsonl").documents()] == ["one", "two"]
    files = find_files([str(path)], "txt")
    assert len(list(FileSource(files, text_format="txt").documents())) == 1
    path.write_text('{"text": "one"}\nand words\n')
    assert read(path) == ['{"text": "one"}\nand words']


def test_a_long_sample_does_not_end_a_table(monkeypatch):
    monkeypatch.setattr(formats, "SAMPLE_CHARACTERS", 40)
    text = "id\ttext\n" + "".join(f'{i}\t"row {i}\nof two lines"\n' for i in range(50))
    assert table(text, delimiter="\t") == [f"row {i}\nof two lines" for i in range(50)]
