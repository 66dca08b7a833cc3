"""The whole model: initialisation, loss, sampling, generation."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from config_model import PRESETS, ModelConfig
from model import LLM, generate, penalise_repetition, sample
from model_parts import KVCache
from runtime.kernels.choose import choose_kernels
from runtime.kernels.linear_cross_entropy import (
    IGNORE,
    add_product_,
    linear_cross_entropy,
    softmax_gradient_,
)
from tests.builders import random_model, tiny_config
from tests.nightly import nightly_but
from tests.numeric import assert_close, gradients_bound, is_close, logits_bound, rounding


# ----------------------------------------------------------------------------------- initialisation
def test_initial_weights():
    config = tiny_config(
        d_model=128,
        transformer_blocks=8,
        d_ff=64,
        num_experts=8,
        head_dim=32,
        vocabulary_size=500,
        use_attention_bias=True,
        expert_bias=True,
        out_proj_bias=True,
        head_bias=True,
        init_std=0.03,
    )
    torch.manual_seed(0)
    model = LLM(config)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        elif name.endswith(("bias", "b_in", "b_out")):
            assert (p == 0).all(), name
        else:
            expected = 0.03 / math.sqrt(16) if name.endswith(("out_proj.weight", "w_out")) else 0.03
            assert p.std().item() == pytest.approx(expected, rel=0.1), name


def test_first_loss_is_that_of_guessing():
    config = ModelConfig(**PRESETS["nano"].model)
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocabulary_size, (4, 65))
    out = LLM(config)(ids[:, :-1], ids[:, 1:])
    assert (out.cross_entropy_sum / out.num_targets).item() == pytest.approx(
        math.log(config.vocabulary_size), abs=0.25
    )


def test_tied_head_is_the_embedding():
    model = LLM(tiny_config(tie_embeddings=True))
    assert model.head_weight is model.embed.weight and "out_head.weight" not in model.state_dict()
    untied = LLM(tiny_config())
    assert untied.head_weight is untied.out_head.weight


# --------------------------------------------------------------------------------------------- loss
def test_what_pads_the_rows_of_logits_is_no_garbage():
    """Rows of logits begin at multiples of 64 numbers, and the padding was never written.

    A CPU with AMX multiplies bfloat16 in pairs of columns, so with an odd vocabulary the gradient
    met one of the padding's numbers, times 0: whatever the memory held before, NaN included. Then
    every step of a run was skipped.
    """
    seen = []

    def look(logits_NV, bias_V, targets_N, needs_gradient):
        seen.append(logits_NV.as_strided((len(logits_NV), 64), (64, 1)))
        assert logits_NV.stride() == (64, 1) and (seen[-1][:, 61:] == 0).all()
        return softmax_gradient_(logits_NV, bias_V, targets_N, needs_gradient)

    h, w = (torch.randn(n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (7, 61))
    # What the allocator gives out next.
    garbage = torch.full((4, 64), math.nan, dtype=torch.bfloat16)
    del garbage
    linear_cross_entropy(h, w, None, torch.randint(0, 61, (7,)), 4, look).backward()
    assert len(seen) == 2 and h.grad.isfinite().all()


@pytest.mark.parametrize("vocabulary", [61, 257])
def test_odd_vocabularies_have_finite_gradients_in_bfloat16(vocabulary, monkeypatch):
    """The same, seen from outside: memory that held NaN, and the CPU's own bfloat16 products."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(math.nan))
    h, w = torch.randn(9, 32, requires_grad=True), torch.randn(vocabulary, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(h, w, None, torch.randint(0, vocabulary, (9,)), 4).backward()
    assert h.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunked_loss_equals_the_plain_one(bias, rows):
    """Value and all three gradients, with ignored targets.

    For chunks that divide the rows and for ones that do not.
    """
    torch.manual_seed(1)
    h, w, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 5), (11, 5), (11,))
    )
    targets = torch.tensor([3, IGNORE, 0, 10, 7, IGNORE, 2])
    plain = F.cross_entropy(
        F.linear(h, w, b if bias else None), targets, ignore_index=IGNORE, reduction="sum"
    )
    expected = torch.autograd.grad(3 * plain, [h, w] + [b] * bias)
    chunked = linear_cross_entropy(h, w, b if bias else None, targets, rows)
    actual = torch.autograd.grad(3 * chunked, [h, w] + [b] * bias)
    assert_close(chunked, plain, rounding(torch.float64, 5, 11, 7))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, rounding(torch.float64, 5, 11, 11, 7))


def test_loss_never_holds_all_logits():
    """Not one tensor of N x V elements, forward or backward.

    The original implementation held four, in fp32.
    """
    N, V = 600, 1000
    h, w = torch.randn(N, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        linear_cross_entropy(h, w, None, torch.randint(0, V, (N,)), 256).backward()
    # Rows begin at multiples of 64 numbers.
    assert max(sizes) == 256 * 1024 < N * V


def test_reported_loss_is_the_loss():
    """Recomputed in float64 from the logits with numpy.

    Auxiliary losses scale with their coefficients.
    """
    model = random_model(tiny_config(aux_loss_coef=0.5, z_loss_coef=0.25))
    ids = torch.randint(0, 61, (3, 12))
    targets = torch.randint(0, 61, (3, 12))
    targets[0, :5] = IGNORE
    with torch.no_grad():
        out = model(ids, targets)
        logits = model(ids).logits.double().numpy().reshape(-1, 61)
    t = targets.numpy().ravel()
    log_p = logits - logits.max(1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    expected = -log_p[np.arange(36), np.clip(t, 0, None)][t != IGNORE].sum()
    assert out.num_targets == 31 and out.logits is None
    assert_close(out.cross_entropy_sum, expected, rounding(torch.float32, 32, 61, 31))
    assert out.aux_loss.item() == pytest.approx(0.5 * out.router.aux_loss.sum().item())
    assert out.z_loss.item() == pytest.approx(0.25 * out.router.z_loss.sum().item())


def test_loss_without_gradients_computes_none():
    model = random_model(tiny_config())
    ids = torch.randint(0, 61, (1, 4))
    with torch.no_grad():
        assert not model(ids, ids).cross_entropy_sum.requires_grad


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([[61]]), "from 0 to 60"),
        (torch.tensor([[-1]]), "from 0 to 60"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
    ],
)
def test_bad_ids_are_told(ids, message):
    """M9: the original implementation gave a raw IndexError, and empty logits (1, 0, V)."""
    with pytest.raises(ValueError, match=message):
        LLM(tiny_config())(ids)


def test_loss_can_be_walked_back_twice():
    """Its gradients are scaled in place to save a copy of the head's.

    Not when the graph is kept: the second pass must not scale again.
    """
    h, w = torch.randn(9, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = 0.5 * linear_cross_entropy(h, w, None, torch.randint(0, 50, (9,)), 4)
    once = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w))
    assert (
        all(torch.equal(a, b) for a, b in zip(once, again, strict=True)) and once[1].abs().sum() > 0
    )


@pytest.mark.parametrize("V", [61, 64])
def test_half_precision_loss_is_near_the_plain_one(V):
    """bfloat16 products, float32 softmax and sums.

    The buffer's rows are padded, the gradient's not.
    """
    h, w, b = (
        torch.randn(40, 16, requires_grad=True),
        torch.randn(V, 16, requires_grad=True),
        torch.randn(V, requires_grad=True),
    )
    targets = torch.randint(0, V, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, w, b, targets, 16)
    actual = (loss, *torch.autograd.grad(loss, (h, w, b)))
    plain = F.cross_entropy(F.linear(h, w, b), targets, reduction="sum")
    for a, e in zip(actual, (plain, *torch.autograd.grad(plain, (h, w, b))), strict=True):
        assert a.dtype == torch.float32 and (a - e).norm() < 0.02 * e.norm()


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("is_first", [True, False])
def test_a_gpu_adds_to_the_heads_gradient_inside_the_product(monkeypatch, is_first):
    """In float32, with no [V, C] product that is rounded to bfloat16 first.

    The total's old values are ignored the first time. A CPU has no such product, so one is put in
    its place.
    """
    seen = []

    def addmm(total, left, right, *, beta, out_dtype, out):
        assert left.dtype == right.dtype == torch.bfloat16 and out is total
        seen.append((beta, out_dtype))
        added = (left.float() @ right.float()).as_subclass(torch.Tensor)
        return out.copy_(added if beta == 0 else out + added)

    monkeypatch.setattr(torch, "addmm", addmm)
    g = torch.Generator().manual_seed(0)
    chunk = torch.randn(40, 61, generator=g).bfloat16()
    h = torch.randn(40, 8, generator=g).bfloat16()
    total = torch.full((61, 8), math.nan if is_first else 0.5)
    add_product_(total.as_subclass(OnGpu), chunk, h, is_first)
    exact = chunk.double().T @ h.double() + (0 if is_first else 0.5)
    assert seen == [(float(not is_first), torch.float32)]
    # Products of two bfloat16 numbers are exact in float32; a sum of n of them is off by less than
    # n roundings of the sum of their magnitudes.
    magnitude = chunk.double().abs().T @ h.double().abs() + 0.5
    assert ((total.double() - exact).abs() <= 41 * 2**-24 * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_elsewhere_the_product_is_rounded_as_ever(dtype):
    """Bit for bit what the loss did before GPUs had a way of their own."""
    g = torch.Generator().manual_seed(0)
    chunk, h = torch.randn(40, 61, generator=g).to(dtype), torch.randn(40, 8, generator=g).to(dtype)
    total = torch.full((61, 8), math.nan)
    add_product_(total, chunk, h, is_first=True)
    product = chunk.T @ h
    assert torch.equal(total, product.float())
    add_product_(total, chunk, h, is_first=False)
    if dtype == torch.float32:
        assert torch.equal(total, product.addmm_(chunk.T, h))
    else:
        assert torch.equal(total, product.float() + product)


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpointing, on_cores", nightly_but([(False, False), (True, False), (False, True)], 2)
)
def test_compiled_in_one_graph_whatever_the_experts_loads_are(checkpointing, on_cores):
    """T1: compiled in place, so a checkpoint's keys get no prefix (the original's did).

    No graph break, and one graph for all blocks and for 20 steps whose experts' loads all differ.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = random_model(tiny_config(transformer_blocks=3, expert_bias=True))
    plain = copy.deepcopy(model)
    model.activation_checkpointing = checkpointing
    if on_cores:
        choose_kernels(model, torch.device("cpu"), torch.float32)
    names = list(model.state_dict())
    for block in model.layers:
        # Fullgraph: a break is an error.
        block.compile(fullgraph=True, backend=counter)
    loads = set()
    for _ in range(20):
        ids = torch.randint(0, 61, (2, 16))
        compiled, expected = model(ids, ids), plain(ids, ids)
        (compiled.cross_entropy_sum + compiled.aux_loss).backward()
        (expected.cross_entropy_sum + expected.aux_loss).backward()
        loads.add(tuple(compiled.router.load.flatten().tolist()))
        bound = logits_bound(model.config, 16)
        assert_close(compiled.cross_entropy_sum, expected.cross_entropy_sum, bound)
    assert len(loads) == 20 and counter.frame_count == 1
    assert list(model.state_dict()) == names
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, gradients_bound(model.config, 16, rows=20 * 2), n)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    nightly_but(
        [
            dict(head_bias=True),
            dict(
                attention_sinks=True,
                router_bias=True,
                expert_activation="swiglu_clamped",
                expert_bias=True,
                sliding_window=9,
                qk_norm=False,
            ),
        ],
        1,
    ),
    ids=["modern", "gpt-oss"],
)
def test_compiled_by_the_real_compiler_computes_the_same(changes):
    """Inductor's code for the blocks and for the loss, forward and backward.

    And the loss's second chunk, which is shorter. Compiled by torch 2.11, attention with sinks in
    float32 once had gradients of 0: its result came from a `to` that changed nothing.
    """
    torch.compiler.reset()
    model = random_model(tiny_config(transformer_blocks=1, vocabulary_size=300, **changes))
    ids = torch.randint(0, 300, (3, 100))
    plain = model(ids, ids)
    plain.cross_entropy_sum.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    choose_kernels(model, torch.device("cpu"), torch.float32)
    model.compile_in_place()
    compiled = model(ids, ids)
    compiled.cross_entropy_sum.backward()
    bound = logits_bound(model.config, 100)
    assert_close(compiled.cross_entropy_sum, plain.cross_entropy_sum, bound)
    for n, p in model.named_parameters():
        assert_close(p.grad, gradients[n], gradients_bound(model.config, 100, rows=3), n)


@pytest.mark.nightly
@pytest.mark.slow
def test_compiled_blocks_take_another_length():
    """`is_causal=T > 1` became a symbol at a process's second length, and attention rejected it."""
    torch.compiler.reset()
    model = random_model(tiny_config(transformer_blocks=1))
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=None, backend="aot_eager")
    for T in (16, 9, 1):
        ids = torch.randint(0, 61, (2, T))
        with torch.no_grad():
            assert model(ids).logits.shape == (2, T, 61)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}])
def test_activation_checkpointing_changes_memory_and_nothing_else(changes):
    """The same loss and gradients to the last bit, with fewer saved numbers.

    Also with dropout: its random numbers are drawn again.
    """
    ids, results, saved = torch.randint(0, 61, (2, 32)), [], []
    for checkpointing in (False, True):
        model = random_model(tiny_config(**changes))
        model.activation_checkpointing, count = checkpointing, 0

        def pack(t):
            nonlocal count
            count += t.numel() * (not isinstance(t, torch.nn.Parameter))
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(ids, ids)
        saved.append(count)
        (out.cross_entropy_sum + out.aux_loss).backward()
        results.append([out.cross_entropy_sum, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("changes", [{}, {"use_attention_bias": True}, {"sliding_window": 5}])
def test_packed_documents_do_not_see_each_other(changes):
    """With `starts`, two documents in one row give what each gives alone at the same positions.

    The same logits, and no gradient across.
    """
    model = random_model(tiny_config(**changes), dtype=torch.float64)
    first, second = torch.randint(0, 61, (1, 9)), torch.randint(0, 61, (1, 7))
    ids = torch.cat((first, second), dim=1)
    starts = torch.tensor([[0] * 9 + [9] * 7])
    alone = model(first).logits
    packed = model(ids, starts_BT=starts).logits
    bound = logits_bound(model.config, 16, torch.float64)
    assert_close(packed[:, :9], alone, bound)
    other = model(torch.cat((torch.randint(0, 61, (1, 9)), second), dim=1), starts_BT=starts).logits
    assert_close(packed[:, 9:], other[:, 9:], bound)
    assert not is_close(packed[:, 9:], model(ids).logits[:, 9:], 1e-3)
    x = []
    model.embed.register_forward_hook(
        lambda module, inputs, output: x.append(output.requires_grad_()) or x[-1]
    )
    gradient = torch.autograd.grad(model(ids, starts_BT=starts).logits[:, 9:].sum(), x[-1:])[0]
    assert gradient[:, :9].abs().max() == 0 and gradient[:, 9:].abs().max() > 0


# ----------------------------------------------------------------------------------------- sampling
def chi_square_p(counts, probabilities) -> float:
    """P value of Pearson's test (Wilson-Hilferty approximation of the tail)."""
    expected = probabilities * counts.sum()
    used = expected > 0
    assert (counts[~used] == 0).all()
    degrees = int(used.sum()) - 1
    statistic = float((((counts - expected) ** 2)[used] / expected[used]).sum())
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.5, 4, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (0.9, 6, 0.7, 0.0),
        (1.0, 999, 1.0, 0.0),
        (1.0, 0, 1.0, 0.3),
        (0.5, 0, 1.0, 0.1),
        (1.3, 3, 1.0, 0.2),
        (1.0, 0, 0.9, 0.25),
        (2.0, 8, 0.8, 0.4),
    ],
)
def test_samples_follow_the_distribution(temperature, top_k, top_p, min_p):
    torch.manual_seed(5)
    logits = torch.randn(12) * 0.7
    p = np.exp(logits.double().numpy() / temperature)
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p)
    keep = np.zeros(12, bool)
    keep[order[: top_k or 12]] = True
    p = np.where(keep, p, 0) / p[keep].sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    drawn = sample(
        logits.expand(100_000, 12),
        temperature,
        top_k,
        top_p,
        generator=torch.Generator().manual_seed(7),
        min_p=min_p,
    )
    assert chi_square_p(np.bincount(drawn.numpy(), minlength=12), p) > 1e-4


def test_greedy_banned_and_extreme_settings():
    """P2, P3, P14: temperature 0 and 1e-40, top_k above the vocabulary and ties in bf16.

    They broke the original implementation.
    """
    logits = torch.tensor([[1.0, 5.0, 3.0], [2.0, 0.0, -1.0]])
    assert sample(logits, 0).tolist() == [1, 0]
    assert sample(logits, 1e-40).tolist() == [1, 0] and sample(logits * 1e30, 1e-3).tolist() == [
        1,
        0,
    ]
    assert sample(logits, 0, banned_ids=torch.tensor([1])).tolist() == [2, 0]
    assert sample(logits, 1e6, top_k=1).tolist() == [1, 0] and sample(
        logits, 1e6, top_p=1e-9
    ).tolist() == [1, 0]
    ties = torch.zeros(1000, 50, dtype=torch.bfloat16)
    assert len(set(sample(ties, 1.0, top_k=7).tolist())) == 7
    assert (
        sample(logits, 1e6, min_p=1.0).tolist() == [1, 0]
        and len(set(sample(torch.zeros(1000, 9), 1.0, min_p=1.0).tolist())) == 9
    )
    banned = sample(torch.zeros(5000, 4), 1.0, banned_ids=torch.tensor([0, 2]))
    assert set(banned.tolist()) == {1, 3}


def test_extreme_settings_with_banned_ids():
    """temperature above 3e38 became inf, and -inf / inf NaN.

    top_p below 1e-45 is 0 in float32 and masked every id.
    """
    banned = torch.tensor([1])
    assert sample(torch.tensor([[1.0, 9.0, 3.0]]), 1e300, top_k=0, banned_ids=banned).item() in (
        0,
        2,
    )
    assert sample(torch.tensor([[1.0, 9.0, 3.0]]), 1.0, top_p=1e-300, banned_ids=banned).item() == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(temperature, bad):
    """Greedy decoding drew from NaN silently.

    Sampling raised PyTorch's probability tensor error.
    """
    # Marked, not raised: on a GPU that would be a wait.
    assert sample(torch.tensor([[1.0, bad, 0.0], [0.0, 9e9, 0.0]]), temperature).tolist() == [
        -1,
        1,
    ]
    model = random_model(tiny_config())
    with torch.no_grad():
        model.embed.weight[5] = bad
    with pytest.raises(ValueError, match="not finite.*float32"):
        list(generate(model, torch.tensor([[5]]), 3, temperature=temperature))


def test_each_row_can_draw_from_a_generator_of_its_own():
    """Then what a row draws does not depend on the others."""
    logits, seeds = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), [3, 1, 4, 1]

    def generators(chosen):
        return [torch.Generator().manual_seed(seeds[i]) for i in chosen]

    for settings in ({}, {"top_k": 10}, {"top_p": 0.7}, {"min_p": 0.1}):
        together = sample(logits, 1.0, generator=generators(range(4)), **settings)
        for chosen in ([0], [2, 1], [3, 0, 2]):
            assert (
                sample(logits[chosen], 1.0, generator=generators(chosen), **settings).tolist()
                == together[chosen].tolist()
            )


@pytest.mark.parametrize(
    "settings",
    [
        (-1.0, 0, 1.0),
        (float("nan"), 0, 1.0),
        (1.0, -5, 1.0),
        (1.0, 0, 0.0),
        (1.0, 0, 1.1),
        (1.0, 0, float("nan")),
        (1.0, 0, 1.0, -0.1),
        (1.0, 0, 1.0, 1.1),
        (1.0, 0, 1.0, 0.0, 0.0),
        (1.0, 0, 1.0, 0.0, float("nan")),
        (1.0, 0, 1.0, 0.0, float("inf")),
    ],
)
def test_settings_without_a_meaning_are_refused(settings):
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    with pytest.raises(ValueError, match="must be"):
        next(
            generate(
                random_model(tiny_config()),
                torch.ones(1, 2, dtype=torch.int64),
                2,
                **dict(zip(names, settings, strict=False)),
            )
        )
    if len(settings) < 5:
        with pytest.raises(ValueError, match="must be"):
            sample(torch.zeros(1, 3), **dict(zip(names, settings, strict=False)))


def test_repetition_penalty_makes_what_is_there_less_likely_whatever_its_sign():
    """Dividing a negative logit would make it more likely.

    Ids that end a text are exempt: penalised, it would not end (an end-of-text token begins every
    prompt here).
    """
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    history, exempt = torch.tensor([[0, 1, 1], [2, 3, 2]]), torch.tensor([2])
    assert penalise_repetition(logits, history, 2.0, exempt).tolist() == [
        [1.0, -4.0, 1.0, -1.0],
        [2.0, -2.0, 1.0, -2.0],
    ]
    assert penalise_repetition(logits, history, 0.5, exempt[:0]).tolist() == [
        [4.0, -1.0, 1.0, -1.0],
        [2.0, -2.0, 2.0, -0.5],
    ]


def test_repetition_penalty_counts_the_prompt_and_the_answer():
    model, prompt = random_model(tiny_config()), torch.tensor([[3, 5, 7]])
    plain = torch.cat(list(generate(model, prompt, 24, temperature=0))).tolist()
    hard = torch.cat(
        list(generate(model, prompt, 24, temperature=0, repetition_penalty=1e9))
    ).tolist()
    assert len(set(plain)) < 24 and len({*hard, 3, 5, 7}) == 24 + 3

    def first(token: int, **settings) -> int:
        return next(
            generate(model, torch.tensor([[token, token]]), 1, temperature=0, **settings)
        ).item()

    # One that the model repeats.
    token = next(t for t in range(61) if first(t) == t)
    assert (
        first(token, repetition_penalty=1e9)
        != token
        == first(token, repetition_penalty=1e9, stop_ids=[token])
    )


# --------------------------------------------------------------------------------------- generation
def greedy_by_full_forward(model, ids, count):
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_attention_bias": True},
        {"sliding_window": 4, "window_pattern": "alternating"},
        {"num_kv_heads": 4},
    ],
)
def test_greedy_generation_equals_full_forward_passes(changes):
    model = random_model(tiny_config(**changes), 2, torch.float64).eval()
    prompt = torch.randint(0, 61, (2, 7))
    with torch.no_grad():
        expected = greedy_by_full_forward(model, prompt, 20)[:, 7:]
    drawn = torch.stack(list(generate(model, prompt, 20, temperature=0)), 1)
    assert torch.equal(drawn, expected)


def test_generation_leaves_the_model_as_it_was_and_wastes_no_forward_pass():
    """M4c, P16: the original ended in eval mode and ran one forward pass too many."""
    model = random_model(tiny_config()).train()
    calls = []
    model.layers[0].register_forward_hook(lambda m, a, out: calls.append(a[0].shape[1]))
    assert len(list(generate(model, torch.tensor([[1, 2, 3]]), 4))) == 4
    assert model.training and calls == [3, 1, 1, 1]
    stream = generate(model, torch.tensor([[1, 2, 3]]), 4)
    next(stream)
    stream.close()
    assert model.training and list(generate(model, torch.tensor([[1]]), 0)) == []


def test_prefill_computes_logits_of_the_last_token_only():
    model = random_model(tiny_config()).eval()
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        last = model(ids, cache=KVCache(model.config, 2, 9), last_token_only=True).logits
        assert last.shape == (2, 1, 61)
        assert_close(last, model(ids).logits[:, -1:], logits_bound(model.config, 9))


def test_stop_ids_end_rows_and_then_the_call():
    """Rows past their end kept sampling in the original implementation (P15)."""
    model = random_model(tiny_config())
    drawn = torch.stack(
        list(
            generate(
                model,
                torch.randint(0, 61, (4, 3)),
                29,
                temperature=5.0,
                top_k=0,
                stop_ids=range(0, 61, 3),
                generator=torch.Generator().manual_seed(0),
            )
        ),
        1,
    )
    assert drawn.shape[1] < 29
    for row in drawn.tolist():
        first = next(i for i, t in enumerate(row) if t % 3 == 0)
        assert all(t == row[first] for t in row[first:])
    assert any(row[0] % 3 != 0 for row in drawn.tolist())


def test_same_seed_same_text():
    model = random_model(tiny_config())
    runs = [
        [
            t.item()
            for t in generate(
                model, torch.tensor([[1, 2]]), 20, generator=torch.Generator().manual_seed(s)
            )
        ]
        for s in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("prompt_tokens", [1, 31, 32, 33, 320])
@pytest.mark.parametrize("table", [True, False])
def test_a_full_context_slides_or_stops(prompt_tokens, table):
    """No prompt and no answer is too long; each id equals a fresh forward pass.

    P4: the original implementation crashed and lost the text.
    """
    model = random_model(tiny_config(use_attention_bias=table), 1, torch.float64).eval()
    prompt = torch.randint(0, 61, (1, prompt_tokens))
    drawn = [t.item() for t in generate(model, prompt, 60, temperature=0)]
    assert len(drawn) == 60
    window = prompt[0, -32:].tolist()
    for token in drawn:
        if len(window) > 32:
            window = window[-16:]
        with torch.no_grad():
            assert model(torch.tensor([window])).logits[0, -1].argmax().item() == token
        window.append(token)
    stopped = list(generate(model, prompt, 60, temperature=0, slide=False))
    assert len(stopped) == max(1, 33 - prompt_tokens)


def test_undecodable_ids_are_never_drawn():
    """19 ids of o200k_base have no bytes.

    Drawing one ended the original implementation's session (P1).
    """
    model = random_model(tiny_config())
    banned = [i for i in range(61) if i % 7]
    drawn = [
        t.item()
        for t in generate(
            model, torch.tensor([[1]]), 200, temperature=10.0, top_k=0, banned_ids=banned
        )
    ]
    assert all(t % 7 == 0 for t in drawn)


def test_rows_of_logits_at_a_time_change_neither_loss_nor_gradients():
    """A GPU with room takes more rows (config_model.loss_chunk_rows).

    Only the sums' order differs.
    """
    model = random_model(tiny_config(head_bias=True), dtype=torch.float64)
    ids = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))
    results = []
    for rows in (0, 1, 5, 48, 8192):
        model.loss_rows = rows
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).cross_entropy_sum
        loss.backward()
        results.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            # 48 terms, each rounded to 2^-53 of the largest.
            assert (a - b).abs().max() <= 48 * 2**-52 * max(a.abs().max(), 1.0)
