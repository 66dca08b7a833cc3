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

import torch
from torch import Tensor
from torch.optim import Optimizer

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.files import TEMPORARY_SUFFIX, link_atomic, make_folder, write_atomic
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
) -> Path:
    """Write step_0001000.pt, link latest.pt (and best.pt) to it, and prune to the `keep_last` newest step files (0 = all).

    `run` and `tokenizer_state` are JSON-able. Tensors stay where they are: a few at a time are brought to the CPU, to be hashed
    and again to be written. No optimizer makes a file that can be predicted from but not resumed. Raises CheckpointError,
    leaving nothing new behind, if a weight or moment is not finite or the disk is full.
    """
    folder = Path(ckpt_dir)
    path = folder / f"step_{step:07d}.pt"
    try:
        header = _header(
            model.config,
            tokenizer_state,
            step=step,
            val_loss=None if val_loss is None else float(val_loss),
            train_cfg=dataclasses.asdict(train_config),
            data_fingerprint=data_fingerprint,
            run=run or {},
        )
        groups = {
            "model": model.state_dict(),
            "optimizer": state_by_name(model, optimizer) if optimizer else {},
        }
        if wrong := [
            name for name, tensor in groups["model"].items() if tensor.dtype != torch.float32
        ]:
            raise ValueError(
                f"checkpoints hold float32 weights, and {wrong[0]} is {groups['model'][wrong[0]].dtype}"
            )
        make_folder(folder)
        _remove_leftovers(folder)
        check_disk_space(
            folder, sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
        )
        digests = digests_of(groups["model"], "model") | digests_of(
            groups["optimizer"], "optimizer"
        )
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
        for name in (
            (BEST, LATEST) if is_best else (LATEST,)
        ):  # latest last: what it names knows that it is the best
            link_atomic(path, folder / name)
    except OSError as error:
        raise CheckpointError(
            path,
            f"cannot be written: {error.strerror or error}; free some space or choose another --ckpt_dir",
        ) from error
    except ValueError as error:
        raise CheckpointError(path, f"not written: {error}") from error
    _prune(folder, step, keep_last)
    return path


def _header(config: ModelConfig, tokenizer_state: dict | None, **values) -> dict:
    """The header of a new file, checked. `values`: what differs from a file that holds nothing but weights."""
    header = plain_values(
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
) -> None:
    """Write a checkpoint of weights alone, one tensor in memory at a time: `tensor_of` is asked once for each name of LLM.state_dict().

    Parameters are stored in `dtype`, float32 or bfloat16, and buffers in float32. The file is laid out with holes, which the
    tensors fill as they are hashed, and laid out again around them with their digests, which are as long as those they replace. (The
    zip's CRC-32 of the tensors stay 0: nothing reads them where there are digests.) What is left of a write that ends early is no
    checkpoint: `path` is a temporary name, see runtime.export.staged. ValueError for a tensor of another shape or that is not finite.
    """
    header, expected = (
        _header(config, tokenizer_state, run=run or {}),
        expected_tensors(config, dtype),
    )
    digests = {f"model/{name}": f"{i:064x}" for i, name in enumerate(expected)} | {
        "header": header_digest(header)
    }
    with open(path, "w+b") as file:
        _lay_out(file, header, expected, digests)
        places = _places(file)
        for i, (name, (shape, kind)) in enumerate(expected.items()):
            tensor = tensor_of(name)
            if tensor.shape != shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(shape)}")
            tensor = tensor.detach().to("cpu", kind).contiguous()
            digests[f"model/{name}"], finite = digest_of(tensor)
            if not finite:
                raise ValueError(f"{name} holds NaN or infinity")
            file.seek(places[f"archive/data/{i}"])
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
        _lay_out(file, header, expected, digests)
        assert _places(file) == places, "the digests moved the tensors"


def _lay_out(
    file, header: dict, expected: dict[str, tuple[torch.Size, torch.dtype]], digests: dict[str, str]
) -> None:
    """Write all of a checkpoint but its tensors, whose places in the file stay what they are."""
    from torch._subclasses.fake_tensor import (
        FakeTensorMode,
    )  # takes a while, and predict.py has no use for it

    with FakeTensorMode():
        model = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in expected.items()}
    file.seek(0)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        _torch_save(
            {"step": header["step"], "model": model, "optimizer": {}, **header, "digests": digests},
            file,
        )
    file.flush()


def _places(file) -> dict[str, int]:
    """Where each record of a zip begins: behind its local header of 30 bytes, its name and an extra field (lengths at 26 and 28)."""
    places = {}
    for entry in zipfile.ZipFile(file).infolist():
        file.seek(entry.header_offset + 26)
        places[entry.filename] = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return places


class _Sink:
    """A file whose first error (disk full, Ctrl-C) is kept: torch.save goes on to close its zip and reports that failure instead."""

    def __init__(self, file):
        self.file, self.error = file, None

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
        torch.save(contents, sink)
    except RuntimeError:
        if sink.error is not None:
            raise sink.error from None
        raise


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor itself if it fills its storage, else a copy: torch.save writes whole storages."""
    tensor = tensor.detach()
    fills = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if fills else tensor.clone(memory_format=torch.contiguous_format)


def check_disk_space(folder: str | Path, tensor_bytes: int) -> None:
    """ValueError if a checkpoint with so many bytes of tensors does not fit the disk of `folder`, which need not exist yet."""
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed, free = tensor_bytes + (tensor_bytes >> 8) + (1 << 20), shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"a checkpoint needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: "
            "delete old checkpoints, lower --keep_last, or choose another --ckpt_dir"
        )


def _remove_leftovers(folder: Path) -> None:
    """Half-written files that a kill left under temporary names: each can be as large as a checkpoint."""
    for path in folder.glob(f"*.pt{TEMPORARY_SUFFIX}"):
        if STEP_FILE.fullmatch(path.name.removesuffix(TEMPORARY_SUFFIX)) or path.name.removesuffix(
            TEMPORARY_SUFFIX
        ) in (LATEST, BEST):
            path.unlink()


def _prune(folder: Path, step: int, keep_last: int) -> None:
    """Delete all but the `keep_last` step files that this run wrote last; latest.pt and best.pt keep what they name.

    Steps beyond `step` are left from before the run was resumed further back: they go first, or the file just written would.
    """
    names = {(folder / name).resolve() for name in (LATEST, BEST) if (folder / name).is_symlink()}
    files = sorted(step_files(folder), key=lambda file: (file[0] <= step, file[0]))
    for _, path in files[:-keep_last] if keep_last else []:
        if path.resolve() not in names:
            with contextlib.suppress(
                OSError
            ):  # Windows: another process has it open. What was to be saved is; the next save tries again
                path.unlink()
