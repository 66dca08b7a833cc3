"""What torch.compile lacks on a machine is one line; an error of what it compiles is not touched.

The failures are real ones: each is made in a process of its own, by its environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from runtime.base.compiler import compiler_failure, explained_compiler_failure
from tests import builders_runs
from tests.nightly import nightly_but

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import torch
from runtime.base.compiler import explained_compiler_failure
try:
    with explained_compiler_failure():
        torch.compile(lambda x: (x.sin() * 2).relu(), fullgraph=True)(torch.ones(100, 100))
except ValueError as error:
    print(f"ValueError: {error}")
"""


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def environment(tmp_path: Path, **variables: object) -> dict[str, str]:
    fresh = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache", "TMPDIR": tmp_path}
    return os.environ | {name: str(value) for name, value in (fresh | variables).items()}


def compiled(tmp_path: Path, **variables: object) -> str:
    """Return what a process says that compiles a function with these environment variables."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
    )
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, said",
    nightly_but(
        [
            ("none", "no C++ compiler that works"),
            (
                "no headers",
                "g++ failed (.*omp.h: No such file or directory): install the C and C++",
            ),
            ("junk", "files cannot be written or used (.*file too short): set the environment"),
            ("no folder", "files cannot be written or used (.*File exists: '/dev/null')"),
        ],
    ),
)
def test_a_machine_that_cannot_compile_is_one_line(tmp_path, how, said):
    """`--compile` without a C++ compiler ended in a traceback of 200 lines, and with exit code 1.

    Without headers and on a full disk it did as well. An unusable cache folder was one line that
    did not say what to do.
    """
    link = 'case "$*" in *-shared*) {} ;; esac\nexec g++ "$@"'
    junk = 'while [ "$1" ]; do [ "$1" = -o ] && echo junk > "$2"; shift; done; exit 0'
    variables: dict[str, object] = {
        "none": {"CXX": tmp_path / "nowhere"},
        "no headers": {"CXX": executable(tmp_path / "g++", 'exec /usr/bin/g++ -nostdinc "$@"')},
        "junk": {"CXX": executable(tmp_path / "junk", link.format(junk))},
        "no folder": {"TORCHINDUCTOR_CACHE_DIR": "/dev/null"},
    }[how]
    output = compiled(tmp_path, **variables)
    pattern = said.replace("(", r"\(").replace(")", r"\)").replace("++", r"\+\+")
    assert re.fullmatch(
        f"ValueError: --compile does not work here: .*{pattern}.*leave --compile out\n", output
    ), output


@pytest.mark.nightly
@pytest.mark.slow
def test_train_without_a_compiler_ends_before_step_1_with_exit_code_2(tmp_path):
    run = builders_runs.Run(builders_runs.prepared(tmp_path), tmp_path)
    result = subprocess.run(
        [sys.executable, "train.py", "--compile", *builders_runs.MODEL, *run.folders],
        cwd=ROOT,
        env=environment(tmp_path, PATH="/nonexistent"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and not run.ckpt_dir.exists()
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: --compile does not work here: there is no C++ compiler")
    assert "Traceback" not in result.stderr


def graph_break(x):
    print("a side effect")
    return x


def wrong_shapes(x):
    return x @ torch.ones(3, 3)


def missing_file(x):
    raise FileNotFoundError(2, "the model's own file", "weights.bin")


@torch._dynamo.disable
def _opens(x):
    with open("/nonexistent/table.bin") as file:
        return x + len(file.read())


def opens_a_file_between_graphs(x):
    return _opens(x.sin())


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, whole",
    [
        (graph_break, True),
        (wrong_shapes, True),
        (missing_file, True),
        (opens_a_file_between_graphs, False),
    ],
)
def test_an_error_of_what_is_compiled_is_not_swallowed(function, whole):
    """An error of the model under --compile must not be taken for one of the machine."""
    with pytest.raises(Exception) as plain, explained_compiler_failure():
        torch.compile(function, fullgraph=whole)(torch.ones(4, 4))
    assert "does not work here" not in str(plain.value)
    assert compiler_failure(plain.value) == ""


@pytest.mark.parametrize(
    "kind, text, said",
    [
        ("TritonMissing", "Cannot find a working triton installation", "Triton, which compiles"),
        ("GPUTooOldForTriton", "Found GTX 980", "too old for Triton"),
        (
            "RuntimeError",
            "Failed to find C compiler. Please specify via CC",
            "no C compiler, which",
        ),
        (
            "SubprocException",
            "An exception occurred in a subprocess:\n\nName=triton\nTraceback (most recent\n"
            "  File 'x.py'\nOSError: [Errno 28] No space left on device: '/tmp/x'\n",
            "cannot be written or used (OSError: [Errno 28] No space left",
        ),
        ("SubprocException", "Name=triton\nAssertionError: of the compiler", ""),
        ("LoweringException", "AssertionError: a kernel", ""),
    ],
)
def test_what_a_gpu_s_compiler_lacks_is_one_line(kind, text, said):
    """Triton's errors, as they come wrapped on a GPU: its own, and those of a compile worker."""
    inner = type(kind, (RuntimeError,), {})(text)
    outer = RuntimeError("backend='inductor' raised")
    outer.inner_exception = inner  # type: ignore[attr-defined]
    assert (said in compiler_failure(outer)) if said else compiler_failure(outer) == ""


def test_of_a_compiler_s_output_the_telling_line_is_shown():
    """A compiler that fills the disk says so between warnings, and ends with its own defeat."""
    error = type("CppCompileError", (RuntimeError,), {})("C++ compile error")
    error.cmd = ["g++", "x.cpp"]  # type: ignore[attr-defined]
    error.output = (  # type: ignore[attr-defined]
        "warning: x\n/usr/bin/ld: final link failed: No space left on device\n"
        "collect2: error: ld returned 1 exit status\n"
    )
    said = "g++ failed (/usr/bin/ld: final link failed: No space left on device)"
    assert said in compiler_failure(error)


def test_a_file_that_training_does_not_find_is_no_matter_of_the_compiler(tmp_path):
    with pytest.raises(FileNotFoundError), explained_compiler_failure():
        (tmp_path / "nowhere").read_text()


def test_both_places_that_compile_are_covered(monkeypatch, tmp_path):
    """Validation compiles a second graph, in the loop: a disk may be full by then."""
    real = train.set_up

    def set_up(plan, *args):
        model, *rest = real(plan, *args)
        error = type("InvalidCxxCompiler", (RuntimeError,), {})("no compiler")
        monkeypatch.setattr(model, "forward", lambda *_, **__: (_ for _ in ()).throw(error))
        return model, *rest

    monkeypatch.setattr(train, "set_up", set_up)
    run = builders_runs.Run(builders_runs.prepared(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="no C\\+\\+ compiler that works"):
        run("--max_steps", 4)
