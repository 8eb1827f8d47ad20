"""The audit itself: baseline, controls, and every attack, each one saved when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .attacks import Attack, resolve_attacks
from .data import AuditData
from .progress import track
from .render import write_report
from .report import AuditReport
from .students import StudentFactory, StudentTraining
from .trainer import Trainer

SMOOTHING_GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Label smoothings of the control that asks how far tuning alone takes a student without a teacher."""


def audit(
    data: AuditData,
    student: StudentFactory,
    *,
    attacks: Iterable[str | Attack] | None = None,
    seeds: int | Sequence[int] = 5,
    training: StudentTraining | None = None,
    label_smoothing: float = 0.1,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> AuditReport:
    """Are the teachers undistillable (arXiv 2507.00012)? Does any student that learns from a teacher's logits
    beat a student of the same architecture, initialisation and data that was trained with label smoothing
    alone?

    Args:
        data: the attacker's data, the teachers' answers, test data.
        student: makes one untrained student; see `mlp`.
        attacks: names or `Attack` objects; None takes every registered one.
        seeds: a number of seeds, or the seeds. With one data set per seed: as many as there are data sets.
        training: how students are trained, the same for all. Tune it for the baseline (`tune_training`): an
            audit against a weak baseline finds every teacher distillable.
        label_smoothing: the baseline's (the LS student's), in [0, 1).
        out: a folder for audit.json, audit.md and (with matplotlib) audit.png. An audit that was interrupted
            goes on from there: at most the attack it was in is lost. Attacks that an earlier audit of the
            same data and settings tried stay in the report, and count in the verdict. An attack is known by
            its name, paper and threat: if you change what else it does, rename it or start again.
        fresh: start again though `out` holds an audit.
        progress: show a progress bar.

    Returns:
        The report: per-seed accuracies, differences to the baseline, verdicts.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument out of range, an unknown attack, `out` no folder that can be written to or
            holding the audit of other data or settings, or all seeds training the same student.
    """
    chosen = {attack.name: attack for attack in resolve_attacks(attacks)}
    training = training or StudentTraining()
    if not isinstance(training, StudentTraining):
        raise TypeError(f"training must be a StudentTraining, got {type(training).__name__}")
    seeds = data.seeds(seeds)
    trainer = Trainer(data, student, seeds, training, label_smoothing)
    if out is not None:
        _make_folder(Path(out))
    report = AuditReport(
        teachers=list(data.teacher_names),
        seeds=seeds,
        label_smoothing=label_smoothing,
        settings=_settings(data, training),
        fingerprint=trainer.fingerprint(),
        attacks={attack.name: {"paper": attack.paper, "threat": attack.threat} for attack in chosen.values()},
        versions={"cmim_kernels": __version__, "torch": torch.__version__},
    )
    if out is not None and not fresh:
        report.resume(Path(out))

    smoothings = {f"{value:g}": value for value in sorted({label_smoothing, *SMOOTHING_GRID})}
    for name, attack in chosen.items():
        reason = _cannot_run(attack, data)
        if reason is not None:
            report.skipped[name] = reason
    todo = [f"LS {key}" for key in smoothings if key not in report.baselines]
    todo += [name for name in chosen if name not in report.results and name not in report.skipped]
    for name in track(todo, "audit", progress):
        if name in chosen:
            report.add_attack(name, trainer.knockoffs(chosen[name]))
        else:
            key = name.removeprefix("LS ")
            report.add_baseline(key, trainer.baseline(smoothings[key]))
        if out is not None:
            report.save(Path(out))
    report.results = {name: report.results[name] for name in report.attacks if name in report.results}
    if out is not None:
        write_report(report, Path(out))
    return report


def _make_folder(out: Path) -> None:
    """Before hours are spent on what could not be kept."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written to: {error}") from error


def _cannot_run(attack: Attack, data: AuditData) -> str | None:
    if attack.queries == "mixup" and data.queries is None:
        return "needs the teacher as a function (queries)"
    if attack.queries == "extra" and data.extra_inputs is None:
        return "needs further inputs with the teacher's answers (extra_inputs, extra_logits)"
    return None


def _settings(data: AuditData, training: StudentTraining) -> dict[str, Any]:
    return {
        "training_rows": data.labels.shape[-1],
        "test_rows": data.test_labels.shape[-1],
        "extra_rows": 0 if data.extra_inputs is None else data.extra_inputs.shape[data.labels.dim() - 1],
        "classes": data.num_classes,
        "data_per_seed": data.splits is not None,
        "student_training": asdict(training),
    }
