"""C sources of this repository, compiled once by the machine's own compiler and kept.

A library is kept under a key: what the sources say, the flags, the compiler, the machine. So two
copies of the code share one, and a changed source is compiled again.

Environment variables: CC is the compiler, GPTOSS_CFLAGS are flags after ours, XDG_CACHE_HOME is
where compiled code is kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=gnu11",
    "-shared",
    "-fPIC",
]
# Where the code says itself which multiply-add is one operation. A compiler would choose otherwise
# in each copy of a loop.
EXACT = "-ffp-contract=off"
# Where every multiply-add may be one operation.
FUSED = "-ffp-contract=fast"


def compiled(source: Path, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the library of a C source, ""), or (None, why it is missing).

    flags: for this source, after FLAGS. Headers that it includes in quotes lie in its folder.
    """
    if platform.system() not in ("Linux", "Darwin"):
        return None, f"there are no C kernels on {platform.system()}"
    compiler = os.environ.get("CC") or next(
        (c for c in ("cc", "gcc", "clang") if shutil.which(c)), None
    )
    if compiler is None:
        return None, "there is no C compiler (cc, gcc or clang)"
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    # After -march=native, so that they can take back what it allows:
    # GPTOSS_CFLAGS="-mno-avx512f -O1".
    extra = os.environ.get("GPTOSS_CFLAGS", "").split()
    command = [*compiler.split(), *FLAGS, *flags, native, *extra]
    machine = [platform.machine(), *platform.libc_ver(), cpu_flags()]
    content = "\0".join([*_texts(source), *command, *machine])
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{source.stem}_{key}.so"
        for attempt in range(2):
            if attempt or not path.exists():
                _compile([*command, str(source), "-lm", "-lpthread"], path)
            for own in (folder, path):
                status = own.lstat()
                is_others = status.st_uid != os.geteuid() or status.st_mode & 0o022
                if is_others or own.is_symlink():
                    why = (
                        f"{own} is not this user's alone, and code is not taken from there: "
                        "remove it, or set XDG_CACHE_HOME"
                    )
                    return None, why
            # A file that is cut short, or made for another system, is compiled again.
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path)), ""
        return None, f"{path} was compiled, and cannot be loaded"
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return None, f"{source.name} could not be compiled: {' '.join(said.split())[:200]}"


def kernel(
    source: Path, arguments: type[ctypes.Structure], double: bool = False, *flags: str, **sizes: int
) -> tuple[ctypes.CDLL | None, str]:
    """Return (the library of a kernel of training, ""), or (None, why it is missing).

    arguments: what its functions take, which C knows under another name; ValueError if it has
    another size there. double: in float64, for tests, as are further flags. sizes: names of its
    functions that return a number of elements, and how many int64 they take.
    """
    code, why = compiled(source, FUSED, *["-DGPTOSS_DOUBLE"] * double, *flags)
    if code is None:
        return None, why
    for name, count in {"gptoss_size": 0, **sizes}.items():
        function = getattr(code, name)
        function.argtypes, function.restype = [ctypes.c_int64] * count, ctypes.c_int64
    if code.gptoss_size() != ctypes.sizeof(arguments):
        raise ValueError(f"{source.name} and {arguments.__module__} disagree about a structure")
    return code, ""


def _compile(command: list[str], path: Path) -> None:
    # Another process may be doing the same: the last one wins.
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        subprocess.run(
            [*command, "-o", f"{work}/new.so"],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        os.replace(f"{work}/new.so", path)


def _texts(source: Path) -> list[str]:
    """Return the text of a source and of all that it includes from its folder."""
    text = source.read_text()
    texts = [text]
    for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
        texts += _texts(source.with_name(name))
    return texts


def cache_folder() -> Path:
    """Return the folder of compiled code, and of what runtime/inference/asked.py found."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gptoss"


def digest(code: ctypes.CDLL | None) -> str:
    """Return the SHA-256 of compiled code, "" without it."""
    return "" if code is None else hashlib.sha256(Path(code._name).read_bytes()).hexdigest()


def cpu_flags() -> str:
    """Return what -march=native stands for on this machine, as far as Linux tells."""
    try:
        return next(
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def parallel_region() -> int:
    """Return the address of GOMP_parallel in the OpenMP that PyTorch has loaded, 0 without one.

    The kernels then run on PyTorch's own threads: no second team spins next to them.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return 0
    for path in dict.fromkeys(re.findall(r"(/\S*lib(?:gomp|iomp|omp)[^/\s]*\.so\S*)", maps)):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(path).GOMP_parallel
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
