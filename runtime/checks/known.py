"""What each second implementation of the model knows of it, declared, so that a changed model is
not computed wrongly in silence.

The C decoder, the decoding step, the published classes, GGUF, the closed forms of config_model.py
and the drawing are written for the model as it is. Each declares the ModelConfig fields, modules,
parameters and buffers that it knows. Whoever adds one to the model finds every implementation that
has to learn it: decoders step aside, exports refuse, and reports say what they leave out.

Names are those of LLM.named_modules(), blocks' numbers as a star. The groups below are literal: a
new field is in none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from config_model import ModelConfig, active_parameters, total_parameters
from model import NORMAL, RESIDUAL, ZERO
from runtime.checkpoint.format import meta_model


def _names(*words: str) -> frozenset[str]:
    return frozenset(name for line in words for name in line.split())


# ---------------------------------------------------------------- literal groups, shared by several
# Whoever adds a field to ModelConfig adds it to the declarations of those that learned it, and to a
# group only when all have.
SIZES = _names(
    "d_model transformer_blocks context_length vocabulary_size num_heads num_kv_heads head_dim",
    "num_experts top_k d_ff",
)
ATTENTION = _names(
    "qkv_bias out_proj_bias qk_norm attention_sinks",
    "use_attention_bias sliding_window window_pattern",
)
POSITIONS = _names("use_rope rope_theta rope_scaling rope_scaling_factor yarn_truncate")
EXPERTS = _names("expert_activation expert_bias router_bias router_bias_rate")
OUTSIDE = _names("rms_norm_eps tie_embeddings head_bias")
# They act on initial weights or while training, and change nothing in a finished model.
TRAINING = _names("capacity_factor aux_loss_coef z_loss_coef dropout init_std")

# Name -> class.
MODULES = {
    "": "LLM",
    "embed": "Embedding",
    "layers": "ModuleList",
    "layers.*": "Block",
    "norm": "RMSNorm",
    "out_head": "Head",
    "layers.*.norm1": "RMSNorm",
    "layers.*.norm2": "RMSNorm",
    "layers.*.attention": "Attention",
    "layers.*.attention.W_q": "Linear",
    "layers.*.attention.W_k": "Linear",
    "layers.*.attention.W_v": "Linear",
    "layers.*.attention.out_proj": "Linear",
    "layers.*.attention.q_norm": "RMSNorm",
    "layers.*.attention.k_norm": "RMSNorm",
    "layers.*.moe": "MoE",
    "layers.*.moe.router": "Router",
    "layers.*.moe.experts": "Experts",
}
OPTIONAL_MODULES = _names("layers.*.attention.q_norm layers.*.attention.k_norm")
_IN_ATTENTION = _names(
    "W_q.weight W_q.bias W_k.weight W_k.bias W_v.weight W_v.bias out_proj.weight out_proj.bias",
    "q_norm.weight k_norm.weight sinks attention_bias",
)
_IN_MOE = _names(
    "router.weight router.bias router.selection_bias",
    "experts.w_in experts.w_out experts.b_in experts.b_out",
)
TENSORS = frozenset(
    [
        "embed.weight",
        "norm.weight",
        "out_head.weight",
        "out_head.bias",
        "layers.*.norm1.weight",
        "layers.*.norm2.weight",
        *(f"layers.*.attention.{name}" for name in _IN_ATTENTION),
        *(f"layers.*.moe.{name}" for name in _IN_MOE),
    ]
)
# What runtime/inference/quantize.py makes of some of them.
_PACKED = _names(
    "out_head.weight layers.*.attention.W_q.weight",
    "layers.*.attention.W_k.weight layers.*.attention.W_v.weight",
    "layers.*.attention.out_proj.weight layers.*.moe.experts.w_in layers.*.moe.experts.w_out",
)
PACKED_TENSORS = frozenset(f"{name}_{part}" for name in _PACKED for part in ("packed", "scale"))


# ---------------------------------------------------------------------------------- the declaration
@dataclass(frozen=True)
class Known:
    """What an implementation knows. `what`: its name in a line; fields of ModelConfig; parameters
    and buffers.
    """

    what: str
    fields: frozenset[str]
    tensors: frozenset[str] = TENSORS

    def undeclared(self, config: ModelConfig) -> list[str]:
        """Fields of a config (of this class, an edited one or a subclass) that are not declared,
        whatever their values.
        """
        return [f.name for f in dataclasses.fields(config) if f.name not in self.fields]

    def unknown(self, model: nn.Module) -> list[str]:
        """What a model has, or lacks, that is not declared, in words for a line: fields, modules,
        parameters and buffers.

        A field at its default counts only where it shows: in a comparison of logits
        (runtime/inference/asked.py) or of counts.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(model.config)}
        fields = [
            name
            for name in self.undeclared(model.config)
            if getattr(model.config, name) != defaults[name]
        ]
        words = [f"ModelConfig.{name} {getattr(model.config, name)!r}" for name in fields]
        modules = dict.fromkeys(
            (pattern(name), type(module).__name__) for name, module in model.named_modules()
        )
        # What is inside a module that was named is not named again.
        inside: list[str] = []
        for name, kind in modules:
            if name not in MODULES and not _is_inside(name, inside):
                inside.append(name)
                words.append(f"{name} ({kind})")
            elif name in MODULES and kind != MODULES[name]:
                words.append(f"{name or 'a model'} as {kind} instead of {MODULES[name]}")
        there = {name for name, _ in modules}
        words += [
            f"a model without {name}" for name in MODULES if name not in there | OPTIONAL_MODULES
        ]
        tensors = dict.fromkeys(pattern(name) for name, _ in named_tensors(model))
        return words + [
            name for name in tensors if name not in self.tensors and not _is_inside(name, inside)
        ]

    def why_not(self, model: nn.Module) -> str:
        """Why this implementation cannot compute a model, in one line; "" if it knows all of it."""
        unknown = self.unknown(model)
        return f"{self.what} does not know {listed(unknown)}" if unknown else ""

    def check(self, model: nn.Module, advice: str = "") -> None:
        """Raise ValueError, naming what is not known. advice: what to do instead."""
        if why := self.why_not(model):
            raise ValueError(f"{why}: teach it, or leave that out of the model{advice}")


def pattern(name: str) -> str:
    """A name with the blocks' numbers as stars."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def named_tensors(model: nn.Module) -> Iterable[tuple[str, object]]:
    """(name, tensor) of all parameters and buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _is_inside(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def listed(names: list[str], most: int = 4) -> str:
    """Some names in a line, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ----------------------------------------------------------------- counts, and how parameters begin
CLOSED_FORMS = Known(
    "the closed forms of config_model.py",
    SIZES | ATTENTION | POSITIONS | EXPERTS | OUTSIDE | TRAINING,
)


@dataclass(frozen=True)
class Counts:
    """Parameters of a model as it is, and what the closed forms leave out of FLOPs and memory."""

    total: int  # the module's own
    active: int  # per token; what the closed forms do not know counts as active
    uncounted: int  # total - closed form
    note: str  # one line, "" if there is nothing to say


@functools.lru_cache(maxsize=8)
def counts(config: ModelConfig) -> Counts:
    """Count the parameters of a config's model on the meta device, next to the closed forms."""
    model = meta_model(config)
    total, closed = sum(p.numel() for p in model.parameters()), total_parameters(config)
    note, unknown = "", CLOSED_FORMS.unknown(model)
    if total != closed and not unknown:
        unknown = [f"ModelConfig.{name}" for name in CLOSED_FORMS.undeclared(config)]
    if unknown or total != closed:
        what = f"do not know {listed(unknown)}" if unknown else "are off"
        extra = (
            f"its {total - closed:+,} parameters count as active, and " if total != closed else ""
        )
        note = f"{CLOSED_FORMS.what} {what}: {extra}no figure of FLOPs and memory has it"
    return Counts(total, active_parameters(config) + total - closed, total - closed, note)


def initial_note(config: ModelConfig) -> str:
    """One line that names parameters whose kind LLM.initialise does not know, and how it begins
    them; "" if there are none.
    """
    model = meta_model(config)
    said = {
        f"{module}.{name}".lstrip(".")
        for module, m in model.named_modules()
        for name in getattr(m, "residual_outputs", ())
    }
    known = (*ZERO, *RESIDUAL, *NORMAL)
    unknown = dict.fromkeys(
        pattern(name)
        for name, _ in model.named_parameters()
        if not (
            name in said
            or "norm" in name
            or any(name == kind or name.endswith(f".{kind}") for kind in known)
        )
    )
    if not unknown:
        return ""
    return (
        f"LLM.initialise does not know {listed(list(unknown))}: normal with init_std "
        f"{config.init_std:g}; if one writes to the residual stream, "
        "name it in its module's residual_outputs, else in model.NORMAL or model.ZERO"
    )
