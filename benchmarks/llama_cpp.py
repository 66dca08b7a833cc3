"""Generation on a CPU against llama.cpp: tokens/s of decoding and of reading a prompt, the same
weights on both sides.

    python -m benchmarks.llama_cpp --name nano --ckpt checkpoints/best.pt --context 128
    python -m benchmarks.llama_cpp --name 56m --d_model 256 --transformer_blocks 6 \\
        --num_heads 8 --num_kv_heads 4 --d_ff 336 --vocabulary_size 8192 \\
        --context_length 1152 --expert_activation swiglu --no-expert_bias --no-out_proj_bias \\
        --no-head_bias --no-use_attention_bias --rms_norm_eps 1e-6

Needs llama-cpp-python and gguf. float32 against F32, our int8 against Q8_0; one text, greedy,
caches in float32, as many threads on both sides, all in one process and in turns; a sample during
which other processes used more than 0.15 core is measured again. Of llama.cpp only its own work is
timed: Python calls it once a token, and the likeliest is found by numpy. Figures are medians; they
go to benchmarks/results/llama_cpp_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()  # as predict.py

import argparse
import copy
import dataclasses
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import alternate_undisturbed, save_results
from benchmarks.decode import (
    SEED,
    Ours,
    Run,
    Setting,
    compare_tokens,
    make_model,
    mean_of,
    speed,
    timed,
)
from config_model import ModelConfig, active_parameters, total_parameters
from model import LLM
from runtime.base import cli
from runtime.base.device import device_name
from runtime.checkpoint.read import load_model
from runtime.data.tokenizers import load_tokenizer
from runtime.inference.quantize import quantize_
from runtime.interop import gguf as interop
from runtime.kernels.choose import choose_kernels

PAIRS = {"float32": ("ours", "llama_f32"), "8 bits": ("ours_int8", "llama_q8_0")}
F32 = 0  # GGML_TYPE_F32


class LlamaCpp:
    """llama.cpp with our weights. Between two runs its cache keeps the prompt, unless `fresh`."""

    def __init__(self, model: LLM, quantize: str, folder: Path, max_tokens: int):
        import llama_cpp

        gguf, path, config = interop.import_gguf(), folder / f"{quantize}.gguf", model.config
        family, tokenizer = (
            interop.family_of(config),
            load_tokenizer("byte"),
        )  # ids go in and out: which text they are does not matter
        config, weights = interop.with_head(config, family, model.state_dict())
        entries = interop.layout(config, family, weights, quantize)
        interop.write_gguf(
            gguf,
            path,
            quantize,
            config,
            family,
            entries,
            weights,
            quantize,
            tokenizer,
            interop.vocabulary_of(gguf, tokenizer, config.vocabulary_size),
        )
        threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=max_tokens,
            n_batch=max_tokens,
            n_ubatch=max_tokens,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            type_k=F32,
            type_v=F32,
            verbose=False,
        )
        self.file_bytes = path.stat().st_size

    def next_id(self, ids: list[int]) -> int:
        """The likeliest id after some more."""
        self.llama.eval(ids)
        logits_V = np.ctypeslib.as_array(
            self.llama._ctx.get_logits_ith(-1), shape=(self.llama.n_vocab(),)
        )
        return int(logits_V.argmax())

    def run(self, prompts_BT: Tensor, new_tokens: int, fresh: bool = False) -> Run:
        (prompt,), started = prompts_BT.tolist(), time.perf_counter()
        kept = (
            0 if fresh or list(self.llama.input_ids[: len(prompt)]) != prompt else len(prompt) - 1
        )
        self.llama.n_tokens = kept

        def steps() -> Iterator[list[int]]:
            token = self.next_id(prompt[kept:])
            yield [token]
            for _ in range(new_tokens - 1):
                token = self.next_id([token])
                yield [token]

        return timed(steps(), started)


def measure(model: LLM, prompt_1T: Tensor, prefill_1T: Tensor, args: argparse.Namespace) -> dict:
    """Decoding and reading on all sides, as it is stored."""
    n, T, results = args.new_tokens, prompt_1T.shape[1], {"decode": {}, "prefill": {}}
    with tempfile.TemporaryDirectory() as folder:
        sides = {"ours": Ours(model), "ours_int8": Ours(quantize_(copy.deepcopy(model)))}
        for side in sides.values():
            side.make_room(1, T + n)
        sides |= {
            name: LlamaCpp(
                model,
                name.removeprefix("llama_"),
                Path(folder),
                max(T + n, prefill_1T.shape[1] + 1),
            )
            for _, name in PAIRS.values()
        }
        ids = {name: side.run(prompt_1T, n).ids for name, side in sides.items()}
        agreement = compare_tokens(model, prompt_1T, ids["ours"], ids["llama_f32"])
        for what, tokens, start in (
            ("decode", n - 1, lambda side: side.run(prompt_1T, n).decode_s),
            (
                "prefill",
                prefill_1T.shape[1],
                lambda side: side.run(prefill_1T, 1, fresh=True).first_s,
            ),
        ):
            functions = {
                name: mean_of(
                    lambda start=start, side=side: start(side), start(side), args.min_sample_seconds
                )
                for name, side in sides.items()
            }
            results[what] = {
                name: speed(tokens, sample)
                for name, sample in alternate_undisturbed(functions, args.repeats).items()
            }
            for title, (ours, theirs) in PAIRS.items():
                medians = [
                    results[what][name]["tokens_per_sec"]["median"] for name in (ours, theirs)
                ]
                results[what][ours]["ratio_to_llama_cpp"] = medians[0] / medians[1]
                print(
                    f"{what}, {title}: ours {medians[0]:,.0f}, llama.cpp {medians[1]:,.0f} "
                    f"tokens/s: {medians[0] / medians[1]:.2f} x",
                    flush=True,
                )
        results["sides"] = {"ours": sides["ours"].facts, "ours_int8": sides["ours_int8"].facts} | {
            name: {
                "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
                "file_bytes": sides[name].file_bytes,
            }
            for _, name in PAIRS.values()
        }
        results["sides"]["llama_f32"] |= agreement
        for _, name in PAIRS.values():
            sides[name].llama.close()
    print(f"tokens of llama_f32 that are ours: {agreement['same_tokens']}")
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/llama_cpp_NAME.json"
    )
    parser.add_argument(
        "--ckpt", help="checkpoint to run (default: random weights, of the model's flags)"
    )
    parser.add_argument(
        "--context",
        type=int,
        default=128,
        help="tokens in the cache before decoding (default: 128)",
    )
    parser.add_argument(
        "--prefill", type=int, default=256, help="tokens of a prompt that is read (default: 256)"
    )
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=48,
        help="tokens in a run, of which the first is not timed (default: 48)",
    )
    parser.add_argument(
        "--num_threads",
        type=int,
        default=0,
        help="CPU threads; 0 = the cores that this process may use (default: 0)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="samples of each side (default: 7)")
    parser.add_argument(
        "--min_sample_seconds",
        type=float,
        default=0.25,
        help="a sample is as many runs as take this long (default: 0.25)",
    )
    parser.add_argument(
        "--weight_scale",
        type=float,
        default=3.0,
        help="random weights are this many times those that training starts from (default: 3)",
    )
    cli.add_config_flags(parser, ModelConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    settings, cpu = cli.settings_from(args, ModelConfig), torch.device("cpu")
    if args.ckpt and (settings.explicit or settings.preset):
        raise ValueError("--ckpt has a model of its own: leave the model's flags out")
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError(
            "benchmarks.llama_cpp needs llama-cpp-python: pip install llama-cpp-python"
        )
    if (
        min(args.context, args.prefill, args.repeats) < 1
        or args.new_tokens < 2
        or args.min_sample_seconds <= 0
        or args.weight_scale <= 0
        or args.num_threads < 0
    ):
        raise ValueError(
            "context, prefill and repeats must be at least 1, new_tokens at least 2, "
            "min_sample_seconds and weight_scale above 0, num_threads not below 0"
        )
    torch.set_num_threads(args.num_threads or min(torch.get_num_threads(), process.usable_cores()))
    if args.ckpt:
        model = load_model(args.ckpt)[0].requires_grad_(False)
        choose_kernels(model, cpu, torch.float32)
    else:
        config = settings.build(ModelConfig)
        interop.family_of(config)
        model = make_model(
            Setting(
                config, cpu, torch.float32, [], {}, [1], [], [], [], "random ids", torch.empty(0)
            ),
            args.weight_scale,
        )
    config = model.config
    if max(args.context + args.new_tokens, args.prefill) > config.context_length:
        raise ValueError(
            f"context {args.context} and new_tokens {args.new_tokens}, or prefill "
            f"{args.prefill}, do not fit the context_length {config.context_length}"
        )
    ids = torch.randint(
        config.vocabulary_size,
        (1, max(args.context, args.prefill)),
        generator=torch.Generator().manual_seed(SEED),
    )
    print(
        f"{total_parameters(config):,} parameters, {active_parameters(config):,} active; "
        f"{torch.get_num_threads()} threads"
    )
    results = {
        "device": device_name(cpu),
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "model": dataclasses.asdict(config),
        "parameters": total_parameters(config),
        "active_parameters": active_parameters(config),
        "weights": "checkpoint" if args.ckpt else f"random, scale {args.weight_scale}",
        "context": args.context,
        "prefill_tokens": args.prefill,
        "new_tokens": args.new_tokens,
    }
    save_results(
        f"llama_cpp_{args.name}",
        results | measure(model, ids[:, : args.context], ids[:, : args.prefill], args),
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
