"""The run's measurements: one strict JSON object per line, on disk the moment they are made, never twice after a resume.

`metrics.jsonl` is the truth and is only appended to; `metrics.json` is rewritten from it, atomically, at each checkpoint, and
is the second copy by which a resumed run notices what became of the first on the disk: a flipped bit in a digit is still JSON.
A metrics file can cost a run its curves, but never its training: whatever is wrong with one that is found, it is moved
aside under a name that is not in use, what can be read of it is kept, and a message says so.

    metrics.jsonl            {"step": 10, "kind": "train", "tokens_seen": 20480, "loss": 8.91, ...}
    metrics.json             {"run": {...}, "train": [records], "val": [records]}
    metrics-N.jsonl          another run's, found where this one was to start (and its metrics-N.json)
    metrics-damaged-N.jsonl  one with lines that could not be read (and its metrics-damaged-N.json)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from runtime.base.files import make_folder, write_atomic

KINDS = ("train", "val")
HEALTHY_LOAD = (
    0.25,
    4.0,
)  # of its fair share: an expert below learns little, one above is a bottleneck


# -------------------------------------------------------------------------------- records <-> lines
def to_json(value):
    """`value` as plain JSON types and whether a number in it was not finite: such numbers become None.

    Arrays and tensors become lists. Numbers inside lists are kept to 6 digits: an expert's load needs no more, and there
    are blocks x experts of them in a record.
    """
    finite = True

    def convert(value, nested):
        nonlocal finite
        if hasattr(value, "tolist"):  # NumPy and torch, scalars included
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


def _check(record) -> str:
    """What is wrong with a record, or an empty string."""
    if not isinstance(record, dict):
        return f"a record must be a JSON object, not {type(record).__name__}"
    step = record.get("step")
    if type(step) is not int or step < 0:
        return f"step must be a whole number from 0, not {step!r}"
    if record.get("kind") not in KINDS:
        return f"kind must be one of {', '.join(KINDS)}, not {record.get('kind')!r}"
    return ""


def _counted(records: int) -> str:
    return f"{records} record{'s' * (records != 1)}"


def _not_json(name):
    raise ValueError(f"{name} is not JSON")


def _scan(path: Path) -> Iterator[tuple[int, bytes, dict | None, str, bool]]:
    """(line number from 1, line without its end, record or None, what is wrong with it or "", whether it is the last)."""
    with open(path, "rb") as file:
        number, line = 1, file.readline()
        while line:
            following, record = file.readline(), None
            try:
                record = json.loads(line, parse_constant=_not_json)
                problem = _check(record)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
                problem = str(error) or type(error).__name__
            yield number, line.rstrip(b"\r\n"), None if problem else record, problem, not following
            number, line = number + 1, following


def _good_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    for number, line, record, problem, last in _scan(path):
        if record is not None:
            yield line, record
        elif not last:
            raise ValueError(
                f"{path}, line {number}: not a metrics record ({problem}); mend or delete that line"
            )


def read_records(path: str | Path) -> Iterator[dict]:
    """The records of a metrics.jsonl, one at a time.

    A last line that cannot be read was cut off by a kill and is skipped; any other raises ValueError with file and line.
    """
    return (record for _, record in _good_lines(Path(path)))


# ---------------------------------------------------------------------------------------------- log
class MetricsLog:
    """Append-only measurements of one run in `folder`.

    `resume_step` None: a fresh run. Another run's metrics in the folder are moved aside, never appended to.
    `resume_step` N: goes on with what is there up to and including step N; later records, which will be made again, and a
    torn last line are dropped. Metrics of another run (`run_info["run_id"]` differs) or with damaged lines are moved aside.
    Damaged is also a line that says other than metrics.json: it is left out, for no one knows which is right.
    `run_info` (JSON-able) becomes metrics.json's "run"; its "run_id", if any, is written into each record.
    `sinks` get every record too (see `make_sinks`). What a user should hear is in `messages`; `take_messages` empties it.
    Raises ValueError if `folder` cannot be a folder.
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
        self._file = None
        self._last = dict.fromkeys(KINDS, -1)  # last step per kind
        try:
            make_folder(self.folder)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"{folder} is to hold the metrics but it, or a part of it, is a file: give another folder"
            ) from None
        if resume_step is None:
            self._start_fresh()
        else:
            self._adopt(resume_step, compare=True)
            self.write_json()  # what it had of steps that come again must not be compared with them later

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
        """Open the metrics that are there, without records after `last_step` and without what cannot be read or, with `compare`,
        differs from metrics.json; what only that still has is put back."""
        self._bring_back()
        kept, problems, dropped, repeated, torn, foreign = {}, [], 0, 0, False, None
        copy = self._second_copy() if compare else {}
        copied = {kind: max((step for k, step in copy if k == kind), default=-1) for kind in KINDS}
        self._last = dict.fromkeys(KINDS, -1)
        if not self.path.exists():
            self.messages.append(f"{self.path} is not there: it begins anew, with what comes now")
            return self._open()
        try:
            for number, line, record, problem, last in _scan(self.path):
                key = (record["kind"], record["step"]) if record else None
                if problem and last:
                    torn = True
                elif problem:
                    problems.append(f"line {number}: {problem}")
                elif record["step"] <= last_step and (
                    copy.pop(key) != record
                    if key in copy
                    else record["step"] <= copied[record["kind"]] and key not in kept
                ):
                    problems.append(
                        f"line {number}: not what {self.json_path.name} has of step {record['step']}"
                    )
                elif (
                    record.get("run_id") != self.run_id
                    and self.run_id is not None
                    and "run_id" in record
                ):
                    foreign = record["run_id"]
                elif record["step"] > last_step:
                    dropped += 1
                elif record["step"] <= self._last[record["kind"]]:
                    repeated += 1
                else:
                    kept[key] = line
                    self._last[record["kind"]] = record["step"]
        except OSError as error:  # no permission, a folder, a failing disk
            problems.append(error.strerror or type(error).__name__)
        if foreign is not None:
            self._last = dict.fromkeys(KINDS, -1)
            self.messages.append(
                f"{self.path} is run {foreign}'s, not run {self.run_id}'s: moved to {self._move_aside('metrics')}; this run's begin anew"
            )
            return self._open()
        if problems:
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            aside = self._move_aside("metrics-damaged")
            self.messages.append(
                f"{self.path} is damaged ({problems[0]}{more}): moved to {aside}; {_counted(len(kept))} of it kept"
            )
        if torn:
            self.messages.append(f"the last line of {self.path} was cut off and is dropped")
        if dropped:
            self.messages.append(
                f"{_counted(dropped)} after step {last_step} dropped from {self.path}; the resumed run makes them again"
            )
        if repeated:
            self.messages.append(
                f"{_counted(repeated)} of {self.path} dropped: the step was there already"
            )
        if lost := {
            key: record
            for key, record in copy.items()
            if record["step"] <= last_step and key not in kept
        }:
            kept |= {key: _dump(record) for key, record in lost.items()}
            kept = dict(
                sorted(kept.items(), key=lambda item: (item[0][1], KINDS.index(item[0][0])))
            )
            self._last = {
                kind: max((step for k, step in kept if k == kind), default=-1) for kind in KINDS
            }
            self.messages.append(
                f"{_counted(len(lost))} that {self.path} no longer has put back from {self.json_path.name}"
            )
        # Always rewritten: it costs little, and heals a missing line end, too.
        write_atomic(
            self.path, lambda file: file.writelines(line + b"\n" for line in kept.values())
        )
        self._open()

    def _second_copy(self) -> dict[tuple[str, int], dict]:
        """This run's records in metrics.json, by (kind, step); none where it is not there or cannot be read."""
        try:
            whole = json.loads(self.json_path.read_bytes(), parse_constant=_not_json)
            records = [
                record
                for kind in KINDS
                for record in whole[kind]
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
        """If another run's metrics have taken the place of this run's, exchange them."""

        def owner(path: Path) -> str | None:
            return (
                next((record.get("run_id") for _, _, record, _, _ in _scan(path) if record), None)
                if path.is_file()
                else None
            )

        if self.run_id is None or owner(self.path) == self.run_id:
            return
        for aside in sorted(self.folder.glob("metrics-[0-9]*.jsonl")):
            if owner(aside) == self.run_id:
                if self.path.exists():
                    self._move_aside("metrics")
                os.replace(aside, self.path)
                aside.with_suffix(".json").unlink(missing_ok=True)  # made again from the lines
                self.messages.append(f"{aside} is this run's: taken up again as {self.path}")
                return

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def _move_aside(self, stem: str) -> Path:
        """Rename metrics.jsonl and metrics.json to the first free `stem`-N; returns the new path of the former."""
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
        """Write one record: `step`, `kind` ("train" or "val") and what was measured; steps of a kind must increase.

        Numbers that are not finite become null, and the record says `"non_finite": true`. Raises ValueError for a record
        that breaks these rules and OSError if it cannot be written; the file then is as it was.
        """
        record, non_finite = to_json(record)
        if problem := _check(record):
            raise ValueError(f"bad metrics record: {problem}")
        if record["step"] <= self._last[record["kind"]]:
            raise ValueError(
                f"step {record['step']} of {record['kind']} is already in {self.path} (last: {self._last[record['kind']]})"
            )
        if self.run_id is not None:
            record["run_id"] = self.run_id
        if non_finite:
            record["non_finite"] = True
        if not self.path.exists():  # someone tidied up under the running run
            self._reopen()
        line = _dump(record) + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{self.path}: disk full, {written} of {len(line)} bytes written")
        except OSError:
            self._file.truncate(size)  # no half line that the next record would be glued to
            raise
        self._last[record["kind"]] = record["step"]
        for sink in self.sinks:
            sink.append(record)

    def _reopen(self) -> None:
        last = self._last
        self._file.close()
        make_folder(self.folder)
        self._adopt(math.inf)
        self._last = {kind: max(last[kind], self._last[kind]) for kind in KINDS}

    def write_json(self) -> None:
        """Rewrite metrics.json from metrics.jsonl, atomically and in constant memory (validation records aside)."""
        try:
            self._write_json()
        except (
            ValueError,
            FileNotFoundError,
        ):  # damaged or deleted from outside since it was opened
            self._reopen()
            self._write_json()

    def _write_json(self) -> None:
        def write(file):
            val = []
            file.write(b'{"run":' + _dump(self.run_info) + b',\n"train":[')
            separator = b"\n"
            for line, record in _good_lines(self.path):
                if record["kind"] == "val":
                    val.append(line)
                else:
                    file.write(separator + line)
                    separator = b",\n"
            file.write(b'],\n"val":[\n' + b",\n".join(val) + b"]}\n")

        if not self._file.closed:
            os.fsync(self._file.fileno())
        write_atomic(self.json_path, write)

    # ---- reading
    def stream(self) -> Iterator[dict]:
        """The records from the file, one at a time: for readers that need not hold them all, such as draw_plots."""
        return read_records(self.path)

    def records(self) -> list[dict]:
        """All records, in the order they were made."""
        return list(self.stream())

    def take_messages(self) -> list[str]:
        """The messages since the last call."""
        messages, self.messages = self.messages, []
        return messages

    def finish(self) -> None:
        """Write metrics.json for the last time and close everything. A second call does nothing."""
        if self._file.closed:
            return
        self.write_json()
        self._file.close()
        for sink in self.sinks:
            sink.finish()


# ------------------------------------------------------------------------------------------ mirrors
def flatten(record: dict) -> dict[str, float]:
    """A record as named scalars: `train/loss`, ..., and per block `router/block_00/entropy`, `.../load_min`, `.../load_max`,
    `.../dropped_share`. Nulls are left out."""
    flat = {
        f"{record['kind']}/{key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    for name, value in (record.get("score") or {}).items():
        if value is not None:
            flat[f"{record['kind']}/{name}"] = value
    for block, loads in enumerate(record.get("expert_load") or []):
        loads = [load for load in loads if load is not None]
        if loads:
            (
                flat[f"router/block_{block:02d}/load_min"],
                flat[f"router/block_{block:02d}/load_max"],
            ) = min(loads), max(loads)
    for key, name in (("router_entropy", "entropy"), ("dropped_share", "dropped_share")):
        flat |= {
            f"router/block_{block:02d}/{name}": value
            for block, value in enumerate(record.get(key) or [])
            if value is not None
        }
    return flat


class WandbSink:
    """Mirrors records to Weights & Biases. A resumed run (same run_id) goes on in the same chart."""

    def __init__(self, folder: Path, run_info: dict):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "wandb was asked for but is not installed: pip install wandb, or leave --wandb out"
            ) from None
        run_id = run_info.get("run_id")
        folder.mkdir(
            parents=True, exist_ok=True
        )  # wandb writes to a temporary folder where its own does not exist
        try:
            self.run = wandb.init(
                project="gptoss",
                dir=str(folder),
                config=run_info,
                id=run_id,
                resume="allow" if run_id else None,
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb did not start ({error}): run wandb login, or set WANDB_MODE=offline, or leave --wandb out"
            ) from error
        # An axis of our own: wandb's is only allowed to grow, and a resumed run may begin before the step it was killed at.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def append(self, record: dict) -> None:
        self.run.log({"step": record["step"], **flatten(record)})

    def finish(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """Mirrors records to TensorBoard event files in `folder`/tensorboard/<run_id>. TensorBoard hides what is there from later
    steps than the one resumed at (a fresh run: all)."""

    def __init__(self, folder: Path, run_info: dict, resume_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard was asked for but is not installed: pip install tensorboard, or leave --tensorboard out"
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


def make_sinks(
    folder: str | Path,
    *,
    wandb: bool = False,
    tensorboard: bool = False,
    run_info: dict | None = None,
    resume_step: int | None = None,
) -> list:
    """The optional mirrors that were asked for, for `MetricsLog(sinks=...)`. ValueError says what to install if one is missing."""
    run_info, folder = to_json(dict(run_info or {}))[0], Path(folder)
    sinks = []
    if tensorboard:
        sinks.append(TensorBoardSink(folder, run_info, resume_step))
    if wandb:
        sinks.append(WandbSink(folder, run_info))
    return sinks
