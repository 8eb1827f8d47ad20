"""Launching kernels: what a kind of call launches is settled once, and started with little more than addresses.

Triton asks of every argument of every launch what it is, and compares every constant that the kernel's source
mentions with what it was: 0.1 ms and more of the host's time. What decides a compiled kernel is less here, since no
kernel specialises on its integers: constants, types, and whether pointers are aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import OPTIONS, Plan, interpreting

_ALIGNED = 16  # bytes, as Triton asks
# Every launch goes by Triton's look-up: the interpreter compiles nothing, and AMD's backend asks more of a pointer.
_LOOKED_UP = torch.version.hip is not None or interpreting()
_APART = 256  # bytes between the starts of what a call has in its memory, or a multiple


class Kernel:
    """One kernel, `module.function` of this package, and what was compiled of it."""

    def __init__(self, name: str) -> None:
        module, function = name.split(".")
        self.name = name
        self.function = getattr(import_module(f"{__package__}.{module}"), function)
        self.parameters: list[str] = self.function.arg_names
        # Those that machine code is made for; the interpreter makes none, and does not know them.
        constants = [] if interpreting() else [p.name for p in self.function.params if p.is_constexpr]
        self.constant = [name in constants for name in self.parameters]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def compiled(self, device: int | None, arguments: Sequence[Any]) -> Any:
        """The kernel for such arguments, or None; one argument may be a `Block` for a tensor that lies there."""
        return self._compiled.get(self._key(device, arguments))

    def look_up(self, device: int | None, programs: int, arguments: Sequence[Any]) -> None:
        """Enqueues so many programs as Triton does it, and keeps what it has compiled."""
        named = dict(zip(self.parameters, arguments, strict=True))
        made = self.function[(programs,)](**named, **OPTIONS)
        if hasattr(type(made), "__getitem__"):  # nothing from under a compilation hook, or a kernel's promise
            self._compiled[self._key(device, arguments)] = made

    def _key(self, device: int | None, arguments: Sequence[Any]) -> tuple[Any, ...]:
        return (device, *map(_decisive, self.constant, arguments))


def _decisive(constant: bool, argument: Any) -> Any:
    """What of an argument decides the compiled kernel."""
    if constant or argument is None:
        return argument
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNED == 0
    if isinstance(argument, Block):
        return argument.dtype, True
    return type(argument) is int and argument.bit_length() > 31


@cache
def kernel(name: str) -> Kernel:
    return Kernel(name)


class Launch(NamedTuple):
    """A kernel, its number of programs, and its arguments in order, those that calls bring left out.

    brought: (place among the arguments, name of what a call brings there).
    """

    kernel: Kernel
    programs: int
    arguments: list[Any]
    brought: list[tuple[int, str]]

    def filled(self, values: Mapping[str, Any]) -> list[Any]:
        arguments = self.arguments.copy()
        for place, name in self.brought:
            arguments[place] = values[name]
        return arguments


class Block(NamedTuple):
    """A tensor in the memory of a call."""

    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


class Schedule:
    """The launches of one kind of call, in order, and the memory between them.

    plan: the sizes; names: what calls bring, tensors and numbers; settled: arguments of all kernels that have them,
    by name.
    """

    def __init__(self, plan: Plan, names: Sequence[str], **settled: Any) -> None:
        self.plan = plan
        self.names = names
        self.settled = settled
        self.launches: list[Launch] = []
        self.memory: dict[str, Block] = {}
        self.size = 0  # bytes of it
        self.end = 0  # where the next of it goes
        self._started: dict[tuple[Any, ...], list[_Started]] = {}

    def room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        """Memory that kernels know by this name, which it returns; undefined at first."""
        self.memory[name] = Block(self.end, shape, dtype)
        self.end += -(-prod(shape) * dtype.itemsize // _APART) * _APART
        self.size = max(self.size, self.end)
        return name

    def launch(self, name: str, programs: int, **own: Any) -> None:
        """One launch more: `own` are arguments of this one, text names what the call brings or has room for.

        What is neither among these nor settled for all is brought, or lies in the memory, by the parameter's name.
        """
        known = kernel(name)
        values = self.settled | own
        arguments = [values.get(parameter, parameter) for parameter in known.parameters]
        brought = [(place, value) for place, value in enumerate(arguments) if type(value) is str]
        if unknown := own.keys() - set(known.parameters):
            raise TypeError(f"{name} does not take {unknown}")
        if unknown := {value for _, value in brought} - self.memory.keys() - set(self.names):
            raise TypeError(f"{name} takes {unknown}, which nobody brings")
        self.launches.append(Launch(known, programs, arguments, brought))

    def run(
        self, device: torch.device, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, float]
    ) -> None:
        """Enqueues the launches on the current stream of the tensors' device, the current one.

        Tensors and numbers in the same order at every call. Their types are one kind's of call, but for what this
        looks at: which tensors there are, and whether they are aligned.
        """
        memory = torch.empty(self.size, dtype=torch.uint8, device=device) if self.size else None
        addresses = [None if t is None else t.data_ptr() for t in tensors.values()]
        key = (*[None if p is None else p % _ALIGNED for p in addresses],)
        started = self._started.get(key)
        if started is None:
            started = self._compiled(device, {**tensors, **self.memory, **numbers})
            if started is None:
                self._look_up(device, {**tensors, **self._views(memory), **numbers})
                return
            self._started[key] = started
        if memory is not None:
            base = memory.data_ptr()
            addresses += [base + block.start for block in self.memory.values()]
        values = (*addresses, *numbers.values())
        for runner, arguments, brought in started:
            filled = arguments.copy()
            for place, source in brought:
                filled[place] = values[source]
            runner(*filled)

    def _compiled(self, device: torch.device, values: Mapping[str, Any]) -> list[_Started] | None:
        """All launches as compiled, where they are."""
        if _LOOKED_UP:
            return None
        order = {name: i for i, name in enumerate(values)}
        started = []
        for launch in self.launches:
            compiled = launch.kernel.compiled(device.index, launch.filled(values))
            if compiled is None:
                return None
            brought = [(place, order[name]) for place, name in launch.brought]
            started.append((compiled[launch.programs, 1, 1], launch.arguments, brought))
        return started

    def _look_up(self, device: torch.device, values: Mapping[str, Any]) -> None:
        for launch in self.launches:
            launch.kernel.look_up(device.index, launch.programs, launch.filled(values))

    def _views(self, memory: Tensor | None) -> dict[str, Tensor]:
        """The memory as tensors."""
        if memory is None:
            return {}
        return {
            name: memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (start, shape, dtype) in self.memory.items()
        }


_Started = tuple[Callable[..., None], list[Any], list[tuple[int, int]]]
