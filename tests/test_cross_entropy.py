"""With `cmi_weight=0` the loss is `F.cross_entropy`, whatever the options, in value and gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from calls import regime
from conftest import Place

import cmim_kernels as ck
from cmim_kernels.testing import value_and_grad

OPTIONS = list(
    itertools.product(
        ("mean", "sum", "none"), (False, True), (0.0, 0.1, 1.0), (None, 2), ("random", "confident")
    )
)


@pytest.mark.parametrize(("reduction", "weighted", "smoothing", "ignored", "name"), OPTIONS)
def test_equals_cross_entropy(
    place: Place, reduction: str, weighted: bool, smoothing: float, ignored: int | None, name: str
) -> None:
    logits, target = regime(name).make(device=place.device)
    weight = torch.linspace(0.2, 2, logits.shape[1], device=place.device) if weighted else None
    ignore_index = -100 if ignored is None else ignored
    kwargs = {
        "weight": weight,
        "label_smoothing": smoothing,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    upstream = torch.rand(len(target) if reduction == "none" else ()).to(place.device)
    value, gradient = value_and_grad(
        lambda z: ck.fused_cmi_loss(z, target, cmi_weight=0, backend=place.name, **kwargs),
        logits,
        upstream=upstream,
    )
    expected, expected_gradient = value_and_grad(
        lambda z: F.cross_entropy(z, target, **kwargs), logits, upstream=upstream
    )
    # Confident rows: F.cross_entropy loses the loss itself, log(1 + small), below 1e-7 for each row.
    rows = len(target) if reduction == "sum" else 1
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=2e-7 * rows)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(place: Place, dtype: torch.dtype) -> None:
    """Half types: the cross entropy of the widened logits, in float32, with the gradient rounded once."""
    place.needs(dtype)
    logits, target = regime("random").make(dtype, place.device)
    wide = logits if dtype == torch.float64 else logits.float()
    weight = torch.linspace(0.2, 2, logits.shape[1], device=place.device, dtype=dtype)
    value, gradient = value_and_grad(
        lambda z: ck.fused_cmi_loss(z, target, cmi_weight=0.0, weight=weight, backend=place.name), logits
    )
    expected, expected_gradient = value_and_grad(
        lambda z: F.cross_entropy(z, target, weight.to(z.dtype)), wide
    )
    assert value.dtype == wide.dtype
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.to(wide.dtype), expected_gradient, rtol=u, atol=2e-7)


@pytest.mark.parametrize("offset", [-1000.0, 30000.0])
def test_label_smoothing_of_logits_far_from_zero(place: Place, offset: float) -> None:
    """The sum of a row's logits carries an offset as many times as there are classes."""
    logits, target = regime("classes_129").make(device=place.device)
    logits = logits + offset
    weight = torch.linspace(0.2, 2, logits.shape[1], device=place.device)
    for options in ({}, {"weight": weight}):
        value = ck.fused_cmi_loss(
            logits, target, cmi_weight=0.0, label_smoothing=0.3, backend=place.name, **options
        )
        wide = {name: t.double() for name, t in options.items()}
        expected = F.cross_entropy(logits.double(), target, label_smoothing=0.3, **wide)
        torch.testing.assert_close(value.double(), expected, rtol=5e-7, atol=0)


def test_a_masked_target_costs_infinity(place: Place) -> None:
    logits = torch.zeros(3, 4, device=place.device)
    logits[0, 1] = -torch.inf
    target = torch.tensor([1, 1, 2], device=place.device)
    value = ck.fused_cmi_loss(logits, target, cmi_weight=0.0, backend=place.name)
    assert value == F.cross_entropy(logits, target) == torch.inf


def test_weights_of_the_terms_add_up(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    parts = [
        value_and_grad(
            lambda z, ce=ce, cmi=cmi: ck.fused_cmi_loss(
                z, target, ce_weight=ce, cmi_weight=cmi, backend=place.name
            ),
            logits,
        )
        for ce, cmi in ((0.5, 0.0), (0.0, 3.0), (0.5, 3.0))
    ]
    for k in (0, 1):
        torch.testing.assert_close(parts[0][k] + parts[1][k], parts[2][k], rtol=1e-5, atol=1e-7)


def test_no_term_is_a_constant_with_a_gradient_of_zero(place: Place) -> None:
    """As in the first step of a warm-up of both weights."""
    logits, target = regime("random").make(device=place.device)
    leaf = logits.requires_grad_()
    value = ck.fused_cmi_loss(leaf, target, ce_weight=0.0, cmi_weight=0.0, backend=place.name)
    assert value == 0
    value.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(logits))


def test_numpy_numbers_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    logits, target = regime("random").make()
    ignored = {"ignore_index": numpy.int64(2)}
    loss = ck.fused_cmi_loss(
        logits, target, cmi_weight=numpy.float32(0), label_smoothing=numpy.float64(0.1), **ignored
    )
    assert loss == ck.CMIMLoss(cmi_weight=0, label_smoothing=0.1, ignore_index=2)(logits, target)
    spectrum = ck.cmi_spectrum(logits, target, ignore_index=2)
    assert torch.equal(ck.cmi_spectrum(logits, target, **ignored), spectrum)
    assert ck.class_centroids(logits, target, **ignored)[1][2] == 0
    assert ck.CentroidBank(10, **ignored).ignore_index == 2
