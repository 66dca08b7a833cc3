"""A router's choice, weights and statistics in C equal MoE.routed, forward and backward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import LLM
from model_parts import MoE, Router
from runtime.checks.kernels import settle_kernels
from runtime.kernels import router
from runtime.kernels.choose import choose_kernels, why_not_c
from runtime.kernels.router import Routed
from tests.builders import random_model, tiny_config
from tests.kernels.builds import EVERY_BUILD, share_small_work, take
from tests.numeric import assert_close, gradients_bound, rounding

HAS_CODE, WHY_NOT = router.library()
pytestmark = pytest.mark.skipif(HAS_CODE is None, reason=WHY_NOT)
CPU = torch.device("cpu")
# (tokens, experts, experts of a token): a part of a vector, one, some and a part; more tokens than
# a task's; all experts; one expert.
CASES = [(7, 3, 2), (5, 1, 1), (40, 8, 2), (9, 19, 4), (1, 6, 6), (1200, 16, 2), (300, 33, 1)]
WIDTH = 12


def block(N, E, K, biased: bool, dtype=torch.float64, seed=0) -> tuple[MoE, torch.Tensor]:
    """Return an MoE with random numbers in its router, and tokens [N, C]."""
    torch.manual_seed(seed)
    sizes = dict(d_model=WIDTH, num_experts=E, top_k=K)
    config = tiny_config(**sizes, router_bias=biased, router_bias_rate=0.1 * biased)
    moe = MoE(config)
    for tensor in [*moe.router.parameters(), *moe.router.buffers()]:
        # Scores of about 1: a softmax turns a difference into a ratio.
        tensor.data.normal_(0, WIDTH**-0.5)
    return moe.to(dtype), torch.randn(N, WIDTH, dtype=dtype)


def by_c(moe: MoE, x_NC: torch.Tensor) -> Routed:
    r = moe.router
    return router.routed(x_NC, r.weight, r.bias, r.selection_bias, r.top_k)


def results(function, moe: MoE, x_NC: torch.Tensor) -> list[torch.Tensor]:
    """Return all that it returns, and the gradients of x and the parameters for random ones."""
    torch.manual_seed(1)
    x_NC = x_NC.clone().requires_grad_()
    found = Routed(*function(moe, x_NC))
    parts = (found.weights_NK, found.mean_E, found.z_loss)
    # In float64, so that all dtypes get the same ones.
    grads = [torch.randn(part.shape, dtype=torch.float64).to(part.dtype) for part in parts]
    leaves = [x_NC, *moe.router.parameters()]
    return [*(t.detach() for t in found), *torch.autograd.grad(parts, leaves, grads)]


def check(N, E, K, biased, dtype) -> None:
    moe, x_NC = block(N, E, K, biased, dtype)
    ours = results(by_c, moe, x_NC)
    expected = results(MoE.routed, copy.deepcopy(moe).double(), x_NC.double())
    bound = rounding(dtype, 2 * (E + WIDTH), N)
    names = (*Routed._fields, "x", "weight", "bias")
    for name, value, wanted in zip(names, ours, expected, strict=False):
        if value.dtype == torch.int64:
            assert torch.equal(value, wanted), name
        else:
            # One weight is 1, and its gradient what is left of numbers that cancel.
            size = 1 if K == 1 else None
            assert_close(value, wanted, bound, f"{(N, E, K)} {name}", size)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("N", "E", "K"), CASES)
def test_it_computes_what_the_plain_operations_do(N, E, K, biased):
    check(N, E, K, biased, torch.float32)


@pytest.mark.slow
@EVERY_BUILD
def test_every_build_gives_the_same(monkeypatch, build, dtype):
    take(monkeypatch, router, build, dtype)
    for case in CASES:
        check(*case, True, dtype)


@pytest.mark.parametrize("K", [1, 3])
def test_gradients_are_those_of_finite_differences(K):
    """The build in float64 against differences."""
    moe, x_NC = block(4, 5, K, True)
    leaves = [t.detach().requires_grad_() for t in (x_NC, moe.router.weight, moe.router.bias)]

    def differentiable(*given):
        found = router.routed(*given, moe.router.selection_bias, K)
        return found.weights_NK, found.mean_E, found.z_loss

    assert torch.autograd.gradcheck(differentiable, leaves)


@pytest.mark.parametrize("part", ["weights_NK", "mean_E", "z_loss"])
def test_a_loss_of_one_part_alone_has_its_gradient(part):
    """The others' gradients are then missing, not zeros."""
    moe, x_NC = block(9, 6, 2, False)
    grads = []
    for function in (by_c, MoE.routed):
        found = Routed(*function(moe, x_NC))
        (grad,) = torch.autograd.grad((getattr(found, part) ** 2).sum(), moe.router.weight)
        grads.append(grad)
    assert grads[1].any()
    assert_close(*grads, rounding(torch.float64, 2 * (6 + WIDTH), 9))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_leaves_the_other_gradients_bits(frozen):
    moe, x_NC = block(9, 6, 2, True, torch.float32)
    leaves = dict(x=x_NC, **dict(moe.router.named_parameters()))
    found = []
    for without in ("", frozen):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != without)
        out = by_c(moe, x_NC)
        wanted = [leaf for name, leaf in leaves.items() if name != frozen]
        found.append(torch.autograd.grad(out.weights_NK.square().sum() + out.z_loss, wanted))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("biased", [False, True])
def test_one_expert_s_router_gets_zeros_and_its_input_nothing(biased):
    """Unless the z-loss counts. Products with zeros took 3 % of a small dense model's step."""
    moe, x_NC = block(40, 1, 1, biased)
    x_NC.requires_grad_()
    leaves = list(moe.router.parameters())
    for factor, is_zero in ((None, True), (0.0, True), (0.1, False)):
        out = by_c(moe, x_NC)
        loss = out.weights_NK.square().sum() + out.mean_E.sum()
        loss = loss if factor is None else loss + factor * out.z_loss
        of_x, *others = torch.autograd.grad(loss, [x_NC, *leaves], allow_unused=True)
        assert (of_x is None) == is_zero
        assert all((grad.count_nonzero() == 0) == is_zero for grad in others)


def test_the_same_bits_on_any_number_of_threads(monkeypatch):
    """Sums over tokens are made of the same parts: a resumed run may have other threads."""
    share_small_work(monkeypatch, router)
    before, found = torch.get_num_threads(), []
    moe, x_NC = block(3000, 16, 2, True, torch.float32)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            # The products are PyTorch's.
            found.append(by_c(moe, x_NC)[:6])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_equal_scores_and_scores_that_are_no_numbers_choose_different_experts():
    """The first of equals; after a step that diverged, any: an index beyond the experts would read
    other memory.
    """
    x_NC, weight_EC = torch.ones(3, 2), torch.zeros(5, 2)
    found = router.routed(x_NC, weight_EC, None, None, 3)
    assert found.experts_NK.tolist() == [[0, 1, 2]] * 3
    assert torch.equal(found.counts_E, torch.tensor([3, 3, 3, 0, 0]))
    for broken in (math.nan, math.inf):
        for rows in (slice(1, 2), slice(0, 5)):
            weight_EC = torch.zeros(5, 2)
            weight_EC[rows] = broken
            found = router.routed(x_NC, weight_EC, None, None, 3)
            assert all(len(set(row)) == 3 for row in found.experts_NK.tolist())
            assert found.experts_NK.min() >= 0 and found.experts_NK.max() < 5
            assert found.z_loss.isnan() and found.weights_NK.isnan().all()


# ------------------------------------------------------------------------------- where it is taken
def chosen(**changes):
    model = random_model(tiny_config(**dict(dropout=0.0) | changes))
    choose_kernels(model, CPU, torch.float32)
    return model


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 1, "top_k": 1}, {"capacity_factor": 1.0, "z_loss_coef": 0.1}]
)
def test_a_model_trains_with_it(monkeypatch, changes):
    """The losses, the statistics and all gradients are the plain model's."""
    model, calls = chosen(**changes), []
    plain_model = copy.deepcopy(model)
    choose_kernels(plain_model, CPU, torch.float64)
    assert settle_kernels(model) == []
    real = router._run

    def noted(which, *given, **tensors):
        calls.append(which)
        real(which, *given, **tensors)

    monkeypatch.setattr(router, "_run", noted)
    ids_BT, outputs = torch.arange(18).view(2, 9), []
    for one in (model, plain_model):
        out = one(ids_BT, ids_BT.roll(-1, 1))
        (out.cross_entropy_sum + out.aux_loss).backward()
        outputs.append(out)
    blocks, is_dense = model.config.transformer_blocks, model.config.num_experts == 1
    assert calls.count("forward") == blocks
    assert calls.count("backward") == (0 if is_dense else blocks)
    bound = gradients_bound(model.config, 9, 2)
    for ours, theirs in zip(*(out.router for out in outputs), strict=True):
        assert_close(ours.detach(), theirs.detach(), bound)
    for ours, theirs in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, bound)


def test_without_it_the_module_computes_and_a_line_says_why(monkeypatch):
    """One kernel may be missing while the others are there."""
    why = "router.c could not be compiled: no space"
    monkeypatch.setattr(router, "library", lambda *given: (None, why))
    model = chosen()
    assert why_not_c(CPU, torch.float32) == why
    for one in model.layers:
        assert one.moe.route_kernel is None and one.attention.kernel is not None
    model(torch.arange(8)[None])


def test_what_it_lacks_is_left_to_the_module():
    """Another dtype, autocast, no token, tensors of shapes alone, sizes that do not fit."""
    moe, x_NC = block(4, 5, 2, False, torch.float32)
    assert router.route(moe.router, x_NC) is not None
    assert router.route(moe.router, x_NC[:0]) is None
    for dtype in (torch.bfloat16, torch.float64):
        assert router.route(copy.deepcopy(moe.router).to(dtype), x_NC.to(dtype)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert router.route(moe.router, x_NC) is None
    with FakeTensorMode():
        assert router.route(moe.router, torch.empty(4, WIDTH)) is None
    moe.router.selection_bias = torch.ones(1)
    assert router.route(moe.router, x_NC) is None
    moe.router.selection_bias, moe.router.top_k = None, 6
    assert router.route(moe.router, x_NC) is None


@pytest.mark.parametrize("K", [0, 6])
def test_more_experts_than_there_are_is_an_error(K):
    """It wrote beyond its memory, and the process ended."""
    with pytest.raises(ValueError, match=f"5 experts, {K} for a token"):
        router.routed(torch.randn(3, 4), torch.randn(5, 4), None, None, K)


def test_numbers_that_do_not_lie_side_by_side():
    """Every second number of a bias, and tokens that are columns."""
    moe, _ = block(4, 5, 2, True, torch.float32)
    x_NC = torch.randn(WIDTH, 4).t()
    moe.router.selection_bias = torch.randn(10)[::2]
    ours, plain = by_c(moe, x_NC), Routed(*moe.routed(x_NC))
    assert torch.equal(ours.experts_NK, plain.experts_NK)
    assert_close(ours.weights_NK, plain.weights_NK, rounding(torch.float32, 2 * (5 + WIDTH)))


def test_an_expert_that_is_switched_off_has_no_share_and_no_part_in_the_entropy():
    """A bias of minus infinity: the logged entropy was infinite."""
    moe, x_NC = block(9, 5, 2, True)
    moe.router.bias.data[3] = -math.inf
    for ours, plain in zip(by_c(moe, x_NC), moe.routed(x_NC), strict=True):
        assert_close(ours, plain, rounding(torch.float64, 2 * (5 + WIDTH), 9), size=1)


# ------------------------------------------------------------------------- changed and watched ones
class Noisy(Router):
    """One more layer, which begins with zeros and trains."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(config.d_model, config.num_experts, bias=False)
        torch.nn.init.zeros_(self.extra.weight)

    def forward(self, x_NC):
        return super().forward(x_NC + self.extra(x_NC).mean())


class Gate(torch.nn.Module):
    """A router without parameters of its own."""

    def __init__(self, config):
        super().__init__()
        self.inside = Router(config)
        self.num_experts = config.num_experts

    def forward(self, x_NC):
        return self.inside(x_NC)


@pytest.mark.parametrize("kind", [Noisy, Gate])
def test_a_router_of_another_class_is_called(kind):
    """The kernel computed without the new layer, or ended the run as it found no weight."""
    model = random_model(tiny_config(dropout=0.0))
    for one in model.layers:
        one.moe.router = kind(model.config)
        for parameter in one.moe.router.parameters():
            torch.nn.init.normal_(parameter)
    choose_kernels(model, CPU, torch.float32)
    lines = settle_kernels(model)
    assert len(lines) == 1 and "runtime/kernels/router.py does not know" in lines[0]
    assert not any(one.moe.route_kernel for one in model.layers)
    model.layers[0].moe.route_kernel = router.route
    out = model(torch.arange(18).view(2, 9), torch.arange(18).view(2, 9))
    out.cross_entropy_sum.backward()
    assert all(p.grad is not None for p in model.layers[0].moe.router.parameters())


def test_a_router_with_a_further_part_is_called():
    """Its class may have been given one: its forward pass then has the old name."""
    moe, x_NC = block(4, 5, 2, False, torch.float32)
    moe.router.add_module("extra", torch.nn.Identity())
    assert router.route(moe.router, x_NC) is None


def test_a_forward_pass_that_was_replaced_on_one_router_is_called():
    model, seen = chosen(), []
    one = model.layers[0].moe.router
    original = one.forward
    one.forward = lambda x_NC: seen.append(len(x_NC)) or original(x_NC)
    model(torch.arange(8)[None])
    assert seen == [8]


@pytest.mark.parametrize("sizes", [(2880, 32, 4), (2048, 64, 8), (1024, 32, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_wide_models_keep_it(sizes, biased):
    """Their comparison had scores of up to 200: shares of nothing, in other orders."""
    C, E, K = sizes
    config = tiny_config(
        d_model=C,
        num_experts=E,
        top_k=K,
        num_heads=2,
        num_kv_heads=2,
        d_ff=8,
        transformer_blocks=1,
        router_bias=biased,
        router_bias_rate=0.1 * biased,
    )
    model = LLM(config)
    choose_kernels(model, CPU, torch.float32)
    assert settle_kernels(model) == [] and model.layers[0].moe.route_kernel is not None


def test_a_gradient_that_was_changed_is_what_is_computed(monkeypatch):
    """A contributor lets no gradient pass through the choice: all values are as before."""
    original = MoE.routed

    def routed(self, x_NC):
        weights_NK, *rest = original(self, x_NC)
        return weights_NK.detach(), *rest

    monkeypatch.setattr(MoE, "routed", routed)
    model = chosen()
    (line,) = settle_kernels(model)
    assert "router.py has other results than MoE.routed" in line


KINDS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_with_a_hook_is_called(kind):
    """Whoever watches which experts are chosen sees them."""
    model, seen = chosen(), []
    one = model.layers[0].moe.router
    getattr(one, f"register_{kind}")(lambda *given: seen.append(len(given)))
    ids_BT = torch.arange(18).view(2, 9)
    model(ids_BT, ids_BT).cross_entropy_sum.backward()
    assert len(seen) == 1


def test_a_hook_of_all_modules_sees_routers():
    model, seen = chosen(), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, given, out: seen.append(type(module).__name__)
    )
    try:
        model(torch.arange(8)[None])
    finally:
        handle.remove()
    assert seen.count("Router") == model.config.transformer_blocks


def test_a_changed_router_is_what_is_computed(monkeypatch):
    """A contributor scores by a sigmoid, as DeepSeek-V3: the kernel would have kept the softmax."""
    original = MoE.routed

    def routed(self, x_NC):
        monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: x.sigmoid())
        found = original(self, x_NC)
        monkeypatch.undo()
        monkeypatch.setattr(MoE, "routed", routed)
        return found

    monkeypatch.setattr(MoE, "routed", routed)
    model = chosen()
    (line,) = settle_kernels(model)
    assert line.startswith("plain operations compute routers, which is slower: ")
    assert "router.py has other results than MoE.routed" in line
    assert not any(one.moe.route_kernel for one in model.layers)


def test_a_second_derivative_is_an_error():
    """It would be a constant, without a word."""
    moe, x_NC = block(4, 5, 2, False)
    found = by_c(moe, x_NC)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(found.z_loss, moe.router.weight, create_graph=True)
