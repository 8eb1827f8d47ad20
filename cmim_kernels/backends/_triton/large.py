"""Clusters of more than LARGE rows: their sums over rows are shared out over several programs, in two launches.

A program adds up the rows of one stretch of LARGE positions, which holds rows of at most two large clusters: one
that was already there at its start (part 0) and one that starts in it (part 1). Then the cluster that starts in
a stretch, at most one, is put together from its parts in their order.
"""

import triton
import triton.language as tl

from .blocks import COUNT, FIRST, bundle, chunk_and_tile, forms, int_field, large_logs, load_centre
from .columns import choose_form, logs, pulls, spread, sums

SCALARS = tl.constexpr(3)


@triton.jit
def large_at(saved, N, p, LARGE: tl.constexpr):
    """(first position, rows) of the cluster at p; no rows if it is not large."""
    f = tl.load(int_field(saved, N, FIRST) + p)
    n = tl.load(int_field(saved, N, COUNT) + p)
    return f, tl.where(n > LARGE, n, 0)


@triton.jit
def store_part(at, values, k, K, col, C):
    """Values (KC, BC) into a part (K, C)."""
    tl.store(
        at + k.to(tl.int64)[:, None] * C + col[None, :], values, mask=(k < K)[:, None] & (col < C)[None, :]
    )


@triton.jit(do_not_specialize=["N", "C", "K", "row_units", "col_stride", "tiles", "up_stride"])
def large_parts_kernel(
    logits,
    table,
    saved,
    upstream,  # (N,) in the backward pass; None in the forward pass, where the form is yet to be chosen
    parts,  # (slots, 2, 2, K, C): sums of P and of w; in the backward pass sums in their form, and weighted ones
    scalars,  # (slots, 2, tiles, SCALARS): what `spread` returns; in the backward pass the drift
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
    VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    slot, tile = chunk_and_tile(tiles)
    lo = slot * LARGE
    hi = tl.minimum(lo + LARGE, N)
    Z, S = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
    col = tile * BC + tl.arange(0, BC)
    k = tl.arange(0, KC)
    T = (tl.load(table + k).to(tl.float32), base, floor)
    for part in range(2):
        f, n = large_at(saved, N, tl.where(part == 0, lo, hi - 1), LARGE)
        begin = tl.maximum(f, lo)
        if (n > 0) & ((part == 0) | (f > lo)):
            end = tl.minimum(f + n, hi)
            centre, centre_top = load_centre(Z, S, f, col, VEC)
            index = tl.cast(slot, tl.int64) * 2 + part
            at = parts + index * (2 * K) * C
            scalar = scalars + (index * tiles + tile) * SCALARS
            if upstream is None:
                low = tl.load(table).to(tl.float32)
                high = tl.load(table + K - 1).to(tl.float32)
                mild, sharp, widest = spread(
                    Z, S, begin, end, centre, centre_top, col, low, high, floor, R, VEC
                )
                tl.store(scalar, mild)
                tl.store(scalar + 1, sharp)
                tl.store(scalar + 2, widest)
                for form in range(2):
                    total, _weighted, _drift = sums(
                        Z,
                        S,
                        T,
                        begin,
                        end,
                        f,
                        tl.where(form == 1, K, 0),
                        centre,
                        centre_top,
                        None,
                        0,
                        col,
                        KC,
                        POWERS,
                        R,
                        VEC,
                    )
                    store_part(at + tl.cast(form, tl.int64) * K * C, total, k, K, col, C)
            else:
                m = tl.load(forms(saved, N, K) + tl.cast(N, tl.int64) * tile + f)
                total, weighted, drift = sums(
                    Z, S, T, begin, end, f, m, centre, centre_top, upstream, up_stride, col, KC, POWERS, R,
                    VEC,
                )  # fmt: skip
                store_part(at, total, k, K, col, C)
                store_part(at + tl.cast(K, tl.int64) * C, weighted, k, K, col, C)
                tl.store(scalar, drift)


@triton.jit
def add_parts(
    parts, first_slot, last_slot, starts_inside, which, k, K, col, C, KC: tl.constexpr, BC: tl.constexpr
):
    """(KC, BC): the sums number `which` (KC,) of a cluster's parts, in their order."""
    total = tl.zeros([KC, BC], tl.float32)
    mask = (k < K)[:, None] & (col < C)[None, :]
    for slot in range(first_slot, last_slot + 1):
        part = tl.where((slot == first_slot) & starts_inside, 1, 0)
        at = ((tl.cast(slot, tl.int64) * 2 + part) * 2 + which) * K
        total += tl.load(parts + (at + k)[:, None] * C + col[None, :], mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["N", "C", "K", "row_units", "col_stride", "tiles"])
def large_whole_kernel(
    logits,
    table,
    saved,
    parts,
    scalars,
    large_masses,  # (slots, tiles, K) in the forward pass: sums of Q; None in the backward pass
    large_pulls,  # (slots, K, C) in the backward pass
    N,
    C,
    K,
    row_units,
    col_stride,
    tiles,
    floor,
    LARGE: tl.constexpr,
    VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    BC: tl.constexpr,
):
    slot, tile = chunk_and_tile(tiles)
    lo = slot * LARGE
    hi = tl.minimum(lo + LARGE, N)
    f, n = large_at(saved, N, hi - 1, LARGE)
    if (n > 0) & (f >= lo):
        col = tile * BC + tl.arange(0, BC)
        k = tl.arange(0, KC)
        last = (f + n - 1) // LARGE
        form = forms(saved, N, K) + tl.cast(N, tl.int64) * tile + f
        mild = 0.0
        sharp = 0.0
        widest = 0.0
        drift = 0.0
        for s in range(slot, last + 1):
            part = tl.where((s == slot) & (f > lo), 1, 0)
            at = scalars + ((tl.cast(s, tl.int64) * 2 + part) * tiles + tile) * SCALARS
            if large_pulls is None:
                mild += tl.load(at)
                sharp += tl.load(at + 1)
                widest = tl.maximum(widest, tl.load(at + 2))
            else:
                drift += tl.load(at)
        if large_pulls is None:
            Z, S = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
            centre, centre_top = load_centre(Z, S, f, col, VEC)
            low = tl.load(table).to(tl.float32)
            high = tl.load(table + K - 1).to(tl.float32)
            m = choose_form(
                n, mild, sharp, widest, centre, centre_top, table, K, low, high, floor, KC, POWERS
            )
            total = add_parts(parts, slot, last, f > lo, (k < m).to(tl.int32), k, K, col, C, KC, BC)
            L, q_mass = logs(total, n, S, f, m, KC, POWERS)
            tl.store(form, m)
            tl.store(large_masses + (tl.cast(slot, tl.int64) * tiles + tile) * K + k, q_mass, mask=k < K)
            store_part(large_logs(saved, N, K, tiles) + tl.cast(slot, tl.int64) * K * C, L, k, K, col, C)
        else:
            m = tl.load(form)
            total = add_parts(parts, slot, last, f > lo, 0 * k, k, K, col, C, KC, BC)
            weighted = add_parts(parts, slot, last, f > lo, 0 * k + 1, k, K, col, C, KC, BC)
            pull = pulls(total, weighted, drift, n, m, KC, POWERS)
            store_part(large_pulls + tl.cast(slot, tl.int64) * K * C, pull, k, K, col, C)
