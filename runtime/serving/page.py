"""The page that people use a server with: to continue text, to chat, to see the experts.

Its files are static/serve.html, serve.css and serve.js. They become one document, whose policy
allows its own style and script, requests to its own server, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from runtime.base.page import read_template

STATIC = Path(__file__).with_name("static")
# In lines of a script with these marks, a blank may be part of more than a text in quotes.
_UNCLEAR = re.compile("['`/]")
# A text, or a mark that needs no blank on either side wherever it stands.
_TEXT_OR_MARK = re.compile(r'("(?:[^"\\]|\\.)*")| ?([=,{}?:;&|<>()\[\]*]) ?')


def _joined(lines: Iterable[str]) -> str:
    """Return lines as one text, without the line breaks after marks that end nothing by one."""
    return "".join(line if line.endswith((",", ";", "{", "(")) else f"{line}\n" for line in lines)


def _style() -> str:
    return _joined((STATIC / "serve.css").read_text(encoding="utf-8").splitlines())


def _script() -> str:
    """Return the script with no indentation, no comment that has a line of its own, few blanks."""
    lines = map(str.strip, (STATIC / "serve.js").read_text(encoding="utf-8").splitlines())
    code = [line for line in lines if line and not line.startswith("//")]
    return _joined(
        line if _UNCLEAR.search(line) else _TEXT_OR_MARK.sub(r"\1\2", line) for line in code
    )


def serve_page() -> tuple[str, str]:
    """Return the page and its content security policy, for the header of that name."""
    page, policy = read_template(STATIC / "serve.html", style=_style(), script=_script())
    policy += "; connect-src 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    return page, policy
