"""Embedded tasks for post-training, made from the grammar of the toy stories: no network, no files.

Questions on the beginning of a story have one exact answer. Requests for a story list what must be
in it, so that a program can check the result. A pair is a request, its story, and the same story
with one requested thing replaced.

Every exercise is a pure function of (split, number). Splits use stories of their own, which no
pre-training text has, so a score on "test" is one on text that no stage has seen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.data import toy_stories
from runtime.data.toy_stories import Phrase, _pick
from runtime.posttraining.forms import Conversation, Pair, Prompt

# The first story of each split. prepare_data.py --dataset toy takes stories 0, 1, 2, ...
FIRST_STORY = {
    "sft": 1_000_000_000,
    "preference": 2_000_000_000,
    "rl": 3_000_000_000,
    "test": 4_000_000_000,
}
SPLIT_STORIES = 1_000_000_000
# Stories from here on are text for no stage: a model's loss on them tells what tuning cost.
FIRST_HELD_OUT_STORY = 5_000_000_000
# An exercise takes the first of so many stories that has what it needs.
STORIES_PER_EXERCISE = 1_000
# A question comes after the sentences that fit.
MOST_BEGINNING_WORDS = 60
# A small model may read 256 tokens: the request and its story must fit.
MOST_STORY_WORDS = 140

QUESTIONS = {
    "who": ("Who is the story about?", "What is the name of the hero?"),
    "who else": ("Who else is in the story?", "What is the name of the friend?"),
    "kind": ("What kind of child or animal is {A}?", "What is {A}?"),
    "thing": ("What does {A} have?", "Which toy does {A} have?"),
    "where": ("Where does it happen?", "To which place does the story take us?"),
}
REQUEST = "request"
# What a request can ask for.
PARTS = ("hero", "friend", "kind", "first thing", "second thing")
# Pairs in which a name is replaced. A model learns early to use the names that it is given. From
# there on such pairs can only teach it to break the copying of names inside the rejected story.
NAME_SHARE = 0.3
# Rows that are drawn before another requested thing is replaced.
MOST_DRAWS = 20

# The drafts in which the hero owns the toy; in others it is a prize, or somebody has lost it.
_OWNS = re.compile(
    r"\{A\.[Hh]is\} \{O|\{A\} had \{O\.a\}|thing was \{O\.a\}|\{A\} got \{O\.a\}|"
    r"gave \{A\} \{O\.a\}|\{A\} kept \{O\.a\}|\{at\} with \{O\.a\}|playing with \{O\.a\}|"
    r"playing with the \{O\.noun\}|had brought \{O\.a\}"
)
# Fields with things that a request can ask for: what the story is about, no detail of its end.
_THINGS = ("O", "place", "bake", "build", "gift", "plant", "broken")
_SENTENCE_END = re.compile(r"""[.!?]"?(?=\s|$)""")
_FIELD = re.compile(r"\{(\w+)[\w.]*\}")


@dataclass(frozen=True)
class Exercise:
    """A prompt with an answer that is right.

    kind: of question, or REQUEST. items: what the answer to a request must have, as whole words, by
    part (PARTS); empty for a question.
    """

    kind: str
    prompt: str
    answer: str
    items: dict[str, str]


@dataclass(frozen=True)
class Drafted:
    """A story with its fields still open, and its cast."""

    text: str
    cast: dict[str, Any]

    @property
    def story(self) -> str:
        return self.text.format_map(self.cast)

    @property
    def fields(self) -> set[str]:
        """Return the names of the fields that the story uses."""
        return set(_FIELD.findall(self.text))


# ------------------------------------------------------------------------------ stories of a split
def _numbers(split: str, number: int) -> range:
    """Return the stories that exercise `number` of a split can take."""
    if split not in FIRST_STORY:
        raise ValueError(f"the splits are {', '.join(FIRST_STORY)}, not {split!r}")
    if not 0 <= number < SPLIT_STORIES // STORIES_PER_EXERCISE:
        most = SPLIT_STORIES // STORIES_PER_EXERCISE - 1
        raise ValueError(f"an exercise's number must be from 0 to {most:,}, not {number}")
    first = FIRST_STORY[split] + number * STORIES_PER_EXERCISE
    return range(first, first + STORIES_PER_EXERCISE)


def _drafts(split: str, number: int) -> Iterator[tuple[Drafted, Callable[[], float]]]:
    """Yield the stories of an exercise, each with a source of random numbers of its own."""
    for index in _numbers(split, number):
        # Not the numbers that made the story: a choice must not depend on its first sentence.
        yield Drafted(*toy_stories._draft(index)), random.Random(f"task {index}").random


def _shuffled(draw: Callable[[], float], options: Sequence[str]) -> list[str]:
    """Return the options in random order."""
    left, order = list(options), []
    while left:
        order.append(left.pop(int(draw() * len(left))))
    return order


def held_out_story(number: int) -> str:
    """Return story `number` of those that neither pre-training nor an exercise takes."""
    return toy_stories.story(FIRST_HELD_OUT_STORY + number)


# ------------------------------------------------------------------------------ questions
def question(split: str, number: int) -> Exercise:
    """Return a question on the beginning of a story; the kinds take turns."""
    return interview(split, number)[0]


def interview(split: str, number: int) -> list[Exercise]:
    """Return all questions that the beginning of a story answers, in some order.

    The text is in the prompt of the first alone. Its kind goes by the number, so that all kinds are
    as frequent as each other.
    """
    kinds = list(QUESTIONS)
    first = kinds[number % len(kinds)]
    for draft, draw in _drafts(split, number):
        beginning = _beginning(draft)
        answers = _answers(beginning)
        if first not in answers:
            continue
        order = [first, *_shuffled(draw, [kind for kind in answers if kind != first])]
        texts = [f"{beginning.story}\n", *[""] * len(order)]
        return [
            Exercise(kind, text + _pick(draw, QUESTIONS[kind]).format_map(draft.cast), answer, {})
            for kind, text, answer in zip(
                order, texts, (answers[kind] for kind in order), strict=False
            )
        ]
    raise AssertionError(f"no story of {_numbers(split, number)} answers {first!r}")


def _beginning(draft: Drafted) -> Drafted:
    """Return the sentences from the start that have MOST_BEGINNING_WORDS at most together."""
    end = 0
    for match in _SENTENCE_END.finditer(draft.text):
        text = draft.text[: match.end()]
        if len(text.format_map(draft.cast).split()) > MOST_BEGINNING_WORDS:
            break
        end = match.end()
    return Drafted(draft.text[:end], draft.cast)


def _answers(beginning: Drafted) -> dict[str, str]:
    """Return the answer to each kind of question that the text answers; the text has all of it."""
    cast, fields = beginning.cast, beginning.fields
    # Without its name the friend is not introduced.
    has_friend = re.search(r"\{B(\.full|\.s|\.[Ii]ntro)?\}", beginning.text)
    answers = {
        "who": "A" in fields and cast["A"],
        "who else": has_friend and cast["B"],
        "kind": re.search(r"\{A\.(a|A|kind|intro|Intro|full)\}", beginning.text) and cast["A"].kind,
        "thing": _OWNS.search(beginning.text) and cast["O"],
        "where": fields & {"place", "at"} and cast["place"],
    }
    story = beginning.story
    return {kind: str(answer) for kind, answer in answers.items() if answer and has(story, answer)}


# ------------------------------------------------------------------------------ requests
def request(split: str, number: int) -> Exercise:
    """Return a request for a story, with the grammar's own story as its answer."""
    draft, asked, _ = _requested(split, number)
    return _request(draft, asked)


def _requested(split: str, number: int) -> tuple[Drafted, dict[str, str], Callable[[], float]]:
    """Return the story of a request, the fields that it asks for by part, and random numbers."""
    for draft, draw in _drafts(split, number):
        fields, cast = draft.fields, draft.cast
        if len(draft.story.split()) > MOST_STORY_WORDS:
            continue
        things = [
            name for name in _THINGS if name in fields and has(draft.story, _core(cast, name))
        ]
        asked = {"hero": "A"}
        if "B" in fields:
            asked["friend"] = "B"
        for part in ("first thing", "second thing")[: _pick(draw, (1, 2))]:
            if things:
                asked[part] = things.pop(int(draw() * len(things)))
        if "first thing" in asked:
            return draft, asked, draw
    raise AssertionError(f"no story of {_numbers(split, number)} is short and has things")


def _core(cast: dict[str, Any], field: str) -> str:
    """Return the words of a field that must be in a story: "ribbon" of "red ribbon"."""
    return str(cast["O"].noun if field == "O" else cast[field])


def _shown(cast: dict[str, Any], field: str) -> str:
    """Return how a request names a thing: "a ribbon", "the farm"."""
    core = _core(cast, field)
    return core if field == "place" else Phrase(core).a


def _request(draft: Drafted, asked: dict[str, str]) -> Exercise:
    """Return the request for the fields `asked` of a story."""
    cast = draft.cast
    items = {part: _core(cast, field) for part, field in asked.items()}
    if cast["A"].full != cast["A"]:
        items["kind"] = cast["A"].kind
    who = " and ".join([cast["A"].full] + [str(cast["B"]) for part in asked if part == "friend"])
    things = [_shown(cast, asked[part]) for part in asked if part.endswith("thing")]
    prompt = f"Tell a story about {who}. Use these words: {', '.join(things)}."
    return Exercise(REQUEST, prompt, draft.story, items)


# ------------------------------------------------------------------------------ pairs
def pair(split: str, number: int) -> tuple[Exercise, str]:
    """Return a request with its story, and the same story with one requested thing replaced.

    The replaced thing is another row of its table, in all its forms, so the two stories have about
    the same length and differ in nothing else. Only the first has everything that is asked for.
    """
    draft, asked, draw = _requested(split, number)
    exercise = _request(draft, asked)
    names = [part for part in exercise.items if part in ("hero", "friend")]
    others = [part for part in exercise.items if part not in names]
    first, second = (names, others) if draw() < NAME_SHARE else (others, names)
    for part in [*_shuffled(draw, first), *_shuffled(draw, second)]:
        for _ in range(MOST_DRAWS):
            cast = _replaced(draft.cast, "kind" if part == "kind" else asked[part], draw)
            rejected = Drafted(draft.text, cast).story
            # A row occurs several times in its table, and two characters need two names.
            if cast["A"] != cast["B"] and not has(rejected, exercise.items[part]):
                return exercise, rejected
    raise AssertionError(f"nothing in {exercise.prompt!r} can be replaced")


def _replaced(cast: dict[str, Any], field: str, draw: Callable[[], float]) -> dict[str, Any]:
    """Return a cast with another row of the table that a field is from, in all its forms."""
    tables = toy_stories.grammar().tables
    if field in ("A", "B"):
        return cast | {field: _renamed(cast[field], draw)}
    if field == "kind":
        return cast | {"A": _of_kind(cast["A"], _pick(draw, tables["animal"]))}
    if field == "O":
        return cast | {"O": _toy(cast["O"], draw)}
    if field == "place":
        return cast | _placed(cast, _pick(draw, tables["place"]))
    return cast | {field: _pick(draw, tables[field])}


def _renamed(character: Phrase, draw: Callable[[], float]) -> Phrase:
    """Return the character with another name and its pronouns; a girl can become a boy."""
    tables = toy_stories.grammar().tables
    is_child = character.full == character
    is_girl = _pick(draw, (True, False))
    name = _pick(
        draw, tables[("girl" if is_girl else "boy") if is_child else "she" if is_girl else "he"]
    )
    kind = ("girl" if is_girl else "boy") if is_child else character.kind
    changed = {str(character): str(name), character.kind: kind}
    pronouns = toy_stories._SHE if is_girl else toy_stories._HE
    return _with_words(name, character, changed, **pronouns)


def _of_kind(character: Phrase, animal: Phrase) -> Phrase:
    """Return the animal character as one of another kind, with its home and looks."""
    old = next(row for row in toy_stories.grammar().tables["animal"] if row == character.kind)
    changed = {character.kind: str(animal), old.den: animal.den}
    return _with_words(str(character), character, changed, look=animal.look)


def _with_words(text: str, phrase: Phrase, changed: dict[str, str], **forms: str) -> Phrase:
    """Return a phrase with the forms of another in which whole words are changed."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, changed))})\b")
    kept = {
        name: pattern.sub(lambda match: changed[match[0]], form)
        for name, form in vars(phrase).items()
    }
    return Phrase(text, **(kept | forms))


def _toy(toy: Phrase, draw: Callable[[], float]) -> Phrase:
    """Return another toy of the same color; one that flies stays one that flies."""
    tables = toy_stories.grammar().tables
    noun = _pick(draw, tables["light" if toy.noun in tables["light"] else "toy"])
    color = str(toy).removesuffix(toy.noun).strip()
    return Phrase(f"{color} {noun}", noun=noun, use=noun.use)


def _placed(cast: dict[str, Any], place: Phrase) -> dict[str, Any]:
    """Return the fields of a cast that speak of the place, for another place."""
    old = cast["place"]
    spots, old_spots = place.spots.split(", "), old.spots.split(", ")
    sights, old_sights = place.sights.split(", "), old.sights.split(", ")
    first = old_spots.index(cast["spot"]) % len(spots)
    return {
        "place": place,
        "at": f"{place.prep} {place}",
        "sight": sights[old_sights.index(cast["sight"]) % len(sights)],
        "spot": spots[first],
        "spot2": spots[first - 1],
        "spot3": spots[first - 2],
    }


# ------------------------------------------------------------------------------ rewards
def has(text: str, item: str) -> bool:
    """Return whether a text has an item as whole words; its first letter may be a capital."""
    first = f"[{item[0]}{item[0].upper()}]"
    return re.search(rf"(?<!\w){first}{re.escape(item[1:])}(?!\w)", text) is not None


def parts(items: dict[str, str], text: str) -> dict[str, float]:
    """Return 1.0 or 0.0 for each item by part: whether the text has it."""
    return {part: float(has(text, item)) for part, item in items.items()}


def reward(items: dict[str, str], text: str, ended: bool) -> float:
    """Return the share of a request's items that the text has; 0 for a text without an end."""
    return sum(parts(items, text).values()) / len(items) if ended else 0.0


def is_right(exercise: Exercise, text: str, ended: bool) -> bool:
    """Return whether a text is the answer to a question, or has all that a request asks for."""
    if not exercise.items:
        return ended and text.strip() == exercise.answer
    return reward(exercise.items, text, ended) == 1.0


# ------------------------------------------------------------------------------ as data
def conversations(split: str, count: int, question_share: float = 0.7) -> list[Conversation]:
    """Return `count` interviews and requests with their answers, spread evenly.

    question_share: the share of interviews, from 0 to 1.
    """
    if not 0 <= question_share <= 1:
        raise ValueError(f"question_share must be from 0 to 1, not {question_share}")
    found = []
    for number in range(count):
        # Of the conversations before this one.
        interviews = int(number * question_share)
        is_interview = int((number + 1) * question_share) > interviews
        turns = (
            interview(split, interviews) if is_interview else [request(split, number - interviews)]
        )
        found.append(Conversation([message for turn in turns for message in _turn(turn)]))
    return found


def pairs(split: str, count: int) -> list[Pair]:
    """Return `count` requests, each with a story that has everything and one that does not."""
    found = []
    for number in range(count):
        exercise, rejected = pair(split, number)
        found.append(Pair(asked(exercise), [_answered(exercise.answer)], [_answered(rejected)]))
    return found


def prompts(split: str, count: int) -> list[Prompt]:
    """Return `count` requests; the column "items" is for `reward`."""
    exercises = (request(split, number) for number in range(count))
    return [Prompt(asked(exercise), {"items": exercise.items}) for exercise in exercises]


def asked(exercise: Exercise) -> list[dict]:
    """Return the messages that a model is to answer."""
    return [{"role": "user", "content": exercise.prompt}]


def _turn(exercise: Exercise) -> list[dict]:
    return [*asked(exercise), _answered(exercise.answer)]


def _answered(text: str) -> dict:
    return {"role": "assistant", "content": text}
