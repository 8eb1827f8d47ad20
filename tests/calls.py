"""One set of options, called through the public functions and through the reference's argument list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from conftest import Place
from torch import Tensor

import cmim_kernels as ck
from cmim_kernels import reference, testing
from cmim_kernels.testing import Regime

UNIFORM = ck.TemperatureSpectrum.uniform(1.0, 8)
REDUCTIONS = {"none": reference.NONE, "mean": reference.MEAN, "sum": reference.SUM}


@dataclass(frozen=True)
class Options:
    """`fused_cmi_loss`'s options; the tensors among them are made to fit the batch."""

    spectrum: ck.TemperatureSpectrum = UNIFORM
    ce_weight: float = 1.0
    cmi_weight: float = 1.0
    class_weight: bool = False
    centroids: bool = False
    label_smoothing: float = 0.0
    reduction: str = "mean"
    ignore_every: int = 0  # every so many rows are ignored
    ignore_index: int = -100

    def batch(self, regime: Regime, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
        logits, target = regime.make(dtype, device, seed)
        if self.ignore_every:
            target[:: self.ignore_every] = self.ignore_index
        return logits, target

    def tensors(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """class_weight (C,), centroids (K, C, C), in the compute dtype."""
        generator = torch.Generator().manual_seed(len(logits))
        c, k = logits.shape[1], len(self.spectrum)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weight = 0.5 + torch.rand(c, generator=generator)
        centroids = torch.softmax(torch.randn(k, c, c, generator=generator), -1) if self.centroids else None
        return (
            weight.to(logits.device, dtype) if self.class_weight else None,
            None if centroids is None else centroids.to(logits.device, dtype),
        )

    def kwargs(self, logits: Tensor) -> dict[str, Any]:
        weight, centroids = self.tensors(logits)
        return {
            "temperatures": self.spectrum,
            "ce_weight": self.ce_weight,
            "cmi_weight": self.cmi_weight,
            "weight": weight,
            "centroids": centroids,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }

    def arguments(self, logits: Tensor, target: Tensor, reduction: int | None = None) -> tuple[Any, ...]:
        """As `reference_loss` takes them after the logits."""
        weight, centroids = self.tensors(logits)
        return (
            target,
            self.spectrum.inverse_temperatures,
            self.spectrum.weights,
            weight,
            centroids,
            self.ce_weight,
            self.cmi_weight,
            self.label_smoothing,
            self.ignore_index,
            REDUCTIONS[self.reduction] if reduction is None else reduction,
        )


OPTIONS = {
    "default": Options(),
    "cmi_alone": Options(ce_weight=0.0),
    "general_grid": Options(ck.TemperatureSpectrum.gauss_legendre(2.0, 5), cmi_weight=3.0),
    "powers_of_two": Options(ck.TemperatureSpectrum.geometric(1.0, 8.0, 4)),
    "one_temperature": Options(ck.TemperatureSpectrum([1.0])),
    "cold_and_hot": Options(ck.TemperatureSpectrum([0.25, 3.0, 20.0])),
    "cross_entropy_options": Options(class_weight=True, label_smoothing=0.2, ignore_every=5),
    "sum": Options(reduction="sum", ignore_every=3, ignore_index=2**40),
    "rows": Options(reduction="none", class_weight=True, label_smoothing=0.1, ignore_every=4, ignore_index=0),
    "centroids": Options(centroids=True, ce_weight=0.5),
    "centroids_rows": Options(
        ck.TemperatureSpectrum.gauss_legendre(2.0, 5), centroids=True, reduction="none"
    ),
}


# Inverse temperatures with and without a common base, in any order
SOME_GRIDS = {
    "consecutive_from_3": tuple(k / 10 for k in range(3, 9)),
    "powers_of_two": (0.125, 0.25, 0.5, 1.0),
    "descending_12": tuple(k / 8 for k in range(12, 0, -1)),
    "irregular_multiples": (0.9, 0.1, 0.3, 0.6),
    "no_common_base": (0.07, 1.7, 0.3),
    "twice_the_same": (0.5, 0.5),
    "single": (2.5,),
    "float32": tuple(torch.linspace(0.1, 1.0, 10).tolist()),
}


def upstream_for(options: Options, logits: Tensor) -> Tensor:
    """The upstream gradient, different for every row where rows have their own."""
    shape = logits.shape[:1] if options.reduction == "none" else ()
    generator = torch.Generator().manual_seed(7)
    return (0.5 + torch.rand(shape, generator=generator)).to(logits.device)


def fused(place: Place, options: Options, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by the public function on one backend."""
    kwargs = options.kwargs(logits)
    return testing.value_and_grad(
        lambda z: ck.fused_cmi_loss(z, target, backend=place.name, **kwargs),
        logits,
        upstream=upstream_for(options, logits),
    )


def spectrum(place: Place, options: Options, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """CMI of every temperature, and the gradient of their sum."""
    centroids = options.tensors(logits)[1]
    return testing.value_and_grad(
        lambda z: ck.cmi_spectrum(
            z,
            target,
            temperatures=options.spectrum,
            centroids=centroids,
            ignore_index=options.ignore_index,
            backend=place.name,
        ),
        logits,
    )


def each_divergence(
    place: Place, logits: Tensor, target: Tensor, spectrum: ck.TemperatureSpectrum
) -> Iterator[tuple[Tensor, Tensor, tuple[Any, ...]]]:
    """CMI (1,) of each temperature by itself, its gradient, and the arguments of `reference_loss` for it."""
    leaf = logits.to(place.device).detach().requires_grad_()
    values = ck.cmi_spectrum(leaf, target.to(place.device), temperatures=spectrum, backend=place.name)
    for k, a in enumerate(spectrum.inverse_temperatures):
        (gradient,) = torch.autograd.grad(values[k], leaf, retain_graph=True)
        arguments = (target.cpu(), [a], [1.0], None, None, 0.0, 1.0, 0.0, -100, reference.SPECTRUM)
        yield values[k : k + 1].detach().cpu(), gradient.cpu(), arguments


@cache
def judged(
    regime: Regime, options: Options, dtype: torch.dtype, seed: int, of: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(value, gradient) by truth and by base, of the "loss" or "spectrum", kept for all backends."""
    logits, target = options.batch(regime, dtype, "cpu", seed)
    if of == "spectrum":
        arguments = options.arguments(logits, target, reference.SPECTRUM)
        return testing.truth(logits, *arguments), testing.base(logits, *arguments)
    arguments = options.arguments(logits, target)
    upstream = upstream_for(options, logits)
    return (
        testing.truth(logits, *arguments, upstream=upstream),
        testing.base(logits, *arguments, upstream=upstream),
    )


def regime(name: str) -> Regime:
    return next(r for r in testing.regimes() if r.name == name)


def pooled(results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The tensors of several batches, one tuple for each, end to end: numbers become vectors."""
    return tuple(torch.cat([torch.atleast_1d(t) for t in part]) for part in zip(*results, strict=True))
