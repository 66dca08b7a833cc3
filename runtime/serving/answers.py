"""An answer while it grows: the engine's tokens become text, which may end at a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.base.text import UntilText
from runtime.data.tokenizer import Tokenizer, TokenStream
from runtime.serving.asking import Asking, Job
from runtime.serving.request import Experts, Finished, Started, Token, Top


@dataclass(frozen=True)
class Entry:
    """A token as it is told. offset: characters of the answer's text before it."""

    id: int
    offset: int
    log_prob: float | None = None
    top: Top | None = None
    experts: Experts | None = None
    # A token that ends an answer is no text.
    is_stop: bool = False


@dataclass
class Delta:
    """What an event adds to an answer."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    # Of an answer's last: stop or length.
    finish_reason: str | None = None


class Answer:
    """One answer: feed it the engine's events in order.

    is_done: nothing more comes. If that is not the engine's doing, a stop text came: cancel it.
    """

    def __init__(self, asking: Asking, job: Job, tokenizer: Tokenizer):
        self.asking, self.job, self.tokenizer = asking, job, tokenizer
        self.stream, self.until = TokenStream(tokenizer), UntilText(asking.stops)
        self.stop_ids = frozenset(job.request.sampling.stop_ids)
        self.num_characters = 0
        self.num_tokens = self.num_reused = 0
        self.is_done = False

    def take(self, event: Started | Token | Finished) -> Delta:
        """Return what an event adds. Nothing after a stop text counts."""
        if self.is_done:
            return Delta()
        if isinstance(event, Started):
            self.num_reused = event.num_reused_tokens
            return self._prompt(event) if self.asking.echo else Delta()
        if isinstance(event, Token):
            return self._token(event)
        self.is_done = True
        return self._end(event.reason)

    def _token(self, token: Token) -> Delta:
        self.num_tokens += 1
        is_stop = token.id in self.stop_ids
        entry = Entry(
            token.id, self.num_characters, token.log_prob, token.top, token.experts, is_stop
        )
        if is_stop:
            return Delta(entries=[entry])
        text = self.stream.push(token.id)
        self.num_characters += len(text)
        piece, stopped = self.until.push(text)
        self.is_done = stopped
        return Delta(piece, [entry], "stop" if stopped else None)

    def _end(self, reason: str) -> Delta:
        """Return what waited for the rest of a character, or of a stop text: it is text now."""
        piece, stopped = self.until.push(self.stream.flush())
        piece += "" if stopped else self.until.held
        return Delta(piece, [], "stop" if stopped or reason == "stop" else "length")

    def _prompt(self, started: Started) -> Delta:
        """Return the prompt's text and tokens, without a start token that the client did not send.

        The answer continues its last character.
        """
        hidden, ids, scores = self.job.num_hidden, self.job.request.ids, started.scores
        delta = Delta()
        for t, token_id in enumerate(ids):
            if t < hidden:
                continue
            log_prob, top, experts = None, None, None
            if scores is not None:
                log_prob, top = scores.log_probs[t], scores.tops[t]
                experts = scores.experts[t] if scores.experts else None
            delta.entries.append(Entry(token_id, self.num_characters, log_prob, top, experts))
            text = self.stream.push(token_id)
            self.num_characters += len(text)
            delta.text += text
        return delta


def usage_of(answers: Sequence[Answer], num_per_prompt: int) -> dict:
    """Return the tokens of a request: each prompt once, as its first answer read it; all answers.

    The others of a prompt read it from the first one's cache: that saves the client nothing more.
    """
    firsts = answers[::num_per_prompt]
    prompt = sum(len(answer.job.request.ids) for answer in firsts)
    new = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(a.num_reused for a in firsts)},
    }
