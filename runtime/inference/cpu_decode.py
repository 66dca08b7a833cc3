"""Decode on a CPU with runtime/inference/cpu_decode.c.

The machine's own C compiler compiles it once (runtime/kernels/compile.py). It runs a finished
plain LLM (`native_model`, `NativeModel`): the C code gets pointers to the model's own parameters
and to ordinary KV caches. So nothing is copied, and a text can go from PyTorch's path to this one
and back. Without a compiler, or for a dtype other than float32, `native_model` says why and
runtime/inference/decoder.py continues in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import LLM
from model_parts import KVCache, rope_tables
from runtime.checks.known import (
    ATTENTION,
    EXPERTS,
    OUTSIDE,
    PACKED_TENSORS,
    POSITIONS,
    SIZES,
    TENSORS,
    TRAINING,
    Known,
)
from runtime.inference.quantize import is_packed, kind_of
from runtime.kernels.compile import EXACT, compiled, digest

SOURCE = Path(__file__).with_name("cpu_decode.c")
# As in the C code.
GROUP, MOST_QUERIES, NIBBLES, WIDE = 64, 6, 32, 128
# Of working memory, for WIDE inputs.
ROUNDED_FLOATS = 72
# Of weights; of those packed to 8 bits, to 4, and of the scales of these.
DTYPES = (torch.float32, torch.int8, torch.uint8, torch.bfloat16)
# In the order of the C code's enum.
ACTIVATIONS = ("gelu", "swiglu", "swiglu_clamped")
KNOWS = Known(
    "the C decoder",
    SIZES | ATTENTION | POSITIONS | EXPERTS | OUTSIDE | TRAINING,
    TENSORS | PACKED_TENSORS,
)
# Bytes of weights, read once for each token: for less, another thread costs more than it gains.
LEAST_BYTES_PER_THREAD = 1 << 20


# ---------------------------------------------------------------------------------- the C library
def _struct(name: str, **fields) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _of(kind, names: str) -> dict:
    return dict.fromkeys(names.split(), kind)


Matrix = _struct("Matrix", **_of(c_void_p, "weight scale bias groups"), **_of(c_int32, "rows cols"))
Block = _struct(
    "Block",
    **_of(
        c_void_p, "norm1 norm2 q_norm k_norm router router_bias selection_bias attention_bias sinks"
    ),
    **_of(Matrix, "q k v out w_in w_out"),
    **_of(c_int32, "window capacity is_ring unused"),
)
Model = _struct(
    "Model",
    **_of(c_int32, "C L H G D V E K F activation table threads"),
    eps=c_float,
    unused=c_int32,
    norm=c_void_p,
    **_of(Matrix, "embed head"),
    blocks=POINTER(Block),
    **_of(c_void_p, "cos sin"),
)
Pass = _struct(
    "Pass",
    m=POINTER(Model),
    **_of(c_int32, "n num_logits"),
    **_of(c_void_p, "ids positions caches keys values logit_rows logits"),
    **_of(c_void_p, "best best_log_probs targets log_probs experts weights"),
    **_of(c_void_p, "x y q k v h up chosen order starts gate private"),
    private_floats=c_int64,
    **_of(c_int32, "team arrived phase planes"),
)


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing)."""
    code, why = compiled(SOURCE, EXACT)
    if code is None:
        return None, why
    sizes = [code.gptoss_sizes(i) for i in range(5)]
    # Python's -O leaves assertions out, and C would read elsewhere.
    if sizes != [*(ctypes.sizeof(s) for s in (Matrix, Block, Model, Pass)), 4 * ROUNDED_FLOATS]:
        raise ValueError("cpu_decode.c and cpu_decode.py disagree about a structure")
    code.gptoss_forward.argtypes, code.gptoss_forward.restype = [POINTER(Pass)], None
    return code, ""


@functools.cache
def library_digest() -> str:
    """Return the SHA-256 of the compiled code, "" without it."""
    return digest(library()[0])


# -------------------------------------------------------------------------------------- the model
def native_model(model: LLM) -> tuple[NativeModel | None, str]:
    """Return (the model for C, ""), or (None, why not)."""
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    if kinds != {("cpu", torch.float32)}:
        return None, "native decoding is for float32 on a CPU"
    if why := KNOWS.why_not(model):
        return None, why
    code, why = library()
    return (NativeModel(model, code) if code else None), why


class Read(NamedTuple):
    """What a pass over n tokens gives.

    The rows of all texts follow one another: R rows of logits or of scores, where they were named.
    """

    # [R, V] float32, unless targets are scored.
    logits_RV: Tensor | None
    # If asked for, of the targets, and of the most likely ids: [R] float64, nats. NaN for damaged
    # logits.
    log_probs_R: np.ndarray | None
    best_log_probs_R: np.ndarray | None
    # The most likely ids, of equals the lowest: [R] int32.
    best_R: np.ndarray | None
    # If asked for, of all n tokens, strongest first: experts int32, routing weights float32.
    experts_LNK: np.ndarray | None
    weights_LNK: np.ndarray | None


class NativeModel:
    """A plain LLM as the C code sees it. The model's parameters must stay where they are.

    What a token gets depends on the tokens before it alone: the same bits in any company, however a
    text is cut into passes, and on any number of threads.
    """

    def __init__(self, model: LLM, code: ctypes.CDLL):
        c = model.config
        self.model, self.config, self._code = model, c, code
        # Tensors that only C points to.
        self._kept: list[Tensor] = []
        # (cos, sin) of the positions needed so far.
        self._rope: tuple[Tensor, Tensor] | None = None
        table = model.layers[0].attention.attention_bias
        self._blocks = (Block * c.transformer_blocks)(
            *(self._block(block) for block in model.layers)
        )
        self._m = Model(
            C=c.d_model,
            L=c.transformer_blocks,
            H=c.num_heads,
            G=c.num_kv_heads,
            D=c.attention_head_dim,
            V=c.vocabulary_size,
            E=c.num_experts,
            K=c.top_k,
            F=c.d_ff,
            activation=ACTIVATIONS.index(c.expert_activation),
            table=0 if table is None else table.shape[-1],
            eps=c.rms_norm_eps,
            norm=self._pointer(model.norm.weight),
            embed=self._matrix(model.embed, "weight"),
            head=self._matrix(
                model.embed if c.tie_embeddings and not is_packed(model) else model.out_head,
                "weight",
                model.out_head.bias,
            ),
            blocks=self._blocks,
        )
        self._is_packed = is_packed(model)
        self._widest = max(c.d_model, c.num_heads * c.attention_head_dim, c.d_ff)
        self._room: dict[str, Tensor] | None = None
        # Logits that are scored, [GROUP, V].
        self._scored: Tensor | None = None
        self._rows, self._named, self._threads = 0, 0, 0
        self._lock = threading.Lock()
        self.least_bytes_per_thread = LEAST_BYTES_PER_THREAD
        # 2: inputs of weights of 4 bits are rounded to 16 bits, not 8. For comparisons.
        self.planes = 1

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        known = tensor.dtype in DTYPES and tensor.device.type == "cpu"
        if not (known and tensor.is_contiguous()):
            raise ValueError(
                "the C kernel needs contiguous float32, int8 or int4 weights on the CPU, not "
                f"{tensor.dtype} on {tensor.device}"
            )
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, module, name: str, bias: Tensor | None = None) -> Matrix:
        """Return the weights `name` of a module, plain or packed by quantize.py."""
        packed = getattr(module, f"{name}_packed", None)
        weight = getattr(module, name) if packed is None else packed
        scale = None if packed is None else self._pointer(getattr(module, f"{name}_scale"))
        in_groups = packed is not None and kind_of(packed) == "int4"
        return Matrix(
            weight=self._pointer(weight),
            scale=None if in_groups else scale,
            bias=self._pointer(bias),
            groups=scale if in_groups else None,
            rows=weight.shape[-2],
            cols=weight.shape[-1] if packed is None else getattr(module, f"{name}_inputs"),
        )

    def _block(self, block) -> Block:
        a, moe = block.attention, block.moe
        return Block(
            norm1=self._pointer(block.norm1.weight),
            norm2=self._pointer(block.norm2.weight),
            router=self._pointer(moe.router.weight),
            q_norm=self._pointer(a.q_norm and a.q_norm.weight),
            k_norm=self._pointer(a.k_norm and a.k_norm.weight),
            router_bias=self._pointer(moe.router.bias),
            selection_bias=self._pointer(moe.router.selection_bias),
            attention_bias=self._pointer(a.attention_bias),
            sinks=self._pointer(a.sinks),
            q=self._matrix(a.W_q, "weight", a.W_q.bias),
            k=self._matrix(a.W_k, "weight", a.W_k.bias),
            v=self._matrix(a.W_v, "weight", a.W_v.bias),
            out=self._matrix(a.out_proj, "weight", a.out_proj.bias),
            w_in=self._matrix(moe.experts, "w_in", moe.experts.b_in),
            w_out=self._matrix(moe.experts, "w_out", moe.experts.b_out),
            window=a.window,
        )

    def forward(
        self, caches: Sequence[KVCache], ids: Sequence[Sequence[int]], all_logits: bool = False
    ) -> Tensor:
        """`read` for the logits [caches, V] of each text's last id, or of all ids: [all ids, V]."""
        rows = [range(len(own)) if all_logits else [len(own) - 1] for own in ids]
        logits_RV = self.read(caches, ids, rows).logits_RV
        assert logits_RV is not None
        return logits_RV

    def read(
        self,
        caches: Sequence[KVCache],
        ids: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]] | None = None,
        with_experts: bool = False,
        with_best: bool = False,
    ) -> Read:
        """Read further ids of each cache's text in one pass, and advance the caches.

        The caches must be different rows of one allocation. One that gets several ids must have no
        ring buffer. rows: of each text, which of its ids have logits (0 is the first; none, and
        one several times, are allowed). targets: for each of these, the id to score instead; logits
        then stay here.
        with_best: the most likely ids next to the logits; with targets they always come.
        Raise ValueError for what C would read or write elsewhere: ids out of range, rows that are
        not there, a cache without room, and caches that one pass cannot have.
        """
        lengths = [len(own) for own in ids]
        self._check_room(caches, lengths)
        every = [i for own in ids for i in own]
        n, firsts = len(every), [0, *itertools.accumulate(lengths[:-1])]
        named = [first + row for first, own in zip(firsts, rows, strict=True) for row in own]
        scored = None if targets is None else [i for own in targets for i in own]
        for some in (every, scored or [0]):
            if not some or min(some) < 0 or max(some) >= self.config.vocabulary_size:
                raise ValueError(f"token ids must be from 0 to {self.config.vocabulary_size - 1}")
        if not all(0 <= row < T for own, T in zip(rows, lengths, strict=True) for row in own):
            raise ValueError("a row is that of an id that is not read: count each text's from 0")
        if scored is not None and len(scored) != len(named):
            raise ValueError(f"{len(named)} rows have {len(scored)} targets: give one for each")
        positions = np.concatenate(
            [
                np.arange(cache.length, cache.length + T, dtype=np.int32)
                for cache, T in zip(caches, lengths, strict=True)
            ]
        )
        owners = np.repeat(np.arange(len(caches), dtype=np.int32), lengths)
        keys, values = (np.concatenate([_addresses(cache)[i] for cache in caches]) for i in (0, 1))
        # C has one capacity for all, and its threads write to all at once.
        if not all(cache.is_ring is caches[0].is_ring for cache in caches):
            raise ValueError("caches of one pass must be rows of one allocation")
        if len(set(keys[:: self.config.transformer_blocks].tolist())) != len(caches):
            raise ValueError("a cache is given twice: give all further ids of a text at once")
        given: dict[str, np.ndarray | None] = dict(
            ids=np.array(every, dtype=np.int64),
            positions=positions,
            caches=owners,
            keys=keys,
            values=values,
            logit_rows=np.array(named, dtype=np.int32),
        )
        out = self._outputs(n, len(named), scored, with_experts, with_best)
        # C runs without Python's lock, and there is one working memory.
        with self._lock:
            # A row may be named more than once: their normalised inputs have a place each.
            self._prepare(n, len(named), caches[0])
            p = self._pass
            p.n, p.num_logits, p.planes = n, len(named), self.planes
            for name, array in (given | out).items():
                setattr(p, name, None if array is None else _address(array))
            if scored is not None:
                p.logits = self._group_of_logits()
            self._code.gptoss_forward(ctypes.byref(p))
        for cache, T in zip(caches, lengths, strict=True):
            cache.advance(T)
        logits = out["logits"]
        return Read(
            None if logits is None else torch.from_numpy(logits),
            *(out[name] for name in ("log_probs", "best_log_probs", "best", "experts", "weights")),
        )

    def _check_room(self, caches: Sequence[KVCache], lengths: list[int]) -> None:
        """Raise ValueError for a cache that so many further tokens do not fit."""
        for cache, T in zip(caches, lengths, strict=True):
            cache.check_fits(1, T)
            self.model.check_length(cache.length + T)
            if T > 1 and any(cache.is_ring):
                raise ValueError("a ring loses keys that the first of several new tokens need")

    def _outputs(
        self,
        n: int,
        num_logits: int,
        targets: list[int] | None,
        with_experts: bool,
        with_best: bool,
    ) -> dict[str, np.ndarray | None]:
        """Return what C writes to, and the targets; None for what is not asked for."""
        c, is_scored = self.config, targets is not None
        ids = None if targets is None else np.array(targets, np.int32)
        experts_shape = (c.transformer_blocks, n, c.top_k)

        def array(is_wanted: bool, shape, dtype) -> np.ndarray | None:
            return np.empty(shape, dtype) if is_wanted else None

        return dict(
            logits=array(not is_scored, (num_logits, c.vocabulary_size), np.float32),
            targets=ids,
            log_probs=array(is_scored, num_logits, np.float64),
            best_log_probs=array(is_scored or with_best, num_logits, np.float64),
            best=array(is_scored or with_best, num_logits, np.int32),
            experts=array(with_experts, experts_shape, np.int32),
            weights=array(with_experts, experts_shape, np.float32),
        )

    def _group_of_logits(self) -> int:
        """Return where C puts the logits of those rows that it scores at a time."""
        if self._scored is None:
            self._scored = torch.empty(GROUP, self.config.vocabulary_size)
        return self._scored.data_ptr()

    def _prepare(self, n: int, num_logits: int, cache: KVCache) -> None:
        """Set up the pass: working memory for n rows of which num_logits are named, rotations for
        the cache's positions, each block's capacity, the number of threads.
        """
        c = self.config
        if c.use_rope and (self._rope is None or len(self._rope[0]) < cache.max_tokens):
            self._rope = rope_tables(c, 0, cache.max_tokens, torch.float32, "cpu")
            self._m.cos, self._m.sin = self._rope[0].data_ptr(), self._rope[1].data_ptr()
        for block, store, is_ring in zip(self._blocks, cache.keys, cache.is_ring, strict=True):
            block.capacity, block.is_ring = store.shape[2], is_ring
        threads = min(
            torch.get_num_threads(),
            max(1, n * self.bytes_per_token() // self.least_bytes_per_thread),
        )
        # Inputs that are rounded at a time, for packed weights.
        rounded = min(max(n, num_logits), GROUP) if self._is_packed else 0
        private = max(
            self.planes * rounded * -(-self._widest // WIDE) * ROUNDED_FLOATS,
            MOST_QUERIES * (cache.max_tokens + 16),
            c.num_experts,
        )
        if (
            self._room is None
            or n > self._rows
            or num_logits > self._named
            or threads > self._threads
            or private > self._pass.private_floats
        ):
            HD = c.num_heads * c.attention_head_dim
            GD = c.num_kv_heads * c.attention_head_dim
            # Assignments of a token to an expert.
            R = n * c.top_k
            sizes = dict(
                x=n * c.d_model,
                y=max(n * max(c.d_model, HD), num_logits * c.d_model),
                q=n * HD,
                k=n * GD,
                v=n * GD,
                h=R * c.d_ff,
                up=R * c.d_ff,
                gate=R,
                chosen=R,
                order=R,
                starts=c.num_experts + 1,
                private=threads * private,
            )
            # float32 or int32: all of them are 4 bytes wide.
            self._room = {name: torch.empty(size) for name, size in sizes.items()}
            self._rows, self._named, self._threads = n, max(n, num_logits), threads
            self._pass = Pass(
                m=ctypes.pointer(self._m),
                private_floats=private,
                **{name: t.data_ptr() for name, t in self._room.items()},
            )
        self._m.threads = threads

    def bytes_per_token(self) -> int:
        """Return the bytes of weights that one token reads.

        These are its experts, attention, router and head, and one row of the embedding.
        """
        return self._token_bytes

    # Kept here, and not in a cache of the function: that would keep each decoder that ever was.
    @functools.cached_property
    def _token_bytes(self) -> int:
        def size(matrix, rows: int) -> int:
            row = matrix.cols + 4 if matrix.scale else 4 * matrix.cols
            if matrix.groups:
                row = -(-matrix.cols // NIBBLES) * (NIBBLES // 2 + 2)
            return rows * (row + 4 * bool(matrix.bias))

        c = self.config
        total = size(self._m.head, self._m.head.rows) + size(self._m.embed, 1)
        for b in self._blocks:
            total += sum(size(m, m.rows) for m in (b.q, b.k, b.v, b.out))
            total += c.top_k * sum(size(m, m.rows) for m in (b.w_in, b.w_out))
            # The router.
            total += 4 * c.num_experts * c.d_model
        return total


def _address(array: np.ndarray) -> int:
    """Return where an array's numbers are. `array.ctypes` makes an object each time."""
    return array.__array_interface__["data"][0]


def _addresses(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Return where a cache of one row has its keys and values, by block: [L] uint64 each.

    Raise ValueError for a cache that is none of one row.
    """
    if not hasattr(cache, "_addresses"):
        both = cache.keys + cache.values
        if any(t.dtype != torch.float32 or len(t) != 1 or not t[0].is_contiguous() for t in both):
            raise ValueError("a cache of the C kernel is one contiguous row of float32")
        cache._addresses = tuple(
            np.array([t.data_ptr() for t in tensors], dtype=np.uint64)
            for tensors in (cache.keys, cache.values)
        )
    return cache._addresses
