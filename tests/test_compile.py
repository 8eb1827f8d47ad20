"""Under torch.compile and torch.export the loss is one graph of the same values; operators are sound."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import OPTIONS, Options, regime
from conftest import ALL, Place
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cmim_kernels as ck
from cmim_kernels.backends import cpu


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def both(function: Callable[..., Tensor], logits: Tensor, target: Tensor, backend: str = "inductor") -> None:
    """Value and gradient of a function, eager and compiled into one graph."""
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        leaf = logits.clone().requires_grad_()
        value = f(leaf, target)
        results.append((value, *torch.autograd.grad(value.sum() * 1.5, leaf)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor(place: Place, dtype: torch.dtype) -> None:
    if place.name == "reference":
        pytest.skip("slow: a hundred operations to fuse, and none of them ours")
    logits, target = regime("random").make(dtype, place.device)
    both(lambda z, y: ck.fused_cmi_loss(2 * z, y, backend=place.name), logits, target)


# The rest is about what is traced, not about what inductor makes of it.
@pytest.mark.parametrize("options", ["cross_entropy_options", "rows", "centroids", "sum", "general_grid"])
def test_options(place: Place, options: str) -> None:
    logits, target = OPTIONS[options].batch(regime("random"), torch.float32, place.device, 0)
    kwargs = OPTIONS[options].kwargs(logits)
    function = lambda z, y: ck.fused_cmi_loss(z, y, backend=place.name, **kwargs)  # noqa: E731
    both(function, logits, target, backend="aot_eager")


def test_other_functions(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    both(lambda z, y: ck.cmi_spectrum(z, y, backend=place.name).max(), logits, target, backend="aot_eager")

    def centroids(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return ck.class_centroids(z, y, backend=place.name)

    compiled = torch.compile(centroids, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(logits, target), centroids(logits, target), strict=True):
        torch.testing.assert_close(got, expected)


def test_module_in_a_network(place: Place) -> None:
    """As in a training step: parameters, a weight buffer, any batch size without compiling again."""
    network = nn.Linear(6, 10).to(place.device)
    criterion = ck.CMIMLoss(weight=torch.rand(10), cmi_weight=2.0, backend=place.name).to(place.device)
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=counting)
    def step(x: Tensor, y: Tensor) -> Tensor:
        return criterion(network(x), y)

    for n in (16, 12, 9):
        x, y = torch.randn(n, 6, device=place.device), torch.arange(n, device=place.device) % 10
        network.zero_grad()
        step(x, y).backward()
        compiled = network.weight.grad
        network.zero_grad()
        criterion(network(x), y).backward()
        torch.testing.assert_close(compiled, network.weight.grad, rtol=1e-5, atol=1e-7)
    assert len(graphs) == 1


def test_double_backward_is_refused_not_wrong(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    leaf = logits.clone().requires_grad_()
    compiled = torch.compile(lambda z: ck.fused_cmi_loss(z, target, backend=place.name), backend="aot_eager")

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(compiled(leaf), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    with pytest.raises(RuntimeError):
        penalty()


def test_transform_inside_a_compiled_function(place: Place) -> None:
    """A place where a hand-written gradient was seen to become zero without a word."""
    logits, target = regime("random").make(device=place.device)
    function = torch.func.grad(lambda z: ck.fused_cmi_loss(z, target, backend=place.name))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), function(logits), rtol=1e-4, atol=1e-6)


class Network(nn.Module):
    def __init__(self, place: Place, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(10, 10).to(place.device)
        self.loss = ck.CMIMLoss(backend=place.name, **options).to(place.device)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        value: Tensor = self.loss(self.layer(x), target)
        return value


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exported_programs_can_be_trained(place: Place, reduction: Any, strict: bool) -> None:
    x, target = torch.randn(9, 10, device=place.device), torch.arange(9, device=place.device) % 4
    eager = Network(place, reduction=reduction, weight=0.5 + torch.rand(10), label_smoothing=0.1)
    program = torch.export.export(eager, (x, target), strict=strict).module()
    assert isinstance(program.layer, nn.Module)
    results = []
    for network in (eager, program):
        value = network(x, target)
        network.zero_grad()
        (1.5 * value.sum()).backward()
        results.append((value, network.layer.weight.grad))
    for expected, got in zip(*results, strict=True):
        assert expected is not None
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_a_program_exported_for_inference_still_has_a_gradient(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    loss = ck.CMIMLoss(backend=place.name)
    with torch.no_grad():
        program = torch.export.export(loss, (logits, target)).module()
    gradients = []
    for function in (loss, program):
        leaf = logits.clone().requires_grad_()
        function(leaf, target).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_an_exported_program_is_differentiated_twice(place: Place) -> None:
    x, target = torch.randn(9, 10, device=place.device), torch.arange(9, device=place.device) % 4
    eager = Network(place)
    program = torch.export.export(eager, (x, target)).module()
    results = []
    for network in (eager, program):
        weight = network.layer.weight  # type: ignore[union-attr]
        (gradient,) = torch.autograd.grad(network(x, target), weight, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


LOADED = """
import sys
import torch
import cmim_kernels
print(float(torch.export.load(sys.argv[1]).module()(*torch.load(sys.argv[2]))))
"""


def test_a_saved_program_is_loaded_where_nothing_has_been_called_yet(tmp_path: Path) -> None:
    network = Network(Place("auto", "cpu", ALL))
    batch = torch.randn(9, 10), torch.arange(9) % 4
    files = [str(tmp_path / name) for name in ("program.pt2", "batch.pt")]
    torch.export.save(torch.export.export(network, batch), files[0])
    torch.save(batch, files[1])
    done = subprocess.run([sys.executable, "-c", LOADED, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(network(*batch).item(), rel=1e-6)


@pytest.mark.parametrize("source", ["tensor", "bank"])
def test_tracers_without_data(place: Place, source: str) -> None:
    """Class weights, centroids and labels are not looked into where there is nothing to see."""
    logits, target = torch.randn(9, 10, device=place.device), torch.arange(9, device=place.device) % 4
    options: dict[str, Any] = {"weight": torch.rand(10)}
    if source == "bank":
        options["centroids"] = ck.CentroidBank(10, backend=place.name)
    loss = ck.CMIMLoss(backend=place.name, **options).to(place.device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = mode.from_tensor(logits).requires_grad_(), mode.from_tensor(target)
        assert loss.eval()(*fakes).shape == ()
        weight = torch.rand(10, device=place.device)  # a fake too
        assert ck.fused_cmi_loss(*fakes, weight=weight, backend=place.name).requires_grad
    if source == "tensor":
        graph = make_fx(loss)(logits, target)
        torch.testing.assert_close(graph(logits, target), loss(logits, target))


def op_arguments(options: Options, logits: Tensor, target: Tensor) -> tuple[Any, ...]:
    return logits, *options.arguments(logits, target)


@pytest.mark.skipif(cpu.unusable() is not None, reason="the operators are in the compiled library")
@pytest.mark.parametrize("options", ["default", "rows", "centroids", "cross_entropy_options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(options: str, dtype: torch.dtype) -> None:
    logits, target = OPTIONS[options].batch(regime("random"), dtype, "cpu", 0)
    operators = torch.ops.cmim_kernels
    arguments = op_arguments(OPTIONS[options], logits, target)
    for save in (True, False):
        torch.library.opcheck(operators.loss.default, (*arguments, save))
    value, saved = operators.loss(*arguments, True)
    torch.library.opcheck(operators.loss_backward.default, (torch.ones_like(value), saved, *arguments))
    empty = saved.new_empty(0)
    torch.library.opcheck(operators.loss_backward.default, (torch.ones_like(value), empty, *arguments))
    a = OPTIONS[options].spectrum.inverse_temperatures
    ignore_index = OPTIONS[options].ignore_index
    torch.library.opcheck(operators.class_centroids.default, (logits, target, a, ignore_index))


@pytest.mark.skipif(cpu.unusable() is not None, reason="the operators are in the compiled library")
def test_backward_computes_again_what_was_not_saved() -> None:
    logits, target = regime("random").make()
    operators = torch.ops.cmim_kernels
    for reduction in ("mean", "sum"):
        arguments = op_arguments(Options(reduction=reduction), logits, target)
        value, saved = operators.loss(*arguments, True)
        upstream = torch.full_like(value, 0.7)
        results = [operators.loss_backward(upstream, s, *arguments) for s in (saved, saved.new_empty(0))]
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-8)
