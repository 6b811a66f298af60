"""From a float network to an INT8 one, PTQ or QAT, and to Q/DQ ONNX. Torch lives only here.

The public face, for networks of any task in a loop of one's own::

    from training import QuantizationSpec, prepare, calibrate, learn_ranges, refresh_ranges, export

The command line (``python -m training``) trains, quantizes and exports image classifiers with the same functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.onnx_export import Exported, export
    from training.ptq.ranges import calibrate
    from training.quantization.graph.layer_count import LayerCount
    from training.quantization.layers import refresh_ranges
    from training.quantization.preparation import prepare
    from training.quantization.range_learning import learn_ranges
    from training.quantization.spec import QuantizationSpec

__all__ = [
    "Exported",
    "LayerCount",
    "QuantizationSpec",
    "calibrate",
    "export",
    "learn_ranges",
    "prepare",
    "refresh_ranges",
]

_ROOMS = {
    "Exported": "training.onnx_export",
    "export": "training.onnx_export",
    "calibrate": "training.ptq.ranges",
    "LayerCount": "training.quantization.graph.layer_count",
    "refresh_ranges": "training.quantization.layers",
    "learn_ranges": "training.quantization.range_learning",
    "prepare": "training.quantization.preparation",
    "QuantizationSpec": "training.quantization.spec",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the help of the command line needs no torch."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
