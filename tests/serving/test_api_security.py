"""Who may ask, without a server: the key, and what flags allow."""

from __future__ import annotations

import os

import pytest

from runtime.serving import security
from runtime.serving.errors import ApiError
from runtime.serving.security import Head, check, key_note, read_key, rules_of

KEY = b"right-key"
ORIGIN = "http://localhost:3000"


def test_the_key_is_compared_as_bytes_in_constant_time(monkeypatch):
    """`==` ends at the first other byte, and compare_digest raises for text beyond ASCII."""
    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(
        security.hmac, "compare_digest", lambda *two: compared.append(two) or real(*two)
    )
    rules = rules_of("127.0.0.1", (), (), KEY)
    for given, right in ((b"right-key", True), (b"\xff\xe9", False)):
        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer " + given)]
        head = Head("GET", "/v1/models", headers)
        if right:
            check(head, rules)
        else:
            with pytest.raises(ApiError):
                check(head, rules)
    assert len(compared) == 2 and all(type(part) is bytes for two in compared for part in two)


def test_the_key_comes_from_a_file_or_the_environment_and_never_from_both(tmp_path):
    file = tmp_path / "key.txt"
    file.write_text("  secret\n")
    assert read_key("", {}) == b""
    assert read_key(str(file), {}) == b"secret"
    assert read_key("", {"GPTOSS_API_KEY": "from-env"}) == b"from-env"
    for path, environment, says in (
        (str(file), {"GPTOSS_API_KEY": "x"}, "not in both"),
        ("", {"GPTOSS_API_KEY": ""}, "holds no key"),
        ("", {"GPTOSS_API_KEY": "two words"}, "holds no key"),
        (str(tmp_path / "none"), {}, "cannot be read"),
        (str(tmp_path), {}, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=says) as raised:
            read_key(path, environment)
        assert "\n" not in str(raised.value) and "two words" not in str(raised.value)
    for bad in (b"", b"\xff\xfe", "k\u00e9y".encode(), b"a\x00b", b"x" * 513):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="holds no key"):
            read_key(str(file), {})


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_a_key_that_others_may_read_is_told(tmp_path):
    """`openssl rand -hex 32 > key.txt` makes a file that everyone on the machine can read."""
    file = tmp_path / "key.txt"
    file.write_text("secret")
    for mode, told in ((0o600, False), (0o400, False), (0o640, True), (0o644, True)):
        file.chmod(mode)
        line = key_note(str(file))
        assert bool(line) == told and "secret" not in line
        assert not told or f"chmod 600 {file}" in line
    assert key_note("") == ""


def test_an_allowed_origin_is_spelled_as_browsers_send_it():
    """http://localhost:80 was allowed and never matched: browsers leave a scheme's own port out.

    An origin with a user or with letters beyond ASCII never matches either, and "[" gave a line
    that did not name the flag.
    """
    for given, sent in (
        ("http://localhost:80", "http://localhost"),
        ("HTTPS://App.Example:443/", "https://app.example"),
        ("http://localhost:443", "http://localhost:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ):
        assert rules_of("127.0.0.1", (), (given,), b"").origins == {sent}
    for given in (
        "http://[bad",
        "http://a@b",
        "http://b\u00fccher.example",
        "http://a:x",
        "http://a?",
    ):
        with pytest.raises(ValueError, match="^--allow_origin"):
            rules_of("127.0.0.1", (), (given,), b"")


def test_another_host_needs_a_key_and_rules_are_exact():
    for host in ("0.0.0.0", "::", "192.168.1.5", "box.local"):
        with pytest.raises(ValueError, match=f"--host {host} lets other machines in"):
            rules_of(host, (), (), b"")
        assert rules_of(host, (), (), KEY).key == KEY
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert rules_of(host, (), (), b"").key == b""
    assert "[::1]" in rules_of("::1", (), (), b"").hosts
    rules = rules_of("0.0.0.0", ("Box.local",), ("https://App.example/", ORIGIN), KEY)
    assert "box.local" in rules.hosts and "https://app.example" in rules.origins
    for name in ("box:80", "*", "", "a b"):
        with pytest.raises(ValueError, match="--allow_host"):
            rules_of("127.0.0.1", (name,), (), b"")
    for origin in ("*", "null", "localhost", "http://a/b", "ftp://a", "http://"):
        with pytest.raises(ValueError, match="--allow_origin"):
            rules_of("127.0.0.1", (), (origin,), b"")


def test_a_host_is_one_of_ours_exactly():
    rules = rules_of("127.0.0.1", ("box",), (), b"")
    good = ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]", "[::1]:65535", "box", "Box:80")
    bad = ("localhost.evil.example", "boxes", "127.0.0.1.", "127.0.0.10", "[::1", "::1", "b", "")
    for host in good:
        check(Head("GET", "/", [(b"host", host.encode())]), rules)
    for host in bad:
        with pytest.raises(ApiError, match="--allow_host"):
            check(Head("GET", "/", [(b"host", host.encode())]), rules)
    for headers in ([], [(b"host", b"box")] * 2):
        with pytest.raises(ApiError, match="--allow_host"):
            check(Head("GET", "/", headers), rules)
