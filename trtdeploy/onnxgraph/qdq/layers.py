"""Layers with weights: the Q/DQ that input and weights of each come through, or why it is in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from trtdeploy.onnxgraph.graph import ONNX_DOMAINS, WEIGHTED_OPS, Graph, node_name
from trtdeploy.onnxgraph.qdq.quantized_types import asked_type

MOVES = frozenset({"Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Ops that only move values; TensorRT takes Q/DQ across them ("Q/DQ propagation" in its developer guide)."""

_OTHER_WEIGHTED_OPS = {"Einsum": (0, 1), "DeformConv": (1,), "RNN": (1, 2), "LSTM": (1, 2), "GRU": (1, 2)}
"""Ops that multiply with weights, too, and where these may stand; neither TensorRT nor our rules quantize them."""


@dataclass(frozen=True)
class Layer:
    """A node that multiplies what the network computes with constant weights.

    Attributes:
        name: Its name; see ``node_name``.
        node: The node.
        weights: Which of its inputs the weights are.
        input_pair: The DequantizeLinear that its input comes from, if any, perhaps through ops that only move values.
        weight_pair: The same for its weights.
        asked_for: The type that Q/DQ asks it to compute in: ``int8``, ``fp8`` ... where its input and weights come
            through Q/DQ, ``int4 weight-only`` where its weights alone do; None for float.
        left_float: Why it is not quantized; empty if it is.
    """

    name: str
    node: onnx.NodeProto
    weights: int
    input_pair: onnx.NodeProto | None
    weight_pair: onnx.NodeProto | None
    asked_for: str | None
    left_float: str

    @property
    def is_quantized(self) -> bool:
        """Whether both its input and its weights come through Q/DQ."""
        return not self.left_float


@dataclass(frozen=True)
class QuantizationCount:
    """How much of a graph is quantized.

    Attributes:
        weighted_layers: Layers with constant weights.
        quantized_layers: Those of them whose input and weights are both quantized.
        pairs: DequantizeLinear nodes, those of other layers among them.
        asked: The layers by the type that is asked of them; ``float`` for none.
    """

    weighted_layers: int
    quantized_layers: int
    pairs: int
    asked: Mapping[str, int]


def count_quantized(model: onnx.ModelProto) -> QuantizationCount:
    """Count layers with constant weights, those of them that Q/DQ quantizes, and all DequantizeLinear nodes."""
    found = weighted_layers(model)
    pairs = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
    asked = Counter(layer.asked_for or "float" for layer in found)
    return QuantizationCount(len(found), sum(layer.is_quantized for layer in found), pairs, dict(asked))


def asked_types(model: onnx.ModelProto) -> dict[str, str | None]:
    """Return what Q/DQ asks every layer with constant weights to compute in, by node name; None for float."""
    return {layer.name: layer.asked_for for layer in weighted_layers(model)}


def quantized_nodes(model: onnx.ModelProto) -> dict[str, bool]:
    """Return every layer with constant weights, by node name, and whether Q/DQ is on its input and its weights."""
    return {layer.name: layer.is_quantized for layer in weighted_layers(model)}


def left_in_float(model: onnx.ModelProto) -> dict[str, str]:
    """Return why a layer with constant weights is not quantized, by node name."""
    return {layer.name: layer.left_float for layer in weighted_layers(model) if layer.left_float}


def weighted_layers(model: onnx.ModelProto) -> list[Layer]:
    """Return every layer with constant weights, in the order of the nodes.

    Weights are what depends on constants alone, through whatever ops, Q/DQ among them. A product of two constants is
    no layer: it is computed once. Weights that several layers share are weights of each. Bodies of If, Loop and Scan
    are not looked into.
    """
    graph = Graph(model.graph)
    return [_layer(graph, node, weights) for node, weights in _with_weights(model.graph, graph.constants)]


def pair_before(graph: Graph, tensor: str) -> tuple[onnx.NodeProto | None, onnx.NodeProto | None]:
    """Return the DequantizeLinear that a tensor comes from through ops that only move values.

    Returns:
        That node, or None and the node at which the search has ended, if there is one.
    """
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in MOVES and node.input:
        node = graph.producer.get(node.input[0])
    return (node, None) if node is not None and node.op_type == "DequantizeLinear" else (None, node)


def _with_weights(graph: onnx.GraphProto, constants: set[str]) -> Iterator[tuple[onnx.NodeProto, int]]:
    for node in graph.node:
        if node.domain not in ONNX_DOMAINS or all(name in constants for name in node.input if name):
            continue
        places = (0, 1) if node.op_type in WEIGHTED_OPS else _OTHER_WEIGHTED_OPS.get(node.op_type, ())
        weights = [place for place in places if place < len(node.input) and node.input[place] in constants]
        others = [place for place in (0, 1) if place < len(node.input) and node.input[place] not in constants]
        if weights and others:
            yield node, weights[0]


def _layer(graph: Graph, node: onnx.NodeProto, weights: int) -> Layer:
    of_weights, stopped = pair_before(graph, node.input[weights])
    of_input, _ = pair_before(graph, node.input[1 - weights if weights < 2 else 0])
    if node.op_type not in WEIGHTED_OPS:
        reason = f"{node.op_type} has no explicit INT8"
    elif of_weights is not None:
        reason = "" if of_input is not None else "its weights have Q/DQ and its input has none"
    elif stopped is not None and any(_reaches_pair(graph, name) for name in stopped.input):
        reason = f"{stopped.op_type} {node_name(stopped)} stands between its weights and their Q/DQ"
    elif of_input is not None:
        reason = "its input has Q/DQ and its weights have none"
    else:
        reason = "neither its input nor its weights have Q/DQ"
    asked = asked_type(graph, of_input, of_weights) if node.op_type in WEIGHTED_OPS else None
    return Layer(node_name(node), node, weights, of_input, of_weights, asked, reason)


def _reaches_pair(graph: Graph, tensor: str) -> bool:
    """Say whether a constant tensor comes from Q/DQ, through whatever ops."""
    ahead, seen = [tensor], {tensor}
    while ahead:
        node = graph.producer.get(ahead.pop())
        if node is None:
            continue
        if node.op_type == "DequantizeLinear":
            return True
        ahead += [name for name in node.input if name not in seen]
        seen.update(node.input)
    return False
