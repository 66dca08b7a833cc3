"""The numbers: closed forms against the module itself, validation, presets."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from config_model import (
    PRESETS,
    ModelConfig,
    TrainConfig,
    active_parameters,
    flops_per_token,
    kv_cache_bytes_per_token,
    loss_chunk_rows,
    parameter_counts,
    total_parameters,
)
from model import LLM
from model_parts import KVCache
from runtime.kernels import choose
from runtime.kernels.choose import choose_kernels
from runtime.training.memory import training_memory_bytes
from tests.builders import random_config, tiny_config


def module_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LLM(config).parameters())


def test_default_is_the_published_model():
    config = ModelConfig()
    assert total_parameters(config) == module_parameters(config) == 3_664_132_435
    assert parameter_counts(config)["attention bias table"] == 1_610_612_736
    assert active_parameters(config) == 542_464_339
    assert flops_per_token(config) == pytest.approx(725e6, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_count(name):
    preset = PRESETS[name]
    config = ModelConfig(**preset.model)
    TrainConfig(**preset.train)
    assert total_parameters(config) == module_parameters(config)


def test_modern_keeps_the_default_sizes_and_exports_as_qwen3_moe():
    default, modern = ModelConfig(), ModelConfig(**PRESETS["gptoss-modern"].model)
    for name in ("d_model", "transformer_blocks", "num_experts", "top_k", "d_ff"):
        assert getattr(modern, name) == getattr(default, name)
    assert (
        modern.attention_head_dim in (64, 128)
        and modern.qk_norm
        and modern.expert_activation == "swiglu"
    )
    assert not (
        modern.use_attention_bias
        or modern.expert_bias
        or modern.out_proj_bias
        or modern.head_bias
        or modern.qkv_bias
    )
    assert not (modern.router_bias_rate or modern.sliding_window)


def test_gpt_oss_20b_has_the_published_numbers():
    """20.91 B parameters, 3.61 B of them active per token, the embedding not counted.

    (Model card, arXiv 2508.10925, table 1.)
    """
    config = ModelConfig(**PRESETS["gpt-oss-20b"].model)
    assert round(total_parameters(config) / 1e9, 2) == 20.91
    assert (
        round((active_parameters(config) - parameter_counts(config)["embedding"]) / 1e9, 2) == 3.61
    )


@pytest.mark.parametrize(
    "name, card_gib",
    [
        ("modern-8gb", 8),
        ("modern-24gb", 24),
        ("gptoss", 141e9 / 2**30),
        ("gptoss-modern", 141e9 / 2**30),
    ],
)
def test_presets_fit_their_card(name, card_gib):
    preset = PRESETS[name]
    needed = sum(
        training_memory_bytes(
            ModelConfig(**preset.model), TrainConfig(**preset.train), 2, on_gpu=True
        ).values()
    )
    assert needed < 0.95 * card_gib * 2**30


@pytest.mark.parametrize("seed", range(60))
def test_closed_form_equals_the_module(seed):
    config = random_config(seed)
    assert total_parameters(config) == module_parameters(config)


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"d_model": "16"}, "d_model"),
        ({"d_model": 0}, "d_model"),
        ({"d_model": True}, "d_model"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 33}, "num_experts"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_kv_heads": 5}, "num_kv_heads"),
        ({"head_dim": 33}, "head_dim"),
        ({"expert_activation": "relu"}, "swiglu"),
        ({"rope_scaling_factor": 2.0}, "rope_scaling"),
        ({"rope_scaling": "yarn", "use_rope": False}, "use_rope"),
        ({"window_pattern": "alternating"}, "sliding_window"),
        ({"vocabulary_size": 10**12}, "vocabulary_size"),
        ({"aux_loss_coef": -0.1}, "aux_loss_coef"),
    ],
)
def test_bad_model_numbers_are_refused(changes, names):
    """The original implementation accepted top_k 0 and capacity_factor -1 silently (fault M8)."""
    with pytest.raises(ValueError, match=names) as error:
        ModelConfig(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_accum": 0},
        {"grad_clip": -1.0},
        {"val_steps": 0},
        {"max_steps": -5},
        {"log_interval": 0},
        {"lr": float("inf")},
        {"min_lr": 1.0},
        {"schedule": "linear"},
        {"dtype": "int8"},
        {"warmup_steps": 50_000},
        {"resume": True, "init_from": "x.pt"},
        {"save_interval": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"beta2": 1.0},
        {"muon_momentum": 0.9},
    ],
)
def test_bad_training_numbers_are_refused(changes):
    """T19: grad_accum 0 trained nothing and grad_clip -1 was gradient ascent.

    Both in the original implementation.
    """
    with pytest.raises(ValueError):
        TrainConfig(**changes)


def test_configs_are_frozen_and_every_field_explains_itself():
    for config in (ModelConfig(), TrainConfig()):
        for f in dataclasses.fields(config):
            assert len(f.metadata["help"]) > 8, f.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.lr = 1.0


def test_flops_match_a_count_of_the_real_matrix_products():
    """All but attention scores are compared with PyTorch's FLOP counter.

    The attention kernel counts the full square.
    """
    config = tiny_config(transformer_blocks=3, context_length=32)
    ids = torch.randint(0, config.vocabulary_size, (2, 32))
    model = LLM(config)
    # An operation of our own.
    experts = {
        torch.ops.gptoss.grouped_linear: lambda x, w, b, counts, out_shape=None, **_: (
            2 * x[0] * w[1] * w[2]
        )
    }
    with FlopCounterMode(display=False, custom_mapping=experts) as counter, torch.no_grad():
        model(ids)
    q = config.num_heads * config.attention_head_dim
    square = 4 * q * 32 * config.transformer_blocks
    causal = 4 * q * 33 / 2 * config.transformer_blocks
    counted = counter.get_total_flops() / ids.numel()
    counted = (
        counted - square + causal
        if any("attention" in str(op) for op in counter.get_flop_counts()["Global"])
        else counted + causal
    )
    assert flops_per_token(config, 32) == pytest.approx(counted, rel=1e-6)


def test_window_lowers_attention_flops():
    full, windowed = (
        tiny_config(context_length=64),
        tiny_config(context_length=64, sliding_window=8),
    )
    difference = flops_per_token(full) - flops_per_token(windowed)
    mean_full, mean_windowed = 65 / 2, (sum(range(1, 9)) + 56 * 8) / 64
    assert difference == pytest.approx(4 * 32 * 2 * (mean_full - mean_windowed), abs=1)


def test_kv_cache_bytes_equal_the_cache():
    config = tiny_config()
    cache = KVCache(config, 3, 50, torch.bfloat16)
    assert cache.num_bytes() == 3 * 50 * kv_cache_bytes_per_token(config, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_activation": "gelu", "expert_bias": True},
        {"qk_norm": False},
        {"use_attention_bias": True},
        {"dropout": 0.1},
        {"document_mask": True},
    ],
)
def test_activation_estimate_is_what_autograd_saves(changes, monkeypatch):
    """Within 30 %: the estimate decides whether a run is started.

    So it is compared with the tensors that are really kept, by PyTorch's operations. Those in C
    keep less: no scores of a mask or a learned bias.
    """
    monkeypatch.setattr(choose, "_in_c", lambda *given: choose.InC())
    masked = bool(changes.pop("document_mask", False)) if (changes := dict(changes)) else False
    # with a mask: a context at which the masks are most of it
    config = tiny_config(
        d_model=64,
        d_ff=128,
        context_length=512 if masked else 128,
        transformer_blocks=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        **changes,
    )
    T = config.context_length
    model, ids = LLM(config), torch.randint(0, config.vocabulary_size, (4, T))
    choose_kernels(model, torch.device("cpu"), torch.float32)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(
            ids, ids, starts_BT=torch.arange(T).expand(4, T) // 64 * 64 if masked else None
        ).cross_entropy_sum
    assert loss.requires_grad
    measured = sum(nbytes for nbytes, _ in saved.values())
    estimate = training_memory_bytes(config, TrainConfig(batch_size=4, document_mask=masked))[
        "activations"
    ]
    assert 0.7 * measured < estimate < 1.3 * measured, (estimate, measured)


def test_memory_estimate_counts_16_bytes_a_parameter():
    memory = training_memory_bytes(ModelConfig(), TrainConfig(), 2, on_gpu=True)
    assert memory["weights"] + memory["gradients"] + memory["optimizer state"] == 16 * 3_664_132_435
    assert memory["loss"] < 2048 * 200_019 * 8 + 10 * 200_019 * 1024
    assert (
        loss_chunk_rows(ModelConfig(), False) == 256
        and loss_chunk_rows(ModelConfig(), True) == 2048
    )
    assert (
        loss_chunk_rows(ModelConfig(vocabulary_size=16_384), False) == 512
        and loss_chunk_rows(ModelConfig(vocabulary_size=4096), False) == 1024
    )
