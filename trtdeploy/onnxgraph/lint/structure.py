"""Rules of where Q/DQ stands: around weighted layers, additions, concatenations and activations."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from trtdeploy.onnxgraph.lint.rules import Finding
from trtdeploy.onnxgraph.qdq import WEIGHTED_OPS, Graph, node_name, quantized_nodes

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FUSED = frozenset({"BatchNormalization", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"})


def structure_findings(model: onnx.ModelProto, graph: Graph) -> Iterator[Finding]:
    """Yield what stands in the wrong place, in the order of the nodes; nothing of a model without Q/DQ."""
    weighted = quantized_nodes(model)
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type in WEIGHTED_OPS and node_name(node) in weighted:
            yield from _weighted(graph, node)
        elif node.op_type == "Add":
            yield from _residual(graph, node)
        elif node.op_type == "Concat":
            yield from _concat(graph, node)
        elif node.op_type == "DequantizeLinear":
            yield from _pair(graph, node, outputs)


def _weighted(graph: Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    name = node_name(node)
    quantized = [_dequantize(graph, source) is not None for source in node.input[:2]]
    constant = [_is_constant(graph, source) for source in node.input[:2]]
    if all(quantized) or all(constant):
        return
    if not any(quantized):
        yield Finding("layer-in-float", name, f"{node.op_type} has no Q/DQ on its input and weight")
        return
    bare = node.input[quantized.index(False)]
    if constant[quantized.index(False)]:
        yield Finding("weight-in-float", name, f"the weight {bare!r} of {node.op_type} has no Q/DQ, its input has")
    else:
        yield Finding("input-in-float", name, f"the input {bare!r} of {node.op_type} has no Q/DQ, its weight has")


def _residual(graph: Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    sources = [_quantized_tensor(graph, name) for name in node.input]
    if None in sources or any(_is_constant(graph, name) for name in node.input):
        return
    branches = [source for source in sources if source is not None and _from_convolution(graph, source)]
    if branches:
        yield Finding(
            "both-residual-inputs", node_name(node), f"both inputs have Q/DQ; {branches[0]!r} comes from a convolution"
        )


def _concat(graph: Graph, node: onnx.NodeProto) -> Iterator[Finding]:
    makers = [graph.maker(name, "DequantizeLinear") for name in node.input]
    scales = [graph.constant(maker.input[1]) for maker in makers if maker is not None]
    known = {float(scale.reshape(())) for scale in scales if scale is not None and scale.size == 1}
    if len(known) > 1:
        yield Finding("concat-scales", node_name(node), f"its inputs have the scales {sorted(known)[:4]}")


def _pair(graph: Graph, node: onnx.NodeProto, outputs: set[str]) -> Iterator[Finding]:
    quantize = graph.maker(node.input[0], "QuantizeLinear")
    if quantize is None:
        return
    name, tensor = node_name(node), quantize.input[0]
    before = graph.maker(tensor, "DequantizeLinear")
    if before is not None:
        yield Finding("double-pair", name, f"it quantizes the result of {node_name(before)} again")
    readers = graph.consumers[node.output[0]]
    if node.output[0] in outputs and not readers:
        yield Finding("output-pair", name, f"only the graph output {node.output[0]!r} reads it")
    maker = graph.producer.get(tensor)
    if maker is not None and maker.op_type in _CONVOLUTIONS:
        fused = next((reader for reader in readers if reader.op_type in _FUSED), None)
        if fused is not None:
            reason = f"it stands between {maker.op_type} {node_name(maker)} and {fused.op_type} {node_name(fused)}"
            yield Finding("before-activation", name, reason)


def _dequantize(graph: Graph, name: str) -> onnx.NodeProto | None:
    """Return the DequantizeLinear behind a tensor; torch puts a Transpose between it and a linear layer."""
    maker = graph.producer.get(name)
    while maker is not None and maker.op_type in ("Transpose", "Identity"):
        maker = graph.producer.get(maker.input[0])
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _quantized_tensor(graph: Graph, name: str) -> str | None:
    maker = graph.maker(name, "DequantizeLinear")
    quantize = graph.maker(maker.input[0], "QuantizeLinear") if maker is not None else None
    return quantize.input[0] if quantize is not None else None


def _is_constant(graph: Graph, name: str) -> bool:
    maker = graph.producer.get(name)
    while maker is not None and maker.op_type in ("Transpose", "Identity", "DequantizeLinear", "QuantizeLinear"):
        name = maker.input[0]
        maker = graph.producer.get(name)
    return graph.constant(name) is not None


def _from_convolution(graph: Graph, name: str) -> bool:
    maker = graph.producer.get(name)
    if maker is not None and maker.op_type == "BatchNormalization":
        maker = graph.producer.get(maker.input[0])
    return maker is not None and maker.op_type in _CONVOLUTIONS
