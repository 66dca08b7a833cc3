"""runtime/inference/scorer: each next token's log-probability, whatever else is scored."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from config_model import ModelConfig
from model_parts import KVCache
from runtime.inference import cpu_decode
from runtime.inference import scorer as scorer_module
from runtime.inference.decoder import Decoder, router_choices
from runtime.inference.quantize import quantize_
from runtime.inference.scorer import Scorer, Window, windows
from tests.builders import random_model, tiny_config
from tests.nightly import nightly_but
from tests.numeric import logits_bound
from tests.shared_checks import needs_code

MODELS = {
    "plain": {},
    "window": dict(sliding_window=5, window_pattern="alternating"),
    "sinks": dict(attention_sinks=True, sliding_window=9),
    "learned bias": dict(use_attention_bias=True, use_rope=False),
}


def model_of(name: str):
    return random_model(tiny_config(context_length=32, **MODELS[name]), 3)


def random_documents(V: int, seed: int = 0, longest: int = 33) -> list[list[int]]:
    """Return documents of all lengths from 0 on; half of them begin like another."""
    r = random.Random(seed)
    documents: list[list[int]] = [[], [1], [2, 3]]
    for _ in range(40):
        ids = [r.randrange(V) for _ in range(r.randint(2, longest))]
        if r.random() < 0.5:
            other = r.choice(documents)
            ids = (other[: r.randint(0, len(other))] + ids)[:longest]
        documents.append(ids)
    return documents


def plain_scores(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits_TV = model(torch.tensor([ids[:-1]])).logits[0].double()
    log_probs_TV = logits_TV.log_softmax(dim=1)
    targets_T1 = torch.tensor(ids[1:])[:, None]
    best_T, argmax_T = log_probs_TV.max(dim=1)
    return (
        log_probs_TV.gather(1, targets_T1)[:, 0].numpy(),
        best_T.numpy(),
        (argmax_T == targets_T1[:, 0]).numpy(),
    )


def bound(config: ModelConfig) -> float:
    """Return how far two orders of the same sums may put a log-probability apart, in nats."""
    # Logits of a random model are below 8; a log-probability is off by at most twice their error.
    return 2 * 8 * logits_bound(config, config.context_length)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_scores_are_the_plain_models(name, native):
    model = model_of(name)
    documents = random_documents(model.config.vocabulary_size)
    scorer = Scorer(Decoder(model, native=native))
    results = list(scorer.scores(iter(documents)))
    assert len(results) == len(documents)
    for ids, got in zip(documents, results, strict=True):
        assert len(got.log_probs_T) == max(0, len(ids) - 1)
        if len(ids) > 1:
            expected, best, is_greedy = plain_scores(model, ids)
            np.testing.assert_allclose(got.log_probs_T, expected, atol=bound(model.config))
            np.testing.assert_allclose(got.best_log_probs_T, best, atol=bound(model.config))
            assert (got.is_greedy_T == is_greedy).mean() > 0.9
            assert (got.log_probs_T <= got.best_log_probs_T).all()


@pytest.mark.parametrize("native", [True, False])
@torch.inference_mode()
def test_experts_are_those_of_every_token_that_is_read(native):
    model = model_of("window")
    documents = random_documents(model.config.vocabulary_size, seed=1)
    for firsts in (None, [1 + number % 40 for number in range(len(documents))]):
        scorer = Scorer(Decoder(model, native=native), with_experts=True)
        for ids, got in zip(documents, scorer.scores(documents, firsts), strict=True):
            c = model.config
            shape = (c.transformer_blocks, max(0, len(ids) - 1), c.top_k)
            assert got.experts_LTK.shape == shape
            if len(ids) > 1:
                expected_LTK = router_choices(model, ids[:-1])[0].numpy()
                assert (got.experts_LTK == expected_LTK).mean() > 0.97


@pytest.mark.parametrize("native", [True, False])
def test_only_what_is_asked_for_is_scored(native):
    """Choices share a beginning and have an ending each: the beginning is read once."""
    model = model_of("plain")
    documents = random_documents(model.config.vocabulary_size, seed=2)
    scorer = Scorer(Decoder(model, native=native))
    firsts = [1 + number % 40 for number in range(len(documents))]
    whole = scorer.scores(documents)
    for first, all_of, some in zip(firsts, whole, scorer.scores(documents, firsts), strict=True):
        for expected, got in zip(all_of[:3], some[:3], strict=True):
            np.testing.assert_allclose(got, expected[first - 1 :], atol=bound(model.config))


@needs_code
@pytest.mark.parametrize("slots", [1, 2, 32])
def test_scores_are_not_taken_from_where_nothing_was_scored(slots, monkeypatch):
    """Texts of one beginning, of which the first in order is scored from the latest token on.

    Random texts with a wanted token each never met so, and a wrong copy went unnoticed.
    """
    monkeypatch.setattr(scorer_module, "SLOTS", slots)
    model = model_of("plain")
    r = random.Random(7)
    begin = [r.randrange(model.config.vocabulary_size) for _ in range(30)]
    documents = [[*begin, tail, 3, 4] for tail in range(6)]
    firsts = [31, 5, 20, 1, 31, 12]
    scorer = Scorer(Decoder(model))
    alone = [next(scorer.scores([ids])) for ids in documents]
    together = scorer.scores(documents, firsts)
    for first, whole, some in zip(firsts, alone, together, strict=True):
        for expected, got in zip(whole[:3], some[:3], strict=True):
            assert np.array_equal(got, expected[first - 1 :])


def test_windows_score_each_token_once_after_as_many_as_the_stride_leaves():
    assert windows(0, 4, 4) == windows(1, 4, 4) == []
    assert windows(5, 4, 4) == [Window(0, 5, 1)]
    assert windows(6, 4, 4) == [Window(0, 5, 1), Window(4, 6, 5)]
    assert windows(8, 4, 2) == [Window(0, 5, 1), Window(2, 7, 5), Window(4, 8, 7)]
    # Only those windows are read that score something.
    assert windows(8, 4, 2, first=7) == [Window(4, 8, 7)]
    for tokens in range(2, 40):
        for stride in range(1, 7):
            found = windows(tokens, 6, stride)
            scored = [t for window in found for t in range(window.first, window.end)]
            assert scored == list(range(1, tokens))
            for window in found:
                assert window.end - 1 - window.begin <= 6
                assert window.begin == 0 or window.first - window.begin > 6 - stride


@pytest.mark.parametrize("native", [True, False])
@torch.inference_mode()
def test_long_documents_are_scored_in_windows(native):
    model = random_model(tiny_config(context_length=8), 3)
    r = random.Random(0)
    ids = [r.randrange(model.config.vocabulary_size) for _ in range(30)]
    scorer = Scorer(Decoder(model, native=native), with_experts=True, stride=3)
    (got,) = scorer.scores([ids])
    assert len(got.log_probs_T) == 29 and got.experts_LTK.shape[1] == 29
    for window in windows(30, 8, 3):
        own = ids[window.begin : window.end]
        expected, _, _ = plain_scores(model, own)
        rows = slice(window.first - 1, window.end - 1)
        new = window.first - 1 - window.begin
        np.testing.assert_allclose(got.log_probs_T[rows], expected[new:], atol=bound(model.config))
        experts = router_choices(model, own[:-1])[0].numpy()[:, new:]
        assert (got.experts_LTK[:, rows] == experts).mean() > 0.9


def test_documents_are_taken_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(scorer_module, "BUFFER_TOKENS", 20)
    taken = []

    def documents():
        for number in range(100):
            taken.append(number)
            yield [1, 2, 3, 4]

    results = Scorer(model_of("plain")).scores(documents())
    for _ in range(3):
        next(results)
    assert len(taken) == 4
    assert len(list(results)) == 97


@pytest.mark.parametrize("native", [True, False])
def test_what_cannot_be_scored_is_refused(native):
    model = model_of("plain")
    V = model.config.vocabulary_size
    scorer = Scorer(Decoder(model, native=native))
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"document 1: token ids must be from 0 to {V - 1}"):
            list(scorer.scores([[1, 2], [1, bad]]))
    with pytest.raises(ValueError, match="the first token to be scored must be at least 1, not 0"):
        list(scorer.scores([[1, 2]], [0]))
    with pytest.raises(ValueError, match="stride must be from 1 to the context of 32 tokens"):
        Scorer(model, stride=33)
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    assert len(list(scorer.scores([[1, 2, 3]]))) == 1
    with pytest.raises(ValueError, match="logits are not finite"):
        list(scorer.scores([[1, 2, 3], [1, 7, 3]]))


@needs_code
@pytest.mark.parametrize(
    "packed", nightly_but(["", "int8", "int4"], 0, 2), ids=["float32", "int8", "int4"]
)
@pytest.mark.parametrize("name", ["plain", "window"])
def test_scores_are_the_same_bits_whatever_else_is_scored(name, packed, monkeypatch):
    """In any order and batch, on one thread and two, with shared beginnings copied or read."""
    model = model_of(name)
    decoder = Decoder(quantize_(model, packed) if packed else model)
    documents = random_documents(model.config.vocabulary_size, seed=4, longest=70)
    scorer = Scorer(decoder, with_experts=True, stride=11)
    assert scorer.is_exact and "same bits" in scorer.line
    alone = [next(scorer.scores([ids])) for ids in documents]
    r, threads = random.Random(0), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for buffer, slots, rows, shared, bytes_per_thread in (
            (1 << 16, 32, 256, 8, 1),
            (300, 5, 17, 2, 1 << 60),
            (1 << 16, 7, 64, 1 << 30, cpu_decode.LEAST_BYTES_PER_THREAD),
            (1 << 16, 1, 9, 1, 1),
        ):
            for setting, value in (
                ("BUFFER_TOKENS", buffer),
                ("SLOTS", slots),
                ("PASS_ROWS", rows),
                ("LEAST_SHARED", shared),
            ):
                monkeypatch.setattr(scorer_module, setting, value)
            monkeypatch.setattr(decoder.native, "least_bytes_per_thread", bytes_per_thread)
            order = r.sample(range(len(documents)), len(documents))
            together = scorer.scores(documents[number] for number in order)
            for number, got in zip(order, together, strict=True):
                for own, expected in zip(got, alone[number], strict=True):
                    assert np.array_equal(own, expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("native", [True, False])
def test_weights_that_have_moved_are_followed(native):
    """The scorer kept the decoder's C kernel, and that had pointers to the old weights.

    `weights_changed` makes a new one where a tensor has moved.
    """
    model, other = model_of("plain"), random_model(tiny_config(context_length=32), 4)
    decoder, ids = Decoder(model, native=native), [1, 5, 2, 7, 3, 3, 1, 9, 2]
    scorer = Scorer(decoder)
    (before,) = scorer.scores([ids])
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data = new.data.clone()
    decoder.weights_changed()
    (after,), (expected,) = (one.scores([ids]) for one in (scorer, Scorer(decoder)))
    assert scorer.is_exact == (decoder.native is not None)
    assert not np.allclose(before.log_probs_T, expected.log_probs_T)
    assert np.array_equal(after.log_probs_T, expected.log_probs_T)


@needs_code
def test_a_shared_beginning_is_read_once(monkeypatch):
    """Few-shot prompts: all share the examples, four endings each a question."""
    model = model_of("plain")
    decoder, read = Decoder(model), []
    forward = decoder.native.read

    def counted(caches, ids, *more):
        read.append(sum(map(len, ids)))
        return forward(caches, ids, *more)

    monkeypatch.setattr(decoder.native, "read", counted)
    monkeypatch.setattr(scorer_module, "SLOTS", 6)
    r = random.Random(0)
    examples = [r.randrange(1, 50) for _ in range(12)]
    documents = []
    for question in range(5):
        own = [question, *(r.randrange(1, 50) for _ in range(10))]
        documents += [[*examples, *own, ending, 1, 2, 3] for ending in range(4)]
    firsts = [len(ids) - 4 for ids in documents]
    plain = sum(len(ids) - 1 for ids in documents)
    assert len(list(Scorer(decoder).scores(documents, firsts))) == 20
    # The examples; ten tokens of each question; of each ending three, and the token before it. The
    # last token that is shared is read again, because another one follows.
    assert plain == 20 * 26
    assert sum(read) <= 12 + 5 * 11 + 20 * 4


@needs_code
def test_long_contexts_take_few_caches(monkeypatch):
    """Thirty-two caches of 131,072 tokens would take gigabytes."""
    model = model_of("plain")
    monkeypatch.setattr(scorer_module, "MOST_CACHE_BYTES", 1)
    made = []

    def cache(config, batch_size, max_tokens, *more):
        made.append(batch_size)
        return KVCache(config, batch_size, max_tokens, *more)

    monkeypatch.setattr(scorer_module, "KVCache", cache)
    documents = random_documents(model.config.vocabulary_size)
    assert len(list(Scorer(model).scores(documents))) == len(documents)
    assert made == [1]
