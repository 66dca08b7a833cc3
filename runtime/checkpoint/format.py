"""The checkpoint format: one file from which a run continues bit for bit on a CPU.

It cannot be half written, and it is believed only when checked. A checkpoint is a `torch.save` zip
of a dict that can be read by hand:

    step_0001000.pt (zip, stored, not compressed)
      archive/data.pkl   the dict below; tensors by number
      archive/data/0     bytes of the first tensor, mapped when it is read
      archive/data/1     ...

    step, val_loss, cfg                     what the original implementation wrote, under its names
    model {name: float32}                   (weights alone may be bfloat16)
    optimizer {"exp_avg.NAME": tensor}
    format, version, versions, train_cfg,   what a resume needs in addition
    tokenizer, data_fingerprint, run
    stage                                   only after pre-training: what kind of training this is
    world                                   only from several ranks: how many
    digests {"model/NAME": sha256,          "header" covers everything that is no tensor
      "optimizer/NAME": sha256, "header": sha256}

A file is never trusted: it may be cut short, flipped by a bad disk, or made to do harm. Its pickle
is scanned before it is loaded, by `torch.load(weights_only=True)` on a private map of the file. The
config is compared with the tensors before anything is allocated. Digests are checked for what is
read, so predicting does not read the optimizer's two thirds. Whatever is wrong is a
`CheckpointError` of one line. Files of the original implementation are converted as they are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from config_model import ModelConfig, total_parameters
from model import LLM
from runtime.checkpoint.adapter import Adapter

FORMAT, VERSION = "gptoss-checkpoint", 1
# Names of a folder's newest checkpoint and of that with the lowest validation loss.
LATEST, BEST = "latest.pt", "best.pt"
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
# What a header may hold in addition. Files without them are those of before there were any.
OPTIONAL_HEADER = {"stage": dict, "world": int}
TENSOR_KEYS = ("model", "optimizer", "digests")

# Hashed and checked for NaN at a time: a chunk stays in the cache between the two.
CHUNK_ELEMENTS = 1 << 20
# Characters, and VALUE_COST for each value. A 200k-token vocabulary in base64 is 4 M.
HEADER_LIMIT = 1 << 26
# A value takes some 80 bytes and half a microsecond to look at: 64 M were 5 GB and a minute.
VALUE_COST = 32
DEPTH_LIMIT = 64


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one line that names the file and the reason."""

    # Of a file of adapters: what is wrong with the base, or with a base's base.
    innermost = ""

    def __init__(self, path: Path | str, reason: object):
        # A hostile file must not write to the terminal.
        line = " ".join(f"{path}: {reason}".split())
        line = "".join(c if c.isprintable() else "?" for c in line)
        super().__init__(line if len(line) <= 600 else line[:600] + " ...")

    def __reduce__(self):
        # Ranks send each other their errors.
        return _error_of, (*self.args, self.innermost)


def _error_of(line: str, innermost: str) -> CheckpointError:
    """Return the CheckpointError of a finished line."""
    error = CheckpointError.__new__(CheckpointError, line)
    error.innermost = innermost
    return error


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, checked.

    Tensors are on the CPU and mapped: private pages of the file, read when touched, never written.
    """

    path: Path
    # Optimizer steps done.
    step: int
    model_config: ModelConfig
    # Under the names of LLM.state_dict(); float32, or all parameters bfloat16 (buffers never).
    model: Mapping[str, Tensor]
    # As optimizer_state.state_by_name gives it; None if it was not asked for.
    optimizer: dict[str, Tensor] | None
    # Cross-entropy in nats. Files of the original implementation include its auxiliary loss.
    val_loss: float | None
    # Fields of TrainConfig; empty in the original implementation's format.
    train_config: dict
    # For tokenizer_from_state.
    tokenizer_state: dict | None
    data_fingerprint: str
    # What the trainer put there.
    run: dict
    # Of torch and Python, when it was written.
    versions: dict
    # Whether the original implementation wrote it.
    is_reference_format: bool
    # Of the digests of all that the file holds; "" where there are none.
    digest: str = ""
    # What a training after pre-training says of itself: at least its kind. {} for pre-training.
    stage: dict = field(default_factory=dict)
    # Ranks of the run that wrote it.
    world: int = 1
    # Of the weights alone, whatever else is in the file.
    weights_digest: str = ""
    # What a file of adapters says of them, and their tensors: `model` is what they mean with their
    # base. None and {} for all other files.
    adapter: Adapter | None = None
    trained: dict[str, Tensor] = field(default_factory=dict)


# ------------------------------------------------------------------------------- digests and header
def digests_of(
    tensors: dict[str, Tensor], group: str, recorded: dict | None = None
) -> dict[str, str]:
    """Return the SHA-256 of every tensor as {"GROUP/NAME": digest}.

    One thread each: hashing frees the interpreter's lock. Raise ValueError where one is not what
    was `recorded`, or is not finite.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = dict(zip(tensors, pool.map(digest_of, tensors.values()), strict=True))
    for name, (digest, _) in results.items():
        if recorded is not None and recorded.get(f"{group}/{name}") != digest:
            raise ValueError(f"damaged: {group} tensor {name} does not match its digest")
    if bad := [name for name, (_, finite) in results.items() if not finite]:
        more = f", and so do {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ValueError(f"{group} tensor {bad[0]} holds NaN or infinity{more}")
    return {f"{group}/{name}": digest for name, (digest, _) in results.items()}


def digest_of(tensor: Tensor) -> tuple[str, bool]:
    """Return the SHA-256 in hex over dtype, shape and bytes, and whether every value is finite.

    A GPU's tensor is copied, a CPU's is not.
    """
    digest, finite = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode()), True
    for chunk in tensor.detach().cpu().contiguous().reshape(-1).split(CHUNK_ELEMENTS):
        # As bytes: bfloat16 has no numpy dtype.
        digest.update(chunk.view(torch.uint8).numpy())
        values = chunk if chunk.dtype in (torch.float32, torch.float64) else chunk.float()
        finite = finite and bool(np.isfinite(values.numpy()).all())
    return digest.hexdigest(), finite


def plain_values(header: object) -> object:
    """Return `header` as plain str, int, float, bool, None, list and dict.

    Raise ValueError for what JSON cannot hold or what is too large. The limit counts what is
    visited, so lists that contain one another many times over (a small file) end here as well.
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
                # A subclass would name its class in the pickle.
                return kind(value)
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
    """Return the SHA-256 of a header, as JSON in one spelling."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_header(header: dict) -> None:
    """Raise ValueError unless every header key is there, of its type, and the step is possible."""
    for key, kind in HEADER.items():
        kinds: tuple = kind if isinstance(kind, tuple) else (kind,)
        if key not in header:
            raise ValueError(f"{key} is missing")
        # type(), not isinstance: True is no step.
        if type(header[key]) not in kinds:
            allowed = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{key} must be of type {allowed}, not {type(header[key]).__name__}")
    for key, kind in OPTIONAL_HEADER.items():
        if key in header and type(header[key]) is not kind:
            raise ValueError(
                f"{key} must be of type {kind.__name__}, not {type(header[key]).__name__}"
            )
    if not 1 <= header.get("world", 1) < 1 << 31:
        raise ValueError(f"world must be at least 1, not {header['world']}")
    if not 0 <= header["step"] < 1 << 63:
        raise ValueError(f"step must be at least 0, not {header['step']}")


def dict_in(contents: dict, key: str) -> dict:
    """Return contents[key]. Raise ValueError unless it is there and a dict."""
    if key not in contents:
        raise ValueError(f"{key} is missing")
    value = contents[key]
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a dict, not {type(value).__name__}")
    return value


def config_from(fields: dict) -> ModelConfig:
    """Return the ModelConfig of a file's fields: none unknown, each valid.

    A field that the file's version did not have takes its default, so a new field must default to
    what the model did before it.
    """
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(ModelConfig)}:
        raise ValueError(f"cfg has unknown {min(unknown)!r:.60}")
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise ValueError(f"cfg: {error}") from error


def plain_tensors(given: dict, group: str, file_bytes: int) -> dict[str, Tensor]:
    """Return the group, if its tensors are plain, contiguous and fit into the file.

    Raise ValueError for anything else, such as stride 0.
    """
    for name, tensor in given.items():
        if type(name) is not str or type(tensor) is not Tensor:
            raise ValueError(
                f"{group} must map names to tensors, not {name!r:.60} to a {type(tensor).__name__}"
            )
        is_dense = tensor.layout == torch.strided and tensor.is_contiguous()
        is_view = is_dense and (tensor.is_neg() or tensor.is_conj())
        if not is_dense or is_view or tensor.device.type != "cpu":
            raise ValueError(f"{group} tensor {name} is not a plain, contiguous tensor")
    if sum(tensor.nbytes for tensor in given.values()) > file_bytes:
        raise ValueError(f"{group} tensors claim more than the file holds")
    return {name: tensor.detach() for name, tensor in given.items()}


def expected_tensors(
    config: ModelConfig, dtype: torch.dtype, file_bytes: int | None = None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the names, shapes and dtypes that a config implies, with parameters in `dtype`.

    They come from the module itself on the meta device. Raise ValueError first for a config that
    is larger than the file.
    """
    if file_bytes is not None and dtype.itemsize * total_parameters(config) > file_bytes:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"cfg describes {total_parameters(config):,} {kind} parameters, more than the file's "
            f"{file_bytes:,} bytes hold"
        )
    model = meta_model(config)
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: (tensor.shape, dtype if name in parameters else torch.float32)
        for name, tensor in model.state_dict().items()
    }


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a config's plain model, by name."""
    return {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}


class _WithoutRandomNumbers(TorchFunctionMode):
    """Leave out the initial weights of modules.

    On the meta device they are nothing, but to draw them PyTorch imports its compiler, which takes
    a second.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig) -> LLM:
    """Return a model of shapes alone."""
    with torch.device("meta"), _WithoutRandomNumbers():
        return LLM(config)
