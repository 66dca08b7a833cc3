"""Builds of the C kernels of training that this processor would not take by itself.

One source has tiles of 6 x 2 and of 12 x 2 vectors, of 2 to 16 lanes.
"""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.compile import cpu_flags

FLAGS = {
    "4 lanes": ("-DVECTOR_BYTES=16", "-mno-avx2", "-mno-avx", "-mno-fma"),
    "8 lanes": ("-DVECTOR_BYTES=32",),
    # As with AVX-512, from whatever instructions there are.
    "16 lanes": ("-DVECTOR_BYTES=64",),
}
# In float64 a vector has half as many. The processor's own build is in all other tests.
BUILDS = [("4 lanes", torch.float32), ("8 lanes", torch.float64), ("16 lanes", torch.float32)]
EVERY_BUILD = pytest.mark.parametrize(("build", "dtype"), BUILDS)


def take(monkeypatch, module, build: str, dtype: torch.dtype) -> None:
    """Let a kernel's module use this build; skip where the flags are not this processor's."""
    if build != "8 lanes" and "avx2" not in cpu_flags():
        pytest.skip("these flags are for processors with AVX2")
    code = module.library(dtype, "-O1", *FLAGS[build])
    assert code[0] is not None, code[1]
    monkeypatch.setattr(module, "library", lambda dtype: code)


def share_small_work(monkeypatch, module) -> None:
    """Let a kernel's module wake threads for work of any size."""
    code = module.library(torch.float32, "-O1", "-DWORTH_A_THREAD=1")
    assert code[0] is not None, code[1]
    monkeypatch.setattr(module, "library", lambda *_: code)
