"""The serving engine without HTTP: tokens/s by requests at a time, next to `generate`; any device.

    python -m benchmarks.engine --name modern_gpu --preset gptoss-modern --dtype bfloat16
    python -m benchmarks.engine --name nano_cpu --preset plain-nano --vocabulary_size 4096

Takes every flag of the model. Both sides are in this process, have the same random weights, greedy
drawing and prompts, and take turns. `first_ms`: from submitting to the first token, of all requests
that come together. Figures are medians; they go to benchmarks/results/engine_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable

import torch

from benchmarks.common import alternate, save_results, summary
from benchmarks.decode import Setting, make_model
from config_model import ModelConfig, total_parameters
from runtime.base import cli
from runtime.base.device import choose_device, choose_dtype, device_name, synchronize
from runtime.inference.decoder import Decoder, generate
from runtime.serving.engine import Engine
from runtime.serving.request import Event, Finished, Request, Sampling, Token

SEED = 0


class Answered:
    """When the events of a request came, in seconds of time.perf_counter."""

    def __init__(self, engine: Engine, request: Request):
        self.tokens: list[float] = []
        self.done = threading.Event()
        self.failed = ""
        self.submitted = time.perf_counter()
        engine.submit(request, self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Token):
            self.tokens.append(time.perf_counter())
        elif isinstance(event, Finished):
            self.failed = event.message if event.reason == "error" else ""
            self.done.set()


def engine_side(engine: Engine, prompts: list[list[int]], new: int, first: list[float]) -> None:
    """Answer all prompts at a time. first: gets the seconds to each first token."""
    requests = [Request(tuple(ids), Sampling(temperature=0, max_new_tokens=new)) for ids in prompts]
    answers = [Answered(engine, request) for request in requests]
    for one in answers:
        one.done.wait()
        if one.failed or len(one.tokens) != new:
            raise ValueError(f"a request had {len(one.tokens)} tokens of {new}: {one.failed}")
        first.append(one.tokens[0] - one.submitted)


def generate_side(decoder: Decoder, texts: list, prompts: list[list[int]], new: int) -> None:
    """Continue all prompts in one batch."""
    count = sum(len(s) for s in generate(decoder, texts, prompts, new, temperature=0))
    assert count == new * len(prompts)
    synchronize(decoder.device)


def measured(args: argparse.Namespace, config: ModelConfig) -> list[dict]:
    """Return a cell for each number of requests at a time."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    setting = Setting(config, device, dtype, [], {}, [1], [], [], [], "", torch.empty(0))
    model = make_model(setting, 3.0)
    decoder = Decoder(model)
    engine = Engine(model, slots=max(args.clients), max_waiting=0)
    cells, generator = [], torch.Generator().manual_seed(SEED)

    def prompts_of(count: int) -> list[list[int]]:
        """New ones each time, so that no cache has their beginning."""
        shape = (count, args.prompt_tokens)
        return torch.randint(0, config.vocabulary_size, shape, generator=generator).tolist()

    print(engine.line)
    try:
        for n in args.clients:
            texts = decoder.texts(n, args.prompt_tokens + args.new_tokens)
            first: list[float] = []
            sides: dict[str, Callable[[], object]] = {
                "engine": lambda n=n, first=first: engine_side(
                    engine, prompts_of(n), args.new_tokens, first
                ),
                "generate": lambda n=n, texts=texts: generate_side(
                    decoder, texts, prompts_of(n), args.new_tokens
                ),
            }
            times = alternate(sides, args.repeats)
            speeds = {
                name: summary([n * args.new_tokens / t for t in own]) for name, own in times.items()
            }
            ratio = speeds["engine"]["median"] / speeds["generate"]["median"]
            first_ms = 1000 * statistics.median(first)
            cells.append(
                {"requests": n, "tokens_per_sec": speeds, "ratio": ratio, "first_ms": first_ms}
            )
            print(
                f"{n:3} at a time: {speeds['engine']['median']:,.0f} tokens/s, {ratio:.2f} of "
                f"generate, first token after {first_ms:.1f} ms",
                flush=True,
            )
    finally:
        engine.close()
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig)
    parser.add_argument("--name", required=True, help="results go to engine_NAME.json")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 32], help="requests at a time (1 8 32)"
    )
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens of an answer (128)")
    parser.add_argument("--repeats", type=int, default=5, help="samples of a side (5)")
    args = parser.parse_args(argv)
    if min(*args.clients, args.prompt_tokens, args.new_tokens, args.repeats) < 1:
        raise ValueError("all numbers must be at least 1")
    config = cli.settings_from(args, ModelConfig).build(ModelConfig)
    if args.prompt_tokens + args.new_tokens > config.context_length:
        raise ValueError(
            f"--prompt_tokens {args.prompt_tokens} and --new_tokens {args.new_tokens} do not fit "
            f"the context_length {config.context_length}"
        )
    results = {
        "device": device_name(choose_device(args.device)),
        "dtype": args.dtype,
        "parameters": total_parameters(config),
        "model": dataclasses.asdict(config),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "cells": measured(args, config),
    }
    save_results(f"engine_{args.name}", results)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
