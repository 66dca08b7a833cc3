"""Watching and comparing: how long pages take to open, to show news, and what --watch costs a run.

    python -m benchmarks.watching --name quiet
    python -m benchmarks.watching --name tiny --tiny

In this order: opening the page of a run of 5,000 steps of 12 blocks of 32 experts, and of 10 such
runs; scripts.compare of 10 runs, with its page; seconds until a record that is appended is drawn in
Chromium (left out where there is none); and train.py without the page and with it open, whole runs
in turns, by the median step of each. Readers start without anything read before. The runs are made
up, but for those that train. It takes about 5 minutes on 2 CPU cores. Saved:
benchmarks/results/watching_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import contextlib
import http.client
import io
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.common import alternate, save_results, summary
from runtime.base.cli import parser, run_main
from runtime.serving.watch import Server, Watch, snapshot
from scripts import compare
from tests.builders_watch import MadeRun, write_long_run
from tests.chromium import NAMES, Browser

REPO = Path(__file__).resolve().parent.parent
# What the medians are read against; they are saved with them.
TARGETS = {"open_s": 1.0, "append_s": 3.0, "compare_s": 5.0, "step_cost_percent": 1.0}


def opening(folder: Path, repeats: int) -> dict:
    """Return the seconds from a server's start to its whole page, of one run and of all."""
    first = sorted(folder.iterdir())[0]
    times = alternate(
        {
            "one_run_s": lambda: open_page([first]),
            "all_runs_s": lambda: open_page([folder]),
        },
        repeats,
    )
    found: dict = {name: summary(values) for name, values in times.items()}
    found["page_bytes"] = len(snapshot(Watch([first])).encode())
    return found


def open_page(folders: list[Path]) -> None:
    """Ask a new server for its page and read all of it."""
    with serving(folders) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
        connection.request("GET", "/", headers={"Accept-Encoding": "gzip"})
        assert connection.getresponse().read()
        connection.close()


@contextlib.contextmanager
def serving(folders: list[Path]) -> Iterator[Server]:
    with Server(Watch(folders), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def appending(folder: Path, records: int) -> dict | None:
    """Return the seconds until Chromium shows a record that was appended; None without Chromium."""
    if not any(map(shutil.which, NAMES)):
        return None
    run, times = MadeRun(folder, max_steps=100_000).train(10, 1000), []
    with serving([folder]) as server, Browser(folder) as browser:
        page = browser.open(server.url)
        for i in range(records):
            # Not in step with the page's questions.
            time.sleep(0.37)
            step, started = 1010 + 10 * i, time.perf_counter()
            run.train(step, step)
            page.until(
                f"document.querySelector('#runs tbody tr').textContent.includes('{step:,} /')"
            )
            times.append(time.perf_counter() - started)
        page.close()
    return summary(times)


def comparing(folder: Path, page: Path, repeats: int) -> dict:
    """Return the seconds of scripts.compare with a page, without the start of Python."""

    def once() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert compare.main([str(folder), "--out", str(page)]) == 0

    return summary(alternate({"compare": once}, repeats)["compare"])


def training(folder: Path, args: argparse.Namespace) -> dict:
    """Return the seconds of a step of train.py without --watch and with its page open.

    Whole runs in turns, after one that is not counted: it brings the files into memory. Each run's
    figure is the median of its steps, so that one disturbance does not count.
    """
    data = folder / "data"
    text = ["--dataset", "toy", "--num_stories", "200" if args.tiny else "3000"]
    _command("prepare_data.py", *text, "--tokenizer", "byte", "--out_dir", str(data))
    _run_seconds(folder / "first", data, True, 4)
    times: dict[str, list[float]] = {"without": [], "with": []}
    for turn, name in enumerate(turns(args.rounds)):
        times[name].append(_run_seconds(folder / str(turn), data, name == "with", args.steps))
    return costs(times)


def turns(rounds: int) -> list[str]:
    """Return the order of the runs: pairs of both sides, each of which begins every other pair."""
    pair = ["without", "with"]
    return [name for i in range(rounds) for name in (pair[::-1] if i % 2 else pair)]


def costs(times: dict[str, list[float]]) -> dict:
    """Return both sides' summaries, and by how many percent a step is slower with the page.

    times: seconds of a step of each run; those at the same place are a pair.
    """
    pairs = zip(times["without"], times["with"], strict=True)
    cost = [100 * (with_page / without - 1) for without, with_page in pairs]
    sides = {name: summary(values) for name, values in times.items()}
    return sides | {"cost_percent": {"median": statistics.median(cost), "of_each_pair": cost}}


def step_seconds(records: Iterable[dict]) -> float:
    """Return the median seconds of a step after the first quarter, which meets new shapes.

    records: a run's, a training record of each step.
    """
    seconds = [one["seconds"] for one in records if one["kind"] == "train"]
    steps = [after - before for before, after in itertools.pairwise(seconds)]
    return statistics.median(steps[len(steps) // 4 :])


def _run_seconds(folder: Path, data: Path, watches: bool, steps: int) -> float:
    """Train, with a page that asks every 2 seconds where `watches`; return the median step."""
    flags = ["--data_dir", str(data), "--ckpt_dir", str(folder / "ckpt"), "--preset", "plain-nano"]
    flags += ["--graph_dir", str(folder / "graphs"), "--max_steps", str(steps)]
    flags += ["--log_interval", "1", "--save_interval", "100000", "--batch_size", "4"]
    flags += ["--grad_accum", "1", "--val_interval", "100000", "--context_length", "64"]
    ended = threading.Event()
    command = [sys.executable, "train.py", *flags, *(["--watch"] if watches else [])]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process_:
        asking = None
        for line in process_.stdout or ():
            if line.startswith("watch    http://") and asking is None:
                port = int(line.strip().strip("/").rpartition(":")[2])
                asking = threading.Thread(target=_ask_on, args=(port, ended))
                asking.start()
        ended.set()
        if asking:
            asking.join()
    if process_.returncode or (watches and asking is None):
        raise ValueError(f"train.py ended with {process_.returncode}: {' '.join(command)}")
    with open(folder / "graphs" / "metrics.jsonl", encoding="ascii") as file:
        return step_seconds(map(json.loads, file))


def _ask_on(port: int, ended: threading.Event) -> None:
    """Ask as an open page does, every 2 seconds, until `ended`."""
    have = ""
    while not ended.wait(2):
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", f"/data{have}", headers={"Accept-Encoding": "identity"})
            have = question(json.loads(connection.getresponse().read()))
            connection.close()


def question(data: dict) -> str:
    """Return the query of a page that has an answer of the server."""
    keys = ("number", "version", "step", "notes")
    mine = "_".join(".".join(str(run[key]) for key in keys) for run in data["runs"])
    return f"?session={data['session']}&have={mine}"


def _command(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=REPO, check=True, stdout=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--name", required=True, help="of the result's file")
    p.add_argument("--rounds", type=int, default=5, help="runs of train.py on each side (5)")
    p.add_argument("--steps", type=int, default=80, help="of each such run (80)")
    p.add_argument("--repeats", type=int, default=5, help="times that each page is opened (5)")
    p.add_argument("--tiny", action="store_true", help="small runs, to try the script itself")
    args = p.parse_args(argv)
    records, L, E, runs = (200, 2, 4, 3) if args.tiny else (5_000, 12, 32, 10)
    if args.tiny:
        args.rounds, args.steps, args.repeats = 1, 8, 2
    results: dict = {"targets": TARGETS, "records": records, "blocks": L, "experts": E}
    with tempfile.TemporaryDirectory() as name:
        folder, made = Path(name), Path(name) / "runs"
        for i in range(runs):
            write_long_run(made / f"run{i}", records, L, E, seed=i)
        results["open"] = opening(made, args.repeats)
        results["compare"] = comparing(made, folder / "page.html", args.repeats)
        (folder / "growing").mkdir()
        results["append"] = appending(folder / "growing", 3 if args.tiny else 12)
        results["train"] = training(folder, args)
    save_results(f"watching_{args.name}", results)
    return 0


if __name__ == "__main__":
    run_main(main)
