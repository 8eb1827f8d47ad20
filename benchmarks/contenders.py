"""Who is timed: each contender is a loss of (logits (N, C), target (N,))."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import CMI_WEIGHT, Case
from benchmarks.eager import EagerLoop, EagerVectorised, MovingAverageLoop
from cmim_kernels import available_backends, fused_cmi_loss

LossFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def fused(backend: str, case: Case, device: str) -> LossFunction:
    return partial(fused_cmi_loss, temperatures=case.spectrum, cmi_weight=CMI_WEIGHT, backend=backend)


def eager_loop(case: Case, device: str) -> LossFunction:
    return EagerLoop(case.spectrum, CMI_WEIGHT)


def eager_vectorised(case: Case, device: str) -> LossFunction:
    return EagerVectorised(case.spectrum, CMI_WEIGHT)


def moving_average_loop(case: Case, device: str, momentum: float = 0.9) -> LossFunction:
    return MovingAverageLoop(case.spectrum, CMI_WEIGHT, momentum)


def compiled(make: Callable[[Case, str], LossFunction], case: Case, device: str) -> LossFunction:
    torch.compiler.reset()
    return torch.compile(make(case, device), fullgraph=True, dynamic=False)


def liger_cross_entropy(case: Case, device: str) -> LossFunction:
    """Liger-Kernel's cross entropy alone, without CMI. It overwrites its logits with their gradient."""
    from liger_kernel.transformers.functional import liger_cross_entropy as loss

    return loss


FUSED: dict[str, Callable[[Case, str], LossFunction]] = {
    f"fused[{backend}]": partial(fused, backend) for backend in available_backends() if backend != "reference"
}
OTHERS: dict[str, Callable[[Case, str], LossFunction]] = {
    "reference": partial(fused, "reference"),
    "eager loop": eager_loop,
    "eager vectorised": eager_vectorised,
    "moving-average loop": moving_average_loop,
    "compiled loop": partial(compiled, eager_loop),
    "compiled vectorised": partial(compiled, eager_vectorised),
    "Liger cross entropy": liger_cross_entropy,
}
CONTENDERS = FUSED | OTHERS


def why_not(name: str, device: str) -> str | None:
    """Why a contender cannot be timed on this device; None if it can."""
    if name in FUSED:
        backend = name.removeprefix("fused[").removesuffix("]")
        reason = available_backends()[backend]
        if reason is None:
            module = importlib.import_module(f"cmim_kernels.backends.{backend}")
            reason = module.refuses(torch.empty(1, 1, device=device), 1)
        return reason
    if name == "Liger cross entropy":
        if device == "cpu":
            return "is a Triton kernel for GPUs"
        return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    return None


def usable(names: Iterable[str], device: str) -> list[str]:
    return [name for name in names if why_not(name, device) is None]


def checked(name: str, case: Case, device: str) -> LossFunction:
    """The code that is timed, to be checked; a moving average without memory is the batch's own centroid."""
    if name == "moving-average loop":
        return moving_average_loop(case, device, momentum=0.0)
    return CONTENDERS[name](case, device)
