"""Multiple choice without generation: which answer has the higher probability.

Each answer is scored after its context, and the likeliest one is the model's. What "likeliest"
means is a choice of its own, so each task has a column for each: the sum of log-probabilities
favours short answers, so it is also divided by the answer's bytes or tokens, or compared with the
same answer without the context (PMI). Gu et al. 2024, "OLMES", arXiv 2406.08446, say which suits
which task.

An accuracy without its chance level says nothing: the centred one is 0 at chance and 1 if all
answers are right. Shares have Wilson's interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from runtime.base.shares import wilson
from runtime.data.tokenizer import Tokenizer
from runtime.evaluation.choice_formats import CHOICES, GREEDY, Question, Task
from runtime.evaluation.report import Figure, Section, Table, figure, section
from runtime.inference.scorer import Scorer

# Columns of a task, as they are keys and as a table heads them.
COLUMNS = {
    "sum": "sum",
    "per_byte": "per byte",
    "per_token": "per token",
    "pmi": "PMI",
    "greedy": "greedy",
}


class DoesNotFit(ValueError):
    """An answer is longer than the model's context."""


# ------------------------------------------------------------------------------ requests
class Request(NamedTuple):
    """Ids to read, and the first of those whose log-probability counts."""

    ids: tuple[int, ...]
    first: int


class Answer(NamedTuple):
    """The sum of log-probabilities (nats, float64), its tokens, and whether each was the argmax."""

    log_prob: float
    num_tokens: int
    is_greedy: bool


def before_text(tokenizer: Tokenizer) -> list[int]:
    """Return the id that is before the first one of a text, as in training; [] if there is none."""
    start = tokenizer.start_id if tokenizer.start_id is not None else tokenizer.end_of_text_id
    return [] if start is None else [start]


def request(
    tokenizer: Tokenizer, context: str, continuation: str, context_length: int
) -> tuple[Request, bool]:
    """Return the ids of a continuation after its context, and whether its start was cut off.

    Both are encoded together, after the start token, and parted where the context alone ends;
    blanks at the context's end belong to the continuation (as lm-evaluation-harness has it). Of a
    text longer than the model's context the end is read. Raise DoesNotFit if the continuation
    alone is longer, ValueError if nothing comes before it.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    start = before_text(tokenizer)
    if not (bare or start):
        raise ValueError(
            "an answer without a context needs a token before a text, and this tokenizer has "
            "neither a start token nor end-of-text"
        )
    before = start + tokenizer.encode(bare) if bare else start
    ids = start + tokenizer.encode(bare + continuation)
    # Merged across the border, the whole may be no longer than the context.
    first = min(max(len(before), 1), len(ids) - 1)
    return fitted(ids, first, context_length)


def fitted(ids: Sequence[int], first: int, context_length: int) -> tuple[Request, bool]:
    """Return a request whose last id needs at most context_length ids before it, whether it is cut.

    Raise DoesNotFit if what counts is longer.
    """
    cut = max(0, len(ids) - (context_length + 1))
    if cut and first - cut < 1:
        raise DoesNotFit(
            f"an answer has {len(ids) - first:,} tokens, and the model's context {context_length:,}"
        )
    return Request(tuple(ids[cut:]), first - cut), cut > 0


def answers(scorer: Scorer, requests: Sequence[Request]) -> list[Answer]:
    """Return the answer to each request; of equal ids the model is asked once."""
    first_of: dict[tuple[int, ...], int] = {}
    for one in requests:
        first_of[one.ids] = min(one.first, first_of.get(one.ids, one.first))
    wanted: dict[tuple[int, ...], set[int]] = {ids: set() for ids in first_of}
    for one in requests:
        wanted[one.ids].add(one.first)
    found: dict[Request, Answer] = {}
    scored = scorer.scores(map(list, first_of), first_of.values())
    for (ids, least), scores in zip(first_of.items(), scored, strict=True):
        for first in wanted[ids]:
            own = slice(first - least, None)
            log_probs = scores.log_probs_T[own]
            is_greedy = bool(scores.is_greedy_T[own].all())
            found[Request(ids, first)] = Answer(float(log_probs.sum()), len(log_probs), is_greedy)
    return [found[one] for one in requests]


# ------------------------------------------------------------------------------ questions
@dataclass
class Result:
    """What a model made of a task.

    credits: column -> [its questions], 1 for a right answer, 1/m if m likeliest ones share the
    place and one of them is right. chances: column -> [its questions], the share that guessing
    gets; a column that nobody can guess has none. numbers: column -> [its questions], which of the
    task's they are, ascending: another model may leave out others.
    """

    task: str
    form: str
    credits: dict[str, np.ndarray]
    chances: dict[str, np.ndarray]
    # Questions whose start was cut off, those where the right answer shares its place, and those
    # that were left out, because an answer does not fit.
    num_cut: int = 0
    num_tied: int = 0
    num_left_out: int = 0
    numbers: dict[str, np.ndarray] = field(default_factory=dict)


def credit(scores: Sequence[float], right: int) -> float:
    """Return what a choice by the largest score earns: 1/m if m largest ones hold the right one."""
    best = max(scores)
    likeliest = [number for number, score in enumerate(scores) if score == best]
    return (right in likeliest) / len(likeliest)


def check_task(tokenizer: Tokenizer, task: Task, context_length: int, leave_out: bool) -> None:
    """Raise ValueError for a task that `score_task` would refuse. Nothing is scored."""
    _asked(tokenizer, task, context_length, leave_out)


def score_task(scorer: Scorer, tokenizer: Tokenizer, task: Task, leave_out: bool = False) -> Result:
    """Return what a model makes of a task.

    leave_out: leave out questions with an answer that does not fit, and count them, as where
    another model can hold them. Of a task that is made of text they are always left out: nobody
    can mend them. Raise ValueError for such an answer elsewhere.
    """
    kept, requests, num_cut = _asked(tokenizer, task, scorer.context, leave_out)
    given = iter(answers(scorer, requests))
    credits: dict[str, list[float]] = {}
    chances: dict[str, list[float]] = {}
    numbers: dict[str, list[int]] = {}
    num_tied = 0
    has_start = bool(before_text(tokenizer))
    for number, question in kept:
        earned = _credits(question, given, has_start)
        num_tied += any(0 < one < 1 for one in earned.values())
        for name, one in earned.items():
            credits.setdefault(name, []).append(one)
            numbers.setdefault(name, []).append(number)
            if question.kind != GREEDY:
                chances.setdefault(name, []).append(1 / len(question.pairs))
    return Result(
        task.name,
        task.form,
        {name: np.array(own) for name, own in credits.items()},
        {name: np.array(own) for name, own in chances.items()},
        num_cut,
        num_tied,
        len(task.questions) - len(kept),
        {name: np.array(own) for name, own in numbers.items()},
    )


def _asked(
    tokenizer: Tokenizer, task: Task, context_length: int, leave_out: bool
) -> tuple[list[tuple[int, Question]], list[Request], int]:
    """Return the questions that are asked with their numbers, their requests, and how many are cut.

    Raise ValueError as `score_task` does.
    """
    kept: list[tuple[int, Question]] = []
    requests: list[Request] = []
    num_cut = 0
    for number, question in enumerate(task.questions):
        try:
            own, is_cut = _requests(tokenizer, question, context_length)
        except DoesNotFit:
            if not (task.is_made or leave_out):
                raise
            continue
        kept.append((number, question))
        requests += own
        num_cut += is_cut
    return kept, requests, num_cut


def _credits(question: Question, given: Iterator[Answer], has_start: bool) -> dict[str, float]:
    """Return column -> what the answers of a question earn."""
    columns = _columns(question, given, has_start)
    if question.kind == GREEDY:
        return {name: scores[0] for name, scores in columns.items()}
    return {name: credit(scores, question.right) for name, scores in columns.items()}


def _requests(
    tokenizer: Tokenizer, question: Question, context_length: int
) -> tuple[list[Request], bool]:
    """Return the requests of a question, and whether one was cut.

    Those of its answers come first; then, where PMI is a column, the same without the context.
    """
    made, is_cut = [], False
    texts = [(context, question.delimiter + own) for context, own in question.pairs]
    if _has_pmi(question, bool(before_text(tokenizer))):
        texts += [("", own) for _, own in texts]
    for context, continuation in texts:
        try:
            one, cut = request(tokenizer, context, continuation, context_length)
        except ValueError as error:
            raise type(error)(f"{question.where}: {error}") from None
        made.append(one)
        is_cut |= cut
    return made, is_cut


def _has_pmi(question: Question, has_start: bool) -> bool:
    # One continuation of several contexts has the same probability without each of them. Without
    # a start token nothing predicts the first token of a bare answer.
    return has_start and question.kind == CHOICES and bool(question.contexts[0].strip())


def _columns(
    question: Question, given: Iterator[Answer], has_start: bool
) -> dict[str, list[float]]:
    """Return column -> the score of each answer, of a question's answers in their order."""
    pairs = question.pairs
    own = [next(given) for _ in pairs]
    if question.kind == GREEDY:
        return {"greedy": [float(own[0].is_greedy)]}
    sums = [answer.log_prob for answer in own]
    # The same continuation has the same bytes, and its tokens differ at the border alone.
    if question.kind != CHOICES:
        return {"sum": sums}
    columns = {
        "sum": sums,
        "per_byte": [
            answer.log_prob / len(text.encode())
            for answer, (_, text) in zip(own, pairs, strict=True)
        ],
        "per_token": [answer.log_prob / answer.num_tokens for answer in own],
    }
    if _has_pmi(question, has_start):
        alone = [next(given).log_prob for _ in pairs]
        columns["pmi"] = [with_it - bare for with_it, bare in zip(sums, alone, strict=True)]
    return columns


# ------------------------------------------------------------------------------ the report
def choices_section(results: Iterable[Result], name: str = "tasks") -> Section:
    """Return accuracies by task and column, each with Wilson's interval, chance and n."""
    figures: dict[str, Figure] = {}
    rows: list[list] = []
    notes: list[str] = []
    for result in results:
        for column, credits in result.credits.items():
            n, right = len(credits), math.fsum(credits)
            low, high = wilson(right, n)
            figures[f"{result.task}_{column}"] = figure(right / n, n, low, high)
            row = [result.task, result.form, COLUMNS[column], n, right / n, low, high]
            if column not in result.chances:
                rows.append([*row, None, None])
                continue
            chance = math.fsum(result.chances[column]) / n
            centered, least, most = (
                (share - chance) / (1 - chance) for share in (right / n, low, high)
            )
            figures[f"{result.task}_{column}_centered"] = figure(centered, n, least, most)
            rows.append([*row, chance, centered])
        notes += _notes(result)
    columns = ["task", "form", "chosen by", "n", "accuracy", "low", "high", "chance", "centered"]
    return section(name, figures, Table(columns=columns, rows=rows), notes=notes)


def _notes(result: Result) -> list[str]:
    notes = []
    if result.num_cut:
        notes.append(
            f"{result.task}: {result.num_cut:,} questions are longer than the context, so their "
            "start is cut off"
        )
    if result.num_tied:
        notes.append(
            f"{result.task}: {result.num_tied:,} questions have likeliest answers of equal score, "
            "the right one among them, which counts as its part"
        )
    if result.num_left_out:
        notes.append(
            f"{result.task}: {result.num_left_out:,} questions are left out, because an answer is "
            "longer than the model's context"
        )
    return notes
