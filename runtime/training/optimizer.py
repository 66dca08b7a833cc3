"""AdamW, and Muon for the matrices inside the blocks: which tensors get which, and one step.

torch's own optimizer state dict is keyed by position. Here a moment has its parameter's name, such
as `exp_avg.layers.0.norm1.weight`. So a checkpoint can be read by hand, and an error about a
renamed, missing or reshaped parameter says its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from config_model import TrainConfig
from runtime.base.device import DTYPES, choose_dtype
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.optimizer_state import STATE_KEYS, initialise_state
from runtime.kernels import squares
from runtime.training.muon import orthogonalise, passes, sums_of_squares, update_dtype
from runtime.training.state import sums_dtype

# One bias per expert, stacked to a matrix [E, F or C]: still biases.
STACKED_BIASES = ("b_in", "b_out")
HIDDEN_MATRICES = (
    "attention.W_q.weight",
    "attention.W_k.weight",
    "attention.W_v.weight",
    "attention.out_proj.weight",
    "experts.w_in",
    "experts.w_out",
)

# A bfloat16 has 8 significant bits. If a step takes less than 2^-8 of a moment away and the
# gradient is 0, the moment rounds back to what it was, and never falls.
BFLOAT16_DECAY_LIMIT = 0.996
# The RMS of AdamW's updates, so that its lr and weight decay also serve Muon (Liu et al. 2025,
# section 2.2).
MUON_RMS = 0.2
# Temporaries of so many elements stay in a CPU's cache, and fill a GPU's (64 MB in float32).
ELEMENTS_ON_A_CPU, ELEMENTS_ON_A_GPU = 1 << 17, 1 << 24


# --------------------------------------------------------------------------- which tensors get what
def decays(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter decays: it has two or more dimensions and is no stack of biases.

    So every matrix (stacked experts and the router included), the embeddings, the head and the
    learned attention bias [H, T, T] decay. Norms, biases and the experts' stacked biases do not.
    Decay pulls a matrix that multiplies its input towards a smaller function; on a bias or a norm's
    gain it only shifts the function (nanoGPT's rule, kept for stacks).
    """
    return parameter.dim() >= 2 and name.rpartition(".")[2] not in STACKED_BIASES


def parameter_groups(
    model: nn.Module, weight_decay: float, muon_momentum: float | None = None
) -> list[dict]:
    """Return AdamW's groups, with and without decay; with a muon_momentum also Muon's.

    Each trainable parameter is in one group; a tied one counts once. Muon trains the matrices that
    map features to features inside a block, HIDDEN_MATRICES by name. Embedding, head and router
    stay with AdamW, because their rows are ids or experts and not features (Jordan et al. 2024),
    and so does everything that is no matrix. `row_parts`: matrices stacked along the rows of each
    matrix in a group, 2 in w_in of gated experts (gate and up).
    """
    named = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    gated = {
        f"{name}.w_in"
        for name, module in model.named_modules()
        if getattr(module, "activation", "gelu") != "gelu"
    }
    muon = [name for name in named if muon_momentum is not None and name.endswith(HIDDEN_MATRICES)]
    groups = [
        {
            "params": [
                p for name, p in named.items() if name not in muon and decays(name, p) == decay
            ],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    groups += [
        {
            "params": [named[name] for name in muon if (name in gated) == (parts == 2)],
            "weight_decay": weight_decay,
            "momentum": muon_momentum,
            "row_parts": parts,
        }
        for parts in (1, 2)
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: TrainConfig, ranks: Ranks = ONE_PROCESS, muon_dtype: str = ""
) -> Optimizer:
    """Return the optimizer that the config describes, over `model`.

    ranks: among which the model is sharded, if it is. muon_dtype: of Muon's products; "" = half
    precision on CUDA, float32 elsewhere. Raise ValueError for moments that bfloat16 cannot hold.
    """
    kind = OPTIMIZERS[config.optimizer]
    for name in kind.decay_rates:
        if config.state_dtype == "bfloat16" and getattr(config, name) >= BFLOAT16_DECAY_LIMIT:
            raise ValueError(
                f"{name} {getattr(config, name)} with state_dtype bfloat16 makes a moment that "
                f"rounding keeps from ever falling: lower it below {BFLOAT16_DECAY_LIMIT}, or use "
                "state_dtype float32"
            )
    optimizer = kind.build(model, config, ranks)
    if muon_dtype and isinstance(optimizer, MuonAdamW):
        optimizer.products_dtype = DTYPES[muon_dtype]
    return optimizer


def build_adamw_in_any_dtype(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Optimizer:
    """Return AdamW with moments in the config's state_dtype: torch's own keeps float32 alone.

    On several ranks it is ours too, which passes the same kernel plain tensors, not shards.
    """
    if config.state_dtype == "float32" and ranks.world == 1:
        return build_adamw(model, config)
    return _muon_adamw(model, config, ranks, None)


def build_muon(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Optimizer:
    """Return Muon for the matrices inside the blocks and AdamW for all else."""
    return _muon_adamw(model, config, ranks, config.muon_momentum)


def _muon_adamw(
    model: nn.Module, config: TrainConfig, ranks: Ranks, muon_momentum: float | None
) -> Optimizer:
    return MuonAdamW(
        parameter_groups(model, config.weight_decay, muon_momentum),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        state_dtype=DTYPES[config.state_dtype],
        ranks=ranks,
    )


def build_adamw(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return torch's fused AdamW over `model`, which CPU, CUDA and MPS have."""
    return AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )


class OptimizerKind(NamedTuple):
    """How an optimizer is built, and its settings that are decay rates of moments."""

    build: Callable[[nn.Module, TrainConfig, Ranks], Optimizer]
    decay_rates: tuple[str, ...]


# A new optimizer is an entry here, its memory in memory.OPTIMIZER_MEMORY, and a choice of
# TrainConfig.optimizer; a test holds the three together.
OPTIMIZERS = {
    "adamw": OptimizerKind(build_adamw_in_any_dtype, ("beta1", "beta2")),
    "muon": OptimizerKind(build_muon, ("beta1", "beta2", "muon_momentum")),
}


def total_norm(gradients: list[Tensor], ranks: Ranks = ONE_PROCESS) -> Tensor:
    """Return the norm of all gradients together: 0-dim, in their dtype, on their device.

    Squares are summed in float64 (MPS has none), so that the sum does not depend on how they are
    cut: neither on the ranks that hold them nor on the slices that are widened at a time.
    """
    device = gradients[0].device
    wide = sums_dtype(device)
    total = torch.zeros((), dtype=wide, device=device)
    if squares.takes(gradients):
        total = squares.sum_of_squares(gradients)
    else:
        for gradient in gradients:
            for part in gradient.reshape(-1).split(_elements_at_once(gradient)):
                total += torch.linalg.vector_norm(part, dtype=wide).square()
    return ranks.sum_of_shards_(total).sqrt().to(gradients[0].dtype)


def check_skips(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that cannot be told to skip a step."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"fit cannot tell {type(optimizer).__name__} to skip a step whose gradient is not "
            "finite: make it with fused=True, or by build_optimizer"
        )


# ----------------------------------------------------------------------------------------- the step
class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the groups that have a momentum, AdamW for the others.

    Moments are kept in `state_dtype` between steps and computed in float32. As in torch's fused
    optimizers, a step divides gradients by the tensor `grad_scale` and changes nothing, not one
    bit, where the tensor `found_inf` is 1. Whoever calls step() may set these attributes
    (GradScaler does), and the host waits for neither.
    """

    # What GradScaler asks before it sets the two.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        state_dtype: torch.dtype = torch.float32,
        ranks: Ranks = ONE_PROCESS,
    ):
        self.ranks = ranks
        # Of Muon's products; None = the device's.
        self.products_dtype: torch.dtype | None = None
        super().__init__(
            groups,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=0.0,
                state_dtype=state_dtype,
                momentum=None,
                row_parts=1,
                fused=True,
            ),
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the loop has done its passes
        """Update every parameter that has a gradient."""
        initialise_state(self)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                given = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
                found_inf, grad_scale = (
                    None if t is None else t.to(parameters[0].device, non_blocking=True)
                    for t in given
                )
                (self._adamw if group["momentum"] is None else self._muon)(
                    group, parameters, found_inf, grad_scale
                )

    def _adamw(
        self,
        group: dict,
        parameters: list[Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        """Do torch's fused AdamW; bfloat16 moments are widened for it a slice at a time."""
        steps = [self.state[parameter]["step"] for parameter in parameters]
        held = [tensors for tensors in map(self._held, parameters) if tensors[0].numel()]
        values = dict(
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        torch._foreach_add_(steps, 1)
        # A rank may hold nothing of a group, which the kernel refuses.
        if held and group["state_dtype"] == torch.float32:
            weights, gradients, exp_avgs, exp_avg_sqs, own_steps = map(
                list, zip(*held, strict=True)
            )
            torch._fused_adamw_(weights, gradients, exp_avgs, exp_avg_sqs, [], own_steps, **values)
        else:
            for *tensors, step in held:
                flat = (tensor.reshape(-1) for tensor in tensors)
                for weights, gradient, *moments in zip(
                    *(t.split(_elements_at_once(t)) for t in flat), strict=True
                ):
                    wide = [moment.float() for moment in moments]
                    torch._fused_adamw_(
                        [weights], [gradient], wide[:1], wide[1:], [], [step], **values
                    )
                    torch._foreach_copy_(moments, wide)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _held(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """Return what this rank holds of a parameter, its gradient and its state, in their order.

        Kernels then see plain tensors.
        """
        state = self.state[parameter]
        tensors = (
            parameter,
            _gradient(parameter),
            *(state[k] for k in STATE_KEYS[1:] if k in state),
        )
        local = tuple(map(self.ranks.local, tensors))
        return (*local, state["step"]) if "step" in state else local

    def _muon(
        self,
        group: dict,
        parameters: list[Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        """Update matrices of one shape together, a bounded number at a time.

        It does not matter which tensors they are stacked in. A stack in shards is split between
        matrices. Another matrix is split within itself: its update is gathered, and every rank
        orthogonalises the whole of it.
        """
        by_shape: dict[tuple, list[Matrices]] = {}
        for parameter in parameters:
            R, C = parameter.shape[-2] // group["row_parts"], parameter.shape[-1]
            at_once = max(1, _elements_at_once(parameter) // (R * C))
            pieces = by_shape.setdefault((R, C, at_once), [])
            held = self._held(parameter)
            if parameter.dim() == 2 and self.ranks.is_split(parameter):
                weights, gradient, momentum = (tensor[None] for tensor in held)
                pieces.append(Matrices(weights, gradient, momentum, parameter))
            elif held[0].numel():
                stacks = (tensor.reshape(-1, R, C).split(at_once) for tensor in held)
                pieces += (Matrices(*parts) for parts in zip(*stacks, strict=True))
        skip = None if found_inf is None else found_inf == 1
        for (*_, at_once), pieces in by_shape.items():
            for batch in _batches(pieces, at_once):
                self._muon_step(batch, group, grad_scale, skip)

    def _muon_step(
        self, batch: list[Matrices], group: dict, grad_scale: Tensor | None, skip: Tensor | None
    ) -> None:
        """Do Muon's update of some matrices of one shape.

        It is Nesterov momentum, orthogonalised and scaled to MUON_RMS. An orthogonal R x C matrix
        has a root mean square of 1 / sqrt(max(R, C)).
        """
        weights, split = batch[0].weights, batch[0].split
        device = weights.device
        dtype = self.products_dtype or _orthogonalise_dtype(device)
        R, C = weights.shape[1:] if split is None else self.ranks.shape_of(split)
        before_, after_, number = passes(device)
        counts = [len(matrices.weights) for matrices in batch]
        updates = torch.empty(sum(counts), R, C, dtype=update_dtype(dtype), device=device)
        parts, beta = updates.split(counts), number(group["momentum"])
        facts = []
        for (_, gradient, momentum, split), part in zip(batch, parts, strict=True):
            own = part if split is None else part.new_empty(gradient.shape)
            fact = before_(gradient, momentum, own, beta, grad_scale, skip)
            if split is not None:
                # A sum over the ranks would depend on their number. That of the gradient's squares
                # is asked whether it is 0.
                self.ranks.sum_of_shards_(fact[0])
                part.copy_(self.ranks.whole(split, own[0])[None])
                fact[1] = sums_of_squares(part)
            facts.append(fact)
        gradient_squares, squares = torch.cat(facts, dim=1)
        orthogonal = orthogonalise(updates, dtype, squares)
        lr, weight_decay = group["lr"], group["weight_decay"]
        keep, step = number(1 - lr * weight_decay), number(-lr * MUON_RMS * math.sqrt(max(R, C)))
        for (weights, _, _, split), part, size in zip(
            batch, orthogonal.split(counts), gradient_squares.split(counts), strict=True
        ):
            if split is not None:
                part = self.ranks.part_of(split, part[0])[None]
            after_(weights, part, size, keep, step, skip)


class Matrices(NamedTuple):
    """Some matrices, [n, R, C] each, with what Muon needs of them.

    split: the parameter, if this rank holds rows of one matrix only.
    """

    weights: Tensor
    gradient: Tensor
    momentum: Tensor
    split: Tensor | None = None


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "step() leaves out parameters without a gradient"
    return parameter.grad


def _elements_at_once(parameter: Tensor) -> int:
    """Return how many elements to make temporaries for."""
    return ELEMENTS_ON_A_CPU if parameter.device.type == "cpu" else ELEMENTS_ON_A_GPU


def _batches(pieces: list[Matrices], at_once: int) -> Iterator[list[Matrices]]:
    """Yield lists of consecutive pieces that hold at most `at_once` matrices each.

    None of the pieces holds more.
    """
    batch: list[Matrices] = []
    for piece in pieces:
        if sum(len(matrices.weights) for matrices in (*batch, piece)) > at_once:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _orthogonalise_dtype(device: torch.device) -> torch.dtype:
    """Return half precision on CUDA, as the result is approximate anyway; float32 elsewhere.

    A CPU is timed when a run begins (runtime/training/clocks.py), not at each step.
    """
    return choose_dtype("auto", device) if device.type == "cuda" else torch.float32
