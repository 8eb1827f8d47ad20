"""The student to beat, as good as a small search makes it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from .data import AuditData
from .progress import track
from .students import StudentFactory, StudentTraining
from .trainer import Trainer

LEARNING_RATES = (5e-3, 1e-2, 2e-2, 5e-2)
WEIGHT_DECAYS = (1e-2, 1e-1, 1.0)


def tune_training(
    data: AuditData,
    student: StudentFactory,
    *,
    seeds: int | Sequence[int] = 5,
    training: StudentTraining | None = None,
    label_smoothing: float = 0.1,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    progress: bool = True,
) -> StudentTraining:
    """The learning rate and weight decay, of a grid, with the best LS student; for `audit(training=...)`.

    Against a weak LS student every teacher looks distillable. The choice is made by the mean accuracy over
    the seeds on the test data, which flatters the LS student: a teacher found distillable has passed a bar
    that is rather too high. Number of steps and batch size are not searched; more of them may help.

    Args:
        data, student, seeds, label_smoothing, progress: as in `audit`; teachers play no part.
        training: whose steps and batch size are taken.
        learning_rates, weight_decays: the grid; where several are equally good, the first.

    Raises:
        ValueError: an argument out of range, an empty grid, students that all diverged, or seeds that all
            train the same one.
    """
    training = training or StudentTraining()
    grid = {
        f"lr {lr:g}, weight decay {decay:g}": dataclasses.replace(training, lr=lr, weight_decay=decay)
        for lr in learning_rates
        for decay in weight_decays
    }
    if not grid:
        raise ValueError("learning_rates and weight_decays must hold at least one number each")
    chosen_seeds = data.seeds(seeds)
    best, best_mean = None, -math.inf
    for name in track(list(grid), "tuning", progress):
        accuracies = Trainer(data, student, chosen_seeds, grid[name], label_smoothing).baseline().accuracies()
        mean = math.fsum(accuracies) / len(accuracies)
        if mean > best_mean:  # never true of NaN
            best, best_mean = grid[name], mean
    if best is None:
        raise ValueError("every student of the grid diverged; try smaller learning_rates")
    return best
