"""Whether a backend computes the loss right on this machine: small batches against the reference in float64.

The kernels for GPUs were proved by compilers, an emulator and an interpreter; drivers, compilers and devices
differ. So `auto` trusts one only after this check, once for each process and device, which waits for the
device: some milliseconds, and for Triton, until its kernels are in its cache, a minute or two of compiling.
`python -m cmim_kernels --check` runs it for every backend that is usable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .backends import Backend
from .reference import MEAN, NONE, SPECTRUM, reference_loss

_EIGHT = tuple(k / 8 for k in range(1, 9))
_APART = (0.07, 0.3, 0.55, 1.0, 1.7)  # multiples of nothing


class _Batch(NamedTuple):
    rows: int
    logits: int
    present: int  # classes
    spread: float  # of the rows of a class
    a: tuple[float, ...] = _EIGHT
    reduction: int = MEAN
    dtype: torch.dtype = torch.float32


# Small and large clusters, wide and collapsed, whole and partial tiles, every reduction
_BATCHES = (
    _Batch(64, 1000, 20, 1.0),
    _Batch(96, 101, 5, 1e-3),
    _Batch(96, 513, 7, 0.3, _APART),
    _Batch(300, 10, 2, 1.0, reduction=SPECTRUM),
    _Batch(50, 37, 9, 0.5, reduction=NONE),
    _Batch(4200, 12, 8, 1.0),
    _Batch(64, 256, 8, 0.5, dtype=torch.bfloat16),
)


def mismatch(backend: Backend, device: str) -> str | None:
    """What a backend gets wrong on `device`, in words; None if everything is right."""
    # Whatever the first call is made in: modes of the dispatcher, transforms of torch.func
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with (
        torch.no_grad(),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
        _waiting_allowed(device),
    ):
        for batch in _BATCHES:
            try:
                wrong = _compare(backend, device, batch)
            except torch.OutOfMemoryError:  # no fault of the backend
                raise
            except Exception as error:  # compilers and drivers have their own, of any kind
                wrong = f"it raised {type(error).__name__}: {error}"
            if wrong is not None:
                return f"on {batch.rows}x{batch.logits} {batch.dtype} logits {wrong}"
    return None


@contextmanager
def _waiting_allowed(device: str) -> Iterator[None]:
    """Whatever the caller has said of calls that wait for the device."""
    mode = torch.cuda.get_sync_debug_mode() if device.startswith("cuda") else 0
    if mode == 0:
        yield
        return
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _compare(backend: Backend, device: str, batch: _Batch) -> str | None:
    generator = torch.Generator("cpu").manual_seed(0)
    # whatever the caller's defaults are
    plain: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    target = torch.randint(batch.present, (batch.rows,), generator=generator, device="cpu")
    centres = 2 * torch.randn(batch.present, batch.logits, **plain)
    noise = torch.randn(batch.rows, batch.logits, **plain)
    logits = (centres[target] + batch.spread * noise).to(batch.dtype)
    target[::7] = -100
    k = len(batch.a)
    values = {NONE: (batch.rows,), SPECTRUM: (k,)}.get(batch.reduction, ())
    upstream = 0.5 + torch.rand(values, **plain)
    ce_weight = 0.0 if batch.reduction == SPECTRUM else 1.0
    rest = (batch.a, (1 / k,) * k, None, None, ce_weight, 1.0, 0.0, -100, batch.reduction)

    z, y = logits.to(device), target.to(device)
    value, saved = backend.loss(z, y, *rest, True)
    gradient = backend.loss_backward(upstream.to(device), saved, z, y, *rest)

    exact = logits.double()
    with torch.enable_grad():
        exact.requires_grad_()
        truth = reference_loss(exact, target, *rest)
        (slope,) = torch.autograd.grad(truth, exact, upstream.double())
    # An entry's own rounding, in its dtype, and what float32 arithmetic may lose
    eps = torch.finfo(batch.dtype).eps
    return _off("the loss", value, truth.detach(), 1e-5) or _off("the gradient", gradient, slope, 1e-4 + eps)


def _off(what: str, out: Tensor, truth: Tensor, accepted: float) -> str | None:
    error = float((out.cpu().double() - truth).norm() / truth.norm())
    return (
        None
        if error <= accepted
        else f"{what} is off by {error:.1e} (2-norm, relative; {accepted:.0e} is accepted)"
    )
