"""Guarantees about the network: nothing reaches for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests import builders_runs
from tests.promises import Promise, Tally
from tests.promises.common import REPO, folder

ALONE = r"""
import contextlib, importlib, io, json, os, sys
sys.path.insert(0, {repo!r})
NETWORK = (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr",
    "socket.sendto", "socket.sendmsg",
    "urllib.Request", "ftplib.connect", "http.client.connect", "smtplib.connect",
)
reached = []
def hook(event, args):
    if event in NETWORK:
        reached.append(event + " " + repr(args)[:200])
        raise OSError("no network here")
sys.addaudithook(hook)
def step(name, work):
    reached.clear()
    code, what = None, ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = work()
    except BaseException as error:
        what = type(error).__name__ + ": " + str(error)[:300]
    print(json.dumps([name, reached[:], what or (str(code) if code else "")]), flush=True)
def run(module, *argv):
    return lambda: importlib.import_module(module).main(list(argv))
{prelude}
MODEL, SPEED = {model!r}, {speed!r}
for module in (
    "config_model", "runtime.data.shards", "runtime.data.tokenizers", "runtime.checkpoint.read",
    "runtime.inference.decoder", "prepare_data", "train", "predict", "test",
    "scripts.draw_architecture",
):
    step("import " + module, lambda: importlib.import_module(module) and None)
TOY = "--dataset", "toy", "--num_stories", "60", "--val_ratio", "0.2"
step("prepare_data, bytes", run("prepare_data", *TOY, "--tokenizer", "byte", "--out_dir", "data"))
step("prepare_data, BPE", run("prepare_data", *TOY, "--tokenizer", "bpe:300", "--out_dir", "bpe"))
FOUR = *SPEED, "--data_dir", "bpe", "--max_steps", "4"
step("train", run("train", *MODEL, *FOUR, "--num_threads", "1"))
step("train --resume", run("train", "--resume", "--data_dir", "bpe", "--max_steps", "6"))
NEW = "--ckpt_dir", "new", "--graph_dir", "new_graphs"
step("train --init_from", run("train", *FOUR, "--init_from", "checkpoints/latest.pt", *NEW))
step("predict", run("predict", "--prompt", "Once", "--max_new_tokens", "8", "--device", "cpu"))
step("test", run("test", "--ckpt", "checkpoints/latest.pt"))
"""


def alone(count: int, prelude: str = "") -> Tally:
    """Run everything in a process that fails at, and records, each network access.

    Import every module, prepare text, train, resume, train further and predict. Python's audit
    events report name resolution and connections. count: the last steps to check.
    """
    tally = Tally()
    with folder() as at:
        code = ALONE.format(
            repo=str(REPO), prelude=prelude, model=builders_runs.MODEL, speed=builders_runs.SPEED
        )
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIKTOKEN"))
        } | {
            "OMP_NUM_THREADS": "1",
            "HOME": str(at),
            "MPLCONFIGDIR": str(at),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=at,
            env=environment,
        )
        results = [json.loads(line) for line in done.stdout.splitlines()][-count:]
        for name, reached, what in results:
            tally.add(not reached and not what, f"{name}: {'; '.join(reached)} {what}")
        if done.returncode:
            tally.add(False, f"exit {done.returncode}: {done.stderr[-500:]}")
    return tally


PROMISES: list[Promise] = [
    Promise(
        33,
        "Nothing reaches for the network: imports, preparing, training, resuming and "
        "predicting with local data",
        alone,
        17,
        17,
        17,
        "downloads a tokenizer at import config_model",
    ),
]
