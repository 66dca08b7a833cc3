"""Check that the guarantees of tests/promises/serving_http.py can be broken."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from runtime.serving import app, security
from tests.promises import serving_http
from tests.shared_checks import needs_code

pytestmark = needs_code


def test_a_fault_of_the_server_is_noticed(monkeypatch):
    def read_object(data, real=app.read_object):
        body = real(data)
        return body if "temperature" not in body else body["nothing"]

    monkeypatch.setattr(app, "read_object", read_object)
    assert serving_http.malformed(40).failures


def test_a_large_body_that_is_not_refused_is_noticed(monkeypatch):
    monkeypatch.setattr(app, "too_large", lambda most: app.ApiError(400, "no"))
    assert serving_http.full_queue(4).failures


@pytest.mark.parametrize("name", ["check_origin", "check_key", "check_content"])
def test_a_check_that_is_left_out_is_noticed(monkeypatch, name):
    monkeypatch.setattr(security, name, lambda *given: None)
    assert serving_http.who_may_ask(250).failures
