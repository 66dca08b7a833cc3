"""Models with adapters for tests, and runs that have saved some."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim import Optimizer

from config_model import ModelConfig
from model import LLM
from runtime.checkpoint.adapter import Adapter, is_trained
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.posttraining.lora import attach, new_adapter
from runtime.training.optimizer import build_adamw
from tests.builders_checkpoint import CONFIG, TRAIN, new_run, save, train

# The adapters of a base that is no file.
NOWHERE = Adapter(4, 2, 8.0, 0, 0, "/nowhere/base.pt", "0" * 64)


def move_adapters(model: LLM, seed: int = 0, size: float = 0.05) -> LLM:
    """Give an adapted model adapters that matter, as training would; return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_trained(name) and not name.endswith("lora_A"):
                change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * change.to(parameter))
    return model


def base_run(folder: Path, config: ModelConfig = CONFIG, seed: int = 0, steps: int = 3) -> Path:
    """Train a plain model a little; return its checkpoint."""
    model, optimizer = new_run(config, seed)
    train(model, optimizer, steps, seed)
    return save(folder, steps, model, optimizer)


def lora_run(
    source: Checkpoint | Path, rank: int = 4, new_ids: tuple[int, ...] = (), **settings
) -> tuple[LLM, Optimizer]:
    """Return a model with adapters on a checkpoint, and its optimizer.

    A checkpoint of adapters that was read with its optimizer is continued with its own.
    """
    source = read_checkpoint(source) if isinstance(source, Path) else source
    model, adapter = build_model(source), source.adapter
    if source.optimizer is None or adapter is None:
        adapter = new_adapter(source, source.model_config, rank, new_ids=new_ids, **settings)
    attach(model, adapter)
    return model, build_adamw(model, TRAIN)
