"""Class-balanced batches: their make-up, the use of every row, ranks, reproducibility."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cmim_kernels.samplers import ClassBalancedBatchSampler

LABELS = torch.tensor([7] * 20 + [3] * 12 + [5] * 30 + [11] * 9)


def test_a_batch_holds_m_classes_of_n_distinct_rows() -> None:
    sampler = ClassBalancedBatchSampler(LABELS, classes_per_batch=3, samples_per_class=4, batches=50)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 50
    for rows in batches:
        assert len(set(rows)) == 12
        assert sorted(Counter(LABELS[rows].tolist()).values()) == [4, 4, 4]


def test_classes_and_rows_take_turns() -> None:
    batches = list(ClassBalancedBatchSampler(LABELS, classes_per_batch=1, samples_per_class=3, batches=40))
    classes = Counter(int(LABELS[rows[0]]) for rows in batches)
    assert set(classes.values()) == {10}
    rows_of_5 = Counter(row for rows in batches for row in rows if LABELS[row] == 5)
    assert set(rows_of_5.values()) == {1}
    rows_of_11 = Counter(row for rows in batches for row in rows if LABELS[row] == 11)
    assert set(rows_of_11.values()) <= {3, 4}


def test_a_small_class_repeats_rows() -> None:
    sampler = ClassBalancedBatchSampler([0, 0, 0, 1], samples_per_class=5, batches=2)
    for rows in sampler:
        assert Counter(rows)[3] == 5
        assert len(rows) == 10


def test_epochs_are_reproducible_and_differ() -> None:
    sampler = ClassBalancedBatchSampler(LABELS.tolist(), samples_per_class=2)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(ClassBalancedBatchSampler(LABELS, samples_per_class=2, seed=1)) != first


def test_the_default_length_is_one_pass() -> None:
    assert len(ClassBalancedBatchSampler(LABELS, samples_per_class=2)) == len(LABELS) // 8
    assert len(ClassBalancedBatchSampler(LABELS, samples_per_class=2, world_size=3)) == len(LABELS) // 24
    assert len(ClassBalancedBatchSampler(LABELS, samples_per_class=100)) == 1


def test_ranks_share_the_rows() -> None:
    options: dict[str, Any] = {"classes_per_batch": 2, "samples_per_class": 4, "batches": 2, "world_size": 2}
    ranks = [list(ClassBalancedBatchSampler(LABELS, rank=rank, **options)) for rank in range(2)]
    for mine, other in zip(*ranks, strict=True):
        assert not set(mine) & set(other)
        assert not set(LABELS[mine].tolist()) & set(LABELS[other].tolist())


def test_drives_a_loader() -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(len(LABELS)), LABELS),
        batch_sampler=ClassBalancedBatchSampler(LABELS, samples_per_class=2),
    )
    rows, labels = next(iter(loader))
    assert torch.equal(LABELS[rows], labels)
    assert torch.bincount(labels).max() == 2


@pytest.mark.parametrize(
    ("error", "message", "labels", "options"),
    [
        (ValueError, "labels", [], {}),
        (ValueError, "labels", [[0, 1]], {}),
        (TypeError, "labels must be integers", [0.0, 1.0], {}),
        (ValueError, r"classes_per_batch must lie in \[1, 2\], got 3", [0, 1], {"classes_per_batch": 3}),
        (ValueError, "samples_per_class", [0, 1], {"samples_per_class": 0}),
        (ValueError, "batches", [0, 1], {"batches": 0}),
        (ValueError, "rank", [0, 1], {"rank": 1}),
        (TypeError, "classes_per_batch must be an int, got float", [0, 1], {"classes_per_batch": 2.0}),
        (TypeError, "samples_per_class must be an int, got float", [0, 1], {"samples_per_class": 2.0}),
        (TypeError, "batches must be an int, got bool", [0, 1], {"batches": True}),
        (TypeError, "seed must be an int, got NoneType", [0, 1], {"seed": None}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, labels: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ClassBalancedBatchSampler(labels, **options)
