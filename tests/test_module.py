"""CMIMLoss is `fused_cmi_loss` with a memory for its options, and a good citizen among modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import OPTIONS, regime
from conftest import Place
from torch import Tensor, nn

import cmim_kernels as ck


@pytest.mark.parametrize("options", OPTIONS)
def test_same_as_the_function(place: Place, options: str) -> None:
    logits, target = OPTIONS[options].batch(regime("random"), torch.float32, place.device, 0)
    kwargs = OPTIONS[options].kwargs(logits)
    module = ck.CMIMLoss(backend=place.name, **kwargs)
    assert torch.equal(
        module(logits, target), ck.fused_cmi_loss(logits, target, backend=place.name, **kwargs)
    )


def test_options_may_change_between_steps() -> None:
    logits, target = regime("random").make()
    module = ck.CMIMLoss()
    for step in range(4):
        module.cmi_weight = 10.0 * step
        assert torch.equal(module(logits, target), ck.fused_cmi_loss(logits, target, cmi_weight=10.0 * step))


def test_buffers_move_and_are_saved() -> None:
    module = ck.CMIMLoss(weight=torch.rand(5), centroids=torch.full((8, 5, 5), 0.2))
    assert set(module.state_dict()) == {"weight", "centroids"}
    assert list(module.parameters()) == []
    assert module.double().weight.dtype == torch.float64
    value = module(torch.randn(4, 5).double(), torch.tensor([0, 1, 1, 4]))
    assert value.dtype == torch.float64
    assert ck.CMIMLoss().state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_to_half_leaves_the_centroids(dtype: torch.dtype) -> None:
    """They are held in the dtype the loss is computed in, as a bank holds them."""
    centroids = torch.softmax(torch.randn(8, 5, 5), -1)
    module = ck.CMIMLoss(weight=torch.rand(5), centroids=centroids).to(dtype)
    assert module.weight is not None
    assert module.weight.dtype == dtype
    assert torch.equal(module.centroids, centroids)
    logits, target = torch.randn(4, 5).to(dtype), torch.tensor([0, 1, 1, 4])
    expected = ck.fused_cmi_loss(logits, target, weight=module.weight, centroids=centroids)
    assert torch.equal(module(logits, target), expected)


def test_repr_shows_the_options() -> None:
    text = repr(ck.CMIMLoss(temperatures=[1.0, 2.0], cmi_weight=3.0, reduction="sum"))
    for part in ("inverse_temperatures=[1.0, 0.5]", "cmi_weight=3.0", "reduction='sum'", "ignore_index=-100"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight must not require grad"),
        ({"centroids": ck.CentroidBank}, TypeError, "a CentroidBank, got a class"),
    ],
)
def test_what_no_batch_could_put_right(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ck.CMIMLoss(**options)


def test_any_source_of_centroids() -> None:
    class Uniform(nn.Module):
        def centroids_for(self, logits: Tensor, target: Tensor, inverse_temperatures: list[float]) -> Tensor:
            return logits.new_full((len(inverse_temperatures), logits.shape[1], logits.shape[1]), 0.1)

    logits, target = regime("random").make()
    module = ck.CMIMLoss(centroids=Uniform())
    assert isinstance(module.centroids, Uniform)
    assert "centroids" in dict(module.named_children())
    expected = ck.fused_cmi_loss(logits, target, centroids=torch.full((8, 10, 10), 0.1))
    assert torch.equal(module(logits, target), expected)


def test_autocast() -> None:
    """Half precision logits out of an autocast network; the loss and its sums stay in float32."""
    torch.manual_seed(0)
    network, x = nn.Linear(6, 10), torch.randn(12, 6)
    target = torch.arange(12) % 3
    for backend in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
            assert logits.dtype == torch.bfloat16
            value = ck.fused_cmi_loss(logits, target, backend=backend)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, ck.fused_cmi_loss(logits.float(), target), rtol=1e-5, atol=1e-6)
        network.zero_grad()
        value.backward()
        assert network.weight.grad is not None


def test_no_graph_without_a_need() -> None:
    logits, target = regime("random").make()
    assert not ck.fused_cmi_loss(logits, target).requires_grad
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        assert not ck.fused_cmi_loss(leaf, target).requires_grad
    with torch.inference_mode():
        assert ck.fused_cmi_loss(logits.clone(), target).is_inference()
    assert not ck.class_centroids(leaf, target)[0].requires_grad
    assert ck.cmi_spectrum(leaf, target).requires_grad


def test_parameters_and_subclasses_of_tensors() -> None:
    logits, target = regime("random").make()
    value = ck.fused_cmi_loss(nn.Parameter(logits), target)
    assert torch.equal(value, ck.fused_cmi_loss(logits, target))


def test_backends_are_listed() -> None:
    backends = ck.available_backends()
    assert list(backends) == ["cpu", "cuda", "triton", "reference"]
    assert backends["cpu"] is None, "the compiled library is part of the package"
    assert backends["reference"] is None
    for reason in backends.values():
        assert reason is None or len(reason) > 10


def test_python_m_prints_what_a_bug_report_needs() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "cmim_kernels"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for part in (ck.__version__, torch.__version__, "backends:", "cpu        usable", "reference  usable"):
        assert part in run.stdout


def test_import_initialises_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch, cmim_kernels\n"
        "heavy = {'triton', 'sklearn', 'matplotlib', 'torchmetrics', 'torch._dynamo'} & set(sys.modules)\n"
        "print(sorted(heavy), torch.cuda.is_initialized())"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] False", run.stdout
