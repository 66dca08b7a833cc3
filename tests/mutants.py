"""Put faults back into copies of the code, one at a time. The tests must notice each of them.

    python -m tests.mutants                  all: ten minutes of one core, fewer of two;
                                             writes benchmarks/results/mutants.json
    python -m tests.mutants --only T2 M6.2   those of some faults (of the original implementation,
                                             as the tests' docstrings number them), or single ones
    python -m tests.mutants --left           those that the stored result did not catch, or that
                                             are new or changed since; it keeps all others
    python -m tests.mutants -j 1             one at a time; else one per core, up to 4

tests/mutants.toml lists the mutants: a few changed tokens, and the tests that should fail because
of them. All of these tests must first pass on the unchanged copy, or a mutant would prove nothing.
Exit code 1 if a mutant survives.
Some need what their tests need: a C compiler, Chromium. Without it they survive, and say why.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from benchmarks.common import REPO, RESULTS, SHARED, save_results
from runtime.base import cli
from tests import anchors

# A mutant takes about three.
HANG_SECONDS = 600
# Unless more are asked for: each has a copy of the tree and a process with the libraries.
MOST_JOBS = 4
# pytest's exit codes: tests failed; a module could not be collected, or a Ctrl-C came through.
CAUGHT = (1, 2)

# The faults of the original implementation that running it confirmed. Each must be mutated here,
# or be said not to apply.
# fmt: off
CONFIRMED = [
    "M1", "M2", "M2c", "M3", "M3b", "M4", "M4b", "M4c", "M4d", "M5", "M5b", "M5d", "M5f", "M6",
    "M7", "M8", "M9", "T1", "T2", "T3", "T4", "T6", "T7", "T8", "T9", "T10", "T11", "T12", "T13",
    "T14", "T16", "T17", "T18", "T19", "T21", "T22", "D1", "D3", "D5", "D6", "D7", "D8", "D9",
    "D10", "D13", "D15", "D16", "P1", "P2", "P3", "P4", "P5", "P7", "P8", "P9", "P10", "P12",
    "P13", "P14", "P15", "P16", "S1", "S2",
]
# fmt: on
# Those confirmed in part.
IN_PART = ["T5", "T15", "D2", "D4"]
# The fault of a mutant of code that the original implementation has nothing like.
OWN = "own"
# fault -> why nothing here can have it
NOT_APPLICABLE: dict[str, str] = {}


@dataclass(frozen=True)
class Mutant:
    # One of CONFIRMED, IN_PART or OWN.
    fault: str
    # What is put back, in a line.
    what: str
    file: str
    # Occurs once in the file, as tests/anchors.py reads it.
    old: str
    new: str
    # Node ids for pytest. Without [...]: all cases of a test.
    tests: tuple[str, ...]

    def put_into(self, source: str) -> str:
        """Return the file's source with this mutant in it, or raise ValueError."""
        try:
            return anchors.replace(source, self.old, self.new, self.file.endswith(".py"))
        except ValueError as error:
            raise ValueError(f"{self.file} has {error}") from None


def load(path: Path) -> list[Mutant]:
    """Return the mutants of a TOML file, in its order."""
    return parsed(path.read_text(encoding="utf-8"))


def parsed(text: str) -> list[Mutant]:
    """Return the mutants of a TOML text, in its order."""
    listed = tomllib.loads(text)["mutant"]
    return [Mutant(**{**fields, "tests": tuple(fields["tests"])}) for fields in listed]


MUTANTS = load(Path(__file__).with_suffix(".toml"))


def names(mutants: Sequence[Mutant] | None = None) -> list[str]:
    """Name each by its fault, numbered where a fault has several mutants: T2.1, T2.2, ..."""
    seen: dict[str, int] = {}
    of_fault = [one.fault for one in (MUTANTS if mutants is None else mutants)]
    result = []
    for fault in of_fault:
        seen[fault] = seen.get(fault, 0) + 1
        result.append(fault if of_fault.count(fault) == 1 else f"{fault}.{seen[fault]}")
    return result


# --------------------------------------------------------------------------------------- the runner
@dataclass
class Outcome:
    name: str
    mutant: Mutant
    caught: bool
    # The test that failed, or why it survives.
    said: str
    # What that test said (it may name folders of this machine).
    why: str
    seconds: float


def copy_tree(folder: Path) -> None:
    """Copy the working tree, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=REPO, check=True, capture_output=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, folder / name)


class Tests:
    """`python -m pytest` in a copy, as often as asked.

    Each run is a child of a process that has imported the libraries and nothing of ours, which
    saves it three seconds.
    """

    SERVER = """
import json, os, sys
import hypothesis, numpy, pytest, tiktoken, torch
for line in sys.stdin:
    arguments, printed = json.loads(line)
    if not (pid := os.fork()):
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
    NOT_FOR_TESTS = (
        "CI",
        "PYTHONPATH",
        "PYTEST_ADDOPTS",
        "PYTEST_CURRENT_TEST",
        "GPTOSS_TRACEBACK",
    )

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {k: v for k, v in os.environ.items() if k not in self.NOT_FOR_TESTS}
        environment |= {"OMP_NUM_THREADS": "1", "GPTOSS_SHARED": str(SHARED)}
        # Compiled code of mutants is not for keeping.
        environment["XDG_CACHE_HOME"] = str(folder.parent / "cache")
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, "-c", self.SERVER],
            cwd=folder,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.kill()
        self._server.communicate()

    def run(
        self, tests: Sequence[str], *flags: str, seconds: float = HANG_SECONDS
    ) -> tuple[int | None, list[tuple[str, str, str]], str]:
        """Return (exit code, cases, the end of what it printed). The code is None where it hangs.

        A case is (node id; passed, skipped or failed; why).
        """
        report, printed = self.folder.parent / "report.xml", self.folder.parent / "printed"
        report.unlink(missing_ok=True)
        arguments = [
            "-q",
            "-m",
            "",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *flags,
            *tests,
        ]
        self._server.stdin.write(json.dumps([arguments, str(printed)]) + "\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        if hangs := not select.select([self._server.stdout], [], [], seconds)[0]:
            os.killpg(pid, signal.SIGKILL)
        code = int(self._server.stdout.readline())
        cases = []
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            kinds = {child.tag for child in case}
            failed = kinds & {"failure", "error"}
            result = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            why = " ".join(" ".join(child.get("message", "") for child in case).split())
            cases.append((name, result, why))
        return None if hangs else code, cases, printed.read_text(errors="replace")[-3000:]


@contextmanager
def mutated(folder: Path, one: Mutant, turn: int) -> Iterator[None]:
    """Hold a mutant in a copy. Raise ValueError unless what it replaces is there once."""
    path, original = folder / one.file, (folder / one.file).read_text(encoding="utf-8")
    try:
        path.write_text(one.put_into(original), encoding="utf-8")
        # Compiled modules are told apart by this, in whole seconds.
        os.utime(path, (turn, turn))
        yield
    finally:
        path.write_text(original, encoding="utf-8")
        os.utime(path, (turn + 1, turn + 1))


def ended(test: str, cases: Sequence[tuple[str, str, str]]) -> set[str]:
    """How the cases of a test ended."""
    return {result for case, result, _ in cases if case == test or case.startswith(f"{test}[")}


@contextmanager
def copy_of_the_tree() -> Iterator[Tests]:
    """Copy the working tree into a temporary folder, and yield the means to run its tests."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = Path(temporary) / "copy"
        copy_tree(folder)
        with Tests(folder) as tests:
            yield tests


def run_unchanged(tests: Tests, some: Sequence[str]) -> tuple[int, list[tuple[str, str, str]]]:
    """Return (exit code, cases) of some tests on the unchanged code.

    Raises ValueError if they do not run.
    """
    code, cases, printed = tests.run(some, seconds=2 * HANG_SECONDS)
    if code not in (0, 1):
        raise ValueError(f"the tests do not run on the unchanged code: {printed.strip()[-500:]}")
    return code, cases


def try_one(
    tests: Tests, name: str, one: Mutant, turn: int, cases: Sequence[tuple[str, str, str]]
) -> Outcome:
    """What one mutant's tests say of it. `cases`: what all tests said of the unchanged code."""
    started, why, caught = time.perf_counter(), "", False
    before = [ended(test, cases) for test in one.tests]
    if any("failed" in results for results in before):
        said = "its tests fail on the unchanged code too"
    elif not any("passed" in results for results in before):
        said = "none of its tests runs on this machine"
    else:
        with mutated(tests.folder, one, 1_000_000_000 + 10 * turn):
            code, after, printed = tests.run(one.tests, "-x")
        caught = code in CAUGHT
        if caught:
            failures = ((case, why[:200]) for case, result, why in after if result == "failed")
            said, why = next(failures, (f"exit code {code}", ""))
            if why.startswith("NameError"):
                # The code has other names by now: any test fails, and the fault was never made.
                caught, said = False, f"the mutant does not run: {why}"
        elif code is None:
            said = "its tests hang"
        elif code == 0:
            said = "its tests pass"
        else:
            said = f"pytest ended with {code}: {' '.join(printed.split())[-200:]}"
    return Outcome(name, one, caught, said, why, time.perf_counter() - started)


def run(chosen: Sequence[tuple[str, Mutant]], say=print, jobs: int = 1) -> list[Outcome]:
    """Try some mutants, each under a name, `jobs` at a time, in as many copies of the tree."""
    with ExitStack() as stack:
        copies: SimpleQueue[Tests] = SimpleQueue()
        for _ in range(jobs):
            copies.put(stack.enter_context(copy_of_the_tree()))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))

        def in_a_copy(function, *arguments):
            tests = copies.get()
            try:
                return function(tests, *arguments)
            finally:
                copies.put(tests)

        everything = sorted({test for _, one in chosen for test in one.tests})
        started = time.perf_counter()
        shares = filter(None, (everything[job::jobs] for job in range(jobs)))
        results = list(pool.map(lambda share: in_a_copy(run_unchanged, share), shares))
        cases = [case for _, some in results for case in some]
        code = max((code for code, _ in results), default=0)
        seconds = time.perf_counter() - started
        say(f"{len(everything)} tests on the unchanged code: exit code {code}, {seconds:.0f} s")

        def attempt(turn: int) -> Outcome:
            o = in_a_copy(try_one, *chosen[turn], turn, cases)
            verdict = "caught  " if o.caught else "SURVIVES"
            reason = o.said + ": " * bool(o.why) + o.why
            what = f"{o.mutant.file}: {o.mutant.what}"
            say(f"{verdict} {o.name:6} {o.seconds:5.1f} s  {what}  [{reason}]")
            return o

        return list(pool.map(attempt, range(len(chosen))))


# ------------------------------------------------------------------------------------- the results
def entry_of(o: Outcome) -> dict:
    """Return what is stored of an outcome."""
    return {
        "id": o.name,
        "fault": o.mutant.fault,
        "what": o.mutant.what,
        "file": o.mutant.file,
        "caught": o.caught,
        "by": o.said,
        "seconds": round(o.seconds, 1),
    }


def caught_before(stored: dict) -> dict[Mutant, dict]:
    """Return what a stored result says of the mutants that it caught, as they were then.

    Each entry gets the commit that it was tried at. A result of code that was not committed says
    nothing: nobody can look that code up.
    """
    environment, lists, kept = stored["environment"], {}, {}
    for entry in stored["mutants"]:
        commit = entry.get("commit", environment["commit"])
        is_known = "commit" in entry or not environment["uncommitted_changes"]
        if entry["caught"] and is_known:
            if commit not in lists:
                lists[commit] = {(one.fault, one.what): one for one in listed_at(commit)}
            kept[lists[commit][entry["fault"], entry["what"]]] = entry | {"commit": commit}
    return kept


def listed_at(commit: str) -> list[Mutant]:
    """Return the mutants of a commit."""
    command = ["git", "show", f"{commit}:tests/mutants.toml"]
    shown = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
    return parsed(shown.stdout)


def store(outcomes: Sequence[Outcome], kept: dict[Mutant, dict]) -> int:
    """Write the result of all mutants, tried now or before; return how many survive."""
    tried = {o.mutant: entry_of(o) for o in outcomes}
    named = zip(names(), MUTANTS, strict=True)
    entries = [(tried.get(one) or kept[one]) | {"id": name} for name, one in named]
    caught = sum(entry["caught"] for entry in entries)
    save_results(
        "mutants",
        {
            "caught": caught,
            "made": len(entries),
            "faults": len({one.fault for one in MUTANTS} - {OWN}),
            "not_applicable": NOT_APPLICABLE,
            "seconds": round(sum(entry["seconds"] for entry in entries)),
            "mutants": entries,
        },
    )
    return len(entries) - caught


def default_jobs() -> int:
    """Return the cores that this process may use, at most MOST_JOBS."""
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_JOBS, len(os.sched_getaffinity(0)))
    return min(MOST_JOBS, os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    only_help = "faults (T2) or single mutants (T2.3); nothing is stored then"
    parser.add_argument("--only", nargs="+", metavar="ID", help=only_help)
    left_help = "new and changed mutants, and those that the stored result did not catch"
    parser.add_argument("--left", action="store_true", help=left_help)
    jobs_help = f"mutants tried at the same time (here {default_jobs()})"
    parser.add_argument(
        "-j", "--jobs", type=int, default=default_jobs(), metavar="N", help=jobs_help
    )
    arguments = parser.parse_args(argv)
    only = arguments.only
    if arguments.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {arguments.jobs}: mutants at a time")
    everything = list(zip(names(), MUTANTS, strict=True))
    faults = list(dict.fromkeys(one.fault for one in MUTANTS))
    if unknown := set(only or ()) - {name for name, _ in everything} - set(faults):
        raise ValueError(f"there is no mutant {min(unknown)}; there are {', '.join(faults)}")
    if only and arguments.left:
        raise ValueError("give --only or --left, not both: --left chooses the mutants")
    kept: dict[Mutant, dict] = {}
    if arguments.left:
        kept = caught_before(json.loads((RESULTS / "mutants.json").read_text(encoding="utf-8")))
    started = time.perf_counter()
    chosen = [
        (name, one)
        for name, one in everything
        if one not in kept and (only is None or name in only or one.fault in only)
    ]
    outcomes = run(chosen, lambda line: print(line, flush=True), arguments.jobs)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} mutants caught in {time.perf_counter() - started:.0f} s")
    if only is None:
        return int(store(outcomes, kept) > 0)
    return int(caught < len(outcomes))


if __name__ == "__main__":
    cli.run_main(main)
