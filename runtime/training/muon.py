"""Muon's two passes over memory, and the products of matrices between them.

`before_` reads gradient and momentum and writes momentum and update. `orthogonalise` multiplies.
`after_` reads the result and the weights and writes the weights. On a GPU the two are compiled:
each is one kernel, which reads and writes every number once. With float32 state and a half-
precision update that is 14 + 10 bytes a parameter; as single operations it was 112. On a CPU, and
where torch.compile does not work, they are the same operations with few temporaries, which stay in
the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.base.compiler import compiler_failure
from runtime.kernels import newton_schulz

# (a, b, c) of the polynomials a x + b x^3 + c x^5, one per step, and how much larger than 1
# rounding may make a singular value: Amsel et al. 2025, "The Polar Express", algorithm 1, minimax
# for singular values from 0.001 to 1. They lift small ones twice as far as the five equal steps of
# Jordan et al. 2024, end closer to 1, and trained GPT-2 Large to a lower loss (the paper's figure
# 1).
POLAR_EXPRESS = (
    (8.287212, -23.595887, 17.300387),
    (4.107059, -2.947850, 0.544843),
    (3.948691, -2.908902, 0.551819),
    (3.318420, -2.488488, 0.510049),
    (2.300652, -1.668904, 0.418807),
)
POLAR_EXPRESS_MARGIN = 1.01
FACTORS = [
    (a / POLAR_EXPRESS_MARGIN, b / POLAR_EXPRESS_MARGIN**3, c / POLAR_EXPRESS_MARGIN**5)
    for a, b, c in POLAR_EXPRESS
]
# No matrix is divided by less, so that one of zeros stays one.
LEAST_NORM = 1e-12

# N matrices of R rows and C columns.


# -------------------------------------------------------------------------------------- the passes
def before_(
    gradient_NRC: Tensor,
    momentum_NRC: Tensor,
    update_NRC: Tensor,
    beta: float | Tensor,
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    """Write the momentum, and into `update` Nesterov's update, in its dtype. Return [2, N].

    Those are the sums of squares of each matrix's gradient and update. beta: the momentum's decay.
    The gradient is divided by grad_scale, 0-dim. Where `skip`, a 0-dim bool, is set, no bit of the
    momentum changes.
    """
    gradient = gradient_NRC if grad_scale is None else gradient_NRC / grad_scale
    moved = torch.lerp(momentum_NRC.to(gradient.dtype), gradient, 1 - beta)
    if torch.compiler.is_compiling():
        # Sums of rows first: a kernel that makes them also writes what it sums.
        update = torch.lerp(gradient, moved, beta)
        update_NRC.copy_(update)
        squares = [x.square().sum(dim=2).sum(dim=1) for x in (gradient, update)]
    else:
        if update_NRC.dtype == gradient.dtype:
            update = torch.lerp(gradient, moved, beta, out=update_NRC)
        else:
            update = torch.lerp(gradient, moved, beta)
            update_NRC.copy_(update)
        squares = [sums_of_squares(x) for x in (gradient, update)]
    _assign(momentum_NRC, moved, skip)
    return torch.stack(squares)


def after_(
    weights_NRC: Tensor,
    orthogonal_NRC: Tensor,
    gradient_squares_N: Tensor,
    keep: float | Tensor,
    step: float | Tensor,
    skip: Tensor | None,
) -> None:
    """Write weights * keep + orthogonal * step.

    A matrix without any gradient (an expert that no token chose) gets no update: the rest of its
    momentum would be blown up to full size, step after step. Where `skip`, a 0-dim bool, is set, no
    bit changes.
    """
    is_idle_N = gradient_squares_N == 0
    step_N = torch.where(is_idle_N, torch.zeros_like(gradient_squares_N), step)
    kept = weights_NRC * keep
    _assign(weights_NRC, kept.addcmul_(orthogonal_NRC.to(kept.dtype), step_N[:, None, None]), skip)


def _assign(to: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Copy, unless `skip`, a boolean on the device, says not to.

    A product with 0 would let NaN through and turn -0 to 0.
    """
    if skip is None:
        to.copy_(value)
    elif torch.compiler.is_compiling():
        to.copy_(torch.where(skip, to, value.to(to.dtype)))
    else:
        torch.where(skip, to, value.to(to.dtype), out=to)


def sums_of_squares(matrices_NRC: Tensor) -> Tensor:
    """Return each matrix's sum of squares [N], in float32 or better."""
    wide = torch.promote_types(matrices_NRC.dtype, torch.float32)
    return torch.linalg.vector_norm(matrices_NRC, dim=(1, 2), dtype=wide).square()


class Passes(NamedTuple):
    """The two passes as a device does them. number(value): what it wants beta, keep, step to be."""

    before_: Callable[..., Tensor]
    after_: Callable[..., None]
    number: Callable[[float], float | Tensor]


def passes(device: torch.device) -> Passes:
    """Return the passes for a device: compiled on CUDA, unless kernels must be deterministic.

    The compiler chooses by a clock how many numbers of a row it sums at once.
    """
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return Passes(before_, after_, float)
    return Passes(
        *compiled(), functools.partial(torch.full, (), dtype=torch.float32, device=device)
    )


@functools.cache
def compiled() -> tuple[Callable[..., Tensor], Callable[..., None]]:
    """Return before_ and after_ compiled, for any number and size of matrices.

    Numbers that change from step to step are given as tensors: another float would be another
    graph.
    """
    return _compiled_if_it_works(before_), _compiled_if_it_works(after_)


def _compiled_if_it_works(function: Callable) -> Callable:
    """Return a function compiled at its first call, or itself where there is no compiler."""
    fast: Callable | None = torch.compile(function, fullgraph=True, dynamic=True)

    def call(*args):
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args)
            except Exception as error:
                # The compiler failed before anything was computed.
                if not (why := compiler_failure(error)):
                    raise
                fast = None
                print(f"note     Muon's passes are not compiled, which is slower: {why}")
        return function(*args)

    return call


# ---------------------------------------------------------------------------------------- products
def update_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to keep an update in that is orthogonalised in `dtype`.

    Before it is divided by its norm, a float16 could not hold it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def orthogonalise(
    matrices_NRC: Tensor, dtype: torch.dtype, squares_N: Tensor | None = None
) -> Tensor:
    """Return about the nearest orthogonal matrices, U V' of U S V' [N, R, C], in `dtype`.

    It takes Newton-Schulz steps. squares: the sum of squares of each matrix, float32 or better; by
    default it is computed.

    Singular values of at least 0.002 of their matrix's Frobenius norm come out between 0.86 and
    1.13, smaller ones lower.
    """
    x, tall = matrices_NRC, matrices_NRC.shape[1] > matrices_NRC.shape[2]
    if squares_N is None:
        squares_N = sums_of_squares(x)
    norm_N11 = (POLAR_EXPRESS_MARGIN * squares_N.sqrt()).clamp(min=LEAST_NORM)[:, None, None]
    # One pass, in `dtype`. Left to the first product, as a scale of its square and a number on the
    # diagonal, it would be two passes over squares: more than this one, unless a side is longer
    # than twice the other.
    x = torch.div(x, norm_N11, out=torch.empty_like(x, dtype=dtype))
    if newton_schulz.takes(x):
        return newton_schulz.steps_(x, FACTORS)
    for a, b, c in FACTORS:
        # The products are of the shorter side.
        square = x.mT @ x if tall else x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x
