"""Read the curves of runs: of one that is over, or of one that still writes them.

This is the one reader of what a run leaves in its graph_dir, for pages and comparisons:

    metrics.jsonl   the run's records; metrics-N.jsonl those of other runs
    metrics.json    its "run": the settings, the data and the machine
    events.jsonl    what happened to it; samples.jsonl what it wrote (runtime.training.diary)

A damaged file costs its own lines and leaves a message, never an exception. Nothing is written, and
neither torch nor NumPy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from runtime.training.json_lines import Lines
from runtime.training.metrics import record_of
from runtime.training.run_curves import Run

# A file that is no run's may have any number of them.
MOST_RUNS, MOST_MESSAGES, MOST_NOTES = 16, 8, 2_000
MOST_CHARACTERS = 20_000
# Of a metrics.json: the part that holds "run" in our own files, and the most that is read.
HEAD_BYTES, MOST_INFO_BYTES = 1 << 20, 1 << 26
# A float64 holds every whole number up to here.
MOST_STEPS = 1 << 53
# Most of a record of many experts. To parse it takes 8 times as long as to parse the others, and
# most records' is never shown. Its characters cannot stand in a text: there a quote is escaped.
LOADS = re.compile(rb',\s*"expert_load":\s*(\[\[[-+0-9.eE,\[\]nul\s]*\]\])')


def split_record(line: bytes) -> tuple[dict | None, str]:
    """Return (record, what is wrong with it), as record_of; its expert_load may still be bytes."""
    found = LOADS.search(line)
    rest = line[: found.start()] + line[found.end() :] if found else line
    record, problem = record_of(rest)
    if record is None:
        return None, problem
    if record["step"] > MOST_STEPS:
        return None, f"step must be at most {MOST_STEPS}"
    if found:
        record["expert_load"] = found[1]
    return record, ""


class _MetricsFile:
    """One metrics file: its runs by run_id. They are more than one where files were joined."""

    def __init__(self, path: Path, within: Path | None):
        self.path, self.lines = path, Lines(path, within)
        self.info_lines = Lines(path.with_suffix(".json"), within)
        self.info: dict = {}
        self.info_problem = ""
        self.runs: dict[str, Run] = {}
        self.messages: list[str] = []
        self.damaged = 0
        self.generation = self.lines.generation

    def poll(self) -> bool:
        """Read what is new; return whether anything is."""
        news = self._poll_info()
        if self.lines.changed():
            news = True
            for number, line in self.lines.read():
                self._follow()
                if line.strip():
                    self._take(number, line)
            self._follow()
            if self.lines.rest and split_record(self.lines.rest)[0]:
                self._take(self.lines.number + 1, self.lines.rest)
                self.lines.take_rest()
        if news:
            self._finish()
        return news

    def _follow(self) -> None:
        """Forget the records of a file that was replaced."""
        if self.generation == self.lines.generation:
            return
        self.generation, self.messages, self.damaged = self.lines.generation, [], 0
        for run in self.runs.values():
            run.restart()

    def _take(self, number: int, line: bytes) -> None:
        record, problem = split_record(line)
        run_id = record.get("run_id") if record else None
        # Early versions wrote none.
        run_id = run_id if isinstance(run_id, str) else next(reversed(self.runs), "")
        if run_id not in self.runs and len(self.runs) >= MOST_RUNS:
            # Of a folder that one run after the other began in, those whose file was moved aside.
            self.runs = {key: run for key, run in self.runs.items() if run.last_step >= 0}
        if run_id not in self.runs and len(self.runs) >= MOST_RUNS:
            record, problem = None, f"of more than {MOST_RUNS} runs"
        if record is None:
            self.damaged += 1
            if self.damaged <= MOST_MESSAGES:
                self.messages.append(
                    f"{self.path.name}, line {number}: not a metrics record ({problem[:200]}); "
                    "it is left out"
                )
            return
        self.runs.setdefault(run_id, Run(self.path, run_id)).take(record)

    def _poll_info(self) -> bool:
        lines = self.info_lines
        if not lines.changed():
            return False
        self.info, self.info_problem = {}, lines.problem
        if lines.is_there:
            try:
                self.info = read_info(lines.path)
            except (OSError, ValueError) as error:
                self.info_problem = str(error)
        return True

    def _finish(self) -> None:
        """Give the runs what is known of all of them."""
        run_id = self.info.get("run_id")
        if self.info and not any(run.last_step >= 0 for run in self.runs.values()):
            # It has begun, and has no record yet.
            owner = run_id if isinstance(run_id, str) else ""
            self.runs.setdefault(owner, Run(self.path, owner))
        more = self.damaged - MOST_MESSAGES
        messages = self.messages + [f"{more} more lines like these"] * (more > 0)
        for lines, problem in (
            (self.lines, self.lines.problem),
            (self.info_lines, self.info_problem),
        ):
            messages = messages + [f"{lines.path.name}: {problem}"] * bool(problem)
        for run in self.runs.values():
            # Early versions gave their records no run_id.
            run.info = self.info if run_id is None or run.run_id in ("", run_id) else {}
            run.modified, run.messages = self.lines.modified, messages


def read_info(path: Path) -> dict:
    """Return "run" of a metrics.json, without parsing its records. Raise ValueError, OSError."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        text = head.decode("utf-8", "replace")
        try:
            # Our own file begins with it.
            start = re.match(r'\s*\{\s*"run"\s*:\s*', text)
            info = json.JSONDecoder().raw_decode(text, start.end())[0] if start else None
        except (ValueError, RecursionError):
            info = None
        if info is None:
            info = _run_of(head + file.read(MOST_INFO_BYTES))
    return info if isinstance(info, dict) else {}


def _run_of(text: bytes) -> object:
    """Return "run" of a whole JSON file. Raise ValueError."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {str(error)[:200]}") from None
    return whole.get("run") if isinstance(whole, dict) else None


class _Notes:
    """A file of notes, events or samples: JSON objects with a step, the newest MOST_NOTES of them.

    A damaged line is left out. replaces: a note takes the place of those of later steps, and of
    one with the same step and prompt, because they were made again after a resume.
    """

    def __init__(self, path: Path, within: Path | None, replaces: bool):
        self.lines, self.replaces = Lines(path, within), replaces
        self.notes: list[dict] = []
        self.generation = self.lines.generation

    def poll(self) -> bool:
        if not self.lines.changed():
            return False
        for _, line in self.lines.read():
            self._follow()
            record, _ = record_of(line, ())
            if record is not None:
                self.notes.append(_plain(record))
        self._follow()
        del self.notes[:-MOST_NOTES]
        return True

    def _follow(self) -> None:
        if self.generation != self.lines.generation:
            self.generation, self.notes = self.lines.generation, []

    def of(self, run: Run) -> list[dict]:
        """Return the notes of a run."""
        own = [note for note in self.notes if note.get("run_id", run.run_id) == run.run_id]
        if not self.replaces:
            return own
        kept: dict[tuple, dict] = {}
        for note in own:
            while kept and next(reversed(kept))[0] > note["step"]:
                kept.popitem()
            kept[note["step"], note.get("prompt")] = note
        return list(kept.values())


def _plain(note: dict) -> dict:
    """Return a note's numbers and texts; a file may hold anything."""
    return {
        name: value[:MOST_CHARACTERS] if isinstance(value, str) else value
        for name, value in note.items()
        if isinstance(value, (str, int, float, bool))
    }


class Follower:
    """A folder of metrics that may still grow: `poll` reads what is new, by byte offset.

    within: a folder that no file may link out of; None: files may be links. `runs` are those of
    metrics.jsonl, then those of metrics-1.jsonl, metrics-2.jsonl, ...; a run keeps its object.
    """

    def __init__(self, folder: str | Path, within: str | Path | None = None):
        self.folder = Path(folder)
        self.within = None if within is None else Path(within)
        self._files: dict[str, _MetricsFile] = {}
        self._events = _Notes(self.folder / "events.jsonl", self.within, False)
        self._samples = _Notes(self.folder / "samples.jsonl", self.within, True)
        self.runs: list[Run] = []

    def poll(self) -> bool:
        """Read what is new; return whether anything is."""
        for name in metrics_files(self.folder):
            self._files.setdefault(name, _MetricsFile(self.folder / name, self.within))
        news = [file.poll() for file in self._files.values()]
        news += [self._events.poll(), self._samples.poll()]
        if not any(news):
            return False
        # A file that is no more has no records.
        ordered = sorted(self._files.items(), key=lambda item: _order(item[0]))
        self.runs = [
            run
            for _, file in ordered
            for run in file.runs.values()
            if run.last_step >= 0 or (file.info and run.info)
        ]
        for run in self.runs:
            run.events, run.samples = self._events.of(run), self._samples.of(run)
        return True


def _order(name: str) -> tuple[int, str]:
    number = re.fullmatch(r"metrics-(\d{1,9})\.jsonl", name)
    return (int(number[1]) if number else 0), name


def metrics_files(folder: Path) -> list[str]:
    """Return the names of a folder's metrics files: metrics.jsonl, and other runs' by number."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    pattern = re.compile(r"metrics(-\d{1,9})?\.jsonl")
    return sorted((name for name in names if pattern.fullmatch(name)), key=_order)


def run_folders(folder: str | Path) -> list[Path]:
    """Return the folders with metrics: `folder` itself, and those in it."""
    folder = Path(folder)
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        inside = []
    return [path for path in (folder, *inside) if metrics_files(path)]


def read_runs(folder: str | Path) -> list[Run]:
    """Return the runs of a folder, metrics.jsonl's first. Raise ValueError without any."""
    folder = Path(folder)
    follower = Follower(folder)
    follower.poll()
    if follower.runs:
        for run in follower.runs:
            run.info = run.info or _info_of_checkpoint(folder, run.run_id)
        return follower.runs
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "is not there"
        raise ValueError(f"{folder} {reason}: give the graph_dir of a run, a folder")
    if metrics_files(folder):
        raise ValueError(f"{folder} has no record of a run yet: train first, or look again later")
    inside = [str(path) for path in run_folders(folder)][:3]
    hint = f", such as {' or '.join(inside)}" if inside else ""
    raise ValueError(f"{folder} holds no metrics.jsonl: give the graph_dir of a run{hint}")


def _info_of_checkpoint(folder: Path, run_id: str) -> dict:
    """Return what a run's newest checkpoint in the folder says of its settings; {} without one."""
    if not any(folder.glob("*.pt")):
        return {}
    # Here, because it imports PyTorch.
    from runtime.checkpoint.folder import find_latest

    try:
        source, _ = find_latest(folder, optimizer=False)
    except ValueError:
        return {}
    if source.run.get("run_id") != run_id:
        return {}
    return {
        "run_id": run_id,
        "model": dataclasses.asdict(source.model_config),
        "train": source.train_config,
        "kind": source.stage.get("kind", "pretraining"),
        "fingerprint": source.data_fingerprint,
        "tokenizer": source.tokenizer_state or {},
    }


def read_run(folder: str | Path) -> Run:
    """Return the run that a folder's metrics.jsonl holds. Raise ValueError if there is none."""
    return read_runs(folder)[0]
