"""Write HTML pages that need nothing else: their style, script and data are inside.

A page's file is a template whose placeholders are %%{name}. Its content security policy names its
own style and script by their hashes and allows nothing else. So whatever a run, a model or a file
says on the page stays text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import string
from pathlib import Path

from runtime.base.text import visible


class _Template(string.Template):
    """Placeholders are %%{name}: `$` is for the page's script."""

    delimiter = "%%"


def page_style() -> str:
    """Return the style sheet that all pages share (page.css). A page's own rules come after it."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def clean(text: str) -> str:
    """Return text for the inside of an element, &, <, > and quotes escaped.

    Without lone surrogates, and without control characters but newline and tab.
    """
    return html.escape(visible(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def json_in_html(value: object) -> str:
    """Return JSON that no HTML parser can take for markup: ASCII, and of <, > and & not one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash_of(name: str, page: str) -> str:
    """Return the SHA-256, in base64, of what the page's element of this name holds."""
    _, _, start = page.partition(f"<{name}>")
    text, _, _ = start.partition(f"</{name}>")
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_template(path: Path, **parts: str) -> tuple[str, str]:
    """Return a page's template with the style sheet and our own `parts` in it, and its policy.

    The policy's hashes are of this text, before anything that a model or a file said is in it.
    """
    text = path.read_text(encoding="utf-8")
    template = _Template(text).safe_substitute(page_style=page_style().rstrip(), **parts)
    policy = (
        f"default-src 'none'; script-src 'sha256-{_hash_of('script', template)}'; "
        f"style-src 'sha256-{_hash_of('style', template)}'; base-uri 'none'; form-action 'none'"
    )
    return template, policy


def fill(template: str, **values: object) -> str:
    """Return a template with its values, which are HTML: clean() or json_in_html() made them."""
    return _Template(template).substitute(**values)
