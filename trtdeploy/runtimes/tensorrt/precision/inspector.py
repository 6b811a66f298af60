"""Evidence of the engine inspector on the layers of a plan: the type that each computes in, or that it hides it.

The JSON has no such field; what tells it differs by layer. Convolutions of TensorRT's own libraries have ``Weights``
with a type and a kernel (``TacticName``) whose name spells both factors; those of fused regions (Myelin) have
``Inputs``, ``Constants`` and a kernel; with dynamic shapes the inputs are ``N/A``; a region that is one layer
(``ForeignNode``) shows its ends alone. TensorRT 10 has a tensor's type in ``Format/Datatype``, 11 apart
(https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trtdeploy.onnxgraph.qdq.quantized_types import WEIGHT_ONLY, quantizes_input
from trtdeploy.plan import PrecisionFacts
from trtdeploy.runtimes.tensorrt.precision.element_types import QUANTIZED, operands_of, product_type, type_in
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers

# What the parser puts around a product carries the name of its node, too: another shape, a sum with the bias.
_NO_PRODUCT = frozenset(
    {"reformat", "noop", "constant", "shuffle", "slice", "identity", "cast", "padding", "concat", "copy"}
    | {"pointwise", "pointwisev2", "elementwise", "scale", "shape_call", "signal", "wait"}
)
# Generated kernels are named for what they do; these words are the products: __myl_CastMulCastFc.
_PRODUCT = re.compile(r"Fc|Corr|Deco|Gemm")
_FUSED = frozenset({"kgen", "fusion"})
_INDICES = frozenset({"int32", "int64", "bool"})


def facts_from_layers(found: list[dict[str, Any]], layers: WeightedLayers) -> PrecisionFacts:
    """Judge the inspector's layers. Only what is shown to be float is a fallback; what is hidden is unknown."""
    if not any("Inputs" in layer for layer in found):
        return PrecisionFacts.of(
            layers.running_in({}),
            evidence="engine inspector",
            note="The plan was built without detailed profiling verbosity: the inspector knows no precisions.",
        )
    types: dict[str, str] = {}
    reasons: dict[str, str] = {}
    hidden: dict[str, str] = {}
    integer_kernels = 0
    for layer in found:
        nodes = layers.named_in(str(layer.get("Metadata", ""))) if _multiplies(layer) else set()
        counts = False
        for name in nodes:
            kind, why = _shown(layer, layers.asked_for(name))
            where = f"{why} in layer {layer.get('Name', '?')}"
            if kind is None:
                hidden.setdefault(name, where)
            elif not quantizes_input(types.get(name)):  # of several layers, one that computes on codes tells
                types[name], reasons[name] = kind, where
            counts |= kind == "int8"
        integer_kernels += counts
    for name in hidden:
        if not quantizes_input(types.get(name)):
            types.pop(name, None)
    unknown = {
        name: hidden.get(name, "is in no layer that the inspector names; it was fused into one that hides its parts")
        for name in layers.macs
        if name not in types
    }
    fallbacks = {name: reasons[name] for name in types if layers.falls_back(name, types[name])}
    asking = [name for name in layers.macs if layers.asked_for(name)]
    as_asked = sum(types.get(name) == layers.asked_for(name) for name in asking)
    return PrecisionFacts.of(
        layers.running_in(types),
        evidence="engine inspector",
        integer_kernels=integer_kernels,
        reformats=tuple(str(layer.get("Name")) for layer in found if layer.get("LayerType") == "Reformat"),
        fallbacks=fallbacks,
        unknown=unknown,
        note=f"{as_asked} of {len(asking)} quantized layers were shown to run as asked, "
        f"{len(unknown)} of {len(layers.macs)} layers are hidden, by the engine's inspector.",
    )


def json_layers(text: str) -> list[dict[str, Any]]:
    """Return the inspector's layers; a plan without details lists names alone."""
    layers = json.loads(text).get("Layers", [])
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]


def _multiplies(layer: Mapping[str, Any]) -> bool:
    """Say whether a layer can hold a product: what only moves or rescales values tells nothing of its arithmetic."""
    kind = str(layer.get("LayerType", "")).lower()
    if kind == "kgen":
        return bool(_PRODUCT.search(f"{layer.get('Name', '')} {layer.get('TacticName', '')}"))
    return kind not in _NO_PRODUCT


def _shown(layer: Mapping[str, Any], asked: str | None) -> tuple[str | None, str]:
    """Return the type that a layer is shown to multiply in, None where that is hidden, and what shows or hides it."""
    kernel = str(layer.get("TacticName") or "")
    operands = operands_of(kernel)
    if operands is not None:
        return product_type(*operands), f"runs kernel {kernel}"
    family = str(layer.get("LayerType", "")).lower()
    if family == "myelin" or "ForeignNode" in str(layer.get("Name", "")):
        return None, "is fused with others"
    said = [_data_type(tensor) for tensor in layer.get("Inputs") or []]
    inputs = [type_in(text) for text in said]
    constants = [type_in(_data_type(tensor)) for tensor in layer.get("Constants") or []]
    stated = layer.get("Weights")
    weights = type_in(str(stated.get("Type", ""))) if isinstance(stated, dict) else None
    weights = weights or next((kind for kind in constants if kind in QUANTIZED), None)
    codes = [kind for kind in inputs if kind in QUANTIZED]
    first = inputs[0] if inputs else None
    if weights in QUANTIZED:
        if codes:
            return product_type(codes[0], weights), f"has {weights} weights and reads {codes[0]}"
        if None in inputs and isinstance(stated, dict) and quantizes_input(asked):
            return weights, f"has {weights} weights"
        return _with_float_input(weights, asked, said)
    if (first in QUANTIZED and weights is None) or len(codes) > 1:
        return codes[0], f"reads {codes[0]}"
    if codes:
        return _with_float_input(codes[0], asked, said)
    operands_seen = [kind for kind in (*inputs, *constants) if kind not in _INDICES]
    if weights is None and (None in operands_seen or not operands_seen):
        return None, f"reads {', '.join(said) or 'no input'}"
    if weights is None and (family in _FUSED or (family == "gemm" and len(operands_seen) < 2)):
        return None, f"reads {', '.join(said)} and does not say what its weights are"
    floats = [kind for kind in (weights, *operands_seen) if kind and kind != "uint8"]
    # TensorRT has UINT8 as an input that is cast, not as what it computes in
    return floats[0] if floats else "float", f"runs on {', '.join(said)}"


def _with_float_input(codes: str, asked: str | None, said: list[str]) -> tuple[str | None, str]:
    """Judge a layer that reads quantized weights and a float input: it may quantize that input itself."""
    kind = codes + WEIGHT_ONLY
    what = f"reads {', '.join(said)} with {codes} weights"
    return (kind, what) if asked == kind else (None, f"{what} and does not say whether it quantizes the input")


def _data_type(tensor: Mapping[str, Any]) -> str:
    """Return what the inspector says of a tensor's type."""
    return str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype") or "unknown")
