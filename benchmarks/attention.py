"""The core of attention, forward and backward: seconds, rate, memory and error of PyTorch's
kernels, of FlexAttention and of plain matmuls.

    python -m benchmarks.attention --name cpu --batch_size 1 --num_heads 8 --num_kv_heads 4 \\
        --context_length 512 --head_dim 32 --num_threads 2
    python -m benchmarks.attention --name gpu --batch_size 16 --num_heads 32 --num_kv_heads 8 \\
        --context_length 2048 --head_dim 32

Cases: causal; table (causal, plus the learned attention bias, whose gradient is needed too);
documents (causal within each of the documents that share a row); table_documents (both) and sinks
(causal, with gpt-oss's sinks), only if asked for. Variants: manual (all T x T scores), sdpa_grouped
and sdpa_expanded (F.scaled_dot_product_attention with the few key/value heads as they are or
repeated per query head, and the mask made in the call, as model_parts.Attention does),
sdpa_compiled (the latter under torch.compile), sdpa_flash, sdpa_efficient, sdpa_cudnn and sdpa_math
(the latter with one backend forced), c (runtime/kernels/cpu_attention.py, as the model does on a
CPU), rescaled (runtime/kernels/sink_attention.py; sinks only), triton
(runtime/kernels/bias_attention.py; table only), flex (FlexAttention compiled, with a block mask).
Each runs as it is and under --deterministic. What a library refuses stays in the results with its
reason. All variants of a case are measured in turns; the figures are medians and go to
benchmarks/results/attention_NAME.json after each case.
"""

from __future__ import annotations

import os

from runtime.base import process

# ruff: noqa: E402
process.before_torch()  # what it sets is read when torch loads
os.environ.setdefault(
    "KINETO_LOG_LEVEL", "6"
)  # the profiler counts bytes here; its start and end are no news

import argparse
import contextlib
import functools
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.common import alternate_undisturbed, save_results, summary
from model_parts import attention_mask, attention_with_sinks
from runtime.base import cli
from runtime.base.device import (
    choose_device,
    choose_dtype,
    device_name,
    explained_out_of_memory,
    is_out_of_memory,
    make_deterministic,
    release_memory,
    synchronize,
)
from runtime.base.text import human_bytes
from runtime.kernels import cpu_attention
from runtime.kernels.attention_choice import card_of
from runtime.kernels.bias_attention import bias_attention, is_interpreted
from runtime.kernels.sink_attention import sink_attention

CASES = {
    "causal": (),
    "table": ("table",),
    "documents": ("documents",),
    "table_documents": ("table", "documents"),
    "sinks": ("sinks",),
}
DEFAULT_CASES = ("causal", "table", "documents")
MODES = ("default", "deterministic")
CHECK_BATCH, CHECK_TOKENS = (
    2,
    256,
)  # the size at which errors are measured: two of FlexAttention's blocks of 128 in each direction
REASON_CHARACTERS = 500
OUT_OF_MEMORY = "out of memory"


@dataclass
class Problem:
    """Queries and the output's gradient [B, H, T, D], keys and values [B, G, T, D], with memory in
    the order B, T, H, D as the model's projections leave it; table [H, T, T], each token's start of
    document [B, T] and sinks [H], or None.
    """

    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTD: Tensor
    dy_BHTD: Tensor
    table_HTT: Tensor | None
    starts_BT: Tensor | None
    sinks_H: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """What needs a gradient."""
        leaves = {
            "q": self.q_BHTD,
            "k": self.k_BGTD,
            "v": self.v_BGTD,
            "table": self.table_HTT,
            "sinks": self.sinks_H,
        }
        return {name: tensor for name, tensor in leaves.items() if tensor is not None}

    def expanded(self) -> tuple[Tensor, Tensor]:
        """Keys and values, one head for every query head."""
        groups = self.q_BHTD.shape[1] // self.k_BGTD.shape[1]
        return self.k_BGTD.repeat_interleave(groups, dim=1), self.v_BGTD.repeat_interleave(
            groups, dim=1
        )

    def mask(self) -> Tensor:
        """The model's own rule, [T, T] or [B, 1, T, T] bool."""
        positions_T = torch.arange(self.q_BHTD.shape[2], device=self.q_BHTD.device)
        return attention_mask(positions_T, positions_T, 0, self.starts_BT)

    def visible_pairs(self) -> int:
        """Query-key pairs inside the mask, over the batch."""
        B, _, T, _ = self.q_BHTD.shape
        return B * T * (T + 1) // 2 - (0 if self.starts_BT is None else self.starts_BT.sum().item())

    def flops(self) -> int:
        """Needed by forward and backward: 2 and 4 matrix products over the visible pairs, a
        multiply-add counting 2.
        """
        _, H, _, D = self.q_BHTD.shape
        return 6 * 2 * H * D * self.visible_pairs()


def make_problem(
    args: argparse.Namespace, case: str, B: int, T: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Random numbers, the same whenever it is called with the same sizes; table and sinks in
    float32, as the model keeps them.
    """
    H, G, D = args.num_heads, args.num_kv_heads, args.head_dim
    draws = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (
        torch.randn(B, T, heads, D, generator=draws, device=device, dtype=dtype).transpose(1, 2)
        for heads in (H, G, G, H)
    )
    table_HTT = (
        torch.randn(H, T, T, generator=draws, device=device).requires_grad_()
        if "table" in CASES[case]
        else None
    )
    starts_BT = random_starts(B, T, args.documents, device) if "documents" in CASES[case] else None
    sinks_H = (
        torch.randn(H, generator=draws, device=device).requires_grad_()
        if "sinks" in CASES[case]
        else None
    )
    return Problem(
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        dy,
        table_HTT,
        starts_BT,
        sinks_H,
    )


def random_starts(B: int, T: int, documents: int, device: torch.device) -> Tensor:
    """Position [B, T] where each token's document begins, for rows that hold up to `documents` of
    them, cut at random.
    """
    draws = torch.Generator().manual_seed(1)
    starts_BT = torch.zeros(B, T, dtype=torch.int64)
    for starts_T in starts_BT:
        cuts = 1 + torch.randperm(T - 1, generator=draws)[: documents - 1]
        starts_T[cuts] = cuts
    return starts_BT.cummax(dim=1).values.to(device)


# ------------------------------------------------------------------------------------- the variants
def manual(p: Problem) -> Tensor:
    """Matmul, table, mask, softmax in float32 (or better), matmul: every score is held, several
    times.
    """
    if p.sinks_H is not None:
        return attention_with_sinks(p.q_BHTD, p.k_BGTD, p.v_BGTD, p.sinks_H, None, True)
    k_BHTD, v_BHTD = p.expanded()
    scores_BHTT = p.q_BHTD @ k_BHTD.transpose(2, 3) / math.sqrt(p.q_BHTD.shape[3])
    if p.table_HTT is not None:
        scores_BHTT = scores_BHTT + p.table_HTT
    scores_BHTT = scores_BHTT.masked_fill(~p.mask(), -math.inf)
    return (
        scores_BHTT.softmax(dim=-1, dtype=torch.promote_types(scores_BHTT.dtype, torch.float32)).to(
            v_BHTD.dtype
        )
        @ v_BHTD
    )


def sdpa(p: Problem, grouped: bool = False) -> Tensor:
    """PyTorch's function, called as model_parts.Attention calls it."""
    if p.sinks_H is not None:
        raise ValueError("F.scaled_dot_product_attention knows no sinks")
    mask = None if p.table_HTT is None and p.starts_BT is None else p.mask()
    if p.table_HTT is not None:
        mask = torch.where(mask, p.table_HTT.to(p.q_BHTD.dtype)[None], -math.inf)
    k, v = (p.k_BGTD, p.v_BGTD) if grouped else p.expanded()
    return F.scaled_dot_product_attention(
        p.q_BHTD,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=k.shape[1] != p.q_BHTD.shape[1],
    )


def rescaled(p: Problem) -> Tensor:
    """Attention with sinks as the model computes it on this device."""
    if p.sinks_H is None:
        raise ValueError("without sinks there is nothing to rescale")
    card = card_of(p.q_BHTD.device) if p.q_BHTD.is_cuda else None
    return sink_attention(p.q_BHTD, p.k_BGTD, p.v_BGTD, p.sinks_H, None, True, card)


def in_c(p: Problem) -> Tensor:
    """Attention as the model computes it on a CPU that has a compiler."""
    if p.q_BHTD.device.type != "cpu" or p.q_BHTD.dtype != torch.float32:
        raise ValueError("attention in C is for CPUs, in float32")
    code, why = cpu_attention.library()
    if code is None:
        raise ValueError(why)
    positions_T = torch.arange(p.q_BHTD.shape[2])
    return cpu_attention.computed(
        *(p.q_BHTD, p.k_BGTD, p.v_BGTD, p.sinks_H, p.table_HTT),
        *(positions_T, positions_T, p.starts_BT, 0),
    )[0]


def triton(p: Problem) -> Tensor:
    """Attention with the learned bias by our Triton kernels."""
    if p.table_HTT is None or p.starts_BT is not None:
        raise ValueError("the Triton kernels are for the learned bias alone")
    if not (p.q_BHTD.is_cuda or is_interpreted()):
        raise ValueError(f"Triton needs a CUDA GPU, and this is {p.q_BHTD.device.type}")
    return bias_attention(p.q_BHTD, p.k_BGTD, p.v_BGTD, p.table_HTT, dtype=p.q_BHTD.dtype)


def forced(p: Problem, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(p)


@functools.cache
def compiled(function: Callable) -> Callable:
    """Compiled as a whole or not at all: FlexAttention would otherwise quietly hold all scores."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def prepare_flex(p: Problem) -> Callable[[], Tensor]:
    """FlexAttention (Dong et al. 2024) with its block mask, which all blocks of a model would
    share, made here.
    """
    B, H, T, _ = p.q_BHTD.shape
    table_HTT, starts_BT, sinks_H = p.table_HTT, p.starts_BT, p.sinks_H

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k if starts_BT is None else (q >= k) & (k >= starts_BT[b, q])

    def add_table(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table_HTT[h, q, k]

    def with_sinks(q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        y, log_BHT = flex_attention(q, k, v, return_lse=True, **how)
        return y * torch.sigmoid(log_BHT - sinks_H[:, None])[..., None].to(y.dtype)

    block_mask = create_block_mask(
        visible, None if starts_BT is None else B, None, T, T, device=p.q_BHTD.device
    )
    function = flex_attention if sinks_H is None else with_sinks
    return lambda: compiled(function)(
        p.q_BHTD,
        p.k_BGTD,
        p.v_BGTD,
        score_mod=None if table_HTT is None else add_table,
        block_mask=block_mask,
        enable_gqa=p.k_BGTD.shape[1] != H,
    )


VARIANTS: dict[
    str, Callable[[Problem], Callable[[], Tensor]]
] = {  # problem -> what is timed; what comes before is done once for all blocks
    "manual": lambda p: lambda: manual(p),
    "sdpa_grouped": lambda p: lambda: sdpa(p, grouped=True),
    "sdpa_expanded": lambda p: lambda: sdpa(p),
    "sdpa_compiled": lambda p: lambda: compiled(sdpa)(p),
    "sdpa_flash": lambda p: lambda: forced(p, SDPBackend.FLASH_ATTENTION),
    "sdpa_efficient": lambda p: lambda: forced(p, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_cudnn": lambda p: lambda: forced(p, SDPBackend.CUDNN_ATTENTION),
    "sdpa_math": lambda p: lambda: forced(p, SDPBackend.MATH),
    "c": lambda p: lambda: in_c(p),
    "rescaled": lambda p: lambda: rescaled(p),
    "triton": lambda p: lambda: triton(p),
    "flex": prepare_flex,
}


# ---------------------------------------------------------------------------------------- measuring
def run_once(attend: Callable[[], Tensor], p: Problem) -> dict[str, Tensor]:
    """Forward and backward: the output and the gradients by name."""
    leaves = p.leaves()
    y_BHTD = attend()
    return {"output": y_BHTD} | dict(
        zip(leaves, torch.autograd.grad(y_BHTD, list(leaves.values()), p.dy_BHTD), strict=True)
    )


def expected(p: Problem) -> dict[str, Tensor]:
    """What run_once should return, computed in float64 on the CPU from the same numbers."""

    def exact(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().cpu().double().requires_grad_()

    starts_BT = None if p.starts_BT is None else p.starts_BT.cpu()
    e = Problem(
        exact(p.q_BHTD),
        exact(p.k_BGTD),
        exact(p.v_BGTD),
        p.dy_BHTD.cpu().double(),
        exact(p.table_HTT),
        starts_BT,
        exact(p.sinks_H),
    )
    return run_once(lambda: manual(e), e)


def relative_errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest value, of each tensor."""
    return {
        name: (
            (results[name].cpu().double() - exact[name]).abs().max() / exact[name].abs().max()
        ).item()
        for name in exact
    }


@contextlib.contextmanager
def mode_set(mode: str):
    """Inside, PyTorch does what train.py's --deterministic does, or what it does without."""
    if mode == "deterministic":
        make_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kernel_of(y_BHTD: Tensor) -> str:
    """The backend that PyTorch's attention really took for this output, read from its backward
    graph; math leaves no name there.
    """
    nodes, seen = [y_BHTD.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if found := re.search(r"ScaledDotProduct(\w+?)Attention", node.name()):
            return found[1].lower()
        if "CompiledFunction" in node.name():
            return "compiled"
        nodes += [parent for parent, _ in node.next_functions]
    return "math"


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes that PyTorch holds during a call, above what it held before.

    None where that cannot be asked.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(
        accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())),
        default=0,
    )


def attempt(function: Callable, device: torch.device) -> tuple:
    """(what `function` returns, None), or (None, why there is nothing) whatever it raised: one
    variant must not end the others.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return function(), None
        except Exception as error:
            why = reason(error, [str(w.message) for w in caught])
    if why == OUT_OF_MEMORY:
        release_memory(
            device
        )  # not in the handler: the exception holds the tensors of the frames it passed
    return None, why


def reason(error: Exception, warned: list[str]) -> str:
    """One line on why a variant did not run, in the library's words."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    text = str(error)
    # Each kernel has said in a warning why it is not available, those forbidden here too.
    if "No available kernel" in text:
        told = [w.partition("(Triggered")[0].strip() for w in warned]
        text = " ".join(
            [
                text,
                *(
                    w
                    for w in told
                    if not w.endswith("not used because:") and "runtime disabled" not in w
                ),
            ]
        )
    # The compiler says after much else what the traced code raised: Name('text'), before torch 2.13
    # Name([ConstantVariable(str: 'text')]).
    inner = re.search(r"""raised exception (\w+)\((?:\[\w+\(str: )?(["'])(.+?)\2\)""", text)
    name, text = (inner[1], inner[3]) if inner else (type(error).__name__, text)
    return f"not supported here: {name}: {' '.join(text.split())}"[:REASON_CHARACTERS]


def seconds_per_call(attend: Callable[[], Tensor], p: Problem, calls: int, mode: str) -> float:
    device = p.q_BHTD.device
    with mode_set(mode):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run_once(attend, p)
        synchronize(device)
    return (time.perf_counter() - started) / calls


def examine(
    name: str,
    p: Problem,
    small: Problem,
    exact: dict[str, Tensor],
    mode: str,
    min_sample_seconds: float,
) -> tuple[dict, Callable[[], Tensor]]:
    """(everything about a variant but its speed, the function to time); what it raises is the
    variant's answer.
    """
    device, prepare = p.q_BHTD.device, VARIANTS[name]
    with mode_set(mode):
        row: dict = {"errors": relative_errors(run_once(prepare(small), small), exact)}
        if wrong := [tensor for tensor, error in row["errors"].items() if not math.isfinite(error)]:
            raise ArithmeticError(f"not a number in {', '.join(wrong)}")
        synchronize(device)
        started = time.perf_counter()
        attend = prepare(p)
        synchronize(device)
        row["prepare_seconds"] = time.perf_counter() - started
        first, second = run_once(attend, p), run_once(attend, p)
        row["same_bits"] = {name: torch.equal(first[name], second[name]) for name in first}
        row["kernel"] = kernel_of(first["output"]) if name.startswith("sdpa") else None
        del first, second
        row["peak_above_inputs_bytes"] = peak_bytes(lambda: run_once(attend, p), device)
    row["calls_per_sample"] = math.ceil(min_sample_seconds / seconds_per_call(attend, p, 1, mode))
    return row, attend


def measure_case(
    args: argparse.Namespace, case: str, names: list[str], device: torch.device, dtype: torch.dtype
) -> dict:
    """Every variant of a case in both modes, as it is stored: {variant: {mode: row}}; a row has
    `why` if it did not run.
    """
    # Compiled code of other cases would count towards the limit of what one function may have.
    torch.compiler.reset()
    release_memory(device)
    with explained_out_of_memory(
        device, "not even the inputs fit: lower --batch_size or --context_length"
    ):
        p = make_problem(args, case, args.batch_size, args.context_length, device, dtype)
    small = make_problem(
        args,
        case,
        min(args.batch_size, CHECK_BATCH),
        min(args.context_length, CHECK_TOKENS),
        device,
        dtype,
    )
    exact, flops = expected(small), p.flops()
    rows: dict[tuple[str, str], dict] = {}
    functions: dict[tuple[str, str], Callable[[], float]] = {}

    def sample(key: tuple[str, str], attend: Callable[[], Tensor]) -> float:
        row, seconds = rows[key], None
        if "why" not in row:
            seconds, why = attempt(
                lambda: seconds_per_call(attend, p, row["calls_per_sample"], key[1]), device
            )
            if why:
                rows[key] = {"why": why}
        return math.nan if seconds is None else seconds

    for name, mode in product(names, MODES):
        found, why = attempt(
            lambda name=name, mode=mode: examine(
                name, p, small, exact, mode, args.min_sample_seconds
            ),
            device,
        )
        rows[name, mode] = {"why": why} if found is None else found[0]
        if found is not None:
            functions[name, mode] = functools.partial(sample, (name, mode), found[1])
    limit = (
        {} if device.type == "cpu" else {"most_foreign_cores": math.inf}
    )  # a GPU does not mind a busy core
    for key, samples in alternate_undisturbed(functions, args.repeats, **limit).items():
        if "why" not in rows[key]:
            seconds = summary(samples.values)
            rows[key] |= {
                "seconds": seconds,
                "flops_per_sec": flops / seconds["median"],
                "discarded_samples": samples.discarded,
                "disturbed": samples.disturbed,
            }
    squares = args.batch_size * args.context_length**2
    return {
        "visible_share": p.visible_pairs() / squares,
        "flops": flops,
        "variants": {name: {mode: rows[name, mode] for mode in MODES} for name in names},
    }


def print_case(case: str, results: dict) -> None:
    print(
        f"\n{case}: {100 * results['visible_share']:.1f} % of the pairs visible, "
        f"{results['flops'] / 1e9:,.3g} GFLOP forward and backward"
    )
    print(
        f"{'variant':16}{'mode':15}{'kernel':11}{'ms':>10}{'TFLOP/s':>9}{'memory':>11}{'error':>9}"
        f"  {'made before':11}  bits of two runs"
    )
    for name, modes in results["variants"].items():
        whys = {row.get("why") for row in modes.values()}
        if len(whys) == 1 and None not in whys:
            print(f"{name:16}{'both':15}{whys.pop()}")
            continue
        for mode, row in modes.items():
            if "why" in row:
                print(f"{name:16}{mode:15}{row['why']}")
                continue
            peak = row["peak_above_inputs_bytes"]
            differ = [tensor for tensor, same in row["same_bits"].items() if not same]
            print(
                f"{name:16}{mode:15}{row['kernel'] or '-':11}"
                f"{1000 * row['seconds']['median']:>10.2f}{row['flops_per_sec'] / 1e12:>9.3g}"
                f"{human_bytes(peak) if peak is not None else '-':>11}"
                f"{max(row['errors'].values()):>9.1e}  {1000 * row['prepare_seconds']:>8.2f} ms"
                f"  {'differ in ' + ', '.join(differ) if differ else 'the same'}"
                f"{'; machine was busy' if row['disturbed'] else ''}"
            )


def chosen(flag: str, given: str, known: dict, default: list[str]) -> list[str]:
    """Names of a comma-separated flag, or `default`. ValueError for one that is not known."""
    names = given.split(",") if given else default
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {flag} {unknown[0]!r}: there are {', '.join(known)}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/attention_NAME.json"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="B (default: 16)")
    parser.add_argument("--num_heads", type=int, default=32, help="H, query heads (default: 32)")
    parser.add_argument(
        "--num_kv_heads", type=int, default=8, help="G, key/value heads (default: 8)"
    )
    parser.add_argument("--context_length", type=int, default=2048, help="T (default: 2048)")
    parser.add_argument("--head_dim", type=int, default=32, help="D (default: 32)")
    parser.add_argument(
        "--documents",
        type=int,
        default=8,
        help="documents in a row of the case documents (default: 8)",
    )
    parser.add_argument(
        "--cases",
        default="",
        help=f"comma-separated, of {', '.join(CASES)} (default: {','.join(DEFAULT_CASES)})",
    )
    parser.add_argument(
        "--variants",
        default="",
        help="comma-separated (default: all, the compiled SDPA on a GPU only)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of q, k and v: auto, bfloat16, float16 or float32 (default: auto)",
    )
    parser.add_argument(
        "--num_threads", type=int, default=0, help="CPU threads; 0 = PyTorch's choice (default: 0)"
    )
    parser.add_argument(
        "--repeats", type=int, default=11, help="samples of each variant (default: 11)"
    )
    parser.add_argument(
        "--min_sample_seconds",
        type=float,
        default=0.05,
        help="a sample is as many calls as fill this (default: 0.05)",
    )
    args = parser.parse_args(argv)
    sizes = (
        "batch_size",
        "num_heads",
        "num_kv_heads",
        "context_length",
        "head_dim",
        "documents",
        "repeats",
    )
    if too_small := [name for name in sizes if getattr(args, name) < 1]:
        raise ValueError(f"{too_small[0]} must be at least 1, not {getattr(args, too_small[0])}")
    if args.num_heads % args.num_kv_heads:
        raise ValueError(
            f"num_heads {args.num_heads} must be a multiple of num_kv_heads {args.num_kv_heads}"
        )
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # deterministic mode needs it from cuBLAS's first call on
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    cases = chosen("case", args.cases, CASES, list(DEFAULT_CASES))
    names = chosen(
        "variant",
        args.variants,
        VARIANTS,
        [name for name in VARIANTS if name != "sdpa_compiled" or device.type == "cuda"],
    )
    results = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(args, name) for name in sizes},
        "cases": {},
        "method": {
            "seconds": (
                "of one forward and backward pass, median of samples taken in turns; made before "
                "(prepare_seconds): the block mask, once for all blocks"
            ),
            "flops_per_sec": (
                "12 H D per visible pair of query and key, the six matrix products that are "
                "needed, over the median time"
            ),
            "memory": "peak that PyTorch holds above the inputs, output and gradients included",
            "errors": (
                f"against float64, largest difference over largest value; at most {CHECK_BATCH} "
                f"rows of {CHECK_TOKENS} tokens"
            ),
            "same_bits": "whether two runs gave the same bits",
            "deterministic": "as train.py --deterministic",
        },
    }
    for case in cases:
        results["cases"][case] = measure_case(args, case, names, device, dtype)
        print_case(case, results["cases"][case])
        save_results(
            f"attention_{args.name}", results
        )  # after each: a run that is cut short keeps what it has
    return 0


if __name__ == "__main__":
    cli.run_main(main)
