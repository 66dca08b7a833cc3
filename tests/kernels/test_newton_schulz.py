"""Newton-Schulz steps in C are those of their products, of each matrix alone, in every build."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels import newton_schulz
from tests.kernels.builds import EVERY_BUILD, share_small_work, take
from tests.numeric import assert_close, rounding

HAS_CODE, WHY_NOT = newton_schulz.library()
pytestmark = pytest.mark.skipif(HAS_CODE is None, reason=WHY_NOT)
# Steps that keep singular values between 0 and 1, so that rounding does not grow.
FACTORS = [(1.5, -0.5, 0.0), (1.875, -1.25, 0.375), (1.5, -0.4, -0.1)]
# (matrices, rows, columns): wide, tall and square, off the tiles' sizes, longer than a panel.
SHAPES = [(3, 7, 20), (2, 33, 9), (5, 16, 16), (1, 50, 300), (4, 1, 3)]


def matrices(shape, dtype) -> torch.Tensor:
    torch.manual_seed(0)
    m = torch.randn(shape, dtype=torch.float64)
    return (m / torch.linalg.vector_norm(m, dim=(1, 2), keepdim=True)).to(dtype)


def expected(m_NRC: torch.Tensor) -> torch.Tensor:
    x = m_NRC.double()
    for a, b, c in FACTORS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def check(shape, dtype) -> None:
    m = matrices(shape, dtype)
    wanted, (_, R, C) = expected(m), shape
    bound = rounding(dtype, *len(FACTORS) * [C, R, R])
    assert_close(newton_schulz.steps_(m, FACTORS), wanted, bound, f"{shape}")


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_the_products_steps(shape):
    check(shape, torch.float32)


@pytest.mark.slow
@EVERY_BUILD
def test_every_build_gives_the_same(monkeypatch, build, dtype):
    take(monkeypatch, newton_schulz, build, dtype)
    for shape in SHAPES:
        check(shape, dtype)


def test_a_matrix_has_the_same_bits_in_any_company(monkeypatch):
    """A resumed run may stack matrices in another way, on another number of threads."""
    share_small_work(monkeypatch, newton_schulz)
    shape, before = (5, 24, 40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(newton_schulz.steps_(matrices(shape, torch.float32), FACTORS))
            alone = matrices(shape, torch.float32)[3:4].clone()
            assert torch.equal(newton_schulz.steps_(alone, FACTORS)[0], found[-1][3])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_it_takes():
    assert newton_schulz.takes(torch.ones(2, 64, 64))
    assert not newton_schulz.takes(torch.ones(2, 64, 64, dtype=torch.float64))
    assert not newton_schulz.takes(torch.ones(0, 64, 64))
    # Larger than what stays in a core's cache.
    assert not newton_schulz.takes(torch.ones(1, 512, 512))
