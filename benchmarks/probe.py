"""What the machine gives: the rates that every other figure is a share of.

    python -m benchmarks.probe --name h100
    python -m benchmarks.probe --name cpu --product 256 --copy_bytes 33554432 --rows 512 \\
        --experts 4 --d_in 64 --d_out 128 \\
        --batch_size 1 --context_length 64

Versions and memory; a matrix product; a copy; F.grouped_mm forward and for both gradients;
attention forward and backward by each of PyTorch's kernels, with grouped and with repeated
key/value heads, and with a learned table. Medians. What a library refuses is stored with its
reason. Each figure goes to benchmarks/results/probe_NAME.json as soon as it is there.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention
from benchmarks.measures import Measures
from runtime.base import cli
from runtime.base.device import (
    choose_device,
    choose_dtype,
    device_name,
    memory_bytes,
    release_memory,
    synchronize,
)
from runtime.base.process import usable_cores

SAMPLES = 5
# Query heads, key/value heads and features of a head: the default's and those of gptoss-modern,
# both 1,024 features.
HEADS = ((32, 8, 32), (16, 4, 64))
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def seconds_of(function: Callable[[], object], device: torch.device, min_seconds: float) -> float:
    """Median seconds of a call, the device's work included; a sample is as many calls as fill
    `min_seconds`.
    """

    def sample(calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return (time.perf_counter() - started) / calls

    sample(1)
    calls = max(1, round(min_seconds / sample(1)))
    return statistics.median(sample(calls) for _ in range(SAMPLES))


def probe_product(size: int, device: torch.device, dtype: torch.dtype, min_seconds: float) -> float:
    """FLOP/s of a product of two random [size, size] matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, device, min_seconds)


def probe_copy(num_bytes: int, device: torch.device, min_seconds: float) -> float:
    """Bytes per second of a copy, read and written ones counted."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, min_seconds)


def grouped_products(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """F.grouped_mm of R rows sorted by expert, as the model calls it: forward, gradient of the
    rows, gradient of the weights.

    Rows of an expert: as random choices give them. w [E, O, I], x [R, I], dy [R, O].
    """
    draws = torch.Generator().manual_seed(0)
    experts_R = torch.randint(args.experts, (args.rows,), generator=draws)
    ends_E = torch.bincount(experts_R, minlength=args.experts).cumsum(0).to(device, torch.int32)
    x_RI = torch.randn(args.rows, args.d_in, device=device, dtype=dtype)
    dy_RO = torch.randn(args.rows, args.d_out, device=device, dtype=dtype)
    w_EOI = torch.randn(args.experts, args.d_out, args.d_in, device=device, dtype=dtype)
    return {
        "forward": lambda: F.grouped_mm(x_RI, w_EOI.transpose(1, 2), offs=ends_E),
        "dgrad": lambda: F.grouped_mm(dy_RO, w_EOI, offs=ends_E),
        "wgrad": lambda: F.grouped_mm(dy_RO.T, x_RI, offs=ends_E),
    }


def probe_attention(
    p: attention.Problem, backend: SDPBackend | None, grouped: bool, min_seconds: float
) -> float:
    """Seconds of one forward and backward pass by one kernel, or by PyTorch's own choice."""

    def attend() -> Tensor:
        if backend is None:
            return attention.sdpa(p, grouped)
        with sdpa_kernel(backend):
            return attention.sdpa(p, grouped)

    return seconds_of(lambda: attention.run_once(attend, p), p.q_BHTD.device, min_seconds)


def measure_attention(
    out: Measures, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> None:
    """Attention at both sizes of a head, by kernel; the table's case, which needs its own gradient,
    at the default's size.
    """
    for H, G, D in HEADS:
        args.num_heads, args.num_kv_heads, args.head_dim = H, G, D
        p = attention.make_problem(
            args, "causal", args.batch_size, args.context_length, device, dtype
        )
        for name, backend in BACKENDS.items():
            for grouped in (True, False):
                heads = "grouped" if grouped else "repeated"
                seconds, why = attention.attempt(
                    lambda p=p, b=backend, g=grouped: probe_attention(p, b, g, args.min_seconds),
                    device,
                )
                measure = f"attention {D} {name} {heads}"
                out.fail(measure, why) if why else out.add(measure, 1000 * seconds, "ms")
        chosen, why = attention.attempt(
            lambda p=p: attention.kernel_of(attention.sdpa(p, grouped=True)), device
        )
        out.results.setdefault("chosen_kernel", {})[str(D)] = why or chosen
        del p
        release_memory(device)
    args.num_heads, args.num_kv_heads, args.head_dim = HEADS[0]
    p = attention.make_problem(args, "table", args.batch_size, args.context_length, device, dtype)
    out.attempt(
        "attention 32 table", "ms", lambda: 1000 * probe_attention(p, None, False, args.min_seconds)
    )


def measure(
    out: Measures, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> None:
    """All figures, the ones that others need most first."""
    seconds = args.min_seconds
    out.attempt(
        "product", "TFLOP/s", lambda: probe_product(args.product, device, dtype, seconds) / 1e12
    )
    out.attempt("copy", "GB/s", lambda: probe_copy(args.copy_bytes, device, seconds) / 1e9)
    release_memory(device)
    flops = 2 * args.rows * args.d_in * args.d_out
    for name, product in grouped_products(args, device, dtype).items():
        out.attempt(
            f"grouped {name}",
            "TFLOP/s",
            lambda product=product: flops / seconds_of(product, device, seconds) / 1e12,
        )
    release_memory(device)
    measure_attention(out, args, device, dtype)
    out.save()


def triton_version() -> str | None:
    """Of the installed Triton, which CPU builds of PyTorch come without."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: torch.device) -> dict:
    """Name, memory and libraries of a device, in plain JSON values."""
    memory = memory_bytes(device)
    facts = {
        "device": device_name(device),
        "memory_bytes": memory and memory[1],
        "free_bytes": memory and memory[0],
        "cores": usable_cores(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    return facts


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/probe_NAME.json"
    )
    sizes = {
        "product": (8192, "rows and columns of the matrix product"),
        "copy_bytes": (1 << 32, "bytes that are copied; far more than any cache holds"),
        "rows": (65_536, "rows of the grouped product, over all experts"),
        "experts": (32, "experts of the grouped product"),
        "d_in": (1024, "features of a row of the grouped product"),
        "d_out": (4096, "features of a row of its result"),
        "batch_size": (16, "sequences of the attention"),
        "context_length": (2048, "tokens of each of them"),
    }
    for name, (default, what) in sizes.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--min_seconds",
        type=float,
        default=0.05,
        help=f"of a sample, of which each figure has {SAMPLES} (default: 0.05)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    args = parser.parse_args(argv)
    if too_small := [name for name in (*sizes, "min_seconds") if getattr(args, name) <= 0]:
        raise ValueError(f"{too_small[0]} must be above 0, not {getattr(args, too_small[0])}")
    device = choose_device(args.device)
    dtype = choose_dtype("bfloat16", device)
    args.documents = 1
    out = Measures(f"probe_{args.name}", **machine(device), dtype="bfloat16")
    # First of all: what follows may be killed.
    out.save()
    measure(out, args, device, dtype)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
