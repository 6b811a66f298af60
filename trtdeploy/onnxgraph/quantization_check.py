"""What TensorRT refuses in explicit INT8, or takes silently and gets wrong.

The rules are those of IQuantizeLayer and IDequantizeLayer in NvInfer.h, and of the ONNX parser: symmetric INT8 codes,
positive constant scales, one scale per tensor for activations, one per output channel for weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.qdq import WEIGHTED_OPS, Graph, node_name
from trtdeploy.tensors import Array

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm"}
    | {"QLinearAdd", "QLinearMul", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearSigmoid", "QLinearConcat"}
)
_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        rule: Short name of the rule.
        node: The node that breaks it.
        reason: What is wrong.
    """

    rule: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason} [{self.rule}]"


def check_quantization(model: onnx.ModelProto) -> list[Finding]:
    """Return all faults of a model's quantization, in the order of its nodes."""
    graph = Graph(model.graph)
    findings: list[Finding] = []
    for node in model.graph.node:
        if node.op_type in _INTEGER_OPS:
            plain = node.op_type.removeprefix("QLinear")
            reason = f"{node.op_type} is unknown to TensorRT; it takes Q/DQ around {plain}"
            findings.append(Finding("integer-op", node_name(node), reason))
        elif node.op_type in _QDQ:
            findings += [Finding(rule, node_name(node), reason) for rule, reason in _faults(graph, node)]
    return findings


def require_quantization(model: onnx.ModelProto) -> None:
    """Refuse a model with a faulty quantization.

    Raises:
        QuantizationError: It names every faulty node, up to a limit.
    """
    findings = check_quantization(model)
    if not findings:
        return
    shown = "; ".join(str(finding) for finding in findings[:_SHOWN])
    more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
    raise QuantizationError(
        f"TensorRT cannot take this model's quantization: {shown}{more}.",
        hint="Quantize symmetrically to INT8, weights per output channel, activations per tensor; constant scales.",
    )


def _faults(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    scale = graph.constant(node.input[1])
    if scale is None:
        yield "runtime-scale", "its scale is computed at run time and must be a constant"
    else:
        yield from _scale_faults(graph, node, scale)
    yield from _zero_point_faults(graph, node)


def _scale_faults(graph: Graph, node: onnx.NodeProto, scale: Array) -> Iterator[tuple[str, str]]:
    if not np.isfinite(scale).all():
        yield "scale-not-finite", "a scale is infinite or not a number"
    elif (scale <= 0).any():
        kind = "zero" if (scale == 0).any() else "negative"
        yield f"scale-{kind}", f"a scale is {kind}; all scales must be positive"
    if scale.size == 1:
        return
    weights = _constant_behind(graph, node)
    if weights is None:
        yield (
            "per-channel-activation",
            "it quantizes an activation per-channel; only weights may have a scale per channel",
        )
        return
    axis = next((int(entry.i) for entry in node.attribute if entry.name == "axis"), 1) % max(weights.ndim, 1)
    for reader in _readers(graph, node):
        wanted = {"Conv": 0, "ConvTranspose": 1}.get(reader.op_type)
        if reader.op_type == "Gemm":
            wanted = 0 if any(entry.name == "transB" and entry.i for entry in reader.attribute) else 1
        if wanted is not None and axis != wanted:
            yield (
                "weight-axis",
                f"its scales lie along axis {axis}; {reader.op_type} has its output channels on axis {wanted}",
            )


def _zero_point_faults(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    if len(node.input) < 3 or not node.input[2]:
        if node.op_type == "QuantizeLinear" and not any(entry.name == "output_dtype" for entry in node.attribute):
            yield "uint8", "without a zero-point its codes are uint8; TensorRT has INT8 only"
        return
    zero_point = graph.constant(node.input[2])
    if zero_point is None:
        yield "runtime-zero-point", "its zero-point is computed at run time and must be a constant"
        return
    if zero_point.dtype == np.uint8:
        yield "uint8", "its codes are uint8; TensorRT has INT8 only and would silently read them as such"
    if zero_point.astype(np.int64).any():
        yield "zero-point", "its zero-point is not zero; TensorRT quantizes symmetrically"


def _constant_behind(graph: Graph, node: onnx.NodeProto) -> Array | None:
    source = node.input[0]
    quantize = graph.maker(source, "QuantizeLinear") if node.op_type == "DequantizeLinear" else None
    return graph.constant(quantize.input[0] if quantize is not None else source)


def _readers(graph: Graph, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Return the weighted layers that read what a Q/DQ pair gives."""
    for reader in graph.consumers[node.output[0]]:
        if reader.op_type in WEIGHTED_OPS:
            yield reader
        elif reader.op_type == "DequantizeLinear" and node.op_type == "QuantizeLinear":
            yield from (other for other in graph.consumers[reader.output[0]] if other.op_type in WEIGHTED_OPS)
