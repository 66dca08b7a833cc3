"""Muon's two passes: against single operations in float64, compiled, and the bytes they move."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.fx.experimental.proxy_tensor import make_fx

from runtime.training import muon
from runtime.training.muon import after_, before_, compiled, passes, update_dtype
from tests.numeric import assert_close, rounding

BETA, KEEP, STEP = 0.9, 0.995, -0.01
N, R, C = 3, 12, 20
# (momentum's dtype, dtype of the products, grad_scale)
CASES = [
    (torch.float32, torch.float32, None),
    (torch.float32, torch.float32, 1.7),
    (torch.bfloat16, torch.float32, 1.7),
    (torch.float32, torch.bfloat16, None),
    (torch.bfloat16, torch.float16, 1.7),
]


class Given:
    """Random matrices for one case, the second of them without a gradient."""

    def __init__(self, state_dtype: torch.dtype, dtype: torch.dtype, scale: float | None):
        generator = torch.Generator().manual_seed(0)
        self.gradient, momentum, self.weights = (
            torch.randn(N, R, C, generator=generator) for _ in range(3)
        )
        self.gradient[1] = 0.0
        self.weights[0, 0, 0] = -0.0
        self.momentum = momentum.to(state_dtype)
        self.update = torch.empty(N, R, C, dtype=update_dtype(dtype))
        self.scale = None if scale is None else torch.tensor(scale)

    def run(self, do_before, do_after, number=float, skip: Tensor | None = None):
        """Do both passes in place, without products between them; return the sums of squares."""
        scale, beta = self.scale, number(BETA)
        sums = do_before(self.gradient, self.momentum, self.update, beta, scale, skip)
        do_after(self.weights, self.update, sums[0], number(KEEP), number(STEP), skip)
        return sums


def check(given: Given, do_before, do_after, number=float) -> None:
    """Compare with the same in float64, one operation after another."""
    gradient = given.gradient.double() / (1.0 if given.scale is None else given.scale.double())
    momentum = BETA * given.momentum.double() + (1 - BETA) * gradient
    update = (1 - BETA) * gradient + BETA * momentum
    moved = update.clone()
    moved[1] = 0.0
    weights = given.weights.double() * KEEP + STEP * moved
    sums = given.run(do_before, do_after, number)
    # A handful of operations each.
    exact = rounding(torch.float32, 8)
    assert_close(given.momentum.double(), momentum, rounding(given.momentum.dtype, 1) + exact)
    narrow = rounding(given.update.dtype, 1) + exact
    assert_close(given.update.double(), update, narrow)
    assert_close(given.weights.double(), weights, exact + narrow * abs(STEP))
    squares = torch.stack([x.square().sum(dim=(1, 2)) for x in (gradient, update)])
    assert_close(sums.double(), squares, rounding(torch.float32, R * C))
    assert sums[0, 1] == 0 and (sums[0, ::2] > 0).all()


def check_skipped(given: Given, do_before, do_after, number=float) -> None:
    """Nothing changes where a step is left out, not even the sign of a zero."""
    given.gradient[0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    before = given.momentum.clone(), given.weights.clone()
    given.run(do_before, do_after, number, skip=torch.ones((), dtype=torch.bool))
    for now, then in zip((given.momentum, given.weights), before, strict=True):
        assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))
    # And where it is not left out, the flag does nothing else.
    plain, flagged = Given(*CASES[1]), Given(*CASES[1])
    plain.run(do_before, do_after, number)
    flagged.run(do_before, do_after, number, skip=torch.zeros((), dtype=torch.bool))
    assert torch.equal(plain.weights, flagged.weights)
    assert torch.equal(plain.momentum, flagged.momentum)


@pytest.mark.parametrize("case", CASES)
def test_the_passes_compute_momentum_update_and_weights(case):
    check(Given(*case), before_, after_)


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_left_out_changes_no_bit(case):
    check_skipped(Given(*case), before_, after_)


def tensor_of(value: float) -> Tensor:
    return torch.full((), value)


@pytest.mark.slow
def test_compiled_passes_compute_the_same():
    """For each dtype, for other sizes in the same graph, and where a step is left out."""
    do_before, do_after = map(muon._compiled_if_it_works, (before_, after_))
    for case in CASES:
        check(Given(*case), do_before, do_after, tensor_of)
    check_skipped(Given(*CASES[0]), do_before, do_after, tensor_of)


def test_they_are_compiled_on_cuda_alone_and_not_where_bits_must_repeat():
    """The compiler times how many numbers of a row to sum at once: another run may sum others."""
    assert passes(torch.device("cpu"))[:2] == (before_, after_)
    assert passes(torch.device("mps"))[:2] == (before_, after_)
    assert passes(torch.device("cuda"))[:2] == compiled() != (before_, after_)
    torch.use_deterministic_algorithms(True)
    try:
        assert passes(torch.device("cuda"))[:2] == (before_, after_)
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_compiler_they_are_single_operations_and_one_line_says_so(monkeypatch, capsys):
    calls = []

    class InvalidCxxCompiler(Exception):
        pass

    def no_compiler(*args):
        calls.append(args)
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    do_before, do_after = map(muon._compiled_if_it_works, (before_, after_))
    for _ in range(2):
        check(Given(*CASES[1]), do_before, do_after)
    # Each was tried once.
    assert len(calls) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("not compiled" in line and "g++" in line for line in lines)


def test_another_error_is_raised(monkeypatch):
    """Such as a lack of memory: nothing may be done twice."""

    def fails(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        muon._compiled_if_it_works(before_)(1, 2)


# ------------------------------------------------------------------------------- bytes they move
def bytes_moved(function, *tensors: Tensor) -> float:
    """Return bytes a parameter of one kernel: matrices that the traced function reads and writes.

    Each of its inputs that any operation reads counts once, and each that is overwritten.
    """
    graph = make_fx(function, tracing_mode="fake")(*tensors).graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    moved = 0
    for node, tensor in zip(inputs, tensors, strict=True):
        if tensor.dim() < 3:
            continue
        written = [u for u in node.users if u.target == torch.ops.aten.copy_.default]
        written = [u for u in written if u.args[0] is node]
        read = [u for u in node.users if u not in written]
        moved += tensor.nbytes * (bool(written) + bool(read))
    return moved / tensors[0].numel()


def test_the_two_passes_move_24_bytes_a_parameter(monkeypatch):
    """With float32 state and an update in half precision; as single operations it was 112."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    given, skip, number = Given(*CASES[3]), torch.zeros((), dtype=torch.bool), tensor_of(0.9)
    first = bytes_moved(
        before_, given.gradient, given.momentum, given.update, number, tensor_of(2.0), skip
    )
    sums = torch.ones(N)
    second = bytes_moved(after_, given.weights, given.update, sums, number, number, skip)
    assert (first, second) == (14, 10)


def bytes_of_kernels(function, *tensors: Tensor) -> list[float]:
    """Return bytes a parameter of each kernel that torch.compile would make for a GPU.

    Its scheduler for Triton is asked on a CPU, and stopped before it writes a kernel.
    """
    found: list[int] = []

    class Stop(Exception):
        pass

    def stop(graph):
        graph.init_wrapper_code()
        graph._update_scheduler()
        found.extend(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes)
        raise Stop

    with (
        mock.patch.object(GraphLowering, "codegen", stop),
        inductor_config.patch(cpu_backend="triton", fx_graph_cache=False),
        pytest.raises(Exception, match="Stop"),
    ):
        torch.compile(function, fullgraph=True, dynamic=True)(*tensors)
    return [count / tensors[0].numel() for count in found]


@pytest.mark.slow
def test_a_gpu_does_each_pass_in_one_kernel():
    """Other kernels see numbers of rows, not of matrices."""
    given, skip, number = Given(*CASES[3]), torch.zeros((), dtype=torch.bool), tensor_of(0.9)
    first = bytes_of_kernels(
        before_, given.gradient, given.momentum, given.update, number, tensor_of(2.0), skip
    )
    sums = torch.ones(N)
    second = bytes_of_kernels(after_, given.weights, given.update, sums, number, number, skip)
    # The compiler counts the update as read, too, which is overwritten: 2 bytes. Sums of rows are
    # two numbers a row, written once and read once.
    of_rows, slack = 2 * 4 / C, 100 / (N * R * C)
    assert 16 <= max(first) < 16 + of_rows + slack
    assert sum(first) - max(first) < of_rows + slack
    assert 10 <= max(second) < 10 + slack and len(second) == 1
