"""llama.cpp itself for the tests: the server of the package xllamacpp, in a process of its own.

The package is a wheel with llama.cpp compiled in. Its code can end a process (an instruction that
the CPU lacks, a failed assertion), so the tests talk to it over HTTP, as chat clients do.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Standard input closes when the test's process ends, however it ends; then this one ends too.
# One thread, and no rounding of keys and values: the numbers of another run are the same.
SERVER = """
import os
import sys

import xllamacpp

path, context_length = sys.argv[1], int(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path = path
params.hostnames, params.port, params.n_parallel = ["127.0.0.1"], 0, 1
params.n_ctx = params.n_batch = params.n_ubatch = context_length
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.n_gpu_layers, params.fit_params, params.warmup = 0, False, False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


def need_llama_cpp() -> None:
    """Skip a module's tests if xllamacpp is not installed; under CI it must be."""
    if importlib.util.find_spec("xllamacpp"):
        return
    message = "xllamacpp is not installed (it has no wheel for some platforms)"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{message}: pip install -r requirements-dev.txt", pytrace=False)
    pytest.skip(message, allow_module_level=True)


class Engine:
    """llama.cpp's server with one file: a context manager."""

    def __init__(self, path: Path, context_length: int = 96):
        # What llama.cpp prints, next to its file.
        self.log = Path(f"{path}.log")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(path), str(context_length)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        address = self.process.stdout.readline().strip()
        if not address:
            self.fail("did not start")
        self.address = address.rpartition("/")[2]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        self.process.communicate(timeout=30)

    def fail(self, what: str) -> None:
        """Fail the test with the end of what llama.cpp printed."""
        self.process.kill()
        code = self.process.wait()
        printed = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        pytest.fail(f"llama.cpp {what} (exit code {code}):\n{printed}", pytrace=False)

    def ask(self, route: str, **body) -> dict:
        """Return the server's answer to a POST."""
        # One connection each: the server closes one that has been idle, or has served many.
        connection = http.client.HTTPConnection(self.address, timeout=60)
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("POST", route, json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.fail(f"gave no answer to {route}, {error!r}")
        finally:
            connection.close()
        assert answer.status == 200, f"{route}: {answer.status} {text.decode(errors='replace')}"
        return json.loads(text)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a plain text, with what the file wants before it."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def text(self, ids: list[int]) -> str:
        return self.ask("/detokenize", tokens=ids)["content"]

    def greedy(self, prompt: str | list[int], count: int, **options) -> dict:
        """Return the answer to a completion whose every token is the most likely one.

        `tokens`: the ids, without the stop token; `prompt`: the whole prompt as text.
        """
        options = dict(temperature=0, return_tokens=True, cache_prompt=False) | options
        return self.ask("/completion", prompt=prompt, n_predict=count, **options)
