"""What a request may say, and how it is told what is wrong: parsing alone, without a server."""

from __future__ import annotations

import dataclasses
import json
import random
import typing

import pytest

from config_model import PredictConfig
from runtime.serving.errors import ApiError, short
from runtime.serving.fields import (
    NEUTRAL,
    NO_EFFECT,
    ChatFields,
    CompletionFields,
    kind_of,
    parse,
)
from runtime.serving.json_body import read_object, write_json
from runtime.serving.openapi import document, schema_of

BOTH = (CompletionFields, ChatFields)


def refusal(function, *args) -> ApiError:
    with pytest.raises(ApiError) as raised:
        function(*args)
    return raised.value


def options(fields) -> dict[str, tuple[type, typing.Any]]:
    hints = typing.get_type_hints(fields)
    return {f.name: (kind_of(hints[f.name]), f.metadata) for f in dataclasses.fields(fields)}


@pytest.mark.parametrize("fields", BOTH)
def test_every_field_refuses_another_type_and_names_itself(fields):
    for name, (kind, _) in options(fields).items():
        wrong: list = [{"a": 1}, [[1]], [1]]
        wrong += ["x"] if kind not in (str, tuple) else [3]
        wrong += [True] if kind is not bool else [1]
        wrong += [1.5] if kind is int else []
        for value in wrong:
            error = refusal(parse, fields, {name: value})
            assert (error.status, error.param) == (400, name), (name, value)
            assert name in error.message and "\n" not in error.message
            assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("fields", BOTH)
def test_every_range_is_the_options_and_holds_at_both_ends(fields):
    """Ranges stand in one place: the flags of predict.py, --help, /openapi.json and the API."""
    checked = 0
    for name, (kind, limits) in options(fields).items():
        for end, step in (("minimum", -1), ("maximum", 1)):
            if limits[end] is None or kind not in (int, float):
                continue
            inside, outside = kind(limits[end]), kind(limits[end]) + step * max(1, limits[end])
            assert getattr(parse(fields, {name: inside})[0], name) == inside
            assert refusal(parse, fields, {name: outside}).param == name
            checked += 1
        if limits["choices"]:
            assert refusal(parse, fields, {name: "another"}).param == name
            checked += 1
    assert checked > 15
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        assert dict(options(fields)[name][1]) == dict(
            PredictConfig.__dataclass_fields__[name].metadata
        )


def test_whole_numbers_may_come_as_floats_and_null_counts_as_absent():
    """JavaScript has one kind of number, and some clients send every field, null where unset."""
    found, unknown = parse(CompletionFields, {"top_k": 50.0, "max_tokens": 3.0, "temperature": 1})
    assert (found.top_k, found.max_tokens, found.temperature) == (50, 3, 1.0) and not unknown
    assert type(found.top_k) is int and type(found.temperature) is float
    nothing = dict.fromkeys(options(CompletionFields))
    assert parse(CompletionFields, nothing)[0] == CompletionFields()
    assert refusal(parse, CompletionFields, {"temperature": 10**400}).param == "temperature"
    # More than all tokens is all tokens.
    assert parse(CompletionFields, {"top_k": 10**4000})[0].top_k == 10**4000


def test_stop_is_a_text_or_a_list_of_texts():
    assert parse(CompletionFields, {"stop": "x"})[0].stop == ("x",)
    assert parse(CompletionFields, {"stop": ["x", "y\ud800"]})[0].stop == ("x", "y\ufffd")
    for wrong in (["x"] * 65, "x" * 501, [None], {"a": 1}, 7):
        assert refusal(parse, CompletionFields, {"stop": wrong}).param == "stop"


@pytest.mark.parametrize("fields", BOTH)
def test_what_is_not_honoured_is_refused_by_name_and_neutral_values_pass(fields):
    """A client that asks for JSON or tools must not get text that looks like an answer to that."""
    asks = {
        "tools": [{"type": "function"}],
        "functions": [{}],
        "tool_choice": "required",
        "function_call": {"name": "f"},
        "logit_bias": {"50256": -100},
        "response_format": {"type": "json_object"},
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "suffix": "the end",
        "best_of": 3,
        "modalities": ["text", "audio"],
        "audio": {"voice": "a"},
        "prediction": {"type": "content"},
        "web_search_options": {"a": 1},
        "min_tokens": 4,
        "ignore_eos": True,
        "stop_token_ids": [1],
        "bad_words": ["x"],
        "use_beam_search": True,
        "length_penalty": 2.0,
        "guided_json": {"type": "object"},
        "guided_regex": "a+",
        "guided_choice": ["a"],
        "guided_grammar": "root",
        "structured_outputs": {"json": {}},
        "add_generation_prompt": False,
        "continue_final_message": True,
        "include_stop_str_in_output": True,
        "truncate_prompt_tokens": 5,
        "prompt_embeds": "AAAA",
        "prompt_logprobs": 0,
        "chat_template": "{{ messages }}",
        "documents": [{"text": "x"}],
        "echo": True,
    }
    assert asks.keys() == NEUTRAL.keys()
    for name, value in asks.items():
        if name in options(fields):
            continue
        error = refusal(parse, fields, {name: value})
        assert (error.status, error.param) == (400, name)
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
        "response_format": {"type": "text"},
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "best_of": 1,
        "suffix": None,
        "ignore_eos": False,
        "add_generation_prompt": True,
    }
    assert parse(fields, neutral | dict.fromkeys(NO_EFFECT, "x")) == (fields(), [])
    # False is no zero, and true no one.
    assert refusal(parse, fields, {"presence_penalty": False}).param == "presence_penalty"
    assert refusal(parse, fields, {"best_of": True}).param == "best_of"


def test_messages_are_in_the_words_of_json():
    """Python's words were told to all clients: of type int, NoneType None, list [...]."""
    for fields, name, value, says in (
        (CompletionFields, "max_tokens", "5", 'max_tokens must be an integer, not "5"'),
        (CompletionFields, "n", 1.5, "n must be an integer, not 1.5"),
        (CompletionFields, "temperature", True, "temperature must be a number, not true"),
        (CompletionFields, "temperature", [1], "temperature must be a number, not [1]"),
        (CompletionFields, "model", 3, "model must be a text, not 3"),
        (ChatFields, "logprobs", 1, "logprobs must be true or false, not 1"),
        (ChatFields, "tools", [{"a": None}], 'tools [{"a": null}] is not supported: leave it out'),
        (ChatFields, "temperature", 10**400, "temperature is too large: 1" + "0" * 56 + "..."),
    ):
        error = refusal(parse, fields, {name: value})
        assert (error.message, error.param) == (says, name)
    assert refusal(read_object, b"null").message == "the body must be a JSON object, not null"
    nested: list = []
    for _ in range(5_000):
        nested = [nested]
    assert "nested deeply" in refusal(parse, ChatFields, {"n": nested}).message


def test_unknown_names_are_listed():
    assert parse(CompletionFields, {"mirostat": 2, "top_k": 1, "typical_p": 1})[1] == [
        "mirostat",
        "typical_p",
    ]


def test_an_error_line_is_short_and_visible():
    """What a client sent is quoted in the message: it must not fill a log or move a cursor."""
    error = refusal(parse, CompletionFields, {"when_full": "\x1b[2J" + "x" * 100_000})
    assert len(error.message) <= 400 and "\x1b" not in error.message
    assert short("a\nb\u202ec") == "a b\\u202ec"


# ------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"{}{}",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": ' + b"9" * 4_301 + b"}",
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
        b"{'a': 1}",
        b'{"a": 01}',
        b'{"a": "\x00"}',
    ],
    ids=range(19),
)
def test_a_body_that_is_no_plain_json_object_is_refused_in_a_line(body):
    error = refusal(read_object, body)
    assert error.status == 400 and len(error.message) <= 400


def test_an_integer_that_is_too_long_is_told_in_our_own_line():
    """Python's line told the client to call sys.set_int_max_str_digits."""
    for digits in (401, 5_000, 500_000):
        error = refusal(read_object, b'{"seed": -' + b"9" * digits + b"}")
        assert "digits, and 400 are read" in error.message and "sys" not in error.message
    assert read_object(b'{"seed": ' + b"9" * 400 + b"}")["seed"] == 10**400 - 1
    assert 'name "a" is there twice' in refusal(read_object, b'{"a": 1, "a": 2}').message


def test_json_of_a_stranger_is_read_and_written_back_whole():
    assert read_object(b'{"a": 1e999}')["a"] == float("inf")
    # A lone surrogate, which UTF-8 cannot hold, and a pair, which it can.
    read = read_object(b'{"a": "\\ud800x", "b": "\\ud83d\\ude00"}')
    assert read == {"a": "\ufffdx", "b": "\U0001f600"}
    r = random.Random(0)
    for _ in range(200):
        text = "".join(chr(r.choice([r.randrange(0xD800), 0x2028, 0x85])) for _ in range(9))
        written = write_json({"a": text})
        assert json.loads(written) == {"a": text}
        # Python's splitlines, which clients use on streams, finds one line.
        assert len(written.decode("ascii").splitlines()) == 1
    with pytest.raises(ValueError):
        write_json(float("nan"))


# ---------------------------------------------------------------------------------------- openapi
def test_the_document_has_every_option_with_its_range_and_help():
    for fields in BOTH:
        schema = schema_of(fields)
        for name, (kind, limits) in options(fields).items():
            told = schema["properties"][name]
            assert told["description"] == limits["help"]
            if kind in (int, float):
                assert told.get("minimum") == limits["minimum"]
                assert told.get("maximum") == limits["maximum"]
    body = document("1", True, 72)["paths"]["/v1/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"] and "echo" in schema["properties"]
    assert schema["properties"]["n"]["maximum"] == 72
    assert document("1", True, 72)["security"] == [{"key": []}]
    assert "security" not in document("1", False, 72)
    json.dumps(document("1", True, 72), allow_nan=False)
