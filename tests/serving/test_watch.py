"""The server of the page of runs: what it answers, to whom, and what it must never read."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.serving import watch as watch_module
from runtime.serving.watch import Handler, Server, Watch, folders_of_runs, parsed_have
from scripts import watch as command
from tests.builders_watch import MadeRun
from tests.conftest import REPO
from tests.test_readme import sentences

ROUTES = ("/", "/data", "/data?have=0.0.10.1", "/nothing")


@contextlib.contextmanager
def served(*folders: Path) -> Iterator[Server]:
    with Server(Watch(folders), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", headers: dict | None = None):
    """Return (status, headers, body) of a request with exactly these headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in (
        {"Host": f"127.0.0.1:{server.port}"} if headers is None else headers
    ).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def raw(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def have_of(data: dict) -> str:
    return "_".join(
        f"{run['number']}.{run['version']}.{run['step']}.{run['notes']}" for run in data["runs"]
    )


def data_of(server: Server, known: dict | None = None, loads: str = "") -> dict:
    """Return what the server sends to a page that has the answer `known`."""
    # What was read a moment ago is not read again.
    server.watch._read_at = -1e9
    query = f"session={server.watch.session}&have={have_of(known)}" if known else ""
    status, _, body = ask(server, f"/data?{query}{loads and '&loads=' + loads}")
    assert status == 200, body
    return json.loads(body)


# ---------------------------------------------------------------------------------- who may ask
def test_the_page_comes_with_a_policy_that_names_its_own_script_alone(tmp_path):
    MadeRun(tmp_path / "run").train(10, 50)
    with served(tmp_path) as server:
        status, headers, body = ask(server, "/")
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert status == 200
    for name in ("script", "style"):
        text = page.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "Access-Control-Allow-Origin" not in headers
    assert len(page) - len(page.partition('id="data">')[2]) < 60_000


@pytest.mark.parametrize("path", ROUTES)
def test_a_host_that_is_not_this_machine_is_refused(tmp_path, path):
    """A page of a site whose name points at 127.0.0.1 would else read the runs as its own."""
    with served(tmp_path) as server:
        port = server.port
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            f"localhost.evil.example:{port}",
            f"127.0.0.1:{port}@evil.example",
            "127.0.0.2",
            "0.0.0.0",
            "",
            f"127.0.0.1:{port}, evil.example",
        ):
            status, headers, body = ask(server, path, headers={"Host": host})
            assert status == 403 and b"runs" not in body, host
        assert ask(server, path, headers={})[0] == 403
        twice = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"
        assert raw(server, twice.encode()).startswith(b"HTTP/1.1 403 ")
        for host in (f"127.0.0.1:{port}", "localhost", "LOCALHOST:9999", f"[::1]:{port}"):
            assert ask(server, path, headers={"Host": host})[0] in (200, 404), host


def test_only_get_is_answered(tmp_path):
    with served(tmp_path) as server:
        for method in ("HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"):
            status, headers, _ = ask(server, "/", method)
            assert (status, headers["Allow"]) == (405, "GET"), method
        # A body that is not read must not be taken for the next request.
        request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n"
        hidden = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert raw(server, request + hidden).count(b"HTTP/1.1 ") == 1
        assert ask(server, "/")[0] == 200


def test_no_path_of_a_url_reaches_a_file(tmp_path):
    MadeRun(tmp_path / "run").train(10, 20)
    with served(tmp_path) as server:
        for path in (
            "/metrics.jsonl",
            "/run/metrics.jsonl",
            "/../watch.py",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//etc/passwd",
            "/data/../run",
            "/data/",
            "/index.html",
            "http://127.0.0.1/etc/passwd",
        ):
            assert ask(server, path)[0] in (400, 404), path


@pytest.mark.parametrize(
    "query",
    [
        "have=x",
        "have=0.0.0",
        "have=0.0.0.0_",
        "have=-1.0.0.0",
        "have=../../etc.0.0.0",
        "have=" + "_".join(["0.0.0.0"] * 101),
        "have=" + "9" * 5000,
        "have=%00",
        "have=%D9%A0.0.0.0",
        "loads=x",
        "loads=0.0.-2",
        "loads=" + "9" * 5000 + ".0.0",
        "&".join("a=b" for _ in range(9)),
    ],
)
def test_a_bad_question_gets_a_line(tmp_path, query, capfd):
    MadeRun(tmp_path / "run").train(10, 20)
    with served(tmp_path) as server:
        status, _, body = raw_status(server, f"/data?{query}")
        assert status == 400 and body.count(b"\n") == 1
        assert ask(server, "/data")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def raw_status(server: Server, path: str):
    answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def test_numbers_of_no_run_are_of_no_use(tmp_path):
    """A page that was open before a restart may ask for runs that are not there."""
    MadeRun(tmp_path / "run").train(10, 20)
    with served(tmp_path) as server:
        session = server.watch.session
        status, _, body = ask(server, f"/data?session={session}&have=7.0.10.1&loads=8.0.5")
        data = json.loads(body)
        assert status == 200 and [run["number"] for run in data["runs"]] == [0]
        assert "tables" in data["runs"][0] and "loads" not in data


def test_another_start_sends_everything_again(tmp_path):
    """The same numbers may be other runs: a page showed the records of two runs as one curve."""
    MadeRun(tmp_path / "run").train(10, 20)
    with served(tmp_path) as first:
        data = data_of(first)
    with served(tmp_path) as second:
        assert second.watch.session != data["session"]
        status, _, body = ask(second, f"/data?session={data['session']}&have={have_of(data)}")
        assert status == 200 and "tables" in json.loads(body)["runs"][0]


def test_a_tunnel_gets_it_compressed(tmp_path):
    MadeRun(tmp_path / "run").train(10, 200)
    with served(tmp_path) as server:
        plain = ask(server, "/")[2]
        headers = {"Host": "localhost", "Accept-Encoding": "gzip, deflate"}
        _, sent, body = ask(server, "/", headers=headers)
        assert sent["Content-Encoding"] == "gzip" and len(body) < len(plain) / 2
        assert b"<title>" in gzip.decompress(body)


# ---------------------------------------------------------------------------- what is sent when
def steps_of(table: dict) -> list[int]:
    return table["step"]


def test_a_record_is_sent_once(tmp_path):
    run = MadeRun(tmp_path / "run").train(10, 100)
    with served(tmp_path) as server:
        first = data_of(server)
        (known,) = first["runs"]
        assert steps_of(known["tables"]["train"]) == [*range(10, 101, 10)]
        assert steps_of(known["tables"]["val"]) == [100]
        (nothing,) = data_of(server, first)["runs"]
        assert "tables" not in nothing and "more" not in nothing and "events" not in nothing
        run.train(110, 130)
        (new,) = data_of(server, first)["runs"]
        # That of step 100 may come again, because a validation may follow a training record.
        assert steps_of(new["more"]["train"]) == [100, 110, 120, 130] and new["step"] == 130
        assert steps_of(new["more"]["router"]) == [100, 110, 120, 130]


def test_a_validation_after_the_record_of_its_step_is_not_lost(tmp_path):
    """The page asked between the two lines, and never saw the second."""
    run = MadeRun(tmp_path / "run").train(10, 90)
    record = run.log
    from tests.builders_watch import train_record, val_record

    record.append(train_record(100))
    with served(tmp_path) as server:
        first = data_of(server)
        record.append(val_record(100))
        record.append(train_record(110))
        (new,) = data_of(server, first)["runs"]
        assert steps_of(new["more"]["val"]) == [100]


def test_a_resume_that_makes_steps_again_sends_the_curve_again(tmp_path):
    MadeRun(tmp_path / "run").train(10, 200)
    with served(tmp_path) as server:
        first = data_of(server)
        # Killed after step 200 and resumed from the checkpoint of step 100.
        resumed = MadeRun(tmp_path / "run", seed=1, resume_step=100)
        resumed.train(110, 120)
        (again,) = data_of(server, first)["runs"]
        assert again["number"] == first["runs"][0]["number"]
        assert again["version"] > first["runs"][0]["version"]
        assert steps_of(again["tables"]["train"]) == [*range(10, 121, 10)]
        assert steps_of(again["tables"]["val"]) == [100]


def test_a_page_that_slept_gets_the_thinned_curve(tmp_path):
    run = MadeRun(tmp_path / "run").train(10, 20)
    with served(tmp_path) as server:
        first = data_of(server)
        run.train(30, 20_000)
        (again,) = data_of(server, first)["runs"]
        assert len(again["tables"]["train"]["step"]) == 1000 and "more" not in again


def test_loads_are_sent_for_the_run_that_is_shown_and_once(tmp_path):
    run = MadeRun(tmp_path / "run").train(10, 50)
    with served(tmp_path) as server:
        first = data_of(server)
        assert "loads" not in first
        whole = data_of(server, first, loads="0.0.-1")["loads"]
        assert whole["loads"]["step"] == [10, 20, 30, 40, 50] and "from" not in whole
        assert [len(whole["loads"]["load"]), len(whole["loads"]["load"][0])] == [5, 4]
        run.train(60, 70)
        more = data_of(server, first, loads="0.0.50")["loads"]
        assert more["loads"]["step"] == [60, 70] and more["from"] == 50
        other = data_of(server, first, loads="0.7.50")["loads"]
        assert len(other["loads"]["step"]) == 7 and "from" not in other


def test_notes_and_settings_come_when_they_change(tmp_path):
    run = MadeRun(tmp_path / "run").train(10, 20)
    with served(tmp_path) as server:
        first = data_of(server)
        run.note("events", {"step": 20, "kind": "spike", "text": "loss 9.1"})
        (new,) = data_of(server, first)["runs"]
        assert [event["kind"] for event in new["events"]] == ["spike"]
        second = data_of(server)
        run.note("samples", {"step": 20, "prompt": "Once", "text": " upon"})
        (new,) = data_of(server, second)["runs"]
        assert new["samples"] == [{"step": 20, "prompt": "Once", "text": " upon"}]


# ------------------------------------------------------------------------------ which are found
def test_runs_are_found_below_a_folder_also_later(tmp_path):
    MadeRun(tmp_path / "b").train(10, 10)
    MadeRun(tmp_path / "group" / "a").train(10, 10)
    with served(tmp_path) as server:
        first = data_of(server)
        assert {run["name"] for run in first["runs"]} == {"a", "b"}
        MadeRun(tmp_path / "c").train(10, 10)
        later = data_of(server, first)
        assert [run["number"] for run in later["runs"]] == [0, 1, 2]
        assert [run["name"] for run in later["runs"] if "tables" in run] == ["c"]


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    for group in ("x", "y"):
        MadeRun(tmp_path / group / "nano").train(10, 10)
    with served(tmp_path) as server:
        names = [run["name"] for run in data_of(server)["runs"]]
        assert len(set(names)) == 2 and all(name.startswith("nano (") for name in names)


def test_two_runs_of_one_folder_are_two(tmp_path):
    MadeRun(tmp_path / "run", "first").train(10, 50)
    MadeRun(tmp_path / "run", "second", resume_step=None).train(10, 20)
    with served(tmp_path) as server:
        steps = {run["name"]: run["step"] for run in data_of(server)["runs"]}
    assert steps == {"run": 20, "run (metrics-1)": 50}


def test_no_link_leads_out_of_the_folder(tmp_path):
    """A run's folder may be another user's: a link there must not show files of one's own."""
    secret = MadeRun(tmp_path / "outside", "secret").train(10, 30).folder
    secret_text = (secret / "metrics.json").read_text()
    (secret / "metrics.json").write_text(secret_text.replace("train.py", "TOP-SECRET"))
    inside = tmp_path / "runs"
    (inside / "files").mkdir(parents=True)
    for name in ("metrics.jsonl", "metrics.json", "events.jsonl", "samples.jsonl"):
        (inside / "files" / name).symlink_to(secret / name)
    (inside / "folder").symlink_to(secret)
    half = MadeRun(inside / "half", "half").train(10, 10).folder
    (half / "metrics.json").unlink()
    (half / "metrics.json").symlink_to(secret / "metrics.json")
    with served(inside) as server:
        _, _, body = ask(server, "/data")
        assert b"TOP-SECRET" not in body and b"TOP-SECRET" not in ask(server, "/")[2]
        runs = json.loads(body)["runs"]
        assert [run["name"] for run in runs if run["step"]] == ["half"]
    assert inside / "folder" not in list(folders_of_runs(inside))


def test_a_folder_that_was_given_may_be_a_link(tmp_path):
    MadeRun(tmp_path / "disk" / "run").train(10, 10)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with served(tmp_path / "runs") as server:
        assert [run["step"] for run in data_of(server)["runs"]] == [10]


def test_a_run_that_is_deleted_goes(tmp_path):
    run = MadeRun(tmp_path / "run").train(10, 10)
    with served(tmp_path) as server:
        assert data_of(server)["runs"]
        for path in run.folder.iterdir():
            path.unlink()
        run.folder.rmdir()
        assert data_of(server)["runs"] == []


# ---------------------------------------------------------------------------------- connections
def test_a_connection_that_says_nothing_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "timeout", 0.2)
    with served(tmp_path) as server:
        for begin in (b"", b"GET / HTTP/1.1\r\nHost: loc"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(begin)
                assert connection.recv(1) == b""


def test_connections_beyond_the_limit_are_closed_and_the_others_answered(tmp_path, monkeypatch):
    """A thread each: a browser that opens without end must not take the machine's memory."""
    monkeypatch.setattr(watch_module, "MOST_CONNECTIONS", 2)
    with served(tmp_path) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        first, second, third = (
            stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(3)
        )
        assert third.recv(1) == b""
        for one in (first, second):
            one.sendall(b"GET /data HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in read_all(one)
        # Their threads end in their own time.
        until = time.monotonic() + 60
        while server._free._value < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert ask(server, "/")[0] == 200


# -------------------------------------------------------------------------------- the command
def start(*arguments: object, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.watch", *map(str, arguments)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def test_the_command_prints_an_address_that_answers(tmp_path):
    MadeRun(tmp_path / "run").train(10, 10)
    process = start(tmp_path, "--port", 0)
    try:
        url = re.fullmatch(r"watch    http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
        tunnel = process.stdout.readline()
        assert f"ssh -L {url[1]}:127.0.0.1:{url[1]} " in tunnel
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_said_in_a_line(tmp_path):
    with served(tmp_path) as server:
        with pytest.raises(ValueError, match=rf"port {server.port} of 127.0.0.1 cannot be used"):
            command.main([str(tmp_path), "--port", str(server.port)])
        # A run's page takes another one.
        with command.server_of(Watch([tmp_path]), server.port, True) as other:
            assert other.port != server.port


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere"], "nowhere is not there"),
        (["README.md"], "README.md is a file"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["tests", "--out", "x.html"], "no metrics.jsonl"),
    ],
)
def test_a_mistake_is_a_line(arguments, says, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(ValueError, match=says):
        command.main(arguments)
    assert not (REPO / "x.html").exists()


def test_out_writes_a_page_that_needs_no_server(tmp_path, capsys):
    MadeRun(tmp_path / "run").train(10, 30)
    assert command.main([str(tmp_path), "--out", str(tmp_path / "x" / "page.html")]) == 0
    page = (tmp_path / "x" / "page.html").read_text()
    assert "1 run, " in capsys.readouterr().out
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["live"] is False and data["runs"][0]["loads"]["step"] == [10, 20, 30]
    assert "connect-src" not in page.partition("<style>")[0]


def test_it_ends_with_the_process_that_started_it(tmp_path):
    """A run that is killed at once (SIGKILL) left its page's server and its port taken."""
    code = (
        "import os, subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-m', 'scripts.watch', sys.argv[1], '--port', "
        "'0', '--parent', str(os.getpid())], stdout=subprocess.PIPE, text=True, "
        "start_new_session=True); child.stdout.readline(); print(child.pid, flush=True); "
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "later")],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 60
    try:
        while is_alive(child):
            assert time.monotonic() < until, "the server outlives the run"
            time.sleep(0.05)
    finally:
        # One that outlived a fault of this test was still there an hour later.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def is_alive(process: int) -> bool:
    """Return whether a process runs. One that nobody waits for stays in the list."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_a_page_has_is_read_strictly():
    assert parsed_have("") == {}
    assert parsed_have("0.1.20.3_7.0.0.0") == {0: (1, 20, 3), 7: (0, 0, 0)}


def test_a_number_is_never_given_to_another_run(tmp_path):
    """The last run was deleted and the next one got its number: a page joined their curves."""
    MadeRun(tmp_path / "a").train(10, 20)
    MadeRun(tmp_path / "b", "b").train(10, 20)
    with served(tmp_path) as server:
        first = data_of(server)
        assert [run["number"] for run in first["runs"]] == [0, 1]
        shutil.rmtree(tmp_path / "b")
        server.watch._read_at = -math.inf
        assert [run["number"] for run in data_of(server, first)["runs"]] == [0]
        MadeRun(tmp_path / "c", "c").train(10, 30)
        later = data_of(server, first)["runs"]
        assert [run["number"] for run in later] == [0, 2] and "tables" in later[1]


def test_a_folder_that_is_gone_is_forgotten(tmp_path):
    """A page that is open for weeks would ask for every folder that ever was."""
    watch = Watch([tmp_path])
    for name in "abc":
        MadeRun(tmp_path / name).train(10, 20)
    assert len(fresh_runs(watch)) == 3
    shutil.rmtree(tmp_path / "b")
    assert len(fresh_runs(watch)) == 2
    assert {folder.name for folder in watch._followers} == {"a", "c"}
    MadeRun(tmp_path / "b").train(10, 20)
    assert len(fresh_runs(watch)) == 3


def test_runs_beyond_the_most_are_said(tmp_path, monkeypatch):
    """They were left out without a word."""
    monkeypatch.setattr("runtime.serving.watch.MOST_RUNS", 2)
    for name in "abc":
        MadeRun(tmp_path / name, name).train(10, 20)
    with served(tmp_path) as server:
        data = data_of(server)
        assert len(data["runs"]) == 2
        assert data["notices"] == [
            "runs that are not shown, because a page has at most 2: 1; name fewer folders"
        ]
        shutil.rmtree(tmp_path / "c")
        assert data_of(server, data)["notices"] == []


def test_a_run_that_begins_when_there_is_no_room_leaves_the_others_on_the_page(
    tmp_path, monkeypatch
):
    """One run too many was sent for good, and the server refused what the page said that it has.

    The limit held for new runs as they were met: a run that was known came after it, and stayed.
    """
    monkeypatch.setattr(watch_module, "MOST_RUNS", 2)
    for name in "ab":
        MadeRun(tmp_path / name, name).train(10, 20)
    with served(tmp_path) as server:
        first = data_of(server)
        # It takes metrics.jsonl; the earlier run's file is metrics-1.jsonl now, which is news too.
        MadeRun(tmp_path / "a", "fresh").train(10, 30)
        later = data_of(server, first)
        assert [(run["number"], run["step"]) for run in later["runs"]] == [(2, 30), (1, 20)]
        assert later["notices"][0].endswith("a page has at most 2: 1; name fewer folders")
        assert len(data_of(server, later)["runs"]) == 2
        # There is room again.
        shutil.rmtree(tmp_path / "b")
        last = data_of(server, later)
        assert [(run["number"], run["step"]) for run in last["runs"]] == [(2, 30), (3, 20)]
        assert last["notices"] == []


def test_a_folder_below_another_that_was_given_may_link_as_far_as_that_one(tmp_path):
    """Naming `runs runs/a` hid a run that `runs` alone showed: the last folder's bound held."""
    kept = MadeRun(tmp_path / "runs" / "kept", "kept").train(10, 30).folder
    inner = tmp_path / "runs" / "a"
    inner.mkdir()
    (inner / "metrics.jsonl").symlink_to(kept / "metrics.jsonl")
    (inner / "metrics.json").symlink_to(kept / "metrics.json")
    for roots in ([tmp_path / "runs"], [tmp_path / "runs", inner]):
        watched = {Path(one.where).name: one.run.last_step for one in Watch(roots).runs()}
        assert watched == {"a": 30, "kept": 30}


def test_a_snapshot_is_of_one_moment(tmp_path):
    """Its runs and its notices could be of two readings: a server's threads read as well."""
    free = []

    class Asked(Watch):
        @property
        def notices(self) -> list[str]:
            other = threading.Thread(target=lambda: free.append(self.lock.acquire(blocking=False)))
            other.start()
            other.join()
            return super().notices

    MadeRun(tmp_path / "run").train(10, 20)
    assert "</html>" in watch_module.snapshot(Asked([tmp_path]))
    assert free == [False]


def test_the_sentences_of_its_documentation_are_short():
    text = (REPO / "docs" / "monitoring.md").read_text("utf-8")
    assert [one for one in sentences(text) if len(one.split()) > 20] == []


def fresh_runs(watch: Watch) -> list:
    watch._read_at = -math.inf
    return watch.runs()
