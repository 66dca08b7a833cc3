"""Serving: tokens/s of many clients next to one, to generation without a server, to predict.py and
to llama.cpp's server.

    python -m benchmarks.serving --name 56m --llama_python PATH --d_model 256 \\
        --transformer_blocks 6 --num_heads 8 --num_kv_heads 4 --d_ff 336 --vocabulary_size 8192 \\
        --context_length 1152 --expert_activation swiglu --no-expert_bias --no-out_proj_bias \\
        --no-head_bias --no-use_attention_bias --rms_norm_eps 1e-6
    python -m benchmarks.serving --name nano --preset plain-nano --vocabulary_size 4096

Takes every flag of the model. The servers run as a user starts them, in processes of their own, and
wait while others are measured, which costs them nothing (`idle`). All sides have the same random
weights and as many threads, draw with the server's defaults, and take turns; a sample during which
other processes used more than 0.15 core is measured again. Clients are in this process: what they
cost is stored as `client_cores`. Prompts are new each time, so that no cache has their beginning.
llama.cpp's server is that of the package xllamacpp, which PATH, an interpreter, must have; it reads
the same weights from a GGUF file. Passes are counted in an engine of this process. Figures are
medians, ratios the medians of those of each round; they go to benchmarks/results/serving_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.common import alternate_undisturbed, cpu_clock, save_results, summary
from benchmarks.serving_clients import Client, load
from benchmarks.serving_servers import Running, llama_server, our_server
from benchmarks.serving_sides import (
    GenerateSide,
    PredictSide,
    Prompts,
    ServerSide,
    Sizes,
    random_model,
    save,
)
from config_model import ModelConfig, PredictConfig, total_parameters
from model import LLM
from runtime.base import cli
from runtime.data.tokenizer import Tokenizer
from runtime.inference.predictor import Predictor
from runtime.serving.engine import Engine
from runtime.serving.request import Event, Finished, Request, Sampling, Started, Token

# What the ratios are read against; they are saved with them.
TARGETS = {
    "8 clients over 1": 1.3,
    "32 clients over 1": 1.7,
    "over generate, each number of clients": 0.9,
    "1 client over predict": 0.9,
    "8 clients over llama.cpp": 1.0,
    "passes to the first token of a short prompt": 3,
    "p99 of passes between tokens": 3,
    "idle CPU seconds": 0,
}
# Both servers draw so: llama.cpp has other filters by default.
GREEDY = {"temperature": 0.0}


@dataclasses.dataclass
class Bench:
    """What all comparisons need."""

    args: argparse.Namespace
    model: LLM
    tokenizer: Tokenizer
    checkpoint: str
    prompts: Prompts
    sizes: Sizes

    def clock(self, *servers: Running) -> Callable[[], tuple[float, float, float]]:
        """Return a clock to which the CPU time of servers is our own."""

        def read() -> tuple[float, float, float]:
            wall, machine, own = cpu_clock()
            return wall, machine, own + sum(server.cpu_seconds() for server in servers)

        return read

    def speeds(self, sides: dict[str, Callable[[], float]], *servers: Running) -> dict:
        """Return tokens/s of some sides that take turns."""
        for side in sides.values():
            side()
        samples = alternate_undisturbed(sides, self.args.repeats, clock=self.clock(*servers))
        found = {}
        for name, one in samples.items():
            found[name] = summary(one.values) | {
                "of_each_round": one.values,
                "rounds": one.rounds,
                "discarded": one.discarded,
                "disturbed": one.disturbed,
            }
            side = sides[name]
            if isinstance(side, ServerSide):
                found[name]["client_cores"] = side.client_cores
            print(f"  {name:22} {found[name]['median']:9,.0f} tokens/s", flush=True)
        return found

    def server_side(self, server: Running, clients: int, **settings) -> ServerSide:
        return ServerSide(server, self.prompts, self.sizes, clients, settings)

    def flags(self, slots: int, threads: int = 0) -> list[str]:
        count = threads or torch.get_num_threads()
        return ["--slots", str(slots), "--num_threads", str(count)]


def scaling(bench: Bench, quantize: str) -> dict:
    """Return tokens/s of the server by clients, of `generate`, and of predict.py."""
    flags = [*bench.flags(max(bench.args.clients)), "--quantize", quantize]
    predictor = Predictor(PredictConfig(ckpt=bench.checkpoint, quiet=True, quantize=quantize))
    with our_server(bench.checkpoint, *flags) as server:
        sides: dict[str, Callable[[], float]] = {
            "predict": PredictSide(predictor, bench.prompts, bench.sizes, {})
        }
        for clients in bench.args.clients:
            sides[f"{clients} clients"] = bench.server_side(server, clients)
            sides[f"generate {clients}"] = GenerateSide(
                predictor, bench.prompts, bench.sizes, clients, {}
            )
        streamed = bench.server_side(server, max(bench.args.clients))
        streamed.stream = True
        sides[f"{streamed.clients} streams"] = streamed
        found = bench.speeds(sides, server)
        idle = idle_seconds(server, bench.args.idle_seconds)
    return {"tokens_per_sec": found, "ratios": ratios(found, bench.args.clients), "idle": idle}


def ratio(found: dict, name: str, base: str) -> float:
    """Return the median over the rounds of one side's tokens/s over another's.

    Sides of a round follow one another, so a slow spell of the machine meets both. A sample that
    was measured again belongs to a later round than its number in the list says: rounds that only
    one side has are left out. Where the sides share none, it is the ratio of their medians.
    """
    one, other = (
        dict(zip(found[side]["rounds"], found[side]["of_each_round"], strict=True))
        for side in (name, base)
    )
    if not (shared := one.keys() & other.keys()):
        return statistics.median(one.values()) / statistics.median(other.values())
    return statistics.median(one[round_] / other[round_] for round_ in shared)


def ratios(found: dict, clients: Sequence[int]) -> dict[str, float]:
    """Return how the sides of `scaling` compare with each other."""
    first = f"{clients[0]} clients"
    over = {f"{n} clients over {clients[0]}": (f"{n} clients", first) for n in clients[1:]}
    over |= {f"{n} clients over generate": (f"{n} clients", f"generate {n}") for n in clients}
    over[f"{first} over predict"] = (first, "predict")
    return {what: ratio(found, *sides) for what, sides in over.items()}


def idle_seconds(server: Running, seconds: float) -> dict[str, float]:
    """Return the CPU seconds that a server uses while nobody asks."""
    before = server.cpu_seconds()
    time.sleep(seconds)
    return {"wall_seconds": seconds, "cpu_seconds": server.cpu_seconds() - before}


def threads_compared(bench: Bench) -> dict:
    """Return tokens/s with one thread of the kernel and with all; HTTP shares the cores."""
    most = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        slots = max(bench.args.clients)
        servers = {
            count: stack.enter_context(our_server(bench.checkpoint, *bench.flags(slots, count)))
            for count in sorted({1, most})
        }
        sides: dict[str, Callable[[], float]] = {
            f"{clients} clients, {count} threads": bench.server_side(server, clients)
            for clients in bench.args.clients
            for count, server in servers.items()
        }
        return bench.speeds(sides, *servers.values())


def against_llama_cpp(bench: Bench, quantize: str) -> dict:
    """Return tokens/s of both servers, greedy: float32 and F32, int8 and Q8_0."""
    slots, threads = bench.args.llama_clients, torch.get_num_threads()
    gguf = "q8_0" if quantize == "int8" else "f32"
    flags = [*bench.flags(slots), "--quantize", quantize]
    with (
        our_server(bench.checkpoint, *flags) as ours,
        llama_server(
            bench.args.llama_python, bench.model, bench.tokenizer, slots, threads, gguf
        ) as theirs,
    ):
        found = bench.speeds(
            {
                "ours": bench.server_side(ours, slots, **GREEDY),
                "llama.cpp": bench.server_side(theirs, slots, **GREEDY),
            },
            ours,
            theirs,
        )
    over = ratio(found, "ours", "llama.cpp")
    print(f"  {slots} clients over llama.cpp: {over:.2f} x", flush=True)
    return {"clients": slots, "tokens_per_sec": found, "ratio": over}


# ----------------------------------------------------------------------------------------- passes
class Heard:
    """The passes that an engine had read when events of a request came."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.submitted = engine.statistics.num_passes
        self.tokens: list[int] = []
        self.started, self.done = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started.set()
        elif isinstance(event, Token):
            self.tokens.append(self.engine.statistics.num_passes)
        elif isinstance(event, Finished):
            self.done.set()

    @property
    def gaps(self) -> list[int]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


def passes(bench: Bench, rounds: int = 20) -> dict:
    """Return passes to the first token of a short prompt, and between tokens, while long ones come.

    In each round 6 texts are being answered when a prompt that fills the context comes, and a short
    one after it.
    """
    context, short, long_of = bench.model.config.context_length, 16, 8
    engine = Engine(bench.model, slots=8, max_waiting=8)
    first, gaps = [], []
    try:
        for _ in range(rounds):
            ask = lambda tokens, new: submit(engine, bench.prompts.new(tokens), new)  # noqa: E731
            answered = [ask(short, 64) for _ in range(6)]
            for one in answered:
                one.started.wait()
            long = ask(context - long_of, long_of)
            while engine.statistics.num_passes == long.submitted and not long.done.is_set():
                time.sleep(0)
            late = ask(short, 8)
            for one in (*answered, long, late):
                one.done.wait()
                gaps += one.gaps
            first.append(late.tokens[0] - late.submitted)
    finally:
        engine.close()
    gaps.sort()
    return {
        "context": context,
        "prefill_chunk": engine.prefill_chunk,
        "to_first_token": summary(first),
        "between_tokens_p99": gaps[int(0.99 * (len(gaps) - 1))],
        "between_tokens_max": gaps[-1],
    }


def submit(engine: Engine, ids: list[int], new_tokens: int) -> Heard:
    heard = Heard(engine)
    engine.submit(Request(tuple(ids), Sampling(max_new_tokens=new_tokens)), heard)
    return heard


def first_token(bench: Bench) -> dict:
    """Return ms to the first token of a short prompt, alone and while a long prompt comes in."""
    context = bench.model.config.context_length
    with our_server(bench.checkpoint, *bench.flags(8)) as server:
        once = {"max_tokens": 1, "seed": 0}

        def short() -> float:
            body = {"prompt": bench.prompts.new(16), **once}
            return 1000 * load(server.address, [[body]]).answers[0].seconds

        def in_company() -> float:
            return 1000 * run_in_company(server, bench, context, once)

        samples = alternate_undisturbed(
            {"alone_ms": short, "while_a_long_one_comes_ms": in_company},
            4 * bench.args.repeats,
            clock=bench.clock(server),
        )
    return {name: summary(one.values) for name, one in samples.items()}


def run_in_company(server: Running, bench: Bench, context: int, once: dict) -> float:
    """Return the seconds of a short request that is sent 20 ms after a long one."""
    import asyncio

    async def both() -> float:
        long, short = Client(server.address), Client(server.address)
        coming = asyncio.ensure_future(long.ask({"prompt": bench.prompts.new(context - 1), **once}))
        await asyncio.sleep(0.02)
        answered = await short.ask({"prompt": bench.prompts.new(16), **once})
        await coming
        await long.close()
        await short.close()
        return answered.seconds

    return asyncio.run(both())


# ------------------------------------------------------------------------------------------- main
def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig)
    parser.add_argument("--name", required=True, help="results go to serving_NAME.json")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 8, 32], help="clients (default: 1 8 32)"
    )
    parser.add_argument("--llama_python", default="", help="an interpreter that has xllamacpp")
    parser.add_argument(
        "--llama_clients", type=int, default=8, help="clients of both servers (default: 8)"
    )
    for name, default, what in (
        ("new_tokens", 128, "tokens of an answer"),
        ("prompt_tokens", 32, "tokens of a prompt"),
        ("requests", 16, "least requests of a sample"),
        ("repeats", 7, "samples of a side"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--idle_seconds", type=float, default=10.0, help="how long nobody asks (default: 10)"
    )
    return parser


def bench_of(args: argparse.Namespace, folder: Path) -> Bench:
    """Return the model, its checkpoint and what is asked of it. Raise ValueError for bad flags."""
    numbers = (*args.clients, args.llama_clients, args.new_tokens, args.prompt_tokens)
    if min(*numbers, args.requests, args.repeats) < 1 or args.idle_seconds <= 0:
        raise ValueError("all numbers must be at least 1, and --idle_seconds above 0")
    config = cli.settings_from(args, ModelConfig).build(ModelConfig)
    if args.prompt_tokens + args.new_tokens > config.context_length:
        raise ValueError(
            f"--prompt_tokens {args.prompt_tokens} and --new_tokens {args.new_tokens} do not fit "
            f"the context_length {config.context_length}"
        )
    model = random_model(config)
    checkpoint, tokenizer = save(folder, model)
    prompts = Prompts(config.vocabulary_size, args.prompt_tokens)
    sizes = Sizes(args.new_tokens, args.prompt_tokens, args.requests)
    return Bench(args, model, tokenizer, checkpoint, prompts, sizes)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    torch.set_num_threads(min(torch.get_num_threads(), process.usable_cores()))
    results: dict = {"targets": TARGETS, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        bench = bench_of(args, Path(folder))
        results["parameters"] = total_parameters(bench.model.config)
        results["sizes"] = dataclasses.asdict(bench.sizes)
        for quantize in ("none", "int8"):
            print(f"{args.name} {quantize}, {results['threads']} threads", flush=True)
            results[quantize] = {"scaling": scaling(bench, quantize)}
            for what, over in results[quantize]["scaling"]["ratios"].items():
                print(f"  {what}: {over:.2f} x", flush=True)
            if args.llama_python:
                results[quantize]["llama.cpp"] = against_llama_cpp(bench, quantize)
        results["threads_compared"] = threads_compared(bench)
        results["first_token"] = first_token(bench)
        results["passes"] = passes(bench)
        print(f"  {results['first_token']} {results['passes']}", flush=True)
    save_results(f"serving_{args.name}", results)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
