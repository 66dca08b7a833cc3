"""Turn a checkpoint in a folder into one file, and a file into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from runtime.base.files import TEMPORARY_SUFFIX, make_folder
from runtime.checkpoint.adapter import KEY, Adapter
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import read_as_written
from runtime.checkpoint.sharded import is_folder
from runtime.checkpoint.write import check_disk_space, finish_folder, write_copy


def convert(source: Path, out: Path) -> str:
    """Write the other form of a checkpoint to a new path; return a line that says what it is.

    A file of ours becomes a folder, a folder a file. Raise CheckpointError, leaving nothing.
    """
    header, groups = read_as_written(source)
    if KEY in header.get("stage", {}):
        adapter, _ = Adapter.from_header(header["stage"][KEY])
        header["stage"] = header["stage"] | {KEY: adapter.header(out.parent)}
    try:
        if is_folder(source):
            write_copy(out, header, groups)
        else:
            _write_folder(out, header, groups)
    except OSError as error:
        raise CheckpointError(out, f"cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(out, f"not written: {error}") from error
    count = sum(map(len, groups.values()))
    form = "one file" if is_folder(source) else "a folder"
    return f"{form}, step {header['step']:,}, {count} tensors"


def _write_folder(out: Path, header: dict, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a folder, which has one shard of each tensor."""
    # Here, because nothing else in an export needs it.
    from runtime.distributed.sharded_checkpoint import write_files

    temporary = out.with_name(out.name + TEMPORARY_SUFFIX)
    make_folder(out.parent)
    size = sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
    check_disk_space(out.parent, size)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        finish_folder(temporary, out, header, write_files(temporary, groups, rank=0, world=1))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
