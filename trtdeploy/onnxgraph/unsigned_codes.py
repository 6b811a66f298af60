"""Codes of activations as UINT8, for ONNX Runtime on x86."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from trtdeploy.onnxgraph.qdq import Graph

_ZERO_POINT = "activation_zero_point"


def with_unsigned_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which INT8 codes of activations are UINT8 with zero-point 128: the same values, to the bit.

    ONNX Runtime's kernels for x86 multiply UINT8 by INT8. It rewrites INT8 by itself
    (``session.qdqisint8allowed``), but then leaves most ops unfused.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy.graph)
    changed = False
    for node in copy.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        quantize = graph.maker(node.input[0], "QuantizeLinear")
        if quantize is None or graph.constant(quantize.input[0]) is not None:
            continue
        zero_point = graph.constant(quantize.input[2]) if len(quantize.input) > 2 else None
        if zero_point is None or zero_point.dtype != np.int8 or zero_point.size != 1 or zero_point.any():
            continue
        quantize.input[2] = node.input[2] = _ZERO_POINT
        changed = True
    if changed:
        copy.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), _ZERO_POINT))
    return copy
