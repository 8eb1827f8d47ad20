"""Nothing is wrong, as far as random batches, options and temperatures can tell."""

from __future__ import annotations

import pytest
from conftest import Place
from random_batches import draw


def assert_nothing_is_wrong(place: Place, seeds: range, large: bool = False) -> None:
    found = []
    for seed in seeds:
        case = draw(seed, large, place.dtypes)
        wrong = case.wrong(*case.run(place.name, place.device))
        if wrong is not None:
            found.append(f"{case.text}: {wrong}")
    assert found == []


@pytest.mark.parametrize("first", range(0, 200, 40))
def test_random_batches(place: Place, first: int) -> None:
    count = 8 if place.interpreted else 16 if place.emulated else 40
    assert_nothing_is_wrong(place, range(first, first + count))


def test_large_random_batches(place: Place) -> None:
    """More rows than a tile has, and more columns."""
    assert_nothing_is_wrong(
        place, range(6 if place.emulated else 20 if place.name == "cpu" else 2), large=True
    )
