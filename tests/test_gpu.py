"""What only a CUDA device can show: no waiting, graphs, streams, sizes beyond 32 bits, memory, labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import OPTIONS, Options, upstream_for
from torch import Tensor

import cmim_kernels as ck
from cmim_kernels import testing
from cmim_kernels.backends import cuda
from cmim_kernels.reference import MEAN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
BACKENDS = ("cuda", "triton")
backends = pytest.mark.parametrize("backend", BACKENDS)
ASYNCHRONOUS = ("default", "general_grid", "cross_entropy_options", "rows", "centroids")


def batch(
    n: int = 256, c: int = 1000, classes: int = 32, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (n,), generator=g)
    logits = 2 * torch.randn(classes, c, generator=g)[target] + spread * torch.randn(n, c, generator=g)
    return logits.cuda(), target.cuda()


def call(backend: str, logits: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return testing.value_and_grad(lambda z: ck.fused_cmi_loss(z, target, backend=backend, **kwargs), logits)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[1, 2], ids=["fused", "tiled"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both kinds of the CUDA backend's forward kernels on the same small inputs."""
    torch.ops.cmim_kernels.set_cuda_path(request.param)
    yield
    torch.ops.cmim_kernels.set_cuda_path(0)


@backends
@pytest.mark.parametrize("options", ASYNCHRONOUS)
def test_the_host_never_waits(backend: str, options: str, request: pytest.FixtureRequest) -> None:
    logits, target = batch(c=200)
    kwargs, upstream = OPTIONS[options].kwargs(logits), upstream_for(OPTIONS[options], logits)
    leaf = logits.requires_grad_()
    ck.fused_cmi_loss(leaf, target, backend=backend, **kwargs).backward(upstream)  # compiled, loaded
    request.getfixturevalue("no_synchronisation")
    leaf.grad = None
    ck.fused_cmi_loss(leaf, target, backend=backend, **kwargs).backward(upstream)


@backends
@pytest.mark.parametrize(("n", "c"), [(256, 1000), (6000, 40), (64, 20_000)])
def test_graphs(backend: str, n: int, c: int) -> None:
    """Captured once, replayed a thousand times on data that changes, to the bits of the eager call."""
    logits, target = batch(n, c)
    leaf = logits.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(ck.fused_cmi_loss(leaf, target, backend=backend), leaf)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = ck.fused_cmi_loss(leaf, target, backend=backend)
        (gradient,) = torch.autograd.grad(value, leaf)
    for i in range(1000):
        if i % 250 == 0:
            new_logits, new_target = batch(n, c, spread=(1.0, 1e-3, 0.1, 3.0)[i // 250], seed=i)
            expected = call(backend, new_logits, new_target)
            with torch.no_grad():
                leaf.copy_(new_logits)
            target.copy_(new_target)
        graph.replay()
        if i % 250 in (0, 249):
            assert torch.equal(value, expected[0])
            assert torch.equal(gradient, expected[1])


@backends
def test_graphs_of_torch_compile(backend: str) -> None:
    """Which lend their memory to the calls before they record; what a backend keeps must not lie there."""
    spectrum = ck.TemperatureSpectrum([0.7, 1.1, 1.9, 4.3])  # which no other call has had

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return ck.fused_cmi_loss(logits, target, temperatures=spectrum, backend=backend)

    for seed in range(5):
        logits, target = batch(seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target)
        value.backward()
        expected, gradient = call(backend, logits, target, temperatures=spectrum)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        assert leaf.grad is not None  # by the kernels of `saved`, whereas an eager call may keep the gradient
        assert (leaf.grad - gradient).norm() <= 1e-5 * gradient.norm()


@backends
@pytest.mark.parametrize(("n", "c"), [(256, 1000), (6000, 40)])
def test_side_streams(backend: str, n: int, c: int) -> None:
    """Calls in flight on several streams at the same time do not meet."""
    batches = [batch(n, c, seed=seed) for seed in range(4)]
    expected = [call(backend, *b) for b in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(20):
        for stream, b in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                results.append(call(backend, *b))
    torch.cuda.synchronize()
    for i, (value, gradient) in enumerate(results):
        assert torch.equal(value, expected[i % 4][0])
        assert torch.equal(gradient, expected[i % 4][1])


@backends
def test_more_than_2_31_logits(backend: str) -> None:
    """A class of 16 rows, the last ones among them, against the reference on these rows alone."""
    n, c = 16_640, 131_072
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free device memory")
    logits = torch.empty(n, c, device="cuda", dtype=torch.bfloat16)
    torch.manual_seed(0)
    for rows in logits.split(1024):
        rows.normal_()
    assert logits.numel() > 2**31
    target = torch.arange(n, device="cuda") // 16 + 7
    leaf = logits.requires_grad_()
    value = ck.fused_cmi_loss(leaf, target, backend=backend, reduction="none")
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    for own in (slice(0, 16), slice(n - 16, n)):
        args = (target[own], OPTIONS["default"].spectrum.inverse_temperatures, [1 / 8] * 8, None, None)
        args += (1.0, 1.0, 0.0, -100, 2)
        true_value, true_gradient = testing.truth(logits[own].detach(), *args)
        torch.testing.assert_close(value[own].sum().double(), true_value, rtol=1e-5, atol=0)
        error = (gradient[own].double() - true_gradient).norm()
        assert error <= 2**-8 * true_gradient.norm()


@backends
def test_strides_beyond_32_bits(backend: str) -> None:
    far = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free device memory")
    memory = torch.empty(2 * far + 64, device="cuda", dtype=torch.bfloat16)
    for shape, strides in (((3, 5), (far, 1)), ((5, 3), (1, far))):
        logits = memory.as_strided(shape, strides)
        logits.copy_(torch.randn(shape))
        target = torch.zeros(shape[0], dtype=torch.long, device="cuda")
        value, gradient = call(backend, logits, target)
        expected, expected_gradient = call(backend, logits.contiguous(), target)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, expected_gradient)


@backends
@pytest.mark.parametrize(("n", "c"), [(2048, 32_768), (4096, 10_000)])
def test_memory(backend: str, n: int, c: int) -> None:
    """Beside the inputs: the gradient, and a tenth of that."""
    logits = torch.randn(n, c, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(c, (n,), device="cuda")
    torch.autograd.grad(ck.fused_cmi_loss(logits, target, backend=backend), logits)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ck.fused_cmi_loss(logits, target, backend=backend), logits)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * logits.numel() * logits.element_size()


@pytest.mark.parametrize("width", [1.5, 0.4, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("n", "c"), [(200, 37), (70, 3000), (3000, 5)])
def test_both_kinds_of_cuda_kernels(path: None, width: float, reduction: str, n: int, c: int) -> None:
    logits, target = batch(n, c, 5, width)
    target[::9] = -100
    options = Options(ce_weight=0.0, reduction=reduction)
    upstream = upstream_for(options, logits)
    value, gradient = testing.value_and_grad(
        lambda z: ck.fused_cmi_loss(z, target, backend="cuda", **options.kwargs(z)), logits, upstream=upstream
    )
    true_value, true_gradient = testing.truth(logits, *options.arguments(logits, target), upstream=upstream)
    assert (value - true_value).norm() <= 1e-5 * true_value.norm()
    assert (gradient - true_gradient).norm() <= 1e-5 * true_gradient.norm()


def test_an_invalid_label_is_told_later(path: None) -> None:
    """No call waits to find it; a later one raises, or check_labels."""
    logits, target = batch(64, 20, 5)
    target[7] = 1000
    args = (target, [1.0], [1.0], None, None, 1.0, 1.0, 0.0, -100, MEAN)
    value, saved = cuda.loss(logits, *args, True)
    gradient = cuda.loss_backward(torch.ones_like(value), saved, logits, *args)
    assert value.isnan()
    assert gradient[7].isnan().all()
    with pytest.raises(ValueError, match="got 1000 at row 7"):
        cuda.check_labels()
    cuda.check_labels()


def test_every_cuda_device(path: None) -> None:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    logits, target = batch()
    expected = call("cuda", logits, target)
    there = call("cuda", logits.to("cuda:1"), target.to("cuda:1"))
    assert torch.equal(there[0].cpu(), expected[0].cpu())
    assert torch.equal(there[1].cpu(), expected[1].cpu())


@backends
def test_deterministic_algorithms_are_what_it_has(backend: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        call(backend, *batch())
        call(backend, *batch(6000, 40))
    finally:
        torch.use_deterministic_algorithms(False)
