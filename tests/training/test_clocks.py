"""The clock that chooses a CPU's dtypes, and how a run keeps what it said."""

from __future__ import annotations

import pytest
import torch

import train
from config_model import TrainConfig
from runtime.base import device as device_module
from runtime.kernels import choose, cpu_experts
from runtime.training import clocks
from runtime.training import plan as plan_module
from runtime.training.clocks import LEAST_GAIN, compute_dtype, hidden_shapes, muon_dtype
from runtime.training.optimizer import HIDDEN_MATRICES, MuonAdamW, build_optimizer
from runtime.training.plan import initial_state, make_plan
from tests.builders import random_model, tiny_config
from tests.builders_runs import MODEL, SPEED, Run, settings_of

FLAGS = [flag for flag in SPEED if flag not in ("--dtype", "float32")]


@pytest.fixture
def bfloat16_cpu(monkeypatch):
    """A CPU with products in bfloat16, or what says that it has them."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.mark.parametrize("amx, avx512, expected", [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_a_cpu_has_products_in_bfloat16_by_either_instruction(monkeypatch, amx, avx512, expected):
    """AVX-512's made an AMD step 1.36 times as fast, and only AMX was asked about."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512), raising=False)
    assert device_module.has_bfloat16_products() == bool(expected)


def test_a_cpu_without_products_in_bfloat16_is_asked_nothing(monkeypatch):
    monkeypatch.setattr(clocks, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(clocks, "_chosen", lambda *_: pytest.fail("a clock"))
    assert compute_dtype(tiny_config(), 2) == (torch.float32, "")
    assert muon_dtype(tiny_config(), 1 << 17) == (torch.float32, "")


@pytest.mark.parametrize("narrow, expected", [(0.5, torch.bfloat16), (0.95, torch.float32)])
def test_bfloat16_must_be_clearly_faster(narrow, expected):
    """The least of some tries in turns counts, and the first of each, which builds kernels, not."""
    asked = []

    def work(dtype):
        asked.append(dtype)
        first = 9.0 if len(asked) <= 2 else 0.0
        slow_spell = 5.0 if len(asked) in (5, 6) else 0.0
        return first + slow_spell + (1.0 if dtype == torch.float32 else narrow)

    assert (LEAST_GAIN * narrow <= 1.0) == (expected == torch.bfloat16)
    dtype, line = clocks._chosen(work, "a block computes")
    assert dtype == expected and asked == [torch.float32, torch.bfloat16] * (clocks.TRIES + 1)
    name = str(expected).removeprefix("torch.")
    assert line.startswith(f"dtype    a block computes in {name}: bfloat16 takes {narrow:.2f} of")


def test_a_block_is_timed_with_ragged_loads_that_change(monkeypatch):
    """One square product said 2.2 times as fast where a small model's step was slower.

    In bfloat16 the rows of each expert are padded, as in training.
    """
    # Loads are seen in Python; where there is a compiler, float32 is computed in C.
    monkeypatch.setattr(choose, "_in_c", lambda *given: choose.InC())
    counts, padded = [], []
    groups, pad = cpu_experts._groups, cpu_experts.padded_rows
    monkeypatch.setattr(
        cpu_experts,
        "_groups",
        lambda counts_E: counts.append(counts_E.tolist()) or groups(counts_E),
    )
    monkeypatch.setattr(cpu_experts, "padded_rows", lambda n: padded.append(n) or pad(n))
    generator = torch.get_rng_state()
    seconds = clocks._block(tiny_config(), 3)
    for dtype in clocks.DTYPES:
        assert seconds(dtype) > 0
    # Forward and backward of each; 3 sequences of 32 tokens, two experts a token.
    assert len(counts) == 4 and all(sum(loads) == 3 * 32 * 2 for loads in counts)
    assert counts[0] == counts[1] != counts[2] == counts[3]
    assert len(set(counts[0])) > 1 and padded
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_pass_of_the_clock_has_few_tokens(monkeypatch):
    """A whole micro-batch of a large model takes minutes on a CPU."""
    monkeypatch.setattr(clocks, "MOST_TOKENS", 16)
    monkeypatch.setattr(clocks, "LEAST_GAIN", 1.0)
    shapes = []
    forward = clocks.Block.forward
    monkeypatch.setattr(
        clocks.Block,
        "forward",
        lambda self, x, rope: shapes.append(x.shape) or forward(self, x, rope),
    )
    clocks._block(tiny_config(), 8)(torch.float32)
    clocks._block(tiny_config(context_length=4), 8)(torch.float32)
    clocks._block(tiny_config(context_length=4), 2)(torch.float32)
    assert [tuple(shape[:2]) for shape in shapes] == [(1, 16), (4, 4), (2, 4)]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_muons_products_are_timed_on_the_matrices_that_it_has(activation):
    config = tiny_config(expert_activation=activation)
    model, shapes = random_model(config), {}
    for name, parameter in model.layers[0].named_parameters():
        if name.endswith(HIDDEN_MATRICES):
            *_, rows, columns = parameter.shape
            parts = 2 if name.endswith("w_in") and activation != "gelu" else 1
            shape = (rows // parts, columns)
            shapes[shape] = shapes.get(shape, 0) + parameter.numel() // (shape[0] * columns)
    assert hidden_shapes(config) == shapes
    seconds = clocks._products(config, 1 << 17)
    assert all(seconds(dtype) > 0 for dtype in clocks.DTYPES)


# ------------------------------------------------------------------------------------ kept in a run
@pytest.fixture
def run(data, tmp_path) -> Run:
    return Run(data, tmp_path)


@pytest.fixture
def says(monkeypatch):
    """Clocks that say bfloat16, each with a line; returns how often each was asked."""
    asked = {"block": 0, "muon": 0}

    def answer(which):
        def clock(*_):
            asked[which] += 1
            return torch.bfloat16, f"dtype    {which} by a clock"

        return clock

    monkeypatch.setattr(plan_module, "compute_dtype", answer("block"))
    monkeypatch.setattr(plan_module, "muon_dtype", answer("muon"))
    return asked


def test_a_run_keeps_what_its_clocks_said(run: Run, says, capsys, monkeypatch):
    """Bit for bit, although a clock may say something else when the run is resumed."""
    flags = [*MODEL, *FLAGS, "--optimizer", "muon"]
    used = []
    step = MuonAdamW._muon_step
    monkeypatch.setattr(
        MuonAdamW, "_muon_step", lambda self, *a: used.append(self.products_dtype) or step(self, *a)
    )
    assert train.main([*flags, *run.folders, "--max_steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "dtype    block by a clock\n" in out and "dtype    muon by a clock\n" in out
    saved = run.final()
    assert saved.train_config["dtype"] == saved.run["muon_dtype"] == "bfloat16"
    assert says == {"block": 1, "muon": 1} and set(used) == {torch.bfloat16}
    monkeypatch.setattr(plan_module, "compute_dtype", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(plan_module, "muon_dtype", lambda *_: pytest.fail("asked again"))
    used.clear()
    assert train.main(["--resume", *run.folders, "--max_steps", "6"]) == 0
    assert set(used) == {torch.bfloat16} and run.final().run["muon_dtype"] == "bfloat16"


def test_a_run_that_began_without_a_clock_resumes_without(run: Run, says):
    """Of an earlier version, or from a CPU that has no products in bfloat16."""
    flags = [*MODEL, *FLAGS, "--optimizer", "muon", "--dtype", "float32", "--deterministic"]
    try:
        assert train.main([*flags, *run.folders, "--max_steps", "4"]) == 0
        assert run.final().run["muon_dtype"] == "" and says == {"block": 0, "muon": 0}
        torch.use_deterministic_algorithms(False)
        assert train.main(["--resume", *run.folders, "--max_steps", "5"]) == 0
        assert says == {"block": 0, "muon": 0}
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_runs_ask_no_clock(says, run: Run):
    try:
        flags = [*MODEL, *FLAGS, *run.folders, "--optimizer", "muon", "--deterministic"]
        plan = make_plan(settings_of(*flags), train.pretraining)
    finally:
        torch.use_deterministic_algorithms(False)
    assert plan.dtype == torch.float32 and plan.config.dtype == "float32"
    assert plan.muon_dtype == initial_state(plan).muon_dtype == ""
    assert says == {"block": 0, "muon": 0}


def test_a_given_dtype_and_adamw_ask_no_clock(says, run: Run):
    flags = [*MODEL, *FLAGS, *run.folders]
    plan = make_plan(settings_of(*flags, "--dtype", "bfloat16"), train.pretraining)
    assert plan.dtype == torch.bfloat16 and says == {"block": 0, "muon": 0}
    plan = make_plan(settings_of(*flags), train.pretraining)
    assert plan.dtype == torch.bfloat16 and says == {"block": 1, "muon": 0}


def test_a_plain_answer_of_no_clock_is_float32(run: Run, bfloat16_cpu, monkeypatch):
    """The real clock, with its work replaced."""
    monkeypatch.setattr(clocks, "_block", lambda *_: lambda dtype: 1.0 / dtype.itemsize)
    monkeypatch.setattr(clocks, "_products", lambda *_: lambda dtype: 1.0 * dtype.itemsize)
    flags = [*MODEL, *FLAGS, *run.folders, "--optimizer", "muon"]
    plan = make_plan(settings_of(*flags), train.pretraining)
    # A block was slower in bfloat16, and Muon's products were faster.
    assert plan.dtype == torch.float32 and plan.muon_dtype == "bfloat16"
    assert [line.split()[1] for line in plan.notes if line.startswith("dtype")] == ["a", "Muon"]


def test_the_optimizer_takes_the_dtype_that_was_chosen(monkeypatch):
    """And the device's without one."""
    seen = []
    real = clocks.orthogonalise
    monkeypatch.setattr(
        "runtime.training.optimizer.orthogonalise",
        lambda updates, dtype, squares: (
            seen.append((updates.dtype, dtype)) or real(updates, dtype, squares)
        ),
    )
    for name, expected in (("", torch.float32), ("bfloat16", torch.bfloat16)):
        model = random_model(tiny_config())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before = model.layers[0].attention.W_q.weight.detach().clone()
        build_optimizer(model, TrainConfig(optimizer="muon"), muon_dtype=name).step()
        assert set(seen) == {(expected, expected)}
        assert not torch.equal(before, model.layers[0].attention.W_q.weight)
        seen.clear()
    # AdamW has no products.
    build_optimizer(random_model(tiny_config()), TrainConfig(), muon_dtype="bfloat16")
