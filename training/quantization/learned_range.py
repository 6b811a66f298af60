"""The range of an activation as something that is learned.

The gradient is that of LSQ (Esser et al., "Learned step size quantization",
https://arxiv.org/abs/1902.08153, equation 3), through the rounding as if it were not there, through the clipping as it
is. What is learned is the logarithm of the range: then a range stays positive, and one that is ten times too large is
as far away as one that is ten times too small. With ``y`` the quantized tensor, ``x`` the tensor where it was not
clipped and 0 elsewhere, and ``g`` the gradient of the loss with respect to ``y``, the gradient with respect to the
logarithm is ``sum(g * (y - x))``. Adam divides each gradient by its own size, so LSQ's gradient scale has no use here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_LOWEST, _HIGHEST = -128, 127
_SMALLEST_LOG, _LARGEST_LOG = math.log(1e-8), math.log(1e30)


class LearnedRange:
    """The logarithm of one range, as a parameter that no state dict has.

    Args:
        amax: A quantizer's range; ``write_back`` changes it in place.
        label: What messages call the quantized tensor.

    Raises:
        ValueError: ``amax`` is not one number.
    """

    def __init__(self, amax: Tensor | None, label: str) -> None:
        if amax is None or amax.numel() != 1:
            raise ValueError(f"{label} has no single range")
        self._amax: Tensor = amax
        self.log_amax = nn.Parameter(amax.detach().float().reshape(()).log())

    def fake_quantize(self, inputs: Tensor) -> Tensor:
        """Quantize and dequantize; the gradient reaches the inputs and the logarithm of the range."""
        quantized: Tensor = _FakeQuantize.apply(inputs, self.log_amax, self._amax)  # type: ignore[no-untyped-call]
        return quantized

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the quantizer the range that was learned."""
        self.log_amax.clamp_(_SMALLEST_LOG, _LARGEST_LOG)
        self._amax.copy_(self.log_amax.exp().reshape(self._amax.shape))


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, _log_amax: Tensor, amax: Tensor) -> Tensor:
        outputs, inside = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(
            inputs, amax.item() / _HIGHEST, 0, _LOWEST, _HIGHEST
        )
        ctx.save_for_backward(inputs, outputs, inside)
        result: Tensor = outputs
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs, outputs, inside = ctx.saved_tensors
        gradient = gradients[0]
        to_inputs = gradient * inside
        return to_inputs, _inner(gradient, outputs) - _inner(to_inputs, inputs), None


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of the products, without a tensor in between where both lie alike in memory."""
    if first.stride() == second.stride() and _is_dense(first):
        return torch.dot(first.as_strided((first.numel(),), (1,)), second.as_strided((first.numel(),), (1,)))
    return (first * second).sum()


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
