"""Proof of precision: what really runs in INT8, from the engine's inspector; else what the parsed network asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtdeploy.errors import BuildError
from trtdeploy.plan import LayerPrecision, PrecisionFacts
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.deserialization import deserialize

if TYPE_CHECKING:
    import tensorrt

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Layers that pass values on; the search for a DequantizeLayer goes through them.
_PASSING = ("SHUFFLE", "IDENTITY")


@dataclass(frozen=True)
class WeightedLayers:
    """The layers of a model that INT8 is about.

    Attributes:
        macs: Multiply-accumulates by ONNX node name.
        quantized: Names of those whose input and weights pass through Q/DQ, or have dynamic ranges.
    """

    macs: Mapping[str, int]
    quantized: frozenset[str]

    @classmethod
    def of(cls, precision: PrecisionFacts) -> WeightedLayers:
        """Return the layers that a manifest lists."""
        return cls(
            {name: layer.macs for name, layer in precision.layers.items()},
            frozenset(name for name, layer in precision.layers.items() if layer.quantized),
        )

    def running_in(self, types: Mapping[str, str]) -> dict[str, LayerPrecision]:
        """Return all layers for a manifest; ``types`` says what those run in that the engine names."""
        return {
            name: LayerPrecision(macs=macs, quantized=name in self.quantized, runs_in=types.get(name))
            for name, macs in self.macs.items()
        }

    def share(self, names: frozenset[str] | set[str]) -> float:
        """Return the percentage of all multiply-accumulates that these nodes do."""
        total = sum(self.macs.values())
        return round(100 * sum(self.macs[name] for name in names if name in self.macs) / total, 2) if total else 0.0


def ask_plan(bindings: Bindings, content: bytes, layers: WeightedLayers, options: LoadOptions) -> PrecisionFacts:
    """Load a plan only to ask its engine's inspector.

    Raises:
        PlanError: It cannot be loaded here.
    """
    runtime, engine = deserialize(bindings, content, options)
    facts = inspect_engine(bindings, engine, layers)
    del engine  # before its runtime
    del runtime
    return facts


def inspect_engine(bindings: Bindings, engine: tensorrt.ICudaEngine, layers: WeightedLayers) -> PrecisionFacts:
    """Ask the engine's inspector. The plan must have been built with detailed profiling verbosity."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return facts_from_layers(_json_layers(text), layers)


def facts_from_layers(found: list[dict[str, Any]], layers: WeightedLayers) -> PrecisionFacts:
    """Judge the inspector's layers. TensorRT 10 and 11 name the data type of a tensor differently; both are read."""
    if not any("Inputs" in layer for layer in found):
        return PrecisionFacts(
            weighted_layers=len(layers.macs),
            quantized_layers=len(layers.quantized),
            integer_kernels=None,
            evidence="engine inspector",
            layers=layers.running_in({}),
            note="The plan was built without detailed profiling verbosity: the inspector knows no precisions.",
        )
    in_int8: set[str] = set()
    fallbacks: dict[str, str] = {}
    types: dict[str, str] = {}
    kernels = 0
    for layer in found:
        nodes = set(_ONNX_LAYER.findall(str(layer.get("Metadata", "")))) & set(layers.macs)
        inputs = layer.get("Inputs") or []
        is_int8 = bool(inputs) and "int8" in _data_type(inputs[0]).lower()
        kernels += is_int8 and bool(nodes)
        types |= dict.fromkeys(nodes - in_int8, "int8" if is_int8 else _data_type(inputs[0]) if inputs else "unknown")
        if is_int8:
            in_int8 |= nodes
        for name in nodes & layers.quantized if not is_int8 else ():
            kind = _data_type(inputs[0]) if inputs else "no input"
            fallbacks[name] = f"runs on {kind} in layer {layer.get('Name', '?')}"
    for name in layers.quantized - set(types):
        fallbacks[name] = "is in no layer that the inspector names; it was fused into one that hides its parts"
    return PrecisionFacts(
        weighted_layers=len(layers.macs),
        quantized_layers=len(layers.quantized),
        integer_kernels=kernels,
        int8_macs_percent=layers.share(in_int8),
        evidence="engine inspector",
        reformats=tuple(str(layer.get("Name")) for layer in found if layer.get("LayerType") == "Reformat"),
        fallbacks={name: reason for name, reason in fallbacks.items() if name not in in_int8},
        layers=layers.running_in(types),
        note=f"{len(in_int8)} of {len(layers.macs)} weighted layers run in INT8, by the engine's inspector.",
    )


def facts_from_network(network: tensorrt.INetworkDefinition, layers: WeightedLayers, *, why: str) -> PrecisionFacts:
    """Say what the parsed network asks for, where there is no engine to ask.

    Args:
        network: As the parser left it.
        layers: The weighted layers of the model.
        why: Why the engine cannot be asked.
    """
    made_by = _makers(network)
    asked: set[str] = set()
    for layer in _layers(network):
        nodes = set(_ONNX_LAYER.findall(layer.metadata)) & set(layers.macs)
        if nodes and layer.num_inputs >= 2 and all(_from_dequantize(layer, index, made_by) for index in (0, 1)):
            asked |= nodes
    fallbacks = dict.fromkeys(layers.quantized - asked, "the parsed network does not have Q/DQ on both of its inputs")
    return PrecisionFacts(
        weighted_layers=len(layers.macs),
        quantized_layers=len(layers.quantized),
        integer_kernels=None,
        int8_macs_percent=layers.share(asked),
        evidence="parsed network",
        fallbacks=fallbacks,
        layers=layers.running_in({}),
        note=f"{len(asked)} of {len(layers.macs)} weighted layers are asked for in INT8, by the parsed network. "
        f"What the engine makes of it is not known: {why}",
    )


def require_int8(precision: PrecisionFacts, *, model: str) -> None:
    """Refuse a plan that was to be INT8 and has nothing of it.

    Raises:
        BuildError: The proof says 0 %. Where nothing can be proved, nothing is raised.
    """
    if precision.int8_macs_percent is None or precision.int8_macs_percent > 0:
        return
    reasons = "; ".join(f"{name} {reason}" for name, reason in list(precision.fallbacks.items())[:5])
    raise BuildError(
        f"{model} asks for INT8 and the plan would have none, says the {precision.evidence}"
        + (f": {reasons}." if reasons else "."),
        hint="Look at the Q/DQ around these layers, or build a float model if that is what you want.",
    )


def _json_layers(text: str) -> list[dict[str, Any]]:
    """Return the inspector's layers; a plan without details lists names alone."""
    layers = json.loads(text).get("Layers", [])
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in layers]


def _data_type(tensor: Mapping[str, Any]) -> str:
    """Return what the inspector says of a tensor's type: 11 has "DataType", 10 has "Format/Datatype"."""
    return str(tensor.get("DataType") or tensor.get("Format/Datatype") or "unknown")


def _layers(network: tensorrt.INetworkDefinition) -> Iterator[tensorrt.ILayer]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _makers(network: tensorrt.INetworkDefinition) -> dict[str, tensorrt.ILayer]:
    return {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}


def _from_dequantize(layer: tensorrt.ILayer, index: int, made_by: Mapping[str, tensorrt.ILayer]) -> bool:
    tensor: tensorrt.ITensor | None = layer.get_input(index)
    while tensor is not None and tensor.name in made_by:
        maker = made_by[tensor.name]
        kind = str(maker.type).rpartition(".")[2]
        if kind == "DEQUANTIZE":
            return True
        if kind not in _PASSING:
            return False
        tensor = maker.get_input(0)
    return False
