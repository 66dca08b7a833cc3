"""runtime/serving/engine.py: an answer has the same bits alone and in any company."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from model import LLM
from runtime.inference.decoder import Decoder
from runtime.inference.scorer import Scorer
from runtime.serving.request import Experts, Finished, Token
from tests.builders_inference import biased_model, predictor_of, save
from tests.builders_serving import (
    CONTEXT,
    MODELS,
    Client,
    Stepped,
    answers_alone,
    answers_in_company,
    engine_of,
    engine_of_decoder,
    ids_of_generate,
    model_of,
    random_request,
    request_of,
)
from tests.nightly import nightly_but
from tests.shared_checks import needs_code

BANNED = (3, 17, 60)
# Of drawing: what Sampling and PredictConfig have in common.
SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "when_full",
    "seed",
)


def check_company(model: LLM, seed: int, count: int, threads: int, slots: int = 5) -> int:
    """Raise AssertionError unless answers are the same alone and together; return reused tokens."""
    r = random.Random(seed)
    requests = [random_request(r, model.config.vocabulary_size, CONTEXT) for _ in range(count)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with engine_of(model, slots=1, banned_ids=BANNED) as engine:
            assert engine.is_exact
            # All passes on one thread.
            engine.decoder.native.least_bytes_per_thread = 1 << 60
            alone = answers_alone(engine, requests)
            assert engine.statistics.num_reused_tokens == 0
        chunk = r.choice((1, 7, 16, 64))
        with engine_of(
            model, slots=slots, max_waiting=count, prefill_chunk=chunk, banned_ids=BANNED
        ) as engine:
            # Those with several rows on all threads, or all of them.
            engine.decoder.native.least_bytes_per_thread = r.choice((1, 1 << 12))
            assert answers_in_company(engine, requests, r) == alone
            return engine.statistics.num_reused_tokens
    finally:
        torch.set_num_threads(before)


@needs_code
@pytest.mark.parametrize(
    "packed", nightly_but(["", "int8", "int4"], 0, 2), ids=["float32", "int8", "int4"]
)
@pytest.mark.parametrize("name", MODELS)
def test_each_answer_is_the_same_bits_alone_and_in_company(name, packed):
    """Ids, log-probabilities, the most likely ids and experts, under random arrivals and chunks."""
    reused = check_company(
        model_of(name, packed), len(name) + len(packed), 24, threads=1 + bool(packed)
    )
    assert reused > 0


@needs_code
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_stay_the_same_while_others_are_cancelled(seed):
    """Those that wait, are read, talk or end. What a cancelled one got is how it would begin."""
    model, r = model_of(), random.Random(seed)
    requests = [random_request(r, model.config.vocabulary_size, CONTEXT) for _ in range(30)]
    with engine_of(model, slots=1) as engine:
        alone = answers_alone(engine, requests)
    with engine_of(model, slots=4, max_waiting=30, prefill_chunk=9) as engine:
        got = answers_in_company(engine, requests, r, clients=8, victims=range(0, 30, 2))
        assert engine.statistics.finished["cancelled"] >= 3
        assert engine.drain(60) and not engine.gauges().num_running
    for i, (events, expected) in enumerate(zip(got, alone, strict=True)):
        if i % 2 == 0 and events[-1] == Finished("cancelled"):
            assert events[:-1] == expected[: len(events) - 1]
        else:
            assert events == expected


@needs_code
def test_draws_of_a_row_do_not_depend_on_the_rows_next_to_it():
    """A vocabulary as large as a real one: sums over it may be split between threads."""
    model = model_of(vocabulary_size=40_003)
    check_company(model, 1, 12, threads=2)


@pytest.mark.parametrize(
    ("native", "name"),
    [
        *(pytest.param(True, name, marks=needs_code) for name in MODELS),
        *nightly_but(((False, name) for name in MODELS), 0),
    ],
)
def test_ids_are_those_of_generate(name, native):
    """With the same seed and settings, past the end of the context, too."""
    model, r = model_of(name), random.Random(2)
    requests = [random_request(r, model.config.vocabulary_size, CONTEXT) for _ in range(16)]
    requests.append(request_of(range(40), 2 * CONTEXT, when_full="slide", temperature=1.0))
    # Longer than the context: its end is read.
    requests.append(request_of([*range(50), *range(20)], 5))
    expected = [ids_of_generate(model, request, banned_ids=BANNED) for request in requests]
    with engine_of(model, native, slots=4, banned_ids=BANNED, prefill_chunk=9) as engine:
        assert engine.is_exact == native
        clients = [Client(engine, request) for request in requests]
        assert [client.ids for client in clients] == expected


@needs_code
@pytest.mark.parametrize("seed", [1, 2])
def test_ids_are_those_of_predict(tmp_path, seed):
    """The server has predict.py's model, tokenizer and decoder, and draws as it does."""
    ckpt = save(tmp_path, biased_model())
    predictor, config = predictor_of(
        ckpt, seed=seed, max_new_tokens=40, temperature=1.2, top_p=0.9, repetition_penalty=1.1
    )
    list(predictor.stream("Once upon", config))
    with engine_of_decoder(predictor.decoder, banned_ids=predictor.banned_ids) as engine:
        request = request_of(
            predictor.prompt_ids("Once upon"),
            config.max_new_tokens,
            stop_ids=tuple(predictor.stop_ids),
            **{name: getattr(config, name) for name in SETTINGS},
        )
        company = [Client(engine, request_of([5, i], 30, seed=i)) for i in range(3)]
        client = Client(engine, request)
        assert client.ids == predictor.last.ids
        assert all(len(other.ids) == 30 for other in company)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_code), False])
@pytest.mark.parametrize("name", ["SwiGLU", "sinks and windows"])
def test_scores_and_experts_are_those_of_the_scorer(name, native):
    """To the bit where the C kernel reads. Each token's experts are those it was sent to itself."""
    model = model_of(name)
    request = request_of(
        range(5, 25), 9, temperature=1.0, logprobs=4, prompt_logprobs=True, experts=True
    )
    with engine_of(model, native, slots=2, prefill_chunk=6, banned_ids=BANNED) as engine:
        client = Client(engine, request)
        ids = [*request.ids, *client.ids]
    # One more: the scorer has no experts of the last token.
    scorer = Scorer(Decoder(model, native=native), with_experts=True)
    (expected,) = scorer.scores([[*ids, 0]])
    tokens = [event for event in client.events if isinstance(event, Token)]
    log_probs = client.scores.log_probs + [token.log_prob for token in tokens]
    assert log_probs[0] is None and client.scores.tops[0] is None
    experts = [*client.scores.experts, *(token.experts for token in tokens)]
    experts_LTK = np.array([own.ids for own in experts]).swapaxes(0, 1)
    weights_LTK = np.array([own.weights for own in experts]).swapaxes(0, 1)
    np.testing.assert_allclose(weights_LTK.sum(axis=2), 1, atol=1e-6)
    assert (np.diff(weights_LTK, axis=2) <= 0).all()
    assert np.array_equal(experts_LTK, expected.experts_LTK)
    if native:
        assert engine.is_exact and log_probs[1:] == expected.log_probs_T[:-1].tolist()
    else:
        np.testing.assert_allclose(log_probs[1:], expected.log_probs_T[:-1], atol=1e-4)
    _check_tops(model, ids, [*client.scores.tops, *(token.top for token in tokens)])


def _check_tops(model: LLM, ids: list[int], tops: list) -> None:
    """Raise AssertionError unless these are the four most likely ids that can be drawn."""
    log_probs_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=1)
    for t, top in enumerate(tops[1:]):
        allowed_V = log_probs_TV[t].index_fill(0, torch.tensor(BANNED), -torch.inf)
        best = allowed_V.topk(4)
        assert [i for i, _ in top] == best.indices.tolist()
        np.testing.assert_allclose([own for _, own in top], best.values.tolist(), atol=1e-4)


@needs_code
def test_of_equally_likely_ids_the_lowest_come_first():
    model = model_of(head_bias=True)
    with torch.no_grad():
        model.out_head.weight.zero_()
        model.out_head.bias.zero_()
        model.out_head.bias[40] = 1.0
    with engine_of(model, banned_ids=(0, 2)) as engine:
        client = Client(engine, request_of([1], 1, temperature=0.0, logprobs=4))
        (token,) = (event for event in client.wait() if isinstance(event, Token))
    assert token.id == 40 and [i for i, _ in token.top] == [40, 1, 3, 4]


def test_log_probabilities_need_no_float64_on_the_device(monkeypatch):
    """Apple's GPUs have none: each request with log-probabilities failed there."""

    def double(tensor):
        raise TypeError("the device has no float64")

    with engine_of(model_of(), native=False) as engine:
        monkeypatch.setattr(torch.Tensor, "double", double)
        client = Client(engine, request_of([1, 2], 2, logprobs=2, prompt_logprobs=True))
        assert client.end == Finished("length")


@needs_code
def test_a_last_token_that_no_room_is_left_for_has_no_experts():
    with engine_of(model_of()) as engine:
        full = Client(engine, request_of(range(CONTEXT - 1), 9, experts=True, when_full="stop"))
        slid = Client(engine, request_of(range(CONTEXT - 1), 9, experts=True))
        experts = [event.experts for event in full.wait() if isinstance(event, Token)]
        assert isinstance(experts[0], Experts) and experts[1:] == [None]
        assert "the context of 48 tokens is full" in full.end.message
        assert full.end.reason == "length"
        experts = [event.experts for event in slid.wait() if isinstance(event, Token)]
        assert len(experts) == 9 and None not in experts


# ------------------------------------------------------------------------------- shared beginnings
@needs_code
@pytest.mark.parametrize("shared", [8, 20, 29])
def test_a_beginning_is_taken_from_a_busy_slot(shared):
    """And not a token more than both have: the bits are those of the prompt alone."""
    model, prompt = model_of(), list(range(1, 31))
    other = [*prompt[:shared], *(60 - i for i in prompt[shared:])]
    requests = [request_of(ids, 12, logprobs=3, temperature=1.0) for ids in (prompt, other)]
    with engine_of(model, slots=1) as engine:
        alone = answers_alone(engine, requests)
    with engine_of(model, slots=2) as engine:
        stepped = Stepped(engine)
        first = Client(engine, requests[0])
        stepped.passes(3)
        second = Client(engine, requests[1])
        stepped.free()
        assert second.reused == shared and first.reused == 0
        assert second.events[1:] == alone[1][1:]
        assert first.wait()[1:] == alone[0][1:]


@needs_code
def test_a_prompt_that_was_answered_before_reads_one_token():
    model, prompt = model_of(), list(range(20))
    with engine_of(model, slots=3) as engine:
        first = Client(engine, request_of(prompt, 5, seed=1, logprobs=0)).wait()
        again = Client(engine, request_of(prompt, 5, seed=1, logprobs=0))
        assert again.reused == 19 and again.events[1:] == first[1:]
        # Scores of a prompt need its logits: it is read whole.
        scored = Client(engine, request_of(prompt, 5, seed=1, logprobs=0, prompt_logprobs=True))
        assert scored.reused == 0 and scored.events[1:] == first[1:]
        assert None not in scored.scores.log_probs[1:]


@needs_code
def test_several_answers_to_a_prompt_read_it_once():
    """They come together, so the others wait for the first one's pass, and copy it."""
    with engine_of(model_of(), slots=4) as engine:
        stepped = Stepped(engine)
        with engine._changed:
            clients = [Client(engine, request_of(range(30), 3, seed=seed)) for seed in range(4)]
        stepped.free()
        assert [client.reused for client in clients] == [0, 29, 29, 29]
        assert stepped.counts[:2] == [[30], [1, 1, 1, 1]]


@needs_code
@pytest.mark.parametrize("when", [0, 1, 2])
def test_who_waits_for_a_beginning_reads_on_when_its_source_is_cancelled(when):
    """What the source had read is taken, and another's rest is read."""
    model = model_of()
    requests = [request_of(range(30), 3, seed=seed, temperature=1.0) for seed in range(3)]
    with engine_of(model, slots=1) as engine:
        alone = answers_alone(engine, requests)
    with engine_of(model, slots=3, prefill_chunk=10) as engine:
        stepped = Stepped(engine)
        with engine._changed:
            clients = [Client(engine, request) for request in requests]
        stepped.passes(when)
        engine.cancel(clients[0].ticket)
        stepped.free()
        assert [client.wait()[1:] for client in clients[1:]] == [own[1:] for own in alone[1:]]
        assert clients[0].end.reason == "cancelled"
