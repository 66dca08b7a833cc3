"""The embedded tasks: their answers are right, and their splits share no story."""

from __future__ import annotations

import collections
import difflib
import itertools

import pytest

from runtime.data.toy_stories import NUM_DISTINCT
from runtime.posttraining import tasks
from runtime.posttraining.forms import Pair, Prompt
from runtime.posttraining.tasks import (
    FIRST_STORY,
    MOST_BEGINNING_WORDS,
    MOST_STORY_WORDS,
    QUESTIONS,
    REQUEST,
    SPLIT_STORIES,
    STORIES_PER_EXERCISE,
    conversations,
    has,
    interview,
    is_right,
    pair,
    pairs,
    parts,
    prompts,
    question,
    request,
    reward,
)

SAMPLE = 300


@pytest.fixture(scope="module")
def questions() -> list[tasks.Exercise]:
    return [question("test", number) for number in range(SAMPLE)]


@pytest.fixture(scope="module")
def requests() -> list[tasks.Exercise]:
    return [request("test", number) for number in range(SAMPLE)]


# ------------------------------------------------------------------------------ splits
def test_splits_share_no_story():
    """A score on stories that a stage was trained on says nothing."""
    last = SPLIT_STORIES // STORIES_PER_EXERCISE - 1
    taken = sorted(
        (stories.start, stories.stop)
        for split in FIRST_STORY
        for stories in (tasks._numbers(split, 0), tasks._numbers(split, last))
    )
    for (_, stop), (start, _) in itertools.pairwise(taken):
        assert stop <= start
    for split, first in FIRST_STORY.items():
        assert tasks._numbers(split, 0).start == first
        assert tasks._numbers(split, last).stop == first + SPLIT_STORIES


def test_exercises_of_a_split_share_no_story():
    blocks = [tasks._numbers("sft", number) for number in (0, 1, 2)]
    assert blocks[0].stop == blocks[1].start and blocks[1].stop == blocks[2].start


def test_a_split_has_its_own_exercises():
    prompts_by_split = [
        {make(split, number).prompt for number in range(20) for make in (question, request)}
        for split in FIRST_STORY
    ]
    for one, other in itertools.combinations(prompts_by_split, 2):
        # Short requests for common names may agree; the stories do not.
        assert len(one & other) <= 2


@pytest.mark.parametrize("make", [question, interview, request, pair])
def test_an_exercise_is_a_function_of_split_and_number(make):
    assert make("sft", 7) == make("sft", 7)
    assert make("sft", 7) != make("sft", 8)
    assert make("sft", 7) != make("test", 7)


def test_wrong_splits_and_numbers_are_refused():
    with pytest.raises(ValueError, match="the splits are sft, preference, rl, test, not 'train'"):
        question("train", 0)
    with pytest.raises(ValueError, match="from 0 to 999,999, not -1"):
        request("sft", -1)
    with pytest.raises(ValueError, match="from 0 to 999,999, not 1000000"):
        pair("sft", 1_000_000)


# ------------------------------------------------------------------------------ questions
def test_answers_are_in_the_text(questions):
    for exercise in questions:
        beginning, asked = exercise.prompt.split("\n")[:-1], exercise.prompt.split("\n")[-1]
        assert has("\n".join(beginning), exercise.answer), exercise
        assert len(" ".join(beginning).split()) <= MOST_BEGINNING_WORDS
        assert asked.endswith("?")


def test_kinds_of_questions_take_turns(questions):
    assert [exercise.kind for exercise in questions] == [
        kind for kind, _ in zip(itertools.cycle(QUESTIONS), questions, strict=False)
    ]


def test_a_question_has_one_answer(questions):
    """The friend is not the hero, and the hero does not have what is a prize or was found."""
    for exercise in questions:
        text, asked = exercise.prompt.rsplit("\n", 1)
        if exercise.kind == "who else":
            assert text.index(exercise.answer) > 0 and not text.startswith(exercise.answer)
        if exercise.kind in ("kind", "thing"):
            # The question names the hero, whom the text names too.
            name = asked.removesuffix("?").split()[-1]
            name = name if exercise.kind == "kind" else asked.split("does ")[1].split(" have")[0]
            assert has(text, name)
        if exercise.kind == "thing":
            assert "prize" not in text and "stumbled over" not in text


def test_a_question_is_right_only_word_for_word_and_with_an_end(questions):
    exercise = questions[0]
    assert is_right(exercise, exercise.answer, ended=True)
    assert is_right(exercise, f" {exercise.answer}\n", ended=True)
    assert not is_right(exercise, exercise.answer, ended=False)
    assert not is_right(exercise, exercise.answer + ".", ended=True)
    assert not is_right(exercise, "", ended=True)


def test_an_interview_asks_each_kind_once():
    """Its first turn has the text, and every answer is in that text."""
    numbers = range(SAMPLE)
    turns = [interview("sft", number) for number in numbers]
    for number, asked in zip(numbers, turns, strict=True):
        text = asked[0].prompt.rsplit("\n", 1)[0]
        kinds = [exercise.kind for exercise in asked]
        assert asked[0] == question("sft", number) and len(kinds) == len(set(kinds))
        for exercise in asked:
            assert has(text, exercise.answer)
        for exercise in asked[1:]:
            assert "\n" not in exercise.prompt
    # On average more than three, in several orders.
    assert sum(map(len, turns)) > 3 * SAMPLE
    orders = {tuple(exercise.kind for exercise in asked) for asked in turns}
    assert len(orders) > 20


# ------------------------------------------------------------------------------ requests
def test_the_story_has_all_that_its_request_asks_for(requests):
    for exercise in requests:
        assert exercise.kind == REQUEST
        assert reward(exercise.items, exercise.answer, ended=True) == 1.0
        assert is_right(exercise, exercise.answer, ended=True)
        assert len(exercise.answer.split()) <= MOST_STORY_WORDS
        assert {"hero", "first thing"} <= set(exercise.items)
        for item in exercise.items.values():
            assert has(exercise.prompt, item)


def test_a_story_without_an_end_earns_nothing(requests):
    """A model that never stops would otherwise name everything at last, and be rewarded for it."""
    exercise = requests[0]
    assert reward(exercise.items, exercise.answer, ended=False) == 0.0
    assert not is_right(exercise, exercise.answer, ended=False)


def test_reward_is_the_share_of_items():
    items = {"hero": "Ben", "friend": "Ann", "first thing": "the farm", "kind": "fox"}
    assert reward(items, "Ben the fox went to the farm with Ann.", ended=True) == 1.0
    assert reward(items, "Ben went to the farm.", ended=True) == 0.5
    assert parts(items, "Ben went to the farm.") == {
        "hero": 1.0,
        "friend": 0.0,
        "first thing": 1.0,
        "kind": 0.0,
    }


def test_items_are_whole_words():
    """ "Ben" is not in "Benny" nor "the farm" in "the farmer", however often they are said."""
    assert has("Ben's kite", "Ben") and has('"Ben!"', "Ben")
    assert not has("Benny and Ruben", "Ben")
    assert not has("the farmer", "the farm")
    assert has("The farm was big", "the farm")
    # A name is no common word.
    assert not has("a patch of clover", "Patch")
    assert not has("", "Ben")


# ------------------------------------------------------------------------------ pairs
def test_pairs_differ_in_one_requested_thing():
    """Both stories have all other items, and only the first has the one that was replaced."""
    replaced = collections.Counter()
    for number in range(SAMPLE):
        exercise, rejected = pair("preference", number)
        assert reward(exercise.items, exercise.answer, ended=True) == 1.0
        lost = [part for part, kept in parts(exercise.items, rejected).items() if not kept]
        assert len(lost) == 1, (exercise, rejected)
        replaced[lost[0]] += 1
    assert set(replaced) == {"hero", "friend", "kind", "first thing", "second thing"}
    # Three standard deviations of a share of 0.3.
    names = (replaced["hero"] + replaced["friend"]) / SAMPLE
    assert abs(names - tasks.NAME_SHARE) < 3 * (0.3 * 0.7 / SAMPLE) ** 0.5


def test_pairs_differ_in_few_words():
    """Stories that differ in much else teach which story, and not what was asked for."""
    shares, longer = [], 0
    for number in range(SAMPLE):
        exercise, rejected = pair("preference", number)
        before, after = exercise.answer.split(), rejected.split()
        matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
        kept = sum(block.size for block in matcher.get_matching_blocks())
        shares.append(1 - kept / len(before))
        longer += abs(len(after) - len(before)) > 5
        assert exercise.answer.count("\n") == rejected.count("\n")
    assert sorted(shares)[SAMPLE // 2] < 0.1
    assert max(shares) < 0.5
    assert longer < 0.1 * SAMPLE


def test_pronouns_follow_the_replaced_name():
    """A boy who becomes a girl is she in the whole story."""
    cast = {"A": tasks.toy_stories._character(lambda: 0.0, tasks.toy_stories.grammar(), True)}
    # Draws: another sex, then a name.
    numbers = iter([0.99, 0.5])
    other = tasks._replaced(cast, "A", lambda: next(numbers))["A"]
    assert (cast["A"].he, cast["A"].kind, other.he, other.kind) == ("she", "girl", "he", "boy")
    text = "{A.intro} {A.full} {A.s} {A.a} {A.his} {A.home}"
    told = text.format(A=other)
    assert "girl" not in told and str(cast["A"]) not in told and "boy" in told
    assert other.home == cast["A"].home


def test_a_replaced_place_brings_its_own_sights_and_spots():
    for number in range(SAMPLE):
        draft, asked, draw = tasks._requested("preference", number)
        if "place" not in asked.values():
            continue
        cast = tasks._replaced(draft.cast, "place", draw)
        row = next(
            row for row in tasks.toy_stories.grammar().tables["place"] if row == cast["place"]
        )
        assert cast["at"] == f"{row.prep} {row}"
        assert cast["sight"] in row.sights.split(", ")
        assert {cast["spot"], cast["spot2"], cast["spot3"]} <= set(row.spots.split(", "))


# ------------------------------------------------------------------------------ as data
def test_conversations_mix_questions_and_requests_evenly():
    for share, asked in ((0.0, 0), (0.2, 12), (0.5, 30), (1.0, 60)):
        found = conversations("sft", 60, share)
        is_question = ["\n" in one.messages[0]["content"] for one in found]
        assert sum(is_question) == asked
        assert abs(sum(is_question[:30]) - asked / 2) <= 1
        for one in found:
            roles = [message["role"] for message in one.messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        conversations("sft", 1, 2)


def test_every_share_of_questions_has_all_kinds():
    """With a fifth of questions, the numbers of all conversations gave questions of one kind."""
    for share in (0.2, 0.4, 1.0):
        contents = [one.messages[0]["content"] for one in conversations("sft", 50, share)]
        numbers = range(round(50 * share))
        questions = [content for content in contents if "\n" in content]
        assert questions == [question("sft", number).prompt for number in numbers]


def test_pairs_and_prompts_are_data():
    (one,) = pairs("preference", 1)
    exercise, rejected = pair("preference", 0)
    asked = [{"role": "user", "content": exercise.prompt}]
    chosen = [{"role": "assistant", "content": exercise.answer}]
    assert one == Pair(asked, chosen, [{"role": "assistant", "content": rejected}])
    exercise = request("rl", 1)
    asked = [{"role": "user", "content": exercise.prompt}]
    assert prompts("rl", 2)[1] == Prompt(asked, {"items": exercise.items})


def test_no_pre_training_text_reaches_the_tasks():
    """prepare_data.py --dataset toy takes the stories from 0 on, and at most NUM_DISTINCT."""
    assert min(FIRST_STORY.values()) >= NUM_DISTINCT
