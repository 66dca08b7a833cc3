"""Causal attention with the learned attention bias, by Triton kernels: no [B, H, T, T] in memory.

PyTorch's kernels take the bias as a mask: each block casts its table, computes the whole square,
and writes gradients [B, H, T, T] that are then summed over the batch. The kernels of
bias_attention_triton.py read the float32 table as it is, skip what lies above the diagonal, and sum
the table's gradient over the batch before they write it. They use no atomic additions, so results
have the same bits in every run. The method is that of FlashAttention (Dao 2023): tiles of scores,
an online softmax, and a backward pass that computes the scores again.

Nothing here has run on a GPU yet, so it is off: GPTOSS_BIAS_KERNEL=triton turns it on.
`runtime.kernels.choose.choose_kernels` then puts `attend` into `Attention.kernel`.
TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The variable, and its values: the first is what there is without it.
VARIABLE = "GPTOSS_BIAS_KERNEL"
VALUES = ("plain", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Numbers in a head. Sums of larger ones do not fit the registers.
MOST_FEATURES = 128
# Triton's first compute capability with bfloat16 products.
FIRST_CARD = (8, 0)


# ------------------------------------------------------------------------------------- the decision
def is_asked_for() -> bool:
    """Whether the environment asks for these kernels. ValueError for a value that it lacks."""
    value = os.environ.get(VARIABLE) or VALUES[0]
    if value not in VALUES:
        raise ValueError(f"{VARIABLE} is {value!r}, and may be {' or '.join(VALUES)}")
    return value == "triton"


def why_not(attention, device: torch.device, dtype: torch.dtype) -> str:
    """Why an attention module with a learned bias cannot use the kernels; "" if it can."""
    if device.type != "cuda" and not is_interpreted():
        return f"Triton needs a CUDA GPU, and this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_CARD:
        return "the GPU is older than compute capability 8.0"
    if dtype not in DTYPES:
        return f"the kernels know no {str(dtype).removeprefix('torch.')}"
    if attention.D > MOST_FEATURES:
        return f"the kernels know heads of at most {MOST_FEATURES} numbers, not {attention.D}"
    if attention.sinks is not None:
        return "the kernels know no sinks"
    if attention.window:
        return "the kernels know no sliding window"
    if attention.dropout:
        return "the kernels know no dropout"
    return ""


# ------------------------------------------------------------------------------------- the function
def attend(
    owner,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    cache,
    starts_BT: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """Do what model_parts.Attention.attend does, [B, H, T, D]; None for what the kernels lack.

    That is a cache, documents that share a sequence, and dropout. owner: model_parts.Attention.
    """
    if cache is not None or starts_BT is not None or owner.dropout:
        return None
    return bias_attention(q_BHTD, k_BGTD, v_BGTD, owner.attention_bias, dtype)


def bias_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, table_HLL: Tensor, dtype: torch.dtype
) -> Tensor:
    """Causal attention [B, H, T, D] in the queries' dtype, with table[:, :T, :T] added to the
    scores.

    dtype: what the kernels were chosen and checked for. Queries of another one, and tensors on a
    CPU, go to PyTorch's function: a model may be copied or cast later.
    """
    if q_BHTD.dtype != dtype or not (q_BHTD.is_cuda or is_interpreted()):
        return plain_attention(q_BHTD, k_BGTD, v_BGTD, table_HLL)
    return _attention(q_BHTD, k_BGTD, v_BGTD, table_HLL)[0]


def plain_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, table_HLL: Tensor) -> Tensor:
    """`bias_attention` by PyTorch's function."""
    H, T = q_BHTD.shape[1:3]
    k_BHTD, v_BHTD = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BGTD, v_BGTD))
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).triu(1)
    mask_HTT = table_HLL[:, :T, :T].to(q_BHTD.dtype).masked_fill(hidden_TT, -torch.inf)
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_HTT[None])


@torch.library.custom_op("gptoss::bias_attention", mutates_args=())
def _attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, table_HLL: Tensor
) -> tuple[Tensor, Tensor]:
    """(attention [B, H, T, D], log [B, H, T] float32: base 2, of the softmax's sum).

    A custom operation, so that a compiler sees one step. ValueError for shapes and dtypes that do
    not fit each other.
    """
    check(q_BHTD, k_BGTD, v_BGTD, table_HLL)
    q, k, v = (_with_dense_rows(x) for x in (q_BHTD, k_BGTD, v_BGTD))
    table_HLL = table_HLL.contiguous()
    y, log_BHT = _empty_results(q_BHTD, k_BGTD, v_BGTD, table_HLL)
    call = _Call.of(q, k, table_HLL)
    if call.is_empty:
        return y, log_BHT
    tile = tile_of("forward", call.width, q.dtype)
    with torch.cuda.device_of(q):
        _triton().attention_bias_forward[call.B, call.H, _tiles(call.T, tile.M)](
            q, k, v, table_HLL, y, log_BHT, *_strides(q, k, v, y), *call.sizes, **call.how(tile)
        )
    return y, log_BHT


@torch.library.custom_op("gptoss::bias_attention_backward", mutates_args=())
def _attention_backward(
    dy_BHTD: Tensor,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    table_HLL: Tensor,
    y_BHTD: Tensor,
    log_BHT: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and the table.

    needed: whether those of q, of k or v, and of the table are wanted. The others come back empty.
    """
    dy, q, k, v, y = (_with_dense_rows(x) for x in (dy_BHTD, q_BHTD, k_BGTD, v_BGTD, y_BHTD))
    table_HLL = table_HLL.contiguous()
    grads = _empty_gradients(q_BHTD, k_BGTD, v_BGTD, table_HLL, needed)
    dq, dk, dv, dtable = grads
    call = _Call.of(q, k, table_HLL)
    if call.is_empty:
        return dq.zero_(), dk.zero_(), dv.zero_(), dtable.zero_()
    kernels, delta_BHT = _triton(), torch.empty_like(log_BHT)
    given = (q, k, v, table_HLL, dy, log_BHT, delta_BHT)
    strides = _strides(q, k, v, dy)
    tiles = {name: tile_of(name, call.width, q.dtype) for name in ("delta", "q", "kv", "table")}
    needs_q, needs_kv, needs_table = needed
    with torch.cuda.device_of(q):
        M, D, W = tiles["delta"].M, call.D, call.width
        kernels.attention_bias_delta[call.B, call.H, _tiles(call.T, M)](
            y, dy, delta_BHT, *_strides(y, dy), call.H, call.T, D=D, W=W, M=M
        )
        if needs_q:
            tile = tiles["q"]
            kernels.attention_bias_backward_q[call.B, call.H, _tiles(call.T, tile.M)](
                *given, dq, *strides, *_strides(dq), *call.sizes, **call.how(tile)
            )
        if needs_kv:
            tile = tiles["kv"]
            kernels.attention_bias_backward_kv[call.B, call.G, _tiles(call.T, tile.N)](
                *given, dk, dv, *strides, *_strides(dk, dv), *call.sizes, **call.how(tile)
            )
        if needs_table:
            tile = tiles["table"]
            grid = (_tiles(call.L, tile.N), _tiles(call.L, tile.M), call.H)
            kernels.attention_bias_backward_table[grid](
                *given, dtable, *strides, *call.sizes, call.B, **call.how(tile)
            )
    return grads


@_attention.register_fake
def _(q, k, v, table):
    return _empty_results(q, k, v, table)


@_attention_backward.register_fake
def _(dy, q, k, v, table, y, log, needed):
    return _empty_gradients(q, k, v, table, needed)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return None, None, None, None
    needs_q, needs_k, needs_v, needs_table = ctx.needs_input_grad
    needed = [needs_q, needs_k or needs_v, needs_table]
    grads = _attention_backward(grad_y, *ctx.saved_tensors, needed)
    return tuple(
        grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=True)
    )


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def check(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> None:
    """Raise ValueError for what the kernels would compute wrongly, or read outside memory."""
    (B, H, T, D), G, L = q.shape, k.shape[1], table.shape[-1]
    fits = (
        k.shape == v.shape == (B, G, T, D)
        and table.shape == (H, L, L)
        and H % G == 0
        and T <= L
        and D <= MOST_FEATURES
    )
    if not fits:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, table))
        raise ValueError(
            "queries must be [B, H, T, D], keys and values [B, G, T, D] with H a multiple of G and "
            f"D at most {MOST_FEATURES}, and the table [H, L, L] with L at least T: got {shapes}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES and table.dtype in DTYPES):
        dtypes = ", ".join(str(x.dtype) for x in (q, k, v, table))
        raise ValueError(f"queries, keys and values must have one dtype of {DTYPES}: got {dtypes}")


# ------------------------------------------------------------------------------- sizes and strides
class Tile(NamedTuple):
    """M rows and N columns of a tile; warps of a program; stages of its loads."""

    M: int
    N: int
    warps: int
    stages: int


@functools.cache
def tile_of(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel (forward, delta, q, kv, table) for heads padded to `width` numbers.

    Fixed, and not timed on each machine: another tile gives other bits.
    """
    if kernel == "delta":
        return Tile(64, 64, 4, 1)
    # Exact products of float32 are no tensor core's: they need registers.
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    # As compiled for Hopper: up to 255 registers, few or none of them in memory, and at most
    # 131 kB of its 227 kB of shared memory.
    is_large = width > 64 and kernel in ("kv", "table")
    return Tile(64, 64, 8 if is_large else 4, 2)


class _Call(NamedTuple):
    """Sizes of a call of the kernels."""

    B: int
    H: int
    G: int
    T: int
    D: int
    L: int
    dtype: torch.dtype

    @staticmethod
    def of(q: Tensor, k: Tensor, table: Tensor) -> _Call:
        (B, H, T, D), G = q.shape, k.shape[1]
        return _Call(B, H, G, T, D, table.shape[-1], q.dtype)

    @property
    def is_empty(self) -> bool:
        return 0 in (self.B, self.H, self.T, self.D)

    @property
    def width(self) -> int:
        """Numbers in a head, padded to a power of 2 that a product takes."""
        return max(16, 1 << (self.D - 1).bit_length())

    @property
    def sizes(self) -> tuple[int, int, int, float]:
        return self.H, self.T, self.L, self.D**-0.5

    def how(self, tile: Tile) -> dict:
        """The keyword arguments of a kernel."""
        return {
            "J": self.H // self.G,
            "D": self.D,
            "W": self.width,
            "M": tile.M,
            "N": tile.N,
            "DOT": _product_dtype(self.dtype),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of the batch, the heads and the tokens of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _with_dense_rows(x: Tensor) -> Tensor:
    """A copy where the numbers of a head are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_projection(x: Tensor, need: bool = True) -> Tensor:
    """An empty tensor like x [B, heads, T, D], with memory in the order B, T, heads, D.

    The model joins a token's heads next: no copy. need: False gives one without elements.
    """
    B, heads, T, D = x.shape
    return x.new_empty(B, T, heads, D).transpose(1, 2) if need else x.new_empty(0)


def _empty_results(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return _like_projection(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_q, needs_kv, needs_table = needed
    return (
        _like_projection(q, needs_q),
        _like_projection(k, needs_kv),
        _like_projection(v, needs_kv),
        table.new_empty(table.shape if needs_table else 0),
    )


# ------------------------------------------------------------------------------------------- Triton
def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _product_dtype(dtype: torch.dtype):
    """Triton's dtype of what is multiplied: that of the queries.

    The interpreter takes the bits of bfloat16 for integers when it multiplies: float32 there.
    """
    language = importlib.import_module("triton.language")
    if is_interpreted() and dtype == torch.bfloat16:
        return language.float32
    return getattr(language, str(dtype).removeprefix("torch."))


@functools.cache
def _triton() -> ModuleType:
    """The kernels: importing Triton takes a second, and needs it installed."""
    return importlib.import_module("runtime.kernels.bias_attention_triton")
