"""All experts as one operation on a CPU equal the plain path, for any loads, threads and mode."""

from __future__ import annotations

import collections
import os
import random
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_parts import Experts
from runtime.kernels import cpu_experts, routed_experts
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config
from tests.conftest import REPO
from tests.numeric import assert_close, rounding


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_experts(activation: str, bias: bool, E: int = 5, dtype=torch.float64) -> Experts:
    experts = Experts(
        tiny_config(
            d_model=12,
            d_ff=8,
            num_experts=E,
            top_k=1,
            expert_activation=activation,
            expert_bias=bias,
        )
    ).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 0.5)
    return experts


def outputs_and_gradients(
    experts: Experts, x: torch.Tensor, counts: torch.Tensor
) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    experts.zero_grad()
    y = experts(x, torch.repeat_interleave(torch.arange(len(counts)), counts), counts)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    return [y.detach(), x.grad] + [p.grad.clone() for p in experts.parameters()]


@pytest.mark.parametrize(
    "activation, bias",
    [
        ("swiglu", False),
        ("gelu", True),
        ("swiglu", True),
        ("gelu", False),
        ("swiglu_clamped", True),
    ],
)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_it_equals_the_plain_path(threads, monkeypatch, activation, bias, num_threads):
    """Random loads, some experts without rows.

    A thread per expert, or threads that share each product.
    """
    threads(num_threads)
    used = []
    monkeypatch.setattr(cpu_experts, "MOST_ROWS_INLINE", 1)
    original = cpu_experts.shares
    monkeypatch.setattr(
        cpu_experts, "shares", lambda groups, n: used.append(original(groups, n)) or used[-1]
    )
    for seed in range(8):
        r = random.Random(seed)
        counts = torch.tensor(
            [r.choice([0, 1, 7, 8, 9]) for _ in range(5)] if seed else [40, 0, 0, 0, 1]
        )
        if counts.sum() == 0:
            continue
        torch.manual_seed(seed)
        experts, x = (
            make_experts(activation, bias),
            torch.randn(int(counts.sum()), 12, dtype=torch.float64),
        )
        plain = outputs_and_gradients(experts, x, counts)
        experts.feed_forward = torch.ops.gptoss.feed_forward.default
        for expected, value in zip(plain, outputs_and_gradients(experts, x, counts), strict=True):
            # Gate and up, down; backward two products for each; sums over the rows.
            bound = rounding(torch.float64, *3 * [2 * 12, 8], len(x))
            assert_close(value, expected, bound, f"seed {seed}")
        assert torch.get_num_threads() == num_threads
    assert (None in used and any(used)) == (num_threads > 1), "both ways were to be tried"


def test_gradcheck():
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 2])
    for activation, bias in (("swiglu", False), ("gelu", True), ("swiglu_clamped", True)):
        e = make_experts(activation, bias, E=3)
        inputs = [
            torch.randn(5, 12, dtype=torch.float64, requires_grad=True),
            e.w_in,
            e.b_in,
            e.w_out,
            e.b_out,
        ]
        assert torch.autograd.gradcheck(
            lambda *tensors, e=e: cpu_experts.feed_forward(*tensors, counts, e.activation)[0],
            inputs,
        )


def test_the_compiler_knows_its_shapes():
    torch.manual_seed(0)
    for activation, bias in (("swiglu", True), ("gelu", False), ("swiglu_clamped", True)):
        e = make_experts(activation, bias, E=3, dtype=torch.float32)
        arguments = (
            torch.randn(6, 12, requires_grad=True),
            e.w_in,
            e.b_in,
            e.w_out,
            e.b_out,
            torch.tensor([1, 0, 5]),
            e.activation,
        )
        torch.library.opcheck(torch.ops.gptoss.feed_forward.default, arguments)


def test_shares_are_even_or_refused():
    """Whole experts go to threads, unless one has most of the rows.

    The others would then wait for it, so all share each product.
    """

    def groups(*rows):
        return [(e, slice(sum(rows[:e]), sum(rows[: e + 1]))) for e in range(len(rows))]

    parts = cpu_experts.shares(groups(5, 1, 4, 2), 2)
    assert sorted(e for part in parts for e, _ in part) == [0, 1, 2, 3]
    assert [sum(rows.stop - rows.start for _, rows in part) for part in parts] == [6, 6]
    assert cpu_experts.shares(groups(100, 1, 1, 1), 2) is None
    assert cpu_experts.shares(groups(8), 2) is None
    assert cpu_experts.shares(groups(8), 1) == [[(0, slice(0, 8))]]


def test_threads_of_the_pool_do_not_cut_their_products(threads):
    """A thread's first question about its thread count sets it to the process's.

    A number set before that was lost: every expert's products were still split. And the process's
    number was left at 1.
    """
    threads(2)
    pool = cpu_experts._pool(2, os.getpid())
    assert list(pool.map(lambda _: torch.get_num_threads(), range(8))) == [1] * 8
    assert torch.get_num_threads() == 2


def test_a_change_of_threads_makes_another_pool(threads):
    experts, counts = make_experts("swiglu", False), torch.tensor([80, 80, 80, 80, 80])
    experts.feed_forward = torch.ops.gptoss.feed_forward.default
    x, results = torch.randn(400, 12, dtype=torch.float64), []
    for n in (2, 3, 2):
        threads(n)
        results.append(outputs_and_gradients(experts, x, counts)[0])
        assert torch.get_num_threads() == n
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), (
        "an expert on one thread is the same on any"
    )


def test_an_error_in_a_thread_is_raised(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(
        cpu_experts,
        "_activation",
        lambda h, activation: (_ for _ in ()).throw(RuntimeError("can't allocate memory")),
    )
    experts, counts = make_experts("swiglu", False), torch.tensor([80] * 5)
    experts.feed_forward = torch.ops.gptoss.feed_forward.default
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        outputs_and_gradients(experts, torch.randn(400, 12, dtype=torch.float64), counts)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_makes_its_own_threads():
    """A pool's threads do not survive a fork: work given to it in the child was never done."""
    code = """
import os, torch
from runtime.kernels import cpu_experts
torch.set_num_threads(2)
counts = torch.tensor([200, 200])
seen = []
cpu_experts._each_expert(lambda e, rows: seen.append(e), counts)
if os.fork() == 0:
    seen.clear()
    cpu_experts._each_expert(lambda e, rows: seen.append(e), counts)
    os._exit(40 + len(seen))
print(sorted(seen), os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[0, 1] 42", done.stderr


def test_inference_mode_reaches_the_threads(threads):
    """It is a mode of each thread: the tensors made in it could not be written by the others."""
    threads(2)
    experts, counts = make_experts("swiglu", True), torch.tensor([80] * 5)
    x = torch.randn(400, 12, dtype=torch.float64)
    expected = experts(x, torch.repeat_interleave(torch.arange(5), counts), counts)
    experts.feed_forward = torch.ops.gptoss.feed_forward.default
    with torch.inference_mode():
        actual = experts(x, torch.repeat_interleave(torch.arange(5), counts), counts)
        assert_close(actual, expected, rounding(torch.float64, 2 * 12, 8))


def test_dropout_takes_the_plain_path_and_the_rest_this_one(monkeypatch):
    calls = []
    monkeypatch.setattr(
        cpu_experts,
        "_each_expert",
        lambda function, counts, original=cpu_experts._each_expert: (
            calls.append(1) or original(function, counts)
        ),
    )
    model = random_model(tiny_config(dropout=0.5))
    # As without a compiler.
    monkeypatch.setattr(routed_experts, "library", lambda *given: (None, "no compiler"))
    choose_kernels(model, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 61, (2, 8))
    model.train()(ids)
    assert not calls
    model.eval()(ids)
    assert len(calls) == 2


def test_autocast_reaches_it():
    torch.manual_seed(0)
    experts, counts, x = (
        make_experts("swiglu", True, dtype=torch.float32),
        torch.tensor([4, 4, 4, 4, 4]),
        torch.randn(20, 12),
    )
    exact = outputs_and_gradients(experts, x, counts)
    experts.feed_forward = torch.ops.gptoss.feed_forward.default
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs_and_gradients(experts, x, counts)
    assert rounded[0].dtype == torch.bfloat16
    for a, b in zip(exact, rounded, strict=True):
        assert not torch.equal(a, b.float()) and torch.allclose(
            a, b.float(), rtol=0.05, atol=0.05 * a.abs().max().item()
        )


# ------------------------------------------------------------------------ memory that does not grow
class _Shapes(TorchDispatchMode):
    """The row counts that each operation of oneDNN's is given."""

    def __init__(self):
        super().__init__()
        self.rows = collections.defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        if name.partition(".")[0] in ("mm", "addmm", "gelu", "gelu_backward"):
            matrices = [a for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
            self.rows[name].add(tuple(tuple(m.shape) for m in matrices))
        return function(*args, **(kwargs or {}))


def _implementation(name: str):
    """An operation's function itself: a mode outside of a custom operation does not see inside."""
    return getattr(cpu_experts, name)._init_fn if "feed" in name else getattr(cpu_experts, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "swiglu_clamped"])
def test_onednn_meets_few_row_counts(dtype, activation):
    """Memory grew with every step.

    Each new row count of an expert made oneDNN build, and keep, a kernel for GELU (0.9 MB) and, in
    half precision, one for each of an expert's six products.
    """
    C, F, I = 12, 8, 8 if activation == "gelu" else 16
    made = [torch.randn(shape).to(dtype) for shape in ((2, I, C), (2, I), (2, C, F), (2, C))]
    with _Shapes() as seen:
        for rows in range(1, 700, 3):
            counts, x = torch.tensor([rows, 0]), torch.ones(rows, C, dtype=dtype)
            _, h = _implementation("feed_forward")(x, *made, counts, activation)
            backward = _implementation("_feed_forward_backward")
            backward(x, x, h, made[0], made[2], counts, activation, [True] * 5)
            if activation == "gelu":
                _implementation("_grouped_linear")(x, *made[:2], counts)
                _implementation("_grouped_linear_backward")(h, x, made[0], counts, [True] * 3)
    half = dtype != torch.float32
    taken = {name: shapes for name, shapes in seen.rows.items() if half or "gelu" in name}
    assert len(taken) == 2 * half + 2 * (activation == "gelu"), seen.rows.keys()
    for name, shapes in taken.items():
        counts = {n for shape in shapes for matrix in shape for n in matrix} - {C, F, I}
        assert counts and all(n == cpu_experts.padded_rows(n) for n in counts), name
        if "mm" in name:
            # A weight's gradient multiplies [features, rows]; all others [rows, features].
            first = {matrices[0][0] for matrices in shapes} - {C, F, I}
            assert max(first) <= cpu_experts.ROWS_AT_ONCE, (name, sorted(first))
        # Up to 700 rows: 1, 8, 4 multiples of 64; 7 larger ones in the weights' gradients.
        assert len(counts) <= (13 if name.startswith("mm") else 6), (name, sorted(counts))


def test_padded_rows_are_few_and_near():
    """Eight to a doubling from 512 on, so that large batches, too, meet few."""
    padded = {n: cpu_experts.padded_rows(n) for n in range(1, 70_000)}
    assert all(p >= n and cpu_experts.padded_rows(p) == p for n, p in padded.items())
    assert all(p < n * 9 / 8 + 64 for n, p in padded.items())
    assert len(set(padded.values())) < 2 + 8 + 8 * 8
    some = {1: 1, 2: 8, 9: 64, 65: 128, 512: 512, 513: 576, 1025: 1152}
    assert {n: padded[n] for n in some} == some


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "swiglu_clamped"])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_padding_changes_nothing(threads, monkeypatch, activation, num_threads):
    """bfloat16 with and without it, on both paths.

    An expert without rows gets zeros, not what was in its memory.
    """
    threads(num_threads)
    torch.manual_seed(0)
    counts = torch.tensor([130, 0, 97, 1, 140])
    experts = make_experts(activation, True, dtype=torch.bfloat16)
    x = torch.randn(368, 12, dtype=torch.bfloat16)
    for path in (None, torch.ops.gptoss.feed_forward.default):
        experts.feed_forward = path
        padded = outputs_and_gradients(experts, x, counts)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_experts, "_padded", lambda x: x)
            unpadded = outputs_and_gradients(experts, x, counts)
        for a, b in zip(padded, unpadded, strict=True):
            # Sums are float32's: another order may turn a rounding, 2^-8, of two numbers in a row.
            assert (a - b).abs().max() <= 2 * 2**-8 * b.abs().max()
        assert not any(gradient[1].any() for gradient in padded[2:])


def test_gelu_in_pieces_is_gelu_bit_for_bit():
    """Row counts below, at and above the pieces' sizes; columns that fill no register."""
    torch.manual_seed(0)
    for rows in (1, 3, 31, 32, 33, 63, 255, 256, 257, 300, 611):
        h, grad = torch.randn(rows, 37), torch.randn(rows, 37)
        assert torch.equal(cpu_experts._activation(h, "gelu"), torch.nn.functional.gelu(h))
        backward = torch.ops.aten.gelu_backward(grad, h)
        assert torch.equal(cpu_experts._activation_backward(grad.clone(), h, "gelu"), backward)
