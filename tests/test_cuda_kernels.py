"""The CUDA kernels in the emulator: shapes, grids, devices and orders that only they care about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import SOME_GRIDS
from cuda_calls import both_paths, check, check_norm, check_together, needs_x86, run, same_bits
from cuda_emulated import FUSED, TILED, emulated, settings
from operator_calls import EIGHT, arguments, clusters

from cmim_kernels import reference, testing
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, SUM

pytestmark = needs_x86

WIDTHS = {"wide": 1.5, "some_temperatures_collapsed": 0.4, "collapsed": 1e-3}
Grid = tuple[float, ...]
grids = pytest.mark.parametrize("a", [EIGHT, (0.1, 0.5, 1.3)], ids=["powers", "apart"])
widths = pytest.mark.parametrize("width", list(WIDTHS.values()), ids=list(WIDTHS))


@both_paths
@widths
class TestManyRows:
    """Rows in several batches, columns in several parts."""

    def test_mean(self, path: int, width: float) -> None:
        logits, target = clusters(width)
        with settings(path, processors=40):
            check(logits, arguments(target, ce_weight=0.0))
            check(logits, arguments(target, label_smoothing=0.1))

    def test_rows(self, path: int, width: float) -> None:
        logits, target = clusters(width)
        with settings(path, processors=40):
            check(logits, arguments(target, NONE), torch.randn(150))

    def test_rows_without_cross_entropy(self, path: int, width: float) -> None:
        logits, target = clusters(width)
        with settings(path, processors=40):
            check_norm(logits, arguments(target, NONE, ce_weight=0.0), torch.randn(150))

    def test_spectrum(self, path: int, width: float) -> None:
        logits, target = clusters(width)
        with settings(path, processors=40):
            check(logits, arguments(target, SPECTRUM), torch.rand(8))

    def test_given_centroids(self, path: int, width: float) -> None:
        logits, target = clusters(width)
        with settings(path, processors=40):
            check(logits, arguments(target, centroids=torch.softmax(torch.randn(8, 37, 37), -1)))

    def test_parts_of_the_columns(self, path: int, width: float) -> None:
        """More than a thousand columns for each class: several tiles, in the tiled kernels several parts."""
        logits, target = clusters(width, n=40, c=2100, classes=3)
        for processors in (3, 40):
            with settings(path, processors=processors):
                check(logits, arguments(target, SPECTRUM), torch.rand(8))
                check(logits, arguments(target, NONE), torch.rand(40))


AT_MOST = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float64: 1e-12}


@widths
@grids
class TestClustersOfBlocks:
    """Few classes of many columns: several blocks share a class, in the fused kernel of grids apart."""

    def same_in_any_order(
        self, width: float, a: Grid, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        """As many as eight blocks, of which the last may have fewer columns, or none."""
        upstream = options.pop("upstream", None)
        for columns, order in ((256, 1), (1027, 5)):
            logits, target = clusters(width, n=12, c=columns, classes=3)
            logits, args = logits.to(dtype), arguments(target, a=a, **options)
            with settings(FUSED, processors=100):
                check_norm(logits, args, upstream, AT_MOST[dtype])
                value, gradient = run(logits, args, upstream)
            with settings(FUSED, order=order, processors=100):
                again, gradient_again = run(logits, args, upstream)
            assert same_bits(value, again)
            assert same_bits(gradient, gradient_again)

    @pytest.mark.parametrize("dtype", AT_MOST, ids=str)
    def test_mean(self, width: float, a: Grid, dtype: torch.dtype) -> None:
        self.same_in_any_order(width, a, dtype, label_smoothing=0.1)

    @pytest.mark.parametrize("columns", [257, 258, 385, 1030])
    @pytest.mark.parametrize("shared_kb", [227, 60], ids=["on_chip", "too_large_for_the_chip"])
    def test_double_precision(self, width: float, a: Grid, columns: int, shared_kb: int) -> None:
        """Sixteen bytes are two numbers, half of what a thread takes at a time."""
        logits, target = clusters(width, n=20, c=columns, classes=2)
        for centroids in (None, torch.softmax(torch.randn(len(a), columns, columns).double(), -1)):
            with settings(FUSED, processors=100, shared_kb=shared_kb):
                check_norm(logits.double(), arguments(target, a=a, centroids=centroids), at_most=1e-12)

    def test_rows(self, width: float, a: Grid) -> None:
        self.same_in_any_order(width, a, reduction=NONE, upstream=torch.rand(12))

    def test_spectrum(self, width: float, a: Grid) -> None:
        self.same_in_any_order(width, a, reduction=SPECTRUM, upstream=torch.rand(len(a)))

    def test_class_weights(self, width: float, a: Grid) -> None:
        logits, target = clusters(width, n=12, c=600, classes=3)
        weight = 0.5 + torch.rand(600)
        with settings(FUSED, processors=100):
            check(logits, arguments(target, a=a, class_weight=weight, label_smoothing=0.2))

    def test_given_centroids(self, width: float, a: Grid) -> None:
        logits, target = clusters(width, n=12, c=300, classes=3)
        centroids = torch.softmax(torch.randn(len(a), 300, 300), -1)
        with settings(FUSED, processors=100):
            check(logits, arguments(target, a=a, centroids=centroids))

    def test_not_in_code_for_devices_without_them(self, width: float, a: Grid) -> None:
        """Built with CUDA_ARCH_LIST=80, a newer device's code comes from PTX that has no barrier."""
        logits, target = clusters(width, n=12, c=520, classes=3)
        with settings(FUSED, processors=100, code=80):
            check(logits, arguments(target, a=a))


@grids
def test_where_the_largest_logit_is_in_a_cluster(a: Grid) -> None:
    """In any block's columns, in several at once, and no number in one of them."""
    logits, target = torch.randn(12, 520), torch.arange(12) % 2
    logits[0, 519], logits[1, 130] = 9.0, 9.0
    logits[2, [5, 200, 400]] = 9.0
    logits[3, 128:260] = -torch.inf
    target[4] = -100
    args = arguments(target, a=a)
    with settings(FUSED, processors=200):
        check(logits, args)
        for bad in (torch.nan, torch.inf):
            logits[5, 300] = bad
            value, gradient = run(logits, args)
            assert value.isnan()
            assert gradient[5].isnan().all()
            assert gradient[4].count_nonzero() == 0


@pytest.mark.parametrize("shared_kb", range(48, 53))
def test_one_row_that_just_fits_the_chip(shared_kb: int) -> None:
    """Two blocks share a class: the columns of a whole tile, beyond those of a block, lie behind the row."""
    logits, target = torch.randn(2, 600), torch.arange(2)
    upstream = torch.rand(5)
    with settings(FUSED, processors=6, shared_kb=shared_kb):
        value, gradient = run(logits, arguments(target, SPECTRUM, (0.07, 0.3, 0.55, 1.0, 1.7)), upstream)
    assert value.abs().max() <= 1e-12
    assert gradient.abs().max() <= 1e-8


@both_paths
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 33, 63, 64, 65, 127, 129])
def test_one_class_of_so_many_rows(path: int, rows: int) -> None:
    """On both sides of a batch of rows, and of what a group of threads takes."""
    g = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 21, generator=g)
    with settings(path):
        check(logits, arguments(torch.full((rows,), 3)))
        check(1e-3 * logits, arguments(torch.full((rows,), 3), ce_weight=0.0))


@both_paths
@pytest.mark.parametrize("classes", [1, 4, 60, 1021, 1024, 1027, 4099])
def test_dtypes_at_the_tiles_edges(path: int, classes: int) -> None:
    g = torch.Generator().manual_seed(classes)
    logits, target = torch.randn(9, classes, generator=g), torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 0]) % classes
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with settings(path):
            check(logits.to(dtype), arguments(target))
    wide = logits.double()
    with settings(path):
        value, gradient = run(wide, arguments(target))
    true_value, true_gradient = testing.truth(wide, *arguments(target))
    torch.testing.assert_close(value, true_value, rtol=1e-12, atol=1e-14)
    assert (gradient - true_gradient).norm() <= 1e-12 * true_gradient.norm() + 1e-16


GRIDS = SOME_GRIDS | {
    "64": tuple(k / 64 for k in range(1, 65)),
    "64_apart": tuple((k / 64) ** 1.5 for k in range(1, 65)),
}


@both_paths
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [1.5, 1e-3], ids=["wide", "collapsed"])
def test_grids(path: int, grid: str, width: float) -> None:
    a = GRIDS[grid]
    batches = [clusters(width, n=30, c=20, seed=seed) for seed in range(4)]
    upstream = torch.rand(len(a))
    with settings(path):
        check_together([(z, arguments(y, a=a, ce_weight=0.0), None) for z, y in batches])
        check_together([(z, arguments(y, SPECTRUM, a), upstream) for z, y in batches])
        check_norm(batches[0][0], arguments(batches[0][1], NONE, a, ce_weight=0.0), torch.rand(30))


@both_paths
@pytest.mark.parametrize("shared_kb", [99, 163, 227])
def test_devices_of_other_sizes(path: int, shared_kb: int) -> None:
    """Tables and copied rows have what room the device leaves; a class that does not fit stays in memory."""
    for width in (1.5, 1e-3):
        logits, target = clusters(width, n=70, c=900, classes=3)
        for processors in (1, 7):
            with settings(path, processors=processors, shared_kb=shared_kb):
                check_norm(logits, arguments(target, SPECTRUM, ce_weight=0.0))
                check_norm(logits, arguments(target, NONE, ce_weight=0.0), torch.rand(70))


@both_paths
@widths
@pytest.mark.parametrize("reduction", [MEAN, NONE, SPECTRUM])
def test_the_order_of_threads_and_blocks_changes_no_bit(path: int, width: float, reduction: int) -> None:
    """A race would show: fibers run from one barrier to the next, in orders of the test's choice."""
    logits, target = clusters(width, n=60, c=300, classes=4)
    for args in (
        arguments(target, reduction, label_smoothing=0.1),
        arguments(target, reduction, a=(0.3, 1.7)),
        arguments(target, reduction, a=(0.5, 1.0), centroids=torch.softmax(torch.randn(2, 300, 300), -1)),
    ):
        with settings(path, processors=5):
            first = run(logits, args)
        for order in (1, 2, 3):
            with settings(path, order, processors=5):
                value, gradient = run(logits, args)
            assert same_bits(value, first[0])
            assert same_bits(gradient, first[1])


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_changes_no_centroid(order: int) -> None:
    logits, target = clusters(1.5, c=300)
    first = emulated().class_centroids(logits, target, EIGHT, -100)
    with settings(order=order):
        again = emulated().class_centroids(logits, target, EIGHT, -100)
    assert same_bits(again[0], first[0])
    assert torch.equal(again[1], first[1])


@widths
def test_both_kinds_of_kernels_agree(width: float) -> None:
    logits, target = clusters(width, n=60, c=300)
    for args in (arguments(target, ce_weight=0.0), arguments(target, SUM), arguments(target, a=(0.3, 1.1))):
        with settings(FUSED):
            value, gradient = run(logits, args)
        with settings(TILED, processors=40):
            other_value, other_gradient = run(logits, args)
        torch.testing.assert_close(other_value, value, rtol=1e-6, atol=0)
        assert (other_gradient - gradient).norm() <= 1e-6 * gradient.norm()


@both_paths
@pytest.mark.parametrize(("a", "seam"), [(0.125, 0.57), (1.0, 0.2)], ids=["T=8", "T=1"])
@pytest.mark.parametrize("times", [0.7, 0.9, 1.15, 1.5])
def test_both_sides_of_the_seam(a: float, seam: float, times: float, path: int) -> None:
    """Clusters as wide as makes the plain form take over from the centred one, and a little more and less."""
    logits, target = clusters(times * seam, n=64, c=200)
    with settings(path):
        check_norm(logits, arguments(target, SPECTRUM, (a,), ce_weight=0.0), at_most=1.5e-6)


@both_paths
def test_a_wide_tile_beside_a_collapsed_one(path: int) -> None:
    """The negligible wide columns cost the others no digit."""
    g = torch.Generator().manual_seed(5)
    target = torch.arange(24) % 3
    logits = torch.randn(3, 32, generator=g)[target] + 1e-4 * torch.randn(24, 32, generator=g)
    logits[:, 16:] += 3 * torch.randn(24, 16, generator=g) - 12
    for reduction, upstream in ((MEAN, None), (SPECTRUM, torch.rand(8))):
        args = arguments(target, reduction, ce_weight=0.0)
        with settings(path):
            value, gradient = run(logits, args, upstream)
        true_value, true_gradient = testing.truth(logits, *args, upstream=upstream)
        assert ((value - true_value).abs() <= 1e-5 * true_value).all()
        assert (gradient - true_gradient).norm() <= 1e-5 * true_gradient.norm()


@both_paths
def test_collapsed_but_for_a_class_that_only_one_row_has(path: int) -> None:
    """exp(a d) would overflow where the first row masks a class by a large number: the plain form serves."""
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(1, 12, generator=g) + 1e-3 * torch.randn(10, 12, generator=g)
    logits[:, 5] -= 60
    logits[0, 5] = -1e9
    with settings(path):
        check(logits, arguments(torch.zeros(10, dtype=torch.long)))


@both_paths
def test_collapsed_but_for_a_mask_at_a_hot_temperature(path: int) -> None:
    """What one row masks has vanished there, though a d of any number one would call far is small."""
    logits = torch.randn(1, 300) + 0.01 * torch.randn(12, 300)
    logits[3, 5] = -torch.inf
    with settings(path):
        check_norm(logits, arguments(torch.zeros(12, dtype=torch.long), SPECTRUM, (1e-4,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [3, 300, 2100])
def test_centroids(dtype: torch.dtype, classes: int) -> None:
    logits, target = clusters(1.5, n=40, c=classes, classes=3)
    logits = logits.to(dtype)
    logits[:, 0] = -torch.inf
    for z in (logits, torch.cat([logits, logits], 1)[:, classes:]):
        for processors in (3, 40):
            with settings(processors=processors):
                out, counts = emulated().class_centroids(z, target, (0.3, 1.0), -100)
            true, true_counts = reference.class_centroids(logits.double(), target, (0.3, 1.0), -100)
            assert torch.equal(counts, true_counts)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(out.double(), true, rtol=tolerance, atol=1e-37)
