"""Checkpoints of runs with known numbers, saved and loaded on several ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.ranks import Ranks
from runtime.checkpoint.optimizer_state import state_by_name
from runtime.checkpoint.read import load_training_state, read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.training.optimizer import build_optimizer
from tests.builders import tiny_config
from tests.builders_data import BYTE

# Rows that neither 2 nor 4 ranks share evenly, fewer rows than ranks, an expert bias that moves.
CONFIG = tiny_config(vocabulary_size=61, num_experts=6, router_bias_rate=0.01, expert_bias=True)
SETTINGS = dict(optimizer="muon", state_dtype="bfloat16", warmup_steps=0)


def number(name: str, shape, dtype=torch.float32) -> Tensor:
    """Return random numbers that depend on a tensor's name alone."""
    random = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**60)
    return torch.randn(shape, generator=random).abs().to(dtype)


def new_run(
    ranks: Ranks,
    numbers: bool = True,
    config: ModelConfig = CONFIG,
    expert_parallel: int = 1,
    shard: str = "full",
):
    """Return a model in shards and its optimizer, with known numbers or with initial ones."""
    torch.manual_seed(0)
    model = LLM(config)
    ranks.arrange(expert_parallel, shard, config.num_experts)
    ranks.shard(model, torch.float32)
    optimizer = build_optimizer(model, TrainConfig(**SETTINGS), ranks)
    if numbers:
        own = model.state_dict() | state_by_name(model, optimizer)
        with torch.no_grad():
            for name, tensor in own.items():
                ranks.fill_(tensor, number(name, ranks.shape_of(tensor), tensor.dtype))
    return model, optimizer


def save(
    ranks: Ranks, folder: Path, model, optimizer, checkpoint: str = "file", step: int = 7
) -> Path:
    return save_checkpoint(
        folder,
        step,
        model,
        optimizer,
        train_config=TrainConfig(**SETTINGS, checkpoint=checkpoint),
        tokenizer_state=BYTE.to_state(),
        data_fingerprint="abc",
        val_loss=3.25,
        run={"step": step},
        keep_last=2,
        is_best=True,
        ranks=ranks,
    )


def saved(ranks: Ranks, folder: Path, checkpoint: str = "file", **placing) -> str:
    return str(save(ranks, folder, *new_run(ranks, **placing), checkpoint))


def loaded_and_saved(
    ranks: Ranks, path: Path, folder: Path, checkpoint: str = "file", **placing
) -> str:
    """Load a checkpoint into a run with other numbers, and save it again."""
    model, optimizer = new_run(ranks, numbers=False, **placing)
    read = read_checkpoint(path, optimizer=True, is_checked=ranks.rank > 0)
    load_training_state(read, model, optimizer, ranks)
    return str(save(ranks, folder, model, optimizer, checkpoint))


def contents(path: str | Path) -> tuple[dict, dict]:
    """Return a checkpoint's header, without what may differ, and its tensors by group."""
    read = read_checkpoint(path, optimizer=True)
    assert read.optimizer is not None
    header = dataclasses.asdict(dataclasses.replace(read, model={}, optimizer=None, path=Path()))
    del header["digest"], header["world"], header["train_config"]["checkpoint"]
    return header, {"model": dict(read.model), "optimizer": dict(read.optimizer)}


def same(path: str | Path, other: str | Path) -> bool:
    """Return whether two checkpoints hold the same tensors and the same header.

    The header has the digest of the weights. Its number of ranks may differ.
    """
    (header, groups), (other_header, other_groups) = contents(path), contents(other)
    return header == other_header and all(
        groups[group].keys() == tensors.keys()
        and all(torch.equal(groups[group][name], tensor) for name, tensor in tensors.items())
        for group, tensors in other_groups.items()
    )
