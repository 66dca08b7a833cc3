"""Optimizer state under the parameters' names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum")


def initialise_state(optimizer: Optimizer) -> None:
    """Allocate moments and step counters as the first step would, so that out-of-memory comes before step 1, not at its end.

    State that is there already is left alone. Training on is bitwise what it would be with lazy initialisation.
    """
    for group in optimizer.param_groups:
        muon, dtype = group.get("momentum") is not None, group.get("state_dtype")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                if not muon:
                    on_device = (
                        group["fused"] or group["capturable"]
                    )  # foreach keeps the counter on the CPU: no launch per tensor
                    state["step"] = torch.zeros(
                        (), dtype=torch.float32, device=parameter.device if on_device else "cpu"
                    )
                for key in ("momentum",) if muon else ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(
                        parameter, dtype=dtype, memory_format=torch.preserve_format
                    )


def state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's own tensors (not copies) as {"exp_avg.NAME": tensor, ...}; allocated first if no step was taken yet."""
    initialise_state(optimizer)
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter in optimized
    }
    if len(named) != len(optimized):
        raise ValueError(
            f"the optimizer holds {len(optimized)} parameters, of which only {len(named)} are the model's: build it from this model"
        )
    return {
        f"{key}.{name}": optimizer.state[parameter][key]
        for key in STATE_KEYS
        for name, parameter in named.items()
        if key in optimizer.state[parameter]
    }


def load_state_by_name(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Copy saved state into the optimizer. ValueError names what is missing, unknown or of another shape or dtype, and then
    nothing has been changed."""
    own = state_by_name(model, optimizer)
    check_tensors(
        {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()},
        tensors,
        "optimizer state",
    )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def check_tensors(
    expected: dict[str, tuple[torch.Size, torch.dtype]], given: dict[str, Tensor], what: str
) -> None:
    """ValueError unless `given` has exactly the expected names, each of the expected shape and dtype."""

    def some(names: set[str]) -> str:
        return ", ".join(sorted(names)[:3]) + (
            f" and {len(names) - 3} more" if len(names) > 3 else ""
        )

    if missing := expected.keys() - given.keys():
        raise ValueError(f"{what} lacks {some(missing)}")
    if unknown := given.keys() - expected.keys():
        raise ValueError(f"{what} has unknown {some(unknown)}")
    for name, (shape, dtype) in expected.items():
        if given[name].shape != shape or given[name].dtype != dtype:
            raise ValueError(
                f"{what} {name} is {_describe(given[name].shape, given[name].dtype)}, not {_describe(shape, dtype)}"
            )


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
