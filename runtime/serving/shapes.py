"""The JSON of answers: OpenAI's shapes, whole or in chunks, and what we add to them.

Added: `seed` and, if asked for, `token_ids`, `top_tokens` and `experts` of a choice. In `experts`,
ids and weights are [tokens][blocks][top k], strongest first. In `top_tokens`, each of a token's
most likely ones is [id, text, log-probability].
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from runtime.data.tokenizer import Tokenizer
from runtime.serving.answers import Answer, Delta, Entry, usage_of
from runtime.serving.asking import Asking
from runtime.serving.served import Served

# JSON has no infinity. OpenAI's and vLLM's number for it.
LEAST_LOG_PROB = -9999.0


class Shapes:
    """The JSON of one request's answers."""

    def __init__(self, asking: Asking, served: Served):
        self.asking, self.served = asking, served
        self.is_chat = asking.kind == "chat"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self.id, self.created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())

    # ------------------------------------------------------------------------------ whole
    def whole(self, answers: Sequence[Answer], deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the answer that is not streamed. deltas: of each answer, all its deltas joined."""
        choices = []
        for index, delta in enumerate(deltas):
            choice = self._choice(index, delta)
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": delta.text, "refusal": None}
            else:
                choice["text"] = delta.text
            choices.append(choice)
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._around(kind, choices) | {"usage": self.usage(answers)}

    # ----------------------------------------------------------------------------- chunks
    def chunk(self, index: int, delta: Delta, is_first: bool = False) -> dict[str, Any]:
        """Return a part of a streamed answer. is_first: that says whose message it is."""
        choice = self._choice(index, delta)
        if self.is_chat:
            said: dict[str, Any] = {"role": "assistant"} if is_first else {}
            if is_first or delta.text:
                said["content"] = delta.text
            choice["delta"] = said
        else:
            choice["text"] = delta.text
        chunk = self._around(self._chunk_kind(), [choice])
        return chunk | ({"usage": None} if self.asking.include_usage else {})

    def last_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the chunk of the usage, which has no choices."""
        return self._around(self._chunk_kind(), []) | {"usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return usage_of(answers, self.asking.num_per_prompt)

    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _around(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "seed": self.asking.seed,
            "choices": choices,
        }

    def _choice(self, index: int, delta: Delta) -> dict[str, Any]:
        asking, tokenizer = self.asking, self.served.tokenizer
        choice: dict[str, Any] = {
            "index": index,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "seed": asking.jobs[index].request.sampling.seed,
        }
        if asking.top is not None:
            shape = chat_logprobs if self.is_chat else text_logprobs
            choice["logprobs"] = shape(delta.entries, tokenizer)
        if asking.token_ids:
            choice["token_ids"] = [entry.id for entry in delta.entries]
            if asking.top is not None:
                # Of tokens with the same text, only an id says which it was.
                choice["top_tokens"] = [
                    [[i, token_text(i, tokenizer), finite(p)] for i, p in entry.top or ()]
                    for entry in delta.entries
                ]
        if asking.experts:
            # A last token that the context had no room to read has none.
            known = [entry.experts for entry in delta.entries]
            choice["experts"] = {
                "ids": [experts and experts.ids for experts in known],
                "weights": [experts and experts.weights for experts in known],
            }
        return choice


# ------------------------------------------------------------------------------------ log-probs
def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    r"""Return a token's text; bytes that are no whole characters as OpenAI spells them: bytes:\xc3.

    So different tokens keep different texts.
    """
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def finite(log_prob: float | None) -> float | None:
    """Return a log-probability as JSON can hold it."""
    return log_prob if log_prob is None or math.isfinite(log_prob) else LEAST_LOG_PROB


def text_logprobs(entries: Sequence[Entry], tokenizer: Tokenizer) -> dict[str, list]:
    """Return the log-probabilities of /v1/completions: lists by token.

    The first token of a prompt has none. The most likely ones come with the token itself.
    """
    return {
        "tokens": [token_text(entry.id, tokenizer) for entry in entries],
        "token_logprobs": [finite(entry.log_prob) for entry in entries],
        "top_logprobs": [_top_by_text(entry, tokenizer) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top_by_text(entry: Entry, tokenizer: Tokenizer) -> dict[str, float | None] | None:
    """Return the most likely tokens and the token itself, which keeps its text, by their texts.

    Another id with a text that is taken is called token_id:ID, vLLM's name for it.
    """
    if entry.log_prob is None:
        return None
    own = token_text(entry.id, tokenizer)
    found: dict[str, float | None] = {}
    for i, log_prob in entry.top or []:
        text = token_text(i, tokenizer)
        if i != entry.id and (text == own or text in found):
            text = f"token_id:{i}"
        found[text] = finite(log_prob)
    found.setdefault(own, finite(entry.log_prob))
    return found


def chat_logprobs(entries: Sequence[Entry], tokenizer: Tokenizer) -> dict[str, list]:
    """Return the log-probabilities of a chat: objects by token, without the one that ends it."""

    def told(token_id: int, log_prob: float | None) -> dict[str, Any]:
        return {
            "token": token_text(token_id, tokenizer),
            "logprob": finite(log_prob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            told(entry.id, entry.log_prob)
            | {"top_logprobs": [told(*pair) for pair in entry.top or []]}
            for entry in entries
            if not entry.is_stop
        ],
        "refusal": [],
    }
