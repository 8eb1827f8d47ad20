"""The last launch: the gradient, written once.

    dL/dz = sum_k c_k P (t - sum_j P t) + cross entropy        with t of columns.py, its mean of forward.py

c_k = g a_k w_k cmi_weight / normaliser, the upstream gradient g included: one rounding, at the end. Where every
row has a g of its own (reduction "none") the path through the centroid does not cancel, and takes a launch before:

    c_k P ( g (t - sum_j P t) - (U - sum_j P U) )             U = sum_m g_m P_m / sum_m P_m, the column's pull
"""

import triton
import triton.language as tl

from .blocks import (
    COUNT,
    INVERSE_SUM,
    LABEL,
    MEAN_RATIO,
    PROBABILITY,
    ROW,
    TOP,
    bundle,
    by_temperature,
    chunk_and_tile,
    cluster_at,
    field,
    forms,
    int_field,
    large_logs,
    load_block,
    load_centre,
    load_large,
    load_rows,
    normalisers,
    owned_from,
    per_cluster,
    per_row,
)
from .columns import below_top, by_form, from_centre, logs, pulls, sums
from .elementary import LOG2E, exponentials
from .finish import MEAN, NONE, SPECTRUM, row_totals
from .given import given_q, precise_ratios


@triton.jit
def entropy_gradient(
    x,  # (R, BC): z - max z
    p,
    live,
    row,
    label,
    col,
    saved,
    grad,
    grad_stride,
    class_weight,
    N,
    C,
    norm,
    ce_weight,
    smoothing,
    REDUCTION: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """(R, BC): softmax less the target distribution, both weighted, times upstream gradient over normaliser `norm`."""
    if REDUCTION == NONE:
        scale = ce_weight * tl.load(grad + row.to(tl.int64) * grad_stride, mask=live, other=0.0)
    else:
        scale = tl.where(live, ce_weight * norm * tl.load(grad), 0.0)
    factor = scale * tl.load(field(saved, N, PROBABILITY) + p, mask=live, other=0.0)
    factor *= tl.load(field(saved, N, INVERSE_SUM) + p, mask=live, other=0.0)
    one = scale * (1.0 - smoothing)
    if class_weight is not None:
        one *= tl.load(class_weight + tl.where(live, label, 0), mask=live, other=0.0)
    g = factor[:, None] * tl.exp2(x * LOG2E) - tl.where(col[None, :] == label[:, None], one[:, None], 0.0)
    if SMOOTH:
        share = (scale * (smoothing / C))[:, None]
        if class_weight is not None:
            share = share * tl.load(class_weight + col, mask=col < C, other=0.0)[None, :]
        g -= share
    return g


@triton.jit
def store_block(grad_logits, g, row, live, col, C, out_units, OUT_VEC: tl.constexpr):
    """g (R, BC) into rows of the contiguous (N, C) gradient, rounded once."""
    at = grad_logits + (row.to(tl.int64) * (tl.cast(out_units, tl.int64) * OUT_VEC))[:, None] + col[None, :]
    tl.store(at, g, mask=live[:, None] & (col < C)[None, :])


@triton.jit
def fresh_columns(
    Z,
    S,
    T,
    begin,
    end,
    f,
    n,
    m,
    centre,
    centre_top,
    upstream,
    up_stride,
    col,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """(L, pull) of a cluster whose rows are begin to end."""
    total, weighted, drift = sums(
        Z, S, T, begin, end, f, m, centre, centre_top, upstream, up_stride, col, KC, POWERS, R, VEC
    )
    L, _mass = logs(total, n, S, f, m, KC, POWERS)
    pull = L
    if upstream is not None:
        pull = pulls(total, weighted, drift, n, m, KC, POWERS)
    return L, pull


@triton.jit
def cluster_columns(
    Z,
    S,
    T,
    saved,
    N,
    begin,
    end,
    f,
    n,
    tile,
    tiles,
    centre,
    centre_top,
    upstream,
    up_stride,
    large_pulls,
    col,
    LARGE: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """(form m, L, pull) of a cluster in a tile, in the form that the forward pass chose; pull is L where there is
    no upstream gradient of every row."""
    K = S[4]
    m = tl.load(forms(saved, N, K) + tl.cast(N, tl.int64) * tile + f)
    if LARGE > 0:
        if n > LARGE:
            slot = f // LARGE
            L = load_large(large_logs(saved, N, K, tiles), slot, K, Z[3], col, KC)
            pull = L
            if upstream is not None:
                pull = load_large(large_pulls, slot, K, Z[3], col, KC)
        else:
            L, pull = fresh_columns(
                Z,
                S,
                T,
                begin,
                end,
                f,
                n,
                m,
                centre,
                centre_top,
                upstream,
                up_stride,
                col,
                KC,
                POWERS,
                R,
                VEC,
            )
    else:
        L, pull = fresh_columns(
            Z,
            S,
            T,
            begin,
            end,
            f,
            n,
            m,
            centre,
            centre_top,
            upstream,
            up_stride,
            col,
            KC,
            POWERS,
            R,
            VEC,
        )
    return m, L, pull


@triton.jit(do_not_specialize=["N", "C", "K", "row_units", "col_stride", "up_stride", "tiles"])
def pull_kernel(
    logits,
    table,
    saved,
    upstream,  # (N,)
    large_pulls,  # (slots, K, C)
    parts,  # (tiles, N, K): shares of sum_j P U
    N,
    C,
    K,
    row_units,
    col_stride,
    up_stride,
    tiles,
    base,
    floor,
    LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    """Before the gradient of reduction "none": every row's mean of the columns' pulls."""
    chunk, tile = chunk_and_tile(tiles)
    lo = chunk * CHUNK
    hi = tl.minimum(lo + CHUNK, N)
    Z, S = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
    col = tile * BC + tl.arange(0, BC)
    k = tl.arange(0, KC)
    T = (tl.load(table + k).to(tl.float32), base, floor)
    parts += tl.cast(N, tl.int64) * tile * K
    p = owned_from(saved, N, lo, True, LARGE)
    while p < hi:
        f, n, _label, stop = cluster_at(saved, N, p, hi, True, LARGE)
        if n > 1:
            centre, centre_top = load_centre(Z, S, f, col, VEC)
            _form, _L, pull = cluster_columns(
                Z, S, T, saved, N, p, stop, f, n, tile, tiles, centre, centre_top, upstream, up_stride,
                large_pulls, col, LARGE, KC, POWERS, R, VEC,
            )  # fmt: skip
            for start in range(p, stop, R):
                q, live, _row, top, z = load_rows(Z, S, start, stop, col, R, VEC)
                e = exponentials(below_top(z, top, floor), T[0], base, KC, POWERS)
                mean = per_row(S[2], K, q, live, KC) * tl.sum(e * pull[:, None, :], 2)
                at = q.to(tl.int64)[None, :] * K + k[:, None]
                tl.store(parts + at, mean, mask=(k < K)[:, None] & live[None, :])
        p = stop


@triton.jit(do_not_specialize=["N", "C", "K", "row_units", "col_stride", "out_units", "grad_stride", "tiles"])
def gradient_kernel(
    logits,  # (N, C)
    centroids,  # (K, C, C) or None
    class_weight,  # (C,) or None
    table,  # (3, KC) float64: a, w, the caller's index
    saved,
    grad,  # the upstream gradient: (), (N,) for NONE, (K,) for SPECTRUM
    large_pulls,  # (slots, K, C), and
    pull_parts,  # (tiles, N, K), of `pull_kernel`: for NONE with the batch's own centroids
    grad_logits,  # (N, C) contiguous
    N,
    C,
    K,
    row_units,
    col_stride,
    out_units,
    grad_stride,
    tiles,
    base,
    floor,
    ce_weight,
    cmi_weight,
    smoothing,
    REDUCTION: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_CMI: tl.constexpr,
    GIVEN: tl.constexpr,
    SMOOTH: tl.constexpr,
    LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    OUT_VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    chunk, tile = chunk_and_tile(tiles)
    lo = chunk * CHUNK
    hi = tl.minimum(lo + CHUNK, N)
    WHOLE: tl.constexpr = HAS_CMI and not GIVEN
    PULLED: tl.constexpr = REDUCTION == NONE and WHOLE
    Z, S = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
    col = tile * BC + tl.arange(0, BC)
    norm = 1.0
    ce_norm = 1.0
    if REDUCTION == MEAN or REDUCTION == SPECTRUM:
        norm = tl.load(normalisers(saved, N, K))
        ce_norm = tl.load(normalisers(saved, N, K) + 1)

    # Rows that only the cross entropy sees, and those that nothing does.
    for start in range(lo, hi, R):
        p = start + tl.arange(0, R)
        live = p < hi
        label = tl.load(int_field(saved, N, LABEL) + p, mask=live, other=-1)
        alone = live
        if HAS_CMI:
            count = tl.load(int_field(saved, N, COUNT) + p, mask=live, other=1)
            alone = live & ((label < 0) | ((count == 1) & (not GIVEN)))
        if tl.max(alone.to(tl.int32), 0) > 0:
            row = tl.load(int_field(saved, N, ROW) + p, mask=live, other=0)
            g = tl.zeros([R, BC], tl.float32)
            if HAS_CE:
                kept = alone & (label >= 0)
                top = tl.load(field(saved, N, TOP) + p, mask=kept, other=0.0)
                x = load_block(Z, row, kept, col, VEC) - top[:, None]
                g = entropy_gradient(
                    x, p, kept, row, label, col, saved, grad, grad_stride, class_weight, N, C, ce_norm, ce_weight,
                    smoothing, REDUCTION, SMOOTH,
                )  # fmt: skip
                g = tl.where(kept[:, None], g, 0.0)
            g = tl.where((label == -2)[:, None], float("nan"), g)
            store_block(grad_logits, g, row, alone, col, C, out_units, OUT_VEC)

    if HAS_CMI:
        k = tl.arange(0, KC)
        a = tl.load(table + k).to(tl.float32)
        T = (a, base, floor)
        if REDUCTION == SPECTRUM:
            order = tl.load(table + 2 * KC + k).to(tl.int64)
            c = a * norm * tl.load(grad + order * grad_stride, mask=k < K, other=0.0)
        else:
            c = a * (norm * cmi_weight) * tl.load(table + KC + k).to(tl.float32)
            if REDUCTION != NONE:
                c *= tl.load(grad)
        upstream = grad if PULLED else None
        means = by_temperature(saved, N, K, MEAN_RATIO)
        p = owned_from(saved, N, lo, WHOLE, LARGE)
        while p < hi:
            f, n, kind, stop = cluster_at(saved, N, p, hi, WHOLE, LARGE)
            if (kind >= 0) & ((n > 1) | GIVEN):
                centre, centre_top = load_centre(Z, S, f, col, VEC)
                if GIVEN:
                    log_b = per_cluster(S[3], K, f, KC)
                    Q = given_q(centroids, table, kind, K, C, col, KC)
                    L = tl.log(Q) + log_b[:, None]
                    pull = L
                else:
                    m, L, pull = cluster_columns(
                        Z, S, T, saved, N, p, stop, f, n, tile, tiles, centre, centre_top, upstream, grad_stride,
                        large_pulls, col, LARGE, KC, POWERS, R, VEC,
                    )  # fmt: skip
                for start in range(p, stop, R):
                    q, live, row, top, z = load_rows(Z, S, start, stop, col, R, VEC)
                    x = below_top(z, top, floor)
                    e = exponentials(x, a, base, KC, POWERS)
                    y = x
                    if not GIVEN and m > 0:
                        y = from_centre(z, top, live, centre, centre_top)
                    if GIVEN:
                        t = a[:, None, None] * y[None, :, :] - L[:, None, :]
                    else:
                        t = a[:, None, None] * by_form(y, x, m, KC, POWERS) - L[:, None, :]
                    mean = per_row(means, K, q, live, KC)
                    factor = c[:, None] * per_row(S[2], K, q, live, KC)
                    pulled = factor
                    if GIVEN:
                        log_s = per_row(S[3], K, q, live, KC)
                        if tl.max(tl.load(forms(saved, N, K) + q, mask=live, other=0), 0) > 0:
                            t = precise_ratios(z, top, log_s, Q, table, KC)
                        else:
                            mean += log_s - log_b[:, None]
                    if REDUCTION == NONE:
                        up = tl.load(grad + row.to(tl.int64) * grad_stride, mask=live, other=0.0)
                        factor *= up[None, :]
                    h = factor[:, :, None] * (t - mean[:, :, None])
                    if PULLED:
                        pull_mean = row_totals(pull_parts, tiles, N, K, q, live, KC)
                        h -= pulled[:, :, None] * (pull[:, None, :] - pull_mean[:, :, None])
                    if GIVEN:
                        h = tl.where(e > 0, h, 0.0)
                    g = tl.sum(e * h, 0)
                    if HAS_CE:
                        label = tl.where(live, kind, -1)
                        g += entropy_gradient(
                            x, q, live, row, label, col, saved, grad, grad_stride, class_weight, N, C, ce_norm,
                            ce_weight, smoothing, REDUCTION, SMOOTH,
                        )  # fmt: skip
                    store_block(grad_logits, g, row, live, col, C, out_units, OUT_VEC)
            p = stop
