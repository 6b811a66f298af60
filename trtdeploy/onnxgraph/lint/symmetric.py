"""Q/DQ of another form rewritten as symmetric INT8, in place: what it stands for is kept as well as that can."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.graph import Graph, dequantized_constant, int_attribute, node_name, unused
from trtdeploy.onnxgraph.lint.linter import errors
from trtdeploy.onnxgraph.lint.node_findings import weight_readers
from trtdeploy.onnxgraph.qdq.dynamic_ranges import INT8_BOUND
from trtdeploy.onnxgraph.qdq.int8_scales import activation_scale, channel_axis, weight_scale
from trtdeploy.onnxgraph.qdq.pairs import Pair, pairs
from trtdeploy.tensors import Array

_KEEP_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Reshape", "Transpose", "QuantizeLinear", "Squeeze"}
    | {"DequantizeLinear", "Identity", "Dropout", "ReduceMean", "Unsqueeze", "Slice", "Split", "Tile", "Expand"}
    | {
        "Gather",
        "GatherElements",
        "GatherND",
        "DepthToSpace",
        "SpaceToDepth",
        "GlobalMaxPool",
        "ReduceMax",
        "ReduceMin",
    }
)
_KEEP_SIGN_OF_ALL = frozenset({"Concat", "Add", "Mul"})
_POSITIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})
_FLOATS = frozenset({"float16", "bfloat16", "float32"})
_CODES = (np.int8, np.uint8, np.int16, np.uint16)


class Rewriter:
    """Rewrites the pairs of one model.

    Attributes:
        done: Rule, node and what was done, for each rewritten node.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.done: list[tuple[str, str, str]] = []
        self._model = model
        self._graph = Graph(model.graph)
        self._used = {value.name for value in [*model.graph.initializer, *model.graph.input]}
        self._used.update(*(node.output for node in model.graph.node))
        self._known: dict[str, Array] = {}
        self._gone: set[str] = set()
        self._relus: dict[str, onnx.NodeProto] = {}
        self._positive = set(self._positive_tensors())

    def run(self) -> None:
        """Rewrite every pair that an error of the linter is about, and every bias of codes."""
        rules: dict[str, str] = {}
        for finding in errors(self._model):
            rules.setdefault(finding.node, finding.rule)
        by_quantize: dict[str, list[Pair]] = defaultdict(list)
        for pair in list(pairs(self._graph)):
            broken = [name for node in (pair.quantize, pair.dequantize) if (name := _name(node)) in rules]
            if pair.is_constant and (broken or pair.is_bias or self._is_of_norm(pair)):
                self._requantize(pair, rules[broken[0]] if broken else "")
            elif broken and pair.quantize is not None:
                by_quantize[pair.quantize.output[0]].append(pair)
        self._known = activation_scales(self._graph)
        for readers in by_quantize.values():
            self._make_symmetric(readers, rules)
        if self._relus or self._gone:
            nodes = list(self._nodes())
            del self._model.graph.node[:]
            self._model.graph.node.extend(nodes)

    def _nodes(self) -> Iterator[onnx.NodeProto]:
        for node in self._model.graph.node:
            if node.output and node.output[0] in self._relus:
                yield self._relus[node.output[0]]
            if not node.output or node.output[0] not in self._gone:
                yield node

    def _positive_tensors(self) -> Iterator[str]:
        found: set[str] = set()
        for node in self._model.graph.node:
            reads = [name in found for name in node.input if name]
            if (
                node.op_type in _POSITIVE
                or (node.op_type in _KEEP_SIGN and reads and reads[0])
                or (node.op_type in _KEEP_SIGN_OF_ALL and all(reads))
                or (node.op_type == "QuantizeLinear" and self._begins_at_zero(node))
                or (node.op_type == "Clip" and self._clips_at_zero(node))
            ):
                found.update(node.output)
                yield from node.output

    def _begins_at_zero(self, node: onnx.NodeProto) -> bool:
        zero = self._zero(node)
        return zero is not None and zero.dtype in _CODES and bool((zero == np.iinfo(zero.dtype).min).all())

    def _clips_at_zero(self, node: onnx.NodeProto) -> bool:
        low = self._graph.constant(node.input[1]) if len(node.input) > 1 else None
        return low is not None and bool((low >= 0).all())

    def _zero(self, node: onnx.NodeProto) -> Array | None:
        has_zero = len(node.input) > 2 and bool(node.input[2])
        return self._graph.constant(node.input[2]) if has_zero else np.zeros((), np.uint8)

    def _is_of_norm(self, pair: Pair) -> bool:
        readers = self._graph.consumers[pair.dequantize.output[0]]
        return any(reader.op_type == "BatchNormalization" for reader in readers)

    def _is_weight(self, pair: Pair) -> bool:
        return next(weight_readers(self._graph, pair.dequantize.output[0], 0, 1), None) is not None or any(
            reader.op_type == "Transpose" for reader in self._graph.consumers[pair.dequantize.output[0]]
        )

    def _make_symmetric(self, readers: list[Pair], rules: dict[str, str]) -> None:
        quantize = readers[0].quantize
        everyone = self._graph.consumers[quantize.output[0]] if quantize is not None else []
        if quantize is None or any(node.op_type != "DequantizeLinear" for node in everyone):
            return
        scale, zero = self._graph.constant(quantize.input[1]), self._zero(quantize)
        if scale is None or zero is None or zero.dtype not in _CODES:
            return  # its range is not known
        for node in everyone:
            own = self._graph.constant(node.input[1])
            if own is None or own.tobytes() != scale.tobytes():
                return
        if not np.isfinite(scale).all():
            if readers[0].tensor not in self._known:
                return
            scale, zero = self._known[readers[0].tensor].astype(scale.dtype), np.zeros((), np.int8)
        kind = scale.dtype
        scale = np.abs(scale.astype(np.float64))
        limits = np.iinfo(zero.dtype)
        ends = [np.abs((end - zero.astype(np.float64)) * scale) for end in (limits.min, limits.max)]
        is_symmetric = zero.dtype == np.int8 and not zero.any()
        new = np.float32(scale.max() if is_symmetric else np.max(ends) / INT8_BOUND)
        new = new if new > 0 else activation_scale(0).reshape(-1)[0]
        names = [_name(node) for node in (quantize, *everyone)]
        if self._begins_at_zero(quantize) and quantize.input[0] not in self._positive:
            # codes that begin at 0 do the work of a Relu, and ONNX Runtime's quantizer has taken that out
            made = unused(f"{quantize.input[0]}.positive", self._used)
            self._relus[quantize.output[0]] = helper.make_node("Relu", [quantize.input[0]], [made], name=made)
            quantize.input[0] = made
        self._set_parameters([quantize, *everyone], np.asarray(new), None, kind)
        rule = next(rules[name] for name in names if name in rules)
        what = f"{quantize.input[0]!r} is quantized as symmetric INT8 with the scale {new:.6g}"
        self.done.append((rule, names[0], what))

    def _requantize(self, pair: Pair, rule: str) -> None:
        dequantize, output = pair.dequantize, pair.dequantize.output[0]
        try:
            values = (
                dequantized_constant(self._graph, dequantize)
                if pair.quantize is None
                else self._graph.constant(pair.tensor)
            )
        except ModelError:
            return  # its scales do not fit its codes: nobody knows what they stand for
        old = self._graph.constant(dequantize.input[1])
        if values is None or old is None or values.dtype.name not in _FLOATS or not np.isfinite(values).all():
            return
        if not self._is_weight(pair):
            # a bias, or a parameter of a BN: TensorRT wants floats
            self._gone.add(output)
            self._model.graph.initializer.append(numpy_helper.from_array(values, output))
            if rule:
                self.done.append((rule, _name(dequantize), f"the constant {output!r} is float"))
            return
        axis = self._channels(dequantize, values)
        scale = _stored(weight_scale(values.astype(np.float32), axis), old.dtype)
        axis = axis if scale.ndim else None
        if pair.quantize is not None:
            self._set_parameters([pair.quantize, dequantize], scale, axis, old.dtype)
        else:
            shaped = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
            codes = np.clip(np.rint(values / shaped.astype(np.float32)), -INT8_BOUND, INT8_BOUND).astype(np.int8)
            dequantize.input[0] = self._constant(f"{output}.int8", codes)
            self._set_parameters([dequantize], scale, axis, old.dtype)
        per = f"with {scale.size} scales along axis {axis}" if axis is not None else "with one scale"
        self.done.append((rule, _name(dequantize), f"the weight {output!r} is quantized as symmetric INT8 {per}"))

    def _channels(self, dequantize: onnx.NodeProto, values: Array) -> int | None:
        """Return the axis of output channels; of a ConvTranspose that of the scales that it has, if they fit."""
        old, own = self._graph.constant(dequantize.input[1]), int_attribute(dequantize, "axis", 1)
        for axis in range(values.ndim):
            for reader, position, seen in weight_readers(self._graph, dequantize.output[0], axis, values.ndim):
                if reader.op_type == "ConvTranspose":
                    has_channels = old is not None and old.shape == values.shape[own : own + 1] and old.size > 1
                    return own % values.ndim if has_channels else None
                if seen == channel_axis(reader, position, values.ndim):
                    return axis
        return None

    def _set_parameters(self, nodes: list[onnx.NodeProto], scale: Array, axis: int | None, kind: np.dtype[Any]) -> None:
        """Give nodes a new scale of the type of their old one, which is that of the tensors around them."""
        stem = nodes[0].output[0]
        names = [
            self._constant(f"{stem}.scale", _stored(scale, kind)),
            self._constant(f"{stem}.zero", np.zeros(scale.shape, np.int8)),
        ]
        for node in nodes:
            # of a QuantizeLinear the type of its codes, which the zero-point says; of a DequantizeLinear that of floats
            gone = ("axis", "output_dtype") if node.op_type == "QuantizeLinear" else ("axis",)
            kept = [entry for entry in node.attribute if entry.name not in gone]
            source = node.input[0]
            del node.attribute[:], node.input[:]
            node.input.extend([source, *names])
            node.attribute.extend(kept + ([] if axis is None else [helper.make_attribute("axis", axis)]))

    def _constant(self, stem: str, values: Array) -> str:
        name = unused(stem, self._used)
        self._model.graph.initializer.append(numpy_helper.from_array(values, name))
        return name


def activation_scales(graph: Graph) -> dict[str, Array]:
    """Return the scale of every activation that has symmetric INT8 anywhere; the larger one of two."""
    known: dict[str, Array] = {}
    for pair in pairs(graph):
        if pair.quantizer is not None and not pair.is_constant and pair.quantizer.axis is None:
            known[pair.tensor] = np.maximum(known.get(pair.tensor, pair.quantizer.scale), pair.quantizer.scale)
    return known


def _stored(scale: Array, kind: np.dtype[Any]) -> Array:
    """Return a scale in the type of the one that it replaces; what is 0 there is the smallest number above that."""
    stored: Array = scale.astype(kind)
    return np.maximum(stored, np.nextafter(kind.type(0), kind.type(1)))


def _name(node: onnx.NodeProto | None) -> str:
    return node_name(node) if node is not None else ""
