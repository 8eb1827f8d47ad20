"""Who computes a call: the backend asked for, or with `auto` the fastest that serves the logits' device."""

from __future__ import annotations

import warnings
from importlib import import_module

import torch
from torch import Tensor

from .backends import Backend

REFERENCE = "reference"
NATIVE = ("cpu", "cuda", "triton")
NAMES = ("auto", *NATIVE, REFERENCE)
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# Filled on first use, so that importing the package initialises no device.
_usable_on: dict[str, tuple[Backend, ...]] = {}


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if this process can use it, else the reason why it cannot."""
    return {name: _backend(name).unusable() for name in NATIVE} | {REFERENCE: None}


def pick(name: str, logits: Tensor, temperatures: int) -> Backend | None:
    """The backend for this call; None stands for the reference.

    `name` is one of `NAMES`. `auto` never fails: it falls back to the reference. Any other name is served or
    raises.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend asked for is unusable in this process or cannot serve this call; says why.
    """
    if name == "auto":
        usable = _usable_on.get(logits.device.type)
        for backend in _find_usable(logits.device.type) if usable is None else usable:
            if backend.refuses(logits, temperatures) is None:
                return backend
        return None
    if name == REFERENCE:
        return None
    if name not in NATIVE:
        raise ValueError(f"backend must be one of {list(NAMES)}, got {name!r}")
    backend = _backend(name)
    reason = backend.unusable() or backend.refuses(logits, temperatures)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    return backend


@torch.compiler.disable
def _find_usable(device: str) -> tuple[Backend, ...]:
    candidates = [_backend(name) for name in _PREFERENCE.get(device, ())]
    reasons = {backend.NAME: backend.unusable() for backend in candidates}
    usable = tuple(backend for backend in candidates if reasons[backend.NAME] is None)
    if candidates and not usable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"cmim_kernels uses its slow reference for {device} tensors: {why}", stacklevel=4)
    _usable_on[device] = usable
    return usable


def _backend(name: str) -> Backend:
    module: Backend = import_module(f"{__package__}.backends.{name}")  # type: ignore[assignment]
    return module
