"""LoRA on attention and stacked experts, from outside a finished plain LLM.

`attach` freezes a model and gives its matrices adapters (runtime/checkpoint/adapter.py says what
they are and which factor they have). Trained are the adapters, and rows of the vocabulary that
nobody trained before. Router, norms, embedding, head and biases stay as they are: a router that
moves would send tokens to experts that never learned them. The expert biases stay too.

The sum of a matrix and its adapter is never made while training: rows that are sorted by expert
take two more thin products, on a CPU in one operation with the others
(runtime/kernels/cpu_adapters.py). `merged_model` makes it, in a plain LLM of its own, for decoders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config_model import ModelConfig, total_parameters
from model import LLM, Head
from model_parts import Experts
from runtime.base.ranks import Ranks
from runtime.base.text import human_count
from runtime.checkpoint.adapter import (
    ATTENTION,
    EXPERTS,
    ROWS,
    AdaptedWeights,
    Adapter,
    adapted_matrices,
    adapter_of,
    is_trained,
    merged,
    pair_of,
    trained_shapes,
)
from runtime.checkpoint.format import Checkpoint, meta_model, shapes_of
from runtime.checks.kernels import EXPERTS as EXPERT_PARAMETERS
from runtime.checks.kernels import settle_kernels
from runtime.kernels.choose import choose_kernels
from runtime.kernels.cpu_adapters import adapted_feed_forward
from runtime.kernels.trained_rows import with_trained_rows
from runtime.posttraining.config import PostTrainConfig

ADAPTER_PARAMETERS = ("w_in_lora_A", "w_in_lora_B", "w_out_lora_A", "w_out_lora_B")
# The grouped kernel wants rows of a multiple of 16 bytes: eight numbers in half precision.
ALIGNED_RANK = 8


# ----------------------------------------------------------------------------------------- settings
def new_adapter(
    source: Checkpoint,
    config: ModelConfig,
    rank: int,
    expert_rank: int = 0,
    alpha: float = 32.0,
    new_ids: Sequence[int] = (),
) -> Adapter:
    """Return the settings of adapters for a run that starts from a checkpoint.

    config: of the run's model. expert_rank: 0 = max(1, rank / top_k), because a token passes
    through top_k experts, which together then have the rank of the attention ("LoRA Without
    Regret"). new_ids: ids whose rows are trained too, with all that the config adds to the
    checkpoint's vocabulary. Raise ValueError if they do not follow each other.
    """
    if rank < 1 or expert_rank < 0 or not alpha > 0:
        raise ValueError(
            "lora_rank must be at least 1, lora_expert_rank at least 0 (0 = lora_rank / top_k) and "
            f"lora_alpha positive, not {rank}, {expert_rank} and {alpha}"
        )
    most = min(config.d_model, config.num_heads * config.attention_head_dim, config.d_ff)
    if max(rank, expert_rank) > most:
        raise ValueError(
            f"lora_rank {rank} and lora_expert_rank {expert_rank} must not be larger than the "
            f"model's smallest matrix, {most}: lower them, or train all weights (lora_rank 0)"
        )
    added = range(source.model_config.vocabulary_size, config.vocabulary_size)
    ids = sorted({*new_ids, *added})
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(
            f"adapters train rows of the vocabulary that follow each other, not {ids[:8]}: train "
            "all weights (lora_rank 0)"
        )
    return Adapter(
        rank=rank,
        expert_rank=expert_rank or max(1, rank // config.top_k),
        alpha=float(alpha),
        first_row=ids[0] if ids else 0,
        num_rows=len(ids),
        base=str(source.path.resolve()),
        base_digest=source.weights_digest,
    )


# ------------------------------------------------------------------------------------ adapted parts
class AdaptedLinear(nn.Linear):
    """A linear layer whose frozen matrix has an adapter."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_A)
        return super().forward(x) + F.linear(thin, self.lora_B * self.lora_scale)


class AdaptedExperts(Experts):
    """Experts whose frozen stacked matrices have an adapter for each expert."""

    w_in_lora_A: nn.Parameter
    w_in_lora_B: nn.Parameter
    w_out_lora_A: nn.Parameter
    w_out_lora_B: nn.Parameter
    lora_scale: float

    # What the CPU's operation is given (runtime/checks/kernels.py).
    cpu_parameters = (*EXPERT_PARAMETERS, *ADAPTER_PARAMETERS)

    def forward(self, x_RC: Tensor, experts_R: Tensor, counts_E: Tensor) -> Tensor:
        if self.feed_forward is None or (self.dropout and self.training):
            return super().forward(x_RC, experts_R, counts_E)
        device, dtype = x_RC.device.type, x_RC.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        w_in, b_in, w_out, b_out, *adapters = (
            None if parameter is None else parameter.to(dtype)
            for parameter in (getattr(self, name) for name in self.cpu_parameters)
        )
        return adapted_feed_forward(
            x_RC.to(dtype),
            w_in,
            b_in,
            w_out,
            b_out,
            adapters,
            self.lora_scale,
            counts_E,
            self.activation,
        )[0]

    def _linear(
        self, x_RI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, experts_R: Tensor, counts_E: Tensor
    ) -> Tensor:
        a_ErI: Tensor
        b_EOr: Tensor
        if w_EOI is self.w_in:
            a_ErI, b_EOr = self.w_in_lora_A, self.w_in_lora_B
        elif w_EOI is self.w_out:
            a_ErI, b_EOr = self.w_out_lora_A, self.w_out_lora_B
        else:
            raise AssertionError("experts with adapters have another matrix than w_in and w_out")
        y_RO = super()._linear(x_RI, w_EOI, b_EO, experts_R, counts_E)
        b_EOr = b_EOr * self.lora_scale
        if self.grouped and (missing := -a_ErI.shape[1] % ALIGNED_RANK):
            a_ErI, b_EOr = F.pad(a_ErI, (0, 0, 0, missing)), F.pad(b_EOr, (0, missing))
        thin_Rr = super()._linear(x_RI, a_ErI, None, experts_R, counts_E)
        return y_RO + super()._linear(thin_Rr, b_EOr, None, experts_R, counts_E)


class AdaptedEmbedding(nn.Embedding):
    """A frozen embedding of which the rows `new_rows` are trained: views of its own rows."""

    new_rows: nn.Parameter
    first_row: int

    def forward(self, ids: Tensor) -> Tensor:
        number = ids - self.first_row
        is_new = (number >= 0) & (number < len(self.new_rows))
        rows = F.embedding(torch.where(is_new, number, 0), self.new_rows)
        return torch.where(is_new[..., None], rows, super().forward(ids))


class AdaptedHead(Head):
    """An output projection of which rows are trained: views of its own rows."""

    new_bias: nn.Parameter
    first_row: int

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # read as the parameter was
        """Return the bias [V], if there is one; the gradient goes to its trained rows."""
        whole = self._parameters["bias"]
        if whole is None:
            return None
        return with_trained_rows(whole, self.new_bias, self.first_row)


class AdaptedLLM(LLM):
    """A plain LLM with adapters. `attach` makes it of one that is there."""

    adapter: Adapter

    @property
    def head_weight(self) -> Tensor:
        """Return the output projection [V, C]; the gradient goes to its trained rows."""
        if not self.adapter.num_rows:
            return super().head_weight
        owner: Any = self.embed if self.out_head.weight is None else self.out_head
        return with_trained_rows(owner.weight, owner.new_rows, self.adapter.first_row)

    @torch.no_grad()
    def balance_experts(self, load_LE: Tensor) -> None:
        """Move nothing: the expert biases belong to the frozen router."""


# ------------------------------------------------------------------------------------------- attach
def attach(model: LLM, adapter: Adapter, seed: int = 0) -> None:
    """Freeze a plain model and give it adapters, in place, before its kernels and optimizer.

    It computes to the bit what it did before: B begins at 0, and A uniform within 1 / sqrt(inputs),
    as in peft and the original code. Drawn from `seed` on the CPU, so the same on each device.
    Raise ValueError for a model that has adapters.
    """
    if adapter_of(model) is not None:
        raise ValueError("the model has adapters already: merge them first (scripts.merge_lora)")
    if type(model) is not LLM:
        raise ValueError(f"adapters are for a plain LLM, not for a {type(model).__name__}")
    # Raises for rows that the vocabulary does not have.
    trained_shapes(adapter, {name: tensor.shape for name, tensor in model.state_dict().items()})
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in adapted_matrices(model.config):
        _add_pair(model, name, adapter, generator)
    for block in model.layers:
        a, experts = block.attention, block.moe.experts
        for linear in (a.W_q, a.W_k, a.W_v, a.out_proj):
            linear.__class__ = AdaptedLinear
            cast(AdaptedLinear, linear).lora_scale = adapter.scale_of(ATTENTION[0])
        experts.__class__ = AdaptedExperts
        cast(AdaptedExperts, experts).lora_scale = adapter.scale_of(EXPERTS[0])
    model.__class__ = AdaptedLLM
    cast(AdaptedLLM, model).adapter = adapter
    if adapter.num_rows:
        _train_rows(model, adapter)


def _add_pair(model: LLM, name: str, adapter: Adapter, generator: torch.Generator) -> None:
    """Give one matrix [.., out, in] its adapter: A [.., r, in], B [.., out, r]."""
    weight = model.get_parameter(name)
    *stack, outputs, inputs = weight.shape
    rank, bound = adapter.rank_of(name), 1 / math.sqrt(inputs)
    a = torch.empty(*stack, rank, inputs).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(*stack, outputs, rank)
    # Where a model is of shapes alone, its adapters wait for it on the CPU.
    device = torch.device("cpu") if weight.is_meta else weight.device
    for part, values in zip(pair_of(name), (a, b), strict=True):
        module, _, own = part.rpartition(".")
        values = values.to(device, torch.promote_types(weight.dtype, torch.float32))
        model.get_submodule(module).register_parameter(own, nn.Parameter(values))


def _train_rows(model: LLM, adapter: Adapter) -> None:
    """Make the adapter's rows of the vocabulary parameters, which share the model's memory.

    So whoever reads the embedding or the head reads the trained rows, and nothing is copied.
    """
    head = model.out_head
    owners = ((model.embed, "weight"), (head, "weight"), (head, "bias"))
    for (module, name), own in zip(owners, ("new_rows", "new_rows", "new_bias"), strict=True):
        whole = getattr(module, name)
        if whole is not None:
            # .data: the rows and the whole count their changes apart.
            rows = nn.Parameter(whole.data[adapter.rows])
            module.register_parameter(own, rows)
    model.embed.__class__, head.__class__ = AdaptedEmbedding, AdaptedHead
    cast(AdaptedEmbedding, model.embed).first_row = adapter.first_row
    cast(AdaptedHead, head).first_row = adapter.first_row


# ------------------------------------------------------------------------------------------ merging
@torch.no_grad()
def merged_model(model: LLM) -> LLM:
    """Return a plain LLM in eval mode that computes what an adapted one does; a plain one itself.

    Called again it gives the same LLM, brought up to date in place, so pointers to its weights stay
    valid. The matrices with adapters are in memory of their own: W + B A - B A is not W. All other
    tensors are the model's own.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return model
    names = adapted_matrices(model.config)
    plain = model.__dict__.get("merged")
    if plain is None:
        plain = meta_model(model.config)
        tensors = {name: t for name, t in model.state_dict().items() if not is_trained(name)}
        tensors |= {name: torch.empty_like(tensors[name]) for name in names}
        plain.load_state_dict(tensors, assign=True)
        plain.eval().requires_grad_(False)
        choose_kernels(plain, model.embed.weight.device, model.embed.weight.dtype)
        settle_kernels(plain)
        # Past nn.Module, which would make it a part of the model.
        model.__dict__["merged"] = plain
    for name in names:
        a, b = (model.get_parameter(part) for part in pair_of(name))
        product = merged(model.get_parameter(name), a, b, adapter.scale_of(name))
        plain.get_parameter(name).copy_(product)
    return plain


class WholeTensors(Mapping[str, Tensor]):
    """The tensors of a model in shards; each is gathered when it is asked for, by all ranks."""

    def __init__(self, model: LLM, ranks: Ranks):
        self.tensors, self.ranks = model.state_dict(), ranks

    def __getitem__(self, name: str) -> Tensor:
        return self.ranks.whole(self.tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@torch.no_grad()
def gathered_model(model: LLM, ranks: Ranks) -> LLM:
    """Return a plain LLM in eval mode that computes what a model in shards does.

    Adapters are merged. Every rank calls this, and holds all weights in memory of its own.
    """
    weights: Mapping[str, Tensor] = WholeTensors(model, ranks)
    shapes = shapes_of(model.config)
    if adapter := adapter_of(model):
        weights = AdaptedWeights(shapes, adapter, weights, shapes, weights)
    plain = meta_model(model.config)
    plain.load_state_dict({name: weights[name] for name in shapes}, assign=True)
    return plain.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ a task
class Adapters:
    """What a task needs to train adapters where its run asks for them, and nothing otherwise.

    source: the checkpoint that the run starts from or resumes; new_ids: see new_adapter. A task
    calls these methods in its own of the same names.
    """

    def __init__(
        self, config: PostTrainConfig, source: Checkpoint | None, new_ids: Sequence[int] = ()
    ):
        if config.lora_rank and source is None:
            raise ValueError("--lora_rank trains adapters of a model: give it with --init_from")
        self.config, self.source, self.new_ids = config, source, new_ids

    def adapter(self, model_config: ModelConfig) -> Adapter | None:
        """Return the settings of the run's adapters; None without any."""
        if not self.config.lora_rank:
            return None
        assert self.source is not None
        if self.config.resume:
            return self.source.adapter
        c = self.config
        settings = (c.lora_rank, c.lora_expert_rank, c.lora_alpha, self.new_ids)
        return new_adapter(self.source, model_config, *settings)

    def prepare(self, model: LLM) -> None:
        """Attach the adapters to a new model."""
        if adapter := self.adapter(model.config):
            attach(model, adapter, self.config.seed)

    def needed_bytes(self, needed: dict[str, int], model_config: ModelConfig) -> dict[str, int]:
        """Return the estimate of memory by part: most weights are frozen, and no state is theirs.

        "weights" are those that are trained and saved. Two moments each, as AdamW has.
        """
        adapter = self.adapter(model_config)
        if adapter is None:
            return needed
        trained = sum(_trained_counts(adapter, model_config).values())
        state_bytes = 4 if self.config.state_dtype == "float32" else 2
        own = {
            "weights": 4 * trained,
            "gradients": min(needed["gradients"], 4 * trained),
            "optimizer state": 2 * state_bytes * trained,
        }
        return {"frozen weights": needed["weights"]} | needed | own

    def gradient_bytes(self, needed: dict[str, int]) -> int:
        """Return the bytes that are there next to trained weights and optimizer state."""
        return needed["weights"] + needed.get("frozen weights", 0)

    def describe(self, model_config: ModelConfig) -> list[str]:
        """Return the lines on what is trained, by part."""
        adapter = self.adapter(model_config)
        if adapter is None:
            return []
        counts = _trained_counts(adapter, model_config)
        total, trained = total_parameters(model_config), sum(counts.values())
        ranks = {"attention": adapter.rank, "experts": adapter.expert_rank}
        parts = [
            f"{part} {human_count(count)}" + (f" (rank {ranks[part]})" if part in ranks else "")
            for part, count in counts.items()
        ]
        lines = [
            f"lora     trains {human_count(trained)} of {human_count(total)} parameters "
            f"({100 * trained / total:.2f} %): {', '.join(parts)}; alpha {adapter.alpha:g}",
            f"base     {adapter.base} stays as it is; checkpoints hold the adapters alone",
        ]
        if self.config.optimizer != "adamw":
            lines.append(f"note     optimizer {self.config.optimizer}: AdamW trains the adapters")
        return lines


def _trained_counts(adapter: Adapter, model_config: ModelConfig) -> dict[str, int]:
    """Return the trained parameters by part of the model."""
    counts = {"attention": 0, "experts": 0}
    if adapter.num_rows:
        counts[f"rows of {adapter.num_rows} new ids"] = 0
    for name, (shape, _) in trained_shapes(adapter, shapes_of(model_config)).items():
        part = "attention" if ".attention." in name else "experts"
        part = [*counts][-1] if name in ROWS else part
        counts[part] += shape.numel()
    return counts
