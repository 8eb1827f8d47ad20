"""One module per native backend: each says whether it is usable, and why not, and how it computes.

What the rest of the package expects of a backend module is the `Backend` protocol below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Of an operator `loss` but for `save`, in the language of schemas; csrc/ops.cpp has it too
ARGUMENTS = """Tensor logits, Tensor target, float[] inverse_temperatures, float[] temperature_weights,
    Tensor? class_weight, Tensor? centroids, float ce_weight, float cmi_weight, float label_smoothing,
    int ignore_index, int reduction"""


class Backend(Protocol):
    """A backend module. Its functions get validated arguments: K temperatures, logits (N, C), target (N,)
    int64.

    `class_weight` (C,) and `centroids` (K, C, C) are contiguous and of the compute dtype: float64 for float64
    logits, else float32. `reduction` is one of the numbers in `reference.py`. `saved` is the backend's own
    business: what `loss` returned with `save=True` comes back to `loss_backward`.
    """

    def unusable(self) -> str | None:
        """Why this backend cannot be used in this process at all; None if it can."""

    def refuses(self, logits: Tensor, temperatures: int, /) -> str | None:
        """Why it cannot serve this call (device, dtype, size), without reading any data; None if it can."""

    def keeps_gradient(self, logits: Tensor, reduction: int, /) -> bool:
        """Whether `saved` is the gradient (N, C) for an upstream gradient of one, of logits that need one.

        It may then be given away: `loss_backward` gets an empty tensor instead, and computes again.
        """

    def saved_like(
        self, logits: Tensor, temperatures: int, reduction: int, save: bool, /
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `saved`; for tracing."""

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        inverse_temperatures: Sequence[float],
        temperature_weights: Sequence[float],
        class_weight: Tensor | None,
        centroids: Tensor | None,
        ce_weight: float,
        cmi_weight: float,
        label_smoothing: float,
        ignore_index: int,
        reduction: int,
        save: bool,
        /,
    ) -> tuple[Tensor, Tensor]:
        """(value, saved); `save=False` promises that no backward follows."""

    def loss_backward(
        self,
        grad: Tensor,
        saved: Tensor,
        logits: Tensor,
        target: Tensor,
        inverse_temperatures: Sequence[float],
        temperature_weights: Sequence[float],
        class_weight: Tensor | None,
        centroids: Tensor | None,
        ce_weight: float,
        cmi_weight: float,
        label_smoothing: float,
        ignore_index: int,
        reduction: int,
        /,
    ) -> Tensor:
        """The gradient in the logits, (N, C) in their dtype; `grad` is the upstream one, of value's shape."""

    def class_centroids(
        self, logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float], ignore_index: int, /
    ) -> tuple[Tensor, Tensor]:
        """(Q (K, C, C) of the compute dtype, counts (C,) int64)."""
