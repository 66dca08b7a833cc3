"""The server as a command in a process of its own, and what Linux says about that process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.inference.predictor import READY
from tests import children
from tests.builders_server import JSON, post, read_all, wait_for

SECONDS = 300
HAS_FORK = hasattr(os, "fork")
HAS_PROC = sys.platform == "linux"
# What the server imports that is not ours.
LIBRARIES = ("uvicorn", "starlette.responses", "starlette.routing", "h11", "safetensors")
COMMAND = ("-m", "scripts.serve")


@dataclass
class Process:
    """A running server. child: of tests/children.py. printed: the file with all that it says."""

    child: children.Child
    printed: Path
    port: int = 0

    def text(self) -> str:
        return self.printed.read_text(encoding="utf-8") if self.printed.exists() else ""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        """Return (status, headers, body); a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data, JSON | headers)
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def raw(self, path: str, body: Any, *lines: str) -> bytes:
        """Return all that comes for a POST until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(post(path, body, "Connection: close", *lines))
            return read_all(connection)

    # -------------------------------------------------------------------------- what Linux says
    def _status(self, name: str) -> int:
        """Return a size of /proc/PID/status in bytes."""
        text = Path(f"/proc/{self.child.pid}/status").read_text()
        match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        assert match is not None, name
        return 1024 * int(match[1])

    def memory_bytes(self) -> int:
        """Return the memory that is resident now."""
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """Return the most memory that was resident since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")

    def cpu_ticks(self) -> int:
        """Return the CPU time of all threads, in the ticks of /proc (10 ms)."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        # Fields 14 and 15 of proc(5): user and system time.
        return int(fields[11]) + int(fields[12])

    def wake_ups(self) -> int:
        """Return how often its threads have waited for something: each wait began with work."""
        waits = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)$", re.MULTILINE)
        total = 0
        for path in Path(f"/proc/{self.child.pid}/task").glob("*/status"):
            # A thread may end meanwhile.
            with contextlib.suppress(OSError):
                match = waits.search(path.read_text())
                assert match is not None
                total += int(match[1])
        return total


@contextlib.contextmanager
def serving(
    *flags: str, port: int = 0, command: Sequence[str] = COMMAND, ckpt: str | Path = READY
) -> Iterator[Process]:
    """Run the command until it says that it serves; kill it at the end if it still runs."""
    argv = [*command, "--ckpt", ckpt, "--port", port, "--device", "cpu", *flags]
    child = children.start(argv, merge=True, libraries=LIBRARIES)
    process = Process(child, child.printed)
    try:
        url = re.compile(r"^serve +http://127\.0\.0\.1:(\d+)$", re.MULTILINE)
        wait_for(lambda: child.poll() is not None or url.search(process.text()), SECONDS)
        match = url.search(process.text())
        assert match is not None, process.text()
        process.port = int(match[1])
        yield process
    finally:
        child.kill()
        child.wait(SECONDS)
