"""POST /tokenize and /detokenize, GET /tokenizer_info: vLLM's shapes, which lm-eval asks for."""

from __future__ import annotations

from typing import Any

from runtime.data.chat_template import find_source
from runtime.data.tokenizer import NoTokenizer, Tokenizer
from runtime.serving.asking import check_ids
from runtime.serving.chat import chat_ids, messages_of
from runtime.serving.errors import refused, told
from runtime.serving.fields import DetokenizeFields, TokenizeFields, parse, without
from runtime.serving.served import Served
from runtime.serving.shapes import token_text


def tokenize(body: dict[str, Any], served: Served) -> tuple[dict[str, Any], list[str]]:
    """Return the ids of a text or of messages, and unknown names. Raise ApiError.

    A special token's spelling alone is that token: clients find ids of their stop tokens so.
    """
    fields, unknown = parse(TokenizeFields, without(body, "prompt", "messages"))
    prompt = body.get("prompt")
    if body.get("messages") is not None:
        if prompt is not None:
            raise refused("prompt", "give either prompt or messages, not both")
        ids = list(chat_ids(messages_of(body["messages"]), served))
    elif isinstance(prompt, str):
        ids = _text_ids(prompt, served, fields.add_special_tokens)
    else:
        raise refused("prompt", f"prompt must be a text, not {told(prompt)}")
    texts = [token_text(i, served.tokenizer) for i in ids] if fields.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": served.context_length, "tokens": ids}
    return answer | {"token_strs": texts}, unknown


def _text_ids(text: str, served: Served, with_start: bool) -> list[int]:
    tokenizer = served.tokenizer
    if not isinstance(tokenizer, NoTokenizer) and text in tokenizer.special_tokens:
        return [tokenizer.special_tokens[text]]
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise refused("prompt", str(error)) from None
    start = [tokenizer.start_id] if with_start and tokenizer.start_id is not None else []
    return start + ids


def detokenize(body: dict[str, Any], served: Served) -> tuple[dict[str, Any], list[str]]:
    """Return the text of token ids, and unknown names. Raise ApiError."""
    _, unknown = parse(DetokenizeFields, without(body, "tokens"))
    tokens = body.get("tokens")
    if not isinstance(tokens, list):
        raise refused("tokens", f"tokens must be a list of token ids, not {told(tokens)}")
    ids = check_ids(served, tokens, "tokens")
    return {"prompt": served.tokenizer.decode(ids)}, unknown


def tokenizer_info(served: Served) -> dict[str, Any]:
    """Return the special tokens, and the chat template of a published model."""
    tokenizer = served.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "name": tokenizer.name,
        "fingerprint": None if isinstance(tokenizer, NoTokenizer) else tokenizer.fingerprint,
        "vocab_size": tokenizer.vocabulary_size,
        "model_max_length": served.context_length,
        "bos_token": _spelled(tokenizer, tokenizer.start_id),
        "eos_token": _spelled(tokenizer, tokenizer.eos_id),
        "pad_token": None,
        "chat_template": find_source(tokenizer) or None,
    }


def _spelled(tokenizer: Tokenizer, token_id: int | None) -> str | None:
    return None if token_id is None else token_text(token_id, tokenizer)
