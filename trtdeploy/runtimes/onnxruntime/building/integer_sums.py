"""Which products of codes this processor sums up exactly.

On x86 without VNNI, ONNX Runtime multiplies UINT8 by INT8 with VPMADDUBSW, which adds two products in 16 bits and
saturates: 255 * 127 + 255 * 127 is 32767 there. Source: "Quantize ONNX models", section "When and why do I need to try
U8U8", https://onnxruntime.ai. Names of instruction sets decide only together with ONNX Runtime's version and choice of
kernels, and an emulator may show those of its host, so the kernels themselves are run, once per process, on the largest
codes: that takes a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.runtimes.onnxruntime.session import RUNTIME_ERRORS, make_session
from trtdeploy.tensors import Array

Types = tuple[str, str]
"""What is multiplied by what: "uint8" or "int8", of activations and of weights."""

LARGEST_SAFE_CODE = 64
"""Of an INT8 weight: two products with the largest UINT8, 255, add up to less than 2**15."""

_CHANNELS, _OUTPUTS = 64, 40
_ROWS = (1, 17)  # a vector has kernels of its own


@cache
def exact_products() -> frozenset[Types]:
    """Return the types whose products ONNX Runtime sums up exactly on this processor; one without a kernel is none."""
    kinds = ("uint8", "int8")
    return frozenset((a, b) for a in kinds for b in kinds if _is_exact(np.dtype(a), np.dtype(b)))


def multiplies_exactly() -> bool:
    """Return whether a product of UINT8 and INT8, which most integer kernels on x86 make, is summed up exactly."""
    return ("uint8", "int8") in exact_products()


def _is_exact(a: np.dtype[Any], b: np.dtype[Any]) -> bool:
    weights = np.full((_CHANNELS, _OUTPUTS), np.iinfo(b).max, b)
    weights[:, ::2] = np.iinfo(b).min
    largest = int(np.iinfo(a).max)
    sums = largest * weights.sum(axis=0, dtype=np.int64)
    scale = np.float32(np.abs(sums).max() / 100)  # of the convolution, which makes codes of up to 100 of its sums
    codes = np.clip(np.rint(sums / scale), np.iinfo(a).min, largest)
    inputs = {f"a{rows}": np.full((rows, _CHANNELS), largest, a) for rows in _ROWS}
    inputs["image"] = np.full((1, _CHANNELS, 3, 3), largest, a)
    try:
        session = make_session(_products(weights, inputs, scale).SerializeToString())
        *products, convolved = session.run(None, inputs)
    except RUNTIME_ERRORS:
        return False
    right = all(np.array_equal(rows, np.broadcast_to(sums, rows.shape)) for rows in products)
    return right and float(np.abs(convolved - codes[:, None, None]).max()) <= 1


def _products(weights: Array, inputs: Mapping[str, Array], scale: np.float32) -> onnx.ModelProto:
    """Return a product of every input but the last with the weights, and a 1x1 convolution of the last one."""
    *rows, image = inputs
    zero = np.zeros((), inputs[image].dtype)
    kernels = np.ascontiguousarray(weights.T[:, :, None, None])
    constants = [weights, kernels, np.float32(1), scale, zero, np.zeros((), weights.dtype)]
    names = ["weights", "kernels", "one", "scale", "zero", "weight_zero"]
    nodes = [helper.make_node("MatMulInteger", [name, "weights"], [f"{name}.y"]) for name in rows]
    convolution = [image, "one", "zero", "kernels", "one", "weight_zero", "scale", "zero"]
    nodes.append(helper.make_node("QLinearConv", convolution, [f"{image}.y"]))
    kind = onnx.TensorProto.UINT8 if zero.dtype == np.uint8 else onnx.TensorProto.INT8
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info(name, kind, each.shape) for name, each in inputs.items()],
        [
            *(helper.make_tensor_value_info(f"{name}.y", onnx.TensorProto.INT32, None) for name in rows),
            helper.make_tensor_value_info(f"{image}.y", kind, None),
        ],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in zip(names, constants, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
