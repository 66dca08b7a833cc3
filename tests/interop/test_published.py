"""runtime/published: what a file's architecture computes, against transformers' classes.

And for GGUF through the same core.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from runtime.interop import published
from runtime.interop.huggingface import FAMILIES, folder_tensors
from tests.builders import random_model
from tests.builders_export import CONFIGS as PUBLISHED
from tests.builders_export import load_theirs, some_ids, write_folder

# Sizes at which the ends of YaRN's ramp, rounded or not, give other frequencies.
CONFIGS = PUBLISHED | {
    "gpt_oss, yarn not rounded": dataclasses.replace(
        PUBLISHED["gpt_oss"],
        head_dim=16,
        context_length=64,
        rope_theta=100.0,
        yarn_truncate=False,
    )
}
ANY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
EPS = torch.finfo(torch.float32).eps


def bound(config, expected: torch.Tensor) -> float:
    """Of a difference between two orders of float32 sums.

    eps * sqrt(terms) for each of the blocks' sums, of the logits' size. 16: the softmax of scores
    of about that size makes so much more of an error in them.
    """
    longest = max(config.d_model, config.d_ff, config.num_heads * config.attention_head_dim)
    return (
        16
        * EPS
        * math.sqrt(longest)
        * (config.transformer_blocks + 1)
        * max(1.0, expected.abs().max().item())
    )


def of_folder(folder) -> published.Published:
    _, read, names = folder_tensors(folder)
    return published.from_folder(json.loads((folder / "config.json").read_text()), names, read)


@ANY
def test_it_computes_what_transformers_computes(config, tmp_path):
    """All families, tied or not, with windows, linear positions and both YaRNs.

    Its own weights and settings, to rounding.
    """
    write_folder(random_model(config), tmp_path)
    theirs = load_theirs(tmp_path)
    here, ids = of_folder(tmp_path), some_ids(config, 1)
    with torch.no_grad():
        expected = theirs(ids).logits[0]
    assert (published.logits(here, ids[0].tolist()) - expected).abs().max() <= bound(
        config, expected
    )
    assert published.unclaimed(here) == []


@pytest.mark.parametrize(
    "changes",
    [
        dict(theta=50.0),
        dict(eps=1e-2),
        dict(top_k=1),
        dict(neighbours=True),
        dict(is_gpt_oss=True),
        dict(windows=(3, 3)),
        dict(scaling="linear", factor=2.0),
    ],
    ids=str,
)
def test_each_setting_shows_in_the_logits(changes, tmp_path):
    """A setting that is read and not used would let a wrong file pass."""
    config = CONFIGS["qwen3_moe"]
    write_folder(random_model(config), tmp_path)
    here, ids = of_folder(tmp_path), some_ids(config, 1)[0].tolist()
    right = published.logits(here, ids)
    other = published.logits(dataclasses.replace(here, **changes), ids)
    assert (right - other).abs().max() > 100 * bound(config, right)


def test_a_choice_of_experts_is_taken_only_where_it_costs_nothing(tmp_path):
    """Two experts that are equally good may be chosen either way.

    A choice that another router made is not followed.
    """
    config = CONFIGS["qwen3_moe"]
    model = random_model(config)
    with torch.no_grad():
        # Experts 0 and 1 are the same to the router, and always among the best three: rounding
        # decides between them.
        model.layers[0].moe.router.weight[1] = model.layers[0].moe.router.weight[0]
    write_folder(model, tmp_path)
    here, ids = of_folder(tmp_path), some_ids(config, 1)[0].tolist()
    own = published.logits(here, ids)
    E, K = config.num_experts, config.top_k
    said = []
    hook = model.layers[0].moe.router.register_forward_hook(
        lambda router, given, out: said.append((out[1], out[3]))
    )
    hook1 = model.layers[1].moe.router.register_forward_hook(
        lambda router, given, out: said.append((out[1], out[3]))
    )
    model(torch.tensor([ids]))
    hook.remove()
    hook1.remove()
    swap = torch.arange(E)
    swap[0], swap[1] = 1, 0
    other = swap[said[0][0]]
    moved = published.logits(here, ids, [other, said[1][0]])
    chosen_TE = torch.zeros(len(ids), E).scatter_(1, said[0][0], 1.0)
    is_free_T = chosen_TE[:, 0] != chosen_TE[:, 1]
    assert is_free_T.any() and not is_free_T.all()
    first = int(is_free_T.nonzero()[0])
    assert (moved[first] - own[first]).abs().max() > 100 * bound(config, own)
    worst = said[0][1].argsort(dim=1)[:, :K]
    assert torch.equal(published.logits(here, ids, [worst, said[1][0]]), own)


def test_a_tensor_without_a_place_is_named(tmp_path):
    """Every reader of Qwen3-MoE files would leave out a shared expert's matrices."""
    from safetensors.torch import load_file, save_file

    model = random_model(CONFIGS["qwen3_moe"])
    write_folder(model, tmp_path)
    name = "model.layers.0.mlp.shared_expert.down_proj.weight"
    save_file(
        load_file(tmp_path / "model.safetensors") | {name: torch.zeros(2, 2)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    assert published.unclaimed(of_folder(tmp_path)) == [name]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tensor_is_named(family, tmp_path):
    from safetensors.torch import load_file, save_file

    write_folder(random_model(CONFIGS[family]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the file has no tensor for norm"):
        published.logits(of_folder(tmp_path), [1, 2, 3])
