"""Let Q/DQ of activations work in ONNX Runtime's blocked layout, without converting there and back.

ONNX Runtime's blocked convolutions (domain ``com.microsoft.nchwc``) keep the channels of an activation in blocks. Its
optimizer does not know that QuantizeLinear and DequantizeLinear with one scale per tensor do not care about the order
of the elements, so it leaves each pair between a ReorderOutput and a ReorderInput. For EfficientNet-B0 these 58
conversions cost about a tenth of the inference. The same holds for the additions and activations between pairs, and for
what stands between a tensor whose channels come last and a blocked convolution: ReorderInput reads that order, too.

Padding channels hold zeros: zero has the zero-point for its code, which stands for zero again, and what is added or
activated here keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from trtdeploy.onnxgraph.graph import Graph, remove_unused

BLOCKED_DOMAIN = "com.microsoft.nchwc"
_ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "HardSwish", "QuickGelu"})
"""Of one input, which give 0 for 0."""

Shape = tuple[int | str, ...]


def uses_blocked_layout(model: onnx.ModelProto) -> bool:
    """Say whether the graph depends on the block size of the processor that it was optimized on."""
    return any(node.domain == BLOCKED_DOMAIN for node in model.graph.node)


def known_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of every tensor that ONNX's shape inference knows in full; sizes may have names.

    Of a model that it refuses, none.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError:
        return {}
    shapes: dict[str, Shape] = {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        sizes = tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        if sizes and all(sizes):
            shapes[value.name] = sizes
    return shapes


def quantize_in_blocked_layout(
    model: onnx.ModelProto, shapes: Mapping[str, Shape] | None = None
) -> tuple[onnx.ModelProto, int]:
    """Connect Q/DQ pairs, and what stands between them, directly to the blocked tensors around them.

    Args:
        model: As ONNX Runtime's optimizer leaves it.
        shapes: Of its tensors. An addition is moved only if both of its inputs are known to have one shape.

    Returns:
        A new model with the same outputs, and the number of Q/DQ pairs that were moved.
    """
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    graph = Graph(moved.graph)
    blocked = {
        node.output[0]: node.input[0]
        for node in moved.graph.node
        if node.op_type == "ReorderOutput" and _is_channels_first(node)
    }
    kept, ends = _connect(graph, blocked, shapes or {})
    replacement = {end.output[0]: end.input[0] for end in ends}
    for node in moved.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = replacement.get(name, name)
    remove_unused(moved.graph)
    return moved, sum(node.op_type == "QuantizeLinear" for node in kept)


def read_channels_last(model: onnx.ModelProto, shapes: Mapping[str, Shape] | None = None) -> onnx.ModelProto:
    """Return a new model in which ReorderInput takes channels from the end, where a Transpose would bring them forward.

    Args:
        model: As ONNX Runtime's optimizer leaves it.
        shapes: As in ``quantize_in_blocked_layout``.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = Graph(changed.graph)
    last = {
        node.output[0]: node.input[0]
        for node in changed.graph.node
        if node.op_type == "Transpose" and _permutation(node) == [0, 3, 1, 2]
    }
    for end in _connect(graph, last, shapes or {})[1]:
        del end.attribute[:]
        end.attribute.append(helper.make_attribute("channels_last", 1))
    remove_unused(changed.graph)
    return changed


def _connect(
    graph: Graph, elsewhere: Mapping[str, str], shapes: Mapping[str, Shape]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Let nodes that do not care for the order of the elements read tensors as they are before a change of layout.

    Args:
        graph: Is changed.
        elsewhere: The results of the changes of layout, and what they are given.
        shapes: Of tensors.

    Returns:
        Those nodes, and every ReorderInput that reads what they give.
    """
    kept = _kept(graph, _movable(graph, elsewhere, shapes))
    ends = []
    for node in kept.values():
        for index, name in enumerate(node.input):
            node.input[index] = elsewhere.get(name, name)
        ends += [reader for reader in graph.consumers[node.output[0]] if reader.op_type == "ReorderInput"]
    return list(kept.values()), ends


def _movable(graph: Graph, elsewhere: Mapping[str, str], shapes: Mapping[str, Shape]) -> dict[str, onnx.NodeProto]:
    """Return the nodes, by output, that could read tensors of the other layout and give one."""
    shape: dict[str, Shape | None] = {name: shapes.get(name) for name in elsewhere}
    movable: dict[str, onnx.NodeProto] = {}
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            fits = node.input[0] in shape and _is_per_tensor(graph, node)
        elif node.op_type == "Add":
            given = [shape.get(name) for name in node.input]
            fits = all(name in shape for name in node.input) and given[0] is not None and given[0] == given[1]
        else:
            fits = node.op_type in _ELEMENTWISE and node.input[0] in shape
        if fits:
            movable[node.output[0]] = node
            shape[node.output[0]] = shape[node.input[0]]
    return movable


def _kept(graph: Graph, movable: Mapping[str, onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """Return those whose result nobody needs in the plain layout, and whose inputs all have the other one then."""
    outputs = {output.name for output in graph.graph.output}
    kept = dict(movable)

    def belongs(name: str, node: onnx.NodeProto) -> bool:
        readers = graph.consumers[name]
        lost = [read for read in node.input if read in movable and read not in kept]
        return (
            name not in outputs
            and not lost
            and bool(readers)
            and all(
                (reader.op_type == "ReorderInput" and _is_channels_first(reader))
                or (bool(reader.output) and kept.get(reader.output[0]) is reader)
                for reader in readers
            )
        )

    while refused := [name for name, node in kept.items() if not belongs(name, node)]:
        for name in refused:
            del kept[name]
    return kept


def _is_per_tensor(graph: Graph, node: onnx.NodeProto) -> bool:
    scale = graph.constant(node.input[1])
    return scale is not None and scale.size == 1


def _permutation(transpose: onnx.NodeProto) -> list[int]:
    return next((list(entry.ints) for entry in transpose.attribute if entry.name == "perm"), [])


def _is_channels_first(reorder: onnx.NodeProto) -> bool:
    return not any(attribute.name == "channels_last" and attribute.i for attribute in reorder.attribute)
