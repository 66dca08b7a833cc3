"""/openapi.json, made of the same `option(...)` fields that parse requests."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from runtime.data.chat import ROLES
from runtime.serving.fields import (
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    TokenizeFields,
    kind_of,
)

TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
TEXT = {"type": "string"}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPT = {
    "description": "a text, token ids, or a list of either",
    "anyOf": [
        TEXT,
        IDS,
        {"type": "array", "items": TEXT, "minItems": 1},
        {"type": "array", "items": IDS, "minItems": 1},
    ],
}
PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["text"]}, "text": TEXT},
        "required": ["type", "text"],
    },
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": {"enum": list(ROLES)}, "content": {"anyOf": [TEXT, PARTS]}},
        "required": ["role", "content"],
    },
}
STREAM_OPTIONS = {
    "type": "object",
    "description": "with stream true",
    "properties": {"include_usage": {"type": "boolean", "description": "end with the usage"}},
}
ERRORS = {
    "400": "a field is wrong: param names it",
    "401": "the key is missing or wrong",
    "403": "Host or Origin is not allowed",
    "404": "there is no such model or route",
    "413": "the body is too large",
    "415": "the body is not plain JSON",
    "429": "the queue is full: ask again after Retry-After seconds",
    "500": "the model's numbers are not finite",
    "503": "the server is loading or shutting down, or its engine has stopped",
}


def schema_of(fields: type, **more: Any) -> dict[str, Any]:
    """Return the JSON schema of a request body: a dataclass of options, and fields of their own."""
    hints = typing.get_type_hints(fields)
    properties: dict[str, Any] = {}
    for f in dataclasses.fields(fields):
        about = {"description": f.metadata["help"]}
        if f.default not in (None, ()):
            about["default"] = f.default
        properties[f.name] = about | _range(kind_of(hints[f.name]), f.metadata)
    return {"type": "object", "properties": properties | more}


def _range(kind: type, limits: Any) -> dict[str, Any]:
    """Return the type and the range of an option."""
    if kind is tuple:
        text = {"type": "string", "maxLength": MOST_STOP_CHARACTERS}
        return {"anyOf": [text, {"type": "array", "items": text, "maxItems": MOST_STOPS}]}
    found: dict[str, Any] = {"type": TYPES[kind]}
    names = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum"}
    found |= {said: limits[name] for name, said in names.items() if limits[name] is not None}
    if limits["choices"] is not None:
        found["enum"] = list(limits["choices"])
    return found


def document(version: str, has_key: bool, most_choices: int) -> dict[str, Any]:
    """Return the document. has_key: whether the server asks for one. most_choices: of n."""
    completion = schema_of(CompletionFields, prompt=PROMPT, stream_options=STREAM_OPTIONS)
    chat = schema_of(ChatFields, messages=MESSAGES, stream_options=STREAM_OPTIONS)
    for schema in (completion, chat):
        schema["properties"]["n"]["maximum"] = most_choices
    tokenize = schema_of(TokenizeFields, prompt=TEXT, messages=MESSAGES)
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    detokenize = schema_of(DetokenizeFields, tokens=ids)
    model = {"name": "id", "in": "path", "required": True, "schema": TEXT}
    named = {"name": "model", "in": "query", "schema": TEXT}
    paths = {
        "/v1/completions": {"post": _post("continue a prompt", completion, ["prompt"], True)},
        "/v1/chat/completions": {"post": _post("answer a chat", chat, ["messages"], True)},
        "/v1/models": {"get": _get("all models")},
        "/v1/models/{id}": {"get": _get("one model", [model])},
        "/tokenize": {"post": _post("a text's token ids", tokenize, [])},
        "/detokenize": {"post": _post("the text of token ids", detokenize, ["tokens"])},
        "/tokenizer_info": {"get": _get("the tokenizer's special tokens", [named])},
        "/metrics": {"get": _get("counts and times for Prometheus", kind="text/plain")},
        # The one that needs no key.
        "/health": {"get": _get("whether requests are answered") | {"security": []}},
        "/openapi.json": {"get": _get("this document")},
    }
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "gptoss", "version": version},
        "paths": paths,
    }
    if has_key:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
    return found


def _responses(kinds: list[str]) -> dict[str, Any]:
    content: dict[str, dict] = {kind: {} for kind in kinds}
    error = {"application/json": {"schema": {"type": "object", "required": ["error"]}}}
    return {"200": {"description": "the answer", "content": content}} | {
        status: {"description": text, "content": error} for status, text in ERRORS.items()
    }


def _get(summary: str, parameters: list | None = None, kind: str = "application/json") -> dict:
    return {"summary": summary, "parameters": parameters or [], "responses": _responses([kind])}


def _post(summary: str, schema: dict, required: list[str], streams: bool = False) -> dict:
    kinds = ["application/json"] + (["text/event-stream"] if streams else [])
    body = schema | ({"required": required} if required else {})
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": _responses(kinds),
    }
