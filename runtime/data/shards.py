"""Token shards: the format on disk, how a finished set replaces the one before, and how training reads it.

    data/train/meta.json  shard_0000.npy  shard_0001.npy ...    and the same in data/val

A shard is a one-dimensional uint32 .npy array; the manifest (meta.json) lists the shards in order, each with its token
count and SHA-256, and is itself sealed with a digest. Nothing that is not in the manifest is ever read.

Replacing a set: the new one is written to data/.partial, then renamed to data/.ready. That rename is the commit: from
then on data/.ready is the set, and readers look there first; before it, the old set is untouched. Then, split by split,
the old folder is removed and the new one takes its place. A kill at any moment leaves one whole set, the old or the new.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.base.files import TEMPORARY_SUFFIX, fsync_folder, sha256_of_file, write_text_atomic
from runtime.data.tokenizer import STATE_FILE, Tokenizer

if TYPE_CHECKING:
    pass

FORMAT, VERSION = "gptoss-shards", 1
SPLITS = ("train", "val")
MANIFEST = "meta.json"
PARTIAL, READY = ".partial", ".ready"
DTYPE = np.dtype("<u4")
HEADER_BYTES = 128  # of a one-dimensional .npy file, whatever its length
LARGEST_MANIFEST_BYTES = 1 << 28
OPEN_SHARDS = (
    64  # memory maps held at a time: each keeps a file open, and systems allow 256 to 1,024
)
CHUNK_BYTES = 1 << 22  # shards are rewritten in pieces of this size
SHARD_NAME = re.compile(r"shard_\d{4,9}\.npy")


# ------------------------------------------------------------------------------------------------------------- manifest
def _seal(manifest: dict) -> str:
    """Hex SHA-256 of a manifest without its own seal, so that no flipped bit in it goes unnoticed."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write meta.json, sealed, atomically."""
    sealed = manifest | {"seal": _seal(manifest)}
    write_text_atomic(
        folder / MANIFEST, json.dumps(sealed, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    )


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a split, checked: format, seal, types, and that its sums agree. ValueError in one line otherwise."""
    path = Path(folder) / MANIFEST
    again = "run prepare_data.py again"
    try:
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{path} is too large to be a manifest of prepare_data.py: {again}")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist: python prepare_data.py writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path} is damaged, it is not JSON: {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this program (its format is not {FORMAT!r}): {again} with another --out_dir"
        )
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r}; this program reads version {VERSION}: {again}"
        )
    if manifest.get("seal") != _seal(manifest):
        raise ValueError(f"{path} is damaged, its digest does not match: {again}")
    if fault := _manifest_fault(manifest):
        raise ValueError(f"{path} is not usable, {fault}: {again}")
    return manifest


def _manifest_fault(m: dict) -> str | None:
    """What is wrong with the values of a manifest, or None. (The seal keeps out accidents; this keeps out inventions.)"""

    def count(value) -> bool:
        return type(value) is int and 0 < value < 1 << 48

    shards, tokenizer = m.get("shards"), m.get("tokenizer")
    if (
        not isinstance(shards, list)
        or not shards
        or not all(isinstance(shard, dict) for shard in shards)
    ):
        return "it lists no shards"
    for shard in shards:
        if not isinstance(shard.get("file"), str) or not SHARD_NAME.fullmatch(shard["file"]):
            return f"{shard.get('file')!r} is no name of a shard"
        if not count(shard.get("tokens")) or not isinstance(shard.get("sha256"), str):
            return f"{shard['file']} has no token count or digest"
    if len({shard["file"] for shard in shards}) < len(shards):
        return "it lists a shard twice"
    if m.get("num_shards") != len(shards) or m.get("total_tokens") != sum(
        shard["tokens"] for shard in shards
    ):
        return "its totals do not agree with its shards"
    if m.get("dtype") != DTYPE.name:
        return f"its dtype is {m.get('dtype')!r}, not {DTYPE.name!r}"
    if not all(count(m.get(key)) for key in ("total_documents", "total_bytes", "vocabulary_size")):
        return "a count is missing or not positive"
    if not isinstance(tokenizer, dict) or not all(
        isinstance(value, str)
        for value in (tokenizer.get("fingerprint"), m.get("tokens_sha256"), m.get("pair"))
    ):
        return "its tokenizer, content digest or pair is missing"
    if tokenizer.get("vocabulary_size") != m["vocabulary_size"] or tokenizer.get(
        "end_of_text_id"
    ) != m.get("end_of_text_id"):
        return "its vocabulary is not its tokenizer's"
    return None


# ---------------------------------------------------------------------------------------------------------------- write
class ShardWriter:
    """Writes one split: append ids, then finish() for what the manifest says about them. Holds nothing in memory."""

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.shards: list[dict] = []
        self.total_tokens = 0
        self._tokens = hashlib.sha256()  # of all ids, however they are cut into shards
        self._file = None
        folder.mkdir(parents=True)

    def append(self, ids: np.ndarray) -> None:
        """Add ids, uint32 [tokens]; a full shard is closed and the next one begun."""
        ids = ids.astype(DTYPE, copy=False)
        while len(ids):
            if self._file is None:
                self._open()
            part, ids = (
                ids[: self.shard_size - self._in_shard],
                ids[self.shard_size - self._in_shard :],
            )
            data = memoryview(part).cast("B")
            self._file.write(data)
            self._digest.update(data)
            self._tokens.update(data)
            self._in_shard += len(part)
            self.total_tokens += len(part)
            if self._in_shard == self.shard_size:
                self._finish_shard()

    def finish(self) -> dict:
        """Close the last shard; returns the manifest's shards, num_shards, total_tokens, dtype and tokens_sha256."""
        if self._file is not None:
            self._finish_shard()
        fsync_folder(self.folder)
        return {
            "num_shards": len(self.shards),
            "total_tokens": self.total_tokens,
            "dtype": DTYPE.name,
            "tokens_sha256": self._tokens.hexdigest(),
            "shards": self.shards,
        }

    def close(self) -> None:
        """Let go of the open file, if any: what is written so far is no set."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> None:
        self._path = self.folder / f"shard_{len(self.shards):04d}.npy"
        self._file = open(self._path, "wb")  # noqa: SIM115 (lives across calls)
        self._digest, self._in_shard = hashlib.sha256(), 0
        self._write_header(self.shard_size)  # right for every shard but the last
        self._digest.update(self._header)

    def _write_header(self, tokens: int) -> None:
        self._header = npy_header(tokens)
        self._file.seek(0)
        self._file.write(self._header)

    def _finish_shard(self) -> None:
        if short := self._in_shard < self.shard_size:
            self._write_header(self._in_shard)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        sha256 = sha256_of_file(self._path) if short else self._digest.hexdigest()
        self.shards.append({"file": self._path.name, "tokens": self._in_shard, "sha256": sha256})


def renumber(folder: Path, counts: dict, new_ids: np.ndarray) -> dict:
    """Replace every id i in a split's finished shards by new_ids[i], uint32 [old ids]; `counts` is what ShardWriter.finish returned, and so is the result.

    In place, a piece at a time: for a set that is not yet published, so that a half-done one is thrown away.
    """
    tokens, shards = hashlib.sha256(), []
    for shard in counts["shards"]:
        with open(folder / shard["file"], "r+b") as file:
            digest = hashlib.sha256(file.read(HEADER_BYTES))
            while old := file.read(CHUNK_BYTES):
                new = new_ids[np.frombuffer(old, dtype=DTYPE)].astype(DTYPE, copy=False).tobytes()
                file.seek(-len(old), os.SEEK_CUR)
                file.write(new)
                digest.update(new)
                tokens.update(new)
            file.flush()
            os.fsync(file.fileno())
        shards.append(shard | {"sha256": digest.hexdigest()})
    return counts | {"tokens_sha256": tokens.hexdigest(), "shards": shards}


def npy_header(tokens: int) -> bytes:
    """The .npy header (version 1.0) of a uint32 array [tokens]: 128 bytes, for numpy leaves room for the length to grow."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": DTYPE.str, "fortran_order": False, "shape": (tokens,)}
    )
    assert buffer.tell() == HEADER_BYTES
    return buffer.getvalue()


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict:
    """The manifest's entry for a tokenizer; one that was made from the text is also saved in the folder, beside the shards."""
    if not tokenizer.made_from_text:
        return tokenizer.to_state()
    text = json.dumps(tokenizer.to_state(), ensure_ascii=True) + "\n"
    write_text_atomic(folder / STATE_FILE, text)
    return tokenizer.summary() | {
        "file": STATE_FILE,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def pair_id(tokenizer: Tokenizer, tokens_sha256: Iterable[str]) -> str:
    """What train and val of one run share and no other run has, unless it made the same tokens: a digest of both contents."""
    return hashlib.sha256("\n".join([tokenizer.fingerprint, *tokens_sha256]).encode()).hexdigest()[
        :32
    ]


# --------------------------------------------------------------------------------------------- replacing a set by another
def _files_of_set(folder: Path) -> list[str]:
    """Names of the files that prepare_data wrote into a split's folder, manifest last. ValueError if anything else is there."""
    present = {entry.name for entry in os.scandir(folder)}
    if not present:
        return []
    if MANIFEST not in present:
        raise ValueError(
            f"{folder} holds files that prepare_data.py did not write ({min(present)}): move them away or give another --out_dir"
        )
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder} cannot be replaced, for what it holds is unknown: delete it or give another --out_dir ({error})"
        ) from None
    ours = (
        [shard["file"] for shard in manifest["shards"]]
        + [STATE_FILE] * ("file" in manifest["tokenizer"])
        + [MANIFEST]
    )
    if foreign := present - set(ours):
        raise ValueError(
            f"{folder} holds a file that prepare_data.py did not write ({min(foreign)}): move it away or give another --out_dir"
        )
    return ours


def check_replaceable(out_dir: Path) -> None:
    """ValueError, before any work, if a new set could not take the place of what is in `out_dir`."""
    for folder in (out_dir, *(out_dir / split for split in SPLITS)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give another --out_dir")
    for split in SPLITS:
        if (out_dir / split).is_symlink():
            raise ValueError(
                f"{out_dir / split} is a symbolic link, which would be replaced: give its target's folder as --out_dir"
            )
        if (out_dir / split).exists():
            _files_of_set(out_dir / split)


def remove_partial(out_dir: Path) -> None:
    """Remove the half-written set that an interrupted run left, if there is one. ValueError if it holds anything else."""
    ours = re.compile(
        f"(?:{SHARD_NAME.pattern}|{re.escape(MANIFEST)}|{re.escape(STATE_FILE)})(?:{re.escape(TEMPORARY_SUFFIX)})?"
    )
    partial = out_dir / PARTIAL
    if not partial.is_dir():
        return
    folders = [partial / split for split in SPLITS if (partial / split).is_dir()]
    for folder in (partial, *folders):
        for entry in os.scandir(folder):
            if not (folder != partial and ours.fullmatch(entry.name)) and not (
                folder == partial and entry.name in SPLITS
            ):
                raise ValueError(
                    f"{entry.path} was not written by prepare_data.py: move it away or give another --out_dir"
                )
    for folder in folders:
        for entry in list(os.scandir(folder)):
            os.unlink(entry.path)
        folder.rmdir()
    partial.rmdir()


def publish(out_dir: Path) -> None:
    """Make the finished set in `.partial` the set of `out_dir`, in the place of the one before."""
    check_replaceable(out_dir)  # once more: the old set must still be ours to remove
    fsync_folder(out_dir / PARTIAL)
    os.rename(out_dir / PARTIAL, out_dir / READY)  # the commit
    fsync_folder(out_dir)
    finish_publishing(out_dir)


def finish_publishing(out_dir: Path) -> None:
    """Move a committed set into its place; also what a later run does for one that was killed after its commit."""
    ready = out_dir / READY
    if not ready.is_dir():
        return
    for split in SPLITS:
        if not (ready / split).is_dir():
            continue
        old = out_dir / split
        if old.is_dir():
            for name in _files_of_set(
                old
            ):  # the manifest last: it says what is ours, should this be interrupted too
                (old / name).unlink(missing_ok=True)
            old.rmdir()
        os.rename(ready / split, old)
        fsync_folder(out_dir)
    ready.rmdir()
    fsync_folder(out_dir)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs of prepare_data. ValueError if one has it. (Windows has no such lock and goes without.)"""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another prepare_data.py is writing to {folder}: wait for it or give another --out_dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------- read
class TokenShards:
    """One split's tokens, memory-mapped: a single long sequence, whatever the shards. ValueError if anything in it is not as written.

    `verify` reads every byte once (about a second per GiB and core) and checks digests and ids; the shards' names, sizes,
    dtype and shape are always checked.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.num_tokens: int = self.manifest["total_tokens"]
        self.vocabulary_size: int = self.manifest["vocabulary_size"]
        self.end_of_text_id: int = self.manifest["end_of_text_id"]
        self._shards: list[dict] = self.manifest["shards"]
        self._starts = np.concatenate(
            [[0], np.cumsum([shard["tokens"] for shard in self._shards], dtype=np.int64)]
        )
        self._identity = [self._check_size(i) for i in range(len(self._shards))]
        self._map = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open)
        if verify:
            self.verify()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, end-of-text included: nats per token / (ln 2 * this) = bits per byte."""
        return self.manifest["total_bytes"] / self.num_tokens

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what is trained on: the ids in order and what they mean; how they are cut into shards does not count."""
        content = self.manifest["tokenizer"]["fingerprint"] + self.manifest["tokens_sha256"]
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def tokenizer_state(self) -> dict:
        """State of the tokenizer that made these shards, for tokenizer_from_state; one made from the text is read from beside them."""
        entry = self.manifest["tokenizer"]
        if "file" not in entry:
            return entry
        path = self.folder / STATE_FILE
        if not path.is_file() or sha256_of_file(path) != entry.get("sha256"):
            raise ValueError(f"{path} is missing or damaged: run prepare_data.py again")
        return json.loads(path.read_text(encoding="utf-8"))

    def read(self, start: int, count: int) -> np.ndarray:
        """Ids start .. start + count - 1 of the whole sequence, int64 [count], across shard borders."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise ValueError(
                f"{self.folder} has tokens 0 to {self.num_tokens - 1}, not {start} to {start + count - 1}"
            )
        ids, filled = np.empty(count, dtype=np.int64), 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while filled < count:
            offset = start + filled - int(self._starts[shard])
            part = self._map(shard)[offset : offset + count - filled]
            ids[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return ids

    def verify(self) -> None:
        """Read everything: each shard's digest must be the manifest's and each id below vocabulary_size."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._verify_shard, range(len(self._shards))):
                pass
        _ = self.tokenizer_state

    def _path(self, i: int) -> Path:
        return self.folder / self._shards[i]["file"]

    def _fault(self, i: int, what: str) -> ValueError:
        return ValueError(f"{self._path(i)} {what}: run prepare_data.py again")

    def _stat(self, i: int) -> tuple[int, int, int]:
        try:
            stat = self._path(i).stat()
        except OSError as error:
            raise self._fault(i, f"cannot be read ({error.strerror})") from None
        return stat.st_size, stat.st_ino, stat.st_mtime_ns

    def _check_size(self, i: int) -> tuple[int, int, int]:
        identity = self._stat(i)
        if identity[0] != (expected := HEADER_BYTES + DTYPE.itemsize * self._shards[i]["tokens"]):
            raise self._fault(i, f"has {identity[0]:,} bytes, not {expected:,}")
        return identity

    def _open(self, i: int) -> np.ndarray:
        """Memory map of shard i, uint32 [tokens]. Opened late and few at a time, so the file must still be the one first seen."""
        if self._stat(i) != self._identity[i]:
            raise self._fault(i, "was changed while it was in use")
        with open(self._path(i), "rb") as file:
            if file.read(HEADER_BYTES) != npy_header(self._shards[i]["tokens"]):
                raise self._fault(
                    i, f"is not a {DTYPE.name} array of {self._shards[i]['tokens']:,} tokens"
                )
            return np.asarray(
                np.memmap(
                    file,
                    dtype=DTYPE,
                    mode="r",
                    offset=HEADER_BYTES,
                    shape=(self._shards[i]["tokens"],),
                )
            )

    def _verify_shard(self, i: int) -> None:
        ids = self._open(i)
        if sha256_of_file(self._path(i)) != self._shards[i]["sha256"]:
            raise self._fault(i, "is damaged, its digest is not the manifest's")
        if (largest := int(ids.max())) >= self.vocabulary_size:
            raise self._fault(
                i, f"holds id {largest}, beyond its vocabulary of {self.vocabulary_size:,}"
            )


def open_data(data_dir: str | Path, verify: bool = True) -> tuple[TokenShards, TokenShards]:
    """The train and val shards that one run of prepare_data.py wrote. ValueError if they are missing, damaged or of two runs."""
    data_dir = Path(data_dir)
    folders = [
        data_dir / READY / split if (data_dir / READY / split).is_dir() else data_dir / split
        for split in SPLITS
    ]
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"{data_dir} has no prepared text ({folder / MANIFEST} is missing): run python prepare_data.py --out_dir {data_dir}"
            )
    train, val = (TokenShards(folder, verify) for folder in folders)
    for shards, split in zip((train, val), SPLITS, strict=True):
        if shards.manifest.get("split") != split:
            raise ValueError(
                f"{shards.folder} holds the split {shards.manifest.get('split')!r}, not {split!r}: run prepare_data.py again"
            )
    if train.manifest["pair"] != val.manifest["pair"]:
        raise ValueError(
            f"{train.folder} and {val.folder} were not written by the same run of prepare_data.py: run it again"
        )
    if train.manifest["tokenizer"] != val.manifest["tokenizer"]:
        raise ValueError(
            f"{train.folder} and {val.folder} were made with different tokenizers: run prepare_data.py again"
        )
    return train, val
