"""Let Q/DQ of activations work in ONNX Runtime's blocked layout, without converting there and back.

ONNX Runtime's blocked convolutions (domain ``com.microsoft.nchwc``) keep the channels of an activation in blocks. Its
optimizer does not know that QuantizeLinear and DequantizeLinear with one scale per tensor do not care about the order
of the elements, so it leaves each pair between a ReorderOutput and a ReorderInput. For EfficientNet-B0 these 58
conversions cost about a tenth of the inference. Padding channels hold zeros, and zero quantizes to zero.
"""

from __future__ import annotations

import onnx

from trtdeploy.onnxgraph.qdq import Graph, remove_unused

BLOCKED_DOMAIN = "com.microsoft.nchwc"


def uses_blocked_layout(model: onnx.ModelProto) -> bool:
    """Say whether the graph depends on the block size of the processor that it was optimized on."""
    return any(node.domain == BLOCKED_DOMAIN for node in model.graph.node)


def quantize_in_blocked_layout(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Connect Q/DQ pairs directly to the blocked tensors around them.

    Returns:
        A new model with the same outputs, and the number of Q/DQ pairs that were moved.
    """
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    graph = Graph(moved.graph)
    outputs = {output.name for output in moved.graph.output}
    replacement: dict[str, str] = {}
    count = 0
    for quantize in moved.graph.node:
        if quantize.op_type != "QuantizeLinear" or not _is_symmetric_per_tensor(graph, quantize):
            continue
        reorder = graph.maker(quantize.input[0], "ReorderOutput")
        dequantizers = graph.consumers[quantize.output[0]]
        if reorder is None or not _is_channels_first(reorder) or not dequantizers or quantize.output[0] in outputs:
            continue
        readers = [reader for node in dequantizers for reader in graph.consumers[node.output[0]]]
        if (
            all(node.op_type == "DequantizeLinear" and _is_symmetric_per_tensor(graph, node) for node in dequantizers)
            and all(node.output[0] not in outputs for node in dequantizers)
            and readers
            and all(reader.op_type == "ReorderInput" and _is_channels_first(reader) for reader in readers)
        ):
            quantize.input[0] = reorder.input[0]
            replacement.update((reader.output[0], reader.input[0]) for reader in readers)
            count += 1
    for node in moved.graph.node:
        for index, name in enumerate(node.input):
            if name in replacement:
                node.input[index] = replacement[name]
    remove_unused(moved.graph)
    return moved, count


def _is_symmetric_per_tensor(graph: Graph, node: onnx.NodeProto) -> bool:
    scale = graph.constant(node.input[1])
    if scale is None or scale.size != 1:
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    zero_point = graph.constant(node.input[2])
    return zero_point is not None and not zero_point.any()


def _is_channels_first(reorder: onnx.NodeProto) -> bool:
    return not any(attribute.name == "channels_last" and attribute.i for attribute in reorder.attribute)
