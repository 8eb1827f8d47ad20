"""The first launch: the place of every row among the rows sorted by label, and what it needs of itself alone.

    x = z - max z       S_k = sum_j exp(a_k x_j)       cross entropy from S at a = 1

One pass over the logits: the maximum is found on the way, and the sums so far are scaled when it rises.
"""

import triton
import triton.language as tl

from .blocks import (
    COUNT,
    ENTROPY,
    FIRST,
    INVERSE,
    INVERSE_SUM,
    LABEL,
    LOG_SUM,
    PROBABILITY,
    ROW,
    TOP,
    WEIGHT,
    bundle,
    by_temperature,
    field,
    int_field,
    load_block,
)
from .elementary import LOG2E, exponentials

NOWHERE = tl.constexpr(2**31 - 1)  # sorts after every label


@triton.jit
def load_label(target, i, stride, N, C, ignore_index):
    """(label int32, -1 ignored, -2 out of range; key int32 to sort by: C for both) of rows i; int64 up to here."""
    y = tl.load(target + i.to(tl.int64) * stride, mask=i < N, other=0)
    valid = (y >= 0) & (y < C) & (y != ignore_index)
    label = tl.where(valid, y, tl.where(y == ignore_index, -1, -2)).to(tl.int32)
    key = tl.where(i < N, tl.where(valid, label, C), NOWHERE)
    return label, key


@triton.jit
def place(target, i, key, stride, N, C, ignore_index, R: tl.constexpr, BN: tl.constexpr):
    """(position, first position of the cluster, its rows) of rows i (R,), by comparison with all targets.

    Counts of integers: stable, the same in every run, and without a wait for the host.
    """
    before = tl.zeros([R, BN], tl.int32)
    smaller = tl.zeros([R, BN], tl.int32)
    same = tl.zeros([R, BN], tl.int32)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        _label, other = load_label(target, j, stride, N, C, ignore_index)
        less = other[None, :] < key[:, None]
        equal = other[None, :] == key[:, None]
        smaller += less.to(tl.int32)
        same += equal.to(tl.int32)
        before += (equal & (j[None, :] < i[:, None])).to(tl.int32)
    first = tl.sum(smaller, 1)
    return first + tl.sum(before, 1), first, tl.sum(same, 1)


@triton.jit(
    do_not_specialize=[
        "N",
        "C",
        "K",
        "row_units",
        "col_stride",
        "target_stride",
        "n_counters",
        "ignore_index",
    ]
)
def rows_kernel(
    logits,  # (N, C)
    target,  # (N,) int64
    order,  # (N,) int64 rows by label, and their cluster's first position and end (N,) int64; None: found here
    firsts,
    ends,
    class_weight,  # (C,) or None
    table,  # (3, KC) float64: a, w, the caller's index
    saved,
    counters,  # (n_counters,) int32, made zero here for the next launch; or None
    N,
    C,
    K,
    row_units,
    col_stride,
    target_stride,
    n_counters,
    ignore_index: tl.int64,
    base,
    smoothing,
    HAS_CE: tl.constexpr,
    HAS_CMI: tl.constexpr,
    SOLO: tl.constexpr,  # a cluster of one row has a divergence too: the centroids are given
    SMOOTH: tl.constexpr,
    VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    pid = tl.program_id(0)
    if counters is not None:
        counter = pid * (2 * R) + tl.arange(0, 2 * R)
        tl.store(counters + counter, tl.zeros([2 * R], tl.int32), mask=counter < n_counters)

    i = pid * R + tl.arange(0, R)
    live = i < N
    if order is None:
        row = i
        label, key = load_label(target, row, target_stride, N, C, ignore_index)
        p, first, count = place(target, i, key, target_stride, N, C, ignore_index, R, BN)
    else:
        p = i
        row = tl.load(order + i, mask=live, other=0).to(tl.int32)
        label, key = load_label(target, row, target_stride, N, C, ignore_index)
        first = tl.load(firsts + i, mask=live, other=0).to(tl.int32)
        count = tl.load(ends + i, mask=live, other=0).to(tl.int32) - first
    kept = label >= 0
    first = tl.where(kept, first, p)
    count = tl.where(kept, count, 1)
    tl.store(int_field(saved, N, ROW) + p, row, mask=live)
    tl.store(int_field(saved, N, FIRST) + p, first, mask=live)
    tl.store(int_field(saved, N, COUNT) + p, count, mask=live)
    tl.store(int_field(saved, N, LABEL) + p, label, mask=live)

    kept = kept & live
    UNSEEN: tl.constexpr = HAS_CMI and not HAS_CE and not SOLO  # rows alone in their class have no term then
    Z, _ = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
    grid = HAS_CMI & (tl.max((kept & ((count > 1) | SOLO)).to(tl.int32), 0) > 0)  # CE alone needs no S_k
    a = tl.load(table + tl.arange(0, KC)).to(tl.float32)
    at_label = tl.where(kept, label, 0).to(tl.int64)
    z_label = tl.load(logits + row.to(tl.int64) * Z[1] + at_label * Z[2], mask=kept, other=0.0).to(tl.float32)
    anchor = tl.where(z_label == -float("inf"), 0.0, z_label)  # of the sum for label smoothing

    top = tl.full([R], -float("inf"), tl.float32)
    sums = tl.zeros([KC, R, BC], tl.float32)
    unit = tl.zeros([R, BC], tl.float32)
    spread = tl.zeros([R, BC], tl.float32)
    weights = tl.zeros([BC], tl.float32)
    lost = tl.zeros([R, BC], tl.int32)
    for start in range(0, C, BC):
        col = start + tl.arange(0, BC)
        z = load_block(Z, row, kept, col, VEC)
        raised = tl.maximum(top, tl.max(z, 1))
        level = tl.where(raised == -float("inf"), 0.0, raised)
        if tl.max((raised > top).to(tl.int32), 0) > 0:
            fall = top - level  # -inf at first
            unit *= tl.exp2(fall * LOG2E)[:, None]
            if grid:
                sums *= tl.exp2((a * LOG2E)[:, None] * fall[None, :])[:, :, None]
        top = raised
        x = z - level[:, None]
        if HAS_CE:
            unit += tl.exp2(x * LOG2E)
        if UNSEEN:
            lost = lost | (z != z).to(tl.int32)
        if grid:
            sums += exponentials(x, a, base, KC, POWERS)
        if SMOOTH:
            inside = col < C
            if class_weight is None:
                weight = inside.to(tl.float32)
            else:
                weight = tl.load(class_weight + col, mask=inside, other=0.0)
            weights += weight
            spread += tl.where(inside[None, :], weight[None, :] * (z - anchor[:, None]), 0.0)

    tl.store(field(saved, N, TOP) + p, top, mask=live)
    if UNSEEN:  # what has no softmax is as good as a label out of range: NaN
        without = (tl.max(lost, 1) > 0) | (tl.abs(top) == float("inf"))
        tl.store(int_field(saved, N, LABEL) + p, -2, mask=kept & (count == 1) & without)
    if HAS_CE:
        s = tl.sum(unit, 1)
        log_s = tl.log(s)
        weight = tl.full([R], 1.0, tl.float32)
        if class_weight is not None:
            weight = tl.load(class_weight + at_label, mask=kept, other=0.0)
        entropy = (1.0 - smoothing) * weight * (log_s + (top - z_label))
        probability = (1.0 - smoothing) * weight
        if SMOOTH:
            total = tl.sum(weights, 0)
            share = smoothing / C
            entropy += share * (total * (log_s + (top - anchor)) - tl.sum(spread, 1))
            probability += share * total
        entropy = tl.where(kept, entropy, tl.where(label == -2, float("nan"), 0.0))
        tl.store(field(saved, N, ENTROPY) + p, entropy, mask=live)
        tl.store(field(saved, N, WEIGHT) + p, tl.where(kept, weight, 0.0), mask=live)
        tl.store(field(saved, N, PROBABILITY) + p, probability, mask=live)
        tl.store(field(saved, N, INVERSE_SUM) + p, 1.0 / s, mask=live)
    if grid:
        sum_k = tl.sum(sums, 2)
        k = tl.arange(0, KC)[:, None]
        at = p.to(tl.int64)[None, :] * K + k
        mask = (k < K) & kept[None, :]
        tl.store(by_temperature(saved, N, K, INVERSE) + at, 1.0 / sum_k, mask=mask)
        if SOLO:
            tl.store(by_temperature(saved, N, K, LOG_SUM) + at, tl.log(sum_k), mask=mask)
