"""A run's measurements: one strict JSON object per line, written at once, once each.

`metrics.jsonl` is the truth and is only appended to. `metrics.json` is rewritten from it,
atomically, at each checkpoint. It is the second copy: by it a resumed run notices damage to the
first on the disk, because a flipped bit in a digit is still JSON. A damaged metrics file can cost a
run its curves, but never its training: it is moved aside under an unused name, what can be read of
it is kept, and a message says so.

    metrics.jsonl            {"step": 10, "kind": "train", "tokens_seen": 20480, "loss": 8.91, ...}
    metrics.json             {"run": {...}, "train": [records], "val": [records], "score": [...]}
    metrics-N.jsonl          another run's, found where this one started (with its metrics-N.json)
    metrics-damaged-N.jsonl  one with lines that could not be read (with its ...-N.json)
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.base.files import make_folder, write_atomic

KINDS = ("train", "val", "score")
# The ends of the names of a score's interval.
LOW, HIGH = "_low", "_high"
# Shares of its fair load: an expert below them learns little, one above them is a bottleneck.
HEALTHY_LOAD = (0.25, 4.0)


# -------------------------------------------------------------------------------- records <-> lines
def to_json(value):
    """Return `value` as plain JSON types, and whether a number in it was not finite.

    Such numbers become None. Arrays and tensors become lists. Numbers inside lists keep 6 digits:
    an expert's load needs no more, and a record holds blocks x experts of them.
    """
    finite = True

    def convert(value, nested):
        nonlocal finite
        # NumPy and torch, scalars included.
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, dict):
            return {str(key): convert(item, nested) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item, True) for item in value]
        if isinstance(value, float):
            if not math.isfinite(value):
                finite = False
                return None
            return float(f"{value:.6g}") if nested else float(value)
        if value is None or isinstance(value, (bool, int, str)):
            return value
        raise ValueError(
            f"a metric must be a number, text, list or dict, not {value!r} ({type(value).__name__})"
        )

    return convert(value, False), not finite


def _dump(value) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _check(record, kinds: Sequence[str] = KINDS) -> str:
    """Return what is wrong with a record, or an empty string. kinds: allowed; () = any."""
    if not isinstance(record, dict):
        return f"a record must be a JSON object, not {type(record).__name__}"
    step = record.get("step")
    if type(step) is not int or step < 0:
        return f"step must be a whole number from 0, not {step!r}"
    if kinds and record.get("kind") not in kinds:
        return f"kind must be one of {', '.join(kinds)}, not {record.get('kind')!r}"
    return ""


def _counted(records: int) -> str:
    return f"{records} record{'s' * (records != 1)}"


def _not_json(name):
    raise ValueError(f"{name} is not JSON")


def record_of(line: bytes, kinds: Sequence[str] = KINDS) -> tuple[dict | None, str]:
    """Return the record that a line of a metrics.jsonl holds, or None and what is wrong with it.

    kinds: that it may be of; () = any.
    """
    try:
        record = json.loads(line, parse_constant=_not_json)
        problem = _check(record, kinds)
    except (ValueError, RecursionError) as error:
        # Not JSON, or not UTF-8.
        problem = str(error) or type(error).__name__
    return (None, problem) if problem else (record, "")


def _scan(path: Path) -> Iterator[tuple[int, bytes, dict | None, str, bool]]:
    """Yield (line number, line, record, problem, whether it is the last line).

    Numbers start at 1; lines come without their end; the record is None where there is a problem.
    """
    with open(path, "rb") as file:
        number, line = 1, file.readline()
        while line:
            following = file.readline()
            record, problem = record_of(line)
            yield number, line.rstrip(b"\r\n"), record, problem, not following
            number, line = number + 1, following


def _good_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    for number, line, record, problem, last in _scan(path):
        if record is not None:
            yield line, record
        elif not last:
            raise ValueError(
                f"{path}, line {number}: not a metrics record ({problem}); fix or delete that line"
            )


def read_records(path: str | Path) -> Iterator[dict]:
    """Return an iterator over the records of a metrics.jsonl.

    Skip a last line that cannot be read: a kill cut it off. Raise ValueError with file and line for
    any other.
    """
    return (record for _, record in _good_lines(Path(path)))


# ---------------------------------------------------------------------------------------------- log
class MetricsLog:
    """Append-only measurements of one run in `folder`.

    resume_step None: a fresh run. Another run's metrics in the folder are moved aside, never
    appended to.
    resume_step N: keep the records up to and including step N. Later records, which will be made
    again, and a torn last line are dropped. Metrics of another run (`run_info["run_id"]` differs)
    or with damaged lines are moved aside. A line that disagrees with metrics.json counts as damaged
    and is dropped: we cannot tell which is right.
    run_info: becomes metrics.json's "run" (JSON-able); its "run_id", if any, goes into each record.
    sinks: get every record too (see `make_loggers`).

    `messages` holds what the user should be told; `take_messages` empties it. Raise ValueError if
    `folder` cannot be a folder.
    """

    def __init__(
        self,
        folder: str | Path,
        resume_step: int | None = None,
        run_info: dict | None = None,
        sinks=(),
    ):
        self.folder = Path(folder)
        self.path, self.json_path = self.folder / "metrics.jsonl", self.folder / "metrics.json"
        self.run_info = to_json(dict(run_info or {}))[0]
        self.run_id = self.run_info.get("run_id")
        self.sinks = list(sinks)
        self.messages: list[str] = []
        self._file: io.FileIO | None = None
        # Last step per kind.
        self._last = dict.fromkeys(KINDS, -1)
        try:
            make_folder(self.folder)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"{folder} is to hold the metrics but it, or a part of it, is a file: "
                "give another folder"
            ) from None
        if resume_step is None:
            self._start_fresh()
        else:
            self._adopt(resume_step, compare=True)
            # Its records of steps that will be made again must not be compared with the new ones.
            self.write_json()

    # ---- opening
    def _start_fresh(self) -> None:
        if self.path.exists() and (not self.path.is_file() or self.path.stat().st_size):
            self.messages.append(
                f"{self.path} is another run's: moved to {self._move_aside('metrics')}"
            )
        elif self.json_path.exists():
            self._move_aside("metrics")
        self._open()
        self.write_json()

    def _adopt(self, last_step: float, compare: bool = False) -> None:
        """Open the metrics that are there, without records after `last_step` or unreadable lines.

        With `compare`, also drop lines that differ from metrics.json, and put back records that
        only metrics.json still has.
        """
        self._bring_back()
        kept: dict[tuple[str, int], bytes] = {}
        problems: list[str] = []
        dropped = repeated = 0
        torn = False
        foreign = None
        copy = self._second_copy() if compare else {}
        copied = {kind: max((step for k, step in copy if k == kind), default=-1) for kind in KINDS}
        self._last = dict.fromkeys(KINDS, -1)
        if not self.path.exists():
            self.messages.append(f"{self.path} not found: starting a new metrics file")
            return self._open()
        try:
            for number, line, record, problem, last in _scan(self.path):
                if record is None:
                    if last:
                        torn = True
                    else:
                        problems.append(f"line {number}: {problem}")
                    continue
                kind, step = key = record["kind"], record["step"]
                if key in copy:
                    differs = step <= last_step and copy.pop(key) != record
                else:
                    differs = step <= last_step and step <= copied[kind] and key not in kept
                run_id = record.get("run_id")
                if differs:
                    problems.append(
                        f"line {number}: not what {self.json_path.name} has of step {step}"
                    )
                elif run_id != self.run_id and self.run_id is not None and "run_id" in record:
                    foreign = run_id
                elif record["step"] > last_step:
                    dropped += 1
                elif step <= self._last[kind]:
                    repeated += 1
                else:
                    kept[key] = line
                    self._last[kind] = step
        except OSError as error:
            # No permission, a folder, or a failing disk.
            problems.append(error.strerror or type(error).__name__)
        if foreign is not None:
            self._last = dict.fromkeys(KINDS, -1)
            self.messages.append(
                f"{self.path} is run {foreign}'s, not run {self.run_id}'s: moved to "
                f"{self._move_aside('metrics')}; starting a new metrics file"
            )
            return self._open()
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            aside = self._move_aside("metrics-damaged")
            self.messages.append(
                f"{self.path} is damaged ({problems[0]}{more}): moved to {aside}; "
                f"{_counted(len(kept))} of it kept"
            )
        if torn:
            self.messages.append(f"the last line of {self.path} was cut off and is dropped")
        if dropped:
            self.messages.append(
                f"{_counted(dropped)} after step {last_step} dropped from {self.path}; "
                "the resumed run makes them again"
            )
        if repeated:
            self.messages.append(
                f"{_counted(repeated)} of {self.path} dropped: the step was there already"
            )
        lost = {
            key: record
            for key, record in copy.items()
            if record["step"] <= last_step and key not in kept
        }
        if lost:
            kept |= {key: _dump(record) for key, record in lost.items()}
            kept = dict(
                sorted(kept.items(), key=lambda item: (item[0][1], KINDS.index(item[0][0])))
            )
            self._last = {
                kind: max((step for k, step in kept if k == kind), default=-1) for kind in KINDS
            }
            self.messages.append(
                f"{_counted(len(lost))} that {self.path} no longer has put back from "
                f"{self.json_path.name}"
            )
        # Always rewrite: it costs little, and also mends a missing line end.
        write_atomic(
            self.path, lambda file: file.writelines(line + b"\n" for line in kept.values())
        )
        self._open()

    def _second_copy(self) -> dict[tuple[str, int], dict]:
        """Return this run's records in metrics.json by (kind, step); none if unreadable."""
        try:
            whole = json.loads(self.json_path.read_bytes(), parse_constant=_not_json)
            records = [
                record
                for kind in KINDS
                # Earlier versions had no scores.
                for record in (whole[kind] if kind in whole or kind in KINDS[:2] else ())
                if not _check(record) and record["kind"] == kind
            ]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return {
            (record["kind"], record["step"]): record
            for record in records
            if self.run_id in (None, record.get("run_id", self.run_id))
        }

    def _bring_back(self) -> None:
        """Exchange the metrics if another run's have replaced this run's."""

        def owner(path: Path) -> str | None:
            if not path.is_file():
                return None
            return next(
                (record.get("run_id") for _, _, record, _, _ in _scan(path) if record), None
            )

        if self.run_id is None or owner(self.path) == self.run_id:
            return
        for aside in sorted(self.folder.glob("metrics-[0-9]*.jsonl")):
            if owner(aside) == self.run_id:
                if self.path.exists():
                    self._move_aside("metrics")
                os.replace(aside, self.path)
                # It is made again from the lines.
                aside.with_suffix(".json").unlink(missing_ok=True)
                self.messages.append(f"{aside} is this run's: taken up again as {self.path}")
                return

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def _move_aside(self, stem: str) -> Path:
        """Rename both metrics files to the first free `stem`-N; return metrics.jsonl's new path."""
        if self._file is not None:
            self._file.close()
        number = 1
        while any((self.folder / f"{stem}-{number}{end}").exists() for end in (".jsonl", ".json")):
            number += 1
        aside = self.folder / f"{stem}-{number}.jsonl"
        for source, target in ((self.path, aside), (self.json_path, aside.with_suffix(".json"))):
            if source.exists():
                os.replace(source, target)
        return aside

    # ---- writing
    def append(self, record: dict) -> None:
        """Write one record: `step`, `kind` (one of KINDS) and what was measured.

        Steps of a kind must increase. Numbers that are not finite become null, and the record says
        `"non_finite": true`. Raise ValueError for a record that breaks these rules, OSError if it
        cannot be written; the file is then as it was.
        """
        record, non_finite = to_json(record)
        if problem := _check(record):
            raise ValueError(f"bad metrics record: {problem}")
        if record["step"] <= self._last[record["kind"]]:
            raise ValueError(
                f"step {record['step']} of {record['kind']} is already in {self.path} "
                f"(last: {self._last[record['kind']]})"
            )
        if self.run_id is not None:
            record["run_id"] = self.run_id
        if non_finite:
            record["non_finite"] = True
        # Someone may have deleted the file during the run.
        if not self.path.exists():
            self._reopen()
        assert self._file is not None
        line = _dump(record) + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{self.path}: disk full, {written} of {len(line)} bytes written")
        except OSError:
            # Leave no half line that the next record would be glued to.
            self._file.truncate(size)
            raise
        self._last[record["kind"]] = record["step"]
        for sink in self.sinks:
            sink.append(record)

    def _reopen(self) -> None:
        last = self._last
        assert self._file is not None
        self._file.close()
        make_folder(self.folder)
        self._adopt(math.inf)
        self._last = {kind: max(last[kind], self._last[kind]) for kind in KINDS}

    def write_json(self) -> None:
        """Rewrite metrics.json from metrics.jsonl, atomically.

        Memory is constant, except for the records of validations and scores.
        """
        try:
            self._write_json()
        except (ValueError, FileNotFoundError):
            # Damaged or deleted from outside since it was opened.
            self._reopen()
            self._write_json()

    def _write_json(self) -> None:
        def write(file):
            others: dict[str, list[bytes]] = {kind: [] for kind in KINDS[1:]}
            file.write(b'{"run":' + _dump(self.run_info) + b',\n"train":[')
            separator = b"\n"
            for line, record in _good_lines(self.path):
                if record["kind"] in others:
                    others[record["kind"]].append(line)
                else:
                    file.write(separator + line)
                    separator = b",\n"
            for kind, lines in others.items():
                if lines or kind == "val":
                    file.write(b'],\n"' + kind.encode() + b'":[\n' + b",\n".join(lines))
            file.write(b"]}\n")

        assert self._file is not None
        if not self._file.closed:
            os.fsync(self._file.fileno())
        write_atomic(self.json_path, write)

    # ---- reading
    def stream(self) -> Iterator[dict]:
        """Return an iterator over the file's records, for readers that need not hold them all."""
        return read_records(self.path)

    def records(self) -> list[dict]:
        """Return all records, in the order they were made."""
        return list(self.stream())

    def take_messages(self) -> list[str]:
        """Return the messages since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def finish(self) -> None:
        """Write metrics.json for the last time and close everything. A second call does nothing."""
        assert self._file is not None
        if self._file.closed:
            return
        self.write_json()
        self._file.close()
        for sink in self.sinks:
            sink.finish()


# ------------------------------------------------------------------------------------------ mirrors
def flatten(record: dict) -> dict[str, float]:
    """Return a record as named scalars, without nulls.

    Names are `train/loss`, ..., and per block `router/block_00/entropy`, `.../load_min`,
    `.../load_max`, `.../dropped_share`.
    """
    flat = {
        f"{record['kind']}/{key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    own = (record.get("score") or {}) | (record.get("metrics") or {})
    for name, value in own.items():
        if value is not None:
            flat[f"{record['kind']}/{name}"] = value
    for block, loads in enumerate(record.get("expert_load") or []):
        loads = [load for load in loads if load is not None]
        if loads:
            flat[f"router/block_{block:02d}/load_min"] = min(loads)
            flat[f"router/block_{block:02d}/load_max"] = max(loads)
    for key, name in (("router_entropy", "entropy"), ("dropped_share", "dropped_share")):
        flat |= {
            f"router/block_{block:02d}/{name}": value
            for block, value in enumerate(record.get(key) or [])
            if value is not None
        }
    return flat


class WandbSink:
    """Mirrors records to Weights & Biases. A resumed run (same run_id) continues its chart."""

    def __init__(self, folder: Path, run_info: dict):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "wandb was asked for but is not installed: pip install wandb, or leave --wandb out"
            ) from None
        run_id = run_info.get("run_id")
        # wandb writes to a temporary folder if its own does not exist.
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project="gptoss",
                dir=str(folder),
                config=run_info,
                id=run_id,
                name=run_info.get("train", {}).get("run_name") or None,
                resume="allow" if run_id else None,
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb did not start ({error}): run wandb login, or set WANDB_MODE=offline, "
                "or leave --wandb out"
            ) from error
        # Our own axis: wandb's may only grow, and a resumed run may begin before the step it was
        # killed at.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def append(self, record: dict) -> None:
        self.run.log({"step": record["step"], **flatten(record)})

    def finish(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """Mirrors records to TensorBoard event files in `folder`/tensorboard/<run_id>.

    TensorBoard hides older events from steps after the one resumed at (a fresh run: all of them).
    """

    def __init__(self, folder: Path, run_info: dict, resume_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard was asked for but is not installed: pip install tensorboard, "
                "or leave --tensorboard out"
            ) from None
        events = Path(folder) / "tensorboard" / str(run_info.get("run_id", "run"))
        self.writer = SummaryWriter(
            log_dir=str(events), purge_step=0 if resume_step is None else resume_step + 1
        )

    def append(self, record: dict) -> None:
        for name, value in flatten(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def make_loggers(
    folder: str | Path,
    *,
    wandb: bool = False,
    tensorboard: bool = False,
    run_info: dict | None = None,
    resume_step: int | None = None,
) -> list:
    """Return the optional mirrors that were asked for, as `MetricsLog(sinks=...)` takes them.

    Raise ValueError, which says what to install, if one is missing.
    """
    run_info, folder = to_json(dict(run_info or {}))[0], Path(folder)
    sinks: list[TensorBoardSink | WandbSink] = []
    if tensorboard:
        sinks.append(TensorBoardSink(folder, run_info, resume_step))
    if wandb:
        sinks.append(WandbSink(folder, run_info))
    return sinks
