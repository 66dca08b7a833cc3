"""The recipes of docs/recipes.md: commands, and what they need by the program's own counts.

`python -m benchmarks.tables` writes the commands and both tables into the page. Memory, disk and
FLOPs are those of the commands as their own parsers read them, so that no figure can go its own
way. Times on GPUs are estimates: nothing has been timed on one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common import RESULTS
from config_model import ModelConfig, TrainConfig, flops_per_token, total_parameters
from prepare_data import parse_options
from runtime.base import cli
from runtime.base.device import PEAK_FLOPS
from runtime.base.text import human_bytes, human_count, human_seconds
from runtime.data.shards import dtype_for
from runtime.training.memory import training_memory_bytes
from runtime.training.plan import checkpoint_bytes

# Share of a card's peak that training may reach; benchmarks/gpu_plan.py predicts values between.
UTILISATION = (0.10, 0.40)
# Dense half-precision peaks in FLOP/s. The 8 GB card's is from NVIDIA's whitepaper on GA102
# ("FP16 with FP32 accumulate").
PEAKS = PEAK_FLOPS | {"RTX 3070": 40.6e12}
# Bytes of text in the splits (training, validation), as the datasets' pages on the Hub say.
# FineWeb-Edu has no validation split, and more text than any recipe takes.
TEXT_BYTES = {
    "roneneldan/TinyStories": (1.92e9, 19.4e6),
    "DKYoon/SlimPajama-6B": (23.92e9, 39.1e6),
}


@dataclass(frozen=True)
class Recipe:
    """What to type: flags of prepare_data.py, train.py and predict.py, and an export.

    memory_gib: of the machine that it is for. cards: keys of PEAKS with that memory; none: a CPU.
    known: the result of such a run, if there is one.
    """

    machine: str
    memory_gib: int
    cards: tuple[str, ...]
    prepare: str
    train: str
    predict: str
    export: str
    known: str = "no such run exists"

    @property
    def commands(self) -> tuple[str, ...]:
        """The recipe's lines, in order."""
        return (
            f"python prepare_data.py {self.prepare}".rstrip(),
            f"python train.py {self.train}",
            f"python predict.py --ckpt checkpoints/best.pt {self.predict}",
            f"python -m scripts.{self.export}",
        )


_FINEWEB = "--dataset HuggingFaceFW/fineweb-edu --dataset_config sample-10BT --streaming"
_STORY = '--temperature 0.7 --prompt "Once upon a time"'
_FACT = '--temperature 0.7 --prompt "The water cycle begins"'
_EXPORT = "export_hf --ckpt checkpoints/best.pt --out my-model"

RECIPES = {
    "laptop": Recipe(
        "laptop, 2 cores",
        4,
        (),
        "--streaming --tokenizer bpe:4096 --max_tokens 5e6",
        "--preset nano --max_steps 2500",
        _STORY,
        _EXPORT,
        "2.022 after 2,500 steps of the README's run",
    ),
    "8 GB": Recipe(
        "8 GB",
        8,
        ("RTX 3070",),
        f"{_FINEWEB} --max_tokens 7e8 --tokenizer bpe:32768",
        "--preset modern-8gb --compile",
        _FACT,
        _EXPORT,
    ),
    "24 GB": Recipe(
        "24 GB",
        24,
        ("RTX 3090", "RTX 4090"),
        "--dataset DKYoon/SlimPajama-6B --streaming --max_tokens 1.4e9 --tokenizer bpe:32768",
        "--preset modern-24gb --compile --keep_last 1",
        _FACT,
        f"{_EXPORT} --dtype bfloat16",
    ),
    "80 GB": Recipe(
        "80 GB",
        80,
        ("A100", "H100"),
        f"{_FINEWEB} --max_tokens 1.4e9",
        "--preset gptoss-modern --compile --keep_last 1",
        _FACT,
        f"{_EXPORT} --dtype bfloat16",
    ),
    "141 GB": Recipe(
        "141 GB",
        141,
        ("H200",),
        f"{_FINEWEB} --max_tokens 5.5e9",
        "--preset gptoss-modern --compile --keep_last 1 --batch_size 32 --grad_accum 2 "
        "--max_steps 40000",
        _FACT,
        f"{_EXPORT} --dtype bfloat16",
    ),
    "published": Recipe(
        "141 GB, the published run",
        141,
        ("H200",),
        "--streaming",
        "--max_steps 2000 --batch_size 16 --grad_accum 1 --compile --dtype bfloat16 --keep_last 1",
        '--prompt "ben was a brave boy"',
        f"{_EXPORT} --custom_code",
        "about 2.01: the original implementation reports 2.2493 with its auxiliary loss",
    ),
}


def _stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def bytes_per_token(vocabulary_size: int) -> float:
    """Return the text per token that was measured on TinyStories: bpe:4096, or o200k_base."""
    name = "tokenizer_bpe" if vocabulary_size == 4096 else "tokenizer_o200k"
    return _stored(f"ablations/{name}_42")["bytes_per_token"]


@dataclass(frozen=True)
class Cost:
    """What a recipe needs. Tokens, bytes and FLOPs are counts; nothing here was timed."""

    parameters: int
    train_tokens: int
    val_tokens: int
    steps: int
    trained_tokens: int
    validated_tokens: int
    memory_bytes: int
    shard_bytes: int
    checkpoints_bytes: int
    export_bytes: int
    flops: int


def configs(recipe: Recipe) -> tuple[argparse.Namespace, ModelConfig, TrainConfig]:
    """Return what the parsers of prepare_data.py and train.py make of a recipe.

    train.py takes the vocabulary from the data; here it follows from the tokenizer's name.
    """
    options = parse_options(shlex.split(recipe.prepare))
    parser = cli.parser("")
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    settings = cli.settings_from(
        parser.parse_args(shlex.split(recipe.train)), ModelConfig, TrainConfig
    )
    size = ModelConfig.vocabulary_size
    if options.tokenizer.startswith("bpe:"):
        size = int(options.tokenizer.removeprefix("bpe:"))
    else:
        assert options.tokenizer == "o200k_base"
    model = dataclasses.replace(settings.build(ModelConfig), vocabulary_size=size)
    return options, model, settings.build(TrainConfig)


def cost(recipe: Recipe) -> Cost:
    """Return what a recipe needs."""
    options, model, train = configs(recipe)
    on_gpu = bool(recipe.cards)
    limit = options.max_tokens or float("inf")
    per_token = bytes_per_token(model.vocabulary_size)
    if options.dataset in TEXT_BYTES:
        train_tokens, val_tokens = (
            round(min(size / per_token, limit)) for size in TEXT_BYTES[options.dataset]
        )
    else:
        # A share of the documents, by hash.
        train_tokens, val_tokens = int(limit), round(limit / 99)
    # Compute in bfloat16 on a GPU, in float32 on a CPU.
    needed = training_memory_bytes(model, train, 2 if on_gpu else 4, on_gpu)
    parameters = total_parameters(model)
    micro_batch = train.batch_size * model.context_length
    trained = train.max_steps * train.grad_accum * micro_batch
    validated = train.max_steps // train.val_interval * train.val_steps * micro_batch
    return Cost(
        parameters=parameters,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        steps=train.max_steps,
        trained_tokens=trained,
        validated_tokens=validated,
        memory_bytes=sum(needed.values()),
        shard_bytes=(train_tokens + val_tokens) * dtype_for(model.vocabulary_size).itemsize,
        # The best one, and one more that is written before an old one goes.
        checkpoints_bytes=(train.keep_last + 2) * checkpoint_bytes(needed),
        export_bytes=parameters * (2 if "bfloat16" in recipe.export else 4),
        flops=flops_per_token(model) * (3 * trained + validated),
    )


def command_block(name: str) -> str:
    """Return a recipe's commands as a block of code."""
    return "\n".join(["```", *RECIPES[name].commands, "```"])


def costs_table() -> str:
    """Return memory and disk of all recipes."""
    lines = [
        "| recipe | parameters | tokens prepared | tokens trained | training memory "
        "| disk: shards | checkpoints | export |",
        "|---" * 8 + "|",
    ]
    for recipe in RECIPES.values():
        c = cost(recipe)
        lines.append(
            f"| {recipe.machine} | {human_count(c.parameters)} | {human_count(c.train_tokens)} "
            f"| {c.steps:,} steps, {human_count(c.trained_tokens)} "
            f"({c.trained_tokens / c.train_tokens:.1f} epochs) "
            f"| {human_bytes(c.memory_bytes)} | {human_bytes(c.shard_bytes)} "
            f"| {human_bytes(c.checkpoints_bytes)} | {human_bytes(c.export_bytes)} |"
        )
    return "\n".join(lines)


def times_table() -> str:
    """Return the times of training with its validations: on a GPU from FLOPs.

    The CPU's is from a measured speed.
    """
    low, high = UTILISATION
    lines = [
        "| recipe | FLOPs | machine | peak, dense bf16 "
        f"| time at {100 * high:.0f} % of the peak | at {100 * low:.0f} % |",
        "|---" * 6 + "|",
    ]
    for recipe in RECIPES.values():
        c = cost(recipe)
        start = f"| {recipe.machine} | {c.flops:.1e} "
        for card in recipe.cards:
            fast, slow = (human_seconds(c.flops / (PEAKS[card] * share)) for share in (high, low))
            lines.append(f"{start}| {card} | {PEAKS[card] / 1e12:.0f} TFLOP/s | {fast} | {slow} |")
        if not recipe.cards:
            measured = _stored("end_to_end_nano_cpu")
            cpu = f"{measured['environment']['hardware']['cpu']}, 2 cores"
            speed = measured["training"]["tokens_per_sec"]["median"]
            # A validation's token costs a third of a training step's.
            about = human_seconds((c.trained_tokens + c.validated_tokens / 3) / speed)
            lines.append(f"{start}| {cpu} | `nano`, measured: {speed:,.0f} tokens/s | {about} | |")
    return "\n".join(lines)


def losses_table() -> str:
    """Return the loss that each recipe starts from, and the validation loss that is known."""
    lines = ["| recipe | a guess, ln V | validation loss (nats) |", "|---|---|---|"]
    for recipe in RECIPES.values():
        guess = math.log(configs(recipe)[1].vocabulary_size)
        lines.append(f"| {recipe.machine} | {guess:.1f} | {recipe.known} |")
    return "\n".join(lines)


def tokenising_line() -> str:
    """Return how long tokenising takes at the measured speed."""
    result = _stored("prepare")
    speed = result["sides"]["prepare_data"]["tokens_per_second"]
    return (
        f"Two cores tokenise {speed / 1e6:.1f} M tokens/s, so a billion tokens takes "
        f"{human_seconds(1e9 / speed)} if the network keeps up (`prepare.json`)."
    )


TABLES: dict[str, Callable[[], str]] = {
    **{f"recipe {name}": functools.partial(command_block, name) for name in RECIPES},
    "recipe costs": costs_table,
    "recipe times": times_table,
    "recipe losses": losses_table,
    "recipe tokenising": tokenising_line,
}
