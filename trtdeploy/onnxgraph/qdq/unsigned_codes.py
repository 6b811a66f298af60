"""Codes of activations as UINT8, for ONNX Runtime on x86."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from trtdeploy.onnxgraph.graph import Graph, let_constants_stand_alone

_ZERO_POINT = "activation_zero_point"


def with_unsigned_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which INT8 codes of activations are UINT8 with zero-point 128: the same values, to the bit.

    ONNX Runtime's kernels for x86 multiply UINT8 by INT8. It rewrites INT8 by itself
    (``session.qdqisint8allowed``), but then leaves most ops unfused.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    let_constants_stand_alone(copy)
    graph = Graph(copy.graph)
    outputs = {output.name for output in copy.graph.output}
    changed = False
    for node in copy.graph.node:
        if node.op_type != "QuantizeLinear" or node.output[0] in outputs or graph.constant(node.input[0]) is not None:
            continue
        readers = graph.consumers[node.output[0]]
        if any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        if not all(_is_int8_around_zero(graph, each) for each in (node, *readers)):
            continue
        for each in (node, *readers):
            each.input[2] = _ZERO_POINT
        changed = True
    if changed:
        copy.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), _ZERO_POINT))
    return copy


def _is_int8_around_zero(graph: Graph, node: onnx.NodeProto) -> bool:
    zero_point = graph.constant(node.input[2]) if len(node.input) > 2 else None
    return zero_point is not None and zero_point.dtype == np.int8 and zero_point.size == 1 and not zero_point.any()
