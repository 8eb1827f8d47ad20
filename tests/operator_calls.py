"""How tests call a backend's own operators, below the public functions, and judge what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmim_kernels import testing
from cmim_kernels.reference import MEAN

EIGHT = tuple(k / 8 for k in range(1, 9))
Arguments = tuple[Any, ...]


def arguments(target: Tensor, reduction: int = MEAN, a: tuple[float, ...] = EIGHT, **other: Any) -> Arguments:
    """As the operators take them after the logits."""
    w = tuple((1 + k) / len(a) for k in range(len(a)))
    numbers = (other.get("ce_weight", 1.0), 1.0, other.get("label_smoothing", 0.0), -100, reduction)
    return (target, a, w, other.get("class_weight"), other.get("centroids"), *numbers)


def clusters(
    width: float, n: int = 150, c: int = 37, classes: int = 5, seed: int = 3
) -> tuple[Tensor, Tensor]:
    """Two fifths of the rows and more in one class, every ninth ignored."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (n,), generator=g)
    target[: 2 * n // 5] = classes // 2
    target = target[torch.randperm(n, generator=g)]
    logits = 2 * torch.randn(classes, c, generator=g)[target] + width * torch.randn(n, c, generator=g)
    target[::9] = -100
    return logits, target


class Operators:
    """Those of a backend, which is made on first use."""

    def __init__(self, backend: Callable[[], Any]) -> None:
        self.backend = backend

    def run(self, logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        backend = self.backend()
        value, saved = backend.loss(logits, *args, True)
        upstream = torch.ones_like(value) if upstream is None else upstream
        return value, backend.loss_backward(upstream, saved, logits, *args)

    def check(self, logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> None:
        """Value and gradient within the budget, or within the bounds for collapsed clusters."""
        self.check_together([(logits, args, upstream)])

    def check_together(self, calls: list[tuple[Tensor, Arguments, Tensor | None]]) -> None:
        """One small batch of plain PyTorch's is exact by luck now and then: the budget of several at once."""
        outs, truths, bases = [], [], []
        for logits, args, upstream in calls:
            outs.append(self.run(logits, args, upstream))
            truths.append(testing.truth(logits, *args, upstream=upstream))
            bases.append(testing.base(logits, *args, upstream=upstream))
        if all(value.abs().max() < testing.COLLAPSED_CMI for value, _ in truths):
            for out, truth in zip(outs, truths, strict=True):
                testing.assert_collapse_accuracy(*out, *truth)
            return
        results = (outs, truths, bases)
        value, true_value, base_value = (torch.cat([v.flatten() for v, _ in part]) for part in results)
        # One number of plain PyTorch's may still be exact: allow what one sum rounds.
        slack = torch.finfo(value.dtype).eps * true_value.abs().max()
        assert (value.double() - true_value).abs().max() <= 2 * (base_value - true_value).abs().max() + slack
        gradients = (torch.cat([gradient for _, gradient in part]) for part in results)
        testing.assert_gradient_within_budget(*gradients, torch.cat([args[0] for _, args, _ in calls]))

    def check_norm(
        self, logits: Tensor, args: Arguments, upstream: Tensor | None = None, at_most: float = 1e-6
    ) -> None:
        """Where plain PyTorch is no yardstick or there is but one batch: that much of the norms."""
        value, gradient = self.run(logits, args, upstream)
        true_value, true_gradient = testing.truth(logits, *args, upstream=upstream)
        assert (value - true_value).norm() <= at_most * true_value.norm()
        assert (gradient - true_gradient).norm() <= at_most * true_gradient.norm()
