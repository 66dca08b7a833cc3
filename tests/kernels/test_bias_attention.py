"""Attention with the learned bias by Triton: when it is used, and that it computes the same.

The kernels themselves run in a process of their own (bias_attention_interpreted.py).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import model_parts
from model_parts import KVCache
from runtime.checks import kernels as check_kernels
from runtime.checks.kernels import settle_kernels
from runtime.kernels import bias_attention as kernels
from runtime.kernels.bias_attention import bias_attention, plain_attention, why_not
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config
from tests.conftest import REPO
from tests.kernels.test_attention_choice import traced

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which Linux alone has"
)
INTERPRETED = "tests/kernels/bias_attention_interpreted.py"
# Compiles each kernel as a run on a Hopper card would, for heads of 32 numbers in bfloat16.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from runtime.kernels import bias_attention as kernels
from runtime.kernels import bias_attention_triton as triton_kernels

NAMES = {"forward": "forward", "delta": "delta", "q": "backward_q", "kv": "backward_kv",
         "table": "backward_table"}
for kernel, name in NAMES.items():
    function = getattr(triton_kernels, f"attention_bias_{name}")
    tile = kernels.tile_of(kernel, 32, torch.bfloat16)
    sizes = {"J": 4, "D": 32, "W": 32, "M": tile.M, "N": tile.N, "DOT": triton.language.bfloat16}
    signature, constants, hints = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in sizes:
            signature[argument], constants[i,] = "constexpr", sizes[argument]
        elif argument.removesuffix("_ptr") in ("table", "log", "delta", "dtable"):
            signature[argument] = "*fp32"
        elif argument.endswith("_ptr"):
            signature[argument] = "*bf16"
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
        if argument not in (*sizes, "scale", "B"):
            hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, hints)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    products = code.asm["ptx"].count("wgmma.mma_async")
    print(kernel, len(code.asm["cubin"]), code.metadata.shared, products)
"""


# ------------------------------------------------------------------------------------- the kernels
@needs_triton
@pytest.mark.slow
def test_the_kernels_compute_the_plain_attention():
    """Every dtype, length and kind of head, under Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", INTERPRETED, "-q", "--tb=short", "-p", "no:cacheprovider"],
        cwd=REPO,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.nightly
@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_hopper(tmp_path):
    """The interpreter takes what the compiler refuses. Products are those of tensor cores, and
    shared memory is enough for more than one program.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=REPO,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    rows = {name: list(map(int, rest)) for name, *rest in map(str.split, done.stdout.splitlines())}
    assert list(rows) == ["forward", "delta", "q", "kv", "table"]
    for name, (code, shared, products) in rows.items():
        assert code > 0 and shared <= 227 * 1024 // 2
        assert (products > 0) is (name != "delta")


# --------------------------------------------------------------------------------------- the switch
@pytest.mark.parametrize("value, on", [(None, False), ("", False), ("plain", False), ("triton", 1)])
def test_it_is_off_until_it_is_asked_for(monkeypatch, value, on):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(kernels.VARIABLE, value)
    assert kernels.is_asked_for() is bool(on)
    monkeypatch.setattr("runtime.kernels.bias_attention.why_not", lambda *given: "")
    model = random_model(tiny_config(use_attention_bias=True))
    choose_kernels(model, CPU, FP32)
    for block in model.layers:
        assert isinstance(block.attention.kernel, functools.partial) is bool(on)


def test_a_value_that_it_does_not_know_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "Triton")
    with pytest.raises(ValueError, match="GPTOSS_BIAS_KERNEL is 'Triton', and may be plain or"):
        choose_kernels(random_model(tiny_config()), CPU, FP32)


CASES = {
    "": {},
    "no float64": {"dtype": torch.float64},
    "Triton needs a CUDA GPU, and this is cpu": {"device": CPU},
    "Triton is not installed": {"triton": None},
    "older than compute capability 8.0": {"capability": (7, 5)},
    "heads of at most 128 numbers, not 256": {"D": 256},
    "no sinks": {"sinks": torch.zeros(4)},
    "no sliding window": {"window": 8},
    "no dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("why", CASES)
def test_it_steps_aside_for_what_it_does_not_know(monkeypatch, why):
    case = CASES[why]
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: case.get("triton", name))
    capability = case.get("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention = types.SimpleNamespace(
        D=case.get("D", 32),
        sinks=case.get("sinks"),
        window=case.get("window", 0),
        dropout=case.get("dropout", 0.0),
    )
    said = why_not(attention, case.get("device", CUDA), case.get("dtype", BF16))
    assert why in said and bool(why) is bool(said)


def test_on_a_cpu_a_line_says_that_it_is_not_used(monkeypatch):
    """A setting that does nothing must not be silent."""
    model = random_model(tiny_config(use_attention_bias=True))
    choose_kernels(model, CPU, FP32)
    assert settle_kernels(model) == []
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    choose_kernels(model, CPU, FP32)
    (line,) = settle_kernels(model)
    assert line.startswith("plain operations compute attention with the learned bias: Triton needs")
    without = random_model(tiny_config(use_attention_bias=False))
    choose_kernels(without, CPU, FP32)
    assert settle_kernels(without) == []


@pytest.fixture
def chosen(monkeypatch):
    """A model whose kernel is chosen as on a GPU; on a CPU it is PyTorch's function."""
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setattr("runtime.kernels.bias_attention.why_not", lambda *given: "")
    model = random_model(tiny_config(use_attention_bias=True))
    choose_kernels(model, CPU, FP32)
    return model


def test_one_that_computes_the_same_is_kept(chosen):
    (line,) = settle_kernels(chosen)
    assert line.startswith("Triton computes attention with the learned bias")
    for block in chosen.layers:
        assert block.attention.kernel.func is kernels.attend


def test_changed_attention_is_what_is_computed(chosen, monkeypatch):
    def scaled(*given):
        return 2 * model_parts.attention_with_sinks(*given)

    monkeypatch.setattr(check_kernels, "attention_with_sinks", scaled)
    (line,) = settle_kernels(chosen)
    assert line.startswith("plain operations") and "other results than model_parts.py" in line
    assert not any(block.attention.kernel for block in chosen.layers)


def test_wrong_gradients_of_the_table_are_seen(chosen):
    """Results alone do not show them."""
    for block in chosen.layers:
        own = block.attention.kernel

        def halved(owner, *given, dtype, own=own):
            probe, table = copy.copy(owner), owner.attention_bias
            probe._parameters = {"attention_bias": table / 2 + table.detach() / 2}
            return own(probe, *given)

        block.attention.kernel = functools.partial(halved, dtype=FP32)
    (line,) = settle_kernels(chosen)
    assert "other results" in line


def test_under_a_document_mask_a_line_says_so(chosen):
    (line,) = settle_kernels(chosen, documents=True)
    assert "documents that share a sequence" in line
    assert not any(block.attention.kernel for block in chosen.layers)


# ----------------------------------------------------------------------------------------- the call
def test_the_model_calls_it_where_it_can(chosen, monkeypatch):
    """Not with a cache, documents or dropout, which the kernels do not know."""
    attention, seen = chosen.layers[0].attention, []

    def noted(*given):
        seen.append(given)
        return plain_attention(*given[:4])

    monkeypatch.setattr(kernels, "bias_attention", noted)
    kernel = attention.kernel
    x_BTC = torch.randn(2, 9, chosen.config.d_model)
    expected = attention(x_BTC, None)
    assert len(seen) == 1 and seen[0][3] is attention.attention_bias
    attention.kernel = None
    torch.testing.assert_close(attention(x_BTC, None), expected)
    attention.kernel = kernel
    attention(x_BTC, None, KVCache(chosen.config, 2, 16))
    attention(x_BTC, None, None, torch.zeros(2, 9, dtype=torch.int64))
    attention.dropout = 0.1
    attention(x_BTC, None)
    assert len(seen) == 1


@pytest.mark.parametrize("given, chosen_dtype", [(torch.float64, FP32), (FP32, BF16), (FP32, FP32)])
def test_other_dtypes_and_cpus_are_pytorchs(given, chosen_dtype):
    """A model may be cast or copied after its kernels were chosen."""
    q, k, v = (torch.randn(1, heads, 5, 8, dtype=given) for heads in (4, 2, 2))
    table = torch.randn(4, 7, 7)
    y = bias_attention(q, k, v, table, dtype=chosen_dtype)
    assert torch.equal(y, plain_attention(q, k, v, table)) and y.dtype == given


@pytest.mark.parametrize(
    "change",
    [
        dict(k=(1, 3, 5, 16)),
        dict(v=(1, 2, 6, 16)),
        dict(table=(4, 4, 4)),
        dict(table=(4, 7, 6)),
        dict(q=(1, 4, 5, 129), k=(1, 2, 5, 129), v=(1, 2, 5, 129)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change):
    """A kernel would read outside its tensors."""
    shapes = dict(q=(1, 4, 5, 16), k=(1, 2, 5, 16), v=(1, 2, 5, 16), table=(4, 7, 7)) | change
    with pytest.raises(ValueError, match="must be"):
        torch.ops.gptoss.bias_attention(*(torch.zeros(shape) for shape in shapes.values()))


def test_dtypes_that_differ_are_refused():
    q, k, table = torch.zeros(1, 4, 5, 16), torch.zeros(1, 2, 5, 16), torch.zeros(4, 7, 7)
    with pytest.raises(ValueError, match="one dtype"):
        torch.ops.gptoss.bias_attention(q.bfloat16(), k, k, table)
    with pytest.raises(ValueError, match="one dtype"):
        torch.ops.gptoss.bias_attention(q.double(), k.double(), k.double(), table)


def test_results_lie_as_the_model_reads_them():
    """Tokens before heads, in the fake results too: a compiler plans the copies by them."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 5, n, 16, dtype=BF16).transpose(1, 2) for n in (4, 2, 2))
        leaves = [x.requires_grad_() for x in (q, k, v, torch.empty(4, 7, 7))]
        y, log = torch.ops.gptoss.bias_attention(*leaves)
        assert y.transpose(1, 2).is_contiguous() and y.dtype == BF16
        assert log.shape == (2, 4, 5) and log.dtype == FP32
        gradients = torch.autograd.grad(y, leaves, torch.empty_like(y))
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
            assert gradient.dim() == 3 or gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("width, W", [(1, 16), (8, 16), (16, 16), (24, 32), (64, 64), (96, 128)])
def test_heads_are_padded_to_a_power_of_2(width, W):
    q, table = torch.zeros(1, 2, 3, width), torch.zeros(2, 4, 4)
    assert kernels._Call.of(q, q, table).width == W


@pytest.mark.slow
def test_a_compiled_block_holds_one_operation(monkeypatch):
    """One graph: the kernel and its backward pass, and no mask."""
    torch.compiler.reset()
    model = random_model(
        tiny_config(use_attention_bias=True, context_length=64, transformer_blocks=1)
    )
    for block in model.layers:
        block.attention.kernel = lambda owner, q, k, v, *rest: torch.ops.gptoss.bias_attention(
            q, k, v, owner.attention_bias
        )[0]
    ids_BT = torch.randint(0, 61, (2, 64))
    training, generating = traced(model, ids_BT, r"scaled_dot|bias_attention")
    assert training == {"bias_attention", "bias_attention_backward"}
    assert generating == {"bias_attention"}


def test_the_variable_is_documented():
    text = (REPO / "docs/performance.md").read_text(encoding="utf-8")
    assert re.search(rf"{kernels.VARIABLE}=triton", text)
