"""Constants of layers that are NaN or infinite, as after a training that diverged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from trtdeploy.errors import ModelError, QuantizationError
from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, node_name
from trtdeploy.tensors import Array

# Layers that hand a NaN of their constants on, with certainty; a Where or a Pad may have one that nothing meets.
_LAYERS = (
    WEIGHTED_OPS
    | {"LSTM", "GRU", "RNN"}
    | {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}
)
_PASSING_ON = frozenset(
    {
        "Cast",
        "DequantizeLinear",
        "Flatten",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def require_finite_weights(model: onnx.ModelProto, name: str) -> None:
    """Refuse a model with a layer whose constants are NaN, whose weights are infinite, or whose scales are no numbers.

    A bias may be infinite: minus infinity takes a class out.

    Args:
        model: Any ONNX model.
        name: What the message calls it.

    Raises:
        ModelError: A layer has such a constant; the message names both.
        QuantizationError: Q/DQ of a layer has such a scale; the message names it.
    """
    graph = Graph(model.graph)
    for node in model.graph.node:
        if node.op_type not in _LAYERS:
            continue
        for index, tensor in enumerate(node.input):
            is_weight = node.op_type in WEIGHTED_OPS and index < 2
            broken = _broken_constant(graph, tensor, np.isfinite if is_weight else lambda values: ~np.isnan(values))
            if broken is not None:
                raise ModelError(
                    f"{name}: {broken}, a constant of the {node.op_type} {node_name(node)}, is not finite, so what the "
                    "layer computes is no number.",
                    hint="Did its training diverge? Export it from an earlier checkpoint.",
                )


def _broken_constant(graph: Graph, tensor: str, is_number: Callable[[Array], Array]) -> str | None:
    """Return the first constant behind ``tensor``, over what only passes it on, that does not consist of numbers."""
    while tensor:
        values = graph.constant(tensor)
        if values is not None:
            return tensor if values.dtype.kind == "f" and not is_number(values).all() else None
        node = graph.producer.get(tensor)
        if node is None or node.op_type not in _PASSING_ON:
            return None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = graph.constant(node.input[1])
            if scale is not None and not np.isfinite(scale).all():
                raise QuantizationError(
                    f"The scale {node.input[1]!r} of the {node.op_type} {node_name(node)} is not finite.",
                    hint="Calibrate again; a scale is a positive number.",
                )
        tensor = node.input[0]
    return None
