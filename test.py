"""Print a model's parameters, FLOPs and memory, without creating it (PyTorch's meta device).

    python test.py                                the 3.66 B default
    python test.py --preset modern-24gb
    python test.py --d_model 2048 --num_experts 64
    python test.py --ckpt checkpoints/latest.pt
    python test.py --presets                      the cost of each preset
    python test.py --world 64                     a run on 64 GPUs

`make test` runs the project's own tests.
"""

from __future__ import annotations

from config_model import (
    PRESETS,
    ModelConfig,
    TrainConfig,
    flops_per_token,
    kv_cache_bytes_per_token,
    parameter_counts,
)
from runtime.base import cli
from runtime.base.text import human_bytes, human_count
from runtime.checkpoint.read import read_config
from runtime.checks import known
from runtime.training import scale
from runtime.training.memory import training_memory_bytes

# Bytes per element.
DTYPES = {"float32": 4, "bfloat16": 2}
# Settings of training that change its memory.
MEMORY_SETTINGS = [
    "batch_size",
    "grad_accum",
    "document_mask",
    "optimizer",
    "state_dtype",
    "activation_checkpointing",
    "expert_parallel",
    "shard",
]


def _row(label: str, cells: list[str]) -> str:
    return f"{label:24}" + "".join(f"{cell:>16}" for cell in cells)


def _cached_tokens(config: ModelConfig) -> tuple[int, int]:
    """Return the tokens that all blocks' caches hold in a full context, and the blocks."""
    context, blocks = config.context_length, config.transformer_blocks
    return sum(min(config.window(i) or context, context) for i in range(blocks)), blocks


def report(config: ModelConfig, train: TrainConfig) -> list[str]:
    """Return the report's lines. The total is the module's own count.

    Parameters that the closed forms do not know are named.
    """
    real = known.counts(config)
    total, active = real.total, real.active
    counts = parameter_counts(config)
    table = counts["attention bias table"]
    lines = [f"{'part':24}{'parameters':>16}{'share':>9}"]
    counts |= {"not in the closed forms": real.uncounted}
    lines += [
        f"{part:24}{count:>16,}{100 * count / total:>8.1f}%"
        for part, count in counts.items()
        if count
    ]
    lines += [
        f"{'total':24}{total:>16,}",
        f"{'active per token':24}{active:>16,}{100 * active / total:>8.1f}%",
    ]
    lines += [f"note: {real.note}"] * bool(real.note)
    if table > 0.1 * total:
        lines.append(
            f"{human_count(total - table)} + {human_count(table)} learned attention bias; "
            "see --preset gptoss-modern"
        )
    forward = flops_per_token(config)
    lines += [
        "",
        f"FLOPs per token at {config.context_length} tokens: {human_count(forward)} forward, "
        f"{human_count(3 * forward)} training",
        "",
    ]
    lines.append(_row("memory", list(DTYPES)))
    lines.append(_row("weights", [human_bytes(total * b) for b in DTYPES.values()]))
    for where, on_gpu in (("GPU", True), ("CPU", False)):
        needed = [
            sum(training_memory_bytes(config, train, b, on_gpu).values()) for b in DTYPES.values()
        ]
        label = f"training, {where}, {train.batch_size} x {config.context_length}"
        lines.append(_row(label, [human_bytes(n) for n in needed]))
    cache = [kv_cache_bytes_per_token(config, b) for b in DTYPES.values()]
    lines.append(_row("KV cache per token", [human_bytes(n) for n in cache]))
    # A windowed block's cache stops growing at its window.
    tokens, blocks = _cached_tokens(config)
    full = [tokens * n // blocks for n in cache]
    lines.append(_row("KV cache, full context", [human_bytes(n) for n in full]))
    return lines


def preset_table() -> list[str]:
    """Return all presets as a Markdown table.

    Training memory is at the preset's own batch: bfloat16 on a GPU, float32 on a CPU.
    """
    lines = [
        "| preset | for | parameters | active | context | tokens per step | training memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        config, train = ModelConfig(**preset.model), TrainConfig(**preset.train)
        on_gpu = not name.endswith("nano")
        needed = sum(training_memory_bytes(config, train, 2 if on_gpu else 4, on_gpu).values())
        real = known.counts(config)
        tokens = train.batch_size * train.grad_accum * config.context_length
        lines.append(
            f"| `{name}` | {preset.description} | {human_count(real.total)} "
            f"| {human_count(real.active)} | {config.context_length:,} | {tokens:,} "
            f"| {human_bytes(needed)} |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig)
    cli.add_fields(parser, TrainConfig, only=MEMORY_SETTINGS)
    parser.add_argument(
        "--ckpt",
        help="checkpoint whose config to use (our format or the original implementation's)",
    )
    parser.add_argument(
        "--presets", action="store_true", help="list all presets and what they cost"
    )
    scale.add_flags(parser)
    args = parser.parse_args(argv)
    if args.presets:
        print("\n".join(preset_table()))
        return 0
    settings = cli.settings_from(args, ModelConfig, TrainConfig)
    from_ckpt = args.ckpt is not None
    if from_ckpt and (args.preset or settings.explicit - set(MEMORY_SETTINGS)):
        raise ValueError("--ckpt says what the model is: leave out --preset and the model's flags")
    config = read_config(args.ckpt) if from_ckpt else settings.build(ModelConfig)
    train = settings.build(TrainConfig)
    print("\n".join(report(config, train) + scale.report(config, train, args)))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
