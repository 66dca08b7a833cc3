"""AdamW: the decay rule, fused and foreach, early allocation, state by name."""
from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from config_model import PRESETS, ModelConfig, TrainConfig
from model import LLM
from runtime.optimizer import build_adamw, decays, initialise_state, load_state_by_name, parameter_groups, state_by_name

# What each kind of parameter does, written out by hand and not by the rule under test.
DECAYS = (r"embed\.weight", r"out_head\.weight", r"layers\.\d+\.attention\.(W_q|W_k|W_v|out_proj)\.weight", r"layers\.\d+\.attention\.attention_bias",
          r"layers\.\d+\.moe\.router\.weight", r"layers\.\d+\.moe\.experts\.(w_in|w_out)")
NO_DECAY = (r"norm\.weight", r"layers\.\d+\.norm[12]\.weight", r"layers\.\d+\.attention\.[qk]_norm\.weight", r"out_head\.bias",
            r"layers\.\d+\.attention\.(W_q|W_k|W_v|out_proj)\.bias", r"layers\.\d+\.moe\.experts\.(b_in|b_out)")


class Small(nn.Module):
    """Twenty lines of a model: a matrix, a norm, stacked experts with stacked biases."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(6)
        self.w_in, self.b_in = nn.Parameter(torch.empty(3, 4, 5)), nn.Parameter(torch.empty(3, 4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return (torch.einsum("nc,efc->nef", self.matrix(self.norm(x)), self.w_in) + self.b_in).square().mean()


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(7, 6, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def adamw(model, implementation, **values):
    config = TrainConfig(**{"lr": 1e-2, "min_lr": 0.0} | values)
    optimizer = build_adamw(model, config)
    if implementation == "foreach":
        optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr, foreach=True)
    return optimizer


@pytest.mark.parametrize("config", [ModelConfig(**preset.model) for preset in PRESETS.values()] + [ModelConfig(qkv_bias=True, router_bias_rate=1e-3)])
def test_every_parameter_of_every_preset_is_in_the_group_written_down_for_it(config):
    with torch.device("meta"):
        model = LLM(config)
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))
    decaying = {id(parameter) for parameter in groups[0]["params"]}
    for name, parameter in model.named_parameters():
        wanted, unwanted = (any(re.fullmatch(pattern, name) for pattern in patterns) for patterns in (DECAYS, NO_DECAY))
        assert wanted != unwanted, f"{name}: written down in neither list, or in both"
        assert (id(parameter) in decaying) == wanted, name


def test_one_dimension_never_decays_and_stacked_biases_neither():
    assert decays("layers.0.attention.attention_bias", torch.empty(2, 3, 3))  # ends in "bias", is a table
    assert not decays("layers.0.moe.experts.b_in", torch.empty(2, 3))          # has two dimensions, is a bias
    assert not decays("norm.weight", torch.empty(3))


def test_frozen_parameters_are_left_out():
    model = Small()
    model.norm.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == len(list(model.parameters())) - 2


def test_config_reaches_adamw_and_cpu_is_fused():
    optimizer = build_adamw(Small(), TrainConfig(lr=2e-3, beta1=0.8, beta2=0.9, adam_eps=1e-7, weight_decay=0.3))
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"], group["fused"]) == (2e-3, (0.8, 0.9), 1e-7, decay, True)


def test_a_device_without_a_fused_kernel_gets_foreach():
    optimizer = build_adamw(Small().to("meta"), TrainConfig())
    assert all(group["foreach"] and not group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_early_state_is_what_the_first_step_makes_and_training_is_bitwise_the_same(implementation):
    lazy, early = Small(), Small()
    lazy_adamw, early_adamw = adamw(lazy, implementation), adamw(early, implementation)
    initialise_state(early_adamw)
    assert all(int(early_adamw.state[p]["step"]) == 0 and not early_adamw.state[p]["exp_avg"].any() for p in early.parameters())
    addresses = [early_adamw.state[p]["exp_avg"].data_ptr() for p in early.parameters()]
    train(lazy, lazy_adamw, 1), train(early, early_adamw, 1)
    for a, b in zip(lazy.parameters(), early.parameters(), strict=True):
        assert list(lazy_adamw.state[a]) == list(early_adamw.state[b])
        for one, other in zip(lazy_adamw.state[a].values(), early_adamw.state[b].values(), strict=True):
            assert (one.dtype, one.device, one.stride()) == (other.dtype, other.device, other.stride()) and torch.equal(one, other)
    assert addresses == [early_adamw.state[p]["exp_avg"].data_ptr() for p in early.parameters()]  # nothing was allocated anew
    train(lazy, lazy_adamw, 5, seed=2), train(early, early_adamw, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(lazy.parameters(), early.parameters(), strict=True))


def test_initialising_again_keeps_what_is_there():
    model = Small()
    optimizer = adamw(model, "fused")
    train(model, optimizer, 2)
    before = copy.deepcopy(state_by_name(model, optimizer))
    initialise_state(optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_by_name(model, optimizer).items())


@pytest.mark.parametrize("writer, reader", [("fused", "fused"), ("foreach", "fused"), ("fused", "foreach")])
def test_state_goes_from_one_optimizer_to_another_by_name(writer, reader):
    straight, resumed = Small(), Small()
    straight_adamw = adamw(straight, writer)
    train(straight, straight_adamw, 3)
    resumed.load_state_dict(straight.state_dict())
    resumed_adamw = adamw(resumed, reader)
    saved = {name: tensor.clone() for name, tensor in state_by_name(straight, straight_adamw).items()}
    assert {"step.norm.weight", "exp_avg.b_in", "exp_avg_sq.matrix.weight"} <= saved.keys() and len(saved) == 3 * len(list(straight.parameters()))
    load_state_by_name(resumed, resumed_adamw, saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state_by_name(resumed, resumed_adamw).items())
    if writer == reader:
        train(straight, straight_adamw, 3, seed=9), train(resumed, resumed_adamw, 3, seed=9)
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("damage, message", [
    (lambda s: s.pop("exp_avg.b_in"), "lacks exp_avg.b_in"),
    (lambda s: s.update({"exp_avg.other": torch.zeros(1)}), "unknown exp_avg.other"),
    (lambda s: s.update({"exp_avg.b_in": torch.zeros(4, 3)}), r"exp_avg.b_in is float32\[4, 3\], not float32\[3, 4\]"),
    (lambda s: s.update({"exp_avg.b_in": torch.zeros(3, 4, dtype=torch.float64)}), r"exp_avg.b_in is float64"),
])
def test_state_that_does_not_fit_is_named_and_changes_nothing(damage, message):
    model = Small()
    optimizer = adamw(model, "fused")
    saved = {name: torch.ones_like(tensor) for name, tensor in state_by_name(model, optimizer).items()}
    damage(saved)
    with pytest.raises(ValueError, match=message):
        load_state_by_name(model, optimizer, saved)
    assert not any(tensor.any() for tensor in state_by_name(model, optimizer).values())


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="build it from this model"):
        state_by_name(Small(), adamw(Small(), "fused"))
