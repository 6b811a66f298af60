"""Why a layer with weights stays in float when a model is quantized."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from trtdeploy.onnxgraph.graph import WEIGHTED_OPS
from trtdeploy.onnxgraph.name_patterns import matches_any
from trtdeploy.onnxgraph.qdq.layers import Layer, weighted_layers
from trtdeploy.onnxgraph.tensor_types import tensor_types


def left_in_float(model: onnx.ModelProto, skip: Collection[str] = ()) -> dict[str, str]:
    """Return why a layer with constant weights is not quantized, by node name.

    Args:
        model: The quantized model, or a float one of which nothing can be quantized.
        skip: The patterns of names that were to stay in float.
    """
    found = [layer for layer in weighted_layers(model) if not layer.is_quantized]
    types = tensor_types(model) if found else {}
    return {layer.name: _reason(layer, types, skip) for layer in found}


def _reason(layer: Layer, types: dict[str, int], skip: Collection[str]) -> str:
    if layer.node.op_type not in WEIGHTED_OPS:
        return layer.left_float
    if matches_any(layer.name, skip):
        return "--skip names it"
    for what, place in (("weights are", layer.weights), ("input is", 1 - layer.weights)):
        kind = types.get(layer.node.input[place], onnx.TensorProto.FLOAT)
        if kind != onnx.TensorProto.FLOAT:
            return f"its {what} {onnx.TensorProto.DataType.Name(kind)}, not float32"
    if layer.weights == 0 and layer.node.op_type != "MatMul":
        return "its first input is the constant one"
    return layer.left_float
