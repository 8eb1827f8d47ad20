"""Small calls of the CUDA kernels for compute-sanitizer: every form, reduction, dtype and kernel once.

    compute-sanitizer --tool racecheck python benchmarks/gpu_cases.py

Results are compared with the reference, loosely: tests/ judges accuracy.
"""

from __future__ import annotations

from itertools import product

import torch

from cmim_kernels.backends import cuda
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, reference_loss

FUSED, TILED = 1, 2
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GRIDS = {"powers": (0.25, 0.5, 0.75, 1.0), "apart": (0.3, 1.7)}


def batch(spread: float, n: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes and an ignored row; made on the CPU, so that no other kernel than ours is checked."""
    g = torch.Generator().manual_seed(0)
    target = torch.arange(n) % 5 // 2
    logits = torch.randn(3, c, generator=g)[target] + spread * torch.randn(n, c, generator=g)
    target[3] = -100
    return logits, target


def main() -> None:
    why = cuda.unusable()
    if why is not None:
        raise SystemExit(f"gpu_cases.py: {why}")
    calls = 0
    shapes = ((23, 37), (9, 1300))
    for path, (n, c), dtype, grid, spread, reduction in product(
        (FUSED, TILED), shapes, DTYPES, GRIDS.values(), (1.0, 1e-3), (MEAN, NONE, SPECTRUM)
    ):
        if dtype in (torch.float64, torch.float16) and (c > 1000 or reduction == SPECTRUM):
            continue
        torch.ops.cmim_kernels.set_cuda_path(path)
        host, labels = batch(spread, n, c)
        host = host.to(dtype)
        logits, target = host.cuda(), labels.cuda()
        weights = [1 / len(grid)] * len(grid)
        numbers = (1.0, 1.0, 0.1, -100, reduction)
        value, saved = cuda.loss(logits, target, grid, weights, None, None, *numbers, True)
        upstream = torch.ones(value.shape, dtype=value.dtype).cuda()
        gradient = cuda.loss_backward(upstream, saved, logits, target, grid, weights, None, None, *numbers)
        truth = reference_loss(host.double(), labels, grid, weights, None, None, *numbers)
        torch.testing.assert_close(value.cpu().double(), truth, rtol=1e-3, atol=1e-6)
        assert gradient.cpu().isfinite().all()
        calls += 1
    for dtype in DTYPES:
        host, labels = batch(1.0, 23, 37)
        logits, target, grid = host.to(dtype).cuda(), labels.cuda(), GRIDS["apart"]
        cuda.class_centroids(logits, target, grid, -100)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        given = torch.softmax(torch.randn(2, 37, 37, dtype=compute), -1).cuda()
        cuda.loss(logits, target, grid, [0.5, 0.5], None, given, 1.0, 1.0, 0.0, -100, MEAN, True)
        calls += 2
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
