"""Multiply-accumulates of the weighted layers, to say which share of the work runs in INT8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.qdq import Graph, node_name, quantized_nodes


def macs_by_node(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Count the multiply-accumulates of every layer with constant weights, by node name.

    A convolution does, for every element of its output, (input channels / groups) x (kernel size) of them; a transposed
    one does as many for every element of its input, with output channels in place of input channels; a matrix product
    does (length of the rows) for every element of its output.

    Args:
        model: The model.
        shapes: Sizes of the inputs by name, without dynamic ones.

    Raises:
        ModelError: The shape of a layer does not follow from those of the inputs.
    """
    known = _shapes(model, shapes)
    counted = quantized_nodes(model)
    graph = Graph(model.graph)
    return {name: _macs(graph, node, known) for node in model.graph.node if (name := node_name(node)) in counted}


def _macs(graph: Graph, node: onnx.NodeProto, known: Mapping[str, tuple[int, ...]]) -> int:
    weights = _shape(node, node.input[1], known, graph)
    if node.op_type == "Conv":
        return _size(_shape(node, node.output[0], known, graph)) * _size(weights[1:])
    if node.op_type == "ConvTranspose":
        return _size(_shape(node, node.input[0], known, graph)) * _size(weights[1:])
    first = _shape(node, node.input[0], known, graph)
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    inner = first[0] if transposed else first[-1]
    return _size(_shape(node, node.output[0], known, graph)) * inner


def _shape(node: onnx.NodeProto, tensor: str, known: Mapping[str, tuple[int, ...]], graph: Graph) -> tuple[int, ...]:
    if tensor in known:
        return known[tensor]
    value = graph.constant(tensor)
    if value is not None:
        return value.shape
    raise ModelError(f"The shape of {tensor}, at {node_name(node)}, does not follow from the shapes of the inputs.")


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Infer shapes by ONNX, with the inputs' sizes fixed."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name in shapes:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, shapes[value.name], strict=True):
                dim.dim_value = size
    # sizes that the model states of its own values as symbols would stay symbols
    del fixed.graph.value_info[:]
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ModelError(f"Shapes of the model cannot be inferred: {error}") from error
    known = {}
    for value in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            known[value.name] = tuple(dim.dim_value for dim in dims)
    known.update({tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer})
    return known
