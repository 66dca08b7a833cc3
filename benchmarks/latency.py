"""One text at a time: milliseconds of a token by CUDA graph and compiled, and of the first token
after a prompt of a new length.

    python -m benchmarks.latency --name h100_no_table --no-use_attention_bias
    python -m benchmarks.latency --name cpu --preset plain-nano --vocabulary_size 512

Takes every flag of the model, which has random weights. In this order: decoding without the
compiler (on a GPU one CUDA graph), first tokens, decoding with the compiler, which takes longest to
begin. cuDNN plans an attention for each length that it has not met, so each way to read a prompt
(the decoder as it is, the model with cuDNN allowed, the model without) is given lengths of its own,
and then the same lengths again. Each figure goes to benchmarks/results/latency_NAME.json as soon as
it is there.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks import decode
from benchmarks.measures import Measures
from config_model import ModelConfig, active_parameters
from model import LLM
from runtime.base import cli
from runtime.base.device import device_name, peak_memory_bytes, synchronize

WEIGHT_SCALE = 3.0
REPEATS = 3


def make_setting(args: argparse.Namespace) -> decode.Setting:
    """benchmarks.decode's setting for one text, its checks included.

    ValueError for what does not fit the model.
    """
    args.variants, args.batch_sizes, args.contexts, args.hf_batches = (
        ["ours"],
        [1],
        [args.context],
        [],
    )
    args.prefill, args.data_dir, args.num_threads, args.repeats = (
        prompt_lengths(args),
        None,
        0,
        REPEATS,
    )
    args.weight_scale, args.min_sample_seconds, args.val_windows = WEIGHT_SCALE, 1e-6, 1
    return decode.make_setting(args)


def prompt_lengths(args: argparse.Namespace) -> list[int]:
    """Lengths that nothing before has met, odd steps apart: prompts for each of the three ways to
    read one.
    """
    first = args.context // 2 + 1
    step = max(1, args.context // (3 * args.prompts + 3)) | 1
    return [first + step * i for i in range(3 * args.prompts)]


def measure_decoding(
    out: Measures, what: str, side: decode.Ours, setting: decode.Setting, new_tokens: int
) -> list[int]:
    """Milliseconds of a token, the seconds before the first run is through, and the share of the
    memory's speed; the ids.
    """
    prompt_1T, times = setting.prompts_BT[:1, : setting.contexts[0]], []
    started = time.perf_counter()
    side.make_room(1, setting.contexts[0] + new_tokens)
    side.run(prompt_1T, new_tokens)
    out.add(f"{what} first run", time.perf_counter() - started, "s")
    for _ in range(REPEATS):
        run = side.run(prompt_1T, new_tokens)
        times.append(run.decode_s / (new_tokens - 1))
        out.add(f"{what} token", 1000 * statistics.median(times), "ms")
        out.add(f"{what} speed", 1 / statistics.median(times), "tokens/s")
    keys = setting.contexts[0] + new_tokens / 2
    num_bytes = decode.weight_bytes_per_token(side.model) + decode.context_bytes_per_token(
        setting.config, keys, setting.dtype.itemsize
    )
    out.add(f"{what} bandwidth", num_bytes / statistics.median(times) / 1e9, "GB/s")
    return run.ids[0]


@contextlib.contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """Inside, PyTorch's attention may take cuDNN's kernel, or not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def pytorchs_attention(model: LLM):
    """PyTorch's own choice of a kernel: ours never takes cuDNN where nothing is trained."""
    attentions = [block.attention for block in model.layers]
    ours = [attention.device_attention for attention in attentions]
    for attention in attentions:
        attention.device_attention = None
    try:
        yield
    finally:
        for attention, choice in zip(attentions, ours, strict=True):
            attention.device_attention = choice


def first_token_ways(side: decode.Ours, model: LLM) -> dict[str, Callable[[torch.Tensor], None]]:
    """Ways to read a prompt [1, T] up to the logits of the token after it."""

    def plainly(allowed: bool, prompt_1T: torch.Tensor) -> None:
        with cudnn_attention(allowed), pytorchs_attention(model), torch.inference_mode():
            model(
                prompt_1T.to(model.embed.weight.device), last_token_only=True
            ).logits.argmax().item()

    return {
        "decoder": lambda prompt_1T: side.run(prompt_1T, 1, fresh=True),
        "cudnn": lambda prompt_1T: plainly(True, prompt_1T),
        "no cudnn": lambda prompt_1T: plainly(False, prompt_1T),
    }


def measure_first_tokens(
    out: Measures, side: decode.Ours, model: LLM, setting: decode.Setting, prompts: int
) -> None:
    """Median milliseconds of a first token after prompts of new lengths, and after the same lengths
    again, in each way.
    """
    for i, (way, read) in enumerate(first_token_ways(side, model).items()):
        lengths = setting.prompt_lengths[i * prompts : (i + 1) * prompts]
        for times in ("new", "again"):
            seconds = []
            for length in lengths:
                synchronize(setting.device)
                started = time.perf_counter()
                read(setting.prompts_BT[:1, :length])
                synchronize(setting.device)
                seconds.append(time.perf_counter() - started)
            out.results.setdefault("first_token_ms", {})[f"{way} {times}"] = [
                1000 * s for s in seconds
            ]
            out.add(f"first token {way} {times}", 1000 * statistics.median(seconds), "ms")


def measure(out: Measures, setting: decode.Setting, args: argparse.Namespace) -> None:
    """Everything, what is certain first."""
    model = decode.make_model(setting, WEIGHT_SCALE)
    side = decode.Ours(model)
    ids: list[int] = []

    def decoding(what: str, side: decode.Ours) -> float:
        found = measure_decoding(out, what, side, setting, args.new_tokens)
        ids[:] = ids or found
        return sum(a == b for a, b in zip(ids, found, strict=True))

    out.attempt("graph tokens", f"of {args.new_tokens}", lambda: decoding("graph", side))
    try:
        measure_first_tokens(out, side, model, setting, args.prompts)
    except Exception as error:
        out.fail("first token", error)
    if args.compiled:
        out.attempt(
            "compiled same tokens",
            f"of {args.new_tokens}",
            lambda: decoding("compiled", decode.Ours(model, compile=True)),
        )
    if peak := peak_memory_bytes(setting.device):
        out.add("memory", peak / 2**30, "GiB")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/latency_NAME.json"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=256,
        help="tokens in the cache before decoding (default: 256)",
    )
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=64,
        help="tokens of a run, of which the first is not timed (default: 64)",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=5,
        help="new prompt lengths for each way to read one (default: 5)",
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also with the compiler, which only a CUDA graph has use for (default: True)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float32"),
        help="of weights and arithmetic (default: bfloat16)",
    )
    cli.add_config_flags(parser, ModelConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.prompts < 1:
        raise ValueError(f"prompts must be at least 1, not {args.prompts}")
    setting = make_setting(args)
    out = Measures(
        f"latency_{args.name}",
        device=device_name(setting.device),
        dtype=args.dtype,
        context=args.context,
        new_tokens=args.new_tokens,
        model=dataclasses.asdict(setting.config),
        active_parameters=active_parameters(setting.config),
    )
    measure(out, setting, args)
    return 1 if out.failed else 0


if __name__ == "__main__":
    cli.run_main(main)
