"""C sources are compiled once, again when they change, and run on PyTorch's threads."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest

from runtime.kernels.compile import compiled, kernel, parallel_region

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux", reason="names of libraries and threads are Linux's"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that returns what its header says, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "number.h").write_text('#include "inner.h"\n')
    (tmp_path / "inner.h").write_text("#define NUMBER 5\n")
    path = tmp_path / "number.c"
    path.write_text(
        '#include "number.h"\n#ifdef SIX\n#undef NUMBER\n#define NUMBER 6\n#endif\n'
        "int number(void) { return NUMBER; }\n"
    )
    if compiled(path)[0] is None:
        pytest.skip("there is no C compiler")
    return path


def test_a_changed_header_makes_another_library(source):
    """The name of a library came from its source alone: a changed header was not noticed."""
    assert compiled(source)[0].number() == 5
    source.with_name("inner.h").write_text("#define NUMBER 7\n")
    assert compiled(source)[0].number() == 7


def test_flags_make_another_library(source):
    assert compiled(source, "-DSIX")[0].number() == 6
    assert compiled(source)[0].number() == 5
    assert len(list((source.parent / "cache/gptoss").iterdir())) == 2


def test_an_error_is_one_line(source):
    source.write_text("no C\n")
    code, why = compiled(source)
    assert code is None and why.startswith("number.c could not be compiled: ") and "\n" not in why


def test_kernels_run_on_pytorchs_threads():
    """A second team would wait, spinning, on the cores that the first one needs."""
    maps = Path("/proc/self/maps").read_text()
    if "libgomp" not in maps:
        pytest.skip("this PyTorch has another OpenMP")
    assert parallel_region()


def test_structures_that_differ_are_an_error(source):
    """A field that one side lacks would shift all that follow it, and memory would be overrun."""

    class Arguments(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int64), ("b", ctypes.c_double))

    source.write_text(
        "#include <stdint.h>\nint64_t gptoss_size(void) { return 16; }\n"
        "int64_t twice(int64_t n) { return 2 * n; }\n"
    )
    code, why = kernel(source, Arguments, twice=1)
    assert why == "" and code.twice(1 << 40) == 1 << 41
    source.write_text("long gptoss_size(void) { return 24; }\n")
    with pytest.raises(ValueError, match="number.c and .* disagree about a structure"):
        kernel(source, Arguments)
