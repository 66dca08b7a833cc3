"""Questions made of one's own text: rules of sentences and names, and what they ask."""

from __future__ import annotations

import random

import pytest

from runtime.data import toy_stories
from runtime.evaluation.own_tasks import (
    MAKERS,
    OTHER_NUMBER,
    agreements,
    drawn_documents,
    endings,
    names,
    orders,
    own_tasks,
)
from runtime.evaluation.sentences import mentions, sentence_starts, words

STORY = (
    'Once there was a girl. She met a boy called Tom. "Stop!" he said. Then Tom and Mia played.\n'
    "The ball was red. Mia was happy, and Tom smiled. They went home."
)


def whole(question, number: int = 0) -> str:
    return question.contexts[0] + question.delimiter + question.continuations[number]


# ------------------------------------------------------------------------------ sentences
@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        ("  \n", []),
        ("One", ["One"]),
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ('"Stop!" he said. Then', ['"Stop!" he said. ', "Then"]),
        ('He said, "Stop." Then', ['He said, "Stop." ', "Then"]),
        ("Mr. Fox ran. Dr. Owl sat.", ["Mr. Fox ran. ", "Dr. Owl sat."]),
        ("Wait... what? It is 3.5 m.", ["Wait... what? ", "It is 3.5 m."]),
        ("One.\n\nTwo.", ["One.\n\n", "Two."]),
        ("\u201cGo.\u201d Then", ["\u201cGo.\u201d ", "Then"]),
    ],
)
def test_sentences(text, expected):
    starts = sentence_starts(text)
    assert [text[a:b] for a, b in zip(starts, [*starts[1:], None], strict=bool(starts))] == expected


def test_words_are_small_letters_without_punctuation():
    assert words('Tom\'s "red" ball, 3 times!') == ["tom's", "red", "ball", "times"]


def test_names_stand_within_a_sentence_once():
    """A capital at the start of a sentence is no sign; nor is one of a word that is also small."""
    assert [name for name, _ in mentions(STORY)] == ["Tom", "Tom", "Mia", "Mia", "Tom"]
    assert mentions("Ran. The dog ran to the Dog. Then the Dog ran.") == []
    assert mentions("He came on Monday. They said Mr Fox left.") == [("Fox", 32)]
    text = "It was Tom's ball. Tom's dog sat."
    assert [text[at:][:5] for _, at in mentions(text)] == ["Tom's", "Tom's"]


@pytest.mark.parametrize("piece", [". ", "Tom, ", '."', "a Tom. ", "\n", "was "])
def test_a_book_of_one_line_is_read_once(piece):
    """What reads a text again at each place does not end: the square of its length is 10^11."""
    for _, make in MAKERS.values():
        assert len(make(drawn_documents([piece * 100_000], 1))) <= 1


# ------------------------------------------------------------------------------ the tasks
def test_an_ending_is_the_last_sentence_against_three_others():
    texts = [f"One {i}. Two. Three. The end number {i}." for i in range(5)]
    questions = endings(drawn_documents(texts, 10))
    assert len(questions) == 5
    for question in questions:
        assert whole(question) in texts and question.right == 0
        assert len(set(question.continuations)) == 4
        assert all(text.startswith("The end number") for text in question.continuations)


def test_equal_endings_are_never_wrong_ones():
    """Stories often end alike: the right answer would stand among the wrong ones."""
    texts = [f"One {i}. Two. Three. {'The end.' if i % 2 else f'End {i}.'}" for i in range(12)]
    for question in endings(drawn_documents(texts, 12)):
        assert len(set(question.continuations)) == len(question.continuations) == 4


def test_two_sentences_are_swapped_whole():
    for question in orders(drawn_documents([STORY], 1)):
        right, wrong = question.continuations
        assert whole(question) in STORY
        assert right != wrong and sorted(right) == sorted(wrong)
        assert len(sentence_starts(question.contexts[0])) >= 1


def test_a_name_is_swapped_with_another_that_came_before():
    (question,) = names(drawn_documents([STORY], 1))
    right, wrong = question.continuations
    assert whole(question) in STORY
    first, other = right.split()[0], wrong.split()[0]
    assert {first, other} == {"Tom", "Mia"} and right[len(first) :] == wrong[len(other) :]
    before = {name for name, at in mentions(STORY) if at < len(question.contexts[0])}
    assert before == {"Tom", "Mia"}


def test_a_verb_is_swapped_with_its_other_number():
    (question,) = agreements(drawn_documents([STORY], 1))
    right, wrong = (text.split(" ", 1) for text in question.continuations)
    assert whole(question) in STORY
    assert OTHER_NUMBER[right[0]] == wrong[0] and right[1] == wrong[1]
    assert OTHER_NUMBER["was"] == "were" and OTHER_NUMBER["were"] == "was"
    assert all(OTHER_NUMBER[OTHER_NUMBER[verb]] == verb for verb in OTHER_NUMBER)


def test_the_order_of_the_documents_asks_nothing_else():
    texts = [toy_stories.story(i) for i in range(60)]
    asked, notes = own_tasks(texts, 20)
    assert [task.name for task in asked] == list(MAKERS) and not notes
    assert all(len(task.questions) == 20 for task in asked)
    random.Random(0).shuffle(texts)
    assert own_tasks(texts + texts[:5], 20)[0] == asked


def test_copies_of_a_document_take_no_places():
    """Files often hold a text many times: of 2,000 copies and 8 others one was drawn."""
    texts = [f"One {i}. Two. Three. The end number {i}." for i in range(9)]
    first = drawn_documents(texts, 1)[0][1]
    assert drawn_documents([first] * 50 + texts, 9) == drawn_documents(texts, 9)
    assert len(drawn_documents([first] * 50 + texts, 9)) == 9


def test_what_a_text_cannot_ask_is_said():
    tasks, notes = own_tasks(["no sentence here"] * 3, 5)
    assert tasks == [] and len(notes) == len(MAKERS)
    assert notes[0] == "ending: no question could be made of 1 documents"
