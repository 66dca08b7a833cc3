"""Translate our model to Hugging Face's terms and back: architecture, config.json, tensors.

Three families hold models of ours exactly: Mixtral, Qwen3-MoE (per-head QK-norm) and OpenAI's
gpt-oss (sinks, alternating windows, biases, clamped SwiGLU). Facts about them are from transformers
5.23 (models/{mixtral,qwen3_moe,gpt_oss}, conversion_mapping.py, integrations/mxfp4.py), which is
not needed here. Files are written so that transformers 4 and 5 both read them: experts one by one
(4 reads no stacked ones), and config.json with the spellings of both.

Shape letters as in model_parts.py, and V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config_model import ModelConfig
from runtime.base.files import is_utf8
from runtime.checkpoint.format import meta_model
from runtime.checks.known import ATTENTION, EXPERTS, OUTSIDE, POSITIONS, SIZES, TRAINING, Known

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# The version of transformers that was read. A config.json without a version makes 4.57 take any
# tokenizer for an old one of Mistral's, and advise a "fix" that breaks it.
CHECKED_VERSION = "5.23.0"
KNOWS = Known(
    "the exchange with published classes",
    SIZES | ATTENTION | POSITIONS | EXPERTS | OUTSIDE | TRAINING,
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Family(NamedTuple):
    """A published architecture: its names, and what our options must be for it."""

    architecture: str
    # module of a block's mixture of experts, on the disk
    moe: str
    router: str
    # an expert's three matrices
    gate: str
    up: str
    down: str
    options: dict


_ALL = dict(use_rope=True, use_attention_bias=False, head_bias=False, router_bias_rate=0.0)
_PLAIN = _ALL | dict(
    qkv_bias=False,
    out_proj_bias=False,
    qk_norm=False,
    attention_sinks=False,
    expert_activation="swiglu",
    expert_bias=False,
    router_bias=False,
    window_pattern="all",
)
_GPT_OSS = _ALL | dict(
    qkv_bias=True,
    out_proj_bias=True,
    qk_norm=False,
    attention_sinks=True,
    expert_activation="swiglu_clamped",
    expert_bias=True,
    router_bias=True,
    window_pattern="alternating",
    rope_scaling="yarn",
    rms_norm_eps=1e-5,
)
FAMILIES = {
    "mixtral": Family("MixtralForCausalLM", "block_sparse_moe", "gate", "w1", "w3", "w2", _PLAIN),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "mlp",
        "gate",
        "gate_proj",
        "up_proj",
        "down_proj",
        _PLAIN | dict(qk_norm=True),
    ),
    # transformers' class would allow no YaRN, other windows and another epsilon; vLLM has these
    # built in.
    "gpt_oss": Family("GptOssForCausalLM", "mlp", "router", "", "", "", _GPT_OSS),
}


def family_of(config: ModelConfig) -> str:
    """Return the family that holds this model exactly.

    Raise ValueError if none does, with all options in the way of the nearest. What acts only in
    training (dropout, capacity_factor, z_loss_coef) is never in the way.
    """
    in_the_way = {
        family: [
            f"{name} {getattr(config, name)} (must be {value})"
            for name, value in FAMILIES[family].options.items()
            if getattr(config, name) != value
        ]
        for family in FAMILIES
    }
    if (
        config.rope_scaling == "yarn"
        and not (config.context_length / config.rope_scaling_factor).is_integer()
    ):
        for names in in_the_way.values():
            names.append(
                f"rope_scaling_factor {config.rope_scaling_factor} "
                f"(must divide context_length {config.context_length})"
            )
    family = min(FAMILIES, key=lambda name: len(in_the_way[name]))
    if in_the_way[family]:
        raise ValueError(
            f"no published architecture holds this model; in the way of the nearest, {family}: "
            f"{', '.join(in_the_way[family])}. "
            "--custom_code of scripts.export_hf exports it with a modeling file of its own"
        )
    return family


# ----------------------------------------------------------------------------------- config.json
def hf_config(
    config: ModelConfig,
    family: str,
    *,
    end_of_text_id: int | None,
    start_id: int | None,
    dtype: str,
    pad_id: int | None = None,
) -> dict:
    """Return config.json of a model of this family.

    transformers never trains the embedding of its pad_token_id. So it is there only if texts do
    not contain that id (see `pad_setting`).
    """
    c, factor = config, config.rope_scaling_factor
    rope = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": factor},
        "yarn": {
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": c.yarn_truncate,
            "original_max_position_embeddings": round(c.context_length / factor),
        },
    }[c.rope_scaling]
    theirs = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": c.vocabulary_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.transformer_blocks,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.attention_head_dim,
        "max_position_embeddings": c.context_length,
        "intermediate_size": c.d_ff,
        "num_experts": c.num_experts,
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "hidden_act": "silu",
        "attention_bias": c.qkv_bias,
        "attention_dropout": 0.0,
        "sliding_window": c.sliding_window or None,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope | {"rope_theta": c.rope_theta},
        # At balance their loss is top_k for all blocks together, ours 1.0 per block: this factor
        # makes them equal.
        "output_router_logits": False,
        "router_aux_loss_coef": _scaled(c.aux_loss_coef, c.transformer_blocks / c.top_k),
        "transformers_version": CHECKED_VERSION,
        "use_cache": True,
        "bos_token_id": start_id,
        "eos_token_id": end_of_text_id,
        **pad_setting(pad_id, end_of_text_id, start_id),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if c.rope_scaling != "none":
        theirs["rope_scaling"] = rope
    if family == "qwen3_moe":
        theirs |= {
            "moe_intermediate_size": c.d_ff,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": c.sliding_window > 0,
            "max_window_layers": c.transformer_blocks,
        }
    if family == "gpt_oss":
        theirs |= {
            "experts_per_token": c.top_k,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "initial_context_length": rope["original_max_position_embeddings"],
            "layer_types": _layer_types(c.transformer_blocks),
        }
    return theirs


def pad_setting(pad_id: int | None, *in_texts: int | None) -> dict:
    """Return pad_token_id for config.json; nothing if `in_texts` has that id, or if it is None."""
    return {} if pad_id is None or pad_id in in_texts else {"pad_token_id": pad_id}


def model_config_from(hf: dict) -> tuple[str, ModelConfig]:
    """Return (family, our config) of a config.json, in either spelling.

    Raise ValueError for a model that ours cannot be.
    """
    family = hf.get("model_type")
    if family == "gptoss":
        raise ValueError(
            "config.json: model_type gptoss was written with --custom_code, which is not imported: "
            "use the checkpoint that it was made from"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(FAMILIES)}, not {family!r}"
        )
    _refuse(
        hf,
        "config.json",
        {
            "hidden_act": "silu",
            "attention_bias": family == "gpt_oss",
            "attention_dropout": 0.0,
            "router_jitter_noise": 0.0,
            "partial_rotary_factor": 1.0,
        },
    )
    quantised = (
        _table(hf, "quantization_config").get("quant_method", "an unknown method")
        if hf.get("quantization_config")
        else None
    )
    if quantised and (family, quantised) != ("gpt_oss", "mxfp4"):
        raise ValueError(
            f"config.json: weights quantised by {quantised} cannot be read; "
            "take the model's unquantised release"
        )
    blocks, top_k = (
        _number(hf, "num_hidden_layers"),
        _number(hf, "num_experts_per_tok", "experts_per_token"),
    )
    window = _number(hf, "sliding_window", default=0)
    if family == "qwen3_moe":
        _refuse(hf, "config.json", {"decoder_sparse_step": 1, "mlp_only_layers": []})
        if hf.get("norm_topk_prob") is not True:
            raise ValueError(
                "config.json: norm_topk_prob must be true: our router's weights always sum to 1"
            )
        window = window if hf.get("use_sliding_window") else 0
    scaling, factor, context, theta, truncate = _rope_from(hf)
    config = ModelConfig(
        **FAMILIES[family].options
        | dict(
            d_model=_number(hf, "hidden_size"),
            transformer_blocks=blocks,
            context_length=context,
            vocabulary_size=_number(hf, "vocab_size"),
            num_heads=_number(hf, "num_attention_heads"),
            num_kv_heads=_number(hf, "num_key_value_heads"),
            head_dim=_number(hf, "head_dim", default=0),
            sliding_window=window,
            rope_theta=theta,
            rope_scaling=scaling,
            rope_scaling_factor=factor,
            yarn_truncate=truncate,
            num_experts=_number(hf, "num_local_experts", "num_experts"),
            top_k=top_k,
            d_ff=_number(hf, "moe_intermediate_size")
            if family == "qwen3_moe"
            else _number(hf, "intermediate_size"),
            aux_loss_coef=_scaled(
                _number(hf, "router_aux_loss_coef", default=0.001), top_k / max(blocks, 1)
            ),
            rms_norm_eps=_number(hf, "rms_norm_eps"),
            tie_embeddings=bool(hf.get("tie_word_embeddings")),
            init_std=_number(hf, "initializer_range", default=0.02),
        )
    )
    if family == "gpt_oss":
        _refuse(
            hf,
            "config.json",
            {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "layer_types": _layer_types(blocks)},
        )
    family_of(config)
    return family, config


def _layer_types(blocks: int) -> list[str]:
    return [("sliding_attention", "full_attention")[block % 2] for block in range(blocks)]


def _scaled(value: float, factor: float) -> float:
    """Return value * factor in the fewest digits that still identify the value.

    So a number that is multiplied and divided again is what it was before.
    """
    candidates = (float(f"{value * factor:.{digits}g}") for digits in range(1, 18))
    return next(
        (
            number
            for number in candidates
            if factor == 0 or math.isclose(number / factor, value, rel_tol=1e-12)
        ),
        value * factor,
    )


def _refuse(given: dict, where: str, allowed: dict) -> None:
    """Raise ValueError if a key has a value we do not support. Missing and null keys are fine."""
    for key, value in allowed.items():
        if given.get(key) is not None and given[key] != value:
            raise ValueError(
                f"{where}: {key} {given[key]!r} cannot be expressed: our model has {value!r}"
            )


def _number(hf: dict, *keys: str, default: int | float | None = None) -> int | float:
    """Return the number under one of these keys, or the default.

    Raise ValueError if there is neither, if the number is negative or at least 2**63, or if two
    keys differ.
    """
    values = [hf[key] for key in keys if hf.get(key) is not None] or (
        [] if default is None else [default]
    )
    if not values or type(values[0]) not in (int, float) or not 0 <= values[0] < 2**63:
        raise ValueError(
            f"config.json: {' or '.join(keys)} must be a number, "
            f"not {reprlib.repr(values[0] if values else None)}"
        )
    if any(value != values[0] for value in values):
        raise ValueError(f"config.json: {' and '.join(keys)} differ")
    return values[0]


def _table(hf: dict, key: str) -> dict:
    if not isinstance(hf.get(key) or {}, dict):
        raise ValueError(f"config.json: {key} must be a table, not {hf[key]!r}")
    return hf.get(key) or {}


def _rope_from(hf: dict) -> tuple[str, float, int, float, bool]:
    """Return (rope_scaling, rope_scaling_factor, context_length, rope_theta, yarn_truncate)."""
    rope: dict = {}
    # transformers 5 has the first table, transformers 4 the others.
    for table in (
        _table(hf, "rope_parameters"),
        _table(hf, "rope_scaling"),
        {"rope_theta": hf.get("rope_theta")},
    ):
        table = {key: value for key, value in table.items() if value is not None}
        if differing := [key for key in table if key in rope and rope[key] != table[key]]:
            raise ValueError(
                f"config.json: {differing[0]} is there twice, "
                f"as {rope[differing[0]]!r} and as {table[differing[0]]!r}"
            )
        rope |= table
    theta = _number(rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    context = _number(hf, "max_position_embeddings")
    if kind not in ("default", "linear", "yarn"):
        raise ValueError(
            f"config.json: rope_type must be one of default, linear, yarn, not {kind!r}"
        )
    known = {
        "default": set(),
        "linear": {"factor"},
        "yarn": {
            "factor",
            "beta_fast",
            "beta_slow",
            "truncate",
            "original_max_position_embeddings",
        },
    }[kind]
    for key, value in rope.items():
        if key not in known | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            raise ValueError(
                f"config.json: {key} {value!r} of rope_type {kind} cannot be expressed: "
                "our model has none"
            )
    _refuse(
        rope, "config.json", {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    )
    if kind == "default":
        return "none", 1.0, context, theta, True
    factor = _number(rope, "factor")
    if kind == "linear":
        return "linear", factor, context, theta, True
    # The default is that of transformers.
    trained = _number(rope, "original_max_position_embeddings", default=context)
    # Not is_integer: 161 * (256 / 161) is a little less than 256.
    if not math.isclose(trained * factor, round(trained * factor), rel_tol=1e-12):
        raise ValueError(
            f"config.json: original_max_position_embeddings {trained} times factor {factor} "
            "must be a whole number: it is our context_length"
        )
    return "yarn", factor, round(trained * factor), theta, rope.get("truncate") is not False


# --------------------------------------------------------------------------------------- tensors
_OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "out_head": "lm_head"}
_INSIDE = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "attention.W_q": "self_attn.q_proj",
    "attention.W_k": "self_attn.k_proj",
    "attention.W_v": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention": "self_attn",
}


def _their_name(family: str, name: str) -> str:
    """Return their name of a tensor that is the same there: any but an expert's."""
    module, kind = name.rsplit(".", 1)
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    _, block, inside = module.split(".", 2)
    f = FAMILIES[family]
    theirs = f"{f.moe}.{f.router}" if inside == "moe.router" else _INSIDE[inside]
    return f"model.layers.{block}.{theirs}.{kind}"


def module_there(family: str, name: str) -> str:
    """Return their module of a matrix that is no expert's: model.layers.0.self_attn.q_proj."""
    return _their_name(family, name).removesuffix(".weight")


def export_tensors(
    config: ModelConfig, family: str, weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (their name, tensor) of all our weights, one at a time, in the weights' dtype.

    The tensors are views if the layout is the same. A tied gpt-oss also gets its head as a tensor,
    because vLLM's class does not tie.
    """
    f, F = FAMILIES[family], config.d_ff
    for name, tensor in weights.items():
        module, kind = name.rsplit(".", 1)
        if not module.endswith(".moe.experts"):
            yield _their_name(family, name), tensor
            continue
        prefix = f"model.layers.{module.split('.')[1]}.{f.moe}.experts"
        if family == "gpt_oss":
            # Gate and up rows alternate there.
            if kind in ("w_in", "b_in"):
                tensor = torch.stack((tensor[:, :F], tensor[:, F:]), dim=2).flatten(1, 2)
            theirs = ("gate_up_proj" if kind.endswith("in") else "down_proj") + (
                "_bias" if kind.startswith("b") else ""
            )
            yield (
                f"{prefix}.{theirs}",
                tensor.transpose(1, 2).contiguous() if kind.startswith("w") else tensor,
            )
        else:
            for e, of_one in enumerate(tensor):
                for theirs, matrix in (
                    ((f.gate, of_one[:F]), (f.up, of_one[F:]))
                    if kind == "w_in"
                    else ((f.down, of_one),)
                ):
                    yield f"{prefix}.{e}.{theirs}.weight", matrix
    if family == "gpt_oss" and config.tie_embeddings:
        yield "lm_head.weight", weights["embed.weight"]


@functools.lru_cache(maxsize=4)
def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of each of our tensors."""
    return {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}


def import_tensor(
    config: ModelConfig,
    family: str,
    name: str,
    has: Callable[[str], bool],
    read: Callable[[str], Tensor],
) -> Tensor:
    """Return our tensor `name` from theirs, in its dtype there; MXFP4 as float32.

    Experts may be stored one by one, stacked (transformers 5) or as MXFP4. `has` and `read`: of
    folder_tensors. Raise ValueError if a tensor is missing or has another shape or dtype.
    """
    shape, f = _shapes(config)[name], FAMILIES[family]

    def take(theirs: str, shape, dtypes=FLOATS) -> Tensor:
        if not has(theirs):
            raise ValueError(f"tensor {theirs} is missing")
        tensor = read(theirs)
        if list(tensor.shape) != list(shape) or tensor.dtype not in dtypes:
            raise ValueError(
                f"tensor {theirs} is {tensor.dtype} {list(tensor.shape)}, "
                f"and must be {' or '.join(map(str, dtypes))} {list(shape)}"
            )
        return tensor

    module, kind = name.rsplit(".", 1)
    if not module.endswith(".moe.experts"):
        theirs = _their_name(family, name)
        in_memory = theirs.replace(f".{f.moe}.", ".mlp.")
        return take(theirs if has(theirs) else in_memory, shape)
    E, F, block = config.num_experts, config.d_ff, module.split(".")[1]
    prefix = f"model.layers.{block}.{f.moe}.experts"
    proj = "gate_up_proj" if kind.endswith("in") else "down_proj"
    stacked = f"model.layers.{block}.mlp.experts.{proj}"
    if family == "gpt_oss":
        if kind.startswith("b"):
            tensor = take(f"{stacked}_bias", shape)
        elif has(f"{stacked}_blocks"):
            groups = [*shape[:2], math.ceil(shape[2] / 32)]
            tensor = dequantise_mxfp4(
                take(f"{stacked}_blocks", [*groups, 16], (torch.uint8,)),
                take(f"{stacked}_scales", groups, (torch.uint8,)),
            )
        else:
            tensor = take(stacked, (shape[0], shape[2], shape[1])).transpose(1, 2)
        return (
            torch.cat((tensor[:, ::2], tensor[:, 1::2]), dim=1)
            if kind.endswith("in")
            else tensor.contiguous()
        )
    if has(stacked):
        return take(stacked, shape)
    tensor = None
    for e in range(E):
        for i, theirs in enumerate((f.gate, f.up) if kind == "w_in" else (f.down,)):
            rows = slice(i * F, (i + 1) * F) if kind == "w_in" else slice(None)
            matrix = take(
                f"{prefix}.{e}.{theirs}.weight", (F, shape[2]) if kind == "w_in" else shape[1:]
            )
            tensor = torch.empty(shape, dtype=matrix.dtype) if tensor is None else tensor
            tensor[e, rows] = matrix
    return tensor


# Open Compute Project, Microscaling Formats 1.0 (2023): sections 5.3.3 (e2m1: sign, exponent,
# mantissa) and 5.4.1 (e8m0 scale, bias 127).
_E2M1 = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
)


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return MXFP4 numbers as [E, rows, 32 * groups] float32.

    blocks: [E, rows, groups, 16] uint8, two numbers a byte, the low four bits first. scales:
    [E, rows, groups] uint8.
    """
    out = torch.empty(*scales.shape, 32)
    # One expert at a time: indices are int64.
    for matrix, packed, scale in zip(out, blocks, scales, strict=True):
        matrix[..., 0::2], matrix[..., 1::2] = (
            _E2M1[(packed & 15).long()],
            _E2M1[(packed >> 4).long()],
        )
        matrix.ldexp_((scale.int() - 127)[..., None])
    return out.flatten(2)


# ---------------------------------------------------------------------------------------- folder
def folder_tensors(
    folder: str | Path,
) -> tuple[Callable[[str], bool], Callable[[str], Tensor], list[str]]:
    """Return (has, read, names) of the tensors in a folder's safetensors, sharded or not.

    Tensors are mapped from the files. Raise ValueError for damage, and for a folder with two sets
    of weights: transformers reads one of them, other programs the other.
    """
    folder = Path(folder)
    if not is_utf8(folder):
        raise ValueError(
            f"{folder} is not UTF-8, and safetensors opens UTF-8 paths alone: rename the folder"
        )
    if (folder / INDEX).exists():
        try:
            file_of = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            # Its shards lie next to it, whatever paths it names.
            files = sorted({Path(name).name for name in file_of.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is no index of safetensors files") from error
    elif (folder / SINGLE).exists():
        file_of, files = {}, [SINGLE]
    else:
        raise ValueError(
            f"{folder} has no {SINGLE} and no {INDEX}: only models stored as safetensors are read"
        )
    opened = {}
    for name in files:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which its index names: download it again")
        try:
            opened[name] = safe_open(folder / name, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error
    if (folder / SINGLE).exists() and files != [SINGLE]:
        raise ValueError(
            f"{folder} has {SINGLE} and an index that names other files, so two sets of weights: "
            "remove the one that is not meant"
        )
    inside = {tensor: name for name, file in opened.items() for tensor in list(file.keys())}
    if lacking := [tensor for tensor in file_of if tensor not in inside]:
        raise ValueError(
            f"{folder / file_of[lacking[0]]} lacks tensor {lacking[0]}, "
            "which the index says is there"
        )
    return inside.__contains__, lambda name: opened[inside[name]].get_tensor(name), list(inside)
