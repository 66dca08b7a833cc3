"""What is said at the end of a run: how good it became, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from runtime.checkpoint.folder import BEST, LATEST
from runtime.training.plan import TrainPlan
from runtime.training.state import RunState


def closing_lines(plan: TrainPlan, state: RunState) -> list[str]:
    """Return the best validation loss with its step, and the command that tries the model."""
    lines = []
    if state.best_val_loss is not None:
        # The first versions did not keep the step.
        at = f" at step {state.best_step:,}" if state.best_step else ""
        lines.append(f"best     validation loss {state.best_val_loss:.4f}{at}")
    if plan.task.tokenizer_state:
        folder = Path(plan.config.ckpt_dir)
        name = BEST if (folder / BEST).exists() else LATEST
        chat = "--chat " if plan.task.tokenizer_state.get("chat") else ""
        lines.append(f"next     python predict.py {chat}--ckpt {shlex.quote(str(folder / name))}")
    return lines
