"""Checks that tests and guarantees share: AssertionError says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F

import runtime.inference.cpu_decode as cpu_decode
from config_model import ModelConfig
from model import LLM
from model_parts import KVCache, MoE
from runtime.inference.cpu_decode import native_model
from runtime.inference.quantize import KINDS, packed_kind, quantize_
from tests.builders import (
    random_architecture,
    random_config,
    random_model,
    tiny_config,
    without_chance,
)
from tests.numeric import (
    assert_close,
    before_ties,
    is_close,
    logits_bound,
    packed_bound,
    rounding,
    size_of,
)

HAS_CODE, WHY_NOT = cpu_decode.library()
needs_code = pytest.mark.skipif(HAS_CODE is None, reason=f"no native decoding here: {WHY_NOT}")


# Far from the seeds that are tried.
OTHER_MODEL = 10**6


def close(a: torch.Tensor, b: torch.Tensor, model: LLM) -> bool:
    config = model.config
    # A residual stream of one number may cancel to nearly 0, but what it is a sum of is about 1.
    size = max(size_of(b), 1.0) if config.d_model == 1 else None
    bound = logits_bound(config, config.context_length) + packed_bound(model)
    return is_close(a, b, bound, size)


def check_native_logits(seed: int) -> None:
    """Raise AssertionError if the C code gives other logits than a random model."""
    r = random.Random(seed)
    config = random_architecture(r)
    model = random_model(config, seed)
    # An expert bias that matters.
    with torch.no_grad():
        for block in model.layers:
            if block.moe.router.selection_bias is not None:
                block.moe.router.selection_bias.normal_(
                    generator=torch.Generator().manual_seed(seed)
                )
    if r.random() < 0.6:
        quantize_(model, r.choice(KINDS))
    native, why = native_model(model)
    assert native and not why
    cpu_decode_threads = r.choice([1, 2, 3])
    # However small it is.
    native.least_bytes_per_thread = 1
    # Inputs of 8 bits are too coarse to compare: experts would differ.
    native.planes = 2 if packed_kind(model) == "int4" else 1
    apart = packed_bound(model) / 4
    # Of the texts one at least meets no near tie.
    for longest in range(40, 0, -1):
        texts = [
            [r.randrange(config.vocabulary_size) for _ in range(r.randint(1, longest))]
            for _ in range(r.choice([1, 2, 5, 9]))
        ]
        clear = [before_ties(model, torch.tensor([text]), apart)[0] for text in texts]
        if any(clear_T.all() for clear_T in clear):
            break
    else:
        # One in fifty packed models meets near ties at each token; another is as good.
        return check_native_logits(seed + OTHER_MODEL)
    plain = [model(torch.tensor([text])).logits[0] for text in texts]
    caches = KVCache(config, len(texts), 48).rows()
    is_ring, done, compared = any(caches[0].is_ring), [0] * len(texts), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(cpu_decode_threads)
    try:
        while left := [i for i, text in enumerate(texts) if done[i] < len(text)]:
            chosen = r.sample(left, r.randint(1, len(left)))
            chunks = [
                texts[i][done[i] : done[i] + (1 if is_ring else r.choice([1, 1, 2, 7, 30]))]
                for i in chosen
            ]
            all_logits = r.random() < 0.5
            logits = native.forward([caches[i] for i in chosen], chunks, all_logits)
            expected, is_sure = [], []
            for i, chunk in zip(chosen, chunks, strict=True):
                done[i] += len(chunk)
                rows = slice(done[i] - (len(chunk) if all_logits else 1), done[i])
                expected.append(plain[i][rows])
                is_sure.append(clear[i][rows])
            sure = torch.cat(is_sure)
            compared += sure.sum().item()
            assert not sure.any() or close(logits[sure], torch.cat(expected)[sure], model), config
            assert [cache.length for cache in caches] == done
        assert compared
        if native.planes == 2:
            # As users have it: the other distances between inputs, and half the room for them.
            native, _ = native_model(model)
            native.least_bytes_per_thread = 1
            caches = KVCache(config, len(texts), 48).rows()
            chunks = [text[:1] if is_ring else text for text in texts]
            assert native.forward(caches, chunks).isfinite().all()
    finally:
        torch.set_num_threads(threads)


def check_no_gradient_from_later_tokens(seed: int) -> None:
    """Raise AssertionError if the logits of a random model depend on a later token."""
    config = random_config(1000 + seed)
    model = random_model(config, seed, torch.float64).eval()
    T, t = 9, seed % 8
    ids = torch.randint(0, config.vocabulary_size, (2, T))
    for cached in (False, True):
        inputs = {}

        def keep(module, args, output, inputs=inputs):
            output.retain_grad()
            inputs["x"] = output

        handle = model.embed.register_forward_hook(keep)
        logits = model(ids, cache=KVCache(config, 2, T, torch.float64) if cached else None).logits
        handle.remove()
        logits[:, t].sum().backward()
        grad = inputs["x"].grad
        assert (grad[:, t + 1 :] == 0).all() and (grad[:, t] != 0).any()


def check_rows_do_not_meet(seed: int) -> None:
    """Raise AssertionError if a row of a batch depends on another row."""
    config = without_chance(random_config(2000 + seed))
    model = random_model(config, seed, torch.float64).train()
    ids = torch.randint(0, config.vocabulary_size, (2, 8))
    other = torch.stack((torch.randint(0, config.vocabulary_size, (8,)), ids[1]))
    assert_close(
        model(ids).logits[1], model(other).logits[1], logits_bound(config, 8, torch.float64)
    )


def moe_by_token(moe: MoE, x_NC, capacity_factor=0.0):
    """Compute the layer one token and one expert at a time.

    Return (output, assignments per expert, dropped).
    """
    E, K = moe.router.num_experts, moe.router.top_k
    logits = x_NC @ moe.router.weight.T + (0 if moe.router.bias is None else moe.router.bias)
    probabilities = torch.softmax(logits, -1)
    chosen = []
    for n in range(len(x_NC)):
        scores = probabilities[n] + (
            moe.router.selection_bias.double() if moe.router.selection_bias is not None else 0
        )
        best = torch.argsort(scores, descending=True)[:K].tolist()
        total = sum(probabilities[n, e] for e in best)
        chosen += [(n, e, probabilities[n, e] / total) for e in best]
    load = [sum(1 for _, e, _ in chosen if e == expert) for expert in range(E)]
    dropped = 0
    if capacity_factor:
        capacity = math.ceil(capacity_factor * len(x_NC) * K / E)
        kept = []
        for expert in range(E):
            mine = sorted((a for a in chosen if a[1] == expert), key=lambda a: -a[2].item())
            kept += mine[:capacity]
            dropped += max(0, len(mine) - capacity)
        chosen = kept
    y, ex = torch.zeros_like(x_NC), moe.experts
    for n, e, weight in chosen:
        h = F.linear(x_NC[n], ex.w_in[e], None if ex.b_in is None else ex.b_in[e])
        gate, up = h[: len(h) // 2], h[len(h) // 2 :]
        if ex.activation == "swiglu":
            h = F.silu(gate) * up
        elif ex.activation == "swiglu_clamped":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        else:
            h = F.gelu(h)
        y[n] += weight * F.linear(h, ex.w_out[e], None if ex.b_out is None else ex.b_out[e])
    return y, load, dropped


def check_moe_against_a_loop(seed: int) -> None:
    """Raise AssertionError if a random MoE layer is not what `moe_by_token` computes."""
    r = random.Random(seed)
    E = r.choice([1, 2, 4, 9])
    config = tiny_config(
        d_model=12,
        d_ff=8,
        num_experts=E,
        top_k=r.randint(1, E),
        expert_activation=r.choice(["gelu", "swiglu", "swiglu_clamped"]),
        expert_bias=r.random() < 0.5,
        router_bias=r.random() < 0.5,
        capacity_factor=r.choice([0.0, 0.0, 0.5, 1.0, 1.25]),
        router_bias_rate=r.choice([0.0, 1e-3]),
    )
    moe = random_model(config, seed, torch.float64).layers[0].moe.train()
    N = r.choice([1, 3, 17])
    x = torch.randn(1, N, 12, dtype=torch.float64)
    y, stats = moe(x)
    expected, load, dropped = moe_by_token(moe, x[0], config.capacity_factor)
    bound = rounding(torch.float64, *3 * [config.d_model], E, config.d_ff, config.top_k)
    assert_close(y[0], expected, bound, f"seed {seed}")
    assert torch.allclose(
        stats.load * N * config.top_k / E, torch.tensor(load, dtype=stats.load.dtype), atol=1e-9
    )
    assert stats.dropped_share.item() == pytest.approx(dropped / (N * config.top_k), abs=1e-6)


def fields_not_varied() -> list[str]:
    """Fields of ModelConfig that have one value in all random configurations."""
    configs = [random_config(seed) for seed in range(200)]
    return [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if len({getattr(config, f.name) for config in configs}) < 2
    ]
