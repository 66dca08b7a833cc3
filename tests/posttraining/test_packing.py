"""Encoded examples and packed rows: only answers are learned, alone or in company."""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import pytest
import torch

import model as model_module
import train
from runtime.data import loader as loader_module
from runtime.data.chat import Rendered, with_chat
from runtime.data.loader import prefetch
from runtime.data.tokenizers import load_tokenizer
from runtime.data.toy_stories import story
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.posttraining import encode as encode_module
from runtime.posttraining import packing
from runtime.posttraining.conversations import Conversation, ExampleRows, Pair
from runtime.posttraining.encode import (
    encode_examples,
    render_raw,
    up_to_last_target,
    without_oldest_turn,
)
from runtime.posttraining.forms import Dropped
from runtime.posttraining.packing import (
    PackedLoader,
    PackedValidation,
    PairLoader,
    best_fit,
    can_share_rows,
    make_batch,
)
from runtime.posttraining.showing import show_example
from tests.builders import tiny_config
from tests.promises import packing as promise
from tests.promises.packing import random_encoded

BYTE = load_tokenizer("byte")
CHAT = with_chat(BYTE)


def said(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def talk(*texts: str, system: str = "") -> Conversation:
    """A conversation of alternating questions and answers."""
    turns = [("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    return Conversation(said(*([("system", system)] if system else []), *turns))


def contents(example) -> list[str]:
    messages = example.prompt if isinstance(example, Pair) else example.messages
    return [message["content"] for message in messages]


# ------------------------------------------------------------------------------- encoding
def test_ids_are_flat_arrays_of_a_small_type():
    """A million conversations as lists of Python's numbers are gigabytes."""
    encoded = encode_examples([talk("a", "b"), talk("c", "d")], CHAT, 64)
    assert (encoded.ids.dtype, encoded.is_target.dtype) == (np.uint16, np.uint8)
    assert encoded.offsets.tolist() == [0, len(encoded.ids) // 2, len(encoded.ids)]
    assert encoded.kind == "conversations" and len(encoded) == 2


def test_large_vocabularies_have_32_bits():
    tokenizer = with_chat(load_tokenizer("byte"))
    tokenizer.vocabulary_size = 1 << 17
    assert encode_examples([talk("a", "b")], tokenizer, 64).ids.dtype == np.uint32


def test_what_follows_the_last_target_costs_no_row():
    first = talk("a", "b", "c", "d")
    first.messages[-1]["train"] = False
    encoded = encode_examples([first, talk("a", "b")], CHAT, 64)
    one, other = (encoded.sequence(i) for i in (0, 1))
    assert one[0].tolist() == other[0].tolist() and one[1].tolist() == other[1].tolist()


def test_only_the_last_answer_is_learned_if_asked():
    encoded = encode_examples([talk("a", "b", "c", "d")], CHAT, 64, train_on="last")
    ids, is_target = encoded.sequence(0)
    assert CHAT.decode(ids[is_target == 1].tolist()) == "d<|end|>"


def test_raw_is_prompt_completion_and_end_of_text():
    encoded = encode_examples([talk("ab", " c")], BYTE, 64, raw=True)
    ids, is_target = encoded.sequence(0)
    assert ids.tolist() == [BYTE.start_id, *b"ab", *b" c", BYTE.end_of_text_id]
    assert is_target.tolist() == [0, 0, 0, 1, 1, 1]


def test_raw_needs_an_end_of_text():
    with mock.patch.object(BYTE, "end_of_text_id", None), pytest.raises(ValueError, match="--raw"):
        render_raw(talk("a", "b").messages, BYTE)


def test_an_example_that_fills_a_row_is_not_too_long():
    """Its last id is only a target, so that ids may be one more than the row's inputs."""
    length = int(encode_examples([talk("a", "b")], CHAT, 64).lengths[0])
    encoded = encode_examples([talk("a", "b"), talk("a", "bc")], CHAT, length)
    assert len(encoded) == 1
    assert encoded.report.lines()[0] == (
        f"2 conversations, 1 dropped: 1 longer than {length} tokens"
    )
    batch = PackedLoader(encoded, length, 1, 0).batch(0)
    assert batch[1][0, -1] == CHAT.chat.end


def test_too_long_examples_are_dropped_refused_or_lose_their_oldest_turns():
    long = talk("one", "1" * 40, "two", "2", "three", "3", system="brief")
    shorter = talk("two", "2", "three", "3", system="brief")
    fits = int(encode_examples([shorter], CHAT, 999).lengths[0])
    with pytest.raises(ValueError, match="all 1 conversations of the examples are dropped"):
        encode_examples([long], CHAT, fits)
    where = Conversation(long.messages, "a.jsonl line 7")
    with pytest.raises(ValueError, match="a.jsonl line 7: 1[0-9]{2} tokens are longer.*cut_prompt"):
        encode_examples([where], CHAT, fits, too_long="refuse")
    for length, kept in ((fits, "two2three3"), (fits - 1, "three3")):
        cut = encode_examples([long], CHAT, length, too_long="cut_prompt")
        ids, _ = cut.sequence(0)
        texts = [
            part.split("<|message|>")[-1] for part in CHAT.decode(ids.tolist()).split("<|end|>")
        ]
        assert "".join(texts) == f"brief{kept}"
        assert cut.report.lines()[1] == "1 were too long and lost their oldest turns"
    # An answer is never cut.
    with pytest.raises(ValueError, match="1 longer than 20 tokens"):
        encode_examples([talk("a", "b" * 60)], CHAT, 20, too_long="cut_prompt")
    with pytest.raises(ValueError, match="--too_long must be one of drop, cut_prompt, refuse"):
        encode_examples([long], CHAT, 64, too_long="cut")
    with pytest.raises(ValueError, match="--raw has none"):
        encode_examples([talk("a", "b")], CHAT, 64, too_long="cut_prompt", raw=True)


@pytest.mark.parametrize(
    "texts, rest",
    [
        (["a", "b", "c", "d"], ["c", "d"]),
        (["a", "b"], None),
        ([], None),
    ],
)
def test_the_oldest_turn_goes_and_the_system_stays(texts, rest):
    for system in ("", "s"):
        shorter = without_oldest_turn(talk(*texts, system=system))
        expected = rest and ["s"][: len(system)] + rest
        assert (contents(shorter) if shorter else None) == expected


def test_a_greeting_before_the_first_question_is_the_oldest_turn():
    greeted = Conversation(said(("assistant", "hi"), ("user", "a"), ("assistant", "b")))
    assert contents(without_oldest_turn(greeted)) == ["a", "b"]


def test_a_pair_loses_the_oldest_turns_of_its_prompt():
    answers = said(("assistant", "x")), said(("assistant", "y"))
    prompt = said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    shorter = without_oldest_turn(Pair(prompt, *answers))
    assert contents(shorter) == ["s", "c"] and (shorter.chosen, shorter.rejected) == answers
    assert without_oldest_turn(shorter) is None


def test_examples_without_a_target_are_dropped():
    untrained = talk("a", "b")
    untrained.messages[-1]["train"] = False
    encoded = encode_examples([untrained, talk("a", "b")], CHAT, 64)
    assert encoded.report.dropped == {"without an answer to train on": 1}
    # Nothing predicts the first id.
    with pytest.raises(Dropped):
        up_to_last_target(Rendered([1, 2], [True, False]))


def test_examples_of_two_kinds_are_refused():
    pair = Pair(said(("user", "a")), said(("assistant", "b")), said(("assistant", "c")))
    with pytest.raises(ValueError, match="is a Pair: give conversations, or give pairs"):
        encode_examples([talk("a", "b"), pair], CHAT, 64)
    with pytest.raises(ValueError, match="PackedLoader takes conversations, not pairs"):
        PackedLoader(encode_examples([pair], CHAT, 64), 64, 1, 0)


def test_the_report_of_a_file_has_all_that_was_dropped():
    rows = [{"prompt": "a", "completion": text} for text in ("b", "", "c" * 99)] + 3 * [
        {"prompt": "a", "completion": "b"}
    ]
    examples = ExampleRows(rows, "rows", "conversations")
    encoded = encode_examples(examples, CHAT, 64)
    assert encoded.report.lines()[0] == (
        "6 conversations (prompt, completion), 2 dropped: 1 without an answer, "
        "1 longer than 64 tokens"
    )


def test_both_sides_of_the_split_share_the_ids():
    encoded = encode_examples([talk(f"ask {i}", "b") for i in range(400)], CHAT, 64)
    train_part, val_part, line = encoded.split(0.1)
    assert line == "" and train_part.ids is val_part.ids is encoded.ids
    assert 20 < len(val_part) < 80
    assert sorted([*train_part.numbers, *val_part.numbers]) == list(range(400))
    held = [encoded.sequence(number)[0].tolist() for number in val_part.numbers]
    batches = list(PackedValidation(val_part, 64, 4))
    assert sum(len(batch[3]) for batch in batches) == 2 * len(held)


# ------------------------------------------------------------------------------- packing
def test_best_fit_by_hand():
    assert best_fit(np.array([7, 5, 5, 3, 2, 2]), 10).tolist() == [0, 1, 1, 0, 2, 2]
    # The row with the least room, not the first: 6 leaves 4 and 7 leaves 3.
    assert best_fit(np.array([7, 6, 3, 3]), 10).tolist() == [0, 1, 0, 1]
    assert best_fit(np.array([4, 4, 4]), 4).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_the_slow_search(seed):
    """Against a search of all rows for the one with the least room."""
    r = random.Random(seed)
    capacity = r.choice([1, 7, 64, 300])
    sizes = sorted((r.randint(1, capacity) for _ in range(200)), reverse=True)
    rooms: list[int] = []
    for size in sizes:
        best = min((room for room in rooms if room >= size), default=None)
        if best is None:
            rooms.append(capacity - size)
        else:
            rooms[rooms.index(best)] -= size
    row_of = best_fit(np.array(sizes), capacity)
    filled = np.bincount(row_of, weights=sizes)
    assert sorted(capacity - filled) == sorted(rooms)


def test_stories_fill_their_rows():
    """At least 90 % of the tokens are no padding."""
    examples = [talk(f"Tell story {i}.", story(i)[: 60 + 13 * (i % 40)]) for i in range(400)]
    encoded = encode_examples(examples, CHAT, 1024)
    assert PackedLoader(encoded, 1024, 1, 0).rows.fill > 0.9


def test_equal_lengths_change_places_and_rows_stay_as_many():
    r = random.Random(0)
    encoded = random_encoded(r, 200, 20, "conversations")
    loader = PackedLoader(encoded, 50, 1, 0)
    R = loader.samples_per_epoch
    epochs = [[frozenset(loader.examples(e * R + i)) for i in range(R)] for e in range(3)]
    assert len({tuple(map(tuple, map(sorted, epoch))) for epoch in epochs}) == 3
    assert set(epochs[0]) != set(epochs[1]), "the same company in each epoch"
    for epoch in epochs:
        assert sorted(n for row in epoch for n in row) == list(range(200))
    other = PackedLoader(encoded, 50, 1, 1)
    assert [frozenset(other.examples(i)) for i in range(R)] != epochs[0]


def test_rows_are_computed_once():
    """A task makes its loader several times."""
    encoded = random_encoded(random.Random(0), 20, 20, "conversations")
    with mock.patch.object(packing, "best_fit", wraps=best_fit) as fit:
        for _ in range(3):
            PackedLoader(encoded, 50, 2, 0)
        PackedValidation(encoded, 50, 2)
    assert fit.call_count == 1


def test_models_that_count_positions_have_an_example_a_row():
    assert can_share_rows(tiny_config())
    assert not can_share_rows(tiny_config(use_attention_bias=True))
    assert not can_share_rows(tiny_config(use_rope=False))
    encoded = random_encoded(random.Random(0), 30, 20, "conversations")
    loader = PackedLoader(encoded, 100, 4, 0, share=False)
    assert loader.samples_per_epoch == 30
    ids_BT, _, starts_BT, *_ = loader.batch(0)
    # As long as the longest example: no longer one will come.
    assert ids_BT.shape == (4, int(encoded.lengths.max()))
    for number, starts_T in zip(range(4), starts_BT, strict=True):
        length = int(encoded.lengths[loader.examples(number)[0]])
        assert not starts_T[:length].any()
        assert starts_T[length:].tolist() == list(range(length, len(starts_T)))


def test_ids_of_a_small_type_do_not_wrap():
    """IGNORE among unsigned 16-bit targets was the id 65,436."""
    encoded = encode_examples([talk("a", "b")], CHAT, 64)
    targets = PackedLoader(encoded, 64, 1, 0).batch(0)[1]
    assert targets.dtype == torch.int64
    assert set(targets.flatten().tolist()) == {IGNORE, ord("b"), CHAT.chat.end}


def test_a_step_without_a_target_is_refused():
    encoded = random_encoded(random.Random(0), 3, 5, "conversations")
    encoded.is_target = np.zeros_like(encoded.is_target)
    with pytest.raises(ValueError, match="example 0 has no target"):
        PackedLoader(encoded, 20, 1, 0)


def test_rows_of_another_length_are_refused():
    encoded = random_encoded(random.Random(0), 9, 20, "conversations")
    with pytest.raises(ValueError, match="encode them for rows of this length"):
        PackedLoader(encoded, 5, 1, 0)
    with pytest.raises(ValueError, match="no examples"):
        PackedLoader(encoded.of(np.arange(0)), 50, 1, 0)
    assert len(PackedValidation(encoded.of(np.arange(0)), 50, 1)) == 0


def test_a_pair_is_side_by_side():
    examples = [
        Pair(said(("user", "a")), said(("assistant", "b" * n)), said(("assistant", "c")))
        for n in (1, 9, 4)
    ]
    encoded = encode_examples(examples, CHAT, 96)
    ids_BT, targets_BT, starts_BT, rows_M, segments_M, pairs_P = PairLoader(
        encoded, 96, 2, 0
    ).batch(0)
    assert ids_BT.shape == (4, 96)
    for j, number in enumerate(pairs_P.tolist()):
        for side, text in enumerate(("b" * (1, 9, 4)[number], "c")):
            targets = targets_BT.flatten()[rows_M[segments_M == 2 * j + side]]
            assert CHAT.decode(targets.tolist()) == f"{text}<|end|>"
            assert set((rows_M[segments_M == 2 * j + side] // 96 % 2).tolist()) == {side}


def test_batches_made_ahead_are_the_same():
    """The thread that prefetches asks while others do."""
    encoded = random_encoded(random.Random(0), 50, 20, "conversations")
    loader = PackedLoader(encoded, 40, 3, 0)
    wanted = [PackedLoader(encoded, 40, 3, 0).batch(3 * i) for i in range(30)]
    ahead = prefetch(loader.batch(3 * i) for i in range(30))
    for one, other in zip(ahead, wanted, strict=True):
        loader.batch(7)
        assert all(map(torch.equal, one, other))


# ------------------------------------------------------------------------------- the promises
@pytest.mark.parametrize(
    "run, count",
    [
        (promise.answers_only, 25),
        (promise.packed_is_alone, 1),
        (promise.any_split, 1),
        (promise.each_once, 60),
    ],
    ids=["answers only", "packed is alone", "any split", "each once"],
)
def test_what_is_promised(run, count):
    run(count).check()


def broken(tally, words: str) -> None:
    assert tally.held < tally.tried and any(words in failure for failure in tally.failures), tally


def shifted(rendered):
    """The mask one id too early: the header is learned, the end is not."""
    ids, is_target = up_to_last_target(rendered)
    return Rendered(ids, [*is_target[1:], True])


@pytest.mark.parametrize(
    "fake",
    [shifted, lambda rendered: Rendered(rendered.ids, [False] + [True] * (len(rendered.ids) - 1))],
    ids=["shifted", "on all"],
)
def test_a_wrong_mask_is_found(fake):
    with mock.patch.object(encode_module, "up_to_last_target", fake):
        broken(promise.answers_only(25), "mask False")


def test_examples_that_see_each_other_are_found():
    with mock.patch.object(promise, "make_batch", make_batch):
        real = model_module.LLM.forward

        def forward(self, *args, starts_BT=None, **options):
            return real(self, *args, **options)

        with mock.patch.object(model_module.LLM, "forward", forward):
            broken(promise.packed_is_alone(1), "differs by")


def test_a_mean_of_means_is_found():
    """Each micro-batch divided by its own targets: short answers count more."""
    real = train.forward_backward

    def means(model, task, batch, dtype, divisor=1, grad_accum=1, scaler=None):
        return real(model, task, batch, dtype, task.count(batch) * grad_accum, grad_accum, scaler)

    with mock.patch.object(train, "forward_backward", means):
        broken(promise.any_split(1), "4: ")
    assert loader_module.micro_batches is promise.micro_batches


# ------------------------------------------------------------------------------- shown
def test_an_example_is_shown_with_its_mask():
    rendered = Rendered(CHAT.encode("Who? I am.\x1b"), [False] * 5 + [True] * 6)
    assert show_example(*rendered, CHAT, colour=False) == "Who? [I am.\\x1b]"
    assert show_example(*rendered, CHAT, colour=True) == "Who? \033[32mI am.\\x1b\033[0m"


def test_a_shown_example_has_short_lines():
    text = "灯台 a cat é " * 60 + "x" * 250
    rendered = Rendered(CHAT.encode(text), [True] * len(CHAT.encode(text)))
    lines = show_example(*rendered, CHAT, colour=False).split("\n")
    widths = [sum(2 if c in "灯台" else 1 for c in line) for line in lines]
    assert max(widths) == 100 and "".join(lines) == f"[{text}]"
    for line in show_example(*rendered, CHAT, colour=True).split("\n"):
        assert line.startswith("\033[32m") and line.endswith("\033[0m")


def test_of_a_long_example_the_middle_is_left_out():
    ids = CHAT.encode("\n".join(map(str, range(100))))
    lines = show_example(ids, [False] * len(ids), CHAT, colour=False).split("\n")
    assert len(lines) == 40 and lines[20] == "... 61 lines ..."
    assert (lines[19], lines[21], lines[-1]) == ("19", "81", "99")
