"""The calls that Open WebUI makes of a connection of type OpenAI, answered.

Its server makes them (backend/open_webui/routers/openai.py and tasks.py), with aiohttp: a list of
models, chats that stream, and tasks such as titles that do not. The texts are ours.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from tests.builders_server import BYTE, DEFAULTS, FakeEngine, Live, events_of, live, served_of

KEY = "sk-of-the-connection"
# aiohttp's own, the key's, and those of ENABLE_FORWARD_USER_INFO_HEADERS: values are quoted.
HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate, br, zstd",
    "User-Agent": "Python/3.11 aiohttp/3.14.5",
    "Authorization": f"Bearer {KEY}",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Zo%C3%AB%20Ann",
    "X-OpenWebUI-User-Id": "3f2a9c1e-0d4b-4c55-8a52-1f0c6f6a77aa",
    "X-OpenWebUI-User-Email": "zoe@box.example",
    "X-OpenWebUI-User-Role": "admin",
    "X-OpenWebUI-Chat-Id": "b7a1d5d0-63c2-4b8c-9a39-6a3b1c7f2e10",
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": [{"type": "text", "text": "A cat?"}]},
]
# A chat as it is forwarded, with the settings of its side panel.
CHAT: dict[str, Any] = {
    "model": "toy",
    "messages": MESSAGES,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 4,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "seed": 42,
    "stop": ["\nUser:"],
}
# What its versions, filters and pipes leave in a body.
LEFT = {
    "chat_id": "b7a1d5d0-63c2-4b8c-9a39-6a3b1c7f2e10",
    "id": "4c1b",
    "session_id": "Qx3v",
    "tool_ids": [],
    "tools": [],
    "files": None,
    "features": {"web_search": False, "image_generation": False, "code_interpreter": False},
    "variables": {"{{USER_NAME}}": "Zo\u00eb", "{{CURRENT_DATE}}": "2026-11-29"},
    "background_tasks": {"title_generation": True, "tags_generation": True},
    "metadata": {"task": "title_generation"},
    "num_ctx": 2048,
    "keep_alive": "5m",
}
TITLE: dict[str, Any] = {
    "model": "toy",
    "messages": [{"role": "user", "content": "Give a title, as JSON."}],
    "stream": False,
}


@pytest.fixture(scope="module")
def server():
    with live(
        served_of(FakeEngine(BYTE.encode(" cat")), plain_chat=True), key=KEY.encode()
    ) as running:
        yield running


def post(server: Live, body: dict[str, Any], headers: dict[str, str] = HEADERS):
    return server.ask("/v1/chat/completions", body, headers=headers)


def test_the_models_are_listed(server):
    status, headers, data = server.ask("/v1/models", headers=HEADERS)
    assert status == 200 and headers["Content-Encoding"] is None
    found = json.loads(data)
    # Its list is made of these three.
    (model,) = found["data"]
    assert found["object"] == "list" and (model["id"], model["object"]) == ("toy", "model")
    assert isinstance(model["owned_by"], str)


@pytest.mark.parametrize("left", [{}, LEFT], ids=["plain", "with what is left in"])
def test_a_chat_streams_with_its_usage(server, left):
    """It forwards the stream as it is, and its page reads `choices`, `delta` and `usage`."""
    status, headers, data = post(server, CHAT | left)
    assert status == 200, data
    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["Content-Encoding"] is None and headers["X-Accel-Buffering"] == "no"
    *chunks, usage, done = events_of(data)
    assert done == "[DONE]" and usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks)
    assert text == " cat" and chunks[-1]["choices"][0]["finish_reason"] == "length"
    ignored = headers["X-Gptoss-Ignored"]
    unread = [name for name in left if name not in ("tools", "metadata")]
    assert ignored == (", ".join(unread) or None)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_title_comes_whole(server, name):
    """Tasks ask without a stream; what kind of model it is decides the name of the limit."""
    status, headers, data = post(server, TITLE | {name: 3, "metadata": {"task": "title"}})
    assert status == 200 and headers["Content-Type"] == "application/json"
    (choice,) = json.loads(data)["choices"]
    assert choice["message"]["content"] == " ca"


def test_a_title_that_is_longer_than_the_context_needs_two_flags(server):
    """It asks for up to 1,000 tokens, whatever the context: docs/serving.md names the flags."""
    body = TITLE | {"max_completion_tokens": 1_000}
    status, _, data = post(server, body)
    assert status == 400 and json.loads(data)["error"]["param"] == "max_completion_tokens"
    slides = served_of(
        FakeEngine(BYTE.encode(" cat")),
        plain_chat=True,
        defaults=DEFAULTS | {"when_full": "slide"},
        max_new_tokens=1_000,
    )
    with live(slides) as running:
        assert post(running, body)[0] == 200


def test_an_error_is_a_text_that_it_can_show(server):
    """It shows `error.message` of what it gets; a picture is what people send that we cannot."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}
    status, _, data = post(server, CHAT | {"messages": [message]})
    assert status == 400 and "parts of type text" in json.loads(data)["error"]["message"]
    # The connection's key is empty until someone fills it in: then it is sent all the same.
    status, _, data = post(server, CHAT, HEADERS | {"Authorization": "Bearer "})
    assert status == 401 and "Authorization: Bearer KEY" in json.loads(data)["error"]["message"]
