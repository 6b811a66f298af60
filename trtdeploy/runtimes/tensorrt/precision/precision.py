"""Proof of precision: what each layer of a plan runs in, by the best evidence there is.

The engine's inspector where the engine can be loaded, else the kernels that the plan lists, else what the parsed
network asks for, which shows nothing of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from trtdeploy.errors import BuildError
from trtdeploy.plan import PrecisionFacts
from trtdeploy.runtimes.config import LoadOptions
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.execution.deserialization import deserialize
from trtdeploy.runtimes.tensorrt.precision.inspector import facts_from_layers as facts_from_layers
from trtdeploy.runtimes.tensorrt.precision.inspector import json_layers
from trtdeploy.runtimes.tensorrt.precision.kernel_list import facts_from_kernels
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers as WeightedLayers

if TYPE_CHECKING:
    import tensorrt

# Layers that pass values on, as they are or in another shape; the search for a DequantizeLayer goes through them. The
# parser puts UNSQUEEZE and SQUEEZE around a one-dimensional convolution and beside a vector.
_PASSING = frozenset({"SHUFFLE", "IDENTITY", "UNSQUEEZE", "SQUEEZE", "CAST", "SLICE"})
_PRODUCTS = frozenset({"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"})


def ask_plan(bindings: Bindings, content: bytes, layers: WeightedLayers, options: LoadOptions) -> PrecisionFacts:
    """Load a plan only to ask its engine's inspector.

    Raises:
        PlanError: It cannot be loaded here.
    """
    runtime, engine = deserialize(bindings, content, options)
    facts = inspect_engine(bindings, engine, layers)
    del engine  # before its runtime
    del runtime
    if facts.runs_in:
        return facts
    return facts_from_kernels(content, layers, why=f"The inspector shows nothing: {facts.note}") or facts


def inspect_engine(bindings: Bindings, engine: tensorrt.ICudaEngine, layers: WeightedLayers) -> PrecisionFacts:
    """Ask the engine's inspector. The plan must have been built with detailed profiling verbosity."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return facts_from_layers(json_layers(text), layers)


def facts_from_network(network: tensorrt.INetworkDefinition, layers: WeightedLayers, *, why: str) -> PrecisionFacts:
    """Say what the parsed network asks for, where there is no engine to inspect.

    Args:
        network: As the parser left it.
        layers: The weighted layers of the model.
        why: Why the engine cannot be inspected.
    """
    made_by = _makers(network)
    found: set[str] = set()
    asked: set[str] = set()
    for layer in _layers(network):
        if _kind(layer) not in _PRODUCTS:
            continue
        nodes = layers.named_in(layer.metadata)
        found |= nodes
        # weights that are no tensor of the network are its layer's own, in float
        if layer.num_inputs >= 2 and all(_from_dequantize(layer, index, made_by) for index in (0, 1)):
            asked |= nodes
    missing = (layers.quantized & found) - asked
    return PrecisionFacts.of(
        layers.running_in({}),
        evidence="parsed network",
        fallbacks=dict.fromkeys(missing, "the parsed network does not have Q/DQ on both of its inputs"),
        note=f"{len(layers.quantized & asked)} of {len(layers.quantized)} quantized layers have Q/DQ in the "
        f"parsed network. What the engine makes of it is not known: {why}",
    )


def require_int8(precision: PrecisionFacts, *, model: str) -> None:
    """Refuse a plan that was to be INT8 and has nothing of it; the same holds of FP8 and of each type beside others.

    Raises:
        BuildError: Of all layers that a type is asked for, each is shown not to run in it. Where a layer hides what it
            runs in, nothing is raised.
    """
    asked: dict[str, list[str]] = {}
    for name, layer in precision.layers.items():
        if layer.quantized and layer.asked_for:
            asked.setdefault(layer.asked_for, []).append(name)
    for kind, names in asked.items():
        if not all(name in precision.fallbacks for name in names):
            continue
        reasons = "; ".join(f"{name} {precision.fallbacks[name]}" for name in names[:5])
        title = kind.upper() if kind.isalnum() else kind
        raise BuildError(
            f"{model} asks for {title} and the plan would have none, says the {precision.evidence}: {reasons}.",
            hint="Look at the Q/DQ around these layers, or build a float model if that is what you want.",
        )


def _kind(layer: tensorrt.ILayer) -> str:
    return str(layer.type).rpartition(".")[2]


def _layers(network: tensorrt.INetworkDefinition) -> Iterator[tensorrt.ILayer]:
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _makers(network: tensorrt.INetworkDefinition) -> dict[str, tensorrt.ILayer]:
    return {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}


def _from_dequantize(layer: tensorrt.ILayer, index: int, made_by: Mapping[str, tensorrt.ILayer]) -> bool:
    tensor: tensorrt.ITensor | None = layer.get_input(index)
    while tensor is not None and tensor.name in made_by:
        maker = made_by[tensor.name]
        kind = _kind(maker)
        if kind == "DEQUANTIZE":
            return True
        if kind not in _PASSING:
            return False
        tensor = maker.get_input(0)
    return False
