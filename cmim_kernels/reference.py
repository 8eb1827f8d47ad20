"""The definition of the CMIM loss in plain PyTorch: `docs/math.md` as code, gradients by autograd.

Every other implementation in this package is judged against this file. It imports nothing of the package,
runs on any device and in any floating dtype, computes in float64 where the device has it, and holds (K, N, C)
tensors without regret.

Notation: logits z (N, C), labels y (N,), inverse temperatures a (K,), P = softmax(a z) (K, N, C), clusters =
rows of one label, Q = a cluster's mean P, M = kept rows (label not `ignore_index`). All divergences are in
nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, MEAN, SUM, SPECTRUM = 0, 1, 2, 3  # the `reduction` argument of the operators
_CE_REDUCTION = {NONE: "none", MEAN: "mean", SUM: "sum"}


def reference_loss(
    logits: Tensor,
    target: Tensor,
    inverse_temperatures: Sequence[float],
    temperature_weights: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    ce_weight: float,
    cmi_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """ce_weight * CE + cmi_weight * sum_k w_k CMI_k, with the argument list of `torch.ops.cmim_kernels.loss`.

    Returns (N,) for `NONE`, () for `MEAN` and `SUM`, and the CMI of every temperature, (K,), for `SPECTRUM`;
    float64 for float64 logits, else float32. A term of weight zero is left out. No argument is checked.
    """
    kept = target != ignore_index  # (N,)
    z = _wide_rows(logits, kept)
    out = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if reduction == SPECTRUM:
        return (divergences(z, target, inverse_temperatures, centroids, kept).sum(1) / kept.sum()).to(out)
    # z[:0] makes it differentiable where both terms are left out
    value = z.new_zeros(z.shape[:1] if reduction == NONE else ()) + z[:0].sum()
    if ce_weight != 0:
        weight = None if class_weight is None else class_weight.to(z)
        how = _CE_REDUCTION[reduction]
        value = value + ce_weight * F.cross_entropy(
            z, target, weight, ignore_index=ignore_index, reduction=how, label_smoothing=label_smoothing
        )
    if cmi_weight != 0:
        w = z.new_tensor(temperature_weights)  # (K,)
        rows = w @ divergences(z, target, inverse_temperatures, centroids, kept)  # (N,)
        term = {NONE: rows, MEAN: rows.sum() / kept.sum(), SUM: rows.sum()}[reduction]
        value = value + cmi_weight * term
    return value.to(out)


def reference_gradient(grad: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient of `reference_loss` by autograd, differentiable itself if gradients are enabled."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        value = reference_loss(logits, *arguments)
        (result,) = torch.autograd.grad(value, logits, grad, create_graph=differentiable)
    return result


def divergences(
    z: Tensor, target: Tensor, inverse_temperatures: Sequence[float], centroids: Tensor | None, kept: Tensor
) -> Tensor:
    """KL(P_i || Q_{y_i}) of every row and temperature, (K, N) in nats; 0 for rows that are not kept.

    z (N, C) in the arithmetic dtype, finite (or -inf) in rows that are not kept. `centroids` (K, C, C)
    replaces the batch's own Q and is held fixed.
    """
    a = z.new_tensor(inverse_temperatures)[:, None, None]  # (K, 1, 1)
    if centroids is None:
        p, q, log_ratio = _batch_ratios(z, torch.where(kept, target, -1), a)
    else:
        log_p = torch.log_softmax(a * _from_largest(z), dim=-1)  # (K, N, C)
        q = centroids.to(z)[:, torch.where(kept, target, 0)]  # (K, N, C)
        p, log_ratio = log_p.exp(), log_p - q.log()
    return _generalised_kl(p, q, log_ratio).masked_fill(~kept, 0)


def class_centroids(
    logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float], ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Mean softmax of the rows of each class, Q (K, C, C), zero for absent classes; counts (C,) int64."""
    kept = target != ignore_index
    z = _wide_rows(logits.detach(), kept)
    classes = z.shape[1]
    a = z.new_tensor(inverse_temperatures)[:, None, None]  # (K, 1, 1)
    p = torch.softmax(a * _from_largest(z), dim=-1)  # (K, N, C)
    label = torch.where(kept, target, classes)  # ignored rows go to an extra class, dropped below
    total = p.new_zeros(len(p), classes + 1, classes).index_add(1, label, p)[:, :classes]
    counts = label.new_zeros(classes + 1).index_add(0, label, torch.ones_like(label))[:classes]
    out = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (total / counts.clamp(min=1)[:, None]).to(out), counts


def _wide_rows(logits: Tensor, kept: Tensor) -> Tensor:
    """Logits in the arithmetic dtype; 0 in ignored rows, which neither value nor gradient may see."""
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return logits.to(dtype).masked_fill(~kept[:, None], 0)


def _from_largest(z: Tensor) -> Tensor:
    """z less each row's largest, which no softmax sees: a cold temperature would multiply its rounding."""
    return z - z.detach().amax(-1, keepdim=True)


def _batch_ratios(z: Tensor, label: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, Q and log(P/Q), each (K, N, C), to relative accuracy even where the rows of a cluster almost agree.

    P is written around a centre b that all rows of a cluster share, P = exp(b + rho), and the centroid around
    the same centre, Q = exp(b) (1 + mean expm1(rho)), so that no two rounded probabilities are subtracted. P
    and Q do not depend on the centre, which is why it carries no gradient and may be rounded in any way that
    is the same for all rows: it is the cluster's largest logits, moved by whole numbers towards log Q where
    they are far from it. Rows are moved by whole numbers too. Then every exponent is at most about log N.
    """
    cluster = _first_row_of_same_label(label)  # (N,)
    with torch.no_grad():
        peak = z.amax(-1, keepdim=True)  # (N, 1)
        level = (peak - _cluster_max(peak, cluster)).round()  # (N, 1)
        fixed = z - level
        centre = _cluster_max(fixed, cluster)  # (N, C)
        log_norm = torch.logsumexp(a * fixed, -1, keepdim=True)  # (K, N, 1)
        centre_norm = torch.logsumexp(a * centre, -1, keepdim=True)  # (K, N, 1)
        row_shift = (log_norm - centre_norm).round()  # (K, N, 1)
        log_centre = a * centre - centre_norm  # (K, N, C)
        dead = log_centre < -1e12  # masked in every row of the cluster, by -inf or by a large number
        log_q = _cluster_log_mean_exp(a * fixed - log_norm, cluster)  # (K, N, C)
        column_shift = (log_q - log_centre).round().masked_fill(dead, 0)  # (K, N, C)
        pbar = torch.softmax(log_centre + column_shift, dim=-1)  # (K, N, C)
    offset = z - level - centre  # (N, C), exact for rows that agree
    rho = (a * offset - (column_shift + row_shift)).masked_fill(dead, 0)  # (K, N, C)
    for _ in range(2):  # log P - b; the second round takes away what the first one's sum was rounded by
        rho = rho - torch.log1p((pbar * torch.expm1(rho)).sum(-1, keepdim=True))
    mean_growth = _cluster_sum(torch.expm1(rho), cluster) / _cluster_sum(torch.ones_like(z[:, :1]), cluster)
    p = pbar * rho.exp()
    q = pbar * (1 + mean_growth)
    return p, q, rho - torch.log1p(mean_growth)


def _generalised_kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """sum_j P log(P/Q) - P + Q over the last dimension, each term to relative accuracy and none negative.

    With r = log(P/Q) a term is Q (r e^r - e^r + 1) = Q sum_{m>=2} r^m (m - 1) / m!, which is what remains
    when the leading parts of the three terms cancel. Where P = 0 the term is Q, with gradient 0 to P's logit.
    """
    some = p > 0
    r = log_ratio.masked_fill(~some, 0)
    near = some & (r.abs() < 0.25)
    s = r.masked_fill(~near, 0)
    series = torch.zeros_like(s)
    for m in range(16, 1, -1):  # Horner; the next term is below 1e-16 of the sum
        series = (series + (m - 1) / factorial(m)) * s
    return torch.where(near, q * series * s, p * r - p + q).sum(-1)


def _first_row_of_same_label(label: Tensor) -> Tensor:
    """(N,) int64: every cluster named by the index of its first row, so that N clusters always suffice."""
    if len(label) == 0:
        return label
    return (label[:, None] == label).to(torch.uint8).argmax(dim=1)


def _cluster_sum(x: Tensor, cluster: Tensor) -> Tensor:
    """Each row of x (..., N, C) replaced by the sum over its cluster."""
    return torch.zeros_like(x).index_add(-2, cluster, x).index_select(-2, cluster)


def _cluster_max(x: Tensor, cluster: Tensor) -> Tensor:
    """Each row of x (..., N, C) replaced by the maximum over its cluster."""
    index = cluster[:, None].expand_as(x)
    top = torch.zeros_like(x).scatter_reduce(-2, index, x, "amax", include_self=False)
    return top.index_select(-2, cluster)


def _cluster_log_mean_exp(x: Tensor, cluster: Tensor) -> Tensor:
    """Each row of x (K, N, C) replaced by log mean exp over its cluster; -inf where the whole cluster is."""
    top = _cluster_max(x, cluster)
    top = top.masked_fill(top == -torch.inf, 0)  # (K, N, C)
    count = _cluster_sum(torch.ones_like(x[0, :, :1]), cluster)  # (N, 1)
    return top + (_cluster_sum((x - top).exp(), cluster) / count).log()
