"""Look-ups over an ONNX graph, and what Q/DQ makes of constants."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from trtdeploy.errors import ModelError
from trtdeploy.tensors import Array

ONNX_DOMAINS = frozenset({"", "ai.onnx"})
RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"}
)
"""Ops whose results differ from run to run, whatever they read."""
WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Attributes of newer opsets that change what Q/DQ computes; such constants are left to the runtime.
NOT_PLAIN = ("block_size", "output_dtype", "precision")
_FREE_INITIALIZERS = 4


class Graph:
    """Look-ups over one ONNX graph: who makes a tensor, who reads it, what is constant."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.producer = {output: node for node in graph.node for output in node.output if output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in [*node.input, *outer_names(node)]:
                self.consumers[name].append(node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._stated = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input]}

    @cached_property
    def constants(self) -> set[str]:
        """The names of all tensors that depend on constants alone, through whatever ops."""
        constants = set(self._initializers) - {value.name for value in self.graph.input}
        for node in self.graph.node:
            if node.domain in ONNX_DOMAINS and node.op_type not in RANDOM_OPS:
                reads = [*(name for name in node.input if name), *outer_names(node)]
                if all(name in constants for name in reads):
                    constants.update(name for name in node.output if name)
        return constants

    def constant(self, name: str) -> Array | None:
        """Return the value of an initializer or a Constant node's output, also behind Identity nodes, else None."""
        node = self.producer.get(name)
        while node is not None and node.op_type == "Identity":  # torch gives the second of two equal constants one
            name = node.input[0]
            node = self.producer.get(name)
        if name in self._initializers:
            return _array(self._initializers[name])
        if node is not None and node.op_type == "Constant":
            for entry in node.attribute:
                if entry.name == "value":
                    return _array(entry.t)
        return None

    def element_type(self, name: str) -> int | None:
        """Return the ``TensorProto.DataType`` of a constant, an input, or what the file states a type of, else None."""
        if name in self._initializers:
            return int(self._initializers[name].data_type)
        node = self.maker(name, "Constant")
        for entry in node.attribute if node is not None else ():
            if entry.name == "value":
                return int(entry.t.data_type)
        return self._stated.get(name) or None

    def maker(self, name: str, op_type: str) -> onnx.NodeProto | None:
        """Return the node that makes ``name`` if it is of ``op_type``."""
        node = self.producer.get(name)
        return node if node is not None and node.op_type == op_type else None


def node_name(node: onnx.NodeProto) -> str:
    """Return the node's name, or, as names are optional in ONNX, that of its first output."""
    return node.name or next((name for name in node.output if name), "")


def control_flow(model: onnx.ModelProto) -> list[str]:
    """Return kind and name of every node with a body: If, Loop and Scan."""
    return [f"{node.op_type} {node_name(node)}" for node in model.graph.node if node.op_type in ("If", "Loop", "Scan")]


def with_named_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a name on every node, so that whatever refers to a node can say which."""
    if all(node.name for node in model.graph.node):
        return model
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for node in named.graph.node:
        node.name = node_name(node)
    return named


def fold_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Replace the Q/DQ (or DQ) of every constant by the float values that it stands for.

    The numbers are the ones that QuantizeLinear and DequantizeLinear define: round half to even, saturate, multiply by
    the scale (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html). So the outputs of the model stay the same.

    Returns:
        A new model and the number of constants that were folded.

    Raises:
        ModelError: A scale or zero-point of a constant has an impossible shape.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    let_constants_stand_alone(folded)
    graph = Graph(folded.graph)
    replaced: dict[str, Array] = {}
    for node in folded.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        values = dequantized_constant(graph, node)
        if values is not None:
            replaced[node.output[0]] = values
    nodes = [node for node in folded.graph.node if not any(name in replaced for name in node.output)]
    del folded.graph.node[:]
    folded.graph.node.extend(nodes)
    folded.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in replaced.items())
    remove_unused(folded.graph)
    return folded, len(replaced)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Drop nodes, initializers and recorded shapes that no output depends on."""
    needed = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if any(output in needed for output in node.output):
            kept.append(node)
            needed.update(node.input)
            needed.update(outer_names(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    made = {output for node in graph.node for output in node.output}
    shapes = [value for value in graph.value_info if value.name in made]
    del graph.value_info[:]
    graph.value_info.extend(shapes)


def let_constants_stand_alone(model: onnx.ModelProto) -> None:
    """Take initializers off the inputs of a graph, in place, where older exporters list them, too.

    Before IR version 4 every initializer must be an input and that says nothing; since then it says that a caller may
    give another value, so that a runtime does not fold it, and an input whose initializer is gone has to be given
    (https://onnx.ai/onnx/repo-docs/IR.html, "Graphs"). So the IR version becomes 4 at least.
    """
    model.ir_version = max(model.ir_version, _FREE_INITIALIZERS)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)


def unused(stem: str, used: set[str]) -> str:
    """Return a name that is not in ``used``, and put it there."""
    name, count = stem, 1
    while name in used:
        count += 1
        name = f"{stem}_{count}"
    used.add(name)
    return name


def opset_version(model: onnx.ModelProto) -> int:
    """Return the version of ONNX's own operators that the model uses; 0 if it names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _array(tensor: onnx.TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor))


def outer_names(node: onnx.NodeProto) -> set[str]:
    """Return every name that the node's subgraphs read: some come from the enclosing graph."""
    names: set[str] = set()
    for entry in node.attribute:
        for subgraph in [entry.g] if entry.HasField("g") else list(entry.graphs):
            names.update(output.name for output in subgraph.output)
            for inner in subgraph.node:
                names.update(inner.input)
                names |= outer_names(inner)
    return names


def quantized_constant(graph: Graph, quantize: onnx.NodeProto) -> Array | None:
    """Return the codes that a QuantizeLinear of a float32 constant computes, else None.

    Round half to even, then saturate (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html).

    Raises:
        ModelError: A scale or zero-point has an impossible shape.
    """
    if any(int_attribute(quantize, name, 0) for name in NOT_PLAIN):
        return None
    weights = graph.constant(quantize.input[0])
    scale = graph.constant(quantize.input[1])
    zero_point = _zero_point(graph, quantize)
    if (
        weights is None
        or weights.dtype != np.float32
        or scale is None
        or zero_point is None
        or zero_point.dtype not in (np.int8, np.uint8)
    ):
        return None
    limits = np.iinfo(zero_point.dtype)
    axis = int_attribute(quantize, "axis", 1)
    with np.errstate(all="ignore"):
        rounded = np.rint(weights / _along_axis(scale, weights, axis))
    if np.isnan(rounded).any():  # ONNX does not say what their codes are
        return None
    codes = np.clip(rounded + _along_axis(zero_point, weights, axis), limits.min, limits.max)
    return codes.astype(zero_point.dtype)


def dequantized_constant(graph: Graph, dequantize: onnx.NodeProto) -> Array | None:
    """Return what a DequantizeLinear of a constant computes, or None if its input is not constant.

    Raises:
        ModelError: A scale or zero-point has an impossible shape.
    """
    scale = graph.constant(dequantize.input[1])
    if scale is None or any(int_attribute(dequantize, name, 0) for name in NOT_PLAIN):
        return None
    codes = graph.constant(dequantize.input[0])
    if codes is None:
        quantize = graph.maker(dequantize.input[0], "QuantizeLinear")
        codes = quantized_constant(graph, quantize) if quantize is not None else None
    if codes is None:
        return None
    zero_point = _zero_point(graph, dequantize)
    axis = int_attribute(dequantize, "axis", 1)
    offset = 0 if zero_point is None else _along_axis(zero_point.astype(np.float32), codes, axis)
    values: Array = ((codes.astype(np.float32) - offset) * _along_axis(scale, codes, axis)).astype(scale.dtype)
    return values


def _zero_point(graph: Graph, node: onnx.NodeProto) -> Array | None:
    if len(node.input) < 3 or not node.input[2]:
        # ONNX: without a zero-point the quantized type is uint8
        return np.zeros((), np.uint8) if node.op_type == "QuantizeLinear" else None
    return graph.constant(node.input[2])


def _along_axis(values: Array, target: Array, axis: int) -> Array:
    if values.size == 1:
        return values.reshape(())
    axis = axis % target.ndim
    if values.ndim != 1 or values.shape[0] != target.shape[axis]:
        raise ModelError(
            f"A scale or zero-point of shape {list(values.shape)} does not fit axis {axis} of {list(target.shape)}."
        )
    return values.reshape([-1 if index == axis else 1 for index in range(target.ndim)])


def int_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return an integer attribute of a node."""
    for candidate in node.attribute:
        if candidate.name == name:
            return int(candidate.i)
    return default
