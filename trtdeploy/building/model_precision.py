"""Bringing a model to the precision that a build asks for: strongly typed networks take every type from the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from trtdeploy.errors import QuantizationError
from trtdeploy.runtimes.config import BuildConfig

if TYPE_CHECKING:
    from trtdeploy.onnxgraph.reading.source import SourceModel


def with_precision(source: SourceModel, config: BuildConfig) -> SourceModel:
    """Return the model with Q/DQ from dynamic ranges, and with what is not quantized cast, as far as it is asked.

    Raises:
        QuantizationError: Explicit precision is asked for and no layer has INT8 Q/DQ; or the ranges are faulty.
        RuntimeUnavailableError: The library that casts is not installed.
    """
    from trtdeploy.onnxgraph.qdq.dynamic_ranges import read_ranges
    from trtdeploy.onnxgraph.qdq.layers import asked_types
    from trtdeploy.onnxgraph.qdq.quantized_types import INT8
    from trtdeploy.onnxgraph.qdq.ranges_to_qdq import canonical_qdq, quantize_with_ranges

    proto = source.proto
    if config.ranges is not None and not config.implicit:
        proto = quantize_with_ranges(proto, read_ranges(config.ranges))
    elif config.precision == "explicit":
        asked = Counter(kind for kind in asked_types(proto).values() if kind is not None)
        if INT8 not in asked:
            others = ", ".join(f"{kind} in {count}" for kind, count in asked.items())
            raise QuantizationError(
                f"--precision explicit was asked for, and {source.path} has no layer with INT8 Q/DQ on input and "
                "weights" + (f"; its Q/DQ is {others} of its layers." if others else "."),
                hint="Leave out --precision explicit: the model is then built with the types that it has."
                if others
                else "Export a calibrated model (trtdeploy train export), or give dynamic ranges: --ranges FILE",
            )
        # the same form that ranges lead to: equal scales make equal models, whichever way they came
        proto = canonical_qdq(proto)
    if config.high_precision != "fp32":
        from trtdeploy.onnxgraph.precision_cast import cast_unquantized

        proto = cast_unquantized(proto, config.high_precision)
    return source if proto is source.proto else replace(source, proto=proto)
