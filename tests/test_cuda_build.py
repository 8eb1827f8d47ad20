"""The CUDA library without a GPU: compiled, what its kernels take on each architecture, and its tracing."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import cuda_compile
import pytest
import torch
from calls import OPTIONS, REDUCTIONS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cmim_kernels as ck
import setup
from cmim_kernels import autograd, dispatch
from cmim_kernels.backends import cpu, cuda
from cmim_kernels.reference import NONE, SPECTRUM

needs_nvcc = pytest.mark.skipif(setup.why_no_cuda() is not None, reason=str(setup.why_no_cuda()))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(4000)  # five minutes of one core, beside other tests
class TestCompiled:
    """Kernels, launchers and binding, all warnings errors; asserted is what the compiler itself reports."""

    def test_every_kernel_on_each_architecture(self) -> None:
        found = {(u.kernel.split(",")[0], u.architecture) for u in cuda_compile.compiled()}
        wanted = {(k, f"sm_{n}") for k in cuda_compile.kernels() for n in cuda_compile.architectures()}
        assert found == wanted

    def test_nothing_spills(self) -> None:
        """Except in the fused kernel of float arithmetic, which has two ways: docs/performance_cuda.md."""
        found = [u for u in cuda_compile.compiled() if u.spills or u.stack]
        assert [u for u in found if u.kernel != "fused_forward" or u.storage == "float64"] == []
        assert [u for u in found if u.spills > 400 or u.stack > 80] == []

    def test_registers_let_two_blocks_share_a_multiprocessor(self) -> None:
        """Of 64 K registers and 256 threads: 128 each for float arithmetic; double's have one block."""
        for usage in cuda_compile.compiled():
            assert usage.registers <= (255 if usage.storage == "float64" else 128), usage

    @pytest.mark.parametrize(("processor", "table"), [(100, 16), (164, 32), (228, 32)])
    def test_shared_memory_lets_two_blocks_share_a_multiprocessor(self, processor: int, table: int) -> None:
        """In KB: what the device has, and the table that host.h chooses for it. None of it is static."""
        text = (setup.CSRC / "cuda" / "problem.h").read_text()
        assert "__shared__" not in "".join(p.read_text() for p in (setup.CSRC / "cuda").glob("*.cu"))
        fixed = {4: 16384, 8: 16384}  # sums of groups: 256 threads * 4 columns * half a chunk of numbers
        constants, rows = 14 * 1024, {size: 64 * (8 + 3 * size) for size in fixed}
        assert re.search(r"constants = 14 \* 1024", text)
        for size, combined in fixed.items():
            used = combined + constants + rows[size] + 8 * 8 * size + 128 + table * 1024
            assert 2 * (used + 1024) <= processor * 1024


FAKES = [
    (name, reduction) for name in ("default", "rows", "centroids", "general_grid") for reduction in REDUCTIONS
]


class FakeCuda:
    """The backend as tracing sees it: the registered operators, of which only the fakes run."""

    loss, loss_backward = torch.ops.cmim_kernels.loss.default, torch.ops.cmim_kernels.loss_backward.default
    class_centroids = torch.ops.cmim_kernels.class_centroids.default
    refuses, keeps_gradient = staticmethod(cuda.refuses), staticmethod(cuda.keeps_gradient)
    saved_like = staticmethod(cuda.saved_like)

    @staticmethod
    def unusable() -> None:
        return None


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(dispatch._modules, "cuda", FakeCuda())
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "reduction"), FAKES)
def test_fakes_of_the_operators(traced: None, name: str, reduction: str, dtype: torch.dtype) -> None:
    n, c, options = 6, 5, OPTIONS[name]
    k = len(options.spectrum)
    logits = torch.empty(n, c, dtype=dtype, device="cuda")
    target = torch.zeros(n, dtype=torch.int64, device="cuda")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    a, w = list(options.spectrum.inverse_temperatures), list(options.spectrum.weights)
    for number, shape in ((REDUCTIONS[reduction], (n,) if reduction == "none" else ()), (SPECTRUM, (k,))):
        args: tuple[Any, ...] = (target, a, w, None, None, 1.0, 1.0, 0.0, -100, number)
        value, saved = FakeCuda.loss(logits, *args, True)
        assert_fake(value, shape, compute)
        kept = number != SPECTRUM and reduction != "none" and dtype != torch.float16
        assert cuda.keeps_gradient(logits, number) == kept
        assert_fake(saved, *cuda.saved_like(logits, k, number, True))
        assert saved.dtype == (dtype if kept else compute)
        assert_fake(FakeCuda.loss_backward(torch.empty_like(value), saved, logits, *args), (n, c), dtype)
    centroids, counts = FakeCuda.class_centroids(logits, target, a, -100)
    assert_fake(centroids, (k, c, c), compute)
    assert_fake(counts, (c,), torch.int64)


def assert_fake(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (tuple(t.shape), t.dtype, t.device.type) == (tuple(shape), dtype, "cuda")


class Context:
    """What autograd hands to a Function."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_public_function_is_traced(
    traced: None, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, checks included: nothing asks for the data of a CUDA tensor.

    Without autograd's engine, which asks the device for its stream.
    """
    context = Context()
    function = autograd._SavedLoss if reduction == "none" else autograd._OwnedLoss
    forward = torch.no_grad()(partial(function.forward, context))
    monkeypatch.setattr(autograd._SavedLoss, "apply", forward)
    monkeypatch.setattr(autograd, "_apply_owned", forward)
    logits = torch.empty(6, 5, dtype=dtype, device="cuda", requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64, device="cuda")
    value = ck.fused_cmi_loss(logits, target, reduction=reduction, label_smoothing=0.1, backend="cuda")
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert_fake(value, (6,) if reduction == "none" else (), compute)
    with torch.no_grad():
        gradient, *others = function.backward(context, torch.empty_like(value))
    assert others == [None] * (4 if function is autograd._SavedLoss else 1)
    assert gradient is not None
    assert_fake(gradient, (6, 5), dtype)


def test_no_rows_are_traced(traced: None) -> None:
    logits = torch.empty(0, 5, device="cuda")
    args = (
        torch.zeros(0, dtype=torch.int64, device="cuda"),
        [1.0],
        [1.0],
        None,
        None,
        1.0,
        1.0,
        0.0,
        -100,
        NONE,
    )
    value, saved = FakeCuda.loss(logits, *args, True)
    assert_fake(value, (0,), torch.float32)
    assert_fake(saved, (4,), torch.float32)


def test_where_it_is_not_built_it_says_why() -> None:
    if cuda.unusable() is None:
        pytest.skip("it is usable here")
    assert cpu.unusable() is None
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used"):
        ck.fused_cmi_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), backend="cuda")
