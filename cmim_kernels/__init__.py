"""The CMIM training loss for the price of a plain cross entropy."""

from .spectrum import TemperatureSpectrum

__all__ = ["TemperatureSpectrum"]
