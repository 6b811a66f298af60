"""How much of a network's work each weighted layer does."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir

from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.qdq.layers import weighted_layers
from trtdeploy.onnxgraph.reading.constant_folding import fold_constants
from trtdeploy.onnxgraph.tensor_types import without_weights

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

_BY_OUTPUT = frozenset({"Conv", "DeformConv", "Gemm", "MatMul"})
"""Ops whose work the size of the output tells."""


def macs_by_node(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the multiply-accumulates of every layer with constant weights, by node name, for one execution.

    Each output value of a Conv sums over ``C/group * kernel`` products, each of a Gemm or MatMul over K; each input
    value of a ConvTranspose is multiplied with ``M/group * kernel`` weights; an RNN, LSTM or GRU multiplies all of its
    weights at every step, and an Einsum sums over all of its indices. Source: the definitions in
    https://onnx.ai/onnx/operators/; padding counts as work, biases do not. A node without a name has that of its
    first output.

    Args:
        model: The model, with or without Q/DQ.
        shapes: Shape of every input whose shape the model leaves open.

    Raises:
        ModelError: The shapes do not fit the model, or do not tell the size of some layer; the message names it.
    """
    sizes = _inferred_shapes(model, shapes)
    return {layer.name: _macs(layer.node, layer.name, sizes) for layer in weighted_layers(model)}


def relative_work(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the multiply-accumulates of every layer, or 1 for each where the shapes do not tell them."""
    try:
        return macs_by_node(model, shapes)
    except ModelError as error:
        logger.info("layers are counted, not multiply-accumulates: %s", error)
        return {layer.name: 1 for layer in weighted_layers(model)}


def _macs(node: onnx.NodeProto, name: str, sizes: Mapping[str, Shape]) -> int:
    read = node.input[:3] if node.op_type in ("RNN", "LSTM", "GRU") else node.input[:2]
    if node.op_type == "Einsum":
        read = node.input
    names = [*read, node.output[0]] if node.op_type in _BY_OUTPUT else list(read)
    unknown = [each for each in names if each not in sizes]
    if unknown:
        raise ModelError(
            f"The multiply-accumulates of {node.op_type} {name} cannot be counted: the shape of "
            f"{unknown[0]!r} cannot be inferred.",
            hint="Give the shapes of all inputs; a shape that depends on data cannot be counted.",
        )
    if node.op_type == "Einsum":
        return _of_einsum(node, [sizes[each] for each in names])
    first, second = sizes[names[0]], sizes[names[1]]
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type not in _BY_OUTPUT:  # (steps, batch, inputs), or (batch, steps, inputs): both weights at every step
        return math.prod(first[:2]) * (math.prod(second) + math.prod(sizes[names[2]]))
    output = sizes[names[2]]
    if node.op_type in ("Conv", "DeformConv"):
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "Gemm":  # A is (M, K), or transposed, and M the output's rows
        return math.prod(output) * math.prod(first) // max(output[0], 1)
    return math.prod(output) * first[-1]


def _of_einsum(node: onnx.NodeProto, shapes: Sequence[Shape]) -> int:
    """Return the product of the sizes of all indices; those of an ellipsis count, too."""
    equation = next(entry.s.decode() for entry in node.attribute if entry.name == "equation").replace(" ", "")
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.split("->")[0].split(","), shapes, strict=True):
        before, dots, behind = term.partition("...")
        hidden = [f"...{place}" for place in reversed(range(len(shape) - len(before) - len(behind)))] if dots else []
        for index, size in zip([*before, *hidden, *behind], shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))  # sizes of 1 are broadcast
    return math.prod(sizes.values())


def _inferred_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    fixed = without_weights(model)
    # What the file says of inner shapes has open sizes, and inference would keep them open.
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        nodes = ir.from_proto(fixed)
        if fold_constants(nodes, everywhere=True):  # such as the widths of a Pad, which torch computes
            fixed = ir.to_proto(nodes)
    except ir.serde.SerdeError as error:
        raise ModelError(f"The model's shapes cannot be inferred: {error}") from error
    inputs = {value.name: value for value in fixed.graph.input}
    given = [value.name for value in model.graph.input]
    for name, shape in shapes.items():
        if name not in given:
            raise ModelError(f"The model has no input {name!r}; its inputs are {', '.join(given)}.")
        _fix_input(inputs[name], shape)
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"These input shapes do not fit the model: {dict(shapes)}: {error}") from error
    sizes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in fixed.graph.initializer}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(size.HasField("dim_value") for size in tensor.shape.dim):
            sizes[value.name] = tuple(size.dim_value for size in tensor.shape.dim)
    return sizes


def _fix_input(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    tensor = value.type.tensor_type
    # some exporters write -1 for an open size
    declared = [
        size.dim_value if size.HasField("dim_value") and size.dim_value >= 0 else None for size in tensor.shape.dim
    ]
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
