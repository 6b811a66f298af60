"""The quantizers of a float model: which of its sites get one, and with which scale."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from trtdeploy.calibration import AbsHistogram, amax_of
from trtdeploy.counting import counted
from trtdeploy.errors import ModelError, QuantizationError
from trtdeploy.onnxgraph.graph import WEIGHTED_OPS, Graph, node_name
from trtdeploy.onnxgraph.qdq.int8_scales import (
    SMALLEST_AMAX,
    TransposedWeights,
    activation_scale,
    chosen_weight_scale,
    with_room,
)
from trtdeploy.onnxgraph.qdq.pairs import Quantizer, Site
from trtdeploy.onnxgraph.qdq.placement import Wanted
from trtdeploy.quantizing.in_float import left_in_float
from trtdeploy.quantizing.method_choice import Candidate
from trtdeploy.quantizing.options import PtqOptions


class Quantizers:
    """The quantized inputs of a model: the scales of its weights, and of its activations once they were observed.

    Args:
        model: A float model.
        sites: That want Q/DQ.
        options: What was left out, and how the weights of every ConvTranspose are quantized.

    Attributes:
        sites: Those but of layers that stay in float.
        left_float: Why these do, by name.
        keys: Under which name the values of an activation are observed: tensors that share a scale have one.

    Raises:
        ModelError: A weight is not finite.
        QuantizationError: No layer is left.
    """

    def __init__(self, model: onnx.ModelProto, sites: list[Wanted], options: PtqOptions) -> None:
        self._graph = Graph(model.graph)
        self._weights: dict[Site, Quantizer] = {}
        self.left_float: dict[str, str] = {}
        left: set[str] = set()
        for wanted in sites:
            if wanted.reason == "weight":
                node = self._graph.producer[wanted.site[0]]
                chosen = self._of_weight(node, wanted, options.transposed_weights)
                if isinstance(chosen, str):
                    left.add(wanted.site[0])
                    self.left_float[node_name(node)] = chosen
                else:
                    self._weights[wanted.site] = chosen
        self.sites = [wanted for wanted in sites if wanted.site[0] not in left]
        self.keys = {wanted.tensor: _key(wanted) for wanted in self.sites if wanted.reason != "weight"}
        if not self._weights:
            hidden = _in_branches(model.graph)
            reasons = {**left_in_float(model, options.skip), **self.left_float}
            raise QuantizationError(
                "Nothing in the model can be quantized: no Conv, ConvTranspose, Gemm or MatMul has constant float32 "
                "weights, or --skip leaves none."
                + "".join(f"\n  {name} stays in float: {why}" for name, why in reasons.items()),
                hint=f"{counted(sum(hidden.values()), 'layer')} in the branches of {', '.join(hidden)} cannot be "
                "reached: quantize an export of the one case that is served."
                if hidden
                else None,
            )

    def of(
        self, histograms: Mapping[str, AbsHistogram], chosen: Candidate
    ) -> tuple[dict[Site, Quantizer], dict[str, str]]:
        """Return the quantizers of all sites, and why further layers stay in float, by name."""
        amax = {key: self._amax(key, found, chosen) for key, found in histograms.items()}
        activations = {
            wanted.site: Quantizer(wanted.tensor, activation_scale(amax[_key(wanted)]))
            for wanted in self.sites
            if wanted.reason != "weight"
        }
        return with_room(self._graph, {**activations, **self._weights})

    def dead(self, histograms: Mapping[str, AbsHistogram], chosen: Candidate) -> int:
        """Return how many ranges of activations are 0, or too small for a scale, and so are replaced."""
        return sum(bool(self._amax(key, found, chosen) < SMALLEST_AMAX) for key, found in histograms.items())

    def one_scale(self, quantizers: Mapping[Site, Quantizer]) -> tuple[str, ...]:
        """Return the name of every ConvTranspose whose weight has one scale for all output channels."""
        found = [(self._graph.producer[site[0]], quantizers.get(site)) for site in self._weights]
        return tuple(
            node_name(node)
            for node, quantizer in found
            if node.op_type == "ConvTranspose" and quantizer is not None and quantizer.axis is None
        )

    def _of_weight(self, node: onnx.NodeProto, wanted: Wanted, transposed: TransposedWeights) -> Quantizer | str:
        weight = self._graph.constant(wanted.tensor)
        if weight is None or weight.dtype != np.float32:
            return "its weights are not float32"
        if not np.isfinite(weight).all():
            raise ModelError(f"The weights {wanted.tensor!r} are not finite.")
        chosen = chosen_weight_scale(node, wanted.site[1], weight, transposed=transposed)
        return chosen if isinstance(chosen, str) else Quantizer(wanted.tensor, *chosen)

    def _amax(self, key: str, found: AbsHistogram, chosen: Candidate) -> float:
        if not found.n:
            tensors = ", ".join(repr(tensor) for tensor, shared in self.keys.items() if shared == key)
            raise QuantizationError(
                f"No sample gave {tensors} a value, so no range can be found for it.",
                hint="Give samples that reach it (with something to detect, for a second stage), or leave the layer "
                "that reads it in float with --skip PATTERN.",
            )
        return amax_of(found, chosen.method, percentile=chosen.percentile or 100)


def _key(wanted: Wanted) -> str:
    return wanted.tensor if wanted.group is None else f"group {wanted.group}"


def _in_branches(graph: onnx.GraphProto) -> dict[str, int]:
    """Return how many ops with weights lie in the branches or the body of each If, Loop and Scan that has such."""

    def inside(node: onnx.NodeProto) -> int:
        bodies = [entry.g for entry in node.attribute if entry.HasField("g")]
        return sum(each.op_type in WEIGHTED_OPS or inside(each) for body in bodies for each in body.node)

    found = {f"{node.op_type} {node_name(node)}": inside(node) for node in graph.node}
    return {name: layers for name, layers in found.items() if layers}
