"""Small configs for tests."""

from __future__ import annotations

import dataclasses
import random

import torch

import train
from config_model import ModelConfig
from model import LLM
from runtime.training.task import GivenTask

TINY = dict(
    d_model=32,
    transformer_blocks=2,
    context_length=32,
    vocabulary_size=61,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=24,
    num_experts=4,
    top_k=2,
    use_attention_bias=False,
    qk_norm=True,
    expert_activation="swiglu",
    expert_bias=False,
    out_proj_bias=False,
    head_bias=False,
    rms_norm_eps=1e-6,
)


def tiny_config(**changes) -> ModelConfig:
    """A modern model of a few thousand parameters, with `changes`."""
    return ModelConfig(**(TINY | changes))


def random_config(seed: int) -> ModelConfig:
    """A small model with every option drawn at random, also those that act only while training. tests/checks/test_known.py holds that none is left out."""
    r = random.Random(seed)
    G, groups, window = r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([0, 0, 1, 3, 7])
    use_rope = r.random() < 0.8
    scaling = r.choice(["none", "linear", "yarn"]) if use_rope else "none"
    E = r.choice([1, 2, 4, 7])
    sinks, router_bias, truncate = (
        r.random() < 0.4,
        r.random() < 0.4,
        scaling != "yarn" or r.random() < 0.5,
    )
    return ModelConfig(
        d_model=r.choice([8, 24, 36]),
        transformer_blocks=r.choice([1, 2, 3]),
        context_length=r.choice([16, 24]),
        vocabulary_size=r.choice([17, 50]),
        num_heads=G * groups,
        num_kv_heads=G,
        head_dim=r.choice([4, 6, 10]),
        d_ff=r.choice([8, 20]),
        num_experts=E,
        top_k=r.randint(1, E),
        use_attention_bias=r.random() < 0.4,
        qkv_bias=r.random() < 0.3,
        out_proj_bias=r.random() < 0.5,
        qk_norm=r.random() < 0.5,
        expert_activation=r.choice(["gelu", "swiglu", "swiglu_clamped"]),
        expert_bias=r.random() < 0.5,
        head_bias=r.random() < 0.5,
        tie_embeddings=r.random() < 0.5,
        sliding_window=window,
        window_pattern=r.choice(["all", "alternating"]) if window else "all",
        use_rope=use_rope,
        rope_scaling=scaling,
        rope_scaling_factor=2.0 if scaling != "none" else 1.0,
        router_bias_rate=r.choice([0.0, 1e-3]),
        attention_sinks=sinks,
        router_bias=router_bias,
        yarn_truncate=truncate,
        rms_norm_eps=r.choice([1e-6, 2.0**-23]),
        # The last draws, so that those before them stay what they were.
        rope_theta=r.choice([100.0, 10_000.0]),
        init_std=r.choice([0.02, 0.05]),
        aux_loss_coef=r.choice([0.0, 1e-2]),
        z_loss_coef=r.choice([0.0, 1e-3]),
        dropout=r.choice([0.0, 0.1]),
        capacity_factor=r.choice([0.0, 1.25]),
    )


def without_chance(config: ModelConfig) -> ModelConfig:
    """A config whose model computes the same in train mode: no dropout, and the capacity that is the
    default, none."""
    return dataclasses.replace(config, dropout=0.0, capacity_factor=ModelConfig.capacity_factor)


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LLM:
    """A model whose every parameter is random and large enough to matter (the initial biases and tables are 0)."""
    torch.manual_seed(seed)
    model = LLM(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
        for block in model.layers:
            if block.moe.router.selection_bias is not None:
                block.moe.router.selection_bias.normal_(0.0, 0.3)
    return model


def fit(
    model,
    loader,
    config,
    loss_fn=train.next_token_loss,
    *,
    optimizer=None,
    state=None,
    val_batches=(),
    dtype=torch.float32,
    **hooks,
):
    """Call train.fit with a task of these parts; `hooks` are the fields of train.Hooks."""
    return train.fit(
        model,
        GivenTask(loader, loss_fn, val_batches),
        config,
        train.Hooks(**hooks),
        optimizer=optimizer,
        state=state,
        dtype=dtype,
    )
