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

IGNORE = -100  # a target with this value is not predicted and not counted
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


# ------------------------------------------------------------------------------------------------------------------ loss
def softmax_gradient_(
    logits_NV: Tensor, bias_V: Tensor | None, targets_N: Tensor, needs_gradient: bool = True
) -> Tensor:
    """Put the gradient of the summed cross-entropy in the place of the logits [N, V]; returns the sum.

    The gradient is softmax - one_hot, 0 in rows whose target is IGNORE. Arithmetic is float32 (or float64), whatever the
    logits are kept in. Without `needs_gradient` the logits are only used up.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    valid_N1, target_N1 = (targets_N != IGNORE)[:, None], targets_N.clamp(min=0)[:, None]
    x_NV = logits_NV.to(wide)  # the logits themselves where that is their dtype
    if (
        torch.compiler.is_compiling()
    ):  # spelled so that it becomes a pass for the sums and one that writes, with no tensor besides
        x_NV = x_NV if bias_V is None else x_NV + bias_V
        at_target_N1, log_sum_N1 = x_NV.gather(1, target_N1), x_NV.logsumexp(dim=-1, keepdim=True)
        if needs_gradient:
            is_target_NV = torch.arange(x_NV.shape[1], device=x_NV.device) == target_N1
            logits_NV.copy_(((x_NV - log_sum_N1).exp() - is_target_NV.to(wide)) * valid_N1)
    else:  # the same, in place
        if bias_V is not None:
            x_NV.add_(bias_V)
        largest_N1, at_target_N1 = x_NV.amax(dim=-1, keepdim=True), x_NV.gather(1, target_N1)
        total_N1 = x_NV.sub_(largest_N1).exp_().sum(dim=-1, keepdim=True)
        log_sum_N1 = total_N1.log() + largest_N1
        if needs_gradient:
            x_NV.mul_(valid_N1 / total_N1)
            if logits_NV.dtype != wide:
                logits_NV.copy_(x_NV)
            gradient_N1 = ((at_target_N1 - log_sum_N1).exp() - 1) * valid_N1
            logits_NV.scatter_(
                1, target_N1, gradient_N1.to(logits_NV.dtype)
            )  # written, not added: no atomics, and rounded once
    return ((log_sum_N1 - at_target_N1) * valid_N1).sum()


def add_product_(total_VC: Tensor, chunk_NV: Tensor, h_NC: Tensor, is_first: bool) -> None:
    """Add chunk' h to the total, or put it there: then what was there is ignored.

    A CUDA GPU adds to a float32 total inside a half-precision product, unrounded (torch.addmm with
    out_dtype, from torch 2.8). Elsewhere the product is rounded to its dtype first.
    """
    if total_VC.dtype == h_NC.dtype:
        total_VC.addmm_(chunk_NV.T, h_NC, beta=float(not is_first))
    elif total_VC.is_cuda and torch.version.hip is None:
        torch.addmm(
            total_VC,
            chunk_NV.T,
            h_NC,
            beta=float(not is_first),
            out_dtype=total_VC.dtype,
            out=total_VC,
        )
    elif is_first:
        total_VC.copy_(chunk_NV.T @ h_NC)
    else:
        total_VC += chunk_NV.T @ h_NC


class _LinearCrossEntropy(torch.autograd.Function):
    """sum over valid rows of logsumexp(h W' + b) - (h W' + b)[target], a few rows of logits at a time.

    A chunk's share of every gradient is known while its logits are there, so one buffer of `chunk_rows` rows serves them
    all and no [N, V] tensor exists. The matrix products are in `dtype`, the head's gradient is summed in float32.
    """

    @staticmethod
    def forward(
        ctx,
        h_NC,
        weight_VC,
        bias_V,
        targets_N,
        chunk_rows,
        dtype,
        needs_gradients,
        softmax_gradient,
    ):
        wide = torch.promote_types(dtype, torch.float32)
        h, weight = h_NC.to(dtype), weight_VC.to(dtype)
        bias = None if bias_V is None else bias_V.to(wide)
        total = torch.zeros((), dtype=wide, device=h.device)
        N, V = len(h), len(weight)
        # Rows start at multiples of 64 numbers: 200,019 is odd, and cuBLAS is slow on rows whose addresses are not aligned.
        buffer = torch.empty(min(chunk_rows, N), -(-V // 64) * 64, dtype=dtype, device=h.device)
        buffer[:, V:] = (
            0  # a CPU's bfloat16 products read on to even numbers of columns: a NaN that was left there would count, times 0
        )
        if needs_gradients:
            grad_h, grad_weight = (
                torch.empty(h.shape, dtype=wide, device=h.device),
                torch.empty(weight.shape, dtype=wide, device=h.device),
            )
            grad_bias = None if bias is None else torch.zeros_like(bias)
        for first in range(0, N, chunk_rows):
            h_chunk = h[first : first + chunk_rows]
            chunk_NV = torch.mm(h_chunk, weight.T, out=buffer[: len(h_chunk), :V])
            total += softmax_gradient(
                chunk_NV, bias, targets_N[first : first + chunk_rows], needs_gradients
            )
            if needs_gradients:
                grad_h[first : first + chunk_rows] = chunk_NV @ weight
                add_product_(grad_weight, chunk_NV, h_chunk, is_first=first == 0)
                if bias is not None:
                    grad_bias += chunk_NV.sum(dim=0, dtype=wide)
        ctx.dtypes = (h_NC.dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype)
        if needs_gradients:
            ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad):
        # Scaled in place, for a copy of the head's gradient is 0.8 GB at full size, unless the graph is to be walked again.
        is_last = not torch._C._autograd._get_current_graph_task_keep_graph()
        grads = (
            None if g is None else (g.mul_(grad) if is_last else g * grad).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def linear_cross_entropy(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    chunk_rows: int,
    softmax_gradient=softmax_gradient_,
) -> Tensor:
    """Summed cross-entropy (nats) of softmax(h W' + b) against targets, holding `chunk_rows` rows of the [N, V] logits at a time.

    h [N, C], weight [V, C], bias [V] or None, targets [N] int64 with IGNORE for rows that do not count. The products run in
    autocast's dtype if it is on; result float32 (float64 for float64 inputs). softmax_gradient: softmax_gradient_, or the
    same compiled.
    """
    device = h_NC.device.type
    dtype = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
    )
    inputs = [t for t in (h_NC, weight_VC, bias_V) if t is not None]
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(
            h_NC, weight_VC, bias_V, targets_N, chunk_rows, dtype, needs_gradients, softmax_gradient
        )


# ------------------------------------------------------------------------------------------------------------ generation
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
