"""All experts of a block as one operation for CPUs: each expert on one core, while it is in cache.

The plain path in model_parts.py cuts every small matrix product among all threads, and reads the
hidden layer from memory for each elementwise step. Here a thread takes whole experts. The results
are the same, except for the last bits of a product that the plain path would have cut.
runtime/kernels/choose.py puts it into `Experts.feed_forward`; benchmarks/experts.py compares them.

An expert's row count differs at each step, and oneDNN, which does GELU and the products in
half precision, builds and keeps a kernel of up to 0.9 MB for each count, up to 1,024 of them:
memory grew with every step. So it only meets counts of `padded_rows` (benchmarks/memory.py).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from config_model import SWIGLU_LIMIT, SWIGLU_STEEPNESS
from runtime.kernels.grouped_linear import empty_gradients

# Fewer rows than this are not worth waking other threads.
MOST_ROWS_INLINE = 256
# Of the busiest thread, over a fair share: beyond it the threads share each product instead.
MOST_IMBALANCE = 1.3
# Rows of half precision are padded to multiples of this, on which oneDNN is also faster.
ROWS_APART = 64
# Rows that GELU and a product of half precision are given at once. oneDNN meets no larger counts
# but in the weights' gradients, which sum over rows.
ROWS_AT_ONCE = 256

# R rows sorted by expert, E experts, C d_model, F d_ff, I = F (gelu) or 2F (gated: gate rows before
# up rows).


@torch.library.custom_op("gptoss::feed_forward", mutates_args=(), device_types="cpu")
def feed_forward(
    x_RC: Tensor,
    w_in_EIC: Tensor,
    b_in_EI: Tensor | None,
    w_out_ECF: Tensor,
    b_out_EC: Tensor | None,
    counts_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Pass rows through their experts; return ([R, C], [R, I]).

    The second is what the backward pass needs: the hidden layer before its activation.
    counts_E int64: rows of each expert; they must sum to R. All floats have one dtype.
    """
    h_RI, y_RC = x_RC.new_empty(len(x_RC), w_in_EIC.shape[1]), torch.empty_like(x_RC)

    def one(e: int, rows: slice) -> None:
        if rows.start < rows.stop:
            h = _linear(_padded(x_RC[rows]), w_in_EIC[e], b_in_EI, e, h_RI[rows])
            _linear(_activation(h, activation), w_out_ECF[e], b_out_EC, e, y_RC[rows])

    _each_expert(one, counts_E)
    return y_RC, h_RI


@torch.library.custom_op("gptoss::feed_forward_backward", mutates_args=(), device_types="cpu")
def _feed_forward_backward(
    grad_RC: Tensor,
    x_RC: Tensor,
    h_RI: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    counts_E: Tensor,
    activation: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, w_in, b_in, w_out, b_out.

    needed: which of the five are wanted. The others come back empty and cost no product. An expert
    without rows gets zeros.
    """
    grads = _empty_gradients(x_RC, w_in_EIC, w_out_ECF, needed)
    grad_x, grad_w_in, grad_b_in, grad_w_out, grad_b_out = grads
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out = needed

    def one(e: int, rows: slice) -> None:
        if rows.start == rows.stop:
            for gradient in grads[1:]:
                gradient[e : e + 1].zero_()
            return
        # Rows of zeros add zeros to every sum over the rows.
        grad, h = _padded(grad_RC[rows]), _padded(h_RI[rows])
        if needs_w_out:
            torch.mm(grad.T, _activation(h, activation), out=grad_w_out[e])
        if needs_b_out:
            torch.sum(grad, dim=0, out=grad_b_out[e])
        if not (needs_x or needs_w_in or needs_b_in):
            return
        grad_a = _product(grad, w_out_ECF[e], _temporary(h, w_out_ECF.shape[2]))
        grad_h = _activation_backward(grad_a, h, activation)
        if needs_x:
            _product(grad_h, w_in_EIC[e], grad_x[rows])
        if needs_w_in:
            torch.mm(grad_h.T, _padded(x_RC[rows]), out=grad_w_in[e])
        if needs_b_in:
            torch.sum(grad_h, dim=0, out=grad_b_in[e])

    _each_expert(one, counts_E)
    return grads


def _linear(x: Tensor, w: Tensor, b_E: Tensor | None, e: int, out: Tensor) -> Tensor:
    return _product(x, w.T, out, None if b_E is None else b_E[e])


def _product(x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ w + bias, of which `out` gets as many rows as it has; returns all of them."""
    whole = out if len(out) == len(x) else _temporary(x, w.shape[1])
    at_once = ROWS_AT_ONCE if x.element_size() == 2 else len(x)
    for x_piece, piece in zip(x.split(at_once), whole.split(at_once), strict=True):
        if bias is None:
            torch.mm(x_piece, w, out=piece)
        else:
            torch.addmm(bias, x_piece, w, out=piece)
    if whole is not out:
        out.copy_(whole[: len(out)])
    return whole


def _activation(h: Tensor, activation: str) -> Tensor:
    """As model_parts.activate, with fewer tensors in between."""
    if activation == "gelu":
        y = _temporary(h, h.shape[1])
        _in_few_shapes(lambda h, y: torch.ops.aten.gelu.out(h, out=y), h, y)
        return y
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        return torch.ops.aten.silu.out(gate, out=_temporary(h, gate.shape[1])).mul_(up)
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return (
        torch.sigmoid(SWIGLU_STEEPNESS * gate)
        .mul_(gate)
        .mul_(up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT).add_(1))
    )


def _activation_backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    """Return the gradient of h in _activation(h) from that of the result, which is used up."""
    grad_h = _temporary(h, h.shape[1])
    if activation == "gelu":
        backward = torch.ops.aten.gelu_backward.grad_input
        _in_few_shapes(lambda grad, h, out: backward(grad, h, grad_input=out), grad, h, grad_h)
        return grad_h
    (gate, up), (grad_gate, grad_up) = h.chunk(2, dim=-1), grad_h.chunk(2, dim=-1)
    if activation == "swiglu_clamped":
        inside_gate, inside_up = gate <= SWIGLU_LIMIT, up.abs() <= SWIGLU_LIMIT
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        sigmoid = torch.sigmoid(SWIGLU_STEEPNESS * gate)
        torch.mul(grad * gate * sigmoid, inside_up, out=grad_up)
        torch.mul(
            grad * (up + 1) * sigmoid * (1 + SWIGLU_STEEPNESS * gate * (1 - sigmoid)),
            inside_gate,
            out=grad_gate,
        )
        return grad_h
    activated = torch.ops.aten.silu.out(gate, out=_temporary(h, gate.shape[1]))
    torch.mul(grad, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_h


# ---------------------------------------------------- the plain path's products, in the same shapes
@torch.library.register_kernel("gptoss::grouped_linear", "cpu")
def _grouped_linear(x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, counts_E: Tensor) -> Tensor:
    """runtime/kernels/grouped_linear.py on a CPU: for training with dropout."""
    y_RO = x_RI.new_empty(len(x_RI), w_EOI.shape[1])
    for e, rows in _groups(counts_E):
        if rows.start < rows.stop:
            _linear(_padded(x_RI[rows]), w_EOI[e], b_EO, e, y_RO[rows])
    return y_RO


@torch.library.register_kernel("gptoss::grouped_linear_backward", "cpu")
def _grouped_linear_backward(
    grad_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grads = empty_gradients(x_RI, w_EOI, needed)
    grad_x, grad_w, grad_b = grads
    needs_x, needs_w, needs_b = needed
    for e, rows in _groups(counts_E):
        if rows.start == rows.stop:
            for gradient in grads[1:]:
                gradient[e : e + 1].zero_()
            continue
        grad = _padded(grad_RO[rows])
        if needs_x:
            _product(grad, w_EOI[e], grad_x[rows])
        if needs_w:
            torch.mm(grad.T, _padded(x_RI[rows]), out=grad_w[e])
        if needs_b:
            torch.sum(grad, dim=0, out=grad_b[e])
    return grads


# --------------------------------------------------------------------------------------- few shapes
def padded_rows(rows: int) -> int:
    """`rows` rounded up to one of few counts: 1, 8, multiples of 64, and from 512 on eight to each
    doubling."""
    if rows <= 8:
        return 1 if rows <= 1 else 8
    step = max(ROWS_APART, 1 << (rows.bit_length() - 4))
    return -(-rows // step) * step


def _temporary(like: Tensor, columns: int) -> Tensor:
    """An uninitialised [len(like), columns], of a size that comes again: malloc then finds a place
    that was freed, where sizes of every kind cut the heap to pieces."""
    return like.new_empty(padded_rows(len(like)), columns)[: len(like)]


def _padded(x: Tensor) -> Tensor:
    """Return x [n, I] with zeros up to `padded_rows` rows, in half precision.

    There oneDNN does the products.
    """
    n, padded = len(x), padded_rows(len(x))
    if n == padded or x.element_size() != 2:
        return x
    y = x.new_empty(padded, x.shape[1])
    y[:n] = x
    y[n:] = 0
    return y


def _in_few_shapes(function: Callable[..., object], *tensors: Tensor) -> None:
    """function(*inputs, output), element by element, on a few rows of all tensors [n, F] at a time,
    never on a number of rows that is not `padded_rows` of itself."""
    start, n = 0, len(tensors[-1])
    while start < n:
        left = n - start
        rows = min(left - left % ROWS_APART, ROWS_AT_ONCE) or left
        pieces = [t[start : start + rows] for t in tensors]
        padded = padded_rows(rows)
        if rows == padded:
            function(*pieces)
        else:
            wide = [t.new_zeros(padded, t.shape[1]) for t in tensors]
            for whole, piece in zip(wide[:-1], pieces[:-1], strict=True):
                whole[:rows] = piece
            function(*wide)
            pieces[-1].copy_(wide[-1][:rows])
        start += rows


# ------------------------------------------------------------------------------------------ threads
def _each_expert(function: Callable[[int, slice], None], counts_E: Tensor) -> None:
    """Call function(expert, slice of its rows) for every expert, on one thread each.

    Where there are few rows, or a few experts have most of them: one after another on all threads.
    """
    groups = _groups(counts_E)
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    enough = threads > 1 and groups[-1][1].stop >= MOST_ROWS_INLINE
    parts = shares(groups, threads) if enough else None
    if parts is None:
        _call(function, groups, inference)
    else:
        pool = _pool(threads, os.getpid())
        # list: errors of the threads are raised here.
        list(pool.map(lambda part: _call(function, part, inference), parts))


def _groups(counts_E: Tensor) -> list[tuple[int, slice]]:
    """Return (expert, slice of its rows) of all experts."""
    groups, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        groups.append((e, slice(start, start + count)))
        start += count
    return groups


def shares(groups: list[tuple[int, slice]], threads: int) -> list[list[tuple[int, slice]]] | None:
    """Return the groups for each thread: the largest first, to the thread that has least.

    None where the busiest thread gets far more than a fair share.
    """
    parts: list[list[tuple[int, slice]]] = [[] for _ in range(threads)]
    rows = [0] * threads
    for e, group in sorted(groups, key=lambda group: group[1].start - group[1].stop):
        least = rows.index(min(rows))
        parts[least].append((e, group))
        rows[least] += group.stop - group.start
    return parts if max(rows) * threads <= MOST_IMBALANCE * sum(rows) else None


def _call(
    function: Callable[[int, slice], None], groups: list[tuple[int, slice]], inference: bool
) -> None:
    # A thread has modes of its own.
    with torch.inference_mode(inference), torch.no_grad():
        for e, rows in groups:
            function(e, rows)


@functools.lru_cache(maxsize=1)
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """Return threads whose own products are not cut further.

    A forked process (another pid) makes its own.
    """
    started = threading.Barrier(threads)

    def start(_: int) -> None:
        # A thread's first question sets it to the process's number, so it has to come before.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="experts")
    list(pool.map(start, range(threads)))
    # What the workers set was theirs, and the number for threads yet to come.
    torch.set_num_threads(threads)
    return pool


# --------------------------------------------------------------------------------- for the compiler
def _empty_gradients(
    x_RC: Tensor, w_in_EIC: Tensor, w_out_ECF: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        *empty_gradients(x_RC, w_in_EIC, needed[:3]),
        *empty_gradients(x_RC, w_out_ECF, [False, *needed[3:]])[1:],
    )


@feed_forward.register_fake
def _(x_RC, w_in_EIC, b_in_EI, w_out_ECF, b_out_EC, counts_E, activation):
    return torch.empty_like(x_RC), x_RC.new_empty(x_RC.shape[0], w_in_EIC.shape[1])


@_feed_forward_backward.register_fake
def _(grad_RC, x_RC, h_RI, w_in_EIC, w_out_ECF, counts_E, activation, needed):
    return _empty_gradients(x_RC, w_in_EIC, w_out_ECF, needed)


def _save_for_backward(ctx, inputs, output):
    x_RC, w_in_EIC, _, w_out_ECF, _, counts_E, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_RC, output[1], w_in_EIC, w_out_ECF, counts_E)


def _backward(ctx, grad_RC, _):
    if grad_RC is None:
        return (None,) * 7
    needed = list(ctx.needs_input_grad[:5])
    grads = _feed_forward_backward(grad_RC.contiguous(), *ctx.saved_tensors, ctx.activation, needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None, None


feed_forward.register_autograd(_backward, setup_context=_save_for_backward)
