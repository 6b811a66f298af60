"""Quantizers whose arithmetic is that of Q/DQ.

Symmetric INT8: inputs per tensor, weights per output channel or per tensor; ``scale = amax / 127``, zero-point 0,
values clamped to [-128, 127] and rounded half to even. That is what QuantizeLinear and TensorRT's explicit quantization
compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.quantization.learned_range import LearnedRange
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.qdq import int8_scales

INT8_BOUND = 127
SMALLEST_AMAX = float(int8_scales.SMALLEST_AMAX)
"""Stands for a smaller amax of a weight. A scale of 0 divides by zero and TensorRT refuses it."""


class Quantizer(nn.Module):
    """Fake quantization of one tensor; the toolkits' quantizers derive from it (``toolkits.make_quantizer``).

    What the toolkit's class gives: ``amax``, kept in the buffer ``_amax``; ``axis``, along which there is one range
    per channel, None for one range; ``enable()`` and ``disable()``.

    Attributes:
        label: What messages call the tensor, for example ``features.0.0.input``.
        of_activation: Whether it quantizes an activation, with one range; else a weight.
        learned_range: Stands in for ``amax`` while ranges are learned.
    """

    label: str
    of_activation: bool = True
    learned_range: LearnedRange | None
    if TYPE_CHECKING:
        axis: int | None
        amax: Tensor | None
        _disabled: bool
        _if_quant: bool

        def enable(self) -> None: ...

        def disable(self) -> None: ...

    @property
    def enabled(self) -> bool:
        """Whether it changes what passes through."""
        return not self._disabled and self._if_quant

    def set_amax(self, amax: Tensor) -> None:
        """Fix the range: a scalar, or one value per channel shaped for broadcasting."""
        self.register_buffer("_amax", amax.detach().clone().float())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        stored = state_dict.get(f"{prefix}_amax")
        if stored is not None and self.amax is None:  # prepared, not calibrated: the ranges come from the file
            self.set_amax(torch.ones_like(stored, dtype=torch.float32))
        super()._load_from_state_dict(state_dict, prefix, *others)

    @property
    def scale_array(self) -> NDArray[np.float32]:
        """The step between two codes, ``amax / 127``: one value, or one per channel, rounded as export rounds it."""
        if self.amax is None:
            raise QuantizationError(f"{self.label} has no range; calibrate first.")
        if self.amax.numel() == 1:
            return np.asarray([self.amax.item() / INT8_BOUND], dtype=np.float32)
        scales: NDArray[np.float32] = (self.amax.flatten() / INT8_BOUND).cpu().numpy()
        return scales

    def forward(self, inputs: Tensor) -> Tensor:
        return self._quant_forward(inputs) if self.enabled else inputs

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        if self.amax is None:
            raise QuantizationError(f"{self.label} has no range; calibrate first.")
        if inputs.dtype != torch.float32:  # under autocast: codes and scales are those of float32 all the same
            inputs = inputs.float()
        if self.learned_range is not None:
            self.learned_range.write_back()  # an optimizer has moved it
            if torch.is_grad_enabled():
                return self.learned_range.fake_quantize(inputs)
        fused = torch.is_grad_enabled() or torch.onnx.is_in_onnx_export()  # what autograd and the exporter know
        return self._by_toolkit(inputs) if fused else self._as_onnx(inputs)

    def _as_onnx(self, inputs: Tensor) -> Tensor:
        """Compute what QuantizeLinear and DequantizeLinear define, to the bit.

        torch's fused kernel multiplies by the reciprocal of the scale, so that a value between two codes now and then
        takes the other one; deep in a network such steps add up to other answers for 1 image in 100.
        """
        assert self.amax is not None  # the caller has looked
        scale = torch.from_numpy(self.scale_array).to(inputs.device).reshape(self.amax.shape)
        return inputs.div(scale).round_().clamp_(-INT8_BOUND - 1, INT8_BOUND).mul_(scale)

    def _by_toolkit(self, inputs: Tensor) -> Tensor:
        """Fake-quantize a float32 tensor with ``amax``, over the full range of codes."""
        raise NotImplementedError


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield the quantizers of a network with their names in its state dict."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


@contextmanager
def quantizers_off(model: nn.Module, *, weights: bool = True) -> Iterator[None]:
    """Let the network compute in float, or on quantized weights if ``weights`` is False.

    Those quantizers that were on are on again afterwards.
    """
    switched = [
        quantizer for _, quantizer in quantizers(model) if quantizer.enabled and (weights or quantizer.of_activation)
    ]
    for quantizer in switched:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enable()
