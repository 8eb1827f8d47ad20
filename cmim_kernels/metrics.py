"""Concentration and separation of output clusters over a data set, at every temperature, in one pass.

With P_i the softmax of row i at a temperature, y_i its label, Q_c the mean of P over class c (n_c of M rows):

    CMI   = 1/M sum_i KL(P_i || Q_{y_i})                         concentration within classes
    Gamma = 1/M^2 sum_{i, j: y_i != y_j} H(P_i, P_j)             separation between classes
    NCMI  = CMI / Gamma                                          H(p, q) = - sum_m p_m log q_m

all in nats (arXiv 2309.09123). CMI is not accumulated as sum P log P - sum Q log Q, whose two sides agree to
all digits where clusters have collapsed. What is kept is each class's scatter around its own mean, W_c =
sum_i KL(P_i || Q_c), and two parts a, b of a class merge by adding numbers that are never negative (the
compensation identity of the KL divergence):

    W = W_a + W_b + n_a KL(Q_a || Q) + n_b KL(Q_b || Q)          Q = (n_a Q_a + n_b Q_b) / (n_a + n_b)

Gamma needs no more than the sums over each class of P and of log P = a z - logsumexp(a z).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .spectrum import DEFAULT_SPECTRUM, Numbers, TemperatureSpectrum, as_spectrum
from .validate import checked_count, checked_ignore_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .torchmetric import CMIMetric as CMIMetric


@dataclass(frozen=True)
class ConcentrationSpectrum:
    """What a data set's clusters look like, in nats, float64 on the CPU; NaN where no row was kept.

    Attributes:
        inverse_temperatures: (K,).
        cmi: (K,).
        separation: (K,), Gamma: 0 with one class only; infinite where a class is masked (logit -inf) in some
            row and possible in a row with another label.
        class_cmi: (K, C), the mean divergence within each class; NaN for a class without rows.
        counts: (C,) int64, the rows of each class.
    """

    inverse_temperatures: Tensor
    cmi: Tensor
    separation: Tensor
    class_cmi: Tensor
    counts: Tensor

    @property
    def ncmi(self) -> Tensor:
        """CMI / Gamma, (K,)."""
        return self.cmi / self.separation


@dataclass
class ClusterSums:
    """Sufficient statistics of L classes, float64 but for the counts."""

    counts: Tensor  # (L,) int64
    mean: Tensor  # (K, L, C): Q_c, 0 for classes without rows
    scatter: Tensor  # (K, L): W_c
    logit_sum: Tensor  # (L, C): sum of z, each row shifted to maximum 0, an entry of -inf taken as 0
    masked: Tensor  # (L, C): number of rows with a logit of -inf
    norm_sum: Tensor  # (K, L): sum of logsumexp(a z) of the shifted rows

    @staticmethod
    def empty(K: int, L: int, C: int, device: torch.device | str) -> ClusterSums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        counts = torch.zeros(L, dtype=torch.int64, device=device)
        return ClusterSums(counts, zeros(K, L, C), zeros(K, L), zeros(L, C), zeros(L, C), zeros(K, L))

    def take_in(self, other: ClusterSums, classes: Tensor) -> None:
        """Adds the rows summed up in `other`, whose class l is class `classes[l]` here; in place."""
        counts, mean = self.counts[classes], self.mean[:, classes]
        total = counts + other.counts
        share = (other.counts.double() / total.clamp(min=1)).unsqueeze(1)  # (L, 1)
        pooled = torch.where(share < 1, mean + share * (other.mean - mean), other.mean)
        between = counts * divergence(mean, pooled) + other.counts * divergence(other.mean, pooled)  # (K, L)
        self.scatter[:, classes] += other.scatter + between
        self.mean[:, classes] = pooled
        self.counts[classes] = total
        self.logit_sum[classes] += other.logit_sum
        self.masked[classes] += other.masked
        self.norm_sum[:, classes] += other.norm_sum

    def to(self, device: torch.device) -> ClusterSums:
        return ClusterSums(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def figures(self, spectrum: TemperatureSpectrum) -> ConcentrationSpectrum:
        """CMI and separation of all rows; every class has to be here (L = C)."""
        n, M = self.counts.double(), self.counts.sum().double()
        masked_elsewhere = self.masked.sum(0) - self.masked  # (C, C): rows of other classes
        separation = []
        for k, a in enumerate(spectrum.inverse_temperatures):
            P = n.unsqueeze(1) * self.mean[k]
            # A masked entry stands in here without its -inf, and counts below only where P gives it no
            # weight.
            log_P = a * self.logit_sum - self.norm_sum[k].unsqueeze(1)
            cross = P * (log_P - log_P.sum(0))
            infinite = (P > 0) & (masked_elsewhere > 0)
            separation.append(cross.masked_fill(infinite, torch.inf).sum() / M**2)
        return ConcentrationSpectrum(
            inverse_temperatures=torch.tensor(
                spectrum.inverse_temperatures, dtype=torch.float64, device="cpu"
            ),
            cmi=(self.scatter.sum(1) / M).cpu(),
            separation=torch.stack(separation).cpu(),
            class_cmi=(self.scatter / n).cpu(),
            counts=self.counts.cpu(),
        )


def summarise(
    logits: Tensor, target: Tensor, spectrum: TemperatureSpectrum, ignore_index: int
) -> tuple[ClusterSums, Tensor]:
    """Statistics of a batch, logits (N, C) and target (N,), by the L classes present; and those, (L,).

    Raises:
        TypeError, ValueError: wrong shape or dtype, a label out of range, logits of NaN or +inf, a row of
        -inf only.
    """
    if not logits.is_floating_point() or target.dtype != torch.int64:
        raise TypeError(f"logits must be floating point and target int64, got {logits.dtype}, {target.dtype}")
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be of shape (N, C), target (N,), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    kept = target != ignore_index
    logits, target = logits[kept].double(), target[kept]
    C = logits.shape[1]
    if bool(((target < 0) | (target >= C)).any()):
        low, high = (int(label) for label in target.aminmax())
        raise ValueError(f"target must lie in [0, {C}) or be {ignore_index} (ignored), got {low} to {high}")
    top = logits.amax(1, keepdim=True) if C else logits
    if not bool(top.isfinite().all()):  # amax passes NaN on
        raise ValueError("every row of logits needs a finite maximum, got NaN, +inf or a row of -inf only")
    classes, cluster = target.unique(return_inverse=True)
    sums = ClusterSums.empty(len(spectrum), len(classes), C, logits.device)
    sums.counts += torch.bincount(cluster, minlength=len(classes))
    z = logits - top
    masked = z.isneginf()
    sums.masked.index_add_(0, cluster, masked.double())
    sums.logit_sum.index_add_(0, cluster, z.masked_fill(masked, 0))
    n = sums.counts.unsqueeze(1)
    for k, a in enumerate(spectrum.inverse_temperatures):
        norm = (a * z).logsumexp(1)  # (N,)
        sums.norm_sum[k].index_add_(0, cluster, norm)
        P = (a * z - norm.unsqueeze(1)).exp()
        Q = torch.zeros_like(sums.logit_sum).index_add_(0, cluster, P) / n
        # Once more from the deviations: where the rows agree, the rounding of the first sum would show.
        Q += torch.zeros_like(Q).index_add_(0, cluster, P - Q[cluster]) / n
        sums.mean[k] = Q
        sums.scatter[k].index_add_(0, cluster, divergence(P, Q[cluster]))
    return sums, classes


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension: sum_j q phi((p - q) / q), phi(u) = (1 + u) log(1 + u) - u.

    p has to be 0 where q is. For small u the terms of phi would cancel: there it is its series u^2/2 - u^3/6
    + ...
    """
    u = torch.where(q > 0, (p - q) / torch.where(q > 0, q, 1.0), 0.0)
    near = u.abs() < 0.01
    s = torch.where(near, u, 0.0)
    series = (
        s * s * (1 / 2 - s * (1 / 6 - s * (1 / 12 - s * (1 / 20 - s * (1 / 30 - s * (1 / 42 - s / 56))))))
    )
    return (q * torch.where(near, series, torch.special.xlog1py(1 + u, u) - u)).sum(-1)


class StreamingCMI:
    """CMI, separation and NCMI of a data set, batch by batch; definitions at the top of this module.

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
        if logits.dim() == 2 and logits.shape[1] != self.num_classes:
            raise ValueError(f"logits must have {self.num_classes} classes, got {logits.shape[1]}")
        sums, classes = summarise(logits, target, self.spectrum, self.ignore_index)
        self._sums.take_in(sums.to(self.device), classes.to(self.device))

    def merge(self, other: StreamingCMI) -> None:
        """Takes in what another instance has seen, of the same spectrum and number of classes."""
        if other.spectrum.inverse_temperatures != self.spectrum.inverse_temperatures:
            raise ValueError("cannot merge: the other instance has other temperatures")
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge: {other.num_classes} classes into {self.num_classes}")
        self._sums.take_in(other._sums.to(self.device), torch.arange(self.num_classes, device=self.device))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Pools what all ranks of a process group have seen; every rank then holds all of it."""
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
        ValueError: the loader is empty; or as `StreamingCMI.update`.
    """
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    metric = None
    try:
        for inputs, target, *_ in loader:
            logits = model(inputs.to(device))
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
        ValueError: another quantity.
    """
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
