"""Generation on a CPU against llama.cpp: tokens/s of decoding and of reading a prompt, the same
weights on both sides.

    python -m benchmarks.llama_cpp --name nano --ckpt checkpoints/best.pt --context 128
    python -m benchmarks.llama_cpp --name 56m --d_model 256 --transformer_blocks 6 \\
        --num_heads 8 --num_kv_heads 4 --d_ff 336 --vocabulary_size 8192 \\
        --context_length 1152 --expert_activation swiglu --no-expert_bias --no-out_proj_bias \\
        --no-head_bias --no-use_attention_bias --rms_norm_eps 1e-6

Needs llama-cpp-python and gguf. float32 against F32, our int8 against Q8_0, our int4 against Q4_0;
one text, then as many at a time as --batch_sizes says; greedy, caches in float32, as many threads
on both sides, all in one process and in turns; a sample during which other processes used more than
0.15 core is measured again. llama.cpp is called once for all texts' tokens, without its flash
attention, which rounds otherwise than float32 does, and numpy finds the likeliest. Figures are
medians; they go to benchmarks/results/llama_cpp_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()  # as predict.py

import argparse
import copy
import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
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

# By what weights are: our side, and llama.cpp's with the kind of its file.
PAIRS = {
    "float32": ("ours", "llama_f32"),
    "8 bits": ("ours_int8", "llama_q8_0"),
    "4 bits": ("ours_int4", "llama_q4_0"),
}
F32 = 0  # GGML_TYPE_F32
# What its caches are rounded up to, for each text.
PADDING = 256


@functools.cache
def quiet() -> None:
    """Start llama.cpp, and let it say errors only."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp._logger.set_verbose(False)


class LlamaCpp:
    """llama.cpp with our weights. Between two runs its caches keep the prompts, unless `fresh`.

    rows: texts at a time, each with a cache of its own.
    """

    def __init__(self, path: Path, rows: int, max_tokens: int, longest_prompt: int):
        import llama_cpp

        self.api, threads = llama_cpp, torch.get_num_threads()
        quiet()
        of_model = llama_cpp.llama_model_default_params()
        of_model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), of_model)
        if not self.model:
            raise ValueError(f"llama.cpp cannot read {path.name}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * (-(-max_tokens // PADDING) * PADDING)
        settings.n_batch = settings.n_ubatch = rows * longest_prompt
        settings.n_seq_max, settings.kv_unified = rows, False
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"llama.cpp has no room for {rows} texts of {max_tokens} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        self.kept: list[list[int]] = []

    def next_ids(self, rows: list[list[int]], position: int) -> list[int]:
        """Return the likeliest id of each text after some more, from a position on."""
        batch, at = self.batch, 0
        for row, ids in enumerate(rows):
            for offset, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = offset == len(ids) - 1
                at += 1
        batch.n_tokens = at
        if code := self.api.llama_decode(self.context, batch):
            raise ValueError(f"llama.cpp's llama_decode ended with {code}")
        logits = self.api.llama_get_logits(self.context)
        logits_BV = np.ctypeslib.as_array(logits, shape=(len(rows), self.vocabulary_size))
        return logits_BV.argmax(axis=1).tolist()

    def run(self, prompts_BT: Tensor, new_tokens: int, fresh: bool = False) -> Run:
        prompts, started = prompts_BT.tolist(), time.perf_counter()
        kept = 0 if fresh or self.kept != prompts else len(prompts[0]) - 1
        # All that comes after it, of all texts.
        self.api.llama_memory_seq_rm(self.memory, -1, kept, -1)
        self.kept = prompts

        def steps() -> Iterator[list[int]]:
            ids = self.next_ids([prompt[kept:] for prompt in prompts], kept)
            yield ids
            for position in range(len(prompts[0]), len(prompts[0]) + new_tokens - 1):
                ids = self.next_ids([[token] for token in ids], position)
                yield ids

        return timed(steps(), started)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def write_files(model: LLM, folder: Path) -> dict[str, Path]:
    """Write a model for llama.cpp; return the files by PAIRS' names.

    Its F32 and Q8_0 files are our exporter's. Of the first, llama.cpp's own quantizer makes the
    Q4_0 file, all matrices in that form but the routers'.
    """
    import llama_cpp

    quiet()
    gguf, config, paths = interop.import_gguf(), model.config, {}
    # Ids go in and out: which text they are does not matter.
    family, tokenizer = interop.family_of(config), load_tokenizer("byte")
    config, weights = interop.with_head(config, family, model.state_dict())
    vocabulary = interop.vocabulary_of(gguf, tokenizer, config.vocabulary_size)
    for kind in ("f32", "q8_0"):
        path = paths[f"llama_{kind}"] = folder / f"{kind}.gguf"
        entries = interop.layout(config, family, weights, kind)
        given = (config, family, entries, weights, kind, tokenizer, vocabulary)
        interop.write_gguf(gguf, path, kind, *given)
    paths["llama_q4_0"] = folder / "q4_0.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    names = [str(paths[name]).encode() for name in ("llama_f32", "llama_q4_0")]
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(settings)):
        raise ValueError("llama.cpp cannot make a Q4_0 file of this model")
    return paths


def measure(model: LLM, prompts_BT: Tensor, prefill_1T: Tensor, args: argparse.Namespace) -> dict:
    """Decoding and reading on all sides, as it is stored. prompts_BT: as many as texts at most."""
    results: dict = {"decode": {}, "prefill": {}, "batched": {}}
    ours = {
        "ours": Ours(model),
        "ours_int8": Ours(quantize_(copy.deepcopy(model))),
        "ours_int4": Ours(quantize_(copy.deepcopy(model), "int4")),
    }
    T, n = prompts_BT.shape[1], args.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(model, Path(folder))
        results["sides"] = {name: side.facts for name, side in ours.items()} | {
            name: {
                "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
                "file_bytes": path.stat().st_size,
            }
            for name, path in paths.items()
        }
        for rows in args.batch_sizes:
            longest = max(T, prefill_1T.shape[1] if rows == 1 else 0)
            theirs = {
                name: LlamaCpp(path, rows, max(T + n, longest + 1), longest)
                for name, path in paths.items()
            }
            for side in ours.values():
                side.make_room(rows, T + n)
            sides, given = ours | theirs, prompts_BT[:rows]
            ids = {name: side.run(given, n).ids for name, side in sides.items()}
            agreement = compare_tokens(model, given, ids["ours"], ids["llama_f32"])
            print(f"tokens of llama_f32 that are ours: {agreement['same_tokens']}")

            def decoding(side, given=given) -> float:
                return side.run(given, n).decode_s

            def reading(side) -> float:
                return side.run(prefill_1T, 1, fresh=True).first_s

            found = in_turns(f"decoding, {rows} at a time", sides, decoding, rows * (n - 1), args)
            if rows == 1:
                results["sides"]["llama_f32"] |= agreement
                results["decode"] = found
                name, length = "a prompt", prefill_1T.shape[1]
                results["prefill"] = in_turns(name, sides, reading, length, args)
            else:
                results["batched"][str(rows)] = {"sides": found, "agreement": agreement}
            for side in theirs.values():
                side.close()
    return results


def in_turns(
    what: str,
    sides: dict[str, Ours | LlamaCpp],
    seconds: Callable[[Ours | LlamaCpp], float],
    tokens: int,
    args: argparse.Namespace,
) -> dict[str, dict]:
    """Return the speeds of all sides, taken in turns, and the ratios of pairs."""
    functions = {
        name: mean_of(functools.partial(seconds, side), seconds(side), args.min_sample_seconds)
        for name, side in sides.items()
    }
    found = {
        name: speed(tokens, sample)
        for name, sample in alternate_undisturbed(functions, args.repeats).items()
    }
    for title, (ours, theirs) in PAIRS.items():
        a, b = (found[name]["tokens_per_sec"]["median"] for name in (ours, theirs))
        found[ours]["ratio_to_llama_cpp"] = a / b
        print(
            f"{what}, {title}: ours {a:,.0f}, llama.cpp {b:,.0f} tokens/s: {a / b:.2f} x",
            flush=True,
        )
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/llama_cpp_NAME.json"
    )
    parser.add_argument(
        "--ckpt", help="checkpoint to run (default: random weights, of the model's flags)"
    )
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=[1, 32],
        help="texts at a time; the first is 1 (default: 1 32)",
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
        min(args.context, args.prefill, args.repeats, *args.batch_sizes) < 1
        or args.batch_sizes[0] != 1
        or args.new_tokens < 2
        or args.min_sample_seconds <= 0
        or args.weight_scale <= 0
        or args.num_threads < 0
    ):
        raise ValueError(
            "context, prefill, repeats and batch_sizes must be at least 1, the first of "
            "batch_sizes 1, new_tokens at least 2, "
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
        (max(args.batch_sizes), max(args.context, args.prefill)),
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
        results | measure(model, ids[:, : args.context], ids[:1, : args.prefill], args),
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
