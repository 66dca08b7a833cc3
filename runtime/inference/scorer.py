"""Score texts: the log-probability of each next token, how sure the model was, and its experts.

`Scorer` is the one place where documents are scored, for all of evaluation. It promises:

* A document's scores depend on the document and the model alone. Where the C kernel runs, they are
  the same bits whatever else is scored, in which order, in what batches and on how many threads:
  then `is_exact` is True. Elsewhere PyTorch scores in batches, and last digits depend on these;
  `line` says which of the two computes, and why.
* Results come in the order of the documents, and memory does not grow with their number: an
  iterable is read as far as one batch needs.
* Beginnings that documents share are read once, where the C kernel runs.
* A document longer than the context is scored in windows: `windows`.

Shape letters as in model_parts.py: L blocks, K top_k, T tokens of a document.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from config_model import kv_cache_bytes_per_token
from model import LLM, check_drawn
from model_parts import KVCache
from runtime.inference.decoder import Decoder

# Documents are taken from the iterable up to so many tokens, and sorted: neighbours share the
# beginning that is read once.
BUFFER_TOKENS = 1 << 16
# Documents in the C kernel's caches at a time, the bytes of these, and tokens in one pass.
SLOTS = 32
MOST_CACHE_BYTES = 1 << 28
PASS_ROWS = 256
# A beginning is copied rather than read if that saves so many tokens.
LEAST_SHARED = 8
# PyTorch: tokens of a batch, and numbers of its logits that are held at a time.
BATCH_TOKENS = 1 << 13
MOST_LOGITS = 1 << 24
# Of Scores, by token, and their dtypes.
ARRAYS = {"log_probs_T": np.float64, "best_log_probs_T": np.float64, "is_greedy_T": np.bool_}


class Scores(NamedTuple):
    """What a model makes of a document of T tokens; scored are those from number `first` on.

    first is 1 unless the caller says otherwise: the first token has nothing before it. All
    log-probabilities are in nats, float64, of temperature 1 over the whole vocabulary.
    """

    # Of each scored token, given those before it: [T - first].
    log_probs_T: np.ndarray
    # Of the most likely token there: [T - first].
    best_log_probs_T: np.ndarray
    # Whether the token is the most likely one (of equals: the lowest id), [T - first] bool.
    is_greedy_T: np.ndarray
    # If asked for: the experts that every token but the last was sent to, whatever is scored,
    # strongest first; number i is of the token before the one with log-probability i + 1.
    # [L, T - 1, K] int32.
    experts_LTK: np.ndarray | None


class Window(NamedTuple):
    """Tokens begin to end - 1 of a document, read together; those from `first` on are scored."""

    begin: int
    end: int
    first: int


def windows(tokens: int, context: int, stride: int, first: int = 1) -> list[Window]:
    """Return how a document of so many tokens is scored by a model with such a context.

    A window reads `context` tokens, and the next begins `stride` tokens later. It scores only what
    no window before it did, so each token is scored once, with at least context - stride tokens
    before it where the document has them. A document that fits is one window.
    """
    found, begin, scored = [], 0, first
    while scored < tokens:
        end = min(tokens, begin + context + 1)
        if end > scored:
            found.append(Window(begin, end, scored))
            scored = end
        begin += stride
    return found


@dataclass
class _Piece:
    """One window: ids, of which all but the last are read and those from `first` on are scored.

    new: the first row whose experts count; a window before it had the others. num_read: rows, from
    the first on, whose keys are in its cache.
    """

    ids: list[int]
    first: int
    new: int
    log_probs_T: np.ndarray
    best_log_probs_T: np.ndarray
    is_greedy_T: np.ndarray
    experts_LTK: np.ndarray | None
    num_read: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.ids) - 1

    def num_shared(self, source: _Piece, same: int) -> int:
        """Return the rows to take from a piece that begins with the same `same` ids.

        The last of these ids is read again: another token may follow it, and its score is another.
        """
        rows = max(0, min(same, self.num_rows) - 1)
        # Scores that are wanted here must be there.
        return rows if source.first <= self.first else min(rows, self.first - 1)

    def take(self, source: _Piece, rows: int) -> None:
        """Take over the first rows of another piece."""
        for name in ARRAYS:
            getattr(self, name)[:rows] = getattr(source, name)[:rows]
        if self.experts_LTK is not None and source.experts_LTK is not None:
            self.experts_LTK[:, :rows] = source.experts_LTK[:, :rows]
        self.num_read = rows


class Scorer:
    """A model, ready to score documents.

    source: a finished plain model, or a Decoder that has one; the model is put into its mode for
    evaluation. with_experts: whether results have experts. stride: of the windows over documents
    longer than the context; 0 = the context, so that windows do not overlap.
    """

    def __init__(self, source: LLM | Decoder, with_experts: bool = False, stride: int = 0):
        self.decoder = source if isinstance(source, Decoder) else Decoder(source)
        self.model, self.config = self.decoder.model, self.decoder.config
        self.context, self.with_experts = self.config.context_length, with_experts
        if not 0 <= stride <= self.context:
            raise ValueError(
                f"stride must be from 1 to the context of {self.context} tokens, or 0 = the "
                f"context, not {stride}"
            )
        self.stride = stride or self.context

    @property
    def is_exact(self) -> bool:
        """Return whether scores are the same bits in whatever company."""
        return self.decoder.native is not None

    @property
    def line(self) -> str:
        """Return in a line what computes the scores, and what that means for their last digits."""
        if self.is_exact:
            return "the C kernel scores: the same bits in any order, batch and number of threads"
        why = self.decoder.why_not_native
        return f"PyTorch scores: last digits depend on the batch{f' ({why})' if why else ''}"

    @torch.inference_mode()
    def scores(
        self, documents: Iterable[Sequence[int]], firsts: Iterable[int] | None = None
    ) -> Iterator[Scores]:
        """Yield the scores of each document (ids), in order.

        firsts: of each document, the number of the first token to be scored, at least 1; a
        document of so many tokens or fewer has no scores. Raise ValueError for ids out of range,
        and for logits that are not finite.
        """
        buffer: list[list[_Piece]] = []
        tokens = 0
        pairs: Iterable[tuple[Sequence[int], int]]
        if firsts is None:
            pairs = ((document, 1) for document in documents)
        else:
            pairs = zip(documents, firsts, strict=True)
        for number, (document, first) in enumerate(pairs):
            buffer.append(self._pieces(document, first, number))
            # One more: a document without tokens takes memory, too.
            tokens += 1 + sum(len(piece.ids) for piece in buffer[-1])
            if tokens >= BUFFER_TOKENS:
                yield from self._score(buffer)
                buffer, tokens = [], 0
        yield from self._score(buffer)

    def _pieces(self, document: Sequence[int], first: int, number: int) -> list[_Piece]:
        """Return the windows of a document, after a check of what was given."""
        ids, c = [int(i) for i in document], self.config
        if first < 1:
            raise ValueError(
                f"document {number}: the first token to be scored must be at least 1, not {first}"
            )
        if ids and not 0 <= min(ids) <= max(ids) < c.vocabulary_size:
            raise ValueError(
                f"document {number}: token ids must be from 0 to {c.vocabulary_size - 1}, "
                f"got {min(ids)} to {max(ids)}"
            )
        pieces = []
        # Experts are wanted of all tokens, so all are read.
        least = 1 if self.with_experts else first
        for begin, end, scored in windows(len(ids), self.context, self.stride, least):
            T = end - begin - 1
            experts = None
            if self.with_experts:
                experts = np.zeros((c.transformer_blocks, T, c.top_k), dtype=np.int32)
            numbers = (np.zeros(T), np.zeros(T), np.zeros(T, dtype=bool))
            own, new = ids[begin:end], scored - 1 - begin if begin else 0
            pieces.append(_Piece(own, max(scored, first) - begin, new, *numbers, experts))
        return pieces

    def _score(self, buffer: list[list[_Piece]]) -> Iterator[Scores]:
        """Score documents, each as its windows; yield their scores in order."""
        pieces = [piece for own in buffer for piece in own]
        if self.decoder.native is not None:
            self._in_c(pieces)
        else:
            self._in_pytorch(pieces)
        for own in buffer:
            scores = self._joined(own)
            if not np.isfinite(scores.log_probs_T).all():
                check_drawn([-1])
            yield scores

    def _joined(self, pieces: list[_Piece]) -> Scores:
        """Return the scores of a document from those of its windows."""
        parts = [
            np.concatenate([np.zeros(0, kind)] + [getattr(p, name)[p.first - 1 :] for p in pieces])
            for name, kind in ARRAYS.items()
        ]
        experts = None
        if self.with_experts:
            c = self.config
            none = np.zeros((c.transformer_blocks, 0, c.top_k), dtype=np.int32)
            new = [p.experts_LTK[:, p.new :] for p in pieces if p.experts_LTK is not None]
            experts = np.concatenate([none, *new], axis=1)
        return Scores(parts[0], parts[1], parts[2], experts)

    # ------------------------------------------------------------------------------ the C kernel
    def _in_c(self, pieces: list[_Piece]) -> None:
        """Score pieces in batches of neighbours: sorted, those with the same beginning meet."""
        if not pieces:
            return
        pieces = sorted(pieces, key=lambda piece: piece.ids)
        longest = max(piece.num_rows for piece in pieces)
        # Without ring buffers: several tokens of a text are read at once.
        config = dataclasses.replace(self.config, sliding_window=0, window_pattern="all")
        slots = MOST_CACHE_BYTES // (longest * kv_cache_bytes_per_token(config, 4))
        slots = max(1, min(SLOTS, slots, len(pieces)))
        caches = KVCache(config, slots, longest).rows()
        last: _Piece | None = None
        for at in range(0, len(pieces), slots):
            batch = pieces[at : at + slots]
            self._batch(batch, caches, last)
            # The next batch may continue from this one's last piece, in that one's cache.
            last = batch[-1]
            caches.insert(0, caches.pop(len(batch) - 1))

    def _batch(self, batch: list[_Piece], caches: list[KVCache], last: _Piece | None) -> None:
        """Score some pieces, each in its cache. last: the piece that the first cache holds."""
        waits = _sources(batch)
        rows = 0 if last is None else batch[0].num_shared(last, _same(last.ids, batch[0].ids))
        if last is not None and rows:
            batch[0].take(last, rows)
        for cache, piece in zip(caches, batch, strict=False):
            cache.length = piece.num_read
        while any(piece.num_read < piece.num_rows for piece in batch):
            chunks: dict[int, int] = {}
            room = PASS_ROWS
            for i, piece in enumerate(batch):
                if i in waits:
                    source, rows = waits[i]
                    if batch[source].num_read < rows:
                        continue
                    _copy(caches[source], caches[i], rows)
                    piece.take(batch[source], rows)
                    del waits[i]
                if count := min(room, piece.num_rows - piece.num_read):
                    chunks[i] = count
                    room -= count
            self._pass([(batch[i], caches[i], count) for i, count in chunks.items()])

    def _pass(self, parts: list[tuple[_Piece, KVCache, int]]) -> None:
        """Read so many further tokens of each piece in one pass, and score what follows them."""
        slices = [slice(p.num_read, p.num_read + count) for p, _, count in parts]
        # Rows of a beginning that nobody asks for need no logits.
        rows = [range(max(0, p.first - 1 - p.num_read), count) for p, _, count in parts]
        ids, targets = [], []
        for (piece, _, _), own, scored in zip(parts, slices, rows, strict=True):
            ids.append(piece.ids[own])
            targets.append([piece.ids[piece.num_read + row + 1] for row in scored])
        caches = [cache for _, cache, _ in parts]
        got = self.decoder.native.read(caches, ids, rows, targets, self.with_experts)
        at = token = 0
        for (piece, _, count), own, scored in zip(parts, slices, rows, strict=True):
            to, some = slice(own.stop - len(scored), own.stop), slice(at, at + len(scored))
            piece.log_probs_T[to] = got.log_probs_R[some]
            piece.best_log_probs_T[to] = got.best_log_probs_R[some]
            piece.is_greedy_T[to] = got.best_R[some] == piece.ids[to.start + 1 : to.stop + 1]
            if piece.experts_LTK is not None:
                piece.experts_LTK[:, own] = got.experts_LNK[:, token : token + count]
            at, token, piece.num_read = at + len(scored), token + count, own.stop

    # ----------------------------------------------------------------------------------- PyTorch
    def _in_pytorch(self, pieces: list[_Piece]) -> None:
        """Score pieces in batches of similar lengths, padded at their ends."""
        pieces = sorted(pieces, key=lambda piece: -len(piece.ids))
        while pieces:
            rows = max(1, BATCH_TOKENS // max(1, pieces[0].num_rows))
            self._padded([piece for piece in pieces[:rows] if piece.num_rows])
            pieces = pieces[rows:]

    def _padded(self, batch: list[_Piece]) -> None:
        if not batch:
            return
        c, device, longest = self.config, self.decoder.device, batch[0].num_rows
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, piece in enumerate(batch):
            ids_BT[row, : piece.num_rows] = torch.tensor(piece.ids[:-1])
        cache = KVCache(c, len(batch), longest, self.model.embed.weight.dtype, device)
        at_once = max(1, MOST_LOGITS // (len(batch) * c.vocabulary_size))
        for at in range(0, longest, at_once):
            chosen: list[torch.Tensor] = []
            with _kept_choices(self.model, chosen if self.with_experts else None):
                chunk_BT = ids_BT[:, at : at + at_once].to(device)
                logits_BTV = self.model(chunk_BT, cache=cache).logits
            for row, piece in enumerate(batch):
                count = min(chunk_BT.shape[1], piece.num_rows - at)
                if count <= 0:
                    continue
                targets_T = piece.ids[at + 1 : at + count + 1]
                values = _scored(logits_BTV[row, :count], targets_T)
                for name, numbers in zip(ARRAYS, values, strict=True):
                    getattr(piece, name)[at : at + count] = numbers
                for block, experts_NK in enumerate(chosen):
                    assert piece.experts_LTK is not None
                    own_TK = experts_NK.view(*chunk_BT.shape, -1)[row, :count]
                    piece.experts_LTK[block, at : at + count] = own_TK.cpu().numpy()


def _scored(logits_TV: torch.Tensor, targets_T: list[int]) -> tuple[np.ndarray, ...]:
    """Return what Scores has of each target: log-probabilities, the best ones, greedy or not."""
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    numbers_TV = logits_TV.to(dtype).cpu().numpy().astype(np.float64)
    best_T = numbers_TV.argmax(axis=1)
    rows_T = np.arange(len(best_T))
    # Row by row: a sum's order then depends on the vocabulary alone.
    largest_T = numbers_TV[rows_T, best_T]
    totals_T = np.exp(numbers_TV - largest_T[:, None]).sum(axis=1)
    log_probs_T = numbers_TV[rows_T, targets_T] - largest_T - np.log(totals_T)
    return log_probs_T, -np.log(totals_T), best_T == np.asarray(targets_T)


def _same(a: list[int], b: list[int]) -> int:
    """Return how many ids two lists have in common at their beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _sources(batch: list[_Piece]) -> dict[int, tuple[int, int]]:
    """Return for sorted pieces whose first rows another has: (that one, the rows to copy).

    It is the earliest with about the longest common beginning: those with one beginning then wait
    for one piece, and not for each other.
    """
    found = {}
    for i in range(1, len(batch)):
        longest = same = _same(batch[i - 1].ids, batch[i].ids)
        source = i - 1
        for j in range(i - 2, -1, -1):
            same = min(same, _same(batch[j].ids, batch[j + 1].ids))
            if same < max(LEAST_SHARED, longest - LEAST_SHARED):
                break
            source = j
        rows = batch[i].num_shared(batch[source], _same(batch[source].ids, batch[i].ids))
        if rows >= LEAST_SHARED:
            found[i] = (source, rows)
    return found


def _copy(source: KVCache, target: KVCache, tokens: int) -> None:
    """Make the first tokens of one cache those of another, too. Neither has ring buffers."""
    for theirs, own in zip(source.keys + source.values, target.keys + target.values, strict=True):
        own[:, :, :tokens] = theirs[:, :, :tokens]
    target.length = tokens


@contextlib.contextmanager
def _kept_choices(model: LLM, chosen: list[torch.Tensor] | None) -> Iterator[None]:
    """Append the experts [N, K] that each block's router chooses, unless `chosen` is None."""
    hooks = []
    if chosen is not None:
        hooks = [
            block.moe.router.register_forward_hook(lambda _, given, out: chosen.append(out[1]))
            for block in model.layers
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
