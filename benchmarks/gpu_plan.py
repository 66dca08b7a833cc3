"""What `benchmarks/gpu.py` runs on one GPU: stages with seconds of their own, sizes by memory, and
what is expected of each.

FIRST is for one command of TOTAL_SECONDS["first"], SECOND for the one after it, THIRD for a session
of its own: kernels that are off until a GPU has run them. Stages are in the
order of what one would miss most. PREDICTIONS are computed from rates and byte counts, before
anything ran on a GPU; none of them is a result.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from config_model import PRESETS, ModelConfig, TrainConfig, flops_per_token
from runtime.training.memory import training_memory_bytes

PYTHON = sys.executable
TOTAL_SECONDS = {"first": 585, "second": 120, "third": 120}
# A command's own seconds, outside its stages.
OWN_SECONDS = {"first": 5, "second": 3, "third": 3}
GIB = 2**30
# Files with tests that need a GPU; all of tests/ would need libraries that a rented machine may
# lack.
TEST_FILES = [
    "tests/test_gpu.py",
    "tests/benchmarks/test_attention.py",
    "tests/checkpoint/test_checkpoint.py",
    "tests/test_predict.py",
]
COMPILED_TESTS = "tests/test_gpu.py::test_a_compiled_step_gives_the_cpus_texts"
# Of kernels that the third command is for, and the setting that turns them on
# (runtime/kernels/bias_attention.py).
TRITON_TESTS = "by_triton"
TRITON = {"GPTOSS_BIAS_KERNEL": "triton"}
RESUME_STEPS = 40
# Processes for the GPU's tests, which mostly wait: for the compiler, the CPU's side of a
# comparison, launches.
PROCESSES = 10


@dataclass(frozen=True)
class Stage:
    """Commands that run one after another, also after one that fails, in `seconds` together.

    environment: their own variables.
    """

    seconds: int
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------- sizes by memory
# CUDA's own memory in a process, which no count of tensors sees.
CONTEXT_BYTES = 0.6 * GIB
USABLE_SHARE = 0.95
# Of an H200.
LARGEST_MEMORY = 139 * GIB
# Sequences of a micro-batch x micro-batches of a step, the fastest first; the last ones fit
# wherever the model does.
SIZES = {
    "no_table": [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)],
    "modern": [(16, 4), (8, 8), (4, 16), (2, 32), (1, 64)],
    "default": [(16, 1), (4, 4), (2, 8), (1, 16)],
}


def models() -> dict[str, tuple[ModelConfig, dict]]:
    """Model and training settings of each stage that trains."""
    modern = PRESETS["gptoss-modern"]
    return {
        "no_table": (ModelConfig(use_attention_bias=False), {}),
        "modern": (ModelConfig(**modern.model), {"optimizer": modern.train["optimizer"]}),
        "default": (ModelConfig(), {}),
    }


def peak_bytes(config: ModelConfig, train: TrainConfig) -> float:
    """Peak of a step with bfloat16 products on a GPU, CUDA's own memory included.

    By the estimate that train.py prints, which tests hold to a count over fake tensors.
    """
    return sum(training_memory_bytes(config, train, 2, on_gpu=True).values()) + CONTEXT_BYTES


def sizes_for(stage: str, memory_bytes: float) -> list[tuple[int, int]]:
    """The sizes of a stage whose peak is below 95 % of a GPU's memory, the fastest first; the
    smallest where none is.
    """
    config, train = models()[stage]
    fitting = [
        (batch_size, grad_accum)
        for batch_size, grad_accum in SIZES[stage]
        if peak_bytes(config, TrainConfig(batch_size=batch_size, grad_accum=grad_accum, **train))
        < USABLE_SHARE * memory_bytes
    ]
    return fitting or SIZES[stage][-1:]


# --------------------------------------------------------------------------------------- the stages
def words(text: str) -> list[str]:
    """Flags as a command line has them."""
    return text.split()


TINY_MODEL = words(
    "--d_model 32 --transformer_blocks 2 --num_heads 4 --num_kv_heads 2 --head_dim 8 "
    "--num_experts 4 --d_ff 32 --context_length 32"
)
TINY_VOCABULARY = words("--vocabulary_size 301")
TINY_PROBE = words(
    "--product 64 --copy_bytes 1048576 --rows 64 --experts 4 --d_in 16 --d_out 32 --batch_size 1 "
    "--context_length 16 --min_seconds 0.001"
)
TINY_LOSS = words(
    "--vocabulary_size 301 --d_model 16 --rows 64 --chunk_rows 16,32,64 --repeats 1 --no-memory"
)
TINY_STEPS = words("--min_sample_seconds 0.01 --dtype float32")
LOSS = words(
    "--rows 32768 --d_model 1024 --chunk_rows 2048,4096,8192 --head_bias --dtype bfloat16 "
    "--repeats 5 --compiled"
)
TRAINING = {
    "no_table": ["--no-use_attention_bias"],
    "modern": ["--preset", "gptoss-modern"],
    "default": [],
}


def tiny_model() -> list[str]:
    """Sizes for a CPU; the vocabulary is the data's where there are data."""
    return [*TINY_MODEL, *([] if "GPTOSS_DATA" in os.environ else TINY_VOCABULARY)]


def command(module: str, name: str, *flags: str) -> list[str]:
    """A benchmark of this repository as a process."""
    return [PYTHON, "-m", f"benchmarks.{module}", "--name", name, *flags]


def steps(stage: str, name: str, memory_bytes: float, tiny: bool) -> list[str]:
    """Training steps of one model at the sizes that fit, compiled; tiny, only the first model is: a
    CPU takes half a minute.
    """
    chosen = [(2, 2), (2, 1)] if tiny else sizes_for(stage, memory_bytes)
    sizes = ",".join(f"{batch_size}x{grad_accum}" for batch_size, grad_accum in chosen)
    compiled = ["--compile"] if not tiny or stage == "no_table" else []
    own = [*tiny_model(), *TINY_STEPS] if tiny else ["--dtype", "bfloat16"]
    return command("steps", f"{name}_{stage}", *TRAINING[stage], *own, *compiled, "--sizes", sizes)


def in_parallel(processes: int) -> list[str]:
    """pytest-xdist's flag, where it is installed."""
    return ["-n", str(processes)] if importlib.util.find_spec("xdist") else []


def hugging_face(name: str, tiny: bool) -> list[list[str]]:
    """Hugging Face's Qwen3-MoE, grouped and all in bfloat16, then ours, both eager with AdamW: a
    process for each.
    """
    own = [
        *tiny_model(),
        "--batch_size",
        "2",
        "--repeats",
        "1",
        "--min_sample_seconds",
        "0.01",
        "--no-memory",
    ]
    flags = own if tiny else ["--batch_size", "8", "--repeats", "3", "--min_sample_seconds", "2"]
    common = [
        "--preset",
        "gptoss-modern",
        "--optimizer",
        "adamw",
        "--dtype",
        "bfloat16",
        "--grad_accum",
        "1",
        "--no-parts",
        *flags,
    ]
    sides = ["hf_grouped_bf16"] * (importlib.util.find_spec("transformers") is not None) + ["ours"]
    return [command("train", f"{name}_{side}", *common, "--variants", side) for side in sides]


def first(name: str, memory_bytes: float, tiny: bool) -> dict[str, Stage]:
    """The first command's stages, for a GPU of so much memory."""
    tests = (
        ["tests/base/test_process.py", "-k", "container"]
        if tiny
        else [
            *TEST_FILES,
            "-m",
            "gpu",
            "-k",
            f"not compiled_step and not {TRITON_TESTS}",
            *in_parallel(PROCESSES),
            "--tb",
            "short",
            "--durations",
            "10",
            "--continue-on-collection-errors",
        ]
    )
    latency = (
        [
            *TINY_MODEL,
            *TINY_VOCABULARY,
            "--context",
            "8",
            "--new_tokens",
            "4",
            "--prompts",
            "2",
            "--dtype",
            "float32",
        ]
        if tiny
        else []
    )
    loss = TINY_LOSS if tiny else LOSS
    chunks = loss[loss.index("--chunk_rows") + 1].split(",")
    variants = ",".join(f"ours_{rows}" + "_compiled" * (not tiny) for rows in chunks)
    return {
        "probe": Stage(25, [command("probe", name, *(TINY_PROBE if tiny else []))]),
        "tests": Stage(85, [command("gpu_tests", name, "--", *tests)]),
        "no_table": Stage(85, [steps("no_table", name, memory_bytes, tiny)]),
        "modern": Stage(105, [steps("modern", name, memory_bytes, tiny)]),
        "default": Stage(85, [steps("default", name, memory_bytes, tiny)]),
        "latency": Stage(90, [command("latency", name, "--no-use_attention_bias", *latency)]),
        "loss": Stage(45, [command("loss", name, *loss, "--variants", variants)]),
        "hugging_face": Stage(60, hugging_face(name, tiny)),
    }


def second(name: str, tiny: bool, first_json: str, work: str) -> dict[str, Stage]:
    """The second command's stages. first_json: what the first wrote; work: a folder for
    checkpoints, 5 GB.
    """
    compiled = (
        ["tests/inference/test_decoder.py", "-k", "decode_step_is and plain"]
        if tiny
        else [COMPILED_TESTS, *in_parallel(2)]
    )
    own = (
        [*TINY_MODEL, "--batch_size", "2", "--dtype", "float32"]
        if tiny
        else ["--batch_size", "16", "--dtype", "bfloat16"]
    )
    half = str(RESUME_STEPS // 2)
    resume = [
        PYTHON,
        "-m",
        "benchmarks.gpu_resume",
        "--work",
        work,
        "--half",
        half,
        "--name",
        name,
        "--",
        "--preset",
        "modern-8gb",
        *own,
        "--grad_accum",
        "1",
    ]
    return {
        "failed_tests": Stage(
            25,
            [
                command(
                    "gpu_tests",
                    f"{name}_failed",
                    "--failed_in",
                    first_json,
                    "--",
                    "--maxfail",
                    "4",
                    "--tb",
                    "long",
                )
            ],
        ),
        "resume": Stage(55, [resume]),
        "compiled_tests": Stage(37, [command("gpu_tests", f"{name}_compiled", "--", *compiled)]),
    }


def third(name: str, tiny: bool) -> dict[str, Stage]:
    """The third command's stages: attention with the learned bias by Triton.

    It holds no masks and no gradients of them, so the largest size is tried on each card.
    """
    tests = (
        ["tests/base/test_process.py", "-k", "container"]
        if tiny
        else ["tests/test_gpu.py", "-m", "gpu", "-k", TRITON_TESTS, *in_parallel(4)]
    )
    own = (
        "--batch_size 1 --num_heads 2 --num_kv_heads 1 --context_length 16 --head_dim 8 --repeats 1"
        " --min_sample_seconds 0.001 --dtype float32"
        if tiny
        else "--batch_size 16 --num_heads 32 --num_kv_heads 8 --context_length 2048 --head_dim 32"
        " --repeats 5 --dtype bfloat16"
    )
    variants = "sdpa_expanded,triton" if tiny else "sdpa_efficient,triton"
    attention = ["--cases", "table", "--variants", variants, *words(own)]
    model = steps("default", f"{name}_triton", LARGEST_MEMORY, tiny)
    return {
        "triton_tests": Stage(28, [command("gpu_tests", f"{name}_triton", "--", *tests)]),
        "triton_attention": Stage(32, [command("attention", f"{name}_table", *attention)]),
        "triton_default": Stage(57, [model], TRITON),
    }


# -------------------------------------------------------------------------------------- predictions
@dataclass(frozen=True)
class Card:
    """What is assumed of a card, per second: rates of kernels, bytes of its memory."""

    copy: float
    product: float
    peak: float = 989e12
    head: float = 620e12
    grouped: float = 480e12
    # cuDNN's attention by features of a head; the memory-efficient kernel with a table, forward and
    # backward, which computes the whole square.
    cudnn_32: float = 200e12
    cudnn_64: float = 350e12
    table_forward: float = 60e12
    table_backward: float = 42e12
    # Our kernels with the table.
    triton: float = 150e12


# Copy and product as measured on such cards, the rest assumed.
CARDS = {"H100": Card(copy=3.0e12, product=798e12), "H200": Card(copy=4.3e12, product=788e12)}
OFF = 1.4


def card_of(device: str) -> str | None:
    """The key of CARDS that a device's name holds, or None: then nothing is predicted."""
    return next((card for card in CARDS if re.search(rf"\b{card}\b", device)), None)


@dataclass(frozen=True)
class Prediction:
    """What a measure should be on a card, and how that was computed. size: of the training stage
    that it is meant for.
    """

    stage: str
    measure: str
    of: Callable[[Card], float]
    how: str
    only: str = ""
    size: str = ""


def by_card(h100: float, h200: float) -> Callable[[Card], float]:
    """A figure that was worked out for each card."""
    return lambda card: h100 if card is CARDS["H100"] else h200


def mfu(stage: str, h100: float, h200: float) -> Callable[[Card], float]:
    """Percent of the peak at so many tokens per second."""
    flops = 3 * flops_per_token(models()[stage][0])
    return lambda card: 100 * flops * by_card(h100, h200)(card) / card.peak


# One block of 16 sequences of 2,048 tokens, 1,024 features in its heads: FLOPs of the two forward
# products over the whole square; backward, with its second computation of the scores, 2.5 times as
# many; under a causal mask half of all.
SQUARE_FLOPS = 4 * 16 * 2048**2 * 1024


def causal_ms(rate: str, blocks: int = 1) -> Callable[[Card], float]:
    return lambda card: 1000 * blocks * 3.5 * SQUARE_FLOPS / 2 / getattr(card, rate)


def table_ms(card: Card) -> float:
    return 1000 * (SQUARE_FLOPS / card.table_forward + 2.5 * SQUARE_FLOPS / card.table_backward)


def triton_ms(card: Card) -> float:
    """Eleven products over what the queries see: 2 forward, 4 for keys and values, 3 for queries,
    2 for the table.
    """
    return 1000 * 11 / 2 * SQUARE_FLOPS / 2 / card.triton


def loss_ms(rows: int) -> Callable[[Card], float]:
    """Head and loss of 32,768 tokens: three products, and passes over a chunk of logits and the
    head's gradient.
    """
    tokens, C, V = 32_768, 1024, ModelConfig().vocabulary_size
    passes = tokens // rows * (6 * rows * V + 12 * V * C)
    return lambda card: 1000 * (6 * tokens * V * C / card.head + passes / card.copy)


def loss_gb(rows: int) -> Callable[[Card], float]:
    return lambda card: 6 * rows * ModelConfig().vocabulary_size / 1e9


TRAINED = {
    # Stage, size, tokens per second on an H100 and an H200, counted peak in GiB.
    ("no_table", "16x1"): (132e3, 149e3, 50.9),
    ("modern", "16x4"): (104e3, 118e3, 73.3),
    ("default", "4x4"): (46e3, 53e3, 69.8),
    ("default", "16x1"): (55e3, 62e3, 73.3),
}
# Milliseconds of a micro-batch of 32,768 tokens (default 4x4: 8,192), bound by rates that both
# cards share.
PARTS = {
    ("no_table", "16x1"): {"attention": 29, "grouped products": 41, "products": 65 + 11},
    ("modern", "16x4"): {"attention": 16, "grouped products": 62},
    ("default", "4x4"): {"attention": 63, "grouped products": 10},
    ("default", "16x1"): {"attention": 251, "grouped products": 41},
}


def training_predictions() -> list[Prediction]:
    """Of the stages that train, for the sizes that were worked out."""
    found = []
    for (stage, size), (h100, h200, peak) in TRAINED.items():
        found += [
            Prediction(
                stage,
                "speed",
                by_card(h100, h200),
                "products, bytes and launches of a step, + 5 % gaps",
                size=size,
            ),
            Prediction(
                stage,
                "MFU",
                mfu(stage, h100, h200),
                "that speed x 3 x forward FLOPs / 989 TFLOP/s",
                size=size,
            ),
            Prediction(
                stage,
                "memory",
                lambda card, peak=peak: peak,
                "counted over fake tensors, eager; compiled keeps less",
                size=size,
            ),
            Prediction(
                stage,
                "first loss",
                lambda card: math.log(ModelConfig().vocabulary_size),
                "ln(vocabulary)",
                size=size,
            ),
        ]
        found += [
            Prediction(
                stage,
                f"{part}, profiled",
                lambda card, ms=ms: ms,
                "FLOPs over the card's assumed rate",
                size=size,
            )
            for part, ms in PARTS[stage, size].items()
        ]
    return found


PREDICTIONS = [
    Prediction(
        "probe", "product", lambda card: card.product / 1e12, "measured before on such a card"
    ),
    Prediction("probe", "copy", lambda card: card.copy / 1e9, "measured before on such a card"),
    *(
        Prediction(
            "probe",
            f"grouped {which}",
            lambda card: card.grouped / 1e12,
            "assumed, 0.6 of the product",
        )
        for which in ("forward", "dgrad", "wgrad")
    ),
    *(
        Prediction(
            "probe",
            f"attention {D} cudnn {heads}",
            causal_ms(f"cudnn_{D}"),
            "3.5 x causal FLOPs over cuDNN's assumed rate",
        )
        for D in (32, 64)
        for heads in ("grouped", "repeated")
    ),
    Prediction(
        "probe",
        "attention 32 table",
        table_ms,
        "3.5 x the whole square's FLOPs at 60 and 42 TFLOP/s",
    ),
    Prediction(
        "triton_attention",
        "table triton time",
        triton_ms,
        "11 causal products at 150 TFLOP/s",
    ),
    Prediction(
        "triton_default",
        "speed",
        by_card(104e3, 118e3),
        "the default's micro-batch with attention at 100 to 200 TFLOP/s, its table read once",
        size="16x1",
    ),
    *training_predictions(),
    Prediction("latency", "graph speed", lambda card: 525.0, "670 kernels a token: 450 to 600"),
    Prediction(
        "latency",
        "graph token",
        lambda card: 1000 / 525,
        "670 kernels a token: 450 to 600 tokens/s",
    ),
    Prediction(
        "latency",
        "compiled speed",
        lambda card: 1150.0,
        "200 to 250 kernels a token: 1,000 to 1,300",
    ),
    Prediction(
        "latency",
        "compiled token",
        lambda card: 1000 / 1150,
        "200 to 250 kernels a token: 1,000 to 1,300 tokens/s",
    ),
    Prediction(
        "latency",
        "first token cudnn new",
        lambda card: 400.0,
        "a plan for each length: 0.44 s was seen on a B200",
    ),
    *(
        Prediction(
            "loss",
            f"ours_{rows}_compiled time",
            loss_ms(rows),
            "products at 620 TFLOP/s and the chunks' bytes",
        )
        for rows in (2048, 4096, 8192)
    ),
    *(
        Prediction(
            "loss", f"ours_{rows}_compiled memory", loss_gb(rows), "6 bytes x rows x vocabulary"
        )
        for rows in (2048, 4096, 8192)
    ),
]


def predicted(stage: str, measure: str, size: str, card: str | None) -> Prediction | None:
    """The prediction for a measure at a size on a card, or None."""
    if card is None:
        return None
    return next(
        (
            p
            for p in PREDICTIONS
            if (p.stage, p.measure) == (stage, measure) and p.size in ("", size)
        ),
        None,
    )
