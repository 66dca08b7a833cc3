"""Numbers as people read them."""
from __future__ import annotations


def human_count(number: float) -> str:
    """A count with a decimal unit and three digits: 950, 12.3 k, 3.66 B."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.3g}" if number != int(number) else str(int(number))


def human_bytes(number: float) -> str:
    """Bytes in binary units: 512 B, 3.1 MiB, 58.6 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024 ** power:
            return f"{number / 1024 ** power:.1f} {unit}"
    return f"{number:.0f} B"


def human_seconds(seconds: float) -> str:
    """A duration: 42 s, 3 min 05 s, 2 h 10 min, 4 d 3 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86_400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86_400} d {seconds % 86_400 // 3600} h"
