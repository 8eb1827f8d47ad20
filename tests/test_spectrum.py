"""TemperatureSpectrum: grids, quadrature, and what cannot be one."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

from cmim_kernels import TemperatureSpectrum


def test_default_grid() -> None:
    spectrum = TemperatureSpectrum.uniform(1.0, 8)
    assert spectrum.inverse_temperatures == tuple(k / 8 for k in range(1, 9))
    assert spectrum.weights == (1 / 8,) * 8
    assert len(spectrum) == 8
    assert spectrum.temperatures[0] == 8.0
    assert spectrum.temperatures[-1] == 1.0


def test_uniform_is_the_right_endpoint_rule() -> None:
    spectrum = TemperatureSpectrum.uniform(3.0, 300)
    integral = sum(w * a**2 for a, w in zip(spectrum.inverse_temperatures, spectrum.weights, strict=True))
    assert integral == pytest.approx(9.0, rel=0.01)
    assert sum(spectrum.weights) == pytest.approx(3.0)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 31])
def test_gauss_legendre_is_exact_for_polynomials(n: int) -> None:
    beta = 2.5
    spectrum = TemperatureSpectrum.gauss_legendre(beta, n)
    assert list(spectrum.inverse_temperatures) == sorted(spectrum.inverse_temperatures)
    assert all(0 < a < beta for a in spectrum.inverse_temperatures)
    for degree in range(2 * n):
        integral = math.fsum(
            w * a**degree for a, w in zip(spectrum.inverse_temperatures, spectrum.weights, strict=True)
        )
        assert integral == pytest.approx(beta ** (degree + 1) / (degree + 1), rel=1e-12)


def test_geometric() -> None:
    spectrum = TemperatureSpectrum.geometric(0.5, 8.0, 5)
    assert spectrum.temperatures == pytest.approx((0.5, 1.0, 2.0, 4.0, 8.0))
    assert spectrum.weights == (0.2,) * 5
    assert TemperatureSpectrum.geometric(2.0, 2.0, 1).temperatures == (2.0,)


@pytest.mark.parametrize("values", [[1.0, 2], (1.0, 2.0), torch.tensor([1.0, 2.0]), torch.tensor([1, 2])])
def test_what_temperatures_may_be(values: object) -> None:
    spectrum = TemperatureSpectrum(values, weights=[0.25, 0.5])  # type: ignore[arg-type]
    assert spectrum.inverse_temperatures == (1.0, 0.5)
    assert spectrum.weights == (0.25, 0.5)


def test_numpy_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert TemperatureSpectrum(list(numpy.float32([1.0, 4.0]))).inverse_temperatures == (1.0, 0.25)


def test_from_inverse_keeps_the_numbers() -> None:
    a = (0.1, 1 / 3, 0.7)
    assert TemperatureSpectrum.from_inverse(a).inverse_temperatures == a


def test_value_semantics() -> None:
    one, same = TemperatureSpectrum.uniform(1.0, 8), TemperatureSpectrum.uniform(1.0, 8)
    other = one.with_weights([1.0] * 8)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "spectrum"
    assert other.weights == (1.0,) * 8
    for again in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert again == one
    with torch.serialization.safe_globals([TemperatureSpectrum]):
        file = io.BytesIO()
        torch.save(one, file)
        file.seek(0)
        assert torch.load(file, weights_only=True) == one
    with pytest.raises(AttributeError, match="immutable"):
        del one.weights  # type: ignore[misc]
    assert repr(one).startswith("TemperatureSpectrum(inverse_temperatures=[0.125, 0.25,")
    with pytest.raises(AttributeError, match="immutable"):
        one.weights = (1.0,)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TemperatureSpectrum([]), ValueError, "temperatures must not be empty"),
        (
            lambda: TemperatureSpectrum.uniform(10**400, 8),
            ValueError,
            "max_inverse_temperature must be positive",
        ),
        (lambda: TemperatureSpectrum([0.0]), ValueError, "temperatures must lie in"),
        (lambda: TemperatureSpectrum([1.0], [1.0, 2.0]), ValueError, "temperature_weights"),
        (lambda: TemperatureSpectrum([1.0], [-1.0]), ValueError, "temperature_weights"),
        (lambda: TemperatureSpectrum([1.0], ["1"]), TypeError, "temperature_weights"),
        (lambda: TemperatureSpectrum.from_inverse([math.inf]), ValueError, "inverse_temperatures"),
        (lambda: TemperatureSpectrum.uniform(0.0, 8), ValueError, "max_inverse_temperature"),
        (lambda: TemperatureSpectrum.uniform("1", 8), TypeError, "max_inverse_temperature"),  # type: ignore[arg-type]
        (lambda: TemperatureSpectrum.uniform(1.0, 0), ValueError, "n must be at least 1"),
        (lambda: TemperatureSpectrum.uniform(1.0, 8.0), TypeError, "n must be an int"),  # type: ignore[arg-type]
        (lambda: TemperatureSpectrum.gauss_legendre(math.nan, 3), ValueError, "max_inverse_temperature"),
        (lambda: TemperatureSpectrum.geometric(2.0, 1.0, 3), ValueError, "t_min must not exceed"),
        (lambda: TemperatureSpectrum.geometric(0.0, 1.0, 3), ValueError, "t_min"),
        (lambda: TemperatureSpectrum.geometric(1.0, 2.0, 1), ValueError, "n=1"),
    ],
)
def test_what_cannot_be_a_spectrum(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]
