"""Read examples for post-training: chats, preference pairs and prompts, from files of any form.

A file is JSON lines, JSON, CSV, TSV or Parquet (runtime/data/sources.py), and each of its rows is
recognised by its keys (forms.py). A row that cannot be read, or mixes forms, ends the reading with
its file and line; a row that teaches nothing is dropped and counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.base.text import names_of
from runtime.data.file_sets import STDIN, FileSet, InputFile, dataset_folder, find_files, format_of
from runtime.data.formats import Counts
from runtime.data.sources import read_rows
from runtime.data.splits import split_by_hash, text_digest
from runtime.posttraining.forms import (
    KINDS,
    Conversation,
    Dropped,
    Example,
    Form,
    Pair,
    Prompt,
    recognise,
    renamed,
)
from runtime.posttraining.messages import Context, Row, refuse_media, refuse_tools

__all__ = [
    "Conversation",
    "Example",
    "ExampleFiles",
    "ExampleRows",
    "Examples",
    "Found",
    "Pair",
    "Prompt",
    "Report",
    "hold_out",
    "read_examples",
]

# A larger share of dropped rows is said in a line of its own.
MANY_DROPPED = 0.05
# Of the prompts, for validation.
HELD_OUT = 0.02


@dataclass
class Report:
    """What was found and what was dropped while examples were read and encoded."""

    kind: str = ""
    # Names of the forms, in the order in which they were met.
    forms: list[str] = field(default_factory=list)
    # Rows, those dropped included.
    total: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    # Where the first row was dropped for each reason.
    first: dict[str, str] = field(default_factory=dict)
    # Further lines.
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, where: str) -> None:
        """Count one row that is left out."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """Return what the user should know: the counts in the first line, then the notes."""
        num_dropped = self.dropped.total()
        kind = self.kind.removesuffix("s") if self.total == 1 else self.kind
        line = f"{self.total:,} {kind}"
        if self.forms:
            line += f" ({'; '.join(self.forms)})"
        if num_dropped:
            line += f", {num_dropped:,} dropped: {self._reasons()}"
        lines = [line, *self.notes]
        if num_dropped > MANY_DROPPED * self.total:
            where = ", ".join(f"{self.first[reason]} {reason}" for reason in self.dropped)
            lines.append(
                f"{100 * num_dropped / self.total:.0f} % of the {self.kind} are dropped; "
                f"the first of each kind: {where}"
            )
        return lines

    def check(self, what: str) -> None:
        """Raise ValueError if nothing is left. what: the files, for the error line."""
        if not self.total:
            raise ValueError(f"{what} holds no rows: there is nothing to learn from")
        if self.dropped.total() == self.total:
            reason, where = next(iter(self.first.items()))
            raise ValueError(
                f"all {self.total:,} {self.kind} of {what} are dropped: {self._reasons()} "
                f"({where} {reason})"
            )

    def _reasons(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())


class Examples:
    """The examples of rows, made again at each pass, so that not all are in memory.

    `report` is that of the last pass. want: "conversations", "pairs" or "prompts"; "" takes what
    the first row is. columns: name of a key here -> name in the rows. raw: prompt and completion as
    texts, without a chat layout. A subclass gives the rows.
    """

    # Where the rows are from, for error lines.
    what = "the data"

    def __init__(self, want: str = "", columns: Mapping[str, str] | None = None, raw: bool = False):
        if want not in ("", *KINDS):
            raise ValueError(f"want must be one of {', '.join(KINDS)}, not {want!r}")
        self.want, self.columns, self.raw = want, dict(columns or {}), raw
        self.report = Report(kind=want)

    def notes(self) -> list[str]:
        """Return lines about where the rows are from."""
        return []

    def parts(self, counts: Counts) -> Iterator[Iterable[tuple[str, object]]]:
        """Yield the rows, as (where, row), in parts: in each all rows are of one form."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples; raise ValueError for what cannot be read and if none are left."""
        report = self.report = Report(kind=self.want, notes=self.notes())
        counts, left_out = Counts(), Counter[str]()
        for rows in self.parts(counts):
            yield from self._read(rows, report, counts, left_out)
        report.notes += counts.lines()
        if left_out:
            fields = ", ".join(f"{name} in {count:,}" for name, count in left_out.most_common(5))
            report.notes.append(f"fields of messages that are not learned are left out: {fields}")
        report.check(self.what)

    def _read(
        self,
        rows: Iterable[tuple[str, object]],
        report: Report,
        counts: Counts,
        left_out: Counter[str],
    ) -> Iterator[Example]:
        """Yield the examples of rows that are all of one form."""
        forms: dict[frozenset, Form] = {}
        first: tuple[Form, str] | None = None
        for where, row in rows:
            try:
                row = self._checked(row, where)
                keys = frozenset(name for name, value in row.items() if value is not None)
                form = forms.get(keys)
                if form is None:
                    form = forms[keys] = self._form(row, first, where)
                first = first or (form, where)
                self._count(form, row, report)
                example = form.make(row, Context(where, counts, left_out))
            except Dropped as reason:
                report.drop(str(reason), where)
                continue
            except ValueError as error:
                text = " ".join(str(error).split())
                raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
            if self.raw:
                _check_raw(example, form)
            yield example

    def _checked(self, row: object, where: str) -> Row:
        """Return a row with the names of the forms. Raise ValueError for what is no row."""
        if not isinstance(row, dict):
            raise ValueError(f"the row is a {type(row).__name__}, not an object with columns")
        row = renamed(row, self.columns, where)
        refuse_media(row, "the row")
        # A reward may be given tools.
        if self.want != "prompts":
            refuse_tools(row, "the row")
        return row

    def _form(self, row: Row, first: tuple[Form, str] | None, where: str) -> Form:
        """Return a row's form. Raise ValueError if it differs from that of the first row."""
        if first is None:
            return recognise(row, self.want, self.columns)
        form, first_where = first
        if all(name in row for name in form.needs):
            found = recognise(row, form.kind, self.columns)
            # Another form may have its columns filled, where those of this one are null.
            if found is form or any(row[name] is None for name in found.needs):
                return form
        raise ValueError(
            f"mixed keys: this row has {names_of(row)}, but {first_where} has {form.name}: "
            "a file holds one form, split it"
        )

    def _count(self, form: Form, row: Row, report: Report) -> None:
        """Count a row of this form. Raise ValueError if its kind is not that of the other rows."""
        if report.kind and report.kind != form.kind:
            raise ValueError(
                f"the row is one of {form.kind} ({form.name}), those before are {report.kind}: "
                "give files of one kind"
            )
        report.kind = form.kind
        report.total += 1
        if form.name not in report.forms:
            report.forms.append(form.name)
        if report.total == 1 and form.kind == "prompts":
            others = names_of({name: None for name in row if name != "prompt"})
            report.notes.append(f"columns that the reward is given: {others}")


class ExampleRows(Examples):
    """The examples of rows in memory, as files have them. what: where they are from."""

    def __init__(self, rows: Sequence[Row], what: str, want: str = ""):
        super().__init__(want)
        self.rows, self.what = rows, what

    def parts(self, counts: Counts) -> Iterator[Iterable[tuple[str, object]]]:
        yield ((f"{self.what} row {i}", row) for i, row in enumerate(self.rows))


class ExampleFiles(Examples):
    """The examples of files. names: files, folders, patterns, or - for standard input."""

    def __init__(
        self,
        names: str | Path | Sequence[str | Path],
        want: str = "",
        columns: Mapping[str, str] | None = None,
        raw: bool = False,
    ):
        super().__init__(want, columns, raw)
        names = [names] if isinstance(names, str | Path) else list(names)
        self.what = ", ".join(map(str, names))
        self.files: list[InputFile] = []
        self._notes: list[str] = []
        for name in map(str, names):
            self._add(name)
        if not self.files:
            raise ValueError("no file is named: give at least one")

    def notes(self) -> list[str]:
        return list(self._notes)

    def parts(self, counts: Counts) -> Iterator[Iterable[tuple[str, object]]]:
        for file in self.files:
            yield read_rows(file, counts)

    def _add(self, name: str) -> None:
        """Find the files of one name. Of a folder's splits, those for training are read."""
        if Path(name).is_file():
            self.files.append(InputFile(Path(name), format_of(Path(name))))
            return
        if not Path(name).is_dir():
            found = find_files([name])
            self.files += found.files
            self._notes += [found.line()] if found.searched and name != STDIN else []
            return
        files = []
        # What it says of a folder without text files names flags of prepare_data.py.
        with contextlib.suppress(ValueError):
            found, _ = dataset_folder(name, None, "train", with_own=False)
            files = [file for file in found.files if file.kind != "txt"]
            self._notes.append(FileSet(files, found.ignored, True).line())
        if not files:
            raise ValueError(
                f"{name} holds no file with rows: put .jsonl, .json, .csv, .tsv or .parquet "
                "files into it"
            )
        self.files += files


def _check_raw(example: Example, form: Form) -> None:
    """Raise ValueError unless an example is of plain prompt and answer texts."""
    sides = [
        getattr(example, name)
        for name in ("messages", "prompt", "chosen", "rejected")
        if hasattr(example, name)
    ]
    roles = [[m["role"] for m in side] for side in sides]
    allowed = {
        Conversation: [["user", "assistant"]],
        Pair: [["user"], ["assistant"], ["assistant"]],
        Prompt: [["user"]],
    }[type(example)]
    if roles != allowed or "prompt" not in form.needs:
        raise ValueError(
            f"{example.where}: --raw joins prompt and completion as they are, but this row has "
            f"{form.name} with messages: leave --raw out"
        )


@dataclass
class Found:
    """All examples of files, in memory. lines: what the user should know about them."""

    kind: str
    examples: list[Example]
    dropped: Counter[str]
    lines: list[str]


def read_examples(
    names: str | Path | Sequence[str | Path],
    want: str = "",
    columns: Mapping[str, str] | None = None,
    raw: bool = False,
) -> Found:
    """Return all examples of files; see ExampleFiles, which does not hold them in memory."""
    files = ExampleFiles(names, want, columns, raw)
    examples = list(files)
    report = files.report
    return Found(report.kind, examples, report.dropped, report.lines())


# ------------------------------------------------------------------------------- validation
def opening_digest(example: Example) -> int:
    """Return the first 64 bits of the digest of what comes before an example's first answer.

    White space does not count. Conversations that begin alike are on one side of the split.
    """
    # No text holds this character (check_nuls), so that borders of messages count.
    text = "\0".join(message["content"] for message in example.opening)
    return int.from_bytes(text_digest(text)[:8], "big")


def hold_out(digests: np.ndarray, ratio: float = HELD_OUT) -> tuple[np.ndarray, str]:
    """Return which examples are for validation, [N] bool, and a line if there is something to say.

    digests: uint64 [N] (opening_digest); equal ones stay on one side. A small set still gives its
    rarest prompt.
    """
    side = split_by_hash(ratio)
    distinct, index, counts = np.unique(digests, return_inverse=True, return_counts=True)
    is_held = np.array([side(int(d).to_bytes(8, "big")) == "val" for d in distinct], dtype=bool)
    line = ""
    if len(distinct) < 2:
        is_held[:] = False
        return is_held[index], (
            "all examples have the same prompt, so none is held out: there is no validation loss"
        )
    if is_held.all() or not is_held.any():
        # Distinct ones are sorted, so that the first of the rarest is always the same.
        rarest = int(counts.argmin())
        line = f"few prompts: {counts[rarest]:,} of {len(digests):,} examples held out"
        is_held[:] = False
        is_held[rarest] = True
    return is_held[index], line
