"""Scores by generation: a model answers held-out exercises, and the answers are checked.

A loss says how likely the right answer was, not whether the model gives it. Shares come with an
interval, because 256 prompts decide nothing finer than about 6 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from model import LLM
from runtime.base.ranks import ONE_PROCESS, START_SECONDS, Ranks
from runtime.data.chat import prompt_ids
from runtime.data.tokenizer import Tokenizer
from runtime.inference.decoder import Decoder, generate
from runtime.posttraining import tasks
from runtime.posttraining.rollouts import Sampler
from runtime.posttraining.tasks import Exercise

# Held-out exercises of each form.
NUM_PROMPTS = 256
# Answers to each prompt at temperature 1: tuning moves what a model draws more than what it says
# first.
SCORE_SAMPLES = 1
# Held-out stories, for the loss on the base's own text.
NUM_STORIES = 64
# Answers that are generated at a time: on a CPU more are hardly faster.
MOST_ROWS = 64
# An answer is cut at so many times the longest right one, and at so many tokens.
MOST_TIMES_LONGER = 2
MOST_NEW_TOKENS = 256

T = TypeVar("T")


# ------------------------------------------------------------------------------ shares
def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that one of k samples is right, from `right` of `samples` >= k.

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} needs {k} samples, not {right} right of {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Share:
    """Successes in trials. Those of pass@k are a sum of chances, one for each prompt."""

    successes: float
    trials: int

    @property
    def value(self) -> float:
        return self.successes / self.trials


@dataclass
class Score:
    """What a model achieved: shares, which have an interval, and means, by name.

    parts: of a mean, what each prompt or story adds to the sum and to its count, so that they can
    be drawn again; not every mean has them.
    """

    shares: dict[str, Share] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    parts: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Return the values by name, for a log record."""
        return {name: share.value for name, share in self.shares.items()} | self.means

    def count(self, name: str, successes: Sequence[float]) -> None:
        """Add a share: each entry is one trial, from 0.0 to 1.0."""
        if successes:
            self.shares[name] = Share(float(sum(successes)), len(successes))

    def average(self, name: str, parts: Sequence[tuple[float, int]]) -> None:
        """Add a mean: (sum, count) of each prompt or story."""
        self.parts[name] = [*parts]
        self.means[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)


# ------------------------------------------------------------------------------ answers
@dataclass(frozen=True)
class Answer:
    """What a model answered. ended: by a stop id, which `num_tokens` counts and `text` lacks."""

    text: str
    ended: bool
    num_tokens: int


def shared_out(ranks: Ranks, parts: Sequence, do: Callable[..., Sequence[T]]) -> list[T]:
    """Return what `do` returns for each part, one after the other; the ranks share the parts out.

    do: something that takes no part in what the ranks do together.
    """
    shared = ranks.share(parts)
    # Some are done much earlier: their answers are short, or they have none.
    before = ranks.wait_at_most(START_SECONDS)
    own = ranks.together(lambda: [do(part) if counts else [] for part, counts in shared])
    ranks.wait_at_most(before)
    return [value for values in ranks.in_order(own) for value in values]


@torch.no_grad()
def greedy_answers(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ranks: Ranks = ONE_PROCESS,
) -> list[Answer]:
    """Return the most likely answer, token by token, to each prompt (ids).

    It ends with a stop id, after max_new_tokens, or at a full context. Leaves the model in the mode
    (train, eval) it was in. ranks: that share the prompts out, each with the whole model.
    ValueError for a prompt that leaves no room.
    """
    longest, context = max(map(len, prompts)), model.config.context_length
    if longest >= context:
        raise ValueError(
            f"a prompt has {longest} tokens and the context {context}, so there is no room for an "
            "answer: score a model with a longer context_length"
        )
    was_training = model.training
    try:
        decoder = Decoder(model)

        def answered(first: int) -> list[Answer]:
            some = prompts[first : first + MOST_ROWS]
            ids: list[list[int]] = [[] for _ in some]
            texts = decoder.texts(len(some), min(context, longest + max_new_tokens))
            for drawn in generate(
                decoder,
                texts,
                some,
                max_new_tokens,
                temperature=0.0,
                stop_ids=tokenizer.stop_ids,
                banned_ids=tokenizer.banned_ids,
                slide=False,
            ):
                for row, token in drawn:
                    ids[row].append(token)
            return [_answer(tokenizer, own) for own in ids]

        return shared_out(ranks, range(0, len(prompts), MOST_ROWS), answered)
    finally:
        model.train(was_training)


def sampled_answers(
    model: LLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samples: int,
    seed: int = 0,
    ranks: Ranks = ONE_PROCESS,
) -> list[list[Answer]]:
    """Return `samples` answers to each prompt (ids), drawn at temperature 1 as GRPO draws them.

    ranks: that share the prompts out, each with the whole model.
    """
    sampler = Sampler(
        model,
        stop_ids=tokenizer.stop_ids,
        banned_ids=tokenizer.banned_ids,
        max_new_tokens=max_new_tokens,
    )
    at_once = -(-len(prompts) // ranks.world)

    def answered(first: int) -> list[list[Answer]]:
        some = prompts[first : first + at_once]
        numbers = range(first, first + len(some))
        groups = sampler.sample(some, samples, seed, numbers)
        return [[_answer(tokenizer, answer.ids) for answer in group] for group in groups]

    return shared_out(ranks, range(0, len(prompts), at_once), answered)


def _answer(tokenizer: Tokenizer, ids: list[int]) -> Answer:
    ended = bool(ids) and ids[-1] in tokenizer.stop_ids
    return Answer(tokenizer.decode(ids[:-1] if ended else ids), ended, len(ids))


# ------------------------------------------------------------------------------ the exam
class Exam:
    """Held-out questions and requests for one tokenizer, which must have a chat layout.

    num_prompts: of each form. max_new_tokens: of an answer, at most. The exercises are of the split
    "test", in order from number `first` on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_prompts: int = NUM_PROMPTS,
        max_new_tokens: int = MOST_NEW_TOKENS,
        first: int = 0,
    ):
        if num_prompts < 1:
            raise ValueError(f"a score needs at least 1 prompt, not {num_prompts}")
        self.tokenizer = tokenizer
        numbers = range(first, first + num_prompts)
        self.questions, self.requests = (
            Sheet(tokenizer, [make("test", number) for number in numbers], max_new_tokens)
            for make in (tasks.question, tasks.request)
        )

    def score(
        self,
        model: LLM,
        samples: int = SCORE_SAMPLES,
        seed: int = 0,
        ranks: Ranks = ONE_PROCESS,
    ) -> Score:
        """Return the score of a plain model, greedy and sampled.

        samples: answers to each prompt at temperature 1, for pass@1 and pass@samples; 0 = none.
        ranks: that share the prompts out, each with the whole model.
        """
        score = Score()
        for name, sheet in (("questions", self.questions), ("requests", self.requests)):
            given = sheet.greedy(model, ranks)
            score.count(name, [float(right) for right in sheet.marks(given)])
            if sheet is self.questions:
                _count_kinds(score, sheet, given)
            else:
                _count_parts(score, sheet, given)
            if samples:
                _count_samples(score, name, sheet, model, samples, seed, ranks)
        score.average("story loss", story_losses(model, self.tokenizer, ranks=ranks))
        return score


class Sheet:
    """Exercises of one form, and their prompts' ids.

    An answer is cut at max_new_tokens, or MOST_TIMES_LONGER than the longest right one.
    """

    def __init__(self, tokenizer: Tokenizer, exercises: list[Exercise], max_new_tokens: int):
        self.tokenizer, self.exercises = tokenizer, exercises
        self.prompts = [prompt_ids(tasks.asked(exercise), tokenizer) for exercise in exercises]
        longest = max(len(tokenizer.encode(exercise.answer)) for exercise in exercises)
        self.max_new_tokens = min(max_new_tokens, MOST_TIMES_LONGER * longest + 1)

    def greedy(self, model: LLM, ranks: Ranks = ONE_PROCESS) -> list[Answer]:
        """Return the model's greedy answer to each exercise; the ranks share them out."""
        return greedy_answers(model, self.tokenizer, self.prompts, self.max_new_tokens, ranks)

    def marks(self, given: Sequence[Answer]) -> list[bool]:
        """Return which answers, one to each exercise, are right."""
        return [
            tasks.is_right(exercise, answer.text, answer.ended)
            for exercise, answer in zip(self.exercises, given, strict=True)
        ]


def _count_kinds(score: Score, sheet: Sheet, given: list[Answer]) -> None:
    """Add the share of right answers to each kind of question."""
    marks = sheet.marks(given)
    for kind in tasks.QUESTIONS:
        pairs = zip(sheet.exercises, marks, strict=True)
        score.count(f"questions: {kind}", [float(mark) for own, mark in pairs if own.kind == kind])


def _count_parts(score: Score, sheet: Sheet, given: list[Answer]) -> None:
    """Add the mean reward, the share of requests whose part is there, of ended ones, the length."""
    rewards, by_part = [], {part: list[float]() for part in tasks.PARTS}
    for exercise, answer in zip(sheet.exercises, given, strict=True):
        rewards.append(tasks.reward(exercise.items, answer.text, answer.ended))
        for part, kept in tasks.parts(exercise.items, answer.text).items():
            by_part[part].append(kept)
    for part, all_kept in by_part.items():
        score.count(f"requests: {part}", all_kept)
    score.count("ended", [float(answer.ended) for answer in given])
    score.average("reward", [(reward, 1) for reward in rewards])
    score.average("length", [(answer.num_tokens, 1) for answer in given])


def _count_samples(
    score: Score, name: str, sheet: Sheet, model: LLM, samples: int, seed: int, ranks: Ranks
) -> None:
    """Add pass@1 and pass@samples at temperature 1, and the mean reward of requests there.

    The interval of pass@1 is that of one sample for each prompt: too wide, never too narrow.
    """
    groups = sampled_answers(
        model, sheet.tokenizer, sheet.prompts, sheet.max_new_tokens, samples, seed, ranks
    )
    right = [
        sum(tasks.is_right(exercise, answer.text, answer.ended) for answer in group)
        for exercise, group in zip(sheet.exercises, groups, strict=True)
    ]
    if sheet.exercises[0].items:
        rewards = [
            sum(tasks.reward(exercise.items, answer.text, answer.ended) for answer in group)
            for exercise, group in zip(sheet.exercises, groups, strict=True)
        ]
        score.average("sampled reward", [(total, samples) for total in rewards])
    for k in dict.fromkeys((1, samples)):
        score.count(f"{name} pass@{k}", [pass_at_k(samples, count, k) for count in right])


@torch.no_grad()
def story_losses(
    model: LLM,
    tokenizer: Tokenizer,
    num_stories: int = NUM_STORIES,
    ranks: Ranks = ONE_PROCESS,
) -> list[tuple[float, int]]:
    """Return the sum of cross-entropies (nats) of each held-out story, and its tokens.

    They are text as pre-training has it, so a rise is what tuning cost. A story is cut at the
    context's end. Leaves the model in the mode it was in. ranks: that share the stories out.
    """
    mode, device = model.training, model.embed.weight.device

    def loss(number: int) -> list[tuple[float, int]]:
        ids_1T = _story_ids(tokenizer, number, model.config.context_length).to(device)
        out = model(ids_1T[:, :-1], ids_1T[:, 1:])
        return [(float(out.cross_entropy_sum), ids_1T.shape[1] - 1)]

    model.eval()
    try:
        return shared_out(ranks, range(num_stories), loss)
    finally:
        model.train(mode)


def _story_ids(tokenizer: Tokenizer, number: int, context: int) -> Tensor:
    """Return a held-out story as pre-training has it: an end of text before and after, [1, T]."""
    ends = tokenizer.between_documents
    ids = [*ends, *tokenizer.encode(tasks.held_out_story(number)), *ends]
    return torch.tensor([ids[: context + 1]])
