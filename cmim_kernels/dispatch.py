"""Who computes a call: the backend asked for, or with `auto` the fastest that serves the logits' device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backends import Backend
from .selfcheck import mismatch

Function = TypeVar("Function", bound=Callable[..., Any])

REFERENCE = "reference"
NATIVE = ("cpu", "cuda", "triton")
NAMES = ("auto", *NATIVE, REFERENCE)
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_CHECKED_FIRST = ("cuda", "triton")  # by selfcheck.py, before `auto` trusts them

# Filled on first use, so that importing the package initialises no device.
_modules: dict[str, Backend] = {}
_untrusted_on: dict[tuple[str, str], str | None] = {}  # (backend, device) -> why not
_warned: set[str] = set()


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if this process can use it, else the reason why it cannot."""
    return {name: _why_unusable(name) for name in NATIVE} | {REFERENCE: None}


def check_backend(name: str) -> None:
    """Raises ValueError where there is no such backend."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {list(NAMES)}, got {name!r}")


def pick(name: str, logits: Tensor, temperatures: int) -> Backend | None:
    """The backend for this call; None stands for the reference.

    `name` is one of `NAMES`. `auto` falls back to the reference, with a warning. A backend that is named is
    used, or an error says why not.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend asked for is unusable in this process or cannot serve this call; says why.
            `auto` would have to choose while a CUDA graph is captured.
    """
    if name == "auto":
        # a device object costs as much as the rest
        kind, device = ("cpu", "cpu") if logits.is_cpu else (logits.device.type, str(logits.device))
        candidates = _PREFERENCE.get(kind, ())
        for candidate in candidates:
            if _why_untrusted(candidate, device) is None:
                module = _modules[candidate]
                if module.refuses(logits, temperatures) is None:
                    return module
        untrusted = {candidate: _why_untrusted(candidate, device) for candidate in candidates}
        trusted = [candidate for candidate, reason in untrusted.items() if reason is None]
        if trusted:
            refusals = {candidate: _modules[candidate].refuses(logits, temperatures) for candidate in trusted}
            _warn_of_reference("this call", _reasons(refusals))
        elif kind != "meta":  # which computes nothing
            _warn_of_reference(f"{kind} tensors", _reasons(untrusted) or "no other backend serves them")
        return None
    if name == REFERENCE:
        return None
    check_backend(name)
    reason = _why_unusable(name) or _modules[name].refuses(logits, temperatures)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}")
    return _modules[name]


def _constant_to_the_compiler(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which imports the whole compiler to set this attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _reasons(reasons: Mapping[str, str | None]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


@_constant_to_the_compiler
def _warn_of_reference(what: str, why: str) -> None:
    """Once for every reason."""
    if why not in _warned:
        _warned.add(why)
        message = f"cmim_kernels uses its slow reference for {what} ({why})"
        warnings.warn(message, stacklevel=_frames_to_the_caller())


def _frames_to_the_caller() -> int:
    """As `stacklevel`: how far up the first function is that is not of this package or a module's call."""
    frame, level = sys._getframe(1), 1
    passed_by = (f"{__package__}.", "torch.nn.modules.")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(passed_by):
        frame, level = frame.f_back, level + 1
    return level


@_constant_to_the_compiler
def _why_untrusted(name: str, device: str) -> str | None:
    """For `auto`: why it is not usable, or what it gets wrong on this device. Found out once, when it is the
    first that may serve a call; devices of one kind may differ in what runs on them.
    """
    key = name, device
    if key in _untrusted_on:
        return _untrusted_on[key]
    if device.startswith("cuda") and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'auto' holds a backend against the reference on its first use, which cannot be done "
            "while a CUDA graph is captured: call the loss once before, or name a backend"
        )
    reason = _why_unusable(name)
    if reason is None and name in _CHECKED_FIRST:
        wrong = mismatch(_modules[name], device)
        reason = wrong and f"it fails its check on this machine: {wrong}"
    _untrusted_on[key] = reason
    return reason


@_constant_to_the_compiler
def _why_unusable(name: str) -> str | None:
    """Imports the backend's module and asks it."""
    if name not in _modules:
        _modules[name] = import_module(f"{__package__}.backends.{name}")
    return _modules[name].unusable()
