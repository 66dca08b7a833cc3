"""Write the tensors of a checkpoint into a folder: each rank the rows that it holds, all at once.

The files are safetensors of torch.distributed.checkpoint, without its index, which is a pickle. The
folder's own index and its reading: runtime/checkpoint/sharded.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from runtime.base.files import fsync_folder, sha256_of_file

# A file's tensors are in memory twice while it is written, so a rank writes several.
FILE_BYTES = 4 << 30


def write_files(
    folder: Path, groups: Mapping[str, Mapping[str, Tensor]], rank: int, world: int
) -> dict[str, tuple[int, str]]:
    """Write groups of tensors, each into a folder of its name; return this rank's files.

    A file is returned by its name in `folder`, with its bytes and its SHA-256. groups: DTensors, or
    tensors that all ranks have alike; on every rank the same names in the same order. world 1 needs
    no process group. Raise what a rank raised on every rank: OSError or ValueError, where it can.
    """
    found = {}
    for group, tensors in groups.items():
        own = folder / group
        own.mkdir(exist_ok=True)
        writer = dcp.HuggingFaceStorageWriter(
            str(own), fqn_to_index_mapping=_numbered(tensors, world), save_distributed=True
        )
        try:
            with warnings.catch_warnings():
                # That there is no process group.
                warnings.simplefilter("ignore")
                dcp.save(dict(tensors), storage_writer=writer, no_dist=world == 1)
        except CheckpointException as failed:
            raise _first_of(failed) from failed
        for path in sorted(own.glob(f"shard-{rank + 1:05d}-*.safetensors")):
            found[f"{group}/{path.name}"] = path.stat().st_size, sha256_of_file(path)
        fsync_folder(own)
    return found


def _numbered(tensors: Mapping[str, Tensor], world: int) -> dict[str, int]:
    """Return which of its files a rank writes each tensor to."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        rank_bytes = tensor.numel() * tensor.element_size() // world
        if size and size + rank_bytes > FILE_BYTES:
            number, size = number + 1, 0
        size += rank_bytes
        numbers[name] = number
    return numbers


def _first_of(failed: CheckpointException) -> Exception:
    """Return the error of the first rank that has one, with its number."""
    rank, (error, _) = min(failed.failures.items())
    if isinstance(error, OSError):
        line = f"{error.strerror or error} (rank {rank})"
        return OSError(error.errno or 0, line)
    return ValueError(f"rank {rank}: {type(error).__name__}: {error}")
