"""Training steps of one model as users run them, and nothing saved: speed, MFU, memory, seconds to
compile, loss, kernels.

    python -m benchmarks.steps --name h100_modern --preset gptoss-modern --compile --sizes 16x4,8x8
    python -m benchmarks.steps --name cpu --preset plain-nano --vocabulary_size 512 --sizes 2x1
    torchrun --standalone --nproc_per_node 1 -m benchmarks.steps --name h100_modern_sharded ...

The last one tells what sharding costs on one GPU, where nothing is split: FSDP's copies and calls.

Takes every flag of train.py. The model is made by train.set_up and runs in train.fit, which is
given nothing to call for a checkpoint: train.py itself would write 24 GB (gptoss-modern) or 44 GB
(the default) at its end. Of --sizes, sequences of a micro-batch x micro-batches of a step, the
first that fits is measured. The data are windows of the shards in --data_dir or GPTOSS_DATA, or
random ids where neither is given. Then the time by kernel of --profile_steps further steps, of the
model that is compiled already: a table, and no trace file. Each figure goes to
benchmarks/results/steps_NAME.json as soon as it is there.
"""

from __future__ import annotations

from runtime.base import process
from runtime.training import setup

# ruff: noqa: E402
process.before_torch()

import argparse
import dataclasses
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch.autograd import DeviceType

from benchmarks import train as bench
from benchmarks.measures import Measures
from config_model import ModelConfig, TrainConfig, flops_per_token, total_parameters
from runtime.base import cli
from runtime.base.device import (
    choose_device,
    choose_dtype,
    device_name,
    is_out_of_memory,
    make_deterministic,
    peak_flops,
    peak_memory_bytes,
    release_memory,
    synchronize,
)
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.base.text import human_bytes
from runtime.data.shards import open_data

# Which part of a step a kernel belongs to, by what its name holds; the first that fits. Names as of
# torch 2.11 on Hopper: cuDNN's attention has sdpa in it, PyTorch's memory-efficient one
# fmha_cutlass, cuBLAS's products nvjet or gemm. What the compiler fused is named after all
# operations in it, so it is asked first; its own products are triton_tem.
KERNELS = {
    "fused": r"^triton_(?!tem)|^cpp_fused",
    "attention": r"sdpa|fmha|flash|attention",
    "grouped products": r"grouped|groupproblem|group_gemm",
    "products": r"gemm|gemv|nvjet|cutlass|xmma|splitk|addmm|_mm|::mm\b|bmm",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy",
}
MOST_KERNELS = 40
NAME_CHARACTERS = 160


# -------------------------------------------------------------------------------------- the setting
def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "16x4,8x8" -> [(16, 4), (8, 8)]: sequences of a micro-batch, micro-batches of a step.

    ValueError for anything else.
    """
    sizes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", one) for one in text.split(",")]
    if None in sizes:
        raise ValueError(f"sizes must be like 16x4,8x8 (sequences x micro-batches), not {text!r}")
    return [(int(size[1]), int(size[2])) for size in sizes]


def make_setting(
    args: argparse.Namespace, batch_size: int, grad_accum: int, ranks: Ranks = ONE_PROCESS
) -> bench.Setting:
    """Flags -> setting; the rate is the peak one from the first step on."""
    settings = cli.settings_from(args, ModelConfig, TrainConfig)
    config = replace(
        settings.build(TrainConfig),
        batch_size=batch_size,
        grad_accum=grad_accum,
        schedule="constant",
        warmup_steps=0,
        micro_batch="batch_size",
    )
    if "document_mask" not in settings.explicit:
        # A preset's.
        config = replace(config, document_mask=False)
    model_config = settings.build(ModelConfig)
    if config.resume or config.init_from or config.profile or config.document_mask:
        raise ValueError(
            "this benchmark takes none of --resume, --init_from, --profile and --document_mask: "
            "leave them out"
        )
    ranks.arrange(config.expert_parallel, config.shard, model_config.num_experts)
    device = ranks.device or choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise ValueError(
            "steps are measured without a loss scale: choose --dtype bfloat16 or float32"
        )
    data_dir = getattr(args, "data_dir", os.environ.get("GPTOSS_DATA"))
    if data_dir is None:
        tokens = bench.random_tokens(model_config, config)
    else:
        tokens, _ = open_data(data_dir)
        if "vocabulary_size" not in settings.explicit:
            model_config = replace(model_config, vocabulary_size=tokens.vocabulary_size)
        if model_config.vocabulary_size < tokens.vocabulary_size:
            raise ValueError(
                f"vocabulary_size {model_config.vocabulary_size:,} is smaller than the data's "
                f"{tokens.vocabulary_size:,}: leave --vocabulary_size out"
            )
    if config.deterministic:
        make_deterministic()
    if device.type == "cpu":
        torch.set_num_threads(
            config.num_threads or min(torch.get_num_threads(), process.usable_cores())
        )
        process.keep_freed_memory()
    return bench.Setting(model_config, config, device, dtype, tokens, ranks)


# ---------------------------------------------------------------------------------------- measuring
def build(setting: bench.Setting) -> tuple[bench.Ours, dict[str, float]]:
    """(the model in its fit, seconds of parts of making it): `build`, and `compile`, which is what
    the first micro-batch of runtime.training.setup.dry_run took longer than the last.
    """
    seconds: dict[str, float] = {}
    dry_run = setup.dry_run

    def timed(*given) -> float:
        started = time.perf_counter()
        seconds["micro-batch"] = dry_run(*given)
        seconds["dry run"] = time.perf_counter() - started
        return seconds["micro-batch"]

    started = time.perf_counter()
    with mock.patch.object(setup, "dry_run", timed):
        runner = bench.Ours(setting, setting.model_config, setting.config.compile)
    whole = time.perf_counter() - started
    return runner, {
        "build": whole - seconds["dry run"],
        "compile": max(seconds["dry run"] - 2 * seconds["micro-batch"], 0.0),
    }


def measure(out: Measures, setting: bench.Setting, args: argparse.Namespace) -> bench.Ours:
    """Speed, MFU, memory, seconds to compile and losses of a setting. Out of memory is raised."""
    release_memory(setting.device)
    runner, seconds = build(setting)
    out.add("build", seconds["build"], "s")
    if setting.config.compile:
        out.add("first compile", seconds["compile"], "s")
    out.add("set-up memory", peak_memory_bytes(setting.device) / 2**30, "GiB")
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    out.add("first loss", runner.run(1), "nats")
    out.add("memory", peak_memory_bytes(setting.device) / 2**30, "GiB")
    tokens = setting.sequences * setting.model_config.context_length
    peak = peak_flops(setting.device, setting.dtype)
    steps = max(1, math.ceil(args.min_sample_seconds / bench.seconds_per_step(runner, 1)))
    speeds: list[float] = []
    for _ in range(args.samples):
        speeds.append(tokens / bench.seconds_per_step(runner, steps))
        out.results["speeds"] = speeds
        speed = statistics.median(speeds)
        out.add("speed", speed, "tokens/s")
        if peak:
            out.add("MFU", 100 * speed * 3 * flops_per_token(setting.model_config) / peak, "%")
    out.add("memory", peak_memory_bytes(setting.device) / 2**30, "GiB")
    if setting.device.type == "cuda":
        out.add("reserved memory", torch.cuda.max_memory_reserved(setting.device) / 2**30, "GiB")
    out.results["steps"] = runner.state.step
    out.add("loss", runner.run(1), "nats")
    return runner


def measure_first_that_fits(
    out: Measures, args: argparse.Namespace, ranks: Ranks = ONE_PROCESS
) -> tuple[bench.Ours, bench.Setting]:
    """The first of --sizes that the device has the memory for. ValueError if it has it for none."""
    tried = []
    for batch_size, grad_accum in parse_sizes(args.sizes):
        setting = make_setting(args, batch_size, grad_accum, ranks)
        size = f"{batch_size}x{grad_accum}"
        out.results |= about(setting) | {"size": size, "out_of_memory": tried, "measures": {}}
        print(f"size {size} on {device_name(setting.device)}", flush=True)
        try:
            return measure(out, setting, args), setting
        except (RuntimeError, MemoryError, ValueError) as error:
            # train.set_up has made a ValueError of it.
            if not is_out_of_memory(error) and not is_out_of_memory(error.__cause__ or error):
                raise
            print(f"size {size} does not fit: {' '.join(str(error).split())[:300]}", flush=True)
        tried.append(size)
        torch.compiler.reset()
        release_memory(setting.device)
    raise ValueError(f"out of memory at all of --sizes {args.sizes}: give smaller ones")


def about(setting: bench.Setting) -> dict:
    """What is measured, in plain JSON values."""
    c = setting.config
    return {
        "device": device_name(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "compile": c.compile,
        "optimizer": c.optimizer,
        "sharded": setting.ranks is not ONE_PROCESS,
        "tokens_per_step": setting.sequences * setting.model_config.context_length,
        "data": "random ids"
        if isinstance(setting.tokens, bench.RandomTokens)
        else "windows of shards",
        "model": dataclasses.asdict(setting.model_config),
        "parameters": total_parameters(setting.model_config),
    }


# ----------------------------------------------------------------------------------- time by kernel
def part_of(kernel: str) -> str:
    """The part of a step that a kernel is, by its name."""
    return next(
        (part for part, words in KERNELS.items() if re.search(words, kernel, re.IGNORECASE)),
        "other",
    )


def time_by_kernel(
    run: Callable[[], object], device: torch.device
) -> tuple[float, dict[str, tuple[float, int]]]:
    """(wall seconds of `run`, {kernel: (seconds, calls)}), most first; on a CPU operations without
    those inside them.
    """
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds) as profiler:
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        wall = time.perf_counter() - started
    return wall, sum_by_name(profiler.events(), on_gpu)


def sum_by_name(events: list, on_gpu: bool) -> dict[str, tuple[float, int]]:
    """{name: (seconds, calls)} of what the profiler saw run, the longest first."""
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        micros = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        seconds, calls = totals.get(event.name, (0.0, 0))
        totals[event.name] = (seconds + micros / 1e6, calls + 1)
    return dict(sorted(totals.items(), key=lambda item: -item[1][0]))


def profile(out: Measures, runner: bench.Ours, setting: bench.Setting, steps: int) -> None:
    """Milliseconds of a micro-batch (a step's over its micro-batches) by part, and the longest
    kernels as a table.
    """
    wall, totals = time_by_kernel(lambda: runner.run(steps), setting.device)
    if not totals:
        raise ValueError("the profiler saw no kernel")
    micro_batches = steps * setting.config.grad_accum
    parts = dict.fromkeys([*KERNELS, "other"], 0.0)
    for name, (seconds, _) in totals.items():
        parts[part_of(name)] += seconds
    out.results["kernels"] = [
        {
            "part": part_of(name),
            "ms": 1000 * seconds / micro_batches,
            "calls": calls,
            "name": name[:NAME_CHARACTERS],
        }
        for name, (seconds, calls) in list(totals.items())[:MOST_KERNELS]
    ]
    print(f"{'ms':>9} {'calls':>6}  {'part':17} kernel ({steps} steps, ms of a micro-batch)")
    for row in out.results["kernels"]:
        print(f"{row['ms']:9.3f} {row['calls']:6}  {row['part']:17} {row['name']}")
    out.add("profiled wall", 1000 * wall / micro_batches, "ms")
    for part, seconds in parts.items():
        out.add(f"{part}, profiled", 1000 * seconds / micro_batches, "ms")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/steps_NAME.json"
    )
    parser.add_argument(
        "--sizes",
        required=True,
        help="sequences x micro-batches of a step; the first that fits, of e.g. 16x4,8x8",
    )
    parser.add_argument(
        "--samples", type=int, default=3, help="the speed is the median of so many (default: 3)"
    )
    parser.add_argument(
        "--min_sample_seconds",
        type=float,
        default=2.0,
        help="a sample is as many steps as take this long (default: 2)",
    )
    parser.add_argument(
        "--profile_steps",
        type=int,
        default=1,
        help="steps under the profiler; 0: none (default: 1)",
    )
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    return parser


def run(args: argparse.Namespace, ranks: Ranks = ONE_PROCESS) -> int:
    """Measure what the flags name; return the exit code."""
    if ranks.world > 1:
        raise ValueError(
            f"this measures one rank against one process, and these are {ranks.world}: give "
            "torchrun --nproc_per_node 1"
        )
    out = Measures(f"steps_{args.name}")
    runner, setting = measure_first_that_fits(out, args, ranks)
    if args.profile_steps:
        try:
            profile(out, runner, setting, args.profile_steps)
        except Exception as error:
            # The speeds are stored; a profiler that this machine forbids must not lose the stage.
            out.fail("profiled wall", error)
    print(f"peak of the process {human_bytes(peak_memory_bytes(setting.device) or 0)}")
    return 1 if out.failed else 0


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.samples < 1 or args.min_sample_seconds <= 0 or args.profile_steps < 0:
        raise ValueError(
            "samples must be at least 1, min_sample_seconds above 0 and profile_steps not below it"
        )
    if not process.has_ranks():
        return run(args)
    from runtime.distributed.launch import joined

    with joined(getattr(args, "device", "auto")) as ranks:
        return run(args, ranks)


if __name__ == "__main__":
    cli.run_main(main)
