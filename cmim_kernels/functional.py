"""The public functions: everything is validated here, once, and nothing below validates again.

A check of what a tensor is (dtype, shape, device) is made in every call. A check of what it holds is made
where it costs no pass of its own and no wait for a device: labels by the kernel that groups them; given
centroids and class weights, which persist over many calls, once per value; all of these on the CPU only.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import reference
from .autograd import Numbers as LossNumbers
from .autograd import differentiable_loss, needs_reference
from .backends import Backend
from .dispatch import pick
from .distributed import gather_batch
from .spectrum import Numbers, TemperatureSpectrum, as_float

Reduction = Literal["none", "mean", "sum"]

DEFAULT_SPECTRUM = TemperatureSpectrum.uniform(1.0, 8)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_REDUCTIONS: dict[str, int] = {"none": reference.NONE, "mean": reference.MEAN, "sum": reference.SUM}


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
    computed by the reference: exact, slower, with (K, N, C) of memory. On a GPU the host never waits for the
    device.

    Args:
        logits: (N, C), float32, float64, bfloat16 or float16, any strides. Arithmetic is float32 (float64 for
            float64). -inf masks a class out for that row; NaN or +inf makes the loss NaN.
        target: (N,) int64 class indices in [0, C), or `ignore_index`.
        temperatures: a `TemperatureSpectrum` (best: it is prepared once), a sequence of positive numbers, or
            a 1-D CPU tensor of them.
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
        ignore_index: rows with this target count nowhere and get a gradient of exactly zero.
        reduction: "mean" (cross entropy as `F.cross_entropy` takes it, CMI over the kept rows), "sum" over
            the rows, or "none": (N,), 0 in ignored rows.
        process_group: clusters and means extend over the batches of all ranks of this group; every rank
            returns the global loss, and the gradients are right after averaging over ranks, as
            DistributedDataParallel does. Row counts may differ. Not with reduction "none".
        backend: "auto", or "cpu", "cuda", "triton", "reference": used, or an error with the reason.

    Returns:
        () or, for reduction "none", (N,); float64 for float64 logits, else float32. If all rows are ignored,
        or N = 0: NaN for "mean" and 0 for "sum", as `F.cross_entropy`, with a gradient of zero.

    Raises:
        TypeError, ValueError: an argument is not what is described above. A label out of range is found on
            the CPU; elsewhere it makes the loss NaN and is never read through. Given centroids and class
            weights are looked into on the CPU only.
        RuntimeError: the backend asked for cannot be used; says why.
    """
    _check_batch(logits, target)
    spectrum = as_spectrum(temperatures, temperature_weights)
    numbers = checked_numbers(ce_weight, cmi_weight, label_smoothing, ignore_index, reduction)
    if weight is not None:
        weight = _class_weight(weight, logits)
    if centroids is not None:
        centroids = _centroids(centroids, logits, len(spectrum.weights))
    if process_group is not None:
        if reduction == "none":
            raise ValueError("reduction must be 'mean' or 'sum' with a process_group, got 'none'")
        logits, target = gather_batch(logits, target, numbers[3], process_group)
    return _evaluate(
        pick(backend, logits, len(spectrum.weights)),
        logits,
        target,
        spectrum.inverse_temperatures,
        spectrum.weights,
        weight,
        centroids,
        numbers,
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
    _check_batch(logits, target)
    spectrum = as_spectrum(temperatures, None)
    ignore_index = checked_ignore_index(ignore_index)
    if centroids is not None:
        centroids = _centroids(centroids, logits, len(spectrum.weights))
    if process_group is not None:
        logits, target = gather_batch(logits, target, ignore_index, process_group)
    a, w = spectrum.inverse_temperatures, spectrum.weights
    numbers = (0.0, 1.0, 0.0, ignore_index, reference.SPECTRUM)
    return _evaluate(pick(backend, logits, len(a)), logits, target, a, w, None, centroids, numbers)


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
    _check_batch(logits, target)
    spectrum = as_spectrum(temperatures, None)
    ignore_index = checked_ignore_index(ignore_index)
    logits = logits.detach()
    if process_group is not None:
        logits, target = gather_batch(logits, target, ignore_index, process_group)
    a = spectrum.inverse_temperatures
    chosen = pick(backend, logits, len(a))
    if chosen is None:
        logits, target = _valid_labels(logits, target, ignore_index)
        return reference.class_centroids(logits, target, a, ignore_index)
    try:
        return chosen.class_centroids(logits, target, a, ignore_index)
    except RuntimeError as error:
        raise _translated(error) from None


def _evaluate(
    backend: Backend | None,
    logits: Tensor,
    target: Tensor,
    a: Sequence[float],
    w: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    numbers: LossNumbers,
) -> Tensor:
    if backend is None or needs_reference():
        backend = None
        logits, target = _valid_labels(logits, target, ignore_index=numbers[3])
    try:
        return differentiable_loss(backend, logits, target, a, w, class_weight, centroids, numbers)
    except RuntimeError as error:
        raise _translated(error) from None


def _translated(error: RuntimeError) -> Exception:
    """A ValueError where a kernel found a label out of range, else the error itself."""
    found = re.search(r"target: expected labels[^\n]*", str(error))
    return ValueError(found[0]) if found else error


def _check_batch(logits: Tensor, target: Tensor) -> None:
    """One expression for what nearly always holds; `_bad_batch` finds out what does not."""
    if not (
        isinstance(logits, Tensor)
        and isinstance(target, Tensor)
        and logits.dtype in _DTYPES
        and target.dtype is torch.int64
        and len(shape := logits.shape) == 2
        and len(rows := target.shape) == 1
        and shape[0] == rows[0]
        and shape[1] > 0
        and ((logits.is_cpu and target.is_cpu) or logits.device == target.device)
        and logits.layout is target.layout is torch.strided
    ):
        raise _bad_batch(logits, target)


def _bad_batch(logits: Any, target: Any) -> Exception:
    """What is wrong with the batch, in the order in which a caller would put it right."""
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            return TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if logits.dtype not in _DTYPES:
        return TypeError(f"logits must be float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.layout is not torch.strided:
        return TypeError(f"logits must be a dense tensor, got layout {logits.layout}")
    if target.layout is not torch.strided:
        return TypeError(f"target must be a dense tensor, got layout {target.layout}")
    if target.dtype is not torch.int64:
        return TypeError(f"target must hold class indices as int64, got {target.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        return ValueError(f"logits must be of shape (N, C) with C >= 1, got {tuple(logits.shape)}")
    if target.dim() != 1 or logits.shape[0] != target.shape[0]:
        return ValueError(f"target must be of shape ({logits.shape[0]},), got {tuple(target.shape)}")
    return ValueError(f"target must be on the device of logits, {logits.device}, got {target.device}")


def _valid_labels(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """For the reference: a batch whose labels can be read through.

    Raises for a label out of range where values may be read without waiting for a device. Elsewhere its row
    becomes NaN, and with it the loss, as in the kernels.
    """
    valid = ((target >= 0) & (target < logits.shape[1])) | (target == ignore_index)
    if not target.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return logits.masked_fill(~valid[:, None], torch.nan), target.masked_fill(~valid, 0)
    if not valid.all():
        row = int(valid.logical_not().nonzero()[0])
        raise ValueError(
            f"target: expected labels in [0, {logits.shape[1]}) or ignore_index = {ignore_index}, "
            f"got {int(target[row])} at row {row}"
        )
    return logits, target


def as_spectrum(temperatures: TemperatureSpectrum | Numbers, weights: Numbers | None) -> TemperatureSpectrum:
    if not isinstance(temperatures, TemperatureSpectrum):
        return TemperatureSpectrum(temperatures, weights)
    return temperatures if weights is None else temperatures.with_weights(weights)


def checked_numbers(
    ce_weight: float, cmi_weight: float, label_smoothing: float, ignore_index: int, reduction: str
) -> LossNumbers:
    """The options that are not tensors, valid and as the operators take them."""
    if type(ce_weight) is not float or not 0 <= ce_weight < math.inf:
        ce_weight = checked_number("ce_weight", ce_weight)
    if type(cmi_weight) is not float or not 0 <= cmi_weight < math.inf:
        cmi_weight = checked_number("cmi_weight", cmi_weight)
    if type(label_smoothing) is not float or not 0 <= label_smoothing <= 1:
        label_smoothing = checked_number("label_smoothing", label_smoothing, most=1)
    if type(reduction) is not str or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {list(_REDUCTIONS)}, got {reduction!r}")
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = checked_ignore_index(ignore_index)
    return ce_weight, cmi_weight, label_smoothing, ignore_index, _REDUCTIONS[reduction]


def checked_number(name: str, value: Any, most: float = math.inf) -> float:
    """`value` as a float in [0, most], finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = as_float(value)
    if not (0 <= number <= most and number < math.inf):
        accepted = "finite and non-negative" if most == math.inf else f"in [0, {most}]"
        raise ValueError(f"{name} must be {accepted}, got {value!r}")
    return number


def checked_ignore_index(value: object) -> int:
    """`value` as an int; NumPy's integers are welcome."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    index = int(value)
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {index}")
    return index


def _class_weight(weight: Tensor, logits: Tensor) -> Tensor:
    """`weight` in the compute dtype, contiguous."""
    weight = _floating("weight", weight)
    compute = _compute_dtype(logits)
    if weight.dtype is torch.float64 and compute is torch.float32:
        raise TypeError(f"weight must be float32 or narrower for {logits.dtype} logits, got float64")
    _check_constant("weight", weight, logits, (logits.shape[1],))
    return weight.to(compute).contiguous()


def _floating(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {_kind(value)}")
    return value


def _centroids(centroids: Tensor, logits: Tensor, k: int) -> Tensor:
    """`centroids` contiguous."""
    compute = _compute_dtype(logits)
    if not isinstance(centroids, Tensor) or centroids.dtype is not compute:
        raise TypeError(
            f"centroids must be a {compute} tensor for {logits.dtype} logits, got {_kind(centroids)}"
        )
    _check_constant("centroids", centroids, logits, (k, logits.shape[1], logits.shape[1]))
    return centroids.contiguous()


def _check_constant(name: str, value: Tensor, logits: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(value.shape)}")
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {value.device}")
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: it is held fixed; pass {name}.detach()")
    _check_values(name, value)


def check_before_logits(name: str, value: object, shape: tuple[int | None, ...]) -> None:
    """What can be said of `weight` or `centroids` before there are logits; None stands for C in `shape`."""
    value = _floating(name, value)
    c = value.shape[-1] if value.dim() else None
    if tuple(value.shape) != tuple(c if size is None else size for size in shape):
        wanted = ", ".join("C" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be of shape ({wanted}), got {tuple(value.shape)}")
    _check_values(name, value)


def _check_values(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    unread = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if value.is_cpu and not unread and not _known_valid(value):
        low, high = torch.aminmax(value)
        if not (low >= 0 and high < math.inf):  # false for NaN
            raise ValueError(f"{name} must be finite and non-negative, got values in [{low}, {high}]")
        _remember_valid(value)


# The version and address of tensors found valid, by id: one that lives over many calls is read once per
# value.
_valid: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def _known_valid(value: Tensor) -> bool:
    known = _valid.get(id(value))
    return (
        known is not None
        and known[0]() is value
        and not value.is_inference()
        and known[1:] == (value._version, value.data_ptr())
    )


def _remember_valid(value: Tensor) -> None:
    if value.is_inference():  # it has no version, so that a change would go unseen
        return
    key = id(value)
    _valid[key] = (weakref.ref(value, lambda _: _valid.pop(key, None)), value._version, value.data_ptr())


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype is torch.float64 else torch.float32


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
