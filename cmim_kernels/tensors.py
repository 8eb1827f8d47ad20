"""Tensors whose numbers must not be asked for, that are nothing but numbers, or that keep their dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLAIN = Tensor.__torch_dispatch__


def without_data(tensor: Tensor) -> bool:
    """Whether it is a tracer's, a transform's, or many at once as `is_grads_batched` makes of them."""
    return (
        torch.compiler.is_compiling()
        or type(tensor).__torch_dispatch__ is not _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def needs_no_dispatch(*arguments: object) -> bool:
    """Whether an operator with these arguments may be called past PyTorch's dispatcher.

    It does nothing then but call the kernel, and nobody looks: no compiler, no mode, no profiler.
    """
    if torch.compiler.is_compiling():
        return False
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            type(argument) is not Tensor
            or argument.is_neg()
            or argument._is_zerotensor()
            or torch._C._functorch.is_legacy_batchedtensor(argument)
        ):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._autograd._profiler_enabled()
    )


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What a module's `_apply` is given, moving tensors between devices as it does, but casting none."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved
