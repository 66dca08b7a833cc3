"""Find the text files that a user names: files, folders, patterns and standard input."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from runtime.data.formats import ENDINGS, FORMATS
from runtime.data.text_files import COMPRESSIONS, archive_fault

STDIN = "-"
# Words in the names of a dataset's files, and the split that each means.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# What `datasets` and prepare_data.py write about a dataset next to it.
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "meta.json")
MADE_BY_SYSTEMS = ("__MACOSX", "__pycache__")
_KNOWN = f"{', '.join(ENDINGS)}, each also {', '.join(COMPRESSIONS)} except .parquet"


@dataclass
class InputFile:
    """One file to read. `kind` is one of FORMATS; None: standard input, known when it is read."""

    path: Path
    kind: str | None
    # The name says no format, so the first bytes did.
    is_guess: bool = False
    # Standard input and pipes can be read once, so they are copied to a file without a name.
    copy: BinaryIO | None = None

    @property
    def name(self) -> str:
        return "standard input" if str(self.path) == STDIN else str(self.path)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.copy.fileno()).st_size if self.copy else self.path.stat().st_size

    def keep(self) -> None:
        """Copy standard input or a pipe, so that it can be opened more than once."""
        if str(self.path) == STDIN:
            self.copy = _copied(sys.stdin.buffer)
        elif not self.path.is_file():
            with open(self.path, "rb") as pipe:
                self.copy = _copied(pipe)

    def open(self) -> BinaryIO:
        """Open the bytes from the start."""
        if self.copy is None:
            return open(self.path, "rb")
        self.copy.seek(0)
        return io.BufferedReader(io.FileIO(os.dup(self.copy.fileno()), "rb"))


def _copied(stream: BinaryIO) -> BinaryIO:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stream, copy, 1 << 20)
    copy.flush()
    return copy


@dataclass
class FileSet:
    """The files to read, in order, and those of the named folders that are left out."""

    files: list[InputFile] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    # A folder or a pattern was named, so that the user should see what it gave.
    searched: bool = False

    @property
    def kinds(self) -> set[str | None]:
        return {file.kind for file in self.files}

    def line(self) -> str:
        """Return what was found, for the terminal."""
        if guesses := [file for file in self.files if file.is_guess]:
            kind = guesses[0].kind
            return f"reading {guesses[0].name} as {kind} (--text_format says otherwise)"
        kinds = Counter(file.kind for file in self.files)
        text = (
            f"reading {len(self.files):,} files: "
            f"{', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items(), key=str))}"
        )
        if self.ignored:
            more = len(self.ignored) - 5
            names = ", ".join(self.ignored[:5]) + (f" and {more:,} more" if more > 0 else "")
            text += f"; ignored: {names}"
        return text


def format_of(path: Path) -> str | None:
    """Return the format that a file's name says, whatever its case; None if it says none."""
    name = path.name.lower()
    compressed = next((end for end in COMPRESSIONS if name.endswith(end)), "")
    ending = Path(name.removesuffix(compressed)).suffix
    kind = ENDINGS.get(ending)
    return None if kind == "parquet" and compressed else kind


def find_files(names: Iterable[str], text_format: str | None = None) -> FileSet:
    """Return the files that `names` mean: files, folders, patterns such as 'data/*.txt', or -.

    A folder means all files in it, at any depth, in the order of their names. `text_format` is the
    format of all files, whatever their names. Raise ValueError for a name that gives no file, for
    an unknown format, and for a file that is named twice.
    """
    found = FileSet()
    # Two names of one file inside a folder are two files: links are how some caches keep them.
    seen: set[str] = set()
    for name in names:
        before, path = len(found.files), Path(name)
        if not name:
            raise ValueError("a name of a file is empty: name a file, a folder or a pattern")
        if name == STDIN:
            found.files.append(InputFile(path, text_format))
        elif path.is_dir():
            _add_folder(found, path, text_format)
        elif path.exists():
            found.files.append(InputFile(path, text_format or _named_format(path)))
        elif glob.has_magic(name):
            _add_matches(found, name, text_format)
        else:
            raise ValueError(f"{name} does not exist")
        places = {os.path.realpath(file.path): file.name for file in found.files[before:]}
        if twice := sorted(places.keys() & seen):
            raise ValueError(f"{places[twice[0]]} is named twice: name each file once")
        seen |= places.keys()
    return found


def _named_format(path: Path) -> str | None:
    """Return the format that a name says; None for a pipe. Raise ValueError for an unknown one."""
    kind = format_of(path)
    if kind is None and path.is_file():
        if path.name.lower().endswith((".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")):
            kind = "zip" if path.suffix.lower() == ".zip" else "tar"
            raise ValueError(archive_fault(str(path), kind))
        raise ValueError(
            f"the name of {path} says no format (known: {_KNOWN}): "
            f"give --text_format {'|'.join(FORMATS)}"
        )
    return kind


def _add_folder(found: FileSet, folder: Path, text_format: str | None) -> None:
    """Add a folder's files. Hidden ones do not count. Raise ValueError if there are none."""
    found.searched = True
    before, ignored = len(found.files), len(found.ignored)
    for path in sorted(_files_below(folder)):
        inside = path.relative_to(folder)
        kind = text_format or format_of(path)
        if kind is None or path.name in ABOUT or not path.is_file():
            found.ignored.append(str(inside))
        else:
            found.files.append(InputFile(path, kind))
    if len(found.files) == before:
        others = ", ".join(found.ignored[ignored : ignored + 5])
        raise ValueError(
            f"{folder} holds no text file ({f'it holds {others}' if others else 'it is empty'}; "
            f"known: {_KNOWN}): unpack archives, or give --text_format"
        )


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and is no folder, at any depth; links to folders are followed."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # A link may lead back.
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if name[0] != "." and name not in MADE_BY_SYSTEMS]
        yield from (Path(place, name) for name in names if name[0] != ".")


def _add_matches(found: FileSet, pattern: str, text_format: str | None) -> None:
    """Add the files and folders that a pattern matches. Raise ValueError if there are none."""
    found.searched = True
    matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    before, folders = len(found.files), []
    for path in matches:
        if path.is_dir():
            folders.append(path)
        elif kind := text_format or format_of(path):
            found.files.append(InputFile(path, kind))
        else:
            found.ignored.append(str(path))
    for folder in folders:
        inside = FileSet()
        with contextlib.suppress(ValueError):
            _add_folder(inside, folder, text_format)
        # ** gives a folder and what is in it.
        known = {file.path for file in found.files}
        found.files += [file for file in inside.files if file.path not in known]
        found.ignored += [f"{folder}/{name}" for name in inside.ignored]
    found.files[before:] = sorted(found.files[before:], key=lambda file: file.path)
    if len(found.files) == before:
        what = f"only {matches[0]}, which is no known text file" if matches else "no file"
        raise ValueError(f"{pattern} matches {what} (known: {_KNOWN})")


def by_split(files: list[InputFile], folder: Path) -> dict[str, list[InputFile]]:
    """Return a dataset folder's files by the split that their names say.

    Names without one, or all if none says train, are train's.
    """
    splits: dict[str, list[InputFile]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.path.relative_to(folder).as_posix().lower())
        named = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        splits.setdefault(named[-1] if named else "", []).append(file)
    if "train" not in splits:
        return {"train": files}
    others = set(map(id, splits.pop("", [])))
    train = set(map(id, splits["train"])) | others
    return splits | {"train": [file for file in files if id(file) in train]}


def is_folder(name: str) -> bool:
    """Return whether a dataset's name is a local folder."""
    return Path(name).is_dir()


def dataset_folder(
    name: str, text_format: str | None, split: str, with_own: bool = True
) -> tuple[FileSet, FileSet]:
    """Return the files of a dataset's folder to train on, and its own validation files.

    `split` is a split's name, or several with + between. Without `with_own`, validation files are
    among the ignored. Raise ValueError if the split has no files.
    """
    found = find_files([name], text_format)
    splits = by_split(found.files, Path(name))
    wanted = [part.strip() for part in split.split("+")]
    if missing := [part for part in wanted if part not in splits]:
        raise ValueError(
            f"{name} has no split {missing[0]!r}: its file names say {', '.join(sorted(splits))}"
        )
    chosen = {id(file) for part in wanted for file in splits[part]}
    own = splits.get("validation", []) if with_own and "validation" not in wanted else []
    others = [file for file in found.files if id(file) not in chosen | set(map(id, own))]
    ignored = found.ignored + [str(file.path.relative_to(name)) for file in others]
    train = [file for file in found.files if id(file) in chosen]
    return FileSet(train, ignored, True), FileSet(own, [], bool(own))
