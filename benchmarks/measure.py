"""A contender is checked, then timed in pairs with F.cross_entropy, with all that says what was timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CMI_WEIGHT, Case
from benchmarks.contenders import FUSED, LossFunction, checked, cross_entropy
from benchmarks.environment import environment
from benchmarks.memory import peak_bytes
from benchmarks.paired import Timed, paired
from cmim_kernels import fused_cmi_loss

PHASES = ("forward", "backward", "both")
ELEMENTS_AT_ONCE = 2**23  # temperatures x rows x classes that the reference takes


@functools.lru_cache(maxsize=1)
def truth(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient (N, C), in float64 from the reference.

    The reference holds (K, N, C) tensors; clusters do not depend on each other and are taken in turn.
    """
    logits, target = case.data(device)
    z = logits.detach().double()
    value, gradient = z.new_zeros(()), torch.empty_like(z)
    rows_at_once = max(1, ELEMENTS_AT_ONCE // (case.k * case.c))
    classes_at_once = max(1, rows_at_once * case.classes // case.n)
    for first in range(0, case.classes, classes_at_once):
        rows = torch.nonzero((target >= first) & (target < first + classes_at_once)).flatten()
        part = z[rows].requires_grad_()
        loss = fused_cmi_loss(
            part,
            target[rows],
            temperatures=case.spectrum,
            cmi_weight=CMI_WEIGHT,
            reduction="sum",
            backend="reference",
        )
        gradient[rows] = torch.autograd.grad(loss, part)[0] / case.n
        value += loss.detach() / case.n
    return value, gradient


def check(name: str, case: Case, device: str) -> None:
    """Fails where a contender computes something else than the loss it is timed for."""
    if name == "Liger cross entropy":
        return
    logits, target = case.data(device)
    loss = checked(name, case, device)(logits, target)
    gradient = torch.autograd.grad(loss, logits)[0]
    expected, expected_gradient = truth(case, device)
    # The gradient comes in the logits' dtype; the textbook formula itself is wrong for collapsed clusters.
    tolerance = 1e-4 if name in FUSED and case.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=1e-6)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < tolerance, f"{name}: gradient off by {error:.1e} in the 2-norm"


def timed_phase(loss: LossFunction, logits: Tensor, target: Tensor, phase: str) -> Timed:
    if phase == "forward":
        return Timed(lambda _: loss(logits, target))
    if phase == "backward":
        return Timed(lambda value: torch.autograd.grad(value, logits), prepare=lambda: loss(logits, target))
    return Timed(lambda _: torch.autograd.grad(loss(logits, target), logits))


def synchronizer(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def measure(
    benchmark: Any,
    name: str,
    loss: LossFunction,
    case: Case,
    phase: str,
    *,
    kind: str,
    device: str,
    budget_seconds: float,
    min_pairs: int = 5,
    memory: bool = False,
) -> None:
    """`kind` tells report.py which table or curve the result belongs to."""
    synchronize = synchronizer(device)
    ours = timed_phase(loss, *case.data(device), phase)
    baseline = timed_phase(cross_entropy, *case.data(device), phase)
    result = paired(
        ours, baseline, budget_seconds=budget_seconds, synchronize=synchronize, min_pairs=min_pairs
    )

    def synchronized(prepared: Any) -> None:
        ours.run(prepared)
        synchronize()

    benchmark.group = f"{kind}: {case.name}, {phase}"
    benchmark.extra_info.update(
        kind=kind,
        contender=name,
        case=case.name,
        n=case.n,
        c=case.c,
        classes=case.classes,
        k=case.k,
        grid=case.grid,
        dtype=str(case.dtype).removeprefix("torch."),
        phase=phase,
        device=device,
        bytes_moved=case.bytes_moved,
        peak_bytes=peak_bytes(name, case, device) if memory else None,
        paired=asdict(result),
        environment=environment(),
    )
    rounds = 1 + min(4, int(0.1 / result.seconds_p50))  # for pytest-benchmark's own table
    benchmark.pedantic(synchronized, setup=lambda: ((ours.prepare(),), {}), rounds=rounds)
