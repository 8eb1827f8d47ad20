"""The differentiable core: an autograd Function over the backends, and the reference where more is asked for.

The Function has a hand-written gradient and nothing else. Double backward, forward-mode differentiation and
the transforms of `torch.func` go by autograd through `reference.py`: slower, with (K, N, C) of memory, and
exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import Backend
from .export import exportable_loss, exporting
from .reference import reference_gradient, reference_loss
from .tensors import without_data

# The options that are not tensors, as the operators take them: ce_weight, cmi_weight, label_smoothing,
# ignore_index, reduction (a number of reference.py). A named tuple would take 1 % of a small call.
LossOptions = tuple[float, float, float, int, int]
IGNORE_INDEX: Final = 3
REDUCTION: Final = 4

# The gradient of these is kept in their own dtype: those that are not rounded at all, and bfloat16, which is
# rounded where it is computed. The upstream gradient is nearly always a power of two (one, a loss scale, one
# part of two, four, ...), by which a multiplication does not round again: bfloat16 has float32's exponents.
_KEPT_IN_THEIR_DTYPE = (torch.float32, torch.float64, torch.bfloat16)


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
    options: LossOptions,
) -> Tensor:
    """The value of `torch.ops.cmim_kernels.loss`, differentiable in the logits; None is the reference."""
    if backend is None:
        return reference_loss(logits, target, a, w, class_weight, centroids, *options)
    if exporting():  # whether or not this is the example that needs a gradient
        return exportable_loss(backend, logits, target, a, w, class_weight, centroids, options)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return backend.loss(logits, target, a, w, class_weight, centroids, *options, False)[0]
    call = (backend, a, w, options)
    value: Tensor
    if (
        logits.dtype in _KEPT_IN_THEIR_DTYPE
        and backend.keeps_gradient(logits, options[REDUCTION])
        and not torch.compiler.is_compiling()
        # Somebody cares for what is saved, such as activation checkpointing, which means to drop it.
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    ):
        value = _apply_owned(logits, (target, class_weight, centroids, call))
    else:
        value = _SavedLoss.apply(logits, target, class_weight, centroids, call)
    return value


class _OwnedLoss(torch.autograd.Function):
    """Where the forward pass computes the gradient, in the logits' dtype.

    Inputs: the logits, and one tuple of what has no gradient, (target, class_weight, centroids, call as that
    of `_SavedLoss`): autograd takes its time for every input, in both passes.

    It is kept out of autograd's hands, so that it has one owner, and the first backward pass gives it away,
    uncopied where the upstream gradient is one, as at the root of a graph, else scaled in place. The leaf may
    keep it as its `.grad`, a hook may write to it, `.grad +=` may change it: no later pass sees it, because
    each of them computes the gradient again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, constants: Any) -> Tensor:
        target, class_weight, centroids, call = constants
        backend, a, w, options = call
        value, ctx.gradient = backend.loss(logits, target, a, w, class_weight, centroids, *options, True)
        ctx.call = call
        ctx.save_for_backward(logits, target, class_weight, centroids)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if torch.is_grad_enabled() or needs_reference():
            gradient = reference_gradient(grad, *_arguments(ctx.saved_tensors, ctx.call))
        elif gradient is None or without_data(grad):  # given away before
            gradient = _computed_gradient(ctx, grad, gradient)
        elif not grad.is_cpu or (scale := grad.item()) != 1.0:
            # The operator knows what rounds a second time, and that rows which are ignored stay 0.
            if gradient.dtype == torch.bfloat16 or (grad.is_cpu and not math.isfinite(scale)):
                gradient = _computed_gradient(ctx, grad, gradient)
            else:
                gradient.mul_(grad)
        return gradient, None


def _computed_gradient(ctx: Any, grad: Tensor, kept: Tensor | None) -> Tensor:
    """By the operator, from the gradient that is kept for an upstream of one, or again from the start."""
    saved = grad.new_empty(0) if kept is None else kept
    result: Tensor = ctx.call[0].loss_backward(grad, saved, *_arguments(ctx.saved_tensors, ctx.call))
    return result


# Function.apply but for its care for the transforms of torch.func, which do not get here: 2 us of 40.
_apply_owned = super(torch.autograd.Function, _OwnedLoss).apply


class _SavedLoss(torch.autograd.Function):
    """Where it does not: reductions `none` and the spectrum, float16, GPUs' larger problems, and all tracing.

    Inputs: logits, target, class_weight, centroids, (backend, a, w, options).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, class_weight: Any, centroids: Any, call: Any
    ) -> Tensor:
        backend, a, w, options = call
        value, saved = backend.loss(logits, target, a, w, class_weight, centroids, *options, True)
        ctx.call = call
        ctx.save_for_backward(logits, target, class_weight, centroids, saved)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, saved = ctx.saved_tensors
        arguments = _arguments(inputs, ctx.call)
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or needs_reference()):
            result = reference_gradient(grad, *arguments)
        else:
            result = ctx.call[0].loss_backward(grad, saved, *arguments)
        return result, None, None, None, None


def _arguments(
    inputs: Sequence[Any], call: tuple[Backend, Sequence[float], Sequence[float], LossOptions]
) -> list[Any]:
    """As `reference_loss` and the operators take them."""
    logits, target, class_weight, centroids = inputs
    _, a, w, options = call
    return [logits, target, a, w, class_weight, centroids, *options]
