"""JSON of a stranger: what Python's parser lets through, or ends with, is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterable

from runtime.data.tokenizer import without_surrogates
from runtime.serving.errors import ApiError, told

# No field holds more than 19; reading an integer takes the square of its digits.
MOST_DIGITS = 400


def read_object(data: bytes) -> dict:
    """Return the object that a body holds. Raise ApiError for anything else.

    No NaN and no Infinity, which JSON does not have; no name twice, because parsers differ in which
    one counts; no nesting beyond Python's stack; no integer of more than MOST_DIGITS digits. Lone
    surrogates in texts become U+FFFD.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_no_constant,
            parse_int=_integer,
            object_pairs_hook=_no_name_twice,
        )
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except RecursionError:
        raise ApiError(400, "the body's JSON is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {told(value)}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not in JSON")


def _integer(digits: str) -> int:
    # Python would say how to change its limit.
    if (count := len(digits.removeprefix("-"))) > MOST_DIGITS:
        raise ValueError(f"an integer has {count:,} digits, and {MOST_DIGITS} are read")
    return int(digits)


def _no_name_twice(pairs: Iterable[tuple[str, object]]) -> dict:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {told(name)} is there twice")
        found[name] = without_surrogates(value) if isinstance(value, str) else value
    return found


def write_json(value: object) -> bytes:
    """Return JSON in ASCII: some clients cut a stream at U+2028 and its like, which it escapes."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
