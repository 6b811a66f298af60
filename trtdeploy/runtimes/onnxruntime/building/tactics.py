"""The implementations of one model that are measured against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from trtdeploy.onnxgraph.graph import fold_weights
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations
from trtdeploy.runtimes.onnxruntime.building.blocked_layout import (
    known_shapes,
    quantize_in_blocked_layout,
    read_channels_last,
)
from trtdeploy.runtimes.onnxruntime.building.integer_kernels import with_exact_sums
from trtdeploy.runtimes.onnxruntime.building.integer_products import multiply_codes
from trtdeploy.runtimes.onnxruntime.session import OPTIMIZE_ALL, OPTIMIZE_PORTABLE, optimize_offline

_KEEP_QDQ = {"session.disable_quant_qdq": "1"}
_KEEP_FLOAT_WEIGHTS = ("WeightBiasQuantization",)
"""ONNX Runtime would quantize them again, with one scale for all of a weight."""


@dataclass(frozen=True)
class Tactic:
    """One way to make a plan of a model.

    Attributes:
        name: How reports call it.
        compile: Returns the optimized model, or None where the tactic changes nothing for this model.
    """

    name: str
    compile: Callable[[onnx.ModelProto], bytes | None]


def tactics_for(quantized: bool) -> list[Tactic]:
    """Return the candidates for a model with or without Q/DQ."""
    if not quantized:
        return [Tactic("blocked-layout", _blocked), Tactic("plain-layout", _plain)]
    return [
        Tactic("integer-kernels", _blocked),
        Tactic("float-weights", _float_weights),
        Tactic("float-weights-blocked-qdq", _float_weights_blocked_qdq),
        Tactic("float-weights-integer-gates", _float_weights_integer_gates),
        Tactic("integer-products", _integer_products),
        Tactic("float-weights-plain-layout", _float_weights_plain_layout),
    ]


def _blocked(model: onnx.ModelProto) -> bytes:
    """Everything ONNX Runtime knows; Q/DQ around an operator with an integer kernel fuses into it."""
    return _serialized(_optimized(model, OPTIMIZE_ALL))


def _plain(model: onnx.ModelProto) -> bytes:
    return _serialized(_optimized(model, OPTIMIZE_PORTABLE))


def _float_weights(model: onnx.ModelProto) -> bytes | None:
    """Weights become the floats that their codes stand for; activations keep their Q/DQ."""
    folded, count = fold_weights(model)
    return _serialized(_optimized(folded, OPTIMIZE_ALL, entries=_KEEP_QDQ)) if count else None


def _float_weights_blocked_qdq(model: onnx.ModelProto) -> bytes | None:
    content = _float_weights(model)
    if content is None:
        return None
    moved, count = quantize_in_blocked_layout(onnx.load_model_from_string(content), known_shapes(model))
    return _serialized(moved) if count else None


def _float_weights_integer_gates(model: onnx.ModelProto) -> bytes | None:
    """Weights become floats; products, means and sums between Q/DQ run on the codes, which are a quarter of the bytes.

    A convolution between Q/DQ stays in float. Where a squeeze-and-excitation gate has its pairs, that saves two
    DequantizeLinear, a QuantizeLinear and a pass of floats for each.
    """
    folded, count = fold_weights(model)
    if not count:
        return None
    optimized = _on_codes(with_unsigned_activations(folded))
    if not any(node.op_type.startswith("QLinear") for node in optimized.graph.node):
        return None
    return _serialized(quantize_in_blocked_layout(optimized, known_shapes(model))[0])


def _integer_products(model: onnx.ModelProto) -> bytes | None:
    """1x1 convolutions and linear layers multiply codes; other layers are as in ``_float_weights_integer_gates``."""
    changed, count = multiply_codes(with_unsigned_activations(model))
    if not count:
        return None
    shapes = known_shapes(model)
    optimized = read_channels_last(_on_codes(fold_weights(changed)[0]), shapes)
    return _serialized(quantize_in_blocked_layout(optimized, shapes)[0])


def _float_weights_plain_layout(model: onnx.ModelProto) -> bytes | None:
    folded, count = fold_weights(model)
    return _serialized(_optimized(folded, OPTIMIZE_PORTABLE, entries=_KEEP_QDQ)) if count else None


def _on_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    return _optimized(model, OPTIMIZE_ALL, without=_KEEP_FLOAT_WEIGHTS)


def _optimized(
    model: onnx.ModelProto,
    optimization: Any,
    *,
    entries: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> onnx.ModelProto:
    """What ONNX Runtime makes of the model; products of codes are rewritten where this processor would saturate."""
    content = optimize_offline(
        model.SerializeToString(), optimization=optimization, entries=entries or {}, without=without
    )
    return with_exact_sums(onnx.load_model_from_string(content))


def _serialized(model: onnx.ModelProto) -> bytes:
    content: bytes = model.SerializeToString()
    return content
