"""The products of grouped rows with a weight per group, and their gradients, as one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class GatherRows(torch.autograd.Function):
    """Gather x[index // K] for a permutation `index` of R = rows(x) * K assignments.

    The backward pass gathers too. PyTorch's own backward of a gather adds atomically, in an order
    that changes from run to run. Knowing the inverse permutation, the gradient of row n is the sum
    over its K assignments, always in the same order.
    """

    @staticmethod
    def forward(ctx, x, index, inverse, K):
        ctx.save_for_backward(inverse)
        ctx.K = K
        return x.index_select(0, index // K if K > 1 else index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        if ctx.K > 1:
            grad = grad.view(-1, ctx.K, grad.shape[1]).sum(dim=1)
        return grad, None, None, None


@torch.library.custom_op("gptoss::grouped_linear", mutates_args=())
def grouped_linear(x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, counts_E: Tensor) -> Tensor:
    """Return rows that are sorted by group, each times its group's matrix plus its bias.

    [R, I], [E, O, I], [E, O] -> [R, O]. counts_E int64: rows of each group; they must sum to R.
    One matrix product after another: the plain path for CPUs, float64 and cards whose grouped
    kernel is slow. A custom operation, because it reads the counts as Python numbers: a compiler
    then sees one step in one graph, whatever they are.
    """
    y_RO = x_RI.new_empty(len(x_RI), w_EOI.shape[1])
    for e, rows in _group_rows(counts_E):
        if b_EO is None:
            torch.mm(x_RI[rows], w_EOI[e].T, out=y_RO[rows])
        else:
            torch.addmm(b_EO[e], x_RI[rows], w_EOI[e].T, out=y_RO[rows])
    return y_RO


@torch.library.custom_op("gptoss::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_RO: Tensor, x_RI: Tensor, w_EOI: Tensor, counts_E: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, w and b, zeros for a group without rows.

    needed: which of the three are wanted. The others come back empty and cost no product.
    """
    grads = empty_gradients(x_RI, w_EOI, needed)
    grad_x, grad_w, grad_b = grads
    needs_x, needs_w, needs_b = needed
    for e, rows in _group_rows(counts_E, empty=True):
        if needs_x:
            torch.mm(grad_RO[rows], w_EOI[e], out=grad_x[rows])
        if needs_w:
            torch.mm(grad_RO[rows].T, x_RI[rows], out=grad_w[e])
        if needs_b:
            torch.sum(grad_RO[rows], dim=0, out=grad_b[e])
    return grads


def empty_gradients(
    x_RI: Tensor, w_EOI: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the gradients of x, w and b: none for those that are not needed."""
    shapes = (x_RI.shape, w_EOI.shape, w_EOI.shape[:2])
    grad_x, grad_w, grad_b = (
        like.new_empty(shape if need else 0)
        for like, shape, need in zip((x_RI, w_EOI, w_EOI), shapes, needed, strict=True)
    )
    return grad_x, grad_w, grad_b


def _group_rows(counts_E: Tensor, empty: bool = False):
    """Yield (group, slice of its rows) for each group that has rows; `empty`: for all."""
    start = 0
    for e, count in enumerate(counts_E.tolist()):
        if count or empty:
            yield e, slice(start, start + count)
        start += count


@grouped_linear.register_fake
def _(x_RI, w_EOI, b_EO, counts_E):
    return x_RI.new_empty(x_RI.shape[0], w_EOI.shape[1])


@_grouped_linear_backward.register_fake
def _(grad_RO, x_RI, w_EOI, counts_E, needed):
    return empty_gradients(x_RI, w_EOI, needed)


def _save_for_backward(ctx, inputs, output):
    x_RI, w_EOI, _, counts_E = inputs
    ctx.save_for_backward(x_RI, w_EOI, counts_E)


def _backward(ctx, grad_RO):
    # A frozen matrix, as under adapters, is as large as a trained one.
    needed = list(ctx.needs_input_grad[:3])
    grads = _grouped_linear_backward(grad_RO.contiguous(), *ctx.saved_tensors, needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), None


grouped_linear.register_autograd(_backward, setup_context=_save_for_backward)


def row_bias(bias_EF: Tensor, experts_R: Tensor) -> Tensor:
    """Return bias[experts], [R, F], as a product with one-hot rows.

    Its backward pass sums in float32 and in a fixed order. That of a gather rounds to bfloat16
    after each of thousands of rows.
    """
    return F.one_hot(experts_R, len(bias_EF)).to(bias_EF.dtype) @ bias_EF
