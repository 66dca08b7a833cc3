"""Folders, architectures and tokenizers for tests of the exports and imports."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from config_model import PRESETS, ModelConfig
from model import LLM
from runtime.data.hf_tokenizer import HuggingFaceTokenizer, canonical_json
from runtime.data.tokenizer import WORD_PATTERN, byte_of_character
from runtime.interop.huggingface import export_tensors, family_of, hf_config
from tests.builders import tiny_config

MIXTRAL = dict(qk_norm=False)
QWEN3_MOE = dict(rope_scaling="yarn", rope_scaling_factor=2.0)
GPT_OSS = dict(
    qk_norm=False,
    qkv_bias=True,
    out_proj_bias=True,
    attention_sinks=True,
    sliding_window=8,
    window_pattern="alternating",
    rope_scaling="yarn",
    rope_scaling_factor=2.0,
    yarn_truncate=False,
    expert_activation="swiglu_clamped",
    expert_bias=True,
    router_bias=True,
    rms_norm_eps=1e-5,
)
FAMILIES = {"llama": MIXTRAL, "qwen3moe": QWEN3_MOE, "gpt-oss": GPT_OSS}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": WORD_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")


def imported(
    pattern: str | None = WORD_PATTERN,
    stop_ids=(258, 260),
    start_id: int | None = 259,
    pre_tokenizer=None,
    ignore_merges=False,
    **changes,
) -> HuggingFaceTokenizer:
    """A byte-level tokenizer.json with one merge, three special tokens and an added word."""
    words = [c for c, _ in sorted(byte_of_character().items(), key=lambda item: item[1])] + ["th"]
    added = [
        {
            "id": 257 + i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": i > 0,
        }
        for i, word in enumerate(["<word>", "<|end|>", "<|start|>", "<|turn|>"])
    ]
    split = pre_tokenizer or {
        "type": "Sequence",
        "pretokenizers": [SPLIT | {"pattern": {"Regex": pattern}}, BYTE_LEVEL],
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {word: i for i, word in enumerate(words)},
        "merges": ["t h"],
    }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    return HuggingFaceTokenizer(canonical_json(data | changes), {}, stop_ids, start_id)


GPT_OSS_SMALL = PRESETS["gpt-oss-nano"].model | dict(
    d_model=32,
    transformer_blocks=3,
    context_length=32,
    vocabulary_size=61,
    head_dim=8,
    num_experts=6,
    d_ff=24,
    sliding_window=5,
)
CONFIGS = {
    "mixtral": tiny_config(qk_norm=False),
    "mixtral, tied, windowed, linear": tiny_config(
        qk_norm=False,
        tie_embeddings=True,
        sliding_window=6,
        rope_theta=5_000.0,
        rope_scaling="linear",
        rope_scaling_factor=2.5,
    ),
    "qwen3_moe": tiny_config(),
    "qwen3_moe, tied, windowed, yarn": tiny_config(
        tie_embeddings=True,
        sliding_window=6,
        rope_theta=1_000.0,
        rope_scaling="yarn",
        rope_scaling_factor=2.0,
        rms_norm_eps=1e-5,
    ),
    "gpt_oss": ModelConfig(**GPT_OSS_SMALL),
    "gpt_oss, tied, truncated yarn": ModelConfig(
        **GPT_OSS_SMALL | dict(tie_embeddings=True, yarn_truncate=True, num_kv_heads=4)
    ),
}


def write_folder(model: LLM, folder: Path, **changes) -> dict:
    """Weights and config.json as an export has them; returns the tensors."""
    folder.mkdir(exist_ok=True)
    family = family_of(model.config)
    tensors = {
        name: tensor.detach().clone()
        for name, tensor in export_tensors(model.config, family, model.state_dict())
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(
            hf_config(model.config, family, end_of_text_id=0, start_id=0, dtype="float32") | changes
        )
    )
    return tensors


def load_theirs(folder: Path):
    from transformers import AutoModelForCausalLM

    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    # Missing, unexpected, mismatched, errors.
    assert not any(info.values()), info
    return theirs


def some_ids(config: ModelConfig, B: int = 2) -> torch.Tensor:
    return torch.randint(
        0,
        config.vocabulary_size,
        (B, config.context_length),
        generator=torch.Generator().manual_seed(1),
    )
