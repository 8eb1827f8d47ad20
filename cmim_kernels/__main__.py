"""`python -m cmim_kernels`: versions, devices, and the backends with the reason for each that is not usable.

With `--check`, every usable backend computes small batches, which are held against the reference in float64.

Environment variables that the package reads when it runs (those of its build are in setup.py):

| variable | values | effect |
|---|---|---|
| `CMIM_KERNELS_CPU_VARIANT` | `avx512`, `avx2`, `baseline` | the CPU kernels' instruction set, read once |
| `TRITON_INTERPRET` | `1` | Triton's kernels run in its interpreter, on CPU tensors; read once |
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import import_module

import torch

from . import __version__, available_backends
from .backends import cpu
from .dispatch import REFERENCE
from .selfcheck import mismatch

VARIABLES = ("CMIM_KERNELS_CPU_VARIANT", "TRITON_INTERPRET")


def report() -> str:
    """The text that `python -m cmim_kernels` prints; what to attach to a bug report."""
    lines = [
        f"cmim_kernels {__version__}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'}",
        f"Python {platform.python_version()}, {platform.platform()}",
        f"CPU: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    ]
    count = torch.cuda.device_count()
    lines += [f"GPU {i}: {torch.cuda.get_device_name(i)}" for i in range(count)] or ["GPU: none visible"]
    lines.append("backends:")
    for name, reason in available_backends().items():
        lines.append(f"  {name:<10} {'usable' if reason is None else 'not usable: ' + reason}")
        if name == "cpu" and reason is None and cpu.why_dispatched is not None:
            lines[-1] += f", each call some 20 microseconds later than need be: {cpu.why_dispatched}"
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(lines)


def check() -> tuple[str, bool]:
    """What `--check` adds, and whether every usable backend passed."""
    lines, passed = ["check against the reference:"], True
    for name, reason in available_backends().items():
        if reason is not None or name == REFERENCE:
            continue
        backend = import_module(f"{__package__}.backends.{name}")
        on_cpu = backend.refuses(torch.zeros(1, 1), 1) is None
        wrong = mismatch(backend, "cpu" if on_cpu else "cuda")
        lines.append(f"  {name:<10} {wrong or 'right'}")
        passed = passed and wrong is None
    return "\n".join(lines), passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cmim_kernels", description="versions, devices, backends")
    parser.add_argument(
        "--check", action="store_true", help="compare every usable backend with the reference"
    )
    options = parser.parse_args(arguments)
    sys.stdout.write(report() + "\n")
    if not options.check:
        return 0
    text, passed = check()
    sys.stdout.write(text + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
