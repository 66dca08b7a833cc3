"""The prompts of reinforcement learning: those to learn from, in order, and those held out.

A prompt is a function of (seed, number of the sample): each epoch has another order.
Numbers far beyond all samples' give the prompts that replace others (`refilled`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from runtime.data.chat import prompt_ids
from runtime.data.tokenizer import Tokenizer
from runtime.posttraining import tasks
from runtime.posttraining.conversations import ExampleFiles, Report, hold_out, opening_digest
from runtime.posttraining.forms import Example, Prompt

# Samples of a run are below it.
REFILL_STRIDE = 1 << 40


class Asked(NamedTuple):
    """A prompt and its ids, up to where the answer begins."""

    prompt: Prompt
    ids: list[int]


def refilled(sample: int, again: int) -> int:
    """Return the number of the prompt that takes a sample's turn, the first, second ... time."""
    return sample + again * REFILL_STRIDE


class Prompts:
    """A set of prompts. `asked` gives them in an order of their own for each epoch."""

    def __init__(self, count: int, lines: list[str], fingerprint: str):
        self.count, self.lines, self.fingerprint = count, lines, fingerprint
        self.held_out: list[Asked] = []
        self._order = functools.lru_cache(maxsize=4)(self._shuffle)

    def __len__(self) -> int:
        return self.count

    def at(self, index: int) -> Asked:
        """Return prompt `index` of the set."""
        raise NotImplementedError

    def of_files(self) -> list[Asked]:
        """Return the prompts that were read from files, those held out included."""
        return []

    def asked(self, seed: int, number: int) -> Asked:
        """Return the prompt of the sample with this number."""
        epoch, position = divmod(number, self.count)
        return self.at(int(self._order(seed, epoch)[position]))

    def _shuffle(self, seed: int, epoch: int) -> np.ndarray:
        philox = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
        return np.argsort(philox.random_raw(self.count), kind="stable")


class ToyPrompts(Prompts):
    """Embedded requests, made when they are asked for. longest: tokens that leave room."""

    def __init__(self, tokenizer: Tokenizer, longest: int, count: int):
        lines = [f"{count:,} embedded requests; a score has others"]
        super().__init__(count, lines, hashlib.sha256(f"toy {count}".encode()).hexdigest())
        self.tokenizer, self.longest = tokenizer, longest

    def at(self, index: int) -> Asked:
        """Return a request. Raise ValueError where the context is too short for it."""
        exercise = tasks.request("rl", index)
        messages = tasks.asked(exercise)
        ids = prompt_ids(messages, self.tokenizer)
        if len(ids) > self.longest:
            raise ValueError(
                f"an embedded request has {len(ids)} tokens, and the context leaves "
                f"{self.longest} before an answer: lower --max_new_tokens"
            )
        return Asked(Prompt(messages, {"items": exercise.items}), ids)


class FilePrompts(Prompts):
    """The prompts of files; some are held out, by their hash.

    longest: tokens that leave room for an answer. too_long: "drop" longer ones; "cut_prompt" drops
    their oldest turns; "refuse" raises ValueError. raw: the ids of a text, without a chat layout.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        tokenizer: Tokenizer,
        longest: int,
        too_long: str = "drop",
        raw: bool = False,
    ):
        self.tokenizer, self.longest, self.too_long, self.raw = tokenizer, longest, too_long, raw
        # Of all, so that a report of the files is whole.
        found = list(examples)
        self.report, what = Report("prompts", total=len(found)), "the examples"
        if isinstance(examples, ExampleFiles):
            self.report, what = examples.report, examples.what
        self.num_cut = 0
        fitting = [asked for asked in map(self._fitted, found) if asked is not None]
        self.report.check(what)
        digests = [opening_digest(asked.prompt) for asked in fitting]
        is_held, line = hold_out(np.array(digests, dtype=np.uint64))
        self.kept = [asked for asked, held in zip(fitting, is_held, strict=True) if not held]
        if self.num_cut:
            self.report.notes.append(f"{self.num_cut:,} were too long and lost their oldest turns")
        self.report.notes += [line] if line else []
        content = "\0".join(repr((asked.ids, asked.prompt.columns)) for asked in fitting)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        super().__init__(len(self.kept), self.report.lines(), digest)
        self.held_out = [asked for asked, held in zip(fitting, is_held, strict=True) if held]

    def at(self, index: int) -> Asked:
        return self.kept[index]

    def of_files(self) -> list[Asked]:
        return [*self.kept, *self.held_out]

    def _fitted(self, prompt: Example) -> Asked | None:
        """Return a prompt with its ids, cut where that was asked for; None, and count, if dropped.

        Raise ValueError for a long one that is refused, and for what is no prompt.
        """
        if not isinstance(prompt, Prompt):
            raise ValueError(f"{prompt.where} has an answer, and prompts for a reward have none")
        messages, is_cut = list(prompt.messages), False
        ids = self._ids(messages, prompt.where)
        while len(ids) > self.longest and self.too_long == "cut_prompt":
            turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if len(turns) < 2:
                break
            del messages[turns[0] : turns[1]]
            ids, is_cut = self._ids(messages, prompt.where), True
        if len(ids) > self.longest:
            if self.too_long == "refuse":
                raise ValueError(
                    f"{prompt.where} has {len(ids):,} tokens, and the context leaves "
                    f"{self.longest:,} before an answer: shorten it, or take --too_long drop or a "
                    "smaller --max_new_tokens"
                )
            self.report.drop(f"longer than {self.longest:,} tokens", prompt.where)
            return None
        self.num_cut += is_cut
        return Asked(prompt, ids)

    def _ids(self, messages: list[dict], where: str) -> list[int]:
        if not self.raw:
            try:
                return prompt_ids(messages, self.tokenizer)
            except ValueError as error:
                raise ValueError(f"{where}: {error}" if where else str(error)) from None
        if len(messages) != 1:
            raise ValueError(f"{where}: --raw continues one text, not several messages")
        start = self.tokenizer.start_id
        return ([] if start is None else [start]) + self.tokenizer.encode(messages[0]["content"])
