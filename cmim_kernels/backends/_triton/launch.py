"""Launching kernels: through Triton's own look-up the first time, then as compiled.

Triton asks of every argument of every launch what it is, and compares every constant that the kernel's source
mentions with what it was: 0.1 ms and more of the host's time. What decides a compiled kernel is less here, since no
kernel specialises on its integers: constants, types, and whether pointers are aligned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .plan import OPTIONS, interpreting

_ALIGNED = 16  # bytes, as Triton asks


class Launcher:
    """One kernel, `module.function` of this package, and what was compiled of it."""

    def __init__(self, kernel: str) -> None:
        module, name = kernel.split(".")
        self.function = getattr(import_module(f"{__package__}.{module}"), name)
        self.names: list[str] = self.function.arg_names
        # Those that machine code is made for; the interpreter makes none, and does not know them.
        self.constants = [] if interpreting() else [p.name for p in self.function.params if p.is_constexpr]
        # AMD's backend asks more of a pointer.
        self.keeps = torch.version.hip is None and not interpreting()
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        device: int | None,
        programs: int,
        tensors: Sequence[Tensor | None],
        arguments: Mapping[str, Any],
    ) -> None:
        """Enqueues so many programs on the current stream of a device, the current one.

        tensors: the kernel's first arguments; arguments: those that follow, by name.
        """
        if not self.keeps:
            self.function[(programs,)](*tensors, **arguments, **OPTIONS)
            return
        rest = [arguments[name] for name in self.names[len(tensors) :]]
        key = (
            device,
            *[None if t is None else (t.dtype, t.data_ptr() % _ALIGNED == 0) for t in tensors],
            *[arguments[name] for name in self.constants],
            *[x.bit_length() > 31 for x in rest if type(x) is int],
        )
        kernel = self.compiled.get(key)
        if kernel is not None:
            kernel[programs, 1, 1](*tensors, *rest)
            return
        made = self.function[(programs,)](*tensors, **arguments, **OPTIONS)
        if hasattr(type(made), "__getitem__"):  # nothing from under a compilation hook, or a kernel's promise
            self.compiled[key] = made


@cache
def launcher(kernel: str) -> Launcher:
    return Launcher(kernel)
