"""Checkpoints for tests: whole, forged and hostile."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.checkpoint import format as module
from runtime.checkpoint.write import save_checkpoint
from runtime.training.optimizer import build_adamw

CONFIG = ModelConfig(
    d_model=16,
    transformer_blocks=2,
    context_length=8,
    vocabulary_size=32,
    num_heads=2,
    num_kv_heads=1,
    num_experts=2,
    top_k=1,
    d_ff=8,
    router_bias_rate=1e-3,
)
TRAIN = TrainConfig(lr=1e-2, min_lr=0.0)
TOKENIZER = {"name": "byte", "vocabulary_size": 257}
RUN = {
    "tokens_seen": 2**40,
    "scaler": {"scale": 65536.0},
    "tail": [[1, 2.5], [2, 2.25]],
    "note": "naïve \u2192 ok",
    "best_val_loss": None,
}


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocabulary_size, (2, 9), generator=generator)
        out = model(ids[:, :-1], ids[:, 1:])
        (out.cross_entropy_sum / out.num_targets + out.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def new_run(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = LLM(config)
    return model, build_adamw(model, TRAIN)


def save(folder, step=2, model=None, optimizer=None, **values):
    values = {
        "train_config": TRAIN,
        "tokenizer_state": TOKENIZER,
        "data_fingerprint": "abc",
        "val_loss": 3.25,
        "run": RUN,
    } | values
    if model is None:
        model, optimizer = new_run()
    return save_checkpoint(folder, step, model, optimizer, **values)


def forge(source: Path, target: Path, change, redo_digests=True) -> Path:
    """Write `source` to `target` with its dict changed and matching digests.

    As an attacker would.
    """
    # Looked up here: a name that is gone must not pass for something without a digest.
    header_digest, digest_of = module.header_digest, module.digest_of
    contents = torch.load(source, weights_only=True)
    changed = change(contents)
    contents = contents if changed is None else changed
    if redo_digests and isinstance(contents, dict) and isinstance(contents.get("digests"), dict):
        # Some of what is put in has no digest.
        with contextlib.suppress(TypeError, RuntimeError, AttributeError, KeyError):
            contents["digests"]["header"] = header_digest(
                {key: value for key, value in contents.items() if key not in module.TENSOR_KEYS}
            )
            for group in ("model", "optimizer"):
                contents["digests"] |= {
                    f"{group}/{name}": digest_of(tensor)[0]
                    for name, tensor in contents[group].items()
                }
    torch.save(contents, target)
    return target


def put(key, value):
    return lambda contents: contents.update({key: value})


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def bomb(depth=60):
    value = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value
