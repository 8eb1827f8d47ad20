"""The differentiable core: one autograd Function over the backends, and the reference where more is asked
for.

The Function has a hand-written gradient and nothing else. Double backward, forward-mode differentiation and
the transforms of `torch.func` go through `reference.py` by autograd: slower, with (K, N, C) of memory, and
exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Backend
from .reference import reference_loss


def differentiable_loss(backend: Backend | None, logits: Tensor, *args: Any) -> Tensor:
    """The value of `torch.ops.cmim_kernels.loss(logits, *args)` (without `save`), differentiable in the
    logits.

    `backend` None stands for the reference. The arguments are valid; see `reference_loss` for their list.
    """
    if backend is None or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return reference_loss(logits, *args)
    if logits.requires_grad and torch.is_grad_enabled():
        value: Tensor = _Loss.apply(backend, logits, *args)
        return value
    return backend.loss(logits, *args, False)[0]


class _Loss(torch.autograd.Function):
    """Inputs: backend, logits (N, C), then target, a, w, class_weight, centroids and five numbers."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, logits: Tensor, *args: Any) -> Tensor:
        value, saved = backend.loss(logits, *args, True)
        target, a, w, class_weight, centroids, *numbers = args
        ctx.backend, ctx.a, ctx.w, ctx.numbers = backend, a, w, numbers
        # Out of autograd's hands, `saved` has one owner, and backward may give it away
        # (`Backend.SAVED_IS_GRADIENT`). A tracer knows no owners; there it is saved like any other tensor.
        ctx.gives_saved_away = backend.SAVED_IS_GRADIENT and not torch.compiler.is_compiling()
        if ctx.gives_saved_away:
            ctx.saved_gradient = saved
            saved = None
        ctx.save_for_backward(logits, target, class_weight, centroids, saved)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, class_weight, centroids, saved = ctx.saved_tensors
        args = (target, ctx.a, ctx.w, class_weight, centroids, *ctx.numbers)
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        ):
            return None, _reference_gradient(grad, logits, *args), *(None,) * len(args)
        if ctx.gives_saved_away:
            saved = ctx.saved_gradient
            ctx.saved_gradient = saved.new_empty(0)
        return None, ctx.backend.loss_backward(grad, saved, logits, *args), *(None,) * len(args)


def _reference_gradient(grad: Tensor, logits: Tensor, *args: Any) -> Tensor:
    """The gradient by autograd through the reference, differentiable itself if gradients are enabled."""
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        value = reference_loss(logits, *args)
        (result,) = torch.autograd.grad(value, logits, grad, create_graph=keep_graph)
    return result
