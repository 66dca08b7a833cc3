"""Generation: tokens/s of decoding and of reading a prompt, ours and others', and how near that is
to the speed of the memory.

    python -m benchmarks.decode --name cpu_56m --d_model 256 --transformer_blocks 6 \\
        --num_heads 8 --num_kv_heads 4 --d_ff 336 --vocabulary_size 8192 \\
        --context_length 1152 --expert_activation swiglu --no-expert_bias --no-out_proj_bias \\
        --no-head_bias --no-use_attention_bias --rms_norm_eps 1e-6
    python -m benchmarks.decode --name modern_gpu --preset gptoss-modern --dtype bfloat16 \\
        --variants ours ours_int8 ours_compiled plain hf_grouped hf_compiled
    python -m benchmarks.decode --name story --variants --launch checkpoints/latest.pt \\
        --perplexity checkpoints/latest.pt data      # no speeds, only these

Takes every flag of the model. All sides are in one process, have the same random weights, prompts,
arithmetic and threads, draw greedily and take turns; a sample during which other processes used
more than 0.15 core is measured again (CPU). In float32 all must draw the same tokens, except where
two logits are as good as equal. Figures are medians; they go to
benchmarks/results/decode_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()  # as predict.py

import argparse
import copy
import dataclasses
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines import HuggingFaceMoE, build_hf, check_hf
from benchmarks.common import REPO, Samples, alternate_undisturbed, save_results, summary
from config_model import ModelConfig, active_parameters, total_parameters
from model import LLM, generate
from runtime.base import cli
from runtime.base.device import (
    choose_device,
    choose_dtype,
    device_name,
    explained_out_of_memory,
    release_memory,
    synchronize,
)
from runtime.checkpoint.read import load_model
from runtime.data.loader import validation_batches
from runtime.data.shards import open_data
from runtime.inference import decoder as inference
from runtime.inference.quantize import KINDS, quantize_
from runtime.kernels.choose import choose_kernels

VARIANTS = {
    "ours": "runtime/inference/decoder.py: native code on a CPU, a CUDA graph on a GPU",
    "ours_int8": (
        "the same with weights of experts, attention and head in 8 bits "
        "(runtime/inference/quantize.py)"
    ),
    "ours_int4": "the same in 4 bits",
    "ours_torch": "the same without the native code (CPU)",
    "ours_compiled": "the same with the CUDA graph's operations compiled (GPU)",
    "plain": "model.generate",
    "hf_eager": (
        "transformers' generate() of Mixtral (Qwen3-MoE with qk_norm), experts_implementation eager"
    ),
    "hf_grouped": (
        "the same, grouped_mm (on a GPU transformers takes batched_mm for all tokens after the "
        "first)"
    ),
    "hf_batched": (
        "the same, batched_mm for all tokens after the first, grouped_mm for the prompt, for "
        "which batched_mm takes 20 times as long"
    ),
    "hf_compiled": (
        "hf_batched with a static cache and a compiled forward pass for all tokens after the first"
    ),
}
# What weights are packed to.
PACKED = {"ours_int8": "int8", "ours_int4": "int4"}
ONLY_ON = {"ours_torch": "cpu", "ours_compiled": "cuda"}
HF_EXPERTS = {
    "hf_eager": ("eager", "eager"),
    "hf_grouped": ("grouped_mm", "grouped_mm"),
    "hf_batched": ("grouped_mm", "batched_mm"),
    "hf_compiled": ("grouped_mm", "batched_mm"),
}  # for the prompt, for each token after it
SAME_PROMPT_CODE = (
    "ours_compiled",
    "hf_batched",
    "hf_compiled",
)  # as ours and hf_grouped, which are measured
SEED = 0
MOST_GAP = 1e-4  # between two logits that rounding may put in another order
BANDWIDTH_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
TIMERS = ("copy", "read")


# --------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Setting:
    """What is the same for all sides."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    names: list[str]  # sides, in order
    left_out: dict[str, str]  # of the default ones: why
    batch_sizes: list[int]
    contexts: list[int]
    prompt_lengths: list[int]
    hf_batches: list[int]
    tokens: str  # where the prompts come from
    prompts_BT: Tensor  # int64, on the CPU; a prompt is the beginning of a row


def make_setting(args: argparse.Namespace) -> Setting:
    """Flags -> setting. ValueError for what cannot be measured."""
    for name in ("repeats", "new_tokens", "val_windows"):
        if getattr(args, name) < (least := 2 if name == "new_tokens" else 1):
            raise ValueError(f"{name} must be at least {least}, not {getattr(args, name)}")
    if args.min_sample_seconds <= 0 or args.weight_scale <= 0 or args.num_threads < 0:
        raise ValueError(
            "min_sample_seconds and weight_scale must be above 0, and num_threads not below it"
        )
    settings = cli.settings_from(args, ModelConfig)
    config, device = settings.build(ModelConfig), choose_device(args.device)
    dtype = choose_dtype(
        "float32" if args.dtype == "auto" and device.type == "cpu" else args.dtype, device
    )
    val, vocabulary = None, config.vocabulary_size
    if args.data_dir:
        _, val = open_data(args.data_dir)
        vocabulary = val.vocabulary_size
        if "vocabulary_size" not in settings.explicit:
            config = replace(config, vocabulary_size=vocabulary)
        if config.vocabulary_size < vocabulary:
            raise ValueError(
                f"vocabulary_size {config.vocabulary_size:,} is smaller than the data's "
                f"{vocabulary:,}: leave --vocabulary_size out"
            )
    contexts = [context or config.context_length - args.new_tokens for context in args.contexts]
    for context in contexts:
        if not 0 < context <= config.context_length - args.new_tokens:
            raise ValueError(
                f"contexts {context} and new_tokens {args.new_tokens} do not fit the "
                f"context_length {config.context_length}: lower one of the first two, or raise "
                "the last"
            )
    for length in args.prefill:
        if not 0 < length <= config.context_length:
            raise ValueError(
                f"prefill {length} must be from 1 to context_length {config.context_length}"
            )
    if min(args.batch_sizes, default=1) < 1:
        raise ValueError(f"batch_sizes must be at least 1, not {min(args.batch_sizes)}")
    if missing := set(args.hf_batches or []) - set(args.batch_sizes):
        raise ValueError(
            f"hf_batches {min(missing)} is not among batch_sizes: "
            f"{', '.join(map(str, args.batch_sizes)) or 'none'}"
        )
    names, left_out = choose_variants(args.variants, config, device)
    rows, length = max(args.batch_sizes, default=1), max([*contexts, *args.prefill], default=1)
    if val is None:
        prompts_BT = torch.randint(
            vocabulary, (rows, length), generator=torch.Generator().manual_seed(SEED)
        )
    elif val.num_tokens < rows * length:
        raise ValueError(
            f"{val.folder} has {val.num_tokens:,} tokens, and {rows} prompts of {length} need "
            f"{rows * length:,}: lower batch_sizes or contexts, or leave data_dir out"
        )
    else:
        prompts_BT = torch.from_numpy(val.read(0, rows * length)).view(rows, length)
    return Setting(
        config,
        device,
        dtype,
        names,
        left_out,
        args.batch_sizes,
        contexts,
        args.prefill,
        [1] if args.hf_batches is None else args.hf_batches,
        "random ids" if val is None else f"validation text ({val.tokenizer_state['name']})",
        prompts_BT,
    )


def choose_variants(
    names: list[str] | None, config: ModelConfig, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """(the sides to measure, why others of the default ones are not).

    ValueError for a name that there is not, or not on this device.
    """
    if names is not None:
        for name in names:
            if name not in VARIANTS:
                raise ValueError(f"unknown variant {name!r}: there are {', '.join(VARIANTS)}")
            if ONLY_ON.get(name, device.type) != device.type:
                raise ValueError(
                    f"variant {name} is for {ONLY_ON[name]}, and this runs on {device.type}: "
                    "leave it out"
                )
        return list(dict.fromkeys(names)), {}
    names, left_out = (
        [name for name in VARIANTS if ONLY_ON.get(name, device.type) == device.type],
        {},
    )
    try:
        check_hf(config)
    except ValueError as error:
        left_out = {name: str(error) for name in names if name.startswith("hf")}
    return [name for name in names if name not in left_out], left_out


def make_model(setting: Setting, weight_scale: float) -> LLM:
    """A model with random weights, larger than those that training starts from: with small ones a
    text soon repeats itself, and the experts with it.
    """
    torch.manual_seed(SEED)
    with setting.device:
        model = LLM(setting.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(weight_scale)
    model = model.to(setting.dtype).eval().requires_grad_(False)
    choose_kernels(model, setting.device, setting.dtype)
    return model


# ---------------------------------------------------------------------------------------- the sides
class Run(NamedTuple):
    """One generation of n tokens for each of B prompts."""

    ids: list[list[int]]  # [B][n]
    first_s: float  # seconds from the call to the first token
    decode_s: float  # seconds from the first token to the last: n - 1 steps


def timed(steps: Iterable[list[int]], started: float) -> Run:
    """The run whose steps give an id for each row, as they come."""
    drawn, stamps = [], []
    for ids_B in steps:
        stamps.append(time.perf_counter())
        drawn.append(ids_B)
    return Run(
        [list(row) for row in zip(*drawn, strict=True)], stamps[0] - started, stamps[-1] - stamps[0]
    )


class Ours:
    """runtime/inference/decoder.py. Between two runs its caches keep the prompt, unless `fresh`."""

    def __init__(self, model: LLM, **options):
        self.model, self.decoder = model, inference.Decoder(model, **options)
        self.facts = {"native": self.decoder.native is not None} | (
            {"why_not_native": self.decoder.why_not_native} if self.decoder.native is None else {}
        )

    def make_room(self, rows: int, tokens: int) -> None:
        """Caches for texts of so many tokens."""
        self.texts = self.decoder.texts(rows, tokens)

    def run(self, prompts_BT: Tensor, new_tokens: int, fresh: bool = False) -> Run:
        prompts, started = prompts_BT.tolist(), time.perf_counter()
        if fresh:
            self.make_room(len(prompts), prompts_BT.shape[1] + new_tokens - 1)
        steps = inference.generate(self.decoder, self.texts, prompts, new_tokens, temperature=0)
        return timed(([token for _, token in step] for step in steps), started)


class Plain:
    """model.generate, whose cache is new in every run."""

    facts: dict = {}

    def __init__(self, model: LLM):
        self.model = model

    def make_room(self, rows: int, tokens: int) -> None:
        pass

    def run(self, prompts_BT: Tensor, new_tokens: int, fresh: bool = True) -> Run:
        ids_BT, started = prompts_BT.to(self.model.embed.weight.device), time.perf_counter()
        return timed(
            (ids_B.tolist() for ids_B in generate(self.model, ids_BT, new_tokens, temperature=0)),
            started,
        )


class HuggingFace:
    """transformers' generate(), whose cache is new in every run.

    Sides share the module and say how it is to compute.
    """

    facts: dict = {}

    def __init__(
        self,
        hf: HuggingFaceMoE,
        model: LLM,
        prompt_experts: str,
        token_experts: str,
        compiled: bool,
    ):
        self.hf, self.model, self.prompt_experts, self.token_experts, self.compiled = (
            hf.model,
            model,
            prompt_experts,
            token_experts,
            compiled,
        )

    def make_room(self, rows: int, tokens: int) -> None:
        self.room = tokens

    def options(self) -> dict:
        if not self.compiled:
            return {}
        import transformers

        # On a GPU its own choice of mode; on a CPU it compiles only if told so, and there is no
        # CUDA graph to make.
        compile_config = (
            transformers.CompileConfig()
            if self.hf.device.type == "cuda"
            else transformers.CompileConfig(mode="default")
        )
        compile_config._compile_all_devices = True
        return {
            "cache_implementation": "static",
            "max_cache_len": self.room,
            "compile_config": compile_config,
        }

    def run(self, prompts_BT: Tensor, new_tokens: int, fresh: bool = True) -> Run:
        ids_BT, clock, options = prompts_BT.to(self.hf.device), Clock(), self.options()
        self.hf.set_experts_implementation(self.prompt_experts)
        if self.token_experts != self.prompt_experts:
            clock.at_first_token = lambda: self.hf.set_experts_implementation(self.token_experts)
        started = time.perf_counter()
        self.hf.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
            **options,
        )
        return Run(
            [list(row) for row in zip(*clock.drawn, strict=True)],
            clock.stamps[0] - started,
            clock.stamps[-1] - clock.stamps[0],
        )


class Clock:
    """A `streamer` of generate(), which hands it the prompt and then each token as soon as it is on
    the host, where generate() needs it anyway.
    """

    def __init__(self):
        self.at_first_token, self.drawn, self.stamps, self.has_prompt = None, [], [], False

    def put(self, ids: Tensor) -> None:
        if not self.has_prompt:
            self.has_prompt = True
            return
        if self.at_first_token and not self.drawn:
            self.at_first_token()
        self.drawn.append(ids.tolist())
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def build_sides(
    setting: Setting, model: LLM
) -> tuple[dict[str, Ours | Plain | HuggingFace], dict[str, str]]:
    """(the sides by name, why others could not be built)."""
    sides, failed = {}, {}
    shared: list[HuggingFaceMoE] = []

    def build(name: str) -> Ours | Plain | HuggingFace:
        if name == "plain":
            return Plain(model)
        if name.startswith("ours"):
            kind = PACKED.get(name)
            of = quantize_(copy.deepcopy(model), kind) if kind else model
            return Ours(of, native=name != "ours_torch", compile=name == "ours_compiled")
        if not shared:
            shared.append(make_hf(setting, model))
        return HuggingFace(shared[0], model, *HF_EXPERTS[name], compiled=name == "hf_compiled")

    for name in setting.names:
        try:
            sides[name] = build(name)
        except Exception as error:
            failed[name] = told(error)
    return sides, failed


def make_hf(setting: Setting, model: LLM) -> HuggingFaceMoE:
    """Hugging Face's model with our weights, ready for generate()."""
    with setting.device:
        hf = build_hf(
            replace(setting.config, aux_loss_coef=0.0), "eager"
        )  # 0: it would compute the load-balance loss at every token
    hf.load_from(model)
    hf.to(setting.device, setting.dtype).eval().requires_grad_(False)
    hf.model.config.use_cache = True
    hf.model.generation_config.eos_token_id, hf.model.generation_config.pad_token_id = None, 0
    import transformers

    transformers.logging.set_verbosity_error()
    return hf


def told(error: Exception) -> str:
    """An exception in one line; a user's mistake without its kind. The rest goes to stderr."""
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
    return " ".join(
        str(error).split()
        if isinstance(error, ValueError)
        else f"{type(error).__name__}: {error}".split()
    )


# ---------------------------------------------------------------------------------- the same tokens
def first_differences(reference: list[list[int]], ids: list[list[int]]) -> list[int | None]:
    """Of each row: the first place where the two differ, or None."""
    return [
        next((i for i, (a, b) in enumerate(zip(r, o, strict=True)) if a != b), None)
        for r, o in zip(reference, ids, strict=True)
    ]


@torch.no_grad()
def compare_tokens(
    model: LLM, prompts_BT: Tensor, reference: list[list[int]], ids: list[list[int]]
) -> dict:
    """How far a continuation agrees with the reference's. first_difference_gap: at the first
    difference of a row, how much less than the largest logit of the plain model the lesser of the
    two tokens has; the largest over rows. After that it is another text.
    """
    same, gaps = 0, []
    for prompt_T, r, o, at in zip(
        prompts_BT.to(model.embed.weight.device),
        reference,
        ids,
        first_differences(reference, ids),
        strict=True,
    ):
        same += len(r) if at is None else at
        if at is not None:
            logits_V = (
                model(
                    torch.cat((prompt_T, prompt_T.new_tensor(r[:at])))[None], last_token_only=True
                )
                .logits[0, -1]
                .float()
            )
            gaps.append((logits_V.max() - logits_V[[r[at], o[at]]].min()).item())
    return {"same_tokens": f"{same} of {sum(map(len, reference))}"} | (
        {"first_difference_gap": max(gaps)} if gaps else {}
    )


# --------------------------------------------------------------------------------------- the memory
def weight_bytes_per_token(model: LLM) -> int:
    """Bytes of weights that one token reads: its top_k experts, one row of the embedding, and all
    of the rest but the position table.
    """
    c, total = model.config, 0
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name == "embed.weight":
            total += tensor.nbytes // c.vocabulary_size + (
                tensor.nbytes if model.out_head.weight is None else 0
            )  # tied: it is the head too
        elif ".experts." in name:
            total += tensor.nbytes * c.top_k // c.num_experts
        elif not name.endswith("attention_bias"):
            total += tensor.nbytes
    return total


def context_bytes_per_token(config: ModelConfig, keys: float, element_bytes: int) -> float:
    """Bytes that one token reads of `keys` tokens before it and itself: keys, values, and its row
    of the position table, each block inside its window.
    """
    each = (
        2 * config.num_kv_heads * config.attention_head_dim
        + config.num_heads * config.use_attention_bias
    )
    return (
        element_bytes
        * each
        * sum(min(keys, config.window(block) or keys) for block in range(config.transformer_blocks))
    )


def repeated(
    function: Callable[[], object], min_seconds: float, device: torch.device
) -> Callable[[], float]:
    """A function that returns mean seconds of so many calls as fill `min_seconds`, the device's
    work included.
    """

    def seconds(times: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(times):
            function()
        synchronize(device)
        return (time.perf_counter() - started) / times

    seconds(1)
    times = math.ceil(min_seconds / seconds(1))
    return lambda: seconds(times)


def bandwidth_timers(device: torch.device, min_seconds: float) -> dict[str, Callable[[], float]]:
    """Seconds per byte of a copy (which reads and writes) and of a sum (which reads) of a tensor
    that no cache holds.
    """
    source, target = (
        torch.ones(BANDWIDTH_BYTES.get(device.type, 1 << 28) // 4, device=device) for _ in range(2)
    )
    copies, sums = (
        repeated(lambda: target.copy_(source), min_seconds, device),
        repeated(source.sum, min_seconds, device),
    )
    return {"copy": lambda: copies() / (2 * source.nbytes), "read": lambda: sums() / source.nbytes}


# -------------------------------------------------------------------------------------------- speed
def in_turns(
    functions: dict[str, Callable[[], float]], setting: Setting, repeats: int
) -> dict[str, Samples]:
    limit = (
        {} if setting.device.type == "cpu" else {"most_foreign_cores": math.inf}
    )  # a GPU does not mind a busy core
    return alternate_undisturbed(functions, repeats, **limit)


def warm_up(sides: dict, start: Callable[[object], Run], cell: dict) -> dict[str, Run]:
    """Each side's second run: the first may compile.

    What fails is noted in the cell, and costs the others nothing.
    """
    runs = {}
    for name, side in sides.items():
        try:
            start(side)
            runs[name] = start(side)
        except Exception as error:
            cell["sides"][name] = {"failed": told(error)}
    return runs


def mean_of(start: Callable[[], float], first: float, min_seconds: float) -> Callable[[], float]:
    """A sample: the mean of as many runs as take min_seconds, if one takes `first`."""
    times = math.ceil(min_seconds / max(first, 1e-9))
    return lambda: statistics.fmean(start() for _ in range(times))


def speed(tokens: int, sample: Samples) -> dict:
    """What is stored of samples of seconds, in which so many tokens were made."""
    return {
        "tokens_per_sec": summary([tokens / seconds for seconds in sample.values]),
        "samples": len(sample.values),
        "discarded_samples": sample.discarded,
        "disturbed": sample.disturbed,
    }


def add_ratios(sides: dict[str, dict]) -> None:
    """Each side's median over that of Hugging Face's best, where that was measured."""
    speeds = {
        name: side["tokens_per_sec"]["median"]
        for name, side in sides.items()
        if "tokens_per_sec" in side
    }
    if best := max(
        (value for name, value in speeds.items() if name.startswith("hf")), default=None
    ):
        for name, value in speeds.items():
            sides[name]["ratio_to_hf"] = value / best


def measure_decode(
    sides: dict,
    model: LLM,
    setting: Setting,
    batch_size: int,
    context: int,
    args: argparse.Namespace,
) -> dict:
    """Decoding `batch_size` texts from `context` tokens on, as it is stored. model: the plain one,
    which says how near two tokens are.
    """
    n, prompts_BT, cell = (
        args.new_tokens,
        setting.prompts_BT[:batch_size, :context],
        {"batch_size": batch_size, "context": context, "sides": {}},
    )
    sides = {
        name: side
        for name, side in sides.items()
        if not name.startswith("hf") or batch_size in setting.hf_batches
    }
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # else a second shape would be compiled for any size, and be slower
    for side in sides.values():
        side.make_room(batch_size, context + n)
    runs = warm_up(sides, lambda side: side.run(prompts_BT, n), cell)
    agreement: dict[str, dict] = {}
    if reference := next(
        (name for name in runs if name not in PACKED), None
    ):  # which has other weights, so other tokens
        cell |= {
            "reference": reference,
            "distinct_tokens": len({i for row in runs[reference].ids for i in row}),
        }
        agreement = {
            name: compare_tokens(model, prompts_BT, runs[reference].ids, run.ids)
            for name, run in runs.items()
            if name not in PACKED
        }
    for name, side in agreement.items():
        if (
            setting.dtype == torch.float32
            and (gap := side.get("first_difference_gap", 0.0)) >= MOST_GAP
        ):
            cell["sides"][name] = {
                "failed": (
                    f"draws another token than {reference} where the logits are {gap:.1e} apart"
                )
            } | side
            del runs[name]
    functions = {
        name: mean_of(
            lambda side=sides[name]: side.run(prompts_BT, n).decode_s,
            run.decode_s,
            args.min_sample_seconds,
        )
        for name, run in runs.items()
    }
    if batch_size == 1 and runs:
        functions |= bandwidth_timers(setting.device, args.min_sample_seconds)
    samples = in_turns(functions, setting, args.repeats)
    timers = {
        name: 1e-9 / statistics.median(samples.pop(name).values)
        for name in TIMERS
        if name in samples
    }
    cell |= {f"{name}_gb_s": value for name, value in timers.items()}
    for name, sample in samples.items():
        cell["sides"][name] = side = speed(batch_size * (n - 1), sample) | agreement.get(name, {})
        if timers:
            side["bytes_per_token"] = round(
                weight_bytes_per_token(sides[name].model)
                + context_bytes_per_token(setting.config, context + n / 2, setting.dtype.itemsize)
            )
            side["achieved_gb_s"] = side["bytes_per_token"] * side["tokens_per_sec"]["median"] / 1e9
            side["share_of_bandwidth"] = side["achieved_gb_s"] / max(timers.values())
    add_ratios(cell["sides"])
    cell["sides"] = {name: cell["sides"][name] for name in sides}
    return cell


def measure_prefill(sides: dict, setting: Setting, length: int, args: argparse.Namespace) -> dict:
    """Reading one prompt of `length` tokens into a fresh cache, to the first token, as it is
    stored.
    """
    prompt_1T, cell = setting.prompts_BT[:1, :length], {"tokens": length, "sides": {}}
    sides = {name: side for name, side in sides.items() if name not in SAME_PROMPT_CODE}
    runs = warm_up(sides, lambda side: side.run(prompt_1T, 1, fresh=True), cell)
    functions = {
        name: mean_of(
            lambda side=sides[name]: side.run(prompt_1T, 1, fresh=True).first_s,
            run.first_s,
            args.min_sample_seconds,
        )
        for name, run in runs.items()
    }
    for name, sample in in_turns(functions, setting, args.repeats).items():
        cell["sides"][name] = speed(length, sample)
    add_ratios(cell["sides"])
    cell["sides"] = {name: cell["sides"][name] for name in sides}
    return cell


def measure_speed(setting: Setting, args: argparse.Namespace) -> dict:
    """Decoding and reading prompts on all sides, as it is stored."""
    with explained_out_of_memory(setting.device, "choose fewer --variants or a smaller model"):
        model = make_model(setting, args.weight_scale)
        sides, failed = build_sides(setting, model)
    stored = {
        name: {"what": VARIANTS[name]}
        | (sides[name].facts if name in sides else {"failed": failed[name]})
        for name in setting.names
    }
    decode, prefill = [], []
    for batch_size, context in (
        itertools.product(setting.batch_sizes, setting.contexts) if sides else ()
    ):
        decode.append(measure_decode(sides, model, setting, batch_size, context, args))
        print(f"decoding {batch_size} x {context}: {brief(decode[-1])}", flush=True)
        release_memory(setting.device)
    for length in setting.prompt_lengths if sides else ():
        prefill.append(measure_prefill(sides, setting, length, args))
        print(f"prompt of {length}: {brief(prefill[-1])}", flush=True)
        release_memory(setting.device)
    return {
        "model": dataclasses.asdict(setting.config),
        "parameters": total_parameters(setting.config),
        "active_parameters": active_parameters(setting.config),
        "weight_scale": args.weight_scale,
        "seed": SEED,
        "tokens": setting.tokens,
        "new_tokens": args.new_tokens,
        "sides": stored,
        "left_out": setting.left_out,
        "decode": decode,
        "prefill": prefill,
        "method": {
            "decode": "tokens of all rows, over the time from the first token drawn to the last",
            "prefill": "tokens of the prompt, over the time to the first token drawn, fresh cache",
            "ratio_to_hf": "median over that of Hugging Face's best side in the same turns",
            "same_tokens": (
                "before the first difference of each row from the reference's; in float32 a "
                f"side fails if its token there is {MOST_GAP} or more below the largest logit"
            ),
            "bytes_per_token": (
                "weights of the token's experts, attention, routers, norms, head, one embedding "
                "row; keys and values of the context and half of the new tokens"
            ),
            "share_of_bandwidth": (
                "bytes_per_token x tokens/s over the better of a large tensor's copy (both "
                "directions counted) and sum"
            ),
            "prefill of "
            + ", ".join(
                SAME_PROMPT_CODE
            ): "by the same code as ours and hf_grouped, so not measured again",
        },
    }


# -------------------------------------------------------------------------------- with a checkpoint
def launch_seconds(command: list[str]) -> float:
    """Seconds that a process takes, from nothing to its end, with PyTorch's own settings of
    threads. ValueError if it fails.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")
    }  # the latter is ours: before_torch
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ValueError(
            f"{' '.join(command[1:3])} ... failed: "
            f"{(done.stderr.strip() or 'killed').splitlines()[-1]}"
        )
    return seconds


def measure_launch(ckpt: str, repeats: int) -> dict:
    """From the command to a first token, as users meet it, next to the part that is PyTorch's
    own start.
    """
    commands = {
        "predict": [
            "predict.py",
            "--ckpt",
            os.path.abspath(ckpt),
            "--prompt",
            "x",
            "--max_new_tokens",
            "1",
            "--quiet",
        ],
        "import_torch": ["-c", "import torch"],
    }
    functions = {
        name: lambda command=command: launch_seconds([sys.executable, *command])
        for name, command in commands.items()
    }
    for function in functions.values():
        function()  # files into the page cache
    samples = alternate_undisturbed(functions, repeats)
    medians = {name: statistics.median(sample.values) for name, sample in samples.items()}
    return {f"{name}_s": summary(sample.values) for name, sample in samples.items()} | {
        "difference_s": medians["predict"] - medians["import_torch"],
        "samples": repeats,
        "discarded_samples": sum(sample.discarded for sample in samples.values()),
        "disturbed": any(sample.disturbed for sample in samples.values()),
    }


@torch.no_grad()
def decoded_cross_entropy(decoder: inference.Decoder, batches: Iterable) -> float:
    """Return the mean cross-entropy (nats a token) of batches of one window, read by a decoder.

    By the C kernel where it decodes, which rounds the inputs of packed weights, too.
    """
    total, tokens = 0.0, 0
    for ids_1T, targets_1T in batches:
        T = ids_1T.shape[1]
        text = decoder.texts(1, T, rings=False)[0]
        logits_TV = decoder.read(text, ids_1T[0].tolist(), all_logits=True)
        targets_T = targets_1T[0].to(logits_TV.device)
        total += F.cross_entropy(logits_TV, targets_T, reduction="sum").item()
        tokens += T
    return total / tokens


def measure_perplexity(ckpt: str, data_dir: str, device: torch.device, windows: int) -> dict:
    """Validation cross-entropy (nats a token) in float32 as the checkpoint is, and with its weights
    in 8 and in 4 bits, over the same windows, as a Decoder computes them.
    """
    model, checkpoint = load_model(ckpt, device)
    _, val = open_data(data_dir)
    if (
        checkpoint.tokenizer_state
        and checkpoint.tokenizer_state["fingerprint"] != val.tokenizer_state["fingerprint"]
    ):
        raise ValueError(
            f"{ckpt} was trained with tokenizer {checkpoint.tokenizer_state['name']}, and "
            f"{data_dir} was made with {val.tokenizer_state['name']}"
        )
    if val.vocabulary_size > model.config.vocabulary_size:
        raise ValueError(
            f"{data_dir} has {val.vocabulary_size:,} ids and the model in {ckpt} "
            f"{model.config.vocabulary_size:,}: give the text that it was trained on"
        )
    batches = validation_batches(val, model.config.context_length, 1, windows)
    cross_entropy = {}
    for what in ("float32", *KINDS):
        if what != "float32":
            model = quantize_(load_model(ckpt, device)[0], what)
        cross_entropy[what] = decoded_cross_entropy(inference.Decoder(model), batches)
    return {
        "windows": len(batches),
        "tokens": len(batches) * model.config.context_length,
        "cross_entropy": cross_entropy,
        "perplexity": {what: math.exp(value) for what, value in cross_entropy.items()},
        "ratio": math.exp(cross_entropy["int8"] - cross_entropy["float32"]),
        "ratio_int4": math.exp(cross_entropy["int4"] - cross_entropy["float32"]),
    }


# --------------------------------------------------------------------------------------- the report
def brief(cell: dict) -> str:
    """A cell's speeds in one line."""
    return (
        ", ".join(
            f"{name} {side['tokens_per_sec']['median']:,.0f}"
            if "tokens_per_sec" in side
            else f"no {name}"
            for name, side in cell["sides"].items()
        )
        + " tokens/s"
    )


def failures(results: dict) -> dict[str, str]:
    """What could not be measured, and why."""
    failed = {
        name: side["failed"] for name, side in results.get("sides", {}).items() if "failed" in side
    }
    for cell in results.get("decode", []) + results.get("prefill", []):
        where = (
            f"{cell['batch_size']} x {cell['context']}"
            if "context" in cell
            else f"prompt of {cell['tokens']}"
        )
        failed |= {
            f"{name} at {where}": side["failed"]
            for name, side in cell["sides"].items()
            if "failed" in side
        }
    return failed


def print_table(results: dict) -> None:
    """The figures, for people."""
    print(f"{results['device']}, {results['dtype']}, {results['threads']} threads")
    if "sides" in results:
        print(
            f"{results['parameters'] / 1e6:,.1f} M parameters, "
            f"{results['active_parameters'] / 1e6:,.1f} M active; {results['tokens']}; "
            f"{results['new_tokens']} tokens a run"
        )
        columns = [
            (f"{c['batch_size']} x {c['context']}", c["sides"]) for c in results["decode"]
        ] + [(f"read {c['tokens']}", c["sides"]) for c in results["prefill"]]
        print(f"{'tokens/s':14}" + "".join(f"{title:>12}" for title, _ in columns))
        for name in results["sides"]:
            print(
                f"{name:14}"
                + "".join(
                    f"{sides[name]['tokens_per_sec']['median']:>12,.0f}"
                    if "tokens_per_sec" in sides.get(name, {})
                    else " " * 12
                    for _, sides in columns
                ).rstrip()
            )
    for cell in results.get("decode", []):
        if "copy_gb_s" in cell:
            shares = ", ".join(
                f"{name} {100 * side['share_of_bandwidth']:.0f} %"
                for name, side in cell["sides"].items()
                if "share_of_bandwidth" in side
            )
            print(
                f"of the memory's speed, 1 x {cell['context']}: {shares} (copy "
                f"{cell['copy_gb_s']:.1f}, read {cell['read_gb_s']:.1f} GB/s)"
            )
    for title, ratio in (("decoding", "decode"), ("prompt", "prefill")):
        for cell in results.get(ratio, []):
            if ratios := {
                name: side["ratio_to_hf"]
                for name, side in cell["sides"].items()
                if "ratio_to_hf" in side and not name.startswith("hf")
            }:
                where = (
                    f"{cell['batch_size']} x {cell['context']}"
                    if ratio == "decode"
                    else f"of {cell['tokens']}"
                )
                print(
                    f"x Hugging Face's best, {title} {where}: "
                    + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
                )
    cells = results.get("decode", [])
    if differing := [
        f"{name} {side['same_tokens']} (gap {side['first_difference_gap']:.1e})"
        for c in cells
        for name, side in c["sides"].items()
        if "first_difference_gap" in side
    ]:
        print("other tokens than the reference's: " + ", ".join(differing))
    if any(
        side.get("disturbed")
        for cell in cells + results.get("prefill", [])
        for side in cell["sides"].values()
    ):
        print("the machine was busy: some figures are from disturbed samples")
    if launch := results.get("launch"):
        print(
            f"launch to first token {launch['predict_s']['median']:.2f} s, import torch alone "
            f"{launch['import_torch_s']['median']:.2f} s"
        )
    if p := results.get("perplexity"):
        print(
            f"perplexity {p['perplexity']['float32']:.4f}, in 8 bits "
            f"{p['perplexity']['int8']:.4f}: x {p['ratio']:.5f}, in 4 bits "
            f"{p['perplexity']['int4']:.4f}: x {p['ratio_int4']:.5f}, {p['tokens']:,} tokens"
        )
    for name, why in (results.get("left_out", {}) | failures(results)).items():
        print(f"no {name}: {why}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/decode_NAME.json"
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        metavar="NAME",
        help=(
            f"of {', '.join(VARIANTS)} (default: all that the device and the model can be); "
            "none: no speeds"
        ),
    )
    parser.add_argument(
        "--batch_sizes",
        nargs="*",
        type=int,
        default=[1, 8, 32],
        metavar="B",
        help="texts decoded at a time (default: 1 8 32)",
    )
    parser.add_argument(
        "--contexts",
        nargs="*",
        type=int,
        default=[128, 1024],
        metavar="T",
        help=(
            "tokens in the cache before decoding; 0 = as many as leave room for new_tokens "
            "(default: 128 1024)"
        ),
    )
    parser.add_argument(
        "--prefill",
        nargs="*",
        type=int,
        default=[64, 256, 1024],
        metavar="T",
        help="lengths of a prompt that is read, one at a time (default: 64 256 1024)",
    )
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=48,
        help="tokens in a run, of which the first is not timed (default: 48)",
    )
    parser.add_argument(
        "--hf_batches",
        nargs="*",
        type=int,
        metavar="B",
        help="those of batch_sizes that Hugging Face decodes, too; none: no decoding (default: 1)",
    )
    parser.add_argument(
        "--data_dir",
        help=(
            "prompts from the validation text in this folder of prepare_data.py (default: random "
            "ids)"
        ),
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help=(
            "weights and arithmetic; auto: float32 on a CPU, else the device's best (default: auto)"
        ),
    )
    parser.add_argument(
        "--num_threads",
        type=int,
        default=0,
        help="CPU threads; 0 = the cores that this process may use (default: 0)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="samples of each side (default: 5)")
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
    parser.add_argument(
        "--launch",
        metavar="CKPT",
        help=(
            "also measure a process of predict.py from its start to a first token, with this "
            "checkpoint"
        ),
    )
    parser.add_argument(
        "--perplexity",
        nargs=2,
        metavar=("CKPT", "DATA_DIR"),
        help=(
            "also measure what 8-bit weights cost this checkpoint on the validation text in "
            "DATA_DIR"
        ),
    )
    parser.add_argument(
        "--val_windows",
        type=int,
        default=64,
        help="contexts of validation text that the perplexity is over (default: 64)",
    )
    cli.add_config_flags(parser, ModelConfig)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    torch.set_num_threads(
        args.num_threads
        if args.num_threads > 0
        else min(torch.get_num_threads(), process.usable_cores())
    )
    setting = make_setting(args)
    if not (setting.names or args.launch or args.perplexity):
        raise ValueError(
            "nothing to measure: name some --variants, or give --launch or --perplexity"
        )
    results = {
        "device": device_name(setting.device),
        "threads": torch.get_num_threads(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "repeats": args.repeats,
    }
    if args.launch:
        results["launch"] = measure_launch(args.launch, args.repeats)
    if args.perplexity:
        results["perplexity"] = measure_perplexity(
            *args.perplexity, setting.device, args.val_windows
        )
    if setting.names:
        results |= measure_speed(setting, args)
    print_table(results)
    save_results(f"decode_{args.name}", results)
    return 1 if failures(results) else 0


if __name__ == "__main__":
    cli.run_main(main)
