"""A run that is cut in the middle and resumed gives the weights of the run that was not, bit for
bit: with --deterministic.

    export GPTOSS_DATA=data
    python -m benchmarks.gpu_resume --name h100 --work /tmp/work -- --preset modern-8gb

What follows -- goes to train.py: a run of twice --half steps, whose checkpoint of the first half is
resumed in a folder of its own, as if the run had been killed there. The last checkpoints are
compared tensor by tensor, moments included. Without GPTOSS_DATA the text is toy stories in bytes,
made in the folder --work. Results go to benchmarks/results/resume_NAME.json.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import REPO
from benchmarks.measures import Measures
from runtime.base import cli
from runtime.checkpoint.read import read_checkpoint


def run(program: str, *flags: str) -> None:
    """Run a program of the repository. ValueError if it fails."""
    command = [sys.executable, program, *flags]
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run(command, cwd=REPO).returncode:
        raise ValueError(f"{program} ended with exit code {code}")


def text_for(work: Path) -> str:
    """A folder of shards: GPTOSS_DATA, or toy stories in bytes."""
    if data_dir := os.environ.get("GPTOSS_DATA"):
        return os.path.abspath(data_dir)
    run(
        "prepare_data.py",
        "--dataset",
        "toy",
        "--tokenizer",
        "byte",
        "--num_stories",
        "500",
        "--val_ratio",
        "0.1",
        "--num_proc",
        "1",
        "--out_dir",
        str(work / "data"),
    )
    return str(work / "data")


def cut_and_resume(work: Path, half: int, flags: list[str]) -> tuple[Path, Path]:
    """Folders of the straight run's and of the resumed run's checkpoints."""
    straight, resumed = work / "straight", work / "resumed"
    run(
        "train.py",
        *flags,
        "--deterministic",
        "--data_dir",
        text_for(work),
        "--lr",
        "1e-3",
        "--warmup_steps",
        "2",
        "--max_steps",
        str(2 * half),
        "--save_interval",
        str(half),
        "--val_interval",
        "1000",
        "--val_steps",
        "2",
        "--keep_last",
        "0",
        "--ckpt_dir",
        str(straight),
        "--graph_dir",
        str(work / "graphs_straight"),
    )
    resumed.mkdir()
    shutil.copy(straight / f"step_{half:07d}.pt", resumed)
    run(
        "train.py",
        "--resume",
        "--ckpt_dir",
        str(resumed),
        "--graph_dir",
        str(work / "graphs_resumed"),
    )
    return straight, resumed


def different_tensors(first: Path, second: Path) -> tuple[list[str], int]:
    """(names of tensors whose bits differ between the last checkpoints of two folders, tensors in
    all).
    """
    a, b = (read_checkpoint(folder / "latest.pt", optimizer=True) for folder in (first, second))
    if a.step != b.step:
        raise ValueError(f"{first} ends at step {a.step} and {second} at step {b.step}")
    pairs = [
        (name, x, getattr(b, group)[name])
        for group in ("model", "optimizer")
        for name, x in getattr(a, group).items()
    ]
    return [name for name, x, y in pairs if not torch.equal(x, y)], len(pairs)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/resume_NAME.json"
    )
    parser.add_argument(
        "--work",
        required=True,
        help="folder for the runs, which is emptied at the end: 4 checkpoints",
    )
    parser.add_argument(
        "--half", type=int, default=20, help="steps before the cut, and after it (default: 20)"
    )
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of train.py, after --")
    args = parser.parse_args(argv)
    if args.half < 3:
        raise ValueError(f"half must be at least 3, the warm-up's steps, not {args.half}")
    work, out = Path(args.work).resolve(), Measures(f"resume_{args.name}", steps=2 * args.half)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        different, count = different_tensors(*cut_and_resume(work, args.half, args.flags))
    finally:
        shutil.rmtree(work)
    out.results["different"] = different[:20]
    out.add("tensors that differ", len(different), f"of {count}")
    return 1 if different else 0


if __name__ == "__main__":
    cli.run_main(main)
