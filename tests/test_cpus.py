"""tests/cpus.py: its settings reach the libraries and the C compiler, and its list has every test
that compares numbers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from runtime.inference import cpu_decode
from tests import cpus
from tests.conftest import REPO

CHILD = """
import hashlib, torch
from runtime.inference import cpu_decode
from tests import conftest
# The same bits everywhere, as random numbers are not.
x = (torch.arange(37 * 37) % 101 / 101).view(37, 37)
digest = hashlib.sha256((x @ x).numpy().tobytes()).hexdigest()
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), digest)
print(getattr(cpu_decode.library()[0], "_name", ""))
torch.nn.functional.gelu(x.to_mkldnn())
"""
is_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86's instructions")


def seen_by(environment: dict[str, str]) -> SimpleNamespace:
    """Return what a process under these variables runs with.

    ATen's and oneDNN's instructions, threads, a product's bits, the C kernel's file.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=REPO,
        env=environment | {"ONEDNN_VERBOSE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (capability, threads, bits), *others = [
        line.split()
        for line in done.stdout.splitlines()
        if line and not line.startswith("onednn_verbose")
    ]
    onednn = re.search(r"cpu,isa:(.*)", done.stdout)
    return SimpleNamespace(
        capability=capability,
        threads=int(threads),
        bits=bits,
        library=others[0][0] if others else "",
        onednn=onednn and onednn[1],
    )


@pytest.fixture(scope="module")
def as_it_is():
    return seen_by(
        {key: value for key, value in os.environ.items() if key not in cpus.SETTINGS["plain"]}
    )


@pytest.mark.nightly
@is_x86
@pytest.mark.parametrize(
    "name, capability, threads, onednn",
    [("plain", "DEFAULT", 1, "SSE4.1"), ("avx2", "AVX2", 2, "AVX2")],
)
def test_the_settings_take_effect(name, capability, threads, onednn, as_it_is):
    """A variable that no library reads would show the same code twice. MKL_ENABLE_INSTRUCTIONS is
    one of those on AMD: hence MKL_CBWR.
    """
    seen = seen_by(cpus.environment(name))
    assert (seen.capability, seen.threads) == (capability, threads)
    # A PyTorch with oneDNN.
    if seen.onednn is not None:
        assert seen.onednn.endswith(onednn)
    if torch.backends.mkl.is_available() and name == "plain":
        assert seen.bits != as_it_is.bits
    if cpu_decode.library()[0] is not None:
        assert seen.library and seen.library != as_it_is.library, (
            "compiled with other flags, it is another file"
        )
        if shutil.which("objdump"):
            code = subprocess.run(
                ["objdump", "-d", seen.library], capture_output=True, text=True, check=True
            ).stdout
            assert "zmm" not in code and "ymm" in code


def test_every_test_that_compares_numbers_is_run():
    """What imports tests.numeric is in the list, all of the file or some of its tests, and
    everything in the list exists.
    """
    listed = {entry.split("::")[0] for entry in cpus.FILES + cpus.TESTS}
    uses = {
        path.relative_to(REPO / "tests").as_posix()
        for path in (REPO / "tests").rglob("test_*.py")
        if re.search(r"^from tests\.numeric import", path.read_text(), re.MULTILINE)
    }
    # A made-up difference.
    not_here = {"interop/test_export.py"}
    assert len(uses) > 15, "a glob that looks too shallow finds nothing"
    assert uses - not_here - listed == set()
    for entry in cpus.FILES + cpus.TESTS:
        file, _, test = entry.partition("::")
        assert f"def {test.partition('[')[0]}" in (REPO / "tests" / file).read_text(), entry


def test_code_that_the_compiler_made_for_one_setting_is_not_taken_for_another():
    """Under ATEN_CPU_CAPABILITY=default, Inductor found what it had generated with vectors in its
    cache, and its headers had none: two red tests.
    """
    folders = {cpus.environment(name)["TORCHINDUCTOR_CACHE_DIR"] for name in cpus.SETTINGS} | {
        os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    }
    assert len(folders) == len(cpus.SETTINGS) + 1


@pytest.mark.parametrize("codes, exit_code", [((0, 0), 0), ((0, 1), 1), ((1, 0), 1)])
def test_one_red_setting_is_enough(codes, exit_code, monkeypatch, capsys):
    calls, left = [], list(codes)
    monkeypatch.setattr(
        cpus.subprocess,
        "run",
        lambda command, **more: (
            calls.append((command, more)) or SimpleNamespace(returncode=left.pop(0))
        ),
    )
    assert cpus.main(["-x"]) == exit_code
    assert [more["env"]["GPTOSS_TEST_THREADS"] for _, more in calls] == ["1", "2"] and all(
        command[-1] == "-x" for command, _ in calls
    )
    assert "avx2: ATEN_CPU_CAPABILITY=avx2 " in capsys.readouterr().out
