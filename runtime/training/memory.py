"""What a training step needs in memory, in closed form, by part.

Standard library only, so that a run can be priced on any machine. Tests hold the estimate to a
count of the tensors (benchmarks/fake_memory.py) and to what a process is seen to hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from config_model import ModelConfig, TrainConfig, loss_chunk_rows, total_parameters
from runtime.training.placement import Placement
from runtime.training.ranks_memory import gathered_bytes, share_of

# Of a CPU's process without a model: Python, PyTorch and what train.py imports also, the compiler
# that torch.optim loads, 390 MiB with matplotlib, and 90 for the plots that it draws
# (benchmarks/memory.py measures both).
PROGRAM_BYTES = 480 * 2**20
# One of oneDNN's kernels, and how many of them a model's experts have: for 6 row counts four
# products, or GELU and its gradient; for some 16 the two products whose sums are over the rows.
ONEDNN_KERNEL_BYTES, ONEDNN_PRODUCTS, ONEDNN_GELUS = 700_000, 4 * 6 + 2 * 16, 2 * 6


def hidden_matrices(config: ModelConfig) -> int:
    """Parameters in the matrices inside the blocks: attention projections and experts, which Muon
    trains.
    """
    c, D = config, config.attention_head_dim
    return (
        c.transformer_blocks
        * c.d_model
        * (2 * D * (c.num_heads + c.num_kv_heads) + c.num_experts * (c.expert_inputs + c.d_ff))
    )


def training_memory_bytes(
    config: ModelConfig,
    train: TrainConfig,
    compute_bytes: int = 4,
    on_gpu: bool = False,
    loss_rows: int = 0,
    placement: Placement | None = None,
) -> dict[str, int]:
    """Estimated peak memory of a training step in bytes, by part: of its forward pass, of the first
    or the last block of its backward pass, or of the optimizer, whichever holds most.

    Weights and gradients are float32; the optimizer keeps two moments (Muon: one for the hidden
    matrices) in state_dtype. compute_bytes: 2 under bfloat16 or float16 autocast, which keeps a
    cast copy of the matrices. Where grad_accum is 1, no step has all gradients and all activations
    at once. On a CPU it is what the process holds, Python and PyTorch included. loss_rows: of
    logits at a time; 0 = loss_chunk_rows. placement: of the run's ranks, one of which this is.
    Eager, not compiled; tests hold it to a count of the tensors (benchmarks/fake_memory.py,
    benchmarks/fake_ranks.py) and to what a process is seen to hold.
    """
    c, b = config, compute_bytes
    share = share_of(c, hidden_matrices(c), b, placement)
    parameters, whole, cast = share.held, total_parameters(c), share.cast_bytes
    tokens = train.batch_size * c.context_length
    hidden_moments = OPTIMIZER_MEMORY[train.optimizer].hidden_moments
    moments = 2 * parameters - (2 - hidden_moments) * share.held_hidden
    always = {
        "program": 0 if on_gpu else PROGRAM_BYTES + _kernel_bytes(c, b),
        "weights": 4 * parameters,
        "optimizer state": moments * (4 if train.state_dtype == "float32" else 2),
    }
    per_token, scores = _saved_per_token(c, b, on_gpu), _saved_scores(c, train, b, on_gpu)
    block, blocks = tokens * sum(per_token.values()) + scores, c.transformer_blocks
    # The last norm's input, its result (of a CPU's norm also a part), and the gradient of that.
    ends = tokens * c.d_model * (12 if on_gpu else 16)
    head = c.vocabulary_size * c.d_model
    # The head's gradient, a chunk of logits (under AMP also in float32); under AMP the cast head
    # and its input.
    rows = min(loss_rows or loss_chunk_rows(c, on_gpu), tokens)
    logits = rows * c.vocabulary_size * (4 if b == 4 else 4 + b)
    loss = {
        "loss": 4 * head + logits + (b != 4) * b * (head * c.tie_embeddings + tokens * c.d_model)
    }
    # The backward pass of a block begins with its experts. What they save is gone when attention's
    # begins.
    within = max(
        0, _attention_gradients(c, train, b, on_gpu) - tokens * per_token["experts"]
    ) + _expert_temporaries(c, tokens, b, on_gpu)
    gradients = {"gradients": 4 * parameters}
    if train.activation_checkpointing:
        # Each block's input; one block is made again, when all of the loss's but the gradient is
        # gone.
        inputs = 4 * c.d_model * tokens * blocks
        forward = {"cast weights": cast // blocks, "activations": inputs + ends} | loss
        backward = {"cast weights": cast // blocks, "activations": inputs + ends + block}
    else:
        forward = {"cast weights": cast, "activations": blocks * block + ends} | loss
        backward = {"cast weights": cast, "activations": blocks * block + ends}
    backward |= {"loss": 4 * head, "temporaries": within}
    gathers = gathered_bytes(share, on_gpu, blocks)
    forward |= {"gathered": gathers.forward}
    backward |= {"gathered": gathers.backward}
    world = placement.world if placement else 1
    before = gradients if train.grad_accum > world else {}
    # In the last block all gradients are there but the embedding's.
    last = {
        "gradients": 4 * (parameters - (not c.tie_embeddings) * head * parameters // whole),
        # Among ranks the head's gradient is summed at the end, with the embedding's.
        "loss": 4 * head * (world > 1),
        "cast weights": cast // blocks,
        "activations": 4 * c.d_model * tokens + block,
        "temporaries": within,
        "gathered": gathers.last,
    }
    temporaries = OPTIMIZER_MEMORY[train.optimizer].temporaries(c, b, on_gpu)
    update = gradients | {"temporaries": temporaries}
    end = gradients | {"gathered": gathers.end}
    moments_of_a_step = [
        always | parts
        for parts in (before | forward, before | backward, last | before, end, update)
    ]
    names = (
        "program",
        "weights",
        "gradients",
        "optimizer state",
        "cast weights",
        "activations",
        "loss",
        "gathered",
        "temporaries",
    )
    largest = max(moments_of_a_step, key=lambda parts: sum(parts.values()))
    return {name: largest.get(name, 0) for name in names}


def _kernel_bytes(c: ModelConfig, b: int) -> int:
    """What oneDNN keeps for a CPU: it does GELU, and in half precision the products."""
    products, gelus = (b != 4) * ONEDNN_PRODUCTS, (c.expert_activation == "gelu") * ONEDNN_GELUS
    return ONEDNN_KERNEL_BYTES * (products + gelus)


def _saved_per_token(c: ModelConfig, b: int, on_gpu: bool) -> dict[str, int]:
    """Bytes that a block saves for its backward pass, per token, scores and masks apart."""
    D, cast = c.attention_head_dim, b != 4
    q, kv, inputs, F = c.num_heads * D, c.num_kv_heads * D, c.expert_inputs, c.d_ff
    # Both norms' inputs; what each linear layer multiplies: the first norm's result, of AMP a copy
    # for each of q, k and v, and the second's, for the router in float32. A CPU's norm keeps a
    # tensor more.
    stream = c.d_model * (8 + (6 if cast else 4) + 4 + (0 if on_gpu else 8))
    # A GPU's kernel for masks reads keys and values that are copied to all heads.
    copied = (q - kv) * on_gpu * (1 if c.use_attention_bias else _windowed_share(c))
    attention = round(b * 2 * (q + kv + copied)) + 4 * c.num_heads
    qk_norm = c.qk_norm * 4 * (q + kv) * (1 if on_gpu else 2)
    router = 8 * c.num_experts + 32 * c.top_k
    # Sorted rows, the hidden layer before its activation, the outputs. A CPU makes the rest again
    # (runtime/kernels/cpu_experts.py); a GPU, or dropout, keeps what the activation is made of and
    # its result.
    kept = {"gelu": 1, "swiglu": 2, "swiglu_clamped": 5}[c.expert_activation] * (
        on_gpu or c.dropout > 0
    )
    one_hot = 2 * c.num_experts * (c.expert_bias and on_gpu and cast)
    dropped = (1 if on_gpu else 2) * (c.dropout > 0)
    experts = c.top_k * (b * (2 * c.d_model + inputs + (kept + dropped) * F + one_hot))
    return {"attention": stream + attention + qk_norm, "router": router, "experts": experts}


def _windowed_share(c: ModelConfig) -> float:
    """Share of the blocks whose window is shorter than the context, so that they need a mask."""
    windowed = [0 < c.window(block) < c.context_length for block in range(c.transformer_blocks)]
    return sum(windowed) / c.transformer_blocks


def _saved_scores(c: ModelConfig, train: TrainConfig, b: int, on_gpu: bool) -> int:
    """Bytes of [T, T] that a block saves: masks, the table as it was added, on a CPU the scores."""
    square, batch = c.context_length**2, train.batch_size
    windowed = 0 if c.use_attention_bias else _windowed_share(c)
    mask = round(b * square * (batch if train.document_mask else windowed))
    if on_gpu:
        # The memory-efficient kernel holds no scores.
        return mask + c.use_attention_bias * square * (b * c.num_heads + 1)
    # A learned table rules the flash kernel out, and so does dropout: float32 scores after the
    # softmax, and, with dropout, what drops them and the result.
    return mask + square * c.num_heads * batch * (12 if c.dropout else 4 * c.use_attention_bias)


def _attention_gradients(c: ModelConfig, train: TrainConfig, b: int, on_gpu: bool) -> int:
    """Bytes of a learned table's gradient, made for each sequence; on a CPU also of the scores."""
    return (
        c.use_attention_bias
        * c.num_heads
        * c.context_length**2
        * train.batch_size
        * (b if on_gpu else 8)
    )


def _expert_temporaries(c: ModelConfig, tokens: int, b: int, on_gpu: bool) -> int:
    """Bytes that the experts of a block hold in their backward pass as well: on a CPU the hidden
    layer's gradients, where one expert may have most of the rows.
    """
    return 0 if on_gpu else tokens * c.top_k * b * (2 * c.d_ff + c.expert_inputs + c.d_model)


def _muon_temporaries(c: ModelConfig, b: int, on_gpu: bool) -> int:
    """Bytes of Muon's temporaries: for a group of matrices four in float32, four in its dtype."""
    matrix = c.d_model * max(c.num_heads * c.attention_head_dim, c.d_ff)
    at_once = max(2**24 if on_gpu else 2**17, matrix)
    return min(at_once, hidden_matrices(c)) * (16 + 4 * (b if on_gpu else 4))


class OptimizerMemory(NamedTuple):
    """What an optimizer needs apart from weights and gradients.

    hidden_moments: tensors kept for each hidden matrix; of all other parameters it keeps two.
    temporaries(config, compute_bytes, on_gpu): bytes during the update.
    """

    hidden_moments: int
    temporaries: Callable[[ModelConfig, int, bool], int]


# One entry for each of optimizer.OPTIMIZERS. It is here because this file needs no PyTorch.
OPTIMIZER_MEMORY = {
    "adamw": OptimizerMemory(2, lambda config, compute_bytes, on_gpu: 0),
    "muon": OptimizerMemory(1, _muon_temporaries),
}
