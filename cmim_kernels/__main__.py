"""`python -m cmim_kernels`: versions, devices, and the backends with the reason for each that is not usable.

Environment variables that the package reads when it runs (those of its build are in setup.py):

| variable | values | effect |
|---|---|---|
| `CMIM_KERNELS_CPU_VARIANT` | `avx512`, `avx2`, `baseline` | the CPU kernels' instruction set, read once |
| `TRITON_INTERPRET` | `1` | Triton's kernels run in its interpreter, on CPU tensors; read once |
"""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import __version__, available_backends

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
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
