"""What is said at the end of a run: how good it became, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from runtime.base.text import human_seconds
from runtime.checkpoint.folder import BEST, LATEST
from runtime.training.metrics import HIGH, LOW
from runtime.training.plan import TrainPlan
from runtime.training.state import RunState, skipped_words


def score_table(records: Iterable[dict]) -> list[str]:
    """Return a table of a run's first and last score, with 95 % intervals; [] without two scores.

    records: of a run, in order. What is measured later has no number in the first column.
    """
    first = last = None
    for record in records:
        if record["kind"] == "score":
            first, last = first or record, record
    if first is None or last is None or first["step"] == last["step"]:
        return []
    rows = [("score", f"step {first['step']:,}", f"step {last['step']:,}")]
    for name in last["score"]:
        if not name.endswith((LOW, HIGH)):
            rows.append((name, _cell(first["score"], name), _cell(last["score"], name)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cell(score: dict, name: str) -> str:
    value = score.get(name)
    if value is None:
        return "-"
    low, high = score.get(name + LOW), score.get(name + HIGH)
    return f"{value:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None else "")


def closing_lines(plan: TrainPlan, state: RunState, records: Iterable[dict] = ()) -> list[str]:
    """Return how a run ended, and the command that continues it or tries its model."""
    config, lines = plan.config, []
    if state.skipped_steps:
        lines.append(skipped_words(state.skipped_steps, state.skipped_spikes))
    if state.step < config.max_steps:
        lines.append(
            f"stopped after step {state.step:,}, saved in {config.ckpt_dir}; continue with: "
            f"{plan.task.command} --resume --ckpt_dir {shlex.quote(config.ckpt_dir)}"
        )
        return lines
    lines.append(
        f"done: {state.step:,} steps, {state.tokens_seen:,} tokens in "
        f"{human_seconds(state.train_seconds)}; checkpoints in {config.ckpt_dir}, plots in "
        f"{config.graph_dir}"
    )
    return lines + result_lines(plan, state, records)


def result_lines(plan: TrainPlan, state: RunState, records: Iterable[dict] = ()) -> list[str]:
    """Return the scores, the best validation loss, and the command that tries the model."""
    lines = score_table(records)
    if plan.task.best_score and state.best_score is not None:
        best = f"{plan.task.best_score} {state.best_score:.4f} at step {state.best_step:,}"
        lines.append(f"best     {best}")
    elif state.best_val_loss is not None:
        # The first versions did not keep the step.
        at = f" at step {state.best_step:,}" if state.best_step else ""
        lines.append(f"best     validation loss {state.best_val_loss:.4f}{at}")
    if plan.task.tokenizer_state:
        folder = Path(plan.config.ckpt_dir)
        name = BEST if (folder / BEST).exists() else LATEST
        chat = "--chat " if plan.task.chats else ""
        lines.append(f"next     python predict.py {chat}--ckpt {shlex.quote(str(folder / name))}")
    return lines
