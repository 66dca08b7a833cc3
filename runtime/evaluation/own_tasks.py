"""Questions made from one's own held-out text: no download, and no tokenizer decides what is asked.

Of each document a rule makes one question at most: its ending against those of three other
documents, two sentences in their order or swapped, a name against another one of the document, a
verb against its other number. Which sentence, name or verb is asked depends on the document alone,
and which endings it meets on the set of documents, never on their order.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Sequence

from runtime.data.splits import text_digest
from runtime.evaluation.choice_formats import CHOICES, Question, Task
from runtime.evaluation.sentences import mentions, sentence_starts

# Questions of each task, at most.
NUM_QUESTIONS = 500
OTHER_ENDINGS = 3
# An ending needs something to follow, and two sentences something before them.
FEWEST_SENTENCES = 4
_SWAPS = ("was were", "is are", "has have", "does do", "wasn't weren't", "isn't aren't")
OTHER_NUMBER = {
    one: other for pair in _SWAPS for one, other in (pair.split(), reversed(pair.split()))
}
# After a word of the same sentence, so that it is no question.
_VERB = re.compile(rf"(?<=[a-z] )({'|'.join(sorted(OTHER_NUMBER, key=len, reverse=True))})(?= )")

Documents = Sequence[tuple[bytes, str]]


def drawn_documents(documents: Iterable[str], most: int) -> list[tuple[bytes, str]]:
    """Return (digest, text) of at most `most` distinct documents, in the order of their digests.

    That is a random sample, and the same one in whatever order the documents come.
    """
    texts = (text.strip() for text in documents)
    # Copies would take the places of others.
    distinct = {text_digest(text): text for text in texts if text}
    return heapq.nsmallest(most, distinct.items())


def own_tasks(
    documents: Iterable[str], num_questions: int = NUM_QUESTIONS
) -> tuple[list[Task], list[str]]:
    """Return the tasks made of documents, and a note for each that they give no question for."""
    # Not every document gives a question of each kind.
    drawn = drawn_documents(documents, 4 * num_questions)
    tasks, notes = [], []
    for name, (form, make) in MAKERS.items():
        questions = make(drawn)[:num_questions]
        if questions:
            tasks.append(Task(name, form, questions, is_made=True))
        else:
            notes.append(f"{name}: no question could be made of {len(drawn):,} documents")
    return tasks, notes


def _question(text: str, at: int, continuations: Sequence[str], number: int) -> Question:
    """Return a question whose first continuation is right: it follows text[:at]."""
    context = text[:at].rstrip()
    return Question(
        CHOICES,
        (context,),
        tuple(continuations),
        0,
        f"document {number} of the held-out text",
        text[len(context) : at],
    )


def endings(documents: Documents) -> list[Question]:
    """Ask for each document's last sentence, against that of three others."""
    cut = []
    for _, text in documents:
        starts = sentence_starts(text)
        if len(starts) >= FEWEST_SENTENCES:
            cut.append((text, starts[-1], text[starts[-1] :]))
    questions = []
    for number, (text, at, own) in enumerate(cut):
        # Those that come next by digest, around the end.
        others = dict.fromkeys(cut[(number + i) % len(cut)][2] for i in range(1, 4 * OTHER_ENDINGS))
        others.pop(own, None)
        if len(others) >= OTHER_ENDINGS:
            wrong = list(others)[:OTHER_ENDINGS]
            questions.append(_question(text, at, [own, *wrong], number + 1))
    return questions


def orders(documents: Documents) -> list[Question]:
    """Ask for two sentences in their order, against the same two swapped."""
    questions = []
    for number, (digest, text) in enumerate(documents, 1):
        starts = sentence_starts(text)
        if len(starts) < FEWEST_SENTENCES:
            continue
        # Not the first sentence, which nothing comes before.
        at = 1 + _drawn(digest, len(starts) - 2)
        pieces = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        first, second = pieces[at].rstrip(), pieces[at + 1].rstrip()
        gap = pieces[at][len(first) :]
        if first != second:
            both = [first + gap + second, second + gap + first]
            questions.append(_question(text, starts[at], both, number))
    return questions


def names(documents: Documents) -> list[Question]:
    """Ask for a name that the document has named before, against another one that it has named."""
    questions = []
    for number, (digest, text) in enumerate(documents, 1):
        # Mentions of a name that came before, where another one did, too: that before it.
        asked: list[tuple[str, int, str]] = []
        last, other, before = "", "", set()
        for name, at in mentions(text):
            if name != last:
                last, other = name, last
            if name in before and other:
                asked.append((name, at, other))
            before.add(name)
        if asked:
            name, at, other = asked[_drawn(digest, len(asked))]
            rest = text[at : _sentence_end(text, at)]
            questions.append(_question(text, at, [rest, other + rest[len(name) :]], number))
    return questions


def agreements(documents: Documents) -> list[Question]:
    """Ask for a verb, against its other number: was, were; is, are; has, have; does, do."""
    questions = []
    for number, (digest, text) in enumerate(documents, 1):
        found = list(_VERB.finditer(text))
        if found:
            match = found[_drawn(digest, len(found))]
            rest = text[match.start() : _sentence_end(text, match.start())]
            wrong = OTHER_NUMBER[match[0]] + rest[len(match[0]) :]
            questions.append(_question(text, match.start(), [rest, wrong], number))
    return questions


def _drawn(digest: bytes, size: int) -> int:
    """Return a number below `size` that depends on the digest alone."""
    return int.from_bytes(digest[8:16], "big") % size


def _sentence_end(text: str, at: int) -> int:
    """Return where the sentence that holds a position ends, without the blanks after it."""
    after = [start for start in sentence_starts(text[at:]) if start]
    end = at + after[0] if after else len(text)
    return at + len(text[at:end].rstrip())


# Task -> what is asked, and how its questions are made.
MAKERS: dict[str, tuple[str, Callable[[Documents], list[Question]]]] = {
    "ending": ("own ending or those of 3 others", endings),
    "order": ("two sentences, or swapped", orders),
    "name": ("a name, or another of the text", names),
    "agreement": ("a verb, or its other number", agreements),
}
