"""Token shards: the format on disk, how a new set replaces the old one, how training reads it.

    data/train/meta.json  shard_0000.npy  shard_0001.npy ...    and the same in data/val

A shard is a one-dimensional .npy array: uint16 if every id of the vocabulary fits, else uint32. The
manifest (meta.json) names the dtype, lists the shards in order, each with its token count and
SHA-256, and carries a digest of itself. Files that are not in the manifest are never read. The
digest of the content, tokens_sha256, is that of the ids as uint32, so it does not depend on the
dtype of the shards.

Replacing a set: the new set is written to data/.partial, then renamed to data/.ready. That rename
is the commit. Before it the old set is untouched; after it data/.ready is the set, and readers look
there first. Then, split by split, the old folder is removed and the new one renamed to its place. A
kill at any moment leaves one whole set, the old or the new.
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
from typing import BinaryIO

import numpy as np

from runtime.base.files import TEMPORARY_SUFFIX, fsync_folder, sha256_of_file, write_text_atomic
from runtime.data.tokenizer import STATE_FILE, Tokenizer

FORMAT, VERSION = "gptoss-shards", 1
SPLITS = ("train", "val")
MANIFEST = "meta.json"
PARTIAL, READY = ".partial", ".ready"
# Of a set's shards, by the name in its manifest; the narrow one first.
DTYPES = {dtype.name: dtype for dtype in (np.dtype("<u2"), np.dtype("<u4"))}
# Of the ids that are appended, and of those in tokens_sha256.
WIDE = DTYPES["uint32"]
# Of a one-dimensional .npy file, whatever its length.
HEADER_BYTES = 128
# A shard takes about 150 bytes in it, so no real set comes near this.
LARGEST_MANIFEST_BYTES = 1 << 28
# Memory maps held at a time: each keeps a file open, and systems allow 256 to 1,024.
OPEN_SHARDS = 64
# Shards are rewritten in pieces of this size.
CHUNK_BYTES = 1 << 22
SHARD_NAME = re.compile(r"shard_\d{4,9}\.npy")


def dtype_for(vocabulary_size: int) -> np.dtype:
    """Return the narrowest dtype of shards that holds every id of a vocabulary."""
    return next(d for d in DTYPES.values() if vocabulary_size - 1 <= np.iinfo(d).max)


# ------------------------------------------------------------------------------ manifest
def _seal(manifest: dict) -> str:
    """Return the hex SHA-256 of a manifest without its own digest, to detect any flipped bit."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write meta.json with its digest, atomically."""
    sealed = manifest | {"seal": _seal(manifest)}
    write_text_atomic(
        folder / MANIFEST, json.dumps(sealed, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    )


def read_manifest(folder: str | Path) -> dict:
    """Return a split's manifest. Raise a one-line ValueError if it is missing, damaged or wrong.

    Checked: format, version, digest, types and sums.
    """
    path = Path(folder) / MANIFEST
    again = "run prepare_data.py again"
    try:
        if path.stat().st_size > LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{path} is too large to be a manifest of prepare_data.py: {again}")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} does not exist: python prepare_data.py writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path} is damaged (it is not JSON): {again}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this program (its format is not {FORMAT!r}): "
            f"{again} with another --out_dir"
        )
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r}; "
            f"this program reads version {VERSION}: {again}"
        )
    if manifest.get("seal") != _seal(manifest):
        raise ValueError(f"{path} is damaged (its digest does not match): {again}")
    if fault := _manifest_fault(manifest):
        raise ValueError(f"{path} is not usable ({fault}): {again}")
    return manifest


def _manifest_fault(m: dict) -> str | None:
    """Return what is wrong with a manifest's values, or None.

    The digest detects corruption; this rejects hand-made manifests.
    """

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
            return f"{shard.get('file')!r} is not a shard's name"
        if not count(shard.get("tokens")) or not isinstance(shard.get("sha256"), str):
            return f"{shard['file']} has no token count or digest"
    if len({shard["file"] for shard in shards}) < len(shards):
        return "it lists a shard twice"
    if m.get("num_shards") != len(shards) or m.get("total_tokens") != sum(
        shard["tokens"] for shard in shards
    ):
        return "its totals differ from the sums over its shards"
    if m.get("dtype") not in tuple(DTYPES):
        return f"its dtype is {m.get('dtype')!r}, not one of {', '.join(DTYPES)}"
    if not all(count(m.get(key)) for key in ("total_documents", "total_bytes", "vocabulary_size")):
        return "a count is missing or not positive"
    if m["vocabulary_size"] - 1 > np.iinfo(DTYPES[m["dtype"]]).max:
        return f"its vocabulary of {m['vocabulary_size']:,} does not fit its dtype {m['dtype']}"
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


# ------------------------------------------------------------------------------ write
class ShardWriter:
    """Writes one split: append ids, then finish() returns the manifest's part. Buffers nothing."""

    def __init__(self, folder: Path, shard_size: int, vocabulary_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.vocabulary_size, self.dtype = vocabulary_size, dtype_for(vocabulary_size)
        self.shards: list[dict] = []
        self.total_tokens = 0
        # Of all ids, however they are cut into shards.
        self._tokens = hashlib.sha256()
        self._file: BinaryIO | None = None
        folder.mkdir(parents=True)

    def append(self, ids: np.ndarray) -> None:
        """Append ids, uint32 [tokens]; close a full shard and start the next.

        Raise ValueError for an id beyond the vocabulary, which a narrow dtype would wrap.
        """
        ids = ids.astype(WIDE, copy=False)
        if len(ids) and (largest := int(ids.max())) >= self.vocabulary_size:
            raise ValueError(f"id {largest} is beyond the vocabulary of {self.vocabulary_size:,}")
        self._tokens.update(ids.data.cast("B"))
        ids = ids.astype(self.dtype, copy=False)
        while len(ids):
            file = self._file or self._open()
            room = self.shard_size - self._in_shard
            part, ids = ids[:room], ids[room:]
            data = part.data.cast("B")
            file.write(data)
            self._digest.update(data)
            self._in_shard += len(part)
            self.total_tokens += len(part)
            if self._in_shard == self.shard_size:
                self._finish_shard(file)

    def finish(self) -> dict:
        """Close the last shard; return the manifest's shards, counts, dtype and tokens_sha256."""
        if self._file is not None:
            self._finish_shard(self._file)
        fsync_folder(self.folder)
        return {
            "num_shards": len(self.shards),
            "total_tokens": self.total_tokens,
            "dtype": self.dtype.name,
            "tokens_sha256": self._tokens.hexdigest(),
            "shards": self.shards,
        }

    def close(self) -> None:
        """Close the open file, if any: what is written so far is not a set."""
        if self._file is not None:
            self._file.close()

    def _open(self) -> BinaryIO:
        """Start the next shard and return its file."""
        self._path = self.folder / f"shard_{len(self.shards):04d}.npy"
        # Not in a `with`: the file lives across calls.
        file = self._file = open(self._path, "wb")  # noqa: SIM115
        # Right for every shard but the last.
        header = npy_header(self.shard_size, self.dtype)
        file.write(header)
        self._digest, self._in_shard = hashlib.sha256(header), 0
        return file

    def _finish_shard(self, file: BinaryIO) -> None:
        """Flush and close a shard's file, and list it."""
        if short := self._in_shard < self.shard_size:
            file.seek(0)
            file.write(npy_header(self._in_shard, self.dtype))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        # A short shard has another header than the one that was digested.
        sha256 = sha256_of_file(self._path) if short else self._digest.hexdigest()
        self.shards.append({"file": self._path.name, "tokens": self._in_shard, "sha256": sha256})


def renumber(folder: Path, counts: dict, new_ids: np.ndarray, vocabulary_size: int) -> dict:
    """Replace every id i in a split's finished shards by new_ids[i], uint32 [old ids].

    `counts` is what ShardWriter.finish returned; return it with the new digests, and with a
    narrower dtype if `vocabulary_size`, which counts the new ids, allows it. Works in place, a
    piece at a time: only for a set that is not published, so that a half-done one is deleted.
    """
    old_dtype, dtype = DTYPES[counts["dtype"]], dtype_for(vocabulary_size)
    if dtype.itemsize > old_dtype.itemsize:
        raise ValueError(f"{old_dtype.name} shards have no room for {vocabulary_size:,} ids")
    tokens, shards = hashlib.sha256(), []
    for shard in counts["shards"]:
        path, header = folder / shard["file"], npy_header(shard["tokens"], dtype)
        digest = hashlib.sha256(header)
        # The new ids are not wider, so nothing is overwritten before it is read.
        with open(path, "rb") as old_file, open(path, "r+b") as file:
            old_file.seek(HEADER_BYTES)
            file.write(header)
            while old := old_file.read(CHUNK_BYTES):
                new = new_ids[np.frombuffer(old, dtype=old_dtype)].astype(WIDE, copy=False)
                tokens.update(new.data.cast("B"))
                data = new.astype(dtype, copy=False).data.cast("B")
                file.write(data)
                digest.update(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        shards.append(shard | {"sha256": digest.hexdigest()})
    digests = {"tokens_sha256": tokens.hexdigest(), "shards": shards}
    return counts | {"dtype": dtype.name} | digests


def npy_header(tokens: int, dtype: np.dtype) -> bytes:
    """Return the .npy header (version 1.0) of an array [tokens].

    It has 128 bytes for any length, because numpy leaves room for the length to grow.
    """
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    )
    assert buffer.tell() == HEADER_BYTES
    return buffer.getvalue()


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict:
    """Return a tokenizer's manifest entry; save one made from the text next to the shards."""
    if not tokenizer.made_from_text:
        return tokenizer.to_state()
    text = json.dumps(tokenizer.to_state(), ensure_ascii=True) + "\n"
    write_text_atomic(folder / STATE_FILE, text)
    return tokenizer.summary() | {
        "file": STATE_FILE,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def pair_id(tokenizer: Tokenizer, tokens_sha256: Iterable[str]) -> str:
    """Return the id that train and val of one run share: a digest of tokenizer and contents.

    Another run has the same id only if it made the same tokens.
    """
    content = "\n".join([tokenizer.fingerprint, *tokens_sha256])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------ replace a set
def _files_of_set(folder: Path) -> list[str]:
    """Return the names of the files that prepare_data wrote into a split's folder, manifest last.

    Raise ValueError if the folder holds anything else.
    """
    present = {entry.name for entry in os.scandir(folder)}
    if not present:
        return []
    if MANIFEST not in present:
        raise ValueError(
            f"{folder} holds files that prepare_data.py did not write ({min(present)}): "
            "move them away or give another --out_dir"
        )
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder} cannot be replaced because its content is unknown: "
            f"delete it or give another --out_dir ({error})"
        ) from None
    ours = (
        [shard["file"] for shard in manifest["shards"]]
        + [STATE_FILE] * ("file" in manifest["tokenizer"])
        + [MANIFEST]
    )
    if foreign := present - set(ours):
        raise ValueError(
            f"{folder} holds a file that prepare_data.py did not write ({min(foreign)}): "
            "move it away or give another --out_dir"
        )
    return ours


def check_replaceable(out_dir: Path) -> None:
    """Raise ValueError, before any work, if a new set cannot replace what is in `out_dir`."""
    for folder in (out_dir, *(out_dir / split for split in SPLITS)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder: give another --out_dir")
    for split in SPLITS:
        if (out_dir / split).is_symlink():
            raise ValueError(
                f"{out_dir / split} is a symbolic link, which would be replaced: "
                "give its target's folder as --out_dir"
            )
        if (out_dir / split).exists():
            _files_of_set(out_dir / split)


def remove_partial(out_dir: Path) -> None:
    """Remove the partial set of an interrupted run, if any. Raise ValueError for foreign files."""
    ours = re.compile(
        f"(?:{SHARD_NAME.pattern}|{re.escape(MANIFEST)}|{re.escape(STATE_FILE)})"
        f"(?:{re.escape(TEMPORARY_SUFFIX)})?"
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
                    f"{entry.path} was not written by prepare_data.py: "
                    "move it away or give another --out_dir"
                )
    for folder in folders:
        for entry in list(os.scandir(folder)):
            os.unlink(entry.path)
        folder.rmdir()
    partial.rmdir()


def publish(out_dir: Path) -> None:
    """Replace the set in `out_dir` by the finished one in `.partial`."""
    # Once more: the old set must still be ours to remove.
    check_replaceable(out_dir)
    fsync_folder(out_dir / PARTIAL)
    # The commit.
    os.rename(out_dir / PARTIAL, out_dir / READY)
    fsync_folder(out_dir)
    finish_publishing(out_dir)


def finish_publishing(out_dir: Path) -> None:
    """Move a committed set into place; a later run calls this too, after a kill in between."""
    ready = out_dir / READY
    if not ready.is_dir():
        return
    for split in SPLITS:
        if not (ready / split).is_dir():
            continue
        old = out_dir / split
        if old.is_dir():
            # The manifest last: it says what is ours, if this is interrupted too.
            for name in _files_of_set(old):
                (old / name).unlink(missing_ok=True)
            old.rmdir()
        os.rename(ready / split, old)
        fsync_folder(out_dir)
    ready.rmdir()
    fsync_folder(out_dir)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs of prepare_data. Raise ValueError if it is locked.

    Windows has no such lock: there this does nothing.
    """
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
                f"another prepare_data.py is writing to {folder}: "
                "wait for it or give another --out_dir"
            ) from None
        yield
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------ read
class TokenShards:
    """One split's tokens, memory-mapped as one long sequence. Raise ValueError for any damage.

    `verify` reads every byte once (about a second per GiB and core) and checks digests and ids.
    Names, sizes, dtype and shape of the shards are always checked.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.num_tokens: int = self.manifest["total_tokens"]
        self.vocabulary_size: int = self.manifest["vocabulary_size"]
        self.end_of_text_id: int = self.manifest["end_of_text_id"]
        self.dtype = DTYPES[self.manifest["dtype"]]
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
        """UTF-8 bytes of text per token, end-of-text included.

        Bits per byte = nats per token / (ln 2 * bytes_per_token).
        """
        return self.manifest["total_bytes"] / self.num_tokens

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the training text: the ids in order and their meaning, not the shards."""
        content = self.manifest["tokenizer"]["fingerprint"] + self.manifest["tokens_sha256"]
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def tokenizer_state(self) -> dict:
        """State of the tokenizer that made these shards, for tokenizer_from_state.

        A tokenizer that was made from the text is read from its file next to the shards.
        """
        entry = self.manifest["tokenizer"]
        if "file" not in entry:
            return entry
        path = self.folder / STATE_FILE
        if not path.is_file() or sha256_of_file(path) != entry.get("sha256"):
            raise ValueError(f"{path} is missing or damaged: run prepare_data.py again")
        return json.loads(path.read_text(encoding="utf-8"))

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids start .. start + count - 1, int64 [count], across shard borders."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise ValueError(
                f"{self.folder} has tokens 0 to {self.num_tokens - 1}, "
                f"not {start} to {start + count - 1}"
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
        """Read everything; each shard must have the manifest's digest and ids in the vocabulary."""
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
        expected = HEADER_BYTES + self.dtype.itemsize * self._shards[i]["tokens"]
        if identity[0] != expected:
            raise self._fault(i, f"has {identity[0]:,} bytes, not {expected:,}")
        return identity

    def _open(self, i: int) -> np.ndarray:
        """Return a memory map of shard i, uint16 or uint32 [tokens].

        Shards are opened late and few at a time, so the file must still be the one first seen.
        """
        if self._stat(i) != self._identity[i]:
            raise self._fault(i, "was changed while it was in use")
        with open(self._path(i), "rb") as file:
            if file.read(HEADER_BYTES) != npy_header(self._shards[i]["tokens"], self.dtype):
                raise self._fault(
                    i, f"is not a {self.dtype.name} array of {self._shards[i]['tokens']:,} tokens"
                )
            return np.asarray(
                np.memmap(
                    file,
                    dtype=self.dtype,
                    mode="r",
                    offset=HEADER_BYTES,
                    shape=(self._shards[i]["tokens"],),
                )
            )

    def _verify_shard(self, i: int) -> None:
        ids = self._open(i)
        if sha256_of_file(self._path(i)) != self._shards[i]["sha256"]:
            raise self._fault(i, "is damaged (its digest is not the manifest's)")
        if (largest := int(ids.max())) >= self.vocabulary_size:
            raise self._fault(
                i, f"holds id {largest}, beyond its vocabulary of {self.vocabulary_size:,}"
            )


def open_data(data_dir: str | Path, verify: bool = True) -> tuple[TokenShards, TokenShards]:
    """Return the train and val shards of one run of prepare_data.py.

    Raise ValueError if they are missing, damaged or of two runs.
    """
    data_dir = Path(data_dir)
    folders = [
        data_dir / READY / split if (data_dir / READY / split).is_dir() else data_dir / split
        for split in SPLITS
    ]
    for folder in folders:
        if not (folder / MANIFEST).is_file():
            raise ValueError(
                f"{data_dir} has no prepared text ({folder / MANIFEST} is missing): "
                f"run python prepare_data.py --out_dir {data_dir}"
            )
    train, val = (TokenShards(folder, verify) for folder in folders)
    for shards, split in zip((train, val), SPLITS, strict=True):
        if shards.manifest.get("split") != split:
            raise ValueError(
                f"{shards.folder} holds the split {shards.manifest.get('split')!r}, "
                f"not {split!r}: run prepare_data.py again"
            )
    if train.manifest["pair"] != val.manifest["pair"]:
        raise ValueError(
            f"{train.folder} and {val.folder} were not written by the same run of "
            "prepare_data.py: run it again"
        )
    if train.manifest["tokenizer"] != val.manifest["tokenizer"]:
        raise ValueError(
            f"{train.folder} and {val.folder} were made with different tokenizers: "
            "run prepare_data.py again"
        )
    return train, val
