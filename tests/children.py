"""Commands of ours in children that start with PyTorch loaded.

`python train.py` spends two to four seconds of CPU on imports. Here one process for each pytest
worker imports the libraries, and nothing of ours, and forks for every command. The child then runs
the script as `python` would: as __main__, with its own arguments, folder, environment and streams,
and leaves through the interpreter's own end.

What a library reads when it loads (OMP_NUM_THREADS, PYTHONIOENCODING, sitecustomize), the order of
imports, a terminal and a process's memory need a real `subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def run(argv, *, timeout: float = 120, input: str = "", **options) -> subprocess.CompletedProcess:
    """`subprocess.run` of Python with `argv` ("train.py", "-m" or "-c" first), as text."""
    child = start(argv, input=input, **options)
    stdout, stderr = child.communicate(timeout=timeout)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


def start(
    argv,
    *,
    cwd=REPO,
    env: dict[str, str] | None = None,
    input: str = "",
    merge: bool = False,
    libraries: Sequence[str] = (),
) -> Child:
    """`subprocess.Popen` of Python with `argv`: what it prints is kept for `communicate`.

    merge: put stderr into stdout. libraries: load these before the fork as well, from now on.
    One child at a time: a start kills the child before it.
    """
    args, env = [str(word) for word in argv], dict(os.environ if env is None else env)
    return Child(args, input, merge, cwd=str(cwd), env=env, libraries=list(libraries))


class Child:
    """A running command, with the methods of `subprocess.Popen` that tests use."""

    _last: Child | None = None

    def __init__(self, args: list[str], input: str, merge: bool, **job):
        if Child._last is not None and Child._last.poll() is None:
            Child._last.kill()
            Child._last.wait()
        self.args, self.returncode = args, None
        self._folder = Path(tempfile.mkdtemp(dir=_home()))
        (self._folder / "in").write_text(input, encoding="utf-8")
        script = args[0]
        if script == "-c":
            script = self._folder / "code.py"
            script.write_text(args[1], encoding="utf-8")
        job |= {
            "args": args,
            "script": str(script),
            "streams": [
                str(self._folder / name) for name in ("in", "out", "out" if merge else "err")
            ],
        }
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        Child._last = self

    @property
    def printed(self) -> Path:
        """Return the file into which stdout goes."""
        return self._folder / "out"

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or raise TimeoutExpired."""
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return (stdout, stderr) once it has ended; kill it after `timeout` seconds."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            raise
        printed = []
        for name in ("out", "err"):
            path = self._folder / name
            printed.append(path.read_text(encoding="utf-8") if path.exists() else "")
        return printed[0], printed[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        answers = _server().stdout
        if self.returncode is None and select.select([answers], [], [], timeout)[0]:
            self.returncode = int(answers.readline())
        return self.returncode


@functools.cache
def _home() -> Path:
    """A folder for what the children print."""
    home = Path(tempfile.mkdtemp(prefix="children-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def end() -> None:
        if Child._last is not None:
            Child._last.kill()
        server.stdin.close()
        server.stdout.close()
        server.wait()

    atexit.register(end)
    return server


# ------------------------------------------------------------------------------------ in the server
# torch.optim imports torch._dynamo with its first optimizer, and it takes as long as torch itself.
LIBRARIES = ["torch", "torch._dynamo", "numpy", "tiktoken", "matplotlib.backends.backend_agg"]
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def _serve() -> None:
    """Fork a child for each line of stdin; print its pid, then its exit code.

    Nothing is computed here before a fork: PyTorch's threads would be missing in the child.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    # The collector of a child must not touch, and so copy, all of this.
    gc.freeze()
    # A signal waits until the child can answer it: Python drops one that comes amid a fork.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in jobs:
        job = json.loads(line)
        for name in job["libraries"]:
            importlib.import_module(name)
        pid = os.fork()
        if not pid:
            _become(job)
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _become(job: dict) -> None:
    """Run a job's command as __main__. Its errors and SystemExit end this process as usual."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    modes = (
        os.O_RDONLY,
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    )
    for stream, (path, mode) in enumerate(zip(job["streams"], modes, strict=True)):
        os.dup2(os.open(path, mode, 0o600), stream)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    args, script = job["args"], job["script"]
    folder = os.path.dirname(os.path.abspath(script)) if args[0][0] != "-" else job["cwd"]
    sys.path[:1] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = args if args[0][0] != "-" else [args[0], *args[2:]]
    if args[0] == "-m":
        sys.argv[0] = args[1]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve()
