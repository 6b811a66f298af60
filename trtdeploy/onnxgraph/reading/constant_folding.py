"""Computing ahead what feeds scales, zero-points and weights, so that each of them is a constant of the graph.

Exporters write them in many forms: a Constant with ``value_float``, FP16 weights behind a Cast, a kernel behind
Transpose and Reshape, a scale as amax / 127. ONNX's reference implementation computes them, node by node.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator

from trtdeploy.onnxgraph.graph import ONNX_DOMAINS, RANDOM_OPS
from trtdeploy.tensors import Array

logger = logging.getLogger(__name__)

_FED = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "BatchNormalization"}
    | {"Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "RNN", "LSTM", "GRU"}
)
"""Ops whose constant inputs are folded."""
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""Ops that say how something is quantized, which is not to be lost."""


def fold_constants(model: ir.Model, *, everywhere: bool = False) -> list[str]:
    """Make initializers, in place, of what is computed from constants alone and feeds a scale or a weight.

    Only the inputs of Q/DQ, of ops with weights and of batch normalization are folded; constants elsewhere stay as
    they are, as do initializers, Constant nodes that hold a tensor, and Identity of these.

    Args:
        model: The model; its nodes must be in order.
        everywhere: Fold the inputs of all ops, those of Q/DQ among them.

    Returns:
        The names of the tensors that are initializers now, in the order of their first readers.
    """
    graph = model.graph
    known = _constants(graph)
    inner = {node for value in known if (node := value.producer()) is not None}
    targets = dict.fromkeys(
        value
        for node in graph
        if (everywhere and node not in inner) or (node.op_type in _FED and node.domain in ONNX_DOMAINS)
        for value in node.inputs
        if value is not None and value in known and not _is_plain(value)
    )
    if not targets:
        return []
    computed = _compute(graph, targets, model.opset_imports)
    expressions = _expressions(targets)
    folded = [value for value in targets if value in computed]
    taken = {name for node in graph for value in node.outputs if (name := value.name)} | set(graph.initializers)
    for value in folded:
        name = value.name or "constant"
        if value.is_graph_output():
            name = next(new for i in range(1, len(taken) + 2) if (new := f"{name}.constant{i}") not in taken)
        array = computed[value]
        tensor = ir.tensor(array, name=name)
        constant = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        graph.register_initializer(constant)
        for node, place in tuple(value.uses()):
            node.replace_input_with(place, constant)
    _remove_unread(graph, expressions)
    return [value.name or "" for value in folded]


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Return the initializers, and what nodes of the graph compute from nothing else."""
    inputs = set(graph.inputs)
    known = {value for value in graph.initializers.values() if value not in inputs}
    for node in graph:
        if (
            node.domain in ONNX_DOMAINS
            and node.op_type not in RANDOM_OPS | _QUANTIZED
            and all(value is None or value in known for value in node.inputs)
            and not any(entry.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for entry in _attributes(node))
        ):
            known.update(node.outputs)
    return known


def _attributes(node: ir.Node) -> Iterable[ir.Attr]:
    return node.attributes.values()


def _is_plain(value: ir.Value) -> bool:
    """Say whether a constant is an initializer or a Constant node with a tensor, perhaps behind Identity nodes."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return node is None or (node.op_type == "Constant" and "value" in node.attributes)


def _expressions(targets: Iterable[ir.Value]) -> set[ir.Node]:
    """Return every node that takes part in computing these values."""
    nodes: set[ir.Node] = set()
    ahead = list(targets)
    while ahead:
        node = ahead.pop().producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            ahead += [value for value in node.inputs if value is not None]
    return nodes


def _compute(graph: ir.Graph, targets: Iterable[ir.Value], opsets: dict[str, int]) -> dict[ir.Value, Array]:
    """Return the values of constant tensors; of those whose computation fails, nothing."""
    wanted = set(targets)
    needed = _expressions(wanted)
    last_read = {value: node for node in graph if node in needed for value in node.inputs if value is not None}
    found: dict[ir.Value, Array] = {}
    for node in graph:
        if node not in needed:
            continue
        feeds: dict[str, Array] = {}
        for value in node.inputs:
            if value is None:
                continue
            if value not in found and value.const_value is not None:
                found[value] = value.const_value.numpy()
            if value in found:
                feeds[value.name or ""] = found[value]
        if len(feeds) == len({value for value in node.inputs if value is not None}):
            found.update(_run(node, feeds, opsets))
        for value in {value for value in node.inputs if value is not None}:
            if last_read[value] is node and value not in wanted:
                found.pop(value, None)  # weights are large
    return {value: array for value, array in found.items() if value in wanted}


def _run(node: ir.Node, feeds: dict[str, Array], opsets: dict[str, int]) -> dict[ir.Value, Array]:
    outputs = [value for value in node.outputs if value.name]
    graph = helper.make_graph(
        [ir.serde.serialize_node(node)],
        "constant",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=value.name) for value in outputs],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        results = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports)).run(None, feeds)
    except Exception as error:  # the reference has no error class of its own; a runtime will say what is wrong
        logger.warning("%s %s is not computed ahead: %s", node.op_type, node.name or outputs[0].name, error)
        return {}
    return {
        value: np.asarray(array)
        for value, array in zip(outputs, results, strict=True)
        if isinstance(array, (np.ndarray, np.generic))
    }


def _remove_unread(graph: ir.Graph, candidates: set[ir.Node]) -> None:
    """Remove those of the nodes that nothing reads any more, and the initializers that only they have read."""
    read: set[ir.Value] = set()
    for node in reversed([node for node in graph if node in candidates]):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        read.update(value for value in node.inputs if value is not None)
        graph.remove(node, safe=True)
    for value in read:
        if (
            value.name is not None
            and value.name in graph.initializers
            and not value.uses()
            and not value.is_graph_output()
        ):
            del graph.initializers[value.name]
