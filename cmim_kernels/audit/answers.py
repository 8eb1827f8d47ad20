"""Which test rows students got right, and how a report keeps that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = torch.arange(7, -1, -1, dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class Answers:
    """Of R students on M test rows.

    right: (R, M) bool; finite: (R,) bool, false for a student with a logit that is not finite: it has
    diverged, and has no accuracy.
    """

    right: Tensor
    finite: Tensor

    def accuracies(self) -> list[float]:
        """The share of right answers of each; NaN for one that has diverged."""
        return torch.where(self.finite, self.right.double().mean(1), math.nan).tolist()

    def split(self, copies: int) -> list[Answers]:
        """Those of each copy, R / copies students."""
        return [
            Answers(right, finite)
            for right, finite in zip(self.right.chunk(copies), self.finite.chunk(copies), strict=True)
        ]

    def packed(self) -> list[str]:
        """`right` of each student in hexadecimal digits, the first row in the highest bit."""
        right = self.right.cpu()
        padded = torch.nn.functional.pad(right.to(torch.uint8), (0, -right.shape[1] % 8))
        bytes_ = (padded.unflatten(1, (-1, 8)) << _BITS).sum(-1)
        return [bytes(row).hex() for row in bytes_.tolist()]


def unpacked(packed: Sequence[str], rows: int) -> Tensor:
    """The inverse of `Answers.packed`: (R, M) bool.

    Raises:
        ValueError: these are not the answers to so many rows.
    """
    found = bytearray().join(bytes.fromhex(text) for text in packed)
    if any(len(text) != 2 * -(-rows // 8) for text in packed):
        raise ValueError(f"expected answers to {rows} test rows")
    bits = (torch.frombuffer(found, dtype=torch.uint8).view(len(packed), -1, 1) >> _BITS) & 1
    return bits.flatten(1)[:, :rows].bool()
