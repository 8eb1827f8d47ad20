"""The loss as one operator that brings its gradient along: what a program made by `torch.export` holds.

`torch.export` traces through autograd Functions: what is left of ours would be a backend's operators, which
know of no gradient. A program does not know whether it will be asked for one, and computes what it takes;
where it runs, `cmim_kernels` has to be imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .backends import ARGUMENTS, Backend
from .reference import reference_gradient

_NAME = "cmim_kernels::exportable_loss"


def exporting() -> bool:
    """`torch.compiler.is_exporting()`, which the compiler of torch 2.11 takes to be true at all times."""
    return torch.compiler._is_exporting_flag


def exportable_loss(backend: Backend, *arguments: Any) -> Tensor:
    """The value of `backend.loss(*arguments, True)`, differentiable in the logits; `options` come last."""
    *others, options = arguments
    name = backend.__name__.rsplit(".")[-1]  # type: ignore[attr-defined]
    value: Tensor = torch.ops.cmim_kernels.exportable_loss.default(*others, *options, name)[0]
    return value


def _loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    *others, name = arguments
    result: tuple[Tensor, Tensor] = _module(name).loss(*others, True)
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, a, w, class_weight, centroids, *options, name = inputs
    saved = output[1]
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(saved, logits, target, class_weight, centroids)
    ctx.constants = a, w, options, name


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved, logits, target, class_weight, centroids = ctx.saved_tensors
    a, w, options, name = ctx.constants
    arguments = (logits, target, a, w, class_weight, centroids, *options)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # somebody differentiates it again
        result = reference_gradient(grad, *arguments)
    else:
        result = _module(name).loss_backward(grad, saved, *arguments)
    return result, *(None,) * (len(arguments))


def _module(name: str) -> Any:
    """The backend that the program was exported with; where it cannot be used, RuntimeError says why."""
    module = import_module(f"{__package__}.backends.{name}")
    reason = module.unusable()
    if reason is not None:
        raise RuntimeError(f"the program was exported with backend {name!r}, which cannot be used: {reason}")
    return module


_LIBRARY = torch.library.Library("cmim_kernels", "FRAGMENT")
_LIBRARY.define(f"exportable_loss({ARGUMENTS}, str backend) -> (Tensor, Tensor)")
_LIBRARY.impl("exportable_loss", _loss, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _loss, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=_LIBRARY)
