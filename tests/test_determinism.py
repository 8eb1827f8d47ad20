"""The same input gives the same bits in every run and with any number of threads; order changes nothing."""

from __future__ import annotations

import pytest
import torch
from calls import OPTIONS, Options, fused, regime, spectrum
from conftest import Place
from torch import Tensor

import cmim_kernels as ck

# Few and many clusters, single rows, clusters large enough to be shared by threads.
SHAPES = {
    "few_classes": (600, 10, 10),
    "many_classes": (200, 300, 40),
    "one_cluster": (300, 700, 1),
    "single_rows": (128, 128, 128),
}


def batch(shape: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    n, c, present = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(n, c, generator=generator)
    target = torch.arange(n) % present
    return logits.to(device, dtype), target[torch.randperm(n, generator=generator)].to(device)


def results_by_threads(options: Options, logits: Tensor, target: Tensor) -> list[tuple[Tensor, ...]]:
    """Loss, gradient, spectrum and its gradient, of the CPU kernels; torch's own operations promise less."""
    place = Place("cpu", "cpu", (logits.dtype,))
    results = []
    for count in (1, 2, 3, 2, 1):
        torch.set_num_threads(count)
        results.append((*fused(place, options, logits, target), *spectrum(place, options, logits, target)))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", ["default", "rows", "centroids"])
@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_runs(shape: str, options: str, dtype: torch.dtype) -> None:
    first, *others = results_by_threads(OPTIONS[options], *batch(shape, "cpu", dtype))
    for other in others:
        for one, again in zip(first, other, strict=True):
            torch.testing.assert_close(again, one, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_threads_flush_subnormal_numbers(dtype: torch.dtype) -> None:
    """A cluster that threads share, with probabilities on both sides of the smallest normal number."""
    logits = 20 * torch.randn(256, 1000, generator=torch.Generator().manual_seed(1))
    options = Options(ck.TemperatureSpectrum([0.1, 0.2, 0.5]))
    first, *others = results_by_threads(options, logits.to(dtype), torch.zeros(256, dtype=torch.int64))
    gradient = first[1].float()
    assert ((gradient != 0) & (gradient.abs() < 1e-35)).any()  # not all of it is far from them
    for other in others:
        assert all(torch.equal(one, again) for one, again in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_runs(place: Place, shape: str) -> None:
    if (
        place.name in ("reference", "triton")
        and SHAPES[shape][0] * SHAPES[shape][1] > 2e4
        and place.device == "cpu"
    ):
        pytest.skip("slow")
    logits, target = batch(shape, place.device)
    first = fused(place, OPTIONS["default"], logits, target)
    for _ in range(3):
        again = fused(place, OPTIONS["default"], logits.clone(), target.clone())
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize(
    "name", ["random", "random_x10", "masked_in_some_rows", "collapsed_0.01", "classes_65"]
)
def test_permuting_rows_permutes_the_gradient(place: Place, name: str) -> None:
    logits, target = regime(name).make(device=place.device)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(2)).to(place.device)
    value, gradient = fused(place, OPTIONS["default"], logits, target)
    other_value, other_gradient = fused(place, OPTIONS["default"], logits[order], target[order])
    torch.testing.assert_close(other_value, value, rtol=1e-6, atol=1e-7)
    error = (other_gradient - gradient[order]).norm()
    assert error <= 1e-6 * gradient.norm()


def test_permuting_classes_permutes_the_gradient(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(3)).to(place.device)
    value, gradient = fused(place, OPTIONS["default"], logits, target)
    renamed = order.argsort()[target]
    other_value, other_gradient = fused(place, OPTIONS["default"], logits[:, order], renamed)
    torch.testing.assert_close(other_value, value, rtol=1e-6, atol=1e-7)
    assert (other_gradient - gradient[:, order]).norm() <= 1e-6 * gradient.norm()


def test_splitting_off_other_classes_changes_nothing(place: Place) -> None:
    """Clusters do not see each other: the rows' own losses are those of their cluster alone."""
    logits, target = regime("random").make(device=place.device)
    rows = ck.fused_cmi_loss(logits, target, reduction="none", backend=place.name)
    for label in target.unique():
        own = target == label
        alone = ck.fused_cmi_loss(logits[own], target[own], reduction="none", backend=place.name)
        torch.testing.assert_close(alone, rows[own], rtol=1e-6, atol=1e-7)
