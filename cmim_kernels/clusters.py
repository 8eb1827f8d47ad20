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

from dataclasses import dataclass

import torch
from torch import Tensor

from .spectrum import TemperatureSpectrum


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


def check_mergeable(
    spectrum: TemperatureSpectrum, classes: int, other_spectrum: TemperatureSpectrum, other_classes: int
) -> None:
    """Raises a ValueError unless the sums of another instance are of the same temperatures and classes."""
    if other_spectrum.inverse_temperatures != spectrum.inverse_temperatures:
        raise ValueError("cannot merge: the other instance has other temperatures")
    if other_classes != classes:
        raise ValueError(f"cannot merge: {other_classes} classes into {classes}")


def summarise(
    logits: Tensor, target: Tensor, num_classes: int, spectrum: TemperatureSpectrum, ignore_index: int
) -> tuple[ClusterSums, Tensor]:
    """Statistics of a batch, logits (N, C) and target (N,), by the L classes present; and those, (L,).

    `num_classes` is what C has to be.

    Raises:
        TypeError, ValueError: wrong shape or dtype, a label out of range, logits of NaN or +inf, a row of
        -inf only.
    """
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = f"layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if not logits.is_floating_point() or target.dtype != torch.int64:
        raise TypeError(f"logits must be floating point and target int64, got {logits.dtype}, {target.dtype}")
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be of shape (N, C), target (N,), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    C = logits.shape[1]
    if num_classes != C:
        raise ValueError(f"logits must have {num_classes} classes, got {C}")
    kept = target != ignore_index
    logits, target = logits[kept].double(), target[kept]
    if bool(((target < 0) | (target >= C)).any()):
        low, high = (int(label) for label in target.aminmax())
        raise ValueError(f"target must lie in [0, {C}) or be {ignore_index} (ignored), got {low} to {high}")
    top = logits.amax(1, keepdim=True)
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
