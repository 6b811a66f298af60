"""Repairs that need no new data: what Q/DQ stands for is kept as well as symmetric INT8 can."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.onnxgraph.dynamic_ranges import INT8_BOUND
from trtdeploy.onnxgraph.lint.linear import weight_readers
from trtdeploy.onnxgraph.lint.linter import lint
from trtdeploy.onnxgraph.qdq import (
    WEIGHTED_OPS,
    Graph,
    dequantized_constant,
    node_name,
    opset_version,
    remove_unused,
)
from trtdeploy.onnxgraph.qdq_pairs import Pair, Quantizer, pairs, put_in
from trtdeploy.onnxgraph.ranges_to_qdq import LOWEST_OPSET, channel_axis, weight_scale
from trtdeploy.tensors import Array

_KEEP_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Transpose", "QuantizeLinear"}
    | {"DequantizeLinear", "Identity"}
)
_POSITIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})


def fix(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with what can be repaired repaired; ``lint`` says what is left.

    Asymmetric activations get the symmetric range that holds their old one, per tensor; weights are quantized again per
    output channel from the floats that they stand for; an INT32 bias becomes float; Q/DQ that is in the way of a fusion
    (on the convolution's side of an Add, before an activation, twice, only for a graph output) is taken out; a weight
    without Q/DQ whose layer has a quantized input gets it.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    broken = {finding.node for finding in lint(fixed) if finding.severity == "error"}
    for pair in list(pairs(Graph(fixed.graph))):
        nodes = [node for node in (pair.quantize, pair.dequantize) if node is not None]
        if broken.isdisjoint(map(node_name, nodes)):
            continue
        if pair.is_constant:
            _requantize_constant(fixed, pair)
        else:
            _make_symmetric(fixed, pair)
    _take_out_hindrances(fixed)
    _take_out_hindrances(fixed)  # what stood before a BN may have hidden a residual branch
    _unify_concat_scales(fixed)
    remove_unused(fixed.graph)
    return _with_weights_quantized(fixed)


def _make_symmetric(model: onnx.ModelProto, pair: Pair) -> None:
    graph = Graph(model.graph)
    dequantize = pair.dequantize
    scale = graph.constant(dequantize.input[1])
    has_zero = len(dequantize.input) > 2 and bool(dequantize.input[2])
    zero = graph.constant(dequantize.input[2]) if has_zero else np.zeros((), np.uint8)
    if pair.quantize is None or scale is None or zero is None or zero.dtype not in (np.int8, np.uint8):
        return
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return  # its range is not known
    limits = np.iinfo(zero.dtype)
    ends = [np.abs((end - zero.astype(np.float64)) * scale) for end in (limits.min, limits.max)]
    is_symmetric = zero.dtype == np.int8 and not zero.any()
    new = scale.max() if is_symmetric else np.float32(np.max(ends) / INT8_BOUND)
    if (zero == limits.min).all() and not _is_positive(graph, pair.tensor):
        # codes that begin at 0 do the work of a Relu, and ONNX Runtime's quantizer has taken that out
        made = _unused(model, f"{pair.tensor}.positive")
        relu = helper.make_node("Relu", [pair.tensor], [made], name=made)
        model.graph.node.insert(list(model.graph.node).index(pair.quantize), relu)
        quantize = graph.producer[dequantize.input[0]]
        quantize.input[0] = made
    _set_parameters(model, [pair.quantize, dequantize], np.asarray(new, np.float32), None)


def _is_positive(graph: Graph, name: str) -> bool:
    maker = graph.producer.get(name)
    while maker is not None and maker.op_type in _KEEP_SIGN:
        maker = graph.producer.get(maker.input[0])
    return maker is not None and maker.op_type in _POSITIVE


def _requantize_constant(model: onnx.ModelProto, pair: Pair) -> None:
    graph = Graph(model.graph)
    dequantize, output = pair.dequantize, pair.dequantize.output[0]
    values = dequantized_constant(graph, dequantize) if pair.quantize is None else graph.constant(pair.tensor)
    if values is None or values.dtype != np.float32 or not np.isfinite(values).all():
        return
    if pair.is_bias:
        model.graph.node.remove(dequantize)
        model.graph.initializer.append(numpy_helper.from_array(values, output))
        return
    axis = _output_channels(graph, output, values.ndim) if opset_version(model) >= LOWEST_OPSET else None
    scale = weight_scale(values, axis)
    axis = axis if scale.ndim else None
    if pair.quantize is not None:
        _set_parameters(model, [pair.quantize, dequantize], scale, axis)
        return
    shaped = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    codes = np.clip(np.rint(values / shaped), -INT8_BOUND, INT8_BOUND).astype(np.int8)
    dequantize.input[0] = _constant(model, f"{output}.int8", codes)
    _set_parameters(model, [dequantize], scale, axis)


def _output_channels(graph: Graph, name: str, rank: int) -> int | None:
    for axis in range(rank):
        for reader, position, seen in weight_readers(graph, name, axis, rank):
            if seen == channel_axis(reader, position, rank):
                return axis
    return None


def _set_parameters(model: onnx.ModelProto, nodes: list[onnx.NodeProto], scale: Array, axis: int | None) -> None:
    stem = nodes[0].output[0]
    names = [_constant(model, f"{stem}.scale", scale), _constant(model, f"{stem}.zero", np.zeros(scale.shape, np.int8))]
    for node in nodes:
        kept = [entry for entry in node.attribute if entry.name != "axis"]
        source = node.input[0]
        del node.attribute[:], node.input[:]
        node.input.extend([source, *names])
        node.attribute.extend(kept + ([] if axis is None else [helper.make_attribute("axis", axis)]))


def _constant(model: onnx.ModelProto, stem: str, values: Array) -> str:
    name = _unused(model, stem)
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _unused(model: onnx.ModelProto, stem: str) -> str:
    used = {tensor.name for tensor in [*model.graph.initializer, *model.graph.input]}
    used = used.union(*(node.output for node in model.graph.node))
    name, count = stem, 1
    while name in used:
        count += 1
        name = f"{stem}_{count}"
    return name


def _unify_concat_scales(model: onnx.ModelProto) -> None:
    graph = Graph(model.graph)
    unequal = {finding.node for finding in lint(model) if finding.rule == "concat-scales"}
    made = {pair.dequantize.output[0]: pair for pair in pairs(graph)}
    for node in list(model.graph.node):
        read = [made[name] for name in node.input if name in made] if node_name(node) in unequal else []
        scales = [pair.quantizer.scale for pair in read if pair.quantizer is not None and not pair.quantizer.scale.ndim]
        if len(scales) == len(read) and all(pair.quantize is not None for pair in read):
            for pair in read:
                nodes = [node for node in (pair.quantize, pair.dequantize) if node is not None]
                _set_parameters(model, nodes, np.asarray(max(scales)), None)


def _take_out_hindrances(model: onnx.ModelProto) -> None:
    findings = lint(model)
    of_rule = {rule: {f.node for f in findings if f.rule == rule} for rule in {f.rule for f in findings}}
    graph = Graph(model.graph)
    branches = {f.reason.split("'")[1] for f in findings if f.rule == "both-residual-inputs"}
    outputs = {output.name for output in model.graph.output}
    for pair in list(pairs(graph)):
        if pair.quantize is None:
            continue
        name, result = node_name(pair.dequantize), pair.dequantize.output[0]
        everywhere = any(name in of_rule.get(rule, ()) for rule in ("double-pair", "before-activation"))
        for reader in graph.consumers[result]:
            is_branch = node_name(reader) in of_rule.get("both-residual-inputs", ()) and pair.tensor in branches
            for position, read in enumerate(reader.input):
                if read == result and (everywhere or is_branch):
                    reader.input[position] = pair.tensor
        if name in of_rule.get("output-pair", ()) and result in outputs:
            node = helper.make_node("Identity", [pair.tensor], [result], name=f"{result}.identity")
            pair.dequantize.CopyFrom(node)


def _with_weights_quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = Graph(model.graph)
    bare = {finding.node for finding in lint(model) if finding.rule == "weight-in-float"}
    sites = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHTED_OPS or node_name(node) not in bare:
            continue
        for position, name in enumerate(node.input[:2]):
            values = graph.constant(name)
            if values is not None and values.dtype == np.float32 and np.isfinite(values).all():
                axis = channel_axis(node, position, values.ndim)
                scale = weight_scale(values, axis)
                sites[node.output[0], position] = Quantizer(name, scale, axis if scale.ndim else None)
    return put_in(model, sites) if sites else model
