"""Weights that come after the ranks have shared a model out, because no device holds all of it.

The model is made of shapes alone, on PyTorch's meta device. The ranks shard it, and then each of
them fills its own rows: from a mapped file, which is read only there, or with random numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config_model import ModelConfig, total_parameters
from model import LLM
from runtime.base.ranks import Ranks
from runtime.checkpoint.adapter import ROWS, adapter_of
from runtime.checkpoint.changed import rows_of
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.optimizer_state import fill_

# A model above this size takes its initial weights by draw_by_name, also in one process. In float32
# it has 32 GB, which every rank would hold whole before it is sharded.
LARGE_PARAMETERS = 8_000_000_000
# Random numbers that are drawn together. Another value makes other models of a seed.
DRAWN_TOGETHER = 1 << 20
# How a tensor could be drawn in place, apart from normal_.
OTHER_DRAWS = ("uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_")


def is_large(config: ModelConfig) -> bool:
    """Return whether a model is made of shapes first and filled by draw_by_name."""
    return total_parameters(config) > LARGE_PARAMETERS


def set_aside(model: nn.Module) -> dict[str, Tensor]:
    """Return the values that a model has already, by name, and leave shapes of float32 in it."""
    # Detached: `to` may change what the model holds in place.
    tensors = {
        name: tensor.detach() for name, tensor in _tensors_of(model).items() if not tensor.is_meta
    }
    model.to("meta", torch.float32)
    return tensors


@torch.no_grad()
def put_back(model: nn.Module, own: Mapping[str, Tensor], source: Checkpoint, ranks: Ranks) -> None:
    """Copy this rank's part of each tensor into a model that `allocate` has given memory.

    own: of set_aside; all others are the source's, of which no more than that part is read.
    """
    adapter = adapter_of(model)
    for name, tensor in _tensors_of(model).items():
        if name in own:
            ranks.fill_(tensor, own[name])
        elif adapter is not None and name in ROWS:
            rows = range(adapter.rows.start, adapter.rows.stop)
            ranks.fill_(tensor, rows_of(source.model, ROWS[name], rows))
        else:
            fill_(tensor, name, source.model, ranks)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model of shapes memory on a device, as much as this rank holds; its values are any."""
    model.to_empty(device=device)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def draw_by_name(model: LLM, seed: int, ranks: Ranks) -> None:
    """Do LLM.initialise on this rank's part of a model, with random numbers of their own.

    They come from (seed, parameter's name, rows), and from the CPU. So they are the same on each
    device, and on any number of ranks; a rank draws no more than its rows, a few at a time.
    """
    with _DrawnByName(model, seed, ranks):
        model.initialise()
    for name, buffer in model.named_buffers():
        assert name.endswith("selection_bias"), (
            f"{name}: only expert biases are known to start at 0"
        )
        buffer.zero_()


class _DrawnByName(TorchFunctionMode):
    """Draw for `normal_` by name; leave all else that LLM.initialise does to PyTorch."""

    def __init__(self, model: LLM, seed: int, ranks: Ranks):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.seed, self.ranks = seed, ranks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "normal_":
            self._draw(*args, **(kwargs or {}))
            return args[0]
        assert func.__name__ not in OTHER_DRAWS, (
            f"LLM.initialise draws by {func.__name__}, which draw_by_name does not know"
        )
        return func(*args, **(kwargs or {}))

    def _draw(self, parameter: Tensor, mean: float, std: float) -> None:
        name, shape = self.names[id(parameter)], self.ranks.shape_of(parameter)
        mine, local = self.ranks.rows(parameter), self.ranks.local(parameter)
        together = max(1, DRAWN_TOGETHER // max(shape[1:].numel(), 1))
        # The first row of each group of which this rank holds some.
        for first in range(mine.start // together * together, mine.stop, together):
            rows = range(first, min(first + together, shape[0]))
            drawn = torch.empty(len(rows), *shape[1:])
            drawn.normal_(mean, std, generator=_generator(self.seed, name, first))
            begin, end = max(mine.start, rows.start), min(mine.stop, rows.stop)
            part = drawn[begin - first : end - first]
            local[begin - mine.start : end - mine.start].copy_(part)


def _generator(seed: int, name: str, first_row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name} {first_row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
