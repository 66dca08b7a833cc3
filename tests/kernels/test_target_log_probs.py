"""One log-probability per target, and a head that runs on chosen rows only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import LLM
from runtime.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy
from runtime.kernels.target_log_probs import target_log_probs
from tests.builders import tiny_config

M, V, C = 7, 11, 5


def inputs(dtype=torch.float64, bias: bool = True):
    generator = torch.Generator().manual_seed(0)
    h, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((M, C), (V, C), (V,))
    )
    targets_M = torch.randint(V, (M,), generator=generator)
    targets_M[2] = IGNORE
    return h, weight, offset if bias else None, targets_M


def by_all_logits(h, weight, bias, targets_M):
    log_probs_MV = F.linear(h, weight, bias).log_softmax(dim=1)
    at_target_M = log_probs_MV.gather(1, targets_M.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_M == IGNORE, 0.0, at_target_M)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_value_and_gradients_are_those_of_all_logits(chunk_rows, bias):
    """Any gradient comes back for each row: a preference weighs its rows after all of them."""
    tensors = inputs(bias=bias)
    grad_M = torch.randn(M, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [t for t in tensors[:3] if t is not None]
    ours = target_log_probs(*tensors, chunk_rows)
    theirs = by_all_logits(*tensors)
    assert ours.dtype == torch.float64 and ours[2] == 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    for one, other in zip(
        torch.autograd.grad(ours, wanted, grad_M),
        torch.autograd.grad(theirs, wanted, grad_M),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_gradcheck():
    h, weight, bias, targets_M = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w, b: target_log_probs(h, w, b, targets_M, 3), (h, weight, bias)
    )


def test_frozen_weights_cost_no_gradient():
    h, weight, bias, targets_M = inputs()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    target_log_probs(h, weight, bias, targets_M, 3).sum().backward()
    assert weight.grad is None and bias.grad is None and h.grad is not None


def test_under_autocast_products_are_in_half_precision_and_sums_in_float32():
    """A log-probability is a float32 difference of logits, each rounded to bfloat16 once."""
    h, weight, bias, targets_M = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = target_log_probs(h, weight, bias, targets_M, 3)
    exact = by_all_logits(h, weight, bias, targets_M)
    assert half.dtype == torch.float32
    logits = F.linear(h, weight, bias).abs().max()
    # Of a product: both factors and the result are rounded, to 8 bits each.
    bound = 2 * 3 * 2.0**-8 * float((logits + (h.abs() @ weight.abs().T).max()).detach())
    assert 0 < float((half - exact).detach().abs().max()) < bound


def gradients_in_half_precision(dtype, grad_M, of):
    """Return the gradients of h, weight and bias under autocast, for parameters of a dtype."""
    h, weight, bias, targets_M = inputs(torch.float32)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (h, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        log_probs_M = of(*leaves, targets_M)
    return log_probs_M, torch.autograd.grad(log_probs_M, leaves, grad_M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_half_precision_come_from_half_precision_products(dtype):
    """Gradients have their parameters' dtype, and are off by a few roundings to 8 bits."""
    grad_M = torch.randn(M, generator=torch.Generator().manual_seed(1))
    log_probs_M, ours = gradients_in_half_precision(
        dtype, grad_M, lambda *head: target_log_probs(*head, 3)
    )
    assert log_probs_M.dtype == torch.float32
    _, exact = gradients_in_half_precision(
        dtype, grad_M, lambda *head: by_all_logits(*(t.double() for t in head[:3]), head[3])
    )
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        # Each of the 5 factors that make a term is rounded: h, weight, logits, softmax, result.
        bound = 5 * 2.0**-8 * max(M, V) ** 0.5 * float(other.abs().max())
        assert float((one - other).abs().max()) < bound


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_a_row_without_a_target_has_a_gradient_of_exactly_0(chunk_rows):
    """Whatever gradient comes back for it: a mask may be multiplied in after the sum."""
    h, weight, bias, targets_M = inputs()
    target_log_probs(h, weight, bias, targets_M, chunk_rows).backward(
        torch.full((M,), 7.0).double()
    )
    assert (h.grad[2] == 0).all() and (h.grad[[0, 1, 3]] != 0).any(dim=1).all()


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_logits_of_all_rows_are_never_there():
    rows, vocabulary, width, chunk_rows = 64, 256, 8, 4
    h = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets_M = torch.randint(vocabulary, (rows,))
    with Largest() as seen:
        target_log_probs(h, weight, None, targets_M, chunk_rows).sum().backward()
    assert seen.elements == max(chunk_rows, width) * vocabulary < rows * vocabulary


def test_no_row_at_all_gives_gradients_of_zero():
    """A micro-batch without a target: the head's gradient was memory that nobody had written."""
    for loss in (
        lambda h, w, targets_M: target_log_probs(h, w, None, targets_M, 3).sum(),
        lambda h, w, targets_M: linear_cross_entropy(h, w, None, targets_M, 3),
    ):
        h = torch.randn(0, C, requires_grad=True)
        weight = torch.randn(V, C, requires_grad=True)
        loss(h, weight, torch.zeros(0, dtype=torch.int64)).backward()
        assert torch.equal(weight.grad, torch.zeros(V, C)) and h.grad.shape == (0, C)


# ------------------------------------------------------------------------------------- in the model
def model_and_batch(**config):
    torch.manual_seed(0)
    model = LLM(tiny_config(**config)).double()
    vocabulary = model.config.vocabulary_size
    ids_BT, targets_BT = torch.randint(vocabulary, (2, 2, 12)).unbind()
    targets_BT[torch.rand(2, 12) < 0.7] = IGNORE
    rows_M = (targets_BT.flatten() != IGNORE).nonzero()[:, 0]
    assert 2 < len(rows_M) < 20
    return model, ids_BT, targets_BT, rows_M


def gradients(model: LLM, loss: torch.Tensor) -> list[torch.Tensor]:
    names = list(model.parameters())
    found = torch.autograd.grad(loss, names, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(names, found, strict=True)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_head_on_rows_with_targets_is_the_head_on_all(tied, per_token):
    model, ids_BT, targets_BT, rows_M = model_and_batch(tie_embeddings=tied)
    model.loss_rows = 3
    all_rows = model(ids_BT, targets_BT)
    some = model(ids_BT, targets_BT, rows_M=rows_M, per_token=per_token)
    assert some.num_targets == all_rows.num_targets == len(rows_M)
    torch.testing.assert_close(
        some.cross_entropy_sum, all_rows.cross_entropy_sum, rtol=1e-13, atol=0
    )
    assert (some.log_probs is not None) == per_token and all_rows.log_probs is None
    if per_token:
        assert some.log_probs.shape == rows_M.shape
    pairs = zip(
        gradients(model, some.cross_entropy_sum),
        gradients(model, all_rows.cross_entropy_sum),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_an_id_after_the_last_target_has_a_gradient_of_exactly_0(chosen, per_token):
    """Nothing that is predicted sees it, and it predicts nothing."""
    model, ids_BT, targets_BT, _ = model_and_batch(tie_embeddings=False)
    unseen = 3
    ids_BT[ids_BT == unseen] = unseen + 1
    ids_BT[:, -4:], targets_BT[:, -4:] = unseen, IGNORE
    rows_M = (targets_BT.flatten() != IGNORE).nonzero()[:, 0]
    rows_M = rows_M if chosen else None
    out = model(ids_BT, targets_BT, rows_M=rows_M, per_token=per_token)
    out.cross_entropy_sum.backward()
    rows_VC = model.embed.weight.grad
    assert (rows_VC[unseen] == 0).all() and (rows_VC[ids_BT[0, 0]] != 0).any()


def test_without_rows_the_loss_is_bit_for_bit_the_fused_loss_of_all_rows():
    model, ids_BT, targets_BT, _ = model_and_batch(tie_embeddings=False)
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    # A second pass, because a backward pass frees the first.
    out, _ = (model(ids_BT, targets_BT) for _ in range(2))
    h_NC = seen[1].flatten(0, 1)
    loss = linear_cross_entropy(
        h_NC, model.head_weight, model.out_head.bias, targets_BT.flatten(), len(h_NC)
    )
    assert torch.equal(out.cross_entropy_sum, loss)
    pairs = zip(gradients(model, out.cross_entropy_sum), gradients(model, loss), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_rows_may_differ_from_batch_to_batch_in_a_compiled_model():
    """The loss is compiled for one shape, and a new shape at each step ends in an error."""
    model, ids_BT, targets_BT, rows_M = model_and_batch()
    compiled = []

    def softmax_gradient(*args):
        compiled.append(args)
        raise AssertionError("a compiled loss must not see rows of a changing number")

    model.softmax_gradient = softmax_gradient
    assert torch.isfinite(model(ids_BT, targets_BT, rows_M=rows_M).cross_entropy_sum)
    with pytest.raises(AssertionError, match="changing number"):
        model(ids_BT, targets_BT)
