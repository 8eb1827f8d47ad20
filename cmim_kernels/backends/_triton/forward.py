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
Else it is G, and of it what the rounding of S has done is taken back: it moves log(P/Q) of a row by some eta,
and with it A / W - lambda by eta and G by eta^2/2, so that half the square of what the two differ by comes off.

Given centroids need not sum to one: A = sum_j P log(P/Q) and W = sum_j P there (given.py), and the same is had
from sum P = 1 + A - G - (1 - sum Q).
"""

import triton
import triton.language as tl

from .blocks import (
    bundle,
    chunk_and_tile,
    cluster_at,
    forms,
    large_logs,
    load_centre,
    load_large,
    load_rows,
    owned_from,
    per_row,
)
from .columns import below_top, choose_form, exponents, log_ratio, logs, spread, sums
from .elementary import excess, exponentials
from .finish import NONE, TOTALS, finish, finish_chunk
from .given import given_shares
from .plan import interpreting

# Triton's interpreter knows the sum of one block, and takes seconds for any other reduction.
INTERPRETED = tl.constexpr(interpreting())
OVERFLOW = tl.constexpr(80.0)  # exp of it, times few, is finite


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
            shift = log_ratio(S, p, live, f, KC)
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
            shift = log_ratio(S, p, live, f, KC)
            G = per_row(S[2], K, p, live, KC) * ((A - shift * W) - W) + q_mass[:, None]
            tl.store(parts + at, G, mask=inside & (k >= m))


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
                    table, saved, totals, chunks, value, N, K, ce_weight, cmi_weight, REDUCTION, HAS_CE, HAS_CMI,
                    KC, FR,
                )  # fmt: skip
