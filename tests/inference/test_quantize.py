"""runtime/inference/quantize.py: the error of 8 and 4 bits, and a packed model is still a model."""

from __future__ import annotations

import copy

import pytest
import torch

from model import LLM, generate
from runtime.inference.quantize import (
    GROUP,
    KINDS,
    copy_weights_,
    is_packed,
    kind_in,
    pack,
    packed_kind,
    quantize_,
    quantized_weights,
    unpack,
)
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config
from tests.numeric import assert_close, is_close, logits_bound


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 6), (1, 1)])
def test_a_packed_weight_is_within_half_a_step(shape):
    weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-6, 6, shape[-2])[:, None]
    )
    packed, scale = pack(weight)
    assert (
        packed.dtype == torch.int8
        and packed.shape == weight.shape
        and scale.shape == (*shape[:-1], 1)
    )
    unpacked = unpack(packed, scale, torch.float32, shape[-1])
    assert ((unpacked - weight).abs() <= 0.5001 * scale).all()
    # Each row uses all of its range.
    assert (packed.abs().amax(dim=-1) == 127).all()
    assert unpack(packed, scale, torch.bfloat16, shape[-1]).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 64), (2, 32), (5, 97), (1, 1)])
def test_a_weight_of_four_bits_is_near(shape):
    """Within half a step of its group, or a whole one where the largest weight is cut; and no worse
    than with the largest weight exact, as a sum of squares.
    """
    weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-6, 6, shape[-2])[:, None]
    )
    packed, scale = pack(weight, "int4")
    groups = -(-shape[-1] // GROUP)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], groups * GROUP // 2)
    assert scale.dtype == torch.bfloat16 and scale.shape == (*shape[:-1], groups)
    unpacked = unpack(packed, scale, torch.float32, shape[-1])
    assert unpacked.shape == weight.shape
    steps = scale.float().abs().repeat_interleave(GROUP, dim=-1)[..., : shape[-1]]
    assert ((unpacked - weight).abs() <= 1.1 * steps).all()
    assert ((unpacked - weight).abs() <= 0.5001 * steps).float().mean() > 0.8 or weight.numel() < 9

    def squares(values):
        padded = torch.nn.functional.pad(values - weight, (0, groups * GROUP - shape[-1]))
        return padded.unflatten(-1, (groups, GROUP)).square().sum(dim=-1)

    w = torch.nn.functional.pad(weight, (0, groups * GROUP - shape[-1])).unflatten(-1, (-1, GROUP))
    largest = w.gather(-1, w.abs().argmax(dim=-1, keepdim=True))
    exact = (largest / -8).bfloat16().float()
    plain = (w / exact).round().clamp(-8, 7) * exact
    assert (squares(unpacked) <= squares(plain.flatten(-2)[..., : shape[-1]])).all()
    assert unpack(packed, scale, torch.bfloat16, shape[-1]).dtype == torch.bfloat16


def test_numbers_of_four_bits_come_back_as_they_were():
    """Every value in every place of a group, beyond a whole group too, and in large tensors."""
    values = torch.arange(-8, 8).repeat(5)[:70]
    weight = torch.stack([values.roll(i) for i in range(70)]).float() * 0.375
    # Each group has a number that is 8 steps from 0, so the scale that fits all of it is tried.
    weight[:, 66] = -8 * 0.375
    packed, scale = pack(weight, "int4")
    assert torch.equal(unpack(packed, scale, torch.float32, 70), weight)


def test_large_tensors_are_packed_in_parts(monkeypatch):
    weight = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(3))
    whole = pack(weight, "int4")
    monkeypatch.setattr("runtime.inference.quantize.CHUNK", 7 * 40)
    for a, b in zip(whole, pack(weight, "int4"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zeros(kind):
    packed, scale = pack(torch.zeros(2, 3), kind)
    assert torch.equal(unpack(packed, scale, torch.float32, 3), torch.zeros(2, 3))


def test_another_number_of_bits_is_refused():
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match="packed to int8 or int4, not to 'int2'"):
        quantize_(model, "int2")
    assert not is_packed(model) and packed_kind(model) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_another_kind_is_no_copy(kind):
    source, other = (quantize_(random_model(tiny_config()), one) for one in KINDS)
    with pytest.raises(ValueError, match="the models differ in"):
        copy_weights_(source if kind == "int8" else other, other if kind == "int8" else source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_embeddings=True),
        dict(expert_activation="gelu", expert_bias=True, head_bias=True, use_attention_bias=True),
    ],
)
def test_a_packed_model_computes_with_the_rounded_weights(changes, kind):
    """A packed model computes exactly what a plain model with those weights does.

    Embedding, norms and router are not touched, and a tied embedding stays exact.
    """
    model = random_model(tiny_config(**changes))
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        if rounded.out_head.weight is None:
            rounded.out_head.weight = torch.nn.Parameter(rounded.embed.weight.clone())
        for module, name in quantized_weights(rounded):
            weight = getattr(module, name)
            packed = pack(weight, kind_in(module, kind))
            weight.copy_(unpack(*packed, torch.float32, weight.shape[-1]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert quantize_(model, kind) is model and packed_kind(model) == kind
    left = dict(model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in left.items())
    assert {name.split(".")[-2] for name in left if name.endswith("weight")} == {
        "embed",
        "norm1",
        "norm2",
        "q_norm",
        "k_norm",
        "router",
        "norm",
    } & {n.split(".")[-2] for n in before}
    choose_kernels(model, torch.device("cpu"), torch.float32)
    ids = torch.randint(
        0, model.config.vocabulary_size, (2, 20), generator=torch.Generator().manual_seed(2)
    )
    bound = logits_bound(model.config, 20)
    assert_close(model(ids).logits, rounded(ids).logits, bound)
    unrounded = random_model(tiny_config(**changes))
    assert not is_close(model(ids).logits, unrounded(ids).logits, 10 * bound)
    assert len(list(generate(model, ids[:, :4], 6))) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_a_quarter_of_the_memory_or_a_seventh(kind):
    model = LLM(tiny_config(d_model=64, d_ff=128, num_experts=8))
    expected = 0
    for module, name in quantized_weights(model):
        weight = getattr(module, name)
        # A float32 for each row of 8 bits, a bfloat16 for 32 weights of 4.
        in_bytes = weight.numel() + 4 * weight[..., 0].numel()
        in_nibbles = weight.numel() * 4.5 / 8
        is_attention = isinstance(module, torch.nn.Linear)
        expected += in_bytes if kind == "int8" or is_attention else in_nibbles
    quantize_(model, kind)
    packed = {
        name: t for name, t in model.state_dict().items() if name.endswith(("_packed", "_scale"))
    }
    assert sum(t.nbytes for t in packed.values()) == expected
