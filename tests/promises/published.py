"""The guarantee on published architectures: export and import preserve the function."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from config_model import ModelConfig
from runtime.interop.huggingface import (
    FAMILIES,
    export_tensors,
    folder_tensors,
    hf_config,
    import_tensor,
    model_config_from,
)
from tests.builders import random_model
from tests.numeric import before_ties
from tests.promises import Promise, Tally


def random_family_config(seed: int) -> tuple[str, ModelConfig]:
    """A small model of one of the families, everything that it leaves open drawn at random."""
    r = random.Random(seed)
    family = list(FAMILIES)[seed % len(FAMILIES)]
    G, E = r.choice([1, 2]), r.choice([2, 4, 7])
    scaling = "yarn" if family == "gpt_oss" else r.choice(["none", "linear", "yarn"])
    free = dict(
        d_model=r.choice([16, 24, 40]),
        transformer_blocks=r.choice([1, 2, 3]),
        context_length=32,
        vocabulary_size=r.choice([17, 50]),
        num_heads=G * r.choice([1, 2, 4]),
        num_kv_heads=G,
        head_dim=r.choice([4, 8, 10]),
        d_ff=r.choice([8, 20]),
        num_experts=E,
        top_k=r.randint(1, E),
        tie_embeddings=r.random() < 0.5,
        sliding_window=5 if family == "gpt_oss" or r.random() < 0.3 else 0,
        rope_theta=r.choice([1e4, 1.5e5]),
        rope_scaling=scaling,
        rope_scaling_factor=1.0 if scaling == "none" else 2.0,
        yarn_truncate=scaling != "yarn" or r.random() < 0.5,
    )
    return family, ModelConfig(**dict(rms_norm_eps=1e-6) | FAMILIES[family].options | free)


def same_function(count: int) -> Tally:
    """Write a random model as a folder: transformers gives its logits and gradients.

    The folder gives its config and weights back to the bit.
    """
    from transformers import AutoModelForCausalLM

    tally, worst = Tally(), {"logits": 0.0, "gradients": 0.0}
    for seed in range(count):
        family, config = random_family_config(seed)
        model = random_model(config, seed).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # At 1.0 float32's own error in the gradients is above 1e-5 (both sides, against
                # float64).
                parameter.mul_(0.7)
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(
                json.dumps(hf_config(config, family, end_of_text_id=0, start_id=0, dtype="float32"))
            )
            save_file(
                {
                    name: tensor.contiguous().clone()
                    for name, tensor in export_tensors(config, family, weights)
                },
                Path(folder, "model.safetensors"),
                metadata={"format": "pt"},
            )
            theirs, info = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, attn_implementation="eager"
            )
            has, read, names = folder_tensors(folder)
            back = model_config_from(json.loads(Path(folder, "config.json").read_text()))
            again = {name: import_tensor(config, family, name, has, read) for name in weights}
            bitwise = (
                back[0] == family
                and back[1] == config
                and all(torch.equal(weights[name], again[name]) for name in weights)
            )
        # Where a router meets a near tie, either expert is right: those are other tokens than
        # these.
        drawn = (
            torch.randint(
                0, config.vocabulary_size, (2, 20), generator=torch.Generator().manual_seed(at)
            )
            for at in itertools.count(seed)
        )
        ids = next(ids for ids in drawn if before_ties(model, ids).all())
        logits, gradients = [], []
        for network in (model, theirs):
            logits.append(network(ids).logits)
            F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            gradients.append(
                {name: parameter.grad for name, parameter in network.named_parameters()}
            )
        difference = (
            (logits[0] - logits[1]).abs().max() / logits[0].abs().max().clamp(min=1)
        ).item()
        # The embedding's gradient has gone back through all of the model; those of single tensors
        # are compared in tests/interop/test_huggingface.py.
        ours, other = gradients[0]["embed.weight"], gradients[1]["model.embed_tokens.weight"]
        gradient = ((ours - other).abs().max() / ours.abs().max()).item()
        worst = {
            "logits": max(worst["logits"], difference),
            "gradients": max(worst["gradients"], gradient),
        }
        tally.add(
            not any(info.values()) and bitwise and difference <= 1e-5 and gradient <= 1e-5,
            f"seed {seed}, {family}: logits differ by {difference:.1e}, gradients by "
            f"{gradient:.1e}, bitwise {bitwise}, keys {info}",
        )
    tally.detail = {
        f"largest relative difference, {name}": f"{value:.0e}" for name, value in worst.items()
    } | {"families": len(FAMILIES)}
    return tally


PROMISES = [
    Promise(
        15,
        "Exported, it is the same function in transformers (fp32 to 1e-5), and it comes back "
        "the same to the bit",
        same_function,
        9,
        60,
        120,
    )
]
