"""The Triton kernels' own functions, each to the error that stands beside it, with a device's exponential."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cmim_kernels.backends._triton.elementary import excess, expm1, log1p, precise_exponential
from cmim_kernels.backends._triton.plan import interpreting

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

POINTS = 4096  # of a block


@triton.jit
def apply_kernel(x, y, a, WHICH: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    v = tl.load(x + at)
    if WHICH == 0:
        v = precise_exponential(v, a)
    elif WHICH == 1:
        v = expm1(v)
    elif WHICH == 2:
        v = log1p(v)
    else:
        v = excess(v)
    tl.store(y + at, v)


def applied(which: int, x: torch.Tensor, a: float = 0.3) -> np.ndarray:
    y = torch.empty_like(x)
    apply_kernel[(1,)](x, y, a, which, len(x))
    return y.double().numpy()


def true_excess(s: np.ndarray) -> np.ndarray:
    """By its series where it would cancel."""
    series, term = np.zeros_like(s), np.ones_like(s)
    for m in range(1, 20):
        term = term * s / m
        series += term if m > 1 else 0.0
    return np.where(np.abs(s) < 0.5, series, np.expm1(s) - s)


@pytest.mark.parametrize(
    ("which", "low", "high", "true", "error", "by_size"),
    [
        (0, -300.0, 0.0, lambda x: np.exp(np.float64(np.float32(0.3)) * x), 1.1e-7, 0.0),
        (1, -30.0, 30.0, np.expm1, 6e-7, 6e-8),
        (2, -0.999, 100.0, np.log1p, 4e-7, 0.0),
        (3, -30.0, 30.0, true_excess, 3e-6, 6e-8),
    ],
    ids=["precise_exponential", "expm1", "log1p", "excess"],
)
def test_error(
    which: int,
    low: float,
    high: float,
    true: Callable[[np.ndarray], np.ndarray],
    error: float,
    by_size: float,
) -> None:
    """Relative: `error`, and `by_size` for each unit of |x|."""
    g = torch.Generator().manual_seed(which)
    wide = low + (high - low) * torch.rand(POINTS, generator=g)
    near = (2 * torch.rand(POINTS, generator=g) - 1) * 10.0 ** (-6 * torch.rand(POINTS, generator=g))
    near = near.clamp(low, high)
    for x in (wide, near):
        expected = true(x.double().numpy())
        kept = np.abs(expected) > 2.0**-126
        difference = (np.abs(applied(which, x) - expected) / np.abs(expected))[kept]
        assert (difference <= (error + by_size * np.abs(x.numpy()))[kept]).all()
        assert difference.max() > 1e-8  # it was computed, in float32


@pytest.mark.parametrize("a", [0.125, 0.3, 1.0, 7.0])
def test_no_exponential_errs_in_every_column_alike(a: float) -> None:
    """Rounding averages out over columns and rows. What does not is a divergence that nobody has."""
    x = -8 / a * torch.rand(POINTS, generator=torch.Generator().manual_seed(1))
    expected = np.exp(np.float64(np.float32(a)) * x.double().numpy())
    error = applied(0, x, a) / expected - 1
    assert np.abs(error.mean()) < 3e-9
    assert np.abs(error[x.numpy() * a < -6].mean()) < 6e-9


def test_ends_of_precise_exponential() -> None:
    x = torch.zeros(8)
    x[1], x[2], x[3], x[4] = float("-inf"), float("nan"), -1e30, -1e4
    y = applied(0, x)
    assert y[0] == 1
    assert np.isnan(y[2])
    assert (y[[1, 3, 4]] == 0).all()
