"""Checkpoints of other kinds behind the server, and what may happen to their files meanwhile.

The models are real, loaded as the command loads them; the server runs in this process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from config_model import PredictConfig
from runtime.checkpoint.read import read_checkpoint
from runtime.inference.predictor import READY, Predictor
from runtime.serving.config import ServeConfig
from runtime.serving.served import Served
from runtime.serving.start import serve_model
from tests.builders_checkpoint import save
from tests.builders_lora import lora_run, move_adapters
from tests.builders_server import live
from tests.conftest import REPO

SECONDS = 300
BODY = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.0, "logprobs": 1}


@pytest.fixture
def loaded() -> Iterator:
    """Yield a function that loads a checkpoint as the command does; its engine ends with the test.

    The live server closes it at its own end, and a test may fail before.
    """
    found: list[Served] = []

    def load(name: str, path: str | Path, **flags) -> Served:
        config = ServeConfig(device="cpu", slots=2, **flags)
        found.append(serve_model(name, str(path), config, "c0ffee"))
        return found[-1]

    yield load
    for served in found:
        served.engine.close()


def told(answer: dict) -> tuple:
    """Return what an answer says: its text and log-probabilities."""
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def predicted(path: str | Path, **flags) -> str:
    """Return what predict.py says to the same."""
    config = PredictConfig(
        ckpt=str(path), device="cpu", quiet=True, temperature=0.0, max_new_tokens=24, **flags
    )
    return "".join(Predictor(config).stream(BODY["prompt"], config))


def with_adapters(folder: Path) -> Path:
    """Save adapters on the ready model that change what it says; return their checkpoint."""
    model, optimizer = lora_run(READY)
    tokenizer_state = read_checkpoint(READY).tokenizer_state
    return save(folder, 3, move_adapters(model), optimizer, tokenizer_state=tokenizer_state)


def test_int8_and_adapters_are_served_as_predict_runs_them(loaded, tmp_path):
    """Each with a fingerprint of its own: the same request and seed give another answer."""
    lora = with_adapters(tmp_path)
    all_served = [
        loaded("plain", READY),
        loaded("int8", READY, quantize="int8"),
        loaded("lora", lora),
    ]
    names = [one.name for one in all_served]
    with live(*all_served) as server:
        answers = [
            server.json("/v1/completions", BODY | {"model": name, "experts": True})[1]
            for name in names
        ]
        expected = [predicted(READY), predicted(READY, quantize="int8"), predicted(lora)]
        assert [told(answer)[0] for answer in answers] == expected
        assert expected[2] != expected[0]
        # 8 bits change the last digits at least.
        assert len({tuple(told(answer)[1]) for answer in answers}) == 3
        assert len({answer["system_fingerprint"] for answer in answers}) == 3
        for name, answer in zip(names, answers, strict=True):
            assert len(answer["choices"][0]["experts"]["ids"]) == 24
            alone = server.json("/v1/completions", BODY | {"model": name})[1]
            assert told(alone) == told(answer)


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps a file that is mapped")
def test_a_checkpoint_that_is_replaced_or_deleted_is_served_as_it_was(loaded, tmp_path):
    """As train.py replaces latest.pt: another file under its name. The weights are mapped."""
    path = tmp_path / "latest.pt"
    shutil.copy(READY, path)
    with live(loaded("latest", path)) as server:
        before = server.json("/v1/completions", BODY)[1]
        new = tmp_path / "new.pt"
        shutil.copy(with_adapters(tmp_path / "other"), new)
        for change in (lambda: os.replace(new, path), lambda: path.unlink()):
            change()
            # Another prompt first, so that no cache holds what is asked.
            server.json("/v1/completions", BODY | {"prompt": "The"})
            after = server.json("/v1/completions", BODY)[1]
            assert told(after) == told(before)
            assert after["system_fingerprint"] == before["system_fingerprint"]


LOADING = """
import time
from runtime.serving.config import ServeConfig
from runtime.serving.start import serve

def load(*_):
    print("loading", flush=True)
    time.sleep(600)

serve(ServeConfig(port=0), {"a": "b.pt"}, "", load)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)]
)
def test_a_signal_while_it_loads_ends_it_at_once(number):
    """Loading is on another thread, which a process would wait for."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(number)
        printed, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait(SECONDS)
    assert process.returncode == 128 + number
    assert printed == "end      at once: still loading\n"
