"""The rows of a model card that come from a report of scripts/evaluate.py.

The report is a file of the user's: it is checked to be of these weights, and nothing in it is read
as Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runtime.base.files import read_json_object
from runtime.checkpoint.format import Checkpoint

FORMAT = "gptoss evaluation"
# Of a report's parts; those of groups are sections by name.
PARTS, GROUPS = ("text", "calibration"), ("tasks", "chat")
# Rows of tasks and exercises in a card.
MOST_ROWS = 24


def read_evaluation(path: str | Path, checkpoint: Checkpoint) -> dict:
    """Return a report. Raise ValueError for another file, and for a report of other weights."""
    try:
        report = read_json_object(Path(path))
    except OSError as error:
        raise ValueError(f"cannot read --evaluation {path}: {error.strerror}") from error
    if report.get("format") != FORMAT:
        raise ValueError(
            f"--evaluation {path} is no report: give the file of python -m scripts.evaluate "
            "--json FILE"
        )
    about = report.get("checkpoint")
    digest = about.get("weights_digest") if isinstance(about, dict) else None
    if not digest or digest != checkpoint.weights_digest:
        raise ValueError(
            f"--evaluation {path} is of other weights than {checkpoint.path}: evaluate this "
            "checkpoint"
        )
    return report


def figures_of(report: dict) -> Iterator[tuple[str, dict]]:
    """Yield (name, figure) of what a card shows, at most MOST_ROWS of tasks."""
    for part in PARTS:
        yield from _figures(report.get(part))
    rows = 0
    for group in GROUPS:
        sections = report.get(group)
        for section in sections.values() if isinstance(sections, dict) else ():
            for name, figure in _figures(section):
                # Another form of the figure before it.
                if not name.endswith("_centered") and rows < MOST_ROWS:
                    rows += 1
                    yield name, figure


def _figures(section: object) -> Iterator[tuple[str, dict]]:
    figures = section.get("figures") if isinstance(section, dict) else None
    for name, figure in figures.items() if isinstance(figures, dict) else ():
        if isinstance(figure, dict):
            yield str(name), figure
