"""One optimizer step: AdamW's implementations, one tensor per expert against stacked experts, Muon,
moments in bfloat16.

    python -m benchmarks.optimizer --name nano --preset plain-nano --num_threads 1
    python -m benchmarks.optimizer --name default_gpu --preset gptoss-modern \\
        --variants adamw_fused,adamw_foreach,muon,muon_bfloat16

Takes every flag of the model, for its sizes. Weights and gradients (random, the same ones every
step) are shared by all variants; each has its own moments. Seconds are medians over samples taken
in turns, ratios are to adamw_fused, above 1 slower. Saved: benchmarks/results/optimizer_NAME.json.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from benchmarks.common import alternate, save_results, summary
from config_model import ModelConfig, TrainConfig, total_parameters
from model import LLM
from runtime.base import cli
from runtime.base.device import (
    choose_device,
    device_name,
    explained_out_of_memory,
    peak_memory_bytes,
    synchronize,
)
from runtime.training.optimizer import build_optimizer, parameter_groups

CONFIG = TrainConfig(
    lr=1e-6, min_lr=0.0
)  # small: the weights stay what they are however often they are stepped


def expert_by_expert(model: nn.Module) -> list[dict]:
    """AdamW's groups with every stack of expert tensors taken apart: views of the same weights and
    gradients.
    """
    stacks = {p for name, p in model.named_parameters() if ".experts." in name}
    groups = parameter_groups(model, CONFIG.weight_decay)
    for group in groups:
        apart: list[Tensor] = []
        for parameter in group["params"]:
            for weights, gradient in (
                zip(parameter.detach(), parameter.grad, strict=True)
                if parameter in stacks
                else [(parameter.detach(), parameter.grad)]
            ):
                apart.append(nn.Parameter(weights))
                apart[-1].grad = gradient
        group["params"] = apart
    return groups


def make_optimizers(model: nn.Module, names: list[str] | None) -> dict[str, torch.optim.Optimizer]:
    """The variants by name; `names` picks some. Those of torch that are named after an
    implementation use that one.
    """

    def adamw(groups: list[dict], **implementation) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            groups,
            lr=CONFIG.lr,
            betas=(CONFIG.beta1, CONFIG.beta2),
            eps=CONFIG.adam_eps,
            **implementation,
        )

    def ours(**values) -> torch.optim.Optimizer:
        return build_optimizer(model, dataclasses.replace(CONFIG, **values))

    makers = {
        "adamw_fused": lambda: ours(),
        "adamw_foreach": lambda: adamw(parameter_groups(model, CONFIG.weight_decay), foreach=True),
        "adamw_for_loop": lambda: adamw(
            parameter_groups(model, CONFIG.weight_decay), foreach=False
        ),
        "adamw_per_expert_default": lambda: adamw(expert_by_expert(model)),
        "adamw_per_expert_fused": lambda: adamw(expert_by_expert(model), fused=True),
        "adamw_bfloat16": lambda: ours(state_dtype="bfloat16"),
        "muon": lambda: ours(optimizer="muon"),
        "muon_bfloat16": lambda: ours(optimizer="muon", state_dtype="bfloat16"),
    }
    if unknown := sorted(set(names or []) - makers.keys()):
        raise ValueError(f"unknown variant {unknown[0]!r}: there are {', '.join(makers)}")
    return {
        name: make()
        for name, make in makers.items()
        if name == "adamw_fused" or not names or name in names
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/optimizer_NAME.json"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    parser.add_argument(
        "--num_threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice (default: 0)"
    )
    parser.add_argument(
        "--variants",
        default="",
        help=(
            "comma-separated, adamw_fused comes with any; moments of all of them are held at "
            "once (default: all)"
        ),
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=11,
        help="samples of each variant, after one to warm up (default: 11)",
    )
    parser.add_argument("--steps", type=int, default=1, help="steps in a sample (default: 1)")
    cli.add_config_flags(parser, ModelConfig)
    args = parser.parse_args(argv)
    if min(args.repeats, args.steps) < 1:
        raise ValueError(
            f"repeats and steps must be at least 1, not {args.repeats} and {args.steps}"
        )
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device, config = (
        choose_device(args.device),
        cli.settings_from(args, ModelConfig).build(ModelConfig),
    )

    def sample(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(args.steps):
            optimizer.step()
        synchronize(device)

    torch.manual_seed(0)
    with explained_out_of_memory(
        device,
        "choose some of the variants with --variants (the moments of all of them are held at "
        "once), or a smaller model",
    ):
        with device:
            model = LLM(config)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter).mul_(1e-3)
        optimizers = make_optimizers(model, args.variants.split(",") if args.variants else None)
        seconds = alternate(
            {
                name: lambda optimizer=optimizer: sample(optimizer)
                for name, optimizer in optimizers.items()
            },
            args.repeats,
        )
    variants = {}
    for name, optimizer in optimizers.items():
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        ratios = [
            mine / fused for mine, fused in zip(seconds[name], seconds["adamw_fused"], strict=True)
        ]
        variants[name] = {
            "seconds_per_step": summary([value / args.steps for value in seconds[name]]),
            "ratio": summary(ratios),
            "tensors": len(optimizer.state),
            "state_bytes": sum(tensor.nbytes for tensor in states),
        }
        print(
            f"{name:26} {1000 * variants[name]['seconds_per_step']['median']:9.2f} ms  "
            f"{variants[name]['ratio']['median']:6.2f} x"
            f"  {variants[name]['tensors']:5} tensors  "
            f"{variants[name]['state_bytes'] / 1e6:10.1f} MB of state"
        )
    save_results(
        f"optimizer_{args.name}",
        {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "model": dataclasses.asdict(config),
            "parameters": total_parameters(config),
            "repeats": args.repeats,
            "steps": args.steps,
            "peak_memory_bytes": peak_memory_bytes(device),
            "variants": variants,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
