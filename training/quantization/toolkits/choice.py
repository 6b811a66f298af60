"""Whose quantizers are put into a network."""

from __future__ import annotations

from typing import Literal

from training.quantization.quantizer import Quantizer
from trtdeploy.errors import RuntimeUnavailableError

Toolkit = Literal["pytorch-quantization", "modelopt"]


def make_quantizer(label: str, *, axis: int | None, toolkit: Toolkit = "pytorch-quantization") -> Quantizer:
    """Return a quantizer without a range.

    Args:
        label: What messages call the tensor.
        axis: Channel axis of the ranges; None for one range.
        toolkit: Which library's; with the same ranges all compute the same.

    Raises:
        RuntimeUnavailableError: The library cannot be imported.
    """
    try:
        if toolkit == "modelopt":
            from training.quantization.toolkits.modelopt import ModelOptQuantizer

            return ModelOptQuantizer(label, axis=axis)
        from training.quantization.toolkits.pytorch_quantization import PytorchQuantizationQuantizer

        return PytorchQuantizationQuantizer(label, axis=axis)
    except ImportError as error:
        extra = "modelopt" if toolkit == "modelopt" else "training"
        raise RuntimeUnavailableError(
            f"The toolkit {toolkit} cannot be imported: {error}.", hint=f"pip install 'trtdeploy[{extra}]'"
        ) from error
