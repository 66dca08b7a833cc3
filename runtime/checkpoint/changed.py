"""The weights of a checkpoint under another config, for a run that starts from them.

Nothing is read before it is asked for: of a model that no device holds, each rank reads its rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from config_model import ModelConfig
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.sharded import Shards


class ChangedWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint, but for some that are others, and some that are left out.

    names: those that are left; changed: what is not the checkpoint's.
    """

    def __init__(
        self, given: Mapping[str, Tensor], names: Iterable[str], changed: Mapping[str, Tensor]
    ):
        self.given, self.changed = given, changed
        self.names = dict.fromkeys((*names, *changed))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return (self.changed if name in self.changed else self.given)[name]

    def __contains__(self, name: object) -> bool:
        # A Mapping would make the tensor to see whether it is there.
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def rows_of(tensors: Mapping[str, Tensor], name: str, rows: range) -> Tensor:
    """Return some rows of a checkpoint's tensor; of one in a folder no others are read."""
    if isinstance(tensors, ChangedWeights) and name not in tensors.changed:
        return rows_of(tensors.given, name, rows)
    if isinstance(tensors, Shards):
        return tensors.rows(name, rows)
    return tensors[name][rows.start : rows.stop]


def with_config(source: Checkpoint, config: ModelConfig, new_ids: Sequence[int] = ()) -> Checkpoint:
    """Return a checkpoint with its weights under another config.

    If router_bias_rate asks for expert biases that are missing, they are zero; if not, they go.
    new_ids: the rows of the vocabulary that the config adds or that nobody trained so far. They
    become the mean of all others.
    """
    biases = {
        f"layers.{block}.moe.router.selection_bias": torch.zeros(config.num_experts)
        for block in range(config.transformer_blocks)
    }
    names = [name for name in source.model if name not in biases]
    changed: dict[str, Tensor] = {}
    if config.router_bias_rate:
        changed = {name: source.model.get(name, zero) for name, zero in biases.items()}
    if new_ids:
        changed |= _with_new_rows(source.model, config.vocabulary_size, new_ids)
    model = ChangedWeights(source.model, names, changed)
    return dataclasses.replace(source, model_config=config, model=model)


def _with_new_rows(
    model: Mapping[str, Tensor], vocabulary_size: int, new_ids: Sequence[int]
) -> dict[str, Tensor]:
    """Return the tensors with a row per id, with the rows `new_ids` as the mean of all others."""
    changed: dict[str, Tensor] = {}
    for name in ("embed.weight", "out_head.weight", "out_head.bias"):
        if name in model:
            old = model[name]
            rows = old.new_zeros(vocabulary_size, *old.shape[1:])
            rows[: len(old)] = old
            is_new = torch.zeros(vocabulary_size, dtype=torch.bool)
            is_new[len(old) :] = True
            is_new[list(new_ids)] = True
            # In float64: a float32 sum of 200,000 rows loses digits.
            total = rows.sum(dim=0, dtype=torch.float64) - rows[is_new].double().sum(dim=0)
            rows[is_new] = (total / (~is_new).sum()).to(rows)
            changed[name] = rows
    return changed
