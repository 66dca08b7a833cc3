"""All experts of a block as one operation for CPUs: each expert on one core, from its input to its output, while it is in the cache.

The plain path in model_parts.py cuts every small matrix product among all threads and reads the hidden layer from memory for
each elementwise step. Here a thread takes whole experts. Same results, except for the last bits of a product that the plain
path would have cut. `runtime.device.choose_kernels` puts it into `Experts.feed_forward`; benchmarks/experts.py compares the two.
"""
from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from config_model import SWIGLU_LIMIT, SWIGLU_STEEPNESS

MOST_ROWS_INLINE = 256    # fewer rows than this are not worth waking other threads
MOST_IMBALANCE = 1.3      # of the busiest thread, over a fair share: beyond it the threads share each product instead

# R rows sorted by expert, E experts, C d_model, F d_ff, I = F (gelu) or 2F (gated: gate rows before up rows).


@torch.library.custom_op("gptoss::feed_forward", mutates_args=(), device_types="cpu")
def feed_forward(x_RC: Tensor, w_in_EIC: Tensor, b_in_EI: Tensor | None, w_out_ECF: Tensor, b_out_EC: Tensor | None, counts_E: Tensor,
                 activation: str) -> tuple[Tensor, Tensor]:
    """Rows through their experts: ([R, C], [R, I]), the second what the backward pass needs, the hidden layer before its activation.

    counts_E int64: rows of each expert; they must sum to R. All floats have one dtype.
    """
    h_RI, y_RC = x_RC.new_empty(len(x_RC), w_in_EIC.shape[1]), torch.empty_like(x_RC)

    def one(e: int, rows: slice) -> None:
        if rows.start < rows.stop:
            h = _linear(x_RC[rows], w_in_EIC[e], b_in_EI, e, h_RI[rows])
            _linear(_activation(h, activation), w_out_ECF[e], b_out_EC, e, y_RC[rows])

    _each_expert(one, counts_E)
    return y_RC, h_RI


@torch.library.custom_op("gptoss::feed_forward_backward", mutates_args=(), device_types="cpu")
def _feed_forward_backward(grad_RC: Tensor, x_RC: Tensor, h_RI: Tensor, w_in_EIC: Tensor, w_out_ECF: Tensor, counts_E: Tensor,
                           activation: str, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to x, w_in, b_in, w_out, b_out (the biases' empty without them). An expert without rows gets zeros."""
    grads = _empty_gradients(x_RC, w_in_EIC, w_out_ECF, has_bias)
    grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out = grads

    def one(e: int, rows: slice) -> None:
        grad, h = grad_RC[rows], h_RI[rows]
        torch.mm(grad.T, _activation(h, activation), out=grad_w_out[e])
        grad_h = _activation_backward(grad @ w_out_ECF[e], h, activation)
        torch.mm(grad_h, w_in_EIC[e], out=grad_x[rows])
        torch.mm(grad_h.T, x_RC[rows], out=grad_w_in[e])
        if has_bias:
            torch.sum(grad, dim=0, out=grad_b_out[e])
            torch.sum(grad_h, dim=0, out=grad_b_in[e])

    _each_expert(one, counts_E)
    return grads


def _linear(x: Tensor, w: Tensor, b_E: Tensor | None, e: int, out: Tensor) -> Tensor:
    return torch.mm(x, w.T, out=out) if b_E is None else torch.addmm(b_E[e], x, w.T, out=out)


def _activation(h: Tensor, activation: str) -> Tensor:
    """As model_parts.activate, with fewer tensors in between."""
    if activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        return F.silu(gate).mul_(up)
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return torch.sigmoid(SWIGLU_STEEPNESS * gate).mul_(gate).mul_(up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT).add_(1))


def _activation_backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    """The gradient with respect to h of _activation(h), from that with respect to its result, which is used up."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, h)
    grad_h = torch.empty_like(h)
    (gate, up), (grad_gate, grad_up) = h.chunk(2, dim=-1), grad_h.chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        inside_gate, inside_up = gate <= SWIGLU_LIMIT, up.abs() <= SWIGLU_LIMIT
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        sigmoid = torch.sigmoid(SWIGLU_STEEPNESS * gate)
        torch.mul(grad * gate * sigmoid, inside_up, out=grad_up)
        torch.mul(grad * (up + 1) * sigmoid * (1 + SWIGLU_STEEPNESS * gate * (1 - sigmoid)), inside_gate, out=grad_gate)
        return grad_h
    torch.mul(grad, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_h


# --------------------------------------------------------------------------------------------------------------- threads
def _each_expert(function: Callable[[int, slice], None], counts_E: Tensor) -> None:
    """Call function(expert, slice of its rows) for every expert: on one thread each, or one after another on all threads
    where there are few rows or a few experts have most of them."""
    groups, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        groups.append((e, slice(start, start + count)))
        start += count
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    parts = shares(groups, threads) if threads > 1 and start >= MOST_ROWS_INLINE else None
    if parts is None:
        _call(function, groups, inference)
    else:
        for _ in _pool(threads, os.getpid()).map(lambda part: _call(function, part, inference), parts):
            pass


def shares(groups: list[tuple[int, slice]], threads: int) -> list[list[tuple[int, slice]]] | None:
    """The groups for each thread, largest first to whoever has least; None where the busiest gets far more than a fair share."""
    parts: list[list[tuple[int, slice]]] = [[] for _ in range(threads)]
    rows = [0] * threads
    for e, group in sorted(groups, key=lambda group: group[1].start - group[1].stop):
        least = rows.index(min(rows))
        parts[least].append((e, group))
        rows[least] += group.stop - group.start
    return parts if max(rows) * threads <= MOST_IMBALANCE * sum(rows) else None


def _call(function: Callable[[int, slice], None], groups: list[tuple[int, slice]], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():  # a thread has modes of its own
        for e, rows in groups:
            function(e, rows)


@functools.lru_cache(maxsize=1)
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """Threads whose own products are not cut further; a forked process (another pid) makes its own."""
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        torch.get_num_threads()  # a thread's first question sets it to the process's number, so it has to come before
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="experts")
    list(pool.map(start, range(threads)))
    torch.set_num_threads(threads)  # what the workers set was theirs, and the number for threads yet to come
    return pool


# ----------------------------------------------------------------------------------------------------- for the compiler
def _empty_gradients(x_RC: Tensor, w_in_EIC: Tensor, w_out_ECF: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def bias(w: Tensor) -> Tensor:
        return w.new_empty(w.shape[:2] if has_bias else 0)
    return torch.empty_like(x_RC), torch.empty_like(w_in_EIC), bias(w_in_EIC), torch.empty_like(w_out_ECF), bias(w_out_ECF)


@feed_forward.register_fake
def _(x_RC, w_in_EIC, b_in_EI, w_out_ECF, b_out_EC, counts_E, activation):
    return torch.empty_like(x_RC), x_RC.new_empty(x_RC.shape[0], w_in_EIC.shape[1])


@_feed_forward_backward.register_fake
def _(grad_RC, x_RC, h_RI, w_in_EIC, w_out_ECF, counts_E, activation, has_bias):
    return _empty_gradients(x_RC, w_in_EIC, w_out_ECF, has_bias)


def _save_for_backward(ctx, inputs, output):
    x_RC, w_in_EIC, b_in_EI, w_out_ECF, _, counts_E, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_RC, output[1], w_in_EIC, w_out_ECF, counts_E)
    ctx.has_bias = b_in_EI is not None


def _backward(ctx, grad_RC, _):
    if grad_RC is None:
        return (None,) * 7
    grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out = _feed_forward_backward(grad_RC.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.has_bias)
    return grad_x, grad_w_in, grad_b_in if ctx.has_bias else None, grad_w_out, grad_b_out if ctx.has_bias else None, None, None


feed_forward.register_autograd(_backward, setup_context=_save_for_backward)
