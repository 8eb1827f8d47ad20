"""The scalar functions that the CUDA kernels are made of, each to its stated error."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from cuda_calls import needs_x86
from cuda_emulated import EMULATOR, ROOT, compiler, run
from numpy.typing import NDArray

pytestmark = needs_x86  # the emulator's file is part of the library

Array = NDArray[np.floating]
DTYPES = {"f32": np.float32, "f64": np.float64}
both = pytest.mark.parametrize("suffix", DTYPES)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("arithmetic") / "libarithmetic.so"
    flags = ["-O2", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    sources = [str(EMULATOR / name) for name in ("arithmetic.cpp", "emulator.cpp")]
    run([compiler(), *flags, *sources, "-o", str(library)])
    return ctypes.CDLL(str(library))


def pointers(*arrays: NDArray) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(a.ctypes.data) for a in arrays]


def call(native: ctypes.CDLL, name: str, *inputs: NDArray, outputs: int = 1) -> list[Array]:
    outs = [np.empty_like(inputs[0]) for _ in range(outputs)]
    native[name](ctypes.c_size_t(len(inputs[0])), *pointers(*inputs, *outs))
    return outs


def exactly(function: str, x: Array) -> Array:
    """In 80 digits, of which psi cancels 30, rounded to float64."""
    mpmath.mp.dps = 80
    f = {
        "exp_nonpositive": mpmath.exp,
        "log_positive": mpmath.log,
        "psi": lambda t: (t - 1) * mpmath.exp(t) + 1,
        "expm1_of": mpmath.expm1,
    }[function]
    return np.array([float(f(mpmath.mpf(float(v)))) for v in x])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def ulps(out: Array, truth: Array) -> Array:
    """Errors in units of the last place of the truth, in out's precision."""
    return np.abs(out.astype(np.float64) - truth) / np.spacing(np.abs(truth).astype(out.dtype)).astype(
        np.float64
    )


def test_exp_nonpositive_in_float(native: ctypes.CDLL, rng: np.random.Generator) -> None:
    x = np.concatenate([-rng.random(1_000_000) * 87.3, -(10 ** -rng.uniform(0, 30, 100_000)), [0.0, -0.0]])
    x = x.astype(np.float32)
    (out,) = call(native, "exp_nonpositive_f32", x)
    assert ulps(out, np.exp(x.astype(np.float64))).max() <= 1
    (edges,) = call(
        native, "exp_nonpositive_f32", np.array([0, -88, -100, -1e30, -np.inf, np.nan], np.float32)
    )
    assert edges.tolist() == [1, 0, 0, 0, 0, 0]


def test_exp_nonpositive_never_decreases(native: ctypes.CDLL) -> None:
    """All floats of one binade, and across the seams of its reduction at odd multiples of ln(2)/2."""
    binade = -np.arange(0x3F800000, 0x3F800000 + (1 << 20), dtype=np.uint32).view(np.float32)
    seams = [np.float32(-(k + 0.5) * math.log(2)) for k in range(120)]
    near = np.sort([s + i * np.spacing(s) for s in seams for i in range(-40, 41)]).astype(np.float32)
    for x in (np.sort(binade), near):
        (out,) = call(native, "exp_nonpositive_f32", x)
        assert (ulps(out[:-1], out[1:].astype(np.float64))[np.diff(out) < 0] <= 1).all()


@pytest.mark.parametrize("low", [-126, -2, 0])
def test_log_positive_in_float(native: ctypes.CDLL, rng: np.random.Generator, low: int) -> None:
    x = (2.0 ** rng.uniform(low, abs(low) + 0.5, 500_000)).astype(np.float32)
    (out,) = call(native, "log_positive_f32", x)
    truth = np.log(x.astype(np.float64))
    size = np.maximum(np.abs(truth), 1).astype(np.float32)
    assert (np.abs(out - truth) / np.spacing(size)).max() <= 1
    assert call(native, "log_positive_f32", np.ones(1, np.float32))[0] == 0


def test_expm1(native: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Of small numbers and large ones, across the seams of its reduction, and of what is out of range."""
    sizes = 10 ** rng.uniform(-30, 0, 1500)
    seams = [np.float32((k + 0.5) * math.log(2)) for k in range(-8, 9)]
    near = [s + i * np.spacing(s) for s in seams for i in range(-20, 21)]
    x = np.concatenate([sizes, -sizes, rng.uniform(-20, 60, 2000), near]).astype(np.float32)
    (out,) = call(native, "expm1_of_f32", x)
    truth = exactly("expm1_of", x)
    assert (np.abs(out - truth) <= 2e-7 * np.abs(truth)).all()
    edges = np.array([0, -88, -1e30, -np.inf, np.nan], np.float32)
    assert call(native, "expm1_of_f32", edges)[0].tolist() == [0, -1, -1, -1, -1]
    assert np.isfinite(call(native, "expm1_of_f32", np.array([1e30, np.inf], np.float32))[0]).all()


def test_exp_coarse(native: ctypes.CDLL, rng: np.random.Generator) -> None:
    x = np.concatenate([-rng.random(100_000) * 87, -(10 ** -rng.uniform(0, 30, 10_000))]).astype(np.float32)
    (out,) = call(native, "exp_coarse_f32", x)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(out - exact) <= exact * (2.0**-21.5 + np.abs(x) * 2.0**-23)).all()
    assert call(native, "exp_coarse_f32", np.zeros(1, np.float32))[0] == 1


@both
def test_chosen(native: ctypes.CDLL, suffix: str) -> None:
    x = np.array([-2, 0, 3, np.nan], DTYPES[suffix])
    assert call(native, f"chosen_{suffix}", x)[0].tolist() == [-1, -1, 3, -1]  # x if positive, else -1


# Relative error, that of the argument's rounding for each unit of |t|, and the range
PSI = {"f32": (3e-6, 1e-7, 80.0), "f64": (1e-13, 2e-16, 600.0)}


@both
def test_psi(native: ctypes.CDLL, rng: np.random.Generator, suffix: str) -> None:
    """Also where its three terms cancel, on both sides of the seam, and never negative."""
    tolerance, slope, largest = PSI[suffix]
    sizes = 10 ** rng.uniform(-15, 0, 1500)
    x = np.concatenate([sizes, -sizes, rng.uniform(-1, 1, 1500), rng.uniform(-largest, largest, 500)])
    x = x.astype(DTYPES[suffix])
    (out,) = call(native, f"psi_{suffix}", x)
    truth = exactly("psi", x)
    assert (out >= 0).all()
    assert (np.abs(out - truth) <= truth * (tolerance + slope * np.abs(x.astype(np.float64)))).all()
    dense = np.linspace(-2, 2, 200_001).astype(DTYPES[suffix])
    assert (call(native, f"psi_{suffix}", dense)[0] >= 0).all()
    assert call(native, f"psi_{suffix}", np.zeros(1, x.dtype))[0] == 0


def test_functions_in_double(native: ctypes.CDLL, rng: np.random.Generator) -> None:
    for name, x in (
        ("exp_nonpositive", -rng.random(2000) * 700),
        ("log_positive", 10 ** rng.uniform(-300, 300, 2000)),
    ):
        (out,) = call(native, f"{name}_f64", x)
        assert ulps(out, exactly(name, x)).max() <= 1


@both
def test_differences_are_exact(native: ctypes.CDLL, rng: np.random.Generator, suffix: str) -> None:
    sizes = 10 ** rng.uniform(-6, 6, (2, 3000))
    x, y = (sizes * rng.choice([-1, 1], sizes.shape)).astype(DTYPES[suffix])
    x[:1000] = y[:1000] * (1 + x[:1000] * 1e-12)
    high, low = call(native, f"differences_{suffix}", x, y, outputs=2)
    for a, b, h, r in zip(x, y, high, low, strict=True):
        assert Fraction(float(a)) - Fraction(float(b)) == Fraction(float(h)) + Fraction(float(r))


@both
def test_offsets_are_relative(native: ctypes.CDLL, rng: np.random.Generator, suffix: str) -> None:
    """(z - z0) - (zj - zj0) keeps its digits where logits of 30 differ by their last bits."""
    dtype = DTYPES[suffix]
    z0, zj0 = (30 * rng.standard_normal((2, 3000))).astype(dtype)
    width = 10 ** rng.uniform(-8, 1, (2, 3000))
    z, zj = (z0 + width[0]).astype(dtype), (zj0 + width[1]).astype(dtype)
    (out,) = call(native, f"offsets_{suffix}", z, z0, zj, zj0)
    for i in range(3000):
        terms = [Fraction(float(v[i])) for v in (z, z0, zj, zj0)]
        truth = (terms[0] - terms[1]) - (terms[2] - terms[3])
        assert abs(Fraction(float(out[i])) - truth) <= 2 * Fraction(float(np.finfo(dtype).eps)) * abs(truth)


@both
def test_offsets_of_masked_classes(native: ctypes.CDLL, suffix: str) -> None:
    z, z0 = np.array([[-np.inf, -np.inf, 1.0], [-np.inf, 1.0, -np.inf]], DTYPES[suffix])
    (out,) = call(native, f"offsets_{suffix}", z, z0, np.ones_like(z), np.zeros_like(z))
    assert out[0] == 0  # in both: it plays no part
    assert out[1] == -1e30  # here only
    assert out[2] == 1e30  # in the class's first row only: the centred form is not taken
    z, z0 = np.array([[-3e38, 1.0], [1.0, 1.0]], DTYPES[suffix])
    (out,) = call(native, f"offsets_{suffix}", z, z0, np.ones_like(z), np.zeros_like(z))
    assert out[0] == -1e30  # masked by a number: no further away
    (out,) = call(native, f"offsets_{suffix}", z0, z0, np.full_like(z, -np.inf), np.zeros_like(z))
    assert (out == np.inf).all()  # the row masks what its offsets are relative to: not taken either


@both
def test_careful_sums(native: ctypes.CDLL, rng: np.random.Generator, suffix: str) -> None:
    """As if summed in twice the precision: 20000 numbers, most of which cancel."""
    dtype = DTYPES[suffix]
    summed = native[f"sum_{suffix}"]
    summed.restype = ctypes.c_float if suffix == "f32" else ctypes.c_double
    x = (10 ** rng.uniform(-4, 4, 20_000) * rng.choice([-1, 1], 20_000)).astype(dtype)
    x = np.concatenate([x, -x[:19_000]])
    truth = math.fsum(x.astype(np.float64))
    eps = float(np.finfo(dtype).eps)
    error = abs(summed(ctypes.c_size_t(len(x)), *pointers(x)) - truth)
    assert error <= eps * abs(truth) + len(x) * eps**2 * float(np.abs(x.astype(np.float64)).sum())
    for special in (np.inf, -np.inf, np.nan):
        values = np.array([1, special, 2], dtype)
        assert np.array_equal(summed(ctypes.c_size_t(3), *pointers(values)), special, equal_nan=True)


@both
def test_small_functions(native: ctypes.CDLL, suffix: str) -> None:
    dtype = DTYPES[suffix]
    x = np.array([np.nan, 2, 0.5, -np.inf, np.inf], dtype)
    assert call(native, f"larger_than_one_{suffix}", x)[0].tolist() == [1, 2, 1, 1, np.inf]
    v = np.arange(1, 1000, dtype=dtype)
    (out,) = call(native, f"third_{suffix}", v)
    assert (out == v * (dtype(1) / dtype(3)) - v / dtype(3)).all()  # the product rounded by itself


def test_bfloat16(native: ctypes.CDLL, rng: np.random.Generator) -> None:
    """To nearest, ties to even; infinities, NaN, what overflows, denormal numbers: as PyTorch rounds."""
    bits = rng.integers(0, 2**32, 500_000, dtype=np.uint32)
    ties = (np.arange(65536, dtype=np.uint32) << 16) | 0x8000
    x = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    x = x[~np.isnan(x)]
    out = np.empty(len(x), np.uint16)
    native["to_bf16"](ctypes.c_size_t(len(x)), *pointers(x, out))
    expected = torch.from_numpy(x).bfloat16()
    assert torch.equal(torch.from_numpy(out.view(np.int16)), expected.view(torch.int16))
    back = np.empty(len(x), np.float32)
    native["from_bf16"](ctypes.c_size_t(len(x)), *pointers(out, back))
    assert np.array_equal(back, expected.float().numpy())
    nothing, rounded = np.array([np.nan], np.float32), np.empty(1, np.uint16)
    native["to_bf16"](ctypes.c_size_t(1), *pointers(nothing, rounded))
    assert torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16).isnan().all()


def test_every_function_is_here() -> None:
    """A function that is added wants a test; the standard library's under another name do not."""
    text = (Path(ROOT) / "csrc/common/arithmetic.h").read_text()
    names = {line.split("(")[0].split()[-1] for line in text.splitlines() if line.startswith("CMIM_HD")}
    tested = {"exp_nonpositive", "log_positive", "psi", "difference", "offset", "larger", "product"}
    tested |= {"expm1_of", "exp_coarse", "chosen", "shift_between"}
    wrapped = {"log1p_of", "log_of", "exp_of"}
    assert names == tested | wrapped | {"infinity", "not_a_number", "lowest", "bit_cast"}
