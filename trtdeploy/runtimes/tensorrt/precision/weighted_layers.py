"""The layers of a model that its precision is about, and where TensorRT names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trtdeploy.onnxgraph.qdq.quantized_types import INT8, quantizes_input
from trtdeploy.plan import LayerPrecision, PrecisionFacts

_ENTRY = "[ONNX Layer: "


@dataclass(frozen=True)
class WeightedLayers:
    """The layers with constant weights of a model.

    Attributes:
        macs: Multiply-accumulates by ONNX node name.
        quantized: Names of those whose input and weights pass through Q/DQ, or have dynamic ranges.
        types: What is asked of a layer where that is neither float nor, for a quantized one, INT8.
    """

    macs: Mapping[str, int]
    quantized: frozenset[str]
    types: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def asking(cls, macs: Mapping[str, int], asked: Mapping[str, str | None]) -> WeightedLayers:
        """Return the layers with what is asked of each; None for float."""
        quantized = frozenset(name for name, kind in asked.items() if quantizes_input(kind))
        types = {
            name: kind for name, kind in asked.items() if kind is not None and (kind != INT8 or name not in quantized)
        }
        return cls(macs, quantized, types)

    @classmethod
    def of(cls, precision: PrecisionFacts) -> WeightedLayers:
        """Return the layers that a manifest lists."""
        return cls.asking(
            {name: layer.macs for name, layer in precision.layers.items()},
            {name: layer.asked_for for name, layer in precision.layers.items()},
        )

    def asked_for(self, name: str) -> str | None:
        """Return the type that a layer is asked to run in; None for float."""
        return self.types.get(name, INT8 if name in self.quantized else None)

    def falls_back(self, name: str, kind: str) -> bool:
        """Say whether a layer that runs in ``kind`` is asked for something smaller: it computes in float then."""
        asked = self.asked_for(name)
        return asked is not None and asked != kind and not quantizes_input(kind)

    def running_in(self, types: Mapping[str, str]) -> dict[str, LayerPrecision]:
        """Return all layers for a manifest; ``types`` has what those were shown to run in that anything shows."""
        return {
            name: LayerPrecision(
                macs=macs,
                quantized=name in self.quantized,
                asked_for=self.asked_for(name),
                runs_in=types.get(name),
            )
            for name, macs in self.macs.items()
        }

    def named_in(self, metadata: str) -> set[str]:
        """Return the layers that a TensorRT layer comes from.

        The parser writes ``[ONNX Layer: NAME]`` and for a node of a local function ``[ONNX Layer: NAME | CALLER
        (FUNCTION)]`` (onnx-tensorrt, importerUtils.cpp, processMetadata); a fused layer has such entries one after
        another, with a control character between them. A name may hold any character, brackets among them.
        """
        found: set[str] = set()
        entry = ""
        for part in metadata.split(_ENTRY)[1:]:
            entry = f"{entry}{_ENTRY}{part}" if entry else part
            name, bracket, _ = entry.rpartition("]")
            if not bracket:
                continue  # the name itself holds the words that begin an entry
            entry = ""
            while name not in self.macs and " | " in name:
                name = name.rpartition(" | ")[0]
            if name in self.macs:
                found.add(name)
        return found
