"""Run tests and store which fail, and why, as each of them ends: a run that is killed keeps what it
has seen.

    python -m benchmarks.gpu_tests --name h100 -- -m gpu -n 10 tests/test_gpu.py
    python -m benchmarks.gpu_tests --name failed --failed_in out/h100.json -- --maxfail 4 --tb long

What follows -- goes to pytest. --failed_in takes the tests that failed in a run of benchmarks.gpu,
and ends at once where none did. Results go to benchmarks/results/tests_NAME.json.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.common import REPO
from benchmarks.measures import Measures
from runtime.base import cli

SLOWEST = 10
SAVE_SECONDS = 1.0


class Recorder:
    """A pytest plugin: outcomes in total, reasons by test, the slowest tests. With pytest-xdist it
    sits in the process that all others report to.
    """

    def __init__(self, out: Measures):
        self.out, self.saved = out, time.monotonic()
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.why: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._fail(report.nodeid, report)
            self.save()

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self._fail(report.nodeid, report)
        elif report.when == "call" or report.skipped:
            self.outcomes[report.outcome] += 1
        if report.failed or time.monotonic() > self.saved + SAVE_SECONDS:
            self.save()

    def pytest_sessionfinish(self) -> None:
        self.save()

    def _fail(self, test: str, report) -> None:
        """A test that fails in two of set-up, call and tear-down is one."""
        self.outcomes["failed"] += test not in self.why
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash else str(report.longrepr)
        self.why.setdefault(test, " ".join(said.split())[:500])

    def save(self) -> None:
        """Into the file, with what is known by now."""
        self.saved = time.monotonic()
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])[:SLOWEST]
        self.out.results |= {
            "failed": self.why,
            "slowest_seconds": {test: round(s, 2) for test, s in slowest},
        }
        self.out.results["measures"] = {
            name: {"value": count, "unit": "tests"} for name, count in self.outcomes.items()
        }
        self.out.save()


def failed_in(path: str) -> list[str]:
    """Tests that failed in a stored run of benchmarks.gpu, that still are in the repository.

    ValueError if it cannot be read.
    """
    try:
        stages = json.loads(Path(path).read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is no result of benchmarks.gpu ({type(error).__name__}): "
            "run its first command before"
        ) from error
    failed = [
        test
        for stage in stages.values()
        for results in stage.get("results", {}).values()
        for test in results.get("failed", {})
        if "slowest_seconds" in results
    ]
    return [test for test in failed if (REPO / test.partition("::")[0]).is_file()]


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/tests_NAME.json"
    )
    parser.add_argument(
        "--failed_in", metavar="FILE", help="only what failed in this file of benchmarks.gpu"
    )
    parser.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="of pytest, after --")
    args = parser.parse_args(argv)
    chosen = failed_in(args.failed_in) if args.failed_in else []
    out = Measures(f"tests_{args.name}")
    recorder = Recorder(out)
    recorder.save()
    if args.failed_in and not chosen:
        print(f"no test failed in {args.failed_in}")
        return 0
    # Deterministic runs are among the tests, and cuBLAS reads this at its first call in a process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return int(pytest.main(["-vv", *args.pytest, *chosen], plugins=[recorder]))


if __name__ == "__main__":
    cli.run_main(main)
