"""Generated stories without a judge: every figure next to the same one of human text.

A model continues the beginnings of held-out stories, and their authors did, too. Both are measured
alike: what repeats, what is copied from the training text, whether names stay, whether the story
ends. Neither a high nor a low value is good by itself: near the human one is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtime.base.shares import wilson
from runtime.data.tokenizer import Tokenizer
from runtime.evaluation import story_measures as measures
from runtime.evaluation.bootstrap import RESAMPLES, ratio_intervals
from runtime.evaluation.choices import answers, before_text, fitted
from runtime.evaluation.copied import RUN_WORDS, CopySearch
from runtime.evaluation.own_tasks import drawn_documents
from runtime.evaluation.report import Figure, Section, Table, figure, section
from runtime.evaluation.sentences import sentence_starts, words
from runtime.inference.decoder import Decoder, generate
from runtime.inference.scorer import Scorer

NUM_STORIES = 200
# Sentences of the held-out story that the model is given, and those that must be left.
PROMPT_SENTENCES, LEAST_LEFT = 2, 3
# A continuation has room for so many tokens, if the context has.
LEAST_ROOM = 32
# Stories that are generated at a time.
MOST_ROWS = 32
# Digits of the pattern of each story's draws.
SEED_BYTES = 8


@dataclass(frozen=True)
class Beginning:
    """The first sentences of a human story, and its rest."""

    prompt: str
    rest: str


@dataclass(frozen=True)
class Continuation:
    """What follows a beginning. ids: its tokens; ended: by its author, not by the limit."""

    text: str
    ids: tuple[int, ...]
    ended: bool


def beginnings(documents: Iterable[str], num_stories: int) -> tuple[list[Beginning], list[str]]:
    """Return the beginnings of at most so many stories, and the other documents that were read.

    Which ones depends on the set of documents alone. A story without enough sentences is left out.
    """
    found: list[Beginning] = []
    others: list[str] = []
    for _, text in drawn_documents(documents, 10 * num_stories):
        starts = sentence_starts(text)
        if len(found) < num_stories and len(starts) >= PROMPT_SENTENCES + LEAST_LEFT:
            prompt = text[: starts[PROMPT_SENTENCES]].rstrip()
            found.append(Beginning(prompt, text[len(prompt) :]))
        else:
            others.append(text)
    return found, others


# ------------------------------------------------------------------------------ continuations
@dataclass(frozen=True)
class Writer:
    """A model that continues stories. banned_ids: those that are never drawn."""

    decoder: Decoder
    tokenizer: Tokenizer
    banned_ids: Sequence[int]
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Return how many tokens a continuation may have."""
        return min(self.max_new_tokens, self.decoder.config.context_length - len(prompt_ids))

    def prompt_ids(self, beginning: Beginning) -> list[int]:
        return before_text(self.tokenizer) + self.tokenizer.encode(beginning.prompt)

    def human(self, beginning: Beginning) -> Continuation:
        """Return the rest of the human story, cut where the model's would be.

        It is encoded by itself, as the model continues a prompt that has ended: a token of both
        would be lost. An end takes a token, too.
        """
        ids = self.tokenizer.encode(beginning.rest)
        room = self.room(self.prompt_ids(beginning))
        cut = ids[:room]
        return Continuation(self.tokenizer.decode(cut), tuple(cut), len(ids) < room)

    def written(self, some: Sequence[Beginning]) -> Iterator[Continuation]:
        """Yield the model's continuation of each beginning.

        Each draws from a generator of its own, so it does not depend on the others.
        """
        for at in range(0, len(some), MOST_ROWS):
            yield from self._batch(some[at : at + MOST_ROWS])

    def _batch(self, some: Sequence[Beginning]) -> list[Continuation]:
        prompts = [self.prompt_ids(one) for one in some]
        most = max(map(self.room, prompts))
        longest = max(map(len, prompts)) + most
        texts = self.decoder.texts(len(some), min(longest, self.decoder.config.context_length))
        ids: list[list[int]] = [[] for _ in some]
        finished: set[int] = set()
        for step in generate(
            self.decoder,
            texts,
            prompts,
            most,
            temperature=self.temperature,
            top_k=0,
            stop_ids=self.tokenizer.all_stop_ids,
            banned_ids=self.banned_ids,
            generators=[self._generator(one) for one in some],
            slide=False,
            finished=finished,
        ):
            for row, token in step:
                ids[row].append(token)
                if len(ids[row]) >= self.room(prompts[row]):
                    finished.add(row)
        return [self._continuation(own) for own in ids]

    def _generator(self, beginning: Beginning) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {beginning.prompt}".encode()).digest()
        generator = torch.Generator(self.decoder.device)
        # manual_seed takes 63 bits.
        return generator.manual_seed(int.from_bytes(digest[:SEED_BYTES], "big") >> 1)

    def _continuation(self, ids: list[int]) -> Continuation:
        ended = bool(ids) and ids[-1] in self.tokenizer.all_stop_ids
        ids = ids[:-1] if ended else ids
        return Continuation(self.tokenizer.decode(ids), tuple(ids), ended)


# ------------------------------------------------------------------------------ measures
@dataclass(frozen=True)
class Measure:
    """A figure of texts: key, how a table says it, and [texts] numerators and denominators.

    is_share: each text counts as one trial at most.
    """

    key: str
    said: str
    ratios: list[measures.Ratio]
    is_share: bool = False
    unit: str = ""


def measured(
    some: Sequence[Beginning],
    own: Sequence[Continuation],
    same_words: Sequence[int],
    known: dict[str, bool],
) -> list[Measure]:
    """Return the measures of continuations. same_words: words of each that count for repetition.

    Repetition grows with the length, so both sides of a comparison have the same number of words.
    """
    all_words = [words(one.text) for one in own]
    cut = [text[:count] for text, count in zip(all_words, same_words, strict=True)]
    pairs = list(zip(some, own, strict=True))
    return [
        Measure("repeated_4grams", "repeated 4-grams", [measures.repeated(text) for text in cut]),
        *(
            Measure(
                f"distinct_{size}",
                f"distinct {size}-grams",
                [measures.distinct(text, size) for text in cut],
            )
            for size in (1, 2, 3)
        ),
        Measure("shared_4grams", "4-grams that another text has", measures.shared(cut)),
        Measure(
            "first_name_returns",
            "the first name returns",
            [measures.returns(one.prompt, rest.text) for one, rest in pairs],
            is_share=True,
        ),
        Measure(
            "new_names_return",
            "new names are used again",
            [measures.new_names(one.prompt, rest.text) for one, rest in pairs],
        ),
        Measure(
            "pronoun_fits",
            "the first name's pronoun fits",
            [measures.pronoun_fits(one.prompt, rest.text, known) for one, rest in pairs],
            is_share=True,
        ),
        Measure("ended", "ended by itself", [(one.ended, 1) for one in own], is_share=True),
        Measure(
            "closed",
            "ended after a sentence, quotes closed",
            [(measures.is_closed(one.prompt, rest.text), 1) for one, rest in pairs],
            is_share=True,
        ),
        Measure("words", "words", [(len(text), 1) for text in all_words], unit="words"),
    ]


def copied_measures(search: CopySearch, texts: slice) -> list[Measure]:
    """Return how much of some of a search's texts the training text has."""
    runs, copied = search.num_runs[texts].tolist(), search.num_copied[texts].tolist()
    longest = search.longest[texts].tolist()
    return [
        Measure(
            f"copied_{RUN_WORDS}grams",
            f"{RUN_WORDS}-grams of the training text",
            list(zip(copied, runs, strict=True)),
        ),
        Measure(
            "longest_copy",
            "longest run of the training text",
            [(length, 1) for length in longest],
            unit="words",
        ),
    ]


def bits_measure(
    scorer: Scorer, writer: Writer, some: Sequence[Beginning], own: Sequence[Continuation]
) -> Measure:
    """Return the bits per byte of continuations under the model."""
    requests, sizes = [], []
    for one, rest in zip(some, own, strict=True):
        if rest.ids:
            prompt = writer.prompt_ids(one)
            request, _ = fitted([*prompt, *rest.ids], len(prompt), scorer.context)
            requests.append(request)
            sizes.append(len(writer.tokenizer.decode_bytes(rest.ids)))
    bits = [-answer.log_prob / math.log(2) for answer in answers(scorer, requests)]
    return Measure(
        "bits_per_byte", "bits per byte", list(zip(bits, sizes, strict=True)), unit="bits per byte"
    )


def figure_of(measure: Measure, resamples: int = RESAMPLES) -> Figure:
    """Return a measure as a ratio of sums with its interval; n: what the ratio is of."""
    kept = [(top, bottom) for top, bottom in measure.ratios if bottom]
    if not kept:
        return figure(math.nan, 0, unit=measure.unit)
    total = int(sum(bottom for _, bottom in kept))
    if measure.is_share:
        right = sum(top for top, _ in kept)
        return figure(right / total, total, *wilson(right, total))
    top_D1, bottom_D1 = (
        np.array(side, dtype=np.float64)[:, None] for side in zip(*kept, strict=True)
    )
    (interval,) = ratio_intervals(top_D1, bottom_D1, resamples)
    n = len(kept) if measure.unit == "words" else total
    return figure(interval.value, n, interval.low, interval.high, measure.unit)


# ------------------------------------------------------------------------------ the report
def evaluate_stories(
    scorer: Scorer,
    writer: Writer,
    documents: Iterable[str],
    num_stories: int = NUM_STORIES,
    training: Iterable[str] | None = None,
    resamples: int = RESAMPLES,
) -> Section:
    """Return the section of generated stories. training: what copies are looked for in, read once.

    Raise ValueError if no document can be continued.
    """
    some, others = beginnings(documents, num_stories)
    some = [one for one in some if writer.room(writer.prompt_ids(one)) >= LEAST_ROOM]
    if not some:
        raise ValueError(
            "no held-out document can be continued: stories need some of at least "
            f"{PROMPT_SENTENCES + LEAST_LEFT} sentences, whose first {PROMPT_SENTENCES} leave "
            f"{LEAST_ROOM} tokens of the context"
        )
    sides = {"": list(writer.written(some)), "_human": [writer.human(one) for one in some]}
    pairs = zip(*sides.values(), strict=True)
    same_words = [min(len(words(one.text)) for one in pair) for pair in pairs]
    known = measures.known_pronouns(others)
    found = {side: measured(some, own, same_words, known) for side, own in sides.items()}
    if training is not None:
        search = CopySearch([one.text for own in sides.values() for one in own])
        search.read(training)
        for number, own in enumerate(found.values()):
            own += copied_measures(search, slice(number * len(some), (number + 1) * len(some)))
    for side, own in found.items():
        own.append(bits_measure(scorer, writer, some, sides[side]))
    return _section(found, len(some), writer, training is not None, resamples)


def _section(
    found: dict[str, list[Measure]],
    num_stories: int,
    writer: Writer,
    has_training: bool,
    resamples: int,
) -> Section:
    figures: dict[str, Figure] = {}
    rows: list[list] = []
    for mine, theirs in zip(*found.values(), strict=True):
        row: list = [mine.said]
        for side, measure in (("", mine), ("_human", theirs)):
            own = figures[measure.key + side] = figure_of(measure, resamples)
            row += [own["value"], own.get("low"), own.get("high"), own["n"]]
        rows.append(row)
    columns = [
        "measure",
        "model",
        "low",
        "high",
        "n",
        "human",
        "human low",
        "human high",
        "human n",
    ]
    notes = [
        f"{num_stories:,} beginnings of held-out stories, {PROMPT_SENTENCES} sentences each, at "
        f"temperature {writer.temperature:g}. A value is good where it is near the human one.",
        "Repetition is measured in as many words of both sides. A proper name's pronoun is known "
        "from the other held-out documents.",
    ]
    if has_training:
        notes.append(
            f"Copies are runs of at least {RUN_WORDS} words, in small letters and without "
            "punctuation. A shorter longest run counts as 0."
        )
    else:
        notes.append("No training text was given, so copies were not looked for.")
    return section("stories", figures, Table(columns=columns, rows=rows), notes=notes)
