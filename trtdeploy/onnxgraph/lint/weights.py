"""Rules of a layer's weight: its scales beside the bias, and the axis of a ConvTranspose's scales."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, int_attribute, node_name
from trtdeploy.onnxgraph.lint.float_view import FloatView, Quantized
from trtdeploy.onnxgraph.lint.rules import Finding
from trtdeploy.onnxgraph.qdq.int8_scales import is_too_small, smallest_beside_bias
from trtdeploy.tensors import Array


def weight_findings(graph: Graph, view: FloatView) -> Iterator[Finding]:
    """Yield what is wrong with the weights of layers whose input and weight have Q/DQ.

    Args:
        graph: The graph with its Q/DQ.
        view: The float graph behind it.
    """
    for node in view.model.graph.node:
        if node.op_type not in WEIGHTED_OPS or not node.output:
            continue
        for position in (0, 1):
            read = view.sites.get((node.output[0], position))
            weight = None if read is None else _weight(graph, read)
            if read is None or weight is None:
                continue
            scale = graph.constant(read.dequantize.input[1])
            if scale is None or scale.dtype.kind != "f":
                continue
            if node.op_type == "ConvTranspose" and scale.size > 1:
                axis = int_attribute(read.dequantize, "axis", 1)
                reason = f"its weight has {scale.size} scales along axis {axis}"
                yield Finding("transposed-axis", node_name(node), reason)
            given = view.sites.get((node.output[0], 1 - position))
            input_scale = None if given is None else graph.constant(given.dequantize.input[1])
            original = graph.producer[node.output[0]]
            if input_scale is not None and input_scale.dtype.kind == "f":
                yield from _without_room(graph, original, position, weight.ndim, scale, input_scale)


def _without_room(
    graph: Graph, node: onnx.NodeProto, position: int, rank: int, scale: Array, input_scale: Array
) -> Iterator[Finding]:
    if scale.ndim > 1 or not (scale > 0).all() or not (input_scale > 0).all():
        return  # an error of its own, or blocks, whose sums stay in float
    smallest = smallest_beside_bias(graph, node, position, rank, scale.astype(np.float64), input_scale)
    if smallest is None:
        return
    small = is_too_small(scale.astype(np.float64), smallest)
    if small.any():
        least = float(np.max(smallest[small]))
        yield Finding(
            "bias-overflow",
            node_name(node),
            f"{int(small.sum())} of {scale.size} scales of its weight leave its bias no room in INT32; they should be "
            f"{least:.3g} or so",
        )


def _weight(graph: Graph, read: Quantized) -> Array | None:
    """Return the constant behind Q/DQ, floats or codes."""
    source = read.dequantize.input[0]
    quantize = graph.maker(source, "QuantizeLinear")
    return graph.constant(source if quantize is None else quantize.input[0])
