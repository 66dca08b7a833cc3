"""Output head and cross-entropy, forward and backward: seconds, rate and memory of ours, of all
logits at once, and of PyTorch's.

    python -m benchmarks.loss --name cpu --vocabulary_size 200019 --d_model 256 --rows 2048 \\
        --chunk_rows 64,256,1024
    python -m benchmarks.loss --name gpu --vocabulary_size 200019 --d_model 1024 --rows 32768 \\
        --chunk_rows 2048,4096,8192

Variants: ours_R (model.linear_cross_entropy with R rows of logits at a time), full (F.linear and
F.cross_entropy), torch_auto and torch_R (F.linear_cross_entropy with its own choice and with R
rows, where this PyTorch has it), and with --compiled ours_R_compiled and full_compiled.
ours_R_aligned has the vocabulary rounded up to a multiple of 64: what is left of the price of an
odd one. All must give the same loss and gradient. Samples are taken in turns, the figures are
medians; they go to benchmarks/results/loss_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()  # what it sets is read when torch loads

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import (
    alternate_undisturbed,
    peak_resident_bytes,
    run_worker,
    save_results,
    summary,
)
from runtime.base import cli
from runtime.base.device import (
    autocast,
    choose_device,
    choose_dtype,
    device_name,
    is_out_of_memory,
    synchronize,
)
from runtime.base.text import human_bytes
from runtime.kernels.linear_cross_entropy import linear_cross_entropy, softmax_gradient_

ALIGNMENT = 64
HAS_TORCH_FUNCTION = hasattr(F, "linear_cross_entropy")


@dataclass
class Problem:
    """Hidden states [N, C], head [V, C] with bias [V] or None, targets [N]; float32 leaves,
    arithmetic in `dtype`.
    """

    h_NC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None
    targets_N: Tensor
    dtype: torch.dtype

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.h_NC, self.weight_VC, self.bias_V) if t is not None]

    def forget_gradients(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None


def make_problem(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, vocabulary_size: int
) -> Problem:
    """Random numbers of about a trained model's size, the same for every variant of this
    vocabulary.
    """
    draws = torch.Generator().manual_seed(0)
    h, weight = (
        torch.randn(args.rows, args.d_model, generator=draws),
        0.02 * torch.randn(vocabulary_size, args.d_model, generator=draws),
    )
    targets = torch.randint(vocabulary_size, (args.rows,), generator=draws)
    leaves = [
        t.to(device).requires_grad_()
        for t in (h, weight, *[torch.zeros(vocabulary_size)] * args.head_bias)
    ]
    return Problem(
        leaves[0], leaves[1], leaves[2] if args.head_bias else None, targets.to(device), dtype
    )


# ------------------------------------------------------------------------------------- the variants
def ours(
    chunk_rows: int, softmax_gradient: Callable = softmax_gradient_
) -> Callable[[Problem], Tensor]:
    return lambda p: linear_cross_entropy(
        p.h_NC, p.weight_VC, p.bias_V, p.targets_N, chunk_rows, softmax_gradient
    )


def full(p: Problem) -> Tensor:
    return F.cross_entropy(
        F.linear(p.h_NC, p.weight_VC, p.bias_V).float(), p.targets_N, reduction="sum"
    )


def torch_function(chunk_rows: int | None) -> Callable[[Problem], Tensor]:
    """F.linear_cross_entropy; it wants all inputs in one dtype."""
    options = torch.nn.LinearCrossEntropyOptions(
        **{"batch_chunk_size": chunk_rows} if chunk_rows else {}
    )

    def run(p: Problem) -> Tensor:
        h, weight, bias = (
            None if t is None else t.to(p.dtype) for t in (p.h_NC, p.weight_VC, p.bias_V)
        )
        return F.linear_cross_entropy(
            h, weight, p.targets_N, linear_bias=bias, reduction="sum", options=options
        )

    return run


def make_variants(chunk_rows: list[int], compiled: bool) -> dict[str, Callable[[Problem], Tensor]]:
    """All variants by name."""
    variants = (
        {f"ours_{rows}": ours(rows) for rows in chunk_rows}
        | {f"ours_{rows}_aligned": ours(rows) for rows in chunk_rows}
        | {"full": full}
    )
    if HAS_TORCH_FUNCTION:
        variants |= {"torch_auto": torch_function(None)} | {
            f"torch_{rows}": torch_function(rows) for rows in chunk_rows
        }
    if compiled:
        inner = torch.compile(softmax_gradient_, fullgraph=True, dynamic=False)
        variants |= {f"ours_{rows}_compiled": ours(rows, inner) for rows in chunk_rows} | {
            "full_compiled": torch.compile(full, dynamic=False)
        }
    return variants


# ---------------------------------------------------------------------------------------- measuring
def run_once(variant: Callable[[Problem], Tensor], p: Problem) -> float:
    """Seconds of one forward and backward pass; the gradients stay until forget_gradients."""
    device = p.h_NC.device
    p.forget_gradients()
    synchronize(device)
    started = time.perf_counter()
    with autocast(device, p.dtype):
        loss = variant(p)
    loss.backward()
    synchronize(device)
    return time.perf_counter() - started


def check(variants: dict[str, Callable], problems: dict[str, Problem]) -> dict[str, str]:
    """Run each variant once: those that are out of memory, by name.

    ValueError where a gradient is not that of the first.
    """
    failed, expected = {}, None
    for name, variant in variants.items():
        problem = problems[name]
        try:
            run_once(variant, problem)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed[name] = "out of memory"
            continue
        if name.endswith("_aligned"):
            continue  # another vocabulary, other numbers
        gradients = [
            t.grad.clone()
            for t in (problem.h_NC, problem.weight_VC, problem.bias_V)
            if t is not None
        ]
        expected = gradients if expected is None else expected
        error = max(
            (mine - first).norm() / first.norm()
            for mine, first in zip(gradients, expected, strict=True)
        )
        if not error < (1e-4 if problem.dtype == torch.float32 else 3e-2):
            raise ValueError(
                f"{name} has another gradient than {next(iter(variants))}: relative error "
                f"{error:.1e}"
            )
    return failed


def cuda_peak(variant: Callable, p: Problem) -> int:
    """Bytes held above all inputs and the gradients."""
    p.forget_gradients()
    torch.cuda.reset_peak_memory_stats(p.h_NC.device)
    before = torch.cuda.memory_allocated(p.h_NC.device)
    run_once(variant, p)
    return (
        torch.cuda.max_memory_allocated(p.h_NC.device)
        - before
        - sum(leaf.nbytes for leaf in p.leaves())
    )


def cpu_peak(variant: Callable, problem: Problem) -> int | None:
    """The same from the resident memory of this process, which should do nothing else.

    None where it cannot be asked.
    """
    run_once(variant, problem)
    problem.forget_gradients()
    peak = peak_resident_bytes(lambda: run_once(variant, problem))
    return None if peak is None else peak - sum(leaf.nbytes for leaf in problem.leaves())


def vocabulary_of(name: str, args: argparse.Namespace) -> int:
    """The vocabulary that a variant runs with."""
    return (
        -(-args.vocabulary_size // ALIGNMENT) * ALIGNMENT
        if name.endswith("_aligned")
        else args.vocabulary_size
    )


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/loss_NAME.json"
    )
    parser.add_argument("--vocabulary_size", type=int, default=200_019, help="V (default: 200019)")
    parser.add_argument("--d_model", type=int, default=256, help="C (default: 256)")
    parser.add_argument(
        "--rows", type=int, default=2048, help="N, tokens of a micro-batch (default: 2048)"
    )
    parser.add_argument(
        "--chunk_rows",
        default="64,256,1024",
        help="comma-separated rows of logits held at a time (default: 64,256,1024)",
    )
    parser.add_argument(
        "--head_bias",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with a bias (default: False)",
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="also with torch.compile (default: on a GPU)",
    )
    parser.add_argument(
        "--variants",
        default="",
        help="comma-separated (default: all, the aligned ones on a GPU only)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="arithmetic: auto, bfloat16 or float32 (default: auto)"
    )
    parser.add_argument(
        "--num_threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice (default: 0)"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="samples of each variant (default: 7)"
    )
    parser.add_argument(
        "--allocator",
        choices=("tuned", "default"),
        default="tuned",
        help="how malloc treats freed memory (default: tuned, as train.py does)",
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU: memory of each variant in its own process (default: True)",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker_out", help=argparse.SUPPRESS)
    flags = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(flags)
    try:
        chunk_rows = [int(rows) for rows in args.chunk_rows.split(",")]
    except ValueError:
        raise ValueError(
            f"chunk_rows must be whole numbers with commas between them, not {args.chunk_rows!r}"
        ) from None
    if min(*chunk_rows, args.vocabulary_size, args.d_model, args.rows, args.repeats) < 1:
        raise ValueError(
            "chunk_rows, vocabulary_size, d_model, rows and repeats must be at least 1"
        )
    if args.allocator == "tuned":
        process.keep_freed_memory()
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    on_gpu = device.type == "cuda"
    variants = make_variants(chunk_rows, on_gpu if args.compiled is None else args.compiled)
    chosen = (
        args.variants.split(",")
        if args.variants
        else [name for name in variants if on_gpu or not name.endswith("_aligned")]
    )
    if unknown := [name for name in chosen if name not in variants]:
        raise ValueError(f"unknown variant {unknown[0]!r}: there are {', '.join(variants)}")
    variants = {name: variants[name] for name in chosen}
    if args.worker:
        name, variant = next(iter(variants.items()))
        problem = make_problem(args, device, dtype, vocabulary_of(name, args))
        Path(args.worker_out).write_text(json.dumps(cpu_peak(variant, problem)))
        return 0

    results = measure(args, flags, variants, device, dtype)
    for name, row in results["variants"].items():
        peak = row["peak_above_inputs_and_gradients_bytes"]
        print(
            f"{name:22}{1000 * row['seconds']['median']:>12.1f} "
            f"ms{row['flops_per_sec'] / 1e9:>10,.0f} GFLOP/s"
            f"  {human_bytes(peak) if peak is not None else '':>12}"
            f"{'  machine was busy' if row['disturbed'] else ''}"
        )
    for name, why in results["failed"].items():
        print(f"{name:22}{why:>15}")
    save_results(f"loss_{args.name}", results)
    return 0


def measure(
    args: argparse.Namespace,
    flags: list[str],
    variants: dict[str, Callable],
    device: torch.device,
    dtype: torch.dtype,
) -> dict:
    """Everything about every variant, as it is stored."""
    on_gpu = device.type == "cuda"
    by_size = {
        size: make_problem(args, device, dtype, size)
        for size in {vocabulary_of(name, args) for name in variants}
    }
    problems = {name: by_size[vocabulary_of(name, args)] for name in variants}
    failed = check(variants, problems)
    variants = {name: variant for name, variant in variants.items() if name not in failed}
    limit = {"most_foreign_cores": math.inf} if on_gpu else {}
    samples = alternate_undisturbed(
        {name: lambda name=name: run_once(variants[name], problems[name]) for name in variants},
        args.repeats,
        **limit,
    )
    rows = {}
    for name, sample in samples.items():
        peak = cuda_peak(variants[name], problems[name]) if on_gpu else None
        if args.memory and device.type == "cpu":
            peak = run_worker("benchmarks.loss", [*flags, "--variants", name, "--worker"])
        seconds = statistics.median(sample.values)
        rows[name] = {
            "seconds": summary(sample.values),
            "flops_per_sec": 6 * args.rows * args.vocabulary_size * args.d_model / seconds,
            "peak_above_inputs_and_gradients_bytes": peak,
            "discarded_samples": sample.discarded,
            "disturbed": sample.disturbed,
        }
        if "full" in samples:
            rows[name]["speed_against_full"] = statistics.median(samples["full"].values) / seconds
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "allocator": args.allocator,
        "dtype": str(dtype).removeprefix("torch."),
        "vocabulary_size": args.vocabulary_size,
        "d_model": args.d_model,
        "rows": args.rows,
        "head_bias": args.head_bias,
        "repeats": args.repeats,
        "variants": rows,
        "failed": failed,
        "method": {
            "flops_per_sec": (
                "6 N V C, the three matrix products that are needed, over the median time"
            ),
            "memory": "peak above inputs and gradients; "
            + ("allocated by PyTorch" if on_gpu else "resident, in a process of its own"),
        },
    }


if __name__ == "__main__":
    cli.run_main(main)
