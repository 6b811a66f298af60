"""The float graph behind a graph with Q/DQ, and which inputs of its nodes Q/DQ stands before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph
from trtdeploy.onnxgraph.qdq.layers import MOVES
from trtdeploy.onnxgraph.qdq.pairs import Site

_SMALL_BYTES = 4096
"""What is larger is a weight, whose values no rule of placement reads."""


@dataclass(frozen=True)
class Quantized:
    """What a site reads through Q/DQ.

    Attributes:
        tensor: The float tensor.
        dequantize: The last DequantizeLinear before the site.
    """

    tensor: str
    dequantize: onnx.NodeProto


@dataclass(frozen=True)
class FloatView:
    """A graph without its Q/DQ. Weights have lost their values; the original graph is not changed.

    Attributes:
        model: The float graph.
        graph: Look-ups over it.
        sites: The inputs that Q/DQ stands before. What only moves a constant, as the Transpose that torch puts between
            the weight of a linear layer and its MatMul, is folded, so that the site is the layer's; what only moves
            an activation between Q/DQ and a layer with weights stays, and the site is the layer's, too.
    """

    model: onnx.ModelProto
    graph: Graph
    sites: dict[Site, Quantized]


def _has_other_readers(graph: Graph, quantize: onnx.NodeProto) -> bool:
    return any(reader.op_type != "DequantizeLinear" for reader in graph.consumers[quantize.output[0]])


def float_view(model: onnx.ModelProto, graph: Graph) -> FloatView:
    """Look through the Q/DQ of a model.

    A DequantizeLinear whose codes come from something else than a QuantizeLinear or a constant stays as it is.
    """
    outputs = {output.name for output in model.graph.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    source: dict[str, str] = {}
    through: dict[str, Quantized] = {}
    moved: dict[str, Quantized] = {}
    stubs: set[str] = set()
    nodes: list[onnx.NodeProto] = []
    sites: dict[Site, Quantized] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            quantize = graph.maker(node.input[0], "QuantizeLinear")
            read, name = (node.input[0] if quantize is None else quantize.input[0]), node.output[0]
            if quantize is not None or read in constants:
                tensor = source.get(read, read) if quantize is not None else name
                source[name], through[name] = tensor, Quantized(tensor, node)
                if quantize is None:
                    stubs.add(name)
                    constants.add(name)
                continue
            through[name] = Quantized(name, node)
        elif node.op_type == "QuantizeLinear" and not _has_other_readers(graph, node):
            continue
        elif node.op_type in MOVES:
            read, name = node.input[0], node.output[0]
            tensor = source.get(read, read)
            if tensor in constants or (node.op_type == "Identity" and name not in outputs):
                if read in through:
                    through[name] = through[read]
                if node.op_type == "Identity":
                    source[name] = tensor
                else:
                    stubs.add(name)
                if tensor in constants:
                    constants.add(name)
                continue
            quantized = through.get(read, moved.get(read))
            if quantized is not None:
                moved[name] = quantized
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for position, read in enumerate(node.input):
            quantized = through.get(read)
            if quantized is None and node.op_type in WEIGHTED_OPS:
                quantized = moved.get(read)
            if quantized is not None and node.output and node.output[0]:
                sites[node.output[0], position] = quantized
            copy.input[position] = source.get(read, read)
        nodes.append(copy)
    view = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    view.graph.name = model.graph.name
    view.graph.node.extend(nodes)
    view.graph.input.extend(model.graph.input)
    view.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SMALL_BYTES:
            view.graph.initializer.append(tensor)
        else:
            stubs.add(tensor.name)
    view.graph.initializer.extend(numpy_helper.from_array(np.zeros((), np.float32), name) for name in sorted(stubs))
    return FloatView(view, Graph(view.graph), sites)
