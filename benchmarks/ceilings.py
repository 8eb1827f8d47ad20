"""What this machine can do at most, beside what the CPU kernel asks of it.

    python benchmarks/ceilings.py [--update FILE]

Measures float32 multiply-adds (a matrix product), bytes moved (a copy larger than the caches) and
exponentials with PyTorch on all its threads, and the fused loss at 1024x1000 in the same minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import update

from cmim_kernels import fused_cmi_loss

N, C, PRESENT, K = 1024, 1000, 128, 8
ROWS = N / PRESENT  # of a cluster
# Vector operations of the wide form (csrc/cpu/wide.h), counted in the source: per logit and temperature, per
# centroid entry and temperature (most of them its logarithm), and per logit.
PER_TEMPERATURE, PER_LOGIT = 10, 35
PER_CENTROID = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 22


def seconds(run: Callable[[], object], repeats: int = 15) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", type=Path, help="a Markdown file with the mark ceilings")
    options = parser.parse_args()

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big = torch.randn(1 << 25)
    to = torch.empty_like(big)
    fma = 1024**3 / seconds(lambda: torch.mm(a, b))
    copied = 2 * big.numel() * 4 / seconds(lambda: to.copy_(big))
    x = -torch.rand(1 << 16)
    y = torch.empty_like(x)
    exponentials = x.numel() / seconds(lambda: torch.exp(x, out=y), 200)

    logits = torch.randn(N, C, requires_grad=True)
    target = torch.randint(PRESENT, (N,))
    took = seconds(lambda: torch.autograd.grad(fused_cmi_loss(logits, target), logits), 60)
    lanes = K * (PER_TEMPERATURE + PER_CENTROID / ROWS) + PER_LOGIT
    table = "\n".join(
        [
            f"| {torch.get_num_threads()} threads | ceiling | a logit asks for | time at the ceiling |",
            "|---|---|---|---|",
            f"| lane operations (1 a multiply-add) | {fma / 1e9:.0f} G/s | {lanes:.0f} | "
            f"{N * C * lanes / fma * 1e6:.0f} us |",
            f"| bytes | {copied / 1e9:.1f} GB/s | 8 | {N * C * 8 / copied * 1e6:.0f} us |",
            f"| exponentials by `torch.exp` | {exponentials / 1e9:.2f} G/s | 1 | "
            f"{N * C / exponentials * 1e6:.0f} us |",
            f"| measured, {N}x{C}, {PRESENT} classes, K = {K} | | | {took * 1e6:.0f} us |",
        ]
    )
    print(table)
    if options.update:
        update(options.update, {"ceilings": table})


if __name__ == "__main__":
    main()
