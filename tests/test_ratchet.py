"""tests/ratchet.py: a file may not get more errors of mypy than it had."""

from __future__ import annotations

import json

from tests import ratchet
from tests.conftest import REPO


def test_errors_are_counted_by_file():
    output = (
        "a.py:3: error: no  [x]\n"
        "runtime/b.py:1: error: no  [y]\n"
        "runtime/b.py:2: note: see\n"
        "runtime/b.py:9: error: no  [z]\n"
        "Found 3 errors in 2 files (checked 4 source files)\n"
    )
    assert ratchet.counted(output) == {"a.py": 1, "runtime/b.py": 2}


def test_more_errors_fail_and_a_new_file_may_have_none():
    allowed = {"a.py": 2, "b.py": 1}
    worse, better = ratchet.compared({"a.py": 3, "new.py": 1}, allowed)
    assert [line.split(":")[0] for line in worse] == ["a.py", "new.py"]
    assert [line.split(":")[0] for line in better] == ["b.py"]
    assert ratchet.compared(allowed, allowed) == ([], [])


def test_the_limits_are_of_files_that_are_there_and_the_root_has_none():
    limits = json.loads(ratchet.COUNTS.read_text())
    assert all((REPO / file).is_file() and count > 0 for file, count in limits.items())
    assert [file for file in limits if "/" not in file] == []
    assert sum(limits.values()) <= 60
