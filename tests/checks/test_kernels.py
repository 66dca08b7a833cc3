"""What stands in for parts of a block on a CPU is compared with model_parts before it is used."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import model_parts
from runtime.checks import kernels as check_kernels
from runtime.checks.kernels import settle_kernels
from runtime.inference.decoder import Decoder
from runtime.inference.quantize import quantize_
from runtime.kernels.choose import choose_kernels, why_not_c
from runtime.posttraining.lora import attach, merged_model
from runtime.posttraining.rollouts import Sampler
from tests.builders import random_config, random_model, tiny_config
from tests.builders_lora import NOWHERE
from tests.numeric import assert_close, logits_bound

CPU = torch.device("cpu")
WHY_NOT = why_not_c(CPU, torch.float32)


def ready(**changes):
    """A small model with a CPU's kernels."""
    model = random_model(tiny_config(**changes)).eval()
    choose_kernels(model, CPU, torch.float32)
    return model


def squared_relu(h, activation):
    return F.relu(h).square()


@pytest.fixture
def other_activation(monkeypatch):
    """model_parts.activate as a contributor changed it."""
    for module in (model_parts, check_kernels):
        monkeypatch.setattr(module, "activate", squared_relu)


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "swiglu_clamped"])
@pytest.mark.parametrize("packed", ["", "int8", "int4"])
def test_the_model_as_it_is_keeps_its_kernels(activation, packed):
    model = ready(expert_activation=activation, expert_bias=True, attention_sinks=True)
    if packed:
        quantize_(model, packed)
    assert settle_kernels(model) == []
    assert all(block.moe.experts.feed_forward for block in model.layers)
    assert all(block.attention.sink_kernel for block in model.layers)


@pytest.mark.parametrize("seed", range(20))
def test_any_architecture_keeps_its_kernels(seed):
    model = random_model(random_config(seed), seed)
    choose_kernels(model, CPU, torch.float32)
    assert settle_kernels(model) == []


@pytest.mark.parametrize("seed", range(6))
def test_kernels_are_asked_whatever_the_weights_are(seed):
    """A large run that resumes has weights of memory as it was until it reads its own.

    Where that held no numbers, the norms' kernel was taken for a wrong one: other bits, now and
    then, than those of the run that was not stopped.
    """
    model = random_model(random_config(seed), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    choose_kernels(model, CPU, torch.float32)
    assert settle_kernels(model) == []


def test_a_changed_activation_is_what_trains(other_activation):
    """A contributor put another activation into model_parts.activate.

    Training on a CPU silently kept the old one, which runtime/kernels/cpu_experts.py has too.
    """
    model = ready(expert_activation="gelu")
    ids_BT = torch.arange(12)[None] % 61
    plain = copy.deepcopy(model)
    for block in plain.layers:
        block.moe.experts.feed_forward = None
        block.moe.dispatcher.kernel = None
    (line,) = settle_kernels(model)
    assert "another activation than model_parts.activate" in line
    losses = [m(ids_BT, ids_BT.roll(-1, 1)).cross_entropy_sum for m in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_decoder_says_so_and_reads_prompts_with_it(other_activation):
    """The C decoder stepped aside, and PyTorch then read with the old activation."""
    model = ready(expert_activation="gelu")
    decoder = Decoder(model)
    assert decoder.native is None and "another activation" in decoder.note
    (text,) = decoder.texts(1, 32)
    logits_V = decoder.read(text, [1, 2, 3])[0]
    plain = copy.deepcopy(model)
    for block in plain.layers:
        block.moe.experts.feed_forward = None
        block.moe.dispatcher.kernel = None
    expected_V = plain(torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert_close(logits_V, expected_V, logits_bound(model.config, 3))


def test_a_parameter_that_the_kernel_is_not_given_is_named():
    model = ready()
    model.layers[1].moe.experts.scale = torch.nn.Parameter(torch.ones(4))
    (line,) = settle_kernels(model)
    assert "does not know scale" in line
    assert [block.moe.experts.feed_forward is None for block in model.layers] == [False, True]


def test_changed_attention_with_sinks_is_what_is_computed(monkeypatch):
    def scaled(*given):
        return 2 * model_parts.attention_with_sinks(*given)

    monkeypatch.setattr(check_kernels, "attention_with_sinks", scaled)
    model = ready(attention_sinks=True, sliding_window=4)
    (line,) = settle_kernels(model)
    assert "attention_with_sinks" in line
    assert all(block.attention.sink_kernel is None for block in model.layers)
    assert settle_kernels(ready()) == []


@pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)
def test_what_was_taken_away_is_not_chosen_again(monkeypatch):
    """GRPO chooses kernels anew before it samples, as a score samples with the same model in
    another dtype. A router with sigmoids was trained, and answers were drawn by one with a softmax.
    """
    monkeypatch.setattr(model_parts.MoE, "routed", router_with_sigmoids(model_parts.MoE.routed))
    model = ready()
    (line,) = settle_kernels(model)
    assert "runtime/kernels/router.py has other results" in line
    for dtype in (torch.bfloat16, torch.float32):
        sampler = Sampler(model, stop_ids=[9], max_new_tokens=3, dtype=dtype)
        sampler.sample([[1, 2, 3]], 2, seed=7)
        assert all(block.moe.route_kernel is None for block in model.layers)
    assert all(block.attention.turn_kernel for block in model.layers)
    assert settle_kernels(model) == []
    # A decoder takes the kernels away even if nobody settled before.
    other = ready()
    Sampler(other, stop_ids=[9], max_new_tokens=3).sample([[1, 2, 3]], 2, seed=7)
    assert all(block.moe.route_kernel is None for block in other.layers)


@pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)
def test_merged_adapters_have_no_kernel_that_computes_something_else(monkeypatch):
    """A model of its own, whose kernels nobody had compared with model_parts.py."""
    monkeypatch.setattr(model_parts.MoE, "routed", router_with_sigmoids(model_parts.MoE.routed))
    model = random_model(tiny_config())
    attach(model, NOWHERE)
    plain = merged_model(model)
    assert all(block.moe.route_kernel is None for block in plain.layers)
    assert all(block.attention.turn_kernel for block in plain.layers)


def router_with_sigmoids(routed):
    """MoE.routed as a contributor changed it: other weights of the same experts."""

    def changed(self, x_NC):
        weights_NK, *others = routed(self, x_NC)
        return weights_NK.sigmoid(), *others

    return changed
