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
# What a blank may be part of: a text in quotes, a template, a regular expression. The style of the
# script tells the last from a division, which has a blank after its sign.
_WHOLE = r'"(?:[^"\\]|\\.)*"|`(?:[^`\\]|\\.)*`|/(?! )(?:[^/\\\[]|\\.|\[(?:[^\]\\]|\\.)*\])+/\w*'
# Or a mark that needs no blank on either side wherever it stands.
_MARK = r"[=,{}?:;&|<>()\[\]*!]|(?<= )[-+/%](?= (?![-+]))"
_WHOLE_OR_MARK = re.compile(f" ?({_WHOLE}|{_MARK}) ?")


def _joined(lines: Iterable[str], ends: str) -> str:
    """Return lines as one text, without what the end of a line or of a block says already."""
    return "".join(line if line.endswith(tuple(ends)) else f"{line}\n" for line in lines)


def _shorter(code: str, word: str, instead: str) -> str:
    """Return code with a word of it replaced, where that is no part of a text in quotes."""
    return re.sub(f"({_WHOLE})|{word}", lambda match: match[1] or instead, code)


def _style() -> str:
    lines = (STATIC / "serve.css").read_text(encoding="utf-8").splitlines()
    return _joined(lines, ",;{(}").replace(";}", "}")


def _script() -> str:
    """Return the script with no indentation, no comment that has a line of its own, few blanks.

    Its statements end with a semicolon or a brace, so a line break says nothing after a mark.
    """
    lines = map(str.strip, (STATIC / "serve.js").read_text(encoding="utf-8").splitlines())
    code = [line for line in lines if line and not line.startswith("//")]
    for i, line in enumerate(code):
        # A constant is assigned once, so the shorter word says the same.
        shorter = _shorter(_shorter(line, r"\bconst\b", "let"), "; (?=})", "")
        ends_block = code[i + 1 : i + 2] and code[i + 1].startswith("}")
        code[i] = _WHOLE_OR_MARK.sub(r"\1", shorter.removesuffix(";") if ends_block else shorter)
    return _joined(code, ",;{(}[=+?:&|>)")


def serve_page() -> tuple[str, str]:
    """Return the page and its content security policy, for the header of that name."""
    page, policy = read_template(STATIC / "serve.html", style=_style(), script=_script())
    # Between elements that are blocks, or items of a flexible box.
    page = page.replace(">\n<", "><")
    policy += "; connect-src 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    return page, policy
