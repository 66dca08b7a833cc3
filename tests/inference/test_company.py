"""runtime/inference/cpu_decode.c: a token's numbers are the same bits in any company.

Alone, next to other texts, however a text is cut into passes, on one thread and on two, in a ring
buffer or not.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

import runtime.inference.cpu_decode as cpu_decode
from model import LLM
from model_parts import KVCache
from runtime.inference.cpu_decode import NativeModel
from runtime.inference.decoder import router_choices
from runtime.inference.quantize import quantize_
from tests.builders import random_model, tiny_config
from tests.nightly import nightly_but
from tests.shared_checks import close, needs_code

# Widths around the 8 or 16 lanes of a vector, the splits of them between threads, and each thing
# that the C code does in a loop of its own.
MODELS = {
    "SwiGLU, 64": dict(d_ff=64),
    "SwiGLU, 72": dict(d_ff=72),
    "SwiGLU, 200": dict(d_ff=200),
    "SwiGLU, 336": dict(d_ff=336),
    # Rows of which the caches hold few.
    "SwiGLU, 1100": dict(d_ff=1100, num_experts=4),
    # More heads share keys than go over them together.
    "one key head": dict(num_heads=8, num_kv_heads=1, head_dim=20, d_ff=40),
    "GELU with biases": dict(
        d_ff=72, expert_activation="gelu", expert_bias=True, qkv_bias=True, head_bias=True
    ),
    "sinks and windows": dict(
        d_ff=72,
        expert_activation="swiglu_clamped",
        expert_bias=True,
        attention_sinks=True,
        sliding_window=11,
        window_pattern="alternating",
    ),
    "a learned bias": dict(d_ff=40, use_attention_bias=True, use_rope=False),
    "odd sizes": dict(d_model=60, d_ff=44, head_dim=22, num_heads=4, qk_norm=True),
}
CONTEXT = 64


@pytest.fixture(
    scope="module", params=nightly_but(["", "-mno-avx512f"], 0), ids=["own", "no AVX-512"]
)
def code(request):
    """Return the C code, compiled for this machine and for one with shorter vectors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTOSS_CFLAGS", request.param)
        cpu_decode.library.cache_clear()
        code, why = cpu_decode.library()
        if code is None:
            pytest.skip(f"no C kernel: {why}")
        yield code
    cpu_decode.library.cache_clear()


def model_of(name: str, packed: str = "") -> LLM:
    sizes = dict(d_model=128, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=8, top_k=2)
    config = tiny_config(
        **sizes | dict(expert_activation="swiglu", context_length=CONTEXT) | MODELS[name]
    )
    model = random_model(config, 5)
    return quantize_(model, packed) if packed else model


def whole_caches(model: LLM, count: int) -> list[KVCache]:
    """Return caches without ring buffers: they take several tokens at once."""
    return KVCache(dataclasses.replace(model.config, **NO_WINDOW), count, CONTEXT).rows()


NO_WINDOW = dict(sliding_window=0, window_pattern="all")


class Reader:
    """Reads texts with one number of threads; keeps the logits and experts of each token."""

    def __init__(self, model: LLM, code, caches: list[KVCache], texts: list[list[int]]):
        self.native, self.caches, self.texts = NativeModel(model, code), caches, texts
        self.logits: list[list[torch.Tensor]] = [[] for _ in texts]
        self.experts: list[list[np.ndarray]] = [[] for _ in texts]
        self.weights: list[list[np.ndarray]] = [[] for _ in texts]

    def read(self, counts: dict[int, int], least_bytes_per_thread: int) -> None:
        """Read so many further tokens of some texts in one pass."""
        self.native.least_bytes_per_thread = least_bytes_per_thread
        done = {i: len(self.logits[i]) for i in counts}
        ids = [self.texts[i][done[i] : done[i] + count] for i, count in counts.items()]
        rows = [range(len(own)) for own in ids]
        caches = [self.caches[i] for i in counts]
        got = self.native.read(caches, ids, rows, with_experts=True)
        at = 0
        for i, count in counts.items():
            for row in range(at, at + count):
                self.logits[i].append(got.logits_RV[row])
                self.experts[i].append(got.experts_LNK[:, row])
                self.weights[i].append(got.weights_LNK[:, row])
            at += count

    def check(self, other: Reader) -> None:
        """Raise AssertionError unless both read the same bits."""
        for i in range(len(self.texts)):
            assert len(self.logits[i]) == len(self.texts[i]) == len(other.logits[i])
            assert torch.equal(torch.stack(self.logits[i]), torch.stack(other.logits[i]))
            assert np.array_equal(self.experts[i], other.experts[i])
            assert np.array_equal(self.weights[i], other.weights[i])


# Bytes a thread: all passes on one thread, all on two, and as it is by default: a pass with more
# rows then has more threads.
ONE, TWO, BY_ROWS = 1 << 60, 1, cpu_decode.LEAST_BYTES_PER_THREAD


@needs_code
@pytest.mark.parametrize(
    "packed", nightly_but(["", "int8", "int4"], 0, 2), ids=["float32", "int8", "int4"]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_token_is_the_same_bits_in_any_company(code, name, packed):
    """Sums had two accumulators for one row and one for several; logits differed by 2e-6.

    And the share of an expert's hidden layer that a thread computes decided which elements take
    the vector's exponential function, and which the C library's. With 72 elements no logits were
    equal.
    """
    model, r = model_of(name, packed), random.Random(0)
    V = model.config.vocabulary_size
    texts = [[r.randrange(V) for _ in range(count)] for count in (1, 9, 24, 37, 38, 53)]
    # More rows than a group of them.
    texts += [[*texts[-1]], texts[-1][:40]]
    every = range(len(texts))

    def reader(rings: bool = False) -> Reader:
        caches = whole_caches(model, len(texts))
        if rings:
            caches = KVCache(model.config, len(texts), CONTEXT).rows()
        return Reader(model, code, caches, texts)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = reader()
        for i in every:
            for _ in texts[i]:
                alone.read({i: 1}, ONE)
        # Each whole, by itself and all together.
        for bytes_per_thread in (ONE, TWO):
            whole, together = reader(), reader()
            for i in every:
                whole.read({i: len(texts[i])}, bytes_per_thread)
            together.read({i: len(texts[i]) for i in every}, bytes_per_thread)
            whole.check(alone)
            together.check(alone)
        for bytes_per_thread in (TWO, BY_ROWS):
            cut, ringed = reader(), reader(rings=True)
            for own, most in ((cut, (1, 1, 2, 3, 5, 12, 30)), (ringed, (1,))):
                while left := [i for i in every if len(own.logits[i]) < len(texts[i])]:
                    some = r.sample(left, r.randint(1, len(left)))
                    counts = {
                        i: min(r.choice(most), len(texts[i]) - len(own.logits[i])) for i in some
                    }
                    own.read(counts, bytes_per_thread)
                own.check(alone)
    finally:
        torch.set_num_threads(threads)
    # They are also right: with inputs of 16 bits, where 4-bit weights have inputs of 8.
    right = reader()
    right.native.planes = 2
    right.read({len(texts) - 2: len(texts[-2])}, ONE)
    expected = model(torch.tensor([texts[-2]])).logits[0]
    clear = torch.tensor(np.stack(right.experts[-2], axis=1)) == router_choices(model, texts[-2])[0]
    sure = clear.flatten(2).all(dim=2).all(dim=0)
    assert sure.float().mean() > 0.5
    assert close(torch.stack(right.logits[-2])[sure], expected[sure], model)


@needs_code
@pytest.mark.parametrize("name", ["SwiGLU, 72", "sinks and windows"])
def test_each_text_names_its_rows_and_what_is_scored_there(code, name):
    """Logits of some rows are those of all rows, and scores are the log-softmax of these."""
    model, r = model_of(name), random.Random(1)
    native, V = NativeModel(model, code), model.config.vocabulary_size
    texts = [[r.randrange(V) for _ in range(count)] for count in (40, 1, 17, 30)]
    rows = [list(range(3, 40)), [0], [], [29, 2]]
    targets = [[r.randrange(V) for _ in own] for own in rows]
    every = native.read(whole_caches(model, 4), texts, [range(len(own)) for own in texts])
    some = native.read(whole_caches(model, 4), texts, rows)
    scored = native.read(whole_caches(model, 4), texts, rows, targets, with_experts=True)
    firsts = np.cumsum([0, 40, 1, 17])
    named = [first + row for first, own in zip(firsts, rows, strict=True) for row in own]
    expected_RV = every.logits_RV[named]
    assert torch.equal(some.logits_RV, expected_RV) and some.log_probs_R is None
    assert some.experts_LNK is None and scored.logits_RV is None
    log_probs_RV = expected_RV.double().log_softmax(dim=1)
    flat = torch.tensor([i for own in targets for i in own])
    # The most likely ids next to the logits are those of the scores.
    both = native.read(whole_caches(model, 4), texts, rows, with_best=True)
    assert torch.equal(both.logits_RV, expected_RV) and both.log_probs_R is None
    assert np.array_equal(both.best_R, scored.best_R)
    assert np.array_equal(both.best_log_probs_R, scored.best_log_probs_R)
    # The exponential function is exact to 2 units in the last place, and so is each sum of 16.
    bound = 8 * torch.finfo(torch.float32).eps
    expected_R = log_probs_RV.gather(1, flat[:, None])[:, 0].numpy()
    np.testing.assert_allclose(scored.log_probs_R, expected_R, atol=bound)
    best_R, argmax_R = log_probs_RV.max(dim=1)
    np.testing.assert_allclose(scored.best_log_probs_R, best_R, atol=bound)
    assert np.array_equal(scored.best_R, argmax_R)
    for i, ids in enumerate(texts):
        experts_LTK, weights_LTK = router_choices(model, ids)
        own = slice(firsts[i], firsts[i] + len(ids))
        same = scored.experts_LNK[:, own] == experts_LTK.numpy()
        assert same.mean() > 0.9
        # Not only alike: the rows that are named, and not the same ones of the first text.
        sure_T = torch.tensor(same.all(axis=2).all(axis=0))
        expected_TV = model(torch.tensor([ids])).logits[0]
        assert close(every.logits_RV[own][sure_T], expected_TV[sure_T], model)
        assert np.allclose(scored.weights_LNK[:, own][same], weights_LTK.numpy()[same], atol=1e-4)


@needs_code
@pytest.mark.parametrize("window", [1, 7, 8, 9, 15, 16, 17, 33])
def test_a_window_without_a_ring_gives_the_same_bits_however_a_prompt_is_cut(code, window):
    """Rows that are read together start from the first one's window, each alone from its own.

    Keys then lie in other lanes of the sum, and some have the share 0: neither may change a bit.
    """
    config = tiny_config(context_length=CONTEXT, sliding_window=window, window_pattern="all")
    model, r = random_model(config, window), random.Random(window)
    text = [r.randrange(config.vocabulary_size) for _ in range(CONTEXT)]
    alone = Reader(model, code, whole_caches(model, 1), [text])
    for _ in text:
        alone.read({0: 1}, ONE)
    for counts in ([CONTEXT], [2] * (CONTEXT // 2), [3] * (CONTEXT // 3) + [1], [5, 1, 13, 45]):
        cut = Reader(model, code, whole_caches(model, 1), [text])
        for count in counts:
            cut.read({0: count}, ONE)
        cut.check(alone)


@needs_code
def test_a_row_may_be_named_more_than_once(code):
    """The answers to a question, scored at its last token: more named rows than tokens.

    The place of the normalised inputs was as long as the tokens of the pass, and C wrote past it.
    """
    model = model_of("SwiGLU, 72")
    native, V = NativeModel(model, code), model.config.vocabulary_size
    ids, every = [5, 3, 1], list(range(V)) * 20

    def read(rows, targets=None):
        return native.read(whole_caches(model, 1), [ids], [rows], targets)

    once = read([0, 2])
    logits_RV = read([2] * len(every) + [0]).logits_RV
    assert torch.equal(logits_RV, once.logits_RV[[1] * len(every) + [0]])
    scored = read([2] * len(every), [every])
    log_probs_V = once.logits_RV[1].double().log_softmax(dim=0).numpy()
    bound = 8 * torch.finfo(torch.float32).eps
    np.testing.assert_allclose(scored.log_probs_R, log_probs_V[every], atol=bound)
    assert (scored.best_R == log_probs_V.argmax()).all()


@needs_code
@pytest.mark.parametrize("V", [3, 16, 17, 1000])
def test_scores_of_equal_logits_are_those_of_the_vocabulary(code, V):
    """All ids are as likely, the first of them counts as the best one; a large logit takes all."""
    model = random_model(tiny_config(vocabulary_size=V, head_bias=True), 0)
    with torch.no_grad():
        model.out_head.weight.zero_()
        model.out_head.bias.zero_()
    native = NativeModel(model, code)
    rows = [range(3)]

    def scores():
        return native.read([KVCache(model.config, 1, 8)], [[1, 2, 0]], rows, [[0, V - 1, 1]])

    got = scores()
    assert (got.log_probs_R == -np.log(V)).all() and (got.best_log_probs_R == -np.log(V)).all()
    assert (got.best_R == 0).all()
    with torch.no_grad():
        model.out_head.bias[V - 1] = 200.0
    got = scores()
    assert got.log_probs_R.tolist() == [-200.0, 0.0, -200.0]
    assert (got.best_log_probs_R == 0).all() and (got.best_R == V - 1).all()
    with torch.no_grad():
        model.out_head.bias[0] = float("nan")
    assert np.isnan(scores().log_probs_R).all() and np.isnan(scores().best_log_probs_R).all()


@needs_code
def test_rows_and_targets_that_are_not_there_are_refused(code):
    model = random_model(tiny_config())
    native, V = NativeModel(model, code), model.config.vocabulary_size
    for bad in (-1, V):
        with pytest.raises(ValueError, match="token ids must be from 0 to"):
            native.read([KVCache(model.config, 1, 8)], [[1, 2]], [[0]], [[bad]])
    # Assertions stood for these, and python -O leaves them out.
    for rows, targets, said in (
        ([[2]], None, "a row is that of an id"),
        ([[-1]], None, "a row is that of an id"),
        ([[0, 1]], [[1]], "2 rows have 1 targets"),
    ):
        with pytest.raises(ValueError, match=said):
            native.read([KVCache(model.config, 1, 8)], [[1, 2]], rows, targets)


@needs_code
def test_caches_that_one_pass_cannot_have_are_refused(code):
    """C takes the first cache's room for that of all: it wrote past the end of a smaller one.

    Of one cache given twice, both texts wrote the same places.
    """
    model = random_model(tiny_config(context_length=64))
    native = NativeModel(model, code)
    large, small = (KVCache(model.config, 2, room).rows() for room in (64, 8))
    with pytest.raises(ValueError, match="must be rows of one allocation"):
        native.read([large[0], small[0]], [[1], [2]], [[0], [0]])
    # Two views of one row are the same place, too.
    for other in (large[0], KVCache.rows(large[0])[0]):
        with pytest.raises(ValueError, match="a cache is given twice"):
            native.read([large[0], other], [[1], [2]], [[0], [0]])
    native.read(large, [[1], [2]], [[0], [0]])
    assert [cache.length for cache in (*large, *small)] == [1, 1, 0, 0]
