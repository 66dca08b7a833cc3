"""Promises about silent wrongness: damage, wrong pairings, malice, numbers, flags, input. Each function tries its promise `count` times.

What is damaged, wrong or hostile is made with the builders of the tests that do the same on a smaller scale, and read by the code that users run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import predict
import prepare_data
import test as size_report
import train
from config_model import ModelConfig, PredictConfig, TrainConfig
from model_parts import KVCache
from runtime.base import cli
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.reference import (
    _reference_shape,
    _reference_sources,
    expected_shapes,
    reference_config,
)
from runtime.checkpoint.write import save_checkpoint
from runtime.checks.rounding import logits_bound, size_of
from runtime.data import shards as shards
from runtime.data.loader import WindowLoader
from runtime.data.shards import TokenShards, open_data
from runtime.data.tokenizers import load_tokenizer
from runtime.inference import predictor, session
from runtime.inference.cpu_decode import library
from runtime.inference.decoder import generate
from runtime.inference.predictor import Predictor
from runtime.inference.session import repl
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.training import plan as plan_module
from runtime.training import reporter
from runtime.training.metrics import MetricsLog, read_records
from runtime.training.plan import FREE_ON_RESUME, make_plan
from runtime.training.setup import set_up
from scripts import draw_architecture
from tests import test_model_parts, test_predict, test_prepare_data, test_train, util
from tests.base import test_cli
from tests.checkpoint import test_checkpoint
from tests.conftest import REPO
from tests.data import test_shards as test_data
from tests.inference import test_cpu_decode
from tests.numeric import before_ties
from tests.promises import Promise, Tally
from tests.util import random_config, random_model, without_chance

FIRST_SEED = 10_000  # the tests of the modules have the small seeds


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder; what is printed meanwhile goes nowhere, and nothing in it is flushed to the disk."""
    with (
        tempfile.TemporaryDirectory() as path,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(os, "fsync"),
        mock.patch.object(reporter, "draw_plots"),
    ):
        yield Path(path)


def attempt(tally: Tally, what: str, function: Callable[[], object]) -> None:
    """Count a check that says what is wrong by AssertionError; any other error is a failure too."""
    try:
        function()
    except Exception as error:
        tally.add(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    else:
        tally.add(True, what)


def one_line(error: Exception, *words: str) -> None:
    """AssertionError unless an error is a line that a terminal can show, with the given words in it."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 1000, f"not one line: {text[:200]!r}"
    assert all(word in text for word in words), f"says {text[:300]!r}, not {words}"


def damaged(data: bytes, r: random.Random, truncate: bool) -> tuple[bytes, str]:
    """`data` cut short or with one bit flipped, and a word about where."""
    if truncate:
        length = r.choice([0, 1, 4, len(data) - 1, r.randrange(len(data)), r.randrange(len(data))])
        return data[:length], f"cut to {length} of {len(data)} bytes"
    place, bit = r.randrange(len(data)), r.randrange(8)
    flipped = bytearray(data)
    flipped[place] ^= 1 << bit
    return bytes(flipped), f"bit {bit} of byte {place} flipped"


# ------------------------------------------------------------------------------------------------------ 6: what is damaged
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
    """Of 14 files, 8 are checkpoints (every fourth cut short, the others with a flipped bit anywhere), 4 shards, a manifest and a metrics.jsonl.

    Held: refused in a line that names the file; or everything that was read is proven to be what was written (padding, blanks). For
    metrics, whose damage may not stop a run: a line that says so, and no record that was not measured.
    """
    tally, seen = Tally(), dict.fromkeys(("checkpoint", "shard", "manifest", "metrics"), 0)
    counts = dict.fromkeys(("refused", "proven identical", "metrics repaired"), 0)
    with folder() as at:
        model, optimizer = test_checkpoint.new_run()
        test_checkpoint.train(model, optimizer, 2, seed=1)
        files = {"checkpoint": test_checkpoint.save(at / "run", 2, model, optimizer)}
        for split, tokens in (("train", 2500), ("val", 700)):
            test_data.write_split(
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
        whole["checkpoint"] = _contents(
            _copied(read_checkpoint(files["checkpoint"], optimizer=True))
        )  # a map would change with the file
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
                    f"case {i}, {kind} {where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                )
            path.write_bytes(good[kind])
    tally.detail = {
        f"{kind}s".replace("metricss", "metrics files"): n for kind, n in seen.items()
    } | counts
    return tally


def _noticed(read: Callable[[], object], whole: object, path: Path) -> str:
    try:
        found = read()
    except ValueError as error:  # CheckpointError is one
        one_line(error, str(path))
        return "refused"
    assert _equal(found, whole), "silently wrong"
    return "proven identical"


def _contents(checkpoint) -> dict:
    return {**{f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}}


def _tokens(data_dir: Path) -> dict:
    return {
        s.folder.name: {"manifest": s.manifest, "tokens": torch.from_numpy(s.read(0, s.num_tokens))}
        for s in open_data(data_dir)
    }


def _equal(a: object, b: object) -> bool:
    """Whether two trees of dicts, lists, tensors and values are the same, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


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
    """What a resumed run makes of the metrics in a folder that was _write_metrics's, which it is again afterwards."""
    original = [json.loads(line) for line in _metrics_bytes()[0].splitlines()]
    (at / "metrics.json").write_bytes(_metrics_bytes()[1])
    log = MetricsLog(at, resume_step=200, run_info={"run_id": "abcd"})
    messages, records = log.take_messages(), log.records()
    log.append({"step": 210, "kind": "train", "loss": 1.0})  # and the run goes on
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
    """The newest of three checkpoints, or the newest two, damaged: `train.py --resume` goes on from the one before and says so."""
    tally = Tally()
    with folder() as at:
        run = test_train.Run(_byte_data(at), at)
        assert run("--max_steps", 6, "--save_interval", 2) == 0
        files = sorted(run.ckpt_dir.glob("step_*.pt"))
        good = [path.read_bytes() for path in files]
        whole = [_contents(_copied(read_checkpoint(path, optimizer=True))) for path in files]
        for i in range(count):
            r, number, places = random.Random(FIRST_SEED + i), 1 if i % 4 else 2, []
            for path, content in list(zip(files, good, strict=True))[-number:]:
                while True:  # a flip in the padding is none that has to be noticed
                    bad, where = damaged(content, r, truncate=r.random() < 0.3)
                    path.write_bytes(bad)  # latest.pt and best.pt are names of the same files
                    with contextlib.suppress(CheckpointError):
                        read_checkpoint(path, optimizer=True)
                        continue
                    break
                places.append(f"{path.name} {where}")

            def check(number=number):
                plan = make_plan(test_train._settings("--resume", *run.folders), train.pretraining)
                said = [
                    note for note in plan.notes if note.startswith("skipped a damaged checkpoint: ")
                ]
                assert [next(p.name for p in files if str(p) in line) for line in said] == [
                    p.name for p in reversed(files[-number:])
                ], plan.notes
                assert any(
                    note == f"resuming {files[-1 - number]} at step {6 - 2 * number}"
                    for note in plan.notes
                ), plan.notes
                assert _equal(_contents(plan.source), whole[-1 - number]), (
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


def _byte_data(at: Path, seed: int = 0, name: str = "set", tokenizer: str = "byte") -> Path:
    """Prepared shards of made-up text."""
    (at / name).parent.mkdir(parents=True, exist_ok=True)
    text, val = (
        test_train.write_text(at / f"{name}.{split}.jsonl", seed + i, documents)
        for i, (split, documents) in enumerate((("train", 60), ("val", 20)))
    )
    prepare_data.main(
        [
            "--files",
            str(text),
            "--val_files",
            str(val),
            "--tokenizer",
            tokenizer,
            "--out_dir",
            str(at / name),
            "--num_proc",
            "1",
        ]
    )
    return at / name


# ------------------------------------------------------------------------------------------------------ 7: wrong pairings
class WorkBegan(BaseException):
    """Raised where a script would begin its work. No Exception, so that nothing handles it."""


def _work_began(*_, **__):
    raise WorkBegan


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """Scripts stop with WorkBegan where they would build a model, generate, read text, draw; they change nothing of this process."""
    patches = [
        (train, "set_up"),
        (predictor, "generate"),
        (predict, "repl"),
        (prepare_data, "own_validation"),
        (prepare_data, "write_partial"),
        (size_report, "report"),
        (draw_architecture, "draw"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name in patches:
            stack.enter_context(mock.patch.object(owner, name, _work_began))
        for owner, name in (
            (torch, "set_num_threads"),
            (plan_module, "make_deterministic"),
            (train.process, "keep_freed_memory"),
            (predict.gc, "freeze"),
        ):
            stack.enter_context(mock.patch.object(owner, name))
        yield


class World:
    """Data sets, runs and checkpoints that do not belong together, in one folder."""

    def __init__(self, at: Path):
        self.at = at
        self.a, self.b = _byte_data(at, 0, "a"), _byte_data(at, 10, "b")
        self.c, self.d = _byte_data(at, 0, "c", "bpe:280"), _byte_data(at, 20, "d", "bpe:280")
        self.run = test_train.Run(self.a, at / "run")
        assert self.run("--max_steps", 5, "--dropout", "0.1") == 0
        self.ckpt = str(self.run.ckpt_dir / "latest.pt")
        self.byte, bpe = load_tokenizer("byte"), load_tokenizer("bpe:280", self.c / "train")
        other = load_tokenizer("bpe:280", self.d / "train")
        build = test_predict.biased_model
        self.bpe = self._save("bpe", build(vocabulary_size=280), bpe)
        self.other_bpe = self._save("other_bpe", build(vocabulary_size=280), other)
        self.wide = self._save("wide", build(vocabulary_size=300), self.byte)
        self.nameless = self._save("nameless", build(), None)
        self.narrow = self._save("narrow", build(vocabulary_size=97), None)
        self.table = self._save("table", build(use_attention_bias=True), self.byte)
        self.no_rope = self._save("no_rope", build(use_rope=False), self.byte)
        self.yarn = self._save(
            "yarn", build(rope_scaling="yarn", rope_scaling_factor=2.0), self.byte
        )
        self.plain = self._save("plain", build(qk_norm=False), self.byte)
        self.window = self._save("window", build(sliding_window=8), self.byte)
        self.mistold = self._save(
            "mistold", build(vocabulary_size=270), bpe
        )  # a tokenizer with more ids than the model
        self.misnamed = self._save(
            "misnamed", build(), None, self.byte.to_state() | {"fingerprint": "0" * 64}
        )  # not the byte tokenizer that is here
        self.reference = self._reference()
        self.halves = self._mix("halves", self.a / "train", self.b / "val")
        self.swapped = self._mix("swapped", self.a / "val", self.a / "train")
        self.tongues = self._mix("tongues", self.a / "train", self.c / "val")
        self.lone = at / "lone"
        shutil.copytree(self.a / "train", self.lone / "train")
        self.two_tokenizers = self._forge(
            "two_tokenizers",
            self.a,
            "val",
            lambda m: m.update(
                pair=shards.read_manifest(self.a / "train")["pair"],
                tokenizer=self.byte.to_state() | {"fingerprint": "1" * 64},
            ),
        )
        self.false_vocabulary = self._forge(
            "false_vocabulary", self.a, "train", lambda m: m.update(vocabulary_size=300)
        )
        self.small_ids = self._forge(
            "small_ids",
            self.c,
            "train",
            lambda m: m.update(
                vocabulary_size=270, tokenizer=m["tokenizer"] | {"vocabulary_size": 270}
            ),
        )
        self.later_version = self._forge(
            "later_version", self.a, "train", lambda m: m.update(version=2)
        )
        self.other_format = self._forge(
            "other_format", self.a, "val", lambda m: m.update(format="something")
        )
        self.foreign_shard = self._forge("foreign_shard", self.a, "train", lambda m: None)
        target = self.foreign_shard / "train" / "shard_0000.npy"
        content = bytearray(target.read_bytes())
        content[200:264] = content[400:464]
        target.write_bytes(content)
        self.foreign_tokenizer = self._forge("foreign_tokenizer", self.c, "train", lambda m: None)
        shutil.copy(
            self.d / "train" / "tokenizer.json", self.foreign_tokenizer / "train" / "tokenizer.json"
        )
        self.empty = at / "empty"
        self.empty.mkdir()
        self.not_ours = at / "not_ours"
        (self.not_ours / "train").mkdir(parents=True)
        (self.not_ours / "train" / "thesis.txt").write_text("mine")
        self.linked = at / "linked"
        self.linked.mkdir()
        (self.linked / "train").symlink_to(self.a / "train")
        for name in ("x.jsonl", "y.jsonl", "x.txt", "x.json"):
            (at / name).write_text('{"text": "a b c"}\n')
        (at / "prompts.jsonl").write_text('{"prompt": "x"}\n')
        (at / "toml").write_text("[train]\nd_model = 3\n")

    def _save(self, name: str, model, tokenizer, state=None) -> str:
        return str(
            save_checkpoint(
                self.at / name,
                1,
                model,
                None,
                train_config=TrainConfig(),
                tokenizer_state=state or tokenizer and tokenizer.to_state(),
            )
        )

    def _mix(self, name: str, train_split: Path, val_split: Path) -> Path:
        shutil.copytree(train_split, self.at / name / "train")
        shutil.copytree(val_split, self.at / name / "val")
        return self.at / name

    def _forge(self, name: str, source: Path, split: str, change) -> Path:
        shutil.copytree(source, self.at / name)
        manifest = shards.read_manifest(self.at / name / split)
        change(manifest)
        shards.write_manifest(self.at / name / split, manifest)
        return self.at / name

    def _reference(self) -> str:
        """A checkpoint in the reference's format, as the only one of a folder."""
        fields = dict(
            d_model=16,
            dropout=0.1,
            context_length=16,
            vocabulary_size=257,
            num_heads=2,
            transformer_blocks=1,
            num_kv_heads=1,
            qkv_bias=False,
            use_rope=True,
            use_attention_bias=False,
            d_ff=8,
            num_experts=2,
            top_k=1,
            aux_loss_coef=0.01,
            capacity_factor=1.25,
        )
        config = reference_config(fields)
        weights = {
            source: torch.ones(_reference_shape(name, shape))
            for name, shape in expected_shapes(config, 1 << 30).items()
            for source in _reference_sources(name, config.num_experts)
        }
        path = self.at / "reference" / "latest.pt"
        path.parent.mkdir()
        torch.save(
            {"step": 1, "val_loss": 3.0, "cfg": fields, "model": weights, "optimizer": {}}, path
        )
        assert read_checkpoint(path).is_reference_format
        return str(path)


def pairing_cases(w: World) -> list[tuple[str, Callable, list[str], str]]:
    """(name, a script's main, its arguments, a pattern that its error must match)."""
    cases = []

    def add(main, pattern: str, *argv, name: str = "") -> None:
        cases.append(
            (
                name or " ".join(a.replace(str(w.at) + os.sep, "") for a in map(str, argv)),
                main,
                list(map(str, argv)),
                pattern,
            )
        )

    # ---- a run and settings that are not its own: every setting that is not free on resume
    resume = ["--resume", *w.run.folders]
    saved = read_checkpoint(w.ckpt)
    own = saved.train_config | dataclasses.asdict(saved.model_config)
    for owner in (ModelConfig, TrainConfig):
        for f in dataclasses.fields(owner):
            if f.name in FREE_ON_RESUME | {"init_from"}:
                continue
            value = (
                not own[f.name]
                if isinstance(own[f.name], bool)
                else next((c for c in f.metadata["choices"] or () if c != own[f.name]), None)
            )
            value = test_cli.other_value(owner, f.name, [own[f.name]]) if value is None else value
            add(
                train.main,
                rf"^--{f.name} .* differs from the run in .*latest|^--{f.name} .* differs from the run in .*step_",
                *resume,
                *test_cli.as_flags({f.name: value}),
                name=f"resume with {f.name} {value}",
            )
    for preset in ("nano", "gptoss"):
        add(
            train.main,
            f"leave out --preset {preset}",
            *resume,
            "--preset",
            preset,
            name=f"resume with preset {preset}",
        )
    add(train.main, "not both", *resume, "--init_from", w.bpe, name="resume and init_from")
    add(
        train.main,
        "at step 5, beyond --max_steps 4",
        *resume,
        "--max_steps",
        4,
        name="resume with fewer steps than were taken",
    )
    # ---- a run and data that are not its own
    for name, pattern in (
        ("b", "is not the text that"),
        ("c", "is not the text that"),
        ("d", "is not the text that"),
        ("halves", "not written by the same run"),
        ("swapped", "holds the split 'val', not 'train'"),
        ("tongues", "not written by the same run"),
        ("lone", "has no prepared text .*val"),
        ("two_tokenizers", "different tokenizers"),
        ("false_vocabulary", "its vocabulary is not its tokenizer's"),
        ("later_version", "has version 2"),
        ("other_format", "was not written by this program"),
        ("foreign_shard", "shard_0000.npy is damaged"),
        ("empty", "has no prepared text .*train"),
        ("run", "has no prepared text"),
    ):
        add(
            train.main,
            pattern,
            "--resume",
            "--data_dir",
            w.at / name,
            *w.run.folders[2:],
            name=f"resume with data {name}",
        )
    for name, pattern in (
        ("small_ids", "holds id 2\\d\\d, beyond its vocabulary of 270|tokenizer"),
        ("foreign_tokenizer", "tokenizer.json is missing or damaged"),
    ):
        add(
            train.main,
            pattern,
            *test_train.MODEL,
            "--data_dir",
            w.at / name,
            "--ckpt_dir",
            w.at / "new",
            name=f"train with data {name}",
        )
    # ---- folders that hold no run, or another's
    for name, pattern in (
        ("empty", "holds no checkpoint"),
        ("a", "holds no checkpoint"),
        ("bpe", "no optimizer state.*--init_from"),
        ("reference", "reference's format.*--init_from"),
    ):
        add(
            train.main,
            pattern,
            "--resume",
            "--ckpt_dir",
            w.at / name,
            "--data_dir",
            w.a,
            name=f"resume from folder {name}",
        )
    add(
        train.main,
        "holds the checkpoints of another run",
        *test_train.MODEL,
        *w.run.folders,
        name="a new run into a used folder",
    )
    # ---- weights and data, or flags, of another kind
    new = ["--ckpt_dir", w.at / "new", "--graph_dir", w.at / "new_graphs"]
    for ckpt, name, pattern in (
        (w.ckpt, "c", "vocabulary_size 257 is smaller than the data's 280"),
        (w.bpe, "a", "trained with tokenizer bpe:280 and .* made with byte"),
        (w.bpe, "d", "bpe:280 of another text"),
        (w.other_bpe, "c", "bpe:280 of another text"),
        (w.wide, "c", "trained with tokenizer byte and .* bpe:280"),
        (w.narrow, "a", "vocabulary_size 97 is smaller than the data's 257"),
        (w.reference, "c", "vocabulary_size 257 is smaller than the data's 280"),
    ):
        add(train.main, pattern, "--init_from", ckpt, "--data_dir", w.at / name, *new)
    for flags in (
        ["--d_ff", 24],
        ["--d_model", 32],
        ["--num_experts", 8],
        ["--transformer_blocks", 2],
        ["--vocabulary_size", 300],
        ["--tie_embeddings"],
        ["--no-head_bias"],
        ["--qk_norm"],
        ["--no-use_attention_bias"],
        ["--no-expert_bias"],
        ["--expert_activation", "gelu"],
        ["--context_length", 32],
        ["--head_dim", 4],
        ["--num_kv_heads", 2],
        ["--qkv_bias"],
        ["--no-out_proj_bias"],
    ):
        add(
            train.main,
            "does not fit the weights",
            "--init_from",
            w.ckpt,
            "--data_dir",
            w.a,
            *new,
            *flags,
        )
    # the same shapes, another function: the weights mean nothing under them
    for ckpt, name, flags in (
        (w.plain, "head_dim", ["--num_heads", 8, "--num_kv_heads", 4, "--head_dim", 4]),
        (w.plain, "use_rope", ["--no-use_rope"]),
        (w.no_rope, "use_rope", ["--use_rope"]),
        (w.plain, "init_std", ["--init_std", 0.5]),
    ):
        add(
            train.main,
            f"--{name}.* the weights",
            "--init_from",
            ckpt,
            "--data_dir",
            w.a,
            *new,
            *flags,
        )
    for path, pattern in (
        (w.at / "nowhere.pt", "no such file"),
        (w.at / "bpe", "is a directory"),
        (w.a / "train" / "shard_0000.npy", "not a checkpoint"),
        (w.c / "train" / "tokenizer.json", "not a checkpoint"),
    ):
        add(train.main, pattern, "--init_from", path, "--data_dir", w.a, *new)
    # ---- a checkpoint and the way it is to be used
    say = ["--prompt", "x", "--device", "cpu"]
    for ckpt, flags, pattern in (
        (w.nameless, [], "does not say which tokenizer it was trained with"),
        (w.bpe, ["--tokenizer", "byte"], "was trained with tokenizer bpe:280, not byte"),
        (w.bpe, ["--tokenizer", w.d], "was trained with tokenizer bpe:280, not .*d: leave"),
        (w.ckpt, ["--tokenizer", w.c], "was trained with tokenizer byte, not"),
        (w.nameless, ["--tokenizer", "words"], "tokenizer 'words' is not one of"),
        (w.nameless, ["--tokenizer", "bpe:300"], "is made from a text: give the folder"),
        (w.nameless, ["--tokenizer", w.c], "has 280 ids and the model in .* 260"),
        (w.narrow, ["--tokenizer", "byte"], "has 257 ids and the model in .* 97"),
        (w.nameless, ["--tokenizer", w.empty], "meta.json does not exist"),
        (w.nameless, ["--tokenizer", w.foreign_tokenizer], "tokenizer.json is missing or damaged"),
        (w.mistold, [], "has 280 ids and the model in .* 270"),
        (w.misnamed, [], "the stored tokenizer byte is not the byte found here"),
        (w.reference, ["--tokenizer", w.c], "has 280 ids and the model"),
        (w.table, ["--context_length", 33], "beyond the trained 32"),
        (w.ckpt, ["--context_length", 64], "beyond the trained 16"),
        (
            w.no_rope,
            ["--context_length", 64, "--rope_scaling", "linear"],
            "rope_scaling linear needs use_rope",
        ),
        (w.yarn, ["--context_length", 64], "yarn-scaled"),
        (w.bpe, ["--context_length", 32, "--rope_scaling", "yarn"], "not more than the trained 32"),
        (w.window, ["--lookup", 2], "leave lookup out"),
        (w.bpe, ["--compile"], "compile is for CUDA graphs"),
        (w.bpe, ["--num_samples", 2, "--show_experts"], "for one answer"),
        (w.bpe, ["--prompt_file", w.at / "prompts.jsonl"], "either prompt or prompt_file"),
        (w.bpe, ["--rope_scaling", "linear"], "needs a context_length"),
        (w.bpe, ["--device", "cuda:99"], "device 'cuda:99' is not here"),
        (w.bpe, ["--interactive"], "leave prompt and prompt_file out"),
        (w.at / "nowhere.pt", [], "no such file"),
        (w.at / "bpe", [], "is a directory"),
        (w.a / "train" / "shard_0000.npy", [], "not a checkpoint"),
        (w.a / "train" / "meta.json", [], "not a checkpoint"),
    ):
        add(predict.main, pattern, "--ckpt", ckpt, *say, *flags)
    # ---- texts, and settings that are for others
    out, x = ["--out_dir", w.at / "prepared", "--tokenizer", "byte"], w.at / "x.jsonl"
    for argv, pattern in (
        (["--files", x, "--dataset", "toy"], "--dataset has no effect with --files"),
        (["--files", x, "--split", "train"], "--split has no effect"),
        (["--dataset", "toy", "--streaming"], "--streaming has no effect"),
        (["--num_stories", 5], "--num_stories has no effect without"),
        (
            ["--files", x, "--val_files", w.at / "y.jsonl", "--val_ratio", 0.1],
            "--val_ratio has no effect",
        ),
        (["--files", x, "--document_separator", "x"], "--document_separator has no effect"),
        (["--files", w.at / "x.txt", "--text_column", "t"], "--text_column has no effect"),
        (["--files", x, x], "given twice"),
        (["--files", x, "--val_files", x], "given twice"),
        (["--files", w.at / "x.json"], "is of no known format"),
        (["--files", x, "--text_column", "story"], "has no 'story'"),
        (["--files", w.at], "is a folder"),
        (["--files", w.a / "train" / "shard_0000.npy"], "is of no known format"),
    ):
        add(prepare_data.main, pattern, *argv, *out)
    for name, argv, pattern in (
        ("not_ours", [], "holds files that prepare_data.py did not write .thesis.txt"),
        ("linked", [], "is a symbolic link"),
        ("x.txt", [], "is not a folder"),
        ("prepared", ["--tokenizer", "byte:compact"], "have a :compact form"),
        ("prepared", ["--tokenizer", "bpe:100"], "must be a whole number from 257"),
    ):
        add(
            prepare_data.main,
            pattern,
            "--files",
            x,
            "--tokenizer",
            "byte",
            "--out_dir",
            w.at / name,
            *argv,
        )
    # ---- settings among themselves
    for argv, pattern in (
        (["--top_k", 9, "--num_experts", 8], "top_k 9 must not exceed"),
        (
            ["--num_heads", 6, "--num_kv_heads", 4, "--d_model", 48],
            "must be a multiple of num_kv_heads",
        ),
        (["--d_model", 50, "--num_heads", 4], "not divisible by num_heads"),
        (["--head_dim", 5], "head_dim must be even"),
        (["--rope_scaling_factor", 2], "has no effect with rope_scaling none"),
        (["--rope_scaling", "yarn", "--no-use_rope"], "needs use_rope"),
        (["--window_pattern", "alternating"], "has no effect without sliding_window"),
        (["--min_lr", 1, "--lr", 0.1], "min_lr 1.0 must not exceed lr"),
        (["--warmup_steps", 50, "--max_steps", 50], "must be less than max_steps"),
        (["--muon_momentum", 0.9], "no effect with optimizer adamw"),
        (["--config", w.at / "toml"], "unknown keys in .train.: d_model"),
        (["--vocabulary_size", 100], "vocabulary_size 100 is smaller than the data's 257"),
        (
            [*test_train.MODEL, "--context_length", 100_000, "--no-use_attention_bias"],
            "tokens and a window needs 100,001",
        ),
    ):
        add(train.main, pattern, "--data_dir", w.a, *new, *argv)
    for argv in (["--preset", "nano"], ["--d_model", 64]):
        add(size_report.main, "leave out --preset and the model's flags", "--ckpt", w.ckpt, *argv)
    return cases


def tree(at: Path) -> dict[str, tuple]:
    """Everything in a folder, by name: sizes and times."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in sorted(at.rglob("*"))
    }


def pairings(count: int) -> Tally:
    """Data, tokenizers, models, checkpoints and flags that do not belong together, through the scripts' own mains: a line that names the
    mismatch, before anything is built or written. Fewer than all: evenly spread over the table."""
    tally = Tally()
    with folder() as at, no_work():
        with contextlib.ExitStack() as stack:
            for owner, name in (
                (train, "set_up"),
                (prepare_data, "write_partial"),
            ):  # the world itself is made by the real ones
                stack.enter_context(mock.patch.object(owner, name, REAL[name]))
            world = World(at)
        cases, written = pairing_cases(world), [tree(at)]
        assert len({name for name, *_ in cases}) == len(cases), "two cases have one name"
        for name, main, argv, pattern in (
            [cases[i * len(cases) // count] for i in range(count)] if count < len(cases) else cases
        ):

            def check(main=main, argv=argv, pattern=pattern):
                try:
                    main(argv)
                except WorkBegan:
                    raise AssertionError("accepted: work began") from None
                except ValueError as error:
                    one_line(error)
                    assert re.search(pattern, str(error)), f"refused, but with {str(error)[:300]!r}"
                else:
                    raise AssertionError("accepted")
                assert tree(at) == written[-1], "something was written"

            attempt(tally, f"{main.__module__}: {name}", check)
            written.append(tree(at))
        tally.detail = {"in the table": len(cases)}
    return tally


REAL = {"set_up": set_up, "write_partial": prepare_data.write_partial}


# ------------------------------------------------------------------------------------------------------------ 8: malice
CHILD = r"""
import contextlib, io, json, os, resource, sys, warnings
sys.path.insert(0, {repo!r})
import torch
from runtime.checkpoint import CheckpointError, read_checkpoint, read_config
torch.set_num_threads(1)
warnings.simplefilter("always")
{prelude}
page = resource.getpagesize()
used = int(open("/proc/self/statm").read().split()[0]) * page
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
for line in sys.stdin:
    (path, is_slow), result = json.loads(line), []
    for read in (lambda path: read_checkpoint(path, optimizer=True), read_checkpoint, read_config)[:1 if is_slow else 3]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                read(path)
                result.append("read")
            except CheckpointError as error:
                result.append("refused: " + str(error))
            except BaseException as error:
                result.append(type(error).__name__ + ": " + str(error)[:300])
        if said.getvalue():
            result.append("on stderr: " + said.getvalue()[:300])
    print(json.dumps(result), flush=True)
"""


class BySetState:
    """An object that is built by a class and a state."""


SLOW = {
    "lists that contain one another"
}  # seconds, to see that there are too many: read in one way


def _pickle_zip(path: Path, pickle: bytes, records: dict[str, bytes] | None = None) -> None:
    """A torch.save-like zip around a pickle written by hand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", pickle)
        archive.writestr("x/version", b"3\n")
        for name, content in (records or {}).items():
            archive.writestr(name, content)


def _short(text: str) -> bytes:
    """BINUNICODE."""
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _number(n: int) -> bytes:
    """LONG1."""
    raw = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def hostile_files(at: Path, canary: Path) -> list[tuple[str, Path]]:
    """Files that try to run something (it would make `canary`), to take memory, or to be what they are not: (what it is, file)."""
    Payload, forge, put, bomb = (
        test_checkpoint.Payload,
        test_checkpoint.forge,
        test_checkpoint.put,
        test_checkpoint.bomb,
    )
    model, optimizer = test_checkpoint.new_run()
    test_checkpoint.train(model, optimizer, 1, seed=1)
    good = test_checkpoint.save(at / "good", 1, model, optimizer)
    contents = torch.load(good, weights_only=True)
    command, files = f"touch {canary}", []

    def new(name: str) -> Path:
        files.append((name, at / f"{len(files):02d}.pt"))
        return files[-1][1]

    def saved(name: str, value, **how) -> None:
        torch.save(value, new(name), **how)

    # ---- code
    system, write = Payload(os.system, command), Payload(open, str(canary), "w")
    saved("reduce in the run", contents | {"run": {"x": system}})
    saved(
        "reduce among the weights",
        contents | {"model": contents["model"] | {"norm.weight": system}},
    )
    saved(
        "reduce among the moments", contents | {"optimizer": contents["optimizer"] | {"x": system}}
    )
    saved("reduce as a key", contents | {"run": {("k", system): 1}})
    saved("reduce for the file", system)
    saved("reduce in an unknown key", contents | {"zzz": [system]})
    saved("open for writing", contents | {"run": {"x": write}})
    saved("eval", contents | {"run": {"x": Payload(eval, f"__import__('os').system({command!r})")}})
    saved("exec", contents | {"run": {"x": Payload(exec, f"__import__('os').system({command!r})")}})
    saved(
        "subprocess", contents | {"run": {"x": Payload(subprocess.Popen, ["touch", str(canary)])}}
    )
    saved("import of a module", contents | {"run": {"x": Payload(__import__, "this")}})
    nested = system
    for i in range(40):
        nested = [nested] if i % 2 else {"x": nested}
    saved("reduce, nested 40 deep", contents | {"run": {"x": nested}})
    state = BySetState()
    state.__dict__.update(x=system)
    saved("build", contents | {"run": {"x": state}})
    module = torch.nn.Linear(2, 2)
    module.hook = system
    saved("a module", module)
    saved("protocol 4", contents | {"run": {"x": system}}, pickle_protocol=4)
    saved("legacy format", contents | {"run": {"x": system}}, _use_new_zipfile_serialization=False)
    call = _short(command) + b"\x85R"
    for name, pickle in (
        ("GLOBAL", b"\x80\x02cposix\nsystem\n" + call + b"."),
        ("INST", b"(" + _short(command) + b"iposix\nsystem\n."),
        ("OBJ", b"(cposix\nsystem\n" + _short(command) + b"o."),
        (
            "NEWOBJ",
            b"\x80\x02csubprocess\nPopen\n"
            + b"]"
            + _short("touch")
            + b"a"
            + _short(str(canary))
            + b"a\x85\x81.",
        ),
        ("STACK_GLOBAL", b"\x80\x04" + _short("posix") + _short("system") + b"\x93" + call + b"."),
        ("EXT1", b"\x80\x02\x82\x01" + call + b"."),
        (
            "BUILD",
            b"\x80\x02ctorch.nn\nModule\n)\x81}" + _short("__setstate__") + b"cposix\nsystem\nsb.",
        ),
        ("REDUCE of a getattr", b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\n" + call + b"."),
        (
            "persistent id with a function",
            b"\x80\x02("
            + _short("storage")
            + b"cposix\nsystem\n"
            + _short("0")
            + _short("cpu")
            + b"K\x01tQ.",
        ),
    ):
        _pickle_zip(new(f"{name} in a zip"), pickle)
    new("a bare pickle").write_bytes(b"cposix\nsystem\n(" + _short(command) + b"tR.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated; files of it are about
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(new("TorchScript")))
    path = new("a checkpoint that is TorchScript too")
    shutil.copy(good, path)
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{top}/constants.pkl", b"\x80\x02cposix\nsystem\n" + call + b".")
        archive.writestr(f"{top}/code/__torch__.py", "class M(Module):\n  pass\n")
    # ---- memory
    for name, function in (
        ("bytearray of 16 TB", bytearray),
        ("storage of 16 TB", torch.UntypedStorage),
    ):
        saved(name, contents | {"run": {"x": Payload(function, 1 << 44)}})
    huge = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + _short("storage")
        + b"ctorch\nFloatStorage\n"
        + _short("0")
        + _short("cpu")
        + b"%s"
        + b"tQK\x00(%st(%st\x89ccollections\nOrderedDict\n)RtR."
    )
    for name, numel, size, stride in (
        ("stride 0, 4 TB", 1, 1 << 40, 0),
        ("a storage of 4 TB", 1 << 40, 1 << 40, 1),
        ("a negative stride", 4, 4, -1),
        ("a size beyond the storage", 4, 1 << 40, 1),
    ):
        _pickle_zip(
            new(f"tensor with {name}"),
            b"\x80\x02}"
            + _short("model")
            + huge.replace(b"%s", _number(numel), 1)
            .replace(b"%s", _number(size), 1)
            .replace(b"%s", _number(stride), 1)[2:-1]
            + b"s.",
            {"x/data/0": b"\0" * 16},
        )
    forge(
        good,
        new("an expanded weight"),
        lambda c: c["model"].update({"embed.weight": torch.zeros(1).expand(1 << 36)}),
        redo_digests=False,
    )
    forge(
        good,
        new("an expanded moment"),
        lambda c: c["optimizer"].update({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        redo_digests=False,
    )
    for cfg in (
        dict(d_model=65_536, num_heads=4, d_ff=262_144),
        dict(transformer_blocks=1_024, num_experts=4_096),
        dict(context_length=16_777_216),
        dict(vocabulary_size=16_777_216, d_model=65_536),
    ):
        forge(good, new(f"config bomb {cfg}"), lambda c, cfg=cfg: c["cfg"].update(cfg))
    forge(
        good, new("lists that contain one another"), put("run", {"x": bomb()}), redo_digests=False
    )
    forge(
        good,
        new("one text 65,536 times"),
        put("run", {"x": ["x" * (1 << 20)] * (1 << 16)}),
        redo_digests=False,
    )
    forge(
        good,
        new("an integer of a million bits"),
        put("run", {"x": 1 << 1_000_000}),
        redo_digests=False,
    )
    for depth in (500, 100_000):
        _pickle_zip(
            new(f"lists {depth} deep"),
            b"\x80\x02}" + _short("cfg") + b"]" * depth + b"a" * (depth - 1) + b"s.",
        )
    _pickle_zip(new("a memo index of two thousand million"), b"\x80\x02}r\xff\xff\xff\x7f.")
    _pickle_zip(
        new("bytes that claim to be 2^62"), b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x."
    )
    _pickle_zip(new("marks without end"), b"\x80\x02" + b"(" * 100_000 + b".")
    # ---- zips
    with zipfile.ZipFile(new("zip bomb"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 26))
    path = new("zip bomb among the tensors")
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as archive:
        for entry in source.infolist():
            archive.writestr(
                entry.filename,
                source.read(entry),
                zipfile.ZIP_STORED if entry.filename.endswith(".pkl") else zipfile.ZIP_DEFLATED,
            )
    with zipfile.ZipFile(new("entries that share bytes"), "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        for number in range(3):
            archive.writestr(f"x/data/{number}", b"0" * 10_000)
        for entry in archive.infolist()[1:]:
            entry.header_offset, entry.file_size, entry.compress_size = (
                archive.infolist()[1].header_offset,
                1 << 30,
                1 << 30,
            )
    for name, entries in (
        ("names that climb", ["../../../x/data.pkl", "x/data.pkl/../../y"]),
        ("names from the root", [f"/{at}/data.pkl"]),
        ("two pickles", ["x/data.pkl", "x/data.pkl"]),
        ("a pickle deeper down", ["x/y/data.pkl"]),
    ):
        with warnings.catch_warnings(), zipfile.ZipFile(new(name), "w") as archive:
            warnings.simplefilter("ignore")  # about the double name
            for entry in entries:
                archive.writestr(entry, b"\x80\x02cposix\nsystem\n" + call + b".")
    # ---- files that are none
    new("a link to a file of the system").symlink_to("/etc/passwd")
    loop = new("a link to itself")
    loop.symlink_to(loop)
    new("a link to a device without end").symlink_to("/dev/zero")
    os.mkfifo(new("a pipe that nobody writes to"))
    with open(new("a hole of 1 TB behind a zip's first bytes"), "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(1 << 40)
    return files


def hostile(count: int, prelude: str = "") -> Tally:
    """Every file is read, in all three ways, by a process that may take 2 GB more than it has after its imports; nothing may be executed. All of it
    must be refused; to predict, or to see the config, is to read less, and may succeed where what is wrong is in the rest.
    prelude: code for that process, for tests of this test."""
    tally = Tally()
    with folder() as at:
        canary = at / "canary"
        (at / "files").mkdir()
        files = hostile_files(at / "files", canary)[:count]
        lines = "".join(json.dumps([str(path), name in SLOW]) + "\n" for name, path in files)
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(repo=str(REPO), prelude=prelude)],
            input=lines,
            capture_output=True,
            text=True,
            timeout=600,
            cwd=at,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        results = [json.loads(line) for line in done.stdout.splitlines()]
        for i, (name, path) in enumerate(files):

            def check(i=i, path=path):
                assert i < len(results), (
                    f"the reader is gone: exit {done.returncode}, {done.stderr[-300:]}"
                )
                for line in results[i][:1] + [line for line in results[i][1:] if line != "read"]:
                    assert line.startswith(f"refused: {path}"), line
                    assert line.isprintable() and len(line) < 800, f"not one line: {line!r:.200}"
                    assert not re.search("memory|allocate", line, re.IGNORECASE), (
                        f"took the memory first: {line}"
                    )

            attempt(tally, f"{path.name}, {name}", check)
        if canary.exists():
            tally.held = 0
            tally.failures.insert(0, "something was executed: the canary file is there")
        tally.detail = {"files": len(files), "executed": int(canary.exists())}
    return tally


# ---------------------------------------------------------------------------------------- 12, 13, 16: the model's arithmetic
def cached(count: int) -> Tally:
    """A text read whole, and in random pieces through a KV cache: the same logits, over random architectures, batches and chunkings."""
    tally, worst = Tally(), {"float64": 0.0, "float32": 0.0}
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            r, config = random.Random(seed), random_config(seed)
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
                model = random_model(config, seed, dtype).eval()
                B, T = r.choice([1, 2, 3, 4]), r.randint(2, config.context_length)
                ids, parts = torch.randint(0, config.vocabulary_size, (B, T)), []
                with torch.no_grad():
                    whole, cache = (
                        model(ids).logits,
                        KVCache(config, B, r.choice([T, T + 3]), dtype),
                    )
                    for size in test_model_parts.chunks_of(T, r):
                        parts.append(
                            model(ids[:, cache.length : cache.length + size], cache=cache).logits
                        )
                sure = before_ties(
                    model, ids
                )  # in float32 either expert is right where a router meets a near tie
                difference = (
                    _relative(torch.cat(parts, 1)[sure], whole[sure]) if sure.any() else 0.0
                )
                worst[str(dtype)[6:]] = max(worst[str(dtype)[6:]], difference)
                assert difference <= tolerance, f"{dtype} differs by {difference:.2g}"

        attempt(tally, f"seed {seed}", check)
    tally.detail = {
        f"largest relative difference, {name}": f"{value:.1g}" for name, value in worst.items()
    }
    return tally


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two tensors, relative to the second's largest value (to 1 if that is smaller); AssertionError if one is not finite."""
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), "not finite"
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def native(count: int) -> Tally:
    """The C code that decodes on a CPU against the plain model, over random architectures, weights in 8 bits among them."""
    tally, worst = Tally(), [0.0]

    def close(a: torch.Tensor, b: torch.Tensor, _) -> bool:
        worst.append(_relative(a, b))
        return worst[-1] <= 1e-4

    with mock.patch.object(test_cpu_decode, "close", close), torch.no_grad():
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            attempt(
                tally,
                f"seed {seed}",
                functools.partial(test_cpu_decode.test_it_gives_the_plain_models_logits, seed),
            )
    tally.detail = {"largest relative difference": f"{max(worst):.1g}"}
    return tally


def causality(count: int) -> Tally:
    """Over random architectures in float64: every token t changed changes no logits before t by more than rounding, read whole, in pieces, in eval
    and in train mode; the gradient of the logits at t with respect to later tokens is exactly 0; rows of a batch do not meet.

    Tokens are grouped by expert, so a matrix product may round otherwise when another token goes elsewhere: hence 1e-12 for values.
    """
    tally, worst = Tally(), [0.0]
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            r, config = random.Random(seed), without_chance(random_config(seed))
            model = random_model(config, seed, torch.float64).train(r.random() < 0.5)
            T = r.randint(2, 12)
            ids = torch.randint(0, config.vocabulary_size, (1, T))
            changed = ids.repeat(T, 1)  # row t: token t is another
            changed[torch.arange(T), torch.arange(T)] += torch.randint(
                1, config.vocabulary_size, (T,)
            )
            changed %= config.vocabulary_size
            for in_pieces in (False, True):
                with torch.no_grad():
                    base, others = (
                        _read(model, rows, r if in_pieces else None) for rows in (ids, changed)
                    )
                for t in range(1, T):
                    worst.append(_relative(others[t, :t], base[0, :t]))
                    assert worst[-1] <= 1e-12, (
                        f"logits before token {t} of {T} move by {worst[-1]:.2g}, {'in pieces' if in_pieces else 'read whole'}"
                    )
                assert all((others[t, t] != base[0, t]).any() for t in range(T)), (
                    "a token that changes nothing proves nothing"
                )
            test_model_parts.test_no_gradient_flows_from_later_tokens(seed)
            test_model_parts.test_rows_of_a_batch_do_not_meet(seed)

        attempt(tally, f"seed {seed}", check)
    tally.detail = {"largest relative change": f"{max(worst):.1g}", "gradient from later tokens": 0}
    return tally


def _read(model, ids: torch.Tensor, r: random.Random | None) -> torch.Tensor:
    """Logits of all tokens, in random pieces where `r` is given."""
    if r is None:
        return model(ids).logits
    cache = KVCache(model.config, *ids.shape, torch.float64)
    return torch.cat(
        [
            model(ids[:, cache.length : cache.length + size], cache=cache).logits
            for size in test_model_parts.chunks_of(ids.shape[1], r)
        ],
        1,
    )


def experts(count: int) -> Tally:
    """The mixture of experts against a loop over tokens and experts: output, load, and what a capacity drops."""
    tally = Tally()
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        attempt(
            tally,
            f"seed {seed}",
            functools.partial(test_model_parts.test_moe_against_a_per_token_loop, seed),
        )
    return tally


# ------------------------------------------------------------------------------------------------- 17, 19, 20: what is trained
def cross_entropy_64(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """(sum over valid targets in nats, how many), in float64 by numpy."""
    x, t = logits.double().numpy().reshape(-1, logits.shape[-1]), targets.numpy().ravel()
    x = x - x.max(axis=1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(t)), np.where(t == IGNORE, 0, t)][t != IGNORE].sum()), int(
        (t != IGNORE).sum()
    )


def loss(count: int) -> Tally:
    """The reported loss is the one that float64 gives from the logits; a validation is that too, the same to the last bit whenever it is asked
    for, leaves the random numbers and the mode alone, and a run that validates at every step trains the very weights of one that never does."""
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
            targets[:, 0] = 0  # each row has a target that counts
            with torch.no_grad():
                out, (total, valid) = (
                    model(inputs, targets),
                    cross_entropy_64(model(inputs).logits, targets),
                )
            worst.append(abs(out.cross_entropy_sum.item() - total) / max(abs(total), 1e-9))
            assert worst[-1] <= 1e-5 and out.num_targets == valid, (
                f"loss {out.cross_entropy_sum.item()} of {out.num_targets} targets, not {total} of {valid}"
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
                util.fit(
                    trained,
                    test_train.Fixed(inputs, targets, rows // 2),
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
            assert _equal(weights[0], weights[1]) and _equal(weights[0], weights[2]), (
                "how often it validates changes the weights"
            )

        attempt(tally, f"seed {seed}", check)
    tally.detail = {"largest relative difference": f"{max(worst):.1g}"}
    return tally


def same_seed(count: int) -> Tally:
    """`count` runs of train.py, each in a process of its own with other hash seeds: weights, optimizer state and metrics have one hash."""
    tally, hashes = Tally(), []
    with folder() as at:
        data = _byte_data(at)
        for i in range(count):
            run = test_train.Run(data, at / str(i))
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "import sys, train\ntrain.draw_plots = lambda *_: None\nsys.exit(train.main(sys.argv[1:]))",
                    *run.folders,
                    *test_train.MODEL,
                    *test_train.SPEED,
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


def run_hash(run: test_train.Run) -> str:
    """SHA-256 over all that a run leaves behind, but for what a clock or its name put there."""
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
        json.dumps([test_train.comparable(run.records()), state], sort_keys=True).encode()
    )
    return digest.hexdigest()


def every_token_once(count: int) -> Tally:
    """Shards of random sizes: an epoch has every token but the first as a target, once; the last window may overlap by less than a context."""
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
                assert (targets == inputs + 1).all(), (
                    "a target is not the token after its input"
                )  # ids are positions
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

    with mock.patch.object(test_data, "ShardWriter", Uneven):
        test_data.write_split(split, np.arange(sum(sizes)))


# -------------------------------------------------------------------------------------------------- 21, 22, 24: what is typed
SCRIPTS = {
    "train": (train.main, [ModelConfig, TrainConfig]),
    "predict": (predict.main, [PredictConfig]),
    "prepare_data": (prepare_data.main, []),
    "test": (size_report.main, [ModelConfig]),
    "scripts.draw_architecture": (draw_architecture.main, [ModelConfig]),
}
PREPARE_FLAGS = (
    "dataset",
    "dataset_config",
    "split",
    "text_column",
    "streaming",
    "num_stories",
    "files",
    "val_files",
    "val_ratio",
    "document_separator",
    "max_tokens",
    "out_dir",
    "tokenizer",
    "shard_size",
    "num_proc",
)


def command(main: Callable, argv: list[str]) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr) of a script's main under cli.run_main; None where its work began. Whatever else it raises comes out: a traceback."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)
        for _ in range(2)
    )
    stdin = io.TextIOWrapper(io.BytesIO(b"typed\n"), encoding="utf-8")
    code = None
    with (
        mock.patch.multiple(sys, argv=["script", *argv], stdout=out, stderr=err, stdin=stdin),
        contextlib.suppress(WorkBegan),
    ):
        try:
            cli.run_main(main)
        except SystemExit as error:
            code = error.code
    return code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err))


def bad_values() -> list[tuple[str, list[str]]]:
    """(script, arguments) that are wrong, from what each field says of itself: a wrong type, a value outside its range, one that is no choice."""
    cases = []
    for script, (_, owners) in SCRIPTS.items():
        for owner in owners:
            hints = typing.get_type_hints(owner)
            for f in dataclasses.fields(owner):
                kind, limits, values = hints[f.name], f.metadata, []
                if kind is bool:
                    values = ["=yes", "=0"]
                elif limits["choices"] is not None:
                    values = ["nonsense", "", limits["choices"][0].upper()]
                elif kind in (int, float):
                    values = [
                        "x",
                        "",
                        "1,5",
                        "0x10",
                        "nan" if kind is float else "1.5",
                        "inf",
                        "-inf",
                    ]
                    values += (
                        [repr(kind(limits["minimum"] - 1))] if limits["minimum"] is not None else []
                    )
                    values += [repr(kind(limits["above"]))] if limits["above"] is not None else []
                    values += (
                        [repr(kind(limits["maximum"] * 2 + 1))]
                        if limits["maximum"] is not None
                        else []
                    )
                cases += [
                    (script, [f"--{f.name}{value}" if kind is bool else f"--{f.name}={value}"])
                    for value in values
                ]
    cases += [
        ("prepare_data", line.split())
        for line in test_prepare_data.BAD
        if "a." not in line and "--files" not in line.split()[:1]
    ]
    cases += [
        (script, argv)
        for script in SCRIPTS
        for argv in (["--nope"], ["word"], ["--config", "nowhere.toml"], ["-x", "1"])
    ]
    return cases


def flags(count: int) -> Tally:
    """Bad values for flags of every script, drawn from all there are: exit 2 and one line that names the flag, before any work."""
    tally, cases = Tally(), bad_values()
    chosen = cases if count >= len(cases) else random.Random(count).sample(cases, count)
    with nowhere() as at:
        for script, argv in chosen:

            def check(script=script, argv=argv):
                code, out, err = command(SCRIPTS[script][0], argv)
                assert code == 2, "accepted: its work began" if code is None else f"exit {code}"
                assert (
                    err.startswith("error: ")
                    and err.count("\n") == 1
                    and len(err) < 1500
                    and not out
                ), f"said {err[:300]!r}"
                names = [
                    word.split("=")[0].removeprefix("--no-").lstrip("-")
                    for word in argv
                    if word.startswith("-")
                ] or argv
                assert any(name in err for name in names), f"names none of {names}: {err[:300]!r}"
                assert not os.listdir(at), f"something was written: {os.listdir(at)}"

            attempt(tally, f"{script} {' '.join(argv)}", check)
    tally.detail = {"in the table": len(cases)}
    return tally


@contextlib.contextmanager
def nowhere() -> Iterator[Path]:
    """An empty folder as the current one, and no work."""
    with folder() as at, no_work(), contextlib.chdir(at):
        yield at


def fuzz_value(r: random.Random) -> str:
    """What someone, or something, might type as a flag's value."""
    number = r.choice(
        [
            str(r.randrange(-3, 300)),
            repr(r.uniform(-2, 2)),
            str(2 ** r.randrange(70)),
            f"{r.choice([1, 9])}e{r.randrange(-400, 400)}",
            "9" * r.choice([20, 5000]),
        ]
    )
    text = "".join(
        chr(
            r.choice(
                [
                    r.randrange(1, 0x20),
                    r.randrange(0x20, 0x7F),
                    r.randrange(0x80, 0x3000),
                    r.randrange(0x1F300, 0x1F700),
                    r.randrange(0xD800, 0xDC00),
                ]
            )
        )
        for _ in range(r.randrange(30))
    )
    odd = [
        "",
        " ",
        "-",
        "--",
        "-1",
        "=",
        "nan",
        "inf",
        "-inf",
        "True",
        "None",
        "auto",
        "cpu",
        "cuda",
        "cuda:0",
        "cuda:-1",
        "cuda:99",
        "cpu:1",
        "mps",
        "meta",
        "xla",
        "byte",
        "bpe:300",
        "bpe:",
        "bpe:٣٣٣",
        "gpt2:compact",
        "٣",
        "½",
        "1_000",
        "0x10",
        "1e3",
        ".",
        "/",
        "/dev/null",
        "/dev/null/x",
        "run.toml",
        "bad.toml",
        "toy",
        "a.jsonl",
        "a.txt",
        "\x00",
        "a\x00b",
        "\x1b[2J",
        "x" * 5000,
        "%s",
        "@run.toml",
        "é" * 300,
        "nano",
        "gptoss",
    ]
    return r.choice([number, number, text, r.choice(odd), r.choice(odd)])


def fuzz_argv(r: random.Random, script: str) -> list[str]:
    """Random arguments for a script: its own flags with any values, some bare words, some flags of others."""
    owners = SCRIPTS[script][1]
    names = [f.name for owner in owners for f in dataclasses.fields(owner)] or list(PREPARE_FLAGS)
    names += {
        "predict": ["prompt"],
        "test": ["preset", "config", "ckpt", "presets", "batch_size"],
        "train": ["preset", "config"],
        "scripts.draw_architecture": ["preset", "config", "out", "title"],
    }.get(script, [])
    argv = []
    for _ in range(r.choice([0, 1, 1, 1, 2, 3, 6])):
        kind = r.random()
        name = r.choice(names)
        if kind < 0.75:
            value = fuzz_value(r)
            argv += r.choice(
                [[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"], [f"--no-{name}"]]
                + [[f"--{name}", value]] * 5
            )
        elif kind < 0.85:  # a value that is surely right, so that what follows is looked at
            argv += (
                r.choice([["--max_tokens", "5"], ["--dataset", "toy"]])
                if script == "prepare_data"
                else ["--seed", "3"]
                if script in ("train", "predict")
                else ["--d_model", "64"]
            )
        else:
            argv.append(
                r.choice(
                    [fuzz_value(r), f"--{fuzz_value(r)}", f"-{fuzz_value(r)}", "--help", "-h", "--"]
                )
            )
    return argv


def fuzzed_argv(count: int) -> Tally:
    """Random arguments for every script: help, exit 2 with one line, or the work begins; nothing else, and nothing is written."""
    tally, ends = Tally(), {"help": 0, "refused": 0, "accepted": 0}
    scripts = list(SCRIPTS)
    with nowhere() as at:
        for name, text in (
            ("run.toml", "[model]\nd_model = 64\nnum_heads = 4\n[train]\nseed = 3\n"),
            ("bad.toml", "seed = 'x'\n[model\n"),
            ("a.jsonl", '{"text": "a b"}\n'),
            ("a.txt", "a b c"),
        ):
            (at / name).write_text(text)
        before = tree(at)
        for i in range(count):
            script = scripts[i % len(scripts)]
            argv = fuzz_argv(random.Random(FIRST_SEED + i), script)

            def check(script=script, argv=argv):
                code, _, err = command(SCRIPTS[script][0], argv)
                assert code in (None, 0, 2), f"exit {code}"
                if code == 2:
                    assert (
                        err.startswith("error: ")
                        and err.count("\n") == 1
                        and re.sub(r"[^\x00-\x1f\x7f-\x9f]", "", err) == "\n"
                    ), f"said {err[:300]!r}"
                ends["accepted" if code is None else "refused" if code else "help"] += 1
                assert tree(at) == before, f"something was written: {set(tree(at)) ^ set(before)}"

            attempt(tally, f"case {i}, {script} {argv!r:.600}", check)
    tally.detail = ends
    return tally


@contextlib.contextmanager
def _small_predictor(**settings) -> Iterator[tuple[Predictor, PredictConfig, Path]]:
    """The smallest of models, ready to answer, in a folder that is the current one."""
    with folder() as at, contextlib.chdir(at):
        model = test_predict.biased_model(
            transformer_blocks=1,
            d_model=8,
            num_heads=1,
            num_kv_heads=1,
            num_experts=2,
            top_k=1,
            d_ff=4,
            context_length=8,
        )
        yield *test_predict.predictor_of(test_predict.save(at / "ckpt", model), **settings), at


def repl_lines(count: int) -> Tally:
    """Lines at the prompt, in sessions of 500: each is answered, leaves settings that are valid, and the session goes on."""
    tally, typed, answers = Tally(), [], [0]
    with _small_predictor(max_new_tokens=2) as (predictor, config, _):
        r = random.Random(FIRST_SEED + count)

        class Session(session.Session):
            def line(self, line: str) -> bool:
                typed.append(line)
                try:
                    goes_on = super().line(line)
                except (
                    ValueError,
                    RuntimeError,
                ) as error:  # it would be told in a line, but there is no need for one
                    raise AssertionError(f"{type(error).__name__}: {error}") from error
                dataclasses.replace(self.config)  # checks every field again
                assert goes_on, "the session ended"
                answers[0] += bool(line.strip()) and not line.startswith(":")
                return True

        def fake_input(prompt: str = "") -> str:
            if left[0] == 0:
                raise EOFError
            left[0] -= 1
            while (
                line := test_predict.fuzz_line(r).replace("\n", " ").replace("\r", " ")
            ).split() == [":q"]:
                pass
            return line

        patches = [
            mock.patch("builtins.input", fake_input),
            mock.patch.object(session, "Session", Session),
            mock.patch.object(
                predictor, "generate", lambda *a, **k: itertools.islice(generate(*a, **k), 2)
            ),
            mock.patch.object(
                sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
            ),
            mock.patch.object(sys, "stderr", io.StringIO()),
        ]  # as run_main sets them up
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            while len(typed) < count:
                left, first = [min(500, count - len(typed))], len(typed)
                try:
                    repl(predictor, config)
                    tally.tried, tally.held = (
                        tally.tried + len(typed) - first,
                        tally.held + len(typed) - first,
                    )
                except Exception as error:  # it ends the session; the lines before it were answered
                    tally.tried, tally.held = (
                        tally.tried + len(typed) - first,
                        tally.held + len(typed) - first - 1,
                    )
                    tally.failures.append(
                        f"line {len(typed)}, {typed[-1]!r:.200}: {type(error).__name__}: {error}"
                    )
                sys.stdout.seek(0)
                sys.stdout.truncate()
    tally.detail = {"prompts answered": answers[0]}
    return tally


def sampler_settings(count: int) -> Tally:
    """Random settings of how tokens are drawn: refused in a line, or two tokens are drawn."""
    tally, refused = Tally(), [0]
    with _small_predictor(max_new_tokens=2) as (predictor, config, _):
        for i in range(count):
            r = random.Random(FIRST_SEED + i)
            settings = dict(
                temperature=r.choice(
                    [0.0, 1.0, 5e-324, 10 ** r.uniform(-45, 30), 10 ** r.uniform(-2, 2)]
                ),
                top_k=r.choice([0, 1, 2, 259, 260, 261, 10**9, 10**30, r.randrange(300)]),
                top_p=r.choice([1.0, 1.0, 1e-9, 10 ** r.uniform(-9, 0)]),
                min_p=r.choice([0.0] * 4 + [1.0, 1e-9, 5e-324, r.random()]),
                repetition_penalty=r.choice([1.0] * 4 + [1e-3, 1e3, 10 ** r.uniform(-3, 3)]),
                seed=r.choice([-1, 0, 2**63 - 1, r.randrange(2**63)]),
                stop=r.choice([()] * 4 + [("a",), ("",), ("\x00", "é")]),
                lookup=r.choice([0, 0, 1, 64]),
                when_full=r.choice(["slide", "stop"]),
            )
            if r.random() < 0.4:
                odd = r.choice(
                    [
                        "temperature",
                        "top_k",
                        "top_p",
                        "min_p",
                        "repetition_penalty",
                        "seed",
                        "lookup",
                    ]
                )
                settings[odd] = r.choice(
                    [
                        -1,
                        -2,
                        -5,
                        -1.0,
                        0,
                        0.0,
                        0.5,
                        2.0,
                        float("nan"),
                        float("inf"),
                        5e-324,
                        1e39,
                        1e308,
                        2**63,
                        65,
                        True,
                        None,
                        "1",
                        "",
                        (1,),
                    ]
                )

            def check(settings=settings):
                try:
                    changed = dataclasses.replace(config, **settings)
                except ValueError as error:
                    refused[0] += 1
                    return one_line(error)
                assert len(list(predictor.stream("a", changed))) in (
                    1,
                    2,
                    3,
                )  # end-of-text may come first

            attempt(tally, f"case {i}, {settings}", check)
    tally.detail = {"refused": refused[0]}
    return tally


def context_policy(count: int) -> Tally:
    """Prompts of context - 1, context, context + 1 and 10 contexts, each with one token to draw, many with stop, many with slide; a model with a
    position table comes after one without. Held: as many tokens, told in as many words, and the answer begins as the model without a cache says."""
    tally, C = Tally(), test_predict.CONTEXT
    cases = [
        (table, num_prompt, policy)
        for table in (False, True)
        for num_prompt in (C - 1, C, C + 1, 10 * C)
        for policy in ("truncate", "stop", "slide")
    ]
    with folder() as at:
        predictors = {}
        for table, num_prompt, policy in cases[:count]:
            if table not in predictors:
                model = test_predict.biased_model(
                    use_attention_bias=table, biases={test_predict.END: -1e4}, transformer_blocks=1
                )
                predictors[table] = test_predict.predictor_of(
                    test_predict.save(at / str(table), model), temperature=0.0
                )

            def check(table=table, num_prompt=num_prompt, policy=policy):
                predictor, config = predictors[table]
                config = dataclasses.replace(
                    config,
                    max_new_tokens=1 if policy == "truncate" else 3 * C,
                    when_full="stop" if policy == "stop" else "slide",
                )
                prompt, notes = (
                    ("abcdefghij" * 40)[: num_prompt - 1],
                    [],
                )  # behind an end-of-text token
                text = "".join(predictor.stream(prompt, config, notes.append))
                room = C - min(num_prompt, C) + 1
                drawn = predictor.last.ids
                assert len(drawn) == {"truncate": 1, "stop": room, "slide": 3 * C}[policy], (
                    f"{len(drawn)} tokens"
                )
                assert (
                    predictor.last.ended
                    == {"truncate": "length", "stop": "context", "slide": "length"}[policy]
                ), predictor.last.ended
                cut = (
                    f"the prompt has {num_prompt} tokens and the context {C}: reading its last {C}"
                )
                fills = f"prompt and answer may fill the context of {C} tokens: {'the answer ends there' if policy == 'stop' else 'older text is forgotten'} if they do"
                assert notes == [cut] * (num_prompt > C) + [fills] * (policy != "truncate"), notes
                window = ([test_predict.END] + list(prompt.encode()))[-C:]
                for token in drawn:
                    window = window[-(C // 2) :] if len(window) > C else window
                    with torch.no_grad():
                        logits = predictor.model(torch.tensor([window])).logits[0, -1].clone()
                    logits[predictor.banned_ids] = -math.inf
                    gap = (
                        logits.max() - logits[token]
                    )  # of two that tie, rounding may put either first
                    tie = logits_bound(predictor.model.config, C) * size_of(
                        logits[logits.isfinite()]
                    )
                    assert gap <= tie, "not what the model says without a cache"
                    window.append(token)
                assert text == predictor.tokenizer.decode(drawn), "text was lost"

            attempt(
                tally,
                f"{'table' if table else 'no table'}, prompt of {num_prompt}, {policy}",
                check,
            )
    return tally


# --------------------------------------------------------------------------------------------------------------- 33: alone
ALONE = r"""
import contextlib, importlib, io, json, os, sys
sys.path.insert(0, {repo!r})
reached = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto", "socket.sendmsg", "urllib.Request", "ftplib.connect", "http.client.connect", "smtplib.connect"):
        reached.append(event + " " + repr(args)[:200])
        raise OSError("no network here")
sys.addaudithook(hook)
def step(name, work):
    reached.clear()
    code, what = None, ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = work()
    except BaseException as error:
        what = type(error).__name__ + ": " + str(error)[:300]
    print(json.dumps([name, reached[:], what or (str(code) if code else "")]), flush=True)
def run(module, *argv):
    return lambda: importlib.import_module(module).main(list(argv))
{prelude}
MODEL, SPEED = {model!r}, {speed!r}
for module in ("config_model", "runtime.data.shards", "runtime.data.tokenizers", "runtime.checkpoint.read", "runtime.inference.decoder", "prepare_data", "train", "predict", "test", "scripts.draw_architecture"):
    step("import " + module, lambda: importlib.import_module(module) and None)
step("prepare_data, bytes", run("prepare_data", "--dataset", "toy", "--num_stories", "60", "--tokenizer", "byte", "--val_ratio", "0.2", "--out_dir", "data"))
step("prepare_data, BPE", run("prepare_data", "--dataset", "toy", "--num_stories", "60", "--tokenizer", "bpe:300", "--val_ratio", "0.2", "--out_dir", "bpe"))
step("train", run("train", *MODEL, *SPEED, "--data_dir", "bpe", "--max_steps", "4", "--num_threads", "1"))
step("train --resume", run("train", "--resume", "--data_dir", "bpe", "--max_steps", "6"))
step("train --init_from", run("train", *SPEED, "--data_dir", "bpe", "--init_from", "checkpoints/latest.pt", "--ckpt_dir", "new", "--graph_dir", "new_graphs", "--max_steps", "4"))
step("predict", run("predict", "--prompt", "Once", "--max_new_tokens", "8", "--device", "cpu"))
step("test", run("test", "--ckpt", "checkpoints/latest.pt"))
"""


def alone(count: int, prelude: str = "") -> Tally:
    """Every module is imported, text prepared, a model trained, resumed, trained further and asked in a process that fails at, and remembers,
    each attempt to look up a name or to connect (Python's audit events). count: steps of that, counted from the last."""
    tally = Tally()
    with folder() as at:
        code = ALONE.format(
            repo=str(REPO), prelude=prelude, model=test_train.MODEL, speed=test_train.SPEED
        )
        environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIKTOKEN"))
        } | {
            "OMP_NUM_THREADS": "1",
            "HOME": str(at),
            "MPLCONFIGDIR": str(at),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=at,
            env=environment,
        )
        results = [json.loads(line) for line in done.stdout.splitlines()][-count:]
        for name, reached, what in results:
            tally.add(not reached and not what, f"{name}: {'; '.join(reached)} {what}")
        if done.returncode:
            tally.add(False, f"exit {done.returncode}: {done.stderr[-500:]}")
    return tally


PROMISES: list[Promise] = [
    Promise(
        6,
        "Damaged checkpoints, shards, manifests and metrics files are noticed: a line with file and reason, never silence",
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
    Promise(
        7,
        "Wrong pairings of data, tokenizer, model, checkpoint and flags are named and refused before any work",
        pairings,
        200,
        200,
        200,
        "at least 5 accepted in silence",
    ),
    Promise(
        8,
        "A hostile file runs nothing, takes no memory (2 GB at most) and is refused in a line",
        hostile,
        100,
        100,
        100,
        "the payload runs with torch before 2.6; a 3.36 TB request",
    ),
    Promise(
        12,
        "Logits from the cache, however the text is cut, are those without it (fp64 to 1e-12, fp32 to 1e-5)",
        cached,
        40,
        1000,
        1000,
        "21 of 50 continuations differ",
    ),
    *(
        [
            Promise(
                12, "The native CPU decoder's logits are the model's, to 1e-4", native, 3, 100, 100
            )
        ]
        if library()[0] is not None
        else []
    ),
    Promise(
        13,
        "No token sees a later one (gradients exactly 0, logits to 1e-12), and rows of a batch do not meet",
        causality,
        20,
        200,
        200,
        "logits move by 0.037; rows by 0.32",
    ),
    Promise(
        16,
        "The mixture of experts keeps its books: outputs, loads and drops as in a loop over tokens",
        experts,
        30,
        500,
        500,
        "37.5 % dropped at perfect balance",
    ),
    Promise(
        17,
        "The reported loss is the loss (float64 recomputation, 1e-5); validating is repeatable to the bit and changes nothing",
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
        2,
        3,
        3,
        "2 of 2 on a CPU",
    ),
    Promise(
        20,
        "Every token is used once an epoch, whatever the shards (the last window overlaps by less than a context)",
        every_token_once,
        60,
        500,
        500,
        "50 % of a 64-token shard unused",
    ),
    Promise(
        21,
        "A flag that cannot be honoured is refused: one line, exit 2, before any work",
        flags,
        150,
        1000,
        1000,
        "3 ignored; at least 7 accepted",
    ),
    Promise(
        22,
        "No line typed at the prompt ends a session or leaves it with settings that are not valid",
        repl_lines,
        1000,
        10_000,
        10_000,
        "4 of 9 kinds of lines end the session",
    ),
    Promise(
        22,
        "No sampler setting fails: it draws, or is refused in a line",
        sampler_settings,
        1000,
        10_000,
        10_000,
        "temperature 0, nan and a large top_k are tracebacks",
    ),
    Promise(22, "No arguments end a script in a traceback", fuzzed_argv, 300, 5000, 5000),
    Promise(
        24,
        "The context's limit is a policy: cut, stop or slide, always with the text so far",
        context_policy,
        24,
        24,
        24,
        "3 of 4 end the program",
    ),
    Promise(
        33,
        "Nothing reaches for the network: imports, preparing, training, resuming and predicting with local data",
        alone,
        17,
        17,
        17,
        "downloads a tokenizer at import config_model",
    ),
]
