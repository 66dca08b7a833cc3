"""Judge a checkpoint: how good is it, on what, and how sure is that?

    python -m scripts.evaluate --ckpt checkpoints/best.pt                  on the validation shards
    python -m scripts.evaluate --files valid.jsonl --html report.html      on text of your own
    python -m scripts.evaluate --against other.pt                          which of two is better
    python -m scripts.evaluate --tasks hellaswag.jsonl --own_tasks         multiple choice
    python -m scripts.evaluate --experts --expert_off 50                   what the experts do
    python -m scripts.evaluate --require "bits_per_byte<=0.80"             exit code 1 if not

Nothing is downloaded. docs/evaluation.md says what each figure means.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

from runtime.base import process

# Here, because PyTorch reads the environment when it is imported.
process.before_torch()
# ruff: noqa: E402

import dataclasses
import functools
import sys
from collections.abc import Sequence

import numpy as np

from runtime.base.cli import add_fields, parser, run_main
from runtime.base.files import write_text_atomic
from runtime.base.shares import wilson
from runtime.data.chat import has_chat
from runtime.evaluation.bootstrap import RESAMPLES, ratio_intervals
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.evaluate import evaluate
from runtime.evaluation.page import as_page
from runtime.evaluation.report import Figure, Section, figure, section
from runtime.evaluation.requirements import verdicts
from runtime.evaluation.writing import as_json, as_lines, as_markdown
from runtime.inference.predictor import Predictor
from runtime.interop.release import commit
from runtime.posttraining.score import Exam

# They take several names after one flag, as prepare_data.py's do.
LISTS = ("files", "tasks", "train_files")
# Of the means of chat exercises; a reward is from 0 to 1.
UNITS = {"length": "tokens", "story loss": "nats"}
ABOUT_CHAT = (
    "Shares have Wilson's intervals. Those of reward, length and story loss are bootstraps over "
    "prompts, or over stories."
)


def settings_of(argv: list[str] | None) -> EvaluateConfig:
    """Return what the user asked for. Raise ValueError."""
    p = parser(__doc__)
    fields = {f.name: f for f in dataclasses.fields(EvaluateConfig)}
    for name in LISTS:
        p.add_argument(
            f"--{name}", nargs="+", metavar="FILE", default=(), help=fields[name].metadata["help"]
        )
    add_fields(p, EvaluateConfig, [name for name in fields if name not in LISTS])
    args = vars(p.parse_args(argv))
    return EvaluateConfig(**args | {name: tuple(args[name]) for name in LISTS})


def chat_sections(predictor: Predictor, resamples: int = RESAMPLES) -> dict[str, Section]:
    """Return how many held-out exercises of the post-training tasks a chat model does right."""
    if not has_chat(predictor.tokenizer):
        raise ValueError(
            f"{predictor.origin.path} was not trained on chats, so --chat has nobody to ask: train "
            "it with python -m scripts.sft, or leave --chat out"
        )
    score = Exam(predictor.tokenizer).score(predictor.model)
    figures = {
        key_of(name): figure(share.value, share.trials, *wilson(share.successes, share.trials))
        for name, share in score.shares.items()
    }
    for name, parts in score.parts.items():
        figures[key_of(name)] = mean_figure(parts, UNITS.get(name, ""), resamples)
    return {"exercises": section("chat exercises", figures, notes=[ABOUT_CHAT])}


def key_of(name: str) -> str:
    """Return the name of a score as --require can say it without quotes."""
    return name.replace(" ", "_").replace("@", "_at_").replace("__", "_")


def mean_figure(
    parts: Sequence[tuple[float, int]], unit: str = "", resamples: int = RESAMPLES
) -> Figure:
    """Return a mean of (sum, count) of prompts or stories, which the interval draws again.

    n: the prompts or stories.
    """
    totals_D1, counts_D1 = (np.array(side, float)[:, None] for side in zip(*parts, strict=True))
    (interval,) = ratio_intervals(totals_D1, counts_D1, resamples)
    return figure(interval.value, len(parts), interval.low, interval.high, unit)


def main(argv: list[str] | None = None) -> int:
    config = settings_of(argv)
    chat = functools.partial(chat_sections, resamples=config.resamples) if config.chat else None
    report = evaluate(config, lambda line: print(line, file=sys.stderr), commit(), chat)
    print("\n".join(as_lines(report)))
    for path, write in (
        (config.json, as_json),
        (config.markdown, as_markdown),
        (config.html, as_page),
    ):
        if path:
            write_text_atomic(path, write(report))
            print(path, file=sys.stderr)
    lines, is_met = verdicts(config.requirements(), report)
    print("".join(f"{line}\n" for line in lines), end="")
    return 0 if is_met else 1


if __name__ == "__main__":
    run_main(main)
