"""The C decoder's products in integers: packed weights times inputs that it rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runtime.inference.cpu_decode as cpu_decode
from config_model import ModelConfig
from model_parts import KVCache
from runtime.inference.cpu_decode import NativeModel, native_model
from runtime.inference.quantize import KINDS, quantize_
from runtime.kernels.compile import cpu_flags
from tests.builders import random_model, tiny_config
from tests.numeric import logits_bound, size_of
from tests.rounded_inputs import rounding_inputs
from tests.shared_checks import needs_code

# Whole pieces and groups, rows that end within a piece, a group, a vector, and one number.
SHAPES = [(64, 128), (128, 32), (40, 70), (33, 200), (300, 17), (16, 1)]
# The head then has more rows than stay in a cache while inputs pass (BLOCK_BYTES).
VOCABULARY = 2100


def model_of(shape: tuple[int, int], kind: str):
    """Return a packed model of one block whose attention adds nothing."""
    d_model, d_ff = shape
    config = tiny_config(
        d_model=d_model,
        d_ff=d_ff,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        transformer_blocks=1,
        vocabulary_size=VOCABULARY,
    )
    model = random_model(config, sum(shape))
    torch.nn.init.zeros_(model.layers[0].attention.out_proj.weight)
    if model.layers[0].attention.out_proj.bias is not None:
        torch.nn.init.zeros_(model.layers[0].attention.out_proj.bias)
    return quantize_(model, kind)


def differences(config: ModelConfig, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return of each token the largest difference of logits over what float32 explains."""
    return (a - b).abs().amax(dim=1) / size_of(b) / logits_bound(config, config.context_length)


@needs_code
@pytest.mark.parametrize("rows", [1, 3, 20], ids="{} rows".format)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_products_are_those_of_rounded_inputs(shape, kind, rows):
    """Most tokens' logits are those of rounded inputs, well within float32's own rounding.

    Of the others an input lies so near the middle of two steps that it may be rounded to either.
    """
    model = model_of(shape, kind)
    native, why = native_model(model)
    assert native, why
    config = model.config
    ids = torch.randint(config.vocabulary_size, (1, 20), generator=torch.Generator().manual_seed(0))
    with rounding_inputs(model):
        expected = model(ids).logits[0]
    cache = KVCache(config, 1, 20).rows()
    parts = [ids[0, at : at + rows].tolist() for at in range(0, 20, rows)]
    logits = torch.cat([native.forward(cache, [part], all_logits=True) for part in parts])
    plain = model(ids).logits[0]
    assert differences(config, logits, expected).quantile(0.4) < 0.1
    # The check sees the rounding.
    assert differences(config, logits, plain).median() > 1


@needs_code
@torch.no_grad()
def test_two_planes_are_16_bits():
    """Comparisons with the plain model need more than 8 bits; nothing else pays for them."""
    model = model_of((64, 128), "int4")
    native, _ = native_model(model)
    ids = list(range(20))
    plain = model(torch.tensor([ids])).logits[0]
    off = {}
    for planes in (1, 2):
        assert planes == 2 or native.planes == 1
        native.planes = planes
        logits = native.forward(KVCache(model.config, 1, 20).rows(), [ids], all_logits=True)
        off[planes] = size_of(logits - plain) / size_of(plain)
    assert 1e-3 < off[1] < 3e-2 and off[2] < off[1] / 100


@needs_code
@torch.no_grad()
def test_both_builds_have_the_same_sums(monkeypatch, tmp_path, request):
    """That for AVX-512 VNNI and that for AVX2: integers have no rounding.

    A processor without VNNI gets its two instructions written out.
    """
    if "avx2" not in cpu_flags():
        pytest.skip("these flags are for processors with AVX2")
    request.addfinalizer(cpu_decode.library.cache_clear)
    # The header's place is in the flags, so each run makes builds of its own.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    header = tmp_path / "vnni.h"
    header.write_text(Path(__file__).with_name("vnni.h").read_text())
    # Elsewhere they differ: floats are added in the order of a vector's lanes.
    builds = ["-mno-avx512f -O1", f"-mno-avx512f -O1 -include {header}"]
    for kind in KINDS:
        model = model_of((40, 70), kind)
        ids = torch.randint(model.config.vocabulary_size, (24,)).tolist()
        logits = []
        for flags in builds:
            monkeypatch.setenv("GPTOSS_CFLAGS", flags)
            cpu_decode.library.cache_clear()
            code, why = cpu_decode.library()
            assert code is not None, why
            native = NativeModel(model, code)
            caches = KVCache(model.config, 1, 24).rows()
            logits.append(native.forward(caches, [ids], all_logits=True))
        assert torch.equal(*logits)
