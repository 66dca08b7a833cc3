"""Hugging Face formats: transformers' own classes compute the same, both ways.

Names, errors, MXFP4. transformers is the oracle. The weights are checked against the names that
vLLM 0.33 accepts; test_vllm.py runs it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from config_model import PRESETS, ModelConfig, total_parameters
from model import LLM, generate
from runtime.inference.scorer import Scorer
from runtime.interop.export import lazy_model, logits_of
from runtime.interop.huggingface import (
    FAMILIES,
    INDEX,
    dequantise_mxfp4,
    export_tensors,
    family_of,
    folder_tensors,
    hf_config,
    import_tensor,
    model_config_from,
)
from tests.builders import random_model, tiny_config
from tests.builders_export import CONFIGS, GPT_OSS_SMALL, load_theirs, some_ids, write_folder
from tests.numeric import (
    assert_close,
    before_ties,
    gradients_bound,
    logits_bound,
    rounding,
    size_of,
)

ANY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
ONE_EACH = pytest.mark.parametrize(
    "config", [CONFIGS[family] for family in FAMILIES], ids=FAMILIES.keys()
)


def read_folder(folder: Path) -> LLM:
    family, config = model_config_from(json.loads((folder / "config.json").read_text()))
    has, read, _ = folder_tensors(folder)
    return lazy_model(config, lambda name: import_tensor(config, family, name, has, read).float())


def random_theirs(hf: dict):
    """A model that transformers makes from a config.json, with weights large enough to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), attn_implementation="eager")
        .float()
        .eval()
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return theirs


# --------------------------------------------------------------------------------------- the oracle
@ANY
def test_transformers_computes_the_same_from_an_export(config, tmp_path):
    """Logits, every parameter's gradient, the same greedy text; no key is missing or left over."""
    model = random_model(config)
    with torch.no_grad():
        for p in model.parameters():
            # Larger weights make gradients, and the errors in them, grow from block to block.
            p.mul_(0.7)
    write_folder(model, tmp_path)
    theirs, ids_BT = load_theirs(tmp_path), some_ids(config)
    family, targets_BT = family_of(config), ids_BT.roll(-1, 1)
    logits = theirs(ids_BT).logits
    T = config.context_length
    assert before_ties(model, ids_BT).all(), (
        "another seed: a router may choose either of two experts"
    )
    assert_close(model(ids_BT).logits, logits, logits_bound(config, T))
    F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten()).backward()
    out = model(ids_BT, targets_BT)
    (out.cross_entropy_sum / out.num_targets).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        grad = import_tensor(config, family, name, grads.__contains__, grads.__getitem__)
        assert_close(p.grad, grad, gradients_bound(config, T, rows=len(ids_BT)), name)
    theirs.generation_config.eos_token_id = None
    prompt_BT = ids_BT[:1, :5]
    text = theirs.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=24
    )[0, 5:]
    assert text.tolist() == [int(i) for i in generate(model, prompt_BT, 24, temperature=0)]


@ONE_EACH
def test_transformers_gives_the_scores_that_evaluation_gives(config, tmp_path):
    """Log-probabilities of each next token, by the scorer here and by theirs from the export."""
    model = random_model(config)
    with torch.no_grad():
        for p in model.parameters():
            # With larger weights an early near tie of a router leaves little to compare.
            p.mul_(0.7)
    write_folder(model, tmp_path)
    ids_BT = some_ids(config)
    sure_BT = before_ties(model, ids_BT)[:, :-1]
    assert sure_BT.float().mean() > 0.5
    with torch.no_grad():
        logits_BTV = load_theirs(tmp_path)(ids_BT).logits[:, :-1].double()
    log_probs_BTV, targets_BT = logits_BTV.log_softmax(dim=2), ids_BT[:, 1:]
    expected_BT = log_probs_BTV.gather(2, targets_BT[..., None])[..., 0]
    scores = list(Scorer(model).scores(ids_BT.tolist()))
    actual_BT = torch.tensor(np.stack([one.log_probs_T for one in scores]))
    # A logit is off, and so is the logarithm of their sum.
    bound = 2 * logits_bound(config, ids_BT.shape[1])
    assert_close(actual_BT[sure_BT], expected_BT[sure_BT], bound, size=size_of(logits_BTV))


@ANY
@pytest.mark.parametrize("layout", ["5", "5 in memory", "4"])
def test_what_transformers_saved_computes_the_same_here(config, layout, tmp_path):
    """Folders as transformers 5 saves them, and with the spellings of transformers 4.

    Also with the stacked experts and names that transformers 5 has in memory.
    """
    family = family_of(config)
    theirs = random_theirs(hf_config(config, family, end_of_text_id=0, start_id=0, dtype="float32"))
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / INDEX).exists()
    hf = json.loads((tmp_path / "config.json").read_text())
    if layout == "5 in memory":
        (tmp_path / INDEX).unlink()
        tied = {"lm_head.weight"} if config.tie_embeddings else set()
        save_file(
            {
                name: tensor.contiguous()
                for name, tensor in theirs.state_dict().items()
                if name not in tied
            },
            tmp_path / "model.safetensors",
        )
    if layout == "4":
        rope = hf.pop("rope_parameters")
        hf |= {
            "rope_theta": rope.pop("rope_theta"),
            "rope_scaling": None
            if rope["rope_type"] == "default"
            else {"type": rope.pop("rope_type"), **rope},
        }
        hf["torch_dtype"] = hf.pop("dtype")
        if family == "qwen3_moe":
            hf["num_experts"] = hf.pop("num_local_experts", config.num_experts)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ids_BT, ours = some_ids(config), read_folder(tmp_path)
    assert dataclasses.replace(ours.config, head_dim=config.head_dim) == config
    with torch.no_grad():
        expected = theirs(ids_BT).logits
    sure = before_ties(ours, ids_BT)
    assert_close(
        logits_of(ours, ids_BT)[sure], expected[sure], logits_bound(config, ids_BT.shape[1])
    )


@ANY
def test_a_round_trip_changes_no_bit(config, tmp_path):
    """Ours -> files -> ours, and to the same files again."""
    model, again = random_model(config), tmp_path / "again"
    tensors = write_folder(model, tmp_path)
    has, read, names = folder_tensors(tmp_path)
    assert sorted(names) == sorted(tensors)
    family, config_read = model_config_from(json.loads((tmp_path / "config.json").read_text()))
    back = {
        name: import_tensor(config_read, family, name, has, read) for name in model.state_dict()
    }
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    copy = LLM(config_read)
    copy.load_state_dict(back)
    write_folder(copy, again)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


def test_reading_is_lazy():
    """Naming a tensor asks for that tensor alone: memory is one tensor, not one model."""
    config, asked = CONFIGS["mixtral"], []
    tensors = dict(export_tensors(config, "mixtral", random_model(config).state_dict()))

    def read(name):
        asked.append(name)
        return tensors[name]

    import_tensor(config, "mixtral", "layers.1.moe.experts.w_out", tensors.__contains__, read)
    assert asked == [
        f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(config.num_experts)
    ]
    exported = export_tensors(
        config, "mixtral", {"embed.weight": torch.ones(2), "norm.weight": None}
    )
    # And the None after it was not touched.
    assert next(exported)[0] == "model.embed_tokens.weight"


@ONE_EACH
def test_balance_loss_is_the_same_at_balance(config):
    """Theirs counts all blocks as one and sums to top_k, ours is 1.0 per block.

    An unscaled coefficient would weigh 3 blocks' loss by 4/3.
    """
    config = dataclasses.replace(config, aux_loss_coef=0.03)
    model, hf = (
        random_model(config),
        hf_config(config, family_of(config), end_of_text_id=0, start_id=0, dtype="float32"),
    )
    theirs = random_theirs(hf)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *theirs.named_parameters()]:
            if re.search(r"mlp\.(gate|router)\.|moe\.router\.", name):
                # Every expert equally likely.
                p.zero_()
    out = theirs(some_ids(config), output_router_logits=True)
    ids_BT = some_ids(config)
    expected = theirs.router_aux_loss_coef * out.aux_loss
    assert_close(
        model(ids_BT).aux_loss,
        expected,
        rounding(torch.float32, config.num_experts, ids_BT.numel()),
    )


# ------------------------------------------------------------------------------------------ configs
# mistralai/Mixtral-8x7B-v0.1
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
# Qwen/Qwen3-30B-A3B
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# openai/gpt-oss-20b
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


@pytest.mark.parametrize(
    "hf, family, billions",
    [
        (MIXTRAL_8X7B, "mixtral", 46.7),
        (QWEN3_30B, "qwen3_moe", 30.5),
        (GPT_OSS_20B, "gpt_oss", 20.9),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_configs_are_understood(hf, family, billions):
    """The three published models have the right family, size and context.

    Every tensor of ours has a name there.
    """
    found, config = model_config_from(hf)
    assert (
        found == family
        and round(total_parameters(config) / 1e9, 1) == billions
        and config.context_length == hf["max_position_embeddings"]
    )
    again = hf_config(
        config,
        family,
        end_of_text_id=hf["eos_token_id"],
        start_id=hf.get("bos_token_id"),
        dtype="bfloat16",
    )
    for key in hf.keys() & again.keys() - {
        "rope_scaling",
        "intermediate_size",
        "transformers_version",
    }:
        assert again[key] == hf[key], key
    assert model_config_from(json.loads(json.dumps(again))) == (
        family,
        dataclasses.replace(config, head_dim=config.attention_head_dim),
    )


def test_the_preset_is_the_published_gpt_oss():
    _, published = model_config_from(GPT_OSS_20B)
    training_only = dict(aux_loss_coef=published.aux_loss_coef)
    assert ModelConfig(**PRESETS["gpt-oss-20b"].model | training_only) == published


@ANY
@pytest.mark.parametrize("coefficient", [0.0, 0.01, 0.003, 0.0123456789])
def test_configs_come_back_the_same(config, coefficient):
    """config.json -> ours is the inverse of ours -> config.json.

    The balance loss's coefficient is multiplied and divided by numbers such as 3/4.
    """
    config = dataclasses.replace(config, aux_loss_coef=coefficient, init_std=0.03)
    hf = json.loads(
        json.dumps(
            hf_config(config, family_of(config), end_of_text_id=5, start_id=None, dtype="bfloat16")
        )
    )
    assert model_config_from(hf) == (family_of(config), config)
    assert (
        hf["eos_token_id"] == 5
        and hf["bos_token_id"] is None
        and hf["dtype"] == hf["torch_dtype"] == "bfloat16"
    )


@ANY
def test_both_spellings_say_the_same(config):
    """transformers 4 reads neither rope_parameters nor num_local_experts of Qwen3-MoE.

    It silently took 128 experts, or another model's wavelengths.
    """
    hf = hf_config(config, family_of(config), end_of_text_id=0, start_id=0, dtype="float32")
    old, new = (
        {key: value for key, value in hf.items() if key not in names}
        for names in (
            ("rope_parameters", "num_local_experts", "dtype"),
            ("rope_theta", "rope_scaling", "num_experts", "torch_dtype"),
        )
    )
    assert model_config_from(old) == model_config_from(new) == (family_of(config), config)


def test_padding_in_the_config_is_an_id_of_no_text():
    """transformers makes the embedding of config.json's pad id untrainable.

    As end-of-text, which every document begins with, it must not be there.
    """

    def settings(pad_id: int | None) -> dict:
        ids = dict(end_of_text_id=7, start_id=5, pad_id=pad_id)
        return hf_config(CONFIGS["qwen3_moe"], "qwen3_moe", dtype="float32", **ids)

    assert settings(3)["pad_token_id"] == 3
    for pad_id in (None, 7, 5):
        assert "pad_token_id" not in settings(pad_id)


YARN = GPT_OSS_20B["rope_scaling"]
REFUSED = [
    (
        MIXTRAL_8X7B,
        {"model_type": "llama"},
        "model_type must be one of mixtral, qwen3_moe, gpt_oss, not 'llama'",
    ),
    (MIXTRAL_8X7B, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (MIXTRAL_8X7B, {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    (MIXTRAL_8X7B, {"router_jitter_noise": 0.01}, "router_jitter_noise 0.01"),
    (MIXTRAL_8X7B, {"attention_bias": True}, "attention_bias True"),
    (MIXTRAL_8X7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (MIXTRAL_8X7B, {"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
    (MIXTRAL_8X7B, {"quantization_config": {"quant_method": "mxfp4"}}, "quantised by mxfp4"),
    (MIXTRAL_8X7B, {"quantization_config": "gptq"}, "quantization_config must be a table"),
    (
        MIXTRAL_8X7B,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type must be one of default, linear, yarn, not 'dynamic'",
    ),
    (MIXTRAL_8X7B, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "not 'llama3'"),
    (MIXTRAL_8X7B, {"rope_scaling": {"rope_type": "linear"}}, "factor must be a number"),
    (MIXTRAL_8X7B, {"rope_scaling": "yarn"}, "rope_scaling must be a table"),
    (MIXTRAL_8X7B, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    (MIXTRAL_8X7B, {"rope_theta": None}, "rope_theta must be a number"),
    (MIXTRAL_8X7B, {"hidden_size": "4096"}, "hidden_size must be a number, not '4096'"),
    (MIXTRAL_8X7B, {"hidden_size": 0}, "d_model must be at least 1"),
    (MIXTRAL_8X7B, {"num_hidden_layers": 0}, "transformer_blocks must be at least 1"),
    (MIXTRAL_8X7B, {"num_hidden_layers": 10**12}, "transformer_blocks must be at most"),
    (MIXTRAL_8X7B, {"rms_norm_eps": math.nan}, "rms_norm_eps must be a number"),
    (MIXTRAL_8X7B, {"router_aux_loss_coef": "big"}, "router_aux_loss_coef must be a number"),
    (MIXTRAL_8X7B, {"num_experts": 7}, "num_local_experts and num_experts differ"),
    (QWEN3_30B, {"norm_topk_prob": False}, "norm_topk_prob must be true"),
    (
        QWEN3_30B,
        {"norm_topk_prob": None},
        "norm_topk_prob must be true",
        # Absent is false in their class.
    ),
    (QWEN3_30B, {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
    (QWEN3_30B, {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    (QWEN3_30B, {"attention_bias": True}, "attention_bias True"),
    (GPT_OSS_20B, {"attention_bias": False}, "attention_bias False"),
    (GPT_OSS_20B, {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
    (GPT_OSS_20B, {"swiglu_alpha": 1.0}, "swiglu_alpha 1.0"),
    (GPT_OSS_20B, {"layer_types": ["full_attention"] * 24}, "layer_types"),
    (GPT_OSS_20B, {"rms_norm_eps": 1e-6}, "rms_norm_eps"),
    (GPT_OSS_20B, {"sliding_window": None}, "window_pattern"),
    (GPT_OSS_20B, {"rope_scaling": None}, "rope_scaling"),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"beta_fast": 16.0}}, "beta_fast 16.0"),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"beta_slow": 2.0}}, "beta_slow 2.0"),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor 1.0"),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale 0.7"),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"factor": 1.0001}}, "whole number"),
    (
        MIXTRAL_8X7B,
        {"rope_parameters": {"rope_theta": 5.0}},
        "rope_theta is there twice, as 5.0 and as 1000000.0",
    ),
    (
        GPT_OSS_20B,
        {"rope_parameters": YARN | {"factor": 2.0}},
        "factor is there twice, as 2.0 and as 32.0",
    ),
    (GPT_OSS_20B, {"experts_per_token": 5}, "num_experts_per_tok and experts_per_token differ"),
]
# Each of these was a traceback (TypeError, OverflowError, StopIteration), or is the like of one
# that was.
HOSTILE = [
    (MIXTRAL_8X7B, {"model_type": []}, "model_type must be one of"),
    (
        MIXTRAL_8X7B,
        {"num_experts_per_tok": 10**400},
        "num_experts_per_tok or experts_per_token must be a number, not 1000",
    ),
    (
        MIXTRAL_8X7B,
        {"router_aux_loss_coef": 1e308, "num_experts_per_tok": 8, "num_hidden_layers": 1},
        "router_aux_loss_coef must be a number, not 1e+308",
    ),
    (MIXTRAL_8X7B, {"router_aux_loss_coef": math.inf}, "router_aux_loss_coef must be a number"),
    (
        MIXTRAL_8X7B,
        {"max_position_embeddings": 10**400},
        "max_position_embeddings must be a number",
    ),
    (MIXTRAL_8X7B, {"head_dim": [1]}, "head_dim must be a number, not [1]"),
    (MIXTRAL_8X7B, {"sliding_window": "a"}, "sliding_window must be a number, not 'a'"),
    (MIXTRAL_8X7B, {"initializer_range": {}}, "initializer_range must be a number"),
    (
        MIXTRAL_8X7B,
        {"rope_scaling": {"rope_type": "linear", "factor": 1e-320}},
        "rope_scaling_factor must be at least 1.0",
    ),
    (
        MIXTRAL_8X7B,
        {"rope_scaling": {"rope_type": "linear", "factor": 1e308}},
        "factor must be a number",
    ),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"factor": 1e-320}}, "whole number"),
    (GPT_OSS_20B, {"rope_scaling": YARN | {"factor": 1e308}}, "factor must be a number"),
    *(
        (
            GPT_OSS_20B,
            {"rope_scaling": YARN | {"original_max_position_embeddings": value}},
            "original_max_position_embeddings must be a number",
        )
        for value in ("a", [1], 10**400, math.nan, -1)
    ),
]


@pytest.mark.parametrize(
    "hf, changes, message", REFUSED + HOSTILE, ids=[message for _, _, message in REFUSED + HOSTILE]
)
def test_what_our_model_cannot_be_is_refused_by_name(hf, changes, message):
    """An error is one line, whatever the value.

    A list as model_type, or a number of 400 digits, ended in a traceback.
    """
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        model_config_from(hf | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"sliding_window": 4096}, dict(sliding_window=4096, window_pattern="all")),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            dict(rope_scaling="linear", rope_scaling_factor=4.0, context_length=32768),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            dict(rope_scaling="yarn", rope_scaling_factor=4.0, context_length=131072),
            # Extends the trained one.
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 256 / 161,
                    "original_max_position_embeddings": 161,
                }
            },
            dict(context_length=256),
            # 161 * (256 / 161) < 256.
        ),
        (
            {"router_aux_loss_coef": 5e-324},
            dict(aux_loss_coef=0.0),
            # No digits tell it: a StopIteration.
        ),
        (
            {"head_dim": None, "initializer_range": None, "router_aux_loss_coef": None},
            dict(head_dim=0, init_std=0.02, aux_loss_coef=6.25e-5),
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            dict(rope_theta=7.0),
        ),
        ({"tie_word_embeddings": True, "router_jitter_noise": 0.0}, dict(tie_embeddings=True)),
    ],
    ids=str,
)
def test_what_our_model_can_be_is_taken(changes, expected):
    _, config = model_config_from(MIXTRAL_8X7B | changes)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_window_that_is_switched_off_is_none():
    assert model_config_from(QWEN3_30B | {"sliding_window": 4096})[1].sliding_window == 0
    assert (
        model_config_from(QWEN3_30B | {"sliding_window": 4096, "use_sliding_window": True})[
            1
        ].sliding_window
        == 4096
    )


# ----------------------------------------------------------------------------------------- families
def test_families_of_the_presets():
    families = {}
    for name, preset in PRESETS.items():
        try:
            families[name] = family_of(ModelConfig(**preset.model))
        except ValueError:
            families[name] = None
    assert families == {
        "gptoss": None,
        "gptoss-modern": "qwen3_moe",
        "modern-24gb": "qwen3_moe",
        "modern-8gb": "qwen3_moe",
        "nano": "qwen3_moe",
        "plain-nano": "qwen3_moe",
        "gpt-oss-20b": "gpt_oss",
        "gpt-oss-nano": "gpt_oss",
    }


def test_all_options_in_the_way_are_named():
    with pytest.raises(ValueError, match="--custom_code") as error:
        family_of(ModelConfig())
    named = re.findall(r"(\w+) \S+ \(must be", str(error.value))
    assert named == [
        "use_attention_bias",
        "head_bias",
        "out_proj_bias",
        "expert_activation",
        "expert_bias",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        dict(use_rope=False),
        dict(use_attention_bias=True),
        dict(head_bias=True),
        dict(router_bias_rate=1e-3),
        dict(qkv_bias=True),
        dict(out_proj_bias=True),
        dict(attention_sinks=True),
        dict(expert_activation="gelu"),
        dict(expert_activation="swiglu_clamped"),
        dict(expert_bias=True),
        dict(router_bias=True),
        dict(window_pattern="alternating", sliding_window=4),
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_one_option_in_the_way(changes, qk_norm):
    with pytest.raises(
        ValueError,
        match=(
            f"in the way of the nearest, {'qwen3_moe' if qk_norm else 'mixtral'}: "
            f"{next(iter(changes))} [^,]*$"
        ),
    ):
        family_of(tiny_config(qk_norm=qk_norm, **changes))


def test_other_options_in_the_way_of_gpt_oss():
    for changes in (
        dict(rms_norm_eps=1e-6),
        dict(qk_norm=True),
        dict(window_pattern="all"),
        dict(router_bias=False),
        dict(attention_sinks=False),
    ):
        with pytest.raises(ValueError, match=f"nearest, gpt_oss: {next(iter(changes))} [^,]*$"):
            family_of(ModelConfig(**GPT_OSS_SMALL | changes))
    with pytest.raises(ValueError, match="rope_scaling_factor 5.0 .must divide context_length 32"):
        family_of(ModelConfig(**GPT_OSS_SMALL | dict(rope_scaling_factor=5.0)))


def test_training_only_options_are_never_in_the_way():
    assert (
        family_of(
            tiny_config(dropout=0.1, capacity_factor=1.25, z_loss_coef=1e-3, aux_loss_coef=0.0)
        )
        == "qwen3_moe"
    )


# -------------------------------------------------------------------------------------------- MXFP4
def mxfp4(folder: Path, config: ModelConfig) -> dict:
    """A gpt-oss folder with MXFP4 experts, as published, of random bytes; returns its tensors."""
    tensors = write_folder(
        random_model(config), folder, quantization_config={"quant_method": "mxfp4"}
    )
    for name, (E, I, O) in {
        name: tensor.shape
        for name, tensor in tensors.items()
        if name.endswith("_proj") and "experts" in name
    }.items():
        del tensors[name]
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (E, O, I // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 128, (E, O, I // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def test_mxfp4_numbers():
    """Low four bits first; sign, two exponent bits, one mantissa bit; a scale byte of 127 is 1."""
    blocks, scales = (
        torch.zeros(1, 2, 1, 16, dtype=torch.uint8),
        torch.tensor([[[127], [130]]], dtype=torch.uint8),
    )
    blocks[0, :, 0, :4] = torch.tensor([0x21, 0x43, 0x65, 0xF7], dtype=torch.uint8)
    first, second = dequantise_mxfp4(blocks, scales)[0, :, :9]
    assert first.tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -6.0, 0.0] and second.tolist() == [
        8 * x for x in first.tolist()
    ]
    extremes = dequantise_mxfp4(
        torch.full((1, 2, 1, 16), 0x17, dtype=torch.uint8),
        torch.tensor([[[0], [254]]], dtype=torch.uint8),
    )[0, :, :2]
    assert extremes[:, 1].tolist() == [2.0**-128, 2.0**126] and extremes[0, 0] == 6 * 2.0**-127


def test_mxfp4_is_what_transformers_makes_of_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = (
        torch.randint(low, high, shape, dtype=torch.uint8)
        for low, high, shape in ((0, 256, (2, 6, 3, 16)), (100, 150, (2, 6, 3)))
    )
    assert torch.equal(
        dequantise_mxfp4(blocks, scales).transpose(1, 2),
        convert_moe_packed_tensors(blocks, scales, dtype=torch.float32),
    )


def test_published_gpt_oss_files_are_read(tmp_path):
    """MXFP4 experts become ours.

    The logits equal transformers' with experts that it dequantises itself.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = ModelConfig(**GPT_OSS_SMALL | dict(d_model=64, d_ff=32))
    tensors = mxfp4(tmp_path, config)
    theirs = random_theirs(
        hf_config(config, "gpt_oss", end_of_text_id=0, start_id=0, dtype="float32")
    )
    plain = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(("_blocks", "_scales"))
    }
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        plain[name] = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        )
    theirs.load_state_dict(plain)
    ids_BT = some_ids(config)
    with torch.no_grad():
        expected = theirs(ids_BT).logits
    ours = read_folder(tmp_path)
    sure = before_ties(ours, ids_BT)
    assert_close(
        logits_of(ours, ids_BT)[sure], expected[sure], logits_bound(config, ids_BT.shape[1])
    )


# ------------------------------------------------------------------------------- folders gone wrong
def test_a_tensor_that_is_missing_or_wrong_is_named(tmp_path):
    config = CONFIGS["mixtral"]
    tensors = write_folder(random_model(config), tmp_path)
    expert, other = (
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.layers.0.self_attn.k_proj.weight",
    )
    for name, ours in (
        (expert, "layers.1.moe.experts.w_in"),
        (other, "layers.0.attention.W_k.weight"),
    ):
        for wrong, message in (
            (None, f"tensor {name} is missing"),
            (tensors[name][:1], rf"tensor {name} is torch.float32 \[1, 32\]"),
            (tensors[name].to(torch.int8), f"tensor {name} is torch.int8"),
        ):
            changed = {k: v for k, v in (tensors | {name: wrong}).items() if v is not None}
            with pytest.raises(ValueError, match=message):
                import_tensor(config, "mixtral", ours, changed.__contains__, changed.__getitem__)


def split(folder: Path) -> dict:
    """Split a folder's tensors into two shards with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: ("a.safetensors", "b.safetensors")[i % 2] for i, name in enumerate(tensors)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file(
            {name: tensor for name, tensor in tensors.items() if weight_map[name] == file},
            folder / file,
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_two_sets_of_weights_are_refused(tmp_path):
    """A folder has shards and an older model.safetensors: transformers takes the latter.

    We took the former: another model, silently.
    """
    model = random_model(CONFIGS["qwen3_moe"])
    write_folder(model, tmp_path)
    single = (tmp_path / "model.safetensors").read_bytes()
    split(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(single)
    with pytest.raises(
        ValueError, match="has model.safetensors and an index that names other files"
    ):
        folder_tensors(tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    # This one means the same set.
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert sorted(folder_tensors(tmp_path)[2]) == sorted(names)


def test_folders_that_cannot_be_read(tmp_path):
    """One line that names the file: nothing there, a bad index, a damaged or missing shard."""
    with pytest.raises(ValueError, match="only models stored as safetensors"):
        folder_tensors(tmp_path)
    model = random_model(CONFIGS["qwen3_moe"])
    write_folder(model, tmp_path)
    weight_map = split(tmp_path)
    assert torch.equal(
        logits_of(read_folder(tmp_path), some_ids(model.config)),
        logits_of(model, some_ids(model.config)),
    )

    for index in ("[]", "{", '{"weight_map": ["a"]}', '{"weight_map": {"x": 3}}', "{}"):
        (tmp_path / INDEX).write_text(index)
        with pytest.raises(ValueError, match="is no index of safetensors"):
            folder_tensors(tmp_path)
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": weight_map | {"model.extra": "b.safetensors"}})
    )
    with pytest.raises(ValueError, match="b.safetensors lacks tensor model.extra"):
        folder_tensors(tmp_path)
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": weight_map | {"model.extra": "../../etc/c.safetensors"}})
    )
    with pytest.raises(ValueError, match="lacks c.safetensors"):
        folder_tensors(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match="b.safetensors is damaged"):
        folder_tensors(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks b.safetensors"):
        folder_tensors(tmp_path)


# --------------------------------------------------------------------------------------------- vLLM
# What vLLM 0.33's loaders turn into its parameters
# (model_executor/models/{mixtral,qwen3_moe,gpt_oss}.py and their WeightsMappers).
VLLM = {
    "mixtral": [
        "block_sparse_moe.gate.weight",
        r"block_sparse_moe.experts.\d+.w1.weight",
        r"block_sparse_moe.experts.\d+.w2.weight",
        r"block_sparse_moe.experts.\d+.w3.weight",
    ],
    "qwen3_moe": [
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "mlp.gate.weight",
        r"mlp.experts.\d+.gate_proj.weight",
        r"mlp.experts.\d+.up_proj.weight",
        r"mlp.experts.\d+.down_proj.weight",
    ],
    "gpt_oss": [
        "self_attn.sinks",
        "mlp.router.weight",
        "mlp.router.bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.gate_up_proj_bias",
        "mlp.experts.down_proj",
        "mlp.experts.down_proj_bias",
        *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    ],
}
VLLM_ALL = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
]


@ANY
def test_names_are_those_that_vllm_accepts(config):
    """Every exported name is one of vLLM's, and every one of vLLM's is exported."""
    family = family_of(config)
    inside = [rf"model.layers.\d+.{name}" for name in VLLM[family] + VLLM_ALL]
    # Its Mixtral and Qwen3-MoE tie the head; its gpt-oss does not, and rejects a file without one.
    outside = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(["lm_head.weight"] if family == "gpt_oss" or not config.tie_embeddings else []),
    ]
    names = [name for name, _ in export_tensors(config, family, random_model(config).state_dict())]
    for name in names:
        assert any(re.fullmatch(pattern, name) for pattern in inside + outside), name
    for pattern in inside + outside:
        count = sum(bool(re.fullmatch(pattern, name)) for name in names)
        blocks = config.transformer_blocks if pattern in inside else 1
        assert count == blocks * (config.num_experts if r"experts.\d" in pattern else 1), pattern


def test_what_vllm_reads_of_the_config():
    """Its gpt-oss reads YaRN's numbers from rope_parameters without checking that they exist.

    1e-5 is built in as the norms' epsilon.
    """
    config = CONFIGS["gpt_oss"]
    hf = hf_config(config, "gpt_oss", end_of_text_id=0, start_id=0, dtype="float32")
    assert hf["rope_parameters"].keys() >= {
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
    }
    assert hf["rms_norm_eps"] == 1e-5 and hf["sliding_window"] == 5 and hf["num_local_experts"] == 6
    qwen = hf_config(
        CONFIGS["qwen3_moe"], "qwen3_moe", end_of_text_id=0, start_id=0, dtype="float32"
    )
    assert (
        qwen["num_experts"] == 4
        and qwen["norm_topk_prob"] is True
        and qwen["rope_parameters"]["rope_theta"] == 10_000.0
    )


def test_what_was_exported_with_custom_code_is_refused_by_that_name():
    with pytest.raises(ValueError, match="was written with --custom_code, which is not imported"):
        model_config_from({"model_type": "gptoss"})
