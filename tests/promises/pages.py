"""Guarantees about the pages of runs: whatever a run's files hold, the server answers."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from runtime.serving.watch import Server, Watch
from tests.builders_watch import MadeRun
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, folder
from tests.promises.damage import damaged

FILES = ("metrics.jsonl", "metrics.json", "events.jsonl", "samples.jsonl")
DEEP = b"[" * 100_000 + b"]" * 100_000
LINES = (
    DEEP,
    b'{"step": 9, "kind": "train", "loss": ' + DEEP + b"}",
    b'{"step": 9, "kind": "train", "expert_load": ' + DEEP + b"}",
    b'{"step": ' + b"9" * 5_000 + b', "kind": "train", "loss": 1}',
    b'{"step": 9007199254740992, "kind": "train", "loss": 1}',
    b'{"step": 9, "kind": "train", "loss": NaN, "lr": Infinity}',
    b'{"step": 9, "kind": "train", "loss": 1e999, "seconds": -1e308, "tokens_seen": 1e308}',
    b'{"step": 9, "kind": "train", "loss": {"a": 1}, "expert_load": [[1, 2], [3]]}',
    b'{"step": 9, "kind": "val", "loss": "<script>"}',
    b'{"step": 9, "kind": "score", "score": {"__proto__": 1, "constructor": 2}}',
    b'{"step": 9, "kind": "train", "run_id": {"a": [1]}}',
    b'{"step": 9, "kind": "\\ud800", "text": "\\ud800", "time": 1e999, "prompt": []}',
    b'{"step": true, "kind": "train"}',
    b"\xff\xfe\x00\x00",
    b"\x00" * 10_000,
    b"null",
    b"",
    b"x" * 1_000_000,
)
INFOS = (
    b'{"run": {"train": {"max_steps": 1e999, "run_name": {"a": 1}}, "model": 5}}',
    b'{"run": {"model": {"d_model": "wide", "num_experts": -1}, "source": [1]}}',
    b'{"run": ' + b'{"a":' * 2_000 + b"1" + b"}" * 2_001,
    b'{"run": [1]}',
    b"[]",
    b"",
)


def _write_line(path: Path, r: random.Random) -> str:
    """Put a line that is none of ours into a file: before, between or after the others."""
    line = r.choice(LINES)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines.insert(r.randrange(len(lines) + 1), line + b"\n")
    path.write_bytes(b"".join(lines))
    return f"a line {line[:60]!r}"


def _damage_bytes(path: Path, r: random.Random) -> str:
    changed, what = damaged(path.read_bytes(), r, truncate=r.random() < 0.5)
    path.write_bytes(changed)
    return what


def _replace(path: Path, r: random.Random) -> str:
    """Put something else where a file was."""
    path.unlink()
    how = r.choice(("gone", "folder", "pipe", "loop", "device", "noise"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "noise":
        path.write_bytes(r.randbytes(r.randrange(1, 50_000)))
    return how


def _replace_info(path: Path, r: random.Random) -> str:
    info = r.choice(INFOS)
    path.with_name("metrics.json").write_bytes(info)
    return f"metrics.json {info[:60]!r}"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    _write_line,
    _damage_bytes,
    _replace,
    _replace_info,
)


def _clear(at: Path) -> None:
    if at.exists():
        shutil.rmtree(at)


def _asked(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, f"{path}: {answer.status} {body[:200]!r}"
        return body
    finally:
        connection.close()


def _refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is in the answer")


def _check(server: Server, steps: int) -> None:
    """Hold that the page and the data come, are JSON, and show the run next to the damaged one."""
    server.watch._read_at = -1e9
    body = _asked(server.port, "/data?loads=0.0.-1")
    data = json.loads(body, parse_constant=_refuse_constant)
    healthy = [run for run in data["runs"] if run["name"] == "healthy"]
    assert len(healthy) == 1, f"the other run is shown {len(healthy)} times"
    assert healthy[0]["tables"]["train"]["step"] == [*range(10, steps + 1, 10)]
    assert healthy[0]["messages"] == []
    page = _asked(server.port, "/").decode()
    json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def _case(server: Server, runs: Path, healthy: MadeRun, i: int) -> None:
    """Damage a new run and continue the healthy one; hold what `_check` says."""
    r = random.Random(FIRST_SEED + i)
    broken = runs / "broken"
    _clear(broken)
    run = MadeRun(broken, f"run {i}").train(10, 100)
    run.note("events", {"step": 50, "kind": "save", "text": "x", "time": 1.0})
    run.note("samples", {"step": 50, "prompt": "a", "text": "b"})
    run.log.finish()
    steps = 30 + 10 * i
    healthy.train(steps, steps)
    if i % 2:
        # The page has read it already.
        _check(server, steps)
    what = DAMAGES[i % len(DAMAGES)](broken / r.choice(FILES), r)
    try:
        _check(server, steps)
    except (OSError, http.client.HTTPException, ValueError, AssertionError) as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def damaged_runs(count: int) -> Tally:
    """Damage a run's files in `count` ways while a page follows them.

    Held: the server answers, in strict JSON, and shows the run next to it as it is.
    """
    tally = Tally()
    with folder() as at:
        runs = at / "runs"
        healthy = MadeRun(runs / "healthy", "healthy", max_steps=10**6).train(10, 20)
        server = Server(Watch([runs]), 0)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            for i in range(count):
                attempt(tally, f"case {i}", lambda i=i: _case(server, runs, healthy, i))  # type: ignore
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    return tally


PROMISES: list[Promise] = [
    Promise(
        6,
        "A damaged metrics file never ends the page of runs, nor touches another run's curve",
        damaged_runs,
        60,
        200,
        200,
    ),
]
