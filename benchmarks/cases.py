"""What is timed: shapes, spectra and inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmim_kernels import TemperatureSpectrum

CMI_WEIGHT = 10.0


@dataclass(frozen=True)
class Case:
    """A batch of N rows and C logits whose labels are drawn from `classes` of the classes.

    scale: standard deviation of the logits; spread: that of the rows of a cluster about their common centre,
    None for unrelated rows; label: what the label's logit has in addition.
    """

    n: int
    c: int
    classes: int
    k: int = 8
    grid: str = "uniform"  # uniform: integer multiples of one inverse temperature; general: of none
    dtype: torch.dtype = torch.float32
    scale: float = 2.0
    spread: float | None = None
    label: float = 4.0
    balanced: bool = False  # the same number of rows for each of the classes
    heavy: bool = False  # timed with --full only, except for the fused loss

    @property
    def name(self) -> str:
        parts = [f"{self.n}x{self.c}", f"{self.classes} classes"]
        if self.balanced:
            parts.append("one row each" if self.n == self.classes else "balanced")
        if self.k != 8:
            parts.append(f"K={self.k}")
        if self.grid != "uniform":
            parts.append(f"{self.grid} grid")
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        if self.spread is not None:
            parts.append(f"spread {self.spread:g}")
        if self.scale != 2:
            parts.append(f"logits of deviation {self.scale:g}")
        if self.label != 4:
            parts.append(f"label +{self.label:g}")
        return ", ".join(parts)

    @property
    def spectrum(self) -> TemperatureSpectrum:
        if self.grid == "general":
            return TemperatureSpectrum.gauss_legendre(1.0, self.k)
        return TemperatureSpectrum.uniform(1.0, self.k)

    @property
    def bytes_moved(self) -> int:
        """The least that a call can move: logits and labels read once, the gradient written once."""
        return self.n * (2 * self.c * self.dtype.itemsize + 8)

    def data(self, device: str) -> tuple[Tensor, Tensor]:
        """logits (N, C), a leaf that requires grad, and target (N,) int64."""
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(self.classes, (self.n,), generator=generator)
        if self.balanced:
            target = (torch.arange(self.n) % self.classes)[torch.randperm(self.n, generator=generator)]
        if self.spread is None:
            logits = self.scale * torch.randn(self.n, self.c, generator=generator)
        else:
            centres = self.scale * torch.randn(self.classes, self.c, generator=generator)
            logits = centres[target] + self.spread * torch.randn(self.n, self.c, generator=generator)
        logits[torch.arange(self.n), target] += self.label
        return logits.to(device, self.dtype).requires_grad_(), target.to(device)


MAIN = [
    Case(128, 100, 100),
    Case(256, 100, 20),
    Case(256, 1000, 32),
    Case(256, 1000, 1000),
    Case(1024, 1000, 128, heavy=True),
    Case(512, 10, 10),
    Case(4096, 1000, 1000, heavy=True),
]
HOST = [Case(8, 16, 4)]  # nothing but the path through Python and the dispatcher
VARIED = [
    Case(256, 1000, 32, grid="general"),
    Case(256, 1000, 32, k=16),
    Case(256, 1000, 32, dtype=torch.bfloat16),
    Case(256, 1000, 32, dtype=torch.float16),
    Case(256, 1000, 32, spread=1e-3),
    Case(256, 1000, 32, spread=1e-2),
    Case(256, 1000, 32, spread=1e-1),
    Case(256, 1000, 32, label=20.0),
    Case(256, 1000, 32, label=20.0, spread=0.3),
    Case(256, 1000, 32, grid="general", scale=0.5),
    Case(1024, 1000, 128, grid="general"),
    Case(1024, 1000, 128, spread=1e-3),
    Case(1000, 1000, 1000, balanced=True),
]
