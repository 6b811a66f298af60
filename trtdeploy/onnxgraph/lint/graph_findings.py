"""Rules of whole pairs, of scales that must be equal, and of what the linter cannot look into."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from trtdeploy.onnxgraph.graph import Graph, node_name, opset_version, outer_names
from trtdeploy.onnxgraph.lint.float_view import FloatView, float_view
from trtdeploy.onnxgraph.lint.integer_ops import is_integer_op
from trtdeploy.onnxgraph.lint.placement_findings import Placement, placement, placement_findings
from trtdeploy.onnxgraph.lint.rules import Finding
from trtdeploy.onnxgraph.lint.weights import weight_findings
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import LOWEST_OPSET


def structure_findings(model: onnx.ModelProto, graph: Graph, *, with_opset: bool) -> Iterator[Finding]:
    """Yield what stands in the wrong place, by the order of the nodes.

    Args:
        model: The model.
        graph: Look-ups over it.
        with_opset: Say that the opset is old; not wanted where a finding says so already.
    """
    if with_opset and opset_version(model) < LOWEST_OPSET:
        reason = f"opset {opset_version(model)} knows no scale per channel, which weights should have"
        yield Finding("old-opset", model.graph.name, reason)
    order = {name: place for place, node in enumerate(model.graph.node) for name in (node_name(node), *node.output)}
    view = float_view(model, graph)
    placed = placement(view)
    found = [*placement_findings(view, placed), *_concats(graph, view, placed), *weight_findings(graph, view)]
    outputs = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found += _pair(graph, node, outputs)
        elif outer_names(node):
            found.append(Finding("subgraph", node_name(node), f"what the bodies of {node.op_type} hold is not checked"))
    yield from sorted(found, key=lambda finding: order.get(finding.node, -1))


def unequal_scales(graph: Graph, view: FloatView, sites: list[tuple[str, int]]) -> list[float]:
    """Return the different scales of some sites; none where all are equal."""
    scales = [graph.constant(view.sites[site].dequantize.input[1]) for site in sites]
    known = {float(scale.reshape(())) for scale in scales if scale is not None and scale.size == 1}
    return sorted(known) if len(known) > 1 else []


def _concats(graph: Graph, view: FloatView, placed: Placement) -> Iterator[Finding]:
    for node, sites in placed.groups:
        scales = unequal_scales(graph, view, sites)
        if scales:
            reason = f"its inputs, and what reads its result, have the scales {scales[:4]}"
            yield Finding("concat-scales", node_name(node), reason)


def _pair(graph: Graph, node: onnx.NodeProto, outputs: set[str]) -> Iterator[Finding]:
    name, result = node_name(node), node.output[0]
    readers = graph.consumers[result]
    if not readers and result not in outputs:
        yield Finding("unused-pair", name, f"nothing reads {result!r}")
        return
    if node.op_type == "QuantizeLinear":
        other = next((reader for reader in readers if not _takes_codes(reader)), None)
        if other is not None:
            yield Finding("codes-read", name, f"{other.op_type} {node_name(other)} reads its codes")
        elif result in outputs:
            yield Finding("codes-read", name, f"the graph output {result!r} reads its codes")
        return
    quantize = graph.maker(node.input[0], "QuantizeLinear")
    if quantize is None:
        return
    before = graph.maker(quantize.input[0], "DequantizeLinear")
    if before is not None:
        yield Finding("double-pair", name, f"it quantizes the result of {node_name(before)} again")
    if result in outputs and not readers:
        yield Finding("output-pair", name, f"only the graph output {result!r} reads it")


def _takes_codes(node: onnx.NodeProto) -> bool:
    """Say whether codes are what a node should read; ops on integers are a finding of their own."""
    return node.op_type == "DequantizeLinear" or is_integer_op(node)
