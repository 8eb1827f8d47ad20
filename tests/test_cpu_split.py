"""Where the high temperatures of a cluster are centred by themselves, the two parts add up to the whole.

Ordinary logits on grids that reach so high a temperature that the outputs there are closer than float32
resolves uncentred, while those of the lowest are too far apart to be centred; and rows between the two, whose
divergences are summed in another way (csrc/cpu/split.h).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from calls import Options, each_divergence, pooled
from conftest import Place
from torch import Tensor

from cmim_kernels import TemperatureSpectrum, cmi_spectrum, fused_cmi_loss
from cmim_kernels.reference import SPECTRUM
from cmim_kernels.testing import (
    assert_collapse_accuracy,
    assert_gradient_within_budget,
    assert_within_budget,
    base,
    truth,
    value_and_grad,
)

# Each with the scale of the logits at which it is done in parts.
GRIDS = {
    "eight nodes": (TemperatureSpectrum.gauss_legendre(1.0, 8), 1.0),
    "sixteen nodes": (TemperatureSpectrum.gauss_legendre(1.0, 16), 0.5),
    "64 multiples": (TemperatureSpectrum.uniform(1.0, 64), 1.0),
    "some multiples": (TemperatureSpectrum([40.0, 20.0, 5.0, 2.0, 1.0]), 1.0),
    "1 among the first": (TemperatureSpectrum.uniform(64.0, 64), 0.02),
    "all are the first": (TemperatureSpectrum([97.0, 61.0, 43.0]), 1.0),
}
OPTIONS = {
    "default": {},
    "sum": {"reduction": "sum", "cmi_weight": 3.0, "ignore_every": 5},
    "cross_entropy": {"class_weight": True, "label_smoothing": 0.2},
    "cmi_alone": {"ce_weight": 0.0},
}


def batch(scale: float, seed: int, n: int = 40, c: int = 120, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Clusters of about seven rows, the second of them sure of its label."""
    generator = torch.Generator().manual_seed(seed)
    logits, target = scale * torch.randn(n, c, generator=generator), torch.arange(n) % classes
    logits[target == 1, 1] += 12
    return logits, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_loss(grid: str, options: str, dtype: torch.dtype) -> None:
    spectrum, scale = GRIDS[grid]
    call = Options(spectrum, **OPTIONS[options])  # type: ignore[arg-type]
    results = []
    for seed in range(8):
        logits, target = batch(scale, seed)
        logits = logits.to(dtype)
        if call.ignore_every:
            target[:: call.ignore_every] = call.ignore_index
        kwargs, arguments = call.kwargs(logits), call.arguments(logits, target)
        out = value_and_grad(lambda z, y=target, kw=kwargs: fused_cmi_loss(z, y, backend="cpu", **kw), logits)
        both = *truth(logits, *arguments), *base(logits, *arguments)
        results.append((*out, *both, target))
    value, gradient, true_value, true_gradient, base_value, base_gradient, target = pooled(results)
    assert_within_budget(value, true_value, base_value)
    assert_gradient_within_budget(gradient, true_gradient, base_gradient, target, call.ignore_index)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_highest_temperature(grid: str) -> None:
    """Its CMI is held to what collapsed clusters are, and so is its gradient."""
    spectrum, scale = GRIDS[grid]
    logits, target = batch(scale / 4, 0)
    k = min(range(len(spectrum)), key=spectrum.inverse_temperatures.__getitem__)
    upstream = torch.zeros(len(spectrum)).index_fill(0, torch.tensor(k), 1.0)
    arguments = Options(spectrum, ce_weight=0.0).arguments(logits, target)
    true_cmi, true_gradient = truth(logits, *arguments[:-1], SPECTRUM, upstream=upstream)
    assert true_cmi[k] < 1e-4
    cmi, gradient = value_and_grad(
        lambda z: cmi_spectrum(z, target, temperatures=spectrum, backend="cpu"), logits, upstream=upstream
    )
    assert_collapse_accuracy(cmi[k], gradient, true_cmi[k], true_gradient)


def assert_each_divergence(logits: Tensor, target: Tensor, spectrum: TemperatureSpectrum) -> None:
    """Each CMI_k right to 2e-5 and its gradient to 1e-5 (2-norm), whatever the size of the others."""
    place = Place("cpu", "cpu", (torch.float32,))
    for value, gradient, arguments in each_divergence(place, logits, target, spectrum):
        true_value, true_gradient = truth(logits, *arguments)
        torch.testing.assert_close(value.double(), true_value, rtol=2e-5, atol=0)
        error = torch.linalg.vector_norm(gradient.double() - true_gradient)
        assert error <= 1e-5 * torch.linalg.vector_norm(true_gradient)


@pytest.mark.parametrize("grid", ["eight multiples", "eight nodes"])
@pytest.mark.parametrize("classes", [40, 300])
@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5])
def test_from_collapsed_to_ordinary(width: float, classes: int, grid: str) -> None:
    """Rows that differ by `width`: a CMI of 1e-6 to 0.1, centred, close and neither."""
    spectrum = TemperatureSpectrum.uniform(1.0, 8) if grid == "eight multiples" else GRIDS["eight nodes"][0]
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(60) % 5
    logits = torch.randn(5, classes, generator=generator)[target]
    logits += width * torch.randn(60, classes, generator=generator)
    logits[target == 1, 1] += 10
    assert_each_divergence(logits, target, spectrum)


@pytest.mark.parametrize("other", ["far", "masked", "large numbers", "shifted"])
def test_a_wrong_guess(other: str) -> None:
    """The first and the last row of a cluster are close; one between them is not like them."""
    logits, target = batch(0.1, 0, classes=4)
    for row in (8, 9, 10, 11):
        if other == "far":
            logits[row, 30:40] += 40
        elif other == "shifted":
            logits[row] += 1e3
        else:
            logits[row, 50:70] = -torch.inf if other == "masked" else -1e9
    assert_each_divergence(logits, target, TemperatureSpectrum.uniform(1.0, 8))


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("grid", GRIDS)
def test_threads_that_share_a_cluster_change_nothing(grid: str) -> None:
    spectrum, scale = GRIDS[grid]
    logits, target = batch(scale, 0, n=200, c=1100, classes=1)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(
            value_and_grad(lambda z: fused_cmi_loss(z, target, temperatures=spectrum, backend="cpu"), logits)
        )
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
