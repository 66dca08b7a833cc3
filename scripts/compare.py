"""Compare runs: results, the settings that differ, and one page of their curves.

    python -m scripts.compare runs/a runs/b               a table
    python -m scripts.compare runs --out page.html        every run in a folder, and their curves
    python -m scripts.compare runs/a runs/b --json comparison.json

Give what --graph_dir named: the folder with a run's metrics.jsonl, or one such file. A run that
cannot be read is named and left out.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.base.cli import error_line, parser, run_main
from runtime.base.files import write_text_atomic
from runtime.training.comparison import compare, lines, summary
from runtime.training.curves import Run, read_run, read_runs, run_folders
from runtime.training.curves_page import finished_page


def runs_of(paths: Sequence[str]) -> list[Run]:
    """Return the runs of some folders; print a line for each that cannot be read."""
    runs: list[Run] = []
    for path in dict.fromkeys(place for given in paths for place in _places(Path(given))):
        try:
            runs.append(_read(path))
        except ValueError as error:
            print(f"{error_line(error)}: left out", file=sys.stderr)
    return list({run.path.resolve(): run for run in runs}.values())


def _places(path: Path) -> list[Path]:
    """Return a metrics file, a run's folder, or the folders of runs in a folder."""
    return [path] if path.is_file() else run_folders(path) or [path]


def _read(path: Path) -> Run:
    """Return the run of a folder or of a metrics file. Raise ValueError."""
    if not path.is_file():
        return read_run(path)
    found = [run for run in read_runs(path.parent) if run.path.name == path.name]
    if not found:
        raise ValueError(f"{path} is no metrics file with records: give metrics.jsonl")
    return found[0]


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its own, with its folder where several have that name."""
    names = [run.name for run in runs]
    return [
        f"{name} ({run.path.parent})" if names.count(name) > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs (--graph_dir), or of such folders")
    p.add_argument("--json", help="file to write, with all numbers")
    p.add_argument("--out", help="HTML file to write, with the curves of all runs")
    args = p.parse_args(argv)
    runs = runs_of(args.runs)
    if len(runs) < 2:
        found = f"only {runs[0].path.parent}" if runs else "none"
        raise ValueError(f"a comparison needs at least 2 runs, and here is {found}: name more")
    names = names_of(runs)
    comparison = compare(runs, names)
    print(*lines(comparison), sep="\n")
    if args.json:
        write_text_atomic(args.json, json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    if args.out:
        page = finished_page("Comparison of runs", runs, names, notices=summary(comparison))
        write_text_atomic(args.out, page)
        print(f"{args.out}: {len(runs)} runs, {len(page.encode()):,} bytes")
    return 0


if __name__ == "__main__":
    run_main(main)
