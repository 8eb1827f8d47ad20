"""Triton kernels for CUDA and ROCm tensors, and through Triton's interpreter (TRITON_INTERPRET=1) for CPU tensors.

Three launches for a batch of up to a few thousand rows: rows (grouped by label, and what each needs of itself
alone), divergences, gradient. float32, bfloat16 and float16; float64 is left to the reference. Nothing waits for
the device, and no result depends on an order of execution. A label out of range is never read through: it makes
the loss NaN, and the gradient of that row.

`saved` holds what the gradient needs of every row, 3 K + 9 numbers and a few flags, in the order of the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..reference import MEAN, NONE, SPECTRUM
from ..tensors import needs_no_dispatch
from . import ARGUMENTS
from ._triton import calls
from ._triton.launch import Schedule
from ._triton.plan import MAX_CLASSES, MAX_ROWS, MAX_TEMPERATURES, Plan, interpreting, make_plan, table

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unusable() -> str | None:
    """Triton is not installed, or there is neither a GPU nor Triton's interpreter to run it on."""
    if find_spec("triton") is None:
        return 'Triton is not installed: pip install "cmim-kernels[triton]"'
    if not torch.cuda.is_available() and not interpreting():
        return "no GPU is available (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    return None


def refuses(logits: Tensor, temperatures: int) -> str | None:
    """Refuses float64, tensors that are not on a GPU unless the interpreter runs, and what exceeds the tiling."""
    if logits.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, logits is {logits.dtype}"
    if logits.is_cpu != interpreting():
        where = "CPU tensors, since TRITON_INTERPRET is set" if interpreting() else "tensors on a GPU"
        return f"it serves {where}, logits is on {logits.device}"
    if temperatures > MAX_TEMPERATURES:
        return f"it serves up to {MAX_TEMPERATURES} temperatures, there are {temperatures}"
    if logits.shape[0] > MAX_ROWS:
        return f"it serves up to {MAX_ROWS} rows, logits has {logits.shape[0]}"
    if logits.shape[1] > MAX_CLASSES:
        return f"it serves up to {MAX_CLASSES} classes, logits has {logits.shape[1]}"
    return None


def keeps_gradient(logits: Tensor, reduction: int) -> bool:
    """Never: backward computes it from statistics of the rows."""
    return False


def saved_like(
    logits: Tensor, temperatures: int, reduction: int, save: bool
) -> tuple[tuple[int, ...], torch.dtype]:
    """One row of words; see `_triton/plan.py`."""
    n, c = logits.shape
    words = make_plan(n, c, temperatures, reduction == NONE, False).saved if save and n > 0 else 0
    return (words,), torch.float32


def _loss(
    logits: Tensor,
    target: Tensor,
    inverse_temperatures: Sequence[float],
    temperature_weights: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    ce_weight: float,
    cmi_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    value = logits.new_empty(_value_shape(logits, len(inverse_temperatures), reduction), dtype=torch.float32)
    if len(logits) == 0:
        undefined = reduction == SPECTRUM or (reduction == MEAN and (ce_weight != 0 or cmi_weight != 0))
        return value.fill_(float("nan") if undefined else 0.0), value.new_empty(0)
    a, w = tuple(inverse_temperatures), tuple(temperature_weights)
    of = calls.layout(logits, target)
    what = calls.terms(reduction, ce_weight, cmi_weight, label_smoothing)
    schedule = calls.forward(of, a, what, centroids is not None, ignore_index)
    saved = value.new_empty(schedule.plan.saved)
    tensors = {
        "target": target,
        "class_weight": class_weight,
        "centroids": centroids,
        "saved": saved,
        "value": value,
        **_places(schedule.plan, logits, target, ignore_index),
    }
    numbers = {"ce_weight": ce_weight, "cmi_weight": cmi_weight, "smoothing": label_smoothing}
    _run(schedule, logits, a, w, tensors, numbers)
    return value, saved if save else value.new_empty(0)


def _loss_backward(
    grad: Tensor,
    saved: Tensor,
    logits: Tensor,
    target: Tensor,
    inverse_temperatures: Sequence[float],
    temperature_weights: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    ce_weight: float,
    cmi_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if len(logits) == 0:
        return out
    a, w = tuple(inverse_temperatures), tuple(temperature_weights)
    of = calls.layout(logits, target)
    what = calls.terms(reduction, ce_weight, cmi_weight, label_smoothing)
    stride = grad.stride(0) if grad.dim() else 0
    schedule = calls.backward(of, a, what, centroids is not None, stride)
    tensors = {
        "class_weight": class_weight,
        "centroids": centroids,
        "saved": saved,
        "grad": grad,
        "grad_logits": out,
    }
    numbers = {"ce_weight": ce_weight, "cmi_weight": cmi_weight, "smoothing": label_smoothing}
    _run(schedule, logits, a, w, tensors, numbers)
    return out


def _class_centroids(
    logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float], ignore_index: int
) -> tuple[Tensor, Tensor]:
    k, c = len(inverse_temperatures), logits.shape[1]
    out = logits.new_zeros((k, c, c), dtype=torch.float32)
    counts = target.new_zeros(c)
    if len(logits) == 0:
        return out, counts
    a, w = tuple(inverse_temperatures), (0.0,) * k
    schedule = calls.centroids(calls.layout(logits, target), a, ignore_index)
    places = _places(schedule.plan, logits, target, ignore_index)
    _run(schedule, logits, a, w, {"target": target, "centroids": out, "counts": counts, **places}, {})
    return out, counts


def _run(
    schedule: Schedule,
    logits: Tensor,
    a: tuple[float, ...],
    w: tuple[float, ...],
    tensors: dict[str, Tensor | None],
    numbers: dict[str, float],
) -> None:
    """On the logits' device and its current stream, with the logits and the table of temperatures a, w."""
    with torch.cuda.device_of(logits):
        of_all = {"logits": logits, "table": table(a, w, logits.device)}
        schedule.run(logits.device, of_all | tensors, numbers)


def _places(plan: Plan, logits: Tensor, target: Tensor, ignore_index: int) -> dict[str, Tensor]:
    """Of many rows, which are sorted before the first launch: (N,) int64 each.

    order: rows by label; firsts, ends: where the cluster of each of these begins, and the position after it.
    """
    if not plan.sorted_first:
        return {}
    c = logits.shape[1]
    kept = (target >= 0) & (target < c) & (target != ignore_index)
    key, order = torch.sort(torch.where(kept, target, c), stable=True)
    firsts, ends = torch.searchsorted(key, key), torch.searchsorted(key, key, right=True)
    return {"order": order, "firsts": firsts, "ends": ends}


def _value_shape(logits: Tensor, k: int, reduction: int) -> tuple[int, ...]:
    return {NONE: tuple(logits.shape[:1]), SPECTRUM: (k,)}.get(reduction, ())


# For tracing.
def _fake_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    k, reduction, save = len(args[1]), args[9], args[10]
    value = logits.new_empty(_value_shape(logits, k, reduction), dtype=torch.float32)
    shape, dtype = saved_like(logits, k, reduction, save)
    return value, logits.new_empty(shape, dtype=dtype)


def _fake_loss_backward(grad: Tensor, saved: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_class_centroids(
    logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float], ignore_index: int
) -> tuple[Tensor, Tensor]:
    k, c = len(inverse_temperatures), logits.shape[1]
    return logits.new_empty((k, c, c), dtype=torch.float32), target.new_empty((c,))


_LIBRARY = torch.library.Library("cmim_kernels", "FRAGMENT")
_LIBRARY.define(f"triton_loss({ARGUMENTS}, bool save) -> (Tensor, Tensor)")
_LIBRARY.define(f"triton_loss_backward(Tensor grad, Tensor saved, {ARGUMENTS}) -> Tensor")
_LIBRARY.define(
    "triton_class_centroids(Tensor logits, Tensor target, float[] inverse_temperatures, int ignore_index) "
    "-> (Tensor, Tensor)"
)
for _name, _function, _fake in (
    ("triton_loss", _loss, _fake_loss),
    ("triton_loss_backward", _loss_backward, _fake_loss_backward),
    ("triton_class_centroids", _class_centroids, _fake_class_centroids),
):
    _LIBRARY.impl(_name, _function, "CUDA")
    _LIBRARY.impl(_name, _function, "CPU")  # the interpreter
    torch.library.register_fake(f"cmim_kernels::{_name}", _fake, lib=_LIBRARY)


def _past_dispatcher(function: Callable[..., Any], operator: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, or the function that implements it, where dispatching does nothing more."""

    def call(*arguments: Any) -> Any:
        return (function if needs_no_dispatch(*arguments) else operator)(*arguments)

    return call


loss = _past_dispatcher(_loss, torch.ops.cmim_kernels.triton_loss.default)
loss_backward = _past_dispatcher(_loss_backward, torch.ops.cmim_kernels.triton_loss_backward.default)
class_centroids = torch.ops.cmim_kernels.triton_class_centroids.default
