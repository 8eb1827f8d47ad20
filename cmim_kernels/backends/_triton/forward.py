"""The second launch: the divergence of every row, and the loss.

A program takes the clusters that start in a chunk of positions, in one tile of columns, and leaves for every row
and temperature its tile's share of

    A = sum_j P log(P/Q)            the mean log-ratio, which the gradient needs
    G = sum_j P log(P/Q) - P + Q    the divergence; as P excess(log(P/Q)) in the centred form

The last program of a chunk to arrive adds the tiles up in their order, and the last of all chunks the chunks in
theirs: counting arrivals is the only atomic operation, and no sum depends on who comes last. The rounding of
log S moves log(P/Q) of a row by some eta, A by eta and G by eta^2/2: the divergence is G - (A - G)^2 / 2. Given
centroids need not sum to one; there the same is had from sum P = 1 + A - G - (1 - sum Q).
"""

import os

import triton
import triton.language as tl

from .blocks import (
    COUNT,
    ENTROPY,
    LABEL,
    MEAN_RATIO,
    ROW,
    WEIGHT,
    bundle,
    by_temperature,
    cluster_at,
    field,
    forms,
    int_field,
    large_logs,
    load_centre,
    load_large,
    load_rows,
    normalisers,
    owned_from,
    per_cluster,
    per_row,
)
from .columns import below_top, from_centre, is_centred, logs, spread, sums
from .elementary import excess, exponentials
from .given import NEAR, given_shares

# Triton's interpreter knows the sum of one block, and takes seconds for any other reduction.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))
NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
SPECTRUM = tl.constexpr(3)
TOTALS = tl.constexpr(3)  # of a chunk after its KC divergences: cross entropy, class weights, kept rows


@triton.jit
def _add(a, b, x, y):
    return a + x, b + y


@triton.jit
def row_sums(a, b):
    """The sums over columns of two blocks (KC, R, BC), with the barriers of one."""
    if INTERPRETED:
        return tl.sum(a, 2), tl.sum(b, 2)
    return tl.reduce((a, b), 2, _add)


@triton.jit
def fresh_logs(
    Z,
    S,
    T,
    table,
    begin,
    end,
    f,
    n,
    col,
    tile_forms,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """(form, L, sum of the tile's Q) of a cluster whose rows are begin to end; keeps the form."""
    centre, centre_top = load_centre(Z, S, f, col, VEC)
    low = tl.load(table).to(tl.float32)
    high = tl.load(table + S[4] - 1).to(tl.float32)
    mild, sharp, widest = spread(Z, S, begin, end, centre, centre_top, col, low, high, T[2], R, VEC)
    centred = is_centred(n, mild, sharp, widest, centre, centre_top, low, high, T[2])
    total, _weighted, _drift = sums(
        Z, S, T, begin, end, f, centred, centre, centre_top, None, 0, col, KC, POWERS, R, VEC
    )
    L, q_mass = logs(total, n, S, f, centred, KC)
    tl.store(tile_forms + f, centred.to(tl.int32))
    return centred, L, q_mass


@triton.jit
def shares(
    Z,
    S,
    T,
    begin,
    end,
    f,
    centred,
    L,
    q_mass,
    col,
    parts,  # (2, tiles, N, K) from this tile: shares of G, of A
    part_stride,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """Leaves G and A of rows begin to end in this tile of columns."""
    a, base, floor = T
    K = S[4]
    k = tl.arange(0, KC)[:, None]
    for start in range(begin, end, R):
        p, live, _row, top, z = load_rows(Z, S, start, end, col, R, VEC)
        x = below_top(z, top, floor)
        e = exponentials(x, a, base, KC, POWERS)
        if centred:
            shift = per_row(S[3], K, p, live, KC) - per_cluster(S[3], K, f, KC)[:, None]
            inverse = per_row(S[2], K, p, live, KC)
            centre, centre_top = load_centre(Z, S, f, col, VEC)  # again: registers are short here
            d = from_centre(z, top, live, centre, centre_top)
            # t twice, in two ways of rounding: one sum after the other takes half the registers
            s = L[:, None, :] - (a[:, None, None] * d[None, :, :] - shift[:, :, None])
            G = inverse * tl.sum(e * excess(s), 2)
            A = inverse * tl.sum(
                e * ((a[:, None, None] * d[None, :, :] - L[:, None, :]) - shift[:, :, None]), 2
            )
        else:
            A, mass = row_sums(e * (a[:, None, None] * x[None, :, :] - L[:, None, :]), e)
            inverse = per_row(S[2], K, p, live, KC)
            shift = per_row(S[3], K, p, live, KC) - per_cluster(S[3], K, f, KC)[:, None]
            A = inverse * (A - shift * mass)
            G = A - inverse * mass + q_mass[:, None]
        at = p.to(tl.int64)[None, :] * K + k
        mask = (k < K) & live[None, :]
        tl.store(parts + at, G, mask=mask)
        tl.store(parts + part_stride + at, A, mask=mask)


@triton.jit
def row_totals(parts, tiles, N, K, p, busy, KC: tl.constexpr):
    """Shares added up over the tiles in their order: (KC, R), in the type of parts (tiles, N, K)."""
    k = tl.arange(0, KC)[:, None]
    at = p.to(tl.int64)[None, :] * K + k
    mask = (k < K) & busy[None, :]
    total = tl.zeros(mask.shape, parts.dtype.element_ty)
    for _ in range(tiles):
        total += tl.load(parts + at, mask=mask, other=0.0, cache_modifier=".cg")
        parts += tl.cast(N, tl.int64) * K
    return total


@triton.jit
def finish_chunk(
    begin,
    end,
    table,
    saved,
    parts,
    masses,
    totals,  # (KC + TOTALS,) float64 of this chunk
    value,
    N,
    K,
    tiles,
    ce_weight,
    cmi_weight,
    REDUCTION: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_CMI: tl.constexpr,
    GIVEN: tl.constexpr,
    KC: tl.constexpr,
    R: tl.constexpr,
):
    """Rows begin to end, all of whose tiles are done: A for the gradient, the row's loss, the chunk's totals."""
    divergence = tl.zeros([KC], tl.float64)
    entropy = tl.zeros([R], tl.float64)
    weight = tl.zeros([R], tl.float64)
    kept = tl.zeros([R], tl.int32)
    w = tl.load(table + KC + tl.arange(0, KC))
    part_stride = tl.cast(N, tl.int64) * K * tiles
    for start in range(begin, end, R):
        p = start + tl.arange(0, R)
        live = p < end
        label = tl.load(int_field(saved, N, LABEL) + p, mask=live, other=-1)
        kept += (label >= 0).to(tl.int32)
        loss = tl.zeros([R], tl.float64)
        if HAS_CMI:
            count = tl.load(int_field(saved, N, COUNT) + p, mask=live, other=1)
            busy = (label >= 0) & ((count > 1) | GIVEN)
            G = row_totals(parts, tiles, N, K, p, busy, KC)
            A = row_totals(parts + part_stride, tiles, N, K, p, busy, KC)
            k = tl.arange(0, KC)[:, None]
            at = p.to(tl.int64)[None, :] * K + k
            tl.store(by_temperature(saved, N, K, MEAN_RATIO) + at, A, mask=(k < K) & live[None, :])
            G, gap = G.to(tl.float64), (A - G).to(tl.float64)
            if GIVEN:
                mass = row_totals(masses, tiles, N, K, p, busy, KC)
                mass = tl.where(busy[None, :] & (k < K), mass, 1.0)
                kl = (G + (mass - gap) * (mass - 1.0)) / mass - tl.log(mass)
                near = tl.max((busy[None, :] & (k < K) & (kl < NEAR)).to(tl.int32), 0)
                tl.store(forms(saved, N, K) + p, near, mask=live)
            else:
                kl = G - 0.5 * gap * gap
            kl = tl.where((label == -2)[None, :], float("nan"), kl)
            divergence += tl.sum(kl, 1)
            loss += cmi_weight * tl.sum(kl * w[:, None], 0)
        if HAS_CE:
            ce = tl.load(field(saved, N, ENTROPY) + p, mask=live, other=0.0).to(tl.float64)
            entropy += ce
            weight += tl.load(field(saved, N, WEIGHT) + p, mask=live, other=0.0).to(tl.float64)
            loss += ce_weight * ce
        if REDUCTION == NONE:
            row = tl.load(int_field(saved, N, ROW) + p, mask=live, other=0)
            tl.store(value + row, loss.to(tl.float32), mask=live)
    tl.store(totals + tl.arange(0, KC), divergence)
    tl.store(totals + KC, tl.sum(entropy, 0))
    tl.store(totals + KC + 1, tl.sum(weight, 0))
    tl.store(totals + KC + 2, tl.sum(kept, 0).to(tl.float64))


@triton.jit
def finish(
    table,
    saved,
    totals,  # (chunks, KC + TOTALS) float64
    chunks,
    value,
    N,
    K,
    tiles,
    ce_weight,
    cmi_weight,
    REDUCTION: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_CMI: tl.constexpr,
    KC: tl.constexpr,
    R: tl.constexpr,
):
    """The value of a reduced loss from the totals of all chunks, and the normalisers for the gradient."""
    width = KC + TOTALS
    k = tl.arange(0, KC)
    divergence = tl.zeros([KC, R], tl.float64)
    entropy = tl.zeros([R], tl.float64)
    weight = tl.zeros([R], tl.float64)
    kept = tl.zeros([R], tl.float64)
    for start in range(0, chunks, R):
        c = start + tl.arange(0, R)
        live = c < chunks
        at = totals + c.to(tl.int64) * width
        divergence += tl.load(at[None, :] + k[:, None], mask=live[None, :], other=0.0, cache_modifier=".cg")
        entropy += tl.load(at + KC, mask=live, other=0.0, cache_modifier=".cg")
        weight += tl.load(at + KC + 1, mask=live, other=0.0, cache_modifier=".cg")
        kept += tl.load(at + KC + 2, mask=live, other=0.0, cache_modifier=".cg")
    cmi = tl.sum(divergence, 1)
    ce = tl.sum(entropy, 0)
    rows = tl.sum(kept, 0)
    weights = tl.sum(weight, 0)
    norm = normalisers(saved, N, K)
    tl.store(norm, (1.0 / rows).to(tl.float32))
    tl.store(norm + 1, (1.0 / weights).to(tl.float32))
    if REDUCTION == SPECTRUM:
        order = tl.load(table + 2 * KC + k).to(tl.int32)
        tl.store(value + order, (cmi / rows).to(tl.float32), mask=k < K)
    else:
        loss = rows * 0.0
        if REDUCTION == MEAN:
            ce /= weights
            cmi /= rows
        if HAS_CE:
            loss += ce_weight * ce
        if HAS_CMI:
            loss += cmi_weight * tl.sum(cmi * tl.load(table + KC + k), 0)
        tl.store(value, loss.to(tl.float32))


@triton.jit(do_not_specialize=["N", "C", "K", "row_units", "col_stride", "tiles", "chunks"])
def forward_kernel(
    logits,  # (N, C)
    centroids,  # (K, C, C) or None
    table,  # (3, KC) float64: a, w, the caller's index
    saved,
    parts,  # (2, tiles, N, K): shares of G and A
    masses,  # (tiles, N, K) float64: shares of sum P; for given centroids only
    large_masses,  # (slots, tiles, K): sums of Q of large clusters
    totals,  # (chunks, KC + TOTALS) float64
    counters,  # (1 + chunks,) int32, zero
    value,
    N,
    C,
    K,
    row_units,
    col_stride,
    tiles,
    chunks,
    base,
    floor,
    ce_weight,
    cmi_weight,
    REDUCTION: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_CMI: tl.constexpr,
    GIVEN: tl.constexpr,
    LARGE: tl.constexpr,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    FR: tl.constexpr,  # rows to a block of the last sums
):
    chunk = tl.program_id(0)
    tile = tl.program_id(1)
    WHOLE: tl.constexpr = HAS_CMI and not GIVEN
    lo = chunk * CHUNK
    hi = tl.minimum(lo + CHUNK, N)
    end = hi
    part_stride = tl.cast(N, tl.int64) * K * tiles
    this_tile = tl.cast(N, tl.int64) * tile
    if HAS_CMI:
        Z, S = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
        col = tile * BC + tl.arange(0, BC)
        k = tl.arange(0, KC)
        T = (tl.load(table + k).to(tl.float32), base, floor)
        p = owned_from(saved, N, lo, WHOLE, LARGE)
        while p < hi:
            f, n, label, stop = cluster_at(saved, N, p, hi, WHOLE, LARGE)
            tile_parts = parts + this_tile * K
            tile_forms = forms(saved, N, K) + this_tile
            if GIVEN:
                if label >= 0:
                    given_shares(
                        Z, S, T, centroids, table, p, stop, f, label, col, tile_parts, part_stride,
                        masses + this_tile * K, KC, POWERS, R, VEC,
                    )  # fmt: skip
            elif n > 1:
                if LARGE > 0:
                    if n > LARGE:
                        centred = tl.load(tile_forms + f) != 0
                        slot = f // LARGE
                        L = load_large(large_logs(saved, N, K, tiles), slot, K, C, col, KC)
                        at = (tl.cast(slot, tl.int64) * tiles + tile) * K + k
                        q_mass = tl.load(large_masses + at, mask=k < K, other=0.0)
                    else:
                        centred, L, q_mass = fresh_logs(
                            Z, S, T, table, p, stop, f, n, col, tile_forms, KC, POWERS, R, VEC
                        )
                else:
                    centred, L, q_mass = fresh_logs(
                        Z, S, T, table, p, stop, f, n, col, tile_forms, KC, POWERS, R, VEC
                    )
                shares(
                    Z, S, T, p, stop, f, centred, L, q_mass, col, tile_parts, part_stride, KC, POWERS, R, VEC
                )  # fmt: skip
            p = stop
        end = p

    tl.debug_barrier()  # every thread's shares are written before this program counts as arrived
    arrived = tl.atomic_add(counters + 1 + chunk, 1, sem="acq_rel")
    if arrived == tiles - 1:
        finish_chunk(
            owned_from(saved, N, lo, WHOLE, LARGE), end, table, saved, parts, masses, totals + tl.cast(chunk, tl.int64) * (KC + TOTALS), value,
            N, K, tiles, ce_weight, cmi_weight, REDUCTION, HAS_CE, HAS_CMI, GIVEN, KC, FR,
        )  # fmt: skip
        if REDUCTION != NONE:
            tl.debug_barrier()
            if tl.atomic_add(counters, 1, sem="acq_rel") == chunks - 1:
                finish(
                    table, saved, totals, chunks, value, N, K, tiles, ce_weight, cmi_weight, REDUCTION, HAS_CE,
                    HAS_CMI, KC, FR,
                )  # fmt: skip
