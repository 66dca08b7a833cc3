"""runtime/interop/custom_code.py: any config of ours in transformers, by a self-contained file."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import config_model
import model as our_model
import model_parts
from config_model import PRESETS, ModelConfig
from model import LLM, generate
from runtime.interop.custom_code import (
    MODELING_FILE,
    custom_config,
    custom_tensors,
    modeling_source,
)
from runtime.interop.export import Source
from runtime.kernels.grouped_linear import grouped_linear
from runtime.kernels.linear_cross_entropy import IGNORE
from tests.builders import random_config, random_model, tiny_config
from tests.conftest import REPO
from tests.numeric import assert_close, before_ties, gradients_bound, logits_bound


def export(folder: Path, model: LLM, dtype: str = "float32") -> Path:
    """What export_hf writes with --custom_code, tokenizer aside."""
    folder.mkdir()
    (folder / MODELING_FILE).write_text(modeling_source(), encoding="utf-8")
    source = Source(
        folder,
        model,
        None,
        SimpleNamespace(start_id=1, end_of_text_id=1, eos_id=1, undecodable_ids=[0]),
    )
    (folder / "config.json").write_text(json.dumps(custom_config(source, dtype)), encoding="utf-8")
    parameters = {f"model.{name}" for name, _ in model.named_parameters()}
    tensors = {
        name: tensor.to(getattr(torch, dtype)) if name in parameters else tensor
        for name, tensor in custom_tensors(model.state_dict())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ids_for(config: ModelConfig, T: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        config.vocabulary_size, (2, T), generator=torch.Generator().manual_seed(seed)
    )


def import_copy(path: Path, name: str):
    """The modeling file at `path` as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modeling(tmp_path_factory):
    path = tmp_path_factory.mktemp("modeling") / "modeling_gptoss.py"
    path.write_text(modeling_source(), encoding="utf-8")
    return import_copy(path, "exported_modeling_gptoss")


@pytest.fixture
def exported(tmp_path, modeling):
    """(our model, the same model in transformers) of a config."""

    def make(config: ModelConfig, **kwargs):
        model = random_model(config).eval()
        folder = export(tmp_path / f"model{len(list(tmp_path.iterdir()))}", model)
        return model, modeling.GptossForCausalLM.from_pretrained(folder, **kwargs)

    return make


def configs_with(count: int, wanted, **changes) -> list[ModelConfig]:
    """The first `count` random configs that are as wanted."""
    found = (dataclasses.replace(random_config(seed), **changes) for seed in range(200))
    return [config for config in found if wanted(config)][:count]


# ------------------------------------------------------------------------------ where gptoss is not
ALONE = """
import importlib.util, sys
ours = "model", "model_parts", "config_model", "runtime"
assert not any(importlib.util.find_spec(name) for name in ours)
import torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM

def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)

work, repo, results = Path(sys.argv[1]), sys.argv[2], {}
folders = sorted(work.glob("model*"))
models = [load(folder) for folder in folders]
for folder, model in zip(folders, models):
    ids = torch.load(folder / "ids.pt")
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    results[folder.name] = logits, tokens[:, ids.shape[1]:]

models[0].save_pretrained(work / "again")
AutoConfig.from_pretrained(work / "again", trust_remote_code=True)
ids = torch.load(folders[0] / "ids.pt")
with torch.no_grad():
    results["again"] = load(work / "again")(ids).logits, None

# gptoss itself, imported after all those copies of its operations: each still finds its own
sys.path.insert(0, repo)
from config_model import ModelConfig
from model import LLM
for model in (LLM(ModelConfig(**models[0].config.gptoss)), *models):
    ours = isinstance(model, LLM)
    size = model.config.vocabulary_size if ours else model.config.vocab_size
    result = model(ids.clamp(max=size - 1))
    result.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
torch.save(results, work / "results.pt")
"""


@pytest.mark.nightly
@pytest.mark.slow
def test_a_folder_works_where_gptoss_is_not(tmp_path):
    """Compare logits and greedy text of many configs, through the Auto classes, without this repo.

    The process cannot import the repo; models are saved and loaded again. Then the repo is imported
    there, next to a copy of its operations for each folder. Under one name, the last imported copy
    would replace the others' operations.
    """
    seeds = {f"model{seed:02}": random_config(seed) for seed in range(10)}
    nano = ModelConfig(
        **PRESETS["gpt-oss-nano"].model
        | dict(context_length=64, vocabulary_size=300, transformer_blocks=2, sliding_window=5)
    )
    others = {"model98": nano, "model99": tiny_config(tie_embeddings=True)}
    expected, sure_of = {}, {}
    for name, config in (seeds | others).items():
        model = random_model(config).eval()
        ids = ids_for(config)
        torch.save(ids, export(tmp_path / name, model) / "ids.pt")
        with torch.no_grad():
            expected[name] = (
                model(ids).logits,
                torch.stack(list(generate(model, ids, 6, temperature=0)), dim=1),
            )
            sure_of[name] = before_ties(model, torch.cat((ids, expected[name][1]), dim=1))
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    run = subprocess.run(
        [sys.executable, "-I", script, tmp_path, REPO],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment
        | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, (logits, tokens) in expected.items():
        config = (seeds | others)[name]
        sure = sure_of[name][:, : logits.shape[1]]
        assert_close(
            results[name][0][sure], logits[sure], logits_bound(config, logits.shape[1]), name
        )
        assert not sure_of[name].all() or torch.equal(results[name][1], tokens), name
    assert sum(sure.all() for sure in sure_of.values()) >= 10  # of 12
    assert torch.equal(results["again"][0], results["model00"][0])


def test_copies_imported_after_gptoss_leave_its_operations_alone(tmp_path, modeling):
    """PyTorch lets a second registration of an operation's name replace the first.

    A model in use would then fail, or run the other's code.
    """
    config = tiny_config()
    ours, ids = random_model(config), ids_for(config)
    ours(ids).logits.sum().backward()
    (tmp_path / "copy.py").write_text(modeling_source())
    second = import_copy(tmp_path / "copy.py", "exported_copy")
    names = {
        f"gptoss::{grouped_linear._name}",
        *(f"{module.OPERATIONS}::{module.grouped_linear._name}" for module in (modeling, second)),
    }
    assert len(names) == 3
    expected = [parameter.grad.clone() for parameter in ours.parameters()]
    for classes in (modeling, second, our_model):
        model = classes.LLM(classes.ModelConfig(**dataclasses.asdict(config)))
        model.load_state_dict(ours.state_dict())
        model(ids).logits.sum().backward()
        assert all(
            torch.equal(parameter.grad, grad)
            for parameter, grad in zip(model.parameters(), expected, strict=True)
        )


def test_the_mathematics_is_the_repos_own():
    """Every function and class of the model is in the modeling file word for word.

    What only training or the programs need is not.
    """
    text = modeling_source().replace('f"{OPERATIONS}::', '"gptoss::')
    for part in (
        config_model.ModelConfig,
        model_parts.rope_tables_at,
        model_parts.Attention,
        model_parts.Router,
        model_parts.Experts,
        model_parts.LocalDispatcher,
        model_parts.MoE,
        model_parts.Block,
        our_model.Head,
        our_model.LLM,
    ):
        assert inspect.getsource(part) in text, part
    assert "grouped_linear.register_autograd(" in text and text.count(".register_fake") == 2
    assert (
        not {"TrainConfig(", "PRESETS", "total_parameters", "def generate", "def sample"}
        & set(text.split())
        and "def sample" not in text
    )
    assert (
        "from model" not in text
        and "from config_model" not in text
        and "import runtime" not in text
        and '"gptoss::' not in modeling_source()
    )
    assert (REPO / "LICENSE").read_text().strip() in text


# --------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize(
    "config",
    configs_with(6, lambda c: c.sliding_window and not c.use_attention_bias, context_length=24),
)
def test_the_cache_is_transformers_own(exported, config):
    """A text in pieces gives the logits of the whole, through attention windows too.

    Beam search, which reorders the cache, gives what it gives without one.
    """
    ours, theirs = exported(config)
    ids = ids_for(config, 12)
    with torch.no_grad():
        whole, cache, pieces = ours(ids).logits, None, []
        for piece in ids.split([5, 1, 4, 1, 1], dim=1):
            result = theirs(piece, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            pieces.append(result.logits)
    assert type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 12
    assert_close(torch.cat(pieces, dim=1), whole, logits_bound(config, 12))
    settings = dict(
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(
        theirs.generate(ids, **settings), theirs.generate(ids, use_cache=False, **settings)
    )


@pytest.mark.parametrize(
    "config", configs_with(4, lambda c: c.use_rope and not c.use_attention_bias, context_length=24)
)
def test_padding_on_the_left_changes_no_row(exported, config):
    """A left-padded row continues as it does alone, with the same logits.

    It sees nothing before its start, and RoPE is relative.
    """
    _, theirs = exported(config)
    ids = ids_for(config, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    both = theirs.generate(ids, attention_mask=mask, **settings)[:, 10:]
    for row, start in ((0, 4), (1, 0)):
        alone = ids[row : row + 1, start:]
        assert torch.equal(
            both[row : row + 1],
            theirs.generate(alone, attention_mask=torch.ones_like(alone), **settings)[
                :, 10 - start :
            ],
        )
        with torch.no_grad():
            padded = theirs(ids, attention_mask=mask).logits[row, start:]
            assert_close(padded, theirs(alone).logits[0], logits_bound(config, 10))
    # No row of the softmax is empty: some kernels then give NaN.
    assert theirs._starts(mask, 0, 10).tolist() == [
        [0] * 4 + [4] * 6,
        [0] * 10,
    ]


def test_padding_that_would_be_read_wrongly_is_refused(exported):
    """Padding left of a learned table's positions, inside a row, or of another shape.

    Padding on the right changes nothing before it.
    """
    _, theirs = exported(tiny_config(use_attention_bias=True))
    ids = ids_for(tiny_config())
    left, right, inside = (torch.ones_like(ids) for _ in range(3))
    left[0, :2], right[0, -2:], inside[0, 3] = 0, 0, 0
    assert torch.equal(theirs(ids, attention_mask=right).logits, theirs(ids).logits)
    with pytest.raises(ValueError, match="biases for absolute positions: train on rows"):
        theirs(ids, attention_mask=left)
    with pytest.raises(ValueError, match="the beginning and the end of a row only"):
        theirs(ids, attention_mask=inside)
    with pytest.raises(ValueError, match=r"must be \[rows, 9\]"):
        theirs(ids, attention_mask=left[:, 1:])
    with pytest.raises(TypeError, match="position_ids"):
        theirs(ids, position_ids=left)


def test_what_the_model_cannot_do_is_refused(exported):
    _, theirs = exported(tiny_config(), attn_implementation="sdpa")
    ids = ids_for(tiny_config())
    with pytest.raises(ValueError, match="not StaticCache: leave cache_implementation out"):
        theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            eos_token_id=None,
            cache_implementation="static",
        )
    with pytest.raises(ValueError, match="has 61 token ids and cannot be given 64"):
        theirs.resize_token_embeddings(64)
    assert theirs.resize_token_embeddings(61) is theirs.get_input_embeddings()


def test_logits_to_keep_and_tuples(exported):
    """Only the last logits, by count or index, as generate and speculative decoding request.

    For one row, no others are computed.
    """
    _, theirs = exported(tiny_config())
    asked = []
    theirs.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["last_token_only"]), with_kwargs=True
    )
    ids = ids_for(tiny_config())
    with torch.no_grad():
        whole = theirs(ids).logits
        for keep in (1, 3, torch.tensor([2, 5])):
            kept = theirs(ids, logits_to_keep=keep).logits
            expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
            assert_close(kept, expected, logits_bound(tiny_config(), ids.shape[1]))
        as_tuple = theirs(ids, return_dict=False)
    assert asked == [False, True, False, False, False]
    # First the routers' loss.
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], whole)


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "changes",
    [
        dict(z_loss_coef=0.01, aux_loss_coef=0.1),
        dict(tie_embeddings=True, head_bias=True, expert_activation="gelu", expert_bias=True),
        dict(use_attention_bias=True, router_bias_rate=0.01),
    ],
)
def test_loss_and_gradients_are_ours(exported, changes):
    """`labels` are shifted by transformers' rule; router losses are added with our coefficients.

    The gradients are those of train.py's loss.
    """
    ours, theirs = exported(tiny_config(**changes))
    ids = ids_for(ours.config)
    labels = ids.clone()
    labels[0, :3] = IGNORE
    targets = torch.cat((labels[:, 1:], torch.full((2, 1), IGNORE)), dim=1)
    out = ours(ids, targets)
    loss = out.cross_entropy_sum / out.num_targets + out.aux_loss + out.z_loss
    loss.backward()
    expected = {f"model.{name}": parameter.grad for name, parameter in ours.named_parameters()}
    theirs.train()
    for checkpointing in (False, True):
        if checkpointing:
            theirs.activation_checkpointing_enable()
        theirs.zero_grad()
        result = theirs(
            **{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        )
        result["loss"].backward()
        assert result.past_key_values is None
        assert_close(result.loss, loss, logits_bound(ours.config, ids.shape[1]))
        for name, parameter in theirs.named_parameters():
            bound = gradients_bound(ours.config, ids.shape[1], rows=len(ids))
            assert_close(parameter.grad, expected[name], bound, name)
    assert theirs.model.activation_checkpointing and theirs.is_activation_checkpointing
    cache = (
        theirs.eval()
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        .past_key_values
    )
    # With gradients: a block that runs twice would fill a cache twice.
    assert theirs(ids).past_key_values is None
    with pytest.raises(
        ValueError, match="a KV cache and gradient checkpointing do not go together"
    ):
        theirs(ids[:, :1], past_key_values=cache)


# ------------------------------------------------------------------------------------------ loading
def test_bfloat16_and_the_selection_bias(tmp_path, modeling):
    """Loaded in bfloat16 the model equals ours in bfloat16, bit for bit.

    Its expert bias stays float32, as in ours, from either kind of file.
    """
    config = tiny_config(router_bias_rate=1e-3)
    ours = random_model(config).eval()
    ids = ids_for(config)
    folders = [export(tmp_path / dtype, ours, dtype) for dtype in ("float32", "bfloat16")]
    biases = [block.moe.router.selection_bias.clone() for block in ours.layers]
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16()
    for folder in folders:
        theirs = modeling.GptossForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
        assert all(
            torch.equal(block.moe.router.selection_bias, bias)
            for block, bias in zip(theirs.model.layers, biases, strict=True)
        )
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert (
        modeling.GptossForCausalLM.from_pretrained(folders[1], dtype="auto").dtype == torch.bfloat16
    )


def test_missing_and_misshapen_weights_are_refused(tmp_path, modeling):
    """transformers would fill them with whatever, and warn."""
    folder = export(tmp_path / "model", random_model(tiny_config()))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.moe.experts.w_out"
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Experts: weights are missing"):
        modeling.GptossForCausalLM.from_pretrained(folder)
    save_file(
        tensors | {name: torch.zeros(4, 32, 23)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match="Experts: weights are missing in the file, or have another shape"
    ):
        modeling.GptossForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_new_model_has_llms_initial_weights(modeling):
    """from_config uses transformers' initialisation, with one standard deviation for all matrices.

    On the meta device nothing is drawn.
    """
    config = modeling.GptossConfig(
        gptoss=dataclasses.asdict(tiny_config(d_model=64, init_std=0.1, transformer_blocks=8))
    )
    model = modeling.GptossForCausalLM(config)
    assert (
        abs(model.model.layers[0].moe.experts.w_in.std() - 0.1) < 0.01
        and abs(model.model.layers[0].moe.experts.w_out.std() - 0.1 / 4) < 0.005
    )
    assert (
        config.vocab_size == 61
        and config.hidden_size == 64
        and config.num_hidden_layers == 8
        and config.tie_word_embeddings is False
    )
    with torch.device("meta"):
        assert modeling.GptossForCausalLM(config).device.type == "meta"
    with pytest.raises(ValueError, match="top_k 9 must not exceed"):
        modeling.GptossConfig(gptoss=config.gptoss | {"top_k": 9})
