"""Cross-entropy of a linear layer over a large vocabulary, without holding the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.trained_rows import split_rows

# A target with this value is not predicted and not counted.
IGNORE = -100
# runtime/kernels/loss_in_c.py, which runtime/kernels/choose.py puts here. Published copies of this
# file do without.
in_c = None


def softmax_gradient_(
    logits_NV: Tensor, bias_V: Tensor | None, targets_N: Tensor, needs_gradient: bool = True
) -> Tensor:
    """Overwrite logits [N, V] with the gradient of their summed cross-entropy; return the sum.

    The gradient is softmax - one_hot, 0 in rows whose target is IGNORE. Computed in float32 (or
    float64), whatever the logits are kept in. Without `needs_gradient` the logits are only used up.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    valid_N1, target_N1 = (targets_N != IGNORE)[:, None], targets_N.clamp(min=0)[:, None]
    # The logits themselves where that is their dtype.
    x_NV = logits_NV.to(wide)
    if torch.compiler.is_compiling():
        # Written so that the compiler fuses it into two passes without temporaries.
        x_NV = x_NV if bias_V is None else x_NV + bias_V
        at_target_N1, log_sum_N1 = x_NV.gather(1, target_N1), x_NV.logsumexp(dim=-1, keepdim=True)
        if needs_gradient:
            is_target_NV = torch.arange(x_NV.shape[1], device=x_NV.device) == target_N1
            logits_NV.copy_(((x_NV - log_sum_N1).exp() - is_target_NV.to(wide)) * valid_N1)
    else:
        # The same, in place.
        if bias_V is not None:
            x_NV.add_(bias_V)
        at_target_N1 = x_NV.gather(1, target_N1)
        log_sum_N1, total_N1 = log_sum_exp_(x_NV)
        if needs_gradient:
            x_NV.mul_(valid_N1 / total_N1)
            if logits_NV.dtype != wide:
                logits_NV.copy_(x_NV)
            gradient_N1 = ((at_target_N1 - log_sum_N1).exp() - 1) * valid_N1
            # Written, not added: no atomics, and rounded once.
            logits_NV.scatter_(1, target_N1, gradient_N1.to(logits_NV.dtype))
    return ((log_sum_N1 - at_target_N1) * valid_N1).sum()


def log_sum_exp_(x_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of each row's sum of exponentials, and the sum of what is left in the row.

    Overwrite x [N, V] with exp(x - its row's largest). Both results are [N, 1].
    """
    largest_N1 = x_NV.amax(dim=-1, keepdim=True)
    total_N1 = x_NV.sub_(largest_N1).exp_().sum(dim=-1, keepdim=True)
    return total_N1.log() + largest_N1, total_N1


def add_product_(total_VC: Tensor, chunk_NV: Tensor, h_NC: Tensor, is_first: bool) -> None:
    """Add chunk' h to the total; is_first: overwrite the total with it.

    A CUDA GPU adds to a float32 total inside a half-precision product, unrounded (torch.addmm with
    out_dtype, from torch 2.8). Elsewhere the product is rounded to its dtype first.
    """
    if total_VC.dtype == h_NC.dtype:
        total_VC.addmm_(chunk_NV.T, h_NC, beta=float(not is_first))
    elif total_VC.is_cuda and torch.version.hip is None:
        torch.addmm(
            total_VC,
            chunk_NV.T,
            h_NC,
            beta=float(not is_first),
            out_dtype=total_VC.dtype,
            out=total_VC,
        )
    elif is_first:
        total_VC.copy_(chunk_NV.T @ h_NC)
    else:
        total_VC += chunk_NV.T @ h_NC


def logits_buffer(rows: int, V: int, dtype: torch.dtype, device) -> Tensor:
    """Return room for logits of so many rows, the first V columns of it.

    Rows start at multiples of 64 numbers: 200,019 is odd, and cuBLAS is slow on rows whose
    addresses are not aligned.
    """
    buffer = torch.empty(rows, -(-V // 64) * 64, dtype=dtype, device=device)
    # A CPU's bfloat16 products read an even number of columns: a NaN that was left there would
    # count, times 0.
    buffer[:, V:] = 0
    return buffer


def head_dtype(device: str, weight_VC: Tensor) -> torch.dtype:
    """Return the dtype of the head's products: autocast's if it is on."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight_VC.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum logsumexp(h W' + b) - (h W' + b)[target] over valid rows, a few rows at a time.

    A chunk's share of every gradient is known while its logits are there. So one buffer of
    `chunk_rows` rows serves them all, and no [N, V] tensor exists. The matrix products are in
    `dtype`, the head's gradient is summed in float32. On a CPU in float32, C does all of it
    (runtime/kernels/loss_in_c.py).
    """

    @staticmethod
    def forward(
        ctx,
        h_NC,
        weight_VC,
        bias_V,
        targets_N,
        chunk_rows,
        dtype,
        needs_gradients,
        softmax_gradient,
        rows_nC,
        first_row,
    ):
        wide = torch.promote_types(dtype, torch.float32)
        h, weight = h_NC.to(dtype), weight_VC.to(dtype)
        bias = None if bias_V is None else bias_V.to(wide)
        total = torch.zeros((), dtype=wide, device=h.device)
        N, V = len(h), len(weight)
        buffer = logits_buffer(min(chunk_rows, N), V, dtype, h.device)
        grad_h = grad_weight = grad_bias = grad_rows = None
        needs_h, needs_weight, needs_bias = (
            needs_gradients and needed for needed in ctx.needs_input_grad[:3]
        )
        if in_c is not None and rows_nC is None and in_c.takes(h, weight, bias):
            needed = (needs_h, needs_weight, needs_bias)
            total, grads = in_c.summed_loss(h, weight, bias, targets_N, chunk_rows, IGNORE, needed)
            ctx.dtypes = [None if t is None else t.dtype for t in (h_NC, weight_VC, bias_V, None)]
            if needs_gradients:
                ctx.save_for_backward(*grads, None)
            return total
        if needs_h:
            grad_h = torch.empty(h.shape, dtype=wide, device=h.device)
        if needs_weight:
            grad_weight = torch.empty(weight.shape, dtype=wide, device=h.device)
            if not N:
                # No chunk writes it.
                grad_weight.zero_()
        if needs_bias:
            grad_bias = torch.zeros_like(bias)
        if needs_gradients and rows_nC is not None:
            columns = slice(first_row, first_row + len(rows_nC))
            grad_rows = torch.zeros(rows_nC.shape, dtype=wide, device=h.device)
        for first in range(0, N, chunk_rows):
            h_chunk = h[first : first + chunk_rows]
            chunk_NV = torch.mm(h_chunk, weight.T, out=buffer[: len(h_chunk), :V])
            targets = targets_N[first : first + chunk_rows]
            total += softmax_gradient(chunk_NV, bias, targets, needs_gradients)
            if grad_h is not None:
                grad_h[first : first + chunk_rows] = chunk_NV @ weight
            if grad_weight is not None:
                add_product_(grad_weight, chunk_NV, h_chunk, is_first=first == 0)
            if grad_bias is not None:
                grad_bias += chunk_NV.sum(dim=0, dtype=wide)
            if grad_rows is not None:
                grad_rows += chunk_NV[:, columns].T.to(wide) @ h_chunk.to(wide)
        ctx.dtypes = [None if t is None else t.dtype for t in (h_NC, weight_VC, bias_V, rows_nC)]
        if needs_gradients:
            ctx.save_for_backward(grad_h, grad_weight, grad_bias, grad_rows)
        return total

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the loss has first derivatives only, and create_graph=True asks for second ones: "
                "compute it from the logits, with F.cross_entropy"
            )
        # Scaled in place, because a copy of the head's gradient is 0.8 GB at full size. Not if the
        # graph is kept for another backward pass.
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
        *grads, grad_rows = (
            None if g is None else (g.mul_(grad) if is_last else g * grad).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None, grad_rows, None


def linear_cross_entropy(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    chunk_rows: int,
    softmax_gradient=softmax_gradient_,
) -> Tensor:
    """Return the summed cross-entropy (nats) of softmax(h W' + b) against targets.

    h [N, C], weight [V, C], bias [V] or None, targets [N] int64 with IGNORE for rows that do not
    count. Of the logits [N, V], `chunk_rows` rows are held at a time. The products run in
    autocast's dtype if it is on; the result is float32 (float64 for float64 inputs).
    softmax_gradient: softmax_gradient_, or the same compiled. Of a weight from with_trained_rows,
    the trained rows' gradient alone is made.
    """
    device = h_NC.device.type
    weight_VC, rows_nC, first_row = split_rows(weight_VC)
    dtype = head_dtype(device, weight_VC)
    inputs = [t for t in (h_NC, weight_VC, bias_V, rows_nC) if t is not None]
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            h_NC,
            weight_VC,
            bias_V,
            targets_N,
            chunk_rows,
            dtype,
            needs_gradients,
            softmax_gradient,
            rows_nC,
            first_row,
        )
