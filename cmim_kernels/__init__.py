"""The CMIM training loss for the price of a plain cross entropy."""

from .centroids import CentroidBank
from .dispatch import available_backends
from .functional import class_centroids, cmi_spectrum, fused_cmi_loss
from .modules import CMIMLoss
from .spectrum import TemperatureSpectrum

__version__ = "0.1.0"

__all__ = [
    "CMIMLoss",
    "CentroidBank",
    "TemperatureSpectrum",
    "available_backends",
    "class_centroids",
    "cmi_spectrum",
    "fused_cmi_loss",
]
