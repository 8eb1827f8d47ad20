"""Every backend errs at most twice as much as plain PyTorch does, in every regime, dtype and option."""

from __future__ import annotations

import pytest
import torch
from calls import OPTIONS, Options, fused, judged, pooled, regime, spectrum
from conftest import Place

from cmim_kernels.testing import (
    COLLAPSED_CMI,
    Regime,
    assert_gradient_within_budget,
    assert_within_budget,
    regimes,
)

# Where a result is one number, plain PyTorch is exact by luck now and then: judged over several batches at
# once.
SEEDS = range(16)
# Options of which there is something to every column; the others are numbers, or numbers of a row.
BY_COLUMN = ("general_grid", "cross_entropy_options", "rows", "centroids")
# The defaults are tried in every regime, and what weighs the terms of a loss is nothing to a spectrum.
EVERY_OPTION = [("loss", name) for name in OPTIONS if name != "default"]
EVERY_OPTION += [("spectrum", name) for name in OPTIONS if name not in ("default", "cmi_alone")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(place: Place, regime: Regime, options: Options, dtype: torch.dtype, of: str) -> None:
    place.needs(dtype)
    results = []
    seeds = SEEDS
    if place.emulated or place.name == "reference":
        seeds = SEEDS[:4]
    if place.interpreted:  # fewer still, though not so few that luck decides
        seeds = SEEDS[: 3 if regime.make()[0].shape[1] < 100 else 2]
    for seed in seeds:
        logits, target = options.batch(regime, dtype, place.device, seed)
        call = fused if of == "loss" else spectrum
        out = (t.cpu() for t in call(place, options, logits, target))
        truth, base = judged(regime, options, dtype, seed, of)
        results.append((*out, *truth, *base, target.cpu()))
    *parts, targets = pooled(results)
    values, gradients = parts[::2], parts[1::2]
    if of == "spectrum" and values[1].abs().max() < COLLAPSED_CMI:
        pytest.skip("collapsed: judged by test_collapse")
    expected = torch.float32 if dtype != torch.float64 else torch.float64
    assert values[0].dtype == expected
    assert_within_budget(*values, what=of)
    assert gradients[0].dtype == dtype
    assert_gradient_within_budget(*gradients, targets, options.ignore_index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", regimes(), ids=str)
def test_loss_in_every_regime(place: Place, regime: Regime, dtype: torch.dtype) -> None:
    slow, half = place.interpreted or place.emulated, dtype.itemsize == 2
    if slow and half and regime.name not in ("random", "masked_in_some_rows"):
        pytest.skip("slow: the arithmetic is that of float32")
    check(place, regime, OPTIONS["default"], dtype, "loss")


@pytest.mark.parametrize("regime", regimes(), ids=str)
def test_spectrum_in_every_regime(place: Place, regime: Regime) -> None:
    if place.interpreted and regime.name in ("classes_511", "classes_513", "classes_1025", "classes_2049"):
        pytest.skip("slow: these widths are tried by the loss")
    check(place, regime, OPTIONS["default"], torch.float32, "spectrum")


@pytest.mark.parametrize(
    "name", ["random", "random_x10", "masked_in_some_rows", "classes_129", "collapsed_0.3"]
)
@pytest.mark.parametrize(("of", "options"), EVERY_OPTION)
def test_every_option(place: Place, name: str, options: str, of: str) -> None:
    if (place.interpreted or place.emulated) and name == "classes_129" and options not in BY_COLUMN:
        pytest.skip("slow: this width is tried with the options that go by columns")
    check(place, regime(name), OPTIONS[options], torch.float32, of)


@pytest.mark.parametrize("options", OPTIONS)
def test_double_precision_agrees_with_the_reference(place: Place, options: str) -> None:
    place.needs(torch.float64)
    for name in ("random_x10", "masked_by_cluster", "classes_65", "collapsed_0.001"):
        logits, target = OPTIONS[options].batch(regime(name), torch.float64, place.device, 0)
        value, gradient = fused(place, OPTIONS[options], logits, target)
        (true_value, true_gradient), _ = judged(regime(name), OPTIONS[options], torch.float64, 0, "loss")
        assert value.dtype == gradient.dtype == torch.float64
        torch.testing.assert_close(value.cpu(), true_value, rtol=1e-12, atol=1e-14)
        error = (gradient.cpu() - true_gradient).norm()
        assert error <= 1e-12 * true_gradient.norm(), name
