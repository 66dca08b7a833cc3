"""Types that only get better: mypy's errors per file, next to the counts that are allowed.

    python -m tests.ratchet            exit code 1 if a file has more errors than tests/ratchet.json
    python -m tests.ratchet --write    store the counts of today, if none is higher than before

A file that is not in the list may have none. What a count falls to becomes the new limit.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
COUNTS = Path(__file__).with_suffix(".json")
CHECKED = ("*.py", "runtime/**/*.py", "scripts/*.py")
ERROR = re.compile(r"^(?P<file>[^:]+):\d+: error: ", re.MULTILINE)


def counted(output: str) -> dict[str, int]:
    """Return mypy's errors per file, from what it printed."""
    files = (match["file"].replace("\\", "/") for match in ERROR.finditer(output))
    return dict(sorted(collections.Counter(files).items()))


def compared(now: dict[str, int], allowed: dict[str, int]) -> tuple[list[str], list[str]]:
    """Return a line for each file with more errors than allowed, and for each with fewer."""
    worse, better = [], []
    for file in sorted(now.keys() | allowed.keys()):
        errors, limit = now.get(file, 0), allowed.get(file, 0)
        line = f"{file}: {errors} errors of mypy, {limit} allowed"
        if errors > limit:
            worse.append(line)
        elif errors < limit:
            better.append(line)
    return worse, better


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store the counts of today")
    args = parser.parse_args(argv)
    from mypy import api

    files = [str(path.relative_to(REPO)) for part in CHECKED for path in REPO.glob(part)]
    output, problem, code = api.run(sorted(files))
    if code > 1:
        print(output + problem, file=sys.stderr)
        return code
    now = counted(output)
    allowed = json.loads(COUNTS.read_text(encoding="utf-8"))
    worse, better = compared(now, allowed)
    if worse:
        lines = [line for line in output.splitlines() if line.partition(":")[0] in now]
        print("\n".join([*lines, "", *worse]))
        return 1
    if args.write:
        COUNTS.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    elif better:
        print("\n".join([*better, "fewer errors: python -m tests.ratchet --write"]))
    print(f"types: {sum(now.values())} errors, none more than allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
