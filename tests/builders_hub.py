"""A stand-in for the Hugging Face Hub: an HTTP server that `datasets` and `huggingface_hub` ask.

It serves datasets from memory over the routes that these libraries use, writes down what they
asked, and can break connections. Tests point HF_ENDPOINT to it in a child process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_a_reader"


@dataclass
class Hub:
    """What the server has, and what it was asked.

    datasets: {"owner/name": {path: content}}.
    """

    datasets: dict[str, dict[str, bytes]]
    # Names of datasets that want TOKEN.
    gated: set[str] = field(default_factory=set)
    # How often a download of this path still ends after half of the bytes that were asked for.
    broken: dict[str, int] = field(default_factory=dict)
    # Whole downloads of these paths stop after half of the bytes, until the event is set.
    held: dict[str, threading.Event] = field(default_factory=dict)
    # Downloads of whole files that began, by path. (A part is asked for by its range.)
    begun: list[str] = field(default_factory=list)
    # Paths of which parts were asked for.
    parts: list[str] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        for event in hub.held.values():
            event.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        """The server prints nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self.api("/".join(parts[2:4]), parts[4:])
        elif parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            self.file("/".join(parts[1:3]), "/".join(parts[5:]))
        elif parts[:1] == ["store"]:
            path = "/".join(parts[3:])
            self.content(path, self.hub.datasets["/".join(parts[1:3])][path])
        else:
            self.error(404, "EntryNotFound", "no such page")

    def api(self, name: str, rest: list[str]) -> None:
        """What a repository is and has."""
        if (files := self.open(name)) is None:
            return
        kind, path = (rest or ["revision"])[0], "/".join(rest[2:])
        if kind == "revision":
            self.json(
                {
                    "_id": "1",
                    "id": name,
                    "sha": COMMIT,
                    "private": False,
                    "gated": name in self.hub.gated,
                    "disabled": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": file} for file in files],
                }
            )
        elif kind == "tree":
            self.json(
                [entry(it, files.get(it)) for it in (*files, *folders(files)) if inside(it, path)]
            )
        else:
            self.error(404, "EntryNotFound", "no such page")

    def open(self, name: str) -> dict[str, bytes] | None:
        """Return a dataset's files; None, with an answer, if it is missing or gated."""
        if name not in self.hub.datasets:
            # As the Hub does: it does not tell whether a private one exists.
            self.error(401, "RepoNotFound", "Repository not found")
        elif name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.error(401, "GatedRepo", f"Access to dataset {name} is restricted.")
        else:
            return self.hub.datasets[name]
        return None

    def file(self, name: str, path: str) -> None:
        if (files := self.open(name)) is None:
            return
        if path not in files:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        if path.endswith(".md"):
            self.content(path, files[path])
            return
        # As the Hub does with large files: they lie in another store.
        headers = {
            "Location": f"{self.hub.url}/store/{name}/{path}",
            "X-Linked-Etag": f'"{digest(files[path])}"',
            "X-Linked-Size": str(len(files[path])),
            "X-Repo-Commit": COMMIT,
        }
        self.send(302, b"", headers)

    def content(self, path: str, content: bytes) -> None:
        """Send a file, or the part that was asked for."""
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}
        status, whole = 200, "Range" not in self.headers
        if not whole:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            content, status = content[begin:end], 206
        if self.command == "GET":
            (self.hub.begun if whole else self.hub.parts).append(path)
        self.send(status, content, headers, path, whole)

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], path: str = "", whole=False
    ) -> None:
        """Send an answer, or half of it if the connection breaks."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(content) // 2
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[:half])
            self.wfile.flush()
            if self.hub.broken.get(path, 0) > 0:
                self.hub.broken[path] -= 1
                self.close_connection = True
                return
            if whole and path in self.hub.held:
                self.hub.held[path].wait()
            self.wfile.write(content[half:])


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]


def folders(files: dict[str, bytes]) -> set[str]:
    return {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}


def inside(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")


def entry(path: str, content: bytes | None) -> dict:
    """Return what a listing says of a file, or of a folder (None)."""
    if content is None:
        return {"type": "directory", "path": path, "oid": "0" * 40}
    return {"type": "file", "path": path, "oid": digest(content), "size": len(content)}


def parquet(texts: list[str]) -> bytes:
    """Return a Parquet file with a column of text and one of numbers."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()
