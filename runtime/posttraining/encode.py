"""Examples -> ids: rendered with the chat layout, checked for length, in a few flat arrays.

A million short conversations are some hundred megabytes: the ids of all of them are one array, and
their borders another. A *sequence* is the ids of one conversation, or of one side of a pair.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from runtime.data.chat import Rendered, render
from runtime.data.tokenizer import Tokenizer
from runtime.posttraining.conversations import (
    Examples,
    Report,
    hold_out,
    opening_digest,
)
from runtime.posttraining.forms import NO_TARGET, Conversation, Dropped, Example, Pair
from runtime.posttraining.messages import Message

# What becomes of an example that is longer than a row.
TOO_LONG = ("drop", "cut_prompt", "refuse")
CONVERSATIONS, PAIRS = "conversations", "pairs"


@dataclass
class Encoded:
    """Sequences of ids and which of them are targets; a view of some examples of a larger set.

    ids: uint16 or uint32 [tokens of all sequences]; is_target: uint8 [the same]; offsets: int64
    [sequences + 1], where each begins. Example i is sequence i; pair i is sequences 2i (chosen) and
    2i + 1 (rejected). numbers: int64 [N], the examples of this view, ascending. digests: uint64, of
    all examples.
    """

    kind: str
    ids: np.ndarray
    is_target: np.ndarray
    offsets: np.ndarray
    digests: np.ndarray
    numbers: np.ndarray
    report: Report = field(default_factory=Report)
    # How the examples fill rows, by (tokens of a row, whether they share one): see packing.rows_of.
    rows: dict = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def sides(self) -> int:
        """Sequences of an example: 1, or 2 for pairs."""
        return 2 if self.kind == PAIRS else 1

    @property
    def inputs(self) -> np.ndarray:
        """Inputs of each sequence of this view, int64 [N, sides]; the last id is only a target."""
        return (np.diff(self.offsets) - 1).reshape(-1, self.sides)[self.numbers]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens that each example of this view takes of a row, int64 [N]; a pair's longer side."""
        return self.inputs.max(axis=1)

    @property
    def num_targets(self) -> np.ndarray:
        """Targets of each example of this view, int64 [N]; of a pair, of the side with fewer."""
        starts = self.offsets[:-1]
        # Nothing predicts the first id.
        counts = np.add.reduceat(self.is_target, starts, dtype=np.int64) - self.is_target[starts]
        return counts.reshape(-1, self.sides)[self.numbers].min(axis=1)

    def sequence(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a sequence and which are targets, views."""
        span = slice(self.offsets[number], self.offsets[number + 1])
        return self.ids[span], self.is_target[span]

    def of(self, numbers: np.ndarray) -> Encoded:
        """Return a view of the examples with these numbers."""
        return Encoded(
            self.kind, self.ids, self.is_target, self.offsets, self.digests, numbers, self.report
        )

    def split(self, ratio: float) -> tuple[Encoded, Encoded, str]:
        """Return the examples for training and for validation, and a line; see hold_out."""
        is_held, line = hold_out(self.digests[self.numbers], ratio)
        return self.of(self.numbers[~is_held]), self.of(self.numbers[is_held]), line


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    tokens_per_row: int,
    train_on: str = "all",
    too_long: str = "drop",
    raw: bool = False,
) -> Encoded:
    """Return the ids of conversations or of pairs, in one pass.

    tokenizer: with chat ids, unless `raw`. tokens_per_row: the most inputs of a sequence. too_long:
    what becomes of a longer example: "drop" it; "cut_prompt" drops its oldest turns, never a part
    of the last answer; "refuse" raises ValueError. Examples without a target are dropped. Raise
    ValueError if none is left, for prompts, which hold no answers, and for `raw` with "cut_prompt".
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"--too_long must be one of {', '.join(TOO_LONG)}, not {too_long!r}")
    if raw and too_long == "cut_prompt":
        raise ValueError("--too_long cut_prompt drops turns, and --raw has none: take drop")
    encoder = _Encoder(tokenizer, tokens_per_row, train_on, too_long, raw)
    counted = Report()
    for example in examples:
        counted.total += 1
        try:
            encoder.add(example)
        except Dropped as reason:
            counted.drop(str(reason), example.where or f"number {counted.total}")
    # A pass over rows counts them itself, those that were dropped while reading included.
    if isinstance(examples, Examples):
        report, what = examples.report, examples.what
    else:
        report, what = Report(total=counted.total), "the examples"
    report.kind = encoder.kind or report.kind or CONVERSATIONS
    report.dropped.update(counted.dropped)
    report.first = counted.first | report.first
    if encoder.num_cut:
        report.notes.append(f"{encoder.num_cut:,} were too long and lost their oldest turns")
    report.check(what)
    return encoder.finish(report)


class _Encoder:
    """Collects the sequences of one pass."""

    def __init__(
        self, tokenizer: Tokenizer, tokens_per_row: int, train_on: str, too_long: str, raw: bool
    ):
        self.tokenizer, self.tokens_per_row = tokenizer, tokens_per_row
        self.train_on, self.too_long, self.raw = train_on, too_long, raw
        self.kind, self.num_cut = "", 0
        small = tokenizer.vocabulary_size <= 1 << 16
        # They grow in steps of an eighth; a list of Python's numbers would take nine times as much.
        self.ids, self.is_target = array("H" if small else "I"), array("B")
        self.lengths, self.digests = array("I"), array("Q")

    def add(self, example: Example) -> None:
        """Append an example's sequences. Raise Dropped with the reason if it has none."""
        kind = {Conversation: CONVERSATIONS, Pair: PAIRS}.get(type(example))
        if kind is None or self.kind not in ("", kind):
            raise ValueError(
                f"{example.where or 'an example'} is a {type(example).__name__}: give "
                "conversations, or give pairs"
            )
        self.kind = kind
        sequences, was_cut = self._fitting(example)
        for ids, is_target in sequences:
            self.ids.extend(ids)
            self.is_target.extend(is_target)
            self.lengths.append(len(ids))
        self.digests.append(opening_digest(example))
        self.num_cut += was_cut

    def finish(self, report: Report) -> Encoded:
        """Return what was collected."""
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(self.lengths, dtype=np.uint32), out=offsets[1:])
        return Encoded(
            self.kind,
            np.frombuffer(self.ids, dtype=np.dtype(self.ids.typecode)),
            np.frombuffer(self.is_target, dtype=np.uint8),
            offsets,
            np.frombuffer(self.digests, dtype=np.uint64),
            np.arange(len(self.digests)),
            report,
        )

    def _fitting(self, example: Example) -> tuple[list[Rendered], bool]:
        """Return an example's sequences, each of at most a row, and whether turns were cut."""
        was_cut = False
        while True:
            sequences = [up_to_last_target(r) for r in self._render(example)]
            most = max(len(ids) - 1 for ids, _ in sequences)
            if most <= self.tokens_per_row:
                return sequences, was_cut
            if self.too_long == "refuse":
                raise ValueError(
                    f"{example.where or 'an example'}: {most:,} tokens are longer than a row of "
                    f"{self.tokens_per_row:,}: take --too_long drop or cut_prompt, or a longer row"
                )
            shorter = None
            if self.too_long == "cut_prompt":
                shorter = without_oldest_turn(example)
            if shorter is None:
                raise Dropped(f"longer than {self.tokens_per_row:,} tokens")
            example, was_cut = shorter, True

    def _render(self, example: Example) -> list[Rendered]:
        if isinstance(example, Pair):
            sides = [example.prompt + example.chosen, example.prompt + example.rejected]
        else:
            sides = [example.messages]
        if self.raw:
            return [render_raw(messages, self.tokenizer) for messages in sides]
        try:
            return [render(messages, self.tokenizer, self.train_on) for messages in sides]
        except ValueError as error:
            if not example.where:
                raise
            raise ValueError(f"{example.where}: {error}") from None


def render_raw(messages: list[Message], tokenizer: Tokenizer) -> Rendered:
    """Return the ids of a prompt's text, an answer's text and end-of-text, without a chat layout.

    The answer and end-of-text are targets. Raise ValueError if the tokenizer has no end-of-text.
    """
    if tokenizer.end_of_text_id is None:
        raise ValueError(f"--raw needs an end-of-text token, and {tokenizer.name} has none")
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    prompt = start + tokenizer.encode(messages[0]["content"])
    answer = [*tokenizer.encode(messages[1]["content"]), tokenizer.end_of_text_id]
    return Rendered(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def up_to_last_target(rendered: Rendered) -> Rendered:
    """Return a sequence up to its last target. Raise Dropped if no target has an id before it."""
    ids, is_target = rendered
    last = next((i for i in range(len(ids) - 1, 0, -1) if is_target[i]), 0)
    if not last:
        raise Dropped(NO_TARGET)
    return Rendered(ids[: last + 1], is_target[: last + 1])


def without_oldest_turn(example: Example) -> Example | None:
    """Return an example without the user's first message and what follows it up to the next one.

    Messages of the system stay. Return None if the last turn would go.
    """
    messages = example.prompt if isinstance(example, Pair) else example.messages
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not starts:
        return None
    first = next((i for i, m in enumerate(messages) if m["role"] in ("user", "assistant")))
    # What the assistant says before the user's first message is a turn too.
    rest = [start for start in starts if start > first]
    if not rest:
        return None
    system = [m for m in messages[: rest[0]] if m["role"] in ("system", "developer")]
    kept = system + messages[rest[0] :]
    if isinstance(example, Pair):
        return Pair(kept, example.chosen, example.rejected, example.where)
    return Conversation(kept, example.where)
