"""Weights of experts, attention and head in 8 bits, applied from outside to a finished LLM.

int8 with one scale per output row, symmetric; embedding, norms, biases and router stay as they are. The model goes on being a plain
LLM: a packed weight is a property that unpacks when it is read, so everything that works on a model still does; what is fast
reads the packed form (runtime/inference/cpu_decode.c, runtime/inference/decoder.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import LLM


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., O, I] -> int8 [..., O, I] from -127 to 127 and float32 scales [..., O, 1]; their product is within half a scale of the weight."""
    w = weight.detach().float()
    scale = w.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30) / 127
    return (w / scale).round_().to(torch.int8), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `pack` rounded, in `dtype`."""
    return (packed * scale).to(dtype)


def is_packed(model: LLM) -> bool:
    """Whether `quantize_` was here."""
    return hasattr(model.out_head, "weight_packed")


def quantized_weights(model: LLM) -> Iterator[tuple[nn.Module, str]]:
    """The weights that are packed: (module, name)."""
    for block in model.layers:
        a = block.attention
        yield from ((linear, "weight") for linear in (a.W_q, a.W_k, a.W_v, a.out_proj))
        yield from ((block.moe.experts, name) for name in ("w_in", "w_out"))
    yield model.out_head, "weight"


@torch.no_grad()
def quantize_(model: LLM) -> LLM:
    """Pack the model's weights in place, one tensor at a time; returns the model. It cannot be trained any more.

    Where head and embedding are one matrix, the head gets a packed copy and the embedding stays.
    """
    for module, name in quantized_weights(model):
        weight = model.head_weight if module is model.out_head else getattr(module, name)
        packed, scale = pack(weight)
        delattr(module, name)
        module.register_buffer(f"{name}_packed", packed)
        module.register_buffer(f"{name}_scale", scale)
        module.__class__ = _reading_packed(type(module), name, weight.dtype)
        del weight
    return model


@functools.cache
def _reading_packed(kind: type[nn.Module], name: str, dtype: torch.dtype) -> type[nn.Module]:
    """A subclass whose attribute `name` is unpacked from `name`_packed and `name`_scale."""
    return type(
        kind.__name__,
        (kind,),
        {
            name: property(
                lambda self: unpack(
                    getattr(self, f"{name}_packed"), getattr(self, f"{name}_scale"), dtype
                )
            )
        },
    )
