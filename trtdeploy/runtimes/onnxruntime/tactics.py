"""The implementations of one model that are measured against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from trtdeploy.onnxgraph.qdq import fold_weights
from trtdeploy.runtimes.onnxruntime.blocked_layout import quantize_in_blocked_layout
from trtdeploy.runtimes.onnxruntime.session import OPTIMIZE_ALL, OPTIMIZE_PORTABLE, optimize_offline

_KEEP_QDQ = {"session.disable_quant_qdq": "1"}


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
        Tactic("float-weights-plain-layout", _float_weights_plain_layout),
    ]


def _blocked(model: onnx.ModelProto) -> bytes:
    """Everything ONNX Runtime knows; Q/DQ around an operator with an integer kernel fuses into it."""
    return optimize_offline(model.SerializeToString(), optimization=OPTIMIZE_ALL, entries={})


def _plain(model: onnx.ModelProto) -> bytes:
    return optimize_offline(model.SerializeToString(), optimization=OPTIMIZE_PORTABLE, entries={})


def _float_weights(model: onnx.ModelProto) -> bytes | None:
    """Weights become the floats that their codes stand for; activations keep their Q/DQ."""
    folded, count = fold_weights(model)
    if not count:
        return None
    return optimize_offline(folded.SerializeToString(), optimization=OPTIMIZE_ALL, entries=_KEEP_QDQ)


def _float_weights_blocked_qdq(model: onnx.ModelProto) -> bytes | None:
    content = _float_weights(model)
    if content is None:
        return None
    moved, count = quantize_in_blocked_layout(onnx.load_model_from_string(content))
    return moved.SerializeToString() if count else None


def _float_weights_plain_layout(model: onnx.ModelProto) -> bytes | None:
    folded, count = fold_weights(model)
    if not count:
        return None
    return optimize_offline(folded.SerializeToString(), optimization=OPTIMIZE_PORTABLE, entries=_KEEP_QDQ)
