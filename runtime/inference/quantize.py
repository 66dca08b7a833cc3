"""Quantize the weights of experts, attention and head to int8, from outside a finished LLM.

Symmetric int8 with one scale per output row; embedding, norms, biases and router keep their dtype.
The model stays a plain LLM: a packed weight is a property that unpacks when it is read, so
everything that works on a model still does. The fast paths read the packed form
(runtime/inference/cpu_decode.c, runtime/inference/decoder.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import LLM


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [..., O, I] as int8 of the same shape and float32 scales [..., O, 1].

    The int8 values are from -127 to 127; times the scale they are within half a scale of the
    weight.
    """
    w = weight.detach().float()
    scale = w.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30) / 127
    return (w / scale).round_().to(torch.int8), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that `pack` rounded, in `dtype`."""
    return (packed * scale).to(dtype)


def is_packed(model: LLM) -> bool:
    """Return whether `quantize_` has packed the model."""
    return hasattr(model.out_head, "weight_packed")


def quantized_weights(model: LLM) -> Iterator[tuple[nn.Module, str]]:
    """Yield the weights to pack: (module, name)."""
    for block in model.layers:
        a = block.attention
        yield from ((linear, "weight") for linear in (a.W_q, a.W_k, a.W_v, a.out_proj))
        yield from ((block.moe.experts, name) for name in ("w_in", "w_out"))
    yield model.out_head, "weight"


@torch.no_grad()
def quantize_(model: LLM) -> LLM:
    """Pack the model's weights in place, one tensor at a time, and return the model.

    It can no longer be trained. If head and embedding share a matrix, the head gets a packed copy
    and the embedding stays.
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


@torch.no_grad()
def copy_weights_(model: LLM, source: LLM) -> None:
    """Copy the weights of `source` into `model`, a copy of it, and pack what is packed there.

    Every tensor stays where it is. The two may differ in dtype and device. Raise ValueError where
    they have other tensors.
    """
    theirs = dict((*source.named_parameters(), *source.named_buffers()))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("_packed", "_scale")) and name not in theirs:
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise ValueError(f"the models differ in {name}: weights are copied to a copy only")
        tensor.copy_(theirs[name])
    pairs = zip(quantized_weights(model), quantized_weights(source), strict=True)
    for (module, name), (their_module, _) in pairs:
        if hasattr(module, f"{name}_packed") and not hasattr(their_module, f"{name}_packed"):
            is_head = their_module is source.out_head
            packed, scale = pack(source.head_weight if is_head else getattr(their_module, name))
            getattr(module, f"{name}_packed").copy_(packed)
            getattr(module, f"{name}_scale").copy_(scale)


@functools.cache
def _reading_packed(kind: type[nn.Module], name: str, dtype: torch.dtype) -> type[nn.Module]:
    """Return a subclass whose attribute `name` is unpacked from `name`_packed and `name`_scale."""
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
