"""The second launch: the divergence of every row, and the loss.

A program takes the clusters that start in a chunk of positions, in one tile of columns, and leaves for every row
and temperature its tile's share of

    A = sum_j S P t                 t as in columns.py, in either form
    W = sum_j S P
    G = sum_j P log(P/Q) - P + Q    the divergence; as P excess(log(P/Q)) in the centred form

The last program of a chunk to arrive adds the tiles up in their order, and the last of all chunks the chunks in
theirs: counting arrivals is the only atomic operation, and no sum depends on who comes last.

A / W is the mean of t that the gradient subtracts, free of what 1/S has rounded. Where all tiles of a cluster are
plain at a temperature the divergence is A / W - lambda; G would add the rounding of sum P and sum Q, each near one.
Else it is G, and of it what the rounding of log S has done is taken back: it moves log(P/Q) of a row by some eta,
and with it A / W - lambda by eta and G by eta^2/2, so that half the square of what the two differ by comes off.

Given centroids need not sum to one: A = sum_j P log(P/Q) and W = sum_j P there (given.py), and the same is had
from sum P = 1 + A - G - (1 - sum Q).
"""

import triton
import triton.language as tl

from .blocks import (
    COUNT,
    ENTROPY,
    FIRST,
    LABEL,
    LOG_SUM,
    MEAN_RATIO,
    ROW,
    WEIGHT,
    bundle,
    by_temperature,
    chunk_and_tile,
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
from .columns import below_top, choose_form, exponents, logs, spread, sums
from .elementary import excess, exponentials
from .given import NEAR, given_shares
from .plan import interpreting

# Triton's interpreter knows the sum of one block, and takes seconds for any other reduction.
INTERPRETED = tl.constexpr(interpreting())
NONE = tl.constexpr(0)
MEAN = tl.constexpr(1)
SPECTRUM = tl.constexpr(3)
OVERFLOW = tl.constexpr(80.0)  # exp of it, times few, is finite
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
    """(form m, L, sum of the tile's Q) of a cluster whose rows are begin to end; keeps the form."""
    centre, centre_top = load_centre(Z, S, f, col, VEC)
    low = tl.load(table).to(tl.float32)
    high = tl.load(table + S[4] - 1).to(tl.float32)
    mild, sharp, widest = spread(Z, S, begin, end, centre, centre_top, col, low, high, T[2], R, VEC)
    m = choose_form(n, mild, sharp, widest, centre, centre_top, table, S[4], low, high, T[2], KC, POWERS)
    total, _weighted, _drift = sums(
        Z, S, T, begin, end, f, m, centre, centre_top, None, 0, col, KC, POWERS, R, VEC
    )
    L, q_mass = logs(total, n, S, f, m, KC, POWERS)
    tl.store(tile_forms + f, m)
    return m, L, q_mass


@triton.jit
def shares(
    Z,
    S,
    T,
    begin,
    end,
    f,
    m,
    L,
    q_mass,
    col,
    parts,  # (2, tiles, N, K) from this tile: shares of G, of A
    part_stride,
    masses,  # (tiles, N, K) from this tile: shares of W
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """Leaves the shares of rows begin to end in this tile of columns."""
    a, base, floor = T
    K = S[4]
    k = tl.arange(0, KC)[:, None]
    for start in range(begin, end, R):
        p, live, _row, top, z = load_rows(Z, S, start, end, col, R, VEC)
        x = below_top(z, top, floor)
        e = exponentials(x, a, base, KC, POWERS)
        at = p.to(tl.int64)[None, :] * K + k
        inside = (k < K) & live[None, :]
        if m > 0:
            shift = per_row(S[3], K, p, live, KC) - per_cluster(S[3], K, f, KC)[:, None]
            centre, centre_top = load_centre(Z, S, f, col, VEC)  # again: registers are short here
            # t twice, in two ways of rounding: one sum after the other takes half the registers
            s = L[:, None, :] - (
                exponents(x, z, top, live, centre, centre_top, a, m, KC, POWERS) - shift[:, :, None]
            )
            s = tl.where(s > OVERFLOW, OVERFLOW, s)  # of an entry that does not matter
            G = per_row(S[2], K, p, live, KC) * tl.sum(e * excess(s), 2)
            tl.store(parts + at, G, mask=inside & (k < m))
            A, W = row_sums(
                e * (exponents(x, z, top, live, centre, centre_top, a, m, KC, POWERS) - L[:, None, :]), e
            )
        else:
            A, W = row_sums(e * (a[:, None, None] * x[None, :, :] - L[:, None, :]), e)
        tl.store(parts + part_stride + at, A, mask=inside)
        tl.store(masses + at, W, mask=inside)
        if m < K:
            shift = per_row(S[3], K, p, live, KC) - per_cluster(S[3], K, f, KC)[:, None]
            G = per_row(S[2], K, p, live, KC) * ((A - shift * W) - W) + q_mass[:, None]
            tl.store(parts + at, G, mask=inside & (k >= m))


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
def wide_log(x):
    """log x of normal float32 x > 0 as float64, to 3e-8: the exponent's part is exact. 0 for 0."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    rest = tl.log(((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True))
    return tl.where(x > 0.0, (bits >> 23).to(tl.float64) * 0.6931471805599453 + rest, 0.0)


@triton.jit
def some_tile_centred(saved, tiles, N, K, first, busy):
    """(R,) at how many temperatures some tile of the cluster that starts at `first` is centred."""
    at = forms(saved, N, K) + first
    most = tl.zeros(first.shape, tl.int32)
    for _ in range(tiles):
        most = tl.maximum(most, tl.load(at, mask=busy, other=0, cache_modifier=".cg"))
        at += N
    return most


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
    """Rows begin to end, all of whose tiles are done: their means of t, losses, and the chunk's totals."""
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
            mass = row_totals(masses, tiles, N, K, p, busy, KC)
            k = tl.arange(0, KC)[:, None]
            at = p.to(tl.int64)[None, :] * K + k
            inside = (k < K) & busy[None, :]
            if GIVEN:
                gap = A.to(tl.float64) - G
                mass = tl.where(inside, mass, 1.0)
                kl = (G + (mass - gap) * (mass - 1.0)) / mass - tl.log(mass)
                kl = tl.where(tl.abs(G) < float("inf"), kl, G)
                near = tl.max((inside & (kl < NEAR)).to(tl.int32), 0)
                tl.store(forms(saved, N, K) + p, near, mask=live)
                mean = A
            else:
                first = tl.load(int_field(saved, N, FIRST) + p, mask=live, other=0)
                log_s = by_temperature(saved, N, K, LOG_SUM)
                log_b = tl.load(log_s + first.to(tl.int64)[None, :] * K + k, mask=inside, other=0.0).to(
                    tl.float64
                )
                shift = tl.load(log_s + at, mask=inside, other=0.0) - log_b
                mean = A.to(tl.float64) / tl.where(inside, mass, 1.0)
                gap = mean - shift - G
                plain = inside & (k >= some_tile_centred(saved, tiles, N, K, first, busy)[None, :])
                kl = tl.where(plain, mean + log_b - wide_log(mass), G - 0.5 * gap * gap)
                mean = mean.to(tl.float32)
            tl.store(by_temperature(saved, N, K, MEAN_RATIO) + at, mean, mask=(k < K) & live[None, :])
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
    masses,  # (tiles, N, K): shares of W; float64 for given centroids
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
    chunk, tile = chunk_and_tile(tiles)
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
                        m = tl.load(tile_forms + f)
                        slot = f // LARGE
                        L = load_large(large_logs(saved, N, K, tiles), slot, K, C, col, KC)
                        at = (tl.cast(slot, tl.int64) * tiles + tile) * K + k
                        q_mass = tl.load(large_masses + at, mask=k < K, other=0.0)
                    else:
                        m, L, q_mass = fresh_logs(
                            Z, S, T, table, p, stop, f, n, col, tile_forms, KC, POWERS, R, VEC
                        )
                else:
                    m, L, q_mass = fresh_logs(
                        Z, S, T, table, p, stop, f, n, col, tile_forms, KC, POWERS, R, VEC
                    )
                shares(
                    Z, S, T, p, stop, f, m, L, q_mass, col, tile_parts, part_stride,
                    masses + this_tile * K, KC, POWERS, R, VEC,
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
