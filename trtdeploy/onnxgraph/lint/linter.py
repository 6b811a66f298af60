"""Every rule on one model."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from trtdeploy.errors import UsageError
from trtdeploy.onnxgraph.lint.linear import linear_findings
from trtdeploy.onnxgraph.lint.rules import RULES, Finding
from trtdeploy.onnxgraph.lint.structure import structure_findings
from trtdeploy.onnxgraph.qdq import Graph, node_name, opset_version

_LINEAR = ("QuantizeLinear", "DequantizeLinear")
_INTEGER_OPS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm"})


def lint(model: onnx.ModelProto, *, ignore: Collection[str] = ()) -> list[Finding]:
    """Return what breaks the rules of explicit INT8 on TensorRT.

    Bodies of If, Loop and Scan are not looked into.

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
        if _is_integer_op(node):
            findings.append(Finding("integer-op", name, f"TensorRT does not take the op {node.op_type}"))
        elif node.op_type in _LINEAR:
            findings += (Finding(rule, name, why) for rule, why in linear_findings(graph, node, opset_version(model)))
    return findings


def _findings(model: onnx.ModelProto) -> list[Finding]:
    if not any(node.op_type in _LINEAR or _is_integer_op(node) for node in model.graph.node):
        return [Finding("not-quantized", model.graph.name, "the model has no Q/DQ; TensorRT would run it in float")]
    return errors(model) + list(structure_findings(model, Graph(model.graph)))


def _is_integer_op(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS
