"""What a client is told when its request is not honoured, in the form that OpenAI's clients read.

{"error": {"message", "type", "param", "code"}}: openai-python makes exceptions of the status, and
tries 429 and 503 again after `Retry-After` seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from runtime.base.text import visible

# A message quotes what was sent, which may be long.
MOST_CHARACTERS = 400
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = short(message)
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        return TYPES.get(self.status) or (
            "server_error" if self.status >= 500 else "invalid_request_error"
        )

    def body(self) -> dict:
        """Return the answer's JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def short(text: str) -> str:
    """Return a text in one visible line that is not too long."""
    line = " ".join(visible(text[: 4 * MOST_CHARACTERS]).split())
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 3] + "..."


def told(value: object) -> str:
    """Return a value of a body as JSON spells it, cut if it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "a value that is nested deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """Return the error of a field that is wrong."""
    return ApiError(400, message, param=param, code=code)


def try_later(status: int, message: str, seconds: float, code: str) -> ApiError:
    """Return an error that clients try again after so many seconds."""
    return ApiError(status, message, code=code, headers={"Retry-After": f"{seconds:g}"})
