"""The public functions: `validate.py` checks their arguments, `dispatch.py` says who computes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.distributed import ProcessGroup

from . import reference
from .autograd import IGNORE_INDEX, LossOptions, differentiable_loss, needs_reference
from .backends import Backend
from .dispatch import pick
from .distributed import gather_batch
from .spectrum import DEFAULT_SPECTRUM, Numbers, TemperatureSpectrum, as_spectrum
from .validate import (
    check_batch,
    checked_centroids,
    checked_class_weight,
    checked_ignore_index,
    checked_options,
    valid_labels,
)

Reduction = Literal["none", "mean", "sum"]


def fused_cmi_loss(
    logits: Tensor,
    target: Tensor,
    *,
    temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
    temperature_weights: Numbers | None = None,
    ce_weight: float = 1.0,
    cmi_weight: float = 1.0,
    centroids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """The CMIM loss: ce_weight * cross entropy + cmi_weight * sum_k w_k CMI_k, in nats.

    CMI_k is the conditional mutual information between the input and the prediction at temperature T_k given
    the label: the mean over the rows of KL(P_i || Q), P_i = softmax(z_i / T_k), Q = the mean of P over the
    rows with the same label. See Ye, Hamidi, Yang, "Towards Undistillable Models by Minimizing Conditional
    Mutual Information" (arXiv 2507.00012), and docs/math.md for the gradients.

    Differentiable in the logits. Double backward, forward mode and the transforms of `torch.func` are
    computed by the reference, whatever the backend: exact, slower, with some forty float64 tensors of
    (K, N, C) and one of (N, N). On a GPU the host never waits for the device.

    Args:
        logits: (N, C), float32, float64, bfloat16 or float16, any strides; not to be changed in place before
            backward. Arithmetic is float32 (float64 for float64). -inf masks a class out for that row; NaN or
            +inf makes the loss NaN.
        target: (N,) int64 class indices in [0, C), or `ignore_index`.
        temperatures: a `TemperatureSpectrum` (best: it is prepared once), a sequence of numbers in
            [1e-6, 1e6], or a 1-D CPU tensor of them.
        temperature_weights: w_k, K non-negative numbers; those of the spectrum, or 1/K each, if not given.
        ce_weight: factor of the cross entropy, finite and non-negative. A term with factor 0 is left out.
        cmi_weight: factor of the CMI, finite and non-negative. With 0 the loss is `F.cross_entropy` (in
            float32 where the logits are narrower).
        centroids: (K, C, C) of the compute dtype, contiguous or not: Q[k, c] to use for class c instead of
            the batch's own, held fixed. Finite and non-negative; rows need not sum to 1 (the divergence is
            the generalised one).
        weight: (C,) class weights of the cross entropy, as in `F.cross_entropy`; non-negative. This tensor's
            values, and those of `centroids`, are checked once, and again when autograd's version counter says
            that they have changed: a change through `.data` or a NumPy view goes unseen.
        label_smoothing: of the cross entropy, in [0, 1], as in `F.cross_entropy`.
        ignore_index: rows with this target count nowhere and get a gradient of exactly zero (on a GPU, NaN
            if the upstream gradient is not finite).
        reduction: "mean" (cross entropy as `F.cross_entropy` takes it, CMI over the kept rows), "sum" over
            the rows, or "none": (N,), 0 in ignored rows.
        process_group: clusters and means extend over the batches of all ranks of this group; every rank
            returns the global loss, and the gradients are right after averaging over ranks, as
            DistributedDataParallel does. Row counts may differ, classes and dtype not. Not with reduction
            "none", double backward, forward mode or `torch.func`.
        backend: "auto", the fastest that serves the call, with a warning where that is the reference; or
            "cpu", "cuda", "triton", "reference": used, or an error with the reason.

    Returns:
        () or, for reduction "none", (N,); float64 for float64 logits, else float32. If all rows are ignored,
        or N = 0: NaN for "mean" and 0 for "sum", as `F.cross_entropy`, with a gradient of zero.

    Raises:
        TypeError, ValueError: an argument is not what is described above. A label out of range is found on
            the CPU; elsewhere, and under `torch.func` or a tracer, it makes the loss NaN and is never read
            through. Given centroids and class weights are looked into on the CPU only, and not under a
            tracer.
        RuntimeError: the backend asked for cannot be used; says why. With the CUDA backend also: an earlier
            call had a label out of range; names the label and its row.
    """
    check_batch(logits, target)
    spectrum = as_spectrum(temperatures, temperature_weights)
    options = checked_options(ce_weight, cmi_weight, label_smoothing, ignore_index, reduction)
    if weight is not None:
        weight = checked_class_weight(weight, logits)
    if centroids is not None:
        centroids = checked_centroids(centroids, logits, len(spectrum.weights))
    if process_group is not None:
        if reduction == "none":
            raise ValueError("reduction must be 'mean' or 'sum' with a process_group, got 'none'")
        logits, target = gather_batch(logits, target, options[IGNORE_INDEX], process_group)
    return _evaluate(
        pick(backend, logits, len(spectrum.weights)),
        logits,
        target,
        spectrum.inverse_temperatures,
        spectrum.weights,
        weight,
        centroids,
        options,
        process_group,
    )


def cmi_spectrum(
    logits: Tensor,
    target: Tensor,
    *,
    temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
    centroids: Tensor | None = None,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """CMI_k of every temperature, (K,) in nats, differentiable in the logits.

    For other objectives than a weighted sum: `cmi_spectrum(...).max()`, `.logsumexp(0)`, any function of it.
    The arguments and errors are those of `fused_cmi_loss`; the weights of a `TemperatureSpectrum` are not
    used. NaN if no row is kept. float64 for float64 logits, else float32.
    """
    check_batch(logits, target)
    spectrum = as_spectrum(temperatures)
    ignore_index = checked_ignore_index(ignore_index)
    if centroids is not None:
        centroids = checked_centroids(centroids, logits, len(spectrum.weights))
    if process_group is not None:
        logits, target = gather_batch(logits, target, ignore_index, process_group)
    a, w = spectrum.inverse_temperatures, spectrum.weights
    options = (0.0, 1.0, 0.0, ignore_index, reference.SPECTRUM)
    chosen = pick(backend, logits, len(a))
    return _evaluate(chosen, logits, target, a, w, None, centroids, options, process_group)


def class_centroids(
    logits: Tensor,
    target: Tensor,
    *,
    temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
    ignore_index: int = -100,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The mean softmax of the rows of each class at every temperature, without gradient.

    Returns:
        Q (K, C, C), row Q[k, c] for class c and zeros for a class without rows, float64 for float64 logits,
        else float32; and the number of rows of each class, (C,) int64.

    The arguments and errors are those of `fused_cmi_loss`.
    """
    check_batch(logits, target)
    spectrum = as_spectrum(temperatures)
    ignore_index = checked_ignore_index(ignore_index)
    logits = logits.detach()
    if process_group is not None:
        logits, target = gather_batch(logits, target, ignore_index, process_group)
    a = spectrum.inverse_temperatures
    chosen = pick(backend, logits, len(a))
    try:
        if chosen is None:
            logits, target = valid_labels(logits, target, ignore_index)
            return reference.class_centroids(logits, target, a, ignore_index)
        return chosen.class_centroids(logits, target, a, ignore_index)
    except (RuntimeError, ValueError) as error:
        raise _translated(error, len(target), process_group) from None


def _evaluate(
    backend: Backend | None,
    logits: Tensor,
    target: Tensor,
    a: Sequence[float],
    w: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    options: LossOptions,
    group: ProcessGroup | None,
) -> Tensor:
    try:
        if backend is None or needs_reference():
            backend = None
            logits, target = valid_labels(logits, target, options[IGNORE_INDEX])
        return differentiable_loss(backend, logits, target, a, w, class_weight, centroids, options)
    except (RuntimeError, ValueError) as error:
        raise _translated(error, len(target), group) from None


def _translated(error: Exception, rows: int, group: ProcessGroup | None) -> Exception:
    """A ValueError where a label of this call is out of range, else the error itself.

    Without the native stack that comes with it. A label of an earlier call, which CUDA kernels tell of later
    than the call, is no fault of this one's arguments. With a group, each rank has as many of the `rows`.
    """
    found = re.search(r"target: expected labels[^\n]*", str(error))
    if found is None:
        return error
    if "in an earlier call" in found[0]:
        return RuntimeError(found[0])
    told = found[0]
    if group is not None:
        each = rows // group.size()
        told = re.sub(
            r"at row (\d+)", lambda row: "at row {1} of rank {0}".format(*divmod(int(row[1]), each)), told
        )
    return ValueError(told)
