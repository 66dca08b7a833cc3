"""RMSNorm and rotations in C equal the modules' own operations, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model_parts
from model_parts import RMSNorm, rotate
from runtime.checks.kernels import settle_kernels
from runtime.kernels import norms
from runtime.kernels.choose import choose_kernels, norms_of, why_not_c
from tests.builders import random_model, tiny_config
from tests.kernels.builds import EVERY_BUILD, share_small_work, take
from tests.numeric import assert_close, gradients_bound, rounding

HAS_CODE, WHY_NOT = norms.library()
pytestmark = pytest.mark.skipif(HAS_CODE is None, reason=WHY_NOT)
CPU, EPS = torch.device("cpu"), 1e-5
# Of rows: fewer numbers than a vector, odd counts, more than a task's.
ROWS = [(3, 2), (2, 5, 7), (4, 24), (300, 129), (2, 9001)]
# Heads [B, T, H, D]: half a head fills no vector, one, some and a part; more than a task's rows.
HEADS = [(2, 5, 3, 8), (1, 3, 1, 2), (2, 7, 2, 22), (3, 50, 4, 32), (1, 90, 2, 64)]


def plain(x, weight, rope, eps):
    """Return what the modules compute of x [..., N], heads [B, T, H, N] under `rope`."""
    y = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if rope is None else rotate(y.transpose(1, 2), *rope).transpose(1, 2)


def case(shape, has_weight: bool, has_rope: bool, seed=0):
    """Return float64 (x, weight or None, rope or None), and the gradient of the result."""
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape[-1], dtype=torch.float64) if has_weight else None
    size = (shape[1], shape[-1])
    rope = tuple(torch.randn(2, *size, dtype=torch.float64)) if has_rope else None
    return x, weight, rope, torch.randn(shape, dtype=torch.float64)


def results(function, x, weight, rope, grad, eps=EPS) -> list[torch.Tensor]:
    """Return the result and the gradients of x and the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight) if t is not None]
    y = function(leaves[0], None if weight is None else leaves[1], rope, eps)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(shape, has_weight, has_rope, dtype) -> None:
    x, weight, rope, grad = case(shape, has_weight, has_rope)
    # Both from the values that the dtype has.
    x, weight, grad = (None if t is None else t.to(dtype) for t in (x, weight, grad))
    rope = None if rope is None else tuple(t.to(dtype) for t in rope)
    ours = results(norms.rows, x, weight, rope, grad)
    wide = (None if t is None else t.double() for t in (x, weight))
    tables = None if rope is None else tuple(t.double() for t in rope)
    expected = results(plain, *wide, tables, grad.double())
    bound = rounding(dtype, 2 * shape[-1], x[..., 0].numel())
    for name, value, wanted in zip(("y", "x", "weight"), ours, expected, strict=False):
        assert_close(value, wanted, bound, f"{shape} {name}")


@pytest.mark.parametrize("shape", ROWS)
def test_rows_equal_pytorchs(shape):
    check(shape, True, False, torch.float32)


@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("shape", HEADS)
def test_heads_equal_the_plain_rotation(shape, has_weight):
    check(shape, has_weight, True, torch.float32)


@pytest.mark.slow
@EVERY_BUILD
def test_every_build_gives_the_same(monkeypatch, build, dtype):
    take(monkeypatch, norms, build, dtype)
    for shape in ROWS:
        check(shape, True, False, dtype)
    for shape in HEADS:
        check(shape, True, True, dtype)
        check(shape, False, True, dtype)


@pytest.mark.parametrize("has_rope", [False, True])
def test_gradients_are_those_of_finite_differences(has_rope):
    """The build in float64 against differences."""
    x, weight, rope, _ = case((2, 3, 2, 6), True, has_rope)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, w: norms.rows(x, w, rope, EPS), leaves)


def test_without_an_epsilon_it_is_the_dtypes():
    x, weight, _, grad = case((4, 24), True, False)
    given = ((x * 1e-4).float(), weight.float(), None, grad.float())
    for value, wanted in zip(
        results(norms.rows, *given, eps=None), results(plain, *given, eps=None), strict=True
    ):
        assert_close(value, wanted, rounding(torch.float32, 48, 4))


@pytest.mark.parametrize("has_rope", [False, True])
def test_the_same_bits_on_any_number_of_threads(monkeypatch, has_rope):
    """Sums over rows are made of the same parts: a resumed run may have other threads."""
    share_small_work(monkeypatch, norms)
    before, found = torch.get_num_threads(), []
    x, weight, rope, grad = case((4, 300, 6, 32), True, has_rope)
    x, weight, grad = x.float(), weight.float(), grad.float()
    rope = None if rope is None else tuple(t.float() for t in rope)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(norms.rows, x, weight, rope, grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_leaves_the_other_gradients_bits(frozen):
    x, weight, _, grad = (None if t is None else t.float() for t in case((9, 24), True, False))
    whole = results(norms.rows, x, weight, None, grad)[1:]
    wanted = weight if frozen == "x" else x
    wanted.requires_grad_()
    y = norms.rows(x, weight, None, EPS)
    (ours,) = torch.autograd.grad(y, wanted, grad)
    assert torch.equal(ours, whole[frozen == "x"])


def test_rows_that_do_not_lie_side_by_side():
    """A view of every second row, and a gradient that one number is repeated for."""
    x, weight, _, _ = case((8, 24), True, False)
    wide, weight = torch.randn(8, 48)[:, ::2], weight.float().requires_grad_()
    y = norms.rows(wide, weight, None, EPS)
    (ours,) = torch.autograd.grad(y.sum(), weight)
    (expected,) = torch.autograd.grad(plain(wide, weight, None, EPS).sum(), weight)
    assert_close(y, plain(wide, weight, None, EPS), rounding(torch.float32, 48))
    assert_close(ours, expected, rounding(torch.float32, 48, 8))


# ------------------------------------------------------------------------------- where it is taken
CONFIG = dict(qk_norm=True, dropout=0.0)


def chosen(**changes):
    model = random_model(tiny_config(**CONFIG | changes))
    choose_kernels(model, CPU, torch.float32)
    return model


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"use_rope": False}])
def test_a_model_trains_with_it(monkeypatch, changes):
    """Every norm and all queries and keys: the loss and all gradients are the plain model's."""
    model, calls = chosen(**changes), []
    plain_model = copy.deepcopy(model)
    choose_kernels(plain_model, CPU, torch.float64)
    assert settle_kernels(model) == []
    real = norms._run

    def noted(which, *given, **tensors):
        calls.append(which)
        real(which, *given, **tensors)

    monkeypatch.setattr(norms, "_run", noted)
    ids_BT = torch.arange(18).view(2, 9)
    for one in (model, plain_model):
        one(ids_BT, ids_BT.roll(-1, 1)).cross_entropy_sum.backward()
    blocks = model.config.transformer_blocks
    turned = 2 if model.config.qk_norm or model.config.use_rope else 0
    assert calls.count("forward") == calls.count("backward") == 1 + (2 + turned) * blocks
    bound = gradients_bound(model.config, 9, 2)
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, bound)


def test_without_it_the_modules_compute_and_a_line_says_why(monkeypatch):
    """One kernel may be missing while the others are there."""
    why = "norms.c could not be compiled: no space"
    monkeypatch.setattr(norms, "library", lambda *given: (None, why))
    model = chosen()
    assert why_not_c(CPU, torch.float32) == why and why_not_c(CPU, torch.bfloat16) == ""
    assert not any(norm.kernel for norm in norms_of(model))
    for block in model.layers:
        assert block.attention.turn_kernel is None and block.attention.kernel is not None
    model(torch.arange(8)[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_takes_the_modules_own(dtype):
    """None: as in a model that was cast after its kernels were chosen."""
    norm = RMSNorm(8).to(dtype)
    x = torch.randn(2, 3, 5, 8, dtype=dtype)
    assert norms.rms_norm(norm, x) is None and norms.turn(x, norm, None) is None
    assert norms.rms_norm(RMSNorm(8), x) is None
    model = random_model(tiny_config(**CONFIG)).to(dtype)
    choose_kernels(model, CPU, dtype)
    assert not any(norm.kernel for norm in norms_of(model))
    assert not any(block.attention.turn_kernel for block in model.layers)


def test_what_it_lacks_is_left_to_the_modules():
    """Positions that differ from row to row, another length, no weight, tensors of shapes alone.

    A norm without a weight was an error, and as that of a head it was left out.
    """
    x, rope = torch.randn(2, 3, 5, 8), (torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8))
    assert norms.turn(x, None, rope) is None
    assert norms.turn(x, None, (rope[0][0, 0], rope[1][0, 0])) is not None
    assert norms.rms_norm(RMSNorm((5, 8)), x) is None
    bare = RMSNorm(8, elementwise_affine=False)
    bare.kernel = norms.rms_norm
    assert bare(x).shape == x.shape
    assert norms.turn(x, bare, (rope[0][0, 0], rope[1][0, 0])) is None
    assert norms.turn(x, bare, None) is None
    model = random_model(tiny_config(**CONFIG))
    model.norm = RMSNorm(model.config.d_model, elementwise_affine=False)
    choose_kernels(model, CPU, torch.float32)
    assert settle_kernels(model) == []
    with FakeTensorMode():
        assert norms.rms_norm(RMSNorm(8), torch.empty(2, 8)) is None


@pytest.mark.slow
def test_a_compiler_sees_the_plain_operations():
    """Which it fuses with their neighbours."""
    torch.compiler.reset()
    norm, graphs = RMSNorm(8), []
    norm.kernel = norms.rms_norm

    def backend(graph, given):
        graphs.append(graph.code)
        return graph

    x = torch.randn(2, 8)
    y = torch.compile(norm, backend=backend, fullgraph=True)(x)
    assert "rms_norm" in graphs[0] and torch.equal(y, F.rms_norm(x, (8,), norm.weight))


def test_a_changed_norm_is_what_is_computed(monkeypatch):
    """A contributor lets weights start at 0 and adds 1: the kernel would have kept the old rule."""
    original = RMSNorm.forward

    def shifted(self, x):
        return self.kernel(self, x) if self.kernel else original(self, x) + x

    monkeypatch.setattr(RMSNorm, "forward", shifted)
    model = chosen()
    lines = settle_kernels(model)
    assert any("norms.py has other results than model_parts.RMSNorm" in line for line in lines)
    assert not any(norm.kernel for norm in norms_of(model))
    assert not any(block.attention.turn_kernel for block in model.layers)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_changed_rotation_is_what_is_computed(monkeypatch, qk_norm):
    """Pairs (2 i, 2 i + 1), as GPT-J rotates them."""

    def interleaved(x_BHTD, cos_TD, sin_TD):
        first, second = x_BHTD[..., ::2], x_BHTD[..., 1::2]
        return x_BHTD * cos_TD + torch.stack((-second, first), -1).flatten(-2) * sin_TD

    monkeypatch.setattr(model_parts, "rotate", interleaved)
    model = chosen(qk_norm=qk_norm)
    (line,) = settle_kernels(model)
    assert "norms.py has other results than Attention.turned" in line
    assert not any(block.attention.turn_kernel for block in model.layers)
    assert all(norm.kernel for norm in norms_of(model))


def test_a_norm_of_another_kind_is_left_alone(monkeypatch):
    """LayerNorm in a contributor's block has no place for a kernel; a further RMSNorm has one."""
    model = random_model(tiny_config(**CONFIG))
    model.layers[0].norm1 = torch.nn.LayerNorm(model.config.d_model)
    model.layers[0].attention.norm3 = RMSNorm(8)
    choose_kernels(model, CPU, torch.float32)
    assert settle_kernels(model) == [] and not hasattr(model.layers[0].norm1, "kernel")
    assert model.layers[0].attention.norm3.kernel is norms.rms_norm
    model(torch.arange(8)[None])
