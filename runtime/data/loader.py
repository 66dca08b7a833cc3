"""Batches for training and validation."""

from __future__ import annotations

import contextlib
import functools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

from config_model import TrainConfig
from runtime.data.shards import TokenShards


def count_windows(shards: TokenShards, context_length: int) -> int:
    """Return how many windows of T tokens cover every token once as a target.

    Targets are the inputs shifted by one. The last window is moved back to end at the last token.
    """
    if shards.num_tokens < context_length + 1:
        raise ValueError(
            f"{shards.folder} has {shards.num_tokens:,} tokens and a sequence needs "
            f"{context_length + 1:,}: lower --context_length or prepare more text"
        )
    return math.ceil((shards.num_tokens - 1) / context_length)


def read_windows(
    shards: TokenShards, windows: Iterable[int], context_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, int64 [B, T] each, of the given windows.

    Window i is tokens i*T .. i*T + T; the last is moved back to end at the last token.
    """
    # Here, so that preparing text needs no torch.
    import torch

    last = shards.num_tokens - context_length - 1
    tokens = np.stack(
        [shards.read(min(int(i) * context_length, last), context_length + 1) for i in windows]
    )
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())


class WindowLoader:
    """Training batches as a pure function of (seed, index).

    There is no state to save, and any number of workers reads the same batches. Samples are
    numbered 0, 1, 2, ... without end. Epoch e is samples e*num_windows to (e+1)*num_windows - 1:
    every window once. Their order is that of num_windows 64-bit numbers from Philox with key
    (seed, e). numpy promises never to change that generator's raw numbers, but may change its own
    shuffling.
    """

    def __init__(self, shards: TokenShards, context_length: int, batch_size: int, seed: int):
        self.shards, self.context_length = shards, context_length
        self.batch_size, self.seed = batch_size, seed
        self.num_windows = count_windows(shards, context_length)
        # A batch has samples of at most two epochs.
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        philox = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        return np.argsort(philox.random_raw(self.num_windows), kind="stable")

    def window(self, sample: int) -> int:
        """Return which window the sample with this number is."""
        epoch, position = divmod(sample, self.num_windows)
        return int(self._order(epoch)[position])

    def batch(self, first_sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets, int64 [B, T], of the B samples from `first_sample` on."""
        windows = [
            self.window(sample) for sample in range(first_sample, first_sample + self.batch_size)
        ]
        return read_windows(self.shards, windows, self.context_length)


class ValidationBatches:
    """At most `max_batches` batches of (inputs, targets), int64 [B, T]; see validation_batches."""

    def __init__(self, shards: TokenShards, context_length: int, batch_size: int, max_batches: int):
        total = count_windows(shards, context_length)
        num_windows = min(total, batch_size * max_batches)
        if num_windows > batch_size:
            # Whole batches: one shape to compile.
            num_windows -= num_windows % batch_size
        self.shards, self.context_length = shards, context_length
        self.batch_size = batch_size
        self.windows = [i * total // num_windows for i in range(num_windows)]

    def __len__(self) -> int:
        return math.ceil(len(self.windows) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return read_windows(
            self.shards,
            self.windows[i * self.batch_size : (i + 1) * self.batch_size],
            self.context_length,
        )


def validation_batches(
    shards: TokenShards, context_length: int, batch_size: int, max_batches: int
) -> ValidationBatches:
    """Return fixed windows spread evenly over a split, always the same, read on access.

    All batches have batch_size windows; a split with fewer windows gives one smaller batch.
    """
    return ValidationBatches(shards, context_length, batch_size, max_batches)


Item = TypeVar("Item")


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Yield `items`; a background thread makes up to `depth` of them ahead.

    Its errors are raised here. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def offer(kind: str, value: object) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                offer("item", item)
                if closed.is_set():
                    return
            offer("end", None)
        except BaseException as error:
            # The consumer raises it.
            offer("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()


def micro_batches(
    loader,
    count: Callable[[tuple], int],
    config: TrainConfig,
    first_sample: int,
    pinned: bool,
    which: Iterable[int] | None = None,
) -> tuple[list[tuple[torch.Tensor, ...]], int]:
    """Return micro-batches of a step, and the sum of their `count`s.

    which: their numbers within the step; None = all of them. pinned: put them into page-locked
    memory, from which a GPU copies while the host continues.
    """
    which = range(config.grad_accum) if which is None else which
    batches = [loader.batch(first_sample + i * config.batch_size) for i in which]
    divisor = sum(count(batch) for batch in batches)
    if pinned:
        batches = [tuple(tensor.pin_memory() for tensor in batch) for batch in batches]
    return batches, divisor
