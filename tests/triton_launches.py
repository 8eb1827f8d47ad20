"""Launches of the Triton backend, written down by a driver without a device: kernels are compiled only.

Run in a process of its own, by test_triton_compile.py, since Triton has one driver.
`python tests/triton_launches.py time` prints what a call takes of the host.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cmim_kernels.backends import triton as backend
from cmim_kernels.backends._triton.launch import kernel
from cmim_kernels.reference import MEAN, NONE

CLASSES, STREAM = 40, 7


class Launched(NamedTuple):
    kernel: str
    attributes: dict[Any, Any]  # of its compilation: which pointers are aligned
    grid: tuple[int, int, int]
    stream: int
    arguments: dict[str, tuple[str, Any]]  # by parameter: type in the machine code, value


launched: list[Launched] = []


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Driver:
    utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, *others: Any) -> None:
            arguments = others[-len(source.signature) :]  # after the function, its metadata and four hooks
            assert len(others) == 5 + len(arguments)
            named = dict(
                zip(source.signature, zip(source.signature.values(), arguments, strict=True), strict=True)
            )
            launched.append(Launched(source.fn.__name__, dict(source.attrs), (x, y, z), stream, named))

        return launch


def call(rows: int, first: int, reduction: int, ce_weight: float = 1.0) -> tuple[list[tuple[Any, ...]], int]:
    """What one call launches, both ways, pointers by what they point to; how many went by Triton's look-up.

    Of the cross entropy alone: its kernels are small. `first`: of the targets, 8 bytes from the one before.
    """
    logits, target = _LOGITS[:rows], _TARGET[first : first + rows]
    weight = torch.ones(CLASSES) if reduction == NONE else None
    arguments = (logits, target, (0.5, 1.0), (0.5, 0.5), weight, None, ce_weight, 0.0, 0.0, -100, reduction)
    launched.clear()
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as looked_up:
        value, saved = backend._loss(*arguments, True)
        grad = torch.ones_like(value)
        out = backend._loss_backward(grad, saved, *arguments)
    tensors = {"logits": logits, "target": target, "class_weight": weight, "saved": saved, "value": value}
    tensors |= {"grad": grad, "grad_logits": out}
    known = {t.data_ptr(): name for name, t in tensors.items() if t is not None}

    memory = [
        address(pointer)
        for launch in launched
        for name, (kind, pointer) in launch.arguments.items()
        if kind.startswith("*") and name != "table" and address(pointer) not in known
    ]

    def told(name: str, kind: str, argument: Any) -> Any:
        if not kind.startswith("*"):
            return type(argument), argument
        if name == "table":
            return address(argument)
        if address(argument) in known:
            assert known[address(argument)] == name
            return name
        return address(argument) - min(memory)

    told_of = [
        (*launch[:4], {name: told(name, *argument) for name, argument in launch.arguments.items()})
        for launch in launched
    ]
    return told_of, looked_up.call_count


def address(pointer: Tensor | int) -> int:
    return pointer.data_ptr() if isinstance(pointer, Tensor) else pointer


def main() -> None:
    driver.set_active(Driver())
    for case in ((8, 0, MEAN), (8, 1, MEAN), (8, 0, NONE)):
        first, looked_up = call(*case)
        assert 1 <= looked_up <= len(first) == 3, looked_up
        again, looked_up = call(*case)
        assert looked_up == 0, "a compiled kernel is launched as it is"
        assert first == again == call(*case)[0]

        other, looked_up = call(*case, ce_weight=0.75)
        assert looked_up == 0, "a weight is a number of the call's own"
        for before, after in zip(first[1:], other[1:], strict=True):
            assert before[4].pop("ce_weight") == (float, 1.0)
            assert after[4].pop("ce_weight") == (float, 0.75)
        assert other == first

        name, attributes, _, stream, arguments = first[0]
        assert (name, stream) == ("rows_kernel", STREAM)
        assert (arguments["logits"], arguments["counters"]) == ("logits", 0)
        assert bool(attributes[1,]) == (case[1] == 0), (
            "the target's address is a multiple of 16 bytes, or is not"
        )
    assert [len(kernel(name)._compiled) for name in ("rows.rows_kernel", "forward.forward_kernel")] == [3, 2]
    fewer, looked_up = call(5, 0, MEAN)
    assert looked_up == 0, "another number of rows is another kernel for nobody"
    assert [launch[4]["N"] for launch in fewer] == [(int, 5)] * 3


class _Silent(Driver):
    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def time_of_host(calls: int = 200, repeats: int = 25) -> None:
    """Prints what the operators take, both ways, at 256x1000 with 8 temperatures: medians of means."""
    driver.set_active(_Silent())
    logits, target = torch.randn(256, 1000), torch.arange(256) % 32
    numbers = (1.0, 1.0, 0.0, -100, MEAN)
    arguments = (logits, target, [k / 8 for k in range(1, 9)], [0.125] * 8, None, None, *numbers)
    grad = torch.ones(())

    def known() -> None:
        _, saved = backend.loss(*arguments, True)
        backend.loss_backward(grad, saved, *arguments)

    def new() -> None:
        """A shape that no call has had."""
        backend.calls.forward.cache_clear()
        backend.calls.backward.cache_clear()
        known()

    for step in (known, new):
        for _ in range(3):
            step()
        times = []
        for _ in range(repeats):
            start = perf_counter()
            for _ in range(calls):
                step()
            times.append((perf_counter() - start) / calls)
        print(f"{step.__name__} shape: {1e6 * statistics.median(times):.0f} us")


_LOGITS, _TARGET = torch.randn(8, CLASSES), torch.randint(0, 5, (9,))

if __name__ == "__main__":
    time_of_host() if "time" in sys.argv else main()
