"""Adapters in checkpoints: their tensors, and the plain weights that they mean with their base.

LoRA (Hu et al. 2021, arXiv 2106.09685) keeps a matrix W [.., out, in] as it is and learns the two
thin matrices of W + (alpha / r) B A: A [.., r, in] and B [.., out, r], where r is the rank. A run
that learns adapters saves them alone, with the digest of the weights that they belong to, its base.

The factor is alpha / r, and not alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
With it the first updates of the product do not depend on r, so one learning rate serves attention
and experts, whose ranks differ (Schulman et al. 2025, "LoRA Without Regret"). It is also the factor
that peft takes from a file by default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config_model import ModelConfig

# The matrices of a block that get adapters.
ATTENTION = tuple(f"attention.{name}.weight" for name in ("W_q", "W_k", "W_v", "out_proj"))
EXPERTS = ("moe.experts.w_in", "moe.experts.w_out")
# Rows of the vocabulary that are trained with them -> the tensor that they are rows of.
ROWS = {
    "embed.new_rows": "embed.weight",
    "out_head.new_rows": "out_head.weight",
    "out_head.new_bias": "out_head.bias",
}
# What a checkpoint's stage calls them.
KEY = "adapter"


@dataclass(frozen=True)
class Adapter:
    """What a file of adapters says of itself and of its base."""

    # Of the attention's matrices, and of each expert's.
    rank: int
    expert_rank: int
    alpha: float
    # Consecutive rows of the vocabulary that are trained too.
    first_row: int
    num_rows: int
    # The base's file, as an absolute path, and the digest of its weights.
    base: str
    base_digest: str

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter of a matrix."""
        return self.expert_rank if name.endswith(EXPERTS) else self.rank

    def scale_of(self, name: str) -> float:
        """Return what B A is multiplied by before it is added to a matrix."""
        return self.alpha / self.rank_of(name)

    @property
    def rows(self) -> slice:
        """Return the trained rows of the vocabulary."""
        return slice(self.first_row, self.first_row + self.num_rows)

    def header(self, folder: str | Path) -> dict:
        """Return the entry of a stage in a header, for a file in `folder`."""
        try:
            # The whole tree of folders may move.
            near = os.path.relpath(self.base, os.path.abspath(folder))
        except ValueError:
            # Windows: on another drive.
            near = self.base
        return dataclasses.asdict(self) | {"base_from_here": near}

    @classmethod
    def from_header(cls, value: object) -> tuple[Adapter, str]:
        """Return the adapter of a header's entry, and the base's path from the file's folder.

        Raise ValueError unless it has all keys, with values of their types that are possible.
        """
        kinds: dict[str, type] = {
            "rank": int,
            "expert_rank": int,
            "alpha": float,
            "first_row": int,
            "num_rows": int,
            "base": str,
            "base_digest": str,
            "base_from_here": str,
        }
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            raise ValueError(f"stage.{KEY} must have the keys {', '.join(kinds)}")
        for key, kind in kinds.items():
            if type(value[key]) is not kind:
                raise ValueError(f"stage.{KEY}.{key} must be of type {kind.__name__}")
        fields = {key: value[key] for key in kinds if key != "base_from_here"}
        adapter = cls(**fields)
        if min(adapter.rank, adapter.expert_rank) < 1 or not 0 < adapter.alpha < 1e30:
            raise ValueError(f"stage.{KEY} must have ranks of at least 1 and a positive alpha")
        if min(adapter.first_row, adapter.num_rows) < 0:
            raise ValueError(f"stage.{KEY} must have no negative rows")
        return adapter, value["base_from_here"]


# ------------------------------------------------------------------------------------------- names
def adapted_matrices(config: ModelConfig) -> list[str]:
    """Return the names of the matrices of a model that get adapters."""
    return [
        f"layers.{block}.{name}"
        for block in range(config.transformer_blocks)
        for name in (*ATTENTION, *EXPERTS)
    ]


def pair_of(name: str) -> tuple[str, str]:
    """Return the names of A and B of a matrix.

    layers.0.attention.W_q.lora_A of a linear layer, layers.0.moe.experts.w_in_lora_A of experts.
    """
    stem = f"{name.removesuffix('weight')}" if name.endswith(".weight") else f"{name}_"
    return f"{stem}lora_A", f"{stem}lora_B"


def is_trained(name: str) -> bool:
    """Return whether a tensor of an adapted model is one that its run trains and saves."""
    return name.endswith(("lora_A", "lora_B")) or name in ROWS


def trained_shapes(
    adapter: Adapter, matrices: Mapping[str, torch.Size]
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the names, shapes and dtypes of all that a file of adapters holds.

    matrices: the shapes of a plain model's tensors.
    """
    shapes: dict[str, torch.Size] = {}
    for name, shape in matrices.items():
        if name.endswith((*ATTENTION, *EXPERTS)):
            r, (*stack, outputs, inputs) = adapter.rank_of(name), shape
            a, b = pair_of(name)
            shapes[a] = torch.Size([*stack, r, inputs])
            shapes[b] = torch.Size([*stack, outputs, r])
    for rows, name in ROWS.items():
        if adapter.num_rows and name in matrices:
            if adapter.rows.stop > matrices[name][0]:
                raise ValueError(
                    f"stage.{KEY} has rows up to {adapter.rows.stop}, and {name} has "
                    f"{matrices[name][0]}"
                )
            shapes[rows] = torch.Size([adapter.num_rows, *matrices[name][1:]])
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of a model holds: all of it, or what its run trains."""
    tensors = model.state_dict()
    if adapter_of(model) is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if is_trained(name)}


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return what an adapted model says of its adapters; None for a plain model."""
    return getattr(model, "adapter", None)


# ------------------------------------------------------------------------------------------ merging
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + scale B A in the dtype of W, computed in float32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = b.to(wide) @ a.to(wide)
    return product.mul_(scale).add_(weight).to(weight.dtype)


class AdaptedWeights(Mapping[str, Tensor]):
    """The weights of a base with the adapters of a file, made when they are asked for.

    So no more than one made tensor is in memory at a time, unless the caller keeps them. All are
    float32. shapes: of a plain model with the file's config. merges: False gives the base's
    matrices, with the trained rows of the vocabulary.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        adapter: Adapter,
        base: Mapping[str, Tensor],
        base_shapes: Mapping[str, torch.Size],
        trained: Mapping[str, Tensor],
        merges: bool = True,
    ):
        self.shapes, self.base_shapes, self.adapter = shapes, base_shapes, adapter
        self.base, self.trained, self.merges = base, trained, merges
        rows_of = {name: rows for rows, name in ROWS.items() if rows in trained}
        self.rows_of = rows_of
        for name, shape in shapes.items():
            found = base_shapes.get(name)
            if found == shape or (found is None and name.endswith("selection_bias")):
                continue
            # Rows beyond the base's must all be in the file.
            added = slice(found[0], shape[0]) if found and name in rows_of else slice(0, 0)
            is_grown = found is not None and found[1:] == shape[1:] and found[0] < shape[0]
            inside = adapter.first_row <= added.start and added.stop <= adapter.rows.stop
            if not (is_grown and name in rows_of and inside):
                raise ValueError(
                    f"{name} has the shape {list(shape)}, and {list(found) if found else 'none'} "
                    "in its base"
                )

    def __getitem__(self, name: str) -> Tensor:
        shape, weight = self.shapes[name], self.base.get(name)
        if weight is None:
            # An expert bias that the run's config asked for.
            return torch.zeros(shape)
        weight = weight.float()
        if name in self.rows_of:
            whole = weight.new_zeros(shape)
            whole[: len(weight)] = weight
            whole[self.adapter.rows] = self.trained[self.rows_of[name]]
            return whole
        if self.merges and name.endswith((*ATTENTION, *EXPERTS)):
            a, b = (self.trained[part] for part in pair_of(name))
            return merged(weight, a, b, self.adapter.scale_of(name))
        return weight

    def __contains__(self, name: object) -> bool:
        # A Mapping would make the tensor to see whether it is there.
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


# ----------------------------------------------------------------------------------------- identity
def weights_digest(digests: Mapping[str, str], adapter: Adapter | None = None) -> str:
    """Return a SHA-256 that identifies the weights in a file, whatever else is in it.

    digests: of format.digests_of or a file, whose "model/NAME" count. adapter: of a file of
    adapters, whose weights depend on more than its tensors.
    """
    parts: list = sorted(item for item in digests.items() if item[0].startswith("model/"))
    if adapter is not None:
        numbers = (adapter.rank, adapter.expert_rank, adapter.alpha, adapter.first_row)
        parts.append([*numbers, adapter.num_rows, adapter.base_digest])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
