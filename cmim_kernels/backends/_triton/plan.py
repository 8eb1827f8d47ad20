"""Sizes, layouts and temperatures of a call, from shapes and numbers alone; needs no Triton."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CLASSES = 2**21
MAX_ROWS = 2**30  # positions are int32
MAX_TEMPERATURES = 64

# `saved` is one float32 buffer. First these fields of N words each, by position: rows sorted by label, the
# ignored ones last. ROW to LABEL are int32; LABEL is -1 for an ignored row and -2 for a label out of range.
ROW, FIRST, COUNT, LABEL, TOP, ENTROPY, WEIGHT, PROBABILITY, INVERSE_SUM = range(9)
# Then, by position and temperature (N, K): 1/S, for given centroids log S (S = sum exp(a (z - max z))) and the
# row's mean under P of columns.py's t, for given centroids of log(P/Q). Then (2,) normalisers, the form of every
# tile (tiles, N) int32, and L of the large clusters (slots, K, C).
INVERSE, LOG_SUM, MEAN_RATIO = range(3)

# Up to so many rows a program finds a row's place by looking at all targets; beyond, they are sorted first,
# and clusters of more than LARGE_ROWS rows are shared out over several programs.
TYPICAL_ROWS = 4096
LARGE_ROWS = 1024
# Tiles are narrower where a problem would otherwise keep only a part of the device busy.
SMALL_PROBLEM = 2**21
WIDE, NARROW = 512, 256

WARPS = 4
# Left alone, NVIDIA's assembler spills a little where that lets one more program share a multiprocessor.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True} | ({} if torch.version.hip else {"maxnreg": 255})
# Values of a block that a thread holds, all temperatures together: what the registers take. Half of that where
# what a row has of its own by temperature is a lot, or a second table by temperature and column is held (for
# upstream gradients of every row); a quarter for float64 (given centroids).
THREAD_VALUES, MANY_TEMPERATURES = 32, 32
ROWS_OF_SUMS = 64  # rows to a block where there are eight numbers of each, and nothing else


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


_HOST = torch.device("cpu")


class Temperatures(NamedTuple):
    """K temperatures in ascending order of a, as the kernels take them.

    `lead` > 0: a_k = base * p_k with integers p_k, and exp(a_k x) is exp(lead * base * x), lead = min p,
    times powers of exp(base * x): those of the `bits` binary digits of p_k - lead. The digits are those of k
    itself if `masks` is 0, else digit b of every k is in bits 8b to 8b + 7. `lead` = 0: exponentials one by one.
    """

    a: tuple[float, ...]
    order: tuple[int, ...]  # the caller's index of a[k]
    padded: int  # K rounded up to a power of two
    base: float
    lead: int
    bits: int
    masks: int

    @property
    def powers(self) -> int:
        """lead, bits and masks in one number, a constant of the kernels."""
        return self.lead | self.bits << 8 | self.masks << 16


@lru_cache(maxsize=256)
def temperatures(a: tuple[float, ...]) -> Temperatures:
    order = tuple(sorted(range(len(a)), key=lambda k: a[k]))
    ascending = tuple(a[k] for k in order)
    base, lead, bits, masks = _powers(ascending)
    padded = next_power_of_two(len(a))
    return Temperatures(ascending, order, padded, base, lead, bits, masks)


def _powers(a: tuple[float, ...]) -> tuple[float, int, int, int]:
    """(base, lead, bits, masks) of `Temperatures`; lead 0 if the a_k have no common base."""
    for divisor in range(1, 33):
        p = [round(x * divisor / a[0]) for x in a]
        base = a[-1] / p[-1]
        # Equal to half a unit in the last place of the float32 that they become.
        if any(abs(q * base - x) > 2**-25 * x for q, x in zip(p, a, strict=True)):
            continue
        extra = [q - p[0] for q in p]
        bits = extra[-1].bit_length()
        if extra == list(range(len(a))) and p[-1] <= 64:
            return base, p[0], bits, 0
        if len(a) <= 8 and bits <= 5:
            masks = sum(((q >> b) & 1) << (8 * b + k) for k, q in enumerate(extra) for b in range(bits))
            return base, p[0], bits, masks
    return 1.0, 0, 0, 0


class Plan(NamedTuple):
    """How a call is cut up.

    A program takes `chunk` positions of the sorted rows and one tile of `columns` columns, and goes through
    its rows by blocks of `rows`. `sorted_first`: the targets are sorted before the first kernel.
    """

    rows: int
    columns: int
    tiles: int
    chunk: int
    chunks: int
    row_block: int  # blocks of the kernel that goes row by row
    row_columns: int
    sorted_first: bool
    large: int  # rows beyond which a cluster is shared out; 0: none is
    slots: int  # for large clusters: at most one starts in so many positions
    saved: int  # words


def make_plan(n: int, c: int, k: int, per_row: bool, given: bool) -> Plan:
    """The plan for logits (n, c), n > 0, and k temperatures.

    `per_row`: the loss of every row is the result. `given`: the centroids are; it does not change `saved`.
    """
    padded = next_power_of_two(k)
    threads = 32 * WARPS
    values = THREAD_VALUES // 2 if padded >= MANY_TEMPERATURES else THREAD_VALUES
    row_block = min(2048, values * threads // padded)
    width = max(16, next_power_of_two(c))
    sorted_first = n > TYPICAL_ROWS

    def columns_of(block: int) -> int:
        return min(width, block, NARROW if n * c <= SMALL_PROBLEM else WIDE)

    block = row_block // 2 if per_row else row_block  # rows x columns
    slots = -(-n // LARGE_ROWS) if sorted_first else 0
    saved = 9 * n + 3 * n * k + 2 + -(-c // columns_of(block)) * n + slots * k * c
    if given:
        block = row_block // 4
    columns = columns_of(block)
    rows = block // columns
    chunk = max(rows, 8 if sorted_first else 4)
    row_columns = min(width, row_block)
    if not sorted_first:  # every program looks at all targets: let it do that for several rows
        row_columns = min(row_columns, max(16, row_block // min(8, next_power_of_two(-(-n // 512)))))
    return Plan(
        rows=rows,
        columns=columns,
        tiles=-(-c // columns),
        chunk=chunk,
        chunks=-(-n // chunk),
        row_block=row_block // row_columns,
        row_columns=row_columns,
        sorted_first=sorted_first,
        large=LARGE_ROWS if sorted_first and not given else 0,
        slots=slots,
        saved=saved,
    )


def next_power_of_two(x: int) -> int:
    power = 1
    while power < x:
        power *= 2
    return power


def vector(strides: Sequence[int], dtype: torch.dtype) -> int:
    """Elements of 16 bytes, or the part of it that keeps every row aligned of logits (N, C) with such strides.

    0 if columns are apart.
    """
    width = 16 // dtype.itemsize
    if strides[1] != 1:
        return 0
    while strides[0] % width:
        width //= 2
    return width


# The tables of spectra (a, w) on a device, kept: making one is a copy from the host. Each stream has its own, since
# another's copy may not have run yet. Where so many others have been made since, no launch can be waiting any
# more to read the oldest. What a CUDA graph reads is kept for good.
MOST_TABLES = 4096
_Spectrum = tuple[tuple[float, ...], tuple[float, ...]]
_tables: dict[tuple[_Spectrum, torch.device, int], Tensor] = {}
_of_graphs: dict[tuple[_Spectrum, torch.device], Tensor] = {}


def table(a: tuple[float, ...], w: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, padded K) float64 on the device, the current one: a ascending, w and the caller's index of every temperature.

    No wait for the device: the copy is from pinned memory. One that a CUDA graph records is done when the graph
    runs, from memory that has to be there then, and to memory that nobody else may read.
    """
    spectrum = (a, w)
    stream, capturing = 0, False
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        capturing = torch.cuda.is_current_stream_capturing()
    made = _tables.get((spectrum, device, stream))
    if made is None and capturing:  # which begins when the device has done all that was asked of it
        made = next((other for key, other in tuple(_tables.items()) if key[:2] == (spectrum, device)), None)
    if made is not None:
        if capturing:
            _of_graphs[spectrum, device] = made
        return made
    if capturing:
        if (spectrum, _HOST) not in _of_graphs:
            _of_graphs[spectrum, _HOST] = _source(spectrum, device)
        return _of_graphs[spectrum, _HOST].to(device, non_blocking=True)
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def make() -> Tensor:
        if current is not None:  # for good: the thread ends, and going back would make a context on device 0
            torch.cuda.set_stream(current)
        return _source(spectrum, device).to(device, non_blocking=True)

    # It outlives the memory that this thread may have to take for a while, as what torch.compile runs before it
    # records a CUDA graph has to: another thread's allocations do not go there.
    with ThreadPoolExecutor(1) as other:
        made = other.submit(make).result()
    if len(_tables) >= MOST_TABLES:
        del _tables[next(iter(_tables))]
    _tables[spectrum, device, stream] = made
    return made


def _source(spectrum: _Spectrum, device: torch.device) -> Tensor:
    """What the table of a device is copied from."""
    a, w = spectrum
    t = temperatures(a)
    fill = (t.a, tuple(w[k] for k in t.order), t.order)
    source = torch.zeros(3, t.padded, dtype=torch.float64, device=_HOST, pin_memory=device.type == "cuda")
    source[:, : len(a)] = torch.tensor(fill, dtype=torch.float64, device=_HOST)
    source[0, len(a) :] = t.a[-1]
    return source
