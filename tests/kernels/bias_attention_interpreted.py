"""The Triton kernels of attention with the learned bias, on a CPU, by Triton's interpreter.

The interpreter must be chosen before Triton is imported, so tests/kernels/test_bias_attention.py
runs this file in a process of its own: `TRITON_INTERPRET=1 python -m pytest THIS_FILE`.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import triton
from torch import Tensor

from model_parts import attention_mask, attention_with_sinks
from runtime.checks.kernels import settle_kernels
from runtime.kernels import bias_attention as kernels
from runtime.kernels.bias_attention import bias_attention
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config
from tests.numeric import assert_close, gradients_bound, rounding, size_of

CPU = torch.device("cpu")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("y", "q", "k", "v", "table")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Memory that nobody wrote holds NaN, and Triton 3.6 counts as later versions do.

    Its interpreter asks NumPy for an int of an array [1], which NumPy 2.4 refuses.
    """
    assert kernels.is_interpreted(), "set TRITON_INTERPRET=1"
    if int(triton.__version__.split(".")[1]) < 7:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(B: int, H: int, G: int, T: int, D: int, L: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the output's gradient with memory as the model has it; a table."""
    generator = torch.Generator().manual_seed(T)
    random = [torch.randn(B, T, n, D, generator=generator).to(dtype) for n in (H, G, G, H)]
    table_HLL = torch.randn(H, L, L, generator=generator)
    return [*(x.transpose(1, 2) for x in random), table_HLL]


def computed(q, k, v, dy, table, function=None) -> list[Tensor]:
    """The output and the four gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, table)]
    y = function(*leaves) if function else bias_attention(*leaves, dtype=q.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def exact(q, k, v, dy, table) -> list[Tensor]:
    """The same by model_parts in float64."""

    def plain(q, k, v, table):
        T = q.shape[2]
        positions_T = torch.arange(T)
        hidden_TT = ~attention_mask(positions_T, positions_T, 0)
        mask_HTT = table[:, :T, :T].masked_fill(hidden_TT, -math.inf)
        return attention_with_sinks(q, k, v, None, mask_HTT, False)

    return computed(*(x.double() for x in (q, k, v, dy, table)), plain)


def assert_right(got: list[Tensor], q, k, v, dy, table) -> None:
    """Within the rounding of q's dtype, and 0 where the table has no effect.

    float32: sums over keys, features, and the batch. Half precision: sums are float32, and only
    what is stored or multiplied is rounded (the probabilities, y, dS), where the error of y reaches
    dS by a sum over D features.
    """
    (B, H, T, D), G = q.shape, k.shape[1]
    for name, ours, right in zip(NAMES, got, exact(q, k, v, dy, table), strict=True):
        if q.dtype == FP32:
            bound = rounding(FP32, D, T) if name == "y" else rounding(FP32, D, T, D, T, B * H // G)
        else:
            bound = rounding(q.dtype, 2) if name == "y" else rounding(q.dtype, 4, D)
        assert ours.dtype == (table.dtype if name == "table" else q.dtype)
        size = None
        if name == "table":
            # Of what queries see; for one token it is a difference of equal numbers.
            size = size_of(right) * table.shape[-1] / math.sqrt(T * (T + 1) / 2)
            assert (ours.triu(1) == 0).all() and (ours[:, T:] == 0).all()
        assert_close(ours, right, bound, name, size if T > 1 else 1.0)


@pytest.mark.parametrize(
    "B, H, G, T, D, L, dtype",
    [
        (1, 1, 1, 1, 16, 3, FP32),
        (1, 2, 1, 65, 32, 70, FP32),
        (1, 1, 1, 200, 32, 224, FP16),
        (3, 2, 2, 63, 64, 64, FP16),
        (1, 8, 1, 33, 24, 40, FP16),
        (1, 4, 1, 64, 128, 64, FP16),
        (1, 2, 1, 65, 16, 65, BF16),
        (1, 1, 1, 63, 64, 63, BF16),
    ],
    ids=str,
)
def test_it_is_the_plain_one(B, H, G, T, D, L, dtype):
    """Results and four gradients, in the memory order of the model and in another one."""
    given = drawn(B, H, G, T, D, L, dtype)
    got = computed(*given)
    assert_right(got, *given)
    assert got[0].transpose(1, 2).is_contiguous(), "heads are joined next"


def test_two_runs_and_any_memory_order_give_the_same_bits():
    given = drawn(2, 2, 1, 20, 16, 30, FP16)
    first, second = computed(*given), computed(*given)
    q, k, v, dy, table = given
    # Heads outside tokens; features first; a view of a longer table.
    wider_HLL = torch.full((2, 30, 31), math.nan)
    wider_HLL[:, :, :30] = table
    other = computed(
        q.contiguous(),
        k.transpose(2, 3).contiguous().transpose(2, 3),
        v.contiguous(),
        dy.transpose(0, 3).contiguous().transpose(0, 3),
        wider_HLL[:, :, :30],
    )
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_gradient_that_is_one_number_everywhere():
    """The gradient of a sum has strides of 0."""
    q, k, v, dy, table = drawn(1, 2, 1, 20, 16, 20, FP32)
    ones = torch.ones((), dtype=dy.dtype).expand(dy.shape)
    assert_right(computed(q, k, v, ones, table), q, k, v, ones, table)


def test_entries_of_minus_infinity_hide_a_key():
    """A first tile that a row does not see at all gave NaN in kernels that subtract its maximum."""
    q, k, v, dy, table = drawn(1, 1, 1, 40, 16, 40, FP32)
    table[:, 35:, :33] = -math.inf
    assert_right(computed(q, k, v, dy, table), q, k, v, dy, table)


def test_what_is_not_finite_stays_so():
    """Training skips such a step, so it must see it: NaN in a query is NaN in all gradients."""
    q, k, v, dy, table = drawn(1, 1, 1, 20, 16, 20, FP32)
    q[0, 0, 7, 3] = math.nan
    y, *gradients = computed(q, k, v, dy, table)
    assert y[0, 0, 7].isnan().all() and not y[0, 0, :7].isnan().any()
    assert all(gradient.isnan().any() for gradient in gradients)


def test_gradients_that_nobody_wants_are_not_computed():
    """A frozen table's, as under adapters, would cost as much as a trained one's."""
    q, k, v, dy, table = drawn(1, 1, 1, 20, 16, 20, FP32)
    all_four = computed(q, k, v, dy, table)[1:]
    for wanted in range(4):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((q, k, v, table))]
        bias_attention(*leaves, dtype=FP32).backward(dy)
        for i, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, all_four[i]) if i == wanted else leaf.grad is None


def test_the_operation_is_one_for_a_compiler():
    """Its fake results, its gradient and its schema, by PyTorch's own checks."""
    q, k, v, dy, table = (x.requires_grad_() for x in drawn(1, 2, 1, 5, 16, 7, FP32))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operations, given = torch.ops.gptoss, (q, k, v, table)
    torch.library.opcheck(operations.bias_attention.default, given, test_utils=checks)
    y, log_BHT = (x.detach() for x in operations.bias_attention(*given))
    for needed in ([True, True, True], [False, True, False]):
        given = (dy.detach(), *(x.detach() for x in (q, k, v, table)), y, log_BHT, needed)
        torch.library.opcheck(
            operations.bias_attention_backward.default, given, test_utils=checks[::2]
        )


def test_a_model_trains_with_it(monkeypatch):
    """Chosen by the variable, asked, and used: the loss and all gradients are the plain model's."""
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    config = tiny_config(use_attention_bias=True, transformer_blocks=1, num_heads=2, num_kv_heads=1)
    model = random_model(config)
    plain = copy.deepcopy(model)
    choose_kernels(model, CPU, FP32)
    (line,) = settle_kernels(model)
    assert line.startswith("Triton computes attention with the learned bias")
    calls = []
    kernel = model.layers[0].attention.kernel
    model.layers[0].attention.kernel = lambda *given: calls.append(1) or kernel(*given)
    ids_BT = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    for one in (model, plain):
        one(ids_BT, ids_BT.roll(-1, 1)).cross_entropy_sum.backward()
    assert calls == [1]
    bound = gradients_bound(config, 9, 2)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, bound)


def test_bfloat16_is_widened_for_the_interpreter_alone(monkeypatch):
    """Its own product takes the bits of bfloat16 for integers: results were off by 4.7e10."""
    assert kernels._product_dtype(BF16) == triton.language.float32
    assert kernels._product_dtype(FP16) == triton.language.float16
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels._product_dtype(BF16) == triton.language.bfloat16
