"""`CMIMetric`, the streaming figures as a torchmetrics metric; `cmim_kernels.metrics` exports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .clusters import ClusterSums, check_mergeable, summarise
from .spectrum import DEFAULT_SPECTRUM, Numbers, TemperatureSpectrum, as_spectrum
from .tensors import keeping_dtype
from .validate import checked_count, checked_ignore_index

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("CMIMetric needs torchmetrics: pip install 'cmim-kernels[metrics]'") from error

_ADDITIVE = ("logit_sum", "masked", "norm_sum")


class CMIMetric(Metric):
    """CMI, separation and NCMI over all batches of all processes, at every temperature.

    `update(logits (N, C), target (N,))`; `compute()` gives {"cmi", "separation", "ncmi"}, each (K,) float64
    in nats. The same figures and checks as `StreamingCMI`. The sums are float64 and stay so.

    Args:
        num_classes: C.
        temperatures: a `TemperatureSpectrum`, or positive numbers.
        ignore_index: rows with this target count nowhere.
        **kwargs: torchmetrics' own.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True

    def __init__(
        self,
        num_classes: int,
        temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = checked_count("num_classes", num_classes)
        self.ignore_index = checked_ignore_index(ignore_index)
        self.spectrum = as_spectrum(temperatures)
        empty = ClusterSums.empty(len(self.spectrum), self.num_classes, self.num_classes, "cpu")
        for name, zeros in vars(empty).items():
            # Means and scatters of several processes do not add up: they are stacked and merged in compute.
            self.add_state(name, zeros, dist_reduce_fx="sum" if name in _ADDITIVE else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        return super()._apply(keeping_dtype(fn), exclude_state)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Takes in one batch."""
        sums, classes = summarise(logits, target, self.num_classes, self.spectrum, self.ignore_index)
        state = self._sums()
        state.take_in(sums.to(state.counts.device), classes.to(state.counts.device))

    def compute(self) -> dict[str, Tensor]:
        """The figures of everything taken in so far."""
        figures = self._pooled().figures(self.spectrum)
        return {"cmi": figures.cmi, "separation": figures.separation, "ncmi": figures.ncmi}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Takes in what another instance has seen, of the same temperatures and number of classes.

        Raises:
            TypeError: `incoming_state` is something else; a state alone does not tell its temperatures.
            ValueError: the temperatures or numbers of classes differ.
            RuntimeError: this instance is synced.
        """
        if not isinstance(incoming_state, CMIMetric):
            raise TypeError(f"incoming_state must be a CMIMetric, got {type(incoming_state).__name__}")
        if self._is_synced:
            raise RuntimeError("cannot merge into a metric while it is synced with other processes")
        other = incoming_state
        check_mergeable(self.spectrum, self.num_classes, other.spectrum, other.num_classes)
        state = self._sums()
        state.take_in(other._pooled().to(state.counts.device), self._everything())
        self._computed = None  # what compute() has kept
        self._update_count += other._update_count

    def _pooled(self) -> ClusterSums:
        """What all processes have seen, where their states have been brought together; else this one's."""
        state = self._sums()
        if state.counts.dim() == 1:
            return state
        none, nothing = torch.zeros_like(state.logit_sum), torch.zeros_like(state.norm_sum)
        pooled = ClusterSums.empty(
            len(self.spectrum), self.num_classes, self.num_classes, state.counts.device
        )
        for counts, mean, scatter in zip(state.counts, state.mean, state.scatter, strict=True):
            pooled.take_in(ClusterSums(counts, mean, scatter, none, none, nothing), self._everything())
        pooled.logit_sum, pooled.masked, pooled.norm_sum = state.logit_sum, state.masked, state.norm_sum
        return pooled

    def _everything(self) -> Tensor:
        """Of all classes, their numbers."""
        return torch.arange(self.num_classes, device=self._sums().counts.device)

    def _sums(self) -> ClusterSums:
        # The tensors themselves, so that take_in changes the metric's states in place.
        return ClusterSums(**{name: getattr(self, name) for name in ClusterSums.__dataclass_fields__})
