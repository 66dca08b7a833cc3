"""What it costs that a Decoder asks its fast ways for a few tokens before it uses them
(runtime/inference/asked.py).

    python -m benchmarks.asked --preset plain-nano
    python -m benchmarks.asked --name modern_8gb --preset modern-8gb --repeats 10

Takes every flag of the model. A Decoder is made with the C kernel and without, and asked every
time. `first_ms`: the first one of this process, which also loads PyTorch's operations. `cpu_ms`: of
all threads, which other processes hardly lengthen. Saved: benchmarks/results/asked_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import dataclasses
import os
import statistics
import time

import torch

from benchmarks.common import save_results
from config_model import ModelConfig, total_parameters
from model import LLM
from runtime.base import cli
from runtime.base.device import device_name
from runtime.inference.decoder import Decoder
from runtime.kernels.choose import choose_kernels

CPU = torch.device("cpu")


def timed(model: LLM, native: bool, repeats: int) -> dict:
    """Milliseconds to make a Decoder, and what it says of itself."""
    wall, cpu = [], []
    for _ in range(repeats + 1):
        started, used = time.perf_counter(), time.process_time()
        decoder = Decoder(model, native=native)
        wall.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.process_time() - used))
    return {
        "first_ms": wall[0],
        "median_ms": statistics.median(wall[1:]),
        "least_ms": min(wall[1:]),
        "cpu_ms": statistics.median(cpu[1:]),
        "note": decoder.note,
        "way": "C kernel"
        if decoder.native
        else "plain model"
        if decoder.why_not_step
        else "decode_step",
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig)
    parser.add_argument("--name", default="nano", help="name of the results file (default: nano)")
    parser.add_argument("--repeats", type=int, default=40, help="Decoders to make (default: 40)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {args.repeats}")
    torch.set_num_threads(min(torch.get_num_threads(), process.usable_cores()))
    config = cli.settings_from(args, ModelConfig).build(ModelConfig)
    model = LLM(config)
    choose_kernels(model, CPU, torch.float32)
    sides = {
        "c_kernel": timed(model, True, args.repeats),
        "pytorch": timed(model, False, args.repeats),
    }
    for name, side in sides.items():
        print(
            f"{name:10} {side['way']:12} {side['median_ms']:8.1f} ms (least "
            f"{side['least_ms']:.1f}, "
            f"first {side['first_ms']:.1f}; {side['cpu_ms']:.1f} ms of all threads)  {side['note']}"
        )
    save_results(
        f"asked_{args.name}",
        {
            "device": device_name(CPU),
            "model": dataclasses.asdict(config),
            "parameters": total_parameters(config),
            "repeats": args.repeats,
            "sides": sides,
            # Other work on the machine lengthens all but least_ms and cpu_ms.
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
