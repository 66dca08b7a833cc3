"""Guarantees about checkpoints of several ranks: any number continues what any number began."""

from __future__ import annotations

import dataclasses
import itertools
import os
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.read import load_training_state, read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.training.optimizer import build_optimizer
from runtime.training.state import RunState
from runtime.training.task import GivenTask
from tests.builders import random_config, tiny_config
from tests.builders_rank_checkpoints import loaded_and_saved, same, saved
from tests.builders_ranks import SPEED, Windows
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, folder
from tests.promises.many_ranks import without_times
from tests.ranks import run_on

WORLDS, FORMATS = (1, 2, 4), ("file", "sharded")
# Saved on so many ranks, loaded on so many, in a file or a folder.
PAIRS = list(itertools.product(WORLDS, WORLDS, FORMATS))
STEPS = 9
# The ranks of a run's parts.
CHAINS = [(2, 1, 4), (4, 2), (1, 2, 4), (4, 1)]
# Losses of ranks differ by rounding (4 ranks: 5e-7), which ten steps of training let grow.
MOST_LOSS = 1e-5


def any_to_any(count: int) -> Tally:
    """A state that any number of ranks saved is loaded by any other and saved again: PAIRS.

    Random configurations, of which half share experts where ranks may. Compared with what one
    process saves: all tensors, the digest of the weights, the header but for the number of ranks.
    """
    tally = Tally()
    for case in range(count):
        # Of all kinds, also the first few: 7 and 18 have no common divisor.
        saves, loads, checkpoint = PAIRS[case * 7 % len(PAIRS)]
        config = random_config(FIRST_SEED + case)

        def placing(world: int, config=config, shares=case % 2 == 0) -> dict:
            shared = 2 if shares and world % 2 == 0 and config.num_experts % 2 == 0 else 1
            return dict(config=config, expert_parallel=shared)

        def check(saves=saves, loads=loads, checkpoint=checkpoint, placing=placing):
            with folder() as at:
                one = saved(ONE_PROCESS, at / "one", config=placing(1)["config"])
                first = partial(saved, **placing(saves))
                path = run_on(saves, first, at / "a", checkpoint)[0]
                assert same(path, one), "saved"
                second = partial(loaded_and_saved, **placing(loads))
                again = run_on(loads, second, Path(path), at / "b", checkpoint)[0]
                assert same(again, one), "loaded"

        attempt(tally, f"{saves} -> {loads} ranks, {checkpoint}, seed {FIRST_SEED + case}", check)
    return tally


class Noted(Windows):
    """Windows that notes which samples it is asked for."""

    def __init__(self, config: ModelConfig, batch_size: int):
        super().__init__(config, batch_size)
        self.firsts: list[int] = []

    def batch(self, first: int):
        self.firsts.append(first)
        return super().batch(first)


def part_of_a_run(
    ranks: Ranks, changes: dict, at: Path, begin: int, end: int
) -> tuple[list[dict], list[int]]:
    """Continue a run from the checkpoint of a step to another step.

    Return its log records, and the samples that this rank read. changes: of SPEED, and it saves
    at the end if they do not say when.
    """
    model_config = tiny_config(dropout=0.1, router_bias_rate=0.01, context_length=16)
    config = TrainConfig(**(SPEED | dict(max_steps=STEPS, grad_accum=4) | changes))
    torch.manual_seed(0)
    model = LLM(model_config)
    ranks.arrange(1, config.shard, model_config.num_experts)
    ranks.shard(model, torch.float32)
    optimizer, state = build_optimizer(model, config, ranks), RunState()
    if begin:
        found = next(path for path in at.iterdir() if path.stem == f"step_{begin:07d}")
        checkpoint = read_checkpoint(found, optimizer=True)
        load_training_state(checkpoint, model, optimizer, ranks)
        state = RunState(**checkpoint.run)
    records: list[dict] = []

    def on_save(state: RunState, val_loss: float | None, is_best: bool) -> None:
        save_checkpoint(
            *(at, state.step, model, optimizer),
            train_config=config,
            tokenizer_state=None,
            run=dataclasses.asdict(state) | {"train_seconds": 0.0},
            ranks=ranks,
        )

    loader = Noted(model_config, config.batch_size)
    # A step asks for a stop before it logs.
    last = end - begin - 1
    hooks = train.Hooks(records.append, on_save, stop_requested=lambda: len(records) == last)
    task = GivenTask(loader, train.next_token_loss)
    # What is fetched ahead and then not used is not read by the run.
    task.fetch_ahead = False
    given = dict(optimizer=optimizer, state=state, ranks=ranks)
    with mock.patch.object(os, "fsync"):
        train.fit(model, task, config, hooks, **given)
    return without_times(records), loader.firsts


def resumed_at_every_step(ranks: Ranks, changes: dict, at: Path) -> list[list[dict]]:
    """Run STEPS steps at once, then again from each step; return the records of each run."""
    straight, _ = part_of_a_run(ranks, changes, at / "0", 0, STEPS)
    found = [straight]
    for step in range(1, STEPS):
        if ranks.is_first:
            (at / f"{step}").mkdir()
            for path in (at / "0").glob(f"step_{step:07d}*"):
                path.rename(at / f"{step}" / path.name)
        ranks.any(True)
        found.append(part_of_a_run(ranks, changes, at / f"{step}", step, STEPS)[0])
    return found


def resumed_ranks(count: int) -> Tally:
    """A run on two ranks that stops at any of 8 steps and resumes is the straight run, to the bit.

    The final weights, moments and state of the run, and what it logs.
    """
    tally = Tally()
    for case in range(-(-count // (STEPS - 1))):
        checkpoint = FORMATS[case % 2]
        changes = dict(
            optimizer=("muon", "adamw")[case // 2 % 2], checkpoint=checkpoint, save_interval=1
        )
        with folder() as at:
            straight, *resumed = run_on(2, resumed_at_every_step, changes, at)[0]
            for step, records in enumerate(resumed, 1):

                def check(step=step, records=records, at=at, straight=straight):
                    assert records == straight[step:], "the log"
                    assert same(at / f"{step}/latest.pt", at / "0/latest.pt"), "the state"

                attempt(tally, f"{changes}, resumed at step {step}", check)
    return tally


def resumed_on_others(count: int) -> Tally:
    """A run whose parts ran on other numbers of ranks (CHAINS) reads the same samples in each step.

    Its losses are those of one process within 1e-5.
    """
    tally, largest = Tally(), 0.0
    for case in range(count):
        chain = CHAINS[case % len(CHAINS)]
        changes = dict(optimizer="muon", seed=FIRST_SEED + case)

        def check(chain=chain, changes=changes, case=case):
            nonlocal largest
            with folder() as at:
                expected, samples = part_of_a_run(ONE_PROCESS, changes, at / "one", 0, STEPS)
                records, read, begin = [], [], 0
                for i, world in enumerate(chain):
                    end = STEPS * (i + 1) // len(chain)
                    checkpoint = FORMATS[(case + i) % 2]
                    given = (changes | {"checkpoint": checkpoint}, at / "many", begin, end)
                    parts = run_on(world, part_of_a_run, *given)
                    records += parts[0][0]
                    read += sorted(first for _, firsts in parts for first in firsts)
                    begin = end
                assert read == samples, "the samples"
                pairs = zip(records, expected, strict=True)
                off = max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs)
                largest = max(largest, off)
                assert off <= MOST_LOSS, f"{off:.1e}"

        attempt(tally, f"{' -> '.join(map(str, chain))} ranks, seed {FIRST_SEED + case}", check)
    tally.detail["largest relative difference of a loss"] = float(f"{largest:.0e}")
    return tally


PROMISES = [
    Promise(
        68,
        "What 1, 2 or 4 ranks save, in a file or a folder, 1, 2 or 4 load: the same tensors",
        any_to_any,
        4,
        180,
        180,
    ),
    Promise(
        69,
        "A run on two ranks that is resumed at any step is the run without a stop, to the bit",
        resumed_ranks,
        0,
        32,
        32,
    ),
    Promise(
        70,
        "A run that is continued on another number of ranks reads the same text (losses 1e-5)",
        resumed_on_others,
        1,
        40,
        40,
    ),
]
