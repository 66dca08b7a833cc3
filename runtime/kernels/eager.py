"""Which tensors C code may read at once, and which derivatives it lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def is_eager(*tensors: Tensor | None) -> bool:
    """Return whether these are numbers in a CPU's memory, which no compiler is tracing.

    Tensors of shapes alone, of a compiler, in shards, and those whose operations are counted have
    classes of their own. None counts for nothing.
    """
    if torch.compiler.is_compiling():
        return False
    return all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu")
        for t in tensors
    )


def is_eager_float32(*tensors: Tensor | None) -> bool:
    """Return whether these are so, and all in float32."""
    return is_eager(*tensors) and all(t is None or t.dtype == torch.float32 for t in tensors)


def once_differentiable(backward: Callable) -> Callable:
    """Wrap the backward pass of a torch.autograd.Function that has none itself.

    RuntimeError where its result is to be differentiated again (create_graph=True). PyTorch's
    wrapper of this name raises only if the gradient that comes in has a graph; else it would leave
    out, without a word, what goes through the saved tensors.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the C kernels have first derivatives only, and create_graph=True asks for second "
                "ones: train without it, or on a device other than a CPU"
            )
        return backward(ctx, *grads)

    return checked
