"""Students trained together are those trained alone, and the search for the best of them."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from audit_cases import FAST, STUDENT, clusters, data
from torch import nn

from cmim_kernels.audit import StudentTraining, audit, mlp, tune_training
from cmim_kernels.audit.answers import Answers, unpacked
from cmim_kernels.audit.attacks import cross_entropy
from cmim_kernels.audit.students import Students, batches, take
from cmim_kernels.audit.trainer import Trainer


def test_students_trained_together_are_those_trained_alone() -> None:
    x, y = clusters(24, 1)
    together = Students(STUDENT, [3, 4], 2, x.device)
    index = next(batches([3, 4], 24, 128, x.device))
    inputs, labels = x.expand(2, *x.shape), y.expand(2, *y.shape)
    together.train(
        FAST, lambda: cross_entropy(together(take(inputs, index)), take(labels.repeat(2, 1), index))
    )
    found = together(inputs)
    for r, seed in enumerate([3, 4, 3, 4]):
        torch.manual_seed(seed)
        alone = STUDENT()
        optimiser = torch.optim.AdamW(alone.parameters(), lr=FAST.lr, weight_decay=FAST.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, FAST.steps)
        for _ in range(FAST.steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(alone(x), y).backward()
            optimiser.step()
            schedule.step()
        torch.testing.assert_close(found[r], alone(x), rtol=1e-3, atol=1e-3)


def test_accuracy_in_chunks_and_of_the_diverged() -> None:
    x, y = clusters(50, 1)
    students = Students(STUDENT, [0, 1], 1, x.device)
    inputs, labels = x.expand(2, *x.shape), y.expand(2, *y.shape)
    whole = students.answers(inputs, labels)
    assert torch.equal(students.answers(inputs, labels, chunk=7).right, whole.right)
    assert whole.accuracies() == (students(inputs).argmax(-1) == labels).double().mean(1).tolist()
    with torch.no_grad():
        students.parameters()[0][1] = torch.nan
    now = students.answers(inputs, labels).accuracies()
    assert now[0] == whole.accuracies()[0]
    assert math.isnan(now[1])


@pytest.mark.parametrize("rows", [1, 7, 8, 50])
def test_answers_are_packed_and_unpacked(rows: int) -> None:
    right = torch.rand(3, rows, generator=torch.Generator().manual_seed(rows)) < 0.5
    packed = Answers(right, torch.ones(3, dtype=torch.bool)).packed()
    assert torch.equal(unpacked(packed, rows), right)
    assert packed[0][0] == f"{int(''.join(str(int(x)) for x in right[0])[:4].ljust(4, '0'), 2):x}"
    with pytest.raises(ValueError, match=f"expected answers to {rows + 8} test rows"):
        unpacked(packed, rows + 8)


def test_batches_are_each_seeds_own_epochs() -> None:
    draws = batches([0, 1], 10, 4, torch.device("cpu"))
    first, second = next(draws), next(draws)
    assert first.shape == (2, 4)
    assert not torch.equal(first[0], first[1])
    assert len(set(first[0].tolist() + second[0].tolist())) == 8
    assert torch.equal(next(batches([0, 1], 10, 4, torch.device("cpu"))), first)


def test_running_statistics_are_refused() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    with pytest.raises(ValueError, match="keeps running statistics"):
        audit(data(), make, attacks=["kd-t4"], seeds=2, training=FAST, progress=False)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, r"the student does not take batches of rows \(6,\): .*", lambda: nn.Linear(5, 3)),
        (
            ValueError,
            r"must give logits \(2, 3\) for 2 rows \(6,\), got \(2, 4\)",
            lambda: nn.Linear(6, 4),
        ),
        (TypeError, r"must make a torch.nn.Module, got int", lambda: 7),
    ],
)
def test_students_that_do_not_fit(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message):
        audit(data(), make, attacks=["kd-t4"], seeds=2, training=FAST, progress=False)


def test_students_of_any_kind() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 6)),
            nn.Conv1d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16, 3),
        )

    reports = [
        audit(data(), make, attacks=["kd-t4"], seeds=2, training=FAST, progress=False) for _ in range(2)
    ]
    assert reports[0].results["kd-t4"]["bayes"] == reports[1].results["kd-t4"]["bayes"]  # dropout is seeded


def test_frozen_layers_stay() -> None:
    def make() -> nn.Module:
        student = STUDENT()
        next(student.parameters()).requires_grad_(False)
        return student

    x, y = clusters(24, 1)
    students = Students(make, [0, 1], 1, x.device)
    before = [p.detach().clone() for p in students.parameters()]
    inputs, labels = x.expand(2, *x.shape), y.expand(2, *y.shape)
    students.train(FAST, lambda: cross_entropy(students(inputs), labels))
    moved = [not torch.equal(p, old) for p, old in zip(students.parameters(), before, strict=True)]
    assert moved == [False, True, True, True]


def test_seeds_that_train_the_same_student() -> None:
    """Pretrained, say, and with all rows in every batch."""
    options: dict[str, Any] = {"attacks": ["kd-t4"], "seeds": 3, "training": FAST, "progress": False}
    with pytest.raises(ValueError, match="all 3 seeds trained the same student"):
        audit(data(), partial(copy.deepcopy, STUDENT()), **options)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("seeds", 1.5, "seeds must be a number or a sequence of ints, got 1.5"),
        ("seeds", [0.2, 0.7], "seeds must be"),
        ("seeds", "12", "seeds must be"),
        ("training", 3, "training must be a StudentTraining, got int"),
        ("student", STUDENT(), "student must be a function .*, got Sequential"),
        ("attacks", "kd-t4", "attacks must be a sequence .* the string 'kd-t4'"),
    ],
)
def test_wrong_kinds_of_arguments(argument: str, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        audit(**{"data": data(), "student": STUDENT, "progress": False, argument: value})


def test_tuning_finds_the_best_student_alone() -> None:
    options: dict[str, Any] = {
        "seeds": 3,
        "training": StudentTraining(steps=20),
        "learning_rates": (1e-5, 3e-2),
        "weight_decays": (1e-2, 100.0),
        "progress": False,
    }
    source = data()
    tuned = tune_training(source, STUDENT, **options)
    assert (tuned.lr, tuned.weight_decay, tuned.steps) == (3e-2, 1e-2, 20)
    found = Trainer(source, STUDENT, [0, 1, 2], tuned, 0.1).baseline().accuracies()
    others = [StudentTraining(20, lr=1e-5), StudentTraining(20, lr=3e-2, weight_decay=100.0)]
    for other in others:
        assert sum(Trainer(source, STUDENT, [0, 1, 2], other, 0.1).baseline().accuracies()) < sum(found)
    with pytest.raises(ValueError, match="at least one number each"):
        tune_training(source, STUDENT, **(options | {"learning_rates": ()}))
    with pytest.raises(ValueError, match="every student of the grid diverged"):
        tune_training(source, STUDENT, **(options | {"learning_rates": (1e30,)}))
    with pytest.raises(ValueError, match="lr must be finite and non-negative"):
        tune_training(source, STUDENT, **(options | {"learning_rates": (-1.0,)}))


def test_mlp() -> None:
    widths = [tuple(p.shape) for p in mlp(6, [8, 5], 3)().parameters() if p.dim() == 2]
    assert widths == [(8, 6), (5, 8), (3, 5)]
    assert mlp(6, [], 3)()(torch.zeros(2, 3, 2)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"every width must be at least 1, got 6 - \[0\] - 3"):
        mlp(6, [0], 3)


@pytest.mark.parametrize("option", ["steps", "batch_size", "lr", "weight_decay"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "x", True])
def test_bad_training(option: str, value: Any) -> None:
    if (option, value) == ("weight_decay", 0):
        value = -0.5
    with pytest.raises((TypeError, ValueError), match=f"{option} must be"):
        StudentTraining(**{option: value})
