"""The static pages: read once, with a policy that allows their own script and style alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.base.page import read_template

FOLDER = Path(__file__).with_name("static")
# Path of the URL -> file.
FILES = {"/": "index.html", "/experts": "experts.html"}
NO_PAGE = (
    "gptoss serves this model: POST /v1/completions and /v1/chat/completions, GET /v1/models, "
    "/openapi.json and /metrics; docs/serving.md shows how.\n"
)


@dataclass(frozen=True)
class Page:
    """What a path of the server's own shows."""

    text: str
    media_type: str
    headers: dict[str, str]


def page_of(path: str) -> Page:
    """Return a page of the folder, or a line of text where it has none."""
    file = FOLDER / FILES[path]
    if not file.is_file():
        return Page(NO_PAGE, "text/plain", {"Content-Security-Policy": "default-src 'none'"})
    text, policy = read_template(file)
    policy += "; connect-src 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    return Page(text, "text/html", {"Content-Security-Policy": policy})
