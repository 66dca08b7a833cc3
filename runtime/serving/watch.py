"""A page of runs that are being trained: it reads next to the runs what they write, and serves it.

The server answers this machine alone, GET alone, and no path of a URL reaches a file: runs have
numbers. A page of another site can neither read it (no CORS; the Host header must name this
machine, so that a name that someone points at 127.0.0.1 does not help) nor frame it. The page's
policy allows no script but its own, whatever a run's files say.

    GET /                           the page, with what is known so far inside
    GET /data?session=S&have=N.V.STEP.M_...&loads=N.V.STEP     what is new since then, as JSON
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from runtime.base.text import visible
from runtime.training.curves import Follower, metrics_files
from runtime.training.curves_page import (
    finished_page,
    html_page,
    loads_data,
    more_data,
    notes_data,
    page_data,
    run_data,
    status_data,
)
from runtime.training.run_curves import Run

HOST, PORT = "127.0.0.1", 8001
TITLE = "Training runs"
# Below a folder that was given: runs/, runs/NAME/, runs/GROUP/NAME/.
DEEPEST = 3
MOST_FOLDERS, MOST_RUNS = 2_000, 100
# Pages that ask at the same time are answered from one reading.
FRESH_SECONDS = 0.5
# A connection that says nothing, or reads nothing, for this long is closed; so many may be open.
CONNECTION_SECONDS, MOST_CONNECTIONS = 10.0, 64
# What calls itself this machine. The port may be a tunnel's.
LOCAL_HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
HAVE = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,16})\.(\d{1,10})", re.ASCII)
LOADS = re.compile(r"(\d{1,9})\.(\d{1,9})\.(-1|\d{1,16})", re.ASCII)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


# ----------------------------------------------------------------------------------------- the runs
def folders_of_runs(root: Path) -> Iterator[Path]:
    """Yield a folder and those below it that hold metrics. No link is followed."""
    level, seen = [root], 0
    for depth in range(DEEPEST + 1):
        below: list[Path] = []
        for folder in level:
            seen += 1
            if seen > MOST_FOLDERS:
                return
            if metrics_files(folder):
                yield folder
            if depth < DEEPEST:
                below += _inner_folders(folder)
        level = below


def _inner_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [Path(path) for path in sorted(inner)]


@dataclass
class Watched:
    """A run with the number that it has as long as the server runs, and what it is called."""

    number: int
    run: Run
    name: str
    where: str


class Watch:
    """The runs in some folders and below them, those that begin later included.

    `runs` reads what is new. It may be called by several threads.
    """

    def __init__(self, folders: Iterable[str | Path]):
        self.roots = [Path(folder) for folder in folders]
        # Another start may give other numbers to the runs.
        self.session = secrets.token_hex(8)
        self.lock = threading.RLock()
        self._followers: dict[Path, Follower] = {}
        self._numbers: dict[int, Watched] = {}
        self._next = itertools.count()
        self._read_at = -FRESH_SECONDS
        # Runs beyond MOST_RUNS.
        self.left_out = 0

    @property
    def notices(self) -> list[str]:
        """Return lines to show above the runs."""
        if not self.left_out:
            return []
        return [
            f"runs that are not shown, because a page has at most {MOST_RUNS}: {self.left_out}; "
            "name fewer folders"
        ]

    def runs(self) -> list[Watched]:
        """Return the runs, after reading what is new of them."""
        with self.lock:
            if time.monotonic() - self._read_at >= FRESH_SECONDS:
                self._read()
                self._read_at = time.monotonic()
            return list(self._numbers.values())

    def _read(self) -> None:
        found: dict[Path, Path] = {}
        for root in self.roots:
            for folder in folders_of_runs(root):
                found.setdefault(folder, root)
        for folder, root in found.items():
            self._followers.setdefault(folder, Follower(folder, within=root))
        for folder, follower in [*self._followers.items()]:
            follower.poll()
            if folder not in found and not follower.runs:
                # A page is left open for weeks, and folders come and go.
                del self._followers[folder]
        self._number()
        self._name()

    def _number(self) -> None:
        """Give a number to each new run while there is room: runs that are shown stay."""
        known = {id(watched.run): watched for watched in self._numbers.values()}
        runs = [(folder, run) for folder, one in self._followers.items() for run in one.runs]
        room = MOST_RUNS - sum(id(run) in known for _, run in runs)
        there: dict[int, Watched] = {}
        for folder, run in runs:
            watched = known.get(id(run))
            if watched is None and room > 0:
                room -= 1
                # A number is never given again: a page may still show its last run.
                watched = Watched(next(self._next), run, "", str(folder))
            if watched is not None:
                there[watched.number] = watched
        self.left_out = len(runs) - len(there)
        self._numbers = there

    def _name(self) -> None:
        """Call each run by its name, with its folder where several have that name."""
        names = [watched.run.name for watched in self._numbers.values()]
        for watched, name in zip(self._numbers.values(), names, strict=True):
            same = names.count(name) > 1
            watched.name = f"{name} ({watched.where})" if same else name


def _full(watched: Watched, now: float) -> dict:
    return run_data(watched.run, watched.number, watched.name, watched.where, now)


def answer(watch: Watch, have: dict[int, tuple[int, int, int]], loads: tuple | None) -> dict:
    """Return what a page lacks.

    have: per run's number its version, newest step and mark of its notes. loads: (number, version,
    step) of the run whose loads the page shows.
    """
    with watch.lock:
        now = time.time()
        watched_runs = {watched.number: watched for watched in watch.runs()}
        runs = [
            _since(watched, have[number], now) if number in have else _full(watched, now)
            for number, watched in watched_runs.items()
        ]
        data: dict = {"now": now, "session": watch.session, "runs": runs}
        data["notices"] = watch.notices
        if loads and loads[0] in watched_runs:
            number, version, step = loads
            run = watched_runs[number].run
            same = run.version == version and step >= 0
            data["loads"] = {
                "number": number,
                "version": run.version,
                "loads": loads_data(run, step if same else -1),
            } | ({"from": step} if same else {})
        return data


def _since(watched: Watched, have: tuple[int, int, int], now: float) -> dict:
    """Return a run's status and its records after those that a page has; all if they changed."""
    version, step, notes = have
    run = watched.run
    status = status_data(run, watched.number, now)
    if version != run.version:
        return _full(watched, now)
    if step != status["step"] or step == 0:
        more = more_data(run, step)
        if more is None:
            return _full(watched, now)
        status["more"] = more
    if notes != status["notes"]:
        status |= notes_data(run)
    return status | {"name": watched.name, "where": watched.where}


def live_page(watch: Watch) -> tuple[str, str]:
    """Return the live page, with the runs as they are now, and its policy."""
    now = time.time()
    with watch.lock:
        runs = [_full(watched, now) for watched in watch.runs()]
        notices = watch.notices
    data = page_data(runs, notices, live=True, now=now, session=watch.session)
    return html_page(TITLE, data)


def snapshot(watch: Watch) -> str:
    """Return a page of the runs as they are now, which needs no server."""
    with watch.lock:
        watched = watch.runs()
        names = [one.name for one in watched]
        return finished_page(TITLE, [one.run for one in watched], names, notices=watch.notices)


# --------------------------------------------------------------------------------------- the server
class _BadRequest(ValueError):
    """A request that no page of ours makes."""


def parsed_have(text: str) -> dict[int, tuple[int, int, int]]:
    """Return what a page says that it has: N.V.STEP.MARK_N.V.STEP.MARK... Raise ValueError."""
    matches = [HAVE.fullmatch(part) for part in text.split("_")] if text else []
    if len(matches) > MOST_RUNS or not all(matches):
        raise _BadRequest("have must be NUMBER.VERSION.STEP.MARK, joined by _")
    found = [tuple(map(int, match.groups())) for match in matches if match]
    return {number: (version, step, mark) for number, version, step, mark in found}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gptoss", ""
    timeout = CONNECTION_SECONDS
    server: Server

    def do_GET(self) -> None:
        try:
            self._get()
        except _BadRequest as error:
            self._send(400, "text/plain", f"{error}\n")
        except ConnectionError:
            self.close_connection = True

    def _get(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not LOCAL_HOSTS.fullmatch(hosts[0]):
            self._send(403, "text/plain", "this page is for http://127.0.0.1 alone\n")
            return
        url = urlsplit(self.path)
        if url.path == "/":
            page, policy = live_page(self.server.watch)
            policy += "; frame-ancestors 'none'"
            self._send(200, "text/html", page, {"Content-Security-Policy": policy})
        elif url.path == "/data":
            text = json.dumps(self._data(url.query), allow_nan=False, separators=(",", ":"))
            self._send(200, "application/json", text)
        else:
            self._send(404, "text/plain", "there is / and /data\n")

    def _data(self, query: str) -> dict:
        try:
            asked = parse_qs(query, keep_blank_values=True, max_num_fields=4)
        except ValueError as error:
            raise _BadRequest(str(error)) from None
        have = parsed_have(asked.get("have", [""])[0])
        loads = None
        if "loads" in asked:
            match = LOADS.fullmatch(asked["loads"][0])
            if not match:
                raise _BadRequest("loads must be NUMBER.VERSION.STEP")
            loads = tuple(map(int, match.groups()))
        if asked.get("session", [""])[0] != self.server.watch.session:
            # The page is an earlier server's, whose numbers may be other runs'.
            have, loads = {}, None
        return answer(self.server.watch, have, loads)

    def _send(
        self, status: int, kind: str, text: str, headers: dict[str, str] | None = None
    ) -> None:
        body = text.encode("utf-8", "replace")
        sent = HEADERS | {"Content-Type": f"{kind}; charset=utf-8"} | (headers or {})
        if "gzip" in self.headers.get("Accept-Encoding", "") and len(body) > 1400:
            # The page may come through a tunnel.
            body = gzip.compress(body, compresslevel=1)
            sent["Content-Encoding"] = "gzip"
        self.send_response(status)
        for name, value in sent.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self) -> None:
        self.close_connection = True
        self._send(
            405, "text/plain", "only GET is answered\n", {"Allow": "GET", "Connection": "close"}
        )

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request: a page asks every 2 seconds."""


class Server(ThreadingHTTPServer):
    """Serves the page of a `Watch` on this machine."""

    daemon_threads = True
    # A port that another server has must not be shared with it.
    allow_reuse_address = os.name == "posix"

    def __init__(self, watch: Watch, port: int):
        self.watch = watch
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} of {HOST} cannot be used ({error.strerror}): give another --port, "
                "or 0 for any that is free"
            ) from None

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/"

    def process_request(self, request, client_address) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address) -> None:
        """Say in a line what went wrong with one request; the others are answered."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            said = visible(" ".join(str(error).split()))
            print(f"watch: {type(error).__name__}: {said}", file=sys.stderr, flush=True)


def tunnel_line(port: int) -> str:
    """Return the command that brings the page from this machine to the user's."""
    return f"ssh -L {port}:{HOST}:{port} {socket.gethostname()}"
