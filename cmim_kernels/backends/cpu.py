"""The C++ kernels for CPU tensors: the compiled library `cmim_kernels/_cpu*.so`, built from `csrc/`.

With reduction mean and sum, `saved` is the gradient for an upstream gradient of one, (N, C): while the
exponentials of a cluster are at hand, its gradient costs little more. Else it is empty.

A training step calls the library past PyTorch's dispatcher, which takes its time for every argument, where
nobody can tell: `loss` says when. Everything else goes through the operators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..reference import MEAN, NONE, SPECTRUM, SUM
from ..tensors import needs_no_dispatch


def _load() -> str | None:
    """Loads the compiled operators; returns the reason if that cannot be done."""
    package = Path(__file__).parent.parent
    libraries = sorted(package.glob("_cpu*.so"))
    if not libraries:
        return f"the compiled library is missing from {package}; install the package, or build it in place"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0]} cannot be loaded: {error}"
    return None


def _bind() -> tuple[Callable[..., bool] | None, str | None]:
    """`loss` of csrc/direct.cpp, or why the library has none that serves this Python and this torch."""
    if "t" in sys.abiflags:
        return None, "a Python without a global lock has no limited API"
    try:
        direct: Any = import_module(f"{__package__.rpartition('.')[0]}._cpu")
        direct.bind(Tensor.__dlpack_c_exchange_api__)
    except (ImportError, AttributeError, ValueError) as error:
        return None, str(error)
    return direct.loss, None


_WHY_UNUSABLE = _load()
_SINGLE = torch.empty((), device="cpu", dtype=torch.float32)
_DOUBLE = torch.empty((), device="cpu", dtype=torch.float64)

if _WHY_UNUSABLE is None:
    _direct, why_dispatched = _bind()
    # Resolved once: looking an overload up takes as long as a call's checks.
    _loss = torch.ops.cmim_kernels.loss.default
    loss_backward = torch.ops.cmim_kernels.loss_backward.default
    class_centroids = torch.ops.cmim_kernels.class_centroids.default


def unusable() -> str | None:
    """Why the compiled library could not be loaded; None if it was."""
    return _WHY_UNUSABLE


def refuses(logits: Tensor, temperatures: int) -> str | None:
    """Refuses tensors of other devices."""
    return None if logits.is_cpu else f"it serves CPU tensors, logits is on {logits.device}"


def loss(
    logits: Tensor,
    target: Tensor,
    a: Sequence[float],
    w: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The operator `loss`; for the step of a training loop past the dispatcher, where that does nothing more.

    `options`: ce_weight, cmi_weight, label_smoothing, ignore_index, reduction, save.
    """
    *others, reduction, save = options
    if (
        save
        and keeps_gradient(logits, reduction)
        and class_weight is None
        and centroids is None
        and _direct is not None
        and logits.dtype is not torch.float16  # whose gradient is kept in float32
        and needs_no_dispatch(logits, target)
        and logits.is_contiguous()
    ):
        # empty_like takes half the time of empty
        value = torch.empty_like(_DOUBLE if logits.dtype is torch.float64 else _SINGLE)
        saved = torch.empty_like(logits)
        if _direct(logits, target, value, saved, a, w, *others, reduction):
            return value, saved
    result: tuple[Tensor, Tensor] = _loss(logits, target, a, w, class_weight, centroids, *options)
    return result


def keeps_gradient(logits: Tensor, reduction: int) -> bool:
    """True for mean and sum, whose upstream gradient is one number."""
    return reduction in (MEAN, SUM)


def saved_like(
    logits: Tensor, temperatures: int, reduction: int, save: bool
) -> tuple[tuple[int, ...], torch.dtype]:
    """(N, C) if there is a gradient to keep, else (0,).

    In the compute dtype, so that the one rounding comes last; bfloat16 is kept as it is, see `autograd`.
    """
    dtype = torch.bfloat16 if logits.dtype == torch.bfloat16 else compute_dtype(logits)
    return tuple(logits.shape) if save and keeps_gradient(logits, reduction) else (0,), dtype


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Of the loss and of all arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# The operators' shapes and dtypes, for tracing. Other devices' libraries implement the same operators: their
# modules by device type.
_BY_DEVICE = {"cuda": "cuda"}


def _fake_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    inverse_temperatures, reduction, save = args[1], args[9], args[10]
    k = len(inverse_temperatures)
    shape = {NONE: logits.shape[:1], SPECTRUM: (k,)}.get(reduction, ())
    backend = import_module(f"{__package__}.{_BY_DEVICE.get(logits.device.type, 'cpu')}")
    saved_shape, saved_dtype = backend.saved_like(logits, k, reduction, save)
    saved = logits.new_empty(saved_shape, dtype=saved_dtype)
    return logits.new_empty(shape, dtype=compute_dtype(logits)), saved


def _fake_loss_backward(grad: Tensor, saved: Tensor, logits: Tensor, *args: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_class_centroids(
    logits: Tensor, target: Tensor, inverse_temperatures: list[float], ignore_index: int
) -> tuple[Tensor, Tensor]:
    k, c = len(inverse_temperatures), logits.shape[1]
    return logits.new_empty((k, c, c), dtype=compute_dtype(logits)), target.new_empty((c,))


if _WHY_UNUSABLE is None:
    torch.library.register_fake("cmim_kernels::loss", _fake_loss)
    torch.library.register_fake("cmim_kernels::loss_backward", _fake_loss_backward)
    torch.library.register_fake("cmim_kernels::class_centroids", _fake_class_centroids)
