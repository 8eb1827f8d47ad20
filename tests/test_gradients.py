"""Gradients are the derivatives of the values: first and second order, by every way of asking for them."""

from __future__ import annotations

import pytest
import torch
from calls import OPTIONS, Options, regime
from conftest import Place
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import cmim_kernels as ck


def batch(place: Place, ignored: bool = False) -> tuple[Tensor, Tensor]:
    """A small batch in float64: clusters of 3, 2 and 1 rows, one class absent."""
    place.needs(torch.float64)
    logits = torch.randn(7, 4, dtype=torch.float64, device=place.device)
    target = torch.tensor([0, 0, 2, 1, 0, 2, 2], device=place.device)
    if ignored:
        target[4] = -100
    return logits, target


def loss(place: Place, options: Options, logits: Tensor, target: Tensor) -> Tensor:
    return ck.fused_cmi_loss(logits, target, backend=place.name, **options.kwargs(logits))


CASES = {
    "mean": Options(),
    "sum": Options(reduction="sum", cmi_weight=2.0),
    "rows": Options(reduction="none"),
    "options": Options(class_weight=True, label_smoothing=0.3),
    "rows_options": Options(reduction="none", class_weight=True, label_smoothing=0.3),
    "centroids": Options(centroids=True),
    "centroids_rows": Options(centroids=True, reduction="none"),
    "general_grid": OPTIONS["general_grid"],
}


@pytest.mark.parametrize("ignored", [False, True], ids=["kept", "ignored"])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(place: Place, name: str, ignored: bool) -> None:
    logits, target = batch(place, ignored)
    function = lambda z: loss(place, CASES[name], z, target)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("centroids", [False, True], ids=["batch", "given"])
def test_gradcheck_of_the_spectrum(place: Place, centroids: bool) -> None:
    logits, target = batch(place, ignored=True)
    given = Options(centroids=True).tensors(logits)[1] if centroids else None
    function = lambda z: ck.cmi_spectrum(z, target, centroids=given, backend=place.name)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(place: Place, name: str) -> None:
    logits, target = batch(place, ignored=True)
    function = lambda z: loss(place, CASES[name], z, target)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, logits.requires_grad_())


def test_gradient_penalty(place: Place) -> None:
    """Double backward through a network, in float32, against the reference."""
    logits, target = regime("random").make(device=place.device)
    weight = torch.eye(logits.shape[1], device=place.device, requires_grad=True)
    results = []
    for backend in (place.name, "reference"):
        value = ck.fused_cmi_loss(logits @ weight, target, backend=backend)
        (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_the_centroid_path_cancels_only_for_equal_rows() -> None:
    """What lets the kernels skip it, and what forbids skipping it for reduction "none"."""
    logits, target = regime("random").make(torch.float64)
    for upstream, cancels in ((torch.ones(len(target)), True), (torch.arange(float(len(target))), False)):
        gradients = []
        for centroids in (None, ck.class_centroids(logits, target)[0]):
            leaf = logits.clone().requires_grad_()
            rows = ck.fused_cmi_loss(
                leaf, target, ce_weight=0.0, centroids=centroids, reduction="none", backend="reference"
            )
            gradients.append(torch.autograd.grad(rows, leaf, upstream.double())[0])
        assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12) == cancels


class TestTransforms:
    """torch.func and forward mode get the reference's answer."""

    def test_grad(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(ck.fused_cmi_loss(leaf, target, backend="reference"), leaf)
        function = lambda z: ck.fused_cmi_loss(z, target, backend=place.name)  # noqa: E731
        torch.testing.assert_close(torch.func.grad(function)(logits), expected)
        value, pull_back = torch.func.vjp(function, logits)
        torch.testing.assert_close(pull_back(torch.ones_like(value))[0], expected)

    def test_jvp(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        tangent = torch.randn_like(logits)
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ck.fused_cmi_loss(leaf, target, backend="reference"), leaf)
        expected = (gradient * tangent).sum()
        function = lambda z: ck.fused_cmi_loss(z, target, backend=place.name)  # noqa: E731
        _, result = torch.func.jvp(function, (logits,), (tangent,))
        # torch widens the tangent of a number times a float32 scalar to float64.
        torch.testing.assert_close(result.float(), expected, rtol=1e-4, atol=1e-6)
        with forward_ad.dual_level():
            value = function(forward_ad.make_dual(logits, tangent))
            tangent = forward_ad.unpack_dual(value).tangent
            torch.testing.assert_close(tangent.float(), expected, rtol=1e-4, atol=1e-6)

    def test_hessian(self, place: Place) -> None:
        logits, target = batch(place)
        function = lambda z: ck.fused_cmi_loss(z, target, backend=place.name)  # noqa: E731
        result = torch.func.hessian(function)(logits)
        expected = torch.autograd.functional.hessian(
            lambda z: ck.fused_cmi_loss(z, target, backend="reference"), logits
        )
        torch.testing.assert_close(result, expected)

    def test_vmap_over_models(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        several = torch.stack([logits, 2 * logits, logits.flip(0)])
        function = lambda z: ck.fused_cmi_loss(z, target, backend=place.name)  # noqa: E731
        expected = torch.stack([function(z) for z in several])
        torch.testing.assert_close(torch.vmap(function)(several), expected)
        gradients = torch.vmap(torch.func.grad(function))(several)
        torch.testing.assert_close(gradients[1], torch.func.grad(function)(several[1]))

    def test_vmap_over_batches(self, place: Place) -> None:
        """Logits and target both batched, as for gradients of single samples."""
        batches = [regime("random").make(device=place.device, seed=seed) for seed in range(3)]
        logits, target = (torch.stack(part) for part in zip(*batches, strict=True))
        function = lambda z, y: ck.fused_cmi_loss(z, y, backend=place.name)  # noqa: E731
        expected = torch.stack([function(z, y) for z, y in batches])
        torch.testing.assert_close(torch.vmap(function)(logits, target), expected)

    def test_batched_upstream_gradients(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        spectrum = ck.cmi_spectrum(leaf, target, backend=place.name)
        units = torch.eye(8, device=place.device)
        (result,) = torch.autograd.grad(spectrum, leaf, units, is_grads_batched=True, retain_graph=True)
        expected = torch.stack(
            [torch.autograd.grad(spectrum, leaf, unit, retain_graph=True)[0] for unit in units]
        )
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_batched_upstream_gradients_of_a_number(self, place: Place, reduction: str) -> None:
        """As a vectorised jacobian asks for them, of the first pass and of a later one."""
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        value = ck.fused_cmi_loss(leaf, target, reduction=reduction, backend=place.name)
        upstream = torch.tensor([1.0, 0.5, 3.0], device=place.device)
        for _ in range(2):
            (result,) = torch.autograd.grad(value, leaf, upstream, is_grads_batched=True, retain_graph=True)
            (one,) = torch.autograd.grad(value, leaf, retain_graph=True)
            torch.testing.assert_close(result, upstream[:, None, None] * one, rtol=1e-5, atol=1e-7)

    def test_vmap_over_class_weights(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        weights = torch.rand(3, logits.shape[1], device=place.device)
        function = lambda w: ck.fused_cmi_loss(logits, target, weight=w, backend=place.name)  # noqa: E731
        expected = torch.stack([function(w) for w in weights])
        torch.testing.assert_close(torch.vmap(function)(weights), expected)


def test_backward_can_be_traced() -> None:
    """Recorded with proxies, which have no numbers to look at."""
    logits, target = regime("random").make()

    def gradient(z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(2 * ck.fused_cmi_loss(leaf, target), leaf)[0]

    traced = make_fx(gradient)(logits)
    torch.testing.assert_close(traced(logits), gradient(logits))


def test_a_label_out_of_range_under_a_transform_is_never_silent() -> None:
    """No value can be read there, so that nothing can be raised; the loss says so instead."""
    function = lambda z: ck.cmi_spectrum(z, torch.tensor([0, 9])).sum()  # noqa: E731
    assert torch.func.grad(function)(torch.randn(2, 3)).isnan().any()


class TestFormulas:
    """The boxed formulas of docs/math.md, written out, are what autograd makes of the definition."""

    a = 0.75

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """logits (N, C), one-hot cluster membership (N, C), P, Q_{y_i} and r, each (N, C)."""
        logits, target = regime("random").make(torch.float64)
        member = torch.nn.functional.one_hot(target, logits.shape[1]).double()
        p = torch.softmax(self.a * logits, -1)
        q = member @ (member.T @ p / member.sum(0).clamp(min=1)[:, None])
        return logits, member, p, q, (p / q).log()

    def through_softmax(self, p: Tensor, g: Tensor) -> Tensor:
        """Equation (1)."""
        return self.a * p * (g - (p * g).sum(-1, keepdim=True))

    def autograd(self, logits: Tensor, member: Tensor, upstream: Tensor, **kwargs: object) -> Tensor:
        leaf = logits.clone().requires_grad_()
        value = ck.fused_cmi_loss(
            leaf, member.argmax(1), temperatures=[1 / self.a], backend="reference", **kwargs
        )  # type: ignore[arg-type]
        return torch.autograd.grad(value, leaf, upstream)[0]

    def test_batch_centroids(self) -> None:
        logits, member, p, _, r = self.parts()
        expected = self.through_softmax(p, r) / len(logits)
        got = self.autograd(logits, member, torch.tensor(1.0).double(), ce_weight=0.0)
        torch.testing.assert_close(got, expected)

    def test_given_centroids(self) -> None:
        logits, member, p, _, _ = self.parts()
        centroids = torch.rand(1, 10, 10, dtype=torch.float64)  # rows need not sum to one
        upstream = torch.rand(len(logits), dtype=torch.float64)
        expected = self.through_softmax(p, (p / (member @ centroids[0])).log()) * upstream[:, None]
        got = self.autograd(logits, member, upstream, ce_weight=0.0, centroids=centroids, reduction="none")
        torch.testing.assert_close(got, expected)

    def test_rows(self) -> None:
        logits, member, p, q, r = self.parts()
        g = torch.rand(len(logits), 1, dtype=torch.float64)
        counts = member.sum(0).clamp(min=1)[:, None]
        ratio = member @ (member.T @ (g * p) / counts) / q
        expected = self.through_softmax(p, g * r - ratio)
        got = self.autograd(logits, member, g[:, 0], ce_weight=0.0, reduction="none")
        torch.testing.assert_close(got, expected)
        without_constant = g * r - member @ (member.T @ (g * (p / q - 1)) / counts)
        torch.testing.assert_close(self.through_softmax(p, without_constant), expected)

    def test_cross_entropy(self) -> None:
        logits, member, _, _, _ = self.parts()
        c = logits.shape[1]
        v, smoothing = 0.5 + torch.rand(c, dtype=torch.float64), 0.3
        own = (1 - smoothing) * (member @ v)[:, None]
        expected = (
            torch.softmax(logits, -1) * (own + smoothing / c * v.sum()) - own * member - smoothing / c * v
        )
        upstream = torch.rand(len(logits), dtype=torch.float64)
        got = self.autograd(
            logits, member, upstream, cmi_weight=0.0, weight=v, label_smoothing=smoothing, reduction="none"
        )
        torch.testing.assert_close(got, expected * upstream[:, None])


@pytest.mark.parametrize("upstream", [1.0, 0.25, -65536.0, 0.3, 0.0])
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_bfloat16_is_rounded_once(place: Place, upstream: float, again: bool) -> None:
    """Whatever the upstream gradient: half a unit in the last place, and what float32 itself errs."""
    logits, target = regime("random").make(torch.bfloat16, place.device)
    leaf = logits.requires_grad_()
    value = ck.fused_cmi_loss(leaf, target, backend=place.name)
    grad = torch.full_like(value, upstream)
    if again:
        torch.autograd.grad(value, leaf, grad, retain_graph=True)
    (result,) = torch.autograd.grad(value, leaf, grad)
    wide = logits.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(ck.fused_cmi_loss(wide, target, backend="reference"), wide, grad)
    half_a_unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 9)
    error = (result.float() - exact).abs()
    assert (error <= half_a_unit + 1e-5 * exact.abs() + 1e-9 * abs(upstream)).all()
    assert result.dtype == torch.bfloat16
