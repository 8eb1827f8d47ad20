"""A training step on plain CPU tensors goes past the dispatcher: to the same bits, and only where it may."""

from __future__ import annotations

import contextlib
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import regime
from operations import Operations
from torch import Tensor
from torch.overrides import TorchFunctionMode

import cmim_kernels as ck
import setup
from cmim_kernels import __main__ as command
from cmim_kernels.backends import cpu
from cmim_kernels.reference import MEAN, SUM

A, W = (0.25, 0.5, 1.0), (0.5, 0.25, 0.25)
OPTIONS = (1.0, 1.0, 0.1, 2)  # ce_weight, cmi_weight, label_smoothing, ignore_index


pytestmark = pytest.mark.skipif(
    not (Path(sysconfig.get_path("include")) / "Python.h").is_file(), reason="needs Python's headers"
)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return regime("random").make()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the direct call answered, as often as it was called."""
    answers: list[bool] = []

    def recording(*args: Any) -> bool:
        answers.append(direct(*args))
        return answers[-1]

    direct = cpu._direct
    assert direct is not None, cpu.why_dispatched
    monkeypatch.setattr(cpu, "_direct", recording)
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_same_bits(
    batch: tuple[Tensor, Tensor], calls: list[bool], dtype: torch.dtype, reduction: int
) -> None:
    logits, target = batch[0].to(dtype), batch[1].repeat_interleave(2)[::2]
    arguments = (logits, target, A, W, None, None, *OPTIONS, reduction, True)
    for found, expected in zip(cpu.loss(*arguments), cpu._loss(*arguments), strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.is_contiguous()
        assert torch.equal(found, expected)
    assert calls == [True]


def test_a_training_step_takes_it(batch: tuple[Tensor, Tensor], calls: list[bool]) -> None:
    weight = torch.randn(batch[0].shape[1], batch[0].shape[1], requires_grad=True)
    ck.CMIMLoss()(batch[0] @ weight, batch[1]).backward()
    assert calls == [True]


@contextlib.contextmanager
def profiler() -> Iterator[Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        yield found


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watch", [Operations, Functions, profiler])
def test_who_looks_sees_the_operator(
    batch: tuple[Tensor, Tensor], calls: list[bool], watch: Callable[[], Any]
) -> None:
    logits = batch[0].clone().requires_grad_()
    with watch() as watcher:
        ck.fused_cmi_loss(logits, batch[1])
    assert not calls
    if watch is Operations:
        assert "cmim_kernels.loss.default" in watcher.calls
    if watch is profiler:
        assert "cmim_kernels::loss" in {event.name for event in watcher.events()}


class Subclass(Tensor):
    pass


LIKE = {
    "subclass": lambda z: z.as_subclass(Subclass),
    "negative view": torch._neg_view,
    "strides": lambda z: z.t().contiguous().t(),
    "float16": lambda z: z.half(),
}


@pytest.mark.parametrize("kind", LIKE)
def test_other_tensors_take_the_operator(batch: tuple[Tensor, Tensor], calls: list[bool], kind: str) -> None:
    logits = LIKE[kind](batch[0])
    loss = ck.fused_cmi_loss(logits.detach().requires_grad_(), batch[1])
    torch.testing.assert_close(
        loss.as_subclass(Tensor),
        ck.fused_cmi_loss(logits.resolve_neg().clone(), batch[1], backend="reference"),
    )
    assert not calls


def test_tables_and_compilers_take_the_operator(batch: tuple[Tensor, Tensor], calls: list[bool]) -> None:
    logits, target = batch[0].clone().requires_grad_(), batch[1]
    ck.fused_cmi_loss(logits, target, weight=torch.ones(logits.shape[1]))
    ck.fused_cmi_loss(logits, target, reduction="none")
    torch.compile(ck.fused_cmi_loss, backend="eager", fullgraph=True)(logits, target)
    assert not calls


def test_without_elements(calls: list[bool]) -> None:
    """Whose address is none: the operator answers."""
    logits = torch.empty(0, 3, requires_grad=True)
    assert ck.fused_cmi_loss(logits, torch.empty(0, dtype=torch.int64)).isnan()
    assert calls == [False]
    zero = torch._efficientzerotensor((4, 3))
    value, saved = torch.empty(()), torch.empty(4, 3)
    assert not cpu._direct(zero, torch.zeros(4, dtype=torch.int64), value, saved, A, W, *OPTIONS, MEAN)


def test_a_label_out_of_range_is_told(batch: tuple[Tensor, Tensor]) -> None:
    target = batch[1].clone()
    target[3] = 10**6
    with pytest.raises(ValueError, match=r"^target: expected labels in .* got 1000000 at row 3$"):
        ck.fused_cmi_loss(batch[0].clone().requires_grad_(), target)


def test_why_it_is_not_there(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The report says so, and the operator answers."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "abiflags", "t")
        assert cpu._bind() == (None, "a Python without a global lock has no limited API")
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__dlpack_c_exchange_api__", object())
        function, reason = cpu._bind()
        assert function is None
        assert "PyCapsule" in str(reason)
    assert cpu._bind()[1] is None
    assert "microseconds" not in command.report()
    monkeypatch.setattr(cpu, "_direct", None)
    monkeypatch.setattr(cpu, "why_dispatched", "no reason")
    assert re.search(r"cpu +usable, .* microseconds .*: no reason\n", command.report())
    assert ck.fused_cmi_loss(batch[0].clone().requires_grad_(), batch[1]).isfinite()


def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library is built without it."""
    assert setup.python_includes() == ["-isystem", sysconfig.get_path("include")]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup.python_includes() == []


class TestTheFunctionItself:
    """It says so where its arguments are not what it reads through."""

    def arguments(self) -> list[Any]:
        logits, target = regime("random").make()
        return [logits, target, torch.empty(()), torch.empty_like(logits), A, W, *OPTIONS, MEAN]

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (0, 3.0),
            (0, torch.zeros(4)),
            (0, torch.zeros(2, 3, dtype=torch.int32)),
            (1, torch.zeros(1, dtype=torch.int64)),
            (1, torch.zeros(1, dtype=torch.int32)),
            (2, torch.empty((), dtype=torch.float64)),
            (2, torch.empty(1)),
            (3, torch.empty(1, 1)),
            (3, torch.empty((1, 1), device="meta")),
            (5, list(W)),
        ],
    )
    def test_what_it_cannot_read(self, place: int, value: object) -> None:
        arguments = self.arguments()
        arguments[place] = value
        assert cpu._direct is not None
        assert cpu._direct(*arguments) is False

    @pytest.mark.parametrize(
        ("place", "value", "error"),
        [
            (4, A[1:], ValueError),
            (4, (), ValueError),
            (5, ("a", "b", "c"), TypeError),
            (6, None, TypeError),
            (9, 2**63, OverflowError),
            (10, 0, ValueError),
        ],
    )
    def test_numbers(self, place: int, value: object, error: type[Exception]) -> None:
        arguments = self.arguments()
        arguments[place] = value
        assert cpu._direct is not None
        with pytest.raises(error):
            cpu._direct(*arguments)
        with pytest.raises(TypeError, match="11 arguments"):
            cpu._direct(*arguments[:-1])

    def test_nothing_is_kept(self) -> None:
        arguments = self.arguments()
        before = [sys.getrefcount(argument) for argument in arguments]
        assert cpu._direct is not None
        for _ in range(100):
            assert cpu._direct(*arguments)
        assert [sys.getrefcount(argument) for argument in arguments] == before

    def test_other_threads_go_on(self) -> None:
        """The global lock is not held while it computes."""
        logits, target = torch.randn(8192, 1000), torch.randint(0, 64, (8192,))
        steps: list[float] = []
        done = threading.Event()

        def count() -> None:
            while not done.is_set():
                steps.append(time.perf_counter())
                time.sleep(0)

        other = threading.Thread(target=count)
        other.start()
        start = time.perf_counter()
        cpu.loss(logits, target, A, W, None, None, *OPTIONS, MEAN, True)
        end = time.perf_counter()
        done.set()
        other.join()
        inside = [t for t in steps if 0.25 < (t - start) / (end - start) < 0.75]
        assert inside, f"the call took {end - start:.4f} s"
