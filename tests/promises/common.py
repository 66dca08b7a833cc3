"""What the guarantees share: a temporary folder, a tally of checks, data.

Also scripts that stop before their work.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import predict
import prepare_data
import test as size_report
import train
from runtime.inference import predictor
from runtime.training import plan as plan_module
from runtime.training import reporter
from scripts import draw_architecture
from tests import builders_runs
from tests.promises import Tally

REPO = Path(__file__).resolve().parent.parent.parent


# The tests of the modules have the small seeds.
FIRST_SEED = 10_000


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Enter a temporary folder; discard what is printed, and flush nothing in it to the disk."""
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
    """Raise AssertionError unless an error is a line for a terminal, with the given words in it."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 1000, f"not one line: {text[:200]!r}"
    assert all(word in text for word in words), f"says {text[:300]!r}, not {words}"


def equal(a: object, b: object) -> bool:
    """Whether two trees of dicts, lists, tensors and values are the same, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def byte_data(at: Path, seed: int = 0, name: str = "set", tokenizer: str = "byte") -> Path:
    """Prepared shards of made-up text."""
    (at / name).parent.mkdir(parents=True, exist_ok=True)
    text, val = (
        builders_runs.write_text(at / f"{name}.{split}.jsonl", seed + i, documents)
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


class WorkBegan(BaseException):
    """Raised where a script would begin its work. No Exception, so that nothing handles it."""


def _work_began(*_, **__):
    raise WorkBegan


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """Make scripts stop with WorkBegan where they would build a model, generate, read text or draw.

    They change nothing in this process.
    """
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


def tree(at: Path) -> dict[str, tuple]:
    """Everything in a folder, by name: sizes and times."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in sorted(at.rglob("*"))
    }
