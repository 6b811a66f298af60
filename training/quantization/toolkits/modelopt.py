"""Quantizers of NVIDIA's TensorRT Model Optimizer (ModelOpt)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from torch import Tensor

from training.quantization.quantizer import INT8_BOUND, Quantizer

_BACKEND = "trtdeploy"


class ModelOptQuantizer(Quantizer, TensorQuantizer):  # type: ignore[misc]
    """A TensorQuantizer that computes with torch's native fake quantization, through ModelOpt's own extension point.

    ModelOpt's arithmetic multiplies by 127 / amax and divides by it again, which can be one float away from what
    QuantizeLinear and DequantizeLinear compute with the scale amax / 127.
    """

    _fake_quantize: Callable[[Tensor], Tensor]

    def __init__(self, label: str, *, axis: int | None) -> None:
        config = QuantizerAttributeConfig(num_bits=8, axis=axis, narrow_range=False, backend=_BACKEND)
        TensorQuantizer.__init__(self, config)
        self.label = label
        self.learned_range = None

    def _by_toolkit(self, inputs: Tensor) -> Tensor:
        return self._fake_quantize(inputs)


def _as_qdq(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    amax: Tensor = quantizer.amax
    lowest, highest = -INT8_BOUND - 1, INT8_BOUND
    if amax.numel() == 1:
        return torch.fake_quantize_per_tensor_affine(inputs, amax.item() / INT8_BOUND, 0, lowest, highest)
    scale = amax.flatten() / INT8_BOUND
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(inputs, scale, zero_point, quantizer.axis, lowest, highest)


register_quant_backend(_BACKEND, _as_qdq)
