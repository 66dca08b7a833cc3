"""runtime/posttraining/reward.py: functions of users, and one line for each way they fail."""

from __future__ import annotations

import pytest

from runtime.posttraining.forms import Prompt
from runtime.posttraining.reward import load_reward, toy_reward

PROMPT = Prompt([{"role": "user", "content": "Say cat."}], {"word": "cat"})


def reward_of(folder, body: str):
    (folder / "mine.py").write_text(body, encoding="utf-8")
    return load_reward(f"{folder}/mine.py:score")


def test_a_function_gets_messages_text_and_columns(tmp_path):
    reward = reward_of(
        tmp_path,
        "def score(messages, text, word):\n    return float(word in text and len(messages) == 1)\n",
    )
    reward.check(PROMPT)
    assert reward(PROMPT, "a cat", True) == (1.0, {})
    assert reward(PROMPT, "a dog", True) == (0.0, {})


@pytest.mark.parametrize(
    ("value", "earned"),
    [
        ("{'a': 1, 'b': 0.5}", (1.5, {"a": 1.0, "b": 0.5})),
        # The total may be something else than the sum.
        ("{'a': 1, 'b': 0, 'reward': 0.5}", (0.5, {"a": 1.0, "b": 0.0})),
        ("True", (1.0, {})),
        ("__import__('numpy').float32(0.25)", (0.25, {})),
        ("__import__('torch').tensor(0.25)", (0.25, {})),
    ],
)
def test_numbers_and_parts(tmp_path, value, earned):
    reward = reward_of(tmp_path, f"def score(messages, text, **columns):\n    return {value}\n")
    assert reward(PROMPT, "x", True) == earned


def test_an_answer_without_an_end_earns_at_most_nothing(tmp_path):
    """Otherwise the end would never be learned. A penalty stays, so that it is no way out."""
    reward = reward_of(
        tmp_path, "def score(messages, text, word):\n    return {'a': 1.0, 'b': -0.25}\n"
    )
    assert reward(PROMPT, "x", False) == (0.0, {"a": 0.0, "b": -0.25})
    reward = reward_of(tmp_path, "def score(messages, text, word):\n    return -2.0\n")
    assert reward(PROMPT, "x", False) == (-2.0, {})
    assert "at most 0" in reward.rule


def test_a_function_that_asks_decides_about_answers_without_an_end(tmp_path):
    reward = reward_of(
        tmp_path, "def score(messages, text, ended, **more):\n    return 0.5 + ended\n"
    )
    assert reward(PROMPT, "x", False) == (0.5, {}) and reward(PROMPT, "x", True) == (1.5, {})
    assert "it decides" in reward.rule


def test_the_embedded_reward_is_the_share_of_what_was_asked_for():
    prompt = Prompt([], {"items": {"hero": "Tim", "first thing": "ball"}})
    assert toy_reward()(prompt, "Tim ran.", True) == (0.5, {"hero": 1.0, "first thing": 0.0})
    assert toy_reward()(prompt, "Tim ran.", False).total == 0.0


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("def score(messages, text, word):\n    return text[9]\n", "IndexError: .*line 2 of .*py"),
        ("def score(messages, text):\n    return 1.0\n", "failed: TypeError: .*word"),
        ("def score(messages, text, word):\n    return 'good'\n", "returned 'good' as a reward"),
        ("def score(messages, text, word):\n    return '1'\n", "returned '1' as a reward"),
        ("def score(messages, text, word):\n    return float('nan')\n", "returned 'nan'"),
        ("def score(messages, text, word):\n    return 10**400\n", "returned '10+' as a reward"),
        ("def score(messages, text, word):\n    return {}\n", "a dict without parts"),
        ("def score(messages, text, word):\n    return {'a': None}\n", "'None' as part a"),
        ("def scores(messages, text):\n    return 1\n", "no function score; did you mean scores"),
        ("def score(messages, text)\n    return 1\n", r"SyntaxError.*mine\.py"),
        ("import notthere\n", "ModuleNotFoundError.*notthere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, body, line):
    with pytest.raises(ValueError, match=line) as error:
        reward_of(tmp_path, body).check(PROMPT)
    assert "\n" not in str(error.value) and "mine.py:score" in str(error.value)


@pytest.mark.parametrize("name", ["mine.py", "mine:score", "mine.py:"])
def test_a_name_without_both_parts_is_refused(name):
    with pytest.raises(ValueError, match=r"write FILE\.py:FUNCTION"):
        load_reward(name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nothere\.py"):
        load_reward(f"{tmp_path}/nothere.py:score")


def test_a_file_may_define_dataclasses(tmp_path):
    """They look their module up by its name, which was in no table of modules."""
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Rule:\n    points: float = 0.5\n\n\n"
        "def score(messages, text, word):\n    return Rule().points\n"
    )
    assert reward_of(tmp_path, body)(PROMPT, "x", True) == (0.5, {})


def test_a_function_is_tried_with_an_answer_that_does_not_end(tmp_path):
    """Most answers of an untrained model are cut, so a fault there shows at the first step."""
    body = "def score(messages, text, ended, word):\n    return 1.0 if ended else nothing\n"
    with pytest.raises(ValueError, match="NameError.*nothing"):
        reward_of(tmp_path, body).check(PROMPT)
