"""Small calls of the CUDA kernels for compute-sanitizer: every kind of kernel, dtype and form once.

    compute-sanitizer --tool racecheck python benchmarks/gpu_cases.py [fused | tiled] [DTYPE ...]

By default both kinds and all dtypes. Values are compared with the reference, loosely: tests/ judges accuracy.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from cmim_kernels.backends import cuda
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, reference_loss

PATHS = {"fused": 1, "tiled": 2}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
POWERS, APART = (0.25, 0.5, 0.75, 1.0), (0.3, 1.7)  # with a common base, and without one
SMALL, WIDE = (23, 37), (9, 600)


class Form(NamedTuple):
    grid: tuple[float, ...]
    reduction: int
    spread: float  # of a class's rows; 1e-3: it has collapsed
    shape: tuple[int, int] = SMALL
    given: bool = False  # the centroids are


FORMS = [
    Form(POWERS, MEAN, 1.0),
    Form(POWERS, NONE, 1e-3),
    Form(APART, MEAN, 1e-3, given=True),
    Form(APART, NONE, 1.0),
]
MORE = [  # in float32 and bfloat16
    Form(POWERS, SPECTRUM, 1.0),
    Form(APART, MEAN, 1e-3),
    Form(POWERS, NONE, 1.0, given=True),
    Form(POWERS, MEAN, 1.0, WIDE),
    Form(APART, NONE, 1e-3, WIDE),
]


def batch(spread: float, n: int, c: int) -> tuple[Tensor, Tensor]:
    """Three classes and an ignored row; made on the CPU, so that no other kernel than ours is checked."""
    g = torch.Generator().manual_seed(0)
    target = torch.arange(n) % 5 // 2
    logits = torch.randn(3, c, generator=g)[target] + spread * torch.randn(n, c, generator=g)
    target[3] = -100
    return logits, target


def run(form: Form, dtype: torch.dtype) -> None:
    """Forward and backward; the value is that of the reference."""
    host, labels = batch(form.spread, *form.shape)
    host = host.to(dtype)
    logits, target = host.cuda(), labels.cuda()
    k, c = len(form.grid), host.shape[1]
    given = centroids = None  # on the host, on the device
    if form.given:
        given = torch.softmax(torch.randn(k, c, c, dtype=torch.float64), -1)
        centroids = given.to(torch.promote_types(dtype, torch.float32)).cuda()
    weights = [1 / k] * k
    numbers = (1.0, 1.0, 0.1, -100, form.reduction)
    value, saved = cuda.loss(logits, target, form.grid, weights, None, centroids, *numbers, True)
    upstream = torch.ones(value.shape, dtype=value.dtype).cuda()
    gradient = cuda.loss_backward(
        upstream, saved, logits, target, form.grid, weights, None, centroids, *numbers
    )
    truth = reference_loss(host.double(), labels, form.grid, weights, None, given, *numbers)
    torch.testing.assert_close(value.cpu().double(), truth, rtol=1e-3, atol=1e-6)
    assert gradient.cpu().isfinite().all()


def main(words: list[str]) -> None:
    unknown = set(words) - {*PATHS, *DTYPES}
    why = f"unknown: {', '.join(sorted(unknown))}" if unknown else cuda.unusable()
    if why is not None:
        raise SystemExit(f"gpu_cases.py: {why}")
    calls = 0
    for path in [p for p in PATHS if p in words] or PATHS:
        torch.ops.cmim_kernels.set_cuda_path(PATHS[path])
        for name in [d for d in DTYPES if d in words] or DTYPES:
            forms = FORMS + (MORE if name in ("float32", "bfloat16") else [])
            for form in forms:
                run(form, DTYPES[name])
            logits, target = batch(1.0, *SMALL)
            for grid in (POWERS, APART) if path == "tiled" else ():  # there is one kind of kernel for these
                cuda.class_centroids(logits.to(DTYPES[name]).cuda(), target.cuda(), grid, -100)
                calls += 1
            calls += len(forms)
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main(sys.argv[1:])
