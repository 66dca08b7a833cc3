"""Turn what torch.compile lacks on a machine into one line; leave every other error as it is."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator

# Where torch.compile writes files, looks for tools and starts them.
COMPILER_MODULES = ("torch._inductor", "torch._dynamo", "torch._functorch", "triton")
WITHOUT = "leave --compile out"
# What a compile worker says of an error that it could not pass on: a traceback as text.
WORKER_ERRORS = re.compile(
    r"^(?:subprocess\.)?(CalledProcessError|OSError|PermissionError|FileNotFoundError|"
    r"ImportError|RuntimeError: Failed to find C compiler)\b.*",
    re.MULTILINE,
)


@contextlib.contextmanager
def explained_compiler_failure() -> Iterator[None]:
    """Turn a missing or failing tool or cache of torch.compile into a one-line ValueError.

    An error of the model, or of the compiler on the model, is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if not (reason := compiler_failure(error)):
            raise
        raise ValueError(f"--compile does not work here: {reason}") from error


def compiler_failure(error: BaseException | None) -> str:
    """Return what torch.compile lacks and what to do, in one line; "" for any other error."""
    while error is not None:
        if reason := _reason(error):
            return reason
        # Not __context__: it may be an earlier error, which the compiler handled.
        error = getattr(error, "inner_exception", None) or error.__cause__
    return ""


def _reason(error: BaseException) -> str:
    """Return what one error of a chain says about the machine, or ""."""
    kind, text = type(error).__name__, str(error)
    if kind == "InvalidCxxCompiler":
        return (
            "there is no C++ compiler that works: install g++ or clang++, name another one in "
            f"the environment variable CXX, or {WITHOUT}"
        )
    if kind in ("CppCompileError", "CUDACompileError"):
        return _compiler_said(getattr(error, "cmd", ["?"])[0], getattr(error, "output", text))
    if kind == "TritonMissing":
        return f"Triton, which compiles for GPUs, is missing or too old: install it, or {WITHOUT}"
    if kind == "GPUTooOldForTriton":
        return f"this GPU is too old for Triton, the compiler for GPUs: {WITHOUT}"
    if "Failed to find C compiler" in text:
        return (
            "there is no C compiler, which Triton needs: install gcc or clang, name another one "
            f"in the environment variable CC, or {WITHOUT}"
        )
    if kind == "SubprocException" and (said := WORKER_ERRORS.search(text)):
        return _files(said[0])
    if not _is_the_compilers(error):
        return ""
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else error.cmd[0]
        return _compiler_said(command, error.output or error.stderr or "")
    return _files(text) if isinstance(error, (OSError, ImportError)) else ""


def _compiler_said(command: str, output: str | bytes) -> str:
    """Return the line about a compiler that ran and failed."""
    lines = (output.decode(errors="replace") if isinstance(output, bytes) else output).splitlines()
    # What it says first is often a warning, and last that it gives up.
    telling = ("no space left", "fatal error", "error", "")
    line = next((line for word in telling for line in lines if word in line.lower()), "")
    said = f" ({' '.join(line.split())[:200]})" if line.strip() else ""
    return (
        f"the compiler {command} failed{said}: install the C and C++ headers and those of Python, "
        "free some disk space, name another compiler in the environment variable CXX, or "
        f"{WITHOUT}"
    )


def _files(text: str) -> str:
    """Return the line about files that cannot be written, read or loaded."""
    return (
        f"the compiler's files cannot be written or used ({' '.join(text.split())[:200]}): set the "
        "environment variables TORCHINDUCTOR_CACHE_DIR and TMPDIR to folders with space that may "
        f"be written to and executed from, or {WITHOUT}"
    )


def _is_the_compilers(error: BaseException) -> bool:
    """Return whether an error comes from the compiler, and not from what it compiled or ran."""
    modules = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    for name in reversed(modules):
        # The standard library works for whoever called it.
        if name.split(".")[0] not in sys.stdlib_module_names:
            return name.startswith(COMPILER_MODULES)
    return False
