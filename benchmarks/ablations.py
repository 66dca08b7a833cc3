"""What learns best: the same small model, one choice changed at a time, the same text, the same
number of tokens.

    python prepare_data.py --files train.jsonl --val_files valid.jsonl --tokenizer bpe:4096
    python -m benchmarks.ablations --run muon --seeds 42 43      one row
    python -m benchmarks.ablations --run all                     every row (hours)
    python -m benchmarks.ablations --run longer_muon_lr_6e-3     over three times as many tokens
    python -m benchmarks.ablations --run settings_plain          settings of `nano`, in equal time
    python -m benchmarks.ablations --time 3
            seconds per step of every row, in turns, on a quiet machine
    python -m benchmarks.ablations --time 7 --run settings_masked settings_8x512
            the same of settings, as multiples of settings_masked
    python -m benchmarks.ablations --table --picture
            the table in benchmarks/ABLATIONS.md and public/default_against_modern.png

A row is the base with some flags of train.py changed. Each run writes
benchmarks/results/ablations/ROW_SEED.json with its curve; the shards' folder is --data_dir or the
environment variable GPTOSS_DATA.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import train
from benchmarks.common import REPO, RESULTS, alternate, environment, replace_between, save_results
from config_model import (
    ModelConfig,
    TrainConfig,
    active_parameters,
    flops_per_token,
    total_parameters,
)
from runtime.base import cli
from runtime.base.files import write_atomic, write_text_atomic
from runtime.training import plan as plan_module
from runtime.training.plan import TrainPlan
from runtime.training.setup import set_up
from runtime.training.task import GivenTask

FOLDER = RESULTS / "ablations"
PAGE = RESULTS.parent / "ABLATIONS.md"
BASE = dict(
    preset="plain-nano",
    optimizer="adamw",
    lr=3e-3,
    aux_loss_coef=0.01,
    max_steps=400,
    warmup_steps=50,
    val_interval=80,
    val_steps=48,
    log_interval=10,
    num_threads=1,
)
DEFAULT = dict(
    expert_activation="gelu",
    d_ff=384,
    expert_bias=True,
    out_proj_bias=True,
    head_bias=True,
    qk_norm=False,
    use_attention_bias=True,
    tie_embeddings=False,
    init_std=0.02,
)

# name: (what is changed, flags). d_ff 384 gives GELU experts the FLOPs of SwiGLU ones with 256.
ROWS = {
    "base": (
        "SwiGLU, no biases, QK-norm, no table, tied, dropless, balance loss 0.01, AdamW 3e-3",
        {},
    ),
    "muon": ("Muon for the hidden matrices, the same rate", dict(optimizer="muon")),
    "muon_lr_6e-3": ("Muon, twice the rate", dict(optimizer="muon", lr=6e-3)),
    "muon_lr_15e-4": ("Muon, half the rate", dict(optimizer="muon", lr=1.5e-3)),
    "lr_6e-3": ("AdamW, twice the rate", dict(lr=6e-3)),
    "lr_15e-4": ("AdamW, half the rate", dict(lr=1.5e-3)),
    "dense": ("dense at equal active FLOPs", dict(num_experts=1, top_k=1, d_ff=512)),
    "default": (
        "the default's choices: GELU, biases everywhere, table, no QK-norm, untied, initial "
        "weights of 0.02",
        DEFAULT,
    ),
    "default_lr_15e-4": ("the default's choices, half the rate", DEFAULT | dict(lr=1.5e-3)),
    "default_lr_6e-3": ("the default's choices, twice the rate", DEFAULT | dict(lr=6e-3)),
    "default_muon": (
        "the default's choices with Muon, twice the rate",
        DEFAULT | dict(optimizer="muon", lr=6e-3),
    ),
    "gelu_bias": (
        "GELU experts with biases, equal FLOPs",
        dict(expert_activation="gelu", d_ff=384, expert_bias=True),
    ),
    "no_qk_norm": ("no QK-norm", dict(qk_norm=False)),
    "table": ("learned position table, no QK-norm", dict(qk_norm=False, use_attention_bias=True)),
    "table_qk_norm": ("learned position table and QK-norm", dict(use_attention_bias=True)),
    "untied": ("head of its own", dict(tie_embeddings=False)),
    "init_std_0.02": ("initial weights of 0.02 instead of 0.05", dict(init_std=0.02)),
    "capacity_1.25": ("capacity 1.25", dict(capacity_factor=1.25)),
    "aux_loss_0.02": ("balance loss 0.02", dict(aux_loss_coef=0.02)),
    "no_balance": ("no balancing at all", dict(aux_loss_coef=0.0)),
    "bias_balance": (
        "balancing by bias 0.001 instead of a loss",
        dict(aux_loss_coef=0.0, router_bias_rate=1e-3),
    ),
    "z_loss": ("router z-loss 0.001 besides", dict(z_loss_coef=1e-3)),
    "dropout": ("dropout 0.1", dict(dropout=0.1)),
    "document_mask": (
        "documents do not see each other, nor in validation",
        dict(document_mask=True),
    ),
    "bfloat16_state": ("AdamW's moments in bfloat16", dict(state_dtype="bfloat16")),
    "muon_bfloat16_state": (
        "Muon, twice the rate, moments in bfloat16",
        dict(optimizer="muon", lr=6e-3, state_dtype="bfloat16"),
    ),
    "muon_lr_12e-3": ("Muon, four times the rate", dict(optimizer="muon", lr=1.2e-2)),
    "muon_lr_24e-3": ("Muon, eight times the rate", dict(optimizer="muon", lr=2.4e-2)),
    "lr_12e-3": ("AdamW, four times the rate", dict(lr=1.2e-2)),
}
# The rows that matter most, over three times as many tokens.
LONGER = {
    f"longer_{name}": (ROWS[name][0], ROWS[name][1] | dict(max_steps=1200, val_interval=200))
    for name in ("lr_6e-3", "muon_lr_6e-3", "default_lr_6e-3", "default")
}
# The same model on the same text cut by other tokenizers, whose --data_dir must be given; compared
# by bits per byte.
TOKENIZERS = {
    f"tokenizer_{name}": (f"{tokenizer}", dict(max_steps=120, val_interval=60, val_steps=24))
    for name, tokenizer in (
        ("bpe", "bpe:4096"),
        ("compact", "o200k_base:compact"),
        ("o200k", "o200k_base"),
    )
}
# Settings of `nano` in equal time: of each as many steps as take the seconds of 600 of
# settings_masked, by --time. Compared by bits per byte, because tokenizers differ.
_MASKED = dict(document_mask=True, schedule="wsd", decay_fraction=0.4)
_LONG = _MASKED | dict(context_length=512, batch_size=4)
_WIDE = _MASKED | dict(context_length=512, batch_size=8, val_steps=24)
_SMALL_EXPERTS = dict(num_experts=16, d_ff=128)
_8192 = dict(vocabulary_size=8192)
SETTINGS = {
    f"settings_{name}": (
        what,
        dict(optimizer="muon", lr=6e-3, aux_loss_coef=0.02)
        | dict(max_steps=steps, val_interval=steps // 4)
        | flags,
    )
    for name, what, steps, flags in (
        ("plain", "`plain-nano`: 8 x 256 tokens a step, 8 experts of 256, cosine", 600, {}),
        ("masked", "documents do not see each other; wsd, falling over 40 %", 600, _MASKED),
        ("4x512", "... 4 x 512 tokens a step", 600, _LONG),
        ("4x512_lr_1e-2", "... 4 x 512, the rate 1e-2", 600, _LONG | dict(lr=1e-2)),
        ("2x1024", "... 2 x 1,024", 620, _LONG | dict(context_length=1024, batch_size=2)),
        (
            "2x512",
            "... 2 x 512: half the tokens a step",
            900,
            _LONG | dict(batch_size=2, val_steps=96),
        ),
        ("8x512", "... 8 x 512: twice the tokens a step", 360, _WIDE),
        ("4x512_experts", "... 4 x 512, 16 experts of 128", 680, _LONG | _SMALL_EXPERTS),
        ("8x512_experts", "... 8 x 512, 16 experts of 128", 413, _WIDE | _SMALL_EXPERTS),
        *(
            (
                f"8x512_experts_lr_{rate}",
                f"... 8 x 512, 16 experts of 128, the rate {rate}",
                413,
                _WIDE | _SMALL_EXPERTS | dict(lr=float(rate)),
            )
            for rate in ("1e-2", "15e-3")
        ),
        (
            "16x512_experts_lr_1e-2",
            "... 16 x 512, 16 experts of 128, the rate 1e-2",
            240,
            _WIDE | _SMALL_EXPERTS | dict(batch_size=16, val_steps=12, lr=1e-2),
        ),
        ("4x512_8192", "... 4 x 512, bpe:8192", 495, _LONG | _8192),
        (
            "4x512_experts_8192",
            "... 4 x 512, 16 experts of 128, bpe:8192",
            576,
            _LONG | _SMALL_EXPERTS | _8192,
        ),
    )
}
SETTINGS_BASE = "settings_masked"
ALL = ROWS | LONGER | SETTINGS | TOKENIZERS


def make_plan(name: str, seed: int, data_dir: str, changes: dict) -> TrainPlan:
    """The plan of a row."""
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    flags = (
        BASE
        | ALL[name][1]
        | changes
        | dict(
            seed=seed,
            data_dir=data_dir,
            ckpt_dir=os.path.join(tempfile.gettempdir(), "gptoss-ablation-has-no-checkpoints"),
        )
    )
    argv = [
        part
        for key, value in flags.items()
        for part in (
            [f"--{key}" if value else f"--no-{key}"]
            if isinstance(value, bool)
            else [f"--{key}", str(value)]
        )
    ]
    return plan_module.make_plan(
        cli.settings_from(parser.parse_args(argv), ModelConfig, TrainConfig), train.pretraining
    )


def run_row(name: str, seed: int, data_dir: str, changes: dict) -> Path:
    """Train a row and store its curve."""
    plan = make_plan(name, seed, data_dir, changes)
    what, flags = ALL[name]
    tokenizer = plan.task.train.tokenizer_state["name"]
    wanted = what if name in TOKENIZERS else tokenizer
    if ids := flags.get("vocabulary_size"):
        wanted = f"bpe:{ids}"
    if tokenizer != wanted:
        raise ValueError(
            f"{data_dir} was made with {tokenizer}, and {name} wants {wanted}: "
            f"python prepare_data.py --tokenizer {wanted}"
        )
    model, optimizer, _ = set_up(plan, train.forward_backward)
    records: list[dict] = []
    started = time.perf_counter()
    state = train.fit(
        model,
        plan.task,
        plan.config,
        train.Hooks(on_log=records.append),
        optimizer=optimizer,
        dtype=plan.dtype,
    )
    seconds = time.perf_counter() - started
    curves = {kind: [r for r in records if r["kind"] == kind] for kind in ("train", "val")}
    settled = [r for r in curves["train"] if r["step"] > 2 * plan.config.warmup_steps] or curves[
        "train"
    ][-1:]
    loads = [load for r in settled for row in r["expert_load"] for load in row]
    last = curves["val"][-1]["loss"]
    result = {
        "environment": environment(),
        "row": name,
        "what": what,
        "flags": flags | changes,
        "seed": seed,
        "tokenizer": plan.task.train.tokenizer_state["name"],
        "vocabulary_size": plan.model_config.vocabulary_size,
        "tokens": state.tokens_seen,
        "epochs": state.tokens_seen / plan.task.train.num_tokens,
        "validation_loss": last,
        "bytes_per_token": plan.task.train.bytes_per_token,
        "bits_per_byte": last / 0.6931471805599453 / plan.task.val.bytes_per_token,
        "train_loss": curves["train"][-1]["loss"],
        "parameters": total_parameters(plan.model_config),
        "active_parameters": active_parameters(plan.model_config),
        "flops_per_token": 3 * flops_per_token(plan.model_config),
        "seconds": seconds,
        "skipped_steps": state.skipped_steps,
        "expert_load_after_twice_the_warm_up": {"min": min(loads), "max": max(loads)},
        "curve": [[r["tokens_seen"], round(r["loss"], 4)] for r in curves["val"]],
        "train_curve": [[r["tokens_seen"], round(r["loss"], 4)] for r in curves["train"]],
    }
    path = FOLDER / f"{name}_{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    print(
        f"{name:20} seed {seed}: validation {last:.4f}, {result['bits_per_byte']:.4f} "
        f"bits/byte, {seconds:.0f} s",
        flush=True,
    )
    return path


def time_rows(
    names: list[str], base: str, file: str, data_dir: str, repeats: int, steps: int = 8
) -> None:
    """Store the seconds per step of each row, in turns in this process, and their ratios."""
    functions = {}
    for name in names:
        plan = make_plan(name, 42, data_dir, {})
        model, optimizer, _ = set_up(plan, train.forward_backward)
        config = dataclasses.replace(
            plan.config, max_steps=steps, warmup_steps=1, log_interval=steps
        )

        # The plan's task without its validation.
        task = GivenTask(plan.task.loader(plan.model_config, plan.config), plan.task.loss)

        def step(model=model, config=config, task=task, optimizer=optimizer):
            train.fit(model, task, config, optimizer=optimizer)

        functions[name] = step
    seconds = alternate(functions, repeats)
    median = {name: statistics.median(values) / steps for name, values in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
        for name in names
    }
    save_results(
        file,
        {
            "seconds_per_step": median,
            "ratio_to_base": ratios,
            "repeats": repeats,
            "steps": steps,
            "threads": torch.get_num_threads(),
        },
    )


def results() -> dict[str, list[dict]]:
    """What was run, by row."""
    found: dict[str, list[dict]] = {}
    for path in sorted(FOLDER.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["row"], []).append(result)
    return found


def at_tokens(curve: list[list[float]], tokens: float) -> float:
    """A curve's loss at a number of tokens, between its points by a straight line."""
    for (t0, y0), (t1, y1) in zip(curve, curve[1:], strict=False):
        if t0 <= tokens <= t1:
            return y0 + (y1 - y0) * (tokens - t0) / (t1 - t0)
    return curve[-1][1] if tokens > curve[-1][0] else curve[0][1]


def table(rows: dict = ROWS, base: str = "base") -> str:
    """The Markdown table of those of `rows` that were run with the base's tokens and tokenizer,
    best first.

    "At the base's time": what a row with slower steps had reached by then, its rate not yet
    lowered; a faster one, its end.
    """
    runs = {name: rs for name, rs in results().items() if name in rows}
    if base not in runs:
        raise ValueError(
            f"{FOLDER} has no run of the base: python -m benchmarks.ablations --run {base}"
        )
    tokens, tokenizer, ratio = runs[base][0]["tokens"], runs[base][0]["tokenizer"], _ratios()

    def mean(runs_of_row: list[dict], key: str) -> float:
        return statistics.mean(r[key] for r in runs_of_row)

    lines = [
        "| row | what is changed | validation (nats), by seed | against base | step time | "
        "validation at the base's time | expert load after twice the warm-up | train |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rs in sorted(runs.items(), key=lambda item: mean(item[1], "validation_loss")):
        if any((r["tokens"], r["tokenizer"]) != (tokens, tokenizer) for r in rs):
            continue
        loads = [r["expert_load_after_twice_the_warm_up"] for r in rs]
        slower = ratio.get(name.removeprefix("longer_"))
        timed = (
            f"{slower:.2f}x | "
            f"{statistics.mean(at_tokens(r['curve'], tokens / slower) for r in rs):.3f}"
            if slower
            else " | "
        )
        lines.append(
            f"| `{name}` | {rows[name][0]} | "
            f"{', '.join(format(r['validation_loss'], '.4f') for r in rs)} | "
            f"{mean(rs, 'validation_loss') - mean(runs[base], 'validation_loss'):+.4f} | {timed} | "
            f"{100 * min(load['min'] for load in loads):.0f} to "
            f"{100 * max(load['max'] for load in loads):.0f} % | {mean(rs, 'train_loss'):.3f} |"
        )
    return "\n".join(lines)


def longer_table() -> str:
    """The same of the runs over more tokens."""
    return table(LONGER, "longer_lr_6e-3")


def settings_table() -> str:
    """The Markdown table of the settings in equal time, best first."""
    timing = RESULTS / "ablations_settings_time.json"
    ratio = json.loads(timing.read_text())["ratio_to_base"] if timing.is_file() else {}
    runs = {name: rs for name, rs in results().items() if name in SETTINGS}
    lines = [
        "| row | settings | step time | steps | tokens | bits per byte | expert load |",
        "|---|---|---|---|---|---|---|",
    ]

    def mean(name: str) -> float:
        return statistics.mean(r["bits_per_byte"] for r in runs[name])

    for name in sorted(runs, key=mean):
        rs = runs[name]
        loads = [r["expert_load_after_twice_the_warm_up"] for r in rs]
        lines.append(
            f"| `{name}` | {SETTINGS[name][0]} "
            f"| {format(ratio[name], '.2f') + 'x' if name in ratio else ''} "
            f"| {SETTINGS[name][1]['max_steps']} | {rs[0]['tokens'] / 1e6:.2f} M "
            f"| {', '.join(format(r['bits_per_byte'], '.4f') for r in rs)} "
            f"| {100 * min(load['min'] for load in loads):.0f} to "
            f"{100 * max(load['max'] for load in loads):.0f} % |"
        )
    return "\n".join(lines)


def tokenizer_table() -> str:
    """The Markdown table of the runs with other tokenizers."""
    lines = [
        "| tokenizer | ids | parameters | training FLOPs per token | text seen | nats per token "
        "| bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rs in results().items():
        if name in TOKENIZERS:
            r = rs[0]
            lines.append(
                f"| {r['tokenizer']} | {r['vocabulary_size']:,} | {r['parameters'] / 1e6:.1f} M "
                f"| {r['flops_per_token'] / 1e6:.1f} M | "
                f"{r['tokens'] * r['bytes_per_token'] / 1e6:.2f} MB | {r['validation_loss']:.3f} "
                f"| {r['bits_per_byte']:.3f} |"
            )
    return "\n".join(lines)


def picture(path: Path) -> None:
    """Loss curves of the default's choices against the modern ones, by tokens and by what a step
    costs, as --time measured it.
    """
    import matplotlib

    from runtime.training import plots

    runs, ratio = results(), _ratios()
    shown = {
        "default_lr_6e-3": ("the default's choices, AdamW", plots.ORANGE),
        "lr_6e-3": ("modern, AdamW", plots.BLUE),
        "muon_lr_6e-3": ("modern, Muon", plots.GREEN),
    }
    if missing := [name for name in shown if f"longer_{name}" not in runs or name not in ratio]:
        raise ValueError(
            f"the picture wants the rows {', '.join(shown)}, timed, and their longer_ runs; "
            f"missing: {', '.join(missing)}"
        )
    base = runs["longer_lr_6e-3"][0]
    with matplotlib.rc_context(plots.STYLE):
        page = plots.Page(
            "Default against modern",
            f"{base['parameters'] / 1e6:.1f} M parameters, {base['tokens'] / 1e6:.2f} M tokens "
            f"of TinyStories, {base['tokenizer']}",
            columns=2,
            sharey=True,
            width=12,
        )
        for axes, unit in zip(
            page.axes[0],
            ("tokens (thousands)", "compute time (in steps of modern with AdamW)"),
            strict=True,
        ):
            for name, (label, color) in shown.items():
                run = runs[f"longer_{name}"][0]
                scale = (
                    1e-3
                    if axes is page.axes[0][0]
                    else ratio[name] * LONGER["longer_lr_6e-3"][1]["max_steps"] / base["tokens"]
                )
                for curve, style in (
                    (run["train_curve"], dict(linewidth=1.1, alpha=0.55)),
                    (
                        run["curve"],
                        dict(
                            marker="o", markersize=6, label=f"{label}: {run['validation_loss']:.3f}"
                        ),
                    ),
                ):
                    axes.plot(
                        [t * scale for t, _ in curve], [y for _, y in curve], color=color, **style
                    )
            axes.set_xlabel(unit)
            axes.set_ylim(top=6.5)
        page.axes[0][0].set_ylabel("cross-entropy (nats): dots validation, thin train")
        page.axes[0][0].legend(loc="upper right")
        write_atomic(path, lambda file: file.write(page.png()))
    print(f"wrote {path.name}")


def _ratios() -> dict[str, float]:
    """What a step of each row costs against the base's, where --time has measured it, or has a row
    that differs in its rate alone.
    """
    timing = RESULTS / "ablations_time.json"
    timed = json.loads(timing.read_text())["ratio_to_base"] if timing.is_file() else {}

    def work(name: str) -> dict:
        return {flag: value for flag, value in ROWS[name][1].items() if flag != "lr"}

    return {
        name: ratio
        for other, ratio in timed.items()
        for name in ROWS
        if name == other or name not in timed and work(name) == work(other)
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run",
        nargs="+",
        metavar="ROW",
        help=(
            f"rows to run, or all: {', '.join(ROWS)}; besides: "
            f"{', '.join([*LONGER, *SETTINGS, *TOKENIZERS])}"
        ),
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[42], help="seeds to run them with (default: 42)"
    )
    parser.add_argument("--steps", type=int, help=f"steps instead of {BASE['max_steps']}")
    parser.add_argument(
        "--time",
        type=int,
        metavar="REPEATS",
        help="time a few steps of the rows in --run (default: all), in turns",
    )
    parser.add_argument(
        "--table", action="store_true", help="write the table into benchmarks/ABLATIONS.md"
    )
    parser.add_argument(
        "--picture", action="store_true", help="draw public/default_against_modern.png"
    )
    parser.add_argument(
        "--data_dir",
        default=os.environ.get("GPTOSS_DATA", "data"),
        help="shards (default: the environment variable GPTOSS_DATA, else data)",
    )
    args = parser.parse_args(argv)
    names = list(ROWS) if args.run in (None, ["all"]) else args.run
    if unknown := set(names) - ALL.keys():
        raise ValueError(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if not (args.run or args.time or args.table or args.picture):
        raise ValueError("nothing to do: give --run ROW, --time REPEATS, --table or --picture")
    if args.time:
        base, file = "base", "ablations_time"
        if settings := [name for name in names if name in SETTINGS]:
            base, file = SETTINGS_BASE, "ablations_settings_time"
            if settings != names:
                raise ValueError(
                    "settings_ rows are timed against others than the rest: time either"
                )
        time_rows(list(dict.fromkeys([base, *names])), base, file, args.data_dir, args.time)
    elif args.run:
        for seed in args.seeds:
            for name in names:
                run_row(name, seed, args.data_dir, {"max_steps": args.steps} if args.steps else {})
    if args.table:
        replace_between(
            PAGE,
            {
                "rows": table(),
                "longer": longer_table(),
                "settings": settings_table(),
                "tokenizers": tokenizer_table(),
            },
        )
    if args.picture:
        picture(REPO / "public" / "default_against_modern.png")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
