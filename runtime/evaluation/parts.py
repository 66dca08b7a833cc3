"""The parts of a report by name, and what --require may say of them before they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.evaluation.bits_per_byte import against_section, bits_section
from runtime.evaluation.calibration import calibration_section, loss_section
from runtime.evaluation.choices import Result
from runtime.evaluation.compared import as_differences, compared_section
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.report import Section
from runtime.evaluation.requirements import value_of
from runtime.evaluation.text_sums import Sums, add_document, empty_sums

# Of multiple choice: where its questions come from, and the name of its section.
NAMES = {"files": "tasks", "own": "tasks made of the text"}
# Documents of made-up sums: enough for intervals.
MADE_UP = 10


def text_parts(sums: Sums, resamples: int) -> dict:
    """Return the parts that held-out text gives."""
    text = bits_section(sums, resamples)
    return {
        "bits_per_byte": _named(text, "bits_per_byte"),
        "text": text,
        "calibration": calibration_section(sums, resamples),
        "loss": loss_section(sums, resamples),
    }


def against_parts(
    sums: tuple[Sums | None, Sums | None],
    results: Mapping[str, tuple[Sequence[Result], Sequence[Result]]],
    resamples: int,
    are_same: bool = False,
) -> dict:
    """Return the parts that compare two checkpoints, on the same documents and questions.

    sums: of both on the documents. results: of both on the tasks, by the names in NAMES. are_same:
    both are known to be the same model.
    """
    against: dict = {}
    parts: dict = {"against": against}
    mine, other = sums
    if mine is not None and other is not None:
        parts["comparison"] = against_section(mine, other, resamples)
        against |= _named(parts["comparison"], "difference", "difference")
    if results:
        compared = {
            name: compared_section(*both, f"{NAMES[name]}: difference", are_same)
            for name, both in results.items()
        }
        parts["compared_tasks"] = compared
        against["tasks"] = {name: as_differences(one) for name, one in compared.items()}
    return parts


def _named(section: Section, key: str, name: str = "value") -> dict:
    """Return a figure under the names that the report documents for it."""
    one = section["figures"][key]
    return {
        name: one["value"],
        "low": one.get("low"),
        "high": one.get("high"),
        "documents": one["n"],
    }


# --------------------------------------------------------------------------------- requirements
def check_requirements(config: EvaluateConfig) -> None:
    """Raise ValueError for a requirement on a figure that this report cannot have.

    Figures of the texts have fixed names. Those of tasks and experts depend on what is found, so
    only the sections' names are checked.
    """
    known = _known_parts(config)
    sections = config.sections()
    for requirement in config.requirements():
        first, _, rest = requirement.address.partition(".")
        second = rest.partition(".")[0]
        if first in sections and second not in sections[first]:
            raise ValueError(
                f"--require {requirement}: this report will have no {first}.{second}, only "
                f"{', '.join(f'{first}.{name}' for name in sections[first])}; give the flag that "
                "measures it"
            )
        if first in known and not (first == "against" and second == "tasks" in config.parts()):
            value_of(requirement, known)


def _known_parts(config: EvaluateConfig) -> dict:
    """Return a report of made-up texts: it has the names of all that texts give."""
    if not config.has_text:
        return {"against": {}} if config.against else {}
    sums = empty_sums(MADE_UP)
    ids_T = np.arange(4)
    for d in range(MADE_UP):
        nats_T = 1.0 + (ids_T + d) % 3
        add_document(sums, d, ids_T, 4, -nats_T, -nats_T / 2, ids_T > 1, np.ones(4, dtype=np.int64))
    parts = text_parts(sums, 100)
    return parts | (against_parts((sums, sums), {}, 100) if config.against else {})
