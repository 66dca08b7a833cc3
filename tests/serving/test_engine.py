"""runtime/serving/engine.py: queue, cancel, damaged numbers, failures, memory, ends."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from runtime.base.device import one_thread
from runtime.inference.decoder import Decoder
from runtime.serving import slots as slots_module
from runtime.serving.engine import Engine
from runtime.serving.request import (
    EngineClosed,
    Finished,
    QueueFull,
    Request,
    RequestRefused,
    Sampling,
    Started,
    Token,
)
from runtime.serving.slots import share_chunk, slot_bytes
from runtime.serving.statistics import Histogram
from tests.builders_serving import (
    CONTEXT,
    Client,
    Stepped,
    answers_alone,
    engine_of,
    ids_of_generate,
    model_of,
    random_request,
    request_of,
)
from tests.shared_checks import needs_code

both_readers = pytest.mark.parametrize("native", [pytest.param(True, marks=needs_code), False])


# --------------------------------------------------------------------------- queue and turns
@both_readers
def test_the_queue_is_bounded_and_a_place_comes_back(native):
    with engine_of(model_of(), native, slots=2, max_waiting=1) as engine:
        stepped = Stepped(engine)
        clients = [Client(engine, request_of([i], 2)) for i in range(3)]
        with pytest.raises(QueueFull, match="2 requests are being answered and 1 wait"):
            Client(engine, request_of([4]))
        assert engine.statistics.num_refused_full == 1
        stepped.free()
        for client in clients:
            client.wait()
        assert len(Client(engine, request_of([5], 2)).ids) == 2


def test_an_engine_keeps_its_threads_whatever_goes_on_when_it_is_first_asked():
    """A thread's first question for the number of threads takes what was set last, by any thread.

    An engine's was its first request's. While another engine drew on one thread, or a model was
    compared on one, it got one thread for good.
    """
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with engine_of(model_of()) as engine:
            read = engine._reader.read
            engine._reader.read = lambda parts: seen.append(torch.get_num_threads()) or read(parts)
            with one_thread():
                Client(engine, request_of([1], 2)).wait()
        assert seen and set(seen) == {3}
    finally:
        torch.set_num_threads(threads)


def test_who_gets_the_last_event_may_submit_the_next_request():
    """Its place is free by then, although the engine has one slot and no queue."""
    with engine_of(model_of(), slots=1, max_waiting=0) as engine:
        after: list[Client] = []

        def then(event):
            if isinstance(event, Finished):
                after.append(Client(engine, request_of([2], 1)))

        Client(engine, request_of([1], 1), then).wait()
        assert len(after[0].ids) == 1


@needs_code
def test_requests_are_admitted_in_their_order():
    order: list[int] = []
    with engine_of(model_of(), slots=1) as engine:
        with engine._changed:
            clients = [
                Client(engine, request_of([i], 1), lambda event, i=i: order.append(i))
                for i in (5, 1, 4, 2, 3)
            ]
        for client in clients:
            client.wait()
    assert order[::3] == [5, 1, 4, 2, 3]


@needs_code
def test_a_short_prompt_does_not_wait_behind_a_long_one():
    """Its first token comes with the third pass at the latest, and the others' go on."""
    with engine_of(model_of(), slots=3, prefill_chunk=8) as engine:
        stepped = Stepped(engine)
        talking = Client(engine, request_of([1], 30, when_full="slide"))
        stepped.passes(2)
        long = Client(engine, request_of(range(40), 2))
        stepped.passes(1)
        before = len(talking.events)
        short = Client(engine, request_of([50, 51, 52], 2))
        stepped.passes(3)
        assert any(isinstance(event, Token) for event in short.events)
        assert not long.events and len(talking.events) >= before + 2
        assert all(sum(counts) <= 8 + 3 for counts in stepped.counts)
        stepped.free()
        assert len(long.ids) == 2


def test_shares_of_a_pass():
    assert share_chunk([], 8) == []
    assert share_chunk([100], 8) == [8]
    assert share_chunk([3], 8) == [3]
    # The oldest has half, and who needs least comes before who needs more.
    assert share_chunk([100, 50, 3], 8) == [4, 1, 3]
    assert share_chunk([100, 50, 30], 8) == [4, 0, 4]
    assert share_chunk([2, 50], 8) == [2, 6]
    assert share_chunk([100, 2], 1) == [1, 0]
    r = random.Random(0)
    for _ in range(200):
        unread = [r.randint(1, 40) for _ in range(r.randint(1, 6))]
        tokens = r.randint(1, 60)
        counts = share_chunk(unread, tokens)
        assert sum(counts) == min(tokens, sum(unread)) and counts[0] >= 1
        assert all(0 <= n <= most for n, most in zip(counts, unread, strict=True))


# ------------------------------------------------------------------------------------ ends
@both_readers
@pytest.mark.parametrize("stage", ["queue", "prompt", "token", "experts", "ended"])
def test_cancel_at_each_stage_frees_the_slot_and_leaves_the_others(native, stage):
    model = model_of()
    other_request = request_of([9, 8, 7], 12, logprobs=2)
    expected = ids_of_generate(model, other_request)
    with engine_of(model, native, slots=2, prefill_chunk=4) as engine:
        stepped = Stepped(engine)
        other = Client(engine, other_request)
        blocker = Client(engine, request_of([4], 40)) if stage == "queue" else None
        stepped.passes(1)
        target = Client(engine, request_of(range(20, 32), 30, experts=stage == "experts"))
        # Four passes read the prompt, and the last of them draws.
        stepped.passes({"queue": 1, "prompt": 2, "token": 6, "experts": 6, "ended": 1}[stage])
        if stage == "ended":
            stepped.free()
            target.wait()
        num_events = len(target.events)
        engine.cancel(target.ticket)
        if blocker:
            assert not target.events and engine.gauges().num_waiting == 1
            engine.cancel(blocker.ticket)
        if stage != "ended":
            # The pass that is being read, and one more.
            stepped.passes(2)
            assert target.wait()[-1] == Finished("cancelled")
            # The pass that is being read may end the prompt: Started, a token, the end.
            assert len(target.events) <= num_events + 3
            assert engine.gauges().num_running == 1 and engine.gauges().num_waiting == 0
        stepped.free()
        assert other.ids == expected and other.end == Finished("length")
        assert engine.drain(60)
        assert engine.gauges().num_running == 0
        assert engine.statistics.finished["cancelled"] == 1 + (blocker is not None) - (
            stage == "ended"
        )


@needs_code
def test_cancel_from_its_own_event():
    """As the server does where a stop text ends an answer."""
    with engine_of(model_of()) as engine:

        def then(event):
            if isinstance(event, Token) and len(client.events) == 4:
                engine.cancel(client.ticket)

        with engine._changed:
            client = Client(engine, request_of([1], 40), then)
        assert client.end == Finished("cancelled") and len(client.ids) == 3


@both_readers
def test_an_answer_ends_with_its_stop_id_and_at_its_length(native):
    model = model_of()
    request = request_of([1, 2], 30, temperature=1.0, seed=4)
    drawn = ids_of_generate(model, request)
    stop = drawn[7]
    with engine_of(model, native) as engine:
        client = Client(engine, request_of([1, 2], 30, temperature=1.0, seed=4, stop_ids=(stop,)))
        assert client.ids == drawn[: drawn.index(stop) + 1]
        assert client.end == Finished("stop")
        assert Client(engine, request).end == Finished("length")
        none = Client(engine, request_of([1, 2], 0, prompt_logprobs=True))
        assert none.ids == [] and none.end == Finished("length")
        assert len(none.scores.log_probs) == 2


def test_the_engine_drains_and_closes():
    engine = Engine(model_of(), slots=1)
    stepped = Stepped(engine)
    running, waiting = (Client(engine, request_of([i], 3)) for i in (1, 2))
    assert not engine.drain(0) and not engine.is_open
    with pytest.raises(EngineClosed, match="shutting down"):
        Client(engine, request_of([3]))
    stepped.free()
    assert engine.drain(60)
    assert running.end == waiting.end == Finished("length")
    engine.close()
    engine.close()
    assert not engine._thread.is_alive()
    with pytest.raises(EngineClosed):
        Client(engine, request_of([3]))


def test_closing_ends_all_requests():
    engine = Engine(model_of(), slots=1)
    stepped = Stepped(engine)
    clients = [Client(engine, request_of([i], 3)) for i in (1, 2)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    stepped.free()
    closing.join()
    assert all(client.end.reason == "cancelled" for client in clients)


def test_an_idle_engine_does_nothing(monkeypatch):
    turns = []
    # Before it runs: the last event comes within a turn.
    monkeypatch.setattr(
        Engine, "_turn", lambda self, real=Engine._turn: (turns.append(1), real(self))
    )
    with engine_of(model_of()) as engine:
        Client(engine, request_of([1], 3)).wait()
        assert engine.drain(60)
        count = len(turns)
        time.sleep(0.1)
        assert len(turns) == count <= 5


# ----------------------------------------------------------------------------- what goes wrong
def damage(model, token: int) -> None:
    """Make a token's embedding NaN."""
    with torch.no_grad():
        model.embed.weight[token] = float("nan")


@both_readers
def test_damaged_numbers_end_their_own_request_alone(native):
    """And its slot is zeroed: PyTorch weighs what was left there with 0, and 0 * NaN is NaN."""
    model = model_of()
    good = [request_of([i, 2, 3], 10, logprobs=1, temperature=0.0, seed=i) for i in range(3)]
    bad = [request_of([*range(20, 30), 7, *more], 10) for more in ((), range(30, 38))]
    bad.append(request_of([7, 8], 10, prompt_logprobs=True))
    with engine_of(model, native, slots=1) as engine:
        alone = answers_alone(engine, good)
    with engine_of(model, native, slots=6, prefill_chunk=4) as engine:
        # Only now: a kernel that gives other logits than the model is not used.
        damage(model, 7)
        assert engine.is_exact == native
        for _ in range(2):
            with engine._changed:
                clients = [Client(engine, request) for request in good]
                damaged = [Client(engine, request) for request in bad]
            for client in damaged:
                assert client.end.reason == "error" and client.ids == []
                assert "the model's logits are not finite" in client.end.message
            for client, expected in zip(clients, alone, strict=True):
                assert client.ids == [event.id for event in expected if isinstance(event, Token)]
                if native:
                    assert client.events[1:] == expected[1:]
        tensors = engine.decoder._whole.keys + engine.decoder._whole.values
        assert all(torch.isfinite(tensor).all() for tensor in tensors)
        assert engine.statistics.finished["error"] == 6


def test_a_damaged_prompt_that_is_cancelled_leaves_nothing_to_the_next():
    """Its keys are NaN, and no logits have said so. PyTorch reads them, weighed with 0."""
    model = model_of()
    damage(model, 7)
    with engine_of(model, native=False, slots=2, prefill_chunk=4) as engine:
        stepped = Stepped(engine)
        bad = Client(engine, request_of([7] * 20, 4))
        stepped.passes(2)
        engine.cancel(bad.ticket)
        stepped.free()
        bad.wait()
        with engine._changed:
            # The second gets the damaged slot, and is read as far as the first is long.
            clients = [Client(engine, request_of(ids, 9)) for ids in (range(20, 40), [1])]
        assert [len(client.ids) for client in clients] == [9, 9]


@both_readers
@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_good_beginning_is_not_taken_from_a_damaged_prompt_as_damage(native, is_cancelled):
    """The tokens before the damaged one weigh it with 0, and 0 * NaN is NaN.

    In a chunk with it their keys and values became NaN, and a request that begins alike took them,
    from a busy slot or from one whose request was cancelled before its logits could tell.
    """
    model, beginning = model_of(), list(range(20, 42))
    requests = [request_of([*beginning, 1], 5), request_of([*beginning[:20], 2, 3], 5)]
    expected = [ids_of_generate(model, request) for request in requests]
    with engine_of(model, native, slots=2, prefill_chunk=4) as engine:
        damage(model, 7)
        stepped = Stepped(engine)
        bad = Client(engine, request_of([*beginning, 7, *range(10)], 5))
        # Its NaN has been read, and there are no logits yet.
        stepped.passes(6)
        assert not bad.events
        if is_cancelled:
            engine.cancel(bad.ticket)
        clients = [Client(engine, request) for request in requests]
        stepped.free()
        assert [client.ids for client in clients] == expected
        assert clients[0].reused == 20
        assert bad.end.reason == ("cancelled" if is_cancelled else "error")


DIVISION = Finished("error", "the engine failed: ZeroDivisionError: division by zero")


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), MemoryError()])
def test_a_pass_that_fails_ends_its_requests_and_no_others(error, capsys):
    """Those that waited for a slot got the error, too, and no failure of a pass was counted."""
    model = model_of()
    requests = [request_of([i], 3, temperature=1.0, seed=i) for i in range(4)]
    with engine_of(model, slots=2) as engine:
        stepped = Stepped(engine)
        real = stepped.read

        def fails(parts):
            stepped.read = real
            raise error

        stepped.read = fails
        with engine._changed:
            clients = [Client(engine, request) for request in requests]
        stepped.free()
        for client in clients[:2]:
            assert client.end.reason == "error" and client.ids == []
            assert f"the engine failed: {type(error).__name__}: {error}" in client.end.message
        assert type(error).__name__ in capsys.readouterr().err
        for client, request in zip(clients[2:], requests[2:], strict=True):
            assert client.ids == ids_of_generate(model, request)
        assert engine.drain(60)
        assert engine.statistics.num_failures == 1 and engine.statistics.finished["error"] == 2
        assert engine.gauges().num_waiting == engine.gauges().num_running == 0


@pytest.mark.parametrize("where", ["_end_cancelled", "_admit", "_plan", "_draw"])
def test_whatever_fails_again_and_again_ends_all_requests(where, monkeypatch, capsys):
    """Also before a request has a slot: else each turn would fail, and none would ever end."""
    with engine_of(model_of(), slots=2) as engine:
        monkeypatch.setattr(engine, where, lambda *given: 1 / 0)
        clients = [Client(engine, request_of([i], 3)) for i in range(5)]
        assert [client.end for client in clients] == [DIVISION] * 5
        assert engine.drain(60) and engine.statistics.finished["error"] == 5
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_ends_while_it_tells_an_end_is_drained():
    """It counted that event as one to come, so that `drain` waited for it in vain.

    When the end of a second request raised that, too, a third never got its end.
    """
    engine = Engine(model_of(), slots=1)

    def then(event):
        if isinstance(event, Finished):
            raise SystemExit

    clients = [Client(engine, request_of([i], 3), then) for i in range(1, 6)]
    for client in clients:
        client.wait()
    engine._thread.join()
    assert engine.drain(0) and not engine.is_open


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_ends_refuses_requests():
    engine = Engine(model_of(), slots=1)

    def dies(parts):
        raise SystemExit

    engine._reader.read = dies
    client = Client(engine, request_of([1], 3))
    assert client.end == Finished("error", "the engine stopped")
    engine._thread.join()
    assert not engine.is_open
    # Not that the server is shutting down.
    with pytest.raises(EngineClosed, match="^the engine stopped$"):
        Client(engine, request_of([1], 3))


def test_a_caller_that_cannot_take_events_loses_its_own_request(capsys):
    model, request = model_of(), request_of([1], 8)
    expected = ids_of_generate(model, request)
    with engine_of(model, slots=2) as engine:

        def fails(event):
            raise RuntimeError("Event loop is closed")

        with engine._changed:
            ticket = engine.submit(request_of([2], 40), fails)
            client = Client(engine, request)
        assert client.ids == expected
        assert engine.drain(60) and ticket.is_done
        assert engine.statistics.finished["cancelled"] == engine.statistics.num_failures == 1
    assert capsys.readouterr().err.count("an event could not be delivered") == 1


# ------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "request_, words",
    [
        (request_of([1, 61]), "prompt: token ids must be from 0 to 60, not 61"),
        (request_of([-1]), "prompt: token ids must be from 0 to 60, not -1"),
        (request_of([1], stop_ids=(99,)), "stop_ids: token ids must be from 0 to 60, not 99"),
        (request_of([1] * 49, when_full="stop"), "has 49 tokens and the context 48: shorten it"),
        (request_of([1] * 49, prompt_logprobs=True), "log-probabilities are for prompts that fit"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused(request_, words):
    with engine_of(model_of()) as engine:
        with pytest.raises(RequestRefused, match=words):
            Client(engine, request_)
        assert engine.gauges().num_waiting == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Sampling(temperature=-1.0), "temperature must be at least 0"),
        (lambda: Sampling(top_p=2.0), "top_p must be at most 1"),
        (lambda: Sampling(when_full="shrink"), "when_full must be one of 'slide', 'stop'"),
        (lambda: Sampling(seed=-1), "seed must be at least 0"),
        (lambda: Sampling(stop_ids=("a",)), "stop_ids must be"),
        (lambda: Request(()), "at least one token id"),
        (lambda: Request((1.0,)), "must be token ids"),
        (lambda: Request((True,)), "must be token ids"),
        (lambda: Request((1,), logprobs=21), "logprobs must be from 0 to 20, or None, not 21"),
        (lambda: Engine(model_of(), slots=0), "slots must be at least 1, not 0"),
        (lambda: Engine(model_of(), prefill_chunk=0), "prefill_chunk must be at least 1"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", ["SwiGLU", "sinks and windows"])
def test_memory_of_the_slots_is_what_is_said(name):
    with engine_of(model_of(name), slots=3) as engine:
        assert engine._slots.num_bytes == engine.decoder._whole.num_bytes()
        assert engine._slots.num_bytes == 3 * slot_bytes(engine.decoder)
        assert engine.memory_line.startswith("3 slots of 48 tokens: ")


def test_slots_that_do_not_fit_the_memory_are_refused(monkeypatch):
    decoder = Decoder(model_of())
    each = slot_bytes(decoder)
    monkeypatch.setattr(slots_module, "memory_bytes", lambda device: (4 * each - 1, 9 * each))
    with pytest.raises(ValueError, match="4 slots of 48 tokens.* is free: use fewer slots") as e:
        Engine(decoder, slots=4)
    assert "\n" not in str(e.value)
    Engine(decoder, slots=3).close()


# ---------------------------------------------------------------------------------- statistics
@needs_code
def test_what_is_counted():
    model, r = model_of(), random.Random(3)
    c = model.config
    with engine_of(model, slots=3) as engine:
        requests = [random_request(r, c.vocabulary_size, CONTEXT) for _ in range(12)]
        clients = [Client(engine, request) for request in requests]
        for client in clients:
            client.wait()
        assert engine.drain(60)
        s = engine.statistics
        assert sum(s.finished.values()) == s.request_seconds.count == s.queue_seconds.count == 12
        started = [e for client in clients for e in client.events if isinstance(e, Started)]
        assert s.num_prompt_tokens == sum(event.num_prompt_tokens for event in started)
        assert s.num_reused_tokens == sum(event.num_reused_tokens for event in started)
        assert s.num_generated_tokens == sum(len(client.ids) for client in clients)
        assert s.time_to_first_token_seconds.count == 12
        assert s.inter_token_latency_seconds.count == s.num_generated_tokens - 12
        # Each token that was read went to as many experts in each block.
        read_L = s.expert_tokens_LE.sum(axis=1)
        assert (read_L == read_L[0]).all() and read_L[0] % c.top_k == 0
        assert read_L[0] // c.top_k >= s.num_prompt_tokens - s.num_reused_tokens
        gauges = engine.gauges()
        assert (gauges.num_slots, gauges.most_cached_tokens) == (3, 3 * CONTEXT)


def test_a_histogram_counts_by_range():
    h = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        h.add(value)
    assert h.count == 4 and h.total == 10.0
    assert h.cumulative() == [(1.0, 2), (2.0, 3), (np.inf, 4)]
