"""However cold or hot the temperatures, loss, divergences and gradients are right: at 1/1000 every softmax is
one-hot, at 1000 every cluster has collapsed, and the cross entropy beside them has temperature 1."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from calls import Options, each_divergence, fused, judged, pooled
from conftest import Place
from torch import Generator, Tensor

import cmim_kernels as ck
from cmim_kernels.testing import (
    COLLAPSED_CMI,
    Regime,
    assert_collapse_accuracy,
    assert_gradient_within_budget,
    assert_within_budget,
    base,
    truth,
    value_and_grad,
)

GRIDS = {
    "0.001": ck.TemperatureSpectrum([1e-3]),
    "0.01 and 0.003": ck.TemperatureSpectrum([0.01, 0.003]),
    "0.1": ck.TemperatureSpectrum([0.1]),
    "1000": ck.TemperatureSpectrum([1000.0]),
    "0.001 and 1000": ck.TemperatureSpectrum([1e-3, 1e3]),
    "down to 1/4": ck.TemperatureSpectrum.uniform(4.0, 8),
    "0.001 to 1000": ck.TemperatureSpectrum.geometric(1e-3, 1e3, 6),
}


def _batch(g: Generator, n: int, c: int, classes: int, masked: bool) -> tuple[Tensor, Tensor]:
    logits, target = 3 * torch.randn(n, c, generator=g), torch.randint(0, classes, (n,), generator=g)
    if masked:
        mask = torch.rand(n, c, generator=g) < 0.2
        logits = torch.where(mask.scatter(1, target[:, None], False), -torch.inf, logits)
    return logits, target


BATCHES = {
    "12x7": Regime("12x7", lambda g: _batch(g, 12, 7, 4, False)),
    "12x7 masked": Regime("12x7 masked", lambda g: _batch(g, 12, 7, 4, True)),
    "64x50": Regime("64x50", lambda g: _batch(g, 64, 50, 16, False)),
    "64x50 masked": Regime("64x50 masked", lambda g: _batch(g, 64, 50, 16, True)),
}
OTHERS = {
    "default": Options(),
    "rows": Options(reduction="none"),
    "cross_entropy_options": Options(class_weight=True, label_smoothing=0.1),
}
grids = pytest.mark.parametrize("grid", GRIDS)
batches = pytest.mark.parametrize("batch", BATCHES)


def seeds(place: Place, batch: str) -> range:
    return range((1 if "64x50" in batch else 2) if place.interpreted else 4 if place.emulated else 6)


def forgiven(out: Tensor, truth: Tensor, scale: float) -> Tensor:
    """`out`, but the truth where they differ by a few roundings of a number of size `scale`.

    An entry of the gradient is a P (t - KL) over the rows. At a cold temperature P is one-hot and t = KL: the
    truth vanishes, and plain PyTorch is exact by luck or rounds t, times a, as everyone else does.
    """
    return torch.where(
        (out.double() - truth).abs() <= 8 * torch.finfo(torch.float32).eps / 2 * scale, truth, out
    )


@grids
@batches
@pytest.mark.parametrize("name", OTHERS)
def test_loss_and_its_gradient(place: Place, grid: str, batch: str, name: str) -> None:
    if "masked" in batch and name == "cross_entropy_options":
        pytest.skip("infinite, as in F.cross_entropy")
    if place.interpreted and name == "cross_entropy_options":
        pytest.skip("slow")
    options = replace(OTHERS[name], spectrum=GRIDS[grid])
    results = []
    for seed in seeds(place, batch):
        logits, target = options.batch(BATCHES[batch], torch.float32, place.device, seed)
        out = (t.cpu() for t in fused(place, options, logits, target))
        true, plain = judged(BATCHES[batch], options, torch.float32, seed, "loss")
        rows = 1 if name == "rows" else len(logits)
        scale = sum(
            w * a
            for w, a in zip(options.spectrum.weights, options.spectrum.inverse_temperatures, strict=True)
        )
        results.append((*out, *true, *plain, target.cpu(), torch.tensor(scale / rows)))
    value, gradient, true_value, true_gradient, base_value, base_gradient, target, scale = pooled(results)
    assert_within_budget(value, true_value, base_value)
    gradient = forgiven(gradient, true_gradient, float(scale[0]))
    assert_gradient_within_budget(gradient, true_gradient, base_gradient, target)


@grids
@batches
def test_divergence_of_every_temperature(place: Place, grid: str, batch: str) -> None:
    """And its gradient: each by itself, since the coldest would hide the others."""
    spectrum = GRIDS[grid]
    results: list[list[tuple[Tensor, ...]]] = [[] for _ in range(len(spectrum))]
    for seed in seeds(place, batch):
        logits, target = BATCHES[batch].make(seed=seed)
        each = each_divergence(place, logits, target, spectrum)
        for of_temperature, (*out, arguments) in zip(results, each, strict=True):
            true, plain = truth(logits, *arguments), base(logits, *arguments)
            of_temperature.append((*out, *true, *plain, target))
    for a, of_temperature in zip(spectrum.inverse_temperatures, results, strict=True):
        value, gradient, true_value, true_gradient, base_value, base_gradient, target = pooled(of_temperature)
        if true_value.max() < COLLAPSED_CMI:
            assert_collapse_accuracy(value, gradient, true_value, true_gradient)
            continue
        assert_within_budget(value, true_value, base_value, f"CMI at T = {1 / a:g}")
        gradient = forgiven(gradient, true_gradient, a / len(logits))
        assert_gradient_within_budget(gradient, true_gradient, base_gradient, target)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1e3])
def test_the_cross_entropy_does_not_see_the_temperatures(place: Place, temperature: float) -> None:
    """Where every row has a class of its own the loss is the cross entropy, to the last bit on any grid."""
    logits, target = 3 * torch.randn(8, 12, device=place.device), torch.arange(8, device=place.device)
    logits[:, 9] = -torch.inf
    out = fused(place, Options(ck.TemperatureSpectrum([temperature])), logits, target)
    expected = fused(place, Options(cmi_weight=0.0), logits, target)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


def test_cold_temperatures_do_not_see_how_large_the_logits_are(place: Place) -> None:
    """An offset that rounds no logit changes neither the centroids nor the divergence from given ones."""
    place.needs(torch.float64)
    logits = torch.randint(-4, 5, (12, 9)).double() / 1024  # differences of a few units at T = 0.003
    target = torch.arange(12) % 3
    given = torch.rand(1, 9, 9, dtype=torch.float64).softmax(-1).to(place.device)
    results = []
    for offset in (0, 4096):
        moved, labels = (logits + offset).to(place.device), target.to(place.device)
        loss = partial(
            ck.fused_cmi_loss, temperatures=[0.003], ce_weight=0.0, centroids=given, backend=place.name
        )
        value, gradient = value_and_grad(loss, moved, labels)
        centroids, _ = ck.class_centroids(moved, labels, temperatures=[0.003], backend=place.name)
        results.append((value, gradient, centroids))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
