"""Which dtype is faster on this CPU: a clock, on the shapes of the model that is to be trained.

A few large products do not answer that. A block in bfloat16 also rounds its weights, pads the rows
of each expert, and attends no faster. So a block takes its forward and backward pass in either
dtype, with as many tokens as a micro-batch has, up to a limit, and with the loads that a new router
gives its experts, which differ from pass to pass. Muon's products are timed on the matrices that it
has.

A clock may answer otherwise the next time. So a run asks once, says what it heard in a line, and
keeps the answer. A run with --deterministic never asks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import torch

from config_model import ModelConfig
from model_parts import Block, rope_tables
from runtime.base.device import autocast, has_bfloat16_products
from runtime.kernels.choose import choose_kernels
from runtime.training.muon import orthogonalise

# bfloat16 must be so many times as fast: it rounds, and two clocks are never quite alike.
LEAST_GAIN = 1.1
# Passes of each dtype, after one that builds the kernels of oneDNN.
TRIES = 3
# Of a pass. A whole micro-batch of a large model takes a CPU minutes.
MOST_TOKENS = 2048

CPU, DTYPES = torch.device("cpu"), (torch.float32, torch.bfloat16)


def compute_dtype(config: ModelConfig, sequences: int) -> tuple[torch.dtype, str]:
    """Return the dtype in which a CPU trains a model faster, and a line that says why.

    sequences: of a micro-batch. float32 and no line where the CPU has no products in bfloat16.
    """
    if not has_bfloat16_products():
        return torch.float32, ""
    return _chosen(_block(config, sequences), "a block computes")


def muon_dtype(config: ModelConfig, elements_at_once: int) -> tuple[torch.dtype, str]:
    """Return the dtype in which a CPU orthogonalises a model's matrices faster, and a line.

    elements_at_once: of the matrices that Muon takes together.
    """
    if not has_bfloat16_products():
        return torch.float32, ""
    return _chosen(_products(config, elements_at_once), "Muon orthogonalises")


def _chosen(work: Callable[[torch.dtype], float], what: str) -> tuple[torch.dtype, str]:
    """Return bfloat16 if its work takes clearly fewer seconds, else float32; and the line."""
    tries: dict[torch.dtype, list[float]] = {dtype: [] for dtype in DTYPES}
    # They take turns, so that a slow spell of the machine meets both.
    for number in range(TRIES + 1):
        for dtype in DTYPES:
            seconds = work(dtype)
            if number:
                tries[dtype].append(seconds)
    wide, narrow = (min(tries[dtype]) for dtype in DTYPES)
    dtype = torch.bfloat16 if narrow * LEAST_GAIN <= wide else torch.float32
    name = str(dtype).removeprefix("torch.")
    line = (
        f"dtype    {what} in {name}: bfloat16 takes {narrow / wide:.2f} of float32's time here, "
        f"{1000 * narrow:.3g} ms of {1000 * wide:.3g}"
    )
    return dtype, line


def _block(config: ModelConfig, sequences: int) -> Callable[[torch.dtype], float]:
    """Return a function that gives the seconds of a block's forward and backward pass."""
    T = min(config.context_length, MOST_TOKENS)
    B = max(1, min(sequences, MOST_TOKENS // T))
    generator = torch.Generator().manual_seed(0)
    # Modules draw numbers when they are made, which may not move the run's.
    with torch.random.fork_rng(devices=[]):
        block = Block(config, 0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, config.init_std, generator=generator)
    rope = rope_tables(config, 0, T, torch.float32, CPU) if config.use_rope else None

    def seconds(dtype: torch.dtype) -> float:
        # Other tokens each time, so that the experts have other loads.
        x_BTC = torch.randn(B, T, config.d_model, generator=generator).requires_grad_()
        choose_kernels(SimpleNamespace(layers=[block]), CPU, dtype)
        started = time.perf_counter()
        with autocast(CPU, dtype):
            y_BTC, stats = block(x_BTC, rope)
            loss = y_BTC.sum() + stats.aux_loss
        torch.autograd.grad(loss, [x_BTC, *block.parameters()])
        return time.perf_counter() - started

    return seconds


def _products(config: ModelConfig, elements_at_once: int) -> Callable[[torch.dtype], float]:
    """Return a function that gives the seconds of orthogonalising all matrices of a block."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for (R, C), count in hidden_shapes(config).items():
        at_once = min(max(1, elements_at_once // (R * C)), count)
        batches.append((torch.randn(at_once, R, C, generator=generator), count / at_once))

    def seconds(dtype: torch.dtype) -> float:
        total = 0.0
        for matrices_NRC, times in batches:
            update_NRC = matrices_NRC.to(dtype)
            started = time.perf_counter()
            orthogonalise(update_NRC, dtype).float()
            total += times * (time.perf_counter() - started)
        return total

    return seconds


def hidden_shapes(config: ModelConfig) -> Counter[tuple[int, int]]:
    """Return the shapes of the matrices of a block that Muon trains, and how many have each."""
    C, D = config.d_model, config.attention_head_dim
    queries, keys = config.num_heads * D, config.num_kv_heads * D
    gates = 1 if config.expert_activation == "gelu" else 2
    shapes: Counter[tuple[int, int]] = Counter()
    for shape, count in (
        ((queries, C), 1),
        ((keys, C), 2),
        ((C, queries), 1),
        ((config.d_ff, C), gates * config.num_experts),
        ((C, config.d_ff), config.num_experts),
    ):
        shapes[shape] += count
    return shapes
