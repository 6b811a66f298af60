"""Where Q/DQ stands, held against where the placement rules want it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, int_attribute, node_name
from trtdeploy.onnxgraph.lint.float_view import FloatView
from trtdeploy.onnxgraph.lint.rules import Finding
from trtdeploy.onnxgraph.qdq.pairs import Site
from trtdeploy.onnxgraph.qdq.placement import Wanted, wanted_sites

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_BEHIND_CONVOLUTION = ("BatchNormalization", "Identity", "Dropout")
_FUSED = frozenset({"BatchNormalization", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish"})
_RULES = {
    "residual": "residual-in-float",
    "gate": "gate-in-float",
    "pooling": "pooling-in-float",
    "concat": "concat-in-float",
    "input": "input-in-float",
    "weight": "weight-in-float",
}


@dataclass(frozen=True)
class Hindrance:
    """Q/DQ that prevents a fusion: the rule, the site that should read the float tensor, the node to name and why."""

    rule: str
    site: Site
    node: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """What is wrong with the places of Q/DQ.

    Attributes:
        missing: Sites that want Q/DQ and have none, each with its rule; layers in float as a whole are not among them.
        hindering: Q/DQ where it prevents a fusion.
        groups: Sites whose scales must be equal: around every Concat.
        in_float: Layers in float between quantized ones.
    """

    missing: list[tuple[str, Wanted]]
    hindering: list[Hindrance]
    groups: list[tuple[onnx.NodeProto, list[Site]]]
    in_float: list[onnx.NodeProto]


def placement(view: FloatView) -> Placement:
    """Compare the sites of a model with those that ``wanted_sites`` names for its float graph."""
    layers = {node.output[0]: node for node in view.model.graph.node if _is_layer(view.graph, node)}
    quantized = {name for name in layers if {(name, 0), (name, 1)} <= view.sites.keys()}
    touched = {name for name in layers if not {(name, 0), (name, 1)}.isdisjoint(view.sites)}
    between = _between(view.model, touched)
    wanted = wanted_sites(view.model)
    shared = {each.group for each in wanted if each.group is not None and each.site in view.sites}
    missing: list[tuple[str, Wanted]] = []
    hindering: list[Hindrance] = []
    residual: dict[str, set[int]] = {}
    for each in wanted:
        name, position = each.site
        if each.reason == "residual":
            if _has_one_of_two_branches(view, name):
                continue
            residual.setdefault(name, set()).add(position)
        if each.site in view.sites:
            continue
        if each.reason == "residual":
            counts = _convolution(view.graph, view.graph.producer[name].input[1 - position]) in quantized
        elif each.reason in ("gate", "pooling"):
            counts = name in between
        elif each.reason == "concat":
            counts = each.group in shared
        else:
            counts = name in touched
        if counts:
            missing.append((_RULES[each.reason], each))
    for name, positions in residual.items():
        hindering += _on_the_branch(view, name, positions)
    hindering += [*_before_activation(view), *_before_norm(view)]
    return Placement(
        missing=missing,
        hindering=hindering,
        groups=list(_groups(view)),
        in_float=[
            node
            for name, node in layers.items()
            if name not in touched and name in between and not _has_no_scales(node)
        ],
    )


def placement_findings(view: FloatView, placed: Placement) -> Iterator[Finding]:
    """Yield the findings about places, in no special order."""
    graph = view.graph
    for rule, wanted in placed.missing:
        node = graph.producer[wanted.site[0]]
        where = f"input {wanted.site[1]}, {wanted.tensor!r}, of {node.op_type} has no Q/DQ"
        yield Finding(rule, node_name(node), where + (", its input has" if rule == "weight-in-float" else ""))
    for each in placed.hindering:
        yield Finding(each.rule, each.node, each.reason)
    for node in placed.in_float:
        yield Finding("layer-in-float", node_name(node), f"{node.op_type} has no Q/DQ on its input and weight")
    yield from _unfused(view)


def _is_layer(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type not in WEIGHTED_OPS or len(node.input) < 2:
        return False
    return (graph.constant(node.input[0]) is None) != (graph.constant(node.input[1]) is None)


def _has_no_scales(node: onnx.NodeProto) -> bool:
    """Say whether no scales of a layer's weight are right, see ``chosen_weight_scale``, so that it stays in float."""
    return node.op_type == "ConvTranspose" and int_attribute(node, "group", 1) != 1


def _between(model: onnx.ModelProto, quantized: set[str]) -> set[str]:
    """Return the nodes, by first output, with a quantized layer somewhere before and somewhere behind them."""
    above: set[str] = set()
    for node in model.graph.node:
        if any(read in above for read in node.input) or (node.output and node.output[0] in quantized):
            above.update(node.output)
    behind: set[str] = set()
    found: set[str] = set()
    under: set[str] = set()
    for node in reversed(model.graph.node):
        if any(name in behind for name in node.output):
            under.update(node.output[:1])
        if any(name in behind for name in node.output) or (node.output and node.output[0] in quantized):
            behind.update(node.input)
    for node in model.graph.node:
        if node.output and node.output[0] in under and any(read in above for read in node.input):
            found.add(node.output[0])
    return found


def _convolution(graph: Graph, tensor: str) -> str:
    """Return the output of the convolution that a tensor comes from, with at most BN in between; "" without one."""
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in _BEHIND_CONVOLUTION:
        node = graph.producer.get(node.input[0])
    return node.output[0] if node is not None and node.op_type in _CONVOLUTIONS else ""


def _has_one_of_two_branches(view: FloatView, name: str) -> bool:
    """Say whether both operands of an Add are convolutions and one of them has Q/DQ: the other can fuse with the Add.

    Which one ``wanted_sites`` prefers does not matter then.
    """
    reads = view.graph.producer[name].input
    return all(_convolution(view.graph, read) for read in reads) and ((name, 0) in view.sites) != (
        (name, 1) in view.sites
    )


def _on_the_branch(view: FloatView, name: str, positions: set[int]) -> Iterator[Hindrance]:
    node = view.graph.producer[name]
    if len(positions) != 1:
        return
    branch = 1 - next(iter(positions))
    read = view.sites.get((name, branch))
    if read is not None:
        reason = f"its input {branch} has Q/DQ; {read.tensor!r} comes from a convolution, which would fuse with the Add"
        yield Hindrance("both-residual-inputs", (name, branch), node_name(node), reason)


def _before_activation(view: FloatView) -> Iterator[Hindrance]:
    for (name, position), read in view.sites.items():
        node = view.graph.producer[name]
        before = _convolution(view.graph, read.tensor) if node.op_type in _FUSED and position == 0 else ""
        if before:
            maker = view.graph.producer[before]
            reason = f"it stands between {maker.op_type} {node_name(maker)} and {node.op_type} {node_name(node)}"
            yield Hindrance("before-activation", (name, position), node_name(read.dequantize), reason)


def _groups(view: FloatView) -> Iterator[tuple[onnx.NodeProto, list[Site]]]:
    readers: dict[str, list[Site]] = {}
    for site, read in view.sites.items():
        readers.setdefault(read.tensor, []).append(site)
    for node in view.model.graph.node:
        if node.op_type == "Concat":
            sites = [site for i in range(len(node.input)) if (site := (node.output[0], i)) in view.sites]
            yield node, sites + readers.get(node.output[0], [])


def _unfused(view: FloatView) -> Iterator[Finding]:
    for node in _norms_without_layer(view):
        layer = next((r for r in view.graph.consumers[node.output[0]] if r.op_type in WEIGHTED_OPS), None)
        if layer is not None and (node.output[0], 0) not in view.sites:
            reason = f"it stands before {layer.op_type} {node_name(layer)}; only a layer before it could take it in"
            yield Finding("unfused-bn", node_name(node), reason)


def _before_norm(view: FloatView) -> Iterator[Hindrance]:
    for node in _norms_without_layer(view):
        site = node.output[0], 0
        if site in view.sites:
            reason = "it reads Q/DQ, and no layer before it can take it in"
            yield Hindrance("unfused-bn", site, node_name(node), reason)


def _norms_without_layer(view: FloatView) -> Iterator[onnx.NodeProto]:
    """Yield every BN that no layer before it can take in."""
    for node in view.model.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        maker = view.graph.producer.get(node.input[0])
        while maker is not None and maker.op_type in ("Identity", "Dropout"):
            maker = view.graph.producer.get(maker.input[0])
        if maker is None or maker.op_type not in WEIGHTED_OPS:
            yield node
