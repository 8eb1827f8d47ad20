"""Paired differences with Student's t-interval, without SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

_NORMAL = 200  # degrees of freedom from which Student's distribution is taken for the normal one


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, its standard error and the two-sided interval around it, in the inputs'
    units; and the probability of a mean this high or higher where there is no difference. `left_out` pairs
    had a NaN. The interval is wide for want of what is `lacking`, "seeds" or "test rows".
    """

    n: int
    left_out: int
    mean: float
    standard_error: float
    low: float
    high: float
    p: float
    lacking: str


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t, `df` degrees of freedom: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan2(abs(t), math.sqrt(df))
    cosine = math.cos(theta)
    odd = df % 2 == 1
    term = total = 0.0 if df == 1 else cosine if odd else 1.0
    for k in range(2 + odd, df, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + inside)
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(probability: float, df: int) -> float:
    """The t with P(T <= t) = probability, for a probability in [0.5, 1)."""
    high = 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    return _least(lambda t: t_cdf(t, df) >= probability, high)


def _least(reached: Callable[[float], bool], high: float) -> float:
    """The least number in [0, high] from which on `reached` holds, as it does at `high`; by bisection."""
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    resolution: float,
    rows: Tensor | None = None,
    confidence: float = 0.95,
) -> Difference:
    """Mean of values - baseline, paired, with its t-interval; infinitely wide with fewer than two.

    Pairs with a NaN are left out (`n` says how many remain); with none left everything is NaN. Numbers that
    are multiples of `resolution` agree now and then by chance: the standard deviation of the pairs is taken
    to be no smaller.

    rows: (pairs, M), where each number is a mean over the same M rows, the difference in every row. Pairs and
    rows are then both taken to be drawn at random, and the squares of the half-widths that each alone would
    give add up (what a pair and a row have together is in both, so that the interval is rather too wide).
    Adding variances would not do: that of few pairs is small by chance now and then. `p` is that of the
    interval that ends at zero.
    """
    kept = [not (math.isnan(a) or math.isnan(b)) for a, b in zip(values, baseline, strict=True)]
    pairs = [a - b for a, b, keep in zip(values, baseline, kept, strict=True) if keep]
    n, left_out = len(pairs), len(values) - len(pairs)
    if n == 0:
        return Difference(0, left_out, math.nan, math.nan, math.nan, math.nan, 1.0, "seeds")
    mean = math.fsum(pairs) / n
    if n == 1 or (rows is not None and rows.shape[1] == 1):
        lacking = "seeds" if n == 1 else "test rows"
        return Difference(n, left_out, mean, math.inf, -math.inf, math.inf, 1.0, lacking)
    deviation = math.sqrt(math.fsum((pair - mean) ** 2 for pair in pairs) / (n - 1))
    of_pairs, of_rows, freedom = max(deviation, resolution) / math.sqrt(n), 0.0, _NORMAL
    if rows is not None:
        by_row = rows[torch.tensor(kept, device=rows.device)].double().mean(0)
        of_rows, freedom = float(by_row.var() / len(by_row)) ** 0.5, len(by_row) - 1

    def half_widths(t: float) -> tuple[float, float]:
        """Of pairs and of rows, at the level at which that of pairs is t standard errors."""
        return t * of_pairs, _quantile(t_cdf(t, n - 1), freedom) * of_rows

    parts = half_widths(t_quantile(0.5 + confidence / 2, n - 1))
    half = math.hypot(*parts)
    t_at_zero = _least(lambda t: math.hypot(*half_widths(t)) >= abs(mean), abs(mean) / of_pairs)
    return Difference(
        n,
        left_out,
        mean,
        math.hypot(of_pairs, of_rows),
        mean - half,
        mean + half,
        1 - t_cdf(math.copysign(t_at_zero, mean), n - 1),
        "seeds" if parts[0] >= parts[1] else "test rows",
    )


def _quantile(probability: float, df: int) -> float:
    """`t_quantile`, and the normal distribution's where that is as good."""
    if df < _NORMAL:
        return t_quantile(probability, df)
    return NormalDist().inv_cdf(min(probability, 1 - 2**-53))


def holm(p: Mapping[str, float], level: float) -> list[str]:
    """The hypotheses that Holm's procedure rejects at this family-wise level, most certain first."""
    rejected = []
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        if p[name] > level / (len(p) - rank):
            break
        rejected.append(name)
    return rejected
