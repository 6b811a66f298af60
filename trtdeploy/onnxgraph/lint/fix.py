"""Repairs that need no new data: what Q/DQ stands for is kept as well as symmetric INT8 can."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from trtdeploy.onnxgraph.graph import (
    Graph,
    let_constants_stand_alone,
    node_name,
    opset_version,
    outer_names,
    remove_unused,
)
from trtdeploy.onnxgraph.lint.float_view import FloatView, float_view
from trtdeploy.onnxgraph.lint.graph_findings import unequal_scales
from trtdeploy.onnxgraph.lint.integer_ops import integer_ops_to_qdq
from trtdeploy.onnxgraph.lint.linter import lint
from trtdeploy.onnxgraph.lint.placement_findings import Placement, placement
from trtdeploy.onnxgraph.lint.symmetric import Rewriter, activation_scales
from trtdeploy.onnxgraph.qdq.groups import Groups
from trtdeploy.onnxgraph.qdq.int8_scales import chosen_weight_scale, with_room
from trtdeploy.onnxgraph.qdq.pairs import Quantizer, Site, put_in, take_out
from trtdeploy.onnxgraph.qdq.placement import Wanted
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import LOWEST_OPSET
from trtdeploy.tensors import Array

_GONE_WITH_THE_REST = ("output-pair", "unused-pair", "codes-read")


@dataclass(frozen=True)
class Repair:
    """One repair: the rule's short name, the node that broke it, and what was done."""

    rule: str
    node: str
    what: str


@dataclass(frozen=True)
class Fixed:
    """A repaired model; ``lint`` says what is left.

    Attributes:
        model: A new model.
        repairs: What was done; nothing was changed if this is empty.
    """

    model: onnx.ModelProto
    repairs: tuple[Repair, ...]


def fix(model: onnx.ModelProto) -> Fixed:
    """Repair what can be repaired without new data.

    Ops on codes become Q/DQ around float ops; an opset before 13 is converted; asymmetric activations get the symmetric
    range that holds their old one, per tensor; weights are quantized again per output channel from the floats that they
    stand for, and with larger scales where their bias would not fit into INT32; other constants become float. Q/DQ that
    is in the way of a fusion or that nothing uses is taken out.
    Where Q/DQ is missing and the range is known, because the same tensor is quantized elsewhere, it is put in.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    let_constants_stand_alone(fixed)
    repairs = [
        Repair("integer-op" if op.startswith("Q") else "codes-read", name, f"{op} has Q/DQ around its float op now")
        for name, op in integer_ops_to_qdq(fixed)
    ]
    fixed = _with_opset(fixed, repairs)
    _once(fixed, repairs)
    useless = [finding for finding in lint(fixed) if finding.rule in _GONE_WITH_THE_REST]
    rewriter = Rewriter(fixed)
    rewriter.run()
    repairs += [Repair(*each) for each in rewriter.done]
    _fold_transposed(fixed)
    placed = _placed_again(fixed, repairs, has_useless=bool(useless))
    left = {(finding.rule, finding.node) for finding in lint(placed)} if useless else set()
    repairs += [
        Repair(finding.rule, finding.node, "it is taken out")
        for finding in useless
        if (finding.rule, finding.node) not in left
    ]
    if not repairs:
        unchanged = onnx.ModelProto()
        unchanged.CopyFrom(model)
        return Fixed(unchanged, ())
    return Fixed(placed, tuple(repairs))


def _with_opset(model: onnx.ModelProto, repairs: list[Repair]) -> onnx.ModelProto:
    version = opset_version(model)
    has_qdq = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    if version >= LOWEST_OPSET or not has_qdq:
        return model
    try:
        converted = version_converter.convert_version(model, LOWEST_OPSET)
    except Exception:  # the converter is C++ and raises RuntimeError for all it does not know; the finding stays
        return model
    rule = "opset" if any(finding.rule == "opset" for finding in lint(model)) else "old-opset"
    repairs.append(Repair(rule, model.graph.name, f"opset {version} is converted to {LOWEST_OPSET}"))
    return converted


def _once(model: onnx.ModelProto, repairs: list[Repair]) -> None:
    """Let readers of what is quantized twice read the first pair."""
    graph = Graph(model.graph)
    fixed = {output.name for output in model.graph.output}.union(*map(outer_names, model.graph.node))
    first: dict[str, str] = {}
    for node in model.graph.node:
        for position, read in enumerate(node.input):
            node.input[position] = first.get(read, read)
        if node.op_type != "DequantizeLinear":
            continue
        quantize = graph.maker(node.input[0], "QuantizeLinear")
        if quantize is None or graph.maker(quantize.input[0], "DequantizeLinear") is None:
            continue
        name, result = node_name(node), node.output[0]
        first[result] = quantize.input[0]
        repairs.append(Repair("double-pair", name, f"its readers read {quantize.input[0]!r}, which has Q/DQ already"))
        if result in fixed:
            node.CopyFrom(helper.make_node("Identity", [quantize.input[0]], [result], name=name))
    if first:
        remove_unused(model.graph)


def _fold_transposed(model: onnx.ModelProto) -> None:
    """Make the Transpose of a float constant a constant: only so can Q/DQ stand right before the layer."""
    graph = Graph(model.graph)
    folded: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type != "Transpose":
            continue
        values = graph.constant(node.input[0])
        if values is not None:
            order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
            if order is not None and sorted(order) != list(range(values.ndim)):
                continue  # no permutation, which a runtime refuses
            folded[node.output[0]] = np.ascontiguousarray(np.transpose(values, order))
    if folded:
        kept = [node for node in model.graph.node if node.output[0] not in folded]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in folded.items())
        remove_unused(model.graph)


def _placed_again(model: onnx.ModelProto, repairs: list[Repair], *, has_useless: bool) -> onnx.ModelProto:
    """Return the model with its Q/DQ where the rules want it, if anything has to change for that."""
    graph = Graph(model.graph)
    view = float_view(model, graph)
    placed = placement(view)
    stripped, sites = take_out(model, lambda pair: pair.quantizer is not None or pair.is_bias)
    count = len(repairs)
    repairs += [
        Repair(each.rule, each.node, f"Q/DQ is taken off input {each.site[1]} of {each.site[0]!r}")
        for each in placed.hindering
        if sites.pop(each.site, None) is not None
    ]
    _add_missing(Graph(stripped.graph), view, placed, sites, repairs, known=activation_scales(graph))
    _unify(graph, view, placed, sites, repairs)
    sites = _with_room(Graph(stripped.graph), sites, repairs)
    if len(repairs) == count and not has_useless:
        remove_unused(model.graph)
        return model
    return put_in(stripped, sites)


def _add_missing(
    stripped: Graph,
    view: FloatView,
    placed: Placement,
    sites: dict[Site, Quantizer],
    repairs: list[Repair],
    *,
    known: dict[str, Array],
) -> None:
    for rule, wanted in placed.missing:
        node = stripped.producer.get(wanted.site[0])
        if node is None:
            continue
        tensor = node.input[wanted.site[1]]
        quantizer = _of_weight(stripped, node, wanted) if wanted.reason == "weight" else None
        if wanted.reason != "weight" and tensor in known:
            quantizer = Quantizer(tensor, known[tensor])
        if quantizer is not None:
            sites[wanted.site] = quantizer
            where = f"Q/DQ stands before input {wanted.site[1]}, {tensor!r}"
            repairs.append(Repair(rule, node_name(view.graph.producer[wanted.site[0]]), where))


def _with_room(graph: Graph, sites: dict[Site, Quantizer], repairs: list[Repair]) -> dict[Site, Quantizer]:
    """Give biases room; what a single scale cannot do without losing other channels is left."""
    roomy, _ = with_room(graph, sites)
    roomy = {site: roomy.get(site, quantizer) for site, quantizer in sites.items()}
    changed = dict.fromkeys(site[0] for site, quantizer in sites.items() if roomy[site] is not quantizer)
    what = "the scales of its weight leave its bias room in INT32"
    repairs += [Repair("bias-overflow", node_name(graph.producer[name]), what) for name in changed]
    return roomy


def _of_weight(graph: Graph, node: onnx.NodeProto, wanted: Wanted) -> Quantizer | None:
    values = graph.constant(node.input[wanted.site[1]])
    if values is None or values.dtype != np.float32 or not np.isfinite(values).all():
        return None
    chosen = chosen_weight_scale(node, wanted.site[1], values)
    return None if isinstance(chosen, str) else Quantizer(node.input[wanted.site[1]], *chosen)


def _unify(
    graph: Graph, view: FloatView, placed: Placement, sites: dict[Site, Quantizer], repairs: list[Repair]
) -> None:
    """Give what must share a scale the largest one; what two Concats share, all of both."""
    groups: Groups[str] = Groups()
    members: set[str] = set()
    for node, _ in placed.groups:
        read = [sites[site].tensor for i in range(len(node.input)) if (site := (node.output[0], i)) in sites]
        tensors = [*read, node.output[0]] if read else []
        members.update(tensors)
        for tensor in tensors:
            groups.join(tensors[0], tensor)
    largest: dict[str, Array] = {}
    for quantizer in sites.values():
        if quantizer.tensor in members and quantizer.axis is None:
            group = groups.leader(quantizer.tensor)
            largest[group] = np.maximum(largest.get(group, quantizer.scale), quantizer.scale)
    for site, quantizer in sites.items():
        if quantizer.tensor in members and quantizer.axis is None:
            sites[site] = Quantizer(quantizer.tensor, np.asarray(largest[groups.leader(quantizer.tensor)]))
    repairs += [
        Repair("concat-scales", node_name(node), "what it joins and what reads it have one scale, the largest")
        for node, given in placed.groups
        if unequal_scales(graph, view, given)
    ]
