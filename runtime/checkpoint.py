"""Checkpoints: one file from which a run goes on bit for bit, that cannot be half written, and that is believed only when checked.

A checkpoint is a `torch.save` zip of a dict that can be read by hand:

    step, model {name: float32}, optimizer {"exp_avg.NAME": tensor}, val_loss, cfg     what the reference wrote, under its names
                                                                                      (weights alone may be bfloat16)
    format, version, train_cfg, tokenizer, data_fingerprint, run, versions             what a resume needs besides
    digests {"model/NAME": sha256, "optimizer/NAME": sha256, "header": sha256}         header: everything that is no tensor

A file is never trusted: it may be cut short, flipped by a bad disk, or made to do harm. Its pickle is scanned before it is
loaded, by `torch.load(weights_only=True)` on a private map of the file; the config is compared with the tensors before
anything is allocated; digests are checked for what is read, so predicting does not read the optimizer's two thirds.
Whatever is wrong is a `CheckpointError` of one line. Files of the reference's format are converted as they are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pickletools
import platform
import re
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from config_model import ModelConfig, TrainConfig, total_parameters
from model import LLM
from runtime import hf_tokenizer
from runtime.data import MANIFEST, TokenShards
from runtime.files import TEMPORARY_SUFFIX, link_atomic, make_folder, write_atomic
from runtime.optimizer import check_tensors, load_state_by_name, state_by_name
from runtime.tokenizer import NAMED, Tokenizer, load_tokenizer

FORMAT, VERSION = "gptoss-checkpoint", 1
LATEST, BEST = "latest.pt", "best.pt"
STEP_FILE = re.compile(r"step_(\d{7,})\.pt")
# What a header holds, by key; with model, optimizer and digests that is the whole file.
HEADER = {
    "step": int,
    "val_loss": (float, type(None)),
    "cfg": dict,
    "format": str,
    "version": int,
    "train_cfg": dict,
    "tokenizer": (dict, type(None)),
    "data_fingerprint": str,
    "run": dict,
    "versions": dict,
}
TENSOR_KEYS = ("model", "optimizer", "digests")

CHUNK_ELEMENTS = 1 << 20  # hashed and checked for NaN at a time: stays in the cache between the two
HEADER_LIMIT = (
    1 << 26
)  # characters, and VALUE_COST for each value; a 200k-token vocabulary in base64 is 4 M
VALUE_COST = 32  # a value takes some 80 bytes and half a microsecond to look at: 64 M of them were 5 GB and a minute
PICKLE_LIMIT_BYTES = 1 << 28
DEPTH_LIMIT = 64
OUT_OF_ADDRESSES = "Cannot allocate memory"  # in PyTorch's words for a map that the system refuses
# All that the pickle of a checkpoint may name. weights_only allows more, e.g. bytearray(10**12) and storages of any size.
PICKLE_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage"
    for kind in (
        "Float",
        "Double",
        "Half",
        "BFloat16",
        "Long",
        "Int",
        "Short",
        "Char",
        "Byte",
        "Bool",
    )
}
PICKLE_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line that names the file and the reason."""

    def __init__(self, path: Path | str, reason: object):
        line = " ".join(
            f"{path}: {reason}".split()
        )  # a hostile file must not write to the terminal
        line = "".join(c if c.isprintable() else "?" for c in line)
        super().__init__(line if len(line) <= 600 else line[:600] + " ...")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, checked. Tensors are on the CPU and mapped: private pages of the file, read when touched, never written."""

    path: Path
    step: int  # optimizer steps done
    model_config: ModelConfig
    model: dict[
        str, Tensor
    ]  # under the names of LLM.state_dict(); float32, or all parameters bfloat16 (buffers never)
    optimizer: (
        dict[str, Tensor] | None
    )  # as runtime.optimizer.state_by_name; None if it was not asked for
    val_loss: (
        float | None
    )  # cross-entropy in nats (in the reference's files: its auxiliary loss included)
    train_config: dict  # fields of TrainConfig; empty in the reference's format
    tokenizer_state: dict | None  # for Tokenizer.from_state
    data_fingerprint: str
    run: dict  # what the trainer put there
    versions: dict  # of torch and Python, when it was written
    is_reference_format: bool
    # Of the digests of all that the file holds; "" in the reference's format, which has none.
    digest: str = ""


# ---------------------------------------------------------------------------------------------------------------- writing
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
        digests = _digests(groups["model"], "model") | _digests(groups["optimizer"], "optimizer")
        groups = {
            group: {name: _own_storage(tensor) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        contents = {
            "step": step,
            **groups,
            **header,
            "digests": digests | {"header": _header_digest(header)},
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
    header = _plain(
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
    _check_header(header)
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
    header, expected = _header(config, tokenizer_state, run=run or {}), _expected(config, dtype)
    digests = {f"model/{name}": f"{i:064x}" for i, name in enumerate(expected)} | {
        "header": _header_digest(header)
    }
    with open(path, "w+b") as file:
        _lay_out(file, header, expected, digests)
        places = _places(file)
        for i, (name, (shape, kind)) in enumerate(expected.items()):
            tensor = tensor_of(name)
            if tensor.shape != shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {list(shape)}")
            tensor = tensor.detach().to("cpu", kind).contiguous()
            digests[f"model/{name}"], finite = _digest(tensor)
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


def step_files(ckpt_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the step files in a folder, oldest step first. Other files, however similar their names, are not ours."""
    if not Path(ckpt_dir).is_dir():
        return []
    return sorted(
        (int(match[1]), path)
        for path in Path(ckpt_dir).iterdir()
        if (match := STEP_FILE.fullmatch(path.name))
    )


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


# ------------------------------------------------------------------------------------------------------- digests and header
def _digests(
    tensors: dict[str, Tensor], group: str, recorded: dict | None = None
) -> dict[str, str]:
    """SHA-256 of every tensor as {"GROUP/NAME": digest}, one thread each (hashing frees the interpreter lock).

    ValueError where one is not what was `recorded`, or is not finite.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    for name, (digest, _) in results.items():
        if recorded is not None and recorded.get(f"{group}/{name}") != digest:
            raise ValueError(f"damaged: {group} tensor {name} does not match its digest")
    if bad := [name for name, (_, finite) in results.items() if not finite]:
        raise ValueError(
            f"{group} tensor {bad[0]} holds NaN or infinity"
            + (f", and so do {len(bad) - 1} more" if len(bad) > 1 else "")
        )
    return {f"{group}/{name}": digest for name, (digest, _) in results.items()}


def _digest(tensor: Tensor) -> tuple[str, bool]:
    """SHA-256 in hex over dtype, shape and bytes, and whether every value is finite. A GPU tensor is copied, a CPU tensor is not."""
    digest, finite = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode()), True
    for chunk in tensor.detach().cpu().contiguous().reshape(-1).split(CHUNK_ELEMENTS):
        digest.update(chunk.view(torch.uint8).numpy())  # as bytes: bfloat16 has no numpy dtype
        values = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
        finite = finite and bool(np.isfinite(values.numpy()).all())
    return digest.hexdigest(), finite


def _plain(header: object) -> object:
    """`header` as plain str, int, float, bool, None, list and dict; ValueError for what JSON cannot hold or what is too large.

    The limit counts what is visited, so lists that contain one another many times over (a small file) end here as well.
    """
    left = HEADER_LIMIT

    def visit(value, where: str, depth: int):
        nonlocal left
        left -= VALUE_COST + (len(value) if isinstance(value, str) else 0)
        if left < 0 or depth > DEPTH_LIMIT:
            raise ValueError(f"header is too large or nested too deeply at {where}")
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) is bool:
            return value
        if isinstance(value, int) and abs(value) >= 1 << 256:
            raise ValueError(f"{where} is an integer of {value.bit_length()} bits")
        for kind in (str, int, float):
            if isinstance(value, kind):
                return kind(value)  # a subclass would name its class in the pickle
        if isinstance(value, (list, tuple)):
            return [visit(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"{where} has the key {odd[0]!r:.40}, which is no text")
            return {
                visit(key, where, depth): visit(item, f"{where}.{key}"[-80:], depth + 1)
                for key, item in value.items()
            }
        raise ValueError(f"{where} is of type {type(value).__name__}, which JSON cannot hold")

    return visit(header, "header", 0)


def _header_digest(header: dict) -> str:
    return hashlib.sha256(
        json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _check_header(header: dict) -> None:
    """ValueError unless every header key is there, of its type, and the step is possible."""
    for key, kinds in HEADER.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if key not in header:
            raise ValueError(f"{key} is missing")
        if type(header[key]) not in kinds:  # type(), not isinstance: True is no step
            raise ValueError(
                f"{key} must be of type {' or '.join(k.__name__ for k in kinds)}, not {type(header[key]).__name__}"
            )
    if not 0 <= header["step"] < 1 << 63:
        raise ValueError(f"step must be at least 0, not {header['step']}")


# ---------------------------------------------------------------------------------------------------------------- reading
def read_checkpoint(
    path: str | Path, optimizer: bool = False, read_only: bool = False
) -> Checkpoint:
    """Read and check a file of our format or the reference's. Raises CheckpointError (one line) for whatever is wrong with it.

    Checked: the zip, the pickle, every key and type, the config against the tensors, and digests and finiteness of what is
    read: the model always, the optimizer if it is asked for. Tensors are mapped, not copied (stacked experts of the
    reference's format are). The reference's optimizer state cannot be converted: asking for it is an error. read_only: the
    caller promises to write to no tensor, and a file larger than memory and swap can then be read too (see _load_mapped).
    """
    path = Path(path)
    contents, records = _unpack(path, read_only)
    try:
        read = _read_ours if "format" in contents else _read_reference
        return read(path, contents, records, optimizer)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(path, error) from error


def read_config(path: str | Path) -> ModelConfig:
    """The configuration in a file of either format. No weight is read, so it takes no longer for 44 GB. Raises CheckpointError."""
    path = Path(path)
    contents, _ = _unpack(path)
    try:
        return (
            _config(_read_header(contents)["cfg"])
            if "format" in contents
            else reference_config(_plain(_dict(contents, "cfg")))
        )
    except ValueError as error:
        raise CheckpointError(path, error) from error


def _unpack(path: Path, read_only: bool = False) -> tuple[dict, set[tuple[int, int]]]:
    """The dict in the file, and (bytes, CRC-32) of its records. Every reader's failure becomes a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            path,
            "is a directory or device, not a checkpoint file" if path.exists() else "no such file",
        )
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"PK\3\4":
            raise ValueError(
                "the file is empty" if not magic else "not a checkpoint (no torch.save zip)"
            )
        records = _scan_zip(path)
        contents = _load_mapped(path, read_only)
    except (zipfile.BadZipFile, UnicodeError) as error:
        raise CheckpointError(path, f"damaged or cut short: {error}") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(path, error) from error
    except Exception as error:  # zipfile, pickle and torch raise nearly everything on damaged input; the cause is kept
        if OUT_OF_ADDRESSES in str(error):
            raise CheckpointError(
                path,
                f"has {path.stat().st_size / 1e9:.1f} GB, which this machine's memory and swap cannot hold",
            ) from error
        raise CheckpointError(
            path, f"damaged, or no checkpoint: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not isinstance(contents, dict):
        raise CheckpointError(
            path, f"not a checkpoint: it holds a {type(contents).__name__}, not a dict"
        )
    return contents, records


def _load_mapped(path: Path, read_only: bool) -> object:
    """The file's contents, tensors mapped: privately, so that training on one never reaches the file. Linux refuses that for a file larger
    than memory and swap; with `read_only` it is then shared, and who wrote to a tensor all the same would write to the file."""
    kinds = (
        []
        if sys.platform == "win32"
        else [mmap.MAP_PRIVATE, *([mmap.MAP_SHARED] if read_only else [])]
    )
    for kind in kinds or [None]:
        try:
            with (
                contextlib.nullcontext()
                if kind is None
                else torch.serialization.set_default_mmap_options(kind)
            ):
                return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as error:
            if OUT_OF_ADDRESSES not in str(error) or kind in (None, kinds[-1]):
                raise


def _scan_zip(path: Path) -> set[tuple[int, int]]:
    """Refuse zips that torch.save did not write and pickles that name anything but tensors; (bytes, CRC-32) of the records."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(
                "not a checkpoint: its zip is compressed, and torch.save does not compress"
            )
        if sum(entry.file_size for entry in entries) > path.stat().st_size or len(
            {entry.filename for entry in entries}
        ) < len(entries):
            raise ValueError("damaged or forged: its zip claims more than the file holds")
        pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT_BYTES:
            raise ValueError("not a checkpoint: its zip has no data.pkl of a sensible size")
        if any(entry.filename.split("/")[1:] == ["constants.pkl"] for entry in entries):
            raise ValueError("refused: a TorchScript archive, which holds code")
        for opcode, argument, _ in pickletools.genops(
            archive.read(pickles[0])
        ):  # reads the opcodes, executes nothing
            if (
                opcode.name in PICKLE_FORBIDDEN
                or opcode.name == "GLOBAL"
                and argument not in PICKLE_GLOBALS
            ):
                raise ValueError(
                    f"refused: a checkpoint holds tensors and plain values, and this file's pickle asks for {argument or opcode.name}"
                )
        return {(entry.file_size, entry.CRC) for entry in entries}


def _read_header(contents: dict) -> dict:
    """Everything in our format that is no tensor, checked against its digest."""
    header = _plain({key: value for key, value in contents.items() if key not in TENSOR_KEYS})
    if header["format"] != FORMAT:
        raise ValueError(
            f"not a checkpoint: its format is {header['format']!r:.60}, not {FORMAT!r}"
        )
    if type(version := header.get("version")) is int and version > VERSION:
        raise ValueError(
            f"written in format version {version}, and this program reads up to {VERSION}: update gptoss"
        )
    _check_header(header)
    if header["version"] != VERSION:
        raise ValueError(f"version must be {VERSION}, not {header['version']}")
    if extra := header.keys() - HEADER.keys():
        raise ValueError(f"unknown key {min(extra)!r:.60}")
    if _plain(_dict(contents, "digests")).get("header") != _header_digest(header):
        raise ValueError("damaged: the header does not match its digest")
    return header


def _read_ours(path: Path, contents: dict, records: set, optimizer: bool) -> Checkpoint:
    header, digests = _read_header(contents), contents["digests"]
    config = _config(header["cfg"])
    file_bytes = path.stat().st_size
    model = _tensors(_dict(contents, "model"), "model", file_bytes)
    is_bfloat16 = "embed.weight" in model and model["embed.weight"].dtype == torch.bfloat16
    check_tensors(
        _expected(config, torch.bfloat16 if is_bfloat16 else torch.float32, file_bytes),
        model,
        "model",
    )
    state = None
    if optimizer:
        state = _tensors(_dict(contents, "optimizer"), "optimizer", file_bytes)
        if not state:
            raise ValueError(
                "holds weights but no optimizer state, so training cannot be resumed from it: start a new run with --init_from"
            )
    _digests(model, "model", digests)
    _digests(state or {}, "optimizer", digests)
    return Checkpoint(
        path,
        header["step"],
        config,
        model,
        state,
        header["val_loss"],
        header["train_cfg"],
        header["tokenizer"],
        header["data_fingerprint"],
        header["run"],
        header["versions"],
        False,
        hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
    )


def _dict(contents: dict, key: str) -> dict:
    if not isinstance(value := contents.get(key), dict):
        raise ValueError(
            f"{key} is missing"
            if key not in contents
            else f"{key} must be a dict, not {type(value).__name__}"
        )
    return value


def _config(fields: dict) -> ModelConfig:
    """ModelConfig from a file: no field unknown, each valid. A field that the file's version did not have takes its default, so
    a new field must default to what the model did before it."""
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(ModelConfig)}:
        raise ValueError(f"cfg has unknown {min(unknown)!r:.60}")
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"cfg: {error}") from error


def _tensors(given: dict, group: str, file_bytes: int) -> dict[str, Tensor]:
    """The group with plain, dense, contiguous tensors that fit into the file; ValueError for anything else, e.g. stride 0."""
    for name, tensor in given.items():
        if type(name) is not str or type(tensor) is not Tensor:
            raise ValueError(
                f"{group} must map names to tensors, not {name!r:.60} to a {type(tensor).__name__}"
            )
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
            or tensor.is_neg()
            or tensor.is_conj()
        ):
            raise ValueError(f"{group} tensor {name} is not a plain, contiguous tensor")
    if sum(tensor.nbytes for tensor in given.values()) > file_bytes:
        raise ValueError(f"{group} tensors claim more than the file holds")
    return {name: tensor.detach() for name, tensor in given.items()}


def _expected(
    config: ModelConfig, dtype: torch.dtype, file_bytes: int | None = None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and dtypes that a config implies where parameters are kept in `dtype`, from the module itself on the meta device; a
    config beyond the file is refused first."""
    if file_bytes is not None and dtype.itemsize * total_parameters(config) > file_bytes:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"cfg describes {total_parameters(config):,} {kind} parameters, more than the file's {file_bytes:,} bytes hold"
        )
    model = meta_model(config)
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: (tensor.shape, dtype if name in parameters else torch.float32)
        for name, tensor in model.state_dict().items()
    }


# ------------------------------------------------------------------------------------------------- the reference's format
REFERENCE_FIELDS = (
    "d_model",
    "dropout",
    "context_length",
    "vocabulary_size",
    "num_heads",
    "transformer_blocks",
    "num_kv_heads",
    "qkv_bias",
    "use_rope",
    "use_attention_bias",
    "d_ff",
    "num_experts",
    "top_k",
    "aux_loss_coef",
    "capacity_factor",
)
REFERENCE_EXPERT_NAMES = {
    "w_in": "fc1.weight",
    "b_in": "fc1.bias",
    "w_out": "fc2.weight",
    "b_out": "fc2.bias",
}
REFERENCE_TABLES = (".gqa.cos_cached", ".gqa.sin_cached")  # RoPE tables: computed here, not stored


def _expected_shapes(config: ModelConfig, file_bytes: int) -> dict[str, torch.Size]:
    return {
        name: shape for name, (shape, _) in _expected(config, torch.float32, file_bytes).items()
    }


def _read_reference(path: Path, contents: dict, records: set, optimizer: bool) -> Checkpoint:
    """A checkpoint of the reference, under our names. It has no digests, so the zip's CRC-32 of every weight is checked instead."""
    fields = _plain(_dict(contents, "cfg"))
    header = _plain({key: contents.get(key) for key in ("step", "val_loss")})
    if (
        type(header["step"]) is not int
        or header["step"] < 0
        or not isinstance(header["val_loss"], (float, type(None)))
    ):
        raise ValueError(
            f"step must be an integer of at least 0 and val_loss a number or None, not {header['step']!r:.40} and {header['val_loss']!r:.40}"
        )
    if optimizer:
        raise ValueError(
            "is in the reference's format, whose optimizer state cannot be continued: start a new run from it with --init_from"
        )
    config = reference_config(fields)
    given = _tensors(_dict(contents, "model"), "model", path.stat().st_size)
    given = {name.removeprefix("_orig_mod."): tensor for name, tensor in given.items()}
    expected = _expected_shapes(config, path.stat().st_size)
    sources = {name: _reference_sources(name, config.num_experts) for name in expected}
    shapes = {
        source: _reference_shape(name, shape)
        for name, shape in expected.items()
        for source in sources[name]
    }
    weights = {
        name: tensor for name, tensor in given.items() if not name.endswith(REFERENCE_TABLES)
    }
    check_tensors(
        {name: (shape, torch.float32) for name, shape in shapes.items()}, weights, "model"
    )
    _digests(weights, "model")
    for name, tensor in weights.items():
        if (tensor.nbytes, zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())) not in records:
            raise ValueError(f"damaged: model tensor {name} does not match the zip's checksum")
    model = {
        name: torch.stack([weights[source] for source in names])
        if len(names) > 1 or ".experts." in name
        else weights[names[0]].reshape(expected[name])
        for name, names in sources.items()
    }
    return Checkpoint(
        path, header["step"], config, model, None, header["val_loss"], {}, None, "", {}, {}, True
    )


def reference_config(fields: dict) -> ModelConfig:
    """Our config of the reference's: the same function, loss included.

    Its auxiliary loss counts a token once per chosen expert and so is top_k at balance where ours is 1: the coefficient
    takes the factor. Its capacity rule forgets top_k and drops tokens of balanced batches: weights are used dropless.
    """
    if set(fields) != set(REFERENCE_FIELDS):
        raise ValueError(
            f"cfg has the fields {', '.join(sorted(fields))[:200]}, and the reference's has {', '.join(REFERENCE_FIELDS)}"
        )
    try:
        config = ModelConfig(
            **{**fields, "capacity_factor": 0.0},
            expert_activation="gelu",
            expert_bias=True,
            out_proj_bias=True,
            head_bias=True,
            tie_embeddings=False,
            rms_norm_eps=2.0**-23,
        )
        return dataclasses.replace(config, aux_loss_coef=config.aux_loss_coef * config.top_k)
    except ValueError as error:
        raise ValueError(f"cfg: {error}") from error


def _reference_sources(name: str, num_experts: int) -> list[str]:
    """The reference's names of what one tensor of ours is made of: one, or one per expert."""
    stem, _, leaf = name.rpartition(".")
    if stem.endswith(".moe.experts"):
        return [f"{stem}.{expert}.{REFERENCE_EXPERT_NAMES[leaf]}" for expert in range(num_experts)]
    return [
        name.replace(".attention.", ".gqa.").replace(".moe.router.weight", ".moe.router.W_r.weight")
    ]


def _reference_shape(name: str, shape: torch.Size) -> torch.Size:
    if ".moe.experts." in name:
        return shape[1:]
    return torch.Size((1, *shape)) if name.endswith(".attention_bias") else shape


# ------------------------------------------------------------------------------------------------------------ into a model
def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LLM, Checkpoint]:
    """A model in eval mode on `device`, its parameters in `dtype`, and the checkpoint that it came from. Raises CheckpointError."""
    checkpoint = read_checkpoint(path)
    return build_model(checkpoint, device, dtype), checkpoint


class _WithoutRandomNumbers(TorchFunctionMode):
    """Leaves out the initial weights of modules: on the meta device they are nothing, but to draw them PyTorch imports its compiler, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig) -> LLM:
    """A model of shapes alone."""
    with torch.device("meta"), _WithoutRandomNumbers():
        return LLM(config)


def build_model(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LLM:
    """A model in eval mode with the checkpoint's weights, tensor by tensor from the map to `device` and `dtype`: there is no
    second copy of it at any time. On the CPU in float32 the parameters stay mapped: pages are read when used and copied
    when written, so training on them is safe and the file is not changed. Buffers keep float32."""
    model = meta_model(checkpoint.model_config)
    parameters = {name for name, _ in model.named_parameters()}
    model.load_state_dict(
        {
            name: tensor.to(device=device, dtype=dtype if name in parameters else tensor.dtype)
            for name, tensor in checkpoint.model.items()
        },
        assign=True,
    )
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), (
        "the model has tensors that no checkpoint holds"
    )
    return model.eval()


def load_training_state(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer) -> None:
    """Copy weights and optimizer state into a model and its AdamW, wherever they are. All is checked before anything is changed."""
    if checkpoint.optimizer is None:
        raise CheckpointError(checkpoint.path, "was read without its optimizer state")
    try:
        own = model.state_dict()
        check_tensors(
            {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()},
            checkpoint.model,
            "model",
        )
        load_state_by_name(model, optimizer, checkpoint.optimizer)
        model.load_state_dict(checkpoint.model)
    except ValueError as error:
        raise CheckpointError(checkpoint.path, f"does not fit this model: {error}") from error


# ---------------------------------------------------------------------------------------------------------- its tokenizer
def tokenizer_of(checkpoint: Checkpoint, name: str = "") -> Tokenizer:
    """The checkpoint's tokenizer; `name` (see named_tokenizer) only where it carries none. ValueError if they do not go together."""
    path, vocabulary = checkpoint.path, checkpoint.model_config.vocabulary_size
    if checkpoint.tokenizer_state:
        tokenizer = Tokenizer.from_state(checkpoint.tokenizer_state)
        if name and named_tokenizer(name).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{path} was trained with tokenizer {tokenizer.name}, not {name}: leave --tokenizer out"
            )
    elif (
        name or vocabulary == 200_019
    ):  # the reference's checkpoints name none and always are o200k_base
        tokenizer = named_tokenizer(name or "o200k_base")
    else:
        raise ValueError(
            f"{path} does not say which tokenizer it was trained with (vocabulary {vocabulary:,}): name it with --tokenizer"
        )
    if tokenizer.vocabulary_size > vocabulary:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocabulary_size:,} ids and the model in {path} {vocabulary:,}: "
            "give the one that it was trained with"
        )
    return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, or that of what is there under this path: a folder with shards (data, or data/train) or of a published
    model, or a checkpoint, of which no weight is read. Raises ValueError."""
    if name in (*NAMED, "byte") or not os.path.exists(name):
        return load_tokenizer(name)
    folder = Path(name)
    if folder.is_file():
        contents, _ = _unpack(folder, read_only=True)
        try:
            state = _read_header(contents)["tokenizer"] if "format" in contents else None
            if not state:
                raise ValueError("does not say which tokenizer it was trained with")
            return Tokenizer.from_state(state)
        except ValueError as error:
            raise CheckpointError(folder, error) from error
    if (
        not any((place / MANIFEST).exists() for place in (folder, folder / "train"))
        and (folder / hf_tokenizer.TOKENIZER_FILE).exists()
    ):
        return hf_tokenizer.read_tokenizer(folder)
    shards = TokenShards(folder if (folder / MANIFEST).exists() else folder / "train", verify=False)
    return Tokenizer.from_state(shards.tokenizer_state)


# ------------------------------------------------------------------------------------------------------------- the folder
def folder_has_run(ckpt_dir: str | Path) -> bool:
    """Whether a folder holds a run's checkpoints, readable or not."""
    return bool(step_files(ckpt_dir)) or any(
        os.path.lexists(Path(ckpt_dir, name)) for name in (LATEST, BEST)
    )


def restore_names(checkpoint: Checkpoint) -> None:
    """Name latest.pt, and best.pt if it is the run's best, the step file that a run goes on from: a save may have ended between
    writing the file and naming it, and if nothing is saved after it those names would stay an older one's."""
    if not STEP_FILE.fullmatch(checkpoint.path.name):
        return
    is_best = checkpoint.val_loss is not None and checkpoint.val_loss == checkpoint.run.get(
        "best_val_loss"
    )
    for name in (BEST, LATEST) if is_best else (LATEST,):
        link = checkpoint.path.with_name(name)
        if not (link.exists() and link.samefile(checkpoint.path)):
            link_atomic(checkpoint.path, link)


def find_latest(ckpt_dir: str | Path, optimizer: bool = True) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that passes every check, and one line for each newer one that did not, for the caller to print.

    Tried in turn: the step files from the last step down, latest.pt, best.pt: a kill between writing a step file and naming
    it latest.pt loses nothing. CheckpointError if none can be read.
    """
    folder, tried, skipped = Path(ckpt_dir), [], []
    if not folder_has_run(folder):
        raise CheckpointError(folder, f"holds no checkpoint ({LATEST} or step_*.pt)")
    for path in [
        *(path for _, path in reversed(step_files(folder))),
        folder / LATEST,
        folder / BEST,
    ]:
        if not os.path.lexists(path) or any(
            path.exists() and path.samefile(other) for other in tried if other.exists()
        ):
            continue  # another name of a file that was just refused
        try:
            return read_checkpoint(path, optimizer), skipped
        except CheckpointError as error:
            tried.append(path)
            skipped.append(str(error))
    raise CheckpointError(folder, f"no checkpoint can be read: {'; '.join(skipped)}")
