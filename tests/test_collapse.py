"""Accuracy survives collapse, where the textbook formula has no correct digit left."""

from __future__ import annotations

import mpmath
import pytest
import torch
from calls import OPTIONS, Options, each_divergence, judged, regime, spectrum
from conftest import Place
from torch import Tensor

import cmim_kernels as ck
from cmim_kernels import reference, testing
from cmim_kernels.testing import COLLAPSE_WIDTHS, assert_collapse_accuracy, base, truth, value_and_grad

REGIMES = [f"collapsed_{width:g}" for width in COLLAPSE_WIDTHS] + ["confident_collapsed"]


@pytest.mark.parametrize("options", ["default", "general_grid", "cold_and_hot", "one_temperature"])
@pytest.mark.parametrize("name", REGIMES)
def test_cmi_and_its_gradient(place: Place, name: str, options: str) -> None:
    for seed in range(2):
        logits, target = OPTIONS[options].batch(regime(name), torch.float32, place.device, seed)
        value, gradient = (t.cpu() for t in spectrum(place, OPTIONS[options], logits, target))
        (true_value, true_gradient), _ = judged(
            regime(name), OPTIONS[options], torch.float32, seed, "spectrum"
        )
        assert_collapse_accuracy(value, gradient, true_value, true_gradient)


@pytest.mark.parametrize("name", REGIMES)
def test_gradient_of_every_temperature(place: Place, name: str) -> None:
    """A sum over temperatures is carried by the coldest; each has to be right by itself."""
    logits, target = regime(name).make()
    for value, gradient, arguments in each_divergence(place, logits, target, OPTIONS["default"].spectrum):
        assert_collapse_accuracy(value, gradient, *truth(logits, *arguments))


@pytest.mark.parametrize("height", [16.0, 30.0])
@pytest.mark.parametrize("width", [0.3, 1.0])
def test_confident_clusters(place: Place, width: float, height: float) -> None:
    """As late in a training: logits still differ by `width`, but beside the label's they have no weight."""
    g = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (32,), generator=g)
    logits = 2 * torch.randn(4, 40, generator=g)[target] + width * torch.randn(32, 40, generator=g)
    logits[torch.arange(32), target] += height
    for value, gradient, arguments in each_divergence(place, logits, target, OPTIONS["default"].spectrum):
        assert_collapse_accuracy(value, gradient, *truth(logits, *arguments))


@pytest.mark.parametrize("name", ["collapsed_0.001", "collapsed_0.1"])
def test_rows_with_their_own_upstream_gradient(place: Place, name: str) -> None:
    """With reduction "none" the path through the centroid does not cancel; it has to survive collapse too."""
    logits, target = regime(name).make(device=place.device)
    upstream = torch.rand(len(target), generator=torch.Generator().manual_seed(1)).to(place.device)
    options = Options(ce_weight=0.0, reduction="none")
    value, gradient = value_and_grad(
        lambda z: ck.fused_cmi_loss(z, target, backend=place.name, **options.kwargs(logits)),
        logits,
        upstream=upstream,
    )
    true_value, true_gradient = truth(
        logits.cpu(), *options.arguments(logits.cpu(), target.cpu()), upstream=upstream.cpu()
    )
    assert_collapse_accuracy(value.cpu(), gradient.cpu(), true_value, true_gradient)


def test_half_precision_logits_lose_only_their_own_rounding(place: Place) -> None:
    logits, target = regime("collapsed_0.1").make(torch.bfloat16, place.device)
    value, gradient = spectrum(place, OPTIONS["default"], logits, target)
    (true_value, true_gradient), _ = judged(
        regime("collapsed_0.1"), OPTIONS["default"], torch.bfloat16, 0, "spectrum"
    )
    torch.testing.assert_close(value.cpu().double(), true_value, rtol=1e-5, atol=0)
    assert (gradient.cpu().double() - true_gradient).norm() <= 2**-9 * true_gradient.norm()


def test_the_plain_formulation_fails_here() -> None:
    """The reason for all of this: if it did not, the test would prove nothing."""
    logits, target = regime("collapsed_0.0001").make()
    arguments = (target, [1.0], [1.0], None, None, 0.0, 1.0, 0.0, -100, reference.SPECTRUM)
    (value, gradient), (true_value, true_gradient) = base(logits, *arguments), truth(logits, *arguments)
    assert (value - true_value).abs() > 0.1 * true_value
    assert (gradient - true_gradient).norm() > 1e-4 * true_gradient.norm()


def exact(logits: Tensor, target: Tensor, a: float) -> tuple[float, Tensor]:
    """CMI at one temperature and its gradient by the formulas of docs/math.md, in 60 digits."""
    mpmath.mp.dps = 60
    rows = [[mpmath.exp(mpmath.mpf(a) * mpmath.mpf(float(z))) for z in row] for row in logits]
    p = [[e / sum(row) for e in row] for row in rows]
    n, c = logits.shape
    centroid = {}
    for label in set(target.tolist()):
        members = [i for i in range(n) if target[i] == label]
        centroid[label] = [sum(p[i][j] for i in members) / len(members) for j in range(c)]
    total, gradient = mpmath.mpf(0), torch.zeros(n, c, dtype=torch.float64)
    for i in range(n):
        q = centroid[int(target[i])]
        ratio = [mpmath.log(p[i][j] / q[j]) for j in range(c)]
        kl = sum(p[i][j] * ratio[j] for j in range(c))
        total += kl / n
        for j in range(c):
            gradient[i, j] = float(mpmath.mpf(a) / n * p[i][j] * (ratio[j] - kl))
    return float(total), gradient


@pytest.mark.parametrize("width", [1e-12, 1e-9, 1e-6, 1e-3, 1.0, 30.0])
def test_the_reference_is_right_in_double_precision(width: float) -> None:
    """Truth itself, against 60 digits."""
    generator = torch.Generator().manual_seed(3)
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    logits = 3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)[target]
    logits += width * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    for a in (0.125, 1.0):
        arguments = (target, [a], [1.0], None, None, 0.0, 1.0, 0.0, -100, reference.MEAN)
        value, gradient = value_and_grad(reference.reference_loss, logits, *arguments)
        true_value, true_gradient = exact(logits, target, a)
        assert abs(float(value) - true_value) <= 1e-9 * true_value
        assert (gradient - true_gradient).norm() <= 1e-9 * true_gradient.norm()


def test_collapse_widths_cover_the_range() -> None:
    largest = [float(testing.truth(*_spectrum_arguments(name))[0].max()) for name in REGIMES]
    assert min(largest) < 1e-10
    assert max(largest) > 1.0


def _spectrum_arguments(name: str) -> tuple[object, ...]:
    logits, target = regime(name).make()
    return logits, *OPTIONS["default"].arguments(logits, target, reference.SPECTRUM)
