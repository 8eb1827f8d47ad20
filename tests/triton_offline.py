"""Triton kernels compiled without a GPU: exactly the launches that a call makes, recorded instead of run.

    launches = CASES["256x1000"].launches()        # in a process that does not interpret
    usage = used(compiled(launches[0], cuda(90)))   # registers, spills, shared memory on sm_90

`python tests/triton_offline.py` prints the table of docs/performance_triton.md.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cmim_kernels.backends import triton as backend
from cmim_kernels.backends._triton.launch import Block, Schedule, kernel
from cmim_kernels.backends._triton.plan import OPTIONS
from cmim_kernels.reference import MEAN, NONE, SPECTRUM

SHARED_LIMIT = 99 * 1024  # what a program may have on consumer cards
_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """What decides the machine code of one launch; hashable and picklable."""

    kernel: str  # module.function in cmim_kernels.backends._triton
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]


class Usage(NamedTuple):
    """What the machine code takes; registers per thread, the rest in bytes, stack and local (spills) per thread."""

    registers: int
    stack: int
    local: int
    shared: int


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make, none of them made."""
    launches: list[Launch] = []

    def record(
        self: Schedule, _: object, tensors: dict[str, Tensor | None], numbers: dict[str, float]
    ) -> None:
        values = {**tensors, **self.memory, **numbers}
        for launch in self.launches:
            known = launch.kernel
            annotations = known.function.fn.__annotations__
            signature, constants = [], []
            arguments = zip(known.parameters, known.constant, launch.filled(values), strict=True)
            for name, constant, value in arguments:
                if value is None or constant:
                    signature.append((name, "constexpr"))
                    constants.append((name, value))
                elif isinstance(value, Tensor | Block):
                    signature.append((name, _POINTERS[value.dtype]))
                elif isinstance(value, float):
                    signature.append((name, "fp32"))
                else:
                    narrow = -(2**31) <= value < 2**31 and annotations.get(name) is not tl.int64
                    signature.append((name, "i32" if narrow else "i64"))
            launches.append(Launch(known.name, tuple(signature), tuple(constants)))

    with mock.patch.object(Schedule, "run", record):
        call()
    return launches


def cuda(arch: int) -> GPUTarget:
    """sm_<arch>."""
    return GPUTarget("cuda", arch, 32)


MI300 = GPUTarget("hip", "gfx942", 64)
_FIRST = cuda(80)


@cache
def compiled(launch: Launch, target: GPUTarget) -> Any:
    """Triton's kernel, every stage of it in `asm`, with pointers aligned as torch aligns them.

    NVIDIA's other architectures begin with the first one's Triton IR, which knows of none of them.
    """
    if target.backend == "cuda" and target != _FIRST:
        with tempfile.TemporaryDirectory() as folder:
            shared = Path(folder) / "kernel.ttir"
            shared.write_text(compiled(launch, _FIRST).asm["ttir"])
            return triton.compile(str(shared), target=target, options=OPTIONS)
    types = dict(launch.signature)
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
    source = ASTSource(kernel(launch.kernel).function, types, dict(launch.constants), aligned)
    options = dict(OPTIONS)
    if target.backend == "hip":
        del options["maxnreg"]
    return triton.compile(source, target=target, options=options)


def used(kernel: Any) -> Usage:
    """What a kernel for an NVIDIA device takes."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        report = subprocess.run(
            [str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(found["REG"], found["STACK"], found["LOCAL"], kernel.metadata.shared)


class Case(NamedTuple):
    """A call whose launches are compiled; shapes as in the benchmarks."""

    n: int
    c: int
    dtype: torch.dtype = torch.float32
    inverse_temperatures: tuple[float, ...] = tuple(k / 8 for k in range(1, 9))
    reduction: int = MEAN
    given: bool = False
    weight: bool = False
    smoothing: float = 0.0
    strided: bool = False
    ce_weight: float = 1.0
    cmi_weight: float = 1.0

    def forward(self) -> list[Launch]:
        return recorded(lambda: backend._loss(*self._arguments(), True))

    def backward(self) -> list[Launch]:
        k = len(self.inverse_temperatures)
        shape = {NONE: (self.n,), SPECTRUM: (k,)}.get(self.reduction, ())
        grad, saved = torch.empty(shape, device="meta"), torch.empty(0, device="meta")
        return recorded(lambda: backend._loss_backward(grad, saved, *self._arguments()))

    def centroids(self) -> list[Launch]:
        """Those of `class_centroids`."""
        logits, target, a, *_ = self._arguments()
        return recorded(lambda: backend._class_centroids(logits, target, a, -100))

    def launches(self) -> list[Launch]:
        return self.forward() + self.backward()

    def _arguments(self) -> tuple[Any, ...]:
        """Tensors that hold nothing: whatever would have to wait for a device's data fails on them."""
        k = len(self.inverse_temperatures)
        with torch.device("meta"):
            logits = torch.empty((self.n, self.c), dtype=self.dtype)
            if self.strided:
                logits = torch.empty((self.c, self.n), dtype=self.dtype).T
            target = torch.empty(self.n, dtype=torch.int64)
            weight = torch.empty(self.c) if self.weight else None
            centroids = torch.empty(k, self.c, self.c) if self.given else None
        numbers = (self.ce_weight, self.cmi_weight, self.smoothing, -100, self.reduction)
        return logits, target, self.inverse_temperatures, (1 / k,) * k, weight, centroids, *numbers


def _uniform(k: int) -> tuple[float, ...]:
    return tuple(i / k for i in range(1, k + 1))


# The shapes of the benchmarks, and for every other option the launches that differ.
CASES = {
    "256x1000": Case(256, 1000),
    "8192x32768 bfloat16": Case(8192, 32768, torch.bfloat16),
    "4096x10": Case(4096, 10),
    "4096x1000 float16, 5 temperatures apart": Case(4096, 1000, torch.float16, (0.07, 0.3, 0.55, 1.0, 1.7)),
    "256x1000, 16 temperatures": Case(256, 1000, inverse_temperatures=_uniform(16)),
    "256x1000, 64 temperatures": Case(256, 1000, inverse_temperatures=_uniform(64)),
    "256x1000, 1 temperature": Case(256, 1000, inverse_temperatures=(1.0,)),
    "256x1000, rows": Case(256, 1000, reduction=NONE),
    "8192x32768 bfloat16, rows": Case(8192, 32768, torch.bfloat16, reduction=NONE),
    "256x1000, spectrum": Case(256, 1000, reduction=SPECTRUM),
    "256x1000, centroids": Case(256, 1000, given=True),
    "256x1000 strided, weights and smoothing": Case(256, 1000, weight=True, smoothing=0.1, strided=True),
}


def table(arches: tuple[int, ...] = (80, 90, 100)) -> str:
    """Markdown: registers / shared memory of every kernel of every case."""
    lines = ["| call | kernel | " + " | ".join(f"sm_{arch}" for arch in arches) + " |"]
    lines += ["|---|---|" + "---:|" * len(arches)]
    seen: set[Launch] = set()
    for name, case in CASES.items():
        for launch in case.launches():
            if launch in seen:
                continue
            seen.add(launch)
            usages = [used(compiled(launch, cuda(arch))) for arch in arches]
            cells = [
                f"{u.registers} / {u.shared / 1024:.1f} KB"
                + f" (spills {u.stack + u.local})" * (u.stack + u.local > 0)
                for u in usages
            ]
            lines.append(f"| {name} | {launch.kernel.split('.')[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
