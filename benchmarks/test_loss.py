"""The loss against F.cross_entropy, and against the ways to write it without this library."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks.cases import HOST, MAIN, VARIED, Case
from benchmarks.contenders import CONTENDERS, FUSED, LossFunction, usable
from benchmarks.measure import PHASES, check, measure

COMPILED_CASES = (MAIN[0], MAIN[2])  # compilation alone takes a while


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The innermost parameter is the phase, so that a contender is made and checked once for all three."""
    full = metafunc.config.getoption("--full")
    names = usable(CONTENDERS, metafunc.config.getoption("--device"))
    wanted = [
        pytest.param(name, case, phase, id=f"{name}-{case.name}-{phase}")
        for case in [*MAIN, *HOST, *VARIED]
        for name in names
        if is_worth_it(name, case, full)
        for phase in PHASES
    ]
    metafunc.parametrize(("name", "case", "phase"), wanted)


def is_worth_it(name: str, case: Case, full: bool) -> bool:
    if name in FUSED:
        return True
    if case not in MAIN:
        return False
    if name.startswith("compiled"):
        return case in COMPILED_CASES
    if name == "moving-average loop" and case.classes * case.k > 1000:
        return False
    return not case.heavy or (full and name.startswith("eager"))


@functools.lru_cache(maxsize=1)
def checked_contender(name: str, case: Case, device: str) -> LossFunction:
    check(name, case, device)
    return CONTENDERS[name](case, device)


def test_loss(
    benchmark: Any, name: str, case: Case, phase: str, device: str, request: pytest.FixtureRequest
) -> None:
    kind = "shape" if case in MAIN else "host" if case in HOST else "variation"
    slow = name not in FUSED
    measure(
        benchmark,
        name,
        checked_contender(name, case, device),
        case,
        phase,
        kind=kind,
        device=device,
        budget_seconds=0.3 if slow else 0.6,
        min_pairs=3 if slow else 15,
        memory=phase == "both" and not name.startswith("compiled"),
    )
