"""The loss in C equals PyTorch's, with its gradients, in every build; so do sums of squares."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import runtime.kernels.choose  # noqa: F401  (hands the loss in)
from runtime.kernels import linear_cross_entropy as plain
from runtime.kernels import loss_in_c, newton_schulz, squares
from runtime.training.optimizer import total_norm
from tests.kernels.builds import EVERY_BUILD, share_small_work, take
from tests.numeric import assert_close, rounding, size_of

HAS_CODE, WHY_NOT = loss_in_c.library()
pytestmark = pytest.mark.skipif(HAS_CODE is None, reason=WHY_NOT)
# (rows, d_model, vocabulary, rows of a chunk): odd sizes, a last chunk of one row, several tasks.
SHAPES = [(7, 12, 61, 3), (65, 40, 1003, 32), (1, 5, 2, 9), (50, 300, 300, 256)]


def case(shape, bias: bool, seed=0):
    """Return float64 (h, weight, bias or None, targets), two of which do not count."""
    N, C, V, _ = shape
    torch.manual_seed(seed)
    h_NC = torch.randn(N, C, dtype=torch.float64)
    weight_VC = torch.randn(V, C, dtype=torch.float64) * 0.5
    targets_N = torch.randint(V, (N,))
    if N > 2:
        targets_N[[0, N - 1]] = plain.IGNORE
    return h_NC, weight_VC, torch.randn(V, dtype=torch.float64) if bias else None, targets_N


def expected(h_NC, weight_VC, bias_V, targets_N):
    """Return the loss and its gradients by PyTorch's functions, in float64."""
    tensors = [t.clone().requires_grad_() for t in (h_NC, weight_VC, bias_V) if t is not None]
    logits_NV = F.linear(*tensors)
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=plain.IGNORE, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, tensors)


def check(shape, bias: bool, dtype: torch.dtype) -> None:
    N, C, V, chunk = shape
    *floats, targets_N = case(shape, bias)
    loss, grads = expected(*floats, targets_N)
    ours = [None if t is None else t.to(dtype) for t in floats]
    needed = (True, True, bias)
    total, found = loss_in_c.summed_loss(*ours, targets_N, chunk, plain.IGNORE, needed)
    assert_close(total, loss, rounding(dtype, C, V), f"{shape} loss")
    names = ["h", "weight", "bias"][: len(grads)]
    for name, value, wanted in zip(names, found, grads, strict=False):
        # Differences of probabilities are as exact as 1, and so are their products with numbers
        # around 1.
        size = max(size_of(wanted), 1.0)
        assert_close(value, wanted, rounding(dtype, C, V, max(V, N)), f"{shape} {name}", size)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_pytorch(shape, bias):
    check(shape, bias, torch.float32)


@pytest.mark.slow
@EVERY_BUILD
def test_every_build_gives_the_same(monkeypatch, build, dtype):
    take(monkeypatch, loss_in_c, build, dtype)
    for shape in SHAPES:
        check(shape, True, dtype)


def test_the_model_takes_it(monkeypatch):
    """Its result goes through autograd as the other's: scaled, and kept for a second pass."""
    *floats, targets_N = case(SHAPES[1], True)
    calls, real = [], loss_in_c.summed_loss
    monkeypatch.setattr(loss_in_c, "summed_loss", lambda *a: calls.append(a) or real(*a))
    tensors = [t.float().requires_grad_() for t in floats]
    loss = plain.linear_cross_entropy(*tensors, targets_N, 32)
    kept = torch.autograd.grad(loss * 3, tensors, retain_graph=True)
    again = torch.autograd.grad(loss * 3, tensors)
    assert len(calls) == 1 and all(map(torch.equal, kept, again))
    wanted, grads = expected(*floats, targets_N)
    assert_close(loss, wanted, rounding(torch.float32, 40, 1003))
    for value, grad in zip(again, grads, strict=True):
        assert_close(value, 3 * grad, rounding(torch.float32, 40, 1003, 1003))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_gradient_that_is_not_wanted_is_not_made(frozen):
    *floats, targets_N = case(SHAPES[0], True)
    tensors = [t.float().requires_grad_(i != frozen) for i, t in enumerate(floats)]
    wanted = [t for t in tensors if t.requires_grad]
    grads = torch.autograd.grad(plain.linear_cross_entropy(*tensors, targets_N, 3), wanted)
    _, every = expected(*floats, targets_N)
    rest = [grad for i, grad in enumerate(every) if i != frozen]
    for value, grad in zip(grads, rest, strict=True):
        assert_close(value, grad, rounding(torch.float32, 12, 61, 61))


def test_bits_do_not_depend_on_threads(monkeypatch):
    share_small_work(monkeypatch, loss_in_c)
    *floats, targets_N = case(SHAPES[1], True)
    floats, before = [t.float() for t in floats], torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, grads = loss_in_c.summed_loss(
                *floats, targets_N, 32, plain.IGNORE, (True, True, True)
            )
            found.append([loss, *grads])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value):
    """Whichever lane of a vector it is in, and if it is the largest or not."""
    h_NC, weight_VC, _, targets_N = case((5, 4, 37, 5), False)
    for row in (0, 20, 36):
        weight = weight_VC.float()
        weight[row] = value
        loss, _ = loss_in_c.summed_loss(
            h_NC.float().abs(), weight, None, targets_N, 5, plain.IGNORE, (False,) * 3
        )
        # A logit of -infinity has the probability 0, which is a loss where it is the target.
        is_target = (targets_N == row).any()
        assert loss.isfinite() == (value == -math.inf and not is_target)


def test_extreme_logits_keep_their_probability():
    """The share of a logit 100 below the largest is 0, not e^-87; its loss is 100."""
    weight_VC = torch.tensor([[100.0], [0.0]])
    loss, (grad_h, *_) = loss_in_c.summed_loss(
        torch.ones(1, 1), weight_VC, None, torch.tensor([1]), 1, plain.IGNORE, (True, False, False)
    )
    assert loss.item() == 100.0 and grad_h.item() == 100.0
    _, (_, grad_weight, _) = loss_in_c.summed_loss(
        torch.ones(1, 1), weight_VC, None, torch.tensor([0]), 1, plain.IGNORE, (False, True, False)
    )
    assert (grad_weight == 0).all()


@pytest.mark.parametrize("target", [61, -1, -101])
def test_a_target_that_is_no_id_is_refused(target):
    """It would be read and written as an address."""
    h_NC, weight_VC, _, targets_N = case(SHAPES[0], False)
    targets_N[3] = target
    with pytest.raises(ValueError, match="neither an id from 0 to 60 nor -100"):
        loss_in_c.summed_loss(
            h_NC.float(), weight_VC.float(), None, targets_N, 3, plain.IGNORE, (True, True, False)
        )


def test_nothing_to_predict():
    empty = torch.zeros(0, dtype=torch.int64)
    loss, grads = loss_in_c.summed_loss(
        torch.zeros(0, 4), torch.ones(9, 4), None, empty, 8, plain.IGNORE, (True, True, False)
    )
    assert loss == 0 and grads[1].abs().sum() == 0


# ---------------------------------------------------------------------------- the gradients' norm
def test_the_norm_is_exact_to_its_last_bit():
    """The sum is in double: 200,000 values of 1e-3 next to one of 3e3, in several pieces."""
    gradients = [
        torch.full((200_000,), 1e-3),
        torch.tensor([3e3]),
        torch.zeros(0),
        torch.ones(3, 7),
    ]
    assert squares.takes(gradients)
    exact = math.sqrt(sum(t.double().square().sum().item() for t in gradients))
    assert total_norm(gradients).item() == torch.tensor(exact).float().item()


def test_what_c_cannot_read_goes_to_pytorch():
    for tensor in (
        torch.ones(3, 4).T,
        torch.ones(3, dtype=torch.float64),
        torch.ones(3).bfloat16(),
    ):
        assert not squares.takes([torch.ones(2), tensor])
        assert total_norm([tensor]).item() == pytest.approx(math.sqrt(tensor.numel()), rel=2**-8)


def test_the_sum_does_not_depend_on_threads(monkeypatch):
    torch.manual_seed(0)
    tensors, before = [torch.randn(300_001), torch.randn(5)], torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.add(squares.sum_of_squares(tensors).item())
        monkeypatch.setattr(squares, "parallel_region", lambda: 0)
        found.add(squares.sum_of_squares(tensors).item())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_with_what_is_not_finite(value):
    tensor = torch.ones(100_000)
    tensor[77_777] = value
    assert not total_norm([tensor]).isfinite()


def test_tensors_of_shapes_alone_have_nothing_to_read():
    """They have addresses, too: memory was counted with them, and the process ended."""
    with FakeTensorMode():
        h_NC, weight_VC = torch.ones(4, 8, requires_grad=True), torch.ones(16, 8)
        loss = plain.linear_cross_entropy(h_NC, weight_VC, None, torch.zeros(4).long(), 2)
        assert not loss_in_c.takes(h_NC) and loss.shape == ()
        assert not squares.takes([weight_VC])
        assert not newton_schulz.takes(torch.ones(2, 4, 4))
    assert loss_in_c.takes(torch.ones(4, 8), torch.nn.Parameter(torch.ones(16, 8)), None)
