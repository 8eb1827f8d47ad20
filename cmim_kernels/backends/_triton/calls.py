"""What each kind of call launches: settled by shapes, strides and options, and kept for the calls that follow."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import NONE, SPECTRUM
from .launch import Schedule
from .plan import ROWS_OF_SUMS, make_plan, next_power_of_two, temperatures, vector

_KEPT = 1024  # kinds of each, those that were called last


class Layout(NamedTuple):
    """Of the logits (N, C) and the target (N,); hashable. Kernels are compiled for each device."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    target_stride: int


def layout(logits: Tensor, target: Tensor) -> Layout:
    return Layout(logits.shape, logits.stride(), logits.dtype, logits.device, target.stride(0))


class Terms(NamedTuple):
    """What the value has, and is."""

    reduction: int
    ce: bool
    cmi: bool
    smooth: bool  # labels are, in the cross entropy


def terms(reduction: int, ce_weight: float, cmi_weight: float, smoothing: float) -> Terms:
    ce, cmi = (False, True) if reduction == SPECTRUM else (ce_weight != 0, cmi_weight != 0)
    return Terms(reduction, ce, cmi, smoothing > 0)


@lru_cache(_KEPT)
def forward(of: Layout, a: tuple[float, ...], what: Terms, given: bool, ignore_index: int) -> Schedule:
    """rows, divergences and value: brings logits, target, class_weight, centroids, table, saved, value, the places of
    rows that are sorted first, and the numbers ce_weight, cmi_weight, smoothing.
    """
    names = ("logits", "target", "class_weight", "centroids", "table", "saved", "value", *_PLACES, *_NUMBERS)
    schedule = _schedule(names, of, a, what, given)
    plan = schedule.plan
    (n, _), k = of.shape, len(a)
    padded = temperatures(a).padded
    tiles, chunk = (plan.tiles, plan.chunk) if what.cmi else (1, ROWS_OF_SUMS)
    chunks = -(-n // chunk)
    schedule.room("counters", 1 + chunks, dtype=torch.int32)
    _rows(schedule, of, given, ignore_index, 1 + chunks)
    large = what.cmi and plan.large > 0
    if large:
        schedule.room("large_masses", plan.slots, tiles, k)
        _large_sums(schedule, of, k, upstream=None, up_stride=0, large_pulls=None)
    parts = masses = None
    if what.cmi:
        parts = schedule.room("parts", 2, tiles, n, k)
        masses = schedule.room("masses", tiles, n, k, dtype=torch.float64 if given else torch.float32)
    schedule.room("totals", chunks, padded + 3, dtype=torch.float64)
    schedule.launch(
        "forward.forward_kernel",
        chunks * tiles,
        parts=parts,
        masses=masses,
        large_masses="large_masses" if large else None,
        tiles=tiles,
        chunks=chunks,
        CHUNK=chunk,
        FR=max(1, ROWS_OF_SUMS * 8 // padded),
    )
    return schedule


@lru_cache(_KEPT)
def backward(of: Layout, a: tuple[float, ...], what: Terms, given: bool, grad_stride: int) -> Schedule:
    """The gradient: brings logits, class_weight, centroids, table, saved, grad, grad_logits and the numbers."""
    names = ("logits", "class_weight", "centroids", "table", "saved", "grad", "grad_logits", *_NUMBERS)
    schedule = _schedule(names, of, a, what, given)
    plan = schedule.plan
    (n, c), k = of.shape, len(a)
    large_pulls = pull_parts = None
    if what.reduction == NONE and what.cmi and not given:
        if plan.large:
            large_pulls = schedule.room("large_pulls", plan.slots, k, c)
            _large_sums(schedule, of, k, upstream="grad", up_stride=grad_stride, large_masses=None)
        pull_parts = schedule.room("pull_parts", plan.tiles, n, k)
        schedule.launch(
            "backward.pull_kernel",
            plan.chunks * plan.tiles,
            upstream="grad",
            large_pulls=large_pulls,
            parts=pull_parts,
            up_stride=grad_stride,
        )
    out_vec = vector((c, 1), of.dtype)
    schedule.launch(
        "backward.gradient_kernel",
        plan.chunks * plan.tiles,
        large_pulls=large_pulls,
        pull_parts=pull_parts,
        out_units=c // out_vec,
        OUT_VEC=out_vec,
        grad_stride=grad_stride,
    )
    return schedule


@lru_cache(_KEPT)
def centroids(of: Layout, a: tuple[float, ...], ignore_index: int) -> Schedule:
    """The centroids as a result: brings logits, target, table, centroids, counts and the places of sorted rows."""
    names = ("logits", "target", "table", "centroids", "counts", *_PLACES)
    schedule = _schedule(names, of, a, Terms(SPECTRUM, ce=False, cmi=True, smooth=False), given=False)
    plan = schedule.plan
    schedule.room("saved", plan.saved)
    _rows(schedule, of, True, ignore_index, 0, counters=None, class_weight=None, smoothing=0.0)
    schedule.launch("centroids.centroids_kernel", plan.chunks * plan.tiles)
    return schedule


_PLACES = ("order", "firsts", "ends")
_NUMBERS = ("ce_weight", "cmi_weight", "smoothing")


def _schedule(names: tuple[str, ...], of: Layout, a: tuple[float, ...], what: Terms, given: bool) -> Schedule:
    """One without launches yet."""
    n, c = of.shape
    t = temperatures(a)
    plan = make_plan(n, c, len(a), what.reduction == NONE, given)
    vec = vector(of.strides, of.dtype)
    return Schedule(
        plan,
        names,
        N=n,
        C=c,
        K=len(a),
        VEC=vec,
        row_units=of.strides[0] // max(vec, 1),
        col_stride=of.strides[1],
        KC=t.padded,
        POWERS=t.powers,
        base=t.base,
        # Below it exp(a x) vanishes at every temperature and at the cross entropy's a = 1, with room to spare.
        floor=-200.0 / min(t.a[0], 1.0),
        tiles=plan.tiles,
        R=plan.rows,
        BC=plan.columns,
        CHUNK=plan.chunk,
        LARGE=plan.large if what.cmi else 0,
        REDUCTION=what.reduction,
        HAS_CE=what.ce,
        HAS_CMI=what.cmi,
        SMOOTH=what.smooth,
        GIVEN=given,
    )


def _rows(
    schedule: Schedule,
    of: Layout,
    solo: bool,
    ignore_index: int,
    n_counters: int,
    **own: Any,
) -> None:
    """The first launch: rows grouped by label, and what each needs of itself alone."""
    plan, n = schedule.plan, of.shape[0]
    places: dict[str, Any] = {} if plan.sorted_first else dict.fromkeys(_PLACES)
    schedule.launch(
        "rows.rows_kernel",
        -(-n // plan.row_block),
        **places,
        **own,
        R=plan.row_block,
        BC=plan.row_columns,
        BN=min(next_power_of_two(max(n, 16)), 1024 // plan.row_block),
        target_stride=of.target_stride,
        n_counters=n_counters,
        ignore_index=ignore_index,
        SOLO=solo,
    )


def _large_sums(
    schedule: Schedule, of: Layout, k: int, upstream: str | None, up_stride: int, **others: None
) -> None:
    """Two launches for clusters of more than `plan.large` rows: their sums in parts, and put together."""
    plan, end = schedule.plan, schedule.end
    schedule.room("large_parts", plan.slots, 2, 2, k, of.shape[1])
    schedule.room("large_scalars", plan.slots, 2, plan.tiles, 3)
    where = {"parts": "large_parts", "scalars": "large_scalars"}
    programs = plan.slots * plan.tiles
    schedule.launch(
        "large.large_parts_kernel",
        programs,
        **where,
        upstream=upstream,
        up_stride=up_stride,
    )
    schedule.launch("large.large_whole_kernel", programs, **where, **others)
    schedule.end = end  # later launches need none of it: what is theirs may lie there
