"""The end of the second launch: shares of rows added up, divergences and losses from them, and the value.

The last program of a chunk to arrive adds its tiles up in their order, and the last of all chunks the chunks in
theirs. What the shares are, and why a divergence is put together as it is, is told in forward.py.
"""

import triton
import triton.language as tl

from ... import reference
from .blocks import (
    COUNT,
    ENTROPY,
    FIRST,
    INVERSE,
    LABEL,
    MEAN_RATIO,
    ROW,
    WEIGHT,
    by_temperature,
    field,
    forms,
    int_field,
    normalisers,
)
from .columns import sum_of
from .given import NEAR

NONE = tl.constexpr(reference.NONE)
MEAN = tl.constexpr(reference.MEAN)
SPECTRUM = tl.constexpr(reference.SPECTRUM)
TOTALS = tl.constexpr(3)  # of a chunk after its KC divergences: cross entropy, class weights, kept rows


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
                inverse = by_temperature(saved, N, K, INVERSE)
                at_b = first.to(tl.int64)[None, :] * K + k
                ratio = tl.load(inverse + at, mask=inside, other=0.0)
                ratio *= sum_of(tl.load(inverse + at_b, mask=inside, other=0.0))
                shift = -wide_log(ratio)  # rounded as in columns.py
                mean = A.to(tl.float64) / tl.where(inside, mass, 1.0)
                gap = mean - shift - G
                plain = inside & (k >= some_tile_centred(saved, tiles, N, K, first, busy)[None, :])
                kl = tl.where(plain, mean - shift, G - 0.5 * gap * gap)
                mean = mean.to(tl.float32)
            tl.store(by_temperature(saved, N, K, MEAN_RATIO) + at, mean, mask=(k < K) & live[None, :])
            kl = tl.where(kl < 0.0, 0.0, kl)  # by its rounding
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
