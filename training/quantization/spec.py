"""What a network is quantized for, and what of it stays in float."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from training.quantization.toolkits.choice import Toolkit
from trtdeploy.onnxgraph.name_patterns import matches_any, require_matches
from trtdeploy.onnxgraph.qdq.int8_scales import TransposedWeights
from trtdeploy.onnxgraph.qdq.placement import Target


class QuantizationSpec(BaseModel):
    """Where quantizers go. With the model it decides the keys of a quantized state dict.

    Attributes:
        target: Whose placement rules hold. For ``onnxruntime`` batch norm is folded into the convolutions, too.
        toolkit: Whose quantizers are put in.
        skip: Patterns (``fnmatch``) of the names of layers that stay in float.
        transposed_weights: One range for the weight of a transposed convolution, or one per output channel, on whose
            axis tools disagree; see ``trtdeploy.onnxgraph.qdq.int8_scales.chosen_weight_scale``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Target = "tensorrt"
    toolkit: Toolkit = "pytorch-quantization"
    skip: tuple[str, ...] = ()
    transposed_weights: TransposedWeights = "per-tensor"

    def skips(self, layer: str) -> bool:
        """Return whether a layer stays in float."""
        return matches_any(layer, self.skip)

    def require_matches(self, layers: Iterable[str]) -> None:
        """Raise ``UsageError`` for a pattern that matches no layer."""
        require_matches(self.skip, layers, kind="layer that could be quantized")
