"""Who may ask: the Host, Origin and key of a request, before anything of it is read.

A page of another site must not use this server: not under a name that points at 127.0.0.1 (DNS
rebinding, Ollama's CVE-2024-28224), and not by a POST of text/plain, which browsers send without
asking. Programs send no Origin and no Sec-Fetch-*.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.serving.errors import ApiError

KEY_VARIABLE = "GPTOSS_API_KEY"
KEY = re.compile(r"[\x21-\x7e]{1,512}")
# A name or an IPv4 address, or an IPv6 address in brackets; then a port, which a tunnel changes.
HOST = re.compile(r"([\w.-]{1,255}|\[[0-9a-fA-F:.]{2,45}\])(?::\d{1,5})?", re.ASCII)
ORIGIN = re.compile(
    r"(https?)://([\w.-]{1,255}|\[[0-9a-f:.]{2,45}\])(?::(\d{1,5}))?/?", re.ASCII | re.IGNORECASE
)
DEFAULT_PORTS = {"http": "80", "https": "443"}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]{1,100}", re.ASCII)
# Of every answer.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# What pages of an allowed origin may read.
EXPOSED = "Retry-After, X-Gptoss-Ignored"
# Seconds that a browser may remember the answer to its preflight.
PREFLIGHT_SECONDS = 600


@dataclass(frozen=True)
class Rules:
    """Who may ask. key: empty = no key. open_paths: they need none. pages: of them, those that a
    link of another site may open."""

    hosts: frozenset[str]
    origins: frozenset[str] = frozenset()
    key: bytes = b""
    open_paths: frozenset[str] = frozenset()
    pages: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Head:
    """The head of a request: names in lower case, and every value that came."""

    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]

    def values(self, name: str) -> list[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self.headers if key == wanted]


def check(head: Head, rules: Rules) -> None:
    """Raise ApiError unless this may be answered."""
    host = checked_host(head.values("host"), rules)
    check_origin(head, host, rules)
    is_preflight = head.method == "OPTIONS" and head.values("origin")
    if not is_preflight and head.path not in rules.open_paths:
        check_key(head.values("authorization"), rules.key)
    if head.method in ("POST", "PUT", "PATCH"):
        check_content(head)


def checked_host(values: Sequence[str], rules: Rules) -> str:
    """Return the Host header. Raise ApiError unless it names this server, once."""
    match = HOST.fullmatch(values[0]) if len(values) == 1 else None
    if match is None or match[1].lower() not in rules.hosts:
        raise ApiError(
            403,
            "this server is not called by that Host: use http://127.0.0.1, or start it with "
            "--allow_host NAME",
            code="host_not_allowed",
        )
    return values[0].lower()


def check_origin(head: Head, host: str, rules: Rules) -> None:
    """Raise ApiError for a page of another site."""
    origins, sites = head.values("origin"), head.values("sec-fetch-site")
    if origins:
        is_ours = len(origins) == 1 and origins[0].lower() in (f"http://{host}", f"https://{host}")
        if is_ours or (len(origins) == 1 and origins[0] in rules.origins):
            return
    elif not sites or sites[0] in ("same-origin", "none") or _opens_page(head, rules):
        return
    raise ApiError(
        403,
        "this page's origin may not use this server: start it with --allow_origin URL",
        code="origin_not_allowed",
    )


def _opens_page(head: Head, rules: Rules) -> bool:
    """Return whether a link opens our page in a tab: its sender cannot read it."""
    return (
        head.method == "GET"
        and head.path in rules.pages
        and head.values("sec-fetch-mode") == ["navigate"]
        and head.values("sec-fetch-dest") == ["document"]
    )


def check_key(values: Sequence[str], key: bytes) -> None:
    """Raise ApiError unless the Authorization header has the key."""
    if not key:
        return
    scheme, _, given = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    # On bytes, because compare_digest raises for a text that is not ASCII.
    is_right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key)
    if scheme.lower() != "bearer" or not is_right:
        raise ApiError(
            401,
            "the API key is missing or wrong: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_content(head: Head) -> None:
    """Raise ApiError unless the body is plain JSON, which a page of another site cannot send."""
    kinds = head.values("content-type")
    if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415, "the header Content-Type must be application/json", code="unsupported_media_type"
        )
    if [value for value in head.values("content-encoding") if value.lower() != "identity"]:
        raise ApiError(
            415, "a compressed body is not read: leave Content-Encoding out", code="unsupported"
        )


# ----------------------------------------------------------------------------------------- CORS
def cors_headers(head: Head, rules: Rules) -> dict[str, str]:
    """Return the headers by which a page of an allowed origin may read an answer.

    Never with credentials: the key is a header that such a page sends itself.
    """
    origins = head.values("origin")
    if len(origins) != 1 or origins[0] not in rules.origins:
        return {"Vary": "Origin"} if rules.origins else {}
    return {
        "Access-Control-Allow-Origin": origins[0],
        "Access-Control-Expose-Headers": EXPOSED,
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Vary": "Origin",
    }


def preflight_headers(head: Head, rules: Rules) -> dict[str, str]:
    """Return the headers of an answer to a browser that asks before it sends a request."""
    headers = cors_headers(head, rules)
    if "Access-Control-Allow-Origin" not in headers:
        return headers
    asked = ",".join(head.values("access-control-request-headers")).split(",")
    names = [name.strip() for name in asked if TOKEN.fullmatch(name.strip())]
    headers["Access-Control-Allow-Methods"] = "GET, POST"
    headers["Access-Control-Allow-Headers"] = ", ".join(names[:30])
    headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
    if head.values("access-control-request-private-network") == ["true"]:
        headers["Access-Control-Allow-Private-Network"] = "true"
    return headers


# ----------------------------------------------------------------------------------- from flags
def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address that a server is bound to."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_key(path: str, environment: Mapping[str, str] = os.environ) -> bytes:
    """Return the key of a file or of the environment; empty if there is neither.

    Raise ValueError for both, and for one that no header can hold.
    """
    given = environment.get(KEY_VARIABLE)
    if path and given is not None:
        raise ValueError(f"give the key in {KEY_VARIABLE} or in --api_key_file, not in both")
    if not path and given is None:
        return b""
    where = f"--api_key_file {path}" if path else KEY_VARIABLE
    if path:
        try:
            given = Path(path).read_text(encoding="ascii")
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            given = "\x00"
    key = (given or "").strip()
    if not KEY.fullmatch(key):
        raise ValueError(
            f"{where} holds no key: it must be 1 to 512 visible ASCII characters without blanks, "
            "such as those of: openssl rand -hex 32"
        )
    return key.encode("ascii")


def key_note(path: str) -> str:
    """Return a line if other users may read the file of the key, else an empty string."""
    if not path or os.name != "posix" or not Path(path).stat().st_mode & 0o044:
        return ""
    return f"other users of this machine may read {path}: chmod 600 {path}"


def rules_of(
    host: str, allow_host: Sequence[str], allow_origin: Sequence[str], key: bytes
) -> Rules:
    """Return the rules of a server's flags. Raise ValueError for what would allow too much."""
    if not is_loopback(host) and not key:
        raise ValueError(
            f"--host {host} lets other machines in, and there is no key: give --api_key_file FILE "
            f"or {KEY_VARIABLE}, or leave --host out"
        )
    bound = f"[{host}]" if ":" in host else host
    hosts = [*LOCAL_HOSTS, bound.lower()]
    for name in allow_host:
        match = HOST.fullmatch(name)
        if match is None or match[0] != match[1]:
            raise ValueError(f"--allow_host {name} must be a name or an address without a port")
        hosts.append(name.lower())
    return Rules(frozenset(hosts), frozenset(map(_origin, allow_origin)), key)


def _origin(text: str) -> str:
    """Return an origin as browsers write it. Raise ValueError."""
    match = ORIGIN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--allow_origin {text} must be a page's origin as browsers send it, such as "
            "http://localhost:3000"
        )
    scheme, host, port = match[1].lower(), match[2].lower(), match[3]
    # Browsers leave the scheme's own port out.
    return f"{scheme}://{host}" + (f":{port}" if port and port != DEFAULT_PORTS[scheme] else "")
