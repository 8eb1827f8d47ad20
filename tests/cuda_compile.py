"""The CUDA library compiled as setup.py does it, with the compiler's report of what every kernel takes.

`python -m tests.cuda_compile` prints the table of docs/performance_cuda.md, of every architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import setup


class Usage(NamedTuple):
    """Of one kernel on one architecture: registers per thread; bytes of stack and spills per thread."""

    kernel: str
    storage: str  # of the logits; the arithmetic's type for kernels that do not read them
    chunk: str  # temperatures at a time, and whether they are powers of one exponential
    architecture: str
    registers: int
    stack: int
    spills: int


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'\n.*\n"
    r"\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)
_STORAGES = {"f": "float32", "d": "float64", "NS0_6Half16E": "bfloat16, float16"}


def kernels() -> list[str]:
    """The names in the sources."""
    texts = [path.read_text() for path in sorted((setup.CSRC / "cuda").glob("*.cu"))]
    return [name for text in texts for name in re.findall(r"(\w+)\(const __grid_constant__", text)]


def usages(report: str) -> list[Usage]:
    """What `ptxas -v` says; names are mangled as the C++ ABI has it."""
    found = []
    for entry in _ENTRY.finditer(report):
        kernel = next(k for k in kernels() if f"{len(k)}{k}I" in entry["name"])
        arguments = entry["name"].split(f"{len(kernel)}{kernel}I")[1]
        kind = re.match(r"NS0_4KindI(NS0_6Half16E|f|d)[fd]Li(\d)ELb([01])EEE(Lb1E)?", arguments)
        again = kind is not None and kind[4] is not None
        found.append(
            Usage(
                f"{kernel}, again" if again else kernel,
                _STORAGES[kind[1] if kind else arguments[0]],
                f"{kind[2]} {'powers' if kind[3] == '1' else 'apart'}" if kind else "",
                entry["architecture"],
                int(entry["registers"]),
                int(entry["stack"]),
                int(entry["stores"]) + int(entry["loads"]),
            )
        )
    return found


def architectures() -> list[str]:
    """Those of CUDA_ARCH_LIST; else one of each generation, as the others take minutes more: 86, 89, 120."""
    return re.findall(r"\d+", os.environ.get("CUDA_ARCH_LIST", "80 90 100").replace(".", ""))


@cache
def compiled() -> list[Usage]:
    """Of every kernel on these architectures. Every warning is an error, on the device and on the host."""
    settings = {"CMIM_KERNELS_WERROR": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v", "MAX_JOBS": "2"}
    settings["CUDA_ARCH_LIST"] = " ".join(architectures())
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, settings):
        ninja = setup.NinjaFile(Path(folder))
        setup.add_cuda_library(ninja, Path(folder) / "_cuda.so", setup.find_torch())
        done = subprocess.run(ninja.write(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)
    return usages(done.stdout + done.stderr)


def table(found: list[Usage]) -> str:
    """Markdown: the registers of every kernel on every architecture, the most among its kinds."""
    reported = sorted({u.architecture for u in found}, key=lambda name: int(name.split("_")[1]))
    lines = ["| kernel | arithmetic | " + " | ".join(reported) + " |"]
    lines += ["|---|---|" + "---|" * len(reported)]
    for kernel in dict.fromkeys(u.kernel for u in found):
        for arithmetic in ("float32", "float64"):
            cells = [
                max(
                    u.registers
                    for u in found
                    if (u.kernel, u.architecture) == (kernel, architecture)
                    and (u.storage == "float64") == (arithmetic == "float64")
                )
                for architecture in reported
            ]
            lines.append(f"| `{kernel}` | {arithmetic} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_ARCH_LIST", " ".join(setup.CUDA_ARCHITECTURES))
    print(table(compiled()))
