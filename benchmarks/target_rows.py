"""The head and its loss where few tokens are targets, as in fine-tuning: seconds of three ways.

    python -m benchmarks.target_rows
    python -m benchmarks.target_rows --name gpu --vocabulary_sizes 200019 --d_model 1024 \\
        --tokens 32768

Sides, forward and backward, for the same hidden states and the same targets: `all_rows`, the loss
of every token, which ignores those without a target; `target_rows`, the loss of the rows that have
one (LLM.forward with rows_M); `per_token`, their log-probabilities, each with a gradient of its own
(per_token). All must give the same loss and the same gradients, or nothing is measured.

Sides take turns. A sample during which other processes used more than 0.15 core is measured again
(CPU). Figures are medians; saved: benchmarks/results/target_rows_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import alternate_undisturbed, save_results, summary
from config_model import ModelConfig, loss_chunk_rows
from runtime.base import cli
from runtime.base.device import autocast, choose_device, choose_dtype, device_name, synchronize
from runtime.kernels.linear_cross_entropy import IGNORE, linear_cross_entropy
from runtime.kernels.target_log_probs import target_log_probs

SEED = 0
POSITIVE = ("d_model", "tokens", "repeats")


@dataclass
class Problem:
    """Hidden states [N, C] and a head [V, C], float32 leaves; the targets of a micro-batch [N].

    rows_M: those with a target. chunk_rows: of logits that are held at a time.
    """

    h_NC: Tensor
    weight_VC: Tensor
    targets_N: Tensor
    rows_M: Tensor
    chunk_rows: int
    dtype: torch.dtype

    def of_target_rows(self) -> tuple[Tensor, Tensor, None, Tensor, int]:
        """Return what a loss is given, with the rows that have a target."""
        h_MC = self.h_NC.index_select(0, self.rows_M)
        return h_MC, self.weight_VC, None, self.targets_N[self.rows_M], self.chunk_rows


def make_problem(
    tokens: int, d_model: int, V: int, share: float, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Return numbers of about a trained model's size, of which `share` of the tokens are targets.

    The targets come in spans, as answers do; the same ones at each call.
    """
    draws = torch.Generator().manual_seed(SEED)
    h_NC = torch.randn(tokens, d_model, generator=draws)
    weight_VC = 0.02 * torch.randn(V, d_model, generator=draws)
    targets_N = torch.randint(V, (tokens,), generator=draws)
    # Four spans, each at the end of its quarter.
    quarter = max(tokens // 4, 1)
    is_target_N = torch.arange(tokens) % quarter >= quarter - max(round(share * quarter), 1)
    targets_N[~is_target_N] = IGNORE
    # One head, because that divides any width; the rows go by vocabulary and width alone.
    config = ModelConfig(vocabulary_size=V, d_model=d_model, num_heads=1, num_kv_heads=1)
    return Problem(
        h_NC.to(device).requires_grad_(),
        weight_VC.to(device).requires_grad_(),
        targets_N.to(device),
        is_target_N.nonzero()[:, 0].to(device),
        loss_chunk_rows(config, device.type == "cuda"),
        dtype,
    )


# ------------------------------------------------------------------------------------- the sides
def all_rows(p: Problem) -> Tensor:
    return linear_cross_entropy(p.h_NC, p.weight_VC, None, p.targets_N, p.chunk_rows)


def target_rows(p: Problem) -> Tensor:
    return linear_cross_entropy(*p.of_target_rows())


def per_token(p: Problem) -> Tensor:
    return -target_log_probs(*p.of_target_rows()).sum()


SIDES = {side.__name__: side for side in (all_rows, target_rows, per_token)}


def run_once(side: Callable[[Problem], Tensor], p: Problem) -> float:
    """Return the seconds of one forward and backward pass; the gradients stay."""
    device = p.h_NC.device
    p.h_NC.grad = p.weight_VC.grad = None
    synchronize(device)
    started = time.perf_counter()
    with autocast(device, p.dtype):
        loss = side(p)
    loss.backward()
    synchronize(device)
    return time.perf_counter() - started


def check(p: Problem) -> None:
    """Raise ValueError unless all sides give the gradients of the first."""
    expected: list[Tensor] = []
    # Half precision rounds each chunk's share of a gradient, and the chunks differ.
    most = 1e-4 if p.dtype == torch.float32 else 3e-2
    for name, side in SIDES.items():
        run_once(side, p)
        gradients = [p.h_NC.grad, p.weight_VC.grad]
        expected = expected or gradients
        for mine, first in zip(gradients, expected, strict=True):
            error = float((mine - first).norm() / first.norm())
            if not error < most:
                raise ValueError(
                    f"{name} has another gradient than {next(iter(SIDES))}: relative error "
                    f"{error:.1e}"
                )


def measured(p: Problem, repeats: int) -> dict[str, dict]:
    """Return each side's figures."""
    check(p)
    limit = {"most_foreign_cores": math.inf} if p.h_NC.is_cuda else {}
    functions = {name: lambda side=side: run_once(side, p) for name, side in SIDES.items()}
    samples = alternate_undisturbed(functions, repeats, **limit)
    seconds = {name: summary(sample.values) for name, sample in samples.items()}
    return {
        name: {
            "seconds": seconds[name],
            "speed_against_all_rows": seconds["all_rows"]["median"] / seconds[name]["median"],
            "discarded_samples": sample.discarded,
            "disturbed": sample.disturbed,
        }
        for name, sample in samples.items()
    }


# --------------------------------------------------------------------------------------------- main
def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--name", default="cpu", help="of the results' file (default: cpu)")
    parser.add_argument(
        "--vocabulary_sizes",
        default="50000,200019",
        help="comma-separated, measured one after the other (default: 50000,200019)",
    )
    parser.add_argument("--d_model", type=int, default=256, help="features (default: 256)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="tokens of a micro-batch (default: 1024)"
    )
    parser.add_argument(
        "--share", type=float, default=0.2, help="of the tokens that are targets (default: 0.2)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of products: auto, bfloat16 or float32 (default: auto)"
    )
    parser.add_argument(
        "--num_threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice (default: 0)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="samples of a side (default: 7)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    sizes = _sizes(args.vocabulary_sizes)
    for name in POSITIVE:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 < args.share <= 1:
        raise ValueError(f"--share must be above 0 and at most 1, not {args.share}")
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    process.keep_freed_memory()
    torch.set_num_threads(args.num_threads or min(torch.get_num_threads(), process.usable_cores()))
    figures = {}
    for V in sizes:
        problem = make_problem(args.tokens, args.d_model, V, args.share, device, dtype)
        sides = measured(problem, args.repeats)
        figures[str(V)] = {"targets": len(problem.rows_M), "sides": sides}
        for name, figure in sides.items():
            print(
                f"{V:>9,} {name:12} {1000 * figure['seconds']['median']:9.1f} ms  "
                f"{figure['speed_against_all_rows']:5.2f} x all rows"
                f"{'  machine was busy' if figure['disturbed'] else ''}"
            )
    results = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in (*POSITIVE, "share")},
        "vocabulary_sizes": figures,
    }
    save_results(f"target_rows_{args.name}", results)
    return 0


def _sizes(text: str) -> list[int]:
    """Return the vocabulary sizes of a list with commas. Raise ValueError for other text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--vocabulary_sizes must be whole numbers with commas between them, not {text!r}"
        )
    return [int(part) for part in parts]


if __name__ == "__main__":
    cli.run_main(main)
