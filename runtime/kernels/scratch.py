"""Memory that kernels keep from call to call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Tensors by name, of each thread: fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        self.kept: dict[tuple, Tensor] = {}

    def get(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """Return at least `count` uninitialised values."""
        tensor = self.kept.get((name, dtype))
        if tensor is None or tensor.numel() < count:
            with torch.inference_mode(False):
                tensor = self.kept[name, dtype] = torch.empty(count, dtype=dtype)
        return tensor


scratch = Scratch()
