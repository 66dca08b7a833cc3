"""A checkpoint in a folder: several ranks write it at once, each the rows that it holds.

    step_0001000/
      checkpoint.json                      what a file's header holds, and each file's digest
      model/shard-00001-*.safetensors      rows of the weights, from rank 0
      optimizer/shard-00001-*.safetensors  rows of the optimizer's state
      ...

torch.distributed.checkpoint writes the tensors (runtime/distributed/sharded_checkpoint.py), and
notes of each piece where in the whole tensor it begins. To read them takes neither ranks nor
torch.distributed: a tensor is put together when it is asked for, or a range of its rows. Nothing in
a folder is trusted, as in format.py; without a valid checkpoint.json there is no checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Size, Tensor

from runtime.base.files import read_json_object, sha256_of_file
from runtime.checkpoint.format import HEADER_LIMIT, header_digest, plain_values

MANIFEST = "checkpoint.json"
FILE = re.compile(r"(model|optimizer)/[\w.-]{1,200}\.safetensors")
# Where torch.distributed.checkpoint notes the first row of each piece.
SHARDING_INFO = "DCP_SHARDING_INFO"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
# Hashed at a time: more disks than one answer faster together.
FILES_AT_ONCE = 16


class Piece(NamedTuple):
    """Consecutive rows of a tensor, in a file."""

    first: int
    stop: int
    file: str


class Shards(Mapping[str, Tensor]):
    """The tensors in some files of a folder, put together when they are asked for.

    files: their names. Raise ValueError for files whose pieces do not make up whole tensors.
    """

    def __init__(self, folder: Path, files: list[str]):
        self.folder, self.files = folder, files
        self.opened: dict[str, Any] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.kinds: dict[str, tuple[Size, torch.dtype]] = {}
        for file in files:
            try:
                self._open(file)
            except (SafetensorError, OSError, RecursionError) as error:
                raise ValueError(f"{file} is damaged: {str(error)[:200]}") from error
        for name, pieces in self.pieces.items():
            pieces.sort()
            rows, (shape, dtype) = 0, self.kinds[name]
            for piece in pieces:
                if piece.first != rows:
                    raise ValueError(f"tensor {name} has no rows {rows} to {piece.first}, or twice")
                rows = piece.stop
            if shape:
                self.kinds[name] = Size((rows, *shape[1:])), dtype

    def _open(self, file: str) -> None:
        """Note the pieces in a file."""
        opened = self.opened[file] = safe_open(self.folder / file, framework="pt")
        info = json.loads((opened.metadata() or {}).get(SHARDING_INFO, "null"))
        for name in list(opened.keys()):
            part = opened.get_slice(name)
            shape, dtype = Size(part.get_shape()), DTYPES.get(part.get_dtype())
            noted = info.get(name) if isinstance(info, dict) else None
            offsets = noted.get("saved_offsets") if isinstance(noted, dict) else None
            if not _are_offsets(offsets, len(shape)) or dtype is None:
                raise ValueError(f"{file} says of {name} neither where it begins nor a known dtype")
            kind = self.kinds.setdefault(name, (shape, dtype))
            if kind != (Size((*kind[0][:1], *shape[1:])), dtype):
                raise ValueError(f"{file} has a piece of another shape or dtype of {name}")
            first, rows = (offsets[0], shape[0]) if shape and offsets else (0, 1)
            pieces = self.pieces.setdefault(name, [])
            # Of fewer rows than ranks, some have none.
            if rows or not pieces:
                pieces[:] = [piece for piece in pieces if piece.first < piece.stop]
                pieces.append(Piece(first if rows else 0, first + rows if rows else 0, file))

    def check_files(self, digests: Mapping[str, str]) -> None:
        """Raise ValueError unless the files are those that were written."""
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            found = pool.map(lambda file: sha256_of_file(self.folder / file), self.files)
            for file, digest in zip(self.files, found, strict=True):
                if digests.get(file) != digest:
                    raise ValueError(f"damaged: {file} does not match its digest")

    def like(self, name: str) -> Tensor:
        """Return a tensor of shape alone, as the whole one."""
        shape, dtype = self.kinds[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(self, name: str, rows: range) -> Tensor:
        """Return some rows of a tensor that has any dimension."""
        shape, dtype = self.kinds[name]
        parts = []
        for first, stop, file in self.pieces[name]:
            begin, end = max(first, rows.start), min(stop, rows.stop)
            if begin < end:
                parts.append(self.opened[file].get_slice(name)[begin - first : end - first])
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty((0, *shape[1:]), dtype=dtype)

    def __getitem__(self, name: str) -> Tensor:
        shape, _ = self.kinds[name]
        if not shape:
            return self.opened[self.pieces[name][0].file].get_tensor(name)
        return self.rows(name, range(shape[0]))

    def __contains__(self, name: object) -> bool:
        # A Mapping would make the tensor to see whether it is there.
        return name in self.kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)


def _are_offsets(value: object, dimensions: int) -> bool:
    """Return whether a value is where a piece begins: a row, and 0 in all other dimensions."""
    return (
        isinstance(value, list)
        and len(value) == dimensions
        and all(type(offset) is int and offset >= 0 for offset in value)
        and not any(value[1:])
    )


def like(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of a checkpoint, or one with its shape and dtype: nothing is put together."""
    return tensors.like(name) if isinstance(tensors, Shards) else tensors[name]


def is_folder(path: Path) -> bool:
    """Return whether a path is a checkpoint in a folder, readable or not."""
    return (path / MANIFEST).is_file()


def manifest_text(header: dict, files: Mapping[str, tuple[int, str]]) -> str:
    """Return what checkpoint.json holds. files: bytes and SHA-256 of each."""
    contents = {
        **header,
        "files": {file: size for file, (size, _) in files.items()},
        "digests": {"header": header_digest(header)}
        | {file: digest for file, (_, digest) in files.items()},
    }
    return json.dumps(contents | {"digest": _digest_of(contents)}, indent=1)


def read_manifest(folder: Path) -> tuple[dict, dict[str, int]]:
    """Return what a file's dict would hold but for tensors, and the bytes of the folder's files.

    Raise ValueError unless all files are there.
    """
    path = folder / MANIFEST
    if path.stat().st_size > HEADER_LIMIT:
        raise ValueError(f"{MANIFEST} is too large")
    contents: Any = plain_values(read_json_object(path))
    if contents.pop("digest", None) != _digest_of(contents):
        raise ValueError(f"damaged: {MANIFEST} does not match its digest")
    files = contents.pop("files", None)
    if not isinstance(files, dict) or not all(map(FILE.fullmatch, files)):
        raise ValueError(f"{MANIFEST} must name the files in model/ and optimizer/")
    for name, size in files.items():
        with contextlib.suppress(OSError):
            if (folder / name).stat().st_size == size:
                continue
        raise ValueError(f"damaged: {name} is missing, or not as long as it was")
    return contents, files


def _digest_of(contents: dict) -> str:
    """Return the SHA-256 of a manifest but for its own digest."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
