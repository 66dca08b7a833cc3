"""Judge several checkpoints on the same text with scripts/evaluate.py, each against the first.

    python -m benchmarks.judged base=checkpoints/muon/best.pt adamw=checkpoints/adamw/best.pt \\
        sft=checkpoints/sft/best.pt --files valid.jsonl --train_files train.jsonl

Each is asked for bits per byte and their paired difference, tasks made of the text, stories, what
its experts specialise in, and chat exercises where it knows chats. Saved:
benchmarks/results/judged.json, with the figures of every report, and the command of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import REPO, RESULTS, save_results
from runtime.base import cli
from runtime.checkpoint.read import read_checkpoint
from runtime.data.chat import has_chat
from runtime.data.tokenizers import tokenizer_of

# Address of a figure in a report: its row in the table.
ROWS = {
    "text.bits_per_byte": "bits per byte",
    "comparison.difference": "... minus that of the first",
    "text.accuracy": "next token right",
    "calibration.expected_calibration_error": "calibration error",
    "loss.slope_per_doubling": "loss per doubled position, nats",
    "tasks.own.ending_per_byte": "the right ending of four, per byte",
    "tasks.own.ending_pmi": "... by PMI",
    "tasks.own.order_sum": "two sentences in order",
    "tasks.own.name_sum": "the right name",
    "tasks.own.agreement_sum": "the verb that agrees",
    "stories.repeated_4grams": "stories: repeated 4-grams",
    "stories.copied_8grams": "stories: 8-grams of the training text",
    "stories.ended": "stories: ended",
    "stories.words": "stories: words",
    "stories.bits_per_byte": "stories: bits per byte",
    "chat.exercises.questions": "chat: questions",
    "chat.exercises.requests": "chat: requests",
    "experts.specialities.block_0_token": "first block: bits that the token tells of the expert",
    "experts.shared.block_0_overlap": "first block: experts shared with the first",
}
HUMAN = "_human"


def figures_of(report: dict, prefix: str = "") -> dict[str, dict]:
    """Return the figures of a report by their addresses, as --require names them."""
    found = {}
    for key, value in report.items():
        if key == "figures":
            found |= {prefix + name: one for name, one in value.items()}
        elif isinstance(value, dict):
            found |= figures_of(value, f"{prefix}{key}.")
    return found


def report_of(arguments: list[str]) -> tuple[dict, float]:
    """Return the report of scripts.evaluate and the seconds that the command took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "scripts.evaluate", *arguments, "--json", str(path)]
        started = time.perf_counter()
        subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        return json.loads(path.read_text(encoding="utf-8")), seconds


# ------------------------------------------------------------------------------------------ tables
def shown(figure: dict | None) -> str:
    """Return a cell: the value and its interval."""
    if figure is None or figure["value"] is None:
        return ""
    low, high = figure.get("low"), figure.get("high")
    digits = 4 if abs(figure["value"]) < 0.1 else 3
    value = f"{figure['value']:.{digits}f}"
    return value if low is None else f"{value} ({low:.{digits}f} to {high:.{digits}f})"


def judged_table() -> str:
    """Return a row for each figure, and a column for each checkpoint and for the human text."""
    result = json.loads((RESULTS / "judged.json").read_text(encoding="utf-8"))
    reports, first = result["reports"], next(iter(result["reports"].values()))
    lines = [f"| | {' | '.join(reports)} | human text |", "|---" * (len(reports) + 2) + "|"]
    for address, about in ROWS.items():
        cells = [shown(report["figures"].get(address)) for report in reports.values()]
        if any(cells):
            human = shown(first["figures"].get(address + HUMAN))
            lines.append(f"| {about} | {' | '.join(cells)} | {human} |")
    e, data = result["environment"], first["data"]
    return "\n".join(
        [
            *lines,
            "",
            f"{data['documents']:,} documents, {data['bytes']:,} bytes; 95 % intervals. "
            f"{e['hardware']['cpu']}, torch {e['versions']['torch']}; `judged.json`.",
        ]
    )


TABLES = {"judged": judged_table}


# ----------------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=CHECKPOINT", help="models, in order")
    parser.add_argument("--files", nargs="+", required=True, help="held-out text")
    parser.add_argument("--train_files", nargs="*", default=[], help="the training text")
    parser.add_argument("--documents", type=int, default=2000, help="documents (2000)")
    parser.add_argument("--stories", type=int, default=200, help="stories (200)")
    args = parser.parse_args(argv)
    reports, first = {}, ""
    for model in args.models:
        name, equals, path = model.partition("=")
        if not equals:
            raise ValueError(f"{model}: write NAME=CHECKPOINT, as in sft=checkpoints/sft/best.pt")
        command = ["--ckpt", path, "--files", *args.files, "--documents", str(args.documents)]
        command += ["--own_tasks", "--experts", "--stories", str(args.stories)]
        command += ["--train_files", *args.train_files] if args.train_files else []
        command += ["--against", first] if first else []
        command += ["--chat"] if has_chat(tokenizer_of(read_checkpoint(path))) else []
        first = first or path
        report, seconds = report_of(command)
        reports[name] = {
            "arguments": [os.path.basename(one) if os.sep in one else one for one in command],
            "seconds": seconds,
            "checkpoint": report["checkpoint"],
            "data": report["data"],
            "figures": figures_of(report),
        }
        print(name, shown(reports[name]["figures"]["text.bits_per_byte"]), f"{seconds:.0f} s")
    print(save_results("judged", {"reports": reports}))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
