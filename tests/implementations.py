"""The implementations next to the plain model, and the fields that each leaves out on purpose."""

from __future__ import annotations

import dataclasses

from config_model import ModelConfig
from runtime.checks import known
from runtime.inference import cpu_decode, decoder
from runtime.interop import gguf, huggingface
from scripts import draw_architecture

IMPLEMENTATIONS = {
    "C decoder": cpu_decode.KNOWS,
    "decode_step": decoder.KNOWS,
    "published classes": huggingface.KNOWS,
    "GGUF": gguf.KNOWS,
    "closed forms": known.CLOSED_FORMS,
    "drawing": draw_architecture.KNOWS,
}
# Fields that an implementation does not know, on purpose. It then steps aside or refuses where they
# are not at their default.
NOT_KNOWN: dict[str, set[str]] = {name: set() for name in IMPLEMENTATIONS}


def at_default(config: ModelConfig, *names: str) -> ModelConfig:
    """Return a config without what the implementations of these names do not know."""
    fields = {field for name in names for field in NOT_KNOWN[name]}
    return dataclasses.replace(config, **{field: getattr(ModelConfig, field) for field in fields})
