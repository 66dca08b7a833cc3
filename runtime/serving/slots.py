"""The engine's slots: texts with room for a whole context each, and what new prompts take of them.

A prompt that begins like a text that was read before continues there, or from a copy: these tokens
are not computed again. The last token of a prompt always is, because its logits are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from config_model import kv_cache_bytes_per_token
from model_parts import KVCache
from runtime.base.device import explained_out_of_memory, memory_bytes
from runtime.base.text import human_bytes
from runtime.inference.decoder import Decoder, Text, copy_beginning, without_windows
from runtime.serving.answer import Answer, Wait
from runtime.serving.request import Ticket

# A beginning is copied, or waited for, if that saves so many tokens.
LEAST_SHARED = 8


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids two texts have in common at their beginning."""
    most = min(len(a), len(b))
    if list(a[:most]) == list(b[:most]):
        return most
    return next(i for i in range(most) if a[i] != b[i])


def slot_bytes(decoder: Decoder) -> int:
    """Return the bytes of one slot's keys and values: those of a whole context, and one more."""
    c = without_windows(decoder.config)
    element_bytes = decoder.model.embed.weight.element_size()
    return (c.context_length + 1) * kv_cache_bytes_per_token(c, element_bytes)


def finite_tokens(cache: KVCache, tokens: int) -> int:
    """Return how many of a cache's first tokens have finite keys and values, up to the first that
    has not.

    A token whose numbers are not finite may spoil those before it in a chunk, to which it is
    nothing: they weigh it with 0, and 0 * NaN is NaN.
    """
    if not tokens:
        return 0
    # Wide enough for the sum of what is finite in half precision.
    sums = [
        t[:, :, :tokens].sum(dim=(0, 1, 3), dtype=torch.promote_types(t.dtype, torch.float32))
        for t in cache.keys + cache.values
    ]
    is_finite_T = torch.stack(sums).isfinite().all(dim=0).tolist()
    return (is_finite_T + [False]).index(False)


@dataclass
class Slot:
    """A text, and the answer that it is for; None = free."""

    number: int
    text: Text
    answer: Answer | None = None
    # When its last answer ended, as a count: the free slot with the lowest has waited longest.
    freed: int = 0

    def shared(self, ids: Sequence[int]) -> int:
        """Return how many of a prompt's tokens this slot's cache holds, at most all but one."""
        read = self.text.ids[: self.text.cache.length]
        return min(common_tokens(read, ids), len(ids) - 1)


class Slots:
    """All slots of a decoder. ValueError if their keys and values do not fit the memory."""

    def __init__(self, decoder: Decoder, count: int):
        self.decoder = decoder
        context, each = decoder.config.context_length, slot_bytes(decoder)
        self.num_bytes = count * each
        self.line = (
            f"{count} slots of {context:,} tokens: {human_bytes(self.num_bytes)} of keys and "
            f"values, {human_bytes(each)} each"
        )
        advice = "use fewer slots, or a smaller context_length"
        memory = memory_bytes(decoder.device)
        if memory is not None and self.num_bytes > memory[0]:
            raise ValueError(f"{self.line}, and {human_bytes(memory[0])} is free: {advice}")
        with explained_out_of_memory(decoder.device, advice):
            # Windowed blocks keep all keys: prompts are then read in chunks, cut and copied, with
            # the same bits.
            texts = decoder.texts(count, context, rings=False)
        self.all = [Slot(number, text) for number, text in enumerate(texts)]
        self._num_freed = 0

    @property
    def free(self) -> list[Slot]:
        return [slot for slot in self.all if slot.answer is None]

    @property
    def running(self) -> list[Slot]:
        """Return the slots with an answer, in the order in which these came."""
        busy = [slot for slot in self.all if slot.answer is not None]
        return sorted(busy, key=lambda slot: slot.answer.number if slot.answer else 0)

    def take(self, ticket: Ticket, number: int) -> Slot:
        """Give a free slot to a request: the one whose text begins most like its prompt.

        Of equals it is the one that has been free for longest.
        """
        context = self.decoder.config.context_length
        ids = list(ticket.request.ids[-context:])

        def worth(slot: Slot) -> tuple[int, int]:
            shared = slot.shared(ids)
            return shared if shared >= LEAST_SHARED else 0, -slot.freed

        slot = max(self.free, key=worth)
        answer = slot.answer = Answer(ticket, number, ids, slot.text, context)
        if not answer.reads_all:
            answer.num_reused = finite_tokens(slot.text.cache, slot.shared(ids))
        self.cut(slot, answer.num_reused)
        slot.text.ids = ids
        if not answer.reads_all:
            self.copy_longest(slot)
            self._wait(answer)
        return slot

    def _wait(self, answer: Answer) -> None:
        """Let a new answer wait for what another text is about to read of its prompt."""
        least = answer.text.cache.length + LEAST_SHARED
        for slot in self.running:
            other = slot.answer
            # Only for an earlier one, so that none waits for each other.
            if other is None or other is answer or other.has_started:
                continue
            to_come = min(common_tokens(other.ids, answer.ids), len(answer.ids) - 1)
            if to_come >= least:
                answer.wait = Wait(other, to_come)
                least = to_come + 1

    def copy_longest(self, slot: Slot) -> None:
        """Copy the longest beginning that another slot has read of a text that is to be read."""
        ids = slot.text.ids
        source = max(self.all, key=lambda other: other.shared(ids))
        least = slot.text.cache.length + LEAST_SHARED
        if source is slot or source.shared(ids) < least:
            return
        shared = finite_tokens(source.text.cache, source.shared(ids))
        if shared >= least:
            copy_beginning(source.text.cache, slot.text.cache, shared)
            assert slot.answer is not None
            slot.answer.num_reused = shared

    def end_waits(self) -> None:
        """Let those answers read whose wait is over."""
        for slot in self.running:
            if slot.answer is not None and slot.answer.wait and slot.answer.wait.is_over():
                slot.answer.wait = None
                self.copy_longest(slot)

    def release(self, slot: Slot) -> None:
        """Free a slot. Its text stays: the next prompt may begin like it."""
        self._num_freed += 1
        slot.answer, slot.freed = None, self._num_freed

    def cut(self, slot: Slot, tokens: int) -> None:
        """Keep the first tokens of what a slot's cache holds."""
        cache = slot.text.cache
        cache.rewind(tokens)
        if self.decoder.native is None:
            # decode_step weighs what lies after the end with 0, and 0 * NaN is NaN.
            for tensor in cache.keys + cache.values:
                tensor[:, :, cache.length :] = 0

    def clear(self, slot: Slot) -> None:
        """Zero a slot whose numbers are not finite."""
        self.decoder.clear(slot.text)


def share_chunk(unread: Sequence[int], tokens: int) -> list[int]:
    """Return how many tokens of a pass each prompt gets; they are in the order of arrival.

    Half belongs to the oldest, so that it ends in time. The rest goes to those that need least: a
    short prompt does not wait behind long ones.
    """
    counts = [0] * len(unread)
    if not unread:
        return counts
    counts[0] = min(unread[0], -(-tokens // 2))
    room = tokens - counts[0]
    for i in sorted(range(len(unread)), key=lambda i: unread[i] - counts[i]):
        more = min(room, unread[i] - counts[i])
        counts[i] += more
        room -= more
    return counts
