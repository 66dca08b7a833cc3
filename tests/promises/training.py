"""Guarantees about training: the reported loss, the same run again, every token once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import train
from config_model import TrainConfig
from runtime.data import shards as shards
from runtime.data.loader import WindowLoader
from runtime.data.shards import TokenShards
from runtime.kernels.linear_cross_entropy import IGNORE
from tests import builders_data, builders_runs
from tests.builders import random_config, random_model
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, REPO, attempt, byte_data, equal, folder, one_line


def cross_entropy_64(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """(sum over valid targets in nats, how many), in float64 by numpy."""
    x, t = logits.double().numpy().reshape(-1, logits.shape[-1]), targets.numpy().ravel()
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(t)), np.where(t == IGNORE, 0, t)][t != IGNORE].sum()), int(
        (t != IGNORE).sum()
    )


def loss(count: int) -> Tally:
    """The reported loss is the one that float64 gives from the logits; so is a validation's.

    A validation repeats to the last bit, and leaves the random numbers and the mode alone. A run
    that validates at every step trains the weights of one that never does.
    """
    tally, worst = Tally(), [0.0]
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            r = random.Random(seed)
            config = dataclasses.replace(
                random_config(seed),
                z_loss_coef=r.choice([0.0, 0.25]),
                aux_loss_coef=r.choice([0.0, 0.5]),
                dropout=r.choice([0.0, 0.3]),
                capacity_factor=r.choice([0.0, 1.0]),
            )
            model = random_model(config, seed).eval()
            V, T, rows = (
                config.vocabulary_size,
                r.randint(2, config.context_length),
                r.choice([2, 4, 6]),
            )
            inputs, targets = (torch.randint(0, V, (rows, T)) for _ in range(2))
            targets[torch.rand(rows, T) < 0.2] = IGNORE
            # Each row has a target that counts.
            targets[:, 0] = 0
            with torch.no_grad():
                out, (total, valid) = (
                    model(inputs, targets),
                    cross_entropy_64(model(inputs).logits, targets),
                )
            worst.append(abs(out.cross_entropy_sum.item() - total) / max(abs(total), 1e-9))
            assert worst[-1] <= 1e-5 and out.num_targets == valid, (
                f"loss {out.cross_entropy_sum.item()} of {out.num_targets} targets, not "
                f"{total} of {valid}"
            )
            assert math.isclose(
                out.aux_loss.item(),
                config.aux_loss_coef * out.router.aux_loss.sum().item(),
                rel_tol=1e-6,
            ), "auxiliary loss"
            batches = [
                (inputs[: rows // 2], targets[: rows // 2]),
                (inputs[rows // 2 :], targets[rows // 2 :]),
            ]
            results = []
            for training in (True, False, True):
                model.train(training)
                torch.manual_seed(r.randrange(1000))
                state = torch.get_rng_state()
                results.append(train.evaluate(model, batches))
                assert model.training == training and torch.equal(torch.get_rng_state(), state), (
                    "a validation that changes the mode or draws random numbers"
                )
            assert results[0] == results[1] == results[2], (
                f"the same weights validated to {results}"
            )
            assert math.isclose(results[0], total / valid, rel_tol=1e-5), (
                f"validation {results[0]}, by hand {total / valid}"
            )
            weights = []
            for val_batches, val_interval in (((), 1), (batches, 1), (batches, 2)):
                trained = random_model(config, seed)
                builders_runs.fit(
                    trained,
                    builders_runs.Fixed(inputs, targets, rows // 2),
                    TrainConfig(
                        batch_size=rows // 2,
                        grad_accum=2,
                        max_steps=3,
                        warmup_steps=1,
                        lr=1e-2,
                        seed=seed,
                        val_interval=val_interval,
                        device="cpu",
                    ),
                    val_batches=val_batches,
                )
                weights.append(trained.state_dict())
            assert equal(weights[0], weights[1]) and equal(weights[0], weights[2]), (
                "how often it validates changes the weights"
            )

        attempt(tally, f"seed {seed}", check)
    tally.detail = {"largest relative difference": f"{max(worst):.1g}"}
    return tally


def same_seed(count: int) -> Tally:
    """`count` runs of train.py, each in its own process with other hash seeds, agree.

    Weights, optimizer state and metrics have one hash.
    """
    tally, hashes = Tally(), []
    with folder() as at:
        data = byte_data(at)
        for i in range(count):
            run = builders_runs.Run(data, at / str(i))
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "import sys, train\nfrom runtime.training import reporter\n"
                    "reporter.draw_plots = lambda *_, **__: None\n"
                    "sys.exit(train.main(sys.argv[1:]))",
                    *run.folders,
                    *builders_runs.MODEL,
                    *builders_runs.SPEED,
                    "--max_steps",
                    "12",
                    "--dropout",
                    "0.1",
                    "--num_threads",
                    "1",
                    "--save_interval",
                    "5",
                ],
                capture_output=True,
                text=True,
                timeout=600,
                cwd=REPO,
                env=os.environ | {"PYTHONHASHSEED": str(i + 1), "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                tally.add(False, f"run {i}: exit {done.returncode}: {done.stderr[-500:]}")
                continue
            hashes.append(run_hash(run))
            tally.add(
                hashes[-1] == hashes[0],
                f"run {i} ended in {hashes[-1][:12]}, run 0 in {hashes[0][:12]}",
            )
    tally.detail = {"different hashes": len(set(hashes))}
    return tally


def run_hash(run: builders_runs.Run) -> str:
    """SHA-256 over all files of a run, except for what a clock or its name put there."""
    checkpoint, digest = run.final(), hashlib.sha256()
    for group in (checkpoint.model, checkpoint.optimizer):
        for name, tensor in sorted(group.items()):
            digest.update(
                f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
                + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    state = {
        k: v for k, v in checkpoint.run.items() if k not in ("run_id", "train_seconds", "window")
    }
    digest.update(
        json.dumps([builders_runs.comparable(run.records()), state], sort_keys=True).encode()
    )
    return digest.hexdigest()


def every_token_once(count: int) -> Tally:
    """Shards of random sizes: an epoch has every token but the first as a target, once.

    The last sequence may overlap by less than a context.
    """
    tally, unused, twice = Tally(), [0], [0]
    with folder() as at:
        for i, seed in enumerate(range(FIRST_SEED, FIRST_SEED + count)):

            def check(i=i, seed=seed):
                r = random.Random(seed)
                sizes = [
                    r.choice([1, 2, r.randint(1, 30), r.randint(1, 200)])
                    for _ in range(r.randint(1, 12))
                ]
                total = sum(sizes)
                split = at / str(i) / "train"
                _write_shards(split, sizes)
                shards_, context = TokenShards(split, verify=False), r.randint(1, 64)
                if total < context + 1:
                    try:
                        WindowLoader(shards_, context, 1, seed)
                    except ValueError as error:
                        return one_line(error, str(split), "lower --context_length")
                    raise AssertionError("a text shorter than a window was accepted")
                B = r.choice([1, 2, 5])
                loader, used = (
                    WindowLoader(shards_, context, B, r.randrange(2**63)),
                    np.zeros(total, dtype=int),
                )
                epoch = loader.num_windows
                drawn = [loader.batch(first) for first in range(0, epoch, B)]
                inputs, targets = (
                    torch.cat(parts)[:epoch].numpy() for parts in zip(*drawn, strict=True)
                )
                # Ids are positions.
                assert (targets == inputs + 1).all(), "a target is not the token after its input"
                np.add.at(used, targets.ravel(), 1)
                unused.append(int((used[1:] == 0).sum()))
                overlap = used.sum() - (total - 1)
                twice.append(int(overlap))
                starts = np.sort(inputs[:, 0])
                assert used[0] == 0 and unused[-1] == 0, (
                    f"{unused[-1]} of {total} tokens are never a target"
                )
                assert (
                    used.max() <= 2
                    and 0 <= overlap < context
                    and (starts[:-1] == np.arange(epoch - 1) * context).all()
                ), f"{overlap} targets more than once, at other places than the end"
                assert sorted(loader.window(epoch + n) for n in range(epoch)) == list(
                    range(epoch)
                ), "the second epoch is not the same windows"

            attempt(tally, f"seed {seed}", check)
            shutil.rmtree(at / str(i), ignore_errors=True)
    tally.detail = {"unused targets": max(unused), "largest overlap of the last window": max(twice)}
    return tally


def _write_shards(split: Path, sizes: list[int]) -> None:
    """A split whose ids are their positions, in shards of the given sizes."""
    real = shards.ShardWriter

    class Uneven(real):
        def append(self, ids):
            for size in sizes:
                self.shard_size = size
                super().append(ids[:size])
                ids = ids[size:]

    with mock.patch.object(builders_data, "ShardWriter", Uneven):
        builders_data.write_split(split, np.arange(sum(sizes)))


PROMISES: list[Promise] = [
    Promise(
        17,
        "The reported loss is the loss (float64 recomputation, 1e-5); validating is "
        "repeatable to the bit and changes nothing",
        loss,
        6,
        20,
        20,
        "0.24 nats too high; two values for one step",
    ),
    Promise(
        19,
        "The same seed gives the same run: weights, optimizer state and metrics, to the bit",
        same_seed,
        0,
        3,
        3,
        "2 of 2 on a CPU",
    ),
    Promise(
        20,
        "Every token is used once an epoch, whatever the shards (the last window overlaps by "
        "less than a context)",
        every_token_once,
        60,
        500,
        500,
        "50 % of a 64-token shard unused",
    ),
]
