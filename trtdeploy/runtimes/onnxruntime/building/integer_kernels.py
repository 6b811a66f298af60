"""The integer kernels of a graph: which multiply codes of which types, and the same sums from unsigned weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from trtdeploy.onnxgraph.exact_integers import PRODUCTS, Operands, exact_integers
from trtdeploy.runtimes.onnxruntime.building.integer_sums import LARGEST_SAFE_CODE, Types, exact_products
from trtdeploy.tensors import Array

# Kernels that work on codes without summing up products of them.
_OTHERS = frozenset({"QLinearAdd", "QLinearMul", "QLinearGlobalAveragePool", "QLinearAveragePool"})
INTEGER_KERNELS = _OTHERS | frozenset(PRODUCTS)


def inexact_kernels(model: onnx.ModelProto, exact: frozenset[Types] | None = None) -> list[str]:
    """Return, for every product of codes whose sums are not exact on this processor, its operator and types.

    Args:
        model: A graph with kernels of ONNX Runtime, or any other.
        exact: Types that are summed up exactly; by default those of this processor.
    """
    known = exact_products() if exact is None else exact
    return [f"{each.node.op_type} of {' by '.join(each.types)}" for each in _products(model) if not each.is_safe(known)]


def with_exact_sums(model: onnx.ModelProto, exact: frozenset[Types] | None = None) -> onnx.ModelProto:
    """Return the model with weights of the activations' sign, if this processor does not sum up all products exactly.

    See ``onnxgraph.exact_integers``: the same products, to the bit, by kernels that are exact on every processor.

    Args:
        model: Its ``QLinearConv``, ``MatMulInteger`` etc. are rewritten; Q/DQ is not touched. It is not changed.
        exact: As in ``inexact_kernels``.
    """
    known = exact_products() if exact is None else exact
    return model if all(each.is_safe(known) for each in _products(model)) else exact_integers(model)


@dataclass
class _Scope:
    """What a graph can see: its own constants and types, and those of the graphs around it."""

    graph: onnx.GraphProto
    constants: dict[str, Array] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: onnx.GraphProto, outer: _Scope | None) -> _Scope:
        scope = cls(graph, dict(outer.constants), dict(outer.types)) if outer else cls(graph)
        for value in [*graph.input, *graph.value_info, *graph.output]:
            if value.type.tensor_type.elem_type:
                scope.types[value.name] = _type_name(value.type.tensor_type.elem_type)
        for tensor in graph.initializer:
            scope.types[tensor.name] = _type_name(tensor.data_type)
            if scope.types[tensor.name] in ("int8", "uint8"):
                scope.constants[tensor.name] = numpy_helper.to_array(tensor)
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                scope.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
                scope.types[node.output[0]] = str(scope.constants[node.output[0]].dtype)
            elif node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
                zero = node.input[2] if len(node.input) > 2 else ""
                scope.types[node.output[0]] = scope.types.get(zero, "uint8")
        return scope

    def type_of(self, name: str, zero_point: str) -> str:
        return self.types.get(name) or self.types.get(zero_point) or "unknown"


@dataclass(frozen=True)
class _Product:
    """One product of codes."""

    node: onnx.NodeProto
    operands: Operands
    scope: _Scope

    @property
    def types(self) -> Types:
        at = self.operands
        a = "uint8" if at.a is None else self.scope.type_of(self._input(at.a), self._input(at.a_zero))
        return a, self.scope.type_of(self._input(at.b), self._input(at.b_zero))

    def is_safe(self, exact: frozenset[Types]) -> bool:
        return self.types in exact or self._has_small_codes()

    def _has_small_codes(self) -> bool:
        codes = self.scope.constants.get(self._input(self.operands.b))
        if codes is None or codes.dtype != np.int8:
            return False
        return not codes.size or int(np.abs(codes.astype(np.int16)).max()) <= LARGEST_SAFE_CODE

    def _input(self, index: int | None) -> str:
        return self.node.input[index] if index is not None and index < len(self.node.input) else ""


def _products(model: onnx.ModelProto) -> Iterator[_Product]:
    pending: list[tuple[onnx.GraphProto, _Scope | None]] = [(model.graph, None)]
    while pending:
        graph, outer = pending.pop()
        scope = _Scope.of(graph, outer)
        for node in graph.node:
            for operands in PRODUCTS.get(node.op_type, ()):
                yield _Product(node, operands, scope)
            for attribute in node.attribute:
                pending += [(inner, scope) for inner in [attribute.g, *attribute.graphs] if inner.node]


def _type_name(number: int) -> str:
    if number == onnx.TensorProto.UINT8:
        return "uint8"
    return "int8" if number == onnx.TensorProto.INT8 else "no code"
