"""Small configs and models for tests, and values for their flags."""

from __future__ import annotations

import dataclasses
import random
import typing

import torch

from config_model import ModelConfig
from model import LLM
from model_parts import attention_mask

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
    """Return a small model with every option drawn at random, also those that act only in training.

    tests/checks/test_known.py checks that none is left out.
    """
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
    """Return a config whose model computes the same in train mode.

    No dropout, no capacity (default).
    """
    return dataclasses.replace(config, dropout=0.0, capacity_factor=ModelConfig.capacity_factor)


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> LLM:
    """Return a model whose parameters are all random and large enough to matter.

    The initial biases and tables are 0.
    """
    torch.manual_seed(seed)
    model = LLM(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
        for block in model.layers:
            if block.moe.router.selection_bias is not None:
                block.moe.router.selection_bias.normal_(0.0, 0.3)
    return model


# No effect without.
NEEDS = {
    "window_pattern": {"sliding_window": 4},
    "rope_scaling_factor": {"rope_scaling": "linear"},
    "rope_scaling": {"context_length": 4096},
    "yarn_truncate": {"rope_scaling": "yarn"},
    "muon_momentum": {"optimizer": "muon"},
    # Folders that have the run's name already stay.
    "run_name": {"ckpt_dir": "checkpoints/third", "graph_dir": "graphs/third"},
}


def other_value(config_class, name: str, besides=()):
    """A valid value for a field that is neither its default nor in `besides`."""
    f = next(f for f in dataclasses.fields(config_class) if f.name == name)
    kind, default = typing.get_type_hints(config_class)[name], f.default
    companions = {
        k: v
        for k, v in NEEDS.get(name, {}).items()
        if k in {f.name for f in dataclasses.fields(config_class)}
    }
    if f.metadata["choices"]:
        candidates = f.metadata["choices"]
    elif kind is bool:
        candidates = (not default, default)
    elif kind is str:
        candidates = [f"other/{name}", f"another/{name}", "third"]
        # The name of a folder, not a path.
        candidates = candidates[2:] if name == "run_name" else candidates
    elif kind is tuple:
        candidates = [("one", "two")]
    else:
        candidates = [
            kind(v)
            for v in (
                2 * default,
                4 * default,
                default / 2,
                default / 4,
                default + 2,
                default + 4,
                default + 6,
                0.5,
                0.25,
                0.125,
            )
        ]
    for value in candidates:
        if value != default and value not in besides:
            try:
                config_class(**companions | {name: value})
            except ValueError:
                continue
            return value
    raise AssertionError(f"no other value for {name}")


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        if isinstance(value, tuple):
            flags += [part for item in value for part in (f"--{name}", item)]
            continue
        flags += (
            [f"--{'' if value else 'no-'}{name}"]
            if isinstance(value, bool)
            else [f"--{name}", repr(value) if isinstance(value, float) else str(value)]
        )
    return flags


def random_architecture(r: random.Random) -> ModelConfig:
    """Any sizes, also those that no vector and no tile divides."""
    G = r.choice([1, 1, 2, 3])
    E = r.choice([1, 2, 5, 8])
    config = tiny_config(
        d_model=r.choice([1, 7, 16, 33, 64]),
        transformer_blocks=r.choice([1, 2, 3]),
        num_heads=G * r.choice([1, 2, 3]),
        num_kv_heads=G,
        head_dim=2 * r.choice([1, 3, 8, 17]),
        num_experts=E,
        top_k=r.randint(1, min(E, 4)),
        d_ff=r.choice([1, 5, 32, 67]),
        vocabulary_size=r.choice([2, 11, 64, 101]),
        expert_activation=r.choice(["gelu", "swiglu", "swiglu_clamped"]),
        attention_sinks=r.random() < 0.4,
        router_bias=r.random() < 0.4,
        context_length=48,
        tie_embeddings=r.random() < 0.3,
        router_bias_rate=r.choice([0.0, 0.1]),
        rms_norm_eps=r.choice([1e-6, 1e-2]),
        use_rope=r.random() < 0.8,
        **{
            name: r.random() < 0.5
            for name in (
                "expert_bias",
                "qkv_bias",
                "out_proj_bias",
                "head_bias",
                "qk_norm",
                "use_attention_bias",
            )
        },
        **r.choice(
            [
                {},
                dict(sliding_window=5),
                dict(sliding_window=9, window_pattern="alternating"),
                dict(rope_theta=100.0),
            ]
        ),
    )
    # The norm of a single number is its sign, which rounding turns where the number is almost 0:
    # unless eps is as large as it.
    return dataclasses.replace(config, rms_norm_eps=1.0) if config.d_model == 1 else config


def chunks_of(total: int, r: random.Random) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(r.choice([1, 1, 2, 3, 5, 9]), total - sum(sizes)))
    return sizes


def sink_case(seed: int, dtype=torch.float64):
    """Yield (queries, keys, values, sinks, mask or None, is_causal) of various sizes.

    Causal, windowed, packed documents, one token, a chunk after a cache.
    """
    r = random.Random(seed)
    torch.manual_seed(seed)
    G, S = r.choice([1, 2, 3]), r.choice([5, 17, 40])
    H, D, T = G * r.choice([1, 2, 4]), r.choice([4, 8, 10]), r.choice([S, S, 1, 3])
    q, k, v, sinks = (
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((2, H, T, D), (2, G, S, D), (2, G, S, D), (H,))
    )
    window, starts = (
        r.choice([0, 0, 3]),
        torch.tensor([[0] * (T // 2) + [S - T + T // 2] * (T - T // 2)] * 2)
        if T == S and r.random() < 0.4
        else None,
    )
    if starts is None and T == 1 and not window:
        return q, k, v, sinks, None, False
    if starts is None and T == S and not window:
        return q, k, v, sinks, None, True
    return (
        q,
        k,
        v,
        sinks,
        attention_mask(torch.arange(S - T, S), torch.arange(S), window, starts),
        False,
    )
