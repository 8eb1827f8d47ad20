"""What is valid: every argument of a public function is checked here, once, and nothing below checks again.

A check of what a tensor is (dtype, shape, device) is made in every call. A check of what it holds is made
where it costs no pass of its own and no wait for a device: labels by the kernel that groups them; given
centroids and class weights, which persist over many calls, once per value; all of these on the CPU only.
"""

from __future__ import annotations

import math
import weakref
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from . import reference
from .autograd import LossOptions
from .tensors import LOGIT_DTYPES, without_data

_REDUCTIONS: dict[str, int] = {"none": reference.NONE, "mean": reference.MEAN, "sum": reference.SUM}


def check_batch(logits: Tensor, target: Tensor) -> None:
    """One expression for what nearly always holds; `_bad_batch` finds out what does not."""
    if not (
        isinstance(logits, Tensor)
        and isinstance(target, Tensor)
        and logits.dtype in LOGIT_DTYPES
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
    if logits.dtype not in LOGIT_DTYPES:
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


def valid_labels(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """For the reference: a batch whose labels can be read through.

    Raises for a label out of range where values may be read without waiting for a device. Elsewhere its row
    becomes NaN, and with it the loss, as in the kernels.
    """
    valid = ((target >= 0) & (target < logits.shape[1])) | (target == ignore_index)
    if not target.is_cpu or without_data(target):
        return logits.masked_fill(~valid[:, None], torch.nan), target.masked_fill(~valid, 0)
    if not valid.all():
        row = int(valid.logical_not().nonzero()[0])
        raise ValueError(
            f"target: expected labels in [0, {logits.shape[1]}) or ignore_index = {ignore_index}, "
            f"got {int(target[row])} at row {row}"
        )
    return logits, target


def checked_options(
    ce_weight: float, cmi_weight: float, label_smoothing: float, ignore_index: int, reduction: str
) -> LossOptions:
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


def as_float(value: Real | float) -> float:
    """A real number as a float, an infinite one where it is out of range."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def checked_int(name: str, value: object) -> int:
    """`value` as an int; NumPy's integers are welcome."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def checked_count(name: str, value: object) -> int:
    """`value` as an int of at least 1."""
    count = checked_int(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    return count


def checked_ignore_index(value: object) -> int:
    """`value` as an int64."""
    index = checked_int("ignore_index", value)
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"ignore_index must fit into int64, got {index}")
    return index


def checked_class_weight(weight: Tensor, logits: Tensor) -> Tensor:
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


def checked_centroids(centroids: Tensor, logits: Tensor, k: int) -> Tensor:
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
    _check_values(name, value)


def check_before_logits(name: str, value: object, shape: tuple[int | None, ...]) -> None:
    """What can be said of `weight` or `centroids` before there are logits; None stands for C in `shape`."""
    value = _floating(name, value)
    c = value.shape[-1] if value.dim() else None
    if c == 0 or tuple(value.shape) != tuple(c if size is None else size for size in shape):
        wanted = ", ".join("C" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
        raise ValueError(f"{name} must be of shape ({wanted}) with C >= 1, got {tuple(value.shape)}")
    _check_values(name, value)


def _check_values(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: it is held fixed; pass {name}.detach()")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if torch.compiler.is_compiling() or not value.is_cpu or _known_valid(value) or without_data(value):
        return
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
