"""Paired differences with Student's t-interval, without SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NORMAL = 1000  # degrees of freedom beyond which more make no difference


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, its standard error and the two-sided interval around it, in the inputs'
    units; and the probability of a mean this high or higher where there is no difference. `left_out` pairs
    had a NaN.
    """

    n: int
    left_out: int
    mean: float
    standard_error: float
    low: float
    high: float
    p: float


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
    """The t with P(T <= t) = probability, for a probability in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
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

    rows: (pairs, M), where each number is a mean over the same M rows, the difference in every row. The
    variance of their mean over the pairs then adds to that of the pairs, as in a table of pairs by rows both
    drawn at random; what a pair and a row have together is counted twice, so that the interval is rather too
    wide. The degrees of freedom are Satterthwaite's.
    """
    kept = [not (math.isnan(a) or math.isnan(b)) for a, b in zip(values, baseline, strict=True)]
    pairs = [a - b for a, b, keep in zip(values, baseline, kept, strict=True) if keep]
    n, left_out = len(pairs), len(values) - len(pairs)
    if n == 0:
        return Difference(0, left_out, math.nan, math.nan, math.nan, math.nan, 1.0)
    mean = math.fsum(pairs) / n
    if n == 1 or (rows is not None and rows.shape[1] == 1):
        return Difference(n, left_out, mean, math.inf, -math.inf, math.inf, 1.0)
    deviation = math.sqrt(math.fsum((pair - mean) ** 2 for pair in pairs) / (n - 1))
    variance, freedom = max(deviation, resolution) ** 2 / n, n - 1
    if rows is not None:
        of_rows = float(rows[torch.tensor(kept)].double().mean(0).var()) / rows.shape[1]
        of_pairs, variance = variance, variance + of_rows
        parts = of_pairs**2 / (n - 1) + of_rows**2 / (rows.shape[1] - 1)
        freedom = min(int(variance**2 / parts), _NORMAL)
    error = math.sqrt(variance)
    half = t_quantile(0.5 + confidence / 2, freedom) * error
    return Difference(n, left_out, mean, error, mean - half, mean + half, 1 - t_cdf(mean / error, freedom))


def holm(p: Mapping[str, float], level: float) -> list[str]:
    """The hypotheses that Holm's procedure rejects at this family-wise level, most certain first."""
    rejected = []
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        if p[name] > level / (len(p) - rank):
            break
        rejected.append(name)
    return rejected
