"""runtime/kernels/cpu_experts.py for experts whose frozen matrices have adapters.

One operation on a CPU, each expert on one core: W + scale B A of both matrices, which is never
made. It saves the sorted rows and the hidden layer before its activation, as the operation without
adapters does. The gradients are those of the rows and the adapters. runtime/posttraining/lora.py
has the plain path.
"""

from __future__ import annotations

import torch
from torch import Tensor

import runtime.kernels.cpu_experts as cpu

# R rows sorted by expert, E experts, C d_model, F d_ff, I = F or 2F, r rank.


@torch.library.custom_op("gptoss::adapted_feed_forward", mutates_args=(), device_types="cpu")
def adapted_feed_forward(
    x_RC: Tensor,
    w_in_EIC: Tensor,
    b_in_EI: Tensor | None,
    w_out_ECF: Tensor,
    b_out_EC: Tensor | None,
    adapters: list[Tensor],
    scale: float,
    counts_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Pass rows through their experts; return ([R, C], [R, I]), as feed_forward does.

    adapters: A [E, r, C] and B [E, I, r] of w_in, A [E, r, F] and B [E, C, r] of w_out. No gradient
    comes back for the matrices and biases. All floats have one dtype.
    """
    a_in, b_in, a_out, b_out = adapters
    h_RI, y_RC = x_RC.new_empty(len(x_RC), w_in_EIC.shape[1]), torch.empty_like(x_RC)

    def one(e: int, rows: slice) -> None:
        if rows.start < rows.stop:
            x, out = cpu._padded(x_RC[rows]), h_RI[rows]
            h = cpu._linear(x, w_in_EIC[e], b_in_EI, e, out)
            _add_thin(h, x, a_in[e].T, b_in[e].T, scale, out)
            a, out = cpu._activation(h, activation), y_RC[rows]
            y = cpu._linear(a, w_out_ECF[e], b_out_EC, e, out)
            _add_thin(y, a, a_out[e].T, b_out[e].T, scale, out)

    cpu._each_expert(one, counts_E)
    return y_RC, h_RI


@torch.library.custom_op("gptoss::adapted_feed_forward_backward", mutates_args=())
def _backward_of_all(
    grad_RC: Tensor,
    x_RC: Tensor,
    h_RI: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    adapters: list[Tensor],
    scale: float,
    counts_E: Tensor,
    activation: str,
) -> list[Tensor]:
    """Return the gradients of x and of the four adapters; zeros for an expert without rows."""
    grads = [torch.empty_like(tensor) for tensor in (x_RC, *adapters)]
    grad_x, grad_a_in, grad_b_in, grad_a_out, grad_b_out = grads
    a_in, b_in, a_out, b_out = adapters

    def one(e: int, rows: slice) -> None:
        if rows.start == rows.stop:
            for gradient in grads[1:]:
                gradient[e].zero_()
            return
        # Rows of zeros add zeros to every sum over the rows.
        grad, h, x = (cpu._padded(t[rows]) for t in (grad_RC, h_RI, x_RC))
        a = cpu._activation(h, activation)
        thin = _thin_gradients(grad, a, a_out[e], b_out[e], scale, grad_a_out[e], grad_b_out[e])
        grad_a = cpu._product(grad, w_out_ECF[e], cpu._temporary(h, w_out_ECF.shape[2]))
        grad_a += _times(thin, a_out[e])
        grad_h = cpu._activation_backward(grad_a, h, activation)
        thin = _thin_gradients(grad_h, x, a_in[e], b_in[e], scale, grad_a_in[e], grad_b_in[e])
        cpu._product(grad_h, w_in_EIC[e], grad_x[rows])
        grad_x[rows] += _times(thin, a_in[e])[: rows.stop - rows.start]

    cpu._each_expert(one, counts_E)
    return grads


def _add_thin(
    whole: Tensor, x: Tensor, a_Ir: Tensor, b_rO: Tensor, scale: float, out: Tensor
) -> None:
    """Add scale (x A) B to `whole` [n, O], and to `out`, which is all or the first rows of it."""
    at_once = cpu.ROWS_AT_ONCE if x.element_size() == 2 else len(x)
    for x_piece, piece in zip(x.split(at_once), whole.split(at_once), strict=True):
        piece.addmm_(x_piece @ a_Ir, b_rO, alpha=scale)
    if whole.data_ptr() != out.data_ptr():
        out.copy_(whole[: len(out)])


def _thin_gradients(
    grad: Tensor,
    x: Tensor,
    a_rI: Tensor,
    b_Or: Tensor,
    scale: float,
    grad_a: Tensor,
    grad_b: Tensor,
) -> Tensor:
    """Write the gradients of A and B; return that of x A, [n, r]."""
    thin = _times(grad, b_Or).mul_(scale)
    torch.mm(thin.T, x, out=grad_a)
    torch.mm(grad.T, _times(x, a_rI.T).mul_(scale), out=grad_b)
    return thin


def _times(x: Tensor, w: Tensor) -> Tensor:
    return cpu._product(x, w, cpu._temporary(x, w.shape[1]))


@adapted_feed_forward.register_fake
def _(x_RC, w_in_EIC, b_in_EI, w_out_ECF, b_out_EC, adapters, scale, counts_E, activation):
    return torch.empty_like(x_RC), x_RC.new_empty(x_RC.shape[0], w_in_EIC.shape[1])


@_backward_of_all.register_fake
def _(grad_RC, x_RC, h_RI, w_in_EIC, w_out_ECF, adapters, scale, counts_E, activation):
    return [torch.empty_like(tensor) for tensor in (x_RC, *adapters)]


def _save_for_backward(ctx, inputs, output):
    x_RC, w_in_EIC, _, w_out_ECF, _, adapters, ctx.scale, counts_E, ctx.activation = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_RC, output[1], w_in_EIC, w_out_ECF, counts_E, *adapters)


def _backward(ctx, grad_RC, _):
    if grad_RC is None:
        return (None,) * 9
    x_RC, h_RI, w_in_EIC, w_out_ECF, counts_E, *adapters = ctx.saved_tensors
    grad_x, *of_adapters = _backward_of_all(
        grad_RC.contiguous(),
        x_RC,
        h_RI,
        w_in_EIC,
        w_out_ECF,
        adapters,
        ctx.scale,
        counts_E,
        ctx.activation,
    )
    return grad_x, None, None, None, None, of_adapters, None, None, None


adapted_feed_forward.register_autograd(_backward, setup_context=_save_for_backward)
