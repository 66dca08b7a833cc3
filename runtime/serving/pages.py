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
    """Return the page with its policy, which allows its own style and script alone.

    A page that opened it keeps no hold of it, by which it could change what stands in its address.
    """
    text, policy = serve_page()
    headers = {"Content-Security-Policy": policy, "Cross-Origin-Opener-Policy": "same-origin"}
    return Page(text, headers)
