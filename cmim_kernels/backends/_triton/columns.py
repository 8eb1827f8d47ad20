"""log Q of one cluster in one tile of columns, in one of two forms that share everything after it.

    plain     L = log Q + log S_b,     t = a x - L,     x = z - max z
    centred   L = log (Q / P_b),       t = a d - L,     d = (z - z_b) - (max z - max z_b)

with b the cluster's first row. In both, log(P/Q) = t - lambda, lambda = log S - log S_b. The plain L is the
logarithm of the mean of exp(a x) S_b/S, about as large as a x, and so rounded little. Where the rows almost agree, x
and log Q round away what d and L of the centred form keep: there L = log1p(mean w), w = P/P_b - 1 =
(1 + expm1(a d)) S_b/S - 1. A constant of the row in t, such as the rounding of S, harms neither the gradient, which
contains t - mean t, nor the divergence (forward.py), so that d may be shifted by the rows' maxima: a class that
carries all of the probability then has d = 0 exactly, and its tiny log-ratio is not drowned.

The plain form costs half as much. It is taken where the tile is wide: a^2 d^2 is not small on average, under P_b
at the lowest and at the highest a; and at those temperatures where a d is too large for the centred form in an
entry that matters, as for a class masked in some rows only. An entry that does not matter has its exp(a d) cut
off. Temperatures are sorted by a, so that the form of a tile is one number m: it is centred at the first m of them.
Both forms, 0 < m < K, are for general grids, whose hot temperatures may see a collapsed cluster where the cold
ones do not. Grids of powers span a factor of 64 at most: too little for that, so that m is 0 or K.
"""

import triton
import triton.language as tl

from .blocks import load_rows, per_cluster, per_row
from .elementary import LOG2E, exp_less, exponentials, growths, log1p

WIDE = tl.constexpr(0.02)  # mean a^2 d^2 from which the plain form is right: docs/performance_triton.md
FAR = tl.constexpr(30.0)  # |a d| up to which the centred form resolves an entry, of any temperature
BEYOND = tl.constexpr(1e13)  # about exp(FAR)
NEGLIGIBLE = tl.constexpr(1.5)  # P < exp(-1.5 FAR) in the row and in the centre: no matter what d is there
VANISHED = tl.constexpr(1.2e-38)  # the smallest normal number
NOTHING = tl.constexpr(
    -1e3
)  # L of such a Q: finite, so that the P that multiply it, which vanish too, give 0


@triton.jit
def below_top(z, top, floor):
    """x (R, BC) = z - max z, not below `floor`, where every exponential vanishes: a x stays finite."""
    x = z - top[:, None]
    return tl.where(x < floor, floor, x)


@triton.jit
def difference(x, y):
    """(x - y rounded, what the rounding lost), which add up to x - y exactly; nothing is lost of infinities."""
    out = x - y
    rounded_y = x - out
    lost = (x - (out + rounded_y)) + (rounded_y - y)
    return out, tl.where(tl.abs(out) < float("inf"), lost, 0.0)


@triton.jit
def from_centre(z, top, live, centre, centre_top):
    """d (R, BC); 0 where row and centre are both -inf, and in absent rows.

    The two differences are large numbers where rows are shifted against each other; what each rounds away is
    found and added, so that d is right to its own last place.
    """
    by_column, lost = difference(z, centre[None, :])
    by_row, lost_by_row = difference(top, centre_top)
    d = (by_column - by_row[:, None]) + (lost - lost_by_row[:, None])
    dead = (z == -float("inf")) & (centre == -float("inf"))[None, :]
    return tl.where(dead | ~live[:, None], 0.0, d)


@triton.jit
def spread(Z, S, begin, end, centre, centre_top, col, low, high, floor, R: tl.constexpr, VEC: tl.constexpr):
    """What decides the form, summed over rows begin to end: sum d^2 under P_b at a = low and high, and max |d| of
    the entries where P or P_b would matter if a |d| were FAR."""
    squares = tl.zeros(centre.shape, tl.float32)
    widest = tl.zeros(centre.shape, tl.float32)
    from_top = centre - centre_top
    for start in range(begin, end, R):
        _p, live, _row, top, z = load_rows(Z, S, start, end, col, R, VEC)
        d = from_centre(z, top, live, centre, centre_top)
        squares += tl.sum(d * d, 0)
        size = tl.abs(d)
        matters = tl.maximum(z - top[:, None], from_top[None, :]) > size * -NEGLIGIBLE
        widest = tl.maximum(widest, tl.max(tl.where(matters, size, 0.0), 0))
    x = tl.maximum(from_top, floor)
    mild = tl.exp2(low * LOG2E * x)
    sharp = tl.exp2(high * LOG2E * x)
    return tl.sum(mild * squares, 0), tl.sum(sharp * squares, 0), tl.max(widest, 0)


@triton.jit
def choose_form(
    n,
    mild,
    sharp,
    widest,
    centre,
    centre_top,
    table,
    K,
    low,
    high,
    floor,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
):
    """m of a tile with the sums of `spread` over all n rows of its cluster."""
    x = tl.maximum(centre - centre_top, floor)
    mild_mass = n * tl.sum(tl.exp2(low * LOG2E * x), 0)
    sharp_mass = n * tl.sum(tl.exp2(high * LOG2E * x), 0)
    wide = (low * low * mild >= mild_mass * WIDE) & (high * high * sharp >= sharp_mass * WIDE)
    if POWERS & 255 == 0:
        k = tl.arange(0, KC)
        near = (k < K) & (tl.load(table + k).to(tl.float32) * widest <= FAR)
        m = tl.sum(near.to(tl.int32), 0)
    else:
        m = tl.where(high * widest <= FAR, K, 0)
    return tl.where(wide, 0, m)


@triton.jit
def by_form(d, x, m, KC: tl.constexpr, POWERS: tl.constexpr):
    """d where centred, else x: (KC, R, BC); on a grid of powers d (1, R, BC), whatever it is."""
    out = d[None, :, :]
    if POWERS & 255 == 0:
        out = tl.where(tl.arange(0, KC)[:, None, None] < m, out, x[None, :, :])
    return out


@triton.jit
def exponents(x, z, top, live, centre, centre_top, a, m, KC: tl.constexpr, POWERS: tl.constexpr):
    """a d (KC, R, BC) where centred, which is at some temperature, else a x: t + L."""
    d = from_centre(z, top, live, centre, centre_top)
    return a[:, None, None] * by_form(d, x, m, KC, POWERS)


@triton.jit
def sum_of(inverse):
    """S from 1/S; 1 for absent rows and temperatures."""
    return tl.where(inverse == 0, 1.0, 1.0 / inverse)


@triton.jit
def sum_of_first(S, f, KC: tl.constexpr):
    """S_b (KC,)."""
    return sum_of(per_cluster(S[2], S[4], f, KC))


@triton.jit
def log_ratio(S, p, live, f, KC: tl.constexpr):
    """lambda (KC, R), of S_b / S as `sums` has it: what is rounded there cancels in the mean over the rows."""
    ratio = per_row(S[2], S[4], p, live, KC) * sum_of_first(S, f, KC)[:, None]
    return tl.where(ratio == 0, 0.0, -tl.log(ratio))


@triton.jit
def sums(
    Z,
    S,
    T,
    begin,
    end,
    f,
    m,
    centre,
    centre_top,
    upstream,  # (N,) gradient of every row's loss, or None
    up_stride,
    col,
    KC: tl.constexpr,
    POWERS: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """Sums over rows begin to end of S_b P, or of w where centred: (KC, BC), 0 for absent temperatures; with an
    upstream gradient g also the sums weighted with g - g_b, (KC, BC), and the sum of g - g_b, ()."""
    a, base, floor = T
    total = tl.zeros([KC, col.shape[0]], tl.float32)
    weighted = total
    drift = 0.0
    sum_b = sum_of_first(S, f, KC)
    if upstream is not None:
        drift = tl.zeros([R], tl.float32)
        up_b = tl.load(upstream + tl.load(S[0] + f).to(tl.int64) * up_stride)
    for start in range(begin, end, R):
        p, live, row, top, z = load_rows(Z, S, start, end, col, R, VEC)
        ratio = (
            per_row(S[2], S[4], p, live, KC) * sum_b[:, None]
        )  # S_b / S; 0 of absent rows and temperatures
        if m > 0:
            scale = tl.where(ratio == 0, 1.0, ratio)
            rest = scale - 1.0
            if POWERS & 255 == 0:
                centred = tl.arange(0, KC)[:, None] < m
                x = below_top(z, top, floor)
                y = exponents(x, z, top, live, centre, centre_top, a, m, KC, POWERS)
                grown = exp_less(y, centred[:, :, None].to(tl.float32))
                scale = tl.where(centred, scale, ratio)
                rest = tl.where(centred, rest, 0.0)
            else:
                grown = growths(from_centre(z, top, live, centre, centre_top), a, base, KC, POWERS)
            grown = tl.where(grown > BEYOND, BEYOND, grown)  # of a negligible entry
            terms = grown * scale[:, :, None] + rest[:, :, None]
        else:
            terms = exponentials(below_top(z, top, floor), a, base, KC, POWERS) * ratio[:, :, None]
        total += tl.sum(terms, 1)
        if upstream is not None:
            up = tl.load(upstream + row.to(tl.int64) * up_stride, mask=live, other=0.0) - up_b
            up = tl.where(live, up, 0.0)
            weighted += tl.sum(terms * up[None, :, None], 1)
            drift += up
    if upstream is not None:
        drift = tl.sum(drift, 0)
    return total, weighted, drift


@triton.jit
def logs(total, n, S, f, m, KC: tl.constexpr, POWERS: tl.constexpr):
    """(L (KC, BC), sum of the tile's Q (KC,), of the plain form only) from `sums` over all n rows of a cluster."""
    mean = total / n
    out = mean
    if m > 0:
        out = log1p(mean)
    if m < S[4]:
        plain = tl.where(mean < VANISHED, NOTHING, tl.log(mean))
        out = tl.where(tl.arange(0, KC)[:, None] < m, out, plain) if POWERS & 255 == 0 else plain
    return out, tl.sum(mean, 1) * per_cluster(S[2], S[4], f, KC)


@triton.jit
def pulls(total, weighted, drift, n, m, KC: tl.constexpr, POWERS: tl.constexpr):
    """What a column's centroid passes on of the upstream gradients g of n rows: sum g P / sum P, (KC, BC), up to a
    constant of the temperature, from `sums` over all of the rows. Relative to g's spread and to w where centred.

    That constant is g_b + drift / n, the mean of g: the same in both forms, since a row's mean is taken over tiles of
    either.
    """
    plain = tl.where(total < n * VANISHED, 0.0, weighted / total - drift / n)
    out = plain
    if m > 0:
        mean = total / n
        out = (weighted - drift * mean) / (n * (1.0 + mean))
        if POWERS & 255 == 0:
            out = tl.where(tl.arange(0, KC)[:, None] < m, out, plain)
    return out
