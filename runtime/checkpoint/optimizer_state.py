"""Optimizer state under the parameters' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.changed import rows_of
from runtime.checkpoint.sharded import like

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum")


def initialise_state(optimizer: Optimizer) -> None:
    """Allocate moments and step counters as the first step would.

    So out-of-memory comes before step 1, not at its end. State that is there already is left alone.
    Training is bitwise what it would be with lazy initialisation.
    """
    for group in optimizer.param_groups:
        muon, dtype = group.get("momentum") is not None, group.get("state_dtype")
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                if not muon:
                    # foreach keeps the counter on the CPU: no launch per tensor.
                    on_device = group["fused"] or group["capturable"]
                    device = parameter.device if on_device else torch.device("cpu")
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                for key in ("momentum",) if muon else ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(
                        parameter, dtype=dtype, memory_format=torch.preserve_format
                    )


def state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's own tensors (not copies) as {"exp_avg.NAME": tensor, ...}.

    They are allocated first if no step was taken yet.
    """
    initialise_state(optimizer)
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter in optimized
    }
    if len(named) != len(optimized):
        raise ValueError(
            f"the optimizer holds {len(optimized)} parameters, of which only {len(named)} are the "
            "model's: build it from this model"
        )
    return {
        f"{key}.{name}": optimizer.state[parameter][key]
        for key in STATE_KEYS
        for name, parameter in named.items()
        if key in optimizer.state[parameter]
    }


def load_state_by_name(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Copy saved state into the optimizer, on several ranks the part that is this rank's.

    Raise ValueError that names what is missing, unknown or of another shape or dtype; then nothing
    has been changed.
    """
    own = state_by_name(model, optimizer)
    check_tensors(
        {name: (ranks.shape_of(tensor), tensor.dtype) for name, tensor in own.items()},
        tensors,
        "optimizer state",
    )
    for name, tensor in own.items():
        fill_(tensor, name, tensors, ranks)


def fill_(tensor: Tensor, name: str, given: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Copy this rank's part of a tensor from a checkpoint's, and read no more than that part."""
    if tensor.dim():
        ranks.local(tensor).copy_(rows_of(given, name, ranks.rows(tensor)))
    else:
        ranks.fill_(tensor, given[name])


def check_tensors(
    expected: dict[str, tuple[torch.Size, torch.dtype]], given: Mapping[str, Tensor], what: str
) -> None:
    """Raise ValueError unless `given` has the expected names alone, of these shapes and dtypes."""

    def some(names: set[str]) -> str:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(sorted(names)[:3]) + more

    if missing := expected.keys() - given.keys():
        raise ValueError(f"{what} lacks {some(missing)}")
    if unknown := given.keys() - expected.keys():
        raise ValueError(f"{what} has unknown {some(unknown)}")
    for name, (shape, dtype) in expected.items():
        found = like(given, name)
        if found.shape != shape or found.dtype != dtype:
            ours, theirs = _describe(shape, dtype), _describe(found.shape, found.dtype)
            raise ValueError(f"{what} {name} is {theirs}, not {ours}")


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
