"""The numbers: what a model is made of, how it is trained, and what that costs.

The configs are frozen dataclasses. Every field has a help text with its unit, and an allowed range.
The command line (runtime/base/cli.py), `--help` and the checks below are made from these fields.
Only the standard library is needed, so any machine can read, check and price a config.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field

# Of swiglu_clamped, from gpt-oss's code; both are fixed there.
SWIGLU_LIMIT, SWIGLU_STEEPNESS = (7.0, 1.702)


def option(default, help, *, choices=None, minimum=None, maximum=None, above=None):
    """Return a dataclass field with its help text and range. `above` is an exclusive minimum."""
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata={"help": help, **limits})


def check_field(name: str, value: typing.Any, kind: type[typing.Any], limits):
    """Return a field's value, 1 as 1.0 and a list of texts as a tuple, if type and range are right.

    Raises ValueError with the field, the value and what is allowed.
    """
    # 1 is a good float.
    if kind is float and type(value) is int:
        value = float(value)
    # A flag that may be given more than once.
    if kind is tuple and type(value) is list and all(type(item) is str for item in value):
        value = tuple(value)
    # type(), not isinstance: True does not count as an int here.
    if type(value) is not kind:
        raise ValueError(
            f"{name} must be of type {kind.__name__}, not {value!r} ({type(value).__name__})"
        )
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value}")
    if limits["choices"] is not None and value not in limits["choices"]:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, limits['choices']))}, not {value!r}"
        )
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise ValueError(f"{name} must be at least {limits['minimum']}, not {value}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"{name} must be greater than {limits['above']}, not {value}")
    if limits["maximum"] is not None and value > limits["maximum"]:
        raise ValueError(f"{name} must be at most {limits['maximum']}, not {value}")
    return value


def check_fields(config) -> None:
    """Check every field (check_field)."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = check_field(f.name, getattr(config, f.name), hints[f.name], f.metadata)
        # The config stays frozen, so set it underneath.
        object.__setattr__(config, f.name, value)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. The defaults are the published 3.66 B model (learned attention bias)."""

    # sizes
    d_model: int = option(
        1024, "width of the residual stream (features)", minimum=1, maximum=65_536
    )
    transformer_blocks: int = option(
        12, "number of blocks, each attention + mixture of experts", minimum=1, maximum=1_024
    )
    context_length: int = option(
        2048, "maximum number of tokens the model attends over", minimum=1, maximum=16_777_216
    )
    vocabulary_size: int = option(
        200_019,
        "token ids, the embedding's rows (default: o200k_base); train.py reads it from the data",
        minimum=1,
        maximum=16_777_216,
    )
    # attention
    num_heads: int = option(32, "query heads", minimum=1, maximum=4_096)
    num_kv_heads: int = option(
        8, "key/value heads, each shared by a group of query heads (GQA)", minimum=1, maximum=4_096
    )
    head_dim: int = option(
        0, "features per head; 0 = d_model / num_heads", minimum=0, maximum=4_096
    )
    qkv_bias: bool = option(False, "biases on the query, key and value projections")
    out_proj_bias: bool = option(True, "bias on the attention output projection")
    qk_norm: bool = option(False, "RMSNorm on each head's queries and keys before RoPE (Qwen3)")
    attention_sinks: bool = option(
        False,
        "a learned logit per query head in the softmax denominator, without a value (gpt-oss)",
    )
    use_attention_bias: bool = option(
        True, "learned attention bias: context_length x context_length per head and block"
    )
    sliding_window: int = option(
        0,
        "tokens a windowed block attends over, the query's own included; 0 = no window",
        minimum=0,
        maximum=16_777_216,
    )
    window_pattern: str = option(
        "all",
        "blocks that use sliding_window: all, or alternating (0, 2, 4, ...)",
        choices=("all", "alternating"),
    )
    # positions
    use_rope: bool = option(True, "rotary position embedding, rotate-half")
    rope_theta: float = option(10_000.0, "base of the rotary wavelengths", above=1.0)
    rope_scaling: str = option(
        "none",
        "extension beyond the trained context: none, linear (position interpolation) or yarn",
        choices=("none", "linear", "yarn"),
    )
    rope_scaling_factor: float = option(
        1.0,
        "context_length / trained context length, used by rope_scaling",
        minimum=1.0,
        maximum=65_536.0,
    )
    yarn_truncate: bool = option(
        True, "round the ends of YaRN's ramp outwards, as its authors do; gpt-oss does not"
    )
    # mixture of experts
    num_experts: int = option(32, "experts per block", minimum=1, maximum=4_096)
    top_k: int = option(2, "experts per token", minimum=1, maximum=4_096)
    d_ff: int = option(2048, "hidden features of one expert", minimum=1, maximum=262_144)
    expert_activation: str = option(
        "gelu",
        "gelu: Linear-GELU-Linear; swiglu: gated SiLU, one more matrix per expert; "
        "swiglu_clamped: SwiGLU with gpt-oss's clamping",
        choices=("gelu", "swiglu", "swiglu_clamped"),
    )
    expert_bias: bool = option(True, "biases on the experts' matrices")
    router_bias: bool = option(False, "bias on the router's logits (gpt-oss)")
    capacity_factor: float = option(
        0.0,
        "most assignments per expert in training, as a multiple of tokens * top_k / num_experts, "
        "rounded up; the lowest routing weights are dropped; 0 = dropless",
        minimum=0.0,
        maximum=65_536.0,
    )
    aux_loss_coef: float = option(
        1e-2,
        "weight of the load-balance loss (1.0 per block at perfect balance)",
        minimum=0.0,
    )
    z_loss_coef: float = option(0.0, "weight of the router z-loss (ST-MoE)", minimum=0.0)
    router_bias_rate: float = option(
        0.0,
        "step of the router's bias that balances experts without a loss (DeepSeek-V3); 0 = off",
        minimum=0.0,
    )
    # the rest
    dropout: float = option(
        0.0,
        "dropout probability on attention weights and the experts' hidden layer",
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
        "standard deviation of the initial weights; "
        "residual projections get init_std / sqrt(2 * transformer_blocks)",
        above=0.0,
    )

    def __post_init__(self):
        check_fields(self)
        if self.head_dim == 0 and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}: "
                "change either, or set head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.use_rope and self.attention_head_dim % 2:
            raise ValueError(
                f"RoPE rotates pairs: head_dim must be even, not {self.attention_head_dim}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must not exceed num_experts {self.num_experts}")
        if self.rope_scaling == "none" and self.rope_scaling_factor != 1.0:
            raise ValueError(
                f"rope_scaling_factor {self.rope_scaling_factor} has no effect with "
                "rope_scaling none: set rope_scaling to linear or yarn"
            )
        if self.rope_scaling != "none" and not self.use_rope:
            raise ValueError(f"rope_scaling {self.rope_scaling} needs use_rope")
        if self.rope_scaling != "yarn" and not self.yarn_truncate:
            raise ValueError(
                f"yarn_truncate has no effect with rope_scaling {self.rope_scaling}: "
                "leave it out, or set rope_scaling to yarn"
            )
        if self.window_pattern != "all" and not self.sliding_window:
            raise ValueError(
                f"window_pattern {self.window_pattern} has no effect without sliding_window"
            )

    @property
    def attention_head_dim(self) -> int:
        """Return the features per head: head_dim, or d_model / num_heads if that is 0."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def expert_inputs(self) -> int:
        """Return the output features of an expert's first matrix: d_ff, or twice that if gated."""
        return self.d_ff * (1 if self.expert_activation == "gelu" else 2)

    def window(self, block: int) -> int:
        """Return the tokens that block `block` attends over, the query's own included; 0 = all."""
        return self.sliding_window if self.window_pattern == "all" or block % 2 == 0 else 0


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, batch, schedule, optimizer, output."""

    # data and output
    data_dir: str = option("data", "folder of shards written by prepare_data.py (train/ and val/)")
    ckpt_dir: str = option("checkpoints", "folder for checkpoints")
    graph_dir: str = option("artifacts/graphs", "folder for metrics and plots")
    run_name: str = option(
        "", "name of the run: its folder in ckpt_dir and graph_dir, and shown in the plots"
    )
    # batch
    batch_size: int = option(2, "sequences per micro-batch", minimum=1, maximum=1_000_000)
    grad_accum: int = option(8, "micro-batches per optimizer step", minimum=1, maximum=1_000_000)
    micro_batch: str = option(
        "batch_size",
        "auto: use the largest micro-batch that fits, keeping batch_size x grad_accum",
        choices=("batch_size", "auto"),
    )
    document_mask: bool = option(
        False, "attend only inside a token's own document (a sequence may hold several)"
    )
    max_steps: int = option(50_000, "optimizer steps", minimum=1, maximum=1_000_000_000)
    epochs: float = option(0.0, "passes over the data, instead of max_steps; 0 = off", minimum=0.0)
    # optimizer and schedule
    optimizer: str = option(
        "adamw",
        "adamw, or muon: orthogonalised momentum for the blocks' matrices, AdamW for the rest",
        choices=("adamw", "muon"),
    )
    muon_momentum: float = option(0.95, "Muon's Nesterov momentum", minimum=0.0, maximum=0.999999)
    state_dtype: str = option(
        "float32",
        "dtype of the optimizer's moments; bfloat16 halves their memory",
        choices=("float32", "bfloat16"),
    )
    lr: float = option(3e-4, "peak learning rate", above=0.0)
    min_lr: float = option(3e-5, "final learning rate", minimum=0.0)
    schedule: str = option(
        "cosine",
        "learning rate after warm-up: cosine, constant, or wsd (constant, then linear decay over "
        "the last decay_fraction)",
        choices=("cosine", "wsd", "constant"),
    )
    warmup_steps: int = option(1000, "linear warm-up steps", minimum=0)
    decay_fraction: float = option(
        0.2, "fraction of max_steps in which wsd decays", above=0.0, maximum=1.0
    )
    weight_decay: float = option(
        0.1,
        "AdamW weight decay of matrices and the learned attention bias; norms and biases have none",
        minimum=0.0,
    )
    beta1: float = option(0.9, "AdamW beta1", minimum=0.0, maximum=0.999999)
    beta2: float = option(0.95, "AdamW beta2", minimum=0.0, maximum=0.999999)
    adam_eps: float = option(1e-8, "AdamW epsilon", above=0.0)
    grad_clip: float = option(1.0, "maximum gradient norm; 0 = no clipping", minimum=0.0)
    spike_sigmas: float = option(
        0.0,
        "skip a step whose loss is this many standard deviations above recent losses; 0 = off",
        minimum=0.0,
    )
    max_rollbacks: int = option(
        2,
        "how often to roll back to the last good checkpoint after several skipped steps in a row; "
        "after that, exit with code 3",
        minimum=0,
    )
    # how it runs
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option(
        "auto",
        "compute dtype; weights stay float32; auto = the best for the device",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: bool = option(False, "compile the blocks and the loss with torch.compile")
    activation_checkpointing: bool = option(
        False,
        "recompute each block in the backward pass: less memory, about a third more time",
    )
    deterministic: bool = option(
        False,
        "use only kernels that give the same bits in every run; may be slower on a GPU",
    )
    profile: bool = option(
        False,
        "write a trace of a few warm steps, and the time by operation, to graph_dir",
    )
    num_threads: int = option(0, "CPU threads; 0 = PyTorch's choice", minimum=0, maximum=4_096)
    seed: int = option(
        42, "seed of initial weights, data order and dropout", minimum=0, maximum=2**63 - 1
    )
    # what it reports and keeps
    log_interval: int = option(10, "steps between log lines", minimum=1)
    val_interval: int = option(100, "steps between validations", minimum=1)
    val_steps: int = option(
        50, "micro-batches per validation, the same sequences every time", minimum=1
    )
    save_interval: int = option(
        1000,
        "steps between checkpoints and plots; best.pt has the lowest validation loss among them",
        minimum=1,
    )
    keep_last: int = option(
        3, "step checkpoints to keep next to latest.pt and best.pt; 0 = all", minimum=0
    )
    resume: bool = option(
        False,
        "continue the newest checkpoint in ckpt_dir; max_steps and what does not change the "
        "learning may differ",
    )
    init_from: str = option(
        "", "checkpoint with the initial weights (our format or the original implementation's)"
    )
    expert_parallel: int = option(
        1, "ranks that share each block's experts (torchrun); 1 = each has all", minimum=1
    )
    shard: str = option(
        "full",
        "ranks that weights are sharded over: full = all, gathered for each use; none = gathered "
        "once a micro-batch; node = those of one machine",
        choices=("full", "node", "none"),
    )
    checkpoint: str = option(
        "auto",
        "auto = one file, or a folder above 100 GB",
        choices=("auto", "file", "sharded"),
    )
    balance_over: str = option(
        "micro_batch",
        "whose tokens balance loss counts; global = all ranks'",
        choices=("micro_batch", "global"),
    )
    sample_prompts: str = option("", "file of prompts to answer at each validation, one a line")
    keep_plots: bool = option(False, "also keep the plots of each save, as step_*.png")
    plot_theme: str = option("dark", "colours of the plots", choices=("dark", "light"))
    watch: bool = option(False, "serve a live page of the run (python -m scripts.watch)")
    wandb: bool = option(False, "also log to Weights & Biases (pip install wandb)")
    tensorboard: bool = option(False, "also log to TensorBoard (pip install tensorboard)")

    def __post_init__(self):
        check_fields(self)
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not exceed lr {self.lr}")
        if self.warmup_steps >= self.max_steps and self.schedule != "constant":
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be less than max_steps {self.max_steps}: "
                "lower --warmup_steps or raise --max_steps"
            )
        if self.optimizer != "muon" and self.muon_momentum != type(self).muon_momentum:
            raise ValueError(
                f"muon_momentum {self.muon_momentum} has no effect with "
                f"optimizer {self.optimizer}: leave it out, or set optimizer to muon"
            )
        if self.resume and self.init_from:
            raise ValueError(
                "give either resume (continue a run) or init_from (start from weights), not both"
            )


# ------------------------------------------------------------------------------------------ presets
@dataclass(frozen=True)
class Preset:
    """The model's and the training's values that differ from the defaults."""

    description: str
    model: dict
    train: dict


# Today's choices, limited to what a published class (Qwen3-MoE) can hold. SwiGLU experts without
# biases: Shazeer 2020; PaLM, Chowdhery et al. 2022, section 2. Per-head QK-norm: Dehghani et al.
# 2023; Qwen3. No learned attention bias. Trained with Muon, which learned most per token of all
# that benchmarks/ABLATIONS.md tries, and as much per second (at nano's size; no larger one was
# measured). The balance loss weighs twice the default: at 0.01 one of plain-nano's experts fell to
# 23 % of its fair share under Muon.
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

# OpenAI's gpt-oss (model card, arXiv 2508.10925, section 2, and the published config.json): sinks,
# every other block windowed, biases, clamped SwiGLU, YaRN. Trained with AdamW: the original
# optimizer is not published.
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
# For a laptop's CPU: the model, and a run of it.
_NANO = dict(
    d_model=128,
    transformer_blocks=4,
    context_length=256,
    vocabulary_size=4096,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=8,
    init_std=0.05,
)
_MINUTES = dict(
    batch_size=8,
    grad_accum=1,
    max_steps=1_000,
    min_lr=1e-4,
    warmup_steps=50,
    val_interval=100,
    val_steps=20,
    save_interval=250,
)

PRESETS = {
    "gptoss": Preset(
        "the published default with its learned attention bias; one 141 GB GPU", {}, {}
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
    # The settings that learn most in the same seconds on a CPU: benchmarks/ABLATIONS.md.
    "nano": Preset(
        "modern, for a laptop's CPU, minutes; wants a small vocabulary (bpe:4096)",
        _MODERN | _NANO | dict(context_length=512, num_experts=16, d_ff=128, tie_embeddings=True),
        _MINUTES
        | dict(optimizer="muon", lr=1e-2, schedule="wsd", decay_fraction=0.4, document_mask=True),
    ),
    "plain-nano": Preset(
        "nano untuned: fewer experts, half the context, no document mask",
        _MODERN | _NANO | dict(d_ff=256, tie_embeddings=True),
        _MINUTES | dict(optimizer="muon", lr=6e-3),
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
        | _NANO
        | dict(d_ff=128, rope_scaling_factor=2.0, yarn_truncate=True, aux_loss_coef=0.02),
        _MINUTES | dict(lr=3e-3),
    ),
}


# -------------------------------------------------------------------------------------------- costs
def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return the parameters by part, in closed form. They sum to the module's count (tested)."""
    c, L = config, config.transformer_blocks
    D = config.attention_head_dim
    # Features of all query heads, and of all key (or value) heads.
    q, kv = c.num_heads * D, c.num_kv_heads * D
    attention = (
        c.d_model * (2 * q + 2 * kv)
        + c.qkv_bias * (q + 2 * kv)
        + c.out_proj_bias * c.d_model
        + c.qk_norm * 2 * D
        + c.attention_sinks * c.num_heads
    )
    expert = c.d_model * (c.expert_inputs + c.d_ff) + c.expert_bias * (c.expert_inputs + c.d_model)
    output_matrix = (not c.tie_embeddings) * c.vocabulary_size * c.d_model
    return {
        "embedding": c.vocabulary_size * c.d_model,
        "attention": L * attention,
        "attention bias table": L * c.use_attention_bias * c.num_heads * c.context_length**2,
        "router": L * c.num_experts * (c.d_model + c.router_bias),
        "experts": L * c.num_experts * expert,
        "norms": (2 * L + 1) * c.d_model,
        "head": output_matrix + c.head_bias * c.vocabulary_size,
    }


def total_parameters(config: ModelConfig) -> int:
    return sum(parameter_counts(config).values())


def active_parameters(config: ModelConfig) -> int:
    """Return the parameters used per token.

    Not counted: the other experts, and the learned attention bias, which is only added.
    """
    counts = parameter_counts(config)
    experts = counts["experts"] * config.top_k // config.num_experts
    return sum(counts.values()) - counts["experts"] - counts["attention bias table"] + experts


def _mean_keys(config: ModelConfig, block: int, tokens: int) -> float:
    """Return the mean keys per query in a causal sequence of `tokens` tokens."""
    window = min(config.window(block) or tokens, tokens)
    # The first `window` queries see 1, 2, ... keys; each later one sees `window`.
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens


def flops_per_token(config: ModelConfig, sequence_tokens: int | None = None) -> int:
    """Return the matrix-multiply FLOPs of a forward pass, per token of a causal sequence.

    sequence_tokens: its length (default: the context). A multiply-add counts 2. Only the top_k
    experts and the keys inside the mask count. Training costs three times this: forward, and
    backward with respect to inputs and weights (Kaplan et al. 2020, section 2.1).
    """
    c, D = config, config.attention_head_dim
    q, kv = c.num_heads * D, c.num_kv_heads * D
    matrices = (
        c.d_model * (2 * q + 2 * kv)
        + c.d_model * c.num_experts
        + c.top_k * c.d_model * (c.expert_inputs + c.d_ff)
    )
    tokens = sequence_tokens or c.context_length
    keys = sum(_mean_keys(c, block, tokens) for block in range(c.transformer_blocks))
    products = c.transformer_blocks * matrices + c.d_model * c.vocabulary_size
    # Scores and weighted values: two products of q features with each key.
    return round(2 * products + 4 * q * keys)


def kv_cache_bytes_per_token(config: ModelConfig, element_bytes: int = 2) -> int:
    """Return the KV-cache bytes per token. Windowed blocks stop growing at their window."""
    features = config.num_kv_heads * config.attention_head_dim
    # Keys and values.
    return 2 * config.transformer_blocks * features * element_bytes


def loss_chunk_rows(config: ModelConfig, on_gpu: bool, spare_bytes: int = 0) -> int:
    """Return the rows of logits that the loss holds at a time.

    CPU: 256, or as many as make 8 M logits, up to 1,024. GPU: each chunk costs a pass over the
    head's float32 gradient, so the chunk is in proportion to that gradient. spare_bytes: the memory
    that a step leaves free on a GPU. Fewer passes cost memory, so the rows are doubled, up to
    8,192, while the additional rows take at most half of it. Loss and gradients are the same.
    """
    if not on_gpu:
        return min(max(2**23 // config.vocabulary_size, 256), 1024)
    least = rows = min(max(2 * config.d_model, 512), 4096)
    # 6 bytes a logit: half precision and float32. A float32 run takes less.
    while 2 * rows <= 8192 and 6 * (2 * rows - least) * config.vocabulary_size <= spare_bytes // 2:
        rows *= 2
    return rows


@dataclass(frozen=True)
class PredictConfig:
    """Settings of text generation."""

    ckpt: str = option(
        "checkpoints/latest.pt", "checkpoint to load (our format or the original implementation's)"
    )
    # what is drawn
    max_new_tokens: int = option(
        200, "maximum number of new tokens", minimum=1, maximum=100_000_000
    )
    temperature: float = option(
        0.9,
        "sampling temperature: 0 = greedy, 1 = the model's own distribution",
        minimum=0.0,
        maximum=1e30,
    )
    top_k: int = option(50, "sample from the k most likely tokens; 0 = all", minimum=0)
    top_p: float = option(
        1.0, "sample from the fewest tokens whose probabilities reach p", minimum=1e-9, maximum=1.0
    )
    min_p: float = option(
        0.0,
        "minimum probability, as a fraction of the most likely token's; 0 = off",
        minimum=0.0,
        maximum=1.0,
    )
    repetition_penalty: float = option(
        1.0,
        "above 1: tokens already in the context become less likely; 1 = off",
        minimum=1e-3,
        maximum=1e3,
    )
    stop: tuple = option(
        (), "text at which a completion ends (excluded); may be given more than once"
    )
    seed: int = option(
        -1,
        "random seed; the same seed and settings give the same text; -1 = a new one each time",
        minimum=-1,
        maximum=2**63 - 1,
    )
    # many completions
    prompt_file: str = option(
        "", 'file of prompts: one per line, or .jsonl with {"prompt": ...} or {"text": ...}'
    )
    chat: bool = option(
        False, "answer prompts as messages of a chat; needs a model trained on chats"
    )
    messages: str = option("", "JSON or .jsonl file of messages to answer; - = stdin")
    num_samples: int = option(
        1,
        "completions per prompt; with a seed, completion i uses seed + i",
        minimum=1,
        maximum=1_000_000,
    )
    batch_size: int = option(8, "prompts generated per batch", minimum=1, maximum=4_096)
    # the context
    when_full: str = option(
        "slide",
        "at the end of the context: slide (drop its older half and continue) or stop",
        choices=("slide", "stop"),
    )
    context_length: int = option(
        0,
        "tokens to attend over; beyond the trained context only without a learned attention bias; "
        "0 = as trained",
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
        "tokenizer for a checkpoint without one: o200k_base, byte, ..., a folder of "
        "prepare_data.py or of a published model, or none: token ids (default: the checkpoint's)",
    )
    # how it runs
    device: str = option("auto", "auto, cuda, cuda:N, mps or cpu")
    dtype: str = option(
        "auto",
        "dtype of weights and compute; auto = the best for the device",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantize: str = option(
        "none",
        "int8, int4: experts, attention and head in 8 bits, or experts and head in 4; less memory",
        choices=("none", "int8", "int4"),
    )
    lookup: int = option(
        0,
        "prompt-lookup decoding: tokens to guess from earlier text and check in one pass; "
        "same text, faster where it repeats; 0 = off",
        minimum=0,
        maximum=64,
    )
    c_kernel: bool = option(True, "CPU: decode with the C kernel if it gives the model's logits")
    compile: bool = option(
        False,
        "GPU: also compile the CUDA graph's step; delays the first token",
    )
    num_threads: int = option(
        0, "CPU threads; 0 = all cores available to this process", minimum=0, maximum=4_096
    )
    # what is shown
    json: bool = option(False, "print each finished completion as one JSON object per line")
    quiet: bool = option(False, "print only the text: no notes, figures or greeting")
    show_experts: bool = option(
        False, "after a completion: the experts of each of its tokens, block by block"
    )
    experts_html: str = option("", "HTML file to write with the experts of each token")
    interactive: bool = option(False, "interactive mode, also if stdin is a pipe")

    def __post_init__(self):
        check_fields(self)
        if self.rope_scaling != "none" and not self.context_length:
            raise ValueError(
                f"rope_scaling {self.rope_scaling} needs a context_length to stretch to"
            )
        shows_experts = self.show_experts or self.experts_html
        if shows_experts and (self.num_samples > 1 or self.prompt_file or self.messages):
            raise ValueError(
                "show_experts and experts_html are for one completion: "
                "leave out prompt_file, messages and num_samples, or these"
            )
