"""By which tensors a quantized model is held against its float model, and how far apart they are."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from trtdeploy.onnxgraph.graph import Graph, outer_names
from trtdeploy.onnxgraph.tensor_types import tensor_types
from trtdeploy.quantizing.observe import with_outputs
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.statistics import sqnr_db
from trtdeploy.tensors import Array

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Answers:
    """Float tensors of a model.

    Attributes:
        types: The element type of each (``TensorProto.DataType``); empty where the model has none to judge by.
    """

    types: dict[str, int]

    def witness(self, model: onnx.ModelProto) -> Witness:
        """Return a function from the inputs of a model to these tensors of it."""
        return Witness(with_outputs(model, self.types), list(self.types))


def answers_of(model: onnx.ModelProto) -> Answers:
    """Return the float outputs of a model.

    Where it has none, as a classifier that ends in ArgMax, the floats from which its outputs are made: whole numbers
    say too little about how close two models are.
    """
    types = tensor_types(model)
    outputs = [value.name for value in model.graph.output]
    found = [name for name in outputs if types.get(name) in _FLOATS] or _floats_above(model, types, outputs)
    return Answers({name: types[name] for name in found})


def _floats_above(model: onnx.ModelProto, types: dict[str, int], outputs: list[str]) -> list[str]:
    graph = Graph(model.graph)
    found: dict[str, None] = {}
    queue, seen = deque(outputs), set(outputs)
    while queue:
        node = graph.producer.get(name := queue.popleft())
        if node is None or graph.constant(name) is not None:
            continue
        if types.get(name) in _FLOATS:
            found[name] = None
            continue
        reads = [read for read in [*node.input, *sorted(outer_names(node))] if read not in seen]
        seen.update(reads)
        queue.extend(reads)
    return list(found)


def per_sample_sqnr_db(expected: Sequence[Array], answered: Sequence[Array]) -> list[float]:
    """Return the SQNR in dB of each row over all answers to a batch; one for all of it where not all have such rows.

    Infinity where nothing differs, minus infinity where the expected values are all zeros, something is not finite, or
    another number of values is answered, as a detector may.
    """
    if not _of_equal_shapes(expected, answered):
        return [-math.inf]
    rows = {len(each) if each.ndim else None for each in expected}
    count = rows.pop() if len(rows) == 1 else None
    left, right = (
        np.concatenate([np.reshape(each, (count or 1, -1)) for each in given], axis=1) for given in (expected, answered)
    )
    return [
        sqnr_db(one, other) if np.isfinite(one).all() and np.isfinite(other).all() else -math.inf
        for one, other in zip(left, right, strict=True)
    ]


def _of_equal_shapes(expected: Sequence[Array], answered: Sequence[Array]) -> bool:
    return all(one.shape == other.shape for one, other in zip(expected, answered, strict=True))
