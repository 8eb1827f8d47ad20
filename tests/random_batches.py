"""Batches, options and temperatures drawn at random, and what the reference says of them.

Combinations that no list of cases thinks of. `test_random_batches.py` tries a few; for many, from `tests/`:

    python random_batches.py cpu --seconds 600
    python random_batches.py emulated-fused                        # or emulated-tiled: the CUDA kernels
    TRITON_INTERPRET=1 python random_batches.py triton --large
    python random_batches.py cuda --device cuda --first 100000
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from calls import REDUCTIONS
from torch import Generator, Tensor

import cmim_kernels as ck
from cmim_kernels import dispatch, reference, testing

ROUNDINGS = 64  # of the numbers that a result is made of, which it may be off by beside the budget
ROWS, CLASSES = (1, 2, 2, 3, 5, 8, 13, 30, 50), (1, 2, 3, 4, 7, 10, 16, 17, 33, 47, 65, 100, 129, 200, 257)
LARGE_ROWS = (2, 9, 33, 64, 65, 100, 130, 200)
LARGE_CLASSES = (2, 37, 257, 300, 513, 600, 1000, 1025, 1500, 2049, 3000)
ELEMENTS, LARGE_ELEMENTS = 4000, 60000
KINDS = REDUCTIONS | {"spectrum": reference.SPECTRUM}


def _wide(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    return r.choice([1.0, 3.0, 10.0, 1000.0]) * z


def _sure(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    return z + r.choice([10, 20, 40]) * F.one_hot(y, z.shape[1])


def _wrongly_sure(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    return z + 20 * F.one_hot(torch.zeros_like(y), z.shape[1])


def _collapsed(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    c = z.shape[1]
    return 2 * torch.randn(c, c, generator=g)[y] + 10 ** r.uniform(-6, 0) * z


def _shifted(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    return z + 30 * torch.randn(len(z), 1, generator=g)


def _ties(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    return z.sign() if r.random() < 0.7 else torch.full_like(z, 0.7)


def _masked(r: random.Random, g: Generator, z: Tensor, y: Tensor) -> Tensor:
    """In some rows or, the same classes, in whole clusters; never the label."""
    n, c = z.shape
    some = torch.rand(n, c, generator=g) if r.random() < 0.5 else torch.rand(c, c, generator=g)[y]
    mask = r.choice([-torch.inf, -torch.inf, -3e38, -1e9, -1e4])
    return torch.where((some < 0.25) & (F.one_hot(y, c) == 0), mask, z)


LOGITS: tuple[Callable[[random.Random, Generator, Tensor, Tensor], Tensor], ...] = (
    _wide,
    _wide,
    _sure,
    _wrongly_sure,
    _collapsed,
    _shifted,
    _ties,
    _masked,
)


def _spectrum(r: random.Random) -> ck.TemperatureSpectrum:
    spectrum = ck.TemperatureSpectrum
    return r.choice(
        [
            lambda: spectrum.uniform(1.0, 8),
            lambda: spectrum.uniform(1.0, 8),
            lambda: spectrum.uniform(10 ** r.uniform(-0.5, 1), r.choice([3, 4, 7, 16, 33])),
            lambda: spectrum([10 ** r.uniform(-1.5, 1.5)]),
            lambda: spectrum.geometric(10 ** r.uniform(-1, 0), 10 ** r.uniform(0.1, 1.5), 5),
            lambda: spectrum.gauss_legendre(10 ** r.uniform(-0.5, 0.7), r.choice([2, 5, 8])),
            lambda: spectrum([10 ** r.uniform(-3, -1) for _ in range(r.choice([1, 2, 3]))]),
            lambda: spectrum([10 ** r.uniform(-4, 6) for _ in range(r.choice([1, 2, 5]))]),
            lambda: spectrum(r.choice([[0.5, 1.0, 2.0], [1.0, 1.0]])),
        ]
    )()


def _strided(r: random.Random, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers, not always next to each other."""
    n, c = z.shape
    layout = r.choice(["dense", "dense", "columns apart", "a slice of wider rows", "every other row"])
    if layout == "columns apart":
        z = z.t().contiguous().t()
    elif layout == "a slice of wider rows":
        first = r.choice([1, 2, 4, 8])
        z = torch.cat([z.new_full((n, first), torch.nan), z], 1)[:, first:]
    elif layout == "every other row":
        z, y = torch.stack([z, z.new_full((n, c), torch.nan)], 1)[:, 0], torch.stack([y, y + c], 1)[:, 0]
    return z, y


@dataclass(frozen=True)
class Case:
    """One call, all on the CPU."""

    text: str
    logits: Tensor
    target: Tensor
    spectrum: ck.TemperatureSpectrum
    centroids: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    ce_weight: float
    cmi_weight: float
    reduction: str
    upstream: Tensor

    def run(self, backend: str, device: str) -> tuple[Tensor, Tensor]:
        """Value and gradient by the public functions."""
        y = self.target.to(device)
        centroids = None if self.centroids is None else self.centroids.to(device)

        def call(z: Tensor) -> Tensor:
            if self.reduction == "spectrum":
                return ck.cmi_spectrum(z, y, temperatures=self.spectrum, centroids=centroids, backend=backend)
            return ck.fused_cmi_loss(
                z,
                y,
                temperatures=self.spectrum,
                ce_weight=self.ce_weight,
                cmi_weight=self.cmi_weight,
                centroids=centroids,
                weight=None if self.class_weight is None else self.class_weight.to(device),
                label_smoothing=self.label_smoothing,
                reduction=self.reduction,
                backend=backend,
            )

        logits, upstream = self.logits.to(device), self.upstream.to(device)
        value, gradient = testing.value_and_grad(call, logits, upstream=upstream)
        return value.cpu(), gradient.cpu()

    def wrong(self, value: Tensor, gradient: Tensor) -> str | None:
        """What is further off than rounding explains.

        Plain PyTorch may be exact by luck in a single batch, for which the budget would be too strict:
        `ROUNDINGS` of the numbers that a result is made of are allowed beside it.
        """
        a = torch.tensor(self.spectrum.inverse_temperatures, dtype=torch.float64)
        w = torch.tensor(self.spectrum.weights, dtype=torch.float64)
        arguments = (
            self.target,
            self.spectrum.inverse_temperatures,
            self.spectrum.weights,
            self.class_weight,
            self.centroids,
            self.ce_weight,
            self.cmi_weight,
            self.label_smoothing,
            -100,
            KINDS[self.reduction],
        )
        truth = testing.truth(self.logits, *arguments, upstream=self.upstream)
        base = testing.base(self.logits, *arguments, upstream=self.upstream)
        kept = self.target != -100
        if gradient[~kept].count_nonzero() != 0:
            return "an ignored row has a gradient"
        if self.reduction == "spectrum":
            if (value < 0).any():
                return f"a divergence is negative: {value.tolist()}"
            numbers, slopes = 1.0, float(self.upstream.double() @ a)
        else:
            numbers = self.cmi_weight * float(w.sum()) + self.ce_weight
            slopes = self.cmi_weight * float(w @ a) + self.ce_weight
            slopes *= float(self.upstream.abs().max())
        if self.reduction == "sum":
            numbers *= len(kept)
        elif self.reduction != "none":
            slopes /= max(1, int(kept.sum()))
        numbers += float(truth[0].nan_to_num(0, 0, 0).abs().max()) / 8
        rounding = ROUNDINGS * torch.finfo(value.dtype).eps / 2
        if value.dtype == torch.float64:  # the reference rounds as well
            rounding *= 16
        try:
            for what, out, i, size in (("value", value, 0, numbers), ("gradient", gradient, 1, slopes)):
                representable = truth[i].abs() <= torch.finfo(out.dtype).max
                rounded = torch.where(representable, truth[i], truth[i].sign() * torch.inf)
                testing.assert_within_budget(out, rounded, base[i], what, slack=rounding * size)
        except AssertionError as error:
            return str(error)
        return None


def draw(seed: int, large: bool = False, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    """The case of a seed: the same everywhere."""
    r, g = random.Random(seed), Generator().manual_seed(seed)
    n, c = r.choice(LARGE_ROWS if large else ROWS), r.choice(LARGE_CLASSES if large else CLASSES)
    n = min(n, max(2, (LARGE_ELEMENTS if large else ELEMENTS) // c))
    present = min(c, n if r.random() < 0.2 else r.choice([1, 1, 2, 3, 5, 10]))
    target = torch.randperm(c, generator=g)[:present][torch.randint(0, present, (n,), generator=g)]
    kind = r.choice(LOGITS)
    dtype = dtypes[0] if r.random() < 0.6 else r.choice(dtypes)
    wide = kind(r, g, torch.randn(n, c, generator=g), target)
    logits = wide.to(dtype)
    spectrum = _spectrum(r)
    if r.random() < 0.2:
        spectrum = spectrum.with_weights([r.choice([0.0, 0.3, 1.0, 2.0]) for _ in range(len(spectrum))])
    compute = torch.promote_types(dtype, torch.float32)
    given = r.choice(["no", "no", "no", "random", "own", "near"])
    centroids = None
    if given == "random":
        centroids = torch.softmax(torch.randn(len(spectrum), c, c, generator=g), -1).to(compute)
    elif given != "no":
        centroids, _ = reference.class_centroids(logits, target, spectrum.inverse_temperatures, -100)
        if given == "near":
            noise = torch.randn(centroids.shape, generator=g)
            centroids = centroids * (1 + 10 ** r.uniform(-6, -1) * noise).clamp(min=0.1)
        # Where it is 0, the reference may find a P in float64 that float32 does not have.
        centroids = centroids.to(compute).clamp(min=1e-37)
    class_weight = 0.1 + torch.rand(c, generator=g) if r.random() < 0.25 else None
    smoothing = r.choice([0.0, 0.0, 0.0, 0.1, 0.5])
    if not wide.abs().max() < 1e6:  # infinite, as it is in float32 by F.cross_entropy
        smoothing = 0.0
    reduction = r.choice(["mean", "mean", *KINDS])
    shape = {"none": (n,), "spectrum": (len(spectrum),)}.get(reduction, ())
    upstream = r.choice([1.0, 1e-3, 100.0]) * torch.rand(shape, generator=g)
    if reduction == "none":
        upstream = upstream * torch.randn(shape, generator=g).sign()
    if r.random() < 0.2:
        target = torch.where(torch.rand(n, generator=g) < 0.3, -100, target)
    logits, target = _strided(r, logits, target)
    ce_weight, cmi_weight = r.choice([1.0, 1.0, 0.5, 0.0]), r.choice([1.0, 1.0, 3.0, 0.1])
    temperatures = ", ".join(f"{t:.3g}" for t in spectrum.temperatures[:5])
    text = (
        f"seed {seed}: {n}x{c} {dtype} {kind.__name__}, {present} classes, {len(spectrum)} temperatures "
        f"{temperatures}, centroids {given}, smoothing {smoothing}, {reduction}"
    )
    return Case(
        text,
        logits,
        target,
        spectrum,
        centroids,
        None if class_weight is None else class_weight.to(compute),
        smoothing,
        ce_weight,
        cmi_weight,
        reduction,
        upstream,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("backend", help="one of available_backends(), or emulated-fused, emulated-tiled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--large", action="store_true")
    chosen = parser.parse_args()
    backend, dtypes = chosen.backend, [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    kernels: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if backend.startswith("emulated-"):
        import cuda_emulated

        path = {"emulated-fused": cuda_emulated.FUSED, "emulated-tiled": cuda_emulated.TILED}[backend]
        dispatch._modules["cuda"], backend = cuda_emulated.emulated(), "cuda"
        kernels = cuda_emulated.settings(path, processors=60 if path == cuda_emulated.FUSED else 5)
    elif backend == "triton":
        dtypes.remove(torch.float64)
    torch.set_num_threads(1)
    seed, bad, started = chosen.first, 0, time.monotonic()
    with kernels:
        while time.monotonic() - started < chosen.seconds:
            case = draw(seed, chosen.large, tuple(dtypes))
            wrong = case.wrong(*case.run(backend, chosen.device))
            if wrong is not None:
                bad += 1
                print(f"{case.text}: {wrong}", flush=True)
            seed += 1
    print(f"{seed - chosen.first} cases, {bad} wrong")


if __name__ == "__main__":
    main()
