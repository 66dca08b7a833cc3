"""Figures of one command, stored as soon as each is there: a command that is killed keeps what it
measured before.

`benchmarks/probe.py`, `steps.py`, `latency.py` and `gpu_tests.py` write theirs by `Measures`.
`benchmarks/gpu.py` reads them, and those of the other benchmarks, by `measures_of`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable

from benchmarks.common import save_results


class Measures:
    """What a command measures: a value with its unit, or why there is no value. Stored at each
    change.

    results: the dict that goes to NAME.json; a caller may put more into it before the next change.
    """

    def __init__(self, name: str, **about):
        self.name = name
        self.results: dict = {**about, "measures": {}}

    def add(self, measure: str, value: float, unit: str) -> None:
        """Store and print a value; one that is not finite is stored as the reason that there is
        none.
        """
        value = float(value)
        if not math.isfinite(value):
            self._keep(measure, {"why": f"the value is {value}"})
        else:
            self._keep(measure, {"value": value, "unit": unit})

    def attempt(self, measure: str, unit: str, function: Callable[[], float]) -> bool:
        """Store what `function` returns, or what it raised; True if it returned."""
        try:
            value = function()
        except Exception as error:
            # One measure must not cost the others.
            traceback.print_exc()
            self.fail(measure, error)
            return False
        self.add(measure, value, unit)
        return True

    def fail(self, measure: str, error: BaseException | str) -> None:
        """Store why there is no value."""
        kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
        self._keep(measure, {"why": " ".join(f"{kind}{error}".split())[:500]})

    def save(self) -> None:
        """Write the file again, after a change of `results`."""
        save_results(self.name, self.results, quiet=True)

    @property
    def failed(self) -> bool:
        """Whether any measure has no value."""
        return any("why" in row for row in self.results["measures"].values())

    def _keep(self, measure: str, row: dict) -> None:
        self.results["measures"][measure] = row
        said = row["why"] if "why" in row else f"{row['value']:,.6g} {row['unit']}"
        print(f"{measure}: {said}", flush=True)
        self.save()


def _differing(row: dict) -> int:
    """Tensors that had other bits in a second run."""
    return sum(not same for same in row["same_bits"].values())


def measures_of(results: dict) -> dict[str, dict]:
    """The figures of a stored file, by name: of Measures as they are, of benchmarks.train,
    benchmarks.loss and benchmarks.attention the main ones.
    """
    if "measures" in results:
        return results["measures"]
    found: dict[str, dict] = {}

    def take(measure: str, value: float | None, unit: str) -> None:
        if value is not None:
            found[measure] = {"value": value, "unit": unit}

    for name, row in results.get("variants", {}).items():
        if "tokens_per_sec" in row:
            take(f"{name} speed", row["tokens_per_sec"]["median"], "tokens/s")
            take(f"{name} MFU", 100 * row["mfu"], "%")
        if "seconds" in row:
            take(f"{name} time", 1000 * row["seconds"]["median"], "ms")
        for key in ("peak_above_states_bytes", "peak_above_inputs_and_gradients_bytes"):
            if row.get(key) is not None:
                take(f"{name} memory", row[key] / 1e9, "GB")
    for case, figures in results.get("cases", {}).items():
        for name, modes in figures["variants"].items():
            row = modes["default"]
            if "why" in row:
                found[f"{case} {name} time"] = {"why": row["why"]}
                continue
            take(f"{case} {name} time", 1000 * row["seconds"]["median"], "ms")
            take(f"{case} {name} error", 100 * max(row["errors"].values()), "%")
            take(f"{case} {name} differing bits", _differing(row), "tensors")
    found |= {name: {"why": why} for name, why in results.get("failed", {}).items()}
    return found
