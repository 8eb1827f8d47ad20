"""Trains the students of one attack, of every teacher and seed at once, and tests them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .answers import Answers
from .attacks import Attack, cross_entropy
from .data import LABELS_ONLY, AuditData
from .students import StudentFactory, Students, StudentTraining, batches, seeded, take

_MIXUP_QUERIES = 4  # mixtures asked for, per row of the attacker's own
_MIXUP_BETA = 0.4  # MixKD draws the share of a mixture from Beta(a, a)
_TRIED = 64  # test rows that tell students apart


class Trainer:
    """Holds the attacker's data, one row of tensors per seed (S) or per student (R = teachers * S).

    Args:
        data, student, seeds, training: as in `audit`.
        label_smoothing: the LS student's.

    Raises:
        TypeError, ValueError: label_smoothing is out of range, or the students do not fit the data.
    """

    def __init__(
        self,
        data: AuditData,
        student: StudentFactory,
        seeds: Sequence[int],
        training: StudentTraining,
        label_smoothing: float,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.data, self.student, self.seeds, self.training = data, student, seeds, training
        self.label_smoothing = label_smoothing
        S = len(seeds)
        self.device = data.inputs.device
        self.inputs = data.per_seed(data.inputs, S)  # (S, N, ...)
        self.labels = data.per_seed(data.labels, S)  # (S, N)
        self.test_inputs = data.per_seed(data.test_inputs, S)
        self.test_labels = data.per_seed(data.test_labels, S)
        self.logits = data.per_student(data.teachers, S)  # (R, N, C)
        self.label_logits = label_logits(self.labels, data.num_classes, label_smoothing)  # (S, N, C)
        Students(student, seeds, 1, self.device).check(self.inputs, data.num_classes)
        self._mixtures: tuple[Tensor, Tensor] | None = None

    def fingerprint(self) -> str:
        """Hash of all that the results depend on: data, teachers' answers, initial students, training."""
        data, students = self.data, Students(self.student, self.seeds, 1, self.device)
        layers, untrained = students.describe(self.test_inputs[:, :_TRIED])
        digest = hashlib.sha256(repr((self.seeds, self.training, layers)).encode())
        tensors = [data.inputs, data.labels, data.test_inputs, data.test_labels, self.logits, *untrained]
        if data.extra_inputs is not None and data.extra_logits is not None:
            tensors += [data.extra_inputs, *data.extra_logits.values()]
        for tensor in tensors:
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def baseline(self, label_smoothing: float | None = None) -> Answers:
        """Answers (S) of students that see nothing but the attacker's labels; None: the LS student's."""
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        students = Students(self.student, self.seeds, 1, self.device)
        rows = self._batches(self.inputs.shape[1])

        def step_loss() -> Tensor:
            index = next(rows)
            logits = students(take(self.inputs, index))
            return cross_entropy(logits, take(self.labels, index), smoothing)

        students.train(self.training, step_loss)
        if students.all_equal():
            raise ValueError(
                f"all {len(self.seeds)} seeds trained the same student, so that they say no more than one: "
                "the student's weights must be drawn from torch's generator, or batches be smaller than the "
                "data"
            )
        return students.answers(self.test_inputs, self.test_labels)

    def knockoffs(self, attack: Attack) -> dict[str, Answers]:
        """Answers (S) of each teacher's students, and of students under the same attack from labels only.

        The latter tell what the loss gives by itself; attacks with queries have no such control.

        Raises:
            ValueError: the attack's functions return what they should not.
        """
        queries = self._queries(attack)
        names = [*self.data.teacher_names, *([LABELS_ONLY] if queries is None else [])]
        copies = len(names)
        students = Students(self.student, self.seeds, copies, self.device)
        labels = self.labels.repeat(copies, 1)
        logits = self.logits if queries is not None else torch.cat([self.logits, self.label_logits])
        if attack.prepare is not None:
            prepared = attack.prepare(logits, labels)
            if prepared.shape != logits.shape or not bool(prepared.isfinite().all()):
                raise ValueError(
                    f"attack {attack.name!r}: prepare must return finite logits {tuple(logits.shape)}"
                )
            logits = prepared
        rows = self._batches(self.inputs.shape[1])
        query_rows = self._batches(queries[0].shape[1]) if queries is not None else rows

        def step_loss() -> Tensor:
            index = next(rows)
            loss = attack.loss(students(take(self.inputs, index)), take(logits, index), take(labels, index))
            if queries is not None and attack.query_loss is not None:
                index = next(query_rows)
                loss = loss + attack.query_loss(students(take(queries[0], index)), take(queries[1], index))
            if loss.shape != logits.shape[:1]:
                raise ValueError(
                    f"attack {attack.name!r}: the loss must return one value per student, "
                    f"{tuple(logits.shape[:1])}, got {tuple(loss.shape)}"
                )
            return loss

        students.train(self.training, step_loss)
        answers = students.answers(self.test_inputs, self.test_labels).split(copies)
        return dict(zip(names, answers, strict=True))

    def _batches(self, rows: int) -> Iterator[Tensor]:
        return batches(self.seeds, rows, self.training.batch_size, self.device)

    def _queries(self, attack: Attack) -> tuple[Tensor, Tensor] | None:
        """Inputs (S, Q, ...) and the teachers' answers (R, Q, C) of an attack that asks more."""
        data, S = self.data, len(self.seeds)
        if attack.queries == "mixup":
            if self._mixtures is None:
                inputs = self._mix()
                self._mixtures = inputs, data.answer(inputs, S)
            return self._mixtures
        if attack.queries == "extra" and data.extra_inputs is not None and data.extra_logits is not None:
            return data.per_seed(data.extra_inputs, S), data.per_student(data.extra_logits, S)
        return None

    def _mix(self) -> Tensor:
        """Mixtures of two of the attacker's inputs each, (S, 4 N, ...)."""
        mixed = []
        for seed, inputs in zip(self.seeds, self.inputs, strict=True):
            with seeded(seed):
                count = _MIXUP_QUERIES * inputs.shape[0]
                share = torch.distributions.Beta(_MIXUP_BETA, _MIXUP_BETA).sample((count,)).to(inputs)
                pair = torch.randint(inputs.shape[0], (2, count)).to(inputs.device)
            share = share.view(-1, *[1] * (inputs.dim() - 1))
            mixed.append(share * inputs[pair[0]] + (1 - share) * inputs[pair[1]])
        return torch.stack(mixed)


def label_logits(labels: Tensor, classes: int, label_smoothing: float) -> Tensor:
    """Logits (S, N, C) of a teacher that knows nothing but labels (S, N): its softmax smooths them.

    Without smoothing the logits would be infinite; 0.1 stands in.
    """
    smoothing = label_smoothing if label_smoothing > 0 else 0.1
    margin = math.log1p(classes * (1 - smoothing) / smoothing)
    return margin * F.one_hot(labels, classes).float()
