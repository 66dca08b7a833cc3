"""Attention in C equals the plain attention, forward and backward, in every build."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

import model_parts
from model_parts import KVCache, attention_mask, attention_with_sinks
from runtime.checks.kernels import settle_kernels
from runtime.kernels import cpu_attention
from runtime.kernels.choose import choose_kernels, why_not_c
from tests.builders import random_model, tiny_config
from tests.kernels.builds import EVERY_BUILD, take
from tests.numeric import assert_close, gradients_bound, logits_bound, rounding

HAS_CODE, WHY_NOT = cpu_attention.library()
pytestmark = pytest.mark.skipif(HAS_CODE is None, reason=WHY_NOT)
CPU = torch.device("cpu")
# A tile has 48 queries and 96 keys.
LENGTHS = [1, 5, 47, 49, 64, 97, 200]
NAMES = ("y", "q", "k", "v", "sinks", "bias")


def case(T, S=None, heads=(4, 2), D=16, sinks=False, bias=False, window=0, documents=False, B=2):
    """Return what the operation is given, in float64, and the gradient of its result."""
    draws, (H, G) = torch.Generator().manual_seed(0), heads
    S = S or T
    kind = dict(generator=draws, dtype=torch.float64)
    q, k, v, grad = (
        torch.randn(B, length, n, D, **kind).transpose(1, 2)
        for n, length in ((H, T), (G, S), (G, S), (H, T))
    )
    q_positions_T, starts_BT = torch.arange(S - T, S), None
    if documents:
        starts_BT = (q_positions_T - torch.randint(0, 20, (B, T), generator=draws)).clamp(min=0)
    given = (
        *(q, k, v),
        torch.randn(H, **kind) if sinks else None,
        torch.randn(H, T, S, **kind) if bias else None,
        *(q_positions_T, torch.arange(S), starts_BT, window),
    )
    return given, grad


def plainly(q, k, v, sinks, bias, q_positions, k_positions, starts, window):
    mask = attention_mask(q_positions, k_positions, window, starts)
    if bias is not None:
        mask = bias[None].masked_fill(~mask, -torch.inf)
    return attention_with_sinks(q, k, v, sinks, mask, False)


def in_c(*given):
    return cpu_attention.computed(*given)[0]


def results(function, given, grad, dtype) -> dict[str, Tensor]:
    """Return the result and the gradients of q, k, v, sinks and bias, by name."""
    floats = [None if x is None else x.to(dtype).requires_grad_() for x in given[:5]]
    y = function(*floats, *given[5:])
    leaves = {name: x for name, x in zip(NAMES[1:], floats, strict=True) if x is not None}
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad.to(dtype)), strict=True)
    )


def check(dtype, *args, **changes) -> None:
    given, grad = case(*args, **changes)
    expected = results(plainly, given, grad, torch.float64)
    D, (T, S) = given[0].shape[3], (given[0].shape[2], given[1].shape[2])
    # Products over D, S and T; a gradient of a score is a difference that may cancel.
    bound = 4 * rounding(dtype, D, D, S, T)
    for name, value in results(in_c, given, grad, dtype).items():
        size = expected[name].square().mean().sqrt().item()
        scale = max(size, 0.1 * grad.square().mean().sqrt().item())
        assert_close(value, expected[name], bound, f"{name} of {args} {changes}", size=scale)


MASKS = {
    "causal": {},
    "window": dict(window=3),
    "sinks": dict(sinks=True),
    "documents": dict(documents=True),
    "bias": dict(bias=True),
    "all": dict(window=7, sinks=True, documents=True, bias=True),
}


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("mask", MASKS)
def test_it_equals_plain_attention(mask, T):
    check(torch.float32, T, **MASKS[mask])


@pytest.mark.parametrize("D", [2, 20, 32, 40, 64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 1), (6, 2)])
def test_head_sizes_and_shared_heads(D, heads):
    check(torch.float32, 65, heads=heads, D=D, sinks=True)


@pytest.mark.parametrize("mask", ["causal", "window", "all"])
@pytest.mark.parametrize("T, S", [(2, 150), (50, 130), (97, 98)])
def test_earlier_keys(mask, T, S):
    """Queries come after keys that are there already: a prompt's later part."""
    check(torch.float32, T, S, **MASKS[mask])


def test_keys_in_any_order():
    """A ring buffer's slots are not in the order of their positions."""
    given, grad = case(40, 120, window=30, sinks=True)
    order = torch.roll(torch.arange(120), 50)
    shuffled = (given[0], given[1][:, :, order], given[2][:, :, order], *given[3:6], order)
    y = results(in_c, given, grad, torch.float32)["y"]
    ours = results(in_c, (*shuffled, *given[7:]), grad, torch.float32)["y"]
    assert_close(ours, y, rounding(torch.float32, given[0].shape[3], 120))


@pytest.mark.parametrize("sinks", [False, True])
def test_nothing_visible_is_nan_unless_there_is_a_sink(sinks):
    """As a softmax over nothing; a sink then takes all, and the result is 0."""
    given, _ = case(5, sinks=sinks)
    nowhere = (*given[:5], given[5] - 10, *given[6:])
    y = in_c(
        *(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in nowhere)
    )
    assert (y == 0).all() if sinks else y.isnan().all()


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_does_not_hide(which, what):
    """A NaN's payload once made a finite number of 2^NaN in a draft of the polynomial."""
    given, _ = case(60)
    floats = [x.float() for x in given[:3]]
    floats[which][0, 0, 10, 3] = what
    y = in_c(*floats, *given[3:])
    plain = plainly(*floats, *given[3:])
    # The plain products multiply hidden keys by 0, and so find more.
    seen = ~y.isfinite()
    assert seen[0].any() and not (seen & plain.isfinite()).any()
    first_query = seen[0].any(dim=-1).any(dim=0).nonzero()[0]
    # A tile's later keys are multiplied by 0 too, by queries of earlier panels never.
    assert first_query == 10 if which == 0 else first_query <= 10


def test_large_scores_are_exact_powers_of_their_differences():
    given, grad = case(70)
    large = (given[0] * 300, given[1] * 300, *given[2:])
    expected = results(plainly, large, grad, torch.float64)["y"]
    ours = results(in_c, large, grad, torch.float32)["y"]
    # Scores of 1e5 are off by their own rounding: only ties may differ.
    same = (ours.double() - expected).abs().amax(dim=-1) < 0.1
    assert same.double().mean() > 0.97


@pytest.mark.parametrize("mask", ["causal", "all"])
def test_derivatives_are_those_of_finite_differences(mask):
    given, _ = case(7, 9, heads=(2, 1), D=3, B=1, **MASKS[mask])
    floats = [None if x is None else x.requires_grad_() for x in given[:5]]
    present = [x for x in floats if x is not None]

    def function(*values):
        values = iter(values)
        return in_c(*(None if x is None else next(values) for x in floats), *given[5:])

    assert torch.autograd.gradcheck(function, present)


@pytest.mark.slow
@EVERY_BUILD
def test_every_build_gives_the_same(monkeypatch, build, dtype):
    take(monkeypatch, cpu_attention, build, dtype)
    for mask in MASKS.values():
        for T, S in ((5, 5), (65, 65), (97, 200)):
            check(dtype, T, S, D=24, **mask)
    check(dtype, 130, heads=(2, 2), D=64)


# --------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("mask", ["causal", "all"])
def test_the_same_bits_on_any_number_of_threads(mask):
    """Also where no OpenMP is found, and threads are made for the call."""
    given, grad = case(300, heads=(6, 2), D=32, **MASKS[mask])

    def on(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return results(in_c, given, grad, torch.float32)
        finally:
            torch.set_num_threads(before)

    expected = on(1)
    for threads in (2, 3):
        for name, value in on(threads).items():
            assert torch.equal(value, expected[name]), name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "parallel_region", lambda: 0)
        for name, value in on(2).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("mask", MASKS)
def test_a_text_s_bits_are_its_own(mask):
    """Neither other texts of the batch nor later tokens change them."""
    given, _ = case(130, **MASKS[mask])
    floats = [None if x is None else x.float() for x in given[:5]]
    y = in_c(*floats, *given[5:])
    alone = [x[1:] for x in floats[:3]]
    starts = None if given[7] is None else given[7][1:]
    assert torch.equal(in_c(*alone, *floats[3:], *given[5:7], starts, given[8]), y[1:])
    short = [x[:, :, :70] for x in floats[:3]]
    bias = None if floats[4] is None else floats[4][:, :70, :70]
    starts = None if given[7] is None else given[7][:, :70]
    begin = in_c(*short, floats[3], bias, given[5][:70], given[6][:70], starts, given[8])
    assert torch.equal(begin, y[:, :, :70])


# --------------------------------------------------------------------------------- the model
CONFIGS = {
    "plain": {},
    "grouped": dict(num_heads=4, num_kv_heads=2, qk_norm=True),
    "sinks and windows": dict(attention_sinks=True, sliding_window=5),
    "learned bias": dict(use_attention_bias=True),
}


def pair(**changes):
    """Return a model with the kernel and a copy without."""
    model = random_model(tiny_config(**changes))
    choose_kernels(model, CPU, torch.float32)
    assert settle_kernels(model) == []
    assert all(block.attention.kernel for block in model.layers)
    plain = copy.deepcopy(model)
    for block in plain.layers:
        block.attention.kernel = None
    return model, plain


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_s_attention_and_gradients(name, documents):
    model, plain = pair(**CONFIGS[name])
    T, C = model.config.context_length, model.config.d_model
    x_BTC = torch.randn(2, T, C, generator=torch.Generator().manual_seed(0))
    starts_BT = torch.arange(T).expand(2, T) // 4 * 4 if documents else None
    rope = model_parts.rope_tables(model.config, 0, T, torch.float32, CPU)
    outs = []
    for attention in (model.layers[0].attention, plain.layers[0].attention):
        x = x_BTC.clone().requires_grad_()
        y_BTC = attention(x, rope, None, starts_BT)
        (y_BTC * x_BTC).sum().backward()
        outs.append(
            {"y": y_BTC, "x": x.grad} | {n: p.grad for n, p in attention.named_parameters()}
        )
    ours, theirs = outs
    assert_close(ours["y"], theirs["y"], rounding(torch.float32, C, C, T))
    for key in ours:
        assert_close(ours[key], theirs[key], gradients_bound(model.config, T, 2 * T), key)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [(7, 5, 4), (1, 9, 6)])
def test_a_prompt_in_parts(name, sizes):
    """Its keys come from a cache, where windows are shorter from a ring buffer."""
    model, plain = pair(**CONFIGS[name])
    calls, kernel = [], cpu_attention.attend

    def counted(*given):
        y = kernel(*given)
        calls.append(y is not None)
        return y

    for block in model.layers:
        block.attention.kernel = counted
    T = sum(sizes)
    ids_1T = torch.arange(T)[None] % model.config.vocabulary_size
    cache = KVCache(model.config, 1, model.config.context_length)
    expected_TV = plain(ids_1T).logits[0]
    with torch.inference_mode():
        parts = [model(ids, cache=cache).logits[0] for ids in ids_1T.split(sizes, dim=1)]
    assert_close(torch.cat(parts), expected_TV, logits_bound(model.config, T))
    assert calls == [size > 1 for size in sizes for _ in model.layers]


def test_it_steps_aside_for_what_it_does_not_know():
    model, _ = pair(dropout=0.5)
    attention = model.layers[0].attention
    q, k, v = (torch.randn(1, n, 6, attention.D) for n in (attention.H, attention.G, attention.G))
    kernel = functools.partial(cpu_attention.attend, attention)
    assert kernel(q, k, v, None, None) is None
    attention.eval()
    assert kernel(q, k, v, None, None) is not None
    assert kernel(q[:, :, :1], k[:, :, :1], v[:, :, :1], None, None) is None
    assert kernel(q.double(), k.double(), v.double(), None, None) is None
    assert kernel(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, None) is None


def test_without_a_compiler_pytorch_computes_and_a_line_says_so(monkeypatch):
    monkeypatch.setattr(cpu_attention, "library", lambda *given: (None, "there is no C compiler"))
    model = random_model(tiny_config())
    choose_kernels(model, CPU, torch.float32)
    assert all(block.attention.kernel is None for block in model.layers)
    assert why_not_c(CPU, torch.float32) == "there is no C compiler"
    assert model(torch.arange(6)[None]).logits.isfinite().all()


def test_changed_attention_is_what_is_computed(monkeypatch):
    """A contributor caps the scores in model_parts; the kernel would train without that."""
    model, _ = pair()
    plain = model_parts.Attention.attend

    def capped(self, q_BHTD, *given):
        return plain(self, q_BHTD.tanh(), *given)

    monkeypatch.setattr(model_parts.Attention, "attend", capped)
    (line,) = settle_kernels(model)
    assert "cpu_attention.py has other results" in line
    assert all(block.attention.kernel is None for block in model.layers)


@pytest.mark.parametrize("changed", ["window", "starts"])
def test_a_changed_mask_rule_is_what_is_computed(monkeypatch, changed):
    model, _ = pair(sliding_window=4)
    rule = model_parts.attention_mask

    def other(q_positions, k_positions, window, starts=None):
        if changed == "window":
            return rule(q_positions, k_positions, window and window + 1, starts)
        return rule(q_positions, k_positions, window, None)

    monkeypatch.setattr(model_parts, "attention_mask", other)
    assert settle_kernels(model)
    assert any(block.attention.kernel is None for block in model.layers)


def test_a_compilers_operation_and_the_call_without_one_give_the_same_bits():
    for changes in ({}, MASKS["all"]):
        given, grad = case(9, 12, **changes)
        mine = results(in_c, given, grad, torch.float32)
        other = results(lambda *g: cpu_attention.attention(*g)[0], given, grad, torch.float32)
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    with torch.profiler.profile() as profile:
        results(in_c, given, grad, torch.float32)
    names = {event.key for event in profile.key_averages()}
    assert "_Attention" in names and not any(name.startswith("gptoss::") for name in names)


def test_operators_keep_what_pytorch_asks_of_them():
    """Fake results have the shapes, steps and dtypes of true ones: compiled code relies on it."""
    for changes in ({}, MASKS["all"]):
        given, grad = case(9, 12, **changes)
        floats = [None if x is None else x.float().requires_grad_() for x in given[:5]]
        torch.library.opcheck(cpu_attention.attention, (*floats, *given[5:]))
        y, logs = cpu_attention.attention(*floats, *given[5:])
        detached = [None if x is None else x.detach() for x in floats]
        torch.library.opcheck(
            cpu_attention._attention_backward,
            (grad.float(), y.detach(), logs, *detached, *given[5:], floats[4] is not None),
        )


@pytest.mark.slow
def test_a_compiled_block_is_one_graph():
    model, _ = pair(attention_sinks=True)
    T = model.config.context_length
    x_BTC = torch.randn(2, T, model.config.d_model)
    rope = model_parts.rope_tables(model.config, 0, T, torch.float32, CPU)
    attention = model.layers[0].attention
    compiled = torch.compile(attention, fullgraph=True)
    expected = attention(x_BTC, rope)
    ours = compiled(x_BTC, rope)
    assert_close(ours, expected, rounding(torch.float32, model.config.d_model, T))
    ours.sum().backward()
    assert attention.sinks.grad.isfinite().all()
