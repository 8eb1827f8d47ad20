"""The centroids of a batch as a result: for banks that keep them, off the path of a training step's loss."""

import triton
import triton.language as tl

from .blocks import bundle, chunk_and_tile, cluster_at, load_centre, owned_from, per_cluster
from .columns import sums


@triton.jit(do_not_specialize=["N", "C", "K", "row_units", "col_stride", "tiles"])
def centroids_kernel(
    logits,  # (N, C)
    table,  # (3, KC) float64: a, w, the caller's index
    saved,
    centroids,  # (K, C, C), zero
    counts,  # (C,) int64, zero
    N,
    C,
    K,
    row_units,
    col_stride,
    tiles,
    base,
    floor,
    CHUNK: tl.constexpr,
    VEC: tl.constexpr,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    chunk, tile = chunk_and_tile(tiles)
    lo = chunk * CHUNK
    hi = tl.minimum(lo + CHUNK, N)
    Z, S = bundle(logits, row_units, col_stride, C, saved, N, K, VEC)
    col = tile * BC + tl.arange(0, BC)
    k = tl.arange(0, KC)
    T = (tl.load(table + k).to(tl.float32), base, floor)
    order = tl.load(table + 2 * KC + k).to(tl.int64)
    p = owned_from(saved, N, lo, True, 0)
    while p < hi:
        f, n, label, stop = cluster_at(saved, N, p, hi, True, 0)
        if label >= 0:
            centre, centre_top = load_centre(Z, S, f, col, VEC)
            total, _weighted, _drift = sums(
                Z, S, T, p, stop, f, 0, centre, centre_top, None, 0, col, KC, POWERS, R, VEC
            )  # fmt: skip
            at = (order * C + label) * C
            mask = (k < K)[:, None] & (col < C)[None, :]
            Q = total * (per_cluster(S[2], K, f, KC) / n)[:, None]
            tl.store(centroids + at[:, None] + col[None, :], Q, mask=mask)
            tl.store(counts + label, tl.cast(n, tl.int64), mask=tile == 0)
        p = stop
