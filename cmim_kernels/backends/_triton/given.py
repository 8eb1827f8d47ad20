"""Centroids that are given and held fixed: rows are apart from each other, Q is read.

The plain form of columns.py with L = log Q + log S_b. Where P has come close to Q the float32 logarithms round
log(P/Q) away; such rows take it from float64, and everything after it as the centred form does. That is slow on
devices with little float64, but right, and only where P has collapsed onto Q.
"""

import triton
import triton.language as tl

from .blocks import load_rows, per_cluster, per_row
from .columns import below_top
from .elementary import excess, exponentials

NEAR = tl.constexpr(3e-3)  # divergence per unit of P below which float32 does not resolve it


@triton.jit
def given_q(centroids, table, label, K, C, col, KC: tl.constexpr):
    """Q (KC, BC) of a class, from centroids (K, C, C) in the caller's order of temperatures; 0 outside the classes,
    1 for absent temperatures, whose terms have the factor 0 and must be finite."""
    k = tl.arange(0, KC)
    at = (tl.load(table + 2 * KC + k).to(tl.int64) * C + label) * C
    mask = (k < K)[:, None] & (col < C)[None, :]
    q = tl.load(centroids + at[:, None] + col[None, :], mask=mask, other=0.0)
    return tl.where((k < K)[:, None], q, 1.0)


@triton.jit
def precise_log(q):
    """log q of float32 q >= 0 as float64, to 1e-13: exponent and 2 atanh of the rest, with few registers."""
    tiny = q < 1e-30
    scaled = tl.where(tiny, q * 2.0**64, q)
    bits = scaled.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    exponent = (bits >> 23).to(tl.float64) - tl.where(tiny, 64.0, 0.0).to(tl.float64)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    series = tl.full(q.shape, 1 / 19, tl.float64)
    for odd in tl.static_range(17, 1, -2):
        series = series * s2 + (1.0 / odd)
    out = exponent * 0.6931471805599453 + 2.0 * s * (series * s2 + 1.0)
    return tl.where(q == 0.0, -float("inf"), out)


@triton.jit
def precise_ratios(z, top, log_s, q, table, KC: tl.constexpr):
    """log(P/Q) (KC, R, BC) as float32, from float64: a row's constant apart, right to 1e-12."""
    a = tl.load(table + tl.arange(0, KC))[:, None, None]
    x = (z.to(tl.float64) - top.to(tl.float64)[:, None])[None, :, :]
    return (a * x - log_s.to(tl.float64)[:, :, None] - precise_log(q)[:, None, :]).to(tl.float32)


@triton.jit
def given_shares(
    Z,
    S,
    T,
    centroids,
    table,
    begin,
    end,
    f,
    label,
    col,
    parts,  # (2, tiles, N, K) from this tile: shares of G, of A
    part_stride,
    masses,  # (tiles, N, K) float64 from this tile: shares of W
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """Leaves the shares of rows begin to end, all of class `label`, in this tile of columns."""
    a, base, floor = T
    K = S[4]
    q = given_q(centroids, table, label, K, Z[3], col, KC)
    log_b = per_cluster(S[3], K, f, KC)
    L = tl.log(q) + log_b[:, None]
    q_mass = tl.sum(q.to(tl.float64), 1)
    k = tl.arange(0, KC)[:, None]
    for start in range(begin, end, R):
        p, live, _row, top, z = load_rows(Z, S, start, end, col, R, VEC)
        x = below_top(z, top, floor)
        e = exponentials(x, a, base, KC, POWERS)
        t = a[:, None, None] * x[None, :, :] - L[:, None, :]
        inverse = per_row(S[2], K, p, live, KC)
        log_s = per_row(S[3], K, p, live, KC)
        some = e > 0
        p_mass = inverse * tl.sum(e, 2)
        A = inverse * tl.sum(tl.where(some, e * t, 0.0), 2) - (log_s - log_b[:, None]) * p_mass
        G = A - p_mass + q_mass.to(tl.float32)[:, None]
        mask = (k < K) & live[None, :]
        near = tl.max(tl.max((mask & (p_mass * NEAR > G)).to(tl.int32), 1), 0)
        if near > 0:
            r = precise_ratios(z, top, log_s, q, table, KC)
            P = e * inverse[:, :, None]
            A = tl.sum(tl.where(some, P * r, 0.0), 2)
            G = tl.sum(tl.where(some, P * excess(-r), q[:, None, :]), 2)
        at = p.to(tl.int64)[None, :] * K + k
        tl.store(parts + at, G, mask=mask)
        tl.store(parts + part_stride + at, A, mask=mask)
        tl.store(masses + at, (A - G).to(tl.float64) + q_mass[:, None], mask=mask)
