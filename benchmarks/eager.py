"""The loss as one would write it without this library: what the fused kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cmim_kernels import TemperatureSpectrum


class EagerLoop:
    """One temperature after another, centroids by index_add: CE + cmi_weight * sum_k w_k CMI_k.

    float32 inside whatever the logits (N, C) are, as autocast would do.
    """

    def __init__(self, spectrum: TemperatureSpectrum, cmi_weight: float) -> None:
        self.inverse_temperatures = spectrum.inverse_temperatures
        self.weights = spectrum.weights
        self.cmi_weight = cmi_weight

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        z = logits.float()
        classes = z.shape[1]
        ones = torch.ones_like(target, dtype=z.dtype)
        counts = torch.zeros(classes, dtype=z.dtype, device=z.device).index_add(0, target, ones).clamp(min=1)
        cmi = z.new_zeros(())
        for a, weight in zip(self.inverse_temperatures, self.weights, strict=True):
            log_p = F.log_softmax(a * z, dim=1)  # (N, C)
            p = log_p.exp()
            centroids = torch.zeros(classes, classes, dtype=z.dtype, device=z.device).index_add(0, target, p)
            q = (centroids / counts[:, None])[target]  # (N, C)
            cmi = cmi + weight * (p * (log_p - q.clamp(min=1e-30).log())).sum(1).mean()
        return F.cross_entropy(z, target) + self.cmi_weight * cmi


class EagerVectorised(EagerLoop):
    """All temperatures at once, in (K, N, C) tensors."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        z = logits.float()
        a = z.new_tensor(self.inverse_temperatures)[:, None, None]
        classes, k = z.shape[1], len(a)
        ones = torch.ones_like(target, dtype=z.dtype)
        counts = torch.zeros(classes, dtype=z.dtype, device=z.device).index_add(0, target, ones).clamp(min=1)
        log_p = F.log_softmax(a * z, dim=2)  # (K, N, C)
        p = log_p.exp()
        centroids = torch.zeros(k, classes, classes, dtype=z.dtype, device=z.device).index_add(1, target, p)
        q = (centroids / counts[:, None])[:, target]  # (K, N, C)
        cmi = (p * (log_p - q.clamp(min=1e-30).log())).sum(2).mean(1)  # (K,)
        return F.cross_entropy(z, target) + self.cmi_weight * (z.new_tensor(self.weights) * cmi).sum()


class MovingAverageLoop(EagerLoop):
    """Research code: a Python loop over temperatures and classes, centroids kept as a moving average.

    With `momentum` 0 the centroids are the batch's own and the value and gradient those of the other two.
    """

    def __init__(self, spectrum: TemperatureSpectrum, cmi_weight: float, momentum: float) -> None:
        super().__init__(spectrum, cmi_weight)
        self.momentum = momentum
        self.centroids: dict[tuple[float, int], Tensor] = {}

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        z = logits.float()
        loss = F.cross_entropy(z, target)
        for a, weight in zip(self.inverse_temperatures, self.weights, strict=True):
            log_p = F.log_softmax(a * z, dim=1)  # (N, C)
            p = log_p.exp()
            for c in target.unique().tolist():
                rows = target == c
                mean = p[rows].detach().mean(0)  # (C,)
                q = self.momentum * self.centroids.get((a, c), mean) + (1 - self.momentum) * mean
                self.centroids[a, c] = q
                divergence = (p[rows] * (log_p[rows] - q.clamp(min=1e-30).log())).sum()
                loss = loss + self.cmi_weight * weight / len(target) * divergence
        return loss
