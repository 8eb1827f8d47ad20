"""What an attacker holds, and what the students are tested on: shapes, checks, files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QueryFunction = Callable[[Tensor], Tensor]

LABELS_ONLY = "labels only"
"""The name, in a report, of the teacher that knows nothing but the labels; no teacher may have it."""

# What numpy and torch raise for a file they cannot read, or with entries that are no numbers
_UNREADABLE = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, TypeError, ValueError, KeyError)

_TENSORS = ("inputs", "labels", "test_inputs", "test_labels")


@dataclass(frozen=True)
class AuditData:
    """The attacker's data set, the teachers' answers on it, and held-out test data.

    Either one data set for every seed, or (labels of shape (S, N)) one per seed, every tensor with a leading
    S: then each seed is a split of its own, with teachers of its own, and differences to the baseline are
    paired by split.

    Args:
        inputs: (N, ...) or (S, N, ...), float32: the attacker's inputs.
        labels: (N,) or (S, N), int64 in [0, C): their labels.
        teachers: name -> logits, (N, C) or (S, N, C), floating point and finite.
        test_inputs: (M, ...) or (S, M, ...), float32.
        test_labels: (M,) or (S, M).
        extra_inputs: (E, ...) or (S, E, ...), float32: unlabelled inputs for the attacks of the
            `leakage` threat.
        extra_logits: the teachers' answers on them, named as `teachers`.
        queries: teacher name -> function that answers mixtures of the inputs, `(N, ...) -> (N, C)`, or
            `(S, N, ...) -> (S, N, C)` where there is one data set per seed.

    Raises:
        TypeError, ValueError: with the name of the field, what came and what is accepted.
    """

    inputs: Tensor
    labels: Tensor
    teachers: Mapping[str, Tensor]
    test_inputs: Tensor
    test_labels: Tensor
    extra_inputs: Tensor | None = None
    extra_logits: Mapping[str, Tensor] | None = None
    queries: Mapping[str, QueryFunction] | None = None

    def __post_init__(self) -> None:
        for name in _TENSORS:
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        for name in ("labels", "test_labels"):
            if getattr(self, name).dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {getattr(self, name).dtype}")
        for name in ("inputs", "test_inputs", "extra_inputs"):
            value = getattr(self, name)
            if value is not None and value.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, as the students' parameters, got {value.dtype}")
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or infinity")
        if self.labels.dim() not in (1, 2) or self.labels.numel() == 0:
            raise ValueError(
                f"labels must have shape (N,) or (S, N) with N > 0, got {tuple(self.labels.shape)}"
            )
        _check_teachers(self.teachers)
        self._check_shapes()
        self._check_labels()

    @property
    def teacher_names(self) -> tuple[str, ...]:
        return tuple(self.teachers)

    @property
    def splits(self) -> int | None:
        """The number of data sets where there is one per seed, else None."""
        return self.labels.shape[0] if self.labels.dim() == 2 else None

    @property
    def num_classes(self) -> int:
        return next(iter(self.teachers.values())).shape[-1]

    def _check_shapes(self) -> None:
        lead = self.labels.shape[:-1]
        N, C = self.labels.shape[-1], self.num_classes
        _check_rows("inputs", self.inputs, self.labels.shape)
        sample = self.inputs.shape[self.labels.dim() :]
        if (
            self.test_labels.shape[:-1] != lead
            or self.test_labels.dim() == 0
            or self.test_labels.numel() == 0
        ):
            raise ValueError(
                f"test_labels must have shape {_shape(lead, 'M')} with M > 0, "
                f"got {tuple(self.test_labels.shape)}"
            )
        _check_rows("test_inputs", self.test_inputs, self.test_labels.shape)
        _check_sample("test_inputs", self.test_inputs, lead, sample)
        for name, logits in self.teachers.items():
            _check_logits(f"teachers[{name!r}]", logits, (*lead, N, C))
        if (self.extra_inputs is None) != (self.extra_logits is None):
            raise ValueError("extra_inputs and extra_logits must be given together")
        if self.extra_inputs is not None and self.extra_logits is not None:
            _check_sample("extra_inputs", self.extra_inputs, lead, sample)
            _check_names("extra_logits", self.extra_logits, self.teacher_names)
            rows = self.extra_inputs.shape[: len(lead) + 1]
            for name, logits in self.extra_logits.items():
                _check_logits(f"extra_logits[{name!r}]", logits, (*rows, C))
        if self.queries is not None:
            _check_names("queries", self.queries, self.teacher_names)

    def _check_labels(self) -> None:
        for name in ("labels", "test_labels"):
            low, high = (int(v) for v in getattr(self, name).aminmax())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{name} must lie in [0, {self.num_classes}), the teachers' classes, got {low} to {high}"
                )

    def seeds(self, wanted: int | Sequence[int]) -> list[int]:
        """A number of seeds, or the seeds, as a list.

        Raises:
            TypeError: something else.
            ValueError: none, one twice, or not as many as there are data sets where each seed has one.
        """
        if isinstance(wanted, Integral):
            chosen = list(range(int(wanted)))
        elif isinstance(wanted, Sequence) and all(isinstance(seed, Integral) for seed in wanted):
            chosen = [int(seed) for seed in wanted]
        else:
            raise TypeError(f"seeds must be a number or a sequence of ints, got {wanted!r}")
        if not chosen or len(set(chosen)) != len(chosen):
            raise ValueError(f"seeds must be a positive number or distinct numbers, got {wanted!r}")
        if self.splits is not None and self.splits != len(chosen):
            raise ValueError(
                f"the data holds {self.splits} data sets, one per seed, but there are {len(chosen)} seeds"
            )
        return chosen

    def per_seed(self, tensor: Tensor, seeds: int) -> Tensor:
        """(N, ...) shared by all seeds, or (S, N, ...), as (S, N, ...), without a copy."""
        return tensor if self.splits is not None else tensor.expand(seeds, *tensor.shape)

    def per_student(self, logits: Mapping[str, Tensor], seeds: int) -> Tensor:
        """The teachers' logits, teacher by teacher and in it seed by seed, (R, N, C) float32."""
        return torch.cat([self.per_seed(logits[name], seeds) for name in self.teacher_names]).float()

    def answer(self, inputs: Tensor, seeds: int) -> Tensor:
        """Asks every teacher about inputs (S, Q, ...); returns (R, Q, C) float32.

        Raises:
            ValueError: a teacher answers with another shape or with NaN or infinity.
        """
        if self.queries is None:
            raise ValueError("this audit has no queries= to ask the teachers with")
        answers = []
        for name in self.teacher_names:
            ask = self.queries[name]
            with torch.no_grad():
                if self.splits is None:
                    logits = ask(inputs.flatten(0, 1))
                    _check_logits(
                        f"the answer of queries[{name!r}]",
                        logits,
                        (seeds * inputs.shape[1], self.num_classes),
                    )
                    logits = logits.unflatten(0, (seeds, -1))
                else:
                    logits = ask(inputs)
                    _check_logits(
                        f"the answer of queries[{name!r}]", logits, (*inputs.shape[:2], self.num_classes)
                    )
            answers.append(logits)
        return torch.cat(answers).float()


def load_audit_data(path: str | Path) -> AuditData:
    """Reads an `AuditData` from a `.npz` file or a `.pt` file holding a dictionary of tensors.

    The names are the fields of `AuditData`. Several teachers are several entries `teachers.<name>`; their
    answers on the extra inputs are `extra_logits.<name>`; one teacher alone may be `teacher_logits` and
    `extra_logits`, and is called `teacher`.

    Raises:
        FileNotFoundError, TypeError, ValueError: no such file, not such a file, an entry that is missing, not
        known, or not what `AuditData` accepts; with the path in the message.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    entries = _read(path)
    fields: dict[str, Any] = {}
    for key, value in entries.items():
        field, _, teacher = {"teacher_logits": "teachers"}.get(key, key).partition(".")
        if field in ("teachers", "extra_logits"):
            named = fields.setdefault(field, {})
            if (teacher or "teacher") in named:
                raise ValueError(f"{path} holds {field} of {teacher or 'teacher'!r} twice, once as {key!r}")
            named[teacher or "teacher"] = value
        elif key in (*_TENSORS, "extra_inputs"):
            fields[key] = value
        else:
            raise ValueError(f"{path} holds {key!r}, which no audit reads")
    missing = [name for name in (*_TENSORS, "teachers") if name not in fields]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return AuditData(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    # Both formats are zip archives; what torch.load raises for anything else has no end.
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a .npz archive nor a .pt file")
    try:
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as file:
                return {key: torch.from_numpy(file[key]) for key in file.files}
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(value, Tensor) for value in entries.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors")
    return entries


def check_name(what: str, name: object) -> None:
    """Whether a table in Markdown can hold it."""
    if not isinstance(name, str) or name != name.strip() or not name.isprintable() or not name or "|" in name:
        raise ValueError(f"{what} must have printable names without '|' and outer spaces, got {name!r}")


def _check_teachers(teachers: object) -> None:
    if not isinstance(teachers, Mapping) or not all(isinstance(v, Tensor) for v in teachers.values()):
        raise TypeError(f"teachers must map names to logits, got {type(teachers).__name__}")
    if not teachers:
        raise ValueError("teachers must name at least one teacher")
    if LABELS_ONLY in teachers:
        raise ValueError(f"no teacher may be named {LABELS_ONLY!r}: the audit makes one itself")
    for name in teachers:
        check_name("teachers", name)
    if any(value.dim() < 2 for value in teachers.values()):
        raise ValueError("a teacher's logits must have shape (N, C) or (S, N, C)")


def _shape(lead: tuple[int, ...], *rest: object) -> str:
    return "(" + ", ".join(str(size) for size in (*lead, *rest)) + ")"


def _check_rows(name: str, value: Tensor, rows: tuple[int, ...]) -> None:
    if tuple(value.shape[: len(rows)]) != tuple(rows):
        raise ValueError(
            f"{name} must have shape {_shape(tuple(rows), '...')}, as many rows as labels, "
            f"got {tuple(value.shape)}"
        )


def _check_sample(name: str, value: Tensor, lead: tuple[int, ...], sample: tuple[int, ...]) -> None:
    if value.shape[: len(lead)] != lead or value.shape[len(lead) + 1 :] != sample:
        raise ValueError(
            f"{name} must have shape {_shape(tuple(lead), 'rows', *sample)}, got {tuple(value.shape)}"
        )


def _check_logits(name: str, value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"{name} must be a floating point tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad; pass {name}.detach()")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} entries that are NaN or infinite")


def _check_names(name: str, value: object, names: tuple[str, ...]) -> None:
    if not isinstance(value, Mapping) or set(value) != set(names):
        came = ", ".join(value) if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"{name} must name the teachers {', '.join(names)}, got {came}")
