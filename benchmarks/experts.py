"""The experts of one block, forward and backward: one after another, PyTorch's grouped product,
one operation with an expert per core, and that operation in C.

    python -m benchmarks.experts --name cpu_256 --d_model 256 --d_ff 512 --num_experts 32 \\
        --expert_activation swiglu --no-expert_bias
    python -m benchmarks.experts --name default_gpu --rows 65536 --dtype bfloat16

Takes every flag of the model, for its sizes. Rows are sorted by expert and as many for each as
random choices give it; all variants have the same rows and weights and must agree with the first in
output and gradients. Seconds are medians over samples taken in turns; ratios are of the first
variant's time to the others', above 1 faster. Saved: benchmarks/results/experts_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import alternate, save_results, summary
from config_model import ModelConfig
from model_parts import Experts
from runtime.base import cli
from runtime.base.device import choose_device, choose_dtype, device_name, synchronize
from runtime.kernels import cpu_experts, routed_experts

VARIANTS = {
    "one_by_one": (
        "grouped_linear of model_parts.py: a product for each expert, cut among all threads"
    ),
    "grouped_mm": "F.grouped_mm, the GPU's path",
    "feed_forward": "runtime/kernels/cpu_experts.py: each expert on one core",
    "in_c": "runtime/kernels/routed_experts.py: the same in C",
}


def variants_of(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the variants that a device has in a dtype."""
    if device.type != "cpu":
        return ["one_by_one", "grouped_mm"]
    has_c = dtype == torch.float32 and routed_experts.library()[0] is not None
    return list(VARIANTS) if has_c else [name for name in VARIANTS if name != "in_c"]


def make_variant(
    name: str, experts: Experts, x_RC: Tensor, experts_R: Tensor, counts_E: Tensor, grad_RC: Tensor
) -> Callable[[], list[Tensor]]:
    """A function that computes output and gradients in the way that `name` says."""
    inputs = [x_RC, *experts.parameters()]

    def run() -> list[Tensor]:
        experts.grouped = name == "grouped_mm"
        experts.feed_forward = {
            "feed_forward": cpu_experts.feed_forward,
            "in_c": routed_experts.rows_of_experts,
        }.get(name)
        y_RC = experts(x_RC, experts_R, counts_E)
        return [y_RC, *torch.autograd.grad(y_RC, inputs, grad_RC)]

    return run


def check_equal(results: dict[str, list[Tensor]], tolerance: float) -> None:
    """ValueError unless all variants computed the same."""
    first, *others = results
    for name in others:
        for a, b in zip(results[first], results[name], strict=True):
            if (a - b).abs().max() > tolerance * a.abs().max():
                raise ValueError(
                    f"{name} computes something else than {first}: "
                    f"{(a - b).abs().max().item():.2e} off, of {a.abs().max().item():.2e}"
                )


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/experts_NAME.json"
    )
    parser.add_argument(
        "--rows", type=int, default=4096, help="assignments, tokens times top_k (default: 4096)"
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
        "--repeats",
        type=int,
        default=15,
        help="samples of each variant, after one to warm up (default: 15)",
    )
    cli.add_config_flags(parser, ModelConfig)
    args = parser.parse_args(argv)
    if min(args.repeats, args.rows) < 1:
        raise ValueError(f"repeats and rows must be at least 1, not {args.repeats} and {args.rows}")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    process.keep_freed_memory()
    device, config = (
        choose_device(args.device),
        cli.settings_from(args, ModelConfig).build(ModelConfig),
    )
    dtype = choose_dtype(args.dtype, device)
    torch.manual_seed(0)
    with device:
        experts = Experts(config).to(dtype)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=config.init_std)
        experts_R = torch.randint(config.num_experts, (args.rows,)).sort().values
        counts_E = torch.bincount(experts_R, minlength=config.num_experts)
        x_RC, grad_RC = (
            torch.randn(args.rows, config.d_model, dtype=dtype, requires_grad=True),
            torch.randn(args.rows, config.d_model, dtype=dtype),
        )
    names = variants_of(device, dtype)
    functions = {
        name: make_variant(name, experts, x_RC, experts_R, counts_E, grad_RC) for name in names
    }
    check_equal(
        {name: function() for name, function in functions.items()},
        1e-4 if dtype == torch.float32 else 3e-2,
    )
    seconds = alternate(
        {
            name: lambda function=function: (function(), synchronize(device))
            for name, function in functions.items()
        },
        args.repeats,
    )
    matrices = 3 if config.expert_activation == "swiglu" else 2
    flops = 3 * 2 * args.rows * matrices * config.d_model * config.d_ff
    variants = {}
    for name, values in seconds.items():
        ratios = [first / mine for first, mine in zip(seconds[names[0]], values, strict=True)]
        variants[name] = {
            "what": VARIANTS[name],
            "seconds": summary(values),
            "ratio": summary(ratios),
            "flops_per_second": flops / summary(values)["median"],
        }
        print(
            f"{name:14} {1000 * variants[name]['seconds']['median']:9.2f} ms  "
            f"{variants[name]['flops_per_second'] / 1e9:9,.0f} GFLOP/s  "
            f"{variants[name]['ratio']['median']:6.2f} x"
        )
    save_results(
        f"experts_{args.name}",
        {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "rows": args.rows,
            "busiest_expert": int(counts_E.max()) * config.num_experts / args.rows,
            "model": dataclasses.asdict(config),
            "repeats": args.repeats,
            "variants": variants,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
