"""Weights that need no gradient cost none: no product, no memory, and the others do not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.kernels import cpu_experts, grouped_linear
from runtime.kernels.choose import choose_kernels
from runtime.kernels.linear_cross_entropy import linear_cross_entropy
from tests.builders import random_model, tiny_config
from tests.nightly import nightly_but

# Rows, inputs, outputs, experts; the last expert has no rows.
R, I, O, E = 9, 6, 10, 3
COUNTS = torch.tensor([4, 5, 0])


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


class Elements(TorchDispatchMode):
    """Counts the elements of each new tensor, those of custom operations included."""

    def __init__(self):
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_old = func.is_view or func._schema.is_mutable
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not is_old:
                self.made.append(tensor.numel())
        return out


def _random(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _grouped_backward(implementation, needed: list[bool]):
    grad, x, w = _random((R, O), (R, I), (E, O, I))
    return implementation(grad, x, w, COUNTS, needed)


def _feed_forward_backward(needed: list[bool]):
    grad, x, h, w_in, w_out = _random((R, I), (R, I), (R, 2 * O), (E, 2 * O, I), (E, I, O))
    arguments = (grad, x, h, w_in, w_out, COUNTS, "swiglu", needed)
    return cpu_experts._feed_forward_backward._init_fn(*arguments)


def _by_custom_operation(needed):
    return _grouped_backward(grouped_linear._grouped_linear_backward._init_fn, needed)


def _by_kernel_for_cpus(needed):
    return _grouped_backward(cpu_experts._grouped_linear_backward, needed)


# Multiplications for each gradient that is needed, and those that several share: in feed_forward,
# the gradient of the hidden layer is there for x, w_in and b_in.
BACKWARDS = {
    "grouped_linear": (_by_custom_operation, [R * I * O, R * I * O, 0], (0, ())),
    "grouped_linear on a CPU": (_by_kernel_for_cpus, [R * I * O, R * I * O, 0], (0, ())),
    "feed_forward": (
        _feed_forward_backward,
        [2 * R * I * O, 2 * R * I * O, 0, R * I * O, 0],
        (R * I * O, (0, 1, 2)),
    ),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_only_the_needed_gradients_are_computed(name):
    """A frozen matrix cost a product and room for a gradient that nobody read.

    Under adapters, that is two of three products of the backward pass.
    """
    backward, multiplications, (shared, sharers) = BACKWARDS[name]
    whole = backward([True] * len(multiplications))
    for needed in itertools.product([False, True], repeat=len(multiplications)):
        with Products() as products:
            some = backward(list(needed))
        for one, all_of_it, is_needed in zip(some, whole, needed, strict=True):
            assert torch.equal(one, all_of_it) if is_needed else one.numel() == 0
        expected = sum(itertools.compress(multiplications, needed))
        expected += shared * any(needed[i] for i in sharers)
        assert products.multiplications == expected, needed


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_the_loss_makes_no_gradient_of_a_frozen_head(frozen):
    """The head's gradient is 0.8 GB at full size."""
    rows, vocabulary, width, chunk_rows = 8, 50, 4, 3
    whole = _random((rows, width), (vocabulary, width), (vocabulary,))
    targets_N = torch.arange(rows) * 5

    def gradients(frozen):
        inputs = [
            t.clone().requires_grad_(not fixed) for t, fixed in zip(whole, frozen, strict=True)
        ]
        with Elements() as elements, Products() as products:
            loss = linear_cross_entropy(*inputs, targets_N, chunk_rows)
        if not all(frozen):
            loss.backward()
        return [t.grad for t in inputs], elements.made, products.multiplications

    expected, _, _ = gradients([False] * 3)
    found, made, multiplications = gradients(frozen)
    for one, all_of_it, fixed in zip(found, expected, frozen, strict=True):
        assert one is None if fixed else torch.equal(one, all_of_it)
    assert multiplications == rows * vocabulary * width * (3 - frozen[0] - frozen[1])
    assert (made.count(vocabulary * width) == 0) == frozen[1]


@pytest.mark.parametrize(
    "path, bias",
    nightly_but(
        [
            ("feed_forward", False),
            ("feed_forward", True),
            ("plain", False),
            ("plain", True),
            ("compiled", True),
        ],
        0,
        1,
        2,
        3,
    ),
)
def test_a_frozen_model_passes_gradients_on_and_makes_none_of_its_own(path, bias):
    """One trained norm in front of all; its gradient is that of a model where all is trained."""
    config = tiny_config(expert_bias=bias, head_bias=bias, tie_embeddings=False)
    model = random_model(config)
    choose_kernels(model, torch.device("cpu"), torch.float32)
    if path != "feed_forward":
        for block in model.layers:
            block.moe.experts.feed_forward = None
            block.moe.dispatcher.kernel = None
    if path == "compiled":
        model.compile_in_place()
    trained = model.layers[0].norm1.weight
    ids_BT = torch.randint(config.vocabulary_size, (2, 8))
    model(ids_BT, ids_BT).cross_entropy_sum.backward()
    expected, trained.grad = trained.grad, None

    experts = model.layers[0].moe.experts
    model.zero_grad()
    model.requires_grad_(False)
    trained.requires_grad_(True)
    loss = model(ids_BT, ids_BT).cross_entropy_sum
    with Elements() as elements:
        loss.backward()
    large = {experts.w_in.numel(), experts.w_out.numel(), model.head_weight.numel()}
    if path != "compiled":
        assert torch.equal(trained.grad, expected)
        assert not large & set(elements.made)
    else:
        # The compiler fuses other sums when fewer gradients leave the graph.
        torch.testing.assert_close(trained.grad, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters() if p is not trained)


def test_the_compiler_knows_the_shapes_of_what_is_not_needed():
    x, w, b = _random((R, I), (E, O, I), (E, O))
    for frozen in ((False, True, True), (True, False, True)):
        inputs = [t.clone().requires_grad_(not f) for t, f in zip((x, w, b), frozen, strict=True)]
        operation = torch.ops.gptoss.grouped_linear.default
        torch.library.opcheck(operation, (*inputs, COUNTS))
    w_in, b_in, w_out, b_out = _random((E, 2 * O, I), (E, 2 * O), (E, I, O), (E, I))
    arguments = (x.requires_grad_(), w_in, b_in, w_out, b_out, COUNTS, "swiglu")
    torch.library.opcheck(torch.ops.gptoss.feed_forward.default, arguments)
