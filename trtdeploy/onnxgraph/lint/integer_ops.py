"""Ops on codes (ONNX Runtime's QOperator format) written as Q/DQ around float ops.

Sources: the signatures of https://onnx.ai/onnx/operators/ (QLinearConv, QLinearMatMul) and of ONNX Runtime's
docs/ContribOperators.md (com.microsoft). What computes its scales at run time (DynamicQuantizeLinear, ConvInteger,
MatMulInteger) has no ranges to keep and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.onnxgraph.qdq import Graph, int_attribute, node_name, unused
from trtdeploy.tensors import Array

_INTEGER_OPS = frozenset(
    {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QGemm"}
)
_UNARY = {
    "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearAveragePool": "AveragePool",
    "QLinearSoftmax": "Softmax",
}
_BINARY = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}
_COMMUTES = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Relu"}
)
_EXTENSIONS = ("channels_last", "opset")
"""Attributes of ONNX Runtime's ops that ONNX's have not."""


def is_integer_op(node: onnx.NodeProto) -> bool:
    """Say whether a node computes on codes."""
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS


def integer_ops_to_qdq(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Replace, in place, every op on codes that can be by Q/DQ around its float op.

    Returns:
        The name and the op of each node that was replaced.
    """
    rewriting = _Rewriting(Graph(model.graph), {tensor.name for tensor in model.graph.initializer})
    rewriting.used.update(value.name for value in model.graph.input)
    rewriting.used.update(*(node.output for node in model.graph.node))
    replaced: list[tuple[str, str]] = []
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        written = list(rewriting.of(node))
        if written:
            replaced.append((node_name(node), node.op_type))
        nodes += written or [node]
        if node.op_type == "QuantizeLinear":
            rewriting.parameters[node.output[0]] = list(node.input[1:])
    if replaced:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(rewriting.constants)
        domains = {node.domain for node in nodes}
        kept = [entry for entry in model.opset_import if entry.domain in domains or entry.domain in ("", "ai.onnx")]
        del model.opset_import[:]
        model.opset_import.extend(kept)
    return replaced


def _alpha(node: onnx.NodeProto) -> float:
    return next((entry.f for entry in node.attribute if entry.name == "alpha"), 1.0)


@dataclass
class _Rewriting:
    """What is known while the nodes are written again, in order.

    Attributes:
        graph: The graph as it was.
        used: Names of tensors.
        parameters: Scale and zero-point of every tensor of codes.
        constants: New initializers.
    """

    graph: Graph
    used: set[str]
    parameters: dict[str, list[str]] = field(default_factory=dict)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def of(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield what stands for a node; nothing where it stays."""
        read = list(node.input)
        if node.op_type in _COMMUTES and read and read[0] in self.parameters:
            given = self.parameters[read[0]]
            return self._written(node, node.op_type, [[read[0], *given]], given, others=read[1:])
        if int_attribute(node, "channels_last", 0):
            return iter(())
        if node.op_type in _UNARY:
            return self._written(node, _UNARY[node.op_type], [read[:3]], read[3:5])
        if node.op_type in _BINARY:
            weight_axis = -1 if node.op_type == "QLinearMatMul" else None
            return self._written(node, _BINARY[node.op_type], [read[:3], read[3:6]], read[6:8], axis=weight_axis)
        if node.op_type == "QLinearConcat":
            return self._written(node, "Concat", [read[i : i + 3] for i in range(2, len(read), 3)], read[:2])
        if node.op_type == "QLinearConv":
            return self._with_bias(node, "Conv", read[:6], read[8:9], read[6:8], axis=0)
        if node.op_type == "QGemm":
            axis = 0 if int_attribute(node, "transB", 0) else 1
            return self._with_bias(node, "Gemm", read[:6], read[6:7], read[7:9], axis=axis)
        return iter(())

    def _with_bias(
        self, node: onnx.NodeProto, op: str, read: list[str], bias: list[str], made: list[str], axis: int
    ) -> Iterator[onnx.NodeProto]:
        others: list[str] = []
        if bias and bias[0]:
            codes, *scales = (self.graph.constant(name) for name in (bias[0], read[1], read[4]))
            if codes is None or any(scale is None for scale in scales):
                return iter(())
            # the codes of a bias have the scale of the products: input times weight, and of QGemm alpha, too
            products = np.float64(scales[0]) * np.ravel(np.asarray(scales[1], np.float64)) * _alpha(node)
            values = codes.astype(np.float64) * products
            others.append(self._constant(f"{bias[0]}.float", np.asarray(values, np.float32)))
        return self._written(node, op, [read[:3], read[3:6]], made, others=others, axis=axis)

    def _written(
        self,
        node: onnx.NodeProto,
        op: str,
        inputs: list[list[str]],
        made: list[str],
        *,
        others: list[str] | None = None,
        axis: int | None = None,
    ) -> Iterator[onnx.NodeProto]:
        if any(len(each) < 2 for each in inputs):
            return  # ONNX's checker does not know how many inputs ops of ONNX Runtime have
        stem = node.output[0]
        floats: list[str] = []
        for place, (codes, scale, *zero) in enumerate(inputs):
            floats.append(self._unused(f"{stem}.input{place}"))
            attributes: dict[str, Any] = self._axis(codes, scale, axis) if place == 1 else {}
            reads = [codes, scale, *(name for name in zero if name)]
            yield helper.make_node("DequantizeLinear", reads, floats[-1:], name=floats[-1], **attributes)
        quantizes = bool(made and made[0])
        result = self._unused(f"{stem}.float") if quantizes else stem
        written = helper.make_node(op, [*floats, *(others or ())], [result], name=node.name or result)
        written.attribute.extend(entry for entry in node.attribute if entry.name not in _EXTENSIONS)
        yield written
        if quantizes:
            self.parameters[stem] = list(made)
            yield helper.make_node("QuantizeLinear", [result, *filter(None, made)], [stem], name=f"{stem}.quantize")

    def _axis(self, codes: str, scale: str, axis: int | None) -> dict[str, Any]:
        values, scales = self.graph.constant(codes), self.graph.constant(scale)
        if axis is None or values is None or scales is None or scales.size == 1:
            return {}
        return {"axis": axis % values.ndim}

    def _constant(self, stem: str, values: Array) -> str:
        name = self._unused(stem)
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def _unused(self, stem: str) -> str:
        return unused(stem, self.used)
