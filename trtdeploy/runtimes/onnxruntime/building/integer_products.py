"""Layers that are matrix products, on INT8 codes with a float result.

Where TensorRT wants Q/DQ, the result of a convolution has none, so ONNX Runtime, whose integer convolution gives codes,
leaves it in float. A convolution of 1x1 and a linear layer are matrix products, and for these it has a kernel that
takes codes and gives floats, ``com.microsoft.MatMulIntegerToFloat``: exact sums of integers, multiplied by both scales.
For EfficientNet-B0 these are 64 of 81 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.onnxgraph.graph import Graph, int_attribute, quantized_constant, remove_unused, unused
from trtdeploy.onnxgraph.qdq.int8_scales import channel_axis
from trtdeploy.onnxgraph.qdq.pairs import Pair, pairs
from trtdeploy.tensors import Array

CONTRIB_DOMAIN = "com.microsoft"
INTEGER_PRODUCT = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class _Product:
    """A layer as a matrix product.

    Attributes:
        given: The DequantizeLinear of its input.
        codes: Of its weight, (channels in, channels out).
        scale: Of each output channel of the weight, with that of batch norm.
        bias: Float, with that of batch norm.
        spatial: Dimensions of an image, between batch and channels; 0 where the channels are last anyway.
        result: The tensor that it makes.
        norm: The batch norm that is taken in.
    """

    given: onnx.NodeProto
    codes: Array
    scale: Array
    bias: Array
    spatial: int
    result: str
    norm: onnx.NodeProto | None


def multiply_codes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Replace every 1x1 convolution, Gemm and MatMul between Q/DQ of input and constant weight, with its batch norm.

    Returns:
        A new model, and the number of layers that were replaced.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed.graph)
    quantized = {pair.dequantize.output[0]: pair for pair in pairs(graph)}
    used = {name for node in changed.graph.node for name in [node.name, *node.input, *node.output]}
    used.update(tensor.name for tensor in changed.graph.initializer)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    norms: set[str] = set()
    count = 0
    for node in changed.graph.node:
        product = _product(graph, node, quantized)
        if product is not None:
            made, weights = _written(product, node.output[0], used)
            nodes += made
            constants += weights
            count += 1
            if product.norm is not None:
                norms.add(product.norm.output[0])
        elif not norms.intersection(node.output):
            nodes.append(node)
    if not count:
        return changed, 0
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    changed.graph.initializer.extend(constants)
    if all(entry.domain != CONTRIB_DOMAIN for entry in changed.opset_import):
        changed.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    remove_unused(changed.graph)
    return changed, count


def _product(graph: Graph, node: onnx.NodeProto, quantized: Mapping[str, Pair]) -> _Product | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    given, weight = quantized.get(node.input[0]), quantized.get(node.input[1])
    if given is None or given.is_constant or weight is None or not weight.is_constant or weight.quantizer is None:
        return None
    given_scale = graph.constant(given.dequantize.input[1])
    if given_scale is None or given_scale.size != 1:
        return None
    codes = _codes(graph, weight)
    if codes is None or not (_is_pointwise(node, codes) if node.op_type == "Conv" else _is_plain(node, codes)):
        return None
    axis = channel_axis(node, 1, codes.ndim)
    if axis is None or weight.quantizer.axis not in (None, axis):
        return None
    channels = codes.shape[axis]
    bias = np.zeros(channels, np.float32)
    if len(node.input) > 2 and node.input[2]:
        found = graph.constant(node.input[2])
        if found is None or found.dtype != np.float32 or found.size not in (1, channels):
            return None
        bias = np.broadcast_to(found.ravel(), channels)
    scale = np.broadcast_to(weight.quantizer.scale.ravel(), channels)
    norm = _norm_behind(graph, node) if node.op_type == "Conv" else None
    if norm is not None:
        scale, bias = _with_norm(graph, norm, scale, bias)
    matrix = codes.reshape(channels, -1).T if axis == 0 else codes
    return _Product(
        given=given.dequantize,
        codes=np.ascontiguousarray(matrix),
        scale=np.ascontiguousarray(scale, np.float32),
        bias=np.ascontiguousarray(bias, np.float32),
        spatial=codes.ndim - 2 if node.op_type == "Conv" else 0,
        result=(norm or node).output[0],
        norm=norm,
    )


def _codes(graph: Graph, weight: Pair) -> Array | None:
    if weight.quantize is not None:
        return quantized_constant(graph, weight.quantize)
    return graph.constant(weight.dequantize.input[0])


def _is_pointwise(node: onnx.NodeProto, codes: Array) -> bool:
    listed = {entry.name: list(entry.ints) for entry in node.attribute}
    return (
        codes.ndim > 2
        and all(size == 1 for size in codes.shape[2:])
        and all(step == 1 for step in listed.get("strides", ()))
        and not any(listed.get("pads", ()))
        and int_attribute(node, "group", 1) == 1
    )


def _is_plain(node: onnx.NodeProto, codes: Array) -> bool:
    factors = [entry.f for entry in node.attribute if entry.name in ("alpha", "beta")]
    return codes.ndim == 2 and not int_attribute(node, "transA", 0) and all(factor == 1 for factor in factors)


def _norm_behind(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the batch norm that alone reads a node's result, if its constants are known."""
    readers = graph.consumers[node.output[0]]
    if len(readers) != 1 or readers[0].op_type != "BatchNormalization" or len(readers[0].output) != 1:
        return None
    if node.output[0] in {output.name for output in graph.graph.output}:
        return None
    constants = [graph.constant(name) for name in readers[0].input[1:]]
    return readers[0] if all(values is not None for values in constants) else None


def _with_norm(graph: Graph, norm: onnx.NodeProto, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Return scale and bias that do what batch norm does behind them; https://arxiv.org/abs/1502.03167, algorithm 1."""
    values = [graph.constant(name) for name in norm.input[1:]]
    gamma, beta, mean, variance = (np.asarray(each, np.float64) for each in values)
    epsilon = next((entry.f for entry in norm.attribute if entry.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    return scale * factor, (bias - mean) * factor + beta


def _written(product: _Product, stem: str, used: set[str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    names = {
        part: unused(f"{stem}.{part}", used) for part in ("codes", "scale", "bias", "channels_last", "product", "node")
    }
    constants = [
        numpy_helper.from_array(values, names[part])
        for part, values in (("codes", product.codes), ("scale", product.scale), ("bias", product.bias))
    ]
    return list(_nodes(product, names)), constants


def _nodes(product: _Product, names: Mapping[str, str]) -> Iterator[onnx.NodeProto]:
    given, zero_point = product.given.input[0], product.given.input[2] if len(product.given.input) > 2 else ""
    space = list(range(product.spatial))
    if space:
        to_last = [0, *(2 + each for each in space), 1]
        yield helper.make_node("Transpose", [given], [names["channels_last"]], perm=to_last)
        given = names["channels_last"]
    yield helper.make_node(
        INTEGER_PRODUCT,
        [given, names["codes"], product.given.input[1], names["scale"], zero_point, "", names["bias"]],
        [names["product"] if space else product.result],
        name=names["node"],
        domain=CONTRIB_DOMAIN,
    )
    if space:
        to_first = [0, 1 + product.spatial, *(1 + each for each in space)]
        yield helper.make_node("Transpose", [names["product"]], [product.result], perm=to_first)
