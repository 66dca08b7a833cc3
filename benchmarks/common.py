"""What every benchmark stores next to its figures, so that they mean something later: command,
commit, hardware, versions.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.base.files import write_text_atomic

REPO = Path(__file__).resolve().parent.parent
# Where save_results writes; benchmarks.gpu gives each of its stages a folder of its own.
RESULTS = Path(os.environ.get("GPTOSS_RESULTS", REPO / "benchmarks" / "results"))
SHARED = Path(
    os.environ.get("GPTOSS_SHARED", REPO.parent / "shared")
)  # real text, for those who have it
FOREIGN_CORES = 0.15  # a sample during which other processes used more than this is not counted
PACKAGES = ("torch", "numpy", "tiktoken", "tokenizers", "datasets", "safetensors", "transformers")


def environment() -> dict:
    """Command, commit, hardware and versions of this run, in plain JSON values; what is not there
    is None or left out.
    """
    gpus = []
    if "torch" in sys.modules:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": _command(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else None,
            "gpus": gpus,
        },
        "versions": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        }
        | _versions(),
    }


def save_results(name: str, results: dict, quiet: bool = False) -> Path:
    """Write NAME.json in benchmarks/results (or GPTOSS_RESULTS), the environment included; its
    path.
    """
    path = RESULTS / f"{name}.json"
    write_text_atomic(
        path,
        json.dumps({"environment": environment(), **results}, indent=1, allow_nan=False) + "\n",
    )
    if not quiet:
        print(f"wrote {path.relative_to(REPO) if path.is_relative_to(REPO) else path}")
    return path


def replace_between(path: Path, contents: dict[str, str]) -> None:
    """Put each of `contents` between the lines <!-- NAME --> and <!-- /NAME --> of a Markdown file.

    ValueError unless both are there once.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, content=content: m[1] + content + "\n" + m[2],
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(
                f"{path} must hold the lines <!-- {name} --> and <!-- /{name} --> once"
            )
    write_text_atomic(path, text)
    print(f"wrote {path.name}")


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times each in turns, so that a slow spell of the machine
    meets all of them alike.

    The first round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass
class Samples:
    """Values of one function, measured while the machine did little else."""

    values: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)  # in which round each value was measured
    discarded: int = 0  # samples during which other processes used more than the limit
    disturbed: bool = False  # too few were clean: the least disturbed ones were taken instead


def foreign_cores(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Cores that other processes used on average between two `cpu_clock()`s."""
    wall, machine, own = (b - a for a, b in zip(before, after, strict=True))
    return max(machine - own, 0.0) / wall


def cpu_clock(stat: str = "/proc/stat") -> tuple[float, float, float]:
    """Seconds: (wall, CPU time that the machine has spent working, CPU time of this process).

    Linux; elsewhere the last two are 0.
    """
    try:
        with open(stat) as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(
                int, file.readline().split()[1:9]
            )
    except OSError:
        return time.perf_counter(), 0.0, 0.0
    return (
        time.perf_counter(),
        (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
        sum(os.times()[:4]),
    )


def alternate_undisturbed(
    functions: dict[str, Callable[[], float]],
    repeats: int,
    most_foreign_cores: float = FOREIGN_CORES,
    clock: Callable[[], tuple[float, float, float]] | None = None,
) -> dict[str, Samples]:
    """What each function returns, `repeats` times, called in turns; a value is discarded if other
    processes used more than `most_foreign_cores` while it was measured, and measured again in a
    later round.

    After 4 * repeats rounds a function that has too few clean values takes its least disturbed
    ones. clock: `cpu_clock`, or one that counts other processes of what is measured, too.
    """
    clock = clock or cpu_clock
    samples = {name: Samples() for name in functions}
    spoilt: dict[str, list[tuple[float, float, int]]] = {name: [] for name in functions}
    for round_ in range(4 * repeats):
        for name, function in functions.items():
            if len(samples[name].values) < repeats:
                before = clock()
                value = function()
                foreign = foreign_cores(before, clock())
                if foreign <= most_foreign_cores:
                    samples[name].values.append(value)
                    samples[name].rounds.append(round_)
                else:
                    spoilt[name].append((foreign, value, round_))
    for name, sample in samples.items():
        sample.discarded = len(spoilt[name])
        if (missing := repeats - len(sample.values)) > 0:
            sample.disturbed = True
            least = sorted(spoilt[name])[:missing]
            sample.values += [value for _, value, _ in least]
            sample.rounds += [round_ for _, _, round_ in least]
    return samples


def peak_resident_bytes(function: Callable[[], object]) -> int | None:
    """Most resident memory of this process while `function` runs, above what is in use before it.

    None where it cannot be asked.

    Linux with glibc: malloc gives back what was freed, the kernel resets the peak
    (proc_pid_clear_refs(5), value 5). The process should do nothing else, and should have run
    `function` before: what libraries keep for themselves from the first time on is then in use
    already.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(which: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(which))


def run_worker(module: str, flags: list[str], **environment: str | None) -> Any:
    """Run `python -m MODULE FLAGS --worker_out FILE` in a process of its own and return the JSON
    value that it wrote there.

    environment: variables to set, or to remove where None.
    """
    variables = (
        os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))}
        | environment
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        done = subprocess.run(
            [sys.executable, "-m", module, *flags, "--worker_out", str(path)],
            capture_output=True,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "killed").splitlines()
            why = next(
                (
                    line
                    for line in reversed(lines)
                    if re.match(r"error:|[\w.]+(Error|Exception|Unsupported)\b", line)
                ),
                lines[-1],
            )
            raise ValueError(f"python -m {module} {shlex.join(flags)} failed: {why}")
        return json.loads(path.read_text())


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _command() -> str:
    """The command line, as one would type it in the repository."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    start = (
        ["python", "-m", spec.name]
        if spec
        else ["python", os.path.relpath(sys.argv[0] or "-", REPO)]
    )
    return shlex.join(start + sys.argv[1:])


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=REPO, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
