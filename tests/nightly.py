"""Of a test's many cases, a few at every push and the others in the night."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def nightly_but(cases: Iterable[Any], *kept: int) -> list[Any]:
    """Return parameters of which those at the positions `kept` run at every push.

    A case of several arguments is a tuple.
    """
    return [
        case
        if at in kept
        else pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly
        )
        for at, case in enumerate(cases)
    ]
