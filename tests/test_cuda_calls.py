"""Calls of the CUDA operators in the emulator: launches, bad labels, memory, what the binding refuses."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from cuda_calls import both_paths, check, needs_x86, run, same_bits
from cuda_emulated import AUTOMATIC, emulated, guarded, launches, settings
from operator_calls import EIGHT, Arguments, arguments, clusters
from torch import Tensor

import cmim_kernels as ck
from cmim_kernels import dispatch
from cmim_kernels.reference import MEAN, NONE, SPECTRUM, SUM

pytestmark = needs_x86


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


def test_a_later_call_is_not_blamed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own arguments are valid: no ValueError."""
    monkeypatch.setitem(dispatch._modules, "cuda", emulated())
    logits, target = clusters(1.5, n=20)
    wrong = target.clone()
    wrong[4] = 37
    assert ck.fused_cmi_loss(logits, wrong, backend="cuda").isnan()
    with pytest.raises(RuntimeError, match=r"^target: .* in an earlier call, got 37 at row 4;[^\n]*$"):
        ck.fused_cmi_loss(logits, target, backend="cuda")
    assert ck.fused_cmi_loss(logits, target, backend="cuda").isfinite()


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
    """validate.py checks; here is only what memory safety needs."""
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
        assert (tuple(saved.shape), saved.dtype) == backend.saved_like(logits, len(a), MEAN, True)
        _, saved = backend.loss(logits, *arguments(target, SPECTRUM, a), True)
        assert (tuple(saved.shape), saved.dtype) == backend.saved_like(logits, len(a), SPECTRUM, True)
        _, saved = backend.loss(logits, *arguments(target, a=a), False)
        assert (tuple(saved.shape), saved.dtype) == backend.saved_like(logits, len(a), MEAN, False)


@pytest.mark.parametrize("width", [1.5, 1e-3], ids=["wide", "collapsed"])
class TestTheKeptGradient:
    """Forward left the gradient for an upstream gradient of one: backward scales it, or computes it again."""

    def gradients(self, dtype: torch.dtype, width: float, upstream: float) -> tuple[Tensor, Tensor, Tensor]:
        """What forward kept, what backward makes of it, and what backward makes without it."""
        backend = emulated()
        logits, target = clusters(width, n=40)
        target[::7] = -100
        logits, args = logits.to(dtype), arguments(target, label_smoothing=0.1)
        value, kept = backend.loss(logits, *args, True)
        before, g = kept.clone(), torch.full_like(value, upstream)
        scaled = backend.loss_backward(g, kept, logits, *args)
        assert same_bits(kept, before)
        return kept, scaled, backend.loss_backward(g, kept.new_empty(0), logits, *args)

    @pytest.mark.parametrize("upstream", [0.25, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_is_scaled(self, width: float, dtype: torch.dtype, upstream: float) -> None:
        kept, scaled, again = self.gradients(dtype, width, upstream)
        assert same_bits(scaled, kept * torch.tensor(upstream, dtype=dtype))
        assert (scaled - again).norm() <= 2 * torch.finfo(dtype).eps * again.norm()

    def test_is_scaled_by_powers_of_two(self, width: float) -> None:
        """In bfloat16 these do not round what was rounded."""
        kept, scaled, again = self.gradients(torch.bfloat16, width, 0.25)
        assert same_bits(scaled, 0.25 * kept)
        assert same_bits(scaled, again)

    def test_is_rounded_once(self, width: float) -> None:
        kept, scaled, again = self.gradients(torch.bfloat16, width, 0.3)
        assert same_bits(scaled, again)
        assert not same_bits(scaled, 0.3 * kept)


def test_a_device_without_room_is_a_clear_error() -> None:
    logits, target = clusters(1.5, n=20)
    with settings(AUTOMATIC, shared_kb=16), pytest.raises(RuntimeError, match=r"shared memory|\(20, 37\)"):
        run(logits, arguments(target))
