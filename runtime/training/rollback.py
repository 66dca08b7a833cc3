"""Go back to the last good checkpoint of a run whose steps are all skipped."""

from __future__ import annotations

import dataclasses

from runtime.base.device import release_memory
from runtime.base.ranks import START_SECONDS
from runtime.checkpoint.folder import step_files
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import read_checkpoint
from runtime.training.agreed import checkpoint_found
from runtime.training.diary import Diary
from runtime.training.plan import TrainPlan, saved_state
from runtime.training.state import RunState, TrainingDiverged


def rolled_back(
    plan: TrainPlan, diverged: RunState, error: TrainingDiverged
) -> tuple[TrainPlan, RunState]:
    """Return the run at its newest checkpoint saved before any skipped step, after the data used.

    Raise the error again if there is no such checkpoint, or max_rollbacks is reached.
    """
    # The traceback holds the model and the optimizer, which are about to be made again.
    error.__traceback__ = None
    plan.ranks.wait_at_most(START_SECONDS)
    release_memory(plan.device)
    folder = plan.config.graph_dir if plan.ranks.is_first else None
    diary = Diary(folder, diverged.run_id, print)
    reason = error.args[0].partition(":")[0]
    diary.event(diverged.step, "diverged", reason)
    if diverged.rollbacks >= plan.config.max_rollbacks:
        raise error
    source, _ = checkpoint_found(lambda: (_newest_good(plan, diverged), []), plan.ranks)
    if source is None:
        raise error
    state = saved_state(source)
    state.samples_seen, state.rollbacks = diverged.samples_seen, diverged.rollbacks + 1
    back = (
        f"back to step {state.step:,}, continuing after the data already used "
        f"(rollback {state.rollbacks} of at most {plan.config.max_rollbacks})"
    )
    diary.event(state.step, "rollback", back)
    print(f"{reason}: {back}", flush=True)
    config = dataclasses.replace(plan.config, resume=True, init_from="")
    return dataclasses.replace(plan, source=source, config=config), state


def _newest_good(plan: TrainPlan, diverged: RunState) -> Checkpoint | None:
    """Return a run's newest checkpoint saved before any skipped step, or None."""
    for _, path in reversed(step_files(plan.config.ckpt_dir)):
        try:
            source = read_checkpoint(path, optimizer=True)
            state = saved_state(source)
        except ValueError:
            # Damaged: an older one will do.
            continue
        if state.run_id == diverged.run_id and not state.skipped_in_a_row:
            return source
    return None
