"""How much of a network's work each weighted layer does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx

from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.qdq import WEIGHTED_OPS, node_name, quantized_nodes

Shape = tuple[int, ...]


def macs_by_node(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the multiply-accumulates of every layer with constant weights, by node name, for one execution.

    Each output value of a Conv sums over ``C/group * kernel`` products, each of a Gemm or MatMul over K; each input
    value of a ConvTranspose is multiplied with ``M/group * kernel`` weights. Source: the definitions in
    https://onnx.ai/onnx/operators/; padding counts as work, biases do not. A node without a name has that of its
    first output.

    Args:
        model: The model, with or without Q/DQ.
        shapes: Shape of every input whose shape the model leaves open.

    Raises:
        ModelError: The shapes do not fit the model, or do not tell the size of some layer; the message names it.
    """
    sizes = _inferred_shapes(model, shapes)
    weighted = quantized_nodes(model)
    return {
        node_name(node): _macs(node, sizes)
        for node in model.graph.node
        if node.op_type in WEIGHTED_OPS and node_name(node) in weighted
    }


def _macs(node: onnx.NodeProto, sizes: Mapping[str, Shape]) -> int:
    names = [*node.input[:2], node.output[0]]
    unknown = [name for name in names if name not in sizes]
    if unknown:
        raise ModelError(
            f"The multiply-accumulates of {node.op_type} {node_name(node)} cannot be counted: the shape of "
            f"{unknown[0]!r} cannot be inferred.",
            hint="Give the shapes of all inputs; a shape that depends on data cannot be counted.",
        )
    first, second, output = (sizes[name] for name in names)
    if node.op_type == "Conv":
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":  # A is (M, K), or transposed, and M the output's rows
        return math.prod(output) * math.prod(first) // max(output[0], 1)
    return math.prod(output) * first[-1]


def _inferred_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    graph = fixed.graph
    # What the file says of inner shapes has open sizes, and inference would keep them open.
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    inputs = {value.name: value for value in graph.input}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ModelError(f"The model has no input {name!r}; its inputs are {', '.join(inputs)}.")
        _fix_input(inputs[name], shape)
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"These input shapes do not fit the model: {dict(shapes)}: {error}") from error
    sizes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(size.HasField("dim_value") for size in tensor.shape.dim):
            sizes[value.name] = tuple(size.dim_value for size in tensor.shape.dim)
    return sizes


def _fix_input(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    tensor = value.type.tensor_type
    declared = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    fits = not tensor.HasField("shape") or (
        len(declared) == len(shape)
        and all(known in (None, given) for known, given in zip(declared, shape, strict=True))
    )
    if not fits or any(size < 0 for size in shape):
        raise ModelError(
            f"Input {value.name!r} cannot have the shape {list(shape)}; the model declares "
            f"{[known if known is not None else '?' for known in declared]}."
        )
    tensor.ClearField("shape")
    tensor.shape.SetInParent()
    for size in shape:
        tensor.shape.dim.add().dim_value = size
