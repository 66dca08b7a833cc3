"""The model's pieces: rotary positions, KV cache, attention, router, experts, block.

Shapes are written into names: B batch, T query tokens, S key tokens, C d_model, H query heads,
G key/value heads, D head_dim, N = B*T tokens, E experts, K top_k, R = N*K rows (token-expert
assignments), F d_ff, L blocks. A True in a mask keeps.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config_model import SWIGLU_LIMIT, SWIGLU_STEEPNESS, ModelConfig
from runtime.kernels.grouped_linear import (
    GatherRows,
    grouped_linear,
    row_bias,
)


# ---------------------------------------------------------------------------------------- positions
def _table_dtype(device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    is_mps = device is not None and torch.device(device).type == "mps"
    return torch.float32 if is_mps else torch.float64


def rope_frequencies(config: ModelConfig, device=None) -> Tensor:
    """Return the angular frequency of each rotated pair, [D/2], in radians per position."""
    D, factor = config.attention_head_dim, config.rope_scaling_factor
    dtype = _table_dtype(device)
    pairs = torch.arange(0, D, 2, dtype=dtype, device=device) / D
    frequencies = config.rope_theta**-pairs
    if config.rope_scaling == "linear":
        # "Position interpolation" (Chen et al. 2023).
        return frequencies / factor
    if config.rope_scaling == "yarn":
        # Divide only the slow ones, those that turn less than once over the trained context, and
        # blend up to those that turn 32 times (Peng et al. 2023, section 3.2). The ramp is over the
        # pair's index, its ends rounded outwards as in the authors' code, if `yarn_truncate`.
        trained_tokens = config.context_length / factor

        def pair_that_turns(times: float) -> float:
            turns = math.log(trained_tokens / (times * 2 * math.pi))
            return D * turns / (2 * math.log(config.rope_theta))

        fast, slow = pair_that_turns(32), pair_that_turns(1)
        if config.yarn_truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, D - 1)
        index = torch.arange(D // 2, dtype=dtype, device=device)
        keep = 1 - ((index - fast) / max(slow - fast, 1e-3)).clamp(0, 1)
        return frequencies * keep + frequencies / factor * (1 - keep)
    return frequencies


def rope_tables(
    config: ModelConfig, start: int, T: int, dtype: torch.dtype, device
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each [T, D], for absolute positions start .. start+T-1.

    dtype: float32 or float64. Made for each forward pass and never stored, so that casting a model
    cannot round its positions.
    """
    positions_T = torch.arange(start, start + T, dtype=_table_dtype(device), device=device)
    return rope_tables_at(config, positions_T, dtype)


def rope_tables_at(
    config: ModelConfig, positions_T: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `rope_tables` for any positions [T]."""
    device = positions_T.device
    frequencies = rope_frequencies(config, device)
    angles_TD = torch.outer(positions_T.to(_table_dtype(device)), frequencies).repeat(1, 2)
    # YaRN also sharpens attention by a temperature, folded into the tables (Peng et al. 2023,
    # section 3.4).
    scale = 0.1 * math.log(config.rope_scaling_factor) + 1 if config.rope_scaling == "yarn" else 1.0
    return (angles_TD.cos() * scale).to(dtype), (angles_TD.sin() * scale).to(dtype)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of every head by their position's angle (Su et al. 2021).

    In the tables' precision.
    """
    first, second = x_BHTD.chunk(2, dim=-1)
    return (x_BHTD * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD).to(x_BHTD.dtype)


def attention_mask(
    q_positions_T: Tensor, k_positions_S: Tensor, window: int, starts_BT: Tensor | None = None
) -> Tensor:
    """Return the one mask rule, [T, S] bool: a query sees keys at its own and earlier positions.

    window: it sees at most so many of them (0 = all). Positions [B, T] and [B, S], where the rows
    are at positions of their own, give [B, 1, T, S]. So does starts_BT: the position where each
    query's document begins; it sees nothing before.
    """
    distance_TS = q_positions_T[..., :, None] - k_positions_S[..., None, :]
    visible_TS = distance_TS >= 0
    if window:
        visible_TS = visible_TS & (distance_TS < window)
    if q_positions_T.dim() == 2:
        visible_TS = visible_TS[:, None]
    if starts_BT is not None:
        visible_TS = visible_TS & (k_positions_S >= starts_BT[:, None, :, None])
    return visible_TS


# ----------------------------------------------------------------------------------------- KV cache
class Cache(Protocol):
    """What the model asks of a KV cache. `update` comes before `key_positions`, `advance` last.

    per_row: whether each row is at a position of its own. Then each call brings one token a row,
    and positions are [B, T] and [B, S].
    """

    length: int
    per_row: bool
    is_ring: list[bool]  # for each block, whether its keys may not begin at position 0

    def check_fits(self, B: int, T: int) -> None:
        """Raise ValueError if T more tokens for B rows do not fit."""

    def update(self, block: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values; return all that a query may need, [B, G, S, D]."""

    def query_positions(self, T: int, device) -> Tensor:
        """Return the positions [T] of the new tokens."""

    def key_positions(self, block: int, T: int) -> Tensor:
        """Return the positions [S] of the keys that `update` returned."""

    def advance(self, T: int) -> None:
        """Count T tokens as seen; called once, when every block has them."""


def positions_in_slots(newest, slots_S: Tensor, capacity: int) -> Tensor:
    """Return what a ring buffer's slots hold: the largest position up to `newest` of each."""
    return newest - (newest - slots_S) % capacity


class KVCache:
    """A cache of fixed size. The caller makes it, passes it to `LLM.forward`, and owns it.

    Per block two tensors [B, G, capacity, D]. The capacity is `max_tokens`, or the block's window
    if that is smaller: then a ring buffer, with position p in slot p % capacity.
    """

    per_row = False

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device="cpu",
    ):
        self.batch_size, self.max_tokens, self.length = batch_size, max_tokens, 0
        windows = [config.window(block) for block in range(config.transformer_blocks)]
        self.is_ring = [0 < window < max_tokens for window in windows]
        B, G, D = batch_size, config.num_kv_heads, config.attention_head_dim
        capacities = [
            window if ring else max_tokens
            for window, ring in zip(windows, self.is_ring, strict=True)
        ]
        # A tensor that is made in inference mode cannot be written outside it.
        with torch.inference_mode(False):
            self.keys, self.values = (
                [torch.zeros(B, G, S, D, dtype=dtype, device=device) for S in capacities]
                for _ in range(2)
            )

    def num_bytes(self) -> int:
        """Return the bytes that the cache holds."""
        return sum(t.numel() * t.element_size() for t in self.keys + self.values)

    def reset(self) -> None:
        """Clear the cache; the memory stays."""
        self.length = 0

    def rewind(self, length: int) -> bool:
        """Keep only the first `length` tokens.

        Return False (and do nothing) if a ring buffer has wrapped: older keys are gone.
        """
        if length < self.length and any(
            ring and self.length >= keys.shape[2]
            for ring, keys in zip(self.is_ring, self.keys, strict=True)
        ):
            return False
        self.length = min(self.length, length)
        return True

    def rows(self) -> list[KVCache]:
        """Return a cache for each row, in this one's memory: they may then differ in length."""
        rows = [copy.copy(self) for _ in range(self.batch_size)]
        for b, row in enumerate(rows):
            row.batch_size = 1
            row.keys = [t[b : b + 1] for t in self.keys]
            row.values = [t[b : b + 1] for t in self.values]
        return rows

    def check_fits(self, B: int, T: int) -> None:
        if self.batch_size != B:
            raise ValueError(
                f"this KV cache was made for {self.batch_size} rows and was given {B}: make one "
                "for that batch"
            )
        if self.length + T > self.max_tokens:
            raise ValueError(
                f"the KV cache holds {self.max_tokens} tokens, {self.length} of them are used and "
                f"{T} more do not fit"
            )

    def update(self, block: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        k_BGSD = self._store(self.keys[block], block, k_BGTD.to(self.keys[block].dtype))
        v_BGSD = self._store(self.values[block], block, v_BGTD.to(self.values[block].dtype))
        return k_BGSD.to(k_BGTD.dtype), v_BGSD.to(v_BGTD.dtype)

    def _store(self, store: Tensor, block: int, new_BGTD: Tensor) -> Tensor:
        T, capacity = new_BGTD.shape[2], store.shape[2]
        if T == 1 or not self.is_ring[block]:
            first = self.length % capacity
            store[:, :, first : first + T] = new_BGTD
            return store[:, :, : self.length + T]
        # New keys overwrite old ones that the first new queries still see, so read those first.
        positions_S = self.key_positions(block, T)
        old_BGSD = store[:, :, positions_S[:-T] % capacity]
        all_BGSD = torch.cat((old_BGSD, new_BGTD), dim=2)
        store[:, :, positions_S[-capacity:] % capacity] = all_BGSD[:, :, -capacity:]
        return all_BGSD

    def key_positions(self, block: int, T: int) -> Tensor:
        capacity, device = self.keys[block].shape[2], self.keys[block].device
        end = self.length + T
        if T > 1 and self.is_ring[block]:
            # As many old ones as the ring holds, then the new ones.
            return torch.arange(max(0, self.length - capacity), end, device=device)
        slots_S = torch.arange(min(end, capacity), device=device)
        return positions_in_slots(end - 1, slots_S, capacity)

    def query_positions(self, T: int, device) -> Tensor:
        return torch.arange(self.length, self.length + T, device=device)

    def advance(self, T: int) -> None:
        self.length += T


class RMSNorm(nn.RMSNorm):
    """PyTorch's (Zhang and Sennrich 2019)."""

    # The device's own, or None from it: (self, x) -> y.
    kernel = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernel and self.kernel(self, x)
        return super().forward(x) if y is None else y


# ---------------------------------------------------------------------------------------- attention
class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); optional QK-norm, sinks, biases."""

    sinks: nn.Parameter | None
    attention_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.H, self.G, self.D = config.num_heads, config.num_kv_heads, config.attention_head_dim
        self.block, self.window, self.dropout = block, config.window(block), config.dropout
        # The device's own kernels, if it has any (runtime/kernels/choose.py). All of `attend`, or
        # None from it: (self, q, k, v, cache, starts) -> [B, H, T, D].
        self.kernel = None
        # All of `turned`, or None from it: (x, norm, rope) -> [B, H, T, D].
        self.turn_kernel = None
        # Without sinks: (q, k, v, mask, is_causal, dropout) -> [B, H, T, D].
        self.device_attention = None
        # With sinks, without dropout: (q, k, v, sinks, mask, is_causal) -> [B, H, T, D].
        self.sink_kernel = None
        self.W_q = nn.Linear(config.d_model, self.H * self.D, bias=config.qkv_bias)
        self.W_k = nn.Linear(config.d_model, self.G * self.D, bias=config.qkv_bias)
        self.W_v = nn.Linear(config.d_model, self.G * self.D, bias=config.qkv_bias)
        self.out_proj = nn.Linear(self.H * self.D, config.d_model, bias=config.out_proj_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.D, eps=config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )
        sinks = nn.Parameter(torch.empty(self.H)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)
        shape = (self.H, config.context_length, config.context_length)
        bias = nn.Parameter(torch.empty(shape)) if config.use_attention_bias else None
        self.register_parameter("attention_bias", bias)

    def forward(
        self,
        x_BTC: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache | None = None,
        starts_BT: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x_BTC.shape
        q_BHTD, k_BGSD, v_BGSD = self.project(x_BTC, rope)
        if cache is not None:
            k_BGSD, v_BGSD = cache.update(self.block, k_BGSD, v_BGSD)
        given = (q_BHTD, k_BGSD, v_BGSD, cache, starts_BT)
        y_BHTD = self.kernel(self, *given) if self.kernel else None
        if y_BHTD is None:
            y_BHTD = self.attend(*given)
        return self.out_proj(y_BHTD.transpose(1, 2).reshape(B, T, self.H * self.D))

    def attend(
        self,
        q_BHTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        cache: Cache | None,
        starts_BT: Tensor | None,
    ) -> Tensor:
        """Return softmax(q k / sqrt(D)) v, [B, H, T, D]."""
        mask, is_causal = self._mask(q_BHTD, cache, starts_BT)
        if cache is not None and cache.per_row:
            return self._attend_once(q_BHTD, k_BGSD, v_BGSD, mask)
        dropout = self.dropout if self.training else 0.0
        if self.sinks is not None:
            if self.sink_kernel is not None and not dropout and self.attention_bias is None:
                return self.sink_kernel(q_BHTD, k_BGSD, v_BGSD, self.sinks, mask, is_causal)
            return attention_with_sinks(
                q_BHTD, k_BGSD, v_BGSD, self.sinks, mask, is_causal, dropout
            )
        if self.device_attention is not None:
            return self.device_attention(q_BHTD, k_BGSD, v_BGSD, mask, is_causal, dropout)
        if q_BHTD.is_cuda and self.H != self.G and mask is not None:
            # Not every kernel that takes a mask takes grouped heads, and the last resort of
            # PyTorch holds all T x S scores. A copy of what this call reads avoids it.
            groups = self.H // self.G
            k_BGSD, v_BGSD = (x.repeat_interleave(groups, dim=1) for x in (k_BGSD, v_BGSD))
        return F.scaled_dot_product_attention(
            q_BHTD,
            k_BGSD,
            v_BGSD,
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=dropout,
            enable_gqa=k_BGSD.shape[1] != self.H,
        )

    def _attend_once(
        self, q_BH1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BHTS: Tensor | None
    ) -> Tensor:
        """`attend` for one query a row: J heads that share keys become J queries of one head."""
        # So no key is copied. Nothing here depends on values, so a CUDA graph can hold it.
        B, S = len(q_BH1D), k_BGSD.shape[2]
        q_BGJD = q_BH1D.view(B, self.G, -1, self.D)
        # A learned bias has numbers of its own for each head.
        if mask_BHTS is not None and mask_BHTS.shape[1] > 1:
            mask_BHTS = mask_BHTS.view(B, self.G, -1, S)
        y_BGJD = attention_with_sinks(q_BGJD, k_BGSD, v_BGSD, self.sinks, mask_BHTS, False)
        return y_BGJD.reshape(B, self.H, 1, self.D)

    def project(
        self, x_BTC: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, T, D], keys and values [B, G, T, D], normed and rotated.

        rope: tables that broadcast to [B, heads, T, D].
        """
        B, T, _ = x_BTC.shape
        q_BHTD, k_BGTD, v_BGTD = (
            linear(x_BTC).view(B, T, -1, self.D).transpose(1, 2)
            for linear in (self.W_q, self.W_k, self.W_v)
        )
        q_BHTD = self.turned(q_BHTD, self.q_norm, rope)
        return q_BHTD, self.turned(k_BGTD, self.k_norm, rope), v_BGTD

    def turned(self, x_BHTD: Tensor, norm, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Norm and rotate queries or keys."""
        y_BHTD = self.turn_kernel and self.turn_kernel(x_BHTD, norm, rope)
        if y_BHTD is not None:
            return y_BHTD
        if norm is not None:
            # In the weights' dtype: float32 under autocast.
            x_BHTD = norm(x_BHTD.to(norm.weight.dtype)).to(x_BHTD.dtype)
        return x_BHTD if rope is None else rotate(x_BHTD, *rope)

    def _mask(
        self, q_BHTD: Tensor, cache: Cache | None, starts_BT: Tensor | None
    ) -> tuple[Tensor | None, bool]:
        """Return (attn_mask, is_causal): the one rule, in the form that is fastest."""
        T = q_BHTD.shape[2]
        start, per_row = (0, False) if cache is None else (cache.length, cache.per_row)
        if self.attention_bias is None and starts_BT is None and not per_row:
            # A cache gives a single query only keys that it sees.
            if T == 1:
                return None, False
            if start == 0 and (not self.window or self.window >= T):
                return None, True
        if cache is None:
            q_positions_T = k_positions_S = torch.arange(T, device=q_BHTD.device)
        else:
            q_positions_T = cache.query_positions(T, q_BHTD.device)
            k_positions_S = cache.key_positions(self.block, T)
        mask = attention_mask(q_positions_T, k_positions_S, self.window, starts_BT)
        if self.attention_bias is None:
            return mask, False
        if per_row:
            bias = bias_of_rows(self.attention_bias, q_positions_T, k_positions_S)
        else:
            bias_HTS = self.attention_bias[:, start : start + T]
            ring = cache is not None and cache.is_ring[self.block]
            bias_HTS = bias_HTS[:, :, k_positions_S] if ring else bias_HTS[:, :, : start + T]
            bias = bias_HTS[None]
        # Not torch.where, which may copy the number from the host: a CUDA graph cannot hold that.
        return bias.to(q_BHTD.dtype).masked_fill(~mask, -math.inf), False


def bias_of_rows(bias_HTS: Tensor, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor:
    """Return a learned bias [B, H, T, S] at positions that differ from row to row."""
    # Rows that take no part in a step may have positions beyond it.
    last = bias_HTS.shape[1] - 1
    q_BT1 = q_positions_BT.clamp(max=last)[:, :, None]
    k_B1S = k_positions_BS.clamp(0, last)[:, None, :]
    return bias_HTS[:, q_BT1, k_B1S].transpose(0, 1)


def attention_with_sinks(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    sinks_H: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Return attention [B, H, T, D] whose softmax has one more term per head, the sink.

    In float32 or better, with all scores at once. mask: [.., T, S], bool (True keeps) or added to
    the scores. sinks: one per head, or per head and query ([H * T]), or none. Source: gpt-oss
    (arXiv 2508.10925, section 2); Xiao et al. 2023 on why it helps.
    """
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    k_BHSD, v_BHSD = k_BGSD, v_BGSD
    if H != G:
        k_BHSD, v_BHSD = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSD, v_BGSD))
    scores_BHTS = (q_BHTD @ k_BHSD.transpose(2, 3)).to(dtype) * D**-0.5
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf)
        else:
            scores_BHTS = scores_BHTS + mask
    if sinks_H is not None:
        sinks_BHT1 = sinks_H.to(dtype).view(1, H, -1, 1).expand(B, H, T, 1)
        scores_BHTS = torch.cat((scores_BHTS, sinks_BHT1), dim=-1)
    weights_BHTS = scores_BHTS.softmax(dim=-1)[..., :S]
    return F.dropout(weights_BHTS, dropout).to(v_BHSD.dtype) @ v_BHSD


# ------------------------------------------------------------------------------- mixture of experts
class RouterStats(NamedTuple):
    """What the routers did, one entry per block once `LLM` has stacked them.

    The losses carry gradients, the rest does not.
    """

    aux_loss: Tensor  # [L] load-balance loss without its coefficient, 1.0 at perfect balance
    z_loss: Tensor  # [L] mean squared log-partition of the router, without its coefficient
    load: Tensor  # [L, E] assignments to each expert over its fair share: 1.0 = fair
    entropy: Tensor  # [L] mean entropy of a token's router distribution (nats)
    dropped_share: Tensor  # [L] assignments dropped by capacity_factor, as a share of all

    def logged(self) -> dict[str, Tensor]:
        """Return the numbers that are logged, under their names in the metrics."""
        return {
            "expert_load": self.load,
            "router_entropy": self.entropy,
            "dropped_share": self.dropped_share,
        }


class Router(nn.Module):
    """Choose top_k experts per token by softmax in float32; their weights sum to 1."""

    bias: nn.Parameter | None
    selection_bias: Tensor | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        self.register_parameter("bias", bias)
        # The expert bias: added to the scores for the choice only, not for the weights, and moved
        # after each step by LLM.balance_experts (Wang et al. 2024, "auxiliary-loss-free load
        # balancing"; DeepSeek-V3, section 2.1.2).
        expert_bias = torch.zeros(config.num_experts) if config.router_bias_rate else None
        self.register_buffer("selection_bias", expert_bias)

    def forward(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (weights [N, K], experts [N, K] int64, probabilities [N, E], logits [N, E]).

        Floats are in float32 or better, under autocast too.
        """
        dtype = torch.promote_types(x_NC.dtype, torch.float32)
        with torch.autocast(x_NC.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            logits_NE = F.linear(x_NC.to(dtype), self.weight.to(dtype), bias)
        probabilities_NE = logits_NE.softmax(dim=-1)
        if self.num_experts == 1:
            # The only choice, and its weight is 1, whatever its score: its gradient is 0, not none.
            weights_NK = probabilities_NE / probabilities_NE
            return weights_NK, torch.zeros_like(weights_NK).long(), probabilities_NE, logits_NE
        scores_NE = probabilities_NE
        if self.selection_bias is not None:
            scores_NE = probabilities_NE + self.selection_bias
        experts_NK = scores_NE.topk(self.top_k, dim=-1).indices
        weights_NK = probabilities_NE.gather(1, experts_NK)
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        return weights_NK, experts_NK, probabilities_NE, logits_NE


def balance_loss(mean_E: Tensor, counts_E: Tensor) -> Tensor:
    """Return E * sum_e(f_e * P_e), 1.0 at perfect balance.

    f_e is the share of the N*K assignments that go to expert e, P_e (mean_E) its mean probability.
    Switch Transformer (Fedus et al. 2021), equations 4-6.
    """
    share_E = counts_E.to(mean_E.dtype) / counts_E.sum()
    return len(counts_E) * (share_E * mean_E).sum()


def drop_over_capacity(
    weights_NK: Tensor, experts_NK: Tensor, counts_E: Tensor, capacity_factor: float
) -> tuple[Tensor, Tensor]:
    """Zero the weights of assignments over an expert's capacity; return (weights, dropped share).

    The capacity, ceil(capacity_factor * N * K / E), is GShard's (Lepikhin et al. 2020) and
    Switch's. The lowest weights are dropped, wherever they stand in the batch (batch priority
    routing, Riquelme et al. 2021, section 4).
    """
    # The rows are still computed: capacity is here to be studied, the dropless path is the fast
    # one. What is left is not renormalised; a token that lost all its experts passes through the
    # residual.
    (N, K), E = weights_NK.shape, counts_E.shape[0]
    # 1.1 * 100 * 2 / 20 is 11, in binary too.
    capacity = math.ceil(capacity_factor * N * K / E - 1e-9)
    experts_R = experts_NK.flatten()
    # By expert, then by falling weight: two stable sorts, the less important key first.
    by_weight = weights_NK.detach().flatten().argsort(descending=True, stable=True)
    order = by_weight[experts_R[by_weight].argsort(stable=True)]
    # The rank of an assignment within its expert: its place minus its expert's first place.
    first_E = counts_E.cumsum(0) - counts_E
    rank_R = torch.arange(N * K, device=order.device) - first_E[experts_R[order]]
    kept_R = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank_R < capacity)
    return weights_NK * kept_R.view(N, K), 1 - kept_R.float().mean()


def activate(h: Tensor, activation: str) -> Tensor:
    """Return the hidden layer [..., F] from an expert's first product: [..., F], gated [..., 2F].

    gelu: Hendrycks & Gimpel 2016. swiglu: Shazeer 2020. swiglu_clamped: gpt-oss's code.
    """
    if activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    if activation == "swiglu":
        return F.silu(gate) * up
    # The gate is steepened as in GELU's sigmoid form.
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_STEEPNESS * gate) * (up + 1)


class Experts(nn.Module):
    """E feed-forward networks with stacked weights.

    w_in [E, F, C] (gated: [E, 2F, C], gate rows before up rows), w_out [E, C, F].
    """

    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, C, d_ff, f_in = config.num_experts, config.d_model, config.d_ff, config.expert_inputs
        self.activation, self.dropout = config.expert_activation, config.dropout
        self.w_in = nn.Parameter(torch.empty(E, f_in, C))
        self.w_out = nn.Parameter(torch.empty(E, C, d_ff))
        b_in = nn.Parameter(torch.empty(E, f_in)) if config.expert_bias else None
        b_out = nn.Parameter(torch.empty(E, C)) if config.expert_bias else None
        self.register_parameter("b_in", b_in)
        self.register_parameter("b_out", b_out)
        # Faster ways to the same result, where the device has them (runtime/kernels/choose.py).
        # One kernel for the products of all experts:
        self.grouped = False
        # One operation for all of it, (x, w_in, b_in, w_out, b_out, counts, activation) ->
        # ([R, C], what its backward needs):
        self.feed_forward = None

    def forward(self, x_RC: Tensor, experts_R: Tensor, counts_E: Tensor) -> Tensor:
        """Pass rows that are sorted by expert through their experts: [R, C] -> [R, C].

        experts_R: each row's expert; counts_E: rows of each expert.
        """
        device, dtype = x_RC.device.type, x_RC.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # In training one expert is faster without: nothing is computed twice.
        plain = len(counts_E) == 1 and torch.is_grad_enabled()
        if self.feed_forward is not None and not (plain or self.dropout and self.training):
            parameters = (self.w_in, self.b_in, self.w_out, self.b_out)
            given = (None if p is None else p.to(dtype) for p in parameters)
            return self.feed_forward(x_RC.to(dtype), *given, counts_E, self.activation)[0]
        h_RF = self._linear(x_RC.to(dtype), self.w_in, self.b_in, experts_R, counts_E)
        h_RF = activate(h_RF, self.activation)
        # Expert dropout: Switch Transformer (Fedus et al. 2021), section 2.4. The one on attention
        # weights is as in GPT-2's code.
        if self.dropout:
            h_RF = F.dropout(h_RF, self.dropout, self.training)
        return self._linear(h_RF, self.w_out, self.b_out, experts_R, counts_E)

    def _linear(
        self, x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, experts_R: Tensor, counts_E: Tensor
    ) -> Tensor:
        """Return grouped_linear in the rows' dtype, by the device's own kernel if faster."""
        # Autocast knows neither path.
        w_EOI, b_EO = w_EOI.to(x_RI.dtype), None if b_EO is None else b_EO.to(x_RI.dtype)
        if len(counts_E) == 1:
            return F.linear(x_RI, w_EOI.flatten(0, 1), None if b_EO is None else b_EO.flatten())
        if not self.grouped:
            return grouped_linear(x_RI, w_EOI, b_EO, counts_E)
        y_RO = F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))
        return y_RO if b_EO is None else y_RO + row_bias(b_EO, experts_R)


class LocalDispatcher:
    """Bring tokens to experts that are all on this device.

    Sort assignments by expert, compute, put back in order. Anything with this `__call__` can take
    its place in `MoE.dispatcher`.
    """

    # One operation for all of it, or None from it (runtime/kernels/routed_experts.py).
    kernel = None

    def __call__(
        self,
        x_NC: Tensor,
        weights_NK: Tensor,
        experts_NK: Tensor,
        counts_E: Tensor,
        experts: Experts,
    ) -> Tensor:
        """Return each token's experts' outputs, weighted and summed: [N, C] -> [N, C]."""
        if self.kernel:
            y_NC = self.kernel(x_NC, weights_NK, experts_NK, counts_E, experts)
            if y_NC is not None:
                return y_NC
        N, K = experts_NK.shape
        experts_R = experts_NK.flatten()
        if len(counts_E) == 1:
            return experts(x_NC, experts_R, counts_E) * weights_NK
        order_R = experts_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(N * K, device=order_R.device)
        )
        y_RC = experts(GatherRows.apply(x_NC, order_R, inverse_R, K), experts_R[order_R], counts_E)
        y_NKC = GatherRows.apply(y_RC, inverse_R, order_R, 1).view(N, K, -1)
        return (y_NKC * weights_NK[:, :, None]).sum(dim=1)


class MoE(nn.Module):
    """Router, dispatcher, experts. Returns the output and what the router did."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.capacity_factor = config.capacity_factor
        self.router = Router(config)
        self.experts = Experts(config)
        self.dispatcher = LocalDispatcher()
        # runtime/distributed/balance.py counts more tokens than those of one pass.
        self.balance_loss = balance_loss
        # `routed` in one operation, or None from it (runtime/kernels/router.py).
        self.route_kernel = None

    def routed(self, x_NC: Tensor) -> tuple[Tensor, ...]:
        """Return weights, experts, counts [E], mean probabilities [E], z-loss, entropy."""
        weights_NK, experts_NK, probabilities_NE, logits_NE = self.router(x_NC)
        # Compared and summed: atomic additions would differ from run to run.
        experts_E = torch.arange(logits_NE.shape[1], device=x_NC.device)
        counts_E = (experts_NK.flatten()[:, None] == experts_E).sum(dim=0)
        # ST-MoE (Zoph et al. 2022), equation 5
        z_loss = logits_NE.logsumexp(dim=-1).square().mean()
        entropy = torch.special.entr(probabilities_NE.detach()).sum(dim=-1).mean()
        return weights_NK, experts_NK, counts_E, probabilities_NE.mean(dim=0), z_loss, entropy

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, RouterStats]:
        x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
        found = self.route_kernel and self.route_kernel(self.router, x_NC)
        weights_NK, experts_NK, counts_E, mean_E, z_loss, entropy = found or self.routed(x_NC)
        aux_loss = self.balance_loss(mean_E, counts_E)
        load_E = counts_E.to(entropy.dtype) * (len(counts_E) / experts_NK.numel())
        dropped_share = torch.zeros_like(entropy)
        # Drops make a token depend on its batch; inference never does.
        if self.capacity_factor and self.training:
            weights_NK, dropped_share = drop_over_capacity(
                weights_NK, experts_NK, counts_E, self.capacity_factor
            )
        y_NC = self.dispatcher(x_NC, weights_NK, experts_NK, counts_E, self.experts)
        stats = RouterStats(aux_loss, z_loss, load_E, entropy, dropped_share)
        return y_NC.to(x_BTC.dtype).view_as(x_BTC), stats


class Block(nn.Module):
    """Pre-norm residual block: attention, then mixture of experts."""

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.attention = Attention(config, block)
        self.norm2 = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.moe = MoE(config)

    def forward(
        self,
        x_BTC: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache | None = None,
        starts_BT: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats]:
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), rope, cache, starts_BT)
        y_BTC, stats = self.moe(self.norm2(x_BTC))
        return x_BTC + y_BTC, stats
