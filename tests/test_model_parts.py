"""Positions, cache, attention, router, experts: each against a plain version of its function."""

import dataclasses
import math
import random
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config_model import ModelConfig
from model import LLM
from model_parts import (
    Experts,
    KVCache,
    LocalDispatcher,
    MoE,
    Router,
    activate,
    attention_mask,
    attention_with_sinks,
    balance_loss,
    drop_over_capacity,
    rope_frequencies,
    rope_tables,
    rotate,
)
from runtime.kernels.choose import choose_kernels
from runtime.kernels.grouped_linear import GatherRows, grouped_linear, row_bias
from runtime.kernels.sink_attention import sink_attention
from tests.builders import (
    chunks_of,
    random_config,
    random_model,
    sink_case,
    tiny_config,
)
from tests.nightly import nightly_but
from tests.numeric import (
    assert_close,
    before_ties,
    gradients_bound,
    is_close,
    logits_bound,
    rounding,
)
from tests.shared_checks import (
    check_moe_against_a_loop,
    check_no_gradient_from_later_tokens,
    check_rows_do_not_meet,
)


# ---------------------------------------------------------------------------------------- positions
def test_rope_is_a_rotation_by_position_times_frequency():
    config = tiny_config(head_dim=8)
    cos, sin = rope_tables(config, 5, 3, torch.float64, "cpu")
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    z = torch.complex(x[..., :4], x[..., 4:])
    frequencies = torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turned = z * torch.exp(
        1j * torch.outer(torch.arange(5.0, 8.0, dtype=torch.float64), frequencies)
    )
    assert torch.allclose(
        rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1), atol=1e-14
    )


def test_rope_theta_and_linear_scaling_reach_the_frequencies():
    plain = rope_frequencies(tiny_config())
    assert torch.allclose(
        rope_frequencies(tiny_config(rope_theta=500.0)),
        500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8),
    )
    assert torch.allclose(
        rope_frequencies(tiny_config(rope_scaling="linear", rope_scaling_factor=4.0)), plain / 4
    )


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    config = ModelConfig(
        head_dim=64,
        context_length=8192,
        rope_scaling="yarn",
        rope_scaling_factor=4.0,
        use_attention_bias=False,
    )
    plain, scaled = rope_frequencies(ModelConfig(head_dim=64)), rope_frequencies(config)
    # Over the trained context.
    turns = 2048 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 33], plain[turns > 33])
    assert torch.allclose(scaled[turns < 0.9], plain[turns < 0.9] / 4)
    between = (turns < 25) & (turns > 1.5)
    assert ((scaled < plain) & (scaled > plain / 4))[between].all() and between.any()
    cos, _ = rope_tables(config, 0, 1, torch.float64, "cpu")
    assert cos[0, 0] == pytest.approx(0.1 * math.log(4) + 1)
    # As in gpt-oss: the ramp begins and ends between two pairs.
    exact = rope_frequencies(dataclasses.replace(config, yarn_truncate=False))
    first, last = (
        64 * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(10_000)) for turns in (32, 1)
    )
    share = ((torch.arange(32, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    assert torch.allclose(exact, plain * (1 - share) + plain / 4 * share) and not torch.equal(
        exact, scaled
    )


def test_casting_the_model_does_not_round_positions():
    """M3b: the original implementation stored its RoPE tables as buffers.

    .to(bfloat16) rounded them by 2e-3.
    """
    model = LLM(tiny_config()).to(torch.bfloat16)
    assert not [name for name, _ in model.named_buffers() if "cos" in name or "sin" in name]
    cache = KVCache(model.config, 1, 8, torch.bfloat16)
    out = model(torch.tensor([[1, 2, 3]]), cache=cache)
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()


@pytest.mark.parametrize("window", [0, 1, 3])
def test_mask_rule(window):
    mask = attention_mask(torch.arange(4, 8), torch.arange(8), window)
    for i, q in enumerate(range(4, 8)):
        for k in range(8):
            assert mask[i, k] == (k <= q and (not window or q - k < window))


# --------------------------------------------------------------------- causality, cached = uncached


@pytest.mark.parametrize("seed", range(150))
def test_cached_logits_equal_uncached(seed):
    """Over random architectures, windows, chunkings and batches, in float32 and in float64.

    M1: the original implementation's cached prefill had no causal mask: position 0 moved by 0.037
    when the last token changed.
    """
    r = random.Random(seed)
    config = random_config(seed)
    for dtype in (torch.float32, torch.float64):
        model = random_model(config, seed, dtype).eval()
        B, T = r.choice([1, 2, 3]), r.randint(2, config.context_length)
        ids = torch.randint(0, config.vocabulary_size, (B, T))
        with torch.no_grad():
            whole = model(ids).logits
            cache = KVCache(config, B, r.choice([T, T + 3]), dtype)
            parts, at = [], 0
            for size in chunks_of(T, r):
                parts.append(model(ids[:, at : at + size], cache=cache).logits)
                at += size
        assert cache.length == T
        sure = before_ties(model, ids)
        assert sure[:, 0].any()
        assert_close(
            torch.cat(parts, 1)[sure],
            whole[sure],
            logits_bound(config, T, dtype),
            f"seed {seed} {dtype}",
        )


@pytest.mark.parametrize("seed", range(20))
def test_no_gradient_flows_from_later_tokens(seed):
    """The logits at t depend on no later token.

    The gradient is exactly 0, with and without a cache.
    """
    check_no_gradient_from_later_tokens(seed)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_batch_do_not_meet(seed):
    """In train mode too (dropless): changing row 0 leaves row 1 as it was.

    The original implementation's capacity coupled them by 0.32.
    """
    check_rows_do_not_meet(seed)


def test_window_of_one_block_limits_what_is_seen():
    """With one block a query sees exactly `window` tokens.

    Alternating windows leave odd blocks open.
    """
    config = tiny_config(transformer_blocks=1, sliding_window=3, context_length=16)
    model = random_model(config, 0, torch.float64).eval()
    ids = torch.randint(0, 61, (1, 10))
    with torch.no_grad():
        before = model(ids).logits
        changed = ids.clone()
        changed[0, 4] = (changed[0, 4] + 1) % 61
        after = model(changed).logits
    # Rows are grouped by expert, so products round in another way.
    bound = logits_bound(config, 10, torch.float64)
    moved = torch.tensor(
        [not is_close(b, a, bound) for b, a in zip(before[0], after[0], strict=True)]
    )
    assert moved.tolist() == [False] * 4 + [True] * 3 + [False] * 3
    alternating = tiny_config(transformer_blocks=4, sliding_window=3, window_pattern="alternating")
    assert [alternating.window(b) for b in range(4)] == [3, 0, 3, 0]


def test_a_ring_holds_only_its_window():
    config = tiny_config(sliding_window=4, window_pattern="alternating")
    cache = KVCache(config, 2, 20)
    # As many KV heads as the model has: no repeat.
    assert [k.shape for k in cache.keys] == [
        (2, 2, 4, 8),
        (2, 2, 20, 8),
    ]


# ---------------------------------------------------------------------------------- cache as object
def test_cache_is_the_callers_and_its_limits_are_told():
    """M4, M4d: the original implementation kept one cache on the module.

    Another batch size crashed, and a second call saw the first.
    """
    model = random_model(tiny_config()).eval()
    ids = torch.randint(0, 61, (2, 5))
    with torch.no_grad():
        first = model(ids, cache=KVCache(model.config, 2, 5)).logits
        again = model(ids, cache=KVCache(model.config, 2, 5)).logits
        assert torch.equal(first, again)
        cache = KVCache(model.config, 1, 6)
        with pytest.raises(ValueError, match="made for 1 rows and was given 2"):
            model(ids, cache=cache)
        model(ids[:1], cache=cache)
        with pytest.raises(ValueError, match="holds 6 tokens, 5 of them are used and 2 more"):
            model(ids[:1, :2], cache=cache)
        # A rejected call leaves it usable.
        assert cache.length == 5
        model(ids[:1, :1], cache=cache)


def test_cache_made_in_inference_mode_works_outside_it():
    """M4b: an inference tensor could not be written later: 'Inplace update to inference tensor'."""
    model = random_model(tiny_config()).eval()
    with torch.inference_mode():
        cache = KVCache(model.config, 1, 8)
        model(torch.tensor([[1, 2]]), cache=cache)
    with torch.no_grad():
        model(torch.tensor([[3]]), cache=cache)
    assert cache.length == 3


def test_cache_keeps_the_dtype_asked_for():
    model = random_model(tiny_config()).eval()
    ids = torch.randint(0, 61, (1, 6))
    cache = KVCache(model.config, 1, 6, torch.bfloat16)
    with torch.no_grad():
        logits = model(ids, cache=cache).logits
        assert cache.keys[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert torch.allclose(logits, model(ids).logits, atol=0.2)


def test_longer_context_than_trained():
    """Without the table positions continue; with it the error says why not.

    M2c: the original implementation promised it and crashed.
    """
    long = torch.randint(0, 61, (1, 50))
    assert LLM(tiny_config(context_length=32))(long).logits.shape == (1, 50, 61)
    with pytest.raises(ValueError, match="learned bias.*none beyond"):
        LLM(tiny_config(context_length=32, use_attention_bias=True))(long)


def test_attention_table_is_added_to_the_scores():
    config = tiny_config(
        transformer_blocks=1,
        use_attention_bias=True,
        context_length=6,
        num_heads=2,
        num_kv_heads=1,
        use_rope=False,
        qk_norm=False,
    )
    model = random_model(config, 3, torch.float64)
    attention = model.layers[0].attention
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    q, k, v = (
        w(x).view(1, 6, -1, 8).transpose(1, 2)
        for w in (attention.W_q, attention.W_k, attention.W_v)
    )
    scores = q @ k.transpose(-1, -2).expand(1, 2, 8, 6) / math.sqrt(8) + attention.attention_bias
    scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
    expected = attention.out_proj(
        (scores.softmax(-1) @ v.expand(1, 2, 6, 8)).transpose(1, 2).reshape(1, 6, 16)
    )
    assert_close(attention(x, None), expected, rounding(torch.float64, 32, 8, 6, 6, 16))


@pytest.mark.parametrize("seed", range(30))
def test_a_sink_takes_its_share_of_the_softmax_and_gives_nothing(seed):
    """By the plain operations and by the kernels, results and all gradients.

    Compared with one more key whose value is 0 and whose score is the sink.
    """
    q, k, v, sinks, mask, is_causal = sink_case(seed)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    visible = (
        attention_mask(torch.arange(T), torch.arange(S), 0)
        if is_causal
        else torch.ones(T, S, dtype=torch.bool)
        if mask is None
        else mask
    )
    scores = torch.einsum("bgjtd,bgsd->bgjts", q.view(B, G, H // G, T, D), k).reshape(
        B, H, T, S
    ) / math.sqrt(D)
    exp = torch.cat(
        (scores.masked_fill(~visible, -math.inf), sinks[None, :, None, None].expand(B, H, T, 1)), -1
    ).exp()
    shares = exp / exp.sum(-1, keepdim=True)
    expected = torch.einsum(
        "bgjts,bgsd->bgjtd", shares[..., :S].view(B, G, H // G, T, S), v
    ).reshape(B, H, T, D)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v, sinks), gradient)
    for function in (attention_with_sinks, sink_attention):
        y = function(q, k, v, sinks, mask, is_causal)
        # Scores, softmax, values; backward the same again for each of two operands, and sums over
        # the queries of a group.
        lengths = D, S, S
        assert_close(y, expected, rounding(torch.float64, *lengths))
        for got, want in zip(
            torch.autograd.grad(y, (q, k, v, sinks), gradient), wanted, strict=True
        ):
            assert_close(got, want, rounding(torch.float64, *3 * lengths, B * T * H // G))
    assert (shares[..., S] > 0.01).any(), "the sink was to matter"


def test_the_kernel_keeps_no_scores():
    """What is saved for the backward pass grows with the tokens, not with their square.

    The plain operations save the square, several times.
    """
    T, saved = 256, {}
    q, k, v, sinks = (
        torch.randn(shape, requires_grad=True)
        for shape in ((1, 2, T, 8), (1, 1, T, 8), (1, 1, T, 8), (2,))
    )
    for function in (attention_with_sinks, sink_attention):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            function(q, k, v, sinks, None, True)
        saved[function] = sum(sizes)
    assert (
        saved[sink_attention] <= 2 * q.numel() + k.numel() + v.numel() + 2 * T + 2
        and saved[attention_with_sinks] > 2 * T * T
    )


def test_sinks_in_half_precision_are_rounded_once():
    """A factor rounded to bfloat16 would shift a whole row.

    The kernel's result is scaled in float32.
    """
    q, k, v, sinks, mask, is_causal = sink_case(3, torch.float32)
    half = [x.detach().to(torch.bfloat16) for x in (q, k, v)]
    exact = attention_with_sinks(*(x.double() for x in half), sinks.double(), mask, is_causal)
    error = (
        sink_attention(*half, sinks, mask, is_causal).double() - exact
    ).abs() / exact.abs().clamp(min=1e-2)
    assert error.max() < 2**-6 and error.mean() < 2**-9


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"use_attention_bias": True}])
def test_a_model_with_sinks_learns_them(changes):
    """Every head's sink has a gradient, by the kernel and by the plain operations.

    Those run with dropout or a learned attention bias.
    """
    config = tiny_config(
        attention_sinks=True,
        router_bias=True,
        sliding_window=5,
        window_pattern="alternating",
        **changes,
    )
    model, losses = random_model(config, 1), []
    ids = torch.randint(0, 61, (2, 12))
    for chosen in (False, True):
        if chosen:
            choose_kernels(model, torch.device("cpu"), torch.float32)
        model.zero_grad()
        torch.manual_seed(0)
        out = model(ids, targets_BT=ids.roll(-1, 1))
        out.cross_entropy_sum.backward()
        losses.append(out.cross_entropy_sum.item())
        for block in model.layers:
            assert (block.attention.sinks.grad.abs() > 0).all() and (
                block.moe.router.bias.grad.abs() > 0
            ).any()
    assert_close(losses[0], losses[1], logits_bound(config, 12))


# ------------------------------------------------------------------------------- mixture of experts


@pytest.mark.parametrize("seed", range(120))
def test_moe_against_a_per_token_loop(seed):
    """Outputs, counts and drops over random sizes: one expert, all chosen, few tokens, ..."""
    check_moe_against_a_loop(seed)


@pytest.mark.parametrize("changes", [{}, {"expert_activation": "gelu", "expert_bias": True}])
def test_grouped_matmul_equals_one_expert_after_another(changes):
    """The GPU's path, run here in fp32: outputs and every gradient."""
    config = tiny_config(**changes)
    moe = random_model(config, 1).layers[0].moe
    x = torch.randn(2, 9, 32, requires_grad=True)
    results = []
    for grouped in (False, True):
        moe.experts.grouped = grouped
        moe.zero_grad()
        x.grad = None
        y, _ = moe(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad] + [p.grad.clone() for p in moe.parameters()])
    for plain, fast in zip(*results, strict=True):
        # A block without its attention; 18 rows.
        assert_close(
            fast,
            plain,
            gradients_bound(dataclasses.replace(config, transformer_blocks=1), 9, rows=2),
        )


def test_bias_gradients_of_grouped_experts_are_summed_in_float32():
    """A gather's backward rounded to bfloat16 after every row: 13 % off after 2,048 of them.

    The product with one-hot rows is exact enough.
    """
    bias = torch.randn(4, 16, requires_grad=True)
    experts = torch.arange(8192) % 4
    weights = torch.rand(8192, 16) + 0.5
    (row_bias(bias.bfloat16(), experts) * weights.bfloat16()).sum().backward()
    exact = torch.zeros(4, 16).index_add_(0, experts, weights.bfloat16().float())
    assert torch.allclose(bias.grad, exact, rtol=0.01)
    assert torch.equal(row_bias(bias, experts), bias[experts])


def test_balance_loss_is_one_at_balance_and_top_k_does_not_matter():
    """The original implementation's was top_k at balance (fault M6)."""
    for E, K in ((4, 1), (8, 2), (6, 3)):
        uniform = torch.full((E,), 1 / E)
        assert balance_loss(uniform, torch.full((E,), 24 * K // E)).item() == pytest.approx(1.0)
        collapsed = torch.zeros(E)
        collapsed[0] = 1.0
        assert balance_loss(collapsed, 24 * collapsed).item() == pytest.approx(E)


def test_capacity_keeps_everything_at_balance_and_drops_by_weight():
    """M5, M5b: the original implementation's capacity ignored top_k.

    It dropped 37.5 % of a perfectly balanced batch, late rows first.
    """
    E, K, N = 4, 2, 32
    experts = torch.stack((torch.arange(N) % E, (torch.arange(N) + 1) % E), 1)
    counts = torch.bincount(experts.flatten(), minlength=E)
    weights = torch.rand(N, K)
    kept, share = drop_over_capacity(weights, experts, counts, 1.0)
    assert share == 0 and torch.equal(kept, weights)
    everything_to_one = torch.zeros(N, 1, dtype=torch.int64)
    kept, share = drop_over_capacity(
        weights[:, :1], everything_to_one, torch.tensor([N, 0, 0, 0]), 1.0
    )
    assert share.item() == pytest.approx(0.75) and (kept > 0).sum() == N / E
    assert kept[kept > 0].min() >= weights[:, :1][kept == 0].max()


def test_capacity_is_not_rounded_up_by_binary_fractions():
    """ceil(1.1 * 100 * 2 / 20) was 12: 1.1 is a little more than that in binary."""
    kept, _ = drop_over_capacity(
        torch.rand(100, 2),
        torch.zeros(100, 2, dtype=torch.int64),
        torch.tensor([200] + [0] * 19),
        1.1,
    )
    assert (kept > 0).sum() == 11


def test_capacity_does_not_apply_at_inference():
    config = tiny_config(capacity_factor=0.25)
    model, ids = random_model(config), torch.randint(0, 61, (2, 16))
    assert model.train()(ids).router.dropped_share.min() > 0
    assert (model.eval()(ids).router.dropped_share == 0).all()


def test_router_is_float32_under_autocast():
    """M3: a bf16 forward and backward pass also runs on the CPU.

    The original implementation's index_add_ did not.
    """
    model, ids = random_model(tiny_config()), torch.randint(0, 61, (2, 8))
    seen = {}
    model.layers[0].moe.router.register_forward_hook(
        lambda m, a, out: seen.update(weights=out[0].dtype, logits=out[3].dtype)
    )
    exact = model(ids, ids)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = model(ids, ids)
        out.cross_entropy_sum.backward()
        assert seen == {"weights": torch.float32, "logits": torch.float32}
        assert out.cross_entropy_sum.dtype == torch.float32
        assert out.cross_entropy_sum.item() == pytest.approx(
            exact.cross_entropy_sum.item(), rel=0.05
        )
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_selection_bias_moves_the_choice_but_not_the_weights():
    config = tiny_config(router_bias_rate=0.1, top_k=1)
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 32)
    router.selection_bias[3] = 100.0
    weights, experts, probabilities, _ = router(x)
    assert (experts == 3).all() and torch.allclose(weights, torch.ones(5, 1))


def test_balance_experts_moves_biases_towards_the_idle():
    model = LLM(tiny_config(router_bias_rate=0.1))
    model.balance_experts(torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert torch.allclose(
        model.layers[0].moe.router.selection_bias, torch.tensor([-0.1, 0.1, 0.1, 0.1])
    )
    assert (model.layers[1].moe.router.selection_bias == 0).all()


def test_router_entropy_and_z_loss():
    config = tiny_config(top_k=1)
    moe = MoE(config)
    torch.nn.init.normal_(moe.experts.w_in)
    torch.nn.init.normal_(moe.experts.w_out)
    torch.nn.init.zeros_(moe.router.weight)
    _, stats = moe(torch.randn(1, 6, 32))
    assert stats.entropy.item() == pytest.approx(
        math.log(4)
    ) and stats.z_loss.item() == pytest.approx(math.log(4) ** 2)


def test_expert_dropout_is_on_in_training_only():
    """The original implementation parsed --dropout and ignored it (T11)."""
    for field in ("experts", "attention"):
        model = random_model(tiny_config(dropout=0.5))
        module = model.layers[0].moe if field == "experts" else model.layers[0].attention
        x = torch.randn(1, 8, 32)
        call = (
            (lambda m=module, x=x: m(x)[0])
            if field == "experts"
            else (lambda m=module, x=x: m(x, None))
        )
        model.train()
        assert not torch.equal(call(), call())
        model.eval()
        assert torch.equal(call(), call())


def test_dispatcher_is_a_seam():
    """MoE.dispatcher gets the assignments, in this form, and its result is used."""
    moe = random_model(tiny_config()).layers[0].moe
    x, calls = torch.randn(1, 5, 32), []

    class Spy(LocalDispatcher):
        def __call__(self, x_NC, weights_NK, experts_NK, counts_E, experts):
            calls.append(
                (
                    x_NC.shape,
                    weights_NK.shape,
                    experts_NK.shape,
                    counts_E.sum().item(),
                    type(experts),
                )
            )
            return 2 * super().__call__(x_NC, weights_NK, experts_NK, counts_E, experts)

    plain, _ = moe(x)
    moe.dispatcher = Spy()
    doubled, _ = moe(x)
    assert torch.allclose(doubled, 2 * plain) and calls == [((5, 32), (5, 2), (5, 2), 10, Experts)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    nightly_but(
        [
            {},
            {
                "expert_activation": "gelu",
                "expert_bias": True,
                "qkv_bias": True,
                "out_proj_bias": True,
                "head_bias": True,
                "use_attention_bias": True,
            },
            {"tie_embeddings": True, "sliding_window": 3, "z_loss_coef": 1e-2},
        ],
        0,
    ),
)
def test_gradients_of_the_whole_model(changes):
    """gradcheck in float64: every parameter against finite differences.

    Hand-written backward passes included.
    """
    config = tiny_config(
        d_model=6,
        d_ff=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocabulary_size=7,
        context_length=5,
        num_experts=3,
        transformer_blocks=1,
        aux_loss_coef=0.1,
        **changes,
    )
    model = random_model(config, 4, torch.float64)
    ids = torch.randint(0, 7, (2, 5))
    names = [n for n, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def loss(*values):
        out = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids, ids))
        return out.cross_entropy_sum / out.num_targets + out.aux_loss + out.z_loss

    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-6, nondet_tol=0.0)


# ------------------------------------------------------------------------------------- one expert
ONE_EXPERT = [
    {},
    {"expert_activation": "gelu", "expert_bias": True, "router_bias": True},
    {"expert_activation": "swiglu_clamped", "expert_bias": True, "router_bias_rate": 1e-2},
    {"capacity_factor": 0.5},
]


class OperatorNames(TorchDispatchMode):
    """Collects the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.name().removeprefix("aten::").partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def as_any_number_of_experts(moe: MoE, x_BTC: torch.Tensor):
    """Return MoE.forward's output and statistics of one expert, computed as of several.

    Choose by top-k, sort, gather, multiply group by group, put back, weigh.
    """
    x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
    _, _, probabilities_NE, logits_NE = moe.router(x_NC)
    experts_N1 = probabilities_NE.topk(1, dim=-1).indices
    weights_N1 = probabilities_NE.gather(1, experts_N1)
    weights_N1 = weights_N1 / weights_N1.sum(dim=-1, keepdim=True)
    counts_E = torch.bincount(experts_N1.flatten(), minlength=1)
    aux_loss = balance_loss(probabilities_NE.mean(dim=0), counts_E)
    z_loss = logits_NE.logsumexp(dim=-1).square().mean()
    entropy = -torch.special.xlogy(probabilities_NE, probabilities_NE).sum(dim=-1).mean()
    dropped = torch.zeros(())
    if moe.capacity_factor:
        weights_N1, dropped = drop_over_capacity(
            weights_N1, experts_N1, counts_E, moe.capacity_factor
        )
    order_N = experts_N1.flatten().argsort(stable=True)
    inverse_N = order_N.argsort()
    e = moe.experts
    h_NF = grouped_linear(GatherRows.apply(x_NC, order_N, inverse_N, 1), e.w_in, e.b_in, counts_E)
    y_NC = grouped_linear(activate(h_NF, e.activation), e.w_out, e.b_out, counts_E)
    y_N1C = GatherRows.apply(y_NC, inverse_N, order_N, 1).view(len(x_NC), 1, -1)
    y_BTC = (y_N1C * weights_N1[:, :, None]).sum(dim=1).view_as(x_BTC)
    load_E = counts_E.to(entropy.dtype) / experts_N1.numel()
    return y_BTC, (aux_loss, z_loss, load_E, entropy, dropped)


@pytest.mark.parametrize("changes", ONE_EXPERT)
@pytest.mark.parametrize("kernels", [False, True])
def test_one_expert_computes_what_several_would(changes, kernels):
    """Equal up to rounding; without C, statistics and the router's gradient to the bit."""
    config = tiny_config(num_experts=1, top_k=1, **changes)
    model = random_model(config)
    if kernels:
        choose_kernels(model, torch.device("cpu"), torch.float32)
    moe = model.layers[0].moe.train()
    x_BTC, grad_BTC = torch.randn(2, 3, 9, 32)

    def outcome(function):
        x = x_BTC.clone().requires_grad_()
        moe.zero_grad()
        y, stats = function(x)
        ((y * grad_BTC).sum() + 0.3 * stats[0] + 0.7 * stats[1]).backward()
        return y.detach(), stats, x.grad, {n: p.grad for n, p in moe.named_parameters()}

    y, stats, grad_x, gradients = outcome(moe)
    old_y, old_stats, old_grad_x, old_gradients = outcome(
        lambda x: as_any_number_of_experts(moe, x)
    )

    def check_router(own, old):
        # A softmax of one number, its products of 32 features, and sums over 27 tokens.
        assert_close(own, old, rounding(torch.float32, 32 + 27) if kernels else 0.0)

    for own, old in zip(stats, old_stats, strict=True):
        check_router(own.detach(), old.detach())
    assert gradients.keys() == old_gradients.keys()
    routers = [name for name in gradients if name.startswith("router.")]
    assert routers and gradients["router.weight"].abs().max() > 0
    for name in routers:
        check_router(gradients[name], old_gradients[name])
    # Rows of 32 features, hidden layers of 24, and sums over 27 tokens.
    assert_close(y, old_y, rounding(torch.float32, 32 + 24))
    assert_close(grad_x, old_grad_x, rounding(torch.float32, 32 + 24))
    for name, old in old_gradients.items():
        assert_close(gradients[name], old, rounding(torch.float32, 32 + 24 + 27), name)
    if config.capacity_factor:
        assert stats.dropped_share > 0 and (y == 0).all(dim=-1).any()


@pytest.mark.parametrize("changes", ONE_EXPERT[:-1])
@pytest.mark.parametrize("kernels", [False, True])
def test_one_expert_is_neither_chosen_sorted_nor_gathered(changes, kernels):
    """A dense model of 0.8 M parameters spent a tenth of its step on the way to its one expert."""
    model = random_model(tiny_config(num_experts=1, top_k=1, **changes))
    if kernels:
        choose_kernels(model, torch.device("cpu"), torch.float32)
    moe = model.layers[0].moe.train()
    with OperatorNames() as names:
        y, stats = moe(torch.randn(2, 9, 32, requires_grad=True))
        (y.sum() + stats.aux_loss + stats.z_loss).backward()
    assert not any(name.startswith("gptoss::") for name in names.seen)
    for operation in ("sort", "argsort", "topk", "gather", "index_select", "scatter_", "index"):
        assert operation not in names.seen
    # On a CPU with a compiler C does all of it; else there are two products besides the router's,
    # and two more of each in the backward pass. A bias makes a product an addmm.
    products = names.seen["mm"] + names.seen["addmm"]
    assert products == (3 if moe.dispatcher.kernel else 9)


def test_one_expert_in_inference_keeps_the_operation_of_few_shapes():
    """Prompts come in every length, and oneDNN would keep a kernel for each (cpu_experts)."""
    model = random_model(tiny_config(num_experts=1, top_k=1, expert_activation="gelu"))
    # As without a compiler.
    model.layers[0].moe.experts.feed_forward = torch.ops.gptoss.feed_forward.default
    x_BTC = torch.randn(1, 9, 32)
    with torch.no_grad(), OperatorNames() as names:
        y, _ = model.layers[0].moe(x_BTC)
    assert "gptoss::feed_forward" in names.seen
    assert_close(y, model.layers[0].moe(x_BTC)[0], rounding(torch.float32, 32 + 24))
