"""The loss curve of `plain-nano` on four ranks, with shards of experts and weights, on that of one.

    python -m benchmarks.ranks_curve
            three runs, on TinyStories (GPTOSS_SHARED), into benchmarks/results/ranks_curve.json,
            and the picture public/ranks_curve.png
    python -m benchmarks.ranks_curve --picture
            the picture again, from the stored runs

The ranks are processes of torchrun on this machine's cores, in a grid of 2 x 2: --expert_parallel 2
and FSDP. They take the same micro-batches as the process does, so all that differs is in which
order numbers are added. Training multiplies such differences: as soon as a token takes another
expert. The right panel shows how fast. It also shows one process with PyTorch's kernels for AVX2,
which add in another order (where the processor has AVX-512; elsewhere they are the same).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import REPO, RESULTS, SHARED, save_results
from runtime.base import cli
from runtime.base.files import write_atomic

NAME = "ranks_curve"
PICTURE = REPO / "public" / f"{NAME}.png"
RANKS, EXPERTS = 4, 2
# plain-nano's 8 sequences a step, as a micro-batch for each rank.
RUN = ["--preset", "plain-nano", "--batch_size", "2", "--grad_accum", str(RANKS), "--seed", "0"]
RUN += ["--device", "cpu", "--dtype", "float32", "--log_interval", "1"]
RUN += ["--save_interval", "1000000"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
SIDES = {
    "one process": ["train.py"],
    "four ranks": [*TORCHRUN, "train.py", "--expert_parallel", str(EXPERTS)],
    "one process, AVX2": ["train.py"],
}
# PyTorch's kernels for another processor add in another order. No thread count changes its sums.
ENVIRONMENT = {"one process, AVX2": {"ATEN_CPU_CAPABILITY": "avx2"}}
FIRST = "one process"
TOKENIZER = "bpe:4096"


def prepared(folder: Path) -> Path:
    """Write shards of TinyStories with its vocabulary; return their folder."""
    stories = SHARED / "tinystories"
    if not stories.is_dir():
        raise ValueError(f"there is no {stories}: GPTOSS_SHARED names the folder that has it")
    files = ["--files", f"{stories / 'train.jsonl'}", "--val_files", f"{stories / 'valid.jsonl'}"]
    out = ["--tokenizer", TOKENIZER, "--out_dir", f"{folder / 'data'}"]
    subprocess.run([sys.executable, "prepare_data.py", *files, *out], cwd=REPO, check=True)
    return folder / "data"


def trained(name: str, data: Path, folder: Path, steps: int) -> dict:
    """Return the curves of one side: {"train": [[step, loss], ..], "val": [..]}."""
    own = folder / name.replace(",", "").replace(" ", "_")
    flags = ["--data_dir", f"{data}", "--ckpt_dir", f"{own / 'ckpt'}", "--graph_dir", f"{own}"]
    flags += [*RUN, "--max_steps", str(steps), "--val_interval", str(max(1, steps // 5))]
    environment = os.environ | ENVIRONMENT.get(name, {})
    subprocess.run([sys.executable, *SIDES[name], *flags], cwd=REPO, env=environment, check=True)
    curves: dict[str, list] = {"train": [], "val": []}
    for line in (own / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] in curves:
            curves[record["kind"]].append([record["step"], record["loss"]])
    return curves


def differences(curves: dict[str, dict], name: str) -> list[list[float]]:
    """Return [step, difference of a side's training loss to FIRST's, as a share], for each step."""
    one, other = curves[FIRST]["train"], curves[name]["train"]
    if [step for step, _ in one] != [step for step, _ in other]:
        raise ValueError(f"{name} logged other steps than {FIRST}")
    return [[step, abs(b / a - 1)] for (step, a), (_, b) in zip(one, other, strict=True)]


def picture(path: Path, stored: dict) -> None:
    """Draw two curves on each other, and by what they and the third differ."""
    import matplotlib

    from runtime.training import plots

    curves = stored["curves"]
    colors = dict(zip(SIDES, (plots.BLUE, plots.ORANGE, plots.MUTED), strict=True))
    with matplotlib.rc_context(plots.STYLE):
        page = plots.Page(
            "Four ranks on one process's curve",
            f"plain-nano, TinyStories; {EXPERTS} x {RANKS // EXPERTS} ranks: experts x FSDP",
            columns=2,
            width=12,
        )
        left, right = page.axes[0]
        styles = {
            FIRST: (dict(linewidth=4.5, alpha=0.45), dict(marker="o", markersize=11)),
            "four ranks": (dict(linewidth=1.1), dict(marker="o", markersize=5)),
        }
        for name, (line, dots) in styles.items():
            curve, color = curves[name], colors[name]
            label = f"{name}: {curve['val'][-1][1]:.4f}"
            left.plot(*zip(*curve["train"], strict=True), color=color, label=label, **line)
            left.plot(*zip(*curve["val"], strict=True), color=color, linestyle="", **dots)
        left.set_xlabel("step")
        left.set_ylabel("cross-entropy (nats): dots validation")
        left.legend(loc="upper right")
        for name in [*SIDES][:0:-1]:
            steps, shares = zip(*differences(curves, name), strict=True)
            # 0 has no logarithm, and a float32 loss cannot differ by less.
            shown = [max(share, 2.0**-24) for share in shares]
            right.plot(steps, shown, color=colors[name], linewidth=1.4, label=name)
        right.legend(loc="lower right")
        right.set_yscale("log")
        right.set_xlabel("step")
        right.set_ylabel("loss against one process, as a share")
        write_atomic(path, lambda file: file.write(page.png()))
    print(f"wrote {path.name}")


def summary(curves: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Return the figures that a text quotes, of each side against FIRST."""
    found = {}
    for name in [*SIDES][1:]:
        shares = [share for _, share in differences(curves, name)]
        one, other = (curves[side]["val"][-1][1] for side in (FIRST, name))
        found[name] = {
            "largest difference of a training loss": max(shares),
            "in the first ten steps": max(shares[:10]),
            "difference of the last validation loss": abs(other / one - 1),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--data_dir", default="", help="shards with its vocabulary, if any")
    parser.add_argument(
        "--picture", action="store_true", help="draw the stored runs, train nothing"
    )
    args = parser.parse_args(argv)
    if not args.picture:
        train_all(args)
    path = RESULTS / f"{NAME}.json"
    if not path.is_file():
        raise ValueError(f"there is no {path.name} yet: leave --picture out")
    picture(PICTURE, json.loads(path.read_text()))
    return 0


def train_all(args: argparse.Namespace) -> None:
    """Train the sides, one after the other, and store their curves."""
    if args.steps < 60:
        raise ValueError(
            f"--steps must be at least 60 (the preset warms up for 50), not {args.steps}"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = Path(args.data_dir) if args.data_dir else prepared(folder)
        curves = {side: trained(side, data, folder, args.steps) for side in SIDES}
    figures = summary(curves)
    for name, values in figures.items():
        for what, value in values.items():
            print(f"{name}, {what}: {value:.1e}")
    save_results(NAME, {"device": "cpu", "steps": args.steps, "figures": figures, "curves": curves})


if __name__ == "__main__":
    cli.run_main(main)
