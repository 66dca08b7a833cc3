"""What every benchmark stores beside its figures, so that they mean something later: command, commit, hardware, versions."""
from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from runtime.files import write_text_atomic

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
SHARED = Path(os.environ.get("GPTOSS_SHARED", REPO.parent / "shared"))  # real text, for those who have it
PACKAGES = ("torch", "numpy", "tiktoken", "tokenizers", "datasets", "safetensors", "transformers")


def environment() -> dict:
    """Command, commit, hardware and versions of this run, in plain JSON values; what is not there is None or left out."""
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
            "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None, "gpus": gpus,
        },
        "versions": {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"} | _versions(),
    }


def save_results(name: str, results: dict) -> Path:
    """Write benchmarks/results/NAME.json: the environment and the results. Returns its path."""
    path = RESULTS / f"{name}.json"
    write_text_atomic(path, json.dumps({"environment": environment(), **results}, indent=1, allow_nan=False) + "\n")
    print(f"wrote {path.relative_to(REPO)}")
    return path


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, `repeats` times each in turns, so that a slow spell of the machine meets all of them alike.

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


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and greatest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _command() -> str:
    """The command line, as one would type it in the repository."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    start = ["python", "-m", spec.name] if spec else ["python", os.path.relpath(sys.argv[0] or "-", REPO)]
    return shlex.join(start + sys.argv[1:])


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()
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
