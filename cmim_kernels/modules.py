"""`fused_cmi_loss` as a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .dispatch import check_backend
from .distributed import GroupHolder
from .functional import Reduction, fused_cmi_loss
from .spectrum import DEFAULT_SPECTRUM, Numbers, TemperatureSpectrum, as_spectrum
from .validate import check_before_logits, checked_options

_NARROW = (torch.float16, torch.bfloat16)


@runtime_checkable
class Centroids(Protocol):
    """What `CMIMLoss` asks of a source of centroids such as `CentroidBank`, once in every forward pass."""

    def centroids_for(self, logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
        """The (K, C, C) centroids, in the compute dtype and without gradient, to hold this batch against."""


class CMIMLoss(nn.Module):
    """The CMIM loss of arXiv 2507.00012 as a criterion: `CMIMLoss()(logits, target)`.

    Arguments, shapes, dtypes and errors are those of `fused_cmi_loss`; except:

    Args:
        weight: kept as a buffer, as `torch.nn.CrossEntropyLoss` does.
        centroids: a (K, C, C) tensor, kept as a buffer; or a `CentroidBank`, kept as a submodule; or any
            other object with the method of `Centroids`.

    Attributes:
        spectrum: the `TemperatureSpectrum` made of `temperatures` and `temperature_weights`.
        ce_weight, cmi_weight: plain floats, to be changed at any time, for instance raised over the first
            steps: `loss.cmi_weight = 1000 * min(1, step / 150)`. Inside a function compiled by
            `torch.compile` a new value compiles again; call the loss outside of it while the value changes.
            The kernels gain nothing from compilation.

    Raises:
        TypeError, ValueError: as `fused_cmi_loss`; what does not depend on a batch is checked here already.
    """

    weight: Tensor | None
    centroids: Tensor | Centroids | None

    def __init__(
        self,
        *,
        temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
        temperature_weights: Numbers | None = None,
        ce_weight: float = 1.0,
        cmi_weight: float = 1.0,
        centroids: Tensor | Centroids | None = None,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        options = checked_options(ce_weight, cmi_weight, label_smoothing, ignore_index, reduction)
        check_backend(backend)
        self.spectrum = as_spectrum(temperatures, temperature_weights)
        self.ce_weight, self.cmi_weight, self.label_smoothing, self.ignore_index, _ = options
        self.reduction: Reduction = reduction
        self._group = GroupHolder(process_group)
        self.backend = backend
        if weight is not None:
            check_before_logits("weight", weight, (None,))
        self.register_buffer("weight", weight)
        if centroids is None or isinstance(centroids, Tensor):
            if centroids is not None:
                check_before_logits("centroids", centroids, (len(self.spectrum), None, None))
            self.register_buffer("centroids", centroids)
        elif isinstance(centroids, Centroids) and not isinstance(centroids, type):
            ignored = getattr(centroids, "ignore_index", self.ignore_index)
            if ignored != self.ignore_index:
                raise ValueError(
                    f"centroids must ignore the rows that the loss does, of target {self.ignore_index}, "
                    f"got a bank with ignore_index {ignored}"
                )
            self.centroids = centroids
        else:
            kind = "a class" if isinstance(centroids, type) else type(centroids).__name__
            raise TypeError(f"centroids must be a tensor or a CentroidBank, got {kind}")

    process_group = GroupHolder.attribute()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CMIMLoss:
        # Centroids are of the dtype the loss is computed in: half() and the like leave them as they are.
        before = self.centroids
        super()._apply(fn, recurse)
        now = self.centroids
        if isinstance(before, Tensor) and isinstance(now, Tensor) and now.dtype in _NARROW:
            self.centroids = before.to(now.device)
        return self

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C) and target (N,), see `fused_cmi_loss`."""
        centroids = self.centroids
        if centroids is not None and not isinstance(centroids, Tensor):
            centroids = centroids.centroids_for(logits, target, self.spectrum.inverse_temperatures)
        return fused_cmi_loss(
            logits,
            target,
            temperatures=self.spectrum,
            ce_weight=self.ce_weight,
            cmi_weight=self.cmi_weight,
            centroids=centroids,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            process_group=self.process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options, as they stand."""
        names = ("ce_weight", "cmi_weight", "label_smoothing", "ignore_index", "reduction", "backend")
        return ", ".join([repr(self.spectrum), *(f"{name}={getattr(self, name)!r}" for name in names)])
