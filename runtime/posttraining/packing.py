"""Encoded examples -> rows: several examples share one, none sees another, none is cut.

The batches are those of every post-training: (ids_BT, targets_BT, starts_BT, rows_M, segments_M),
int64 tensors. starts_BT: position in the row where each token's example begins; padding begins at
itself, so that it sees nothing else. rows_M: flat indices of the M tokens with a target, ascending.
segments_M: number of each one's example within the batch.

Which examples share a row depends on (seed, epoch), and how many rows there are does not: the
lengths alone decide it, and examples of equal length change places. So samples are numbered as in
WindowLoader: epoch e is samples e*R to (e+1)*R - 1, and a run continues from a number.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from config_model import ModelConfig
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.posttraining.encode import Encoded


def can_share_rows(config: ModelConfig) -> bool:
    """Return whether examples may share a row: whether only distances between tokens matter.

    A learned attention bias belongs to positions of the row, and without RoPE the model may have
    learned to count them.
    """
    return config.use_rope and not config.use_attention_bias


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each item, int64 [N], by best-fit decreasing.

    sizes: int64 [N], from 1 to capacity, the largest first. An item goes to the row with the least
    room that it fits in, else to a new one: about 11/9 of the fewest rows at worst (Johnson et al.
    1974).
    """
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r: there is a row with r tokens of room.
    rooms, num_rows = 0, 0
    row_of = np.empty(len(sizes), dtype=np.int64)
    for i, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, num_rows = num_rows, capacity, num_rows + 1
        if left := room - size:
            rows_with_room[left].append(row)
            rooms |= 1 << left
        row_of[i] = row
    return row_of


class Rows:
    """How examples fill rows: sizes decide the rows, keys which of equal size goes where.

    share: several examples in a row; otherwise each has its own, and rows are as long as the
    longest example. tokens_per_row may be more than the examples were encoded for.
    """

    def __init__(self, encoded: Encoded, tokens_per_row: int, share: bool = True):
        sizes = encoded.lengths
        if not len(sizes):
            raise ValueError("there are no examples to train on")
        if sizes.max() > tokens_per_row or sizes.min() < 1:
            raise ValueError(
                f"the examples have {sizes.min():,} to {sizes.max():,} tokens, and a row has "
                f"{tokens_per_row:,}: encode them for rows of this length"
            )
        without = np.flatnonzero(encoded.num_targets == 0)
        if len(without):
            # A step of such examples alone would divide by 0.
            raise ValueError(f"example {encoded.numbers[without[0]]} has no target: leave it out")
        self.encoded, self.sizes = encoded, sizes
        self.tokens_per_row = tokens_per_row if share else int(sizes.max())
        largest_first = np.sort(sizes)[::-1]
        row_of = best_fit(largest_first, tokens_per_row) if share else np.arange(len(sizes))
        # Ranks by size, row after row, and where each row begins among them.
        self.ranks = np.argsort(row_of, kind="stable")
        self.borders = np.searchsorted(row_of[self.ranks], np.arange(row_of.max() + 2))

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are no padding; of a pair, both sides count."""
        num_tokens = len(self) * self.encoded.sides * self.tokens_per_row
        return float(self.encoded.inputs.sum() / num_tokens)

    def assigned(self, keys_N: np.ndarray) -> np.ndarray:
        """Return the example of each rank, int64 [N]: by size, ties in the order of keys [N]."""
        return self.encoded.numbers[np.lexsort((keys_N, -self.sizes))]

    def examples(self, row: int, by_rank: np.ndarray) -> np.ndarray:
        """Return the numbers of the examples in a row. by_rank: from `assigned`."""
        return by_rank[self.ranks[self.borders[row] : self.borders[row + 1]]]


def make_batch(
    encoded: Encoded, rows: Sequence[np.ndarray], tokens_per_row: int
) -> tuple[Tensor, ...]:
    """Return the batch of these rows, each given by the numbers of its examples.

    With pairs, row i becomes rows 2i (chosen) and 2i + 1 (rejected), pair j of the batch has the
    segments 2j and 2j + 1, and the batch ends with the pairs' numbers [P] int64.
    """
    sides = encoded.sides
    B, T = sides * len(rows), tokens_per_row
    ids_BT = np.zeros((B, T), dtype=np.int64)
    targets_BT = np.full((B, T), IGNORE, dtype=np.int64)
    segments_BT = np.zeros((B, T), dtype=np.int64)
    starts_BT = np.tile(np.arange(T), (B, 1))
    segment = 0
    for i, numbers in enumerate(rows):
        at = [0] * sides
        for number in numbers:
            for side in range(sides):
                ids, is_target = encoded.sequence(sides * number + side)
                here = sides * i + side, slice(at[side], at[side] + len(ids) - 1)
                ids_BT[here] = ids[:-1]
                # In int64: in ids' own unsigned dtype IGNORE would be another number.
                targets_BT[here] = np.where(is_target[1:], ids[1:].astype(np.int64), IGNORE)
                segments_BT[here] = segment
                starts_BT[here] = at[side]
                at[side] += len(ids) - 1
                segment += 1
    rows_M = np.flatnonzero(targets_BT != IGNORE)
    arrays = [ids_BT, targets_BT, starts_BT, rows_M, segments_BT.ravel()[rows_M]]
    if sides == 2:
        arrays.append(np.concatenate([*rows, np.zeros(0, dtype=np.int64)]))
    return tuple(torch.from_numpy(each) for each in arrays)


class PackedLoader:
    """Batches of packed rows as a pure function of (seed, number of the first sample).

    A sample is a row. An epoch has every example once. Any number of threads may ask.
    """

    kind = "conversations"

    def __init__(
        self,
        encoded: Encoded,
        tokens_per_row: int,
        batch_size: int,
        seed: int,
        share: bool = True,
    ):
        if encoded.kind != self.kind:
            raise ValueError(f"{type(self).__name__} takes {self.kind}, not {encoded.kind}")
        self.encoded, self.batch_size, self.seed = encoded, batch_size, seed
        self.rows = rows_of(encoded, tokens_per_row, share)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    @property
    def samples_per_epoch(self) -> int:
        """Rows that hold every example once: the same in each epoch."""
        return len(self.rows)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's rows in order, [R], and its examples by rank, [N].

        The order is that of raw numbers from Philox, which numpy promises never to change.
        """
        philox = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        order_R = np.argsort(philox.random_raw(len(self.rows)), kind="stable")
        return order_R, self.rows.assigned(philox.random_raw(len(self.encoded)))

    def examples(self, sample: int) -> np.ndarray:
        """Return the numbers of the examples in the sample with this number."""
        epoch, position = divmod(sample, len(self.rows))
        order_R, by_rank = self._epoch(epoch)
        return self.rows.examples(int(order_R[position]), by_rank)

    def batch(self, first_sample: int) -> tuple[Tensor, ...]:
        """Return the batch of the `batch_size` samples from `first_sample` on; see make_batch."""
        samples = range(first_sample, first_sample + self.batch_size)
        rows = [self.examples(sample) for sample in samples]
        return make_batch(self.encoded, rows, self.rows.tokens_per_row)


class PairLoader(PackedLoader):
    """PackedLoader of pairs: a sample is a row of chosen answers and one of the rejected ones.

    A batch has 2 x batch_size rows, and one more tensor: the numbers of its pairs [P].
    """

    kind = "pairs"


class PackedValidation(Sequence):
    """All held-out examples once, as batches of packed rows, always the same.

    The last batch is filled with rows of padding, so that all have one shape.
    """

    def __init__(self, encoded: Encoded, tokens_per_row: int, batch_size: int, share: bool = True):
        self.encoded = encoded
        self.rows = rows_of(encoded, tokens_per_row, share) if len(encoded) else None
        num_rows = len(self.rows) if self.rows else 0
        self.batch_size = min(batch_size, num_rows) or batch_size
        if self.rows:
            # With equal keys, examples of equal size keep their order.
            self._by_rank = self.rows.assigned(np.zeros(len(encoded)))

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size) if self.rows else 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i):
        if self.rows is None or not 0 <= i < len(self):
            raise IndexError(i)
        wanted = range(i * self.batch_size, (i + 1) * self.batch_size)
        rows = [
            self.rows.examples(row, self._by_rank)
            if row < len(self.rows)
            else np.zeros(0, dtype=np.int64)
            for row in wanted
        ]
        return make_batch(self.encoded, rows, self.rows.tokens_per_row)


def rows_of(encoded: Encoded, tokens_per_row: int, share: bool) -> Rows:
    """Return the rows of a set of examples, computed once for each length of a row."""
    key = (tokens_per_row, share)
    if key not in encoded.rows:
        encoded.rows[key] = Rows(encoded, tokens_per_row, share)
    return encoded.rows[key]
