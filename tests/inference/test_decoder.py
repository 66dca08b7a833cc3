"""runtime/inference/decoder.py: a batch of texts gives what each gives alone.

Nothing in a cache is computed twice, and prompt-lookup decoding changes nothing.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import types
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import LLM, sample
from model_parts import KVCache
from runtime.inference import decoder as inference
from runtime.inference.decoder import (
    Decoder,
    Text,
    decode_step,
    generate,
    guess_from_text,
    router_choices,
)
from runtime.inference.quantize import KINDS, quantize_
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config
from tests.builders_inference import MODELS, PROMPTS, alone, generated
from tests.nightly import nightly_but
from tests.numeric import (
    assert_close,
    before_ties,
    logits_bound,
    packed_bound,
    rounding,
    size_of,
)
from tests.shared_checks import needs_code

CONTEXT = 32
NO_RINGS = dict(rings=False)
AT_PUSH = ("plain", "biases", "window", "gpt-oss")


@pytest.fixture(params=[True, False], ids=["native", "pytorch"])
def decoder_of(request):
    def make(model, **more):
        decoder = Decoder(model, native=request.param, **more)
        if request.param and decoder.native is None:
            pytest.skip(decoder.why_not_native)
        return decoder

    return make


def by_both_ways(cases: dict[str, dict], native: tuple[str, ...], pytorch: tuple[str, ...]):
    """Let C and PyTorch decode cases: those that are named at every push, and all in the night."""
    both = [
        pytest.param(
            way == "native",
            changes,
            id=f"{way}-{name}",
            marks=[] if name in at_push else pytest.mark.nightly,
        )
        for way, at_push in (("native", native), ("pytorch", pytorch))
        for name, changes in cases.items()
    ]
    return pytest.mark.parametrize(("decoder_of", "changes"), both, indirect=["decoder_of"])


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ----------------------------------------------------------------------------------- the same texts
@by_both_ways(MODELS, AT_PUSH, ("gpt-oss",))
def test_ragged_prompts_give_what_each_gives_alone(decoder_of, changes):
    """Greedy and drawn, past the end of the context (several times) or up to it.

    Rows end at different times.
    """
    model = random_model(tiny_config(context_length=CONTEXT, **changes), 3).eval()
    decoder = decoder_of(model)
    for count, slide in ((5, True), (80, True), (80, False)):
        assert generated(decoder, PROMPTS, count, temperature=0, slide=slide) == [
            alone(model, p, count, temperature=0, slide=slide) for p in PROMPTS
        ]
    settings = dict(
        temperature=0.8,
        top_k=9,
        repetition_penalty=1.3,
        stop_ids=list(range(6, 18)),
        banned_ids=[2],
    )
    seeds = [11, 12, 13, 14, 15]
    drawn = generated(decoder, PROMPTS, 60, generators=seeded(*seeds), **settings)
    assert drawn == [
        alone(model, p, 60, generator=seeded(seed)[0], **settings)
        for p, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert len({len(row) for row in drawn}) > 1 and all(
        row[-1] in range(6, 18) or len(row) == 60 for row in drawn
    )


def test_the_caller_can_end_a_row(decoder_of):
    decoder = decoder_of(random_model(tiny_config(context_length=CONTEXT)))
    finished, counts = set(), [0, 0, 0]
    for step in generate(
        decoder, decoder.texts(3, CONTEXT), PROMPTS[:3], 10, temperature=0, finished=finished
    ):
        for row, _ in step:
            counts[row] += 1
            if row == 1 and counts[1] == 4:
                finished.add(1)
    assert counts == [10, 4, 10]


@pytest.mark.parametrize(
    "changes",
    nightly_but(MODELS.values(), *map(list(MODELS).index, AT_PUSH)),
    ids=MODELS,
)
def test_a_decode_step_is_the_forward_pass_at_any_positions(changes):
    """What a CUDA graph needs: static shapes, and a position per row.

    More of the cache is read than is filled. Also for rows that take no part.
    """
    model = random_model(tiny_config(context_length=CONTEXT, **changes), 5).eval()
    # Some of them packed.
    if len(changes) % 3:
        quantize_(model, KINDS[len(changes) % 3 - 1])
    cache, ids = (
        KVCache(model.config, 3, CONTEXT + 1),
        torch.randint(
            0, model.config.vocabulary_size, (3, 20), generator=torch.Generator().manual_seed(0)
        ),
    )
    with torch.inference_mode():
        for b, row in enumerate(cache.rows()):
            model(ids[b : b + 1, : 4 + 5 * b], cache=row)
        for t in range(5):
            positions = torch.tensor([4 + t, 9 + t, 14 + t])
            # What --compile compiles is one graph.
            step = (
                torch.compile(decode_step, backend="eager", fullgraph=True, dynamic=False)
                if t == 4
                else decode_step
            )
            logits = step(
                model, cache, ids[range(3), positions], positions, CONTEXT if t % 2 else 19
            )
            expected = torch.cat(
                [model(ids[b : b + 1, : positions[b] + 1]).logits[:, -1] for b in range(3)]
            )
            sure = before_ties(model, ids)[range(3), positions]
            assert_close(logits[sure], expected[sure], logits_bound(model.config, 20))


class Claims(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


class OneDevice(TorchDispatchMode):
    """Refuse an operation whose tensors, given or made, are not all on the meta device."""

    def __torch_dispatch__(self, function, types, given=(), named=None):
        made = function(*given, **named or {})
        for tensor in tree_leaves((given, named, made)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                raise AssertionError(f"{function} has a tensor on the host")
        return made


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_decode_step_never_waits_for_the_host(monkeypatch, changes, rows):
    """A CUDA graph holds no value that the host reads, and no copy from the host.

    Meta tensors have no values, and OneDevice refuses copies.
    """
    real = inference._experts
    monkeypatch.setattr(
        inference,
        "_experts",
        lambda block, h: real(block, h.as_subclass(Claims)).as_subclass(torch.Tensor),
    )
    # Meta tensors have no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: contextlib.nullcontext())
    with torch.device("meta"):
        model = LLM(tiny_config(context_length=CONTEXT, **changes)).eval()
        cache = KVCache(model.config, rows, CONTEXT + 1, device="meta")
        ids, positions = torch.ones(2, rows, dtype=torch.int64)
    with OneDevice(), torch.inference_mode():
        logits = decode_step(model, cache, ids, positions, 19)
    assert logits.shape == (rows, model.config.vocabulary_size)


def test_what_waits_for_the_host_is_found():
    x = torch.ones(2, device="meta")
    for waits in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x[: int(x.sum())],
        lambda: x + torch.tensor([1, 2]).to("meta"),
    ):
        with OneDevice(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
            waits()


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("quantized", ["", "int8", "int4"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(expert_activation="gelu", expert_bias=True, head_bias=True)],
    ids=["swiglu", "gelu"],
)
def test_what_a_gpu_computes_without_asking_is_the_same(rows, quantized, changes):
    """Selected experts or all of them, and the packed head, as in a CUDA graph.

    This CPU is told to be a GPU. Eager, and traced by the compiler.
    """
    # Eight models are the most that one compiled function may see.
    torch.compiler.reset()
    model = random_model(tiny_config(**changes), 2)
    if quantized:
        quantize_(model, quantized)
    block, x = (
        model.layers[0],
        torch.randn(rows, model.config.d_model, generator=torch.Generator().manual_seed(1)),
    )

    class Claims(torch.Tensor):
        is_cuda = True

    with torch.inference_mode():
        expected = block.moe(x[:, None])[0][:, 0]
        actual = inference._experts(block, x.as_subclass(Claims)).as_subclass(torch.Tensor)
        c = model.config
        assert_close(
            actual, expected, rounding(torch.float32, c.d_model, 2 * c.d_model, c.d_ff, c.top_k)
        )
    with torch.no_grad():
        weights, chosen, _, _ = block.moe.router(x)
        linear = torch.compile(inference._chosen_linear, backend="eager", fullgraph=True)
        for which, given in (
            ("in", x[:, None].expand(-1, chosen.shape[1], -1)),
            ("out", torch.randn(rows, chosen.shape[1], model.config.d_ff)),
        ):
            plain = inference._chosen_linear(block.moe.experts, which, chosen, given)
            assert_close(
                linear(block.moe.experts, which, chosen, given),
                plain,
                rounding(torch.float32, given.shape[-1]),
            )


@pytest.mark.nightly
def test_every_span_of_the_cache_is_compiled(monkeypatch):
    """The compiler rejects the ninth version of one function.

    With --compile a text ended with an error when more than 32,768 tokens of the cache were in use.
    Each span has a function of its own, and the model's blocks keep what was compiled for them.
    """
    torch.compiler.reset()
    real, options = torch.compile, []

    def compile_eagerly(function, **how):
        options.append(how.pop("options"))
        return real(function, backend="eager", **how)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    model = random_model(tiny_config(context_length=CONTEXT, transformer_blocks=1), 5).eval()
    cache = KVCache(model.config, 2, CONTEXT + 1)
    ids, positions = torch.tensor([3, 4]), torch.tensor([0, 0])
    with torch.inference_mode():
        for span in range(1, 11):
            step = inference.compiled_step(span, tunes=span < 10)
            expected = decode_step(model, cache, ids, positions, span)
            assert torch.allclose(step(model, cache, ids, positions, span), expected, atol=1e-5)
    # A product with one row becomes a sum that its neighbours join.
    assert options == [{"coordinate_descent_tuning": True}] * 9 + [None]


def run_graphs_at_once(monkeypatch) -> None:
    """Replace CUDA's graphs and streams by functions that run at once."""
    graph = types.SimpleNamespace(pool=lambda: None, replay=lambda: None)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    for name in ("stream", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, **more: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(inference, "GRAPH_SPAN", 4)


def test_two_decoders_do_not_capture_at_a_time(monkeypatch):
    """As a server's do that has two models on one GPU, with a thread each.

    PyTorch captures on one stream of all threads, and first waits for the device, which ended the
    other's capture. In the mode that it has without being told, another thread's request for memory
    ended it, too.
    """
    run_graphs_at_once(monkeypatch)
    running, most, modes = [0], [0], []

    @contextlib.contextmanager
    def graph(_, pool, capture_error_mode):
        modes.append(capture_error_mode)
        running[0] += 1
        most[0] = max(most[0], running[0])
        # Long enough for the other thread, which waits for this one.
        time.sleep(0.05)
        yield
        running[0] -= 1

    monkeypatch.setattr(torch.cuda, "graph", graph)
    model = random_model(tiny_config(context_length=CONTEXT), 5)
    decoders = [Decoder(model, False) for _ in range(2)]
    ready = threading.Barrier(2)

    @torch.inference_mode()
    def replay(decoder) -> None:
        decoder.texts(2, CONTEXT)
        ready.wait()
        decoder._replay(torch.tensor([3, 4]), torch.tensor([0, 0]), 1)

    threads = [threading.Thread(target=replay, args=(decoder,)) for decoder in decoders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and modes == ["thread_local"] * 2


@pytest.mark.parametrize("compiles, tunes", [(False, False), (True, False), (True, True)])
def test_a_graph_is_captured_once_for_each_span(monkeypatch, compiles, tunes):
    """256 positions of the cache, then 512, 1,024, ... up to all.

    What was compiled lives as long as the graph that runs it. A small model is not tuned: that
    would waste a minute for each span.
    """
    run_graphs_at_once(monkeypatch)
    made = []

    def compiled(span, is_tuned):
        assert is_tuned == tunes
        made.append((span, lambda *given: decode_step(*given)))
        return made[-1][1]

    monkeypatch.setattr(inference, "compiled_step", compiled)
    model = quantize_(random_model(tiny_config(context_length=CONTEXT), 5))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(inference, "TUNED_BYTES", held if tunes else held + 1)
    decoder = Decoder(model, False, compiles)
    decoder.texts(2, CONTEXT)
    ids, positions = torch.tensor([3, 4]), torch.tensor([0, 0])
    with torch.inference_mode():
        for used in (1, 4, 5, 9, 8, 17, CONTEXT):
            expected = decode_step(decoder.model, decoder._whole, ids, positions, CONTEXT)
            assert torch.allclose(decoder._replay(ids, positions, used), expected, atol=1e-5)
    assert list(decoder._graphs) == [4, 8, 16, 32]
    assert [span for span, _ in made] == ([4, 8, 16, 32] if compiles else [])
    kept = [captured[-1] for captured in decoder._graphs.values()]
    assert kept == ([own for _, own in made] if compiles else [decode_step] * 4)


# ----------------------------------------------------------------------------------- what is reused
@pytest.fixture
def reads(monkeypatch):
    """Counts the tokens that pass through a decoder."""
    counted = []

    def count(decoder):
        if decoder.native:
            real = decoder.native.forward
            decoder.native.forward = lambda caches, ids, *more: (
                counted.append(sum(map(len, ids))) or real(caches, ids, *more)
            )
        real_model = decoder.model.forward
        decoder.model.forward = lambda ids, **more: (
            counted.append(ids.numel()) or real_model(ids, **more)
        )
        return decoder

    count.tokens = counted
    return count


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=8)], ids=["full", "window"])
def test_what_the_cache_holds_is_not_read_again(decoder_of, reads, changes):
    """Continue, go back, change the end, start again.

    With a ring buffer, overwritten positions are read again, and only that makes them right.
    """
    model = random_model(tiny_config(context_length=64, **changes), 1).eval()
    decoder = reads(decoder_of(model))
    text = decoder.texts(1, 64)[0]
    r = random.Random(0)
    ids = [r.randrange(model.config.vocabulary_size) for _ in range(20)]
    is_ring = "sliding_window" in changes

    def read(ids, expected):
        reads.tokens.clear()
        logits = decoder.read(text, list(ids))
        assert sum(reads.tokens) == expected
        expected = model.__class__.forward(model, torch.tensor([ids]), last_token_only=True).logits[
            0
        ]
        assert_close(logits, expected, logits_bound(model.config, 64))

    read(ids[:5], 5)
    # The last token must be asked again, for its logits.
    read(ids[:5], 1)
    read(ids[:7], 2)
    # Within the window nothing is lost.
    read(ids[:4] + [0, 1, 2], 3)
    read(ids[:20], 16)
    read(ids[:19] + [1, 2], 21 if is_ring else 2)
    read(ids[:10] + [3], 11 if is_ring else 1)
    read(ids[:10] + [3, 4], 1)
    read([9, 9], 2)


def test_generation_goes_on_from_the_cache(decoder_of, reads):
    """A second answer after the first: its prompt is what was read and drawn, plus a few tokens."""
    model = random_model(tiny_config(context_length=64)).eval()
    decoder = reads(decoder_of(model))
    texts = decoder.texts(1, 64)
    first = generated(decoder, [[1, 2, 3]], 10, texts, temperature=0)[0]
    reads.tokens.clear()
    second = generated(decoder, [[1, 2, 3, *first, 4, 5]], 5, texts, temperature=0)[0]
    # The last drawn, two new; steps of PyTorch do not pass through forward.
    assert sum(reads.tokens) == 3 + 4 if decoder.native else sum(reads.tokens) == 3
    assert second == alone(model, [1, 2, 3, *first, 4, 5], 5, temperature=0)


@needs_code
@pytest.mark.parametrize("kind", KINDS)
def test_a_windowed_packed_model_reads_prompts_by_the_kernel_that_decodes(kind):
    """Its prompts were read by PyTorch, whose inputs nothing rounds, and the server's by C.

    So the same prompt and seed gave predict.py another text than the server.
    """
    model = random_model(tiny_config(context_length=64, sliding_window=8), 5).eval()
    decoder = Decoder(quantize_(model, kind))
    ids = torch.randint(model.config.vocabulary_size, (30,)).tolist()
    own, served = (decoder.read(decoder.texts(1, 64, **more)[0], ids) for more in ({}, NO_RINGS))
    assert torch.equal(own, served)
    # And it keeps to the window: the first ids are beyond it for all blocks.
    expected = model(torch.tensor([ids])).logits[0, -1:]
    assert size_of(own - expected) < 0.1 * size_of(expected)


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=8)], ids=["full", "window"])
def test_a_pass_that_breaks_off_leaves_a_cache_that_is_right(decoder_of, changes, monkeypatch):
    """Ctrl-C during a forward pass: a ring buffer may have lost keys that the next answer needs.

    Nothing would show it.
    """
    model = random_model(tiny_config(context_length=64, **changes), 4).eval()
    decoder = decoder_of(model)
    text = decoder.texts(1, 64)[0]
    ids = list(range(1, 31))
    decoder.read(text, ids[:20])
    last = model.layers[-1]
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(last, "forward", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        # After C has written, before it is counted.
        if decoder.native:
            patch.setattr(KVCache, "advance", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            decoder.step([text], torch.tensor([ids[20]]))
        decoder.read(text, ids[:29])
    expected = model(torch.tensor([ids]), last_token_only=True).logits[0]
    assert_close(decoder.read(text, ids), expected, logits_bound(model.config, 64))


def test_rewinding_says_when_it_cannot():
    config = tiny_config(sliding_window=4)
    cache = KVCache(config, 1, 16)
    cache.length = 3
    assert cache.rewind(2) and cache.length == 2
    for length in (4, 9):
        cache.length = length
        assert cache.rewind(length) and cache.rewind(12) and cache.length == length
        assert not cache.rewind(3) and cache.length == length
    full = KVCache(tiny_config(), 2, 16)
    full.length = 9
    assert full.rewind(0) and full.length == 0
    rows = KVCache(tiny_config(), 2, 16).rows()
    rows[0].length = 3
    assert [row.length for row in rows] == [3, 0] and rows[1].keys[0].shape[0] == 1


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_texts_that_take_no_part_in_a_step_keep_what_they_hold(decoder_of, changes):
    """A graph runs all texts of an allocation, and those that have ended write past their end.

    A full ring buffer lost its oldest key, which going back one token needs.
    """
    model = random_model(tiny_config(context_length=CONTEXT, **changes), 2).eval()
    decoder = decoder_of(model)
    texts = decoder.texts(3, CONTEXT)
    ids = torch.randint(
        0, model.config.vocabulary_size, (3, CONTEXT), generator=torch.Generator().manual_seed(1)
    ).tolist()
    for length, text, row in zip((8, 12, CONTEXT), texts, ids, strict=True):
        decoder.read(text, row[:length])
    for order in ([1], [1, 0], [0]):
        logits = decoder.step(
            [texts[i] for i in order], torch.tensor([ids[i][texts[i].cache.length] for i in order])
        )
        for i in order:
            texts[i].ids = ids[i][: texts[i].cache.length]
        expected = torch.cat([model(torch.tensor([texts[i].ids])).logits[:, -1] for i in order])
        assert_close(logits, expected, logits_bound(model.config, CONTEXT))
    for text, row in zip(texts, ids, strict=True):
        other = [*row[: text.cache.length - 1], 3]
        expected = model(torch.tensor([other])).logits[:, -1]
        assert_close(decoder.read(text, other), expected, logits_bound(model.config, CONTEXT))


# --------------------------------------------------------------------------- prompt-lookup decoding
def repetitive_model(seed: int = 0):
    """A model whose greedy text repeats itself."""
    model = random_model(tiny_config(context_length=64, vocabulary_size=16), seed).eval()
    return model


@by_both_ways(
    dict(
        greedy=dict(temperature=0),
        penalised=dict(temperature=0, repetition_penalty=1.2),
        drawn=dict(temperature=0.3, top_k=4),
        stopped=dict(temperature=0, stop_ids=[3]),
    ),
    ("greedy", "penalised", "drawn", "stopped"),
    ("drawn",),
)
def test_look_up_gives_the_same_text_in_fewer_passes(decoder_of, reads, changes):
    """Greedy and drawn, across the end of the context, with each token's usual noise.

    A guess is only ever checked.
    """
    accepted = 0
    # Models whose routers and logits are nowhere within rounding of a tie in these texts (seeds 2,
    # 3 and 10 are): reading several tokens at once adds in another order than reading one.
    for seed in (4, 5, 7, 8, 11, 13):
        decoder = decoder_of(repetitive_model(seed))
        plain = generated(decoder, [[1, 2, 3, 1, 2]], 100, generators=seeded(7), **changes)
        passes = []
        real = decoder.read
        decoder.read = lambda *a, real=real, passes=passes, **k: passes.append(1) or real(*a, **k)
        assert (
            generated(decoder, [[1, 2, 3, 1, 2]], 100, lookup=5, generators=seeded(7), **changes)
            == plain
        )
        accepted += len(plain[0]) - len(passes)
    assert accepted > 30


def test_look_up_with_many_rows_begins_with_the_last_one(decoder_of):
    model = repetitive_model(1)
    decoder = decoder_of(model)
    finished, rows = set(), [[], []]
    for step in generate(
        decoder,
        decoder.texts(2, 64),
        [[1, 2], [3, 4, 3]],
        40,
        temperature=0,
        lookup=4,
        finished=finished,
    ):
        for row, token in step:
            rows[row].append(token)
        if len(rows[0]) == 5:
            finished.add(0)
    assert rows == [
        alone(model, [1, 2], 5, temperature=0),
        alone(model, [3, 4, 3], 40, temperature=0),
    ]


@pytest.mark.parametrize(
    ("ids", "most", "guess"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 1, 2, 3], 9, [9, 1, 2, 3]),
        # The last occurrence.
        ([5, 1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),
        # The longest one.
        ([4, 1, 2, 7, 3, 1, 2, 8, 4, 1, 2], 1, [7]),
        ([1, 2, 3], 5, []),
        ([1], 5, []),
        ([], 5, []),
        ([1, 1], 3, []),
        ([1, 1, 1], 3, [1]),
        ([1, 2, 1, 2], 0, []),
        ([1, 2, 1, 2], -3, []),
        (list(np.arange(5)) * 2, 2, [0, 1]),
    ],
)
def test_guesses_come_from_the_text(ids, most, guess):
    assert guess_from_text(ids, most) == guess


def test_look_up_is_refused_where_it_cannot_take_tokens_back(decoder_of):
    decoder = decoder_of(random_model(tiny_config(sliding_window=8)))
    with pytest.raises(
        ValueError, match="windowed blocks keep only their window: leave lookup out"
    ):
        generated(decoder, [[1]], 3, lookup=2)


# ----------------------------------------------------------------------------------------- the rest
def test_router_choices_are_the_routers():
    model = random_model(tiny_config(), 1).eval()
    choose_kernels(model, torch.device("cpu"), torch.float32)
    ids = list(range(9))
    experts, gates = router_choices(model, ids)
    c = model.config
    assert experts.shape == gates.shape == (c.transformer_blocks, 9, c.top_k) and torch.allclose(
        gates.sum(-1), torch.ones(c.transformer_blocks, 9)
    )
    x = model.layers[0].norm1(model.embed(torch.tensor([ids])))
    h = model.embed(torch.tensor([ids])) + model.layers[0].attention(
        x, inference.rope_tables_at(c, torch.arange(9), torch.float32)
    )
    logits = torch.nn.functional.linear(
        model.layers[0].norm2(h)[0], model.layers[0].moe.router.weight
    )
    assert torch.equal(experts[0], logits.topk(c.top_k).indices)
    assert not model.layers[0].moe.router._forward_hooks


def test_nothing_asked_for_is_nothing_done(decoder_of):
    decoder = decoder_of(random_model(tiny_config()))
    assert generated(decoder, [[1]], 0) == [[]] and list(generate(decoder, [], [], 5)) == []
    for bad, message in ((dict(temperature=-1.0), "temperature"), (dict(top_p=0.0), "top_p")):
        with pytest.raises(ValueError, match=message):
            generated(decoder, [[1]], 3, **bad)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0"):
        generated(decoder, [[1]], -1)


def test_long_prompts_of_a_packed_model_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(inference, "MOST_NATIVE_ROWS", 8)
    decoder = Decoder(quantize_(random_model(tiny_config(context_length=64))))
    if decoder.native is None:
        pytest.skip(decoder.why_not_native)
    ids = torch.randint(
        0, decoder.config.vocabulary_size, (29,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    expected = decoder.model(torch.tensor([ids])).logits[0]
    bound = logits_bound(decoder.config, 29) + packed_bound(decoder.model)
    assert_close(decoder.read(decoder.texts(1, 64)[0], ids, all_logits=True), expected, bound)
    assert_close(decoder.read(decoder.texts(1, 64)[0], ids), expected[-1:], bound)


@pytest.mark.parametrize("V", [11, 1 << 18])
def test_few_logits_are_drawn_from_by_one_thread(V, monkeypatch):
    """To wake a second thread took longer than to draw from 50,000 logits, for each token."""
    seen, real = [], inference.sample
    monkeypatch.setattr(
        inference, "sample", lambda *args: seen.append(torch.get_num_threads()) or real(*args)
    )
    draw = inference.Drawing(1.0, 0, 1.0, 0.0, 1.0, (), (), None, torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        draw([0, 1], [[1], [2]], torch.randn(2, V))
        with pytest.raises(IndexError):
            draw([0], [[1]], torch.empty(1, 0))
        assert seen == [1 if V == 11 else 2, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("banned", [(), (2, 40)], ids=["all ids", "some banned"])
def test_the_likeliest_ids_are_those_of_sample(banned):
    """Of equals the first; -1 for a row with what is not a number, or with an infinity."""
    logits = torch.randn(12, 61, generator=torch.Generator().manual_seed(0))
    logits[1, [5, 9, 40]] = 7.0
    logits[2] = 0.0
    logits[3, 17], logits[4, 17], logits[5, 17] = torch.inf, -torch.inf, torch.nan
    logits[6] = -torch.inf
    logits[7, 2] = 9.0
    ids = torch.tensor(banned, dtype=torch.int64)
    expected = sample(logits, 0.0, banned_ids=ids)
    assert expected[3:7].eq(-1).all() and expected[2] == 0
    assert torch.equal(inference.likeliest(logits, ids), expected)
    draw = inference.Drawing(0.0, 0, 1.0, 0.0, 1.0, (), banned, None, torch.device("cpu"))
    assert torch.equal(draw(list(range(12)), [[1]] * 12, logits.double())[0], expected)


def test_a_bad_answer_does_not_spoil_the_next(decoder_of):
    """A NaN past the end of a text counts where more of the cache is read than is filled.

    Its weight is 0, yet every later answer failed too.
    """
    model = random_model(tiny_config(context_length=CONTEXT)).eval()
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    decoder = decoder_of(model)
    texts = decoder.texts(2, CONTEXT)
    with pytest.raises(ValueError, match="not finite"):
        generated(decoder, [[1, 2, 7, 3, 4, 5, 6, 1], [1]], 5, texts, temperature=0)
    good = generated(decoder, [[1, 2], [3]], 9, texts, temperature=0, banned_ids=[7])
    assert good == [alone(model, p, 9, temperature=0, banned_ids=[7]) for p in ([1, 2], [3])]
    whole = decode_step(model, decoder._whole, torch.tensor([1, 2]), torch.tensor([2, 5]), CONTEXT)
    assert torch.isfinite(whole[:, :7]).all()


def test_old_texts_are_gone_before_new_ones_are_made(decoder_of):
    decoder = decoder_of(random_model(tiny_config(context_length=CONTEXT)))
    decoder.texts(2, CONTEXT)
    old = weakref.ref(decoder._whole)
    real = inference.KVCache
    try:
        inference.KVCache = lambda *a: (
            (_ for _ in ()).throw(MemoryError) if old() is not None else real(*a)
        )
        decoder.texts(4, CONTEXT)
    finally:
        inference.KVCache = real


def test_a_full_cache_is_refused_before_anything_is_written(decoder_of):
    decoder = decoder_of(random_model(tiny_config(context_length=64)))
    text: Text = decoder.texts(1, 4)[0]
    decoder.read(text, [1, 2, 3, 4])
    with pytest.raises(
        ValueError, match="the KV cache holds 4 tokens, 4 of them are used and 1 more do not fit"
    ):
        decoder.step([text], torch.tensor([1]))
    assert text.cache.length == 4
