"""The Triton kernels in Triton's interpreter: what only they have, beside the suites of every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from calls import SOME_GRIDS
from operations import Operations
from operator_calls import EIGHT, Operators, arguments, clusters

from cmim_kernels import testing
from cmim_kernels.backends import triton as backend
from cmim_kernels.backends._triton import calls, plan
from cmim_kernels.backends._triton.plan import interpreting
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, SUM, class_centroids

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]

_operators = Operators(lambda: backend)
run, check, check_together = _operators.run, _operators.check, _operators.check_together
check_norm = _operators.check_norm


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets numbers of plan.py by name. Kept schedules, which were made with others, are forgotten."""

    def forget() -> None:
        for kept in (calls.forward, calls.backward, calls.centroids):
            kept.cache_clear()

    def change(**numbers: int) -> None:
        for name, number in numbers.items():
            monkeypatch.setattr(plan, name, number)
        forget()

    yield change
    forget()


@pytest.fixture
def many_rows(cut: Callable[..., None]) -> None:
    """Rows are sorted first, clusters of more than 16 rows are shared out, and tiles are narrow."""
    cut(TYPICAL_ROWS=16, LARGE_ROWS=16, NARROW=16)


ROWS = 80  # five times as many as make a large cluster


@pytest.mark.usefixtures("many_rows")
@pytest.mark.parametrize("width", [1.5, 1e-3], ids=["wide", "collapsed"])
class TestLargeClusters:
    def test_mean(self, width: float) -> None:
        logits, target = clusters(width, n=ROWS)
        check(logits, arguments(target, ce_weight=0.0))
        check(logits, arguments(target, label_smoothing=0.1))

    def test_rows(self, width: float) -> None:
        logits, target = clusters(width, n=ROWS)
        check(logits, arguments(target, NONE), torch.randn(ROWS))

    def test_rows_without_cross_entropy(self, width: float) -> None:
        logits, target = clusters(width, n=ROWS)
        check_norm(logits, arguments(target, NONE, ce_weight=0.0), torch.randn(ROWS))

    def test_spectrum(self, width: float) -> None:
        logits, target = clusters(width, n=ROWS)
        check(logits, arguments(target, SPECTRUM), torch.rand(8))

    def test_given_centroids(self, width: float) -> None:
        logits, target = clusters(width, n=ROWS)
        check(logits, arguments(target, centroids=torch.softmax(torch.randn(8, 37, 37), -1)))

    def test_one_class(self, width: float) -> None:
        logits, _ = clusters(width, n=ROWS)
        check(logits, arguments(torch.full((ROWS,), 3)))

    def test_centroids(self, width: float) -> None:
        logits, target = clusters(width, n=ROWS)
        for out, true in zip(
            backend.class_centroids(logits, target, EIGHT, -100),
            class_centroids(logits, target, EIGHT, -100),
            strict=True,
        ):
            torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tile", [16, 32])
@pytest.mark.parametrize("width", [1.5, 1e-3], ids=["wide", "collapsed"])
def test_many_tiles_agree_with_one(width: float, tile: int, cut: Callable[..., None]) -> None:
    logits, target = clusters(width, n=40)
    args = arguments(target, ce_weight=0.0)
    value, gradient = run(logits, args)
    cut(NARROW=tile)
    narrow_value, narrow_gradient = run(logits, args)
    torch.testing.assert_close(narrow_value, value, rtol=1e-6, atol=0)
    assert (narrow_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    check(logits, args)


@pytest.mark.parametrize(("a", "seam"), [(0.125, 0.6), (1.0, 0.075)], ids=["T=8", "T=1"])
@pytest.mark.parametrize("times", [0.7, 0.9, 1.15, 1.5])
def test_both_sides_of_the_seam(a: float, seam: float, times: float) -> None:
    """Clusters as wide as makes the plain form take over from the centred one, and a little more and less."""
    logits, target = clusters(times * seam, n=64, c=200)
    check_norm(logits, arguments(target, SPECTRUM, (a,), ce_weight=0.0), at_most=2e-6)


def test_a_wide_tile_beside_a_collapsed_one(cut: Callable[..., None]) -> None:
    """Both forms in one row: their shares add up, and the negligible wide tile costs the other no digit."""
    cut(NARROW=16)
    g = torch.Generator().manual_seed(5)
    target = torch.arange(24) % 3
    logits = torch.randn(3, 32, generator=g)[target] + 1e-4 * torch.randn(24, 32, generator=g)
    logits[:, 16:] += 3 * torch.randn(24, 16, generator=g) - 12
    for reduction, upstream in ((MEAN, None), (SPECTRUM, torch.rand(8)), (NONE, torch.rand(24))):
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
        check_together([(z, arguments(y, reduction, GRIDS[grid]), None) for z, y in batches])


def test_64_temperatures() -> None:
    """As many as there may be. A sum of 64 terms rounds more than the plain formulation's does, for which one
    place in the target entries may be a third over the budget; all together are well inside of it."""
    batches = [clusters(1.5, n=30, c=20, seed=seed) for seed in range(2)]
    for logits, target in batches:
        args = arguments(target, MEAN, tuple(k / 64 for k in range(1, 65)))
        check_norm(logits, args, at_most=2e-7)


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


def test_only_who_looks_sees_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others call past the dispatcher, to the same result."""
    logits, target = clusters(1.5, n=12, c=9)
    args, upstream = arguments(target), torch.tensor(-2.0)

    def step(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, saved = backend.loss(logits, *args, True)
        return value, backend.loss_backward(grad, saved, logits, *args)

    with Operations() as operations:
        expected = step(upstream)
    own = [call for call in operations.calls if call.startswith("cmim_kernels.")]
    assert own == ["cmim_kernels.triton_loss.default", "cmim_kernels.triton_loss_backward.default"]
    with monkeypatch.context() as patch:
        patch.setattr(torch._ops.OpOverload, "__call__", None)
        results = step(upstream)
    for found, wanted in zip(results, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(step(torch._neg_view(-upstream))[1], expected[1])
    assert not step(torch._efficientzerotensor(()))[1].any()
