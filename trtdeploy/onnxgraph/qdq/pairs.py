"""Taking Q/DQ pairs out of a graph and putting them in, always in one form.

What is taken out is remembered as sites: which input of which node read which tensor through which quantizer. Putting
sites in always gives the same names, constants and order, so that equal scales make equal models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.graph import (
    NOT_PLAIN,
    Graph,
    dequantized_constant,
    int_attribute,
    let_constants_stand_alone,
    node_name,
    outer_names,
    remove_unused,
    unused,
)
from trtdeploy.tensors import Array


@dataclass(frozen=True)
class Quantizer:
    """Symmetric INT8 quantization of one tensor.

    Attributes:
        tensor: The float tensor.
        scale: float32, finite and positive; shape () or, per channel, (channels,).
        axis: Channel axis; None per tensor.
    """

    tensor: str
    scale: Array
    axis: int | None = None

    @property
    def key(self) -> tuple[str, bytes, int | None]:
        """What makes two quantizers the same."""
        return self.tensor, self.scale.tobytes(), self.axis


@dataclass(frozen=True)
class Pair:
    """A DequantizeLinear and the QuantizeLinear before it; the latter is missing where the codes are a constant.

    Attributes:
        quantize: Makes the codes; None where they are a constant, or come from elsewhere.
        dequantize: Makes floats of them.
        tensor: The float tensor that is quantized; for constant codes the output of ``dequantize``.
        is_constant: The tensor, or its codes, is a constant: a weight.
        is_bias: The codes are a constant of INT32, as some quantizers store a bias.
        quantizer: The pair in TensorRT's form, symmetric INT8 with one constant float32 scale; None if it has another.
        oddity: Why ``quantizer`` is None.
    """

    quantize: onnx.NodeProto | None
    dequantize: onnx.NodeProto
    tensor: str
    is_constant: bool
    is_bias: bool
    quantizer: Quantizer | None
    oddity: str = ""


Site = tuple[str, int]
"""An input of a node: the node's first output, which is unique in a graph, and the position."""


def pairs(graph: Graph) -> Iterator[Pair]:
    """Yield the pair of every DequantizeLinear of a graph, in order."""
    for node in graph.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        quantize = graph.maker(node.input[0], "QuantizeLinear")
        tensor = quantize.input[0] if quantize is not None else node.output[0]
        constant = graph.constant(tensor if quantize is not None else node.input[0])
        read = _quantizer(graph, quantize, node, tensor, constant)
        yield Pair(
            quantize=quantize,
            dequantize=node,
            tensor=tensor,
            is_constant=constant is not None,
            is_bias=quantize is None and constant is not None and constant.dtype == np.int32,
            quantizer=read if isinstance(read, Quantizer) else None,
            oddity=read if isinstance(read, str) else "",
        )


def take_out(model: onnx.ModelProto, wanted: Callable[[Pair], bool]) -> tuple[onnx.ModelProto, dict[Site, Quantizer]]:
    """Remove pairs: their readers read the float tensor; constant codes become the floats that they stand for.

    Where a graph output or a subgraph reads the result of a pair, an Identity keeps its name.

    Returns:
        A new model, and the sites of the pairs that have TensorRT's form.

    Raises:
        QuantizationError: Codes of a wanted pair come from something else than a QuantizeLinear or a constant.
    """
    model = _copy(model)
    let_constants_stand_alone(model)
    graph = Graph(model.graph)
    fixed = {output.name for output in model.graph.output}.union(*map(outer_names, model.graph.node))
    taken: dict[str, Pair] = {}
    for pair in pairs(graph):
        if not wanted(pair):
            continue
        taken[pair.dequantize.output[0]] = pair
        if pair.quantize is None:
            values = dequantized_constant(graph, pair.dequantize)
            if values is None:
                raise QuantizationError(
                    f"DequantizeLinear {node_name(pair.dequantize)} cannot be taken out: {pair.oddity}."
                )
            model.graph.initializer.append(numpy_helper.from_array(values, pair.tensor))
    sites: dict[Site, Quantizer] = {}
    kept: list[onnx.NodeProto] = []
    for node in model.graph.node:
        name = node.output[0] if node.op_type == "DequantizeLinear" else ""
        if name in taken:
            if name not in fixed or taken[name].tensor == name:
                continue
            node = helper.make_node("Identity", [name], [name], name=f"{name}.identity")
            kept.append(node)
        else:
            kept.append(node)
        for position, read in enumerate(node.input):
            first = taken.get(read)
            if first is None:
                continue
            if first.quantizer is not None:
                sites[node.output[0], position] = first.quantizer
            node.input[position] = _source(read, taken)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    remove_unused(model.graph)
    alive = {node.output[0] for node in model.graph.node}
    return model, {site: quantizer for site, quantizer in sites.items() if site[0] in alive}


def put_in(model: onnx.ModelProto, sites: dict[Site, Quantizer]) -> onnx.ModelProto:
    """Return a new model with a Q/DQ pair before every site; sites of the same quantizer share one.

    A tensor ``t`` gets the constants ``t.scale`` and ``t.zero_point``, and the nodes ``t.quantize`` and
    ``t.dequantize``, right before the first node that reads them.
    """
    model = _copy(model)
    let_constants_stand_alone(model)
    graph = model.graph
    used = {name for node in graph.node for name in [node.name, *node.input, *node.output, *outer_names(node)]}
    used.update(value.name for value in [*graph.initializer, *graph.input, *graph.output])
    made: dict[tuple[str, bytes, int | None], str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for position in range(len(node.input)):
            quantizer = sites.get((node.output[0], position)) if node.output else None
            if quantizer is None:
                continue
            if quantizer.key not in made:
                pair, constants = _make_pair(quantizer, used)
                nodes += pair
                graph.initializer.extend(constants)
                made[quantizer.key] = pair[1].output[0]
            node.input[position] = made[quantizer.key]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def merge_equal(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a new model in which equal pairs of one tensor are one pair, but where graph outputs need their names."""
    model = _copy(model)
    first: dict[tuple[str, bytes, int | None], str] = {}
    merged: dict[str, str] = {}
    for pair in pairs(Graph(model.graph)):
        result = pair.dequantize.output[0]
        if pair.quantizer is not None and first.setdefault(pair.quantizer.key, result) != result:
            merged[result] = first[pair.quantizer.key]
    for node in model.graph.node:
        for position, read in enumerate(node.input):
            node.input[position] = merged.get(read, read)
    remove_unused(model.graph)
    return model


def _quantizer(
    graph: Graph, quantize: onnx.NodeProto | None, dequantize: onnx.NodeProto, tensor: str, constant: Array | None
) -> Quantizer | str:
    """Return the pair's quantizer, or why it has none that TensorRT's form can say."""
    nodes = [dequantize] if quantize is None else [quantize, dequantize]
    if quantize is None and constant is None:
        return "its codes come neither from a QuantizeLinear nor from a constant"
    if quantize is not None:
        source = graph.maker(tensor, "DequantizeLinear")
        if source is not None:
            return f"it quantizes the output of DequantizeLinear {node_name(source)} again"
        readers = {reader.op_type for reader in graph.consumers[quantize.output[0]]}
        outputs = {output.name for output in graph.graph.output}
        if readers != {"DequantizeLinear"} or quantize.output[0] in outputs:
            return "something else than a DequantizeLinear reads its codes"
    if any(int_attribute(node, name, 0) for node in nodes for name in NOT_PLAIN):
        return "it has attributes of block quantization or another code type"
    scales = [graph.constant(node.input[1]) for node in nodes]
    scale = scales[-1]
    if scale is None or scales[0] is None:
        return "its scale is computed at run time"
    if scale.tobytes() != scales[0].tobytes() or scale.dtype != scales[0].dtype:
        return "its two nodes have different scales"
    if scale.dtype != np.float32 or not np.isfinite(scale).all() or not (scale > 0).all():
        return "its scale is not float32, finite and positive"
    for node in nodes:
        zero_point = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero_point is None and node is not nodes[0]:
            continue  # a DequantizeLinear behind a QuantizeLinear has the codes' type and 0
        codes = zero_point if zero_point is not None else constant if quantize is None else None
        if codes is None or codes.dtype != np.int8 or (zero_point is not None and bool(zero_point.any())):
            return "its codes are not INT8 around zero-point 0"
    if scale.size == 1:
        return Quantizer(tensor, scale.reshape(()))
    axes = {int_attribute(node, "axis", 1) for node in nodes}
    if constant is not None and constant.ndim:
        axes = {axis % constant.ndim for axis in axes}
    if len(axes) != 1 or scale.ndim != 1:
        return "it has no single channel axis"
    return Quantizer(tensor, scale, axes.pop())


def _make_pair(quantizer: Quantizer, used: set[str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    tensor = quantizer.tensor
    scale, zero_point, codes, result, first, second = (
        unused(f"{tensor}.{suffix}", used)
        for suffix in ("scale", "zero_point", "quantized", "dequantized", "quantize", "dequantize")
    )
    attributes: dict[str, Any] = {} if quantizer.axis is None else {"axis": quantizer.axis}
    nodes = [
        helper.make_node("QuantizeLinear", [tensor, scale, zero_point], [codes], name=first, **attributes),
        helper.make_node("DequantizeLinear", [codes, scale, zero_point], [result], name=second, **attributes),
    ]
    zeros = np.zeros(quantizer.scale.shape, np.int8)
    return nodes, [numpy_helper.from_array(quantizer.scale, scale), numpy_helper.from_array(zeros, zero_point)]


def _source(name: str, taken: dict[str, Pair]) -> str:
    while name in taken and taken[name].tensor != name:
        name = taken[name].tensor
    return name


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
