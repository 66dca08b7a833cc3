"""One request while the engine answers it: what it has read and drawn, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from runtime.inference.decoder import Drawing, Text
from runtime.inference.scorer import on_host
from runtime.serving.readers import Part, Reading
from runtime.serving.request import (
    Experts,
    Finished,
    PromptScores,
    Started,
    Ticket,
    Token,
    Top,
)


@dataclass
class Wait:
    """Another answer that reads the beginning of a prompt, and how many tokens of it.

    seen: the tokens that it had read when that was last looked at.
    """

    source: Answer
    tokens: int
    seen: int = -1

    def is_over(self) -> bool:
        """Return whether the tokens are there, or do not come soon."""
        source, seen = self.source, self.seen
        self.seen = source.text.cache.length
        if source.is_over or source.has_started or self.seen >= self.tokens:
            return True
        # A source that waits, too, comes nearer as its own source does.
        return source.wait is None and self.seen == seen


class Answer:
    """The state of a request that has a slot.

    number: of its arrival. ids: what the model is to see, the very list that its text has; of these
    the cache holds the first.
    """

    def __init__(self, ticket: Ticket, number: int, ids: list[int], text: Text, context: int):
        self.ticket, self.number, self.context = ticket, number, context
        self.request, self.sampling = ticket.request, ticket.request.sampling
        self.text, self.ids, self.num_prompt = text, ids, len(ids)
        self.num_reused = self.num_drawn = 0
        self.is_over = self.has_started = False
        self.wait: Wait | None = None
        # A drawn token that is sent when it has been read, with its experts.
        self.pending: Token | None = None
        # How it ends, known when its last token is drawn.
        self.end: Finished | None = None
        self._log_probs: list[float | None] = [None]
        self._tops: list[Top | None] = [None]
        self._experts: list[Experts] = []

    # ------------------------------------------------------------------------------------- reading
    @property
    def reads_all(self) -> bool:
        """Return whether the prompt must be read whole, because its tokens are scored."""
        return self.request.prompt_logprobs

    @property
    def unread(self) -> int:
        """Return how many ids the cache does not hold."""
        return len(self.ids) - self.text.cache.length

    def slides(self) -> bool:
        """Cut a text that is too long to the newer half of the context.

        Return whether it was, so that nothing of its cache holds any more.
        """
        if len(self.ids) <= self.context:
            return False
        self.ids = self.text.ids = self.ids[-max(1, self.context // 2) :]
        return True

    def part(self, count: int) -> Part:
        """Return what the next pass reads: so many tokens, and the rows that need logits."""
        is_complete = count == self.unread
        scores_prompt = self.request.prompt_logprobs and not self.has_started
        if scores_prompt:
            rows: Sequence[int] = range(count)
        else:
            rows = [count - 1] if is_complete and self.end is None else []
        return Part(
            self.text,
            count,
            rows,
            wants_best=self.request.logprobs is not None or scores_prompt,
            wants_experts=self.request.experts and (is_complete or scores_prompt),
        )

    def keep_prompt_scores(self, rows: PartRows) -> bool:
        """Keep the scores of prompt tokens that a pass has read; return whether they are finite."""
        if self.has_started or not self.request.prompt_logprobs:
            return True
        if self.request.experts:
            self._experts += [rows.experts(token) for token in range(rows.part.count)]
        # The tokens after those that were read; after the last comes the first that is drawn.
        first = self.text.cache.length - rows.part.count + 1
        log_probs = rows.log_probs(self.ids[first : first + rows.part.count])
        if not np.isfinite(log_probs).all():
            return False
        self._log_probs += log_probs
        self._tops += [rows.top(row, self.request.logprobs) for row in range(len(log_probs))]
        return True

    def started(self) -> Started:
        """Return the event that the prompt has been read."""
        self.has_started = True
        if self.sampling.max_new_tokens == 0:
            self.end = Finished("length")
        scores = None
        if self.request.prompt_logprobs:
            experts = self._experts if self.request.experts else None
            scores = PromptScores(self._log_probs, self._tops, experts)
        return Started(self.num_prompt, self.num_reused, scores)

    # ------------------------------------------------------------------------------------- drawing
    @property
    def draws_like(self) -> tuple[float, int, float, float, float, tuple[int, ...]]:
        """Return the settings that answers must share to be drawn together."""
        s = self.sampling
        return s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.stop_ids

    def prepare_drawing(
        self,
        banned_ids: Sequence[int],
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        """Say how this answer's tokens are drawn. generators: those of all rows."""
        self.drawing = Drawing(*self.draws_like, banned_ids, generators, device)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return this answer's own chance."""
        return torch.Generator(device).manual_seed(self.sampling.seed)

    def take(self, token: int) -> None:
        """Append a drawn token, and note whether it is the last."""
        self.ids.append(token)
        self.num_drawn += 1
        if token in self.sampling.stop_ids:
            self.end = Finished("stop")
        elif self.num_drawn == self.sampling.max_new_tokens:
            self.end = Finished("length")
        elif len(self.ids) > self.context and self.sampling.when_full == "stop":
            self.end = Finished("length", f"the context of {self.context} tokens is full")

    @property
    def reads_drawn(self) -> bool:
        """Return whether a drawn token waits for its experts: if it is going to be read."""
        return self.request.experts and (self.end is None or len(self.ids) <= self.context)


class PartRows:
    """What a pass gave one part, of which rows and tokens begin at some number.

    banned: ids that no list of the most likely has.
    """

    def __init__(self, part: Part, reading: Reading, row: int, token: int, banned: frozenset[int]):
        self.part, self._reading, self._row, self._token = part, reading, row, token
        self._banned = banned

    @property
    def last_row(self) -> int:
        """Return the number in the pass of the row after the part's last token."""
        return self._row + len(self.part.rows) - 1

    def log_probs(self, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of an id in each of the part's first rows, in nats."""
        return self._log_probs(range(len(tokens)), tokens)

    def log_prob(self, row: int, token: int) -> float:
        """Return the log-probability of an id in one of the part's rows, in nats."""
        return self._log_probs([row], [token])[0]

    def _log_probs(self, rows: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Add to the best id's what the logits differ by, in float64: exact, in any company."""
        r = self._reading
        assert r.best_R is not None and r.best_log_probs_R is not None
        rows_M = self._row + np.asarray(rows, dtype=np.int64)
        best_M = np.asarray(r.best_R[rows_M], dtype=np.int64)
        ids_M2 = np.stack([best_M, np.asarray(tokens, dtype=np.int64)], axis=1)
        device = r.logits_RV.device
        where = torch.from_numpy(rows_M)[:, None].to(device), torch.from_numpy(ids_M2).to(device)
        logits_M2 = on_host(r.logits_RV[where])
        return (logits_M2[:, 1] - logits_M2[:, 0] + r.best_log_probs_R[rows_M]).tolist()

    def top(self, row: int, count: int | None) -> Top | None:
        """Return the most likely ids of one of the part's rows; None if not asked for."""
        if count is None:
            return None
        if count == 0:
            return []
        best_R = self._reading.best_R
        assert best_R is not None
        best = int(best_R[row + self._row])
        if count == 1 and best not in self._banned:
            return [(best, self.log_prob(row, best))]
        logits_V = self._reading.logits_RV[row + self._row].float()
        logits = logits_V.cpu().numpy().copy()
        logits[list(self._banned)] = -np.inf
        count = min(count, len(logits))
        least = np.partition(logits, -count)[-count]
        # Equal ones at the end may be more than there is room for: the lowest ids stay.
        candidates = np.flatnonzero((logits >= least) & (logits > -np.inf))
        ids = candidates[np.argsort(-logits[candidates], kind="stable")][:count].tolist()
        return list(zip(ids, self._log_probs([row] * len(ids), ids), strict=True))

    def experts(self, token: int) -> Experts:
        """Return where one of the part's tokens was sent."""
        r = self._reading
        assert r.experts_LNK is not None and r.weights_LNK is not None
        token += self._token
        return Experts(r.experts_LNK[:, token].tolist(), r.weights_LNK[:, token].tolist())
