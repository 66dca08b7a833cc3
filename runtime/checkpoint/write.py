"""Write a checkpoint whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.files import TEMPORARY_SUFFIX, link_atomic, make_folder, write_atomic
from runtime.base.ranks import ONE_PROCESS, Ranks
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
    digest_of,
    digests_of,
    expected_tensors,
    header_digest,
    plain_values,
)
from runtime.checkpoint.optimizer_state import state_by_name


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

    Keep the `keep_last` newest step files (0 = all). `run`, `stage` and `tokenizer_state` are
    JSON-able.
    Tensors stay where they are: a few at a time are brought to the CPU, to be hashed and again to
    be written. Of a model with adapters (runtime/checkpoint/adapter.py) the file holds what its run
    trains, and the stage says which base it belongs to. Without an optimizer the file can be
    predicted from but not resumed. Raise CheckpointError, leaving nothing new, if a weight or
    moment is not finite or the disk is full.
    """
    folder = Path(ckpt_dir)
    path = folder / f"step_{step:07d}.pt"
    if adapter := adapter_of(model):
        stage = (stage or {}) | {KEY: adapter.header(folder)}
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
        )
        groups = {
            "model": saved_tensors(model),
            "optimizer": state_by_name(model, optimizer) if optimizer else {},
        }
        for name, tensor in groups["model"].items():
            if tensor.dtype != torch.float32:
                raise ValueError(f"checkpoints hold float32 weights, and {name} is {tensor.dtype}")
        make_folder(folder)
        _remove_leftovers(folder)
        check_disk_space(folder, sum(t.nbytes for group in groups.values() for t in group.values()))
        digests = digests_of(groups["model"], "model")
        digests |= digests_of(groups["optimizer"], "optimizer")
        groups = {
            group: {name: _own_storage(tensor) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        contents = {
            "step": step,
            **groups,
            **header,
            "digests": digests | {"header": header_digest(header)},
        }
        write_atomic(path, lambda file: _torch_save(contents, file))
        # Latest last: what it names knows that it is the best.
        for name in (BEST, LATEST) if is_best else (LATEST,):
            link_atomic(path, folder / name)
    except OSError as error:
        raise CheckpointError(
            path,
            f"cannot be written: {error.strerror or error}; free some space or choose another "
            "--ckpt_dir",
        ) from error
    except ValueError as error:
        raise CheckpointError(path, f"not written: {error}") from error
    _prune(folder, step, keep_last)
    return path


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
    step. Raise ValueError for a tensor of another shape or that is not finite.

    The file is laid out with holes, which the tensors fill as they are hashed. It is laid out again
    around them with their digests, which are as long as those they replace. (The zip's CRC-32 of
    the tensors stay 0: nothing reads them where there are digests.) What is left of a write that
    ends early is no checkpoint: `path` is a temporary name, see runtime/interop/export.py.
    """
    header = _header(config, tokenizer_state, run=run or {}, **values)
    expected = expected_tensors(config, dtype)
    digests = {f"model/{name}": f"{i:064x}" for i, name in enumerate(expected)}
    digests["header"] = header_digest(header)
    with open(path, "w+b") as file:
        _lay_out(file, header, expected, digests)
        offsets = _offsets(file)
        for i, (name, (shape, kind)) in enumerate(expected.items()):
            tensor = tensor_of(name)
            if tensor.shape != shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(shape)}")
            tensor = tensor.detach().to("cpu", kind).contiguous()
            digests[f"model/{name}"], finite = digest_of(tensor)
            if not finite:
                raise ValueError(f"{name} holds NaN or infinity")
            file.seek(offsets[f"archive/data/{i}"])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        _lay_out(file, header, expected, digests)
        assert _offsets(file) == offsets, "the digests moved the tensors"


def _lay_out(
    file, header: dict, expected: dict[str, tuple[torch.Size, torch.dtype]], digests: dict[str, str]
) -> None:
    """Write all of a checkpoint but its tensors, whose offsets in the file stay what they are."""
    # Here, because it takes a while and predict.py has no use for it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in expected.items()}
    contents = {"step": header["step"], "model": model, "optimizer": {}}
    contents |= {**header, "digests": digests}
    file.seek(0)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        _torch_save(contents, file)
    file.flush()


def _offsets(file) -> dict[str, int]:
    """Return where each record of a zip begins.

    That is after its local header of 30 bytes, its name and an extra field, whose lengths are at
    bytes 26 and 28 of the header.
    """
    offsets = {}
    for entry in zipfile.ZipFile(file).infolist():
        file.seek(entry.header_offset + 26)
        name_and_extra = sum(struct.unpack("<HH", file.read(4)))
        offsets[entry.filename] = entry.header_offset + 30 + name_and_extra
    return offsets


class _Sink:
    """A file whose first error (disk full, Ctrl-C) is kept.

    torch.save continues to close its zip and reports that failure instead.
    """

    def __init__(self, file):
        self.file = file
        self.error: BaseException | None = None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def seek(self, *where) -> int:
        return self.file.seek(*where)

    def flush(self) -> None:
        if self.error is None:
            self.file.flush()


def _torch_save(contents: dict, file) -> None:
    sink = _Sink(file)
    try:
        torch.save(contents, sink)  # type: ignore[arg-type]  # a file as far as torch.save asks
    except RuntimeError:
        if sink.error is not None:
            raise sink.error from None
        raise


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor if it fills its storage, else a copy: torch.save writes whole storages."""
    tensor = tensor.detach()
    fills = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if fills else tensor.clone(memory_format=torch.contiguous_format)


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
    for path in folder.glob(f"*.pt{TEMPORARY_SUFFIX}"):
        name = path.name.removesuffix(TEMPORARY_SUFFIX)
        if STEP_FILE.fullmatch(name) or name in (LATEST, BEST):
            path.unlink()


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
                path.unlink()
