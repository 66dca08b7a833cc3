"""Checkpoints of the original implementation, converted as they are read."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import torch

from config_model import ModelConfig
from runtime.checkpoint.adapter import weights_digest
from runtime.checkpoint.format import (
    Checkpoint,
    dict_in,
    digests_of,
    expected_tensors,
    plain_tensors,
    plain_values,
)
from runtime.checkpoint.optimizer_state import check_tensors

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
# Tables of rotary positions: computed here, not stored.
REFERENCE_TABLES = (".gqa.cos_cached", ".gqa.sin_cached")


def expected_shapes(config: ModelConfig, file_bytes: int) -> dict[str, torch.Size]:
    """Return the shape of each tensor of a config's model, under our names."""
    expected = expected_tensors(config, torch.float32, file_bytes)
    return {name: shape for name, (shape, _) in expected.items()}


def read_reference(path: Path, contents: dict, records: set, optimizer: bool) -> Checkpoint:
    """Return a checkpoint of the original implementation, under our names.

    It has no digests, so the zip's CRC-32 of every weight is checked instead.
    """
    fields: Any = plain_values(dict_in(contents, "cfg"))
    header: Any = plain_values({key: contents.get(key) for key in ("step", "val_loss")})
    step, val_loss = header["step"], header["val_loss"]
    if type(step) is not int or step < 0 or not isinstance(val_loss, (float, type(None))):
        raise ValueError(
            "step must be an integer of at least 0 and val_loss a number or None, not "
            f"{step!r:.40} and {val_loss!r:.40}"
        )
    if optimizer:
        raise ValueError(
            "is in the original implementation's format, whose optimizer state cannot be "
            "continued: start a new run from it with --init_from"
        )
    config = reference_config(fields)
    given = plain_tensors(dict_in(contents, "model"), "model", path.stat().st_size)
    given = {name.removeprefix("_orig_mod."): tensor for name, tensor in given.items()}
    expected = expected_shapes(config, path.stat().st_size)
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
    digests = digests_of(weights, "model")
    for name, tensor in weights.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        if (tensor.nbytes, zlib.crc32(data)) not in records:
            raise ValueError(f"damaged: model tensor {name} does not match the zip's checksum")
    model = {
        name: torch.stack([weights[source] for source in names])
        if len(names) > 1 or ".experts." in name
        else weights[names[0]].reshape(expected[name])
        for name, names in sources.items()
    }
    return Checkpoint(
        path=path,
        step=step,
        model_config=config,
        model=model,
        optimizer=None,
        val_loss=val_loss,
        train_config={},
        tokenizer_state=None,
        data_fingerprint="",
        run={},
        versions={},
        is_reference_format=True,
        weights_digest=weights_digest(digests),
    )


def reference_config(fields: dict) -> ModelConfig:
    """Return our config of the original implementation's: the same function, loss included.

    Its auxiliary loss counts a token once per chosen expert, so it is top_k at balance where ours
    is 1: the coefficient takes the factor. Its capacity rule forgets top_k and drops tokens of
    balanced batches: weights are used dropless.
    """
    if set(fields) != set(REFERENCE_FIELDS):
        raise ValueError(
            f"cfg has the fields {', '.join(sorted(fields))[:200]}, and the original "
            f"implementation's has {', '.join(REFERENCE_FIELDS)}"
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
    """Return the names there of what a tensor of ours is made of: one, or one per expert."""
    stem, _, leaf = name.rpartition(".")
    if stem.endswith(".moe.experts"):
        return [f"{stem}.{expert}.{REFERENCE_EXPERT_NAMES[leaf]}" for expert in range(num_experts)]
    name = name.replace(".attention.", ".gqa.")
    return [name.replace(".moe.router.weight", ".moe.router.W_r.weight")]


def _reference_shape(name: str, shape: torch.Size) -> torch.Size:
    """Return the shape there of a tensor of ours."""
    if ".moe.experts." in name:
        return shape[1:]
    return torch.Size((1, *shape)) if name.endswith(".attention_bias") else shape
