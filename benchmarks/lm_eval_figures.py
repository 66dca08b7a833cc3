"""lm-evaluation-harness's figures next to ours: the same rows, asked by both, of one checkpoint.

    python -m benchmarks.lm_eval_figures --ckpt public/stories.pt --files stories.jsonl

Needs lm-eval (pip install -e ".[lm-eval]"); nothing is downloaded. Of the held-out stories in the
files ("text" in JSON lines; without --files: toy stories) come endings with HellaSwag's keys, verbs
with BLiMP's, and texts that fit into the context. Each is a file for --tasks or --files of
scripts/evaluate.py, and a YAML task of lm-eval over the same file, for --lm_eval. One run of that
script asks both.
Saved: benchmarks/results/lm_eval_figures.json. --table prints the stored figures as Markdown.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import REPO, RESULTS, save_results
from benchmarks.score import texts_of
from config_model import PredictConfig
from runtime.base import cli
from runtime.evaluation.choice_formats import Question
from runtime.evaluation.lm_eval import library
from runtime.evaluation.own_tasks import agreements, drawn_documents, endings
from runtime.evaluation.sentences import sentence_starts
from runtime.inference.predictor import Predictor

NAME = "lm_eval_figures"
# Of lm-eval's metrics, our column: acc_norm is by character and ours by byte.
COLUMNS = {"acc": "sum", "acc_bytes": "per_byte", "acc_norm": "per_byte", "acc_mutual_info": "pmi"}
ENDINGS = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{ctx}}",
    "doc_to_choice": "{{endings}}",
    "doc_to_target": "{{label}}",
}
AGREEMENT = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "doc_to_target": 0,
}
TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
}


def ending_rows(questions: Sequence[Question]) -> list[dict]:
    """Return endings as rows with HellaSwag's keys; the right one has each place in turn."""
    rows = []
    for number, question in enumerate(questions):
        right, *others = question.continuations
        place = number % len(question.continuations)
        own = [*others[:place], right, *others[place:]]
        rows.append({"ctx": question.contexts[0], "endings": own, "label": place})
    return rows


def agreement_rows(questions: Sequence[Question]) -> list[dict]:
    """Return verbs as rows with BLiMP's keys: the sentence of each, without what is before it."""
    rows = []
    for question in questions:
        (context,) = question.contexts
        sentence = context[sentence_starts(context)[-1] :] + question.delimiter
        good, bad = (sentence + own for own in question.continuations)
        rows.append({"sentence_good": good, "sentence_bad": bad})
    return rows


def write_task(
    folder: Path, name: str, rows: list[dict], settings: dict, metrics: Sequence[str]
) -> None:
    """Write rows as JSON lines, and lm-eval's task lm_NAME over them."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    is_text = "bits_per_byte" in metrics
    listed = [
        {
            "metric": metric,
            "aggregation": metric if is_text else "mean",
            "higher_is_better": not is_text,
        }
        for metric in metrics
    ]
    task = {
        "task": f"lm_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "metric_list": listed,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(task | settings), encoding="utf-8")


def write_tasks(
    folder: Path,
    texts: Sequence[str],
    questions: int,
    documents: int,
    fits: Callable[[str], bool],
) -> None:
    """Write the three tasks. documents: texts for bits per byte, at most, of those that fit."""
    # HellaSwag's brackets and double blanks would be cleaned.
    plain = [" ".join(text.split()) for text in texts if "[" not in text]
    drawn = drawn_documents(plain, len(plain))
    ends = ending_rows(endings(drawn)[:questions])
    write_task(folder, "endings", ends, ENDINGS, list(COLUMNS))
    metrics = [metric for metric in COLUMNS if metric != "acc_mutual_info"]
    verbs = agreement_rows(agreements(drawn)[:questions])
    write_task(folder, "agreement", verbs, AGREEMENT, metrics)
    # Of a longer one lm-eval's last window begins earlier than ours.
    whole = [{"text": text} for _, text in drawn if fits(text)][:documents]
    if not (ends and verbs and whole):
        raise ValueError(
            f"the texts give {len(ends)} endings, {len(verbs)} verbs and {len(whole)} texts that "
            "fit into the context, and some of each are needed: read more of them"
        )
    write_task(folder, "text", whole, TEXT, ["bits_per_byte"])


def flags_of(ckpt: str, report: str = "report.json") -> list[str]:
    """Return the flags of scripts/evaluate.py, in the folder of the tasks."""
    own = ["--files", "text.jsonl", "--documents", "0", "--tasks", "endings.jsonl"]
    own += ["agreement.jsonl", "--lm_eval", "endings.yaml,agreement.yaml,text.yaml"]
    return ["--ckpt", ckpt, *own, "--device", "cpu", "--json", report]


def asked(folder: Path, ckpt: str) -> dict:
    """Return the report of the checkpoint, of one run in a process of its own."""
    command = [sys.executable, str(REPO / "scripts" / "evaluate.py"), *flags_of(ckpt)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"scripts/evaluate.py failed: {done.stderr.strip()[-2000:]}")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def pairs_of(report: dict) -> list[dict]:
    """Return each figure twice: ours, lm-eval's, and the number of cases that each is of."""
    ours, theirs = (report["tasks"][name]["figures"] for name in ("files", "lm_eval"))
    found = []
    for task in ("endings", "agreement"):
        for metric, column in COLUMNS.items():
            if f"lm_{task}_{metric}" in theirs:
                mine, own = ours[f"{task}_{column}"], theirs[f"lm_{task}_{metric}"]
                found.append(_pair(task, column, metric, mine, own))
    bits = report["bits_per_byte"]
    mine = bits | {"n": bits["documents"]}
    return [
        *found,
        _pair("text", "bits_per_byte", "bits_per_byte", mine, theirs["lm_text_bits_per_byte"]),
    ]


def _pair(task: str, column: str, metric: str, mine: dict, own: dict) -> dict:
    kept = {key: mine[key] for key in ("value", "low", "high", "n")}
    return {
        "task": task,
        "column": column,
        "metric": metric,
        "ours": kept,
        "lm_eval": {key: own.get(key) for key in kept},
        # Both are sums of the same numbers in another order.
        "same": math.isclose(mine["value"], own["value"], rel_tol=1e-9) and mine["n"] == own["n"],
    }


def _interval(one: dict) -> str:
    """Return the interval of a figure; "" if it has none, as of few documents."""
    return "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}"


def markdown(pairs: Sequence[dict]) -> str:
    """Return the figures as a table."""
    lines = ["| task | ours | 95 % interval | lm-eval | | n |", "|---|---|---|---|---|---|"]
    for one in pairs:
        mine, own = one["ours"], one["lm_eval"]
        lines.append(
            f"| {one['task']} | `{one['column']}` {mine['value']:.6f} | {_interval(mine)} | "
            f"`{one['metric']}` {own['value']:.6f} | "
            f"{'the same' if one['same'] else 'not the same'} | {mine['n']:,} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", default="public/stories.pt", help="checkpoint that is asked")
    parser.add_argument("--files", nargs="*", default=[], help='JSON lines with "text"')
    parser.add_argument("--stories", type=int, default=2000, help="stories to read (2000)")
    parser.add_argument("--questions", type=int, default=500, help="of each task, at most (500)")
    parser.add_argument("--documents", type=int, default=500, help="of bits per byte (500)")
    parser.add_argument("--table", action="store_true", help="print the stored figures")
    args = parser.parse_args(argv)
    if args.table:
        print(markdown(json.loads((RESULTS / f"{NAME}.json").read_text())["figures"]))
        return 0
    if min(args.stories, args.questions, args.documents) < 1:
        raise ValueError("--stories, --questions and --documents must be at least 1")
    library()
    texts = texts_of(args.files, args.stories)
    predictor = Predictor(PredictConfig(ckpt=args.ckpt, device="cpu", quiet=True))
    context = predictor.model.config.context_length

    def fits(text: str) -> bool:
        return len(predictor.tokenizer.encode(text)) <= context

    with tempfile.TemporaryDirectory() as name:
        write_tasks(Path(name), texts, args.questions, args.documents, fits)
        report = asked(Path(name), str(Path(args.ckpt).resolve()))
    figures = pairs_of(report)
    print(markdown(figures))
    save_results(
        NAME,
        {
            "evaluate": ["python", "-m", "scripts.evaluate", *flags_of(args.ckpt)],
            "lm_eval": importlib.metadata.version("lm_eval"),
            "source": "files" if args.files else "toy stories",
            "checkpoint": report["checkpoint"],
            "figures": figures,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
