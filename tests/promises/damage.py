"""Guarantees about damaged files: checkpoints, shards, manifests and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import train
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import read_checkpoint
from runtime.data.shards import open_data
from runtime.training.metrics import MetricsLog, read_records
from runtime.training.plan import make_plan
from tests import builders_checkpoint, builders_data, builders_runs
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, byte_data, equal, folder, one_line


def damaged(data: bytes, r: random.Random, truncate: bool) -> tuple[bytes, str]:
    """`data` cut short or with one bit flipped, and a word about where."""
    if truncate:
        length = r.choice([0, 1, 4, len(data) - 1, r.randrange(len(data)), r.randrange(len(data))])
        return data[:length], f"cut to {length} of {len(data)} bytes"
    place, bit = r.randrange(len(data)), r.randrange(8)
    flipped = bytearray(data)
    flipped[place] ^= 1 << bit
    return bytes(flipped), f"bit {bit} of byte {place} flipped"


KINDS = (
    "checkpoint",
    "shard",
    "checkpoint",
    "checkpoint",
    "shard",
    "checkpoint",
    "manifest",
    "checkpoint",
    "shard",
    "checkpoint",
    "checkpoint",
    "shard",
    "checkpoint",
    "metrics",
)


def corruption(count: int) -> Tally:
    """Damage 14 files: 8 checkpoints, 4 shards, a manifest and a metrics.jsonl.

    Every fourth checkpoint is cut short, the others have a flipped bit anywhere. Held: rejected in
    a line that names the file, or everything read is proven to be what was written (padding,
    blanks). For metrics, whose damage may not stop a run: a line that says so, and no record that
    was not measured.
    """
    tally, seen = Tally(), dict.fromkeys(("checkpoint", "shard", "manifest", "metrics"), 0)
    counts = dict.fromkeys(("refused", "proven identical", "metrics repaired"), 0)
    with folder() as at:
        model, optimizer = builders_checkpoint.new_run()
        builders_checkpoint.train(model, optimizer, 2, seed=1)
        files = {"checkpoint": builders_checkpoint.save(at / "run", 2, model, optimizer)}
        for split, tokens in (("train", 2500), ("val", 700)):
            builders_data.write_split(
                at / "data" / split, np.random.default_rng(tokens).integers(257, size=tokens)
            )
        files |= {
            "shard": at / "data" / "train" / "shard_0001.npy",
            "manifest": at / "data" / "val" / "meta.json",
            "metrics": at / "graphs" / "metrics.jsonl",
        }
        _write_metrics(at / "graphs")
        readers = {
            "checkpoint": lambda: _contents(read_checkpoint(files["checkpoint"], optimizer=True)),
            "shard": lambda: _tokens(at / "data"),
            "manifest": lambda: _tokens(at / "data"),
        }
        whole = {kind: read() for kind, read in readers.items()}
        # A map would change with the file.
        whole["checkpoint"] = _contents(
            _copied(read_checkpoint(files["checkpoint"], optimizer=True))
        )
        good = {kind: path.read_bytes() for kind, path in files.items()}
        for i in range(count):
            kind = KINDS[i % len(KINDS)]
            r, path = random.Random(FIRST_SEED + i), files[kind]
            bad, where = damaged(good[kind], r, seen[kind] % 4 == 0)
            seen[kind] += 1
            path.write_bytes(bad)
            try:
                counts[
                    _metrics_noticed(at / "graphs")
                    if kind == "metrics"
                    else _noticed(readers[kind], whole[kind], path)
                ] += 1
                tally.add(True, "")
            except Exception as error:
                tally.add(
                    False,
                    f"case {i}, {kind} {where}: {type(error).__name__}: "
                    f"{' '.join(str(error).split())[:300]}",
                )
            path.write_bytes(good[kind])
    tally.detail = {
        f"{kind}s".replace("metricss", "metrics files"): n for kind, n in seen.items()
    } | counts
    return tally


def _noticed(read: Callable[[], object], whole: object, path: Path) -> str:
    try:
        found = read()
    except ValueError as error:
        # CheckpointError is one.
        one_line(error, str(path))
        return "refused"
    assert equal(found, whole), "silently wrong"
    return "proven identical"


def _contents(checkpoint) -> dict:
    return {**{f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}}


def _tokens(data_dir: Path) -> dict:
    return {
        s.folder.name: {"manifest": s.manifest, "tokens": torch.from_numpy(s.read(0, s.num_tokens))}
        for s in open_data(data_dir)
    }


def _write_metrics(at: Path) -> None:
    log = MetricsLog(at, run_info={"run_id": "abcd"})
    for step in range(10, 210, 10):
        log.append(
            {
                "step": step,
                "kind": "train",
                "tokens_seen": 2048 * step,
                "loss": 5 - step / 77,
                "lr": 1e-3 / step,
                "expert_load": [[0.5, 1.5], [1.25, 0.75]],
            }
        )
        if step % 50 == 0:
            log.append(
                {
                    "step": step,
                    "kind": "val",
                    "tokens_seen": 2048 * step,
                    "loss": 5.5 - step / 79,
                    "perplexity": math.exp(5.5 - step / 79),
                }
            )
    log.finish()


def _metrics_noticed(at: Path) -> str:
    """Return the metrics that a resumed run reads, then restore the folder of _write_metrics."""
    original = [json.loads(line) for line in _metrics_bytes()[0].splitlines()]
    (at / "metrics.json").write_bytes(_metrics_bytes()[1])
    log = MetricsLog(at, resume_step=200, run_info={"run_id": "abcd"})
    messages, records = log.take_messages(), log.records()
    # And the run continues.
    log.append({"step": 210, "kind": "train", "loss": 1.0})
    assert list(read_records(at / "metrics.jsonl")) == [
        *records,
        {"step": 210, "kind": "train", "loss": 1.0, "run_id": "abcd"},
    ]
    log.finish()
    for path in at.iterdir():
        path.unlink()
    for message in messages:
        assert "metrics" in message and "\n" not in message
    assert all(record in original for record in records), "a record that nobody measured was kept"
    if records == original and not messages:
        return "proven identical"
    assert messages, f"{len(original) - len(records)} records lost without a word"
    return "metrics repaired"


@functools.cache
def _metrics_bytes() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as path:
        _write_metrics(Path(path))
        return tuple((Path(path) / name).read_bytes() for name in ("metrics.jsonl", "metrics.json"))


def fallback(count: int) -> Tally:
    """Damage the newest, or the newest two, of three checkpoints.

    `train.py --resume` continues from the one before and says so.
    """
    tally = Tally()
    with folder() as at:
        run = builders_runs.Run(byte_data(at), at)
        assert run("--max_steps", 6, "--save_interval", 2) == 0
        files = sorted(run.ckpt_dir.glob("step_*.pt"))
        good = [path.read_bytes() for path in files]
        whole = [_contents(_copied(read_checkpoint(path, optimizer=True))) for path in files]
        for i in range(count):
            r, number, places = random.Random(FIRST_SEED + i), 1 if i % 4 else 2, []
            for path, content in list(zip(files, good, strict=True))[-number:]:
                # A flip in the padding is none that has to be noticed.
                while True:
                    bad, where = damaged(content, r, truncate=r.random() < 0.3)
                    # latest.pt and best.pt are names of the same files.
                    path.write_bytes(bad)
                    with contextlib.suppress(CheckpointError):
                        read_checkpoint(path, optimizer=True)
                        continue
                    break
                places.append(f"{path.name} {where}")

            def check(number=number):
                plan = make_plan(
                    builders_runs.settings_of("--resume", *run.folders), train.pretraining
                )
                said = [
                    note
                    for note in plan.notes
                    if note.startswith("skipped a checkpoint that cannot be read: ")
                ]
                assert [next(p.name for p in files if str(p) in line) for line in said] == [
                    p.name for p in reversed(files[-number:])
                ], plan.notes
                assert any(
                    note == f"resuming {files[-1 - number]} at step {6 - 2 * number}"
                    for note in plan.notes
                ), plan.notes
                assert equal(_contents(plan.source), whole[-1 - number]), (
                    "other values than were saved"
                )

            attempt(tally, f"case {i}, {' and '.join(places)}", check)
            for path, content in zip(files, good, strict=True):
                path.write_bytes(content)
    return tally


def _copied(checkpoint):
    """A checkpoint that does not change with its file."""
    return dataclasses.replace(
        checkpoint,
        **{
            group: {name: t.clone() for name, t in getattr(checkpoint, group).items()}
            for group in ("model", "optimizer")
        },
    )


PROMISES: list[Promise] = [
    Promise(
        6,
        "Damaged checkpoints, shards, manifests and metrics files are noticed: a line with "
        "file and reason, never silence",
        corruption,
        140,
        700,
        700,
        "138 of 150 flipped checkpoints and 97 of 100 flipped shards accepted",
    ),
    Promise(
        6,
        "A damaged newest checkpoint: --resume goes on from the one before it, and says so",
        fallback,
        12,
        100,
        100,
        "ends the run",
    ),
]
