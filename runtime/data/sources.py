"""Sources of text: files, datasets of the Hugging Face Hub, generated stories."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Protocol

DEFAULT_DATASET, DEFAULT_COLUMN = "roneneldan/TinyStories", "text"
DEFAULT_VAL_RATIO, DEFAULT_TOY_STORIES = 0.01, 30_000

# Names that datasets give their own validation split.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")

# These may also be .gz.
TEXT_FORMATS = (".txt", ".jsonl", ".csv")
FORMATS = (*TEXT_FORMATS, ".parquet")

# A longer document in a .txt file is read and tokenised in parts of this size.
PART_CHARACTERS = 1 << 20

# Text, and whether its document ends with it. Only huge documents have more than one part.
Part = tuple[str, bool]


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


class HubSource:
    """One split of a dataset that the `datasets` library loads, from the Hub or a local folder."""

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
        if text_column not in columns:
            raise ValueError(
                f"dataset {name} has no column {text_column!r}: "
                f"give --text_column as one of {', '.join(columns)}"
            )
        self._rows = rows.select_columns([text_column])

    def documents(self) -> Iterator[Part]:
        with library_errors(self.name):
            row = 0
            for batch in self._rows.iter(batch_size=1000):
                self.fraction = row / self._num_rows if self._num_rows else None
                for text in batch[self.column]:
                    yield text_of(text, f"row {row} of dataset {self.name}", self.column), True
                    row += 1


class FileSource:
    """Local files: .txt with a document separator; .jsonl, .csv and .parquet with a text column.

    All but .parquet may also be .gz.
    """

    def __init__(self, paths: list[str], text_column: str, separator: str):
        self.paths = [Path(path) for path in paths]
        self.column, self.separator = text_column, separator
        # The file that is being read, which knows how far it is.
        self._raw: io.BufferedReader | None = None
        self._bytes_done = 0
        self._bytes = sum(path.stat().st_size for path in self.paths)
        self.description: dict = {
            "files": [
                {"name": path.as_posix(), "bytes": path.stat().st_size} for path in self.paths
            ]
        }
        kinds = {file_format(path) for path in self.paths}
        if kinds - {".txt"}:
            self.description["text_column"] = text_column
        if ".txt" in kinds:
            self.description["document_separator"] = separator
        # Find a file that cannot be read before the work starts.
        for path in self.paths:
            with contextlib.closing(self._read(path)) as parts:
                next(parts, None)

    @property
    def fraction(self) -> float | None:
        here = self._raw.tell() if self._raw and not self._raw.closed else 0
        return (self._bytes_done + here) / self._bytes if self._bytes else None

    def documents(self) -> Iterator[Part]:
        self._bytes_done = 0
        for path in self.paths:
            yield from self._read(path)
            self._bytes_done += path.stat().st_size

    def _read(self, path: Path) -> Generator[Part, None, None]:
        """Yield the parts of one file; every error names the file."""
        kind = file_format(path)
        try:
            with open(path, "rb") as raw:
                self._raw = raw
                if kind == ".parquet":
                    yield from read_parquet(raw, path, self.column)
                    return
                stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                # The csv module handles line ends itself: a field may contain them.
                newline = "" if kind == ".csv" else None
                text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)
                if kind == ".txt":
                    yield from read_txt(text, self.separator)
                elif kind == ".jsonl":
                    yield from read_jsonl(text, path, self.column)
                else:
                    yield from read_csv(text, path, self.column)
        except (OSError, ValueError, EOFError, RecursionError, zlib.error, csv.Error) as error:
            names_it = str(path) in str(error)
            raise ValueError(str(error) if names_it else f"{path}: {error}") from error


def file_format(path: Path) -> str:
    """Return which of FORMATS a file name has. Raise ValueError if none."""
    name = path.name.lower()
    for kind in FORMATS:
        if name.endswith(kind) or (kind in TEXT_FORMATS and name.endswith(kind + ".gz")):
            return kind
    raise ValueError(
        f"unsupported file type: {path} "
        f"(supported: {', '.join(TEXT_FORMATS)}, each optionally .gz, and .parquet)"
    )


def read_txt(file: io.TextIOBase, separator: str) -> Iterator[Part]:
    """Yield the documents between separators, stripped; only a part of one is in memory."""
    # begun: a part of this document has been yielded.
    text, begun = "", False
    while chunk := file.read(1 << 16):
        text += chunk
        *whole, text = text.split(separator)
        for document in whole:
            yield (document.rstrip() if begun else document.strip()), True
            begun = False
        while len(text) > PART_CHARACTERS + len(separator):
            text = text if begun else text.lstrip()
            if len(text) > PART_CHARACTERS + len(separator):
                cut = safe_cut(text, PART_CHARACTERS)
                yield text[:cut], False
                text, begun = text[cut:], True
    yield (text.rstrip() if begun else text.strip()), True


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


def read_jsonl(file: Iterable[str], path: Path, column: str) -> Iterator[Part]:
    """Yield the column of a JSON object per line."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or column not in row:
            columns = ", ".join(row) if isinstance(row, dict) else "no columns"
            raise ValueError(
                f"{path} line {number} has no {column!r} (it has {columns}): give --text_column"
            )
        yield text_of(row[column], f"{path} line {number}", column), True


def read_csv(file: Iterable[str], path: Path, column: str) -> Iterator[Part]:
    """Yield a column of comma-separated values; the first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file)
    if column not in (rows.fieldnames or []):
        raise ValueError(
            f"{path} has no column {column!r} "
            f"(it has {', '.join(rows.fieldnames or ['none'])}): give --text_column"
        )
    for row in rows:
        yield text_of(row[column], f"{path} line {rows.line_num}", column), True


def read_parquet(file: io.BufferedReader, path: Path, column: str) -> Iterator[Part]:
    """Yield a column of a Parquet file; a thousand rows are in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    table = pyarrow.parquet.ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise ValueError(
            f"{path} has no column {column!r} "
            f"(it has {', '.join(table.schema_arrow.names)}): give --text_column"
        )
    for batch in table.iter_batches(batch_size=1000, columns=[column]):
        for text in batch.column(0).to_pylist():
            yield text_of(text, str(path), column), True


def text_of(value: object, where: str, column: str) -> str:
    """Return a text column's value; null is an empty document, any other type a ValueError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: column {column!r} holds {type(value).__name__}, not text: "
            "give another --text_column"
        )
    return value


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
