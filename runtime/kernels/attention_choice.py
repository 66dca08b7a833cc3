"""Which kernel computes attention on a CUDA GPU, and attention without sinks by that kernel.

The choice is a pure function of the card and of the call, so a table of cases tests it without a
GPU. PyTorch makes a choice of its own in F.scaled_dot_product_attention: on Hopper it takes cuDNN
first. Where ours is another, the kernel is called by its name: no switch of the whole process is
set, and a compiled block sees one operation. runtime.kernels.choose.choose_kernels puts this into
`Attention.device_attention`; runtime/kernels/sink_attention.py makes the same choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch takes cuDNN first from this version on (sdp_utils.cpp: earlier ones were wrong for
# lengths that are no multiple of 128).
_FIRST_CUDNN = 91501
# From here on it takes heads of up to 256 numbers on Hopper, and of 128 elsewhere.
_WIDE_CUDNN = 91000
# Numbers that a row of a mask on a GPU must be a multiple of.
_ALIGNMENT = 16

_HALF = (torch.bfloat16, torch.float16)

aten = torch.ops.aten


class Card(NamedTuple):
    """What the choice depends on in addition to the call."""

    # Compute capability: (9, 0) is Hopper.
    capability: tuple[int, int]
    # As torch.backends.cudnn.version() says it: 91900 is 9.19; 0 where it may not be used.
    cudnn_version: int = 0
    # Only kernels that give the same bits in every run.
    deterministic: bool = False


class Choice(NamedTuple):
    """A kernel, and how it is reached."""

    # cudnn, flash, efficient; or torch: whatever PyTorch takes, at worst the operations that hold
    # all T x S scores.
    kernel: str
    # Whether PyTorch would take another one, so that this one is called by its name.
    by_name: bool
    # Whether keys and values need a head for every query head.
    copies_heads: bool


def card_of(device: torch.device) -> Card:
    """The card that a CUDA device is, under the settings of this process."""
    cudnn_version = torch.backends.cudnn.version() if torch.backends.cuda.cudnn_sdp_enabled() else 0
    return Card(
        torch.cuda.get_device_capability(device),
        cudnn_version or 0,
        torch.are_deterministic_algorithms_enabled(),
    )


def choose_attention(
    card: Card,
    dtype: torch.dtype,
    mask: str,
    S: int,
    D: int,
    needs_gradient: bool,
    dropout: float = 0.0,
    sinks: bool = False,
) -> Choice:
    """The kernel for queries of `dtype` with heads of D numbers that see at most S keys.

    mask: none (causal or no mask at all), fixed, or learned (it gets a gradient, which the
    memory-efficient kernel alone can give). sinks: for runtime/kernels/sink_attention.py, which
    gives cuDNN no mask. cuDNN is about twice as fast as flash on Hopper, but
    builds a plan for every new length (0.4 s) and knows no deterministic backward pass: it trains,
    at one length, and never generates. With a mask its gradient of the queries can be NaN where
    S % 128 is 64 (PyTorch issue 196678).
    """
    half = dtype in _HALF
    aligned = D % (8 if half else 4) == 0
    # sdp_utils.cpp, check_cudnn_tensor_shapes.
    wide = card.capability == (9, 0) and card.cudnn_version >= _WIDE_CUDNN
    cudnn_is_first = (
        half
        and aligned
        and (256 if wide else 128) >= D
        and S > 1
        and card.capability[0] in (9, 10)
        and card.cudnn_version >= _FIRST_CUDNN
        and not card.deterministic
        and dropout * 16 % 1 == 0
    )
    if mask == "learned":
        return Choice("efficient" if aligned else "torch", False, True)
    cudnn_takes_mask = mask == "none" or not (sinks or S % 128 == 64)
    if cudnn_is_first and needs_gradient and cudnn_takes_mask:
        return Choice("cudnn", False, False)
    # Some cards have no backward pass for larger heads.
    largest = 192 if needs_gradient else 256
    if mask == "none" and half and aligned and largest >= D and card.capability >= (8, 0):
        return Choice("flash", cudnn_is_first, False)
    if aligned and dtype in (*_HALF, torch.float32):
        return Choice("efficient", cudnn_is_first, True)
    # Without a mask PyTorch pads the heads for flash, which takes grouped heads.
    pads = mask == "none" and half and card.capability >= (8, 0)
    return Choice("torch", False, not pads)


def mask_kind(mask: Tensor | None) -> str:
    """none, fixed or learned."""
    return "none" if mask is None else "learned" if mask.requires_grad else "fixed"


def gpu_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float,
    card: Card,
) -> Tensor:
    """[B, H, T, D] by the kernel that choose_attention names.

    mask: bool (True keeps) or numbers that are added, [T, S] or [B or 1, 1 or H, T, S].
    """
    (H, _, D), (G, S) = q_BHTD.shape[1:], k_BGSD.shape[1:3]
    choice = choose_attention(
        card, q_BHTD.dtype, mask_kind(mask), S, D, torch.is_grad_enabled(), dropout
    )
    if G != H and choice.copies_heads:
        # Never of the cache, only of what this call reads.
        k_BGSD, v_BGSD = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSD, v_BGSD))
    if choice.by_name and choice.kernel == "flash":
        flash = aten._scaled_dot_product_flash_attention
        return flash(q_BHTD, k_BGSD, v_BGSD, dropout, is_causal)[0]
    if choice.by_name:
        numbers = None if mask is None else aligned_mask(mask, q_BHTD)
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(
            q_BHTD, k_BGSD, v_BGSD, numbers, torch.is_grad_enabled(), dropout, is_causal
        )[0]
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        is_causal=is_causal,
        dropout_p=dropout,
        enable_gqa=k_BGSD.shape[1] != H,
    )


def mask_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, in `dtype`: 0 and -inf for a bool mask."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -torch.inf)


def aligned_mask(mask: Tensor, q_BHTD: Tensor) -> Tensor:
    """mask_numbers as the memory-efficient kernel wants them: [B, H, T, S], rows aligned."""
    numbers = mask_numbers(mask, q_BHTD.dtype)
    S = numbers.shape[-1]
    if S % _ALIGNMENT:
        numbers = F.pad(numbers, (0, -S % _ALIGNMENT))[..., :S]
    return numbers.expand(*q_BHTD.shape[:2], *numbers.shape[-2:])
