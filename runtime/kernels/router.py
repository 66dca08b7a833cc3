"""A router's choice, weights and statistics in C, on a CPU in float32: runtime/kernels/router.c.

PyTorch makes some thirty operations of them, each of which costs more than its arithmetic. The
machine's own compiler compiles the C code (runtime/kernels/compile.py). What it lacks, and a
compiled model, is left to `MoE.routed`, whose results are the same except for rounding.
runtime/kernels/choose.py puts `route` into `MoE.route_kernel`.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.kernels.compile import kernel, parallel_region
from runtime.kernels.eager import is_eager_float32, once_differentiable
from runtime.kernels.scratch import scratch

SOURCE = Path(__file__).with_name("router.c")
NUMBERS = "N E K threads task_rows"
POINTERS = (
    "parallel logits selection shares weights logs experts counts mean z_loss entropy sums "
    "grad_weights grad_mean grad_z_loss grad_logits"
)


class _Router(ctypes.Structure):
    """The C code's `Router`."""

    _fields_ = [(name, c_int64) for name in NUMBERS.split()] + [
        (name, c_void_p) for name in POINTERS.split()
    ]


class Routed(NamedTuple):
    """What `MoE.routed` returns. Gradients pass through weights, mean and z_loss."""

    weights_NK: Tensor  # of each token's experts, which sum to 1
    experts_NK: Tensor  # int64
    counts_E: Tensor  # int64: tokens of each expert
    mean_E: Tensor  # mean of the tokens' softmax
    z_loss: Tensor  # mean squared log-partition
    entropy: Tensor  # mean entropy of the softmax (nats)


@functools.cache
def library(dtype: torch.dtype = torch.float32, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing).

    dtype: float32, or float64 in tests, as are further flags.
    """
    return kernel(SOURCE, _Router, dtype == torch.float64, *flags, gptoss_task_rows=1)


def route(router, x_NC: Tensor) -> Routed | None:
    """Do what MoE.routed does with a model_parts.Router; None for what C lacks.

    That is a dtype other than float32, autocast, no token, and any router that is not as it was: of
    another class, with more inside, or with hooks, which are given what its forward pass returns.
    """
    if not _is_plain(router) or torch.is_autocast_enabled("cpu") or not len(x_NC):
        return None
    tensors = (x_NC, router.weight, router.bias, router.selection_bias)
    if not is_eager_float32(*tensors) or not _fits(router.weight, tensors[3], router.top_k):
        return None
    return routed(*tensors, router.top_k)


# What torch.nn.Module calls next to a forward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_plain(router) -> bool:
    """Return whether a router computes with the three tensors that it had, and nobody watches."""
    return (
        type(router).forward.__qualname__ == "Router.forward"
        and "forward" not in router.__dict__
        and router._parameters.keys() == {"weight", "bias"}
        and router._buffers.keys() == {"selection_bias"}
        and not router._modules
        and not any(getattr(router, hooks) for hooks in HOOKS)
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _fits(weight_EC: Tensor, selection_E: Tensor | None, K: int) -> bool:
    E = len(weight_EC)
    return 1 <= K <= E and (selection_E is None or selection_E.shape == (E,))


def routed(
    x_NC: Tensor, weight_EC: Tensor, bias_E: Tensor | None, selection_E: Tensor | None, K: int
) -> Routed:
    """Route N tokens to K of E experts by the softmax of x @ weight.T + bias.

    selection_E: added to the shares for the choice alone. All have one dtype that `library` has.
    Of equal scores the first is chosen. ValueError where K or selection_E do not fit E.
    """
    if not _fits(weight_EC, selection_E, K):
        shape = None if selection_E is None else list(selection_E.shape)
        raise ValueError(f"{len(weight_EC)} experts, {K} for a token, an expert bias of {shape}")
    selection_E = None if selection_E is None else selection_E.contiguous()
    return Routed(*_Route.apply(x_NC, weight_EC, bias_E, selection_E, K))


class _Route(torch.autograd.Function):
    """`routed`, with gradients of x, the weight and the bias."""

    @staticmethod
    def forward(ctx, x_NC, weight_EC, bias_E, selection_E, K):
        logits_NE = F.linear(x_NC, weight_EC, bias_E)
        (N, E), made = logits_NE.shape, logits_NE.new_empty
        experts_NK, counts_E = (made(size, dtype=torch.int64) for size in ((N, K), E))
        tensors = dict(weights=made(N, K), experts=experts_NK, counts=counts_E)
        tensors |= dict(mean=made(E), z_loss=made(()), entropy=made(()))
        # The shares take the place of what they are made of.
        saved = dict(shares=logits_NE, logs=made(N))
        _run("forward", N, E, K, logits=logits_NE, selection=selection_E, **saved, **tensors)
        ctx.mark_non_differentiable(experts_NK, counts_E, tensors["entropy"])
        # None, not zeros, for a result that no loss has.
        ctx.set_materialize_grads(False)
        kept = tensors["weights"], experts_NK, *saved.values()
        ctx.save_for_backward(x_NC, weight_EC, *kept)
        return tuple(tensors.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weights_NK, _experts, _counts, grad_mean_E, grad_z_loss, _entropy):
        x_NC, weight_EC, weights_NK, experts_NK, shares_NE, logs_N = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if shares_NE.shape[1] == 1 and not grad_z_loss:
            # The share is 1, whatever the finite score: nothing for x, zeros for what is trained.
            bias_E = torch.zeros_like(weight_EC[:, 0]) if wanted[2] else None
            return None, torch.zeros_like(weight_EC) if wanted[1] else None, bias_E, None, None
        grads = (grad_weights_NK, grad_mean_E, grad_z_loss)
        weights, mean, z_loss = (None if grad is None else grad.contiguous() for grad in grads)
        grad_NE = torch.empty_like(shares_NE)
        tensors = dict(shares=shares_NE, weights=weights_NK, logs=logs_N, experts=experts_NK)
        tensors |= dict(grad_weights=weights, grad_mean=mean, grad_z_loss=z_loss)
        _run("backward", *shares_NE.shape, weights_NK.shape[1], grad_logits=grad_NE, **tensors)
        return (
            grad_NE @ weight_EC if wanted[0] else None,
            grad_NE.t() @ x_NC if wanted[1] else None,
            grad_NE.sum(dim=0) if wanted[2] else None,
            None,
            None,
        )


def _run(which: str, N: int, E: int, K: int, **tensors: Tensor | None) -> None:
    shares_NE = tensors["shares"]
    assert shares_NE is not None
    code, why = library(shares_NE.dtype)
    if code is None:
        raise ValueError(why)
    job = _Router(N=N, E=E, K=K, task_rows=code.gptoss_task_rows(E))
    job.threads, job.parallel = torch.get_num_threads(), parallel_region()
    if which == "forward":
        tasks = -(-N // job.task_rows)
        tensors["sums"] = scratch.get("router", tasks * (E + 2), shares_NE.dtype)
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(job, name, tensor.data_ptr())
    getattr(code, f"gptoss_router_{which}")(ctypes.byref(job))
