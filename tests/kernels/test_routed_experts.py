"""The experts in C equal the plain dispatcher, forward and backward, in every build."""

from __future__ import annotations

import functools

import pytest
import torch

from model_parts import Experts, LocalDispatcher
from runtime.checks.kernels import settle_kernels
from runtime.kernels import routed_experts
from runtime.kernels.choose import choose_kernels, why_not_c
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from tests.builders import random_model, tiny_config
from tests.kernels.builds import EVERY_BUILD, share_small_work, take
from tests.numeric import assert_close, rounding

HAS_CODE, WHY_NOT = routed_experts.library()
pytestmark = pytest.mark.skipif(HAS_CODE is None, reason=WHY_NOT)
CPU = torch.device("cpu")
ACTIVATIONS = ["gelu", "swiglu", "swiglu_clamped"]
# (d_model, d_ff, rows of each expert, experts of a token). Widths off the vectors', counts around
# a tile's rows, none, all on one expert, more than one task takes, sums longer than a panel.
SHAPES = [
    (12, 8, [5, 0, 40, 35], 2),
    (33, 50, [0, 1, 11, 12, 13, 3], 1),
    (16, 32, [0, 0, 61, 0], 1),
    (24, 20, [700, 3, 500], 3),
    (300, 9, [20, 70, 31, 7], 2),
]


def make_experts(activation: str, bias: bool, C: int, F: int, E: int, dtype) -> Experts:
    config = tiny_config(
        d_model=C,
        d_ff=F,
        num_experts=E,
        top_k=1,
        head_dim=8,
        expert_activation=activation,
        expert_bias=bias,
    )
    experts = Experts(config).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.3)
    return experts


def routed_rows(counts: list[int], K: int) -> torch.Tensor:
    """Return experts_NK with these counts, K different ones for a token if the counts allow."""
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    N = len(rows) // K
    return rows[: N * K].view(K, N).T.contiguous()


def case(activation, bias, shape, dtype, seed=0):
    """Return (experts, arguments of a dispatcher, the gradient of its result)."""
    torch.manual_seed(seed)
    C, F, counts, K = shape
    experts = make_experts(activation, bias, C, F, len(counts), dtype)
    experts_NK = routed_rows(counts, K)
    N = len(experts_NK)
    counts_E = torch.bincount(experts_NK.flatten(), minlength=len(counts))
    x_NC = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weights_NK = torch.rand(N, K, dtype=dtype, requires_grad=True)
    return experts, (x_NC, weights_NK, experts_NK, counts_E), torch.randn(N, C, dtype=dtype)


def in_c(experts, x_NC, weights_NK, experts_NK, counts_E, function=routed_experts.computed):
    return function(
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


def plainly(experts, *given):
    return LocalDispatcher()(*given, experts)


def results(function, experts, given, grad_NC) -> list[torch.Tensor]:
    """Return the output and the gradients of x, weights, w_in, w_out and the biases."""
    y_NC = function(experts, *given)
    inputs = [given[0], given[1], *experts.parameters()]
    return [y_NC.detach(), *torch.autograd.grad(y_NC, inputs, grad_NC)]


def check(activation, bias, shape, dtype) -> None:
    C, F, counts, K = shape
    experts, given, grad_NC = case(activation, bias, shape, torch.float64)
    expected = results(plainly, experts, given, grad_NC)
    if dtype == torch.float32:
        experts.float()
        given = [t.detach().float().requires_grad_() for t in given[:2]] + list(given[2:])
    # In float64 from the same values, so that only the kernel's own rounding counts.
    ours = results(in_c, experts, given, grad_NC.to(dtype))
    bound = rounding(dtype, *3 * [2 * C, F, K], max(counts))
    names = ["y", "x", "weights", *(name for name, _ in experts.named_parameters())]
    for name, value, wanted in zip(names, ours, expected, strict=True):
        assert_close(value, wanted, bound, f"{activation} {shape} {name}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_the_plain_dispatcher(activation, bias, shape):
    check(activation, bias, shape, torch.float32)


@pytest.mark.slow
@EVERY_BUILD
def test_every_build_gives_the_same(monkeypatch, build, dtype):
    take(monkeypatch, routed_experts, build, dtype)
    for activation in ACTIVATIONS:
        for shape in SHAPES:
            check(activation, True, shape, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation):
    """The build in float64 against differences, for the gradients of all six inputs."""
    experts, given, _ = case(activation, True, (5, 6, [3, 0, 4, 5], 2), torch.float64)
    x_NC, weights_NK, experts_NK, counts_E = given

    def function(x_NC, weights_NK, w_in, b_in, w_out, b_out):
        return routed_experts.routed_experts(
            x_NC, weights_NK, experts_NK, counts_E, w_in, b_in, w_out, b_out, activation
        )[0]

    tensors = (x_NC, weights_NK, experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("team", ["PyTorch's threads", "threads of its own"])
def test_bits_do_not_depend_on_threads(monkeypatch, team):
    """Experts of few rows are one task, others several: in any order, on any thread."""
    share_small_work(monkeypatch, routed_experts)
    if team == "threads of its own":
        monkeypatch.setattr(routed_experts, "parallel_region", lambda: 0)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            given = case("swiglu", True, (24, 20, [700, 3, 500, 0, 90], 3), torch.float32)
            found.append(results(in_c, *given))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_tokens_bits_do_not_depend_on_the_others():
    """Each row has its own sums: in a tile of 6 rows, of 2, or with others after it."""
    experts, (x_NC, weights_NK, experts_NK, _), _ = case(
        "gelu", True, (24, 20, [40, 30, 20], 1), torch.float32
    )
    together = in_c(experts, x_NC, weights_NK, experts_NK, torch.tensor([40, 30, 20]))
    for n in (0, 5, 41, 89):
        counts_E = torch.bincount(experts_NK[n], minlength=3)
        alone = in_c(
            experts, x_NC[n : n + 1], weights_NK[n : n + 1], experts_NK[n : n + 1], counts_E
        )
        assert torch.equal(alone[0], together[n])


def test_rows_that_are_sorted_already():
    """Experts of other ranks get rows, not tokens: no order, no weights."""
    experts, (x_NC, *_), grad_NC = case("swiglu", True, (12, 8, [5, 0, 7], 1), torch.float32)
    counts_E = torch.tensor([5, 0, 7])
    arguments = (experts.w_in, experts.b_in, experts.w_out, experts.b_out, counts_E, "swiglu")
    inputs = [x_NC, *experts.parameters()]
    ours, plain = (
        torch.autograd.grad(function(x_NC, *arguments)[0], inputs, grad_NC)
        for function in (routed_experts.rows_of_experts, torch.ops.gptoss.feed_forward.default)
    )
    for value, wanted in zip(ours, plain, strict=True):
        assert_close(value, wanted, rounding(torch.float32, *3 * [24, 8], 7))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 5])
def test_what_is_not_wanted_is_not_needed(wanted):
    """With frozen weights, or as the first block, some gradients are left out."""
    experts, (x_NC, weights_NK, experts_NK, counts_E), grad_NC = case(
        "gelu", True, (12, 8, [5, 0, 300, 35], 1), torch.float32
    )
    parameters = [experts.w_in, experts.b_in, experts.w_out, experts.b_out]
    everything = [x_NC, weights_NK, *parameters]
    whole = torch.autograd.grad(
        in_c(experts, x_NC, weights_NK, experts_NK, counts_E), everything, grad_NC
    )
    for i, tensor in enumerate(everything):
        tensor.requires_grad_(i == wanted)
    y_NC = in_c(experts, x_NC, weights_NK, experts_NK, counts_E)
    (grad,) = torch.autograd.grad(y_NC, everything[wanted], grad_NC)
    assert torch.equal(grad, whole[wanted])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_as_exact_as_its_dtype(activation):
    """From the tails, beyond the clamps, to 0: within a few units in the last place of 1.

    One expert that copies its input to gate and up, and its hidden layer to the result.
    """
    C = 16
    experts = make_experts(activation, False, C, C, 1, torch.float32)
    with torch.no_grad():
        experts.w_in.copy_(torch.cat([torch.eye(C)] * (experts.w_in.shape[1] // C))[None])
        experts.w_out.copy_(torch.eye(C)[None])
    x_NC = torch.cat((torch.linspace(-30, 30, 4_000), torch.linspace(-1, 1, 4_000))).view(-1, C)
    N = len(x_NC)
    given = (torch.ones(N, 1), torch.zeros(N, 1, dtype=torch.int64), torch.tensor([N]))
    plain = plainly(experts.double(), x_NC.double(), given[0].double(), *given[1:])
    ours = in_c(experts.float(), x_NC, *given)
    off = (ours - plain).abs() / x_NC.abs().clamp(min=1).square()
    assert off.max() <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    experts, (x_NC, weights_NK, experts_NK, counts_E), _ = case(
        "swiglu", False, (12, 8, [5, 4], 1), torch.float32
    )
    with torch.no_grad():
        x_NC[3, 2] = value
    y_NC = in_c(experts, x_NC, weights_NK, experts_NK, counts_E)
    assert not y_NC[3].isfinite().all() and y_NC[4:].isfinite().all()


@pytest.mark.parametrize("counts", [[5, 3], [4, 5], [10, -1]])
def test_counts_that_do_not_fit_are_refused(counts):
    """They would be read as addresses."""
    experts, (x_NC, weights_NK, experts_NK, _), _ = case(
        "swiglu", False, (12, 8, [5, 4], 1), torch.float32
    )
    with pytest.raises(ValueError, match="do not fit the rows"):
        in_c(experts, x_NC, weights_NK, experts_NK, torch.tensor(counts))
    with pytest.raises(ValueError, match="do not fit the rows"):
        in_c(experts, x_NC, weights_NK, experts_NK + 7, torch.tensor([5, 4]))


def test_the_compiler_knows_its_shapes():
    for activation in ACTIVATIONS:
        experts, given, _ = case(activation, True, (12, 8, [5, 0, 7], 2), torch.float32)
        parameters = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
        torch.library.opcheck(
            torch.ops.gptoss.routed_experts.default, (*given, *parameters, activation)
        )


def test_a_compilers_operation_and_the_call_without_one_give_the_same_bits():
    """A dense model of 0.8 M parameters spent 3 % of its step on calls of custom operations."""
    for activation in ACTIVATIONS:
        experts, given, grad_NC = case(activation, True, (12, 8, [5, 0, 7], 2), torch.float32)
        operation = functools.partial(in_c, function=routed_experts.routed_experts)
        mine, other = (results(form, experts, given, grad_NC) for form in (in_c, operation))
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    with torch.profiler.profile() as profile:
        in_c(experts, *given).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "_RoutedExperts" in names and not any(name.startswith("gptoss::") for name in names)


@pytest.mark.parametrize("part", ["norm", "attention", "experts", "loss"])
def test_a_second_derivative_is_refused_not_left_out(part):
    """Norms and loss gave gradients without a graph: a penalty on them was constant."""
    model = small_model()
    block, x_BTC = model.layers[0], torch.randn(1, 5, 32, requires_grad=True)
    function = {
        "norm": block.norm1,
        "attention": lambda x: block.attention(x, None),
        "experts": lambda x: block.moe(x)[0],
        "loss": lambda x: linear_cross_entropy(
            x.flatten(0, 1), model.head_weight, None, torch.arange(5), 8
        ),
    }[part]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(function(x_BTC).square().sum(), x_BTC, create_graph=True)


def test_without_gradients_it_is_called_at_once(monkeypatch):
    """Neither kept for a backward pass, nor by way of autograd."""
    experts, given, _ = case("swiglu", False, (12, 8, [5, 4], 1), torch.float32)
    monkeypatch.setattr(routed_experts, "routed_experts", None)
    in_c(experts, *given)
    monkeypatch.setattr(routed_experts, "_RoutedExperts", None)
    with torch.no_grad():
        in_c(experts, *given)


# ------------------------------------------------------------------------------- where it is taken
@functools.cache
def small_model():
    model = random_model(tiny_config(expert_activation="swiglu", dropout=0.0))
    choose_kernels(model, CPU, torch.float32)
    return model


def test_a_model_on_a_cpu_takes_it(monkeypatch):
    model, calls = small_model(), []
    assert settle_kernels(model) == []
    kernel = routed_experts.dispatch
    for block in model.layers:
        assert block.moe.dispatcher.kernel is kernel
        monkeypatch.setattr(
            block.moe.dispatcher, "kernel", lambda *a: calls.append(kernel(*a)) or calls[-1]
        )
    model(torch.arange(8)[None])
    assert len(calls) == len(model.layers) and all(y is not None for y in calls)


@pytest.mark.parametrize("what", ["float64", "bfloat16", "autocast", "dropout", "adapters"])
def test_it_steps_aside(what):
    """None: the dispatcher then goes its plain way."""
    dtype = getattr(torch, what, torch.float32) if "float" in what else torch.float32
    experts, (x_NC, *given), _ = case("swiglu", False, (12, 8, [5, 4], 1), dtype)
    if what == "dropout":
        experts.dropout = 0.5
        assert routed_experts.dispatch(x_NC, *given, experts.eval()) is not None
        experts.train()
    if what == "adapters":
        experts.cpu_parameters = ("w_in",)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert routed_experts.dispatch(x_NC, *given, experts) is None


def test_a_changed_dispatcher_is_noticed(monkeypatch):
    """A contributor weighs experts in another way: the kernel would have kept the old one."""
    original = LocalDispatcher.__call__

    def squared(self, x_NC, weights_NK, experts_NK, counts_E, experts):
        if self.kernel is not None:
            return self.kernel(x_NC, weights_NK, experts_NK, counts_E, experts)
        return original(self, x_NC, weights_NK.square(), experts_NK, counts_E, experts)

    monkeypatch.setattr(LocalDispatcher, "__call__", squared)
    model = random_model(tiny_config())
    choose_kernels(model, CPU, torch.float32)
    (line,) = settle_kernels(model)
    assert "routed_experts.py has other results than model_parts.LocalDispatcher" in line
    assert all(block.moe.dispatcher.kernel is None for block in model.layers)


def test_without_a_compiler_pytorch_computes_them(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    routed_experts.library.cache_clear()
    try:
        model = random_model(tiny_config())
        choose_kernels(model, CPU, torch.float32)
        for block in model.layers:
            assert block.moe.dispatcher.kernel is None
            assert block.moe.experts.feed_forward is torch.ops.gptoss.feed_forward.default
        assert "no C compiler" in why_not_c(CPU, torch.float32)
        assert why_not_c(CPU, torch.bfloat16) == ""
    finally:
        routed_experts.library.cache_clear()
