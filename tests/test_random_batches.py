"""Nothing is wrong, as far as random batches, options and temperatures can tell."""

from __future__ import annotations

import pytest
from conftest import Place
from random_batches import draw


@pytest.mark.parametrize("first", range(0, 200, 40))
def test_random_batches(place: Place, first: int) -> None:
    seeds = range(first, first + (8 if place.interpreted else 16 if place.emulated else 40))
    found = []
    for seed in seeds:
        case = draw(seed, dtypes=place.dtypes)
        wrong = case.wrong(*case.run(place.name, place.device))
        if wrong is not None:
            found.append(f"{case.text}: {wrong}")
    assert found == []


def test_large_random_batches(place: Place) -> None:
    """More rows than a tile has, and more columns."""
    found = []
    for seed in range(6 if place.emulated else 20 if place.name == "cpu" else 2):
        case = draw(seed, large=True, dtypes=place.dtypes)
        wrong = case.wrong(*case.run(place.name, place.device))
        if wrong is not None:
            found.append(f"{case.text}: {wrong}")
    assert found == []
