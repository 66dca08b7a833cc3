"""Read documents from text files: plain text, JSON, JSON lines, CSV, TSV and Parquet.

A reader yields a document or raises ValueError with the file and the line. Nothing is guessed in
silence: what was repaired or left out is counted in `Counts`, and the command prints it.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from runtime.data.text_files import check_nuls
from runtime.data.tokenizer import END_OF_TEXT

# Format names, and the endings of file names that mean them.
ENDINGS = {
    ".txt": "txt",
    ".text": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))

# A longer document in a .txt file is read and tokenised in parts of this size.
PART_CHARACTERS = 1 << 20
# The start of a table, from which its dialect is found.
SAMPLE_CHARACTERS = 1 << 20
# A longer row of a table is a quote that was not closed.
LARGEST_ROW = 1 << 26

# Text, and whether its document ends with it. Only huge documents have more than one part.
Part = tuple[str, bool]


@dataclass
class Counts:
    """What was found while documents were read, of all files together."""

    # Documents without any text: they are left out.
    empty: int = 0
    # Separators in .txt files.
    separators: int = 0
    # Table rows with unquoted delimiters in the last column.
    joined: int = 0
    # Quoted fields of several lines, each of which could be a row; and where the first is.
    like_rows: int = 0
    first_like_rows: str = ""
    # Lists of messages, read as text; those with more than a role and a content.
    conversations: int = 0
    more_than_content: int = 0
    # Documents with <|endoftext|> inside.
    marks: int = 0
    # Of single files.
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what the user should know about the text, a sentence each."""
        lines = list(self.notes)
        if self.empty:
            lines.append(f"{self.empty:,} empty documents were left out")
        if self.joined:
            lines.append(
                f"{self.joined:,} rows had more fields than the header; the text is the last "
                "column, so the rest of the line was read as text"
            )
        if self.like_rows:
            lines.append(
                f"{self.like_rows:,} quoted fields hold lines that look like rows "
                f"({self.first_like_rows} first): if they are rows, a quote is stray"
            )
        if self.more_than_content:
            lines.append(
                f"{self.more_than_content:,} lists of messages have fields next to role and "
                "content, such as tool calls: these were left out"
            )
        if self.conversations:
            lines.append(
                f"{self.conversations:,} lists of messages were read as text, "
                "a 'role: content' paragraph for each message"
            )
        if self.marks:
            lines.append(
                f"{self.marks:,} documents have {END_OF_TEXT} inside; it is read as ordinary "
                "characters"
            )
        return lines


# ------------------------------------------------------------------------------ one document
def cleaned(text: str, where: str, counts: Counts) -> str:
    """Return a document's text with \\n as newline, without a byte order mark or a final mark.

    The mark is <|endoftext|>, which prepare_data puts after every document itself.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.startswith("\ufeff"):
        text = text[1:]
    if END_OF_TEXT in text:
        while (end := text.rstrip()).endswith(END_OF_TEXT):
            text = end.removesuffix(END_OF_TEXT)
        counts.marks += END_OF_TEXT in text
    check_nuls(text, where)
    return text


def text_of(value: object, where: str, column: str, counts: Counts) -> str:
    """Return the document that a column holds; null is an empty one.

    A list of messages becomes text. Raise ValueError for any other type.
    """
    if isinstance(value, list) and (text := messages_as_text(value)) is not None:
        counts.conversations += 1
        counts.more_than_content += any(_has_more(message) for message in value)
        value = text
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text: "
            "give another --text_column"
        )
    text = cleaned(value, where, counts)
    counts.empty += not text or text.isspace()
    return text


def messages_as_text(messages: list) -> str | None:
    """Return a conversation as 'role: content' paragraphs; None if it is none.

    A message has "role" and "content", or "from" and "value" (ShareGPT). A content may be a list of
    parts with a "text".
    """
    paragraphs = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        role = message.get("role", message.get("from"))
        # Null is a message without words; a message without the key has them elsewhere.
        if "content" not in message and "value" not in message:
            return None
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                return None
            content = "".join(texts)
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        paragraphs.append(f"{role}: {content or ''}")
    return "\n\n".join(paragraphs)


def _has_more(message: dict) -> bool:
    """Return whether a message has a field with a value that is neither role nor content."""
    return any(
        value for name, value in message.items() if name not in ("role", "from", "content", "value")
    )


def column_of(row: object, column: str, where: str) -> Any:
    """Return a row's column; `a.b` is column b in column a. A row that is a string is the text.

    Raise ValueError, with the columns there are, if the row has none of that name.
    """
    if isinstance(row, str):
        return row
    value: Any = row
    if isinstance(row, dict) and column in row:
        return row[column]
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            names = ", ".join(_names(row)) if isinstance(row, dict) else "no columns"
            raise ValueError(f"{where} has no {column!r} (it has {names}): give --text_column")
        value = value[part]
    return value


def _names(row: dict, before: str = "") -> Iterator[str]:
    """Yield the names of a row's columns, nested ones as a.b."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from _names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


# ------------------------------------------------------------------------------------- .txt
def read_txt(
    file: io.TextIOBase, separator: str, where: str = "", counts: Counts | None = None
) -> Iterator[Part]:
    """Yield the documents between separators, stripped; only a part of one is in memory."""
    counts = counts if counts is not None else Counts()
    # begun: a part of this document has been yielded.
    text, begun = "", False

    def last_part(text: str) -> Part:
        text = text.rstrip() if begun else text.strip()
        text = cleaned(text, where, counts)
        return (text.rstrip() if begun else text.strip()), True

    while chunk := file.read(1 << 16):
        text += chunk
        *whole, text = text.split(separator)
        counts.separators += len(whole)
        for document in whole:
            yield last_part(document)
            begun = False
        while len(text) > PART_CHARACTERS + len(separator):
            text = text if begun else text.lstrip()
            if len(text) > PART_CHARACTERS + len(separator):
                cut = safe_cut(text, PART_CHARACTERS)
                check_nuls(text[:cut], where)
                yield text[:cut], False
                text, begun = text[cut:], True
    yield last_part(text)


# Before a single space between words, and after a newline before a word, every word pattern here
# cuts anyway: the tokens are the same as those of the whole text.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?= [^\W_])|(?<=\S\n)(?=[^\W_])")


def safe_cut(text: str, end: int) -> int:
    """Return the last position in the 4,096 characters before `end` where a cut changes no token.

    Return `end` if there is no such position.
    """
    return max(
        (match.start() for match in _BETWEEN_WORDS.finditer(text, max(1, end - 4096), end)),
        default=end,
    )


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "\\": "\\"}


def read_separator(text: str) -> str:
    """Return a separator with \\n, \\t, \\r, \\f, \\v, \\0, \\\\, \\xHH and \\uHHHH replaced.

    Its newlines become \\n, as those of the text do.
    """

    def character(match: re.Match) -> str:
        name = match[1]
        return _ESCAPES[name] if name in _ESCAPES else chr(int(name[1:], 16))

    text = re.sub(r"\\([ntrfv\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})", character, text)
    if "\0" in text:
        raise ValueError("--document_separator holds a NUL character, which no text file has")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def looks_like_json_lines(lines: list[str]) -> bool:
    """Return whether there are lines, and each that is not blank is a JSON object."""
    lines = [line for line in lines if line.strip()]
    if not lines or not all(line.lstrip().startswith("{") for line in lines):
        return False
    try:
        return all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def looks_like_json(head: str) -> bool:
    """Return whether a text starts as an array of objects or strings, or as an object."""
    start = re.match(r"\s*(?:\[\s*)?(?=[{\"])", head)
    if not start or (head[start.end()] == '"' and "[" not in start[0]):
        return False
    try:
        # A first value that is cut does not count: it is longer than any head.
        _, end = json.JSONDecoder().raw_decode(head, start.end())
    except (ValueError, RecursionError):
        return False
    rest = head[end:].lstrip()
    return rest[:1] in ("", ",", "]") if "[" in start[0] else rest[:1] in ("", "{")


# ------------------------------------------------------------------------------------- JSON
def read_jsonl(file: Iterable[str], name: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each line that is not blank."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error


def read_json(file: io.TextIOBase, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each value of an array, or of values one after the other.

    A value is in memory, not the file.
    """
    values = _Values(file, name)
    in_array = values.skip_blanks() == "["
    if in_array:
        values.at += 1
    first = True
    while True:
        here = values.skip_blanks()
        if in_array and here == "]":
            values.at += 1
            if rest := values.skip_blanks():
                raise ValueError(f"{values.where} is not JSON: {rest!r} after the end of the array")
            return
        if not here:
            if in_array:
                raise ValueError(f"{values.where} is not JSON: the array does not end")
            return
        if in_array and not first:
            if here != ",":
                raise ValueError(f"{values.where} is not JSON: {here!r} where a comma belongs")
            values.at += 1
            values.skip_blanks()
        first = False
        yield values.where, values.next()


class _Values:
    """A window over a file of JSON values. `line` is that of position `at`."""

    def __init__(self, file: io.TextIOBase, name: str):
        self.file, self.name = file, name
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.decode = json.JSONDecoder().raw_decode

    @property
    def where(self) -> str:
        return f"{self.name} line {self.line}"

    def more(self) -> None:
        """Read as much again as is waiting, and drop what was used."""
        self.text = self.text[self.at :]
        self.at = 0
        chunk = self.file.read(max(1 << 16, len(self.text)))
        self.ended = not chunk
        self.text += chunk

    def skip_blanks(self) -> str:
        """Go to the next character that is not blank and return it; empty at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\n\r":
                end += 1
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self.more()

    def next(self) -> Any:
        """Return the value that starts here. Raise ValueError, with its line, for what is wrong."""
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except RecursionError as error:
                raise ValueError(f"{self.where} is not JSON: {error}") from error
            except json.JSONDecodeError as error:
                # A value that is cut by the window fails at its end, or in its last string.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if self.ended or not cut:
                    line = self.line + self.text.count("\n", self.at, error.pos)
                    raise ValueError(f"{self.name} line {line} is not JSON: {error.msg}") from error
                self.more()
                continue
            # A number may go on.
            if end < len(self.text) or self.ended:
                self.line += self.text.count("\n", self.at, end)
                self.at = end
                return value
            self.more()


# ------------------------------------------------------------------------------------ tables
class _Lines:
    """The lines of a table, which remembers those of the row that is being read."""

    def __init__(self, lines: Iterable[str]):
        self.lines, self.number = iter(lines), 0
        self.row: list[str] = []
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.number += 1
            self.row.append(line)
            self.characters += len(line)
            if self.characters > LARGEST_ROW:
                raise csv.Error("unexpected end: the row is too long")
            yield line

    def clear(self) -> None:
        """Start the next row."""
        self.row.clear()
        self.characters = 0


def read_table(
    file: io.TextIOBase, name: str, column: str, counts: Counts, delimiter: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (where, text) for each row of delimiter-separated values with a header.

    The delimiter is what the line sep= says (Excel), else the given one, else that of , ; tab |
    with which the header has the column. Raise ValueError for a row with other fields than the
    header and for a quote that does not fit. Unquoted delimiters in a text that is the last column
    are certain, so they are read, and counted.
    """
    # Blanks around a name do not belong to it.
    header, rows = _table(file, name, column.strip(), counts, delimiter)
    at = header.index(column.strip())
    for where, row in rows:
        yield where, row[at]


def read_table_rows(
    file: io.TextIOBase, name: str, counts: Counts, delimiter: str | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (where, all columns by name) for each row; as read_table, but nothing is joined.

    The delimiter is that of , ; tab | with which the header has the most columns.
    """
    header, rows = _table(file, name, None, counts, delimiter)
    for where, row in rows:
        yield where, dict(zip(header, row, strict=True))


def _table(
    file: io.TextIOBase, name: str, column: str | None, counts: Counts, delimiter: str | None
) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """Return a table's header, and its rows as (where, fields).

    column: one that the header must have, with blanks around it removed; None: any header will do.
    """
    csv.field_size_limit(2**31 - 1)
    sample = file.read(SAMPLE_CHARACTERS) + file.readline()
    sample = sample.lstrip("\ufeff")
    lines = _Lines(itertools.chain(io.StringIO(sample), file))
    # Empty lines before the header, and the line that tells Excel the delimiter.
    while match := re.match(r"[ \t]*\n|\"?sep=(.)\"?[ \t]*\n", sample):
        delimiter = match[1] or delimiter
        next(iter(lines))
        sample = sample[match.end() :]
    header, options = _dialect(sample, name, column, delimiter)
    if "quoting" in options:
        counts.notes.append(f"{name}: quotes are read as characters, not as marks around a field")
    # Where each column matters, it is not certain that a comma too many belongs to the last.
    at = -1 if column is None else header.index(column)
    return header, _rows(lines, header, at, options, name, counts)


def _rows(
    lines: _Lines, header: list[str], at: int, options: dict, name: str, counts: Counts
) -> Iterator[tuple[str, list[str]]]:
    """Yield (where, fields) of each row after the header. at: the one of the text; -1: all."""
    rows = csv.reader(lines, strict=True, **options)
    seen_header, next_number = False, None
    while True:
        lines.clear()
        start = lines.number + 1
        where = f"{name} line {start}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(_quote_fault(error, name, start, lines)) from error
        if row is None:
            return
        # Also a blank line, and the end of a file from DOS.
        if not "".join(row).strip(" \x1a"):
            continue
        # In a row that is right, each quote that opens has one that closes.
        if "quoting" not in options and sum(line.count('"') for line in lines.row) % 2:
            raise ValueError(_quote_fault(csv.Error(), name, start, lines))
        if not seen_header:
            seen_header = True
            continue
        if next_number and row[0].strip() == str(next_number[0]):
            raise ValueError(next_number[1])
        next_number = _glued(row, lines.row, options["delimiter"], where)
        if len(lines.row) > 1 and _like_rows(lines.row, len(header), options["delimiter"]):
            counts.like_rows += 1
            counts.first_like_rows = counts.first_like_rows or where
        if len(row) != len(header):
            last = _last_column(row, header, at, lines.row, options, where)
            row = [*row[: len(header) - 1], last]
            counts.joined += 1
        yield where, row


def _like_rows(lines: list[str], num_fields: int, delimiter: str) -> bool:
    """Return whether each line of a quoted field could be a row.

    It has as many fields, and one of them is a single word in every line, as a number or a label.
    """
    rows = [line.strip().split(delimiter) for line in lines]
    if num_fields < 2 or any(len(row) != num_fields for row in rows):
        return False
    columns = zip(*rows, strict=True)
    return any(all(len(field.strip('"').split()) == 1 for field in column) for column in columns)


def _dialect(
    sample: str, name: str, column: str | None, delimiter: str | None
) -> tuple[list[str], dict]:
    """Return a table's header, and how csv.reader should read the table.

    column: one that the header must have; None: the delimiter with the most columns is right.
    """
    found: list[str] = []
    if column is None and delimiter is None:
        delimiter = max(",;\t|", key=lambda sign: len(_header(sample, sign)))
    for sign in [delimiter] if delimiter else [",", ";", "\t", "|"]:
        raw = _header(sample, sign)
        # A blank after each delimiter would hide the quotes of the fields.
        blanks = any(field.startswith(" ") for field in raw)
        header = [field.strip().strip('"') if blanks else field.strip() for field in raw]
        found = found or header
        if column is not None and column not in header:
            continue
        wanted = header if column is None else [column]
        if twice := next((each for each in wanted if header.count(each) > 1), None):
            raise ValueError(f"{name} has the column {twice!r} twice: rename one")
        options: dict = {"delimiter": sign, "skipinitialspace": blanks}
        spaced = options | {"skipinitialspace": True}
        if re.search(re.escape(sign) + ' +"', sample) and _lines_of_rows(sample, header, spaced):
            options = spaced
        if sign == "\t":
            # Most tab-separated files know no quotes: then rows are single lines.
            plain = options | {"quoting": csv.QUOTE_NONE}
            if _lines_of_rows(sample, header, options) != 1 and _lines_of_rows(
                sample, header, plain
            ):
                options = plain
        return header, options
    raise ValueError(
        f"{name} has no column {column!r} (it has {', '.join(found) or 'none'}): give --text_column"
    )


def _header(sample: str, delimiter: str) -> list[str]:
    return next(csv.reader(io.StringIO(sample), delimiter=delimiter), [])


def _lines_of_rows(sample: str, header: list[str], options: dict) -> int:
    """Return the most lines of a row in a sample; 0 if rows have other fields than the header, or
    quotes do not fit.
    """
    cut = len(sample) >= SAMPLE_CHARACTERS
    most = before = 0
    rows = csv.reader(io.StringIO(sample), strict=True, **options)
    try:
        for row in rows:
            if "".join(row).strip(" \x1a") and len(row) != len(header):
                return 0
            most, before = max(most, rows.line_num - before), rows.line_num
    except csv.Error as error:
        # A field of several lines may be cut.
        return most if cut and "unexpected end" in str(error) else 0
    return most


def _quote_fault(error: csv.Error, name: str, start: int, lines: _Lines) -> str:
    """Return the error line for a quote that does not fit, in the row that starts at `start`."""
    if "unexpected end" in str(error):
        return (
            f"{name} line {start}: a quote opens here and is never closed, so the rest of the "
            "file would be one field: close it, or double it if it belongs to the text"
        )
    between = f" (the field opens in line {start})" if lines.number > start else ""
    last = lines.row[-1].strip() if lines.row else ""
    return (
        f"{name} line {lines.number}: a stray quote in {last[:60]!r}{between}: a field that holds "
        'quotes must be in quotes itself, with each of them doubled ("")'
    )


def _glued(row: list[str], lines: list[str], delimiter: str, where: str) -> tuple[int, str] | None:
    """Return (number, error line) if a row of several lines seems to hold the rows after it.

    A quote that is opened in one row and closed in another makes valid CSV of all between them. It
    shows where lines inside continue the numbers of the first column, and the next row does too:
    `number` is the one that it would have.
    """
    if len(lines) < 2 or not row[0].strip().isdecimal():
        return None
    first = number = int(row[0]) + 1
    for line in lines[1:]:
        number += line.split(delimiter, 1)[0].strip().strip('"') == str(number)
    if number == first:
        return None
    return number, (
        f"{where}: a quoted field holds the next {number - first} rows (numbers {first} to "
        f"{number - 1}): a quote in one of these lines is stray, or not closed"
    )


def _last_column(
    row: list[str], header: list[str], at: int, lines: list[str], options: dict, where: str
) -> str:
    """Return the text of a row with too many fields, if it is certain. Raise ValueError if not."""
    count = len(header)
    if len(row) > count and at == count - 1 and len(lines) == 1:
        fields = lines[0].rstrip("\n").split(options["delimiter"], count - 1)
        if options["skipinitialspace"]:
            fields = [field.lstrip(" ") for field in fields]
        # Quotes before the text would move the cut, and quotes around its start end it.
        if fields[:-1] == row[: count - 1] and not fields[-1].startswith('"'):
            return fields[-1]
    advice = (
        "put text that holds the delimiter in quotes"
        if len(row) > count
        else "complete the row, or leave it out"
    )
    raise ValueError(
        f"{where} has {len(row)} field{'s' * (len(row) > 1)}, the header has {count} "
        f"({', '.join(header)}): {advice}"
    )


def read_parquet(file: BinaryIO, name: str, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) of a Parquet file's column; a thousand rows are in memory at a time.

    column: None = the value is the whole row, by column.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {name} needs pyarrow: pip install pyarrow") from None
    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    top = column if column is None or column in names else column.split(".")[0]
    if top is not None and top not in names:
        raise ValueError(
            f"{name} has no column {column!r} (it has {', '.join(names)}): give --text_column"
        )
    row = 0
    for batch in table.iter_batches(batch_size=1000, columns=None if top is None else [top]):
        for value in batch.to_pylist() if top is None else batch.column(0).to_pylist():
            where = f"{name} row {row}"
            inside = column is None or top == column or value is None
            yield where, value if inside else column_of({top: value}, str(column), where)
            row += 1
