"""AdamW: which tensors decay, the fastest implementation of the device, and its state under the parameters' names.

torch's own optimizer state dict is keyed by position; here a moment is `exp_avg.layers.0.norm1.weight`, so that a checkpoint
can be read by hand and a renamed, missing or reshaped parameter is an error that says its name.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from config_model import TrainConfig

FUSED_DEVICES = ("cpu", "cuda", "mps")    # where AdamW(fused=True) exists in torch 2.11 to 2.13; elsewhere foreach
STACKED_BIASES = ("b_in", "b_out")        # one bias per expert, stacked to a matrix [E, F or C]: still biases
STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


def decays(name: str, parameter: Tensor) -> bool:
    """The rule: what has two or more dimensions decays, unless it is a stack of biases.

    So every matrix (stacked experts and the router included), the embeddings, the head and the learned attention-bias table
    [H, T, T] decay; norms, biases, and the experts' stacked biases do not. Decay pulls a matrix that multiplies its input
    towards a smaller function; on a bias or a norm's gain it only shifts the function (nanoGPT's rule, kept for stacks).
    """
    return parameter.dim() >= 2 and name.rpartition(".")[2] not in STACKED_BIASES


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups: those that decay, those that do not. Each trainable parameter is in one; a tied one counts once."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [{"params": [parameter for name, parameter in named if decays(name, parameter) == decay],
             "weight_decay": weight_decay if decay else 0.0} for decay in (True, False)]


def build_adamw(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over `model` with the config's lr, betas, eps and weight decay: one fused kernel where the device has it."""
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in model.parameters())
    return AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, betas=(config.beta1, config.beta2),
                 eps=config.adam_eps, fused=fused, foreach=not fused)


def initialise_state(optimizer: AdamW) -> None:
    """Allocate moments and step counters as the first step would, so that out-of-memory comes before step 1, not at its end.

    State that is there already is left alone. Training on is bitwise what it would be with lazy initialisation.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                on_device = group["fused"] or group["capturable"]   # foreach keeps the counter on the CPU: no launch per tensor
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def state_by_name(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The optimizer's own tensors (not copies) as {"exp_avg.NAME": tensor, ...}; allocated first if no step was taken yet."""
    initialise_state(optimizer)
    optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter in optimized}
    if len(named) != len(optimized):
        raise ValueError(f"the optimizer holds {len(optimized)} parameters, of which only {len(named)} are the model's: build it from this model")
    return {f"{key}.{name}": optimizer.state[parameter][key] for key in STATE_KEYS for name, parameter in named.items()}


def load_state_by_name(model: nn.Module, optimizer: AdamW, tensors: dict[str, Tensor]) -> None:
    """Copy saved state into the optimizer. ValueError names what is missing, unknown or of another shape or dtype, and then
    nothing has been changed."""
    own = state_by_name(model, optimizer)
    check_tensors({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}, tensors, "optimizer state")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def check_tensors(expected: dict[str, tuple[torch.Size, torch.dtype]], given: dict[str, Tensor], what: str) -> None:
    """ValueError unless `given` has exactly the expected names, each of the expected shape and dtype."""
    def some(names: set[str]) -> str:
        return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if missing := expected.keys() - given.keys():
        raise ValueError(f"{what} lacks {some(missing)}")
    if unknown := given.keys() - expected.keys():
        raise ValueError(f"{what} has unknown {some(unknown)}")
    for name, (shape, dtype) in expected.items():
        if given[name].shape != shape or given[name].dtype != dtype:
            raise ValueError(f"{what} {name} is {_describe(given[name].shape, given[name].dtype)}, not {_describe(shape, dtype)}")


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
