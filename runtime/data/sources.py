"""Sources of text: files, datasets of the Hugging Face Hub, generated stories."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Generator, Iterator
from typing import BinaryIO, Protocol

from runtime.data.file_sets import SPLIT_WORDS, FileSet, InputFile
from runtime.data.formats import (
    Counts,
    Part,
    column_of,
    looks_like_json,
    looks_like_json_lines,
    read_json,
    read_jsonl,
    read_parquet,
    read_table,
    read_table_rows,
    read_txt,
    text_of,
)
from runtime.data.text_files import open_text
from runtime.data.tokenizer import END_OF_TEXT

DEFAULT_DATASET, DEFAULT_COLUMN = "roneneldan/TinyStories", "text"
DEFAULT_VAL_RATIO, DEFAULT_TOY_STORIES = 0.01, 30_000

# Names that datasets give their own validation split.
VALIDATION_NAMES = [word for word, split in SPLIT_WORDS.items() if split == "validation"]


class Source(Protocol):
    """What a source of text has."""

    # What the manifest says about the source.
    description: dict

    @property
    def fraction(self) -> float | None:
        """Share of the source that has been read; None: unknown."""

    def documents(self) -> Iterator[Part]:
        """Yield all text in order; each call starts from the beginning."""
        ...

    def notes(self) -> list[str]:
        """Return what the user should know about the text of the last pass, a sentence each."""
        ...


class ToySource:
    """Stories from the generator in runtime/data/toy_stories.py."""

    def __init__(self, num_stories: int):
        from runtime.data import toy_stories

        if num_stories > toy_stories.NUM_DISTINCT:
            raise ValueError(
                f"--num_stories {num_stories:,} is too many: "
                f"there are {toy_stories.NUM_DISTINCT:,} distinct stories"
            )
        self._story, self.num_stories = toy_stories.story, num_stories
        self.fraction = 0.0
        self.description = {"dataset": "toy", "num_stories": num_stories}

    def documents(self) -> Iterator[Part]:
        for i in range(self.num_stories):
            self.fraction = i / self.num_stories
            yield self._story(i), True

    def notes(self) -> list[str]:
        return []


class HubSource:
    """One split of a dataset that the `datasets` library loads from the Hub."""

    def __init__(
        self, name: str, config: str | None, split: str, text_column: str, streaming: bool
    ):
        self.name, self.column = name, text_column
        self.fraction: float | None = None
        self.description = {
            "dataset": name,
            "config": config,
            "split": split,
            "text_column": text_column,
        }
        with library_errors(name):
            rows = datasets().load_dataset(name, config, split=split, streaming=streaming)
            columns = rows.column_names or list(next(iter(rows), {}))
            self._num_rows = None if streaming else len(rows)
        # a.b is column b in column a.
        self._top = text_column if text_column in columns else text_column.split(".")[0]
        self.counts = Counts()
        if self._top not in columns:
            raise ValueError(
                f"dataset {name} has no column {text_column!r}: "
                f"give --text_column as one of {', '.join(columns)}"
            )
        self._rows = rows.select_columns([self._top])

    def documents(self) -> Iterator[Part]:
        with library_errors(self.name):
            row, self.counts = 0, Counts()
            for batch in self._rows.iter(batch_size=1000):
                self.fraction = row / self._num_rows if self._num_rows else None
                for value in batch[self._top]:
                    where = f"row {row} of dataset {self.name}"
                    if self._top != self.column and value is not None:
                        value = column_of({self._top: value}, self.column, where)
                    yield text_of(value, where, self.column, self.counts), True
                    row += 1

    def notes(self) -> list[str]:
        return self.counts.lines()


class FileSource:
    """Local files: .txt with a document separator; JSON, tables and Parquet with a text column.

    Files may be compressed (all but .parquet). Each is read from its start at every pass.
    """

    def __init__(
        self,
        files: FileSet,
        text_column: str = DEFAULT_COLUMN,
        separator: str = END_OF_TEXT,
        encoding: str = "utf-8",
        text_format: str | None = None,
    ):
        self.files, self.column, self.separator = files.files, text_column, separator
        self.encoding, self.text_format = encoding, text_format
        self.counts = Counts()
        # The last pass read everything.
        self._is_whole = False
        # The file that is being read, which knows how far it is.
        self._raw: BinaryIO | None = None
        self._bytes_done = 0
        # Find a file that cannot be read before the work starts.
        for file in self.files:
            self._check(file)
        self._bytes = sum(file.num_bytes for file in self.files)
        self.description: dict = {
            "files": [
                {"name": file.path.as_posix(), "bytes": file.num_bytes} for file in self.files
            ]
        }
        kinds = files.kinds
        if kinds - {"txt"}:
            self.description["text_column"] = text_column
        if "txt" in kinds:
            self.description["document_separator"] = separator
        if encoding != "utf-8":
            self.description["encoding"] = encoding

    @property
    def fraction(self) -> float | None:
        here = self._raw.tell() if self._raw and not self._raw.closed else 0
        return (self._bytes_done + here) / self._bytes if self._bytes else None

    def documents(self) -> Iterator[Part]:
        self._bytes_done, self.counts, self._is_whole = 0, Counts(), False
        for file in self.files:
            yield from self._read(file, self.counts)
            self._bytes_done += file.num_bytes
        self._is_whole = True

    @property
    def is_separable(self) -> bool:
        """Whether --document_separator can make more documents of the text."""
        return any(file.kind == "txt" for file in self.files)

    def notes(self) -> list[str]:
        """Return what the user should know about the last pass, a sentence each."""
        lines = self.counts.lines()
        num_txt = sum(file.kind == "txt" for file in self.files)
        if (
            num_txt
            and self._is_whole
            and not self.counts.separators | (self.separator == END_OF_TEXT)
        ):
            lines.append(
                f"the separator {self.separator!r} occurs nowhere: each of the {num_txt:,} "
                ".txt files is one document"
            )
        return lines

    def _check(self, file: InputFile) -> None:
        """Find a file's format where the name says none, and try to read its first document."""
        with _naming(file):
            file.keep()
            if file.kind is None or (file.kind == "txt" and self.text_format is None):
                kind = kind_of(file, self.encoding)
                if file.kind is None:
                    file.kind, file.is_guess = kind, True
                elif kind != "txt":
                    what = {"jsonl": "JSON lines", "json": "JSON", "parquet": "Parquet"}[kind]
                    raise ValueError(
                        f"{file.name} holds {what}: give --text_format {kind}, "
                        "or --text_format txt to train on it as it is"
                    )
            with contextlib.closing(self._read(file, Counts())) as parts:
                next(parts, None)

    def _read(self, file: InputFile, counts: Counts) -> Generator[Part, None, None]:
        """Yield the parts of one file; every error names the file."""
        with _naming(file):
            if file.kind == "parquet":
                with file.open() as raw:
                    self._raw = raw
                    for where, value in read_parquet(raw, file.name, self.column):
                        yield text_of(value, where, self.column, counts), True
                return

            def opened() -> BinaryIO:
                self._raw = file.open()
                return self._raw

            with open_text(opened, file.name, self.encoding) as text:
                if file.kind == "txt":
                    yield from read_txt(text, self.separator, file.name, counts)
                    return
                for where, value in self._values(file, text, counts):
                    yield text_of(value, where, self.column, counts), True

    def _values(
        self, file: InputFile, text: io.TextIOWrapper, counts: Counts
    ) -> Iterator[tuple[str, object]]:
        """Yield (where, the column's value) for each row of a text file with rows."""
        if file.kind in ("csv", "tsv"):
            delimiter = "\t" if file.kind == "tsv" else None
            yield from read_table(text, file.name, self.column, counts, delimiter)
            return
        rows = (read_jsonl if file.kind == "jsonl" else read_json)(text, file.name)
        for where, row in rows:
            yield where, column_of(row, self.column, where)


def kind_of(file: InputFile, encoding: str = "utf-8") -> str:
    """Return the format that the start of a file shows: parquet, json, jsonl or txt."""
    with file.open() as raw:
        if raw.read(4) == b"PAR1":
            return "parquet"
    with open_text(file.open, file.name, encoding) as text:
        # Whole lines; but a book of a single line is not read for this.
        head = text.read(1 << 16) + text.readline(1 << 24)
    if looks_like_json_lines(head.split("\n")[:20]):
        return "jsonl"
    return "json" if looks_like_json(head) else "txt"


def read_rows(file: InputFile, counts: Counts) -> Generator[tuple[str, object], None, None]:
    """Yield (where, row) for each row of a file in UTF-8: a JSON value, or all columns by name.

    Raise ValueError, with the file and the line or row, for what cannot be read, and for plain
    text, which has no rows.
    """
    with _naming(file):
        if file.copy is None:
            file.keep()
        # JSON lines are often named .txt.
        kind = file.kind if file.kind not in (None, "txt") else kind_of(file)
        if kind == "parquet":
            with file.open() as raw:
                yield from read_parquet(raw, file.name)
            return
        if kind == "txt":
            raise ValueError(
                f"{file.name} is plain text, which has no columns: give JSON lines, JSON, CSV, "
                "TSV or Parquet"
            )
        advice = "convert the file to UTF-8 (iconv -t utf-8)"
        with open_text(file.open, file.name, advice=advice) as text:
            if kind in ("csv", "tsv"):
                delimiter = "\t" if kind == "tsv" else None
                yield from read_table_rows(text, file.name, counts, delimiter)
            else:
                yield from (read_jsonl if kind == "jsonl" else read_json)(text, file.name)


@contextlib.contextmanager
def _naming(file: InputFile) -> Iterator[None]:
    """Turn what reading a file raises into one line that names the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error)
        raise ValueError(text if file.name in text else f"{file.name}: {text}") from error


def datasets():
    """Return the `datasets` library, without its warnings. Raise ValueError if it is missing."""
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise ValueError(
            "downloading a dataset needs the datasets library (pip install datasets); "
            "--files and --dataset toy do not need it"
        ) from None
    # They warn about retries; an error becomes one line of ours.
    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity_error()
    return datasets


# What `datasets` says of a configuration that is missing or unknown, and the names there are.
_CONFIGS = re.compile(
    r"(.*?)\.\s+(?:Please pick one among the available configs|Available): \[(.*?)\]", re.DOTALL
)


@contextlib.contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Turn whatever `datasets` and the libraries below it raise into one line; ours pass."""
    try:
        yield
    except ValueError as error:
        if found := _CONFIGS.match(str(error)):
            reason, names = found[1], found[2].replace("'", "")
            raise ValueError(
                f"dataset {name}: {reason}: give --dataset_config as one of {names}"
            ) from error
        if name in str(error):
            raise
        raise ValueError(f"dataset {name}: {error}") from error
    except Exception as error:
        # Their errors share no base class. This one only says that another made it stop.
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
        said = cause or error
        reason = " ".join(f"{type(said).__name__}: {said}".split())[:300]
        raise ValueError(
            f"dataset {name} could not be read ({reason}); {_what_to_do(said)}"
        ) from error


# Packages whose errors are about the network. The last three download for `huggingface_hub`, now
# or in earlier versions.
_NETWORK = ("huggingface_hub", "aiohttp", "httpx", "httpx2", "requests")


def _what_to_do(error: BaseException) -> str:
    """Return the advice that follows an error of `datasets` or of the libraries below it."""
    text = str(error)
    if "gated dataset" in text:
        return (
            "accept its terms on its page on huggingface.co, then log in: hf auth login, "
            "or the environment variable HF_TOKEN"
        )
    if type(error).__name__ == "DatasetNotFoundError":
        return (
            "check the name (OWNER/NAME); a private dataset needs hf auth login, "
            "or the environment variable HF_TOKEN"
        )
    if "scripts are no longer supported" in text:
        return (
            "choose a dataset of Parquet or JSON files, or download this one's files and "
            "give them to --files"
        )
    if isinstance(error, (ConnectionError, TimeoutError)) or (
        type(error).__module__.partition(".")[0] in _NETWORK
    ):
        return (
            "without --streaming, finished downloads are kept: the same command continues; "
            "without a network use --dataset toy or --files"
        )
    return "its files, once downloaded, can be given to --files"


def own_validation(name: str, config: str | None, split: str) -> str | None:
    """Return the name of a dataset's validation split; None if it has none or `split` trains on it.

    Raise ValueError if `split` does not exist.
    """
    with library_errors(name):
        names = datasets().get_dataset_split_names(name, config)
    # split may be train[:10%]+extra.
    wanted = {part.split("[")[0].strip() for part in split.split("+")}
    if missing := sorted(wanted - set(names)):
        raise ValueError(
            f"dataset {name} has no split {missing[0]!r}: give --split as one of {', '.join(names)}"
        )
    return next((own for own in VALIDATION_NAMES if own in names and own not in wanted), None)
