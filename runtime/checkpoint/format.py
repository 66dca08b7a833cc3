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

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config_model import ModelConfig, total_parameters
from model import LLM

FORMAT, VERSION = "gptoss-checkpoint", 1
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
DEPTH_LIMIT = 64


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
    tokenizer_state: dict | None  # for tokenizer_from_state
    data_fingerprint: str
    run: dict  # what the trainer put there
    versions: dict  # of torch and Python, when it was written
    is_reference_format: bool
    # Of the digests of all that the file holds; "" in the reference's format, which has none.
    digest: str = ""


# ------------------------------------------------------------------------------------------------------- digests and header
def digests_of(
    tensors: dict[str, Tensor], group: str, recorded: dict | None = None
) -> dict[str, str]:
    """SHA-256 of every tensor as {"GROUP/NAME": digest}, one thread each (hashing frees the interpreter lock).

    ValueError where one is not what was `recorded`, or is not finite.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = dict(zip(tensors, pool.map(digest_of, tensors.values()), strict=True))
    for name, (digest, _) in results.items():
        if recorded is not None and recorded.get(f"{group}/{name}") != digest:
            raise ValueError(f"damaged: {group} tensor {name} does not match its digest")
    if bad := [name for name, (_, finite) in results.items() if not finite]:
        raise ValueError(
            f"{group} tensor {bad[0]} holds NaN or infinity"
            + (f", and so do {len(bad) - 1} more" if len(bad) > 1 else "")
        )
    return {f"{group}/{name}": digest for name, (digest, _) in results.items()}


def digest_of(tensor: Tensor) -> tuple[str, bool]:
    """SHA-256 in hex over dtype, shape and bytes, and whether every value is finite. A GPU tensor is copied, a CPU tensor is not."""
    digest, finite = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode()), True
    for chunk in tensor.detach().cpu().contiguous().reshape(-1).split(CHUNK_ELEMENTS):
        digest.update(chunk.view(torch.uint8).numpy())  # as bytes: bfloat16 has no numpy dtype
        values = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
        finite = finite and bool(np.isfinite(values.numpy()).all())
    return digest.hexdigest(), finite


def plain_values(header: object) -> object:
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


def header_digest(header: dict) -> str:
    return hashlib.sha256(
        json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def check_header(header: dict) -> None:
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


def dict_in(contents: dict, key: str) -> dict:
    if not isinstance(value := contents.get(key), dict):
        raise ValueError(
            f"{key} is missing"
            if key not in contents
            else f"{key} must be a dict, not {type(value).__name__}"
        )
    return value


def config_from(fields: dict) -> ModelConfig:
    """ModelConfig from a file: no field unknown, each valid. A field that the file's version did not have takes its default, so
    a new field must default to what the model did before it."""
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(ModelConfig)}:
        raise ValueError(f"cfg has unknown {min(unknown)!r:.60}")
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"cfg: {error}") from error


def plain_tensors(given: dict, group: str, file_bytes: int) -> dict[str, Tensor]:
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


def expected_tensors(
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
