"""The numbers: what a model is made of, how it is trained, and what that costs.

`ModelConfig` and `TrainConfig` are frozen dataclasses. Every field carries its help text, its unit and its allowed range;
the command line (runtime/base/cli.py), the validation below and `--help` are all made from that one place. Nothing here needs
more than the standard library, so a config can be read, checked and priced on any machine.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field

SWIGLU_LIMIT, SWIGLU_STEEPNESS = (
    7.0,
    1.702,
)  # of swiglu_clamped, from gpt-oss's code; both are fixed there


def option(default, help, *, choices=None, minimum=None, maximum=None, above=None):
    """A dataclass field with its help text and range. `above` is an exclusive minimum."""
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata={"help": help, **limits})


def check_fields(config) -> None:
    """Check type and range of every field. Raises ValueError that names the field, the value and what is allowed."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, kind, limits = getattr(config, f.name), hints[f.name], f.metadata
        if (
            kind is float and type(value) is int
        ):  # 1 is a good float; the config stays frozen, so set it underneath
            value = float(value)
            object.__setattr__(config, f.name, value)
        if (
            kind is tuple and type(value) is list and all(type(item) is str for item in value)
        ):  # a flag that may be given more than once
            value = tuple(value)
            object.__setattr__(config, f.name, value)
        if type(value) is not kind:  # type(), not isinstance: True is no int here
            raise ValueError(
                f"{f.name} must be of type {kind.__name__}, not {value!r} ({type(value).__name__})"
            )
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{f.name} must be a finite number, not {value}")
        if limits["choices"] is not None and value not in limits["choices"]:
            raise ValueError(
                f"{f.name} must be one of {', '.join(map(repr, limits['choices']))}, not {value!r}"
            )
        if limits["minimum"] is not None and value < limits["minimum"]:
            raise ValueError(f"{f.name} must be at least {limits['minimum']}, not {value}")
        if limits["above"] is not None and value <= limits["above"]:
            raise ValueError(f"{f.name} must be greater than {limits['above']}, not {value}")
        if limits["maximum"] is not None and value > limits["maximum"]:
            raise ValueError(f"{f.name} must be at most {limits['maximum']}, not {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. The defaults are the published 3.66 B model, biases and learned position table included."""

    # sizes
    d_model: int = option(
        1024, "width of the residual stream (features)", minimum=1, maximum=65_536
    )
    transformer_blocks: int = option(
        12, "number of blocks, each attention + mixture of experts", minimum=1, maximum=1_024
    )
    context_length: int = option(
        2048, "tokens the model attends over at most", minimum=1, maximum=16_777_216
    )
    vocabulary_size: int = option(
        200_019,
        "rows of the embedding (token ids); train.py takes it from the data unless it is given (default: o200k_base)",
        minimum=1,
        maximum=16_777_216,
    )
    # attention
    num_heads: int = option(32, "query heads", minimum=1, maximum=4_096)
    num_kv_heads: int = option(
        8, "key/value heads shared by groups of query heads (GQA)", minimum=1, maximum=4_096
    )
    head_dim: int = option(
        0, "features per head; 0 = d_model / num_heads", minimum=0, maximum=4_096
    )
    qkv_bias: bool = option(False, "biases on the query, key and value projections")
    out_proj_bias: bool = option(True, "bias on the attention output projection")
    qk_norm: bool = option(False, "RMSNorm on each head's queries and keys before RoPE (Qwen3)")
    attention_sinks: bool = option(
        False,
        "a learned logit per query head that takes its share of the softmax and gives nothing (gpt-oss)",
    )
    use_attention_bias: bool = option(
        True, "learned table of context_length x context_length attention biases per head and block"
    )
    sliding_window: int = option(
        0,
        "tokens a windowed block looks back over, itself included; 0 = no window",
        minimum=0,
        maximum=16_777_216,
    )
    window_pattern: str = option(
        "all",
        "which blocks are windowed when sliding_window is set: all, or alternating (blocks 0, 2, 4, ...)",
        choices=("all", "alternating"),
    )
    # positions
    use_rope: bool = option(True, "rotary position embedding, rotate-half")
    rope_theta: float = option(10_000.0, "base of the rotary wavelengths", above=1.0)
    rope_scaling: str = option(
        "none",
        "how positions beyond the trained context are reached: none, linear (position interpolation) or yarn",
        choices=("none", "linear", "yarn"),
    )
    rope_scaling_factor: float = option(
        1.0,
        "context_length / trained context length, used by rope_scaling",
        minimum=1.0,
        maximum=65_536.0,
    )
    yarn_truncate: bool = option(
        True, "round the ends of yarn's ramp outwards, as its authors do; gpt-oss does not"
    )
    # mixture of experts
    num_experts: int = option(32, "experts per block", minimum=1, maximum=4_096)
    top_k: int = option(2, "experts that each token is sent to", minimum=1, maximum=4_096)
    d_ff: int = option(2048, "hidden features of one expert", minimum=1, maximum=262_144)
    expert_activation: str = option(
        "gelu",
        "gelu: Linear-GELU-Linear; swiglu: gated SiLU, one more matrix per expert; swiglu_clamped: gpt-oss's kind of it",
        choices=("gelu", "swiglu", "swiglu_clamped"),
    )
    expert_bias: bool = option(True, "biases on the experts' matrices")
    router_bias: bool = option(False, "bias on the router's logits (gpt-oss)")
    capacity_factor: float = option(
        0.0,
        "training: each expert takes at most ceil(capacity_factor * tokens * top_k / num_experts) assignments, lowest gates dropped first; 0 = dropless",
        minimum=0.0,
        maximum=65_536.0,
    )
    aux_loss_coef: float = option(
        1e-2,
        "weight of the load-balance loss, which is 1.0 per block at perfect balance",
        minimum=0.0,
    )
    z_loss_coef: float = option(0.0, "weight of the router z-loss (ST-MoE)", minimum=0.0)
    router_bias_rate: float = option(
        0.0,
        "step of the selection bias that balances experts without a loss (DeepSeek-V3); 0 = off",
        minimum=0.0,
    )
    # the rest
    dropout: float = option(
        0.0,
        "dropout probability on attention weights and on the experts' hidden layer",
        minimum=0.0,
        maximum=0.99,
    )
    rms_norm_eps: float = option(
        2.0**-23,
        "epsilon of every RMSNorm (default: float32 machine epsilon, as in the published model)",
        above=0.0,
    )
    tie_embeddings: bool = option(False, "use the embedding matrix as the output head")
    head_bias: bool = option(True, "bias on the output head")
    init_std: float = option(
        0.02,
        "standard deviation of the initial weights; residual projections get init_std / sqrt(2 * transformer_blocks)",
        above=0.0,
    )

    def __post_init__(self):
        check_fields(self)
        if self.head_dim == 0 and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}: change one of them or set head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.use_rope and self.attention_head_dim % 2:
            raise ValueError(
                f"RoPE rotates pairs of features, so head_dim must be even, not {self.attention_head_dim}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must not exceed num_experts {self.num_experts}")
        if self.rope_scaling == "none" and self.rope_scaling_factor != 1.0:
            raise ValueError(
                f"rope_scaling_factor {self.rope_scaling_factor} has no effect with rope_scaling none: set rope_scaling to linear or yarn"
            )
        if self.rope_scaling != "none" and not self.use_rope:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs use_rope")
        if self.rope_scaling != "yarn" and not self.yarn_truncate:
            raise ValueError(
                f"yarn_truncate has no effect with rope_scaling {self.rope_scaling}: leave it out, or set rope_scaling to yarn"
            )
        if self.window_pattern != "all" and not self.sliding_window:
            raise ValueError(
                f"window_pattern {self.window_pattern} has no effect without sliding_window"
            )

    @property
    def attention_head_dim(self) -> int:
        """Features per head: head_dim, or d_model / num_heads where that is 0."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def expert_inputs(self) -> int:
        """Features that an expert's first matrix gives: d_ff, or twice that where one half gates the other."""
        return self.d_ff * (1 if self.expert_activation == "gelu" else 2)

    def window(self, block: int) -> int:
        """Tokens that block number `block` looks back over, itself included; 0 = all of them."""
        return self.sliding_window if self.window_pattern == "all" or block % 2 == 0 else 0


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, batch, schedule, optimizer, output."""

    # data and output
    data_dir: str = option(
        "data", "folder with the shards that prepare_data.py wrote (train/ and val/)"
    )
    ckpt_dir: str = option("checkpoints", "folder for checkpoints")
    graph_dir: str = option("artifacts/graphs", "folder for metrics and plots")
    # batch
    batch_size: int = option(2, "sequences per micro-batch", minimum=1, maximum=1_000_000)
    grad_accum: int = option(8, "micro-batches per optimizer step", minimum=1, maximum=1_000_000)
    micro_batch: str = option(
        "batch_size",
        "auto: find the largest micro-batch that fits the device and set batch_size and grad_accum accordingly, their product staying what it is",
        choices=("batch_size", "auto"),
    )
    document_mask: bool = option(
        False, "tokens see nothing before the document that they are in (windows hold several)"
    )
    max_steps: int = option(50_000, "optimizer steps", minimum=1, maximum=1_000_000_000)
    # optimizer and schedule
    optimizer: str = option(
        "adamw",
        "adamw, or muon: orthogonalised momentum for the matrices inside the blocks, AdamW for all else",
        choices=("adamw", "muon"),
    )
    muon_momentum: float = option(
        0.95, "momentum of Muon, used in Nesterov's form", minimum=0.0, maximum=0.999999
    )
    state_dtype: str = option(
        "float32",
        "how the optimizer keeps its moments between steps; bfloat16 halves them",
        choices=("float32", "bfloat16"),
    )
    lr: float = option(3e-4, "peak learning rate", above=0.0)
    min_lr: float = option(3e-5, "final learning rate", minimum=0.0)
    schedule: str = option(
        "cosine",
        "learning rate after warm-up: cosine, wsd (constant, then linear decay over the last decay_fraction) or constant",
        choices=("cosine", "wsd", "constant"),
    )
    warmup_steps: int = option(1000, "steps of linear warm-up", minimum=0)
    decay_fraction: float = option(
        0.2, "share of max_steps that schedule wsd decays over", above=0.0, maximum=1.0
    )
    weight_decay: float = option(
        0.1,
        "AdamW weight decay, on matrices and the attention-bias table; norms, biases and the router's selection bias have none",
        minimum=0.0,
    )
    beta1: float = option(0.9, "AdamW beta1", minimum=0.0, maximum=0.999999)
    beta2: float = option(0.95, "AdamW beta2", minimum=0.0, maximum=0.999999)
    adam_eps: float = option(1e-8, "AdamW epsilon", above=0.0)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 = no clipping", minimum=0.0)
    spike_sigmas: float = option(
        0.0,
        "skip a step whose loss is more than this many standard deviations above the recent ones; 0 = off",
        minimum=0.0,
    )
    max_rollbacks: int = option(
        2,
        "times that a run goes back to its last good checkpoint, and on behind the data it met since, when a step after the other is skipped; then it ends with exit code 3",
        minimum=0,
    )
    # how it runs
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option(
        "auto",
        "arithmetic of the forward and backward pass; weights stay float32; auto = the best for the device",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: bool = option(False, "compile the blocks and the loss with torch.compile")
    activation_checkpointing: bool = option(
        False,
        "keep only each block's input and compute the rest again in the backward pass: less memory, about a third more time",
    )
    deterministic: bool = option(
        False,
        "only kernels that give the same bits in every run, where a GPU has faster ones that do not",
    )
    profile: bool = option(
        False,
        "write a trace of a few steps after the warm-up, and the time by operation, into graph_dir",
    )
    num_threads: int = option(0, "CPU threads; 0 = PyTorch's choice", minimum=0, maximum=4_096)
    seed: int = option(
        42, "seed of the initial weights, the data order and dropout", minimum=0, maximum=2**63 - 1
    )
    # what it reports and keeps
    log_interval: int = option(10, "steps between log lines", minimum=1)
    val_interval: int = option(100, "steps between validations", minimum=1)
    val_steps: int = option(
        50, "micro-batches per validation; the same windows every time", minimum=1
    )
    save_interval: int = option(
        1000,
        "steps between checkpoints and plots; best.pt is the one of these with the lowest validation loss",
        minimum=1,
    )
    keep_last: int = option(
        3, "step checkpoints to keep, besides latest.pt and best.pt; 0 = all", minimum=0
    )
    resume: bool = option(
        False,
        "go on from the newest checkpoint in ckpt_dir with that run's settings; of the others only max_steps and those that say where it runs and what it reports may be given anew",
    )
    init_from: str = option(
        "", "checkpoint whose weights the run starts from (ours or the reference's format)"
    )
    wandb: bool = option(False, "also log to Weights & Biases (pip install wandb)")
    tensorboard: bool = option(False, "also log to TensorBoard (pip install tensorboard)")

    def __post_init__(self):
        check_fields(self)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not exceed lr {self.lr}")
        if self.warmup_steps >= self.max_steps and self.schedule != "constant":
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be less than max_steps {self.max_steps}: lower --warmup_steps or raise --max_steps"
            )
        if self.optimizer != "muon" and self.muon_momentum != type(self).muon_momentum:
            raise ValueError(
                f"muon_momentum {self.muon_momentum} has no effect with optimizer {self.optimizer}: leave it out, or set optimizer to muon"
            )
        if self.resume and self.init_from:
            raise ValueError(
                "give either resume (go on with a run) or init_from (start a new run from weights), not both"
            )


# ------------------------------------------------------------------------------------------ presets
@dataclass(frozen=True)
class Preset:
    """Values that differ from the defaults, for the model and for its training."""

    description: str
    model: dict
    train: dict


# What one would choose today, and what a published class (Qwen3-MoE) can hold: SwiGLU experts and no biases (Shazeer 2020;
# PaLM, Chowdhery et al. 2022, section 2), per-head QK-norm (Dehghani et al. 2023; Qwen3), no position table. Trained with Muon,
# which learned most per token of all that benchmarks/ABLATIONS.md tries, and as much per second (at nano's size; no larger one was measured).
# The balance loss weighs twice the default: at 0.01 one of nano's experts fell to 23 % of its fair share under Muon.
_MODERN = dict(
    expert_activation="swiglu",
    expert_bias=False,
    out_proj_bias=False,
    head_bias=False,
    qk_norm=True,
    use_attention_bias=False,
    rms_norm_eps=1e-6,
    aux_loss_coef=0.02,
)

# OpenAI's gpt-oss (model card, arXiv 2508.10925, section 2, and the published config.json): sinks, every other block windowed, biases, clamped SwiGLU, YaRN.
# Trained with AdamW: what it was trained with is not published.
_GPT_OSS = dict(
    head_dim=64,
    qkv_bias=True,
    out_proj_bias=True,
    attention_sinks=True,
    use_attention_bias=False,
    sliding_window=128,
    window_pattern="alternating",
    rope_theta=150_000.0,
    rope_scaling="yarn",
    rope_scaling_factor=32.0,
    yarn_truncate=False,
    top_k=4,
    expert_activation="swiglu_clamped",
    expert_bias=True,
    router_bias=True,
    head_bias=False,
    rms_norm_eps=1e-5,
)

PRESETS = {
    "gptoss": Preset(
        "the published default, learned position table included; one 141 GB GPU", {}, {}
    ),
    "gptoss-modern": Preset(
        "the default's width, depth and experts with today's choices; one 141 GB GPU",
        _MODERN | dict(num_heads=16, num_kv_heads=4, head_dim=64),
        dict(optimizer="muon", batch_size=16, grad_accum=4, max_steps=10_000),
    ),
    "modern-24gb": Preset(
        "modern, for one 24 GB GPU",
        _MODERN
        | dict(
            d_model=768,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            d_ff=768,
            context_length=1024,
            tie_embeddings=True,
        ),
        dict(optimizer="muon", batch_size=8, grad_accum=8, max_steps=20_000, lr=6e-4, min_lr=6e-5),
    ),
    "modern-8gb": Preset(
        "modern, for one 8 GB GPU",
        _MODERN
        | dict(
            d_model=512,
            transformer_blocks=8,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            num_experts=16,
            d_ff=512,
            context_length=512,
            tie_embeddings=True,
        ),
        dict(optimizer="muon", batch_size=8, grad_accum=8, max_steps=20_000, lr=1e-3, min_lr=1e-4),
    ),
    "nano": Preset(
        "modern, for a laptop's CPU, minutes; wants a small vocabulary (bpe:4096)",
        _MODERN
        | dict(
            d_model=128,
            transformer_blocks=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            num_experts=8,
            d_ff=256,
            context_length=256,
            vocabulary_size=4096,
            tie_embeddings=True,
            init_std=0.05,
        ),
        dict(
            optimizer="muon",
            batch_size=8,
            grad_accum=1,
            max_steps=1_000,
            lr=6e-3,
            min_lr=1e-4,
            warmup_steps=50,
            val_interval=100,
            val_steps=20,
            save_interval=250,
        ),
    ),
    "gpt-oss-20b": Preset(
        "OpenAI's gpt-oss-20b, for its numbers (not to be mixed up with gptoss)",
        _GPT_OSS
        | dict(
            d_model=2880,
            transformer_blocks=24,
            context_length=131_072,
            vocabulary_size=201_088,
            num_heads=64,
            num_kv_heads=8,
            d_ff=2880,
        ),
        dict(batch_size=1, grad_accum=1),
    ),
    "gpt-oss-nano": Preset(
        "gpt-oss's architecture for a laptop's CPU, minutes; wants a small vocabulary (bpe:4096)",
        _GPT_OSS
        | dict(
            d_model=128,
            transformer_blocks=4,
            context_length=256,
            vocabulary_size=4096,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            num_experts=8,
            d_ff=128,
            rope_scaling_factor=2.0,
            yarn_truncate=True,
            aux_loss_coef=0.02,
            init_std=0.05,
        ),
        dict(
            batch_size=8,
            grad_accum=1,
            max_steps=1_000,
            lr=3e-3,
            min_lr=1e-4,
            warmup_steps=50,
            val_interval=100,
            val_steps=20,
            save_interval=250,
        ),
    ),
}


# ----------------------------------------------------------------- closed forms: what does it cost?
def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, in closed form; the values sum to the module's own count (tests hold the two together)."""
    c, L, D = config, config.transformer_blocks, config.attention_head_dim
    q, kv = c.num_heads * D, c.num_kv_heads * D
    attention = (
        c.d_model * (2 * q + 2 * kv)
        + c.qkv_bias * (q + 2 * kv)
        + c.out_proj_bias * c.d_model
        + c.qk_norm * 2 * D
        + c.attention_sinks * c.num_heads
    )
    expert = c.d_model * (c.expert_inputs + c.d_ff) + c.expert_bias * (c.expert_inputs + c.d_model)
    return {
        "embedding": c.vocabulary_size * c.d_model,
        "attention": L * attention,
        "attention bias table": L * c.use_attention_bias * c.num_heads * c.context_length**2,
        "router": L * c.num_experts * (c.d_model + c.router_bias),
        "experts": L * c.num_experts * expert,
        "norms": (2 * L + 1) * c.d_model,
        "head": (not c.tie_embeddings) * c.vocabulary_size * c.d_model
        + c.head_bias * c.vocabulary_size,
    }


def total_parameters(config: ModelConfig) -> int:
    return sum(parameter_counts(config).values())


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: all but the experts it is not sent to and the position table, which is only added."""
    counts = parameter_counts(config)
    experts = counts["experts"] * config.top_k // config.num_experts
    return sum(counts.values()) - counts["experts"] - counts["attention bias table"] + experts


def _mean_keys(config: ModelConfig, block: int, tokens: int) -> float:
    """Keys that a query attends to on average in a causal sequence of `tokens` tokens."""
    window = min(config.window(block) or tokens, tokens)
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens


def flops_per_token(config: ModelConfig, sequence_tokens: int | None = None) -> int:
    """Matrix-multiply FLOPs of one forward pass, per token of a causal sequence of `sequence_tokens` (default: the context).

    A multiply-add counts 2, only the top_k experts and only the keys inside the mask count. Training costs three times
    this: forward, and backward with respect to inputs and weights (Kaplan et al. 2020, section 2.1).
    """
    c, D = config, config.attention_head_dim
    q, kv = c.num_heads * D, c.num_kv_heads * D
    matrices = (
        c.d_model * (2 * q + 2 * kv)
        + c.d_model * c.num_experts
        + c.top_k * c.d_model * (c.expert_inputs + c.d_ff)
    )
    keys = sum(
        _mean_keys(c, block, sequence_tokens or c.context_length)
        for block in range(c.transformer_blocks)
    )
    return round(
        2 * (c.transformer_blocks * matrices + c.d_model * c.vocabulary_size) + 4 * q * keys
    )


def kv_cache_bytes_per_token(config: ModelConfig, element_bytes: int = 2) -> int:
    """KV-cache bytes that one more token costs while no window is full; windowed blocks stop growing at their window."""
    return (
        2
        * config.transformer_blocks
        * config.num_kv_heads
        * config.attention_head_dim
        * element_bytes
    )


def loss_chunk_rows(config: ModelConfig, on_gpu: bool, spare_bytes: int = 0) -> int:
    """Rows of logits that the loss holds at a time. On a CPU 256, or as many as make 8 M logits, up to 1,024; on a GPU, where each
    chunk costs a pass over the head's float32 gradient, as many as keep the chunk in proportion to that gradient.

    spare_bytes: what a step leaves free on a GPU. Fewer passes cost memory, so the rows are doubled,
    up to 8,192, while the additional ones take at most half of it. Loss and gradients are the same.
    """
    if not on_gpu:
        return min(max(2**23 // config.vocabulary_size, 256), 1024)
    least = rows = min(max(2 * config.d_model, 512), 4096)
    # A logit is held in half precision and once more in float32, which is where float32 takes less.
    while 2 * rows <= 8192 and 6 * (2 * rows - least) * config.vocabulary_size <= spare_bytes // 2:
        rows *= 2
    return rows


@dataclass(frozen=True)
class PredictConfig:
    """How text is generated."""

    ckpt: str = option(
        "checkpoints/latest.pt", "checkpoint to load, ours or the reference's format"
    )
    # what is drawn
    max_new_tokens: int = option(200, "most tokens in an answer", minimum=1, maximum=100_000_000)
    temperature: float = option(
        0.9,
        "0 takes the likeliest token; 1 draws from the model's own distribution",
        minimum=0.0,
        maximum=1e30,
    )
    top_k: int = option(50, "draw from the k likeliest tokens only; 0 = all", minimum=0)
    top_p: float = option(
        1.0, "draw from the fewest tokens whose probabilities reach p", minimum=1e-9, maximum=1.0
    )
    min_p: float = option(
        0.0,
        "draw only from tokens at least this many times as likely as the likeliest; 0 = off",
        minimum=0.0,
        maximum=1.0,
    )
    repetition_penalty: float = option(
        1.0,
        "above 1: tokens that are in the context already are less likely; 1 = off",
        minimum=1e-3,
        maximum=1e3,
    )
    stop: tuple = option((), "end an answer before this text; may be given more than once")
    seed: int = option(
        -1,
        "the same seed and settings give the same text; -1 = another each time",
        minimum=-1,
        maximum=2**63 - 1,
    )
    # many answers
    prompt_file: str = option(
        "", 'file of prompts: a line each, or .jsonl with {"prompt": ...} or {"text": ...}'
    )
    num_samples: int = option(
        1,
        "answers to each prompt; with a seed, answer i has seed + i",
        minimum=1,
        maximum=1_000_000,
    )
    batch_size: int = option(
        8, "answers that are generated at the same time", minimum=1, maximum=4_096
    )
    # the context
    when_full: str = option(
        "slide",
        "at the end of the context: slide (forget its older half and go on) or stop",
        choices=("slide", "stop"),
    )
    context_length: int = option(
        0,
        "tokens to attend over, also beyond the trained context if the model has no position table; 0 = as trained",
        minimum=0,
        maximum=16_777_216,
    )
    rope_scaling: str = option(
        "none",
        "with a longer context_length: none, linear (position interpolation) or yarn",
        choices=("none", "linear", "yarn"),
    )
    tokenizer: str = option(
        "",
        "tokenizer for a checkpoint that carries none (o200k_base, byte, ..., a folder of prepare_data.py or of a published model); default: the checkpoint's",
    )
    # how it runs
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option(
        "auto",
        "weights and arithmetic; auto = the best for the device",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantize: str = option(
        "none",
        "int8: experts, attention and head in 8 bits; faster on a CPU, less memory everywhere",
        choices=("none", "int8"),
    )
    lookup: int = option(
        0,
        "guess up to this many tokens at once from earlier text, and check them in one pass; the same answer, sooner where text repeats; 0 = off",
        minimum=0,
        maximum=64,
    )
    c_kernel: bool = option(True, "on a CPU: decode by C code, where it gives the model's logits")
    compile: bool = option(
        False,
        "on a GPU: also compile the step of the CUDA graph, which takes a while before the first token",
    )
    num_threads: int = option(
        0, "CPU threads; 0 = the cores that this process may use", minimum=0, maximum=4_096
    )
    # what is shown
    json: bool = option(False, "one JSON object a line for each answer, when it is complete")
    quiet: bool = option(False, "text alone: no notes, no figures, no greeting")
    show_experts: bool = option(
        False, "after an answer: which experts each of its tokens went to, block by block"
    )
    experts_html: str = option("", "write a page that shows the same, token by token, to this file")
    interactive: bool = option(False, "a prompt to type at even where stdin is a pipe")

    def __post_init__(self):
        check_fields(self)
        if self.rope_scaling != "none" and not self.context_length:
            raise ValueError(
                f"rope_scaling {self.rope_scaling} needs a context_length to stretch to"
            )
        if (
            self.num_samples > 1
            and (self.experts_html or self.show_experts)
            or self.prompt_file
            and (self.experts_html or self.show_experts)
        ):
            raise ValueError(
                "show_experts and experts_html are for one answer: leave prompt_file and num_samples out, or these"
            )
