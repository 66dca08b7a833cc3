"""Rollouts: several answers to each of many prompts, as a step of reinforcement learning needs.

    python -m benchmarks.rollouts
    python -m benchmarks.rollouts --ckpt checkpoints/latest.pt --name mine --answers 16

Three sides with the same weights and prompts take turns: `ours` (runtime/posttraining/rollouts.py),
`no_fork`, the same decoder that reads a prompt again for each of its answers, and `plain`,
model.generate. All sample at temperature 1 without filters until the end-of-text token. The rate
counts the tokens that belong to answers, so not those that model.generate repeats after an end.
`no_fork` draws the same answers as `ours`, up to the rounding of logits.

Prompts are beginnings of toy stories, all of the same number of tokens, which model.generate needs.
A sample during which other processes used more than 0.15 core is measured again (CPU). Figures are
medians; saved: benchmarks/results/rollouts_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import alternate_undisturbed, save_results, summary
from config_model import total_parameters
from model import LLM, generate
from runtime.base import cli
from runtime.base.device import choose_device, device_name, synchronize
from runtime.checkpoint.read import load_model
from runtime.data import toy_stories
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_of
from runtime.inference.decoder import Text
from runtime.inference.predictor import READY
from runtime.kernels.choose import choose_kernels
from runtime.posttraining.rollouts import Answer, Sampler

# The first story that no training set of fewer than a million stories has.
FIRST_HELD_OUT = 1_000_000
SEED = 0
POSITIVE = ("prompts", "answers", "prompt_tokens", "max_new_tokens", "repeats")


class WithoutFork(Sampler):
    """Reads a prompt again for each of its answers."""

    def read(self, texts: Sequence[Text], prompts: Sequence[Sequence[int]], count: int) -> Tensor:
        each = [list(prompt) for prompt in prompts for _ in range(count)]
        return self.decoder.read_all(texts[: len(each)], each)


class Plain:
    """model.generate for all answers at once."""

    def __init__(self, model: LLM, stop_ids: Sequence[int], max_new_tokens: int):
        self.model, self.stop_ids, self.max_new_tokens = model, list(stop_ids), max_new_tokens

    def sample(self, prompts: list[list[int]], count: int, seed: int) -> list[list[Answer]]:
        device = self.model.embed.weight.device
        steps = generate(
            self.model,
            torch.tensor([prompt for prompt in prompts for _ in range(count)], device=device),
            self.max_new_tokens,
            temperature=1.0,
            top_k=0,
            stop_ids=self.stop_ids,
            generator=torch.Generator(device).manual_seed(seed),
            slide=False,
        )
        drawn_BT = torch.stack(list(steps), dim=1).tolist()
        return [[Answer(self._until_end(ids)) for ids in drawn_BT]]

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(ids) if token in self.stop_ids]
        return ids[: ends[0] + 1] if ends else ids


def beginnings(tokenizer: Tokenizer, count: int, tokens: int) -> list[list[int]]:
    """Return the first tokens of held-out stories that are long enough."""
    start, prompts, index = tokenizer.start_id, [], FIRST_HELD_OUT
    while len(prompts) < count:
        ids = tokenizer.encode(toy_stories.story(index))
        ids = ([] if start is None else [start]) + ids
        if len(ids) >= tokens:
            prompts.append(ids[:tokens])
        index += 1
        if index - FIRST_HELD_OUT > 1000 * count:
            raise ValueError(f"prompt_tokens {tokens} is more than stories have: lower it")
    return prompts


def make_sides(args: argparse.Namespace, model: LLM, stop_ids: Sequence[int]) -> dict:
    settings = dict(stop_ids=stop_ids, max_new_tokens=args.max_new_tokens)
    return {
        "ours": Sampler(model, **settings),
        "no_fork": WithoutFork(model, **settings),
        "plain": Plain(model, **settings),
    }


def measured(
    sides: dict, prompts: list[list[int]], count: int, repeats: int, device: torch.device
) -> dict[str, dict]:
    """Return of each side the answers' tokens per second, their tokens and their mean length."""
    tokens: dict[str, int] = {}

    def rate(name: str) -> float:
        started = time.perf_counter()
        groups = sides[name].sample(prompts, count, SEED)
        synchronize(device)
        seconds = time.perf_counter() - started
        tokens[name] = sum(len(answer.ids) for group in groups for answer in group)
        return tokens[name] / seconds

    functions: dict[str, Callable[[], float]] = {
        name: (lambda name=name: rate(name)) for name in sides
    }
    for function in functions.values():
        # Compiles, captures and allocates what the first call needs.
        function()
    samples = alternate_undisturbed(functions, repeats)
    plain = summary(samples["plain"].values)["median"]
    return {
        name: {
            "tokens_per_s": (figures := summary(sample.values)),
            "times_plain": figures["median"] / plain,
            "seconds": tokens[name] / figures["median"],
            "tokens": tokens[name],
            "discarded": sample.discarded,
            "disturbed": sample.disturbed,
        }
        for name, sample in samples.items()
    }


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", default=str(READY), help="checkpoint (default: the one here)")
    parser.add_argument("--name", default="stories", help="name of the results (default: stories)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step (default: 8)")
    parser.add_argument("--answers", type=int, default=8, help="answers to each (default: 8)")
    parser.add_argument(
        "--prompt_tokens", type=int, default=48, help="tokens of each prompt (default: 48)"
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=192, help="most tokens of an answer (default: 192)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="samples of each side (default: 5)")
    parser.add_argument(
        "--num_threads",
        type=int,
        default=0,
        help="CPU threads; 0 = the cores that this process may use (default: 0)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    for name in POSITIVE:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    device = choose_device(args.device)
    torch.set_num_threads(args.num_threads or min(torch.get_num_threads(), process.usable_cores()))
    model, checkpoint = load_model(args.ckpt, device, torch.float32)
    choose_kernels(model, device, torch.float32)
    tokenizer = tokenizer_of(checkpoint, "")
    prompts = beginnings(tokenizer, args.prompts, args.prompt_tokens)
    sides = make_sides(args, model.eval(), list(tokenizer.stop_ids))
    figures = measured(sides, prompts, args.answers, args.repeats, device)
    for name, figure in figures.items():
        print(
            f"{name:8} {figure['tokens_per_s']['median']:8.0f} tokens/s  "
            f"{figure['times_plain']:5.2f} x plain  {figure['seconds']:6.2f} s for "
            f"{figure['tokens']:,} tokens"
        )
    results = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "model": dataclasses.asdict(model.config),
        "parameters": total_parameters(model.config),
        "ckpt": Path(args.ckpt).name,
        **{name: getattr(args, name) for name in POSITIVE},
        "sides": figures,
    }
    save_results(f"rollouts_{args.name}", results)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
