"""The differentiable core: an autograd Function over the backends, and the reference where more is asked for.

The Function has a hand-written gradient and nothing else. Double backward, forward-mode differentiation and
the transforms of `torch.func` go by autograd through `reference.py`: slower, with (K, N, C) of memory, and
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Backend
from .reference import reference_loss

# ce_weight, cmi_weight, label_smoothing, ignore_index, reduction
Numbers = tuple[float, float, float, int, int]


def needs_reference() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_loss(
    backend: Backend | None,
    logits: Tensor,
    target: Tensor,
    a: Sequence[float],
    w: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """The value of `torch.ops.cmim_kernels.loss`, differentiable in the logits; None is the reference."""
    if backend is None:
        return reference_loss(logits, target, a, w, class_weight, centroids, *numbers)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return backend.loss(logits, target, a, w, class_weight, centroids, *numbers, False)[0]
    apply = _TracedLoss.apply if torch.compiler.is_compiling() else _apply_loss
    value: Tensor = apply(logits, target, class_weight, centroids, (backend, a, w, numbers))
    return value


class _Loss(torch.autograd.Function):
    """Eager mode. Inputs: logits, target, class_weight, centroids, (backend, a, w, numbers)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Any, centroids: Any, call: Any
    ) -> Tensor:
        backend, a, w, numbers = call
        value, saved = backend.loss(logits, target, a, w, class_weight, centroids, *numbers, True)
        ctx.call = call
        if backend.SAVED_IS_GRADIENT:
            # Kept out of autograd's hands, `saved` has one owner, which may give it away.
            ctx.gradient = saved
            ctx.save_for_backward(logits, target, class_weight, centroids)
        else:
            ctx.save_for_backward(logits, target, class_weight, centroids, saved)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, a, w, numbers = ctx.call
        logits, target, class_weight, centroids, *rest = ctx.saved_tensors
        arguments = (logits, target, a, w, class_weight, centroids, *numbers)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return _reference_gradient(grad, *arguments), None, None, None, None
        if rest:
            saved = rest[0]
        else:
            saved, ctx.gradient = ctx.gradient, None
            if saved is None:  # an earlier pass through this graph has given it away
                saved = grad.new_empty(0)
        return backend.loss_backward(grad, saved, *arguments), None, None, None, None


# Function.apply but for its care for the transforms of torch.func, which do not get here: 2 us of 40.
_apply_loss = super(torch.autograd.Function, _Loss).apply


class _TracedLoss(torch.autograd.Function):
    """Under torch.compile, where tensors have no owners and double backward is refused by the compiler."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Any, centroids: Any, call: Any
    ) -> Tensor:
        backend, a, w, numbers = call
        value, saved = backend.loss(logits, target, a, w, class_weight, centroids, *numbers, True)
        ctx.call = call
        ctx.save_for_backward(logits, target, class_weight, centroids, saved)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, a, w, numbers = ctx.call
        logits, target, class_weight, centroids, saved = ctx.saved_tensors
        arguments = (logits, target, a, w, class_weight, centroids, *numbers)
        return backend.loss_backward(grad, saved, *arguments), None, None, None, None


def _reference_gradient(grad: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient by autograd through the reference, differentiable itself if gradients are enabled."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        value = reference_loss(logits, *arguments)
        (result,) = torch.autograd.grad(value, logits, grad, create_graph=differentiable)
    return result
