"""Adapters as a folder for peft: loaded next to the exported base, it is the same function."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import LLM
from runtime.checkpoint.adapter import saved_tensors
from runtime.checkpoint.read import read_checkpoint
from runtime.interop.adapters import CONFIG, WEIGHTS, write_peft
from runtime.posttraining.lora import attach, merged_model, new_adapter
from tests.builders import random_model, tiny_config
from tests.builders_checkpoint import save
from tests.builders_export import CONFIGS, load_theirs, write_folder
from tests.builders_lora import move_adapters
from tests.promises.adapters import ids_before_ties, random_base

PREFIX = "base_model.model.model.layers.1"


def adapted(
    tmp_path: Path, config, new_ids: tuple[int, ...] = (), rank: int = 4, expert_rank: int = 3
) -> tuple[LLM, Path]:
    """Return a model with adapters on a random base, whose export is at base/, and its file."""
    model = random_base(config, 0)
    write_folder(model, tmp_path / "base")
    source = read_checkpoint(save(tmp_path / "ckpt", 1, model, None))
    attach(model, new_adapter(source, config, rank, expert_rank, 8.0, new_ids))
    move_adapters(model)
    return model, save(tmp_path / "run", 1, model, None)


@pytest.mark.parametrize("new_ids", [(), (5, 6, 7)], ids=["", "with rows"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_peft_computes_the_same(tmp_path, config, new_ids):
    """Both ranks, tied and untied, and rows of ids that were there: by PeftModel and transformers.

    peft only warns of keys that it does not find, and then computes the base.
    """
    peft = pytest.importorskip("peft")
    model, path = adapted(tmp_path, config, new_ids)
    write_peft(read_checkpoint(path), tmp_path / "adapter")
    ids = ids_before_ties(model, 0)
    ids[0, : len(new_ids)] = torch.tensor(new_ids, dtype=torch.int64)
    with torch.no_grad():
        ours = model(ids).logits
        base = load_theirs(tmp_path / "base")
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert (before - ours).abs().max() > 0.1
        found = [theirs(ids).logits]
        if not new_ids:
            # transformers' own door knows no rows.
            inside = load_theirs(tmp_path / "base")
            inside.load_adapter(str(tmp_path / "adapter"))
            found.append(inside.eval()(ids).logits)
        found.append(theirs.merge_and_unload()(ids).logits)
    for logits in found:
        assert (logits - ours).abs().max() <= 1e-5 * ours.abs().max().clamp(min=1)


def test_each_expert_has_keys_of_its_own(tmp_path):
    """Gate and up share A; B is split where gate rows end. As transformers 4 and vLLM name them."""
    config = CONFIGS["mixtral"]
    model, path = adapted(tmp_path, config)
    write_peft(read_checkpoint(path), tmp_path / "adapter")
    there, ours = load_file(tmp_path / "adapter" / WEIGHTS), saved_tensors(model)
    part = "layers.1.moe.experts.w"
    for e in range(config.num_experts):
        names = [f"{PREFIX}.block_sparse_moe.experts.{e}.{w}" for w in ("w1", "w3", "w2")]
        a = [there[f"{name}.lora_A.weight"] for name in names]
        b = [there[f"{name}.lora_B.weight"] for name in names]
        assert torch.equal(a[0], a[1]) and torch.equal(a[0], ours[f"{part}_in_lora_A"][e])
        assert torch.equal(torch.cat(b[:2]), ours[f"{part}_in_lora_B"][e])
        assert torch.equal(a[2], ours[f"{part}_out_lora_A"][e])
        assert torch.equal(b[2], ours[f"{part}_out_lora_B"][e])
    assert f"{PREFIX}.self_attn.o_proj.lora_B.weight" in there
    assert len(there) == config.transformer_blocks * 2 * (4 + 3 * config.num_experts)
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert settings["r"] == 3 and settings["lora_alpha"] == 8.0 and not settings["use_rslora"]
    assert settings["rank_pattern"] == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 4)


def test_stacked_adapters_are_what_peft_multiplies(tmp_path):
    """gpt-oss: expert e's delta is B[:, by rank and then e] A[by e and then rank], transposed."""
    config = CONFIGS["gpt_oss"]
    model, path = adapted(tmp_path, config)
    write_peft(read_checkpoint(path), tmp_path / "adapter")
    there = load_file(tmp_path / "adapter" / WEIGHTS)
    whole = merged_model(model).layers[1].moe.experts
    plain, (E, r) = model.layers[1].moe.experts, (config.num_experts, 3)
    for key, name in ((".base_layer", "w_in"), ("", "w_out")):
        a = there[f"{PREFIX}.mlp.experts{key}.lora_A.weight"].view(E, r, -1)
        b = there[f"{PREFIX}.mlp.experts{key}.lora_B.weight"]
        delta = torch.einsum("ore,eri->eoi", b.view(len(b), r, E), a) * 8.0 / r
        if name == "w_in":
            # Gate and up rows in turn.
            delta = torch.cat((delta[:, ::2], delta[:, 1::2]), dim=1)
        expected = getattr(whole, name) - getattr(plain, name)
        assert (delta - expected).abs().max() < 1e-6


def test_what_peft_cannot_load_is_refused(tmp_path):
    """Rows that the base does not have, and a model that no published architecture holds."""
    config = CONFIGS["qwen3_moe"]
    _, path = adapted(tmp_path, config)
    checkpoint = read_checkpoint(path)
    grown = dataclasses.replace(config, vocabulary_size=config.vocabulary_size + 3)
    with pytest.raises(ValueError, match="adds 3 ids.*--out merged.pt.*scripts.export_hf"):
        write_peft(dataclasses.replace(checkpoint, model_config=grown), tmp_path / "adapter")
    model = random_model(tiny_config(head_bias=True))
    source = read_checkpoint(save(tmp_path / "odd", 1, model, None))
    attach(model, new_adapter(source, model.config, 2))
    odd = read_checkpoint(save(tmp_path / "odd_run", 1, model, None))
    with pytest.raises(ValueError, match="no published architecture holds this model"):
        write_peft(odd, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
