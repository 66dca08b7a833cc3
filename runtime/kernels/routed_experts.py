"""All experts of a block in C, on a CPU in float32: gather, products, activation, weighted sum.

runtime/kernels/experts.c does it, forward and backward. The machine's own compiler compiles it
(runtime/kernels/compile.py). Where there is none, or for another dtype, the model takes
runtime/kernels/cpu_experts.py, whose results are the same except for rounding.
runtime/kernels/choose.py puts it into `LocalDispatcher.kernel`; benchmarks/experts.py compares
them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.compile import kernel, parallel_region
from runtime.kernels.cpu_experts import feed_forward
from runtime.kernels.eager import called, eager_function
from runtime.kernels.scratch import scratch

SOURCE = Path(__file__).with_name("experts.c")
# In the order of the C code's enum.
ACTIVATIONS = ("gelu", "swiglu", "swiglu_clamped")
NUMBERS = "N R C F I E K"
POINTERS = (
    "parallel counts experts x weights w_in b_in w_out b_out h y_rows y "
    "grad grad_h a grad_x_rows grad_x grad_weights grad_w_in grad_b_in grad_w_out grad_b_out "
    "order inverse tasks rooms"
)


class _Experts(ctypes.Structure):
    """The C code's `Experts`."""

    _fields_ = (
        [(name, c_int64) for name in NUMBERS.split()]
        + [("activation", c_int32), ("threads", c_int32)]
        + [(name, c_void_p) for name in POINTERS.split()]
        + [("room_size", c_int64)]
    )


@functools.cache
def library(dtype: torch.dtype = torch.float32, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing).

    dtype: float32, or float64 in tests, as are further flags.
    """
    return kernel(SOURCE, _Experts, dtype == torch.float64, *flags, gptoss_room=2, gptoss_parts=2)


def dispatch(
    x_NC: Tensor, weights_NK: Tensor | None, experts_NK: Tensor | None, counts_E: Tensor, experts
) -> Tensor | None:
    """Do what LocalDispatcher does, [N, C]; None for experts, a dtype or a mode that C lacks.

    experts: model_parts.Experts. Those with adapters have parameters of their own, and dropout
    changes the hidden layer.
    """
    is_plain = isinstance(experts, torch.nn.Module) and not hasattr(experts, "cpu_parameters")
    if not is_plain or x_NC.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    if experts.w_in.dtype != torch.float32 or (experts.dropout and experts.training):
        return None
    return computed(
        x_NC,
        weights_NK,
        experts_NK,
        counts_E,
        experts.w_in,
        experts.b_in,
        experts.w_out,
        experts.b_out,
        experts.activation,
    )[0]


def rows_of_experts(
    x_RC: Tensor,
    w_in_EIC: Tensor,
    b_in_EI: Tensor | None,
    w_out_ECF: Tensor,
    b_out_EC: Tensor | None,
    counts_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Do what runtime/kernels/cpu_experts.py's feed_forward does, in C where the dtype is float32.

    Rows [R, C] are sorted by expert already.
    """
    if x_RC.dtype != torch.float32:
        return feed_forward(x_RC, w_in_EIC, b_in_EI, w_out_ECF, b_out_EC, counts_E, activation)
    return computed(x_RC, None, None, counts_E, w_in_EIC, b_in_EI, w_out_ECF, b_out_EC, activation)


def computed(*given) -> tuple[Tensor, Tensor]:
    """Return what `routed_experts` does, in the way that costs least."""
    return called(routed_experts, _RoutedExperts, _forward, given)


# N tokens, K experts of each, R = N * K rows, E experts, C d_model, F d_ff, I = F (gelu) or 2F.
def _forward(
    x_NC: Tensor,
    weights_NK: Tensor | None,
    experts_NK: Tensor | None,
    counts_E: Tensor,
    w_in_EIC: Tensor,
    b_in_EI: Tensor | None,
    w_out_ECF: Tensor,
    b_out_EC: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return (each token's experts' outputs, weighted and summed [N, C]; hidden layers [R, I]).

    The second is for the backward pass: before the activation, rows sorted by expert. Without
    experts_NK (and weights_NK), x is the rows themselves, sorted by expert. counts_E int64: rows of
    each expert. All floats have one dtype, float32, or float64 in tests. ValueError where counts
    and experts do not fit.
    """
    x_NC = x_NC.contiguous()
    job = _job(x_NC, weights_NK, experts_NK, counts_E, w_in_EIC, w_out_ECF, activation)
    y_NC = torch.empty_like(x_NC)
    h_RI = x_NC.new_empty(job.R, job.I)
    routed = experts_NK is not None
    y_RC = scratch.get("rows", job.R * job.C, x_NC.dtype) if routed else y_NC
    _call(job, "forward", b_in=b_in_EI, b_out=b_out_EC, h=h_RI, y=y_NC, y_rows=y_RC)
    return y_NC, h_RI


routed_experts = torch.library.custom_op(
    "gptoss::routed_experts", _forward, mutates_args=(), device_types="cpu"
)


def _gradients(
    grad_NC: Tensor,
    x_NC: Tensor,
    weights_NK: Tensor | None,
    experts_NK: Tensor | None,
    counts_E: Tensor,
    h_RI: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    b_out_EC: Tensor | None,
    activation: str,
    needed: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, weights, w_in, b_in, w_out, b_out.

    needed: which of the six are wanted. The others come back empty and cost no product.
    """
    x_NC = x_NC.contiguous()
    job = _job(x_NC, weights_NK, experts_NK, counts_E, w_in_EIC, w_out_ECF, activation)
    grads = _empty_gradients(x_NC, weights_NK, w_in_EIC, w_out_ECF, needed)
    names = ("grad_x", "grad_weights", "grad_w_in", "grad_b_in", "grad_w_out", "grad_b_out")
    given = {name: g for name, g, need in zip(names, grads, needed, strict=True) if need}
    dtype = x_NC.dtype
    if "grad_x" in given:
        routed = experts_NK is not None
        rows = scratch.get("rows", job.R * job.C, dtype) if routed else grads[0]
        given["grad_x_rows"] = rows
    if "grad_w_out" in given:
        given["a"] = scratch.get("a", job.R * job.F, dtype)
    grad_h = scratch.get("hidden", job.R * job.I, dtype)
    _call(
        job,
        "backward",
        grad=grad_NC.contiguous(),
        h=h_RI,
        grad_h=grad_h,
        b_out=b_out_EC,
        **given,
    )
    return grads


_routed_experts_backward = torch.library.custom_op(
    "gptoss::routed_experts_backward", _gradients, mutates_args=(), device_types="cpu"
)


def _job(x_NC, weights_NK, experts_NK, counts_E, w_in_EIC, w_out_ECF, activation) -> _Experts:
    """Return what forward and backward have in common."""
    N, C = x_NC.shape
    K = 1 if experts_NK is None else experts_NK.shape[1]
    E, F = len(w_in_EIC), w_out_ECF.shape[2]
    tensors = dict(
        x=x_NC,
        weights=weights_NK,
        experts=experts_NK,
        counts=counts_E,
        w_in=w_in_EIC,
        w_out=w_out_ECF,
    )
    job = _Experts(N=N, R=N * K, C=C, F=F, I=w_in_EIC.shape[1], E=E, K=K)
    job.activation = ACTIVATIONS.index(activation)
    job.held = _set(job, tensors)
    return job


def _set(job: _Experts, tensors: Mapping[str, Tensor | None]) -> list[Tensor]:
    """Give pointers to the C code; return the tensors, which must live as long."""
    held = []
    for name, tensor in tensors.items():
        if tensor is not None:
            held.append(tensor.contiguous())
            setattr(job, name, held[-1].data_ptr())
    return held


def _call(job: _Experts, which: str, **tensors: Tensor | None) -> None:
    dtype = job.held[0].dtype
    code, why = library(dtype)
    if code is None:
        raise ValueError(why)
    held = _set(job, tensors)
    job.threads = torch.get_num_threads()
    job.parallel = parallel_region()
    # One expert may have all rows.
    job.room_size = code.gptoss_room(job.F, job.R)
    rooms = dict(
        order=scratch.get("order", job.R, torch.int64),
        inverse=scratch.get("inverse", job.R, torch.int64),
        tasks=scratch.get("tasks", 3 * code.gptoss_parts(job.R, job.E), torch.int64),
        rooms=scratch.get("rooms", job.threads * job.room_size, dtype),
    )
    held += _set(job, rooms)
    if getattr(code, f"gptoss_experts_{which}")(ctypes.byref(job)):
        raise ValueError("the experts' counts do not fit the rows: count them from experts_NK")


# --------------------------------------------------------------------------------- for the compiler
def _empty_gradients(
    x_NC: Tensor,
    weights_NK: Tensor | None,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    (E, I, C), F = w_in_EIC.shape, w_out_ECF.shape[2]
    weights = (0,) if weights_NK is None else weights_NK.shape
    shapes = (x_NC.shape, weights, (E, I, C), (E, I), (E, C, F), (E, C))
    return [x_NC.new_empty(s if need else (0,)) for s, need in zip(shapes, needed, strict=True)]


@routed_experts.register_fake
def _(x_NC, weights_NK, experts_NK, counts_E, w_in_EIC, b_in_EI, w_out_ECF, b_out_EC, activation):
    K = 1 if experts_NK is None else experts_NK.shape[1]
    return torch.empty_like(x_NC), x_NC.new_empty(x_NC.shape[0] * K, w_in_EIC.shape[1])


@_routed_experts_backward.register_fake
def _(grad, x_NC, weights_NK, experts, counts, h, w_in, w_out, b_out, activation, needed):
    return _empty_gradients(x_NC, weights_NK, w_in, w_out, needed)


def _save_for_backward(ctx, inputs, output):
    x_NC, weights_NK, experts_NK, counts_E, w_in, _, w_out, b_out, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_NC, weights_NK, experts_NK, counts_E, output[1], w_in, w_out, b_out)


def _backward(ctx, grad_NC, _, gradients=_routed_experts_backward):
    if grad_NC is None:
        return (None,) * 9
    wanted = ctx.needs_input_grad
    needed = [wanted[0], wanted[1], *wanted[4:8]]
    grads = gradients(grad_NC, *ctx.saved_tensors, ctx.activation, needed)
    x, weights, *others = (g if need else None for g, need in zip(grads, needed, strict=True))
    return x, weights, None, None, *others, None


routed_experts.register_autograd(_backward, setup_context=_save_for_backward)
# Where no compiler is at work.
_RoutedExperts = eager_function(
    "_RoutedExperts",
    _forward,
    _save_for_backward,
    functools.partial(_backward, gradients=_gradients),
)
