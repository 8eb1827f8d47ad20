"""The loss against F.cross_entropy, and against the ways to write it without this library."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.cases import HOST, MAIN, VARIED, Case
from benchmarks.contenders import CONTENDERS, FUSED, LossFunction, UnusableError
from benchmarks.measure import PHASES, check, measure

COMPILED_CASES = (MAIN[0], MAIN[2])  # compilation alone takes a while


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The innermost parameter is the phase, so that a contender is made and checked once for all three."""
    full = metafunc.config.getoption("--full")
    wanted = [
        pytest.param(name, case, phase, id=f"{name}-{case.name}-{phase}")
        for case in [*MAIN, *HOST, *VARIED]
        for name in CONTENDERS
        if is_worth_it(name, case, full)
        for phase in PHASES
    ]
    metafunc.parametrize(("name", "case", "phase"), wanted)


def is_worth_it(name: str, case: Case, full: bool) -> bool:
    if name in FUSED:
        return True
    if case not in MAIN:
        return False
    if full:
        return True
    if name.startswith("compiled"):
        return case in COMPILED_CASES
    if name == "moving-average loop" and case.classes * case.k > 1000:
        return False
    return not case.heavy


@functools.lru_cache(maxsize=1)
def checked_contender(name: str, case: Case, device: str) -> LossFunction | UnusableError:
    try:
        loss = CONTENDERS[name](case, device)
        check(name, case, device)
    except UnusableError as reason:
        return reason
    return loss


def test_loss(
    benchmark: Any, name: str, case: Case, phase: str, device: str, request: pytest.FixtureRequest
) -> None:
    loss = checked_contender(name, case, device)
    if isinstance(loss, UnusableError):
        pytest.skip(str(loss))
    kind = "shape" if case in MAIN else "host" if case in HOST else "variation"
    slow = name not in FUSED
    measure(
        benchmark,
        name,
        lambda case, device: loss,
        case,
        phase,
        kind=kind,
        device=device,
        budget_seconds=0.3 if slow else 0.6,
        min_pairs=3 if slow else 15,
        memory=phase == "both" and not name.startswith("compiled"),
    )
