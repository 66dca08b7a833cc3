"""Guarantees about flags that cannot be honoured, and arguments that are noise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import random
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import predict
import prepare_data
import test as size_report
import train
from config_model import ModelConfig, PredictConfig, TrainConfig
from runtime.base import cli
from scripts import draw_architecture
from tests import builders_data
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, WorkBegan, attempt, folder, no_work, tree

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
    """Return (exit code, stdout, stderr) of a script's main under cli.run_main; None if work began.

    Whatever else it raises comes out: a traceback.
    """
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
    """Return wrong (script, arguments), from each field's own metadata.

    A wrong type, a value outside its range, an invalid choice.
    """
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
        for line in builders_data.BAD
        if "a." not in line and "--files" not in line.split()[:1]
    ]
    cases += [
        (script, argv)
        for script in SCRIPTS
        for argv in (["--nope"], ["word"], ["--config", "nowhere.toml"], ["-x", "1"])
    ]
    return cases


def flags(count: int) -> Tally:
    """Bad values for every script's flags, drawn from all there are.

    Exit 2 and one line that names the flag, before any work.
    """
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
    """Draw arguments for a script: its own flags with any values, bare words, flags of others."""
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
        elif kind < 0.85:
            # A value that is surely right, so that what follows is looked at.
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
    """Random arguments for every script: help, exit 2 with one line, or the work begins.

    Nothing else, and nothing is written.
    """
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


PROMISES: list[Promise] = [
    Promise(
        21,
        "A flag that cannot be honoured is refused: one line, exit 2, before any work",
        flags,
        150,
        1000,
        1000,
        "3 ignored; at least 7 accepted",
    ),
    Promise(22, "No arguments end a script in a traceback", fuzzed_argv, 300, 5000, 5000),
]
