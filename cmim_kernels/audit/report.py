"""What an audit found: accuracies, differences, verdicts; in one JSON file that audits resume from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .answers import Answers, unpacked
from .data import LABELS_ONLY
from .stats import Difference, holm, paired_difference

VERSION = 2
FAMILY_LEVEL = 0.025  # one-sided, as the upper half of a 95 % interval is
LARGEST_MISS = 0.05  # what an interval may leave possible where nothing was found
_FIXED = ("version", "fingerprint", "teachers", "seeds", "label_smoothing", "settings", "versions")


@dataclass
class AuditReport:
    """Accuracies are shares in [0, 1], one per seed, in the order of `seeds`.

    Args:
        teachers: names of the audited teachers.
        seeds: seeds of the students, or numbers of the splits.
        label_smoothing: the baseline's.
        settings: sizes of the data and the students' training, for the reader.
        fingerprint: hash of data, student and training: only an audit of the same ones may be resumed.
        attacks: name -> {"paper", "threat"} of the attacks asked for.
        baselines: label smoothing -> accuracies of the students that never saw a teacher.
        results: attack -> teacher -> accuracies of the knockoff students; where the attack allows it, also
            for the teacher that knows nothing but the labels (`LABELS_ONLY`).
        skipped: attack -> why it could not be run.
        versions: of the packages that decide the figures.
        right: attack and teacher, or label smoothing, as `_key` writes it -> which test rows the student of
            each seed got right, as `Answers.packed` writes it; empty where seeds have test rows of their own.
    """

    teachers: list[str]
    seeds: list[int]
    label_smoothing: float
    settings: dict[str, Any]
    fingerprint: str
    attacks: dict[str, dict[str, str]]
    baselines: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    right: dict[str, list[str]] = field(default_factory=dict)
    version: int = VERSION

    @property
    def baseline(self) -> list[float]:
        """The LS student's accuracies."""
        return self.baselines[self._smoothing]

    @property
    def _smoothing(self) -> str:
        """The LS student's among `baselines`."""
        return f"{self.label_smoothing:g}"

    def difference(self, teacher: str, attack: str, against: str | None = None) -> Difference:
        """A teacher's students (or those of `LABELS_ONLY`) minus the LS students, paired by seed, as shares
        of the test set; or minus another teacher's students under the same attack.
        """
        other = _key(self._smoothing) if against is None else _key(attack, against)
        return self._paired(_key(attack, teacher), other)

    def control(self, label_smoothing: str) -> Difference:
        """Students of another label smoothing (a key of `baselines`) minus the LS students."""
        return self._paired(_key(label_smoothing), _key(self._smoothing))

    def _paired(self, key: str, other: str) -> Difference:
        rows = None
        if key in self.right and other in self.right and key != other:
            rows = self._right(key).double() - self._right(other).double()
        accuracies = self._by_key()
        return paired_difference(accuracies[key], accuracies[other], 1 / self.settings["test_rows"], rows)

    def _by_key(self) -> dict[str, list[float]]:
        """All accuracies, by `_key`."""
        found = {_key(smoothing): values for smoothing, values in self.baselines.items()}
        for name, each in self.results.items():
            found |= {_key(name, teacher): values for teacher, values in each.items()}
        return found

    def _right(self, key: str) -> Tensor:
        return unpacked(self.right[key], self.settings["test_rows"])

    def add_baseline(self, label_smoothing: str, answers: Answers) -> None:
        """What students gave that never saw a teacher."""
        self.baselines[label_smoothing] = self._added(_key(label_smoothing), answers)

    def add_attack(self, name: str, answers: Mapping[str, Answers]) -> None:
        """What every teacher's students gave."""
        self.results[name] = {
            teacher: self._added(_key(name, teacher), each) for teacher, each in answers.items()
        }

    def _added(self, key: str, answers: Answers) -> list[float]:
        if not self.settings["data_per_seed"]:
            self.right[key] = answers.packed()
        return answers.accuracies()

    def best_smoothing(self) -> tuple[str, Difference]:
        """The label smoothing with the best mean accuracy on the test data, against the baseline's."""
        controls = {key: self.control(key) for key in self.baselines}
        finite = {key: control.mean for key, control in controls.items() if control.n > 0}
        best = max(finite or controls, key=lambda key: controls[key].mean)
        return best, controls[best]

    def deciding(self) -> list[str]:
        """The attacks that were run and decide the verdict: all but those of the `leakage` threat."""
        return [name for name in self.results if self.attacks[name]["threat"] != "leakage"]

    def worst(self, teacher: str) -> str | None:
        """The deciding attack with the highest mean difference; None where none gave a finite one."""
        means = {name: self.difference(teacher, name).mean for name in self.deciding()}
        finite = {name: mean for name, mean in means.items() if not math.isnan(mean)}
        return max(finite, key=finite.__getitem__) if finite else None

    def beaten_by(self, teacher: str) -> list[str]:
        """The deciding attacks that beat the LS student: the whole interval lies above zero."""
        return [name for name in self.deciding() if self.difference(teacher, name).low > 0]

    def certainly_beaten_by(self, teacher: str) -> list[str]:
        """Those that still do when so many attacks were tried (Holm's correction), and that beat the same
        attack from labels only as well, where it has that control: the gain is the teacher's and not the
        loss's.
        """
        p = {name: self.difference(teacher, name).p for name in self.deciding()}
        return [
            name
            for name in holm(p, FAMILY_LEVEL)
            if LABELS_ONLY not in self.results[name] or self.difference(teacher, name, LABELS_ONLY).low > 0
        ]

    def verdict(self, teacher: str) -> str:
        """One sentence: distillable or not by the attacks tried; and the mean difference, standard error and
        95 % interval of the worst of them. "Undistillable" comes with the highest end of all intervals, which
        says how little can have been missed: without two pairs of students for every attack, or where more
        than `LARGEST_MISS` can have been, it is not said.
        """
        worst = self.worst(teacher)
        if not self.deciding() or len(self.seeds) < 2:
            return "undecided: needs at least one attack and two seeds"
        if worst is None:
            return "undecided: every student diverged"
        differences = [self.difference(teacher, name) for name in self.deciding()]
        differences = [difference for difference in differences if difference.n > 0]
        tried, beaten = len(differences), len(self.beaten_by(teacher))
        certain = len(self.certainly_beaten_by(teacher))
        d = self.difference(teacher, worst)
        mean, error, low, high = (100 * share for share in (d.mean, d.standard_error, d.low, d.high))
        at_worst = f"(worst: {worst}, {mean:+.1f} ± {error:.1f} points [{low:+.1f}, {high:+.1f}])"
        beat = f"{beaten} of {tried} attacks beat the LS student"
        if certain:
            return f"distillable: {beat}, {certain} beyond chance {at_worst}"
        if beaten:
            return f"not shown to be distillable: {beat}, none beyond chance {at_worst}"
        widest = max(differences, key=lambda difference: difference.high)
        end = widest.high
        found = f"none of {tried} beats the LS student, intervals end at {100 * end:+.1f} points {at_worst}"
        if end > LARGEST_MISS:
            return f"undecided: {found}; more {widest.lacking} would tell"
        return f"undistillable by the attacks tried: {found}"

    def to_json(self) -> str:
        """The whole report; a share that is not a number is null."""
        return json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> AuditReport:
        """The inverse of `to_json`.

        Raises:
            ValueError: the text is no such report, or one of another version.
        """
        try:
            report = AuditReport(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"not an audit report: {error}") from error
        if report.version != VERSION:
            raise ValueError(
                f"an audit report of version {report.version}, this library reads version {VERSION}"
            )
        try:
            report.baselines = report._accuracies(report.baselines)
            report.results = {name: report._accuracies(each) for name, each in report.results.items()}
            if not set(report.results) <= set(report.attacks) or any(
                not set(report.teachers) <= set(each) for each in report.results.values()
            ):
                raise ValueError("it lacks teachers or attacks that it has results of")
            if not report.settings["data_per_seed"]:
                report._check_right()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a damaged audit report: {error}") from error
        return report

    def _check_right(self) -> None:
        """Raises where it does not have the rows that students got right, or other ones than they have."""
        for key, accuracies in self._by_key().items():
            shares = self._right(key).double().mean(1).tolist()
            for share, accuracy in zip(shares, accuracies, strict=True):
                if abs(share - accuracy) * self.settings["test_rows"] > 0.5:  # not NaN, of one that diverged
                    raise ValueError(f"{key}: the accuracies are not those of the rows that were right")

    def _accuracies(self, found: Mapping[str, Sequence[float | None]]) -> dict[str, list[float]]:
        """As they were before `to_json`; raises where there is not one for each seed."""
        accuracies = {
            name: [math.nan if value is None else float(value) for value in values]
            for name, values in found.items()
        }
        if any(len(values) != len(self.seeds) for values in accuracies.values()):
            raise ValueError(f"expected {len(self.seeds)} accuracies each, one for every seed")
        return accuracies

    def save(self, folder: Path) -> None:
        """Writes folder/audit.json, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "audit.json.partial"
        partial.write_text(self.to_json())
        os.replace(partial, folder / "audit.json")

    def resume(self, folder: Path) -> None:
        """Takes over what folder/audit.json holds, if there is one, other attacks than those asked for too.

        Raises:
            ValueError: the file is no audit report or belongs to other data or settings.
        """
        path = folder / "audit.json"
        if not path.exists():
            return
        try:
            earlier = AuditReport.from_json(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"cannot resume from {path}: {error}; start again with fresh=True (--fresh)"
            ) from error
        differing = [name for name in _FIXED if getattr(earlier, name) != getattr(self, name)]
        if differing:
            raise ValueError(
                f"{path} is the audit of something else ({', '.join(differing)} differ; the fingerprint is "
                "that of data, answers, untrained students and training); "
                "choose another folder or start again with fresh=True (--fresh)"
            )
        self.baselines, self.right = dict(earlier.baselines), dict(earlier.right)
        self.attacks |= {
            name: attack
            for name, attack in earlier.attacks.items()
            if name in earlier.results and name not in self.attacks
        }
        self.results = {
            name: values
            for name, values in earlier.results.items()
            if name in self.attacks and self.attacks[name] == earlier.attacks.get(name)
        }


def _key(name: str, teacher: str | None = None) -> str:
    """Of `AuditReport.right`."""
    return f"LS {name}" if teacher is None else f"{name} | {teacher}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
