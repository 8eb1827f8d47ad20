"""How tests call the emulated CUDA operators, and judge what they return."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from cuda_emulated import FUSED, TILED, emulated
from torch import Tensor

from cmim_kernels import testing
from cmim_kernels.reference import MEAN

needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches between threads in x86-64 machine code"
)
both_paths = pytest.mark.parametrize("path", [FUSED, TILED], ids=["fused", "tiled"])

EIGHT = tuple(k / 8 for k in range(1, 9))
Arguments = tuple[Any, ...]


def arguments(target: Tensor, reduction: int = MEAN, a: tuple[float, ...] = EIGHT, **other: Any) -> Arguments:
    """As the operators take them after the logits."""
    w = tuple((1 + k) / len(a) for k in range(len(a)))
    numbers = (other.get("ce_weight", 1.0), 1.0, other.get("label_smoothing", 0.0), -100, reduction)
    return (target, a, w, other.get("class_weight"), other.get("centroids"), *numbers)


def run(logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    backend = emulated()
    value, saved = backend.loss(logits, *args, True)
    upstream = torch.ones_like(value) if upstream is None else upstream
    return value, backend.loss_backward(upstream, saved, logits, *args)


def check(logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> None:
    """Value and gradient within the budget, or within the bounds for collapsed clusters."""
    check_together([(logits, args, upstream)])


def check_together(calls: list[tuple[Tensor, Arguments, Tensor | None]]) -> None:
    """One small batch of plain PyTorch's is exact by luck now and then: the budget of several together."""
    outs, truths, bases = [], [], []
    for logits, args, upstream in calls:
        outs.append(run(logits, args, upstream))
        truths.append(testing.truth(logits, *args, upstream=upstream))
        bases.append(testing.base(logits, *args, upstream=upstream))
    if all(value.abs().max() < testing.COLLAPSED_CMI for value, _ in truths):
        for out, truth in zip(outs, truths, strict=True):
            testing.assert_collapse_accuracy(*out, *truth)
        return
    results = (outs, truths, bases)
    value, true_value, base_value = (torch.cat([v.flatten() for v, _ in part]) for part in results)
    slack = torch.finfo(value.dtype).eps * true_value.abs().max()
    assert (value.double() - true_value).abs().max() <= 2 * (base_value - true_value).abs().max() + slack
    gradients = (torch.cat([gradient for _, gradient in part]) for part in results)
    testing.assert_gradient_within_budget(*gradients, torch.cat([args[0] for _, args, _ in calls]))


def check_norm(logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> None:
    """Where plain PyTorch is no yardstick or there is but one batch: 1e-6 of the norms."""
    value, gradient = run(logits, args, upstream)
    true_value, true_gradient = testing.truth(logits, *args, upstream=upstream)
    assert (value - true_value).norm() <= 1e-6 * true_value.norm()
    assert (gradient - true_gradient).norm() <= 1e-6 * true_gradient.norm()


def clusters(
    width: float, n: int = 150, c: int = 37, classes: int = 5, seed: int = 3
) -> tuple[Tensor, Tensor]:
    """Most rows in one class, every ninth ignored."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (n,), generator=g)
    target[: 2 * n // 5] = classes // 2
    target = target[torch.randperm(n, generator=g)]
    logits = 2 * torch.randn(classes, c, generator=g)[target] + width * torch.randn(n, c, generator=g)
    target[::9] = -100
    return logits, target


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.equal(x.view(kind), y.view(kind))
