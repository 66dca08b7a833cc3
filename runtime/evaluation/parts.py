"""The parts of a report by name, and what --require may say of them before they are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.evaluation.bits_per_byte import against_section, bits_section
from runtime.evaluation.calibration import calibration_section, loss_section
from runtime.evaluation.choice_formats import GREEDY
from runtime.evaluation.choices import COLUMNS, Result
from runtime.evaluation.compared import as_differences, compared_section
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.copied import CopySearch
from runtime.evaluation.own_tasks import MAKERS
from runtime.evaluation.report import Section, figure, section
from runtime.evaluation.requirements import value_of
from runtime.evaluation.stories import copied_measures, measured
from runtime.evaluation.text_sums import Sums, add_document, empty_sums

# Of multiple choice: where its questions come from, and the name of its section.
NAMES = {"files": "tasks", "own": "tasks made of the text"}
# Ends of the keys of stories: the model's and its authors'.
SIDES = ("", "_human")
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
        for name, both in results.items():
            if notes := list(_left_out(*both)):
                compared[name]["notes"] = [*compared[name].get("notes", []), *notes]
        parts["compared_tasks"] = compared
        against["tasks"] = {name: as_differences(one) for name, one in compared.items()}
    return parts


def _left_out(results: Sequence[Result], others: Sequence[Result]) -> Iterator[str]:
    """Yield a note for each task with questions that one of two models could not be asked."""
    for mine, other in zip(results, others, strict=True):
        both = [
            set[int]().union(*map(np.ndarray.tolist, one.numbers.values())) for one in (mine, other)
        ]
        if left_out := len(both[0]) + mine.num_left_out - len(both[0] & both[1]):
            yield (
                f"{mine.task}: {left_out:,} questions are left out, because an answer is longer "
                "than the context of one of the two models"
            )


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

    Figures of the texts, of stories and of tasks made of the text have fixed names. Those of files,
    lm-eval, experts and chat depend on what is found, so only the sections' names are checked.
    """
    known = _known_parts(config) | _known_names(config)
    sections = config.sections()
    for requirement in config.requirements():
        part, _, rest = requirement.address.partition(".")
        if part == "against" and rest.partition(".")[0] == "tasks" and sections["against.tasks"]:
            part, rest = "against.tasks", rest.partition(".")[2]
        name = rest.partition(".")[0]
        if part in sections and name not in sections[part]:
            raise ValueError(
                f"--require {requirement}: this report will have no {part}.{name}, only "
                f"{', '.join(f'{part}.{one}' for one in sections[part])}; give the flag that "
                "measures it"
            )
        if part in known or f"{part}.{name}" in known:
            value_of(requirement, _nested(known))


def _known_names(config: EvaluateConfig) -> dict:
    """Return made-up sections, by address, with the names of all figures that they may have."""
    known: dict[str, Any] = {}
    if config.stories:
        texts = measured([], [], [], {})
        if config.train_files:
            texts += copied_measures(CopySearch([]), slice(0))
        keys = [*(one.key for one in texts), "bits_per_byte"]
        known["stories"] = _made_up(key + side for key in keys for side in SIDES)
    if config.own_tasks:
        columns = [column for column in COLUMNS if column != GREEDY]
        keys = [f"{task}_{column}" for task in MAKERS for column in columns]
        known["tasks.own"] = _made_up(key + end for key in keys for end in ("", "_centered"))
        if config.against:
            known["compared_tasks.own"] = compared = _made_up(keys)
            known["against.tasks.own"] = as_differences(compared)
    return known


def _made_up(keys: Iterable[str]) -> Section:
    return section("", {key: figure(0.0, 1, 0.0, 0.0) for key in keys})


def _nested(known: Mapping[str, Any]) -> dict:
    """Return parts by address, such as "tasks.own", as a report has them."""
    report: dict = {}
    for address, part in known.items():
        *outer, name = address.split(".")
        place = report
        for one in outer:
            place = place.setdefault(one, {})
        place[name] = part
    return report


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
