"""The C++ kernel from inside: every instruction set and thread count, and the seams between its forms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from calls import Options, pooled
from torch import Tensor

from cmim_kernels import TemperatureSpectrum, cmi_spectrum, fused_cmi_loss
from cmim_kernels.reference import SPECTRUM
from cmim_kernels.testing import (
    assert_collapse_accuracy,
    assert_gradient_within_budget,
    base,
    truth,
    value_and_grad,
)

UNIFORM = TemperatureSpectrum.uniform(1.0, 8)
GENERAL = TemperatureSpectrum([0.7, 1.1, 2.3, 5.0])

# Every dtype against the reference with the same rounded logits, forward and backward.
VARIANT_CHECK = """
import torch
from cmim_kernels import TemperatureSpectrum
from cmim_kernels.backends import cpu
from cmim_kernels.testing import assert_gradient_within_budget, assert_within_budget, base, regimes, truth

spectra = [TemperatureSpectrum.uniform(1.0, 8), TemperatureSpectrum([0.7, 1.1, 2.3, 5.0])]
kinds = {"random", "collapsed_0.01", "masked_in_some_rows", "one_large_cluster", "classes_33"}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for spectrum in spectra:
        for regime in regimes():
            if regime.name not in kinds:
                continue
            results = []
            for seed in range(2):  # pooled: one lucky rounding of the plain formulation decides nothing
                z, y = regime.make(dtype, seed=seed)
                call = (spectrum.inverse_temperatures, spectrum.weights, None, None, 1.0, 1.0, 0.1, -100, 1)
                value, saved = cpu.loss(z, y, *call, True)
                grad = torch.ops.cmim_kernels.loss_backward(torch.ones_like(value), saved, z, y, *call)
                exact, plain = truth(z, y, *call), base(z, y, *call)
                results.append((value[None], exact[0][None], plain[0][None], grad, exact[1], plain[1], y))
            value, exact_value, plain_value, grad, exact, plain, y = map(torch.cat, zip(*results))
            if dtype == torch.float64:  # the truth itself is rounded there
                torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-15)
                torch.testing.assert_close(value, exact_value, rtol=1e-13, atol=0)
                continue
            assert_within_budget(value, exact_value, plain_value, f"{regime} {dtype}")
            assert_gradient_within_budget(grad, exact, plain, y, what=f"{regime} {dtype}")
print("checked")
"""


def run_with_variant(name: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CMIM_KERNELS_CPU_VARIANT": name}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", ["avx512", "avx2", "baseline"])
def test_every_variant_is_accurate(name: str) -> None:
    done = run_with_variant(name, VARIANT_CHECK)
    if "this processor cannot run" in done.stderr:
        pytest.skip(f"this processor cannot run {name}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "checked"


def test_an_unknown_variant_is_refused_by_name() -> None:
    code = "import torch, cmim_kernels as c; c.fused_cmi_loss(torch.zeros(2, 3), torch.zeros(2).long())"
    done = run_with_variant("avx1024", code)
    assert done.returncode != 0
    for word in ("CMIM_KERNELS_CPU_VARIANT", "avx1024", "baseline"):
        assert word in done.stderr


def batch(n: int, c: int, present: int, width: float = 1.0) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, present, (n,))
    return torch.randn(present, c)[target] + width * torch.randn(n, c), target


# One cluster that all threads share, clusters of every size with single rows, and one class after another.
SHAPES = {
    "shared": (200, 1500, 1, 1.0),
    "shared, collapsed": (200, 1500, 1, 1e-3),
    "mixed": (200, 200, 120, 1.0),
    "many rows": (4000, 5, 5, 1.0),
    "many classes": (3, 30_000, 1, 1.0),
    "many classes, collapsed": (3, 30_000, 1, 1e-3),
}


@pytest.mark.parametrize("spectrum", [UNIFORM, GENERAL], ids=["powers", "general"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_do_not_depend_on_threads(
    shape: tuple[int, int, int, float], spectrum: TemperatureSpectrum
) -> None:
    logits, target = batch(*shape)
    before = torch.get_num_threads()
    results: list[tuple[Tensor, Tensor]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            value = fused_cmi_loss(leaf, target, temperatures=spectrum, backend="cpu")
            (grad,) = torch.autograd.grad(value, leaf)
            results.append((value.detach(), grad))
    finally:
        torch.set_num_threads(before)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sums_do_not_build_up_rounding(shape: tuple[int, int, int, float]) -> None:
    n, c, present, width = shape
    logits, target = batch(n, c, present, width)
    call = (target, UNIFORM.inverse_temperatures, UNIFORM.weights, None, None, 0.0, 1.0, 0.0, -100, SPECTRUM)
    exact, _ = truth(logits, *call)
    cmi = cmi_spectrum(logits, target, backend="cpu").double()
    torch.testing.assert_close(cmi, exact, rtol=2e-5, atol=0)


def confident(width: float, by: float) -> tuple[Tensor, Tensor]:
    """Rows sure of their label, that differ by `width` everywhere, on the classes without weight too."""
    logits, target = batch(64, 200, 4, width)
    return logits.scatter_add(1, target[:, None], torch.full((64, 1), by)), target


def row_offsets(width: float) -> tuple[Tensor, Tensor]:
    logits, target = batch(64, 200, 4, width)
    return logits + 30 * torch.randn(64, 1), target


def one_noisy_class(width: float) -> tuple[Tensor, Tensor]:
    logits, target = batch(64, 200, 4, width)
    return logits.scatter_add(1, target[:, None], 3 + torch.randn(64, 1)), target


def masked(width: float) -> tuple[Tensor, Tensor]:
    logits, target = batch(64, 200, 4, width)
    logits[:, 10::3] = -torch.inf
    return logits, target


WIDTHS = [3e-7, 1e-5, 1e-3, 0.03, 0.07, 0.15, 0.2]
COLLAPSED = {f"width {w:g}": (batch, (64, 200, 4, w)) for w in WIDTHS}
COLLAPSED |= {f"confident, width {w:g}": (confident, (w, 20.0)) for w in (1e-4, 1e-2, 0.1, 0.3, 1.0)}
COLLAPSED |= {f"offsets, width {w:g}": (row_offsets, (w,)) for w in (1e-3, 1e-2)}
COLLAPSED |= {f"one noisy class, width {w:g}": (one_noisy_class, (w,)) for w in (1e-3, 1e-2)}
COLLAPSED |= {f"masked, width {w:g}": (masked, (w,)) for w in (1e-4, 1e-2)}


@pytest.mark.parametrize("spectrum", [UNIFORM, GENERAL], ids=["powers", "general"])
@pytest.mark.parametrize(("make", "arguments"), COLLAPSED.values(), ids=COLLAPSED)
def test_collapsed_clusters(
    make: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[float, ...], spectrum: TemperatureSpectrum
) -> None:
    """At each temperature by itself, since a large gradient would hide a small one's error."""
    logits, target = make(*arguments)
    for k, a in enumerate(spectrum.inverse_temperatures):
        upstream = torch.zeros(len(spectrum)).index_fill(0, torch.tensor(k), 1.0)
        call = (
            target,
            spectrum.inverse_temperatures,
            spectrum.weights,
            None,
            None,
            0.0,
            1.0,
            0.0,
            -100,
            SPECTRUM,
        )
        exact_cmi, exact_grad = truth(logits, *call, upstream=upstream)
        if exact_cmi[k] > 2e-4:
            continue
        leaf = logits.clone().requires_grad_()
        cmi = cmi_spectrum(leaf, target, temperatures=spectrum, backend="cpu")
        (grad,) = torch.autograd.grad(cmi, leaf, upstream)
        try:
            assert_collapse_accuracy(cmi[k], grad, exact_cmi[k], exact_grad)
        except AssertionError as error:
            raise AssertionError(f"at inverse temperature {a:g}: {error}") from None


@pytest.mark.parametrize("ahead", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("spectrum", [UNIFORM, GENERAL, TemperatureSpectrum.uniform(3.7, 8)], ids=str)
def test_a_label_far_ahead_costs_no_accuracy(spectrum: TemperatureSpectrum, ahead: float) -> None:
    """The other logits are large numbers below it: rounded as such, pairs of rows are off by 2e-5."""
    target = torch.arange(4).repeat_interleave(2)
    for seed in range(20):
        logits = 0.3 * torch.randn(8, 10, generator=torch.Generator().manual_seed(seed))
        logits[torch.arange(8), target] += ahead
        call = Options(spectrum, ce_weight=0.0, reduction="spectrum").arguments(logits, target, SPECTRUM)
        exact_cmi, _ = truth(logits, *call)
        cmi = cmi_spectrum(logits, target, temperatures=spectrum, backend="cpu")
        error = (cmi / exact_cmi - 1).abs()[(exact_cmi >= 1e-10) & (exact_cmi < 1e-4)]
        assert len(error) == 0 or error.max() < 5e-6, seed


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("count", [12, 16, 32, 64])
def test_many_temperatures_round_no_more_than_few(count: int, scale: float) -> None:
    spectrum = TemperatureSpectrum.uniform(1.0, count)
    results = []
    for _ in range(6):
        logits, target = scale * torch.randn(48, 200), torch.arange(48) % 6
        call = Options(spectrum, cmi_weight=10.0).arguments(logits, target)
        out = value_and_grad(
            lambda z, y=target: fused_cmi_loss(z, y, temperatures=spectrum, cmi_weight=10.0, backend="cpu"),
            logits,
        )
        results.append((out[1], truth(logits, *call)[1], base(logits, *call)[1], target))
    assert_gradient_within_budget(*pooled(results))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("grid", [TemperatureSpectrum.uniform, TemperatureSpectrum.gauss_legendre])
def test_any_number_of_temperatures(
    grid: Callable[[float, int], TemperatureSpectrum], dtype: torch.dtype, tolerance: float
) -> None:
    """They are computed in chunks of eight, four, two and one, and the last pass takes sixteen at a time."""
    logits, target = 3 * torch.randn(30, 70, dtype=dtype), torch.arange(30) % 4
    for count in (*range(1, 18), 19, 21, 24, 30, 33, 37):
        spectrum = grid(1.0, count)
        true_loss, true_gradient = truth(logits, *Options(spectrum).arguments(logits, target))
        loss, gradient = value_and_grad(
            lambda z, s=spectrum: fused_cmi_loss(z, target, temperatures=s, backend="cpu"), logits
        )
        error = (gradient - true_gradient).norm() / true_gradient.norm()
        assert abs(loss - true_loss) <= tolerance * true_loss, count
        assert error <= tolerance, count


def test_identical_rows_cost_nothing() -> None:
    logits = torch.randn(1, 300).expand(20, 300).contiguous().requires_grad_()
    target = torch.zeros(20, dtype=torch.int64)
    cmi = cmi_spectrum(logits, target, backend="cpu")
    (grad,) = torch.autograd.grad(cmi.sum(), logits)
    assert torch.equal(cmi, torch.zeros(8))
    assert torch.equal(grad, torch.zeros_like(grad))
