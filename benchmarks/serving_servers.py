"""Servers for the benchmarks of serving: ours and llama.cpp's, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import REPO
from model import LLM
from runtime.data.tokenizer import Tokenizer
from runtime.interop import gguf as interop

# Standard input closes when the benchmark ends, however it ends; then this one ends, too.
# Its own defaults, but for what both servers are told: threads, slots, context.
LLAMA_CPP = """
import os
import sys

import xllamacpp

path, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.hostnames, params.port, params.n_parallel = ["127.0.0.1"], 0, slots
params.n_ctx, params.n_gpu_layers, params.fit_params = slots * context, 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
print("serve   ", server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


@dataclass
class Running:
    """A server that answers. pid: of its process."""

    address: tuple[str, int]
    pid: int

    def cpu_seconds(self) -> float:
        """Return the CPU time that its process has used; 0 where the system does not tell."""
        return cpu_seconds(self.pid)

    def resident_bytes(self) -> int:
        """Return the memory that its process has now."""
        with open(f"/proc/{self.pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, from /proc; 0 where that is not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    # The name, in brackets, may hold blanks.
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[Running]:
    """Start a server and wait for its line "serve  http://..."; end it after the block.

    Raise ValueError, with the end of its log, if it does not start.
    """
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            command,
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            url = next((line for line in process.stdout if line.startswith("serve ")), "")
            if not url:
                said = log.read_text(errors="replace")[-1_000:]
                raise ValueError(f"a server did not start: {' '.join(command)}: {said}")
            host, _, port = url.strip().rpartition("/")[2].partition(":")
            # What it prints from now on must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield Running((host, int(port)), process.pid)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


@contextlib.contextmanager
def our_server(checkpoint: str, *flags: str) -> Iterator[Running]:
    """Start `python -m scripts.serve` with a checkpoint."""
    command = [sys.executable, "-m", "scripts.serve", "--ckpt", checkpoint, "--port", "0"]
    command += ["--device", "cpu", "--no-log_requests", *flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        started(command, Path(folder) / "log") as running,
    ):
        yield running


@contextlib.contextmanager
def llama_server(
    python: str, model: LLM, tokenizer: Tokenizer, slots: int, threads: int, quantize: str = "f32"
) -> Iterator[Running]:
    """Start llama.cpp's server with the same weights in a GGUF file.

    python: an interpreter that has the package xllamacpp.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, tokenizer, path, quantize)
        numbers = (slots, model.config.context_length, threads)
        command = [python, "-c", LLAMA_CPP, str(path), *map(str, numbers)]
        with started(command, Path(folder) / "log") as running:
            yield running


def write_gguf(model: LLM, tokenizer: Tokenizer, path: Path, quantize: str) -> None:
    """Write a model as scripts.export_gguf does."""
    gguf, family = interop.import_gguf(), interop.family_of(model.config)
    config, weights = interop.with_head(model.config, family, model.state_dict())
    entries = interop.layout(config, family, weights, quantize)
    words = interop.vocabulary_of(gguf, tokenizer, config.vocabulary_size)
    interop.write_gguf(
        gguf, path, path.stem, config, family, entries, weights, quantize, tokenizer, words
    )
