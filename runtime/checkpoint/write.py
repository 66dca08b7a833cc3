"""Write a checkpoint whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.files import (
    TEMPORARY_SUFFIX,
    fsync_folder,
    link_atomic,
    make_folder,
    write_atomic,
    write_text_atomic,
)
from runtime.base.ranks import ONE_PROCESS, START_SECONDS, Ranks
from runtime.checkpoint.adapter import KEY, adapter_of, saved_tensors
from runtime.checkpoint.folder import (
    BEST,
    LATEST,
    STEP_FILE,
    step_files,
)
from runtime.checkpoint.format import (
    FORMAT,
    VERSION,
    CheckpointError,
    check_header,
    digests_of,
    expected_tensors,
    header_digest,
    plain_values,
)
from runtime.checkpoint.optimizer_state import state_by_name
from runtime.checkpoint.sharded import MANIFEST, like, manifest_text
from runtime.checkpoint.stream import Layout, stream, torch_save

# A single writer needs minutes for more, while all ranks wait.
LARGEST_FILE_BYTES = 100 * 10**9
# Between the name of a folder that is deleted and TEMPORARY_SUFFIX.
REMOVED = ".removed"


def save_checkpoint(
    ckpt_dir: str | Path,
    step: int,
    model: LLM,
    optimizer: Optimizer | None,
    *,
    train_config: TrainConfig,
    tokenizer_state: dict | None,
    data_fingerprint: str = "",
    val_loss: float | None = None,
    run: dict | None = None,
    keep_last: int = 0,
    is_best: bool = False,
    stage: dict | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Path:
    """Write step_0001000.pt and link latest.pt (and best.pt) to it; return its path.

    Or write step_0001000, a folder (sharded.py), if the train_config says so.

    Keep the `keep_last` newest step files (0 = all). `run`, `stage` and `tokenizer_state` are
    JSON-able.
    Tensors stay where they are: a few at a time are brought to the CPU, to be hashed and again to
    be written. Of a model with adapters (runtime/checkpoint/adapter.py) the file holds what its run
    trains, and the stage says which base it belongs to. Without an optimizer the file can be
    predicted from but not resumed. All ranks call this, and the first one writes: one whole tensor
    at a time, to which all of them give their parts. Raise CheckpointError on every rank, leaving
    nothing new, if a weight or moment is not finite or the disk is full.
    """
    folder = Path(ckpt_dir)
    path = folder / f"step_{step:07d}.pt"
    write = _write
    if adapter := adapter_of(model):
        stage = (stage or {}) | {KEY: adapter.header(folder)}
    # The ranks wait for the first one's disk, or for the slowest. On GPUs, where they ask for all
    # tensors at once, they do so from the first tensor on.
    before = ranks.wait_at_most(START_SECONDS)
    try:
        header = _header(
            model.config,
            tokenizer_state,
            step=step,
            val_loss=None if val_loss is None else float(val_loss),
            train_cfg=dataclasses.asdict(train_config),
            data_fingerprint=data_fingerprint,
            run=run or {},
            **({"stage": stage} if stage else {}),
            **({"world": ranks.world} if ranks.world > 1 else {}),
        )
        groups = {
            "model": saved_tensors(model),
            "optimizer": state_by_name(model, optimizer) if optimizer else {},
        }
        for name, tensor in groups["model"].items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"checkpoints hold float32 weights, and {name} is {tensor.dtype}")
        if is_in_shards(train_config.checkpoint, tensor_bytes(_layout(groups, ranks)), ranks):
            path, write = path.with_suffix(""), _write_folder
        write(path, header, groups, BEST if is_best else "", ranks)
    except OSError as error:
        raise CheckpointError(
            path,
            f"cannot be written: {error.strerror or error}; free some space or choose another "
            "--ckpt_dir",
        ) from error
    except ValueError as error:
        raise CheckpointError(path, f"not written: {error}") from error
    finally:
        ranks.wait_at_most(before)
    if ranks.is_first:
        _remove_other_form(path)
        _prune(folder, step, keep_last)
    return path


def _write(path: Path, header: dict, groups: dict[str, dict], best: str, ranks: Ranks) -> None:
    """Write a file and its names on the first rank; raise its error, if any, on every rank.

    The other ranks wait for each tensor, so the first asks for all of them even after an error.
    """
    wholes = (ranks.whole(tensor) for named in groups.values() for tensor in named.values())
    failure = None
    if ranks.is_first:
        try:
            _write_first(path, header, groups, wholes, ranks)
            # Latest last: what it names knows that it is the best.
            for name in filter(None, (best, LATEST)):
                link_atomic(path, path.with_name(name))
        except (OSError, ValueError) as error:
            failure = error
    for _ in wholes:
        pass

    def outcome() -> None:
        if failure is not None:
            raise failure

    ranks.from_first(outcome)


def is_in_shards(checkpoint: str, size_bytes: int, ranks: Ranks) -> bool:
    """Return whether a checkpoint is written as a folder. checkpoint: as in TrainConfig."""
    if checkpoint == "auto":
        return ranks.world > 1 and size_bytes > LARGEST_FILE_BYTES
    return checkpoint == "sharded"


def _write_folder(
    path: Path, header: dict, groups: dict[str, dict], best: str, ranks: Ranks
) -> None:
    """Write a folder and its names, each rank its part; raise on every rank what one raises."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)

    def begin() -> None:
        make_folder(path.parent)
        _remove_leftovers(path.parent)
        check_disk_space(path.parent, tensor_bytes(_layout(groups, ranks)))
        temporary.mkdir()

    def check_finite() -> None:
        for group, tensors in groups.items():
            # The digests are not needed: of parts, they depend on how many there are.
            digests_of({name: ranks.local(tensor) for name, tensor in tensors.items()}, group)

    def finish() -> None:
        finish_folder(temporary, path, header, files)
        for name in filter(None, (best, LATEST)):
            link_atomic(path, path.with_name(name))

    try:
        ranks.from_first(begin)
        ranks.together(check_finite)
        files = ranks.write_files(temporary, groups)
        ranks.from_first(finish)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def finish_folder(
    temporary: Path, path: Path, header: dict, files: dict[str, tuple[int, str]]
) -> None:
    """Make a checkpoint of a folder that has all tensors (Ranks.write_files), and name it."""
    write_text_atomic(temporary / MANIFEST, manifest_text(header, files))
    if path.is_dir():
        # From before the run was resumed further back.
        _remove(path)
    os.replace(temporary, path)
    fsync_folder(path.parent)


def write_copy(path: Path, header: dict, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a checkpoint's header and tensors (read_as_written) into a file, one at a time."""
    layout: Layout = {
        group: {
            name: (found.shape, found.dtype) for name in tensors for found in [like(tensors, name)]
        }
        for group, tensors in groups.items()
    }
    check_disk_space(path.parent, tensor_bytes(layout))
    given = (tensors[name] for tensors in groups.values() for name in tensors)
    write_atomic(path, lambda file: stream(file, header, layout, given))


def _layout(groups: dict[str, dict[str, Tensor]], ranks: Ranks) -> Layout:
    """Return what a file of these tensors holds."""
    return {
        group: {name: (ranks.shape_of(tensor), tensor.dtype) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def _write_first(
    path: Path,
    header: dict,
    groups: dict[str, dict[str, Tensor]],
    wholes: Iterator[Tensor],
    ranks: Ranks,
) -> None:
    """Write a file: from whole tensors in memory, or one whole of shards after the other."""
    layout, folder = _layout(groups, ranks), path.parent
    make_folder(folder)
    _remove_leftovers(folder)
    check_disk_space(folder, tensor_bytes(layout))
    if any(ranks.is_split(tensor) for named in groups.values() for tensor in named.values()):
        write_atomic(path, lambda file: stream(file, header, layout, wholes))
        return
    digests = {"header": header_digest(header)}
    for group, tensors in groups.items():
        digests |= digests_of(tensors, group)
    own = {
        group: {name: _own_storage(tensor) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }
    contents = {"step": header["step"], **own, **header, "digests": digests}
    write_atomic(path, lambda file: torch_save(contents, file))


def _header(config: ModelConfig, tokenizer_state: dict | None, **values) -> dict:
    """Return the header of a new file, checked.

    values: what differs from a file that holds nothing but weights.
    """
    header: Any = plain_values(
        {
            "step": 0,
            "val_loss": None,
            "cfg": dataclasses.asdict(config),
            "format": FORMAT,
            "version": VERSION,
            "train_cfg": {},
            "tokenizer": tokenizer_state,
            "data_fingerprint": "",
            "run": {},
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }
        | values
    )
    check_header(header)
    return header


def write_weights(
    path: str | Path,
    config: ModelConfig,
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype = torch.float32,
    tokenizer_state: dict | None = None,
    run: dict | None = None,
    **values,
) -> None:
    """Write a checkpoint of weights alone, with one tensor in memory at a time.

    `tensor_of` is asked once for each name of LLM.state_dict(). Parameters are stored in `dtype`,
    float32 or bfloat16, and buffers in float32. `values` are further entries of the header, such as
    step. Raise ValueError for a tensor of another shape or that is not finite. `path` is a
    temporary name (runtime/interop/export.py): what a write that ends early leaves is no
    checkpoint.
    """
    header = _header(config, tokenizer_state, run=run or {}, **values)
    expected = expected_tensors(config, dtype)
    with open(path, "wb") as file:
        stream(file, header, {"model": expected, "optimizer": {}}, map(tensor_of, expected))


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor if it fills its storage, else a copy: torch.save writes whole storages."""
    tensor = tensor.detach()
    fills = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if fills else tensor.clone(memory_format=torch.contiguous_format)


def tensor_bytes(layout: Layout) -> int:
    """Return the bytes of all tensors that a layout describes."""
    return sum(
        shape.numel() * dtype.itemsize
        for named in layout.values()
        for shape, dtype in named.values()
    )


def check_disk_space(folder: str | Path, tensor_bytes: int) -> None:
    """Raise ValueError if a checkpoint with so many bytes of tensors does not fit the disk.

    folder: where it is to be written; it need not exist yet.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    # The pickle, the zip's directory and the header in addition.
    needed = tensor_bytes + (tensor_bytes >> 8) + (1 << 20)
    if needed > free:
        raise ValueError(
            f"a checkpoint needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: "
            "delete old checkpoints, lower --keep_last, or choose another --ckpt_dir"
        )


def _remove_leftovers(folder: Path) -> None:
    """Delete half-written files that a kill left: each can be as large as a checkpoint."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        name = path.name.removesuffix(TEMPORARY_SUFFIX).removesuffix(REMOVED)
        if STEP_FILE.fullmatch(name) or name in (LATEST, BEST):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a file or folder. What a kill leaves of a folder has a temporary name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.endswith(TEMPORARY_SUFFIX):
        path = path.rename(path.with_name(path.name + REMOVED + TEMPORARY_SUFFIX))
    shutil.rmtree(path)


def _remove_other_form(path: Path) -> None:
    """Delete the folder of a step that was written as a file now, or the file of a folder.

    It is from before the run was resumed further back, and a resume would not know which to take.
    """
    other = path.with_suffix("" if path.suffix else ".pt")
    if os.path.lexists(other):
        best = path.with_name(BEST)
        if best.is_symlink() and best.resolve() == other.resolve():
            link_atomic(path, best)
        with contextlib.suppress(OSError):
            _remove(other)


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """Delete all but the `keep_last` step files that this run wrote last.

    latest.pt and best.pt keep what they name. Steps beyond `step` are left from before the run was
    resumed further back: they go first, or the file just written would.
    """
    names = {(folder / name).resolve() for name in (LATEST, BEST) if (folder / name).is_symlink()}
    files = sorted(step_files(folder), key=lambda file: (file[0] <= step, file[0]))
    for _, path in files[:-keep_last] if keep_last else []:
        if path.resolve() not in names:
            # On Windows another process may have it open. The next save tries again.
            with contextlib.suppress(OSError):
                _remove(path)
