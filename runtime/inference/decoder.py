"""Generate at the machine's speed: many sequences at once, each in a KV cache that is kept.

`Decoder` runs a finished plain LLM in one of three ways that give the same logits: by the C kernel
of runtime/inference/cpu_decode.c (float32 on a CPU), by one captured CUDA graph a token, or by a
few PyTorch operations (`decode_step`) anywhere else. A model that none of them knows is stepped
through by its own forward pass. `generate` is model.generate for many sequences; it reuses what is
in the caches and can guess tokens by prompt-lookup decoding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config_model import ModelConfig
from model import LLM, check_drawn, check_sampling, penalise_repetition, sample
from model_parts import Block, KVCache, activate, rope_tables_at
from runtime.base.compiler import explained_compiler_failure
from runtime.base.device import one_thread
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
from runtime.inference import asked
from runtime.inference.cpu_decode import native_model
from runtime.inference.quantize import copy_weights_, is_packed, packed_kind, unpack

# Tokens of a prompt at once: with more, PyTorch's matrix products are the faster ones.
MOST_NATIVE_ROWS = 512
# A CUDA graph reads so many slots of the cache, or 2, 4, ... times as many.
GRAPH_SPAN = 256
KNOWS = Known(
    "decode_step",
    SIZES | ATTENTION | POSITIONS | EXPERTS | OUTSIDE | TRAINING,
    TENSORS | PACKED_TENSORS,
)
NOT_ASKED_FOR = "the C kernel was not asked for"
# One CUDA graph is captured at a time: torch.cuda.graph first waits for the whole device, which
# ends a capture in another thread, and all threads capture on one stream.
CAPTURE = threading.Lock()
# Weights of which a compiled step is tuned: smaller ones stay in a GPU's L2 cache (50 MB on an
# H100), and tuning takes a minute.
TUNED_BYTES = 1 << 26
# Logits from which a CPU draws on all threads: to wake them takes 0.1 ms and more.
WORTH_THREADS = 1 << 19
# Tokens at the end of a text that prompt-lookup decoding searches for earlier in it, down to 2.
LONGEST_MATCH = 4


@dataclass
class Text:
    """A sequence that is being continued.

    Its cache holds keys and values of the first `cache.length` of `ids`.
    """

    cache: KVCache
    ids: list[int] = field(default_factory=list)


class Decoder:
    """A model ready to generate.

    native: False keeps to PyTorch. compile: fuse the operations of a CUDA graph, which takes a
    while at the first token. weights: digest of the model's file, "" if it has none.

    Each fast way is asked for a few tokens here (runtime/inference/asked.py). Where it does not
    know the model, or gives other logits, the next one is used: the C decoder, decode_step, the
    plain model with its cache.
    """

    def __init__(self, model: LLM, native: bool = True, compile: bool = False, weights: str = ""):
        self.model, self.config, self.device = model.eval(), model.config, model.embed.weight.device
        self.native: Any
        self.native, self.why_not_native = native_model(model) if native else (None, NOT_ASKED_FOR)
        # "": decode_step knows the model.
        self.why_not_step = KNOWS.why_not(model)
        self.compiles = compile
        self._graphs: dict[int, tuple] = {}
        # The cache of all texts, made by `texts`, and what asked.settle says.
        self._whole: Any = None
        self._texts: list[Text] = []
        self._addresses = _addresses(model)
        self.kernel_notes: list[str] = []
        # Then PyTorch has to unpack every matrix that it uses.
        self._is_packed = is_packed(model)
        asked.settle(self, decode_step, KNOWS, weights)

    @property
    def note(self) -> str:
        """What a user should know of how this decodes, in one line.

        "" for a fast way, and for a slower one that was asked for.
        """
        lines = [*self.kernel_notes]
        is_wanted = self.device.type != "cpu" or self.why_not_native == NOT_ASKED_FOR
        if self.native is None and self.why_not_step:
            slowest = "the plain model decodes, text by text, which is slowest"
            lines.append(f"{slowest}: {self.why_not_step}")
        elif self.native is None and not is_wanted:
            lines.append(f"PyTorch decodes, which is slower: {self.why_not_native}")
        return "; ".join(lines)

    def texts(self, count: int, max_tokens: int, rings: bool = True) -> list[Text]:
        """Return `count` empty texts with room for `max_tokens` each.

        Those of an earlier call are no longer valid. rings: windowed blocks keep only their window,
        unless C decodes packed weights. Without, they keep all keys: such texts can be read in
        chunks, cut and copied.
        """
        # First, so that both are never in memory at once.
        self._whole, self._caches, self._texts, self._graphs = None, [], [], {}
        # One slot more: where a step has texts that take no part, they write after their end.
        dtype = self.model.embed.weight.dtype
        # C reads prompts where caches are whole. PyTorch, which reads the others, does not round a
        # packed layer's inputs: one prompt would have two sets of logits.
        keeps_windows = rings and not (self._is_packed and self.native)
        kind = KVCache if keeps_windows else WholeCache
        self._whole = kind(self.config, count, max_tokens + 1, dtype, self.device)
        self._caches = self._whole.rows()
        self._row = {id(cache): row for row, cache in enumerate(self._caches)}
        for cache in self._caches:
            cache.max_tokens = max_tokens
        self._texts = [Text(cache) for cache in self._caches]
        return list(self._texts)

    @torch.inference_mode()
    def fork(self, text: Text, count: int) -> list[Text]:
        """Return `count` texts that hold what `text` holds: itself and the rows after it.

        So a prompt with several answers is read once. What the other rows held is overwritten.
        Raise ValueError where `texts` made fewer rows.
        """
        first, length = self._row[id(text.cache)], text.cache.length
        forked = self._texts[first : first + count]
        if count < 1 or len(forked) < count:
            raise ValueError(
                f"a fork to {count} texts from row {first} needs rows up to {first + count - 1}, "
                f"and there are {len(self._texts)}: ask texts() for more"
            )
        for store in self._whole.keys + self._whole.values:
            # A ring buffer that has wrapped is copied whole.
            used = min(length, store.shape[2])
            store[first + 1 : first + count, :, :used] = store[first, :, :used]
        for other in forked[1:]:
            other.cache.length, other.ids = length, list(text.ids)
        return forked

    def clear(self, text: Text) -> None:
        """Reset and zero a text's cache: 0 * NaN is NaN, so stale values after the end would leak.

        Its ids are none, in a list of its own.
        """
        text.ids = []
        text.cache.reset()
        for tensor in text.cache.keys + text.cache.values:
            tensor.zero_()

    def weights_changed(self, source: LLM | None = None) -> None:
        """Follow weights that have changed: forget all that the caches hold of the old ones.

        source: the model that this decoder runs a copy of (packed, in another dtype, on another
        device, with adapters merged); its weights are copied, and packed again. The C decoder and
        CUDA graphs read weights where they are, so they stay unless a tensor has moved.
        """
        if source is not None:
            copy_weights_(self.model, source)
        if self._whole is not None:
            self.forget()
        if (addresses := _addresses(self.model)) == self._addresses:
            return
        self._addresses, self._graphs = addresses, {}
        if self.native is not None:
            self.native, self.why_not_native = native_model(self.model)

    def forget(self) -> None:
        """Clear all texts."""
        for text in self._texts:
            self.clear(text)

    @torch.inference_mode()
    def read(self, text: Text, ids: list[int], all_logits: bool = False) -> Tensor:
        """Make `ids` the text; return logits [1, V] of its last token.

        all_logits: [T, V] of all tokens that were not in the cache. What the cache holds is not
        computed again, unless a ring buffer has overwritten what that would need.
        """
        new = self._begin(text, ids)
        with _safe([text.cache]):
            if self._reads_natively(text, new):
                firsts = range(0, len(new), MOST_NATIVE_ROWS)
                chunks = [new[first : first + MOST_NATIVE_ROWS] for first in firsts]
                logits = [
                    self.native.forward([text.cache], [chunk], all_logits) for chunk in chunks
                ]
                return torch.cat(logits) if all_logits else logits[-1]
            ids_1T = torch.tensor([new], device=self.device)
            return self.model(ids_1T, cache=text.cache, last_token_only=not all_logits).logits[0]

    @torch.inference_mode()
    def read_all(self, texts: Sequence[Text], ids: Sequence[list[int]]) -> Tensor:
        """`read` for several texts: return logits [B, V] of their last tokens.

        Short ones pass together, so that each weight is read once for them.
        """
        logits: dict[int, Tensor] = {}
        group: list[int] = []
        new = [self._begin(text, own) for text, own in zip(texts, ids, strict=True)]

        def pass_group() -> None:
            caches = [texts[i].cache for i in group]
            with _safe(caches):
                rows = self.native.forward(caches, [new[i] for i in group])
                logits.update(zip(group, rows, strict=True))
            group.clear()

        for i, text in enumerate(texts):
            if not self._reads_natively(text, new[i]) or len(new[i]) > MOST_NATIVE_ROWS:
                logits[i] = self.read(text, ids[i])[0]
                continue
            if group and sum(len(new[j]) for j in group) + len(new[i]) > 2 * MOST_NATIVE_ROWS:
                pass_group()
            group.append(i)
        if group:
            pass_group()
        return torch.stack([logits[i] for i in range(len(texts))])

    def _begin(self, text: Text, ids: list[int]) -> list[int]:
        """Make `ids` the text, rewind its cache to what they share; return the ids to read."""
        pairs = zip(ids[:-1], text.ids[: text.cache.length], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not text.cache.rewind(shared):
            text.cache.reset()
        text.ids = ids
        return ids[text.cache.length :]

    def _reads_natively(self, text: Text, new: list[int]) -> bool:
        if self.native is None:
            return False
        is_short = len(new) <= MOST_NATIVE_ROWS or self._is_packed
        return len(new) == 1 or (is_short and not any(text.cache.is_ring))

    @torch.inference_mode()
    def step(self, texts: Sequence[Text], ids_B: Tensor) -> Tensor:
        """Return logits [B, V] after one more token for each of some texts.

        ids [B] int64; on a GPU the host does not wait for them. All tokens of the texts are in
        their caches.
        """
        caches = [text.cache for text in texts]
        with _safe(caches):
            if self.native:
                return self.native.forward(caches, ids_B[:, None].tolist())
            return self._step(caches, ids_B)

    def _step(self, caches: list[KVCache], ids_B: Tensor) -> Tensor:
        for cache in caches:
            cache.check_fits(1, 1)
            self.model.check_length(cache.length + 1)
        if self.why_not_step:
            rows_B11 = ids_B.clamp(min=0)[:, None, None]
            pairs = zip(rows_B11, caches, strict=True)
            return torch.cat(
                [self.model(id_11, cache=cache).logits[:, -1] for id_11, cache in pairs]
            )
        B = len(self._caches)
        positions = [cache.length for cache in self._caches]
        rows = [self._row[id(cache)] for cache in caches]
        takes_all = rows == list(range(B))
        span = max(positions[row] for row in rows) + 1
        ids, where = ids_B.clamp(min=0), self._to_device(positions)
        if not takes_all:
            ids = torch.zeros(B, dtype=torch.int64, device=self.device).index_copy_(
                0, self._to_device(rows), ids
            )
        if self.device.type == "cuda":
            logits_BV = self._replay(ids, where, span)
        else:
            logits_BV = decode_step(self.model, self._whole, ids, where, span)
        for cache in caches:
            cache.advance(1)
        return logits_BV if takes_all else logits_BV[self._to_device(rows)]

    def _to_device(self, numbers: list[int]) -> Tensor:
        tensor = torch.tensor(numbers)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _replay(self, ids_B: Tensor, positions_B: Tensor, span: int) -> Tensor:
        """Run `decode_step` as a CUDA graph: one for each of GRAPH_SPAN, twice that, ... slots."""
        doublings = max(0, -(-span // GRAPH_SPAN) - 1).bit_length()
        span = min(self._whole.max_tokens, GRAPH_SPAN << doublings)
        if span not in self._graphs:
            self._graphs[span] = self._capture(ids_B, positions_B, span)
        graph, ids, positions, logits, _ = self._graphs[span]
        ids.copy_(ids_B)
        positions.copy_(positions_B)
        graph.replay()
        return logits.clone()

    def _capture(self, ids_B: Tensor, positions_B: Tensor, span: int):
        """Return (graph, its ids [B], its positions [B], its logits [B, V], its function).

        The runs before the capture write what the first replay will write again.
        """
        ids, positions = ids_B.clone(), positions_B.clone()
        function = decode_step
        if self.compiles:
            tensors = (*self.model.parameters(), *self.model.buffers())
            function = compiled_step(span, sum(t.nbytes for t in tensors) >= TUNED_BYTES)
        with CAPTURE, torch.cuda.device(self.device):
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side), explained_compiler_failure():
                for _ in range(3):
                    function(self.model, self._whole, ids, positions, span)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # One memory for all graphs: a replay's logits are copied before the next.
            pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
            # Other threads' decoders may ask for memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = function(self.model, self._whole, ids, positions, span)
        # What was compiled lives as long as the graph that runs it.
        return graph, ids, positions, logits, function


def without_windows(config: ModelConfig) -> ModelConfig:
    """Return the config of a cache without ring buffers: it keeps the keys of all tokens."""
    return dataclasses.replace(config, sliding_window=0, window_pattern="all")


class WholeCache(KVCache):
    """A KVCache without ring buffers: windowed blocks keep all keys, too.

    So it can be read in chunks, cut and copied. As a ring buffer does, it gives a single query only
    the keys that this sees: the model masks none of them then, unless it has learned biases.
    """

    def __init__(self, config: ModelConfig, *sizes):
        super().__init__(without_windows(config), *sizes)
        has_mask = config.use_attention_bias
        blocks = range(config.transformer_blocks)
        self.windows = [0 if has_mask else config.window(block) for block in blocks]

    def update(self, block: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        T, window = k_BGTD.shape[2], self.windows[block]
        k_BGSD, v_BGSD = super().update(block, k_BGTD, v_BGTD)
        if T == 1 and window:
            return k_BGSD[:, :, -window:], v_BGSD[:, :, -window:]
        return k_BGSD, v_BGSD


def copy_beginning(source: KVCache, target: KVCache, tokens: int) -> None:
    """Make the first tokens of one cache those of another, too. Neither has ring buffers."""
    for theirs, own in zip(source.keys + source.values, target.keys + target.values, strict=True):
        own[:, :, :tokens] = theirs[:, :, :tokens]
    target.length = tokens


def _addresses(model: LLM) -> list[int]:
    """Return where the model's tensors are in memory."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


@contextlib.contextmanager
def _safe(caches: Sequence[KVCache]) -> Iterator[None]:
    """If a forward pass is interrupted, discard it.

    Ring buffers, which may be half overwritten, are cleared.
    """
    try:
        yield
    except BaseException:
        for cache in caches:
            if any(cache.is_ring):
                cache.reset()
        raise


@torch.inference_mode()
def router_choices(model: LLM, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return where the routers send each token of a text, and with which routing weights.

    (experts [L, T, K] int64, weights [L, T, K] float32).
    """
    chosen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.moe.router.register_forward_hook(lambda module, given, out: chosen.append(out[:2]))
        for block in model.layers
    ]
    try:
        model(torch.tensor([list(ids)], device=model.embed.weight.device), last_token_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    weights, experts = (torch.stack(values).cpu() for values in zip(*chosen, strict=True))
    return experts, weights.float()


# -------------------------------------------------------------------------- one token for each text
class RowCache:
    """A KVCache whose rows are at positions of their own, for one more token of each.

    positions [B] int64 on the device. The first `span` slots are read, more than every position.
    Where a row's tokens end is never asked on the host, so that a CUDA graph can hold the step.
    """

    per_row = True
    length = 0

    def __init__(self, cache: KVCache, positions_B: Tensor, span: int):
        self.cache, self.positions_B, self.span = cache, positions_B, span
        self.row_B = torch.arange(len(positions_B), device=positions_B.device)

    def update(self, block: int, k_BG1D: Tensor, v_BG1D: Tensor) -> tuple[Tensor, Tensor]:
        """Store each row's key and value at its position; return the slots that are read."""
        results = []
        for store, new in (
            (self.cache.keys[block], k_BG1D),
            (self.cache.values[block], v_BG1D),
        ):
            capacity = store.shape[2]
            is_ring = self.cache.is_ring[block]
            slot_B = self.positions_B % capacity if is_ring else self.positions_B
            store[self.row_B, :, slot_B] = new[:, :, 0].to(store.dtype)
            results.append(store[:, :, : min(self.span, capacity)].to(new.dtype))
        return results[0], results[1]

    def query_positions(self, T: int, device) -> Tensor:
        return self.positions_B[:, None]

    def key_positions(self, block: int, T: int) -> Tensor:
        """Return the positions [B, S] of what the slots hold; of an empty one, one nobody sees."""
        capacity = self.cache.keys[block].shape[2]
        now_B1 = self.positions_B[:, None]
        slot_S = torch.arange(min(self.span, capacity), device=now_B1.device)
        if not self.cache.is_ring[block]:
            return slot_S.expand(len(now_B1), -1)
        positions_BS = now_B1 - (now_B1 - slot_S) % capacity
        return torch.where(positions_BS < 0, now_B1 + 1, positions_BS)


def decode_step(
    model: LLM, cache: KVCache, ids_B: Tensor, positions_B: Tensor, span: int
) -> Tensor:
    """Return logits [B, V] of one more token for each row of a cache, at positions of their own.

    Keys and values are stored, `cache.length` is not touched. ids, positions [B] int64 on the
    device; the first `span` slots of the cache are read, more than every position. Shapes and
    memory are the same at every call with the same span and the host waits for nothing, so that a
    CUDA graph can hold it.
    """
    x_BC = model.embed(ids_B)
    rows = RowCache(cache, positions_B, span)
    rope = None
    if model.config.use_rope:
        dtype = torch.promote_types(x_BC.dtype, torch.float32)
        cos_BD, sin_BD = rope_tables_at(model.config, positions_B, dtype)
        rope = cos_BD[:, None, None], sin_BD[:, None, None]
    for block in model.layers:
        x_BC = x_BC + block.attention(block.norm1(x_BC)[:, None], rope, rows)[:, 0]
        x_BC = x_BC + _experts(block, block.norm2(x_BC))
    return _head(model, model.norm(x_BC))


def _head(model: LLM, x_BC: Tensor) -> Tensor:
    """Return logits [B, V] by the output projection, packed or not."""
    # Any: quantize_ gives it `weight_packed` and `weight_scale`.
    head: Any = model.out_head
    if packed_kind(model) != "int8":
        return F.linear(x_BC, model.head_weight, head.bias)
    packed_VC = head.weight_packed.to(x_BC.dtype)
    logits_BV = _products(packed_VC, x_BC) if torch.compiler.is_compiling() else x_BC @ packed_VC.T
    logits_BV = logits_BV.float() * head.weight_scale[:, 0]
    return logits_BV if head.bias is None else logits_BV + head.bias


def compiled_step(span: int, tunes: bool) -> Callable[..., Tensor]:
    """`decode_step`, compiled for one span.

    The compiler counts what it has compiled for one function and refuses the ninth, so each span
    gets a function of its own. tunes: search each kernel's sizes by coordinate descent; the
    compiler then also writes a product with one row as a sum that its neighbours join, where a call
    of cuBLAS would stand alone.
    """
    code = decode_step.__code__.replace(co_name=f"decode_step_{span}")
    own = types.FunctionType(code, decode_step.__globals__)
    options = {"coordinate_descent_tuning": True} if tunes else None
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _experts(block: Block, h_BC: Tensor) -> Tensor:
    """Return the mixture of experts of a few rows.

    On a GPU without asking which experts were chosen: read the matrices of the chosen ones alone,
    or, where those would be all, ask every expert about every row and weigh with 0.
    """
    moe, experts = block.moe, block.moe.experts
    K, num_experts = moe.router.top_k, len(moe.router.weight)
    is_all = len(h_BC) * K >= num_experts
    if not h_BC.is_cuda or (experts.grouped and is_all):
        return moe(h_BC[:, None])[0][:, 0]
    weights_BK, experts_BK, _, _ = moe.router(h_BC)
    if is_all:
        weights_BE = torch.zeros(
            len(h_BC), num_experts, dtype=weights_BK.dtype, device=h_BC.device
        ).scatter_(1, experts_BK, weights_BK)
        h_EBI = h_BC @ experts.w_in.transpose(1, 2)
        h_EBI = h_EBI + (0 if experts.b_in is None else experts.b_in[:, None])
        y_EBC = activate(h_EBI, experts.activation) @ experts.w_out.transpose(1, 2)
        y_EBC = y_EBC + (0 if experts.b_out is None else experts.b_out[:, None])
        return (y_EBC * weights_BE.T[:, :, None]).sum(dim=0).to(h_BC.dtype)
    h_BKI = _chosen_linear(experts, "in", experts_BK, h_BC[:, None].expand(-1, K, -1))
    h_BKF = activate(h_BKI, experts.activation)
    y_BKC = _chosen_linear(experts, "out", experts_BK, h_BKF)
    return (y_BKC * weights_BK[:, :, None]).sum(dim=1).to(h_BC.dtype)


def _chosen_linear(experts, which: str, experts_BK: Tensor, x_BKI: Tensor) -> Tensor:
    """Return x [B, K, I] times the chosen experts' matrices, plus their biases: [B, K, O].

    Compiled, the matrices are read where they are.
    """
    packed = getattr(experts, f"w_{which}_packed", None)
    if packed is None:
        w_BKOI = getattr(experts, f"w_{which}")[experts_BK]
    else:
        scale_BKO1 = getattr(experts, f"w_{which}_scale")[experts_BK]
        w_BKOI = unpack(packed[experts_BK], scale_BKO1, x_BKI.dtype, x_BKI.shape[-1])
    if torch.compiler.is_compiling():
        y_BKO = _products(w_BKOI, x_BKI)
    else:
        y_BKO = (w_BKOI @ x_BKI[..., None])[..., 0]
    bias_EO = getattr(experts, f"b_{which}")
    return y_BKO if bias_EO is None else y_BKO + bias_EO[experts_BK]


def _products(w_OI: Tensor, x_I: Tensor) -> Tensor:
    """Return matrices [..., O, I] times vectors [..., I] as sums of products.

    The compiler makes that one pass, which reads the matrices where they are.
    """
    return (w_OI * x_I[..., None, :]).sum(dim=-1)


# --------------------------------------------------------------------------------------- generation
class Draw(Protocol):
    """How ids are drawn, and which of them end a row."""

    stop_ids: Sequence[int]

    def __call__(
        self, rows: list[int], ids: list[list[int]], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the next id of some rows, whose tokens so far are `ids[row]`.

        Return (ids [B] int64, -1 where logits are not finite; log-probabilities [B] or None).
        """


@dataclass
class Drawing:
    """How tokens are drawn: the settings of model.sample, and which ids end or never come."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop_ids: Sequence[int]
    banned_ids: Sequence[int]
    generators: Sequence[torch.Generator] | None
    device: torch.device
    # Whether it is asked for log-probabilities, too.
    gives_log_probs: bool = False

    def __post_init__(self):
        check_sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        )
        self.stops, self.banned = (
            torch.tensor(list(ids), dtype=torch.int64, device=self.device)
            for ids in (self.stop_ids, self.banned_ids)
        )

    def __call__(
        self, rows: list[int], ids: list[list[int]], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with _threads_for(logits_BV):
            return self._drawn(rows, ids, logits_BV)

    def _drawn(
        self, rows: list[int], ids: list[list[int]], logits_BV: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        given_BV = logits_BV
        if self.repetition_penalty != 1.0:
            logits_BV = torch.cat(
                [
                    self._penalised(ids[row], logits_V)
                    for row, logits_V in zip(rows, logits_BV, strict=True)
                ]
            )
        if self.temperature == 0 and logits_BV.device.type == "cpu":
            drawn_B = likeliest(logits_BV.float(), self.banned)
        else:
            drawn_B = sample(
                logits_BV,
                self.temperature,
                self.top_k,
                self.top_p,
                self.banned,
                [self.generators[row] for row in rows] if self.generators else None,
                self.min_p,
            )
        return drawn_B, self.log_probs(given_BV, drawn_B) if self.gives_log_probs else None

    def log_probs(self, logits_BV: Tensor, drawn_B: Tensor) -> Tensor:
        """Return the log-probability [B] of drawn ids: temperature 1, over the ids not banned.

        float32, or float64 of such logits.
        """
        dtype = torch.promote_types(logits_BV.dtype, torch.float32)
        logits_BV = logits_BV.to(dtype).index_fill(1, self.banned, -torch.inf)
        drawn_B1 = drawn_B.clamp(min=0)[:, None]
        return logits_BV.gather(1, drawn_B1)[:, 0] - logits_BV.logsumexp(dim=1)

    def _penalised(self, ids: list[int], logits_V: Tensor) -> Tensor:
        seen_1T = torch.tensor([ids], device=self.device)
        return penalise_repetition(
            logits_V[None].float(), seen_1T, self.repetition_penalty, self.stops
        )


def likeliest(logits_BV: Tensor, banned_ids: Tensor) -> Tensor:
    """Return model.sample's ids [B] at temperature 0, of float32 logits on a CPU.

    NumPy's calls cost less than PyTorch's. -1 in rows that are not finite. (`sample` also gives -1
    where finite logits add up to infinity.)
    """
    numbers_BV = logits_BV.detach().numpy()
    is_finite_B = np.isfinite(numbers_BV.min(axis=1)) & np.isfinite(numbers_BV.max(axis=1))
    if len(banned_ids):
        numbers_BV = numbers_BV.copy()
        numbers_BV[:, banned_ids.numpy()] = -np.inf
    return torch.from_numpy(np.where(is_finite_B, numbers_BV.argmax(axis=1), -1))


def _threads_for(logits_BV: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which one thread draws from few logits on a CPU."""
    is_small = logits_BV.device.type == "cpu" and logits_BV.numel() < WORTH_THREADS
    is_wanted = is_small and torch.get_num_threads() > 1
    return one_thread() if is_wanted else contextlib.nullcontext()


def generate(
    decoder: Decoder,
    texts: Sequence[Text],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.9,
    top_k: int = 50,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    generators: Sequence[torch.Generator] | None = None,
    slide: bool = True,
    lookup: int = 0,
    finished: set[int] | None = None,
    log_probs: Sequence[list[float]] | None = None,
    logits_BV: Tensor | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue a prompt (ids, not empty) in each text; yield (row, id) as soon as ids are drawn.

    Settings, sliding and stopping are model.generate's, for each row by itself: what a row draws
    depends on its prompt and its generator alone, up to the rounding of logits. A row ends with a
    stop id (which is yielded), at a full context without `slide`, or when the caller puts it into
    `finished`. Prompts are cut to their last context_length tokens. What the texts' caches hold is
    reused.

    lookup: with one row left, guess that many tokens from an earlier occurrence of the last ones,
    and check them in one pass (Saxena 2023, "prompt lookup decoding"). Each token is still drawn
    from the model's own distribution given what precedes it, with the noise that it would have had:
    the same text, up to the rounding of logits. ValueError with ring buffers in the cache.

    log_probs: a list for each row. The log-probability of each id that is yielded is appended: at
    temperature 1 over the ids that are not banned, whatever the settings (Drawing.log_probs).

    logits_BV: of each prompt's last token, where the texts hold the prompts whole (Decoder.fork).
    Nothing is read then.
    """
    draw = Drawing(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        stop_ids,
        banned_ids,
        generators,
        decoder.device,
        log_probs is not None,
    )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if lookup and any(texts[0].cache.is_ring):
        raise ValueError(
            "lookup takes back tokens, and this model's windowed blocks keep only their window: "
            "leave lookup out"
        )
    if max_new_tokens == 0 or not texts:
        return
    finished = set() if finished is None else finished
    run = Generation(
        decoder, texts, prompts, max_new_tokens, draw, slide, finished, log_probs, logits_BV
    )
    yield from run.in_steps(stop_at_one=lookup > 0)
    # At most one row is left, and that with prompt-lookup decoding.
    for row in run.unfinished():
        yield from run.by_lookup(row, lookup)


class Generation:
    """The rows that `generate` continues.

    draw: how ids are drawn, and which end a row. finished, log_probs, first_BV: the
    arguments finished, log_probs and logits_BV of `generate`. ids: of each row, what the model is
    to see; the very list that its text has.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Text],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        draw: Draw,
        slide: bool,
        finished: set[int],
        log_probs: Sequence[list[float]] | None = None,
        first_BV: Tensor | None = None,
    ):
        self.decoder, self.texts, self.draw = decoder, texts, draw
        self.stop_ids, self.log_probs, self.first_BV = draw.stop_ids, log_probs, first_BV
        self.max_new_tokens, self.slide, self.finished = max_new_tokens, slide, finished
        self.context = decoder.config.context_length
        self.ids = [list(prompt[-self.context :]) for prompt in prompts]
        self.num_drawn = [0] * len(texts)

    def unfinished(self) -> list[int]:
        """Return the rows that continue."""
        return [row for row in range(len(self.texts)) if row not in self.finished]

    def read(self, rows: list[int]) -> Tensor:
        """Return logits [rows, V], reading what their caches do not hold.

        A text that is too long continues from the newer half of the context.
        """
        for row in rows:
            if len(self.ids[row]) > self.context:
                self.ids[row] = self.ids[row][-max(1, self.context // 2) :]
        return self.decoder.read_all(
            [self.texts[row] for row in rows], [self.ids[row] for row in rows]
        )

    def start(self, rows: list[int]) -> Tensor:
        """Return logits [rows, V] after the prompts: those that were given, or by reading."""
        if self.first_BV is None:
            return self.read(rows)
        for text, ids in zip(self.texts, self.ids, strict=True):
            if text.cache.length != len(ids) or text.ids != ids:
                raise ValueError("logits of the prompts are given, and a text holds another prompt")
            text.ids = ids
        return self.first_BV[rows]

    def step(self, rows: list[int], ids_B: Tensor) -> Tensor:
        """Return logits [rows, V] after one more token of each."""
        return self.decoder.step([self.texts[row] for row in rows], ids_B)

    def drawn(self, rows: list[int], logits_BV: Tensor) -> tuple[Tensor, Drawn]:
        """Draw an id for each row: (ids [rows] on the device, the same on the way to the host)."""
        drawn_B, log_probs_B = self.draw(rows, self.ids, logits_BV)
        copied = None if log_probs_B is None else _HostCopy(log_probs_B)
        return drawn_B, Drawn(_HostCopy(drawn_B), copied)

    def take(self, rows: list[int], new: Drawn) -> list[tuple[int, int]]:
        """Append what was drawn, note which rows end with it, and return the pairs."""
        drawn = new.ids.read()
        try:
            check_drawn(drawn)
        except ValueError:
            self.decoder.forget()
            raise
        if self.log_probs is not None and new.log_probs is not None:
            for row, log_prob in zip(rows, new.log_probs.read(), strict=True):
                self.log_probs[row].append(log_prob)
        for row, token in zip(rows, drawn, strict=True):
            self.ids[row].append(token)
            self.num_drawn[row] += 1
            is_last = self.num_drawn[row] == self.max_new_tokens
            is_full = len(self.ids[row]) > self.context and not self.slide
            if token in self.stop_ids or is_last or is_full:
                self.finished.add(row)
        return list(zip(rows, drawn, strict=True))

    def in_steps(self, stop_at_one: bool) -> Iterator[list[tuple[int, int]]]:
        """Draw one token for each row at a time; stop_at_one: until one row is left."""
        rows = self.unfinished()
        logits_BV = self.start(rows) if rows else None
        while rows:
            assert logits_BV is not None
            (drawn_B, new), ahead_BV = self.drawn(rows, logits_BV), None
            if not stop_at_one and self._all_continue(rows):
                # The next step is on its way before this one's ids are read. For a row that ends
                # here it is for nothing.
                ahead_BV = self.step(rows, drawn_B)
            before = rows
            yield self.take(rows, new)
            rows = [row for row in before if row not in self.finished]
            if stop_at_one and len(rows) == 1:
                return
            if ahead_BV is None:
                logits_BV = self._next_logits(rows)
            elif len(rows) == len(before):
                logits_BV = ahead_BV
            else:
                logits_BV = ahead_BV[[before.index(row) for row in rows]]

    def _all_continue(self, rows: list[int]) -> bool:
        """Return whether a GPU's next step can be sent off: no row ends by its length here."""
        return self.decoder.device.type == "cuda" and all(
            self.num_drawn[row] + 1 < self.max_new_tokens and len(self.ids[row]) < self.context
            for row in rows
        )

    def _next_logits(self, rows: list[int]) -> Tensor | None:
        """Return logits [rows, V] after the last tokens; rows over the context are read again."""
        if not rows:
            return None
        full = [row for row in rows if len(self.ids[row]) > self.context]
        fitting = [row for row in rows if len(self.ids[row]) <= self.context]
        logits = dict(zip(full, self.read(full), strict=True)) if full else {}
        if fitting:
            last_B = torch.tensor(
                [self.ids[row][-1] for row in fitting], device=self.decoder.device
            )
            fitting_BV = self.step(fitting, last_B)
            if not full:
                return fitting_BV
            logits |= zip(fitting, fitting_BV, strict=True)
        return torch.stack([logits[row] for row in rows])

    def by_lookup(self, row: int, lookup: int) -> Iterator[list[tuple[int, int]]]:
        """Draw a row's tokens, several a pass where guesses from its own text are right."""
        text = self.texts[row]
        while row not in self.finished:
            room = self.context - len(self.ids[row])
            left = self.max_new_tokens - self.num_drawn[row] - 1
            guess = guess_from_text(self.ids[row], min(lookup, room, left))
            if guess:
                guessed_ids = self.ids[row] + guess
                logits_TV = self.decoder.read(text, guessed_ids, all_logits=True)
                logits_TV = logits_TV[-len(guess) - 1 :]
            else:
                logits_TV = self.read([row])
            for logits_V, guessed in zip(logits_TV, [*guess, None], strict=True):
                pairs = self.take([row], self.drawn([row], logits_V[None])[1])
                yield pairs
                if row in self.finished or pairs[0][1] != guessed:
                    break
            text.cache.rewind(len(self.ids[row]) - 1)
            text.ids = self.ids[row]


def guess_from_text(ids: Sequence[int], most: int) -> list[int]:
    """Return up to `most` ids that followed the last few when these last occurred in `ids`.

    The last few are LONGEST_MATCH, or fewer, down to 2.
    """
    text = np.asarray(ids)
    for n in range(min(LONGEST_MATCH, len(text) - 1), 1, -1) if most > 0 else ():
        candidates = np.lib.stride_tricks.sliding_window_view(text[:-1], n)
        if len(found := np.flatnonzero((candidates == text[-n:]).all(axis=1))):
            start = int(found[-1]) + n
            return list(ids[start : start + most])
    return []


class _HostCopy:
    """A number for each row, [B], on its way to the host.

    `read` waits for them, and for nothing that was started after.
    """

    def __init__(self, numbers_B: Tensor):
        self._numbers, self._event = numbers_B, None
        if numbers_B.is_cuda:
            self._numbers = torch.empty(
                numbers_B.shape, dtype=numbers_B.dtype, pin_memory=True
            ).copy_(numbers_B, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers_B.device))

    def read(self) -> list:
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


class Drawn(NamedTuple):
    """What was drawn for some rows, on the way to the host."""

    ids: _HostCopy
    # Where `generate` was asked for them.
    log_probs: _HostCopy | None
