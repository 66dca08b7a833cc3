"""Write a checkpoint's adapters as others read them: a folder for peft, or merged weights.

Facts about the files are from peft 0.21.2 (tuners/lora, utils/transformers_weight_conversion.py),
which is not needed here; tests/interop/test_adapters.py loads the folders with it.

Mixtral and Qwen3-MoE have a key for each expert; with transformers 5, which stacks experts, peft
stacks their adapters as it loads. gpt-oss has stacked keys. peft then multiplies a matrix
[outputs, r E] by one [E r, inputs]: A has its rows by expert and then rank, and B its columns by
rank and then expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config_model import ModelConfig
from runtime.checkpoint.adapter import ATTENTION, KEY, AdaptedWeights, Adapter, pair_of
from runtime.checkpoint.format import Checkpoint, shapes_of
from runtime.checkpoint.write import write_weights
from runtime.interop.export import staged
from runtime.interop.hf_export import write_json, write_safetensors
from runtime.interop.huggingface import FAMILIES, family_of, module_there

# The version of peft that was read and that loads the files in the tests.
CHECKED_VERSION = "0.21.2"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# --force may replace these.
PEFT_FILES = re.compile(rf"{re.escape(WEIGHTS)}|{re.escape(CONFIG)}")
PREFIX = "base_model.model."
# Room for adapter_config.json.
BESIDES_BYTES = 1 << 16


def peft_config(config: ModelConfig, family: str, adapter: Adapter) -> dict:
    """Return adapter_config.json. Its factor is alpha / r, with the rank of each matrix."""
    f = FAMILIES[family]
    attention = [_leaf(module_there(family, f"layers.0.{name}")) for name in ATTENTION]
    experts = [f.gate, f.up, f.down] if family != "gpt_oss" else []
    stacked = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    rows = list(range(adapter.rows.start, adapter.rows.stop))
    vocabulary = ["embed_tokens"] if config.tie_embeddings else ["embed_tokens", "lm_head"]
    return {
        "peft_type": "LORA",
        "peft_version": CHECKED_VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        # Of the experts. What makes two matrices one doubles this one, and knows no pattern.
        "r": adapter.expert_rank,
        "rank_pattern": dict.fromkeys(attention, adapter.rank),
        "lora_alpha": adapter.alpha,
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": attention + experts,
        "target_parameters": stacked if family == "gpt_oss" else None,
        "modules_to_save": None,
        "trainable_token_indices": dict.fromkeys(vocabulary, rows) if rows else None,
    }


def peft_tensors(
    config: ModelConfig, family: str, adapter: Adapter, trained: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of adapter_model.safetensors, one at a time, contiguous."""
    for block in range(config.transformer_blocks):
        for name in ATTENTION:
            module = module_there(family, f"layers.{block}.{name}")
            yield from _pair(module, *(trained[part] for part in pair_of(f"layers.{block}.{name}")))
        w_in, w_out = (
            tuple(trained[part] for part in pair_of(f"layers.{block}.moe.experts.{name}"))
            for name in ("w_in", "w_out")
        )
        there = f"model.layers.{block}.{FAMILIES[family].moe}.experts"
        if family == "gpt_oss":
            yield from _pair(f"{there}.base_layer", *_stacked(w_in[0], _interleaved(w_in[1])))
            yield from _pair(there, *_stacked(*w_out))
        else:
            yield from _each_expert(there, family, w_in, w_out)
    for name, module in (
        ("embed.new_rows", "model.embed_tokens"),
        ("out_head.new_rows", "lm_head"),
    ):
        if name in trained:
            yield f"{PREFIX}{module}.token_adapter.trainable_tokens_delta", trained[name]


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _pair(module: str, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{PREFIX}{module}.lora_A.weight", a.contiguous()
    yield f"{PREFIX}{module}.lora_B.weight", b.contiguous()


def _each_expert(
    there: str, family: str, w_in: tuple[Tensor, ...], w_out: tuple[Tensor, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the pairs of every expert's three matrices. Gate and up have the same A."""
    f, d_ff = FAMILIES[family], w_in[1].shape[1] // 2
    for e, (a_in, b_in, a_out, b_out) in enumerate(zip(*w_in, *w_out, strict=True)):
        yield from _pair(f"{there}.{e}.{f.gate}", a_in, b_in[:d_ff])
        yield from _pair(f"{there}.{e}.{f.up}", a_in, b_in[d_ff:])
        yield from _pair(f"{there}.{e}.{f.down}", a_out, b_out)


def _interleaved(b_E2Fr: Tensor) -> Tensor:
    """Return B of w_in with gate and up rows in turn, as gpt-oss has them."""
    gate_EFr, up_EFr = b_E2Fr.chunk(2, dim=1)
    return torch.stack((gate_EFr, up_EFr), dim=2).flatten(1, 2)


def _stacked(a_ErI: Tensor, b_EOr: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [E r, I], by expert and then rank, and B [O, r E], by rank and then expert."""
    return a_ErI.flatten(0, 1), b_EOr.permute(1, 2, 0).flatten(1)


# ------------------------------------------------------------------------------------------- files
def write_peft(checkpoint: Checkpoint, out: Path) -> str:
    """Write a file's adapters as the folder `out`; return what was written, for the last line.

    Raise ValueError for a model that no published architecture holds, and for rows of the
    vocabulary that the exported base does not have.
    """
    config, adapter, weights = checkpoint.model_config, checkpoint.adapter, checkpoint.model
    assert adapter is not None and isinstance(weights, AdaptedWeights)
    family = family_of(config)
    if added := config.vocabulary_size - weights.base_shapes["embed.weight"][0]:
        raise ValueError(
            f"{checkpoint.path} adds {added} ids to its base's vocabulary, and peft loads adapters "
            "into a model of the same size: write a merged checkpoint (--out merged.pt), and "
            "export that with scripts.export_hf"
        )
    plan = [
        (name, tensor.to("meta"))
        for name, tensor in peft_tensors(config, family, adapter, checkpoint.trained)
    ]
    needed = sum(tensor.nbytes for _, tensor in plan)
    with staged(out, needed + BESIDES_BYTES, is_folder=True) as folder:
        tensors = peft_tensors(config, family, adapter, checkpoint.trained)
        write_safetensors(folder / WEIGHTS, plan, tensors)
        write_json(folder / CONFIG, peft_config(config, family, adapter))
    return f"adapters for {family}, {len(plan)} tensors, {needed / 1e6:,.1f} MB"


def write_merged(checkpoint: Checkpoint, out: Path) -> str:
    """Write the model that a file of adapters means as a plain checkpoint of weights.

    One tensor is in memory at a time. Return what was written, for the last line.
    """
    shapes = shapes_of(checkpoint.model_config)
    stage = {key: value for key, value in checkpoint.stage.items() if key != KEY}
    values: dict[str, Any] = {"stage": stage} if stage else {}
    needed = sum(4 * shape.numel() for shape in shapes.values())
    with staged(out, needed) as temporary:
        write_weights(
            temporary,
            checkpoint.model_config,
            checkpoint.model.__getitem__,
            tokenizer_state=checkpoint.tokenizer_state,
            run=checkpoint.run,
            step=checkpoint.step,
            val_loss=checkpoint.val_loss,
            train_cfg=checkpoint.train_config,
            data_fingerprint=checkpoint.data_fingerprint,
            **values,
        )
    return f"a plain checkpoint of {len(shapes)} tensors, {needed / 1e6:,.1f} MB"
