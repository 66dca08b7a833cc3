"""Scores by generation: what counts as right, how sure a share is, and that they repeat."""

from __future__ import annotations

import pytest
import torch

from model import generate
from runtime.data.chat import with_chat
from runtime.data.tokenizers import load_tokenizer
from runtime.posttraining import score, tasks
from runtime.posttraining.score import (
    Answer,
    Exam,
    Score,
    Share,
    greedy_answers,
    pass_at_k,
    sampled_answers,
    story_losses,
)
from tests.builders import random_model, tiny_config

BYTE = with_chat(load_tokenizer("byte"))
NUM = 10


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=1024), 3)


@pytest.fixture
def exam() -> Exam:
    return Exam(BYTE, NUM, max_new_tokens=12)


# ------------------------------------------------------------------------------ shares
def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="pass@9 needs 9 samples"):
        pass_at_k(8, 1, 9)


def test_pass_at_k():
    """The chance that a draw of k of the samples has a right one, counted by hand."""
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert pass_at_k(8, 0, 8) == 0 and pass_at_k(8, 1, 8) == 1
    # Of 4 samples, 2 right, 6 pairs, one of which has none.
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 3, 2) == 1


# ------------------------------------------------------------------------------ a rigged model
def rig(monkeypatch, exam: Exam, say) -> None:
    """Let every model answer what `say(exercise)` returns, (text, ended)."""
    by_prompt = {
        tuple(prompt): exercise
        for sheet in (exam.questions, exam.requests)
        for prompt, exercise in zip(sheet.prompts, sheet.exercises, strict=True)
    }

    def stream(decoder, texts, prompts, max_new_tokens, **settings):
        assert settings["temperature"] == 0 and settings["stop_ids"] == (BYTE.chat.end,)
        for row, prompt in enumerate(prompts):
            text, ended = say(by_prompt[tuple(prompt)])
            for token in BYTE.encode(text) + [BYTE.chat.end] * ended:
                yield [(row, token)]

    def sampled(model, tokenizer, prompts, max_new_tokens, samples, seed, ranks):
        return [[Answer(*say(by_prompt[tuple(prompt)]), 1)] * samples for prompt in prompts]

    monkeypatch.setattr(score, "generate", stream)
    monkeypatch.setattr(score, "sampled_answers", sampled)


def test_a_model_that_is_right_has_full_marks(monkeypatch, exam, model):
    rig(monkeypatch, exam, lambda exercise: (exercise.answer, True))
    found = exam.score(model).numbers()
    shares = {name: value for name, value in found.items() if name not in ("length", "story loss")}
    assert shares == dict.fromkeys(shares, 1.0)
    assert {"questions", "requests", "reward", "ended", "questions: who else"} <= set(shares)
    lengths = [len(exercise.answer.encode()) + 1 for exercise in exam.requests.exercises]
    assert found["length"] == sum(lengths) / NUM


def test_no_end_is_no_success(monkeypatch, exam, model):
    """Text that names everything and never stops: the parts are there, and nothing is earned."""
    rig(monkeypatch, exam, lambda exercise: (exercise.answer, False))
    found = exam.score(model).numbers()
    assert found["questions"] == found["requests"] == found["reward"] == found["ended"] == 0
    assert found["questions pass@1"] == found["requests pass@1"] == found["sampled reward"] == 0
    assert found["requests: hero"] == 1


def test_marks_by_kind_and_part(monkeypatch, exam, model):
    """One kind of question is right, and stories lack the hero alone."""

    def say(exercise):
        if exercise.items:
            return exercise.answer.replace(exercise.items["hero"], "Nobody"), True
        return (exercise.answer if exercise.kind == "where" else "the moon"), True

    rig(monkeypatch, exam, say)
    found = exam.score(model)
    assert found.shares["questions"] == Share(2, NUM)
    assert found.shares["questions: where"] == Share(2, 2)
    assert found.shares["questions: who"] == Share(0, 2)
    assert found.shares["requests"] == Share(0, NUM)
    assert found.shares["requests: hero"] == Share(0, NUM)
    assert found.shares["requests: first thing"] == Share(NUM, NUM)
    rewards = [1 - 1 / len(exercise.items) for exercise in exam.requests.exercises]
    assert found.means["reward"] == pytest.approx(sum(rewards) / NUM)


def test_pass_at_k_counts_every_sample(monkeypatch, exam, model):
    """Of 4 samples one is right for half of the prompts: pass@1 is 1 / 8 and pass@4 one half."""

    def sampled(model, tokenizer, prompts, max_new_tokens, samples, seed, ranks):
        sheet = exam.questions if prompts is exam.questions.prompts else exam.requests
        wrong = [Answer("", True, 1)] * samples
        return [
            [Answer(exercise.answer, True, 9), *wrong[1:]] if i % 2 else wrong
            for i, exercise in enumerate(sheet.exercises)
        ]

    rig(monkeypatch, exam, lambda exercise: ("", True))
    monkeypatch.setattr(score, "sampled_answers", sampled)
    found = exam.score(model, samples=4)
    for name in ("questions", "requests"):
        assert found.shares[f"{name} pass@1"] == Share(NUM / 8, NUM)
        assert found.shares[f"{name} pass@4"] == Share(NUM / 2, NUM)
    assert found.means["sampled reward"] == pytest.approx(1 / 8)


# ------------------------------------------------------------------------------ a plain model
def test_greedy_answers_are_the_models_own(monkeypatch, model):
    """Those of model.generate, prompt by prompt, however many pass at a time."""
    prompts = [[7, 8, 9], [70] * 30, [1], [200, 3]]
    stops = torch.tensor(BYTE.stop_ids)
    expected = []
    for prompt in prompts:
        ids = generate(
            model,
            torch.tensor([prompt]),
            20,
            temperature=0.0,
            top_k=0,
            stop_ids=stops,
            banned_ids=torch.tensor(BYTE.banned_ids),
        )
        expected.append([int(i) for i in ids])
    for rows in (1, 3, 64):
        monkeypatch.setattr(score, "MOST_ROWS", rows)
        found = greedy_answers(model, BYTE, prompts, 20)
        assert [answer.num_tokens for answer in found] == [len(ids) for ids in expected]
        for answer, ids in zip(found, expected, strict=True):
            assert answer.ended == (ids[-1] == BYTE.chat.end)
            assert answer.text == BYTE.decode(ids[:-1] if answer.ended else ids)


def test_an_end_is_told_from_a_cut():
    """A model that always ends at once, and one that never does."""
    for logit, ended in ((50.0, True), (-50.0, False)):
        model = random_model(tiny_config(vocabulary_size=BYTE.vocabulary_size, head_bias=True))
        with torch.no_grad():
            model.out_head.bias[BYTE.chat.end] = logit
        (answer,) = greedy_answers(model, BYTE, [[5, 6]], 9)
        assert answer.ended == ended
        assert answer.num_tokens == (1 if ended else 9)
        assert "<|end|>" not in answer.text


def test_answers_leave_the_model_in_its_mode(model):
    """A run would otherwise go on without dropout after its first validation."""
    for training in (True, False):
        model.train(training)
        greedy_answers(model, BYTE, [[5, 6]], 2)
        assert model.training == training
        sampled_answers(model, BYTE, [[5, 6]], 2, samples=2)
        assert model.training == training
        story_losses(model, BYTE, 1)
        assert model.training == training


def test_a_score_repeats(exam, model):
    """It is a function of weights and seed."""
    first = exam.score(model, samples=2, seed=5)
    assert exam.score(model, samples=2, seed=5) == first
    prompts = [[3, 4], [5]]
    drawn = [sampled_answers(model, BYTE, prompts, 12, 4, seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({answer.text for answer in drawn[0][0]}) > 1


def test_other_weights_have_another_score(exam, model):
    """A cache of the earlier weights would give the earlier answers."""
    changed = random_model(model.config, seed=4)
    assert exam.score(changed).numbers() != exam.score(model).numbers()


def test_the_parts_of_each_mean_are_those_of_prompts_and_stories(exam, model):
    """A mean had no interval, because only its value was kept."""
    found = exam.score(model, samples=3)
    assert found.parts.keys() == found.means.keys()
    assert set(found.means) == {"reward", "length", "sampled reward", "story loss"}
    for name, parts in found.parts.items():
        assert len(parts) == (score.NUM_STORIES if name == "story loss" else NUM)
        totals, counts = zip(*parts, strict=True)
        assert found.means[name] == pytest.approx(sum(totals) / sum(counts))
        assert sum(counts) == NUM * (3 if name == "sampled reward" else 1) or name == "story loss"


def test_story_loss_is_the_mean_over_tokens(model):
    total, count = 0.0, 0
    for number in range(3):
        text = tasks.held_out_story(number)
        ids = [BYTE.end_of_text_id, *BYTE.encode(text), BYTE.end_of_text_id][:1025]
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
        total -= logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()
        count += len(ids) - 1
    # Sums of `count` float32 numbers of about 5.
    own = Score()
    own.average("story loss", story_losses(model, BYTE, 3))
    assert own.means["story loss"] == pytest.approx(total / count, rel=1e-6)


def test_held_out_stories_are_no_exercises():
    last = tasks._numbers("test", tasks.SPLIT_STORIES // tasks.STORIES_PER_EXERCISE - 1)
    assert last.stop <= tasks.FIRST_HELD_OUT_STORY
    assert max(tasks.FIRST_STORY.values()) + tasks.SPLIT_STORIES <= tasks.FIRST_HELD_OUT_STORY


def test_wrong_settings_are_refused(model):
    with pytest.raises(ValueError, match="at least 1 prompt, not 0"):
        Exam(BYTE, 0)
    with pytest.raises(ValueError, match="a prompt has 1024 tokens and the context 1024"):
        greedy_answers(model, BYTE, [[1], [1] * 1024], 5)
