"""runtime/inference/quantize.py: the error of 8 bits, and a packed model is still a model."""

from __future__ import annotations

import copy

import pytest
import torch

from model import LLM, generate
from runtime.inference.quantize import pack, quantize_, quantized_weights, unpack
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
    assert ((unpack(packed, scale, torch.float32) - weight).abs() <= 0.5001 * scale).all()
    # Each row uses all of its range.
    assert (packed.abs().amax(dim=-1) == 127).all()
    assert unpack(packed, scale, torch.bfloat16).dtype == torch.bfloat16


def test_a_row_of_zeros_stays_zeros():
    packed, scale = pack(torch.zeros(2, 3))
    assert torch.equal(unpack(packed, scale, torch.float32), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_embeddings=True),
        dict(expert_activation="gelu", expert_bias=True, head_bias=True, use_attention_bias=True),
    ],
)
def test_a_packed_model_computes_with_the_rounded_weights(changes):
    """A packed model computes exactly what a plain model with those weights does.

    Embedding, norms and router are not touched, and a tied embedding stays exact.
    """
    model = random_model(tiny_config(**changes))
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        if rounded.out_head.weight is None:
            rounded.out_head.weight = torch.nn.Parameter(rounded.embed.weight.clone())
        for module, name in quantized_weights(rounded):
            getattr(module, name).copy_(unpack(*pack(getattr(module, name)), torch.float32))
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert quantize_(model) is model
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


def test_it_takes_a_quarter_of_the_memory():
    model = LLM(tiny_config(d_model=64, d_ff=128, num_experts=8))
    weights = [getattr(module, name) for module, name in quantized_weights(model)]
    bytes_before, rows = sum(w.nbytes for w in weights), sum(w[..., 0].numel() for w in weights)
    quantize_(model)
    packed = {
        name: t for name, t in model.state_dict().items() if name.endswith(("_packed", "_scale"))
    }
    assert sum(t.nbytes for t in packed.values()) == bytes_before // 4 + 4 * rows
