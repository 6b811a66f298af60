"""Dynamic ranges to explicit Q/DQ and back: one form for both of TensorRT's INT8 modes.

The form: one pair per tensor and scale, ``<tensor>/QuantizeLinear`` and ``<tensor>/DequantizeLinear`` with constants
``<tensor>/scale`` and ``<tensor>/zero_point``, right before the first node that reads it. Activations have one scale
per tensor, weights one per output channel, all symmetric INT8.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.dynamic_ranges import INT8_MAX, DynamicRanges
from trtdeploy.onnxgraph.qdq import WEIGHTED_OPS, Graph, fold_weights, node_name, remove_unused
from trtdeploy.tensors import Array

logger = logging.getLogger(__name__)

_OLDEST_OPSET = 13  # the first whose QuantizeLinear has an axis


@dataclass(frozen=True)
class _Pair:
    """How one input of a node is quantized: scale, and the axis if there is one per channel."""

    scale: Array
    axis: int | None

    @property
    def key(self) -> tuple[bytes, int | None]:
        return self.scale.tobytes(), self.axis


_Edge = tuple[int, int]
"""Index of a node in the graph without Q/DQ, and of its input."""


def quantize_with_ranges(model: onnx.ModelProto, ranges: DynamicRanges) -> onnx.ModelProto:
    """Give every weighted layer whose input has a range Q/DQ on input and weights.

    Scales of weights are the largest absolute value per output channel over 127; a channel of zeros gets the smallest
    positive scale that is a normal number, as scales must be positive.

    Returns:
        A new model.

    Raises:
        QuantizationError: The model has Q/DQ already, its opset is too old, or no layer gets any.
    """
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise QuantizationError(
            "The model has Q/DQ already; dynamic ranges would quantize it twice.",
            hint="Leave out --ranges to use its Q/DQ, or give the float model.",
        )
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < _OLDEST_OPSET:
        raise QuantizationError(
            f"The model has opset {opset}; Q/DQ per channel needs {_OLDEST_OPSET} or later.",
            hint="Export it with a newer opset, or convert it: onnx.version_converter.",
        )
    graph = Graph(model.graph)
    edges: dict[_Edge, _Pair] = {}
    left: list[str] = []
    for index, node in enumerate(model.graph.node):
        weight_index = _weight_input(graph, node)
        if weight_index is None:
            continue
        scale = ranges.scales.get(node.input[1 - weight_index])
        if scale is None:
            left.append(node_name(node))
            continue
        weights = graph.constant(node.input[weight_index])
        axis = _output_channel_axis(node, weight_index, weights)
        edges[index, 1 - weight_index] = _Pair(np.float32(scale).reshape(()), None)
        scales = ranges.weight_scales.get(node.input[weight_index])
        edges[index, weight_index] = _Pair(_weight_scales(weights, axis) if scales is None else scales, axis)
    if not edges:
        known = set(graph.producer) | {value.name for value in model.graph.input}
        found = len(known & set(ranges.scales))
        raise QuantizationError(
            f"No layer gets Q/DQ: {found} of {len(ranges.scales)} ranges belong to a tensor of the model, and none "
            "of them to the input of a layer with constant weights.",
            hint="Ranges belong to the model that they were calibrated on; tensor names must match.",
        )
    if left:
        logger.warning("%d layers have no range for their input and stay float: %s", len(left), ", ".join(left[:5]))
    return _insert(model, edges)


def canonical_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same model with its Q/DQ in the form that ``quantize_with_ranges`` makes.

    Scales stay as they are, those of the weights too.

    Raises:
        QuantizationError: A scale is not a constant.
    """
    stripped, edges = _strip(model)
    return _insert(stripped, edges)


def without_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the float model: every Q/DQ pair taken out, and weights that are stored as codes as floats."""
    return _strip(model)[0]


def ranges_of(model: onnx.ModelProto) -> DynamicRanges:
    """Return the ranges of an explicitly quantized model's activations, and of weights that have others than their own.

    Raises:
        QuantizationError: A tensor is quantized with two different scales, or per channel.
    """
    stripped, edges = _strip(model)
    graph = Graph(stripped.graph)
    scales: dict[str, np.float32] = {}
    weight_scales: dict[str, Array] = {}
    for (index, position), pair in edges.items():
        node = stripped.graph.node[index]
        tensor = node.input[position]
        weights = graph.constant(tensor)
        if weights is not None:
            if pair.axis is not None and _weight_input(graph, node) == position:
                natural = _weight_scales(weights, _output_channel_axis(node, position, weights))
                if not np.array_equal(natural, pair.scale):
                    weight_scales[tensor] = pair.scale
            continue
        if pair.axis is not None or pair.scale.size != 1:
            raise QuantizationError(
                f"Tensor {tensor!r} is an activation with a scale per channel; a range is one per tensor."
            )
        scale = np.float32(pair.scale.reshape(()))
        if scales.setdefault(tensor, scale) != scale:
            raise QuantizationError(
                f"Tensor {tensor!r} is quantized with scales {scales[tensor]:g} and {scale:g}; there is room for one.",
                hint="Calibrate it once, with one quantizer for all who read it.",
            )
    return DynamicRanges(scales, weight_scales)


def _weight_input(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Return which input of a weighted layer is its constant weights."""
    if node.op_type not in WEIGHTED_OPS:
        return None
    if graph.constant(node.input[1]) is not None:
        return 1
    if node.op_type in ("Gemm", "MatMul") and graph.constant(node.input[0]) is not None:
        return 0
    return None


def _output_channel_axis(node: onnx.NodeProto, weight_index: int, weights: Array | None) -> int:
    """Return the axis of the weights that counts output channels."""
    rank = 2 if weights is None else weights.ndim
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    name, rows = ("transB", 0) if weight_index == 1 else ("transA", 1)
    transposed = any(attribute.name == name and attribute.i for attribute in node.attribute)
    if node.op_type == "Gemm":
        return rows if transposed else 1 - rows
    return max(rank - 1, 0) if weight_index == 1 else max(rank - 2, 0)


def _weight_scales(weights: Array | None, axis: int) -> Array:
    if weights is None or weights.ndim == 0:
        raise QuantizationError("A layer's weights are a scalar; there is nothing to quantize per channel.")
    others = tuple(index for index in range(weights.ndim) if index != axis)
    amax = np.abs(weights.astype(np.float32)).max(axis=others)
    scales: Array = np.maximum((amax.astype(np.float64) / INT8_MAX).astype(np.float32), np.finfo(np.float32).tiny)
    return scales


def _strip(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[_Edge, _Pair]]:
    """Take all Q/DQ pairs out and say how each edge was quantized."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(_with_float_codes(model))
    graph = Graph(stripped.graph)
    outputs = {output.name for output in stripped.graph.output}
    replaced: dict[str, tuple[str, _Pair]] = {}
    dropped: set[str] = set()
    for node in stripped.graph.node:
        if node.op_type != "DequantizeLinear" or node.output[0] in outputs:
            continue
        quantize = graph.maker(node.input[0], "QuantizeLinear")
        if quantize is None:
            continue
        scale = graph.constant(node.input[1])
        if scale is None:
            raise QuantizationError(f"The scale of {node_name(node)} is computed at run time; it must be a constant.")
        axis = next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), 1)
        replaced[node.output[0]] = (quantize.input[0], _Pair(scale, axis if scale.ndim else None))
        dropped.update((node.output[0], quantize.output[0]))
    kept = [node for node in stripped.graph.node if not any(name in dropped for name in node.output)]
    edges: dict[tuple[str, int], _Pair] = {}
    for node in kept:
        for position, name in enumerate(node.input):
            if name in replaced:
                source, pair = replaced[name]
                while source in replaced:  # a pair behind a pair: the inner one decides
                    source, pair = replaced[source]
                node.input[position] = source
                edges[node.output[0], position] = pair
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del stripped.graph.node[:]
    stripped.graph.node.extend(nodes)
    remove_unused(stripped.graph)
    where = {node.output[0]: index for index, node in enumerate(stripped.graph.node) if node.output}
    return stripped, {(where[output], position): pair for (output, position), pair in edges.items() if output in where}


def _with_float_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn weights that are stored as INT8 codes into float constants behind a Q/DQ pair of the same scale."""
    graph = Graph(model.graph)
    stored = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and graph.constant(node.input[0]) is not None
    ]
    if not stored:
        return model
    folded, _ = fold_weights(_only_dequantizers(model, stored))
    values = {tensor.name: tensor for tensor in folded.graph.initializer}
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        if node.output and node.output[0] in values and node.op_type == "DequantizeLinear":
            source = f"{node.input[0]}/float"
            weights = onnx.TensorProto()
            weights.CopyFrom(values[node.output[0]])
            weights.name = source
            changed.graph.initializer.append(weights)
            quantize = helper.make_node(
                "QuantizeLinear", [source, *node.input[1:]], [f"{source}/codes"], name=f"{source}/QuantizeLinear"
            )
            quantize.attribute.extend(attribute for attribute in node.attribute if attribute.name == "axis")
            nodes.append(quantize)
            node.input[0] = f"{source}/codes"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del changed.graph.node[:]
    changed.graph.node.extend(copies)
    return changed


def _only_dequantizers(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Return a model of these nodes alone, whose outputs are its own."""
    small = onnx.ModelProto()
    small.opset_import.extend(model.opset_import)
    small.graph.initializer.extend(model.graph.initializer)
    small.graph.node.extend(node for node in model.graph.node if node.op_type == "Constant")
    small.graph.node.extend(nodes)
    small.graph.output.extend(helper.make_empty_tensor_value_info(node.output[0]) for node in nodes)
    return small


def _insert(model: onnx.ModelProto, edges: Mapping[_Edge, _Pair]) -> onnx.ModelProto:
    """Put Q/DQ on edges; equal pairs of one tensor are shared."""
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    made: dict[tuple[str, tuple[bytes, int | None]], str] = {}
    per_tensor: dict[str, int] = {}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(quantized.graph.node):
        for position, tensor in enumerate(node.input):
            pair = edges.get((index, position))
            if pair is None:
                continue
            if (tensor, pair.key) not in made:
                count = per_tensor[tensor] = per_tensor.get(tensor, 0) + 1
                prefix = tensor if count == 1 else f"{tensor}/{count}"
                nodes += _make_pair(quantized.graph, tensor, prefix, pair)
                made[tensor, pair.key] = f"{prefix}/dequantized"
            node.input[position] = made[tensor, pair.key]
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del quantized.graph.node[:]
    quantized.graph.node.extend(copies)
    return quantized


def _make_pair(graph: onnx.GraphProto, tensor: str, prefix: str, pair: _Pair) -> list[onnx.NodeProto]:
    scale, zero = f"{prefix}/scale", f"{prefix}/zero_point"
    graph.initializer.append(numpy_helper.from_array(pair.scale, scale))
    graph.initializer.append(numpy_helper.from_array(np.zeros(pair.scale.shape, np.int8), zero))
    attributes: dict[str, Any] = {} if pair.axis is None else {"axis": pair.axis}
    codes = f"{prefix}/quantized"
    return [
        helper.make_node(
            "QuantizeLinear", [tensor, scale, zero], [codes], name=f"{prefix}/QuantizeLinear", **attributes
        ),
        helper.make_node(
            "DequantizeLinear",
            [codes, scale, zero],
            [f"{prefix}/dequantized"],
            name=f"{prefix}/DequantizeLinear",
            **attributes,
        ),
    ]
