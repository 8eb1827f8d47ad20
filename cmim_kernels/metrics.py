"""Concentration and separation of output clusters over a data set; `clusters.py` has the definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .clusters import ClusterSums, check_mergeable, divergence, summarise
from .clusters import ConcentrationSpectrum as ConcentrationSpectrum
from .spectrum import DEFAULT_SPECTRUM, Numbers, TemperatureSpectrum, as_spectrum
from .validate import checked_count, checked_ignore_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .torchmetric import CMIMetric as CMIMetric


class StreamingCMI:
    """CMI, separation and NCMI of a data set, batch by batch; definitions at the top of `clusters.py`.

    Equal to the two-pass definition on all rows at once, to the rounding of float64, however the rows are cut
    into batches, also where clusters have collapsed. Memory: 8 K C^2 bytes, 64 MB for C = 1000 and K = 8.

    Args:
        num_classes: C.
        temperatures: a `TemperatureSpectrum`, or positive numbers.
        ignore_index: rows with this target count nowhere.
        device: where the sums are kept.
    """

    def __init__(
        self,
        num_classes: int,
        temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
        *,
        ignore_index: int = -100,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spectrum = as_spectrum(temperatures)
        self.num_classes = checked_count("num_classes", num_classes)
        self.ignore_index = checked_ignore_index(ignore_index)
        self.device = torch.device(device)
        self._sums = ClusterSums.empty(len(self.spectrum), self.num_classes, self.num_classes, self.device)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Takes in a batch: logits (N, C) of any floating dtype, target (N,) int64.

        Raises:
            TypeError, ValueError: wrong shape or dtype, a label out of range, logits of NaN or +inf.
        """
        sums, classes = summarise(logits, target, self.num_classes, self.spectrum, self.ignore_index)
        self._sums.take_in(sums.to(self.device), classes.to(self.device))

    def merge(self, other: StreamingCMI) -> None:
        """Takes in what another instance has seen, of the same spectrum and number of classes.

        Raises:
            TypeError, ValueError: `other` is something else.
        """
        if not isinstance(other, StreamingCMI):
            raise TypeError(f"other must be a StreamingCMI, got {type(other).__name__}")
        check_mergeable(self.spectrum, self.num_classes, other.spectrum, other.num_classes)
        self._sums.take_in(other._sums.to(self.device), torch.arange(self.num_classes, device=self.device))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Pools what all ranks of a process group have seen; every rank then holds all of it.

        Once, at the end: a second time would count every row as often as there are ranks.
        """
        sums = self._sums
        own_counts, own_mean = sums.counts.clone(), sums.mean.clone()
        sums.mean *= own_counts.unsqueeze(1)
        for tensor in (sums.counts, sums.mean, sums.logit_sum, sums.masked, sums.norm_sum):
            dist.all_reduce(tensor, group=group)
        sums.mean /= sums.counts.clamp(min=1).unsqueeze(1)
        sums.scatter += own_counts * divergence(own_mean, sums.mean)
        dist.all_reduce(sums.scatter, group=group)

    def compute(self) -> ConcentrationSpectrum:
        """The figures of everything taken in so far."""
        return self._sums.figures(self.spectrum)


@torch.no_grad()
def evaluate_concentration(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
    ignore_index: int = -100,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> ConcentrationSpectrum:
    """The figures of a model, run in eval mode over batches of (inputs, target).

    Args:
        model: inputs -> logits (N, C); the mode of each of its modules is restored afterwards.
        loader: yields sequences that begin with inputs and target.
        temperatures: where to measure.
        ignore_index: rows with this target count nowhere.
        device: where inputs are moved; by default the model's own.
        group: pool the ranks' data; every rank has to call this with its own share, one batch at least.

    Raises:
        TypeError: the loader or the model yields something else.
        ValueError: the loader is empty; or as `StreamingCMI.update`.
    """
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    metric = None
    try:
        for batch in loader:
            if not isinstance(batch, Sequence) or len(batch) < 2:
                raise TypeError(f"loader must yield (inputs, target, ...), got {type(batch).__name__}")
            inputs, target = batch[:2]
            logits = model(inputs.to(device))
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise TypeError(f"model must return logits of shape (N, C), got {shape}")
            if metric is None:
                metric = StreamingCMI(
                    logits.shape[1], temperatures, ignore_index=ignore_index, device=logits.device
                )
            metric.update(logits, target.to(device))
    finally:
        # From the outside in, each by its own method, which may do more: take adapters apart again, say.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
    if metric is None:
        raise ValueError("loader must yield at least one batch")
    if group is not None:
        metric.all_reduce(group)
    return metric.compute()


def plot_concentration(
    spectra: Mapping[str, ConcentrationSpectrum],
    axes: Axes | None = None,
    *,
    quantity: str = "cmi",
    trained_on: TemperatureSpectrum | None = None,
) -> Axes:
    """Draws one line per named spectrum against inverse temperature, log-log; needs matplotlib.

    Args:
        spectra: label -> figures.
        axes: where to draw; new ones if None.
        quantity: `cmi`, `separation` or `ncmi`.
        trained_on: a grid whose range is shaded.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: `spectra` is no mapping of such figures, or empty; another quantity.
    """
    if not isinstance(spectra, Mapping):
        raise TypeError(f"spectra must map labels to a ConcentrationSpectrum, got {type(spectra).__name__}")
    for name, spectrum in spectra.items():
        if not isinstance(spectrum, ConcentrationSpectrum):
            raise TypeError(
                f"spectra[{name!r}] must be a ConcentrationSpectrum, got {type(spectrum).__name__}"
            )
    if not spectra:
        raise ValueError("spectra must hold at least one ConcentrationSpectrum, got none")
    if quantity not in ("cmi", "separation", "ncmi"):
        raise ValueError(f"quantity must be 'cmi', 'separation' or 'ncmi', got {quantity!r}")
    if axes is None:
        if find_spec("matplotlib") is None:
            raise ImportError("plot_concentration needs matplotlib: pip install matplotlib")
        from matplotlib import pyplot

        axes = pyplot.subplots(layout="constrained")[1]
    if trained_on is not None:
        grid = trained_on.inverse_temperatures
        axes.axvspan(min(grid), max(grid), color="0.9", label="trained on")
    for name, spectrum in spectra.items():
        axes.loglog(spectrum.inverse_temperatures, getattr(spectrum, quantity), label=name)
    axes.set_xlabel("inverse temperature 1/T")
    axes.set_ylabel(
        "NCMI" if quantity == "ncmi" else f"{'CMI' if quantity == 'cmi' else 'separation'} (nats)"
    )
    axes.grid(True, which="major", color="0.85", linewidth=0.6)
    axes.legend()
    return axes


def __getattr__(name: str) -> Any:
    # CMIMetric's base class is torchmetrics', which is optional.
    if name == "CMIMetric":
        from .torchmetric import CMIMetric

        return CMIMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
