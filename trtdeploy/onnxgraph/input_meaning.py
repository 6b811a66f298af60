"""Meaning of the values of a model's inputs, as far as its graph shows: rows of a table, a mask, a branch, a shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.inliner
from onnx import numpy_helper

from trtdeploy.onnxgraph.graph import int_attribute
from trtdeploy.tensors import Array

# Which inputs of an op come out again as they are, if in another order, type or number.
_PASSES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Cast", "Identity", "Flatten", "Transpose", "Dropout", "DequantizeLinear"), (0,)),
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Slice", "Expand", "Gather", "Tile", "Split", "Pad"), (0,)),
    "Where": (1, 2),
    "Concat": tuple(range(64)),
}
_COMPUTES = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Mod", "Max", "Min", "Clip", "Floor", "Ceil"}
    | {"ReduceMax", "ReduceMin", "ReduceSum", "CumSum"}
)
_GIVES_SHAPE: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Pad", "TopK", "OneHot", "Split", "Unsqueeze", "Squeeze"), (1,)),
    **dict.fromkeys(("ConstantOfShape", "Loop"), (0,)),
    "Slice": (1, 2, 3, 4),
    "Range": (0, 1, 2),
    "Resize": (3,),
    "NonMaxSuppression": (2,),
}
_GIVES_LENGTH = {"RNN": (4,), "GRU": (4,), "LSTM": (4,), "ReverseSequence": (1,)}
_COMPARES = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_LOGIC = frozenset({"And", "Or", "Xor", "Not"})
# position of the indices -> position of the table, whose first axis they count
_EMBEDDINGS = {"EmbedLayerNormalization": {0: 2, 1: 4, 8: 3}}
_FEW = 16


@dataclass
class Meaning:
    """What the values of one integer or Boolean input are for.

    Attributes:
        below: They count the rows of a table, which has so many; None if they count none.
        among: They are compared with these, each of which makes one result; None if there are not several.
        is_mask: They say what counts: 1, or true.
        decides: Why no number but the user's is right; empty if any is.
    """

    below: int | None = None
    among: Array | None = None
    is_mask: bool = False
    decides: str = ""


@dataclass
class _Readers:
    """The readers and makers of every tensor, those in the branches of an If and the bodies of loops included."""

    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = field(default_factory=lambda: defaultdict(list))
    maker: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def add(self, graph: onnx.GraphProto) -> None:
        self.constants.update((tensor.name, tensor) for tensor in graph.initializer)
        for node in graph.node:
            for position, name in enumerate(node.input):
                self.readers[name].append((node, position))
            self.maker.update(dict.fromkeys(node.output, node))
            for entry in node.attribute:
                if entry.HasField("g"):
                    self.add(entry.g)
                for each in entry.graphs:
                    self.add(each)

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """Return the constant behind a name, also behind a change of its type."""
        while (node := self.maker.get(name)) is not None:
            if node.op_type == "Constant":
                return _of_constant(node)
            if node.op_type not in ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear"):
                return None
            name = node.input[0]
        return self.constants.get(name)

    def values(self, name: str) -> Array | None:
        """Return the values of a constant; None for one whose values lie in another file."""
        tensor = self.tensor(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return np.asarray(numpy_helper.to_array(tensor))


def input_meanings(model: onnx.ModelProto) -> dict[str, Meaning]:
    """Return what the integer and Boolean inputs of a model mean, by name."""
    proto = onnx.inliner.inline_local_functions(model) if model.functions else model
    known = _Readers()
    known.add(proto.graph)
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    return {
        value.name: _meaning(known, value.name)
        for value in proto.graph.input
        if value.type.tensor_type.elem_type not in floats
    }


def _meaning(known: _Readers, name: str) -> Meaning:
    found = Meaning()
    seen = {(name, True)}
    waiting = [(name, True)]
    while waiting:
        tensor, exact = waiting.pop()
        for node, position in known.readers[tensor]:
            _note(found, known, node, position, exact=exact)
            for following in _followed(node, position, exact=exact):
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
    return found


def _followed(node: onnx.NodeProto, position: int, *, exact: bool) -> Iterator[tuple[str, bool]]:
    """Yield the outputs that hold the values read, and whether they are still the same numbers."""
    if position in _PASSES.get(node.op_type, ()):
        yield from ((output, exact) for output in node.output)
    elif node.op_type in _COMPUTES:
        yield from ((output, False) for output in node.output)


def _note(found: Meaning, known: _Readers, node: onnx.NodeProto, position: int, *, exact: bool) -> None:
    """Add what one reader says about the values that it reads."""
    op = node.op_type
    if position in _GIVES_SHAPE.get(op, ()):
        found.decides = found.decides or f"it gives {op} a size"
    elif position in _GIVES_LENGTH.get(op, ()):
        found.decides = found.decides or f"it gives {op} a length"
    elif op in ("If", "Loop"):
        found.decides = found.decides or f"it decides what {op} runs"
    elif not exact:
        return
    elif (rows := _rows(known, node, position)) is not None:
        found.below = min(rows, found.below or rows)
    elif op in _COMPARES:
        _compared(found, known, node, position)
    elif (
        op in _LOGIC
        or (op == "Where" and position == 0)
        or (op == "Cast" and int_attribute(node, "to", 0) == onnx.TensorProto.BOOL)
        or (op == "Sub" and position == 1 and _is_one(known.values(node.input[0])))
    ):
        found.is_mask = True


def _rows(known: _Readers, node: onnx.NodeProto, position: int) -> int | None:
    """Return how many rows the table has that the values count; None if they count no rows of a constant."""
    if node.op_type == "OneHot" and position == 0:
        depth = known.values(node.input[1])
        return None if depth is None else int(depth.ravel()[0])
    place = {"Gather": {1: 0}, "GatherElements": {1: 0}, **_EMBEDDINGS}.get(node.op_type, {}).get(position)
    table = None if place is None else known.tensor(node.input[place])
    if table is None or not table.dims:
        return None
    axis = int_attribute(node, "axis", 0)
    return int(table.dims[axis]) if -len(table.dims) <= axis < len(table.dims) else None


def _compared(found: Meaning, known: _Readers, node: onnx.NodeProto, position: int) -> None:
    values = known.values(node.input[1 - position])
    if values is None:
        if node.op_type != "Equal":
            found.decides = found.decides or "it is compared with a size that the model computes"
        return
    different = np.unique(values)
    if node.op_type == "Equal" and different.size > 2:
        found.among = different
    elif np.isin(different, (0, 1)).all():
        found.is_mask = True
    else:
        shown = ", ".join(map(str, different[:_FEW].tolist()))
        found.decides = found.decides or f"it is compared with {shown}"


def _is_one(values: Array | None) -> bool:
    return values is not None and bool((values == 1).all())


def _of_constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for entry in node.attribute:
        if entry.name == "value":
            tensor: onnx.TensorProto = entry.t
            return tensor
        if entry.name in ("value_int", "value_ints"):
            values = entry.i if entry.name == "value_int" else list(entry.ints)
            return numpy_helper.from_array(np.array(values, np.int64), node.output[0])
        if entry.name in ("value_float", "value_floats"):
            numbers = entry.f if entry.name == "value_float" else list(entry.floats)
            return numpy_helper.from_array(np.array(numbers, np.float32), node.output[0])
    return None
