"""Times two functions in turn in one process: what else the machine does then meets both, not their ratio."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SAMPLE_SECONDS = 2e-4  # shorter calls are repeated within a sample: the clock and its call must not show


@dataclass(frozen=True, eq=False)
class Timed:
    """What to time: `run` on what `prepare` returned; only `run` is on the clock."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Paired:
    """Quantiles over pairs. Seconds are per call, `ratio` is ours / baseline pair by pair."""

    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    seconds_p20: float
    seconds_p50: float
    seconds_p80: float
    baseline_seconds_p50: float
    pairs: int


def paired(
    ours: Timed,
    baseline: Timed,
    *,
    budget_seconds: float,
    synchronize: Callable[[], object] = lambda: None,
    min_pairs: int = 5,
    max_pairs: int = 400,
) -> Paired:
    """Takes samples of `baseline` and `ours` alternately, either first, until the budget is spent.

    `synchronize` waits for a device; it is called before the clock is read.
    """

    def sample(timed: Timed, calls: int) -> float:
        run, prepared = timed.run, [timed.prepare() for _ in range(calls)]
        synchronize()
        start = time.perf_counter()
        for argument in prepared:
            run(argument)
        synchronize()
        return (time.perf_counter() - start) / calls

    def calls_per_sample(timed: Timed) -> int:
        warm = sample(timed, 1)  # the first call may also load or prepare something
        if warm < budget_seconds:
            warm = min(sample(timed, 1) for _ in range(2))
        return max(1, round(SAMPLE_SECONDS / max(warm, 1e-9)))

    calls = {timed: calls_per_sample(timed) for timed in (ours, baseline)}
    times: dict[Timed, list[float]] = {ours: [], baseline: []}
    end = time.perf_counter() + budget_seconds
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(max_pairs):
            if i >= min_pairs and time.perf_counter() > end:
                break
            for timed in (ours, baseline) if i % 2 else (baseline, ours):
                times[timed].append(sample(timed, calls[timed]))
    finally:
        if was_collecting:
            gc.enable()
    ratio = quantiles([a / b for a, b in zip(times[ours], times[baseline], strict=True)])
    pairs = len(times[ours])
    return Paired(*ratio, *quantiles(times[ours]), statistics.median(times[baseline]), pairs)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(values, n=10, method="inclusive")
    return fifths[1], fifths[4], fifths[7]
