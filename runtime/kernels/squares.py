"""The sum of squares of many tensors, in C: runtime/kernels/squares.c.

PyTorch's float64 norm of float32 tensors makes a copy in float64 first. On a CPU that takes a
twentieth of a training step of a small model; reading them takes a tenth of that.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.kernels.compile import FUSED, compiled, parallel_region
from runtime.kernels.eager import is_eager_float32

SOURCE = Path(__file__).with_name("squares.c")


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing)."""
    code, why = compiled(SOURCE, FUSED)
    if code is None:
        return None, why
    code.gptoss_piece.argtypes, code.gptoss_piece.restype = [], c_int64
    code.gptoss_squares.argtypes = [c_void_p, c_int, c_int64, c_void_p, c_void_p, c_void_p]
    code.gptoss_squares.restype = None
    return code, ""


def takes(tensors: list[Tensor]) -> bool:
    """Return whether `sum_of_squares` can read these tensors: plain, float32, on a CPU."""
    plain = is_eager_float32(*tensors) and all(t.is_contiguous() for t in tensors)
    return plain and library()[0] is not None


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares of all values, 0-dim float64, in an order that threads do not
    change.

    tensors: those that `takes` allows; ValueError without a compiler.
    """
    code, why = library()
    if code is None:
        raise ValueError(why)
    piece = code.gptoss_piece()
    every_start, every_count = [], []
    for tensor in tensors:
        offsets = np.arange(0, tensor.numel(), piece, dtype=np.int64)
        every_start.append(tensor.data_ptr() + 4 * offsets)
        every_count.append(np.minimum(piece, tensor.numel() - offsets))
    if not every_start:
        return torch.zeros((), dtype=torch.float64)
    starts, counts = np.concatenate(every_start), np.concatenate(every_count)
    sums = np.zeros(len(starts), dtype=np.float64)
    code.gptoss_squares(
        parallel_region(),
        torch.get_num_threads(),
        len(starts),
        *(array.ctypes.data for array in (starts, counts, sums)),
    )
    return torch.from_numpy(sums).sum()
