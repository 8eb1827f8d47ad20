"""Functions of a block, free of inline assembly and of the device's mathematical library but for log.

`exp2` is one instruction on the device, which errs by up to two units in the last place (CUDA C++ Programming
Guide, exp2f) and flushes subnormal results to zero. The rest are polynomials; their errors stand beside them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500e-8)  # what is lost of it in float32
MAGIC = tl.constexpr(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits of the mantissa


@triton.jit
def precise_exponential(x, a):
    """exp(a x) of x <= 0 for a number a, to 1.1e-7 of it, neither the product nor a log2(e) rounded; 0 below the
    smallest normal number.

    For exponentials that are raised to powers: 2 units in the last place, eight times over, would be too much
    for the divergences, and so would what a rounded factor does to every column alike.
    """
    factor = a * LOG2E
    rest = tl.fma(a, LOG2E, -factor) + a * LOG2E_REST
    y = x * factor
    shifted = y + MAGIC
    n = shifted - MAGIC
    f = tl.fma(x, rest, tl.fma(x, factor, -n))
    # (2^f - 1) / f fitted on |f| <= 1/2, so that 2^f is right to 2e-9
    p = f * 1.53533621e-4 + 1.33988750e-3
    p = p * f + 9.61843692e-3
    p = p * f + 5.55033237e-2
    p = p * f + 2.40226477e-1
    p = p * f + 6.93147182e-1
    p = p * f + 1.0
    scale = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return tl.where(y < -126.0, 0.0, p * scale.to(tl.float32, bitcast=True))


@triton.jit
def exponentials(x, a, base, KC: tl.constexpr, POWERS: tl.constexpr):
    """exp(a_k x) for x <= 0 (R, BC) and a (KC,): (KC, R, BC). POWERS: see `plan.Temperatures`.

    Powers of one exponential where the a_k allow it. A power multiplies the relative error of what it is made
    of, so that the exponential is exact to the last place, and every second digit takes one of its own: no
    factor is worse than a square.
    """
    LEAD: tl.constexpr = POWERS & 255
    BITS: tl.constexpr = (POWERS >> 8) & 255
    MASKS: tl.constexpr = POWERS >> 16
    if LEAD == 0:
        out = tl.exp2((a * LOG2E)[:, None, None] * x[None, :, :])
    else:
        k = tl.arange(0, KC)[:, None, None]  # a constant of every register, and so are the choices below
        out = precise_exponential(x, LEAD * base)[None, :, :]
        out = tl.broadcast_to(out, [KC, x.shape[0], x.shape[1]])
        step = precise_exponential(x, base)[None, :, :]
        for bit in tl.static_range(BITS):
            if bit > 0 and bit % 2 == 0:
                step = precise_exponential(x, (1 << bit) * base)[None, :, :]
            elif bit > 0:
                step = step * step
            if MASKS == 0:
                chosen = (k >> bit) & 1
            else:
                chosen = (((MASKS >> (8 * bit)) & 255) >> k) & 1
            out = tl.where(chosen != 0, out * step, out)
    return out


@triton.jit
def growths(d, a, base, KC: tl.constexpr, POWERS: tl.constexpr):
    """expm1(a_k d) for d (R, BC) and a (KC,): (KC, R, BC), to relative accuracy.

    As `exponentials`, by expm1(x + y) = expm1(x) + expm1(y) + expm1(x) expm1(y).
    """
    LEAD: tl.constexpr = POWERS & 255
    BITS: tl.constexpr = (POWERS >> 8) & 255
    MASKS: tl.constexpr = POWERS >> 16
    if LEAD == 0:
        out = expm1(a[:, None, None] * d[None, :, :])
    else:
        k = tl.arange(0, KC)[:, None, None]
        step = expm1(base * d)[None, :, :]
        if LEAD == 1:
            first = step
        else:
            first = expm1((LEAD * base) * d)[None, :, :]
        out = tl.broadcast_to(first, [KC, d.shape[0], d.shape[1]])
        for bit in tl.static_range(BITS):
            if bit > 0:
                step = step * (2.0 + step)
            if MASKS == 0:
                chosen = (k >> bit) & 1
            else:
                chosen = (((MASKS >> (8 * bit)) & 255) >> k) & 1
            out = tl.where(chosen != 0, out + step + out * step, out)
    return out


@triton.jit
def expm1(x):
    """Relative error 6e-7 + |x| 6e-8, by the device's exponential; 1e-7 for |x| < 1/2."""
    return exp_less(x, 1.0)


@triton.jit
def exp_less(x, one):
    """e^x - one, which is 1 or 0: Taylor's polynomial for |x| < 1/2 where it is 1."""
    near = (tl.abs(x) < 0.5) & (one > 0.0)
    t = tl.where(near, x, 0.0)
    p = t * (1 / 40320) + (1 / 5040)
    p = p * t + (1 / 720)
    p = p * t + (1 / 120)
    p = p * t + (1 / 24)
    p = p * t + (1 / 6)
    p = p * t + 0.5
    return tl.where(near, p * (t * t) + t, tl.exp2(x * LOG2E) - one)


@triton.jit
def log1p(x):
    """Relative error 4e-7: 2 atanh(x / (2 + x)) for |x| < 1/4."""
    near = tl.abs(x) < 0.25
    t = tl.where(near, x, 0.0)
    s = t / (2.0 + t)
    s2 = s * s
    p = s2 * (1 / 9) + (1 / 7)
    p = p * s2 + (1 / 5)
    p = p * s2 + (1 / 3)
    return tl.where(near, 2 * s * s2 * p + 2 * s, tl.log(1.0 + x))


@triton.jit
def excess(s):
    """e^s - 1 - s, which is never negative: with s = log(Q/P), P times it is P log(P/Q) - P + Q.

    Relative error 3e-6 + |s| 6e-8: the sum's own polynomial s^2 (1/2 + s/6 + ...) for |s| < 0.4, where it would cancel.
    """
    near = tl.abs(s) < 0.4
    t = tl.where(near, s, 0.0)
    p = t * (1 / 40320) + (1 / 5040)
    p = p * t + (1 / 720)
    p = p * t + (1 / 120)
    p = p * t + (1 / 24)
    p = p * t + (1 / 6)
    p = p * t + 0.5
    return tl.where(near, p * (t * t), tl.exp2(s * LOG2E) - 1.0 - s)
