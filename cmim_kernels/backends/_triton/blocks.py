"""Where things lie in `saved` (see plan.py), and blocks of logits as the kernels read them.

Names used throughout: R rows and BC columns to a block, KC temperatures (K rounded up); p a position in the
rows sorted by label, f the first position of a cluster, n its rows; b its first row, which the forms of
columns.py take as the centre. Three bundles go from function to function:

    Z = (logits, row stride, column stride, C)
    S = (row, top, inverse, log_sum, K)      pointers into `saved`: int32 and float32 (N,), float32 (N, K) twice,
                                             the last of given centroids only
    T = (a, base, floor)      inverse temperatures (KC,) and what else `exponentials` and `below_top` take
"""

import triton
import triton.language as tl

from . import plan

ROW = tl.constexpr(plan.ROW)
FIRST = tl.constexpr(plan.FIRST)
COUNT = tl.constexpr(plan.COUNT)
LABEL = tl.constexpr(plan.LABEL)
TOP = tl.constexpr(plan.TOP)
ENTROPY = tl.constexpr(plan.ENTROPY)
WEIGHT = tl.constexpr(plan.WEIGHT)
PROBABILITY = tl.constexpr(plan.PROBABILITY)
INVERSE_SUM = tl.constexpr(plan.INVERSE_SUM)
FIELDS = tl.constexpr(plan.INVERSE_SUM + 1)
INVERSE = tl.constexpr(plan.INVERSE)
LOG_SUM = tl.constexpr(plan.LOG_SUM)
MEAN_RATIO = tl.constexpr(plan.MEAN_RATIO)


@triton.jit
def chunk_and_tile(tiles):
    """What a program takes. One dimension of the grid for both: there may be more than 65535 of either."""
    program = tl.program_id(0)
    return program // tiles, program % tiles


@triton.jit
def field(saved, N, WHICH: tl.constexpr):
    """(N,) float32 by position."""
    return saved + tl.cast(N, tl.int64) * WHICH


@triton.jit
def int_field(saved, N, WHICH: tl.constexpr):
    """(N,) int32 by position."""
    return (saved + tl.cast(N, tl.int64) * WHICH).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def by_temperature(saved, N, K, WHICH: tl.constexpr):
    """(N, K) float32 by position."""
    return saved + tl.cast(N, tl.int64) * (K * WHICH + FIELDS)


@triton.jit
def normalisers(saved, N, K):
    """(2,) float32: 1 / kept rows, 1 / sum of their class weights."""
    return saved + tl.cast(N, tl.int64) * (K * 3 + FIELDS)


@triton.jit
def forms(saved, N, K):
    """(tiles, N) int32: the form of a tile of the cluster that starts at a position (columns.py). For given
    centroids (N,): whether a row takes float64 (given.py)."""
    return (saved + tl.cast(N, tl.int64) * (K * 3 + FIELDS) + 2).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def large_logs(saved, N, K, tiles):
    """(slots, K, C) float32: L of the large clusters."""
    return saved + tl.cast(N, tl.int64) * (K * 3 + FIELDS + tiles) + 2


@triton.jit
def bundle(logits, row_units, col_stride, C, saved, N, K, VEC: tl.constexpr):
    """(Z, S). Unit column stride where VEC > 0: row_units is then the row stride in vectors of VEC elements."""
    if VEC > 0:
        Z = (logits, tl.cast(row_units, tl.int64) * VEC, 1, C)
    else:
        Z = (logits, tl.cast(row_units, tl.int64), tl.cast(col_stride, tl.int64), C)
    n = tl.cast(N, tl.int64)
    row = (saved + n * ROW).to(tl.pointer_type(tl.int32), bitcast=True)
    inverse = saved + n * FIELDS
    return Z, (row, saved + n * TOP, inverse, inverse + n * K, K)


@triton.jit
def load_block(Z, row, live, col, VEC: tl.constexpr):
    """Logits (R, BC) as float32 for row (R,) and col (BC,); -inf outside."""
    logits, row_stride, col_stride, C = Z
    at = logits + row.to(tl.int64)[:, None] * row_stride
    if VEC > 0:
        at += col[None, :]
    else:
        at += col.to(tl.int64)[None, :] * col_stride
    return tl.load(at, mask=live[:, None] & (col < C)[None, :], other=-float("inf")).to(tl.float32)


@triton.jit
def load_rows(Z, S, start, end, col, R: tl.constexpr, VEC: tl.constexpr):
    """(p, live, row, top, z) of positions start to end, R of them at most: (R,) each, z (R, BC)."""
    p = start + tl.arange(0, R)
    live = p < end
    row = tl.load(S[0] + p, mask=live, other=0)
    top = tl.load(S[1] + p, mask=live, other=0.0)
    return p, live, row, top, load_block(Z, row, live, col, VEC)


@triton.jit
def load_centre(Z, S, f, col, VEC: tl.constexpr):
    """(z_b (BC,), max z_b) of the cluster's first row; -inf outside."""
    logits, row_stride, col_stride, C = Z
    at = logits + tl.load(S[0] + f).to(tl.int64) * row_stride
    if VEC > 0:
        at += col
    else:
        at += col.to(tl.int64) * col_stride
    return tl.load(at, mask=col < C, other=-float("inf")).to(tl.float32), tl.load(S[1] + f)


@triton.jit
def per_row(values, K, p, live, KC: tl.constexpr):
    """(KC, R) of values (N, K) by position; 0 for absent temperatures and rows."""
    k = tl.arange(0, KC)[:, None]
    return tl.load(values + p.to(tl.int64)[None, :] * K + k, mask=(k < K) & live[None, :], other=0.0)


@triton.jit
def per_cluster(values, K, f, KC: tl.constexpr):
    """(KC,) of values (N, K) at the cluster's first row; 0 for absent temperatures."""
    k = tl.arange(0, KC)
    return tl.load(values + tl.cast(f, tl.int64) * K + k, mask=k < K, other=0.0)


@triton.jit
def load_large(at, slot, K, C, col, KC: tl.constexpr):
    """(KC, BC) of a large cluster, from values (slots, K, C)."""
    k = tl.arange(0, KC)
    at += (tl.cast(slot, tl.int64) * K + k)[:, None] * C + col[None, :]
    return tl.load(at, mask=(k < K)[:, None] & (col < C)[None, :], other=0.0)


@triton.jit
def owned_from(saved, N, lo, WHOLE: tl.constexpr, LARGE: tl.constexpr):
    """The first position that the program of the chunk from lo takes.

    A cluster belongs to the chunk where it starts, unless it is shared out: those of more than LARGE rows
    (LARGE > 0), and all of them where WHOLE is false.
    """
    begin = lo
    if WHOLE:
        f = tl.load(int_field(saved, N, FIRST) + lo)
        n = tl.load(int_field(saved, N, COUNT) + lo)
        begin = tl.where((f < lo) & ((LARGE == 0) | (n <= LARGE)), f + n, lo)
    return begin


@triton.jit
def cluster_at(saved, N, p, hi, WHOLE: tl.constexpr, LARGE: tl.constexpr):
    """(f, n, label, end): the cluster at p, and the end of its rows that belong to the same program as p."""
    row = int_field(saved, N, ROW) + p
    f = tl.load(row + tl.cast(N, tl.int64) * (FIRST - ROW))
    n = tl.load(row + tl.cast(N, tl.int64) * (COUNT - ROW))
    label = tl.load(row + tl.cast(N, tl.int64) * (LABEL - ROW))
    end = f + n
    if not WHOLE:
        end = tl.minimum(end, hi)
    elif LARGE > 0:
        end = tl.where(n > LARGE, tl.minimum(end, hi), end)
    return f, n, label, end
