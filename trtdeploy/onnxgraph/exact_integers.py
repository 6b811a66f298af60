"""Operators on integers in a form that every processor computes exactly.

Where codes of one operand are unsigned and of the other signed, ONNX Runtime's kernels add pairs of products in 16 bits
on x86 without VNNI, which saturates ("Quantize ONNX models", section "When and why do I need to try U8U8",
https://onnxruntime.ai); with both unsigned or both signed they do not. Moving codes and zero-point of a weight by 128
changes its sign and nothing else: only their difference counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper

from trtdeploy.onnxgraph.graph import remove_unused, unused
from trtdeploy.onnxgraph.tensor_types import graphs_inside, tensor_types

_HALF = 128


@dataclass(frozen=True)
class Operands:
    """Positions of inputs, of an activation and the weight that it is multiplied by.

    Attributes:
        a: The codes of the activation; None where the operator makes them of floats, which are unsigned then.
        a_zero: Their zero-point.
        b: The codes of the weight.
        b_zero: Their zero-point.
    """

    a: int | None
    a_zero: int | None
    b: int
    b_zero: int


# Sources: https://onnx.ai/onnx/operators/ and, for com.microsoft, ONNX Runtime's docs/ContribOperators.md.
PRODUCTS: Mapping[str, tuple[Operands, ...]] = {
    "QLinearConv": (Operands(0, 2, 3, 5),),
    "QLinearMatMul": (Operands(0, 2, 3, 5),),
    "QGemm": (Operands(0, 2, 3, 5),),
    "MatMulInteger": (Operands(0, 2, 1, 3),),
    "ConvInteger": (Operands(0, 2, 1, 3),),
    "MatMulIntegerToFloat": (Operands(0, 4, 1, 5),),
    "DynamicQuantizeMatMul": (Operands(None, None, 1, 3),),
    "DynamicQuantizeLSTM": (Operands(None, None, 1, 9), Operands(None, None, 2, 11)),
    "QAttention": (Operands(0, 6, 1, 7),),
}
"""Operators that sum up products of codes."""
_OTHER_SIGN: dict[int, int] = {TensorProto.INT8: TensorProto.UINT8, TensorProto.UINT8: TensorProto.INT8}


def exact_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which no operator on integers multiplies unsigned by signed codes; itself, where none does."""
    nodes = [node for graph in graphs_inside(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    if not any(map(_is_inexact, nodes)):
        return model
    if model.functions:
        model = inliner.inline_local_functions(model)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    _Signs(changed).unify()
    remove_unused(changed.graph)
    return changed


class _Signs:
    """The codes of a model, which is changed in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._graphs = list(graphs_inside(model.graph))
        self._types = tensor_types(model)
        self._constants = {tensor.name: tensor for graph in self._graphs for tensor in graph.initializer}
        self._used = {name for graph in self._graphs for node in graph.node for name in [*node.input, *node.output]}
        self._used.update(self._types, self._constants)
        self._moved: dict[str, str] = {}

    def unify(self) -> None:
        """Give both operands of every product one sign."""
        for graph in reversed(self._graphs):  # a node is copied with the graphs inside it, so these come first
            nodes: list[onnx.NodeProto] = []
            for node in graph.node:
                for operands in PRODUCTS.get(node.op_type, ()):
                    nodes += self._unify(node, operands)
                if node.op_type == "MatMulNBits":
                    _without(node, "accuracy_level")  # which allows to round the floats to codes
                nodes.append(node)
            del graph.node[:]
            graph.node.extend(nodes)

    def _unify(self, node: onnx.NodeProto, operands: Operands) -> Iterator[onnx.NodeProto]:
        given: int | None = TensorProto.UINT8
        if operands.a is not None:
            given = self._type(node, operands.a) or self._type(node, operands.a_zero)
        kind = self._type(node, operands.b) or self._type(node, operands.b_zero)
        if kind is None or given is None or given == kind or kind not in _OTHER_SIGN or given not in _OTHER_SIGN:
            return
        node.input.extend([""] * (operands.b_zero + 1 - len(node.input)))
        if not node.input[operands.b_zero]:
            node.input[operands.b_zero] = zero = unused(f"{node.input[operands.b]}.zero_point", self._used)
            self._add(numpy_helper.from_array(np.zeros((), helper.tensor_dtype_to_np_dtype(kind)), zero))
        for place in (operands.b, operands.b_zero):
            yield from self._move(node, place, kind)

    def _type(self, node: onnx.NodeProto, place: int | None) -> int | None:
        return self._types.get(node.input[place]) if place is not None and place < len(node.input) else None

    def _move(self, node: onnx.NodeProto, place: int, kind: int) -> Iterator[onnx.NodeProto]:
        """Let a node read codes, or their zero-point, moved to the other sign."""
        name = node.input[place]
        constant = self._constants.get(name)
        if name in self._moved and constant is not None:
            node.input[place] = self._moved[name]
            return
        step = _HALF if kind == TensorProto.INT8 else -_HALF
        node.input[place] = self._moved[name] = moved = unused(f"{name}.moved", self._used)
        if constant is not None:
            values = numpy_helper.to_array(constant).astype(np.int16) + step
            dtype = helper.tensor_dtype_to_np_dtype(_OTHER_SIGN[kind])
            self._add(numpy_helper.from_array(values.astype(dtype), moved))
            return
        wide, summed, half = (unused(f"{name}.{part}", self._used) for part in ("wide", "summed", "half"))
        self._add(numpy_helper.from_array(np.array(step, np.int32), half))
        yield helper.make_node("Cast", [name], [wide], to=TensorProto.INT32)
        yield helper.make_node("Add", [wide, half], [summed])
        yield helper.make_node("Cast", [summed], [moved], to=_OTHER_SIGN[kind])

    def _add(self, tensor: onnx.TensorProto) -> None:
        """Add a constant, which subgraphs read, too."""
        self._graph.initializer.append(tensor)
        self._constants[tensor.name] = tensor


def _is_inexact(node: onnx.NodeProto) -> bool:
    return node.op_type in PRODUCTS or node.op_type == "MatMulNBits"


def _without(node: onnx.NodeProto, attribute: str) -> None:
    kept = [entry for entry in node.attribute if entry.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
