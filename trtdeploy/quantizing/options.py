"""How a model is quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trtdeploy.calibration import Method
from trtdeploy.onnxgraph.qdq.int8_scales import TransposedWeights
from trtdeploy.onnxgraph.qdq.placement import Target


class PtqOptions(BaseModel):
    """How a model is quantized.

    Attributes:
        method: How the ranges of activations are found; see ``trtdeploy.calibration``. ``auto`` tries all of them and
            takes the one whose answers to held-out samples are closest to float; see ``method_choice``. Weights
            use the largest |w| per output channel, but see ``transposed_weights``.
        percentile: Percent of all |x| inside the range, for the method of that name.
        images: How many samples, drawn with ``seed``; all if None.
        seed: Decides which.
        split_seed: Of the splits of a dataset that has no folder for calibration.
        target: Whose placement rules hold.
        skip: Patterns (``fnmatch``) of the names of nodes that stay in float.
        transposed_weights: One scale for the weight of a ConvTranspose, or one per output channel (axis 1), on whose
            axis tools disagree; see ``onnxgraph.int8_scales.chosen_weight_scale``.
        batch_size: Samples per run. All observed tensors of a batch are in memory at once.
        fixed: ``NAME=FILE`` or ``NAME=VALUE`` of inputs that are the same for all samples; see ``fixed_inputs``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method | Literal["auto"] = "auto"
    percentile: float = Field(default=99.99, gt=0, le=100)
    images: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    split_seed: int = Field(default=0, ge=0)
    target: Target = "tensorrt"
    skip: tuple[str, ...] = ()
    transposed_weights: TransposedWeights = "per-tensor"
    batch_size: int = Field(default=8, ge=1)
    fixed: tuple[str, ...] = ()
