"""Quantize the weights of experts, attention and head to 8 or 4 bits, from outside a finished LLM.

int8: symmetric, one float32 scale per output row. int4: from -8 to 7, one bfloat16 scale per group
of GROUP weights along the inputs, 4.5 bits a weight; attention, which is small and suffers most, in
8 bits. Embedding, norms, biases and router keep their dtype. The model stays a plain LLM: a packed
weight is a property that unpacks when it is read, so everything that works on a model still does.
The fast paths read the packed form (runtime/inference/cpu_decode.c, runtime/inference/decoder.py).
The C decoder alone also rounds what a layer is given: to 16 bits next to weights of 8, to 8 bits
next to weights of 4.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model import LLM

# What weights may be packed to.
KINDS = ("int8", "int4")
# Weights of 4 bits that have a scale. NIBBLES in the C code.
GROUP = 32
# What rounding to 16 bits does to inputs that share a scale, next to their size: two standard
# deviations of 1 / sqrt(12) step are 2^-14 where the largest is about 3 times the size. With bounds
# derived from that, the logits of 6 of 500 random models were off by up to 2.5 times the bound, so
# four times as much is allowed.
INPUT_EPS = 2.0**-12
# The largest weight of a group is tried at these multiples of the scale. With 8 it is exact; with
# less the others are nearer, and it may be cut to 7 or 8 steps. The least squared error decides.
LARGEST = (8.4, 8.0, 7.6, 7.2)
# Numbers that are packed at a time, so that a large tensor needs little further memory.
CHUNK = 1 << 18


def pack(weight: Tensor, kind: str = "int8") -> tuple[Tensor, Tensor]:
    """Return a weight [..., O, I] packed, and its scales.

    int8: values from -127 to 127 of the same shape, and float32 scales [..., O, 1]. int4: uint8
    [..., O, I / 2] and bfloat16 scales [..., O, I / GROUP], I rounded up to whole groups. Values
    times scales are the weights, rounded: int8 within half a scale.
    """
    if kind == "int4":
        return _pack_nibbles(weight.detach())
    w = weight.detach().float()
    scale = w.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30) / 127
    return (w / scale).round_().to(torch.int8), scale


def kind_of(packed: Tensor) -> str:
    """Return which of KINDS a packed tensor is."""
    return "int4" if packed.dtype == torch.uint8 else "int8"


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype, inputs: int) -> Tensor:
    """Return the weight [..., O, inputs] that `pack` rounded, in `dtype`."""
    if kind_of(packed) == "int8":
        return (packed * scale).to(dtype)
    numbers = packed.view(torch.int16).unflatten(-1, (-1, 1, 8)).int()
    # Four bits each: the lowest are the first 8 of a group.
    right = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=packed.device)
    values = ((numbers >> right[:, None]) & 15) - 8
    weight = values.flatten(-2) * scale.float()[..., None]
    return weight.flatten(-2)[..., :inputs].to(dtype)


def _pack_nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `pack` for 4 bits.

    A group is 8 numbers of 16 bits. Its element e is in number e % 8, in bits 4 * (e // 8) to that
    plus 3, 8 too large: 8 lanes of a vector then hold 8 elements that follow one another.
    """
    O, I = weight.shape[-2:]
    rows = weight.reshape(-1, I)
    groups = -(-I // GROUP)
    packed = torch.empty(len(rows), groups * GROUP // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(rows), groups, dtype=torch.bfloat16, device=weight.device)
    step = max(1, CHUNK // I)
    for first in range(0, len(rows), step):
        chunk = slice(first, first + step)
        w = nn.functional.pad(rows[chunk].float(), (0, groups * GROUP - I))
        values, scales[chunk] = _round_groups(w.unflatten(-1, (groups, GROUP)))
        bits = (values.int() + 8).unflatten(-1, (4, 8))
        numbers = bits[..., 0, :].clone()
        for nibble in range(1, 4):
            numbers |= bits[..., nibble, :] << 4 * nibble
        # From 32 bits to 16: beyond 2^15 - 1 it is the negative number of the same bits.
        numbers = torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16)
        packed[chunk] = numbers.flatten(1).view(torch.uint8)
    shape = weight.shape[:-2]
    return packed.view(*shape, O, -1), scales.view(*shape, O, -1)


def _round_groups(w_RGI: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [R, groups, GROUP] from -8 to 7 (float), scales [R, groups] bfloat16."""
    at = w_RGI.abs().argmax(dim=-1, keepdim=True)
    largest = w_RGI.gather(-1, at)
    best_error: Tensor | None = None
    for steps in LARGEST:
        # Negative where the largest is positive: there are 8 steps below zero, and 7 above.
        scale = (largest / -steps).bfloat16()
        divisor = torch.where(scale == 0, 1.0, scale.float())
        values = (w_RGI / divisor).round_().clamp_(-8, 7)
        error = (values * divisor - w_RGI).square().sum(dim=-1, keepdim=True)
        if best_error is None:
            best_error, best_values, best_scale = error, values, scale
            continue
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_values = torch.where(is_better, values, best_values)
        best_scale = torch.where(is_better, scale, best_scale)
    return best_values, best_scale[..., 0]


def packed_kind(model: LLM) -> str:
    """Return which of KINDS `quantize_` has packed the model to; "" if it has not."""
    packed = getattr(model.out_head, "weight_packed", None)
    return "" if packed is None else kind_of(packed)


def is_packed(model: LLM) -> bool:
    """Return whether `quantize_` has packed the model."""
    return bool(packed_kind(model))


def quantized_weights(model: LLM) -> Iterator[tuple[nn.Module, str]]:
    """Yield the weights to pack: (module, name)."""
    for block in model.layers:
        a = block.attention
        yield from ((linear, "weight") for linear in (a.W_q, a.W_k, a.W_v, a.out_proj))
        yield from ((block.moe.experts, name) for name in ("w_in", "w_out"))
    yield model.out_head, "weight"


def kind_in(module: nn.Module, kind: str) -> str:
    """Return the one of KINDS that a module has in a model that is packed to `kind`."""
    # Of what 4 bits cost a trained nano, attention had two fifths.
    is_attention = isinstance(module, nn.Linear)
    return "int8" if is_attention else kind


@torch.no_grad()
def quantize_(model: LLM, kind: str = "int8") -> LLM:
    """Pack the model's weights in place, one tensor at a time, and return the model.

    kind: one of KINDS; ValueError for another. It can no longer be trained. If head and embedding
    share a matrix, the head gets a packed copy and the embedding stays.
    """
    if kind not in KINDS:
        raise ValueError(f"weights are packed to {' or '.join(KINDS)}, not to {kind!r}")
    for module, name in quantized_weights(model):
        weight = model.head_weight if module is model.out_head else getattr(module, name)
        packed, scale = pack(weight, kind_in(module, kind))
        delattr(module, name)
        module.register_buffer(f"{name}_packed", packed)
        module.register_buffer(f"{name}_scale", scale)
        module.__class__ = _reading_packed(type(module), name, weight.dtype, weight.shape[-1])
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
        if (
            name not in theirs
            or theirs[name].shape != tensor.shape
            or (name.endswith("_packed") and theirs[name].dtype != tensor.dtype)
        ):
            raise ValueError(f"the models differ in {name}: weights are copied to a copy only")
        tensor.copy_(theirs[name])
    pairs = zip(quantized_weights(model), quantized_weights(source), strict=True)
    for (module, name), (their_module, _) in pairs:
        if hasattr(module, f"{name}_packed") and not hasattr(their_module, f"{name}_packed"):
            is_head = their_module is source.out_head
            own = getattr(module, f"{name}_packed")
            weight = source.head_weight if is_head else getattr(their_module, name)
            packed, scale = pack(weight, kind_of(own))
            own.copy_(packed)
            getattr(module, f"{name}_scale").copy_(scale)


@functools.cache
def _reading_packed(
    kind: type[nn.Module], name: str, dtype: torch.dtype, inputs: int
) -> type[nn.Module]:
    """Return a subclass whose attribute `name` is unpacked from `name`_packed and `name`_scale.

    `name`_inputs is the length of its rows.
    """
    return type(
        kind.__name__,
        (kind,),
        {
            f"{name}_inputs": inputs,
            name: property(
                lambda self: unpack(
                    getattr(self, f"{name}_packed"), getattr(self, f"{name}_scale"), dtype, inputs
                )
            ),
        },
    )
