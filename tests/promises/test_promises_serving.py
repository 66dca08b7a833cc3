"""Check that the guarantees of tests/promises/serving.py can be broken."""

from __future__ import annotations

from runtime.serving import slots
from runtime.serving.answer import Answer
from tests.promises import serving
from tests.shared_checks import needs_code

pytestmark = needs_code


def test_a_copy_of_a_beginning_that_is_too_long_is_noticed(monkeypatch):
    monkeypatch.setattr(
        slots,
        "copy_beginning",
        lambda source, target, tokens, real=slots.copy_beginning: (
            real(source, target, tokens - 1) or setattr(target, "length", tokens)
        ),
    )
    tally = serving.same_in_company(40)
    assert tally.held < tally.tried


def test_chance_that_depends_on_the_company_is_noticed(monkeypatch):
    monkeypatch.setattr(
        Answer,
        "generator",
        lambda self, device, real=Answer.generator: real(self, device).manual_seed(self.number),
    )
    tally = serving.same_in_company(40)
    assert tally.held < tally.tried
