"""Every rule on one model."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from trtdeploy.errors import UsageError
from trtdeploy.onnxgraph.graph import Graph, node_name, opset_version
from trtdeploy.onnxgraph.lint.graph_findings import structure_findings
from trtdeploy.onnxgraph.lint.integer_ops import is_integer_op
from trtdeploy.onnxgraph.lint.node_findings import linear_findings
from trtdeploy.onnxgraph.lint.rules import RULES, Finding

_LINEAR = ("QuantizeLinear", "DequantizeLinear")


def lint(model: onnx.ModelProto, *, ignore: Collection[str] = ()) -> list[Finding]:
    """Return what breaks the rules of explicit INT8 on TensorRT.

    Bodies of If, Loop and Scan are not looked into; a finding says so.

    Args:
        model: The model, with all its weights.
        ignore: Rules to leave out, by number or short name.

    Raises:
        UsageError: There is no such rule.
    """
    known = {rule.id.lower(): rule.name for rule in RULES.values()} | {name: name for name in RULES}
    unknown = [name for name in ignore if name.lower() not in known]
    if unknown:
        raise UsageError(f"There is no rule {unknown[0]!r}; there are {', '.join(RULES)}.")
    ignored = {known[name.lower()] for name in ignore}
    return [finding for finding in _findings(model) if finding.rule not in ignored]


def errors(model: onnx.ModelProto) -> list[Finding]:
    """Return what TensorRT refuses, or takes and computes something else, in the order of the nodes."""
    graph = Graph(model.graph)
    findings: list[Finding] = []
    for node in model.graph.node:
        name = node_name(node)
        if is_integer_op(node):
            findings.append(Finding("integer-op", name, f"TensorRT does not take the op {node.op_type}"))
        elif node.op_type in _LINEAR:
            findings += (Finding(rule, name, why) for rule, why in linear_findings(graph, node, opset_version(model)))
    return findings


def _findings(model: onnx.ModelProto) -> list[Finding]:
    if not any(node.op_type in _LINEAR or is_integer_op(node) for node in model.graph.node):
        return [Finding("not-quantized", model.graph.name, "the model has no Q/DQ; TensorRT would run it in float")]
    found = errors(model)
    with_opset = all(finding.rule != "opset" for finding in found)
    return found + list(structure_findings(model, Graph(model.graph), with_opset=with_opset))
