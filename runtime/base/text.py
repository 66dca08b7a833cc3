"""Readable numbers, and text that is safe to show on a terminal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction


def human_count(number: float) -> str:
    """Return a count with a decimal unit and three digits: 950, 12.3 k, 3.66 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:
            return (
                f"{number / size:.3g}{unit}"
                if number < 999.5 * size
                else f"{number / size:.0f}{unit}"
            )
    # Rounded, because `g` writes 0.00001 as 1e-05.
    return str(int(number)) if number == int(number) else f"{round(number, 4):.3g}"


def human_bytes(number: float) -> str:
    """Return bytes in binary units: 512 B, 3.1 MiB, 58.6 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        # From here on the next smaller unit would print as 1024.
        if number >= (1023.95 if power > 1 else 1023.5) * 1024 ** (power - 1):
            return f"{number / 1024**power:.1f} {unit}"
    return f"{number:.0f} B"


def parse_bytes(text: str, name: str) -> int:
    """Return the bytes of a size: 500MB (decimal, as disks count) or 1GiB (binary, as memory does).

    name: what the size is of, for the error. Raise ValueError for any other text, and for less than
    one byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT])(i?)B", text.strip(), re.ASCII)
    size = 0
    if match:
        number, unit, is_binary = match.groups()
        size = int(Fraction(number) * (1024 if is_binary else 1000) ** ("KMGT".index(unit) + 1))
    if not size:
        raise ValueError(
            f"{name} must be a number with KB, MB, GB or TB (powers of 1000) or "
            f"KiB, MiB, GiB or TiB (powers of 1024), such as 500MB or 1GiB, not {text!r}"
        )
    return size


def human_seconds(seconds: float) -> str:
    """Return a duration: 42 s, 3 min 05 s, 2 h 10 min, 4 d 3 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86_400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"


class UntilText:
    """Cuts streamed text at the first of some stop strings, which may arrive in pieces."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held = [stop for stop in stops if stop], ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return (what can be shown now, whether a stop was found).

        Text that may be the start of a stop is kept in `held`.
        """
        text = self.held + text
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.held = ""
            return text[: min(found)], True
        keep = max((_begun(stop, text) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _begun(stop: str, text: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string.

    The work grows with the new text: stops may be long and many, and each token is asked about.
    """
    start = max(0, len(text) - len(stop) + 1)
    # The first one found is the longest.
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


def visible(text: str) -> str:
    """Return `text` with control characters and direction overrides escaped.

    Newlines and tabs stay. What a model or a file says must not move the cursor, change colours or
    write the clipboard of the terminal.
    """

    def shown(c: str) -> str:
        hidden = (
            (unicodedata.category(c) == "Cc" and c not in "\n\t")
            or "\u202a" <= c <= "\u202e"
            or "\u2066" <= c <= "\u2069"
        )
        return c.encode("unicode_escape").decode() if hidden else c

    return "".join(map(shown, text))


def names_of(row: Iterable) -> str:
    """Return the names of a row's columns for an error line, not more than fit into one."""
    names = [str(name)[:40] for name in row]
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "no columns"


def shown(value: object) -> str:
    """Return a value for an error line, with its type, cut if it is long."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
