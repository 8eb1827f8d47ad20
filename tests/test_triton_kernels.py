"""The Triton kernels in Triton's interpreter: what only they have, beside the suites of every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import SOME_GRIDS
from torch import Tensor

from cmim_kernels import testing
from cmim_kernels.backends import triton as backend
from cmim_kernels.backends._triton import plan
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, SUM, class_centroids

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not backend._interpreting(), reason="needs TRITON_INTERPRET=1"),
]

EIGHT = tuple(k / 8 for k in range(1, 9))


def arguments(
    target: Tensor, reduction: int = MEAN, a: tuple[float, ...] = EIGHT, **other: Any
) -> tuple[Any, ...]:
    w = tuple((1 + k) / len(a) for k in range(len(a)))
    numbers = (other.get("ce_weight", 1.0), 1.0, other.get("label_smoothing", 0.0), -100, reduction)
    return (target, a, w, other.get("class_weight"), other.get("centroids"), *numbers)


def run(logits: Tensor, args: tuple[Any, ...], upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    value, saved = backend.loss(logits, *args, True)
    upstream = torch.ones_like(value) if upstream is None else upstream
    return value, backend.loss_backward(upstream, saved, logits, *args)


def check(logits: Tensor, args: tuple[Any, ...], upstream: Tensor | None = None) -> None:
    check_together([(logits, args)], upstream)


def check_together(batches: list[tuple[Tensor, tuple[Any, ...]]], upstream: Tensor | None = None) -> None:
    """Values and gradients within the budget, or within the bounds for collapsed clusters.

    Plain PyTorch is exact by luck now and then where there are few numbers: batches are judged as one.
    """
    results = []
    for logits, args in batches:
        value, gradient = run(logits, args, upstream)
        true_value, true_gradient = testing.truth(logits, *args, upstream=upstream)
        if true_value.abs().max() < testing.COLLAPSED_CMI:
            assert args[-1] != NONE
            testing.assert_collapse_accuracy(value, gradient, true_value, true_gradient)
            continue
        base_value, base_gradient = testing.base(logits, *args, upstream=upstream)
        values = (torch.atleast_1d(v) for v in (value, true_value, base_value))
        results.append((*values, gradient, true_gradient, base_gradient, args[0]))
    if not results:
        return
    value, true_value, base_value, *gradients = (torch.cat(parts) for parts in zip(*results, strict=True))
    # One number of plain PyTorch's may still be exact: allow what one sum rounds.
    slack = torch.finfo(torch.float32).eps * true_value.abs().max()
    assert (value.double() - true_value).abs().max() <= 2 * (base_value - true_value).abs().max() + slack
    testing.assert_gradient_within_budget(*gradients)


def clusters(width: float, n: int = 150, c: int = 37, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Two fifths of the rows and more in one class, every ninth ignored."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 5, (n,), generator=g)
    target[: n * 2 // 5] = 2
    target = target[torch.randperm(n, generator=g)]
    logits = 2 * torch.randn(5, c, generator=g)[target] + width * torch.randn(n, c, generator=g)
    target[::9] = -100
    return logits, target


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are sorted first, clusters of more than 16 rows are shared out, and tiles are narrow."""
    monkeypatch.setattr(plan, "TYPICAL_ROWS", 16)
    monkeypatch.setattr(plan, "LARGE_ROWS", 16)
    monkeypatch.setattr(plan, "NARROW", 16)


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("width", [1.5, 1e-3], ids=["wide", "collapsed"])
class TestLargeClusters:
    def test_mean(self, width: float) -> None:
        logits, target = clusters(width)
        check(logits, arguments(target, ce_weight=0.0))
        check(logits, arguments(target, label_smoothing=0.1))

    def test_rows(self, width: float) -> None:
        logits, target = clusters(width)
        check(logits, arguments(target, NONE), torch.randn(150))

    def test_rows_without_cross_entropy(self, width: float) -> None:
        logits, target = clusters(width)
        args = arguments(target, NONE, ce_weight=0.0)
        upstream = torch.randn(150)
        _, gradient = run(logits, args, upstream)
        _, truth = testing.truth(logits, *args, upstream=upstream)
        assert (gradient - truth).norm() <= 1e-6 * truth.norm()

    def test_spectrum(self, width: float) -> None:
        logits, target = clusters(width)
        check(logits, arguments(target, SPECTRUM), torch.rand(8))

    def test_given_centroids(self, width: float) -> None:
        logits, target = clusters(width)
        check(logits, arguments(target, centroids=torch.softmax(torch.randn(8, 37, 37), -1)))

    def test_one_class(self, width: float) -> None:
        logits, _ = clusters(width)
        check(logits, arguments(torch.full((150,), 3)))

    def test_centroids(self, width: float) -> None:
        logits, target = clusters(width)
        for out, true in zip(
            backend.class_centroids(logits, target, EIGHT, -100),
            class_centroids(logits, target, EIGHT, -100),
            strict=True,
        ):
            torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("width", [1.5, 1e-3], ids=["wide", "collapsed"])
def test_many_tiles_agree_with_one(width: float, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = clusters(width, n=40)
    args = arguments(target, ce_weight=0.0)
    value, gradient = run(logits, args)
    monkeypatch.setattr(plan, "NARROW", tile)
    narrow_value, narrow_gradient = run(logits, args)
    torch.testing.assert_close(narrow_value, value, rtol=1e-6, atol=0)
    assert (narrow_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    check(logits, args)


def test_a_wide_tile_beside_a_collapsed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms in one row: their shares add up, and the negligible wide tile costs the other no digit."""
    monkeypatch.setattr(plan, "NARROW", 16)
    g = torch.Generator().manual_seed(5)
    target = torch.arange(24) % 3
    logits = torch.randn(3, 32, generator=g)[target] + 1e-4 * torch.randn(24, 32, generator=g)
    logits[:, 16:] += 3 * torch.randn(24, 16, generator=g) - 12
    for reduction, upstream in ((MEAN, None), (SPECTRUM, torch.rand(8))):
        args = arguments(target, reduction, ce_weight=0.0)
        value, gradient = run(logits, args, upstream)
        true_value, true_gradient = testing.truth(logits, *args, upstream=upstream)
        assert ((value - true_value).abs() <= 1e-5 * true_value).all()
        assert (gradient - true_gradient).norm() <= 1e-5 * true_gradient.norm()


GRIDS = SOME_GRIDS | {"16": tuple(k / 16 for k in range(1, 17))}


@pytest.mark.parametrize("grid", GRIDS)
def test_grids(grid: str) -> None:
    batches = [clusters(1.5, n=30, c=20, seed=seed) for seed in range(3)]
    for reduction in (MEAN, SPECTRUM):
        check_together([(z, arguments(y, reduction, GRIDS[grid])) for z, y in batches])


def test_64_temperatures() -> None:
    """As many as there may be. A sum of 64 terms rounds more than the plain formulation's does, for which one
    place in the target entries may be a third over the budget; all together are well inside of it."""
    batches = [clusters(1.5, n=30, c=20, seed=seed) for seed in range(2)]
    for logits, target in batches:
        args = arguments(target, MEAN, tuple(k / 64 for k in range(1, 65)))
        value, gradient = run(logits, args)
        true_value, true_gradient = testing.truth(logits, *args)
        assert (value - true_value).abs() <= 2e-7 * true_value
        assert (gradient - true_gradient).norm() <= 2e-7 * true_gradient.norm()


# 2**32 + 2 is class 2 to whoever narrows labels to 32 bits before looking at them.
@pytest.mark.parametrize("label", [37, -1, 2**31, 2**32 + 2, -(2**40)])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, SPECTRUM])
def test_a_label_out_of_range_is_not_read_through(label: int, reduction: int) -> None:
    logits, target = clusters(1.5, n=20)
    clean_value, clean_gradient = run(logits, arguments(target, NONE))
    others = target != target[4]  # rows of its own class see it missing from their centroid
    target[4] = label
    value, gradient = run(logits, arguments(target, reduction))
    assert gradient[4].isnan().all()
    assert gradient[torch.arange(20) != 4].isfinite().all()
    if reduction == NONE:
        assert value[4].isnan()
        assert others.sum() > 5
        torch.testing.assert_close(value[others], clean_value[others], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient[others], clean_gradient[others], rtol=1e-5, atol=1e-7)
    else:
        assert value.isnan().all()


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("label", [37, 2**32 + 2])
def test_a_label_out_of_range_among_many_rows(label: int) -> None:
    logits, target = clusters(1.5, n=40)
    target[4] = label
    value, gradient = run(logits, arguments(target))
    assert value.isnan()
    assert gradient[4].isnan().all()
    assert gradient[torch.arange(40) != 4].isfinite().all()


def test_the_interpreter_serves_the_cpu() -> None:
    assert backend.unusable() is None
    logits = torch.zeros(2, 3)
    assert backend.refuses(logits, 8) is None
    assert "float64" in str(backend.refuses(logits.double(), 8))
    assert "64 temperatures" in str(backend.refuses(logits, 65))
    assert "classes" in str(backend.refuses(torch.zeros(1, 1).expand(1, 2**21 + 1), 8))


def test_operators() -> None:
    """torch.library's own checks: schemas, fakes, no hidden mutation."""
    logits, target = clusters(1.5, n=12, c=9)
    for reduction, shape in ((NONE, (12,)), (MEAN, ()), (SPECTRUM, (8,))):
        args = arguments(target, reduction)
        torch.library.opcheck(torch.ops.cmim_kernels.triton_loss, (logits, *args, False))
        # `saved` has words that nobody writes, which are not the same in two calls; what is traced is.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.cmim_kernels.triton_loss, (logits, *args, True), test_utils=checks)
        _, saved = backend.loss(logits, *args, True)
        torch.library.opcheck(
            torch.ops.cmim_kernels.triton_loss_backward, (torch.ones(shape), saved, logits, *args)
        )
    torch.library.opcheck(torch.ops.cmim_kernels.triton_class_centroids, (logits, target, EIGHT, -100))
