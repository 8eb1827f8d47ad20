"""No argument is changed, any layout of memory is read right, nobody shares the gradient's memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from calls import OPTIONS, fused, regime, upstream_for
from conftest import Place
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cmim_kernels as ck
from cmim_kernels.backends import cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["default", "cross_entropy_options", "rows", "centroids", "sum"])
def test_inputs_stay_byte_identical(place: Place, options: str, dtype: torch.dtype) -> None:
    logits, target = OPTIONS[options].batch(regime("masked_in_some_rows"), dtype, place.device, 0)
    kwargs = OPTIONS[options].kwargs(logits)
    upstream = upstream_for(OPTIONS[options], logits)
    leaf = logits.clone().requires_grad_()
    inputs = [leaf, target, upstream, *(v for v in kwargs.values() if isinstance(v, Tensor))]
    before = [t.detach().clone() for t in inputs]
    value = ck.fused_cmi_loss(leaf, target, backend=place.name, **kwargs)
    kept = value.detach().clone()
    for _ in range(3):
        value.backward(upstream, retain_graph=True)
    ck.cmi_spectrum(leaf, target, ignore_index=kwargs["ignore_index"], backend=place.name)
    ck.class_centroids(leaf, target, ignore_index=kwargs["ignore_index"], backend=place.name)
    for t, old in zip(inputs, before, strict=True):
        assert torch.equal(t, old)
    assert torch.equal(value, kept)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda z: z.t().contiguous().t(),
    "every_other_column": lambda z: torch.stack([z, torch.full_like(z, torch.nan)], 2).flatten(1)[:, ::2],
    "rows_of_a_wider_one": lambda z: torch.cat([torch.full_like(z, torch.nan), z, z], 1)[
        :, z.shape[1] : 2 * z.shape[1]
    ],
    "offset": lambda z: torch.cat([torch.full_like(z[:3], torch.nan), z])[3:],
    "one_off_alignment": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view_as(z),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["default", "rows"])
def test_strides_change_nothing(place: Place, layout: str, dtype: torch.dtype, options: str) -> None:
    if place.interpreted and dtype == torch.float16:
        pytest.skip("slow: strides and vectors are those of bfloat16")
    logits, target = OPTIONS[options].batch(regime("classes_33"), dtype, place.device, 0)
    strided = LAYOUTS[layout](logits)
    assert torch.equal(strided, logits)
    value, gradient = fused(place, OPTIONS[options], logits, target)
    every_other = torch.stack([target, target.new_full(target.shape, -7)], 1)[:, 0]
    other_value, other_gradient = fused(place, OPTIONS[options], strided, every_other)
    tiny = torch.finfo(dtype).eps
    torch.testing.assert_close(other_value, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        other_gradient, gradient, rtol=4 * tiny, atol=tiny * float(gradient.abs().max())
    )


def test_expanded_inputs(place: Place) -> None:
    """One row of memory, read as a batch: stride 0."""
    logits = torch.randn(1, 9, device=place.device).expand(6, 9)
    target = torch.tensor([2], device=place.device).expand(6)
    value, gradient = fused(place, OPTIONS["default"], logits, target)
    expected, expected_gradient = fused(place, OPTIONS["default"], logits.contiguous(), target.contiguous())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


class TestTheGradientHasOneOwner:
    """The CPU backend hands its saved gradient out uncopied; no later pass may see what became of it."""

    def passes(self, place: Place, root: Callable[[Tensor], Tensor], spoil: bool) -> list[Tensor]:
        """The gradients of three backward passes through one graph, each perhaps spoilt after it was read."""
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        value = ck.fused_cmi_loss(root(leaf), target, backend=place.name)
        seen = []
        for _ in range(3):
            value.backward(retain_graph=True)
            assert leaf.grad is not None
            seen.append(leaf.grad.clone())
            if spoil:
                leaf.grad.zero_()
            else:
                leaf.grad = None
        return seen

    @pytest.mark.parametrize(
        "root",
        [lambda z: z, lambda z: z.view(-1).view_as(z), lambda z: 1.0 * z, lambda z: z.t().contiguous().t()],
        ids=["leaf", "view", "product", "transposed"],
    )
    @pytest.mark.parametrize("spoil", [False, True], ids=["set_to_none", "zero_in_place"])
    def test_repeated_backward(self, place: Place, root: Callable[[Tensor], Tensor], spoil: bool) -> None:
        first, second, third = self.passes(place, root, spoil)
        assert first.abs().max() > 0
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(third, first, rtol=1e-5, atol=1e-8)

    def test_no_copy_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the kernel wrote is what the leaf gets."""
        written = []

        def recording(*args: object) -> tuple[Tensor, Tensor]:
            value, saved = kernel(*args)
            written.append(saved.data_ptr())
            return value, saved

        kernel = cpu.loss
        monkeypatch.setattr(cpu, "loss", recording)
        logits, target = regime("random").make()
        leaf = logits.clone().requires_grad_()
        for factor in (1.0, 3.0):
            leaf.grad = None
            (factor * ck.fused_cmi_loss(leaf, target, backend="cpu")).backward()
            assert leaf.grad is not None
            assert leaf.grad.data_ptr() == written[-1]

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_checkpointing_drops_what_is_kept(self, place: Place, reduction: Any) -> None:
        """The gradient is among what hooks on saved tensors see."""
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()

        def loss(z: Tensor) -> Tensor:
            return ck.fused_cmi_loss(2 * z, target, reduction=reduction, backend=place.name)

        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            hooked = loss(leaf)
        assert getattr(hooked.grad_fn, "gradient", None) is None
        checkpointed = checkpoint(loss, leaf, use_reentrant=False)
        results = [torch.autograd.grad(value.sum(), leaf)[0] for value in (loss(leaf), hooked, checkpointed)]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-9)
        if place.name == "cpu" and reduction == "mean":
            assert sum(t.shape == logits.shape for t in packed) == 2  # the logits and the gradient

    def test_accumulation(self, place: Place) -> None:
        """`.grad += ` in place, on memory that once was the saved gradient."""
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        value = ck.fused_cmi_loss(leaf.view(-1).view_as(leaf), target, backend=place.name)
        totals = []
        for _ in range(4):
            value.backward(retain_graph=True)
            assert leaf.grad is not None
            totals.append(leaf.grad.clone())
        for k, total in enumerate(totals):
            torch.testing.assert_close(total, (k + 1) * totals[0], rtol=1e-5, atol=1e-7)

    def test_a_hook_that_writes(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        expected = fused(place, OPTIONS["default"], logits, target)[1] / upstream_for(
            OPTIONS["default"], logits
        )
        leaf = logits.clone().requires_grad_()
        middle = leaf * 1.0
        middle.register_hook(lambda grad: grad.mul_(2))
        value = ck.fused_cmi_loss(middle, target, backend=place.name)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
            torch.testing.assert_close(gradient, 2 * expected, rtol=1e-5, atol=1e-7)

    def test_both_outputs_of_two_losses_of_one_leaf(self, place: Place) -> None:
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        once = ck.fused_cmi_loss(leaf, target, backend=place.name)
        twice = ck.fused_cmi_loss(leaf, target, backend=place.name)
        (single,) = torch.autograd.grad(once, leaf, retain_graph=True)
        (both,) = torch.autograd.grad(once + twice, leaf)
        torch.testing.assert_close(both, 2 * single, rtol=1e-5, atol=1e-7)

    def test_scaled_upstream(self, place: Place) -> None:
        """A loss scaler's factor, large and small, then the plain gradient again."""
        logits, target = regime("random").make(device=place.device)
        leaf = logits.clone().requires_grad_()
        value = ck.fused_cmi_loss(leaf, target, backend=place.name)
        (plain,) = torch.autograd.grad(value, leaf, retain_graph=True)
        for factor in (65536.0, 2.0**-20, 0.0, 1.0):
            fresh = ck.fused_cmi_loss(leaf, target, backend=place.name)
            (scaled,) = torch.autograd.grad(fresh * factor, leaf)
            torch.testing.assert_close(scaled, factor * plain, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("saved", [False, True], ids=["kept", "by_hooks"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("upstream", [torch.inf, torch.nan])
    def test_upstream_that_is_no_number(
        self, place: Place, upstream: float, dtype: torch.dtype, saved: bool
    ) -> None:
        """Rows that are ignored stay out of it, where a device need not be waited for to find out."""
        if place.device != "cpu":
            pytest.skip("on a device the gradient is scaled as it is")
        if dtype not in place.dtypes:
            pytest.skip(f"{place.name} does not serve {dtype}")
        logits, target = regime("random").make(dtype, place.device)
        target[3] = -100
        leaf = logits.clone().requires_grad_()
        hooks = torch.autograd.graph.save_on_cpu() if saved else nullcontext()
        with hooks:
            value = ck.fused_cmi_loss(leaf, target, backend=place.name)
        value.backward(torch.tensor(upstream, dtype=value.dtype))
        assert leaf.grad is not None
        assert leaf.grad[3].count_nonzero() == 0
        assert not leaf.grad[target != -100].isfinite().any()


def test_half_precision_gradients_are_scaled_before_they_are_rounded(place: Place) -> None:
    """Gradients below float16's smallest number survive a loss scaler: what is rounded is the product."""
    logits, target = regime("collapsed_0.01").make(torch.float16, place.device)
    weights = {"ce_weight": 0.0, "cmi_weight": 1e-3}
    leaf = logits.clone().requires_grad_()
    factor = 2.0**26
    value = ck.fused_cmi_loss(leaf, target, backend=place.name, **weights)
    (scaled,) = torch.autograd.grad(value * factor, leaf)
    wide = logits.float().requires_grad_()
    value = ck.fused_cmi_loss(wide, target, backend=place.name, **weights)
    (expected,) = torch.autograd.grad(value * factor, wide)
    assert (expected / factor).half().count_nonzero() < 0.5 * expected.count_nonzero()
    torch.testing.assert_close(scaled.float(), expected, rtol=1e-3, atol=1e-7)
