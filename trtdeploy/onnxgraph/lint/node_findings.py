"""Rules of a single QuantizeLinear or DequantizeLinear: codes, scales and axis.

Sources: IQuantizeLayer in TensorRT's NvInfer.h (symmetric only, scales strictly positive, per channel for weights
only), and what TensorRT-RTX's parser does: UINT8 codes are silently taken as INT8; per-channel scales of activations
and scales computed at run time are not refused when the plan is built.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, int_attribute, node_name
from trtdeploy.onnxgraph.qdq.int8_scales import channel_axis
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import LOWEST_OPSET
from trtdeploy.tensors import Array

_CODES = frozenset({"int8", "float8_e4m3fn", "int4", "float4_e2m1fn"})
"""What TensorRT quantizes to: "Working with Quantized Types" in its guide; numpy's and ml_dtypes' names. FP8, INT4 and
FP4 have rules of their own, and TensorRT's parser knows them."""


def linear_findings(graph: Graph, node: onnx.NodeProto, opset: int) -> Iterator[tuple[str, str]]:
    """Yield rule and reason for a QuantizeLinear or DequantizeLinear.

    Raises:
        ModelError: Its scale or zero-point are strings.
    """
    for name in node.input[1:]:
        values = graph.constant(name)
        if values is not None and values.dtype.kind in "OSU":
            raise ModelError(f"{node.op_type} {node_name(node)} reads {name!r}, which holds strings and no numbers.")
    yield from _codes(graph, node)
    scale = graph.constant(node.input[1])
    if scale is None:
        yield "run-time-scale", f"its scale {node.input[1]!r} is not a constant of the graph"
        return
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    if bad.size:
        yield (
            "scale-value",
            f"{bad.size} of {scale.size} scales are not finite and positive: {bad.ravel()[:3].tolist()}",
        )
    block = int_attribute(node, "block_size", 0)
    if block:
        yield from _per_block(graph, node, scale, block)
    elif scale.size != 1:
        yield from _per_channel(graph, node, scale, opset)


def _codes(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with zero-point and type of the codes."""
    if len(node.input) > 2 and node.input[2]:
        zero_point = graph.constant(node.input[2])
        if zero_point is None:
            yield "zero-point", f"its zero-point {node.input[2]!r} is not a constant of the graph"
            return
        if zero_point.astype(np.float32).any():
            yield "zero-point", f"its zero-point is not 0: {zero_point.ravel()[:3].tolist()}"
        code_type = str(zero_point.dtype)
    elif node.op_type == "QuantizeLinear":
        # since opset 21 an attribute says the type where no zero-point does; without either it is UINT8
        code_type = _name_of_type(int_attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8)
    else:
        code_type = _type_of_codes(graph, node.input[0])
    if code_type and code_type not in _CODES:
        silently = ", which TensorRT silently takes as INT8" if code_type == "uint8" else ""
        yield "code-type", f"its codes are {code_type.upper()}{silently}"
    elif node.op_type == "QuantizeLinear" and code_type.startswith("float") and not int_attribute(node, "saturate", 1):
        yield "code-type", f"its codes are {code_type.upper()} that do not saturate, and TensorRT's do"


def _type_of_codes(graph: Graph, name: str) -> str:
    """Return the type of codes that come from a constant or from outside; "" where a node makes them."""
    codes = graph.constant(name)
    if codes is not None:
        return str(codes.dtype)
    given = next((value for value in graph.graph.input if value.name == name), None)
    return "" if given is None else _name_of_type(given.type.tensor_type.elem_type)


def _name_of_type(number: int) -> str:
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(number))
    except KeyError:  # of a newer ONNX than this one
        return f"type {number}"


def _per_channel(graph: Graph, node: onnx.NodeProto, scale: Array, opset: int) -> Iterator[tuple[str, str]]:
    if opset < LOWEST_OPSET:
        yield "opset", f"it has a scale per channel, and opset {opset} knows no axis for it"
        return
    source = _source(graph, node)
    values = graph.constant(source)
    if values is None:
        yield (
            "activation-per-channel",
            f"{source!r} is no constant but has {scale.size} scales; only weights may have one per channel",
        )
        return
    axis = int_attribute(node, "axis", 1)
    if scale.ndim != 1 or not -values.ndim <= axis < values.ndim or values.shape[axis] != scale.size:
        yield "scale-size", f"scales of shape {list(scale.shape)} do not fit axis {axis} of {list(values.shape)}"
        return
    if node.op_type == "QuantizeLinear":
        return  # its DequantizeLinear has the same axis, or is reported
    for reader, position, seen in weight_readers(graph, node.output[0], axis % values.ndim, values.ndim):
        wanted = channel_axis(reader, position, values.ndim)
        if reader.op_type == "ConvTranspose" and seen in (0, 1):
            continue  # a warning: which of the two axes computes right is not settled
        if seen != wanted:
            yield (
                "weight-axis",
                f"its {scale.size} scales run along axis {axis}, which is not the output channel of {reader.op_type} "
                f"{node_name(reader)}",
            )


def _per_block(graph: Graph, node: onnx.NodeProto, scale: Array, block: int) -> Iterator[tuple[str, str]]:
    source = _source(graph, node)
    values = graph.constant(source)
    if values is None:
        yield (
            "activation-per-channel",
            f"{source!r} is no constant but has {scale.size} scales, one per block of {block}; of activations TensorRT "
            "finds such scales at run time",
        )
        return
    axis = int_attribute(node, "axis", 1)
    wanted = list(values.shape)
    if -values.ndim <= axis < values.ndim:
        wanted[axis] = -(-wanted[axis] // block)
    if list(scale.shape) != wanted:
        where = f"blocks of {block} along axis {axis} of {list(values.shape)}"
        yield "scale-size", f"scales of shape {list(scale.shape)} do not fit {where}"


def _source(graph: Graph, node: onnx.NodeProto) -> str:
    """Return the name of what a pair quantizes; for constant codes that of the codes."""
    quantize = graph.maker(node.input[0], "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
    return str(quantize.input[0] if quantize is not None else node.input[0])


def weight_readers(graph: Graph, name: str, axis: int, rank: int) -> Iterator[tuple[onnx.NodeProto, int, int]]:
    """Yield every weighted op that reads a weight, with the input's position and where the axis lies there.

    A Transpose in between moves the axis: torch exports the weight of a linear layer so.
    """
    for reader in graph.consumers[name]:
        if reader.op_type == "Transpose":
            order = next((list(entry.ints) for entry in reader.attribute if entry.name == "perm"), None)
            order = order or list(reversed(range(rank)))
            if axis in order:  # else its order is no permutation, which a runtime refuses
                yield from weight_readers(graph, reader.output[0], order.index(axis), rank)
        elif reader.op_type in WEIGHTED_OPS:
            yield from ((reader, position, axis) for position in (0, 1) if list(reader.input)[position] == name)
