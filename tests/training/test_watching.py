"""--watch: the page of a run, as a child of the process that trains."""

from __future__ import annotations

import http.client
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest

from runtime.training import watching
from runtime.training.watching import watched
from tests.builders_runs import Run


def plan_of(folder, watch: bool = True, is_first: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(watch=watch, graph_dir=str(folder)),
        ranks=SimpleNamespace(is_first=is_first),
    )


class Child:
    """Stands in for the server's process."""

    started: list[Child] = []

    def __init__(self, command, **_):
        self.command, self.ended = command, False
        self.started.append(self)

    def terminate(self):
        self.ended = True

    def wait(self, seconds=None):
        assert self.ended


@pytest.fixture
def children(monkeypatch) -> list[Child]:
    monkeypatch.setattr(Child, "started", [])
    monkeypatch.setattr(watching.subprocess, "Popen", Child)
    return Child.started


def test_the_page_is_served_inside_of_the_block_alone(tmp_path, capfd):
    """The folder need not be there yet. The address is printed by the child, as is the tunnel."""
    with watched(plan_of(tmp_path / "later")):
        said, until = "", time.monotonic() + 60
        while "ssh -L" not in said:
            assert time.monotonic() < until
            time.sleep(0.05)
            said += capfd.readouterr().out
        port = int(re.search(r"^watch    http://127\.0\.0\.1:(\d+)/$", said, re.MULTILINE)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=60).request("GET", "/")


def test_it_ends_if_the_run_does_not(tmp_path, children):
    with pytest.raises(KeyError), watched(plan_of(tmp_path)):
        raise KeyError
    assert [child.ended for child in children] == [True]


def test_a_child_that_cannot_start_never_stops_the_run(tmp_path, monkeypatch, capsys):
    """Where a process may have no child, as at a limit of processes, the run ended with it."""

    def refused(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(watching.subprocess, "Popen", refused)
    ran = []
    with watched(plan_of(tmp_path)):
        ran.append(True)
    said = capsys.readouterr().out
    assert ran == [True] and said.startswith("no page  ") and said.count("\n") == 1
    assert "Resource temporarily unavailable" in said and "python -m scripts.watch" in said
    # An error of the run is the run's, and no other is told with it.
    with pytest.raises(OSError, match="disk") as failed, watched(plan_of(tmp_path)):
        raise OSError("disk")
    assert failed.value.__context__ is None


@pytest.mark.parametrize("watch, is_first", [(False, True), (True, False)])
def test_nobody_else_starts_one(tmp_path, children, watch, is_first):
    with watched(plan_of(tmp_path, watch, is_first)):
        pass
    assert children == []


def test_a_run_has_its_page_until_it_ends(data, tmp_path, children):
    run = Run(data, tmp_path)
    assert run("--max_steps", 4, "--watch") == 0
    (child,) = children
    expected = ["-m", "scripts.watch", str(run.graph_dir), "--parent", str(os.getpid())]
    assert child.command == [sys.executable, *expected] and child.ended
    # It belongs to the machine's run, and may be given again or taken back.
    assert run("--resume", "--max_steps", 6, "--no-watch", fresh=False) == 0
    assert len(children) == 1
