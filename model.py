"""The model: embedding, blocks, head; its initialisation, loss, sampling, streaming generation.

Shape letters as in model_parts.py, and V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config_model import ModelConfig, loss_chunk_rows
from model_parts import Block, KVCache, RMSNorm, RouterStats, rope_tables
from runtime.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy, softmax_gradient_
from runtime.kernels.target_log_probs import target_log_probs

# Initial values by the ends of parameter names (LLM.initialise). Norms start at 1.
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
    """The result of a forward pass. Without targets: logits. With targets: the loss, no logits."""

    logits: Tensor | None  # [B, T, V], or [B, 1, V] with last_token_only
    cross_entropy_sum: Tensor | None  # scalar, float32 or better: sum over valid targets (nats)
    num_targets: Tensor | None  # scalar int64: valid targets
    aux_loss: Tensor  # scalar: aux_loss_coef * sum over blocks
    z_loss: Tensor  # scalar: z_loss_coef * sum over blocks
    router: RouterStats  # per block
    log_probs: Tensor | None = None  # [M], float32 or better: of each target (nats)
    metrics: dict[str, Tensor] = {}  # a task's own sums to log, 0-dim


class Head(nn.Module):
    """Parameters of the output projection. `weight` is None if tied: the embedding is used."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        V = config.vocabulary_size
        weight = None if config.tie_embeddings else nn.Parameter(torch.empty(V, config.d_model))
        self.register_parameter("weight", weight)
        bias = nn.Parameter(torch.empty(V)) if config.head_bias else None
        self.register_parameter("bias", bias)


class LLM(nn.Module):
    """Decoder-only Mixture-of-Experts language model (see ModelConfig for every choice).

    It holds no generation state: pass a `KVCache` to continue a sequence.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary_size, config.d_model)
        blocks = nn.ModuleList(Block(config, i) for i in range(config.transformer_blocks))
        self.layers = cast(Sequence[Block], blocks)
        self.norm = RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.out_head = Head(config)
        # Keep only the blocks' inputs; compute the rest again in the backward pass.
        self.activation_checkpointing = False
        # Compiled by compile_in_place.
        self.softmax_gradient = softmax_gradient_
        # Rows of logits that the loss holds at a time; 0 = loss_chunk_rows.
        self.loss_rows = 0
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw normal weights with standard deviation init_std, / sqrt(2L) for residual outputs.

        GPT-2 (Radford et al. 2019, section 2.3): the residual stream sums 2L outputs, so its
        variance does not grow with depth. Norms start at 1; biases, sinks, the expert bias and the
        learned attention bias at 0. A module may name its own parameters that write to the residual
        stream: residual_outputs = ("down.weight",). train.py reports parameters of a kind that is
        not listed above.
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
                is_listed = f".{name}".endswith(tuple(f".{end}" for end in RESIDUAL))
                is_residual = is_listed or name in residual
                parameter.normal_(0.0, residual_std if is_residual else self.config.init_std)

    @property
    def head_weight(self) -> Tensor:
        """Return the output projection [V, C]: the head's, or the embedding if tied."""
        weight = self.out_head.weight
        return self.embed.weight if weight is None else weight

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KVCache | None = None,
        last_token_only: bool = False,
        starts_BT: Tensor | None = None,
        rows_M: Tensor | None = None,
        per_token: bool = False,
    ) -> Output:
        """Run ids [B, T] int64, which continue the sequences in `cache` if there is one.

        targets [B, T]: the next id of each token, or IGNORE. last_token_only: logits of the last
        token alone (prefill needs no others). starts [B, T] int64: the position where each token's
        document begins, if several share a row; a token sees nothing before. rows [M] int64: only
        these b * T + t reach the head. per_token: log_probs, each with a gradient of its own.
        Raises ValueError for ids out of range, an empty input, a full cache, or positions without a
        learned bias.
        """
        T, start = ids_BT.shape[1], 0 if cache is None else cache.length
        self._check_input(ids_BT, start, cache)
        x_BTC = self.embed(ids_BT)
        # A bfloat16 model's positions stay exact.
        dtype = torch.promote_types(x_BTC.dtype, torch.float32)
        rope = None
        if self.config.use_rope:
            rope = rope_tables(self.config, start, T, dtype, x_BTC.device)

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
        logits = cross_entropy_sum = num_targets = log_probs = None
        if targets_BT is None:
            logits = F.linear(x_BTC, self.head_weight, self.out_head.bias)
        else:
            x_MC, targets_M = x_BTC.flatten(0, 1), targets_BT.flatten()
            if rows_M is not None:
                x_MC, targets_M = x_MC.index_select(0, rows_M), targets_M[rows_M]
            chunk_rows = self.loss_rows or loss_chunk_rows(self.config, x_MC.device.type != "cpu")
            head = (x_MC, self.head_weight, self.out_head.bias, targets_M, chunk_rows)
            if per_token:
                log_probs = target_log_probs(*head)
                cross_entropy_sum = -log_probs.sum()
            else:
                # Compiled for one shape: the number of rows differs from batch to batch.
                softmax_gradient = self.softmax_gradient if rows_M is None else softmax_gradient_
                cross_entropy_sum = linear_cross_entropy(*head, softmax_gradient)
            num_targets = (targets_M != IGNORE).sum()
        return Output(
            logits,
            cross_entropy_sum,
            num_targets,
            self.config.aux_loss_coef * stats.aux_loss.sum(),
            self.config.z_loss_coef * stats.z_loss.sum(),
            stats,
            log_probs,
        )

    def _check_input(self, ids_BT: Tensor, start: int, cache: KVCache | None) -> None:
        B, T = ids_BT.shape
        if B == 0 or T == 0:
            raise ValueError(f"the input must hold at least one token, not {B} rows of {T}")
        if cache is not None:
            cache.check_fits(B, T)
        self.check_length(start + T)
        # Reading ids back from a GPU is a host sync; there the callers (data manifest, tokenizer)
        # have checked them.
        if (
            ids_BT.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and (ids_BT.min() < 0 or ids_BT.max() >= self.config.vocabulary_size)
        ):
            raise ValueError(
                f"token ids must be from 0 to {self.config.vocabulary_size - 1}, "
                f"got {ids_BT.min().item()} to {ids_BT.max().item()}"
            )

    def check_length(self, tokens: int) -> None:
        """Raise ValueError for positions without a learned attention bias."""
        if self.config.use_attention_bias and tokens > self.config.context_length:
            raise ValueError(
                f"{tokens} tokens do not fit the context of {self.config.context_length}: "
                "this model adds a learned bias for each pair of positions (use_attention_bias) "
                "and has none beyond; a model without it can go further"
            )

    def compile_in_place(self) -> None:
        """Compile each block (they share one graph) and the loss's inner part, in place.

        Parameter names do not change.
        """
        for block in self.layers:
            block.compile(fullgraph=True, dynamic=False)
        self.softmax_gradient = torch.compile(softmax_gradient_, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def balance_experts(self, load_LE: Tensor) -> None:
        """Move each router's expert bias by router_bias_rate towards underused experts.

        Call it once per optimizer step. load_LE: RouterStats.load of the whole step (1.0 = fair
        share; a row of ones moves nothing). DeepSeek-V3, section 2.1.2.
        """
        for block, load_E in zip(self.layers, load_LE, strict=True):
            bias = cast(Block, block).moe.router.selection_bias
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
    """Return logits [B, V] with the ids in each row's history [B, T] made less likely.

    Positive logits are divided by `penalty`, negative ones multiplied. exempt_ids [*] keep theirs.
    Keskar et al. 2019 (CTRL), section 4.1, whose logits are positive.
    """
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    seen_BV = seen_BV.scatter_(1, history_BT, True).index_fill_(1, exempt_ids, False)
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def sample(
    logits_BV: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    banned_ids: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    min_p: float = 0.0,
) -> Tensor:
    """Draw one id per row from logits [B, V], in float32, without a host sync.

    Returns ids [B] int64, -1 in rows with logits that are not finite. temperature 0 is greedy.
    generator: one for all rows, or one per row. banned_ids [*] int64 are never drawn. Filters, in
    order: min_p keeps ids at least min_p times as likely as the most likely (Nguyen et al. 2024);
    top_k keeps at most that many (0: all); top_p keeps the fewest whose probabilities, which then
    sum to 1, reach top_p (Holtzman et al. 2019).
    """
    check_sampling(temperature, top_k, top_p, min_p)
    logits_BV = logits_BV.float()
    is_finite_B = torch.isfinite(logits_BV.sum(dim=-1))
    if banned_ids is not None and len(banned_ids):
        logits_BV = logits_BV.index_fill(1, banned_ids, -math.inf)
    if temperature == 0:
        return torch.where(is_finite_B, logits_BV.argmax(dim=-1), -1)
    # Shift the largest to 0: a tiny temperature then sends the others to -inf, never to inf - inf.
    # The bounds are float32's: beyond them a temperature would be 0 or inf.
    temperature = min(max(temperature, 1e-30), 1e30)
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    if min_p:
        logits_BV = logits_BV.masked_fill(logits_BV < math.log(min_p), -math.inf)
    ids_BV = None
    V = logits_BV.shape[1]
    # topk sorts, largest first: top_p needs that order too.
    if 0 < top_k < V or top_p < 1:
        logits_BV, ids_BV = logits_BV.topk(min(top_k or V, V), dim=-1)
    probabilities_BV = logits_BV.softmax(dim=-1)
    if top_p < 1:
        before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
        probabilities_BV = probabilities_BV.masked_fill(before_BV >= max(top_p, 1e-30), 0.0)
    # Sample by an exponential race (equivalent to Gumbel-max). Unlike torch.multinomial it needs no
    # host sync.
    clocks_BV = torch.empty_like(probabilities_BV)
    if isinstance(generator, Sequence):
        for clocks_V, row_generator in zip(clocks_BV.unbind(), generator, strict=True):
            clocks_V.exponential_(generator=row_generator)
    else:
        clocks_BV.exponential_(generator=generator)
    drawn_B1 = (probabilities_BV / clocks_BV.clamp_(min=1e-37)).argmax(dim=-1, keepdim=True)
    if ids_BV is not None:
        drawn_B1 = ids_BV.gather(1, drawn_B1)
    return torch.where(is_finite_B, drawn_B1[:, 0], -1)


def check_drawn(ids: Sequence[int]) -> None:
    """Raise ValueError if `sample` was given logits that are not finite."""
    if min(ids) < 0:
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or too large for this "
            "compute dtype (try --dtype float32)"
        )


def _draw(
    logits_BV: Tensor, history_BT: Tensor, penalty: float, exempt_ids: Tensor, **settings
) -> Tensor:
    """Draw one id per row, [B] int64, after the repetition penalty. settings: those of `sample`."""
    if penalty != 1.0:
        logits_BV = penalise_repetition(logits_BV.float(), history_BT, penalty, exempt_ids)
    drawn_B = sample(logits_BV, **settings)
    check_drawn(drawn_B.tolist())
    return drawn_B


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
    """Continue prompts [B, T]; yield one id per row, [B] int64, as soon as it is drawn.

    A row that has drawn one of `stop_ids` repeats it until all rows have; then generation ends. In
    a full context, `slide` drops the older half and continues from the newer; otherwise generation
    ends. A longer prompt is cut to its last context_length tokens. repetition_penalty applies to
    the ids in the context except stop_ids. The model's train/eval mode is restored.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if max_new_tokens == 0:
        return
    (B, T), device = ids_BT.shape, ids_BT.device
    context = model.config.context_length
    dtype = cache_dtype or model.embed.weight.dtype
    cache = KVCache(model.config, B, min(context, T + max_new_tokens), dtype, device)
    banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=device)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
    settings = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
    # The context so far, and its newest part, which the cache does not hold yet.
    history_BT = next_BT = ids_BT[:, -context:]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if cache.length + next_BT.shape[1] > context:
                if not slide:
                    return
                cache.reset()
                next_BT = history_BT = history_BT[:, -max(1, context // 2) :]

            # The first pass reads the whole prompt (prefill), each later one a single token.
            logits_BV = model(next_BT, cache=cache, last_token_only=True).logits[:, -1]

            # Sample
            drawn_B = _draw(
                logits_BV,
                history_BT,
                repetition_penalty,
                stops,
                banned_ids=banned,
                generator=generator,
                **settings,
            )
            if len(stops):
                drawn_B = torch.where(stopped_B, history_BT[:, -1], drawn_B)
                stopped_B = stopped_B | torch.isin(drawn_B, stops)
            yield drawn_B

            # Stop
            if len(stops) and stopped_B.all():
                return

            # Append
            next_BT = drawn_B[:, None]
            history_BT = torch.cat((history_BT, next_BT), dim=1)[:, -context:]
    finally:
        model.train(was_training)
