"""What a Q/DQ graph says, computed by numpy alone: sums of products of codes in 64-bit integers.

For networks of Conv whose kernels lie side by side, Gemm, MatMul, Relu, Flatten, Add, Mul and Q/DQ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.tensors import Array


@dataclass(frozen=True)
class Codes:
    """What DequantizeLinear reads: (codes - zero) * scale, where both are whole numbers along ``axis``."""

    codes: Array
    zero: Array
    scale: Array
    axis: int | None

    def along_axis(self, values: Array) -> Array:
        if values.ndim == 0 or self.axis is None:
            return values.reshape(())
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return values.reshape(shape)

    @property
    def floats(self) -> Array:
        whole = self.codes.astype(np.int64) - self.along_axis(self.zero.astype(np.int64))
        return whole * self.along_axis(self.scale.astype(np.float64))


def answers_in_int8(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    """Return the model's first output; layers without Q/DQ are computed in double precision."""
    values: dict[str, Array | Codes] = dict(inputs)
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        given = [values[name] if name else None for name in node.input]
        values[node.output[0]] = _OPERATORS[node.op_type](*given, **attributes)
    return _floats(values[model.graph.output[0].name])


def _floats(value: Array | Codes) -> Array:
    return value.floats if isinstance(value, Codes) else value


def _quantize(values: Array | Codes, scale: Array, zero: Array, axis: int = 1) -> Codes:
    """Round half to even of single precision, as https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html has it."""
    floats = _floats(values).astype(np.float32)
    empty = Codes(np.zeros(floats.shape, zero.dtype), zero, scale, axis if scale.ndim else None)
    limits = np.iinfo(zero.dtype)
    codes = np.rint(floats / empty.along_axis(scale)) + empty.along_axis(zero.astype(np.int64))
    return Codes(np.clip(codes, limits.min, limits.max).astype(zero.dtype), zero, scale, empty.axis)


def _dequantize(codes: Codes | Array, scale: Array, zero: Array, axis: int = 1) -> Codes:
    if isinstance(codes, Codes):
        codes = codes.codes
    return Codes(codes, zero, scale, axis if scale.ndim else None)


def _product(a: Array | Codes, b: Array | Codes) -> Array:
    """Return the matrix product, of two quantized operands as a product of whole numbers; ``b``'s axis is its last."""
    if not isinstance(a, Codes) or not isinstance(b, Codes):
        return _floats(a).astype(np.float64) @ _floats(b).astype(np.float64)
    sums = (a.codes.astype(np.int64) - int(a.zero)) @ (b.codes.astype(np.int64) - b.along_axis(b.zero.astype(np.int64)))
    return sums * float(a.scale) * b.along_axis(b.scale.astype(np.float64))


def _moved(value: Array | Codes, change: Callable[[Array], Array], axis: int | None = None) -> Array | Codes:
    if not isinstance(value, Codes):
        return change(value)
    return Codes(change(value.codes), value.zero, value.scale, axis if value.axis is not None else None)


def _gemm(x: Array | Codes, w: Array | Codes, bias: Array | Codes | None = None, transB: int = 0) -> Array:
    matrix = _moved(w, np.transpose, axis=1) if transB else w
    return _product(x, matrix) + (0 if bias is None else _floats(bias))


def _conv(
    x: Array | Codes,
    w: Array | Codes,
    bias: Array | Codes | None = None,
    *,
    kernel_shape: list[int],
    strides: list[int],
) -> Array:
    size = kernel_shape[0]
    assert kernel_shape == strides == [size, size]

    def patches(image: Array) -> Array:
        n, c, height, width = image.shape
        cut = image.reshape(n, c, height // size, size, width // size, size)
        return cut.transpose(0, 2, 4, 1, 3, 5).reshape(n, height // size, width // size, c * size * size)

    rows = _product(_moved(x, patches), _moved(w, lambda kernels: kernels.reshape(len(kernels), -1).T, axis=1))
    return np.moveaxis(rows + (0 if bias is None else _floats(bias)), -1, 1)


_OPERATORS: dict[str, Callable[..., Array | Codes]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _product,
    "Relu": lambda x: np.maximum(_floats(x), 0),
    "Flatten": lambda x: _moved(x, lambda values: values.reshape(len(values), -1)),
    "Add": lambda a, b: _floats(a) + _floats(b),
    "Mul": lambda a, b: _floats(a) * _floats(b),
    "Identity": lambda x: x,
}
