"""The CUDA kernels in the emulator: what only they have, beside the suites that every backend passes."""

from __future__ import annotations

import mmap
import platform
from typing import Any

import pytest
import torch
from cuda_emulated import AUTOMATIC, FUSED, TILED, emulated, guarded, launches, settings
from torch import Tensor

from cmim_kernels import reference, testing
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, SUM

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches between threads in x86-64 machine code"
)
both_paths = pytest.mark.parametrize("path", [FUSED, TILED], ids=["fused", "tiled"])

EIGHT = tuple(k / 8 for k in range(1, 9))
Arguments = tuple[Any, ...]


def arguments(target: Tensor, reduction: int = MEAN, a: tuple[float, ...] = EIGHT, **other: Any) -> Arguments:
    """As the operators take them after the logits."""
    w = tuple((1 + k) / len(a) for k in range(len(a)))
    numbers = (other.get("ce_weight", 1.0), 1.0, other.get("label_smoothing", 0.0), -100, reduction)
    return (target, a, w, other.get("class_weight"), other.get("centroids"), *numbers)


def run(logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    backend = emulated()
    value, saved = backend.loss(logits, *args, True)
    upstream = torch.ones_like(value) if upstream is None else upstream
    return value, backend.loss_backward(upstream, saved, logits, *args)


def check(logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> None:
    """Value and gradient within the budget, or within the bounds for collapsed clusters."""
    check_together([(logits, args, upstream)])


def check_together(calls: list[tuple[Tensor, Arguments, Tensor | None]]) -> None:
    """One small batch of plain PyTorch's is exact by luck now and then: the budget of several together."""
    outs, truths, bases = [], [], []
    for logits, args, upstream in calls:
        outs.append(run(logits, args, upstream))
        truths.append(testing.truth(logits, *args, upstream=upstream))
        bases.append(testing.base(logits, *args, upstream=upstream))
    if all(value.abs().max() < testing.COLLAPSED_CMI for value, _ in truths):
        for out, truth in zip(outs, truths, strict=True):
            testing.assert_collapse_accuracy(*out, *truth)
        return
    results = (outs, truths, bases)
    value, true_value, base_value = (torch.cat([v.flatten() for v, _ in part]) for part in results)
    slack = torch.finfo(value.dtype).eps * true_value.abs().max()
    assert (value.double() - true_value).abs().max() <= 2 * (base_value - true_value).abs().max() + slack
    gradients = (torch.cat([gradient for _, gradient in part]) for part in results)
    testing.assert_gradient_within_budget(*gradients, torch.cat([args[0] for _, args, _ in calls]))


def check_norm(logits: Tensor, args: Arguments, upstream: Tensor | None = None) -> None:
    """Where plain PyTorch is no yardstick or there is but one batch: 1e-6 of the norms."""
    value, gradient = run(logits, args, upstream)
    true_value, true_gradient = testing.truth(logits, *args, upstream=upstream)
    assert (value - true_value).norm() <= 1e-6 * true_value.norm()
    assert (gradient - true_gradient).norm() <= 1e-6 * true_gradient.norm()


def clusters(
    width: float, n: int = 150, c: int = 37, classes: int = 5, seed: int = 3
) -> tuple[Tensor, Tensor]:
    """Most rows in one class, every ninth ignored."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (n,), generator=g)
    target[: 2 * n // 5] = classes // 2
    target = target[torch.randperm(n, generator=g)]
    logits = 2 * torch.randn(classes, c, generator=g)[target] + width * torch.randn(n, c, generator=g)
    target[::9] = -100
    return logits, target


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.equal(x.view(kind), y.view(kind))


WIDTHS = {"wide": 1.5, "some_temperatures_collapsed": 0.4, "collapsed": 1e-3}
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


GRIDS = {
    "consecutive_from_3": tuple(k / 10 for k in range(3, 9)),
    "powers_of_two": (0.125, 0.25, 0.5, 1.0),
    "descending_12": tuple(k / 8 for k in range(12, 0, -1)),
    "irregular_multiples": (0.9, 0.1, 0.3, 0.6),
    "no_common_base": (0.07, 1.7, 0.3),
    "twice_the_same": (0.5, 0.5),
    "single": (2.5,),
    "float32": tuple(torch.linspace(0.1, 1.0, 10).tolist()),
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


class TestLaunches:
    def count(self, logits: Tensor, args: Arguments) -> tuple[int, int]:
        backend = emulated()
        before = launches()
        value, saved = backend.loss(logits, *args, True)
        middle = launches()
        backend.loss_backward(torch.ones_like(value), saved, logits, *args)
        return middle - before, launches() - middle

    def test_the_typical_batch_takes_one_launch_each_way(self) -> None:
        logits, target = clusters(1e-3)
        assert self.count(logits, arguments(target)) == (1, 1)
        assert self.count(logits, arguments(target, SPECTRUM)) == (1, 1)
        assert self.count(logits, arguments(target, NONE)) == (1, 2)

    def test_many_rows_take_the_tiled_kernels(self) -> None:
        for rows, expected in ((4096, (1, 1)), (4097, (10, 1))):
            logits, target = torch.randn(rows, 3), torch.arange(rows) % 3
            assert self.count(logits, arguments(target, a=(1.0,))) == expected

    def test_many_elements_take_the_tiled_kernels(self) -> None:
        target = torch.tensor([5, -100])
        for classes, expected in ((2**22, 1), (2**22 + 1, 5)):
            args = (target, (1.0,), (1.0,), None, None, 1.0, 0.0, 0.0, -100, MEAN)
            before = launches()
            value, _ = emulated().loss(torch.zeros(1, 1).expand(2, classes), *args, False)
            assert launches() - before == expected
            torch.testing.assert_close(value, torch.tensor(float(classes)).log())

    def test_captured_launches(self) -> None:
        """A capture has counters of its own, so that its replays meet no other launch."""
        logits, target = clusters(1.5)
        expected, _ = run(logits, arguments(target))
        with settings(capturing=True):
            for _ in range(2):
                value, _ = run(logits, arguments(target))
                assert same_bits(value, expected)

    def test_no_counter_left(self) -> None:
        """The 4096 counters of the library given away, the call's own memory serves."""
        logits, target = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        args = arguments(target, a=(1.0,))
        with settings(capturing=True):
            for _ in range(4100):
                value, _ = emulated().loss(logits, *args, False)
        torch.testing.assert_close(value, torch.tensor(2.0).log())
        value, _ = emulated().loss(logits, *args, False)
        torch.testing.assert_close(value, torch.tensor(2.0).log())


@both_paths
@pytest.mark.parametrize("label", [37, -1, 2**31, 2**36, -(2**36)])
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM, SPECTRUM])
def test_a_label_out_of_range_is_told_and_not_read_through(path: int, label: int, reduction: int) -> None:
    logits, target = clusters(1.5, n=20)
    target[4] = label
    logits, target = guarded(logits), guarded(target)
    backend = emulated()
    with settings(path):
        value, gradient = run(logits, arguments(target, reduction))
        assert gradient[4].isnan().all()
        if reduction == NONE:
            assert value[4].isnan()
            assert value[torch.arange(20) != 4].isfinite().all()
        else:
            assert value.isnan().all()
        message = rf"labels in \[0, C\) or ignore_index in an earlier call, got {label} at row 4;"
        with pytest.raises(RuntimeError, match=message):
            backend.loss(logits, *arguments(target, reduction), False)
        backend.check_labels()  # told once
        target[4] = 0
        assert run(logits, arguments(target, reduction))[0].isfinite().all()
        backend.check_labels()


def test_a_label_out_of_range_has_no_centroid() -> None:
    logits, target = clusters(1.5, n=20)
    target[4] = 37
    backend = emulated()
    centroids, counts = backend.class_centroids(guarded(logits), guarded(target), EIGHT, -100)
    with pytest.raises(RuntimeError, match="got 37 at row 4"):
        backend.check_labels()
    target[4] = -100
    expected, expected_counts = backend.class_centroids(logits, target, EIGHT, -100)
    assert torch.equal(centroids, expected)
    assert torch.equal(counts, expected_counts)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 16, 63, 130])
def test_nothing_is_read_beyond_the_arguments(path: int, dtype: torch.dtype, classes: int) -> None:
    """Every argument ends where memory ends: logits whole, logits[:, 1:], and targets at odd offsets."""
    g = torch.Generator().manual_seed(classes)
    whole = torch.randn(13, classes + 1, generator=g).to(dtype)
    target = torch.randint(0, classes, (14,), generator=g) % 4
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = guarded(0.5 + torch.rand(classes, generator=g, dtype=compute))
    given = guarded(torch.softmax(torch.randn(2, classes, classes, generator=g, dtype=compute), -1))
    for logits, labels in (
        (guarded(whole[:, 1:]), guarded(target[:13])),
        (guarded(whole)[:, 1:], guarded(target)[1:]),
        (guarded(whole.t()[1:]).t(), guarded(target[:13])),
    ):
        for args in (
            arguments(labels, a=(0.5, 1.0), class_weight=weight, label_smoothing=0.1),
            arguments(labels, NONE, a=(0.5, 1.0), centroids=given),
        ):
            with settings(path):
                value, gradient = run(
                    logits, args, torch.ones(13, dtype=compute) if args[-1] == NONE else None
                )
            copies = (logits.clone(memory_format=torch.contiguous_format), *args)
            with settings(path):
                expected, expected_gradient = run(*copies[:1], copies[1:])
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-6)


@both_paths
@pytest.mark.parametrize("layout", ["rows_far_apart", "columns_far_apart"])
def test_offsets_beyond_32_bits(path: int, layout: str) -> None:
    """A view whose elements are more than 2^31 apart, over memory that is mostly never touched."""
    far, n, c = 2**31 + 5, 3, 4
    strides = (far, 1) if layout == "rows_far_apart" else (1, far)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 4 * (3 * far + 4), flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for 26 GB: {error}")
    logits = torch.frombuffer(memory, dtype=torch.float32).as_strided((n, c), strides)
    logits.copy_(torch.randn(n, c))
    target = torch.tensor([2, 2, 1])
    with settings(path):
        check(logits, arguments(target))


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


def test_upstream_gradients_of_any_stride() -> None:
    logits, target = clusters(1.5, n=30)
    wide = torch.rand(60)
    for args, upstream in (
        (arguments(target, NONE), wide[::2]),
        (arguments(target, NONE), wide[:1].expand(30)),
        (arguments(target, SPECTRUM), wide[:16:2]),
    ):
        _, gradient = run(logits, args, upstream)
        _, expected = run(logits, args, upstream.contiguous())
        assert same_bits(gradient, expected)


def test_what_the_binding_refuses() -> None:
    """functional.py checks; here is only what memory safety needs."""
    backend = emulated()
    logits, target = clusters(1.5, n=20)
    args = arguments(target)
    value, saved = backend.loss(logits, *args, True)

    def refused(match: str, call: Any, *arguments: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            call(*arguments)

    refused("target: expected int64", backend.loss, logits, target.int(), *args[1:], True)
    refused(r"expected \(N, C\) and \(N,\)", backend.loss, logits, target[1:], *args[1:], True)
    refused("expected float32, float64", backend.loss, logits.long(), *args, True)
    refused("1 to 64", backend.loss, logits, *arguments(target, a=(0.5,) * 65), True)
    refused("class_weight", backend.loss, logits, *arguments(target, class_weight=torch.ones(3)), True)
    refused("centroids", backend.loss, logits, *arguments(target, centroids=torch.ones(8, 37, 36)), True)
    refused("grad: expected", backend.loss_backward, torch.ones(3), saved, logits, *args)
    refused("saved: expected", backend.loss_backward, value, saved[1:].clone(), logits, *args)


def test_what_is_saved_has_the_shape_that_tracing_is_told() -> None:
    backend = emulated()
    for a in ((1.0,), EIGHT, tuple(k / 9 for k in range(1, 10)), (0.3, 1.7, 2.0)):
        logits, target = clusters(1.5, n=20)
        _, saved = backend.loss(logits, *arguments(target, a=a), True)
        assert tuple(saved.shape) == backend.saved_shape(logits, len(a), MEAN, True)


def test_a_device_without_room_is_a_clear_error() -> None:
    logits, target = clusters(1.5, n=20)
    with settings(AUTOMATIC, shared_kb=16), pytest.raises(RuntimeError, match=r"shared memory|\(20, 37\)"):
        run(logits, arguments(target))
