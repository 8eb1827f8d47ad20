"""The price of the loss has not gone up: paired ratios, with margins that a busy machine does not break."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, cross_entropy
from benchmarks.measure import timed_phase
from benchmarks.paired import paired

pytestmark = [pytest.mark.speed, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would be all that is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ratio(case: Case, ours: str, baseline: str | None = None) -> float:
    """Median ratio of forward and backward; to F.cross_entropy where there is no other baseline."""
    other = cross_entropy if baseline is None else CONTENDERS[baseline](case, "cpu")
    pair = [timed_phase(loss, *case.data("cpu"), "both") for loss in (CONTENDERS[ours](case, "cpu"), other)]
    return paired(*pair, budget_seconds=1.0).ratio_p50


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        (Case(128, 100, 100), 2.5),
        (Case(256, 1000, 32), 2.0),
        (Case(256, 1000, 1000), 1.5),
        (Case(256, 1000, 32, spread=1e-3), 3.5),
        (Case(256, 1000, 32, grid="general"), 4.5),
        (Case(256, 1000, 32, label=20.0), 2.0),  # sure of the label, computed in float all the same
        (Case(256, 1000, 32, grid="general", scale=0.5), 5.0),  # its highest temperature is centred by itself
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_fused_is_not_far_from_cross_entropy(case: Case, limit: float) -> None:
    assert ratio(case, "fused[cpu]") < limit


def test_fused_is_much_faster_than_eager() -> None:
    assert ratio(Case(256, 1000, 32), "fused[cpu]", "eager loop") < 0.1
