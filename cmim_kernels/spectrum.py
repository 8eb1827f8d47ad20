"""The temperatures at which the clusters are looked at, with the weight that each one has in the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .validate import as_float, checked_count

Numbers = Sequence[float] | Tensor


class TemperatureSpectrum:
    """Temperatures T_k and quadrature weights w_k of `sum_k w_k CMI_k`; immutable, prepared once, reused by
    every call.

    Args:
        temperatures: K numbers in [1e-6, 1e6], or a 1-D CPU tensor of them.
        weights: K finite non-negative numbers, or a 1-D CPU tensor of them; 1/K each if not given, so that
            the sum is a mean over the temperatures.

    Attributes:
        inverse_temperatures: the a_k = 1 / T_k that multiply the logits, a tuple of K floats.
        weights: the w_k, a tuple of K floats.

    Raises:
        TypeError: an argument is not made of real numbers.
        ValueError: an argument is empty, not 1-D, of the wrong length, or has a number out of range.

    Grids whose a_k are consecutive multiples of one number (`uniform`) cost one exponential per logit for the
    whole spectrum, and those of some of its multiples (temperatures 1, 2, 4, 8) little more; other grids cost
    one per logit and temperature.
    """

    __slots__ = ("inverse_temperatures", "weights")
    inverse_temperatures: tuple[float, ...]
    weights: tuple[float, ...]

    def __init__(self, temperatures: Numbers, weights: Numbers | None = None) -> None:
        values = floats("temperatures", temperatures)
        _check_range("temperatures", values)
        self._set(tuple(1 / t for t in values), weights)

    @classmethod
    def from_inverse(
        cls, inverse_temperatures: Numbers, weights: Numbers | None = None
    ) -> TemperatureSpectrum:
        """The spectrum with exactly these a_k = 1 / T_k, K numbers in [1e-6, 1e6]; `weights` as above."""
        values = floats("inverse_temperatures", inverse_temperatures)
        _check_range("inverse_temperatures", values)
        self = cls.__new__(cls)
        self._set(values, weights)
        return self

    @classmethod
    def uniform(cls, max_inverse_temperature: float, n: int) -> TemperatureSpectrum:
        """a_k = k beta / n, weights beta / n: the right-endpoint rule for CMI's integral over a in (0, beta].

        `max_inverse_temperature` is beta. `uniform(1.0, 8)` is the default of the loss: its last node is the
        softmax that the cross entropy uses, and every P^k is a power of one exponential.
        """
        beta, n = _beta_and_n(max_inverse_temperature, n)
        return cls.from_inverse([beta * k / n for k in range(1, n + 1)], [beta / n] * n)

    @classmethod
    def gauss_legendre(cls, max_inverse_temperature: float, n: int) -> TemperatureSpectrum:
        """The n-point Gauss-Legendre rule for the integral of CMI over inverse temperatures in (0, beta).

        Exact for polynomials of degree 2n - 1 in a: far fewer nodes than `uniform` for the same integral, at
        one exponential per node. Nodes and weights by Newton's method on P_n, in double precision.
        """
        beta, n = _beta_and_n(max_inverse_temperature, n)
        nodes, weights = zip(*(_legendre_node(i, n) for i in range(n)), strict=True)
        return cls.from_inverse([beta * (1 + x) / 2 for x in nodes], [beta * w / 2 for w in weights])

    @classmethod
    def geometric(cls, t_min: float, t_max: float, n: int) -> TemperatureSpectrum:
        """n temperatures from `t_min` to `t_max` in equal ratios, weights 1/n."""
        for name, value in (("t_min", t_min), ("t_max", t_max)):
            _positive_finite(name, value)
            _check_range(name, [value])
        if t_min > t_max:
            raise ValueError(f"t_min must not exceed t_max, got t_min={t_min!r} and t_max={t_max!r}")
        n = checked_count("n", n)
        if n == 1:
            if t_min != t_max:
                raise ValueError(f"n=1 needs t_min equal to t_max, got t_min={t_min!r} and t_max={t_max!r}")
            return cls([t_min])
        ratio = (math.log(t_max) - math.log(t_min)) / (n - 1)
        return cls([t_min * math.exp(ratio * i) for i in range(n - 1)] + [t_max])

    @property
    def temperatures(self) -> tuple[float, ...]:
        """T_k = 1 / a_k, a tuple of K floats."""
        return tuple(1 / a for a in self.inverse_temperatures)

    def with_weights(self, weights: Numbers) -> TemperatureSpectrum:
        """The same temperatures with other weights (K finite non-negative numbers)."""
        return type(self).from_inverse(self.inverse_temperatures, weights)

    def __len__(self) -> int:
        return len(self.inverse_temperatures)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TemperatureSpectrum):
            return NotImplemented
        return (self.inverse_temperatures, self.weights) == (other.inverse_temperatures, other.weights)

    def __hash__(self) -> int:
        return hash((self.inverse_temperatures, self.weights))

    def __repr__(self) -> str:
        a, w = ([float(f"{v:.6g}") for v in values] for values in (self.inverse_temperatures, self.weights))
        return f"TemperatureSpectrum(inverse_temperatures={a}, weights={w})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"TemperatureSpectrum is immutable: cannot set {name!r}; make another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"TemperatureSpectrum is immutable: cannot delete {name!r}")

    # For pickle and copy, without a function to call: torch.load(weights_only=True) takes the class alone as
    # a safe global.
    def __getstate__(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.inverse_temperatures, self.weights

    def __setstate__(self, state: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
        self._set(*state)

    def _set(self, inverse_temperatures: tuple[float, ...], weights: Numbers | None) -> None:
        k = len(inverse_temperatures)
        values = (1 / k,) * k if weights is None else floats("temperature_weights", weights)
        if len(values) != k:
            raise ValueError(
                f"temperature_weights must have one number per temperature, {k}, got {len(values)}"
            )
        if not all(0 <= w < math.inf for w in values):
            raise ValueError(f"temperature_weights must be finite and non-negative, got {list(values)}")
        object.__setattr__(self, "inverse_temperatures", inverse_temperatures)
        object.__setattr__(self, "weights", values)


def as_spectrum(
    temperatures: TemperatureSpectrum | Numbers, weights: Numbers | None = None
) -> TemperatureSpectrum:
    """What a caller gives as temperatures, with these weights if there are any."""
    if not isinstance(temperatures, TemperatureSpectrum):
        return TemperatureSpectrum(temperatures, weights)
    return temperatures if weights is None else temperatures.with_weights(weights)


def floats(name: str, values: Numbers) -> tuple[float, ...]:
    """`values` as a non-empty tuple of Python floats, of any range; errors call it `name`."""
    if isinstance(values, Tensor):
        values = _tensor_to_list(name, values)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers or a 1-D tensor, got {type(values).__name__}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must hold real numbers only, got {type(value).__name__} {value!r}")
    if not values:
        raise ValueError(f"{name} must not be empty")
    return tuple(as_float(value) for value in values)


def _tensor_to_list(name: str, values: Tensor) -> list[float]:
    if values.requires_grad:
        raise ValueError(
            f"{name} must not require grad: the loss has no gradient in it; pass {name}.detach()"
        )
    if values.device.type != "cpu":
        raise ValueError(
            f"{name} must be numbers or a CPU tensor, got a tensor on {values.device}: reading it would make "
            "the host wait for the device in every call; make a TemperatureSpectrum once instead"
        )
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must hold real numbers, got a tensor of {values.dtype}")
    if values.dim() != 1:
        raise ValueError(f"{name} must be 1-D, got a tensor of shape {tuple(values.shape)}")
    result: list[float] = values.tolist()
    return result


def _beta_and_n(beta: float, n: int) -> tuple[float, int]:
    _positive_finite("max_inverse_temperature", beta)
    return float(beta), checked_count("n", n)


def _positive_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < as_float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _legendre_node(i: int, n: int) -> tuple[float, float]:
    """The i-th node (ascending) and weight of the n-point Gauss-Legendre rule on [-1, 1]."""
    # Tricomi's estimate, from which Newton's method converges to the i-th root.
    x = -math.cos(math.pi * (i + 0.75) / (n + 0.5))
    for _ in range(100):
        p, slope = _legendre(x, n)
        step = p / slope
        x -= step
        if abs(step) < 1e-15:
            break
    slope = _legendre(x, n)[1]
    return x, 2 / ((1 - x * x) * slope * slope)


def _legendre(x: float, n: int) -> tuple[float, float]:
    """P_n(x) and its derivative, by the three-term recurrence; |x| < 1."""
    before, p = 1.0, x
    for m in range(2, n + 1):
        before, p = p, ((2 * m - 1) * x * p - (m - 1) * before) / m
    return p, n * (x * p - before) / (x * x - 1)


def _check_range(name: str, values: Sequence[float]) -> None:
    """Far beyond what is of use, and within what is accurate: see docs/numerics.md."""
    if not all(1e-6 <= value <= 1e6 for value in values):  # false for NaN
        raise ValueError(f"{name} must lie in [1e-6, 1e6], got {list(values)}")


DEFAULT_SPECTRUM = TemperatureSpectrum.uniform(1.0, 8)
