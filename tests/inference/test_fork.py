"""runtime/inference/decoder.py in training: forks, changed weights, log-probabilities."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from runtime.inference.decoder import Decoder, generate
from runtime.inference.quantize import quantize_
from tests.builders import random_model, tiny_config
from tests.builders_inference import CONTEXT, MODELS, PROMPTS, after_an_update, alone, generated
from tests.numeric import assert_close, logits_bound


@pytest.fixture(params=[True, False], ids=["native", "pytorch"])
def decoder_of(request):
    def make(model, **more):
        decoder = Decoder(model, native=request.param, **more)
        if request.param and decoder.native is None:
            pytest.skip(decoder.why_not_native)
        return decoder

    return make


def model_of(changes: dict, seed: int = 3):
    return random_model(tiny_config(context_length=CONTEXT, **changes), seed).eval()


# ------------------------------------------------------------------------------------------- forks
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_a_fork_is_the_prompt_read_by_each_text(decoder_of, changes, length):
    """To the bit: what caches hold, and the logits of further tokens; ring buffers not yet full,
    full and wrapped.
    """
    model, prompt = model_of(changes), PROMPTS[4][:length]
    forked, read = decoder_of(model), decoder_of(model)
    texts, others = forked.texts(5, CONTEXT), read.texts(5, CONTEXT)
    # Rows 1 to 3; their neighbours have texts of their own, and rows 2 and 3 had longer ones.
    for text, other, ids in zip(texts, others, ([9, 8], [1], [6] * 20, [7] * 9, [5]), strict=True):
        forked.read(text, list(ids))
        read.read(other, list(ids))
    logits_1V = forked.read(texts[1], list(prompt))
    assert forked.fork(texts[1], 3) == texts[1:4]
    for other in others[1:4]:
        assert torch.equal(read.read(other, list(prompt)), logits_1V)
    for text, other in zip(texts, others, strict=True):
        assert text.ids == other.ids and text.cache.length == other.cache.length
    new_BT = torch.arange(20).view(5, 4)
    for t in range(4):
        assert torch.equal(forked.step(texts, new_BT[:, t]), read.step(others, new_BT[:, t]))


def test_a_fork_has_a_list_of_ids_of_its_own():
    """`generate` appends to the list that a text has: two forks must not share it."""
    decoder = Decoder(model_of({}))
    texts = decoder.texts(2, CONTEXT)
    decoder.read(texts[0], [1, 2])
    first, second = decoder.fork(texts[0], 2)
    first.ids.append(3)
    assert second.ids == [1, 2]


@pytest.mark.parametrize("count", [0, 3])
def test_a_fork_into_rows_that_are_not_there_is_refused(count):
    decoder = Decoder(model_of({}))
    texts = decoder.texts(3, CONTEXT)
    decoder.read(texts[1], [1, 2])
    with pytest.raises(ValueError, match="and there are 3: ask texts"):
        decoder.fork(texts[1], count)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_generation_from_a_fork(decoder_of, changes):
    """The logits of the prompt are given, so that nothing is read, and rows continue apart."""
    model, prompt = model_of(changes), PROMPTS[2]
    decoder = decoder_of(model)
    texts = decoder.texts(3, CONTEXT)
    logits_1V = decoder.read(texts[0], list(prompt))
    decoder.fork(texts[0], 3)
    decoder.read_all = None
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    drawn = generated(
        decoder,
        [prompt] * 3,
        12,
        texts,
        generators=generators,
        slide=False,
        logits_BV=logits_1V.expand(3, -1),
    )
    assert drawn == [
        alone(model, prompt, 12, generator=torch.Generator().manual_seed(seed), slide=False)
        for seed in (4, 5, 6)
    ]


def test_logits_of_another_prompt_are_refused():
    decoder = Decoder(model_of({}))
    texts = decoder.texts(1, CONTEXT)
    logits_1V = decoder.read(texts[0], [1, 2])
    with pytest.raises(ValueError, match="a text holds another prompt"):
        generated(decoder, [[1, 3]], 2, texts, logits_BV=logits_1V)


# --------------------------------------------------------------------------------- changed weights
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_decoder_follows_weights(decoder_of, changes):
    """A cache that outlived an update was measured to put logits off by 0.31: a prompt that is
    read again was taken from the cache of the old weights.
    """
    model, prompt = model_of(changes), PROMPTS[2]
    decoder = decoder_of(model)
    # Before there is a cache, too.
    decoder.weights_changed()
    texts = decoder.texts(2, CONTEXT)
    decoder.read_all(texts, [list(prompt), [1, 2]])
    after_an_update(model)
    decoder.weights_changed()
    expected_1V = model(torch.tensor([prompt])).logits[:, -1]
    assert_close(decoder.read(texts[0], list(prompt)), expected_1V, logits_bound(model.config, 9))


def test_weights_that_have_moved_are_found(decoder_of):
    """The C decoder holds addresses; a module that gets another tensor leaves them behind."""
    model, prompt = model_of({}), PROMPTS[2]
    decoder = decoder_of(model)
    texts = decoder.texts(1, CONTEXT)
    decoder._graphs = {16: ()}
    decoder.weights_changed()
    # What reads weights where they are stays while they stay.
    assert decoder._graphs == {16: ()}
    model.layers[0].attention.W_q.weight = nn.Parameter(torch.randn(32, 32))
    decoder.weights_changed()
    assert decoder._graphs == {}
    expected_1V = model(torch.tensor([prompt])).logits[:, -1]
    assert_close(decoder.read(texts[0], list(prompt)), expected_1V, logits_bound(model.config, 9))


@pytest.mark.parametrize("packed", ["", "int8", "int4"], ids=["plain", "int8", "int4"])
@pytest.mark.parametrize("name", ["biases", "tied", "gpt-oss"])
def test_a_decoder_of_a_copy_follows_its_source(decoder_of, name, packed):
    """Weights are copied, and packed again, in place: those of a copy made now."""
    source = model_of(MODELS[name])
    model = copy.deepcopy(source)
    decoder = decoder_of(quantize_(model, packed) if packed else model)
    native, texts = decoder.native, decoder.texts(1, CONTEXT)
    after_an_update(source)
    decoder.weights_changed(source)
    assert decoder.native is native
    fresh = decoder_of(
        quantize_(copy.deepcopy(source), packed) if packed else copy.deepcopy(source)
    )
    again = fresh.texts(1, CONTEXT)
    for ids in ([1], list(PROMPTS[2])):
        assert torch.equal(decoder.read(texts[0], ids), fresh.read(again[0], ids))


def test_weights_of_another_model_are_not_copied():
    decoder = Decoder(model_of({}))
    with pytest.raises(ValueError, match=r"differ in embed\.weight"):
        decoder.weights_changed(model_of(dict(vocabulary_size=62)))


# ------------------------------------------------------------------------------- log-probabilities
@pytest.mark.parametrize("lookup", [0, 3])
def test_log_probs_are_of_temperature_one_without_banned_ids(decoder_of, lookup):
    """Whatever the settings that draw: of each id that is yielded, in its row, from one pass."""
    model, prompts, banned = model_of({}), [[1, 2, 3], [4, 5, 4, 5]], [7, 8, 30]
    decoder = decoder_of(model)
    log_probs: list[list[float]] = [[], []]
    drawn = generated(
        decoder,
        prompts,
        12,
        temperature=0.7,
        top_k=5,
        repetition_penalty=1.2,
        banned_ids=banned,
        stop_ids=[9, 10, 11, 12],
        generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        lookup=lookup,
        log_probs=log_probs,
    )
    for prompt, ids, ours in zip(prompts, drawn, log_probs, strict=True):
        logits_TV = model(torch.tensor([prompt + ids])).logits[0].detach().double()
        logits_TV[:, banned] = -torch.inf
        expected = logits_TV.log_softmax(dim=1)[range(len(prompt) - 1, len(prompt + ids) - 1), ids]
        size = logits_TV[:, :7].abs().max().item()
        assert_close(torch.tensor(ours), expected, logits_bound(model.config, CONTEXT), size=size)


def test_log_probs_are_not_made_where_nobody_asks(monkeypatch):
    """They cost a pass over the vocabulary."""
    monkeypatch.setattr("runtime.inference.decoder.Drawing.log_probs", None)
    decoder = Decoder(model_of({}))
    assert len(list(generate(decoder, decoder.texts(1, CONTEXT), [[1]], 3))) == 3


# ------------------------------------------------------------------------ caches that keep all keys
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_caches_without_ring_buffers_are_read_in_chunks_and_cut(decoder_of, changes):
    """Of windowed blocks, too: one token, several, one token for each text; and back to a token.

    The model does not mask what a single query gets, so it saw keys before its window.
    """
    model, ids = model_of(changes), torch.randint(0, 61, (CONTEXT,), generator=seeded(1))
    expected_TV = model(ids[None]).logits[0]
    decoder = decoder_of(model)
    text, other = decoder.texts(2, CONTEXT, rings=False)
    assert not any(text.cache.is_ring) and text.cache.max_tokens == CONTEXT
    decoder.read(other, [5, 6, 7])

    def check(logits_RV, rows) -> None:
        bound = logits_bound(model.config, CONTEXT)
        assert_close(logits_RV, expected_TV[rows], bound)

    for first, count in ((0, 9), (9, 1), (10, 12), (11, 1), (12, 1), (13, 7), (20, 1), (21, 11)):
        # Cut back, where it is.
        assert text.cache.rewind(first) and text.cache.length == first
        own = ids[first : first + count]
        logits_TV = model(own[None], cache=text.cache).logits[0]
        check(logits_TV, slice(first, first + count))
        if first + count < CONTEXT:
            check(decoder.step([text], ids[first + count : first + count + 1]), [first + count])
            text.cache.rewind(first + count)
    assert other.cache.length == 3


def test_a_text_is_cleared_and_the_others_stay(decoder_of):
    decoder = decoder_of(model_of({}))
    texts = decoder.texts(2, CONTEXT)
    for text in texts:
        decoder.read(text, [1, 2, 3])
    decoder.clear(texts[0])
    assert texts[0].ids == [] and texts[0].cache.length == 0 and texts[1].cache.length == 3
    for tensor in decoder._whole.keys + decoder._whole.values:
        assert (tensor[0] == 0).all() and (tensor[1, :, :3] != 0).any()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
