"""Triton kernels for CUDA and ROCm tensors, and through Triton's interpreter (TRITON_INTERPRET=1) for CPU tensors.

Three launches for a batch of up to a few thousand rows: rows (grouped by label, and what each needs of itself
alone), divergences, gradient. float32, bfloat16 and float16; float64 is left to the reference. Nothing waits for
the device, and no result depends on an order of execution. A label out of range is never read through: it makes
the loss NaN, and the gradient of that row.

`saved` holds what the gradient needs of every row, 3 K + 9 numbers and a few flags, in the order of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..reference import MEAN, NONE, SPECTRUM
from . import ARGUMENTS
from ._triton.launch import launcher
from ._triton.plan import (
    MAX_CLASSES,
    MAX_ROWS,
    MAX_TEMPERATURES,
    ROWS_OF_SUMS,
    Plan,
    Temperatures,
    interpreting,
    make_plan,
    next_power_of_two,
    table,
    temperatures,
    vector,
)

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


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        logits: Tensor,
        a: Sequence[float],
        w: Sequence[float],
        per_row: bool = False,
        given: bool = False,
    ) -> None:
        self.logits = logits
        self.n, self.c = logits.shape
        self.k = len(a)
        self.temperatures: Temperatures = temperatures(tuple(a), tuple(w))
        self.plan: Plan = make_plan(self.n, self.c, self.k, per_row, given)
        self.table = table(self.temperatures, logits.device)
        vec = vector(logits)
        self.shape = {"N": self.n, "C": self.c, "K": self.k, "VEC": vec, "col_stride": logits.stride(1)}
        self.shape["row_units"] = logits.stride(0) // max(vec, 1)
        t = self.temperatures
        self.powers = {"KC": t.padded, "POWERS": t.powers, "base": t.base}
        self.tile = {"tiles": self.plan.tiles, "R": self.plan.rows, "BC": self.plan.columns}
        # Below it exp(a x) vanishes at every temperature and at the cross entropy's a = 1, with room to spare.
        self.floor = -200.0 / min(t.a[0], 1.0)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.logits.new_empty(shape, dtype=dtype)

    def launch(self, kernel: str, programs: int, *tensors: Tensor | None, **arguments: Any) -> None:
        """Runs `module.function` of `_triton` on the logits' device and its current stream."""
        with torch.cuda.device_of(self.logits):
            launcher(kernel)(self.logits.device.index, programs, tensors, self.shape | arguments)

    def rows(
        self,
        target: Tensor,
        saved: Tensor,
        ignore_index: int,
        counters: Tensor | None = None,
        **arguments: Any,
    ) -> None:
        """The first launch, and the sorting of many rows before it."""
        plan, n = self.plan, self.n
        order = first = end = None
        if plan.sorted_first:
            kept = (target >= 0) & (target < self.c) & (target != ignore_index)
            key, order = torch.sort(torch.where(kept, target, self.c), stable=True)
            first, end = torch.searchsorted(key, key), torch.searchsorted(key, key, right=True)
        self.launch(
            "rows.rows_kernel",
            -(-n // plan.row_block),
            *(self.logits, target, order, first, end, arguments.pop("class_weight", None), self.table, saved),
            counters,
            **self.powers,
            **arguments,
            R=plan.row_block,
            BC=plan.row_columns,
            BN=min(next_power_of_two(max(n, 16)), 1024 // plan.row_block),
            target_stride=target.stride(0),
            n_counters=0 if counters is None else counters.numel(),
            ignore_index=ignore_index,
        )


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
    given = centroids is not None
    call = _Call(logits, inverse_temperatures, temperature_weights, reduction == NONE, given)
    plan, n, k = call.plan, call.n, call.k
    has_ce, has_cmi = _terms(ce_weight, cmi_weight, reduction)
    tiles, chunk = (plan.tiles, plan.chunk) if has_cmi else (1, ROWS_OF_SUMS)
    chunks = -(-n // chunk)
    saved = call.empty(plan.saved)
    counters = call.empty(1 + chunks, dtype=torch.int32)
    call.rows(
        target,
        saved,
        ignore_index,
        counters,
        class_weight=class_weight,
        HAS_CE=has_ce,
        HAS_CMI=has_cmi,
        SOLO=given,
        SMOOTH=label_smoothing > 0,
        smoothing=label_smoothing,
    )
    large = plan.large if has_cmi else 0
    large_masses = None
    if large:
        large_masses = call.empty(plan.slots, tiles, k)
        _large_sums(call, saved, large, None, large_masses, None)
    call.launch(
        "forward.forward_kernel",
        chunks * tiles,
        *(logits, centroids, call.table, saved),
        call.empty(2, tiles, n, k) if has_cmi else None,
        call.empty(tiles, n, k, dtype=torch.float64 if given else torch.float32) if has_cmi else None,
        large_masses,
        call.empty(chunks, call.temperatures.padded + 3, dtype=torch.float64),
        *(counters, value),
        **call.powers,
        **call.tile | {"tiles": tiles},
        chunks=chunks,
        floor=call.floor,
        ce_weight=ce_weight,
        cmi_weight=cmi_weight,
        REDUCTION=reduction,
        HAS_CE=has_ce,
        HAS_CMI=has_cmi,
        GIVEN=given,
        LARGE=large,
        CHUNK=chunk,
        FR=max(1, ROWS_OF_SUMS * 8 // call.temperatures.padded),
    )
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
    given = centroids is not None
    call = _Call(logits, inverse_temperatures, temperature_weights, reduction == NONE, given)
    plan, n, k = call.plan, call.n, call.k
    has_ce, has_cmi = _terms(ce_weight, cmi_weight, reduction)
    large = plan.large if has_cmi else 0
    large_pulls = pull_parts = None
    stride = grad.stride(0) if grad.dim() else 0
    if reduction == NONE and has_cmi and not given:
        if large:
            large_pulls = call.empty(plan.slots, k, call.c)
            _large_sums(call, saved, large, grad, None, large_pulls)
        pull_parts = call.empty(plan.tiles, n, k)
        call.launch(
            "backward.pull_kernel",
            plan.chunks * plan.tiles,
            *(logits, call.table, saved, grad, large_pulls, pull_parts),
            **call.powers,
            **call.tile,
            up_stride=stride,
            floor=call.floor,
            LARGE=large,
            CHUNK=plan.chunk,
        )
    out_vec = vector(out)
    call.launch(
        "backward.gradient_kernel",
        plan.chunks * plan.tiles,
        *(logits, centroids, class_weight, call.table, saved, grad, large_pulls, pull_parts, out),
        **call.powers,
        **call.tile,
        out_units=call.c // out_vec,
        OUT_VEC=out_vec,
        grad_stride=stride,
        floor=call.floor,
        ce_weight=ce_weight,
        cmi_weight=cmi_weight,
        smoothing=label_smoothing,
        REDUCTION=reduction,
        HAS_CE=has_ce,
        HAS_CMI=has_cmi,
        GIVEN=given,
        SMOOTH=label_smoothing > 0,
        LARGE=large,
        CHUNK=plan.chunk,
    )
    return out


def _class_centroids(
    logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float], ignore_index: int
) -> tuple[Tensor, Tensor]:
    k, c = len(inverse_temperatures), logits.shape[1]
    out = logits.new_zeros((k, c, c), dtype=torch.float32)
    counts = target.new_zeros(c)
    if len(logits) == 0:
        return out, counts
    call = _Call(logits, inverse_temperatures, (0.0,) * k)
    plan = call.plan
    saved = call.empty(plan.saved)
    call.rows(
        target, saved, ignore_index, HAS_CE=False, HAS_CMI=True, SOLO=True, SMOOTH=False, smoothing=0.0
    )  # fmt: skip
    call.launch(
        "centroids.centroids_kernel",
        plan.chunks * plan.tiles,
        *(logits, call.table, saved, out, counts),
        **call.powers,
        **call.tile,
        floor=call.floor,
        CHUNK=plan.chunk,
    )
    return out, counts


def _large_sums(
    call: _Call,
    saved: Tensor,
    large: int,
    upstream: Tensor | None,
    large_masses: Tensor | None,
    large_pulls: Tensor | None,
) -> None:
    """Two launches for clusters of more than `large` rows: their sums in parts, and put together."""
    plan, k, c = call.plan, call.k, call.c
    parts = call.empty(plan.slots, 2, 2, k, c)
    scalars = call.empty(plan.slots, 2, plan.tiles, 3)
    call.launch(
        "large.large_parts_kernel",
        plan.slots * plan.tiles,
        *(call.logits, call.table, saved, upstream, parts, scalars),
        **call.powers,
        **call.tile,
        up_stride=0 if upstream is None else upstream.stride(0),
        floor=call.floor,
        LARGE=large,
    )
    call.launch(
        "large.large_whole_kernel",
        plan.slots * plan.tiles,
        *(call.logits, call.table, saved, parts, scalars, large_masses, large_pulls),
        tiles=plan.tiles,
        BC=plan.columns,
        KC=call.temperatures.padded,
        POWERS=call.temperatures.powers,
        floor=call.floor,
        LARGE=large,
    )


def _terms(ce_weight: float, cmi_weight: float, reduction: int) -> tuple[bool, bool]:
    """Which terms the value has: cross entropy, CMI."""
    return (False, True) if reduction == SPECTRUM else (ce_weight != 0, cmi_weight != 0)


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

loss = torch.ops.cmim_kernels.triton_loss.default
loss_backward = torch.ops.cmim_kernels.triton_loss_backward.default
class_centroids = torch.ops.cmim_kernels.triton_class_centroids.default
