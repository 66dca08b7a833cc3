"""Check that the guarantees of tests/promises/serve_page.py can be broken."""

from __future__ import annotations

import pytest

from runtime.serving import page
from tests.builders_serve_page import HOSTILE
from tests.promises import serve_page


def changed(monkeypatch, old: str, new: str) -> None:
    """Put a fault into the page's script. The page's policy then has the fault's hash."""
    script = page._script()
    assert old in script
    monkeypatch.setattr(page, "_script", lambda: script.replace(old, new))


@pytest.mark.nightly
def test_controls_that_are_not_escaped_are_noticed(monkeypatch):
    changed(monkeypatch, "let visible=text=>String(text)", "let visible=t=>t;let old=text=>text")
    (controls,) = (text for text in HOSTILE if "\u202e" in text)
    monkeypatch.setattr(serve_page, "HOSTILE", (controls, controls))
    assert serve_page.hostile_outputs(1).held == 0


@pytest.mark.nightly
def test_markup_is_noticed_even_by_the_policy_alone(monkeypatch):
    changed(monkeypatch, "made.textContent=text", "made.innerHTML=text")
    assert serve_page.hostile_outputs(1).held == 0
