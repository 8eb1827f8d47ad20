"""Batches at the edge: empty, ignored, of one row, of one class, with masks and with what is no number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calls import each_divergence, regime
from conftest import Place
from torch import Tensor

import cmim_kernels as ck
from cmim_kernels.testing import truth, value_and_grad


def loss(place: Place, logits: Tensor, target: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    call = lambda z: ck.fused_cmi_loss(z, target, backend=place.name, **kwargs)  # type: ignore[arg-type] # noqa: E731
    return value_and_grad(call, logits)


@pytest.mark.parametrize("ignored", [False, True], ids=["no_rows", "all_ignored"])
def test_no_row_is_kept(place: Place, ignored: bool) -> None:
    """As `F.cross_entropy`: NaN for the mean, 0 for the sum; the gradient is zero."""
    n = 3 if ignored else 0
    logits = torch.randn(n, 5, device=place.device)
    target = torch.full((n,), -100, device=place.device)
    for cmi_weight in (0.0, 1.0):
        value, gradient = loss(place, logits, target, cmi_weight=cmi_weight)
        assert value.isnan()
        assert F.cross_entropy(logits, target).isnan()
        assert gradient.shape == (n, 5)
        assert gradient.count_nonzero() == 0
        value, gradient = loss(place, logits, target, cmi_weight=cmi_weight, reduction="sum")
        assert value == 0
        assert gradient.count_nonzero() == 0
        value, gradient = loss(place, logits, target, cmi_weight=cmi_weight, reduction="none")
        assert value.shape == (n,)
        assert value.count_nonzero() == 0
        assert gradient.count_nonzero() == 0
    spectrum, gradient = value_and_grad(lambda z: ck.cmi_spectrum(z, target, backend=place.name), logits)
    assert spectrum.shape == (8,)
    assert spectrum.isnan().all()
    assert gradient.count_nonzero() == 0
    centroids, counts = ck.class_centroids(logits, target, backend=place.name)
    assert centroids.shape == (8, 5, 5)
    assert centroids.count_nonzero() == counts.count_nonzero() == 0


def test_clusters_of_one_row_cost_nothing(place: Place) -> None:
    logits, target = regime("one_row_per_class").make(device=place.device)
    value, gradient = loss(place, logits, target, ce_weight=0.0)
    assert value == 0
    assert gradient.count_nonzero() == 0
    assert ck.cmi_spectrum(logits, target, backend=place.name).count_nonzero() == 0
    torch.testing.assert_close(loss(place, logits, target)[0], F.cross_entropy(logits, target))


def test_one_class(place: Place) -> None:
    """C = 1: every probability is one, and nothing can be learnt."""
    logits = 10 * torch.randn(5, 1, device=place.device)
    value, gradient = loss(place, logits, torch.zeros(5, dtype=torch.int64, device=place.device))
    assert abs(float(value)) <= 1e-12
    assert gradient.abs().max() <= 1e-12


def test_absent_classes_have_zero_centroids(place: Place) -> None:
    logits, target = regime("absent_classes").make(device=place.device)
    centroids, counts = ck.class_centroids(logits, target, backend=place.name)
    assert torch.equal(counts, torch.bincount(target, minlength=50))
    assert centroids[:, counts == 0].count_nonzero() == 0
    rows = centroids[:, counts > 0]
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    expected = torch.softmax(logits[target == 20] / 8, -1).mean(0)
    torch.testing.assert_close(centroids[0, 20], expected, rtol=1e-5, atol=1e-7)


def test_the_batchs_own_centroids_given_back_change_nothing(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    centroids, _ = ck.class_centroids(logits, target, backend=place.name)
    value, gradient = loss(place, logits, target)
    given_value, given_gradient = loss(place, logits, target, centroids=centroids)
    torch.testing.assert_close(given_value, value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(given_gradient, gradient, rtol=1e-3, atol=1e-6)


def test_given_centroids_make_single_rows_count(place: Place) -> None:
    logits, target = regime("one_row_per_class").make(device=place.device)
    centroids = torch.full((8, 20, 20), 1 / 20, device=place.device)
    value, gradient = loss(place, logits, target, ce_weight=0.0, centroids=centroids)
    p = torch.softmax(torch.arange(1, 9, device=place.device)[:, None, None] / 8 * logits, -1)
    torch.testing.assert_close(value, (p * (20 * p).log()).sum(-1).mean(), rtol=1e-5, atol=1e-7)
    assert gradient.count_nonzero() > 0


def test_unnormalised_centroids_get_the_generalised_divergence(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    centroids = torch.rand(1, 10, 10, device=place.device)
    value = ck.cmi_spectrum(logits, target, temperatures=[1.0], centroids=centroids, backend=place.name)
    p, q = logits.double().softmax(-1), centroids[0, target].double()
    expected = (p * (p / q).log() - p + q).sum(-1).mean()
    torch.testing.assert_close(value[0].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["masked_by_cluster", "masked_in_some_rows"])
def test_masked_classes(place: Place, name: str) -> None:
    logits, target = regime(name).make(device=place.device)
    value, gradient = loss(place, logits, target)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient[logits == -torch.inf].count_nonzero() == 0


@pytest.mark.parametrize("mask", [-torch.inf, -3e38, -1e9], ids=str)
@pytest.mark.parametrize("column", [0, 1], ids=["its_largest", "another"])
@pytest.mark.parametrize("rows", [slice(4, 5), slice(None)], ids=["one_row", "every_row"])
@pytest.mark.parametrize("temperature", [33.0, 0.01, 2e-4])
def test_rows_of_a_collapsed_cluster_mask_a_class(
    place: Place, mask: float, column: int, rows: slice, temperature: float
) -> None:
    """Hot, where the clusters collapse all the same, and cold, where a times a large number overflows."""
    logits = torch.tensor([[1.3, -0.9, 0.4, 0.2]]) + 0.01 * torch.randn(10, 4)
    logits[rows, column] = mask
    target = torch.zeros(10, dtype=torch.int64)
    spectrum = ck.TemperatureSpectrum([temperature])
    ((value, gradient, arguments),) = each_divergence(place, logits, target, spectrum)
    true_value, true_gradient = truth(logits, *arguments)
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-12)
    assert (gradient - true_gradient).norm() <= 1e-5 * true_gradient.norm() + 1e-12


def test_zero_centroid_of_a_masked_class(place: Place) -> None:
    """P = Q = 0 contributes nothing; P > 0 where Q = 0 is infinitely surprising."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], device=place.device)
    target = torch.tensor([0], device=place.device)
    centroids = torch.tensor([[[0.5, 0.5, 0.0]] * 3], device=place.device)
    kwargs = {"temperatures": [1.0], "centroids": centroids, "backend": place.name}
    assert ck.cmi_spectrum(logits, target, **kwargs).isfinite().all()
    assert ck.cmi_spectrum(logits.masked_fill(logits.isinf(), 0.5), target, **kwargs) == torch.inf


@pytest.mark.parametrize("scale", [1e3, 1e8])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_centroid_of_a_class_without_probability(
    place: Place, dtype: torch.dtype, label: int, scale: float
) -> None:
    """P = Q = 0 where a logit is far below the largest, the label's or another's."""
    place.needs(dtype)
    logits = torch.tensor([[-1.0, 1.0, -1.0]], device=place.device, dtype=dtype) * scale
    target = torch.tensor([label], device=place.device)
    centroids = torch.tensor([[[0.0, 1.0, 0.0]] * 3] * 2, device=place.device, dtype=dtype)
    kwargs = {"temperatures": [1.0, 2.0], "centroids": centroids, "backend": place.name}
    value, gradient = value_and_grad(lambda z: ck.cmi_spectrum(z, target, **kwargs), logits)
    assert value.count_nonzero() == 0
    assert gradient.count_nonzero() == 0


def test_centroids_below_the_smallest_normal_number(place: Place) -> None:
    """Not zero, which would be infinitely far away."""
    if place.name != "cpu":
        pytest.skip("GPUs read them as they are, or as zero")
    logits = torch.tensor([[0.0, -5.0, 1.0]], device=place.device)
    centroids = torch.tensor([[[0.75, 1e-40, 0.25]] * 3], device=place.device)
    for label in (0, 1):
        target = torch.tensor([label], device=place.device)
        kwargs = {"temperatures": [1.0], "centroids": centroids}
        value = ck.cmi_spectrum(logits, target, **kwargs, backend=place.name)
        expected = ck.cmi_spectrum(logits, target, **kwargs, backend="reference")
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("a", [1.0, 7.0, 1000.0])
@pytest.mark.parametrize("width", [0.01, 3.0])
def test_a_centroid_that_all_but_vanishes(place: Place, dtype: torch.dtype, a: float, width: float) -> None:
    """Around the smallest number of the arithmetic: a probability in some rows, and none in their mean."""
    place.needs(dtype)
    step = 6.0 if place.interpreted or place.emulated else 0.5
    for fall in torch.cat([torch.arange(80, 110, step), torch.arange(690, 760, step)]).tolist():
        g = torch.Generator().manual_seed(int(fall * 10))
        logits = width * torch.randn(8, 12, generator=g, dtype=torch.float64)
        logits[:, 3:6] -= fall
        logits, target = (logits / a).to(place.device, dtype), torch.zeros(8, dtype=torch.int64)
        value = ck.cmi_spectrum(logits, target.to(place.device), temperatures=[1 / a], backend=place.name)
        logits[:, 3:6] = -torch.inf
        expected = ck.cmi_spectrum(logits, target.to(place.device), temperatures=[1 / a], backend=place.name)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mask", [-1e4, -1e30, -3e38])
@pytest.mark.parametrize("cmi_weight", [0.0, 1.0])
@pytest.mark.parametrize("width", [1.0, 1e-3])
def test_classes_masked_by_a_finite_number(
    place: Place, mask: float, cmi_weight: float, width: float
) -> None:
    """As masked_fill(-1e30) leaves them; the labels are not masked. Clusters of one and of five."""
    target = torch.tensor([0, 1, 1, 1, 1, 1], device=place.device)
    logits = 2 * torch.randn(1, 40) + width * torch.randn(6, 40)
    logits[:, 2::3] = mask
    logits = logits.to(place.device)
    value, gradient = loss(place, logits, target, cmi_weight=cmi_weight)
    infinite = logits.masked_fill(logits == mask, -torch.inf)
    expected, expected_gradient = loss(place, infinite, target, cmi_weight=cmi_weight)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_number_gives_no_number(place: Place, bad: float, reduction: str) -> None:
    """A loss scaler has to see it. Rows of other clusters keep their losses."""
    logits, target = regime("random").make(device=place.device)
    logits[5, 3] = bad
    for weights in ({}, {"cmi_weight": 0.0}, {"ce_weight": 0.0}):
        value, gradient = loss(place, logits, target, reduction=reduction, **weights)
        if reduction != "none":
            assert value.isnan()
        else:
            assert value[5].isnan()
            assert value[target != target[5]].isfinite().all()
            assert gradient[target != target[5]].isfinite().all()
        assert gradient[5].isnan().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_number_in_a_cluster_of_one(place: Place, bad: float) -> None:
    """Its divergences are 0 where it has a softmax at all."""
    logits, target = regime("one_row_per_class").make(device=place.device)
    logits[5, 3] = bad
    value, gradient = loss(place, logits, target, ce_weight=0.0, reduction="none")
    others = torch.arange(len(target), device=place.device) != 5
    assert value[5].isnan()
    assert value[others].count_nonzero() == 0
    assert gradient[5].isnan().any()
    assert gradient[others].count_nonzero() == 0
    assert loss(place, logits, target, ce_weight=0.0)[0].isnan()
    assert ck.cmi_spectrum(logits, target, backend=place.name).isnan().all()


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_no_number_beside_given_centroids(place: Place, ce_weight: float) -> None:
    """Rows of one label have nothing to do with each other then."""
    logits, target = regime("random").make(device=place.device)
    centroids, _ = ck.class_centroids(logits, target, backend=place.name)
    kwargs = {"centroids": centroids, "ce_weight": ce_weight, "reduction": "none"}
    expected, expected_gradient = loss(place, logits, target, **kwargs)
    logits[5] = torch.nan
    value, gradient = loss(place, logits, target, **kwargs)
    others = torch.arange(len(target), device=place.device) != 5
    assert value[5].isnan()
    torch.testing.assert_close(value[others], expected[others], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient[others], expected_gradient[others], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, -87.2), (torch.float64, -708.3)], ids=str)
def test_rows_with_their_own_upstream_gradient_where_a_mean_is_subnormal(
    place: Place, dtype: torch.dtype, low: float
) -> None:
    """The gradient divides by the centroid's entry, whose inverse may be beyond the largest number."""
    place.needs(dtype)
    logits = torch.zeros(6, 5, dtype=dtype, device=place.device)
    logits[:, 4] = 2 * low
    logits[1, 4] = low  # the mean is a sixth of the smallest normal number, or of nearly that
    logits[:, 1] = torch.arange(6)
    target = torch.zeros(6, dtype=torch.int64, device=place.device)
    upstream = torch.linspace(0.5, 1.5, 6).to(place.device, dtype)
    results = [
        value_and_grad(
            lambda z, name=name: ck.fused_cmi_loss(
                z, target, temperatures=[1.0], reduction="none", backend=name
            ),
            logits,
            upstream=upstream,
        )
        for name in (place.name, "reference")
    ]
    (value, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_a_term_of_weight_zero_is_left_out(place: Place) -> None:
    """Also where it would be 0 / 0: the mean of the cross entropy over classes that all weigh nothing."""
    logits, target = regime("random").make(device=place.device)
    weight = torch.zeros(logits.shape[1], device=place.device)
    value, gradient = loss(place, logits, target, ce_weight=0.0, weight=weight)
    expected, expected_gradient = loss(place, logits, target, ce_weight=0.0)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert loss(place, logits, target, weight=weight)[0].isnan()
    assert loss(place, logits, target, weight=weight, label_smoothing=0.1)[0].isnan()
    assert F.cross_entropy(logits, target, weight, label_smoothing=0.1).isnan()
    nothing = {"ce_weight": 0.0, "cmi_weight": 0.0, "backend": place.name}
    for rows in (0, len(target)):
        assert ck.fused_cmi_loss(logits[:rows], target[:rows], **nothing) == 0


def test_no_number_in_an_ignored_row_is_not_seen(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    target[5] = -100
    expected = loss(place, logits, target)
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits[5] = bad
        value, gradient = loss(place, logits, target)
        assert torch.equal(value, expected[0])
        assert torch.equal(gradient, expected[1])
        assert gradient[5].count_nonzero() == 0


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_extreme_logits(place: Place, scale: float) -> None:
    """Far beyond any exponent's range: finite, and zero where the softmax is a one-hot that does not move."""
    logits, target = regime("random").make(device=place.device)
    value, gradient = loss(place, logits * scale, target)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_large_labels_to_ignore(place: Place) -> None:
    logits, target = regime("random").make(device=place.device)
    for ignore_index in (2**62, -(2**63), 3):
        some = target.clone()
        some[::4] = ignore_index
        value, gradient = loss(place, logits, some, ignore_index=ignore_index)
        kept = some != ignore_index
        expected, expected_gradient = loss(place, logits[kept], some[kept])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient[kept], expected_gradient, rtol=1e-5, atol=1e-7)
        assert gradient[~kept].count_nonzero() == 0
