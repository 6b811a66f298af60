"""Ops on codes (ONNX Runtime's QOperator format) written as Q/DQ around float ops.

Sources: the signatures of https://onnx.ai/onnx/operators/ (QLinearConv, QLinearMatMul) and of ONNX Runtime's
docs/ContribOperators.md (com.microsoft). What computes its scales at run time (DynamicQuantizeLinear, ConvInteger,
MatMulInteger) has no ranges to keep and stays. Ops that only pass codes on (Resize, Split, Gather, ...) do the same to
the floats that the codes stand for, so that they get Q/DQ around them, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.onnxgraph.graph import Graph, int_attribute, node_name, unused
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
# Ops that choose, order or repeat codes, with the positions of the inputs that hold them.
_PASSES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Dropout", "Slice"), (0,)),
    **dict.fromkeys(("Resize", "Upsample", "Split", "Tile", "Expand", "DepthToSpace", "SpaceToDepth", "Trilu"), (0,)),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Compress", "ReverseSequence", "TopK"), (0,)),
    **dict.fromkeys(("Relu", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin"), (0,)),
    **dict.fromkeys(("ArgMax", "ArgMin", "Shape", "Size"), (0,)),
    **dict.fromkeys(("ScatterElements", "ScatterND", "Pad"), (0, 2)),
    **dict.fromkeys(("Concat", "Max", "Min"), tuple(range(1024))),
    "Clip": (0, 1, 2),
    "Where": (1, 2),
}
_COUNTS = frozenset({"ArgMax", "ArgMin", "Shape", "Size"})
"""What these make are no codes."""
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
    rewriting.know_constants()
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


def _text_attribute(node: onnx.NodeProto, name: str, default: str) -> str:
    return next((entry.s.decode() for entry in node.attribute if entry.name == name), default)


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
        if node.op_type in _PASSES and node.domain in ("", "ai.onnx"):
            return self._passing(node)
        if int_attribute(node, "channels_last", 0):
            return iter(())
        if node.op_type in _UNARY:
            return self._written(node, _UNARY[node.op_type], [read[:3]], read[3:5])
        if node.op_type in _BINARY:
            weight_axis = -1 if node.op_type == "QLinearMatMul" else None
            return self._written(node, _BINARY[node.op_type], [read[:3], read[3:6]], read[6:8], axis=weight_axis)
        if node.op_type == "QLinearWhere" and len(read) > 8:
            return self._written(node, "Where", [read[0], read[1:4], read[4:7]], read[7:9])
        if node.op_type == "QLinearConcat":
            return self._written(node, "Concat", [read[i : i + 3] for i in range(2, len(read), 3)], read[:2])
        if node.op_type == "QLinearConv":
            return self._with_bias(node, "Conv", read[:6], read[8:9], read[6:8], axis=0)
        if node.op_type == "QGemm":
            axis = 0 if int_attribute(node, "transB", 0) else 1
            return self._with_bias(node, "Gemm", read[:6], read[6:7], read[7:9], axis=axis)
        return iter(())

    def know_constants(self) -> None:
        """Learn what constants of codes that a passing op reads stand for, from what reads its result."""
        wanted: dict[str, list[str]] = {}
        for node in reversed(self.graph.graph.node):
            read = list(node.input)
            if node.op_type == "DequantizeLinear":
                wanted[read[0]] = read[1:]
            elif node.op_type in _UNARY or node.op_type in _BINARY or node.op_type == "QLinearConv":
                wanted[read[0]] = read[1:3]
                if len(read) > 5:
                    wanted[read[3]] = read[4:6]
            elif node.op_type in _PASSES and node.output[0] in wanted:
                for position in _PASSES[node.op_type]:
                    if position < len(read):
                        wanted.setdefault(read[position], wanted[node.output[0]])
        for name, given in wanted.items():
            scale = self.graph.constant(given[0]) if given else None
            if self.graph.constant(name) is not None and scale is not None and scale.size == 1:
                self.parameters[name] = given

    def _passing(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield a passing op on floats; nothing where it passes no codes, or codes of several meanings."""
        read = list(node.input)
        places = [position for position in _PASSES[node.op_type] if position < len(read) and read[position]]
        known = [self.parameters[read[position]] for position in places if read[position] in self.parameters]
        if not known or not all(self._same(known[0], each) for each in known):
            return iter(())
        given = known[0]
        operands: list[str | list[str]] = []
        for position, name in enumerate(read):
            if position not in places:
                operands.append(name)
            elif name in self.parameters or self.graph.constant(name) is not None:
                operands.append([name, *given])
            else:
                return iter(())
        if node.op_type == "Pad" and "constant" in _text_attribute(node, "mode", "constant"):
            operands = self._padded(operands, given)
        made = [] if node.op_type in _COUNTS else given
        return self._written(node, node.op_type, operands, made, all_outputs=node.op_type == "Split")

    def _padded(self, operands: list[str | list[str]], given: list[str]) -> list[str | list[str]]:
        """Return the inputs of a Pad whose value, where none is given, is what code 0 stands for."""
        zero = self.graph.constant(given[1]) if len(given) > 1 and given[1] else None
        if zero is None or not zero.any() or (len(operands) > 2 and operands[2]):
            return operands
        code = self._constant("pad.code", np.zeros((), zero.dtype))
        return [*operands[:2], [code, *given], *operands[3:]]

    def _same(self, first: list[str], second: list[str]) -> bool:
        values = [(self.graph.constant(a), self.graph.constant(b)) for a, b in zip(first, second, strict=False)]
        return len(first) == len(second) and all(
            a == b or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))
            for a, b, (x, y) in zip(first, second, values, strict=True)
        )

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
        return self._written(node, op, [read[:3], read[3:6], *others], made, axis=axis)

    def _written(
        self,
        node: onnx.NodeProto,
        op: str,
        operands: Sequence[str | list[str]],
        made: list[str],
        *,
        axis: int | None = None,
        all_outputs: bool = False,
    ) -> Iterator[onnx.NodeProto]:
        """Yield an op on floats: codes, scale and zero-point are dequantized, any other operand is read as it is.

        Its first output, or every one, is quantized with the scale and zero-point ``made``, if there are such.
        """
        if any(len(each) < 2 for each in operands if not isinstance(each, str)):
            return  # ONNX's checker does not know how many inputs ops of ONNX Runtime have
        stem = node.output[0]
        floats: list[str] = []
        place = 0
        for operand in operands:
            if isinstance(operand, str):
                floats.append(operand)
                continue
            codes, scale, *zero = operand
            floats.append(self._unused(f"{stem}.input{place}"))
            attributes: dict[str, Any] = self._axis(codes, scale, axis) if place == 1 else {}
            reads = [codes, scale, *(name for name in zero if name)]
            yield helper.make_node("DequantizeLinear", reads, floats[-1:], name=floats[-1], **attributes)
            place += 1
        quantized = [name for name in (node.output if all_outputs else [stem]) if name and made and made[0]]
        results = {name: self._unused(f"{name}.float") for name in quantized}
        outputs = [results.get(name, name) for name in node.output]
        written = helper.make_node(op, floats, outputs, name=node.name or outputs[0])
        written.attribute.extend(entry for entry in node.attribute if entry.name not in _EXTENSIONS)
        yield written
        for name, result in results.items():
            self.parameters[name] = list(made)
            yield helper.make_node("QuantizeLinear", [result, *filter(None, made)], [name], name=f"{name}.quantize")

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
