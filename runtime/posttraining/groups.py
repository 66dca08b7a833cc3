"""Groups of sampled answers -> packed rows, and back to plain values for a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from runtime.posttraining.encode import CONVERSATIONS, Encoded
from runtime.posttraining.packing import make_batch, rows_of
from runtime.posttraining.prompts import Asked
from runtime.posttraining.reward import Earned
from runtime.posttraining.rollouts import Answer
from runtime.training.task import Batch


@dataclass
class Group:
    """The answers to one prompt, what each earned, and each one's advantage.

    number: of the prompt (Prompts.asked). extra: log-probabilities of each answer's ids by name,
    "old" or "reference", where they were computed.
    """

    number: int
    asked: Asked
    answers: list[Answer]
    earned: list[Earned]
    advantages: list[float]
    extra: dict[str, dict[int, list[float]]] = field(default_factory=dict)

    @property
    def has_signal(self) -> bool:
        """Whether its answers earned different rewards."""
        return any(self.advantages)

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    def state(self) -> dict:
        """Return all but the prompt as plain JSON values; floats keep their bits."""
        return {
            "number": self.number,
            "answers": [[a.ids, a.log_probs, a.ended] for a in self.answers],
            "earned": [[earned.total, earned.parts] for earned in self.earned],
            "advantages": self.advantages,
            "extra": {
                name: {str(i): values for i, values in own.items()}
                for name, own in self.extra.items()
            },
        }

    @classmethod
    def of(cls, state: dict, asked: Asked) -> Group:
        """Return the group whose `state` this is."""
        return cls(
            state["number"],
            asked,
            [Answer(*values) for values in state["answers"]],
            [Earned(total, dict(parts)) for total, parts in state["earned"]],
            list(state["advantages"]),
            {
                name: {int(i): values for i, values in own.items()}
                for name, own in state["extra"].items()
            },
        )


class Rolled:
    """Packed answers of some groups, and what belongs to each of their tokens.

    packed: (ids_BT, targets_BT, starts_BT, rows_M, segments_M). places: of each segment, (its
    group, its answer's number there). num_tokens: of all answers, those that are left out included.
    """

    def __init__(self, packed: Batch, places: list[tuple[Group, int]], num_tokens: int):
        self.packed, self.places, self.num_tokens = packed, places, num_tokens

    def lacks(self, name: str) -> bool:
        """Return whether an answer has no log-probabilities of this name."""
        return any(i not in group.extra.get(name, {}) for group, i in self.places)

    def store(self, name: str, log_probs_M: Tensor) -> None:
        """Give each answer its log-probabilities of this name."""
        sizes = [len(group.answers[i].ids) for group, i in self.places]
        parts = log_probs_M.split(sizes)
        for (group, i), part in zip(self.places, parts, strict=True):
            group.extra.setdefault(name, {})[i] = part.tolist()

    def batch(self, dtype: torch.dtype) -> Batch:
        """Return packed, advantages_S, then [M] each: sampled, old, reference; num_tokens.

        Empty tensors stand for log-probabilities that nobody computed. dtype: of all but ids.
        """
        advantages = [group.advantages[i] for group, i in self.places]
        sampled = [value for group, i in self.places for value in group.answers[i].log_probs]
        return (
            *self.packed,
            torch.tensor(advantages, dtype=dtype),
            torch.tensor(sampled, dtype=dtype),
            torch.tensor(self._extra("old"), dtype=dtype),
            torch.tensor(self._extra("reference"), dtype=dtype),
            torch.tensor(self.num_tokens),
        )

    def _extra(self, name: str) -> list[float]:
        if self.lacks(name):
            return []
        return [value for group, i in self.places for value in group.extra[name][i]]


def pack_groups(groups: Sequence[Group], tokens_per_row: int, share: bool, keep: bool) -> Rolled:
    """Return the answers of some groups in rows.

    share: several in a row. keep: also those with advantage 0, which have a gradient only where
    there is a KL term. Without any other, one row of answers is left, so that there is a batch.
    """
    every = [(group, i) for group in groups for i in range(len(group.answers))]
    places = [(group, i) for group, i in every if keep or group.advantages[i]]
    if not places:
        places = _one_row(every, tokens_per_row)
    sequences = [group.asked.ids + group.answers[i].ids for group, i in places]
    is_target = [
        [False] * len(group.asked.ids) + [True] * len(group.answers[i].ids) for group, i in places
    ]
    encoded = Encoded(
        CONVERSATIONS,
        ids=np.array([id_ for ids in sequences for id_ in ids], dtype=np.int64),
        is_target=np.array([one for flags in is_target for one in flags], dtype=np.uint8),
        offsets=np.cumsum([0, *map(len, sequences)]),
        digests=np.zeros(len(sequences), dtype=np.uint64),
        numbers=np.arange(len(sequences)),
    )
    rows = rows_of(encoded, tokens_per_row, share)
    by_rank = rows.assigned(np.zeros(len(sequences)))
    members = [rows.examples(row, by_rank) for row in range(len(rows))]
    packed = make_batch(encoded, members, rows.tokens_per_row)
    # A segment's number is its place in the rows.
    order = [places[number] for number in np.concatenate(members)]
    return Rolled(packed, order, sum(group.num_tokens for group in groups))


def _one_row(places: list[tuple[Group, int]], tokens: int) -> list[tuple[Group, int]]:
    """Return the first answers that fit one row together."""
    chosen: list[tuple[Group, int]] = []
    for group, i in places:
        tokens -= len(group.asked.ids) + len(group.answers[i].ids) - 1
        if chosen and tokens < 0:
            break
        chosen.append((group, i))
    return chosen
