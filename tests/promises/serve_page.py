"""Guarantees about the server's page: whatever a model says, it is text."""

from __future__ import annotations

import random

from runtime.base.text import visible
from tests.builders_serve_page import (
    CARD,
    HOSTILE,
    Server,
    Standin,
    ask,
    clean,
    ended,
    opened,
    read,
)
from tests.chromium import Browser
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, folder

# Of a case's answer; a line may come in many tokens.
MOST_TOKENS = 400
MARKUP = "img, svg, iframe, object, embed, base, meta[http-equiv], main script, main style, main a"


def _tokens(r: random.Random) -> list[str]:
    """Return hostile lines cut wherever tokens may be cut."""
    text = "".join(r.choice(HOSTILE) + r.choice((" ", "\n", "")) for _ in range(r.randrange(2, 9)))
    # Halves of a pair would be one character here, and two in the page.
    text = text.replace("\ud800", "\ud800 ")
    cuts = sorted(r.sample(range(len(text)), min(len(text), r.randrange(1, MOST_TOKENS))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]


def _case(browser: Browser, i: int) -> None:
    """Let a model answer with hostile text; look at it in every way that the page has."""
    r = random.Random(FIRST_SEED + i)
    tokens, is_chat = _tokens(r), bool(i % 2)
    card = CARD | {"has_chat_template": is_chat, "max_model_len": 10**6, "max_new_tokens": 10**6}
    card["id"] = r.choice(HOSTILE[:-1])
    written = r.choice(HOSTILE[:-1])
    with Server(Standin(cards=[card], answer=lambda body: tokens, halves=r.random() < 0.5)) as own:
        page = opened(browser, own, dark=r.random() < 0.5, width=r.choice((320, 1280)))
        try:
            view = r.choice(("plain", "surprise", "experts"))
            page.run(
                f"document.querySelector('[data-view={view}]').click();"
                "localStorage.setItem('gptoss.settings', '[{\"max_tokens\": 1000}]')"
            )
            page.call("Page.reload")
            page.until("document.documentElement.dataset.ready")
            ask(page, "A")
            answer = "".join(tokens).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            assert read(page) == "A" + visible(answer), "the text is not what the model said"
            page.run(
                f"document.querySelector('#say').value = {_as_script(written)};"
                "document.querySelector('#ask').requestSubmit()"
            )
            ended(page)
            for script in (
                "document.querySelectorAll('.t')[1]?.focus()",
                "document.querySelector('[data-view=experts]').click()",
                "document.querySelectorAll('.t')[1]?.focus()",
                "document.querySelector('#compare').click()",
                "document.querySelector('[data-act=link]').click()",
                "document.querySelector('[data-act=copy]').click()",
                "document.querySelector('#show-history').click()",
                "document.querySelector('#talks button').click()",
            ):
                page.run(script)
            assert page.run(f"document.querySelectorAll({MARKUP!r}).length") == 0
            assert page.run("getComputedStyle(document.body).display") == "flex"
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            clean(page)
        finally:
            page.close()


def _as_script(text: str) -> str:
    return "JSON.parse(" + repr('"' + "".join(f"\\u{ord(c):04x}" for c in text) + '"') + ")"


def hostile_outputs(count: int) -> Tally:
    """Let a model say `count` hostile texts, in all views and both modes.

    Held: the page shows what was said, and nothing of it ran, was fetched, hid or moved anything.
    Skips where there is no Chromium.
    """
    tally = Tally()
    with folder() as at, Browser(at) as browser:
        for i in range(count):
            attempt(tally, f"case {i}", lambda i=i: _case(browser, i))  # type: ignore
    return tally


PROMISES: list[Promise] = [
    Promise(
        82,
        "Whatever a model says is text on the server's page: nothing of it runs or is fetched",
        hostile_outputs,
        0,
        20,
        20,
    ),
]
