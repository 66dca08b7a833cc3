"""A stand-in for the server, for tests of its page: it streams made answers in the API's shapes."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from runtime.serving.page import serve_page
from tests.chromium import Browser, Page

BLOCKS, EXPERTS, TOP_K = 4, 8, 2
CONTEXT = 256
CARD = {
    "id": "stories",
    "object": "model",
    "max_model_len": CONTEXT,
    "max_new_tokens": CONTEXT,
    "batch_invariant": True,
    "has_chat_template": False,
    "plain_chat": False,
    "num_experts": EXPERTS,
    "sampling_defaults": {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "when_full": "stop",
    },
}
STORY = (
    " there was a little girl named Lily. She had a red ball, and she liked to throw it high up"
    " in the air.\n\nOne day the ball did not come down. It sat in a tall tree. \u201cOh no!\u201d"
    " said Lily. A small bird heard her, and it pushed the ball with its head. The ball fell down,"
    " and they played until the sun went to bed."
)

# Each would set window.pwned, leave the page or hide a line, if it were more than text.
HOSTILE = (
    "</script><img src=x onerror=\"window.pwned='image'\">",
    "<script>window.pwned='script'</script>",
    "<!--<script>",
    "javascript:window.pwned='url'",
    "'\"><svg onload=window.pwned='svg'>",
    "<style>body{display:none}</style>}body{display:none}",
    "url(http://192.0.2.1/x) @import 'http://192.0.2.1/x';",
    "[a](javascript:window.pwned=1) ![b](http://192.0.2.1/b.png)",
    "\u202eevil\u2066\u0000\u001b[31m\r",
    "\ud800",
    "__proto__",
    "constructor",
    "${window.pwned=1} %%{data}",
    "x" * 100_000,
)
BUSY = "document.querySelector('.busy')"


def split(text: str) -> list[str]:
    """Return a text in tokens: a word with the blank before it, or a single mark or newline."""
    tokens: list[str] = []
    for character in text:
        if tokens and character.isalpha() and (tokens[-1] == " " or tokens[-1][-1].isalpha()):
            tokens[-1] += character
        else:
            tokens.append(character)
    return tokens


@dataclass
class Vocabulary:
    """Ids of tokens, given out as tokens come."""

    ids: dict[str, int] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        return [self.ids.setdefault(token, len(self.ids)) for token in split(text)]

    def id(self, token: str) -> int:
        return self.ids.setdefault(token, len(self.ids))

    def decode(self, ids: list[int]) -> str:
        names = list(self.ids)
        return "".join(names[i] for i in ids)


@dataclass
class Standin:
    """What the server has and does.

    answer: from a request's body to the answer's tokens. gap: seconds between them. fail: answers
    with errors before the next good one: (status, headers). key: what requests must bring.
    """

    cards: list[dict] = field(default_factory=lambda: [dict(CARD)])
    answer: Callable[[dict], list[str]] = lambda body: split(STORY)
    gap: float = 0.0
    fail: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    key: str = ""
    # A raw event that comes after so many tokens, instead of the rest. None: the machine is gone.
    breaks: tuple[int, bytes | None] | None = None
    # Tokens that add another text than their own: parts of a character.
    texts: dict[str, str] = field(default_factory=dict)
    # Whether each event comes in two pieces, cut wherever its middle is.
    halves: bool = False
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    # (path, body) of each request of JSON, in order.
    asked: list[tuple[str, dict]] = field(default_factory=list)
    # Answers whose client went before their end.
    gone: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def bodies(self, path: str = "/v1/completions") -> list[dict]:
        with self.lock:
            return [body for one, body in self.asked if one == path]

    # ------------------------------------------------------------------------------ answers
    def chunks(self, body: dict, is_chat: bool) -> Iterator[dict]:
        tokens = self.answer(body)[: body.get("max_tokens", 16)]
        seed = body.get("seed", 1234567)
        offset = 0
        if body.get("echo"):
            yield self.chunk(body, split(body["prompt"]), 0, seed, is_chat)
            offset = len(body["prompt"])
        for t, token in enumerate(tokens):
            yield self.chunk(body, [token], offset, seed, is_chat, t)
            offset += len(token)
        # What the tests' answers hold ends them, unless the limit did.
        reason = "length" if len(tokens) == body.get("max_tokens", 16) else "stop"
        yield self.around(seed, [{"index": 0, "finish_reason": reason, "text": "", "delta": {}}])
        prompt = body["prompt"] if isinstance(body.get("prompt"), list) else [0]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        yield {"choices": [], "usage": usage | {"total_tokens": len(prompt) + len(tokens)}}

    def around(self, seed: int, choices: list[dict]) -> dict:
        return {"id": "x", "seed": seed, "model": "stories", "choices": choices, "usage": None}

    def chunk(
        self, body: dict, tokens: list[str], offset: int, seed: int, is_chat: bool, t: int = 0
    ) -> dict:
        ids = [self.vocabulary.id(token) for token in tokens]
        text = "".join(self.texts.get(token, token) for token in tokens)
        choice: dict = {"index": 0, "finish_reason": None, "token_ids": ids, "logprobs": None}
        choice |= {"delta": {"content": text}} if is_chat else {"text": text}
        tops = [self.top(token, t + i) for i, token in enumerate(tokens)]
        if is_chat and body.get("logprobs"):
            choice["logprobs"] = {"content": [
                {"token": token, "logprob": dict(top)[token], "bytes": [],
                 "top_logprobs": [{"token": a, "logprob": b, "bytes": []} for a, b in top]}
                for token, top in zip(tokens, tops, strict=True)
            ]}  # fmt: skip
        elif body.get("logprobs") is not None:
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": [
                    dict(top)[token] for token, top in zip(tokens, tops, strict=True)
                ],
                "top_logprobs": [dict(top) for top in tops],
                "text_offset": [
                    offset + sum(map(len, tokens[:i])) for i in range(len(tokens))
                ],
            }  # fmt: skip
        if choice["logprobs"]:
            choice["top_tokens"] = [
                [[self.vocabulary.id(name), name, lp] for name, lp in top] for top in tops
            ]
        if body.get("experts"):
            choice["experts"] = {
                "ids": [experts_of(i + t, self.cards[0]["num_experts"]) for i in ids],
                "weights": [[weights_of(i, block) for block in range(BLOCKS)] for i in ids],
            }
        return self.around(seed, [choice])

    def top(self, token: str, t: int) -> list[tuple[str, float]]:
        """Return ten tokens, the likeliest first; the drawn one is somewhere among them."""
        others = [f" other{i}" for i in range(9)]
        at = (7 * t) % 10 if t % 3 == 0 else 0
        names = [*others[:at], token, *others[at:]]
        weights = [0.55**i for i in range(10)]
        return [(name, math.log(w / sum(weights))) for name, w in zip(names, weights, strict=True)]


def experts_of(seed: int, count: int = EXPERTS) -> list[list[int]]:
    first = [(seed * (3 + 2 * block) + block) % count for block in range(BLOCKS)]
    return [[e, (e + 1 + seed % (count - 1)) % count] for e in first]


def weights_of(seed: int, block: int) -> list[float]:
    strongest = 0.5 + ((seed + block) % 10) / 20
    return [strongest, 1 - strongest]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path in ("/", "/experts"):
            page, policy = serve_page()
            self._send(200, "text/html", page.encode(), {"Content-Security-Policy": policy})
        elif self.path == "/v1/models" and self._has_key():
            self._json({"object": "list", "data": self.server.standin.cards})
        elif self.path != "/v1/models":
            self._send(404, "text/plain", b"")

    def do_POST(self) -> None:
        standin = self.server.standin
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        with standin.lock:
            standin.asked.append((self.path, body))
        assert self.headers["Content-Type"] == "application/json"
        if self.path == "/tokenize":
            ids = standin.vocabulary.encode(self._prompt(body))
            self._json({"count": len(ids), "max_model_len": CONTEXT, "tokens": ids})
        elif self.path == "/detokenize":
            self._json({"prompt": standin.vocabulary.decode(body["tokens"])})
        elif standin.fail:
            status, headers = standin.fail.pop(0)
            error = {"error": {"message": f"made error {status}", "type": "x"}}
            self._send(status, "application/json", json.dumps(error).encode(), headers)
        else:
            self._stream(standin, body)

    def _prompt(self, body: dict) -> str:
        if "messages" in body:
            return "".join(f"{one['role']}\n{one['content']}\n" for one in body["messages"])
        return body["prompt"]

    def _stream(self, standin: Standin, body: dict) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.wfile.write(b": ping\n\n")
            for t, chunk in enumerate(standin.chunks(body, "chat" in self.path)):
                if standin.breaks and t == standin.breaks[0]:
                    if standin.breaks[1] is None:
                        self._reset()
                    else:
                        self.wfile.write(standin.breaks[1])
                    return
                self._event(standin, chunk)
                time.sleep(standin.gap)
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            standin.gone += 1

    def _reset(self) -> None:
        """End the connection as a machine does that is switched off and on."""
        # What was sent is read before, or a reset would take it back.
        time.sleep(0.3)
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        os.close(self.connection.detach())

    def _event(self, standin: Standin, chunk: dict) -> None:
        event = f"data: {json.dumps(chunk, ensure_ascii=not standin.halves)}\n\n".encode(
            "utf-16", "surrogatepass"
        )
        # UTF-8 has no half of a pair.
        event = event.decode("utf-16", "replace").encode()
        if standin.halves:
            # The middle of the character, if there is one.
            cut = next((i for i, byte in enumerate(event) if byte >= 0x80), len(event) // 2) + 1
            self.wfile.write(event[:cut])
            self.wfile.flush()
            time.sleep(0.02)
            event = event[cut:]
        self.wfile.write(event)
        self.wfile.flush()

    def _has_key(self) -> bool:
        key = self.server.standin.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        error = {"error": {"message": "the API key is missing or wrong"}}
        self._send(401, "application/json", json.dumps(error).encode())
        return False

    def _json(self, value: dict) -> None:
        self._send(200, "application/json", json.dumps(value).encode())

    def _send(
        self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Serves the page and a `Standin` on a free port of this machine."""

    daemon_threads = True

    def __init__(self, standin: Standin):
        super().__init__(("127.0.0.1", 0), Handler)
        self.standin = standin
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


# ---------------------------------------------------------------------------------------- the page
def opened(browser: Browser, server: Server, fragment: str = "", **more) -> Page:
    page = browser.open(server.url + fragment, **more)
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)
    if not server.standin.key:
        page.until("document.documentElement.dataset.ready")
    return page


def ask(page: Page, text: str) -> None:
    """Write a text, press Enter, and wait until the answer is there."""
    page.run("document.querySelector('#say').focus()")
    if text:
        page.type(text)
    page.press("Enter")
    ended(page)


def ended(page: Page) -> None:
    page.until(f"!{BUSY}")


def read(page: Page, pane: int = 0) -> str:
    """Return the text that a pane shows, as its elements hold it."""
    return page.run(f"document.querySelectorAll('.pane .text')[{pane}].textContent")


def clean(page: Page) -> None:
    """Hold that a page made no error, broke no policy of its own and asked its server alone."""
    assert page.errors == []
    assert page.violations() == []
    assert page.run("window.pwned === undefined")
    own = page.run("location.origin")
    assert [url for url in page.requests if not url.startswith((own, "blob:"))] == []
