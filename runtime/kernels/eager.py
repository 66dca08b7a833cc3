"""How C kernels are called where no compiler is at work: with which tensors and derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def is_eager(*tensors: Tensor | None) -> bool:
    """Return whether these are numbers in a CPU's memory, which no compiler is tracing.

    Tensors of shapes alone, of a compiler and in shards have classes of their own. Inside vmap and
    torch.func's gradients none is so. None counts for nothing.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu")
        for t in tensors
    )


def is_eager_float32(*tensors: Tensor | None) -> bool:
    """Return whether `is_eager` holds and all are float32."""
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
                "ones: set the kernels of model_parts to None (runtime/kernels/choose.py)"
            )
        return backward(ctx, *grads)

    return checked


def eager_function(
    name: str, forward: Callable, save_for_backward: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """Return a Function that does what a custom operation does; a call takes 0.1 ms less.

    The three are what torch.library takes, of (*inputs), (ctx, inputs, output) and (ctx, *grads).
    """

    def saved(ctx, *given):
        output = forward(*given)
        save_for_backward(ctx, given, output)
        return output

    methods = dict(forward=saved, backward=once_differentiable(backward))
    return type(
        name, (torch.autograd.Function,), {key: staticmethod(m) for key, m in methods.items()}
    )


def called(operation: Callable, function: type[torch.autograd.Function], forward: Callable, given):
    """Call the one of three that costs least.

    The custom operation for compilers and fake tensors; else the Function where gradients may be
    asked for, and its forward pass where not.
    """
    if not is_eager(*(x for x in given if isinstance(x, Tensor))):
        return operation(*given)
    return function.apply(*given) if torch.is_grad_enabled() else forward(*given)
