"""The model: embedding, blocks, head; its initialisation, its loss, sampling and streaming generation.

Shape letters as in model_parts.py, and V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config_model import ModelConfig, loss_chunk_rows
from model_parts import Block, KVCache, RouterStats, rope_tables
from runtime.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy, softmax_gradient_

# How parameters begin, by the ends of their names (LLM.initialise). Norms begin at 1.
ZERO = ("bias", "b_in", "b_out", "attention_bias", "sinks")
RESIDUAL = ("out_proj.weight", "w_out")
NORMAL = (
    "embed.weight",
    "out_head.weight",
    "W_q.weight",
    "W_k.weight",
    "W_v.weight",
    "router.weight",
    "w_in",
)


class Output(NamedTuple):
    """What one forward pass gives. Without targets: logits. With targets: the loss, and no logits."""

    logits: Tensor | None  # [B, T, V], or [B, 1, V] with last_token_only
    cross_entropy_sum: Tensor | None  # scalar, float32 or better: summed over valid targets (nats)
    num_targets: Tensor | None  # scalar int64: valid targets
    aux_loss: Tensor  # scalar: aux_loss_coef * sum over blocks
    z_loss: Tensor  # scalar: z_loss_coef * sum over blocks
    router: RouterStats  # per block


class Head(nn.Module):
    """Output projection; `weight` is None where the embedding is used in its place (tied)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        weight = (
            None
            if config.tie_embeddings
            else nn.Parameter(torch.empty(config.vocabulary_size, config.d_model))
        )
        self.register_parameter("weight", weight)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(config.vocabulary_size)) if config.head_bias else None
        )


class LLM(nn.Module):
    """Decoder-only Mixture-of-Experts language model (see ModelConfig for every choice).

    It holds no generation state: pass a `KVCache` to continue a sequence.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary_size, config.d_model)
        self.layers = nn.ModuleList(
            Block(config, block) for block in range(config.transformer_blocks)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.out_head = Head(config)
        self.activation_checkpointing = (
            False  # keep only the blocks' inputs, compute the rest again in the backward pass
        )
        self.softmax_gradient = softmax_gradient_  # or the same compiled (compile_in_place)
        self.loss_rows = 0  # rows of logits that the loss holds at a time; 0 = loss_chunk_rows
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Normal weights with standard deviation init_std, those that write to the residual stream smaller by sqrt(2L).

        GPT-2 (Radford et al. 2019, section 2.3): the stream sums 2L of them, so its variance does not grow with depth.
        Norms start at 1; biases, sinks, the selection bias and the position table at 0. A module may name
        those of its parameters that write to the stream: residual_outputs = ("down.weight",). train.py
        names parameters of a kind that is not listed above.
        """
        residual = {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self.named_modules()
            for name in getattr(module, "residual_outputs", ())
        }
        residual_std = self.config.init_std / math.sqrt(2 * self.config.transformer_blocks)
        for name, parameter in self.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if "norm" in name:
                parameter.fill_(1.0)
            elif kind in ZERO:
                parameter.zero_()
            else:
                is_residual = (
                    f".{name}".endswith(tuple(f".{end}" for end in RESIDUAL)) or name in residual
                )
                parameter.normal_(0.0, residual_std if is_residual else self.config.init_std)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]"""
        weight = self.out_head.weight
        return self.embed.weight if weight is None else weight

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_token_only: bool = False,
        starts_BT: Tensor | None = None,
    ) -> Output:
        """One pass over ids [B, T] int64, which continue what is in `cache` if one is given.

        targets [B, T]: the id that should follow each token, IGNORE where none counts. last_token_only: logits of the last
        token alone (prefill needs no others). starts [B, T] int64: the position where each token's document begins, where
        several are packed into a row: it sees nothing before. Raises ValueError for ids out of range, an empty input, a full cache, or
        positions that a learned table does not have.
        """
        T, start = ids_BT.shape[1], 0 if cache is None else cache.length
        self._check_input(ids_BT, start, cache)
        x_BTC = self.embed(ids_BT)
        dtype = torch.promote_types(x_BTC.dtype, torch.float32)
        rope = (
            rope_tables(self.config, start, T, dtype, x_BTC.device)
            if self.config.use_rope
            else None
        )
        per_block = []
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTC, stats = checkpoint(block, x_BTC, rope, cache, starts_BT, use_reentrant=False)
            else:
                x_BTC, stats = block(x_BTC, rope, cache, starts_BT)
            per_block.append(stats)
        if cache is not None:
            cache.advance(T)
        stats = RouterStats(*(torch.stack(values) for values in zip(*per_block, strict=True)))
        x_BTC = self.norm(x_BTC[:, -1:] if last_token_only else x_BTC)
        logits = cross_entropy_sum = num_targets = None
        if targets_BT is None:
            logits = F.linear(x_BTC, self.head_weight, self.out_head.bias)
        else:
            rows = self.loss_rows or loss_chunk_rows(self.config, x_BTC.device.type != "cpu")
            cross_entropy_sum = linear_cross_entropy(
                x_BTC.flatten(0, 1),
                self.head_weight,
                self.out_head.bias,
                targets_BT.flatten(),
                rows,
                self.softmax_gradient,
            )
            num_targets = (targets_BT != IGNORE).sum()
        return Output(
            logits,
            cross_entropy_sum,
            num_targets,
            self.config.aux_loss_coef * stats.aux_loss.sum(),
            self.config.z_loss_coef * stats.z_loss.sum(),
            stats,
        )

    def _check_input(self, ids_BT: Tensor, start: int, cache: KVCache | None) -> None:
        B, T = ids_BT.shape
        if B == 0 or T == 0:
            raise ValueError(f"the input must hold at least one token, not {B} rows of {T}")
        if cache is not None:
            cache.check_fits(B, T)
        self.check_length(start + T)
        # Reading ids back from a GPU would stop it; there the callers (data manifest, tokenizer) have checked them.
        if (
            ids_BT.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and (ids_BT.min() < 0 or ids_BT.max() >= self.config.vocabulary_size)
        ):
            raise ValueError(
                f"token ids must be from 0 to {self.config.vocabulary_size - 1}, got {ids_BT.min().item()} to {ids_BT.max().item()}"
            )

    def check_length(self, tokens: int) -> None:
        """Raise ValueError for positions that a learned table does not have."""
        if self.config.use_attention_bias and tokens > self.config.context_length:
            raise ValueError(
                f"{tokens} tokens do not fit the context of {self.config.context_length}: this model adds a learned bias for each pair of "
                "positions (use_attention_bias) and has none beyond; a model without that table can go further"
            )

    def compile_in_place(self) -> None:
        """Compile the blocks, each by itself (they share one graph), and the loss's inner part; parameter names stay what they are."""
        for block in self.layers:
            block.compile(fullgraph=True, dynamic=False)
        self.softmax_gradient = torch.compile(softmax_gradient_, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def balance_experts(self, load_LE: Tensor) -> None:
        """Move each router's selection bias by router_bias_rate towards underused experts; call once per optimizer step.

        load_LE: RouterStats.load of the whole step (1.0 = fair share; a row of ones moves nothing). DeepSeek-V3, section 2.1.2.
        """
        for block, load_E in zip(self.layers, load_LE, strict=True):
            bias = block.moe.router.selection_bias
            if bias is not None:
                bias += self.config.router_bias_rate * torch.sign(1.0 - load_E).to(bias)


# --------------------------------------------------------------------------------------- generation
def check_sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """Raise ValueError for settings that define no distribution."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or a positive count, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be greater than 0 and at most 1, not {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 (off) to 1, not {min_p}")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(
            f"repetition_penalty must be a positive number (1 = off), not {repetition_penalty}"
        )


def penalise_repetition(
    logits_BV: Tensor, history_BT: Tensor, penalty: float, exempt_ids: Tensor
) -> Tensor:
    """Logits [B, V] of the ids in each row's history [B, T] made less likely: positive ones divided by `penalty`, negative ones
    multiplied. exempt_ids [*]: ids that stay as they are. Keskar et al. 2019 (CTRL), section 4.1, whose logits are positive."""
    seen_BV = (
        torch.zeros_like(logits_BV, dtype=torch.bool)
        .scatter_(1, history_BT, True)
        .index_fill_(1, exempt_ids, False)
    )
    return torch.where(
        seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV
    )


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned_ids: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one id per row from logits [B, V], in float32: ids [B] int64, -1 in rows whose logits are not finite. The host never waits.

    generator: one for all rows, or one for each. banned_ids [*] int64 are never drawn. temperature 0 takes the largest logit. min_p keeps those at least min_p times as
    likely as the likeliest (Nguyen et al. 2024); of these top_k keeps that many at most (0: all); of these top_p keeps the
    fewest whose probabilities, which then sum to 1, reach top_p (Holtzman et al. 2019).
    """
    check_sampling(temperature, top_k, top_p, min_p)
    logits_BV = logits_BV.float()
    is_finite_B = torch.isfinite(logits_BV.sum(dim=-1))
    if banned_ids is not None and len(banned_ids):
        logits_BV = logits_BV.index_fill(1, banned_ids, -math.inf)
    if temperature == 0:
        return torch.where(is_finite_B, logits_BV.argmax(dim=-1), -1)
    # Shifted so that the largest is 0: a tiny temperature then sends the others to -inf and never makes inf - inf. The
    # bounds are float32's: beyond them a temperature would be 0 or inf.
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / min(
        max(temperature, 1e-30), 1e30
    )
    if min_p:
        logits_BV = logits_BV.masked_fill(logits_BV < math.log(min_p), -math.inf)
    ids_BV = None
    V = logits_BV.shape[1]
    if 0 < top_k < V or top_p < 1:
        logits_BV, ids_BV = logits_BV.topk(min(top_k or V, V), dim=-1)  # sorted, largest first
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p < 1:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= max(top_p, 1e-30), 0.0)
    # The least of exponential clocks with these rates is a draw from them. torch.multinomial does the same, and waits for a check.
    clocks_BV = torch.empty_like(probabilities_BV)
    for rows_BV, g in (
        zip(clocks_BV.unbind(), generator, strict=True)
        if isinstance(generator, Sequence)
        else [(clocks_BV, generator)]
    ):
        rows_BV.exponential_(generator=g)
    drawn_B1 = (probabilities_BV / clocks_BV.clamp_(min=1e-37)).argmax(dim=-1, keepdim=True)
    return torch.where(
        is_finite_B, (drawn_B1 if ids_BV is None else ids_BV.gather(1, drawn_B1))[:, 0], -1
    )


def check_drawn(ids: Sequence[int]) -> None:
    """Raise ValueError if `sample` met logits that are not finite."""
    if min(ids) < 0:
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or too large for this arithmetic (try --dtype float32)"
        )


@torch.no_grad()
def generate(
    model: LLM,
    ids_BT: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.9,
    top_k: int = 50,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    banned_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    cache_dtype: torch.dtype | None = None,
    slide: bool = True,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Iterator[Tensor]:
    """Continue prompts [B, T], yielding one id per row, [B] int64, as soon as it is drawn.

    A row that has drawn one of `stop_ids` repeats it until all rows have; then generation ends. When the context is full,
    `slide` drops the older half of it and goes on from the newer; otherwise generation ends there. A prompt longer than
    the context is cut to its last context_length tokens. repetition_penalty is for the ids in the context, stop_ids excepted.
    The model's train/eval mode is restored.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if max_new_tokens == 0:
        return
    (B, T), context, device = ids_BT.shape, model.config.context_length, ids_BT.device
    cache = KVCache(
        model.config,
        B,
        min(context, T + max_new_tokens),
        cache_dtype or model.embed.weight.dtype,
        device,
    )
    banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
    history_BT, next_BT = ids_BT[:, -context:], ids_BT[:, -context:]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache.length + next_BT.shape[1] > context:
                if not slide:
                    return
                cache.reset()
                next_BT = history_BT = history_BT[:, -max(1, context // 2) :]
            logits_BV = model(next_BT, cache=cache, last_token_only=True).logits[:, -1]
            if repetition_penalty != 1.0:
                logits_BV = penalise_repetition(
                    logits_BV.float(), history_BT, repetition_penalty, stops
                )
            drawn_B = sample(logits_BV, temperature, top_k, top_p, banned, generator, min_p)
            check_drawn(drawn_B.tolist())
            if len(stops):
                drawn_B = torch.where(stopped_B, history_BT[:, -1], drawn_B)
                stopped_B = stopped_B | torch.isin(drawn_B, stops)
            yield drawn_B
            if len(stops) and stopped_B.all():
                return
            next_BT = drawn_B[:, None]
            history_BT = torch.cat((history_BT, next_BT), dim=1)[:, -context:]
    finally:
        model.train(was_training)
