"""Our own page, made once: a request reads no file, so no path of a URL reaches one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from runtime.serving.page import serve_page

# The experts are on the same page; the second path is for links.
PATHS = ("/", "/experts")


@dataclass(frozen=True)
class Page:
    """What a path of the server's own shows."""

    text: str
    headers: dict[str, str]


@functools.cache
def the_page() -> Page:
    """Return the page with its policy, which allows its own style and script alone."""
    text, policy = serve_page()
    return Page(text, {"Content-Security-Policy": policy})
