"""The CUDA kernels for NVIDIA GPUs: the compiled library `cmim_kernels/_cuda*.so`, built from `csrc/cuda/`.

A typical batch with reduction mean or sum goes all the way to its gradient in the forward kernel, which
leaves it in `saved`, in the logits' dtype. Else `saved` holds statistics of the rows, (K, N) and smaller,
from which backward computes the gradient; see `Saved` in csrc/cuda/problem.h.

A label out of range cannot be found by the host without waiting for the device. The kernels never read
through one; they make the loss NaN and leave the row and the label in a word of host memory, from which the
next call, or `check_labels`, raises.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..reference import MEAN, SUM
from . import cpu

MAX_TEMPERATURES = 64
_MAX_SIZE = (2**31 - 1) // 128  # of N and of C: kMaxSize in csrc/cuda/problem.h
_CHUNK = 8  # temperatures that the kernels' statistics are padded to
_TYPICAL_ROWS, _TYPICAL_ELEMENTS = 4096, 8 << 20  # as in csrc/cuda/launch.cpp


def _load() -> str | None:
    """Loads the compiled operators; returns the reason if that cannot be done."""
    package = Path(__file__).parent.parent
    libraries = sorted(package.glob("_cuda*.so"))
    if not libraries:
        return f"the compiled library is missing from {package}; build it where nvcc and a CUDA torch are"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "it is for NVIDIA devices, torch is built for AMD's"
    why = cpu.unusable()
    if why is not None:
        return f"the operators' schemas are in the CPU library: {why}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0]} cannot be loaded: {error}"
    return None


_WHY_UNUSABLE = _load()

if _WHY_UNUSABLE is None:
    # Resolved once: looking an overload up takes as long as a call's checks.
    loss = torch.ops.cmim_kernels.loss.default
    loss_backward = torch.ops.cmim_kernels.loss_backward.default
    class_centroids = torch.ops.cmim_kernels.class_centroids.default


def unusable() -> str | None:
    """Why there are no CUDA kernels in this process; None if there are."""
    return _WHY_UNUSABLE


def refuses(logits: Tensor, temperatures: int) -> str | None:
    """Refuses tensors of other devices, and sizes beyond 32-bit row and column numbers."""
    if not logits.is_cuda:
        return f"it serves CUDA tensors, logits is on {logits.device}"
    if temperatures > MAX_TEMPERATURES:
        return f"it serves up to {MAX_TEMPERATURES} temperatures, not {temperatures}"
    if max(logits.shape) > _MAX_SIZE:
        return f"it serves up to {_MAX_SIZE} rows and classes, logits is {tuple(logits.shape)}"
    return None


def keeps_gradient(logits: Tensor, reduction: int) -> bool:
    """As `can_keep_gradient` in csrc/cuda/launch.cpp."""
    if reduction not in (MEAN, SUM) or logits.dtype == torch.float16:
        return False
    return logits.shape[0] <= _TYPICAL_ROWS and logits.numel() <= _TYPICAL_ELEMENTS


def saved_like(
    logits: Tensor, temperatures: int, reduction: int, save: bool
) -> tuple[tuple[int, ...], torch.dtype]:
    """The gradient, or `saved_elements` of csrc/cuda/problem.h."""
    if save and keeps_gradient(logits, reduction):
        return tuple(logits.shape), logits.dtype
    padded = (temperatures + _CHUNK - 1) // _CHUNK * _CHUNK
    elements = logits.shape[0] * (3 * padded + 7) + 4
    return (elements if save else 0,), cpu.compute_dtype(logits)


def check_labels() -> None:
    """Waits for the current device and raises ValueError if a call so far met a label out of range."""
    torch.cuda.synchronize()
    try:
        torch.ops.cmim_kernels.check_cuda_labels()
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
