"""Triton's interpreter without its greatest waste, and with the device's rounding and exponential.

A launch replaces the functions of `triton.language` by interpreted ones, by walking through the whole
module, and so does every call of a device function within it, though there is nothing left to replace: two
thirds of a run's time. Importing this module leaves out the walks that change nothing. Much of the rest goes
into the types and shapes of blocks, which are few, and are remembered here; into finding out that two tensors
of one type need not be converted, and copying one to the shape of the other, which NumPy does by itself; and
into assertions on sizes and sums for one on overflow, which are left out.

The interpreter cuts off the digits that a bfloat16 has no room for. Devices round to nearest, ties to even,
and so it is done here. Its exponential is right to half a unit in the last place; a device's is one
instruction, `ex2.approx.ftz`, which errs by up to two units (CUDA C++ Programming Guide, exp2f). So does the
one here: by what looks drawn at random for each argument, not at whole numbers, and to no subnormal results.
Before Triton 3.9 the interpreter rounds a fused multiply-add twice; here it does so in double only.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

_convert, _dtype = interpreter._convert_float, interpreter._get_np_dtype
_block_type, _tensor = tl.core.block_type.__init__, tl.core.tensor.__init__
_with_element, _lowered = tl.core.block_type.with_element_ty, tl.core.block_type.to_ir
_broadcast = semantic.TritonSemantic.broadcast_impl_value
_expand_dims = semantic.TritonSemantic.expand_dims
_alike = semantic.TritonSemantic.binary_op_type_checking_impl
_block_types: dict[Any, dict[str, Any]] = {}
_tensors: dict[str, dict[str, Any]] = {}
_dtypes: dict[str, Any] = {}
_constants: dict[Any, Any] = {}
_retyped: dict[Any, Any] = {}
_lowered_types: dict[str, Any] = {}
_expanded_types: dict[Any, Any] = {}
_common_types: dict[Any, Any] = {}
_PLAIN = {"fp32": float, "fp64": float, "int32": int, "int64": int}  # numbers of their kind


@functools.cache
def _languages(function: Any) -> list[Any]:
    return [value for value in function.__globals__.values() if value in (tl, tl.core)]


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _remembered_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])


def _remembered_with_element(self: Any, scalar_ty: Any) -> Any:
    key = (self.name, scalar_ty.name)
    if key not in _retyped:
        _retyped[key] = _with_element(self, scalar_ty)
    return _retyped[key]


def _remembered_lowered(self: Any, builder: Any) -> Any:
    if self.name not in _lowered_types:
        _lowered_types[self.name] = _lowered(self, builder)
    return _lowered_types[self.name]


def _remembered_tensor(self: Any, handle: Any, type: Any) -> None:
    if type.name not in _tensors:
        _tensor(self, handle, type)
        _tensors[type.name] = dict(vars(self))
    vars(self).update(_tensors[type.name], handle=handle)


def _remembered_dtype(type: Any) -> Any:
    if type.name not in _dtypes:
        _dtypes[type.name] = _dtype(type)
    return _dtypes[type.name]


def _expanded(self: Any, input: Any, axis: int) -> Any:
    key = (input.type.name, axis)
    if key not in _expanded_types:
        _expanded_types[key] = _expand_dims(self, input, axis).type
    data = input.handle.data[(slice(None),) * axis + (None,)]
    return self.tensor(interpreter.TensorHandle(data, input.handle.dtype.scalar), _expanded_types[key])


def _broadcast_unless_alike(self: Any, one: Any, other: Any) -> Any:
    if one.type.is_block() and other.type.is_block() and one.type.shape.values == other.type.shape.values:
        return one, other
    return _broadcast(self, one, other)


def _alike_unless_known(self: Any, one: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
    """Two tensors of one type, one and a number of its kind, a pointer and an offset are not converted."""
    if not isinstance(one, tl.tensor):
        if isinstance(other, tl.tensor) and type(one) is _PLAIN.get(other.dtype.name):
            return _constant(self, other, one), other
        return _alike(self, one, other, *args, **kwargs)
    if not isinstance(other, tl.tensor):
        if type(other) is _PLAIN.get(one.dtype.name):
            return one, _constant(self, one, other)
        return _alike(self, one, other, *args, **kwargs)
    same = one.dtype.name == other.dtype.name and (one.dtype.name in _PLAIN or one.dtype.is_int1())
    if same or (one.dtype.is_ptr() and other.dtype.is_int() and args):
        return _of_one_shape(self, one, other)
    return _alike(self, one, other, *args, **kwargs)


def _of_one_shape(self: Any, one: Any, other: Any) -> tuple[Any, Any]:
    """By their types only: the operation that follows broadcasts the numbers, as NumPy does."""
    if one.type.name == other.type.name:
        return one, other
    key = (one.type.name, other.type.name)
    if key not in _common_types:
        _common_types[key] = tuple(value.type for value in _broadcast(self, one, other))
    return tuple(
        self.tensor(value.handle, type) for value, type in zip((one, other), _common_types[key], strict=True)
    )


def _constant(self: Any, like: Any, number: Any) -> Any:
    key = (like.type.name, number.hex() if isinstance(number, float) else number)  # 0.0 is not -0.0
    if key not in _constants:
        _constants[key] = _alike(self, like, number)[1]
    return _constants[key]


def _rounded(source: Any, from_type: Any, to_type: Any, mode: Any) -> Any:
    if (from_type, to_type) == (tl.bfloat16, tl.float32):
        return source.astype(np.uint32) << 16
    if (from_type, to_type) != (tl.float32, tl.bfloat16):
        return _convert(source, from_type, to_type, mode)
    bits = source.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(source), 0x7FC0, rounded).astype(np.uint16)


def _exp2(self: Any, argument: Any) -> Any:
    x = argument.data
    if x.dtype != np.float32:
        return interpreter.TensorHandle(np.exp2(x), argument.dtype.scalar)
    draw = x.view(np.uint32) * np.uint32(2654435761)  # Knuth's multiplicative hash
    draw = (draw ^ (draw >> 15)) * np.uint32(2246822519)
    wide = np.minimum(x.astype(np.float64), 1000.0)  # infinite in float32, without an infinity less another
    exact = np.exp2(wide)
    unit = np.exp2(np.floor(wide) - 23)
    error = (draw / 2.0**31 - 1.0) * np.where(x == np.rint(x), 0.0, 2 * unit)
    y = (exact + error).astype(np.float32)
    return interpreter.TensorHandle(np.where(y < 2.0**-126, np.float32(0), y), argument.dtype.scalar)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    product = x.data.astype(np.float64) * y.data.astype(np.float64)  # exact, of two float32
    return interpreter.TensorHandle((product + z.data).astype(z.data.dtype), z.dtype.scalar)


if not hasattr(interpreter._interpreter, "fma_fp32"):
    interpreter.InterpreterBuilder.create_fma = _fma
interpreter.InterpretedFunction.__call__ = _call
interpreter.TensorHandle.__post_init__ = lambda self: None
interpreter._get_np_dtype = _remembered_dtype
tl.core.block_type.__init__ = _remembered_block_type
tl.core.block_type.with_element_ty = _remembered_with_element
tl.core.block_type.to_ir = _remembered_lowered
tl.core.tensor.__init__ = _remembered_tensor
semantic.TritonSemantic.expand_dims = _expanded
semantic.TritonSemantic.broadcast_impl_value = _broadcast_unless_alike
semantic.TritonSemantic.binary_op_type_checking_impl = _alike_unless_known
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter.InterpreterBuilder.create_exp2 = _exp2
interpreter._convert_float = _rounded
