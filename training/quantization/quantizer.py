"""Quantizers of pytorch-quantization whose arithmetic is that of Q/DQ.

Symmetric INT8: inputs per tensor, weights per output channel; ``scale = amax / 127``, zero-point 0, values clamped to
[-128, 127] and rounded half to even. That is what QuantizeLinear and TensorRT's explicit quantization compute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.quantization.learned_range import LearnedRange
from trtdeploy.errors import QuantizationError


class _FromLibrary(logging.Filter):
    """Drops pytorch-quantization's remarks about its own inner steps (it logs every amax it loads as a warning)."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL or "pytorch_quantization" not in record.pathname


@contextmanager
def _root_handlers_kept() -> Iterator[None]:
    """Undo what importing the library does to everybody's logging: it hangs absl's handler on the root logger."""
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        yield
    finally:
        root.handlers[:] = before


with _root_handlers_kept():
    from pytorch_quantization import nn as quant_nn
    from pytorch_quantization.tensor_quant import QuantDescriptor

logging.getLogger("absl").addFilter(_FromLibrary())

INT8_BOUND = 127
SMALLEST_AMAX = 1e-8
"""Stands for an amax of 0. A scale of 0 divides by zero and TensorRT refuses it; so small a one still maps 0 to 0."""


class Quantizer(quant_nn.TensorQuantizer):  # type: ignore[misc]
    """A TensorQuantizer that always uses torch's native fake quantization over the full range [-128, 127].

    The library does so only while a global flag is set, and otherwise clamps weights and inputs to [-127, 127]; then
    training and the exported graph would compute different things.

    Args:
        label: What messages call the tensor, for example ``features.0.0.input``.
        axis: Channel axis of the ranges; None for one range.
    """

    def __init__(self, label: str, *, axis: int | None) -> None:
        super().__init__(QuantDescriptor(num_bits=8, axis=axis, calib_method="max"))
        self.label = label
        self.learned_range: LearnedRange | None = None

    @property
    def of_activation(self) -> bool:
        """Whether it quantizes an activation, with one range; else a weight, with one per output channel."""
        return self.axis is None

    @property
    def enabled(self) -> bool:
        """Whether it changes what passes through."""
        return not self._disabled and self._if_quant

    def set_amax(self, amax: Tensor) -> None:
        """Fix the range: a scalar, or one value per channel shaped for broadcasting."""
        self.register_buffer("_amax", amax.detach().clone().float())

    @property
    def scale_array(self) -> NDArray[np.float32]:
        """The step between two codes, ``amax / 127``: one value, or one per channel, rounded as export rounds it."""
        if self.amax is None:
            raise QuantizationError(f"{self.label} has no range; calibrate first.")
        if self.amax.numel() == 1:
            return np.asarray([self.amax.item() / INT8_BOUND], dtype=np.float32)
        scales: NDArray[np.float32] = (self.amax.flatten() / INT8_BOUND).numpy()
        return scales

    def forward(self, inputs: Tensor) -> Tensor:
        return self._quant_forward(inputs) if self.enabled else inputs

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        if self.amax is None:
            raise QuantizationError(f"{self.label} has no range; calibrate first.")
        if inputs.dtype != torch.float32:  # under autocast: codes and scales are those of float32 all the same
            inputs = inputs.float()
        if self.learned_range is not None and torch.is_grad_enabled():
            return self.learned_range.fake_quantize(inputs)
        outputs: Tensor = self._fb_fake_quant(inputs, self.amax)
        return outputs


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield the quantizers of a network with their names in its state dict."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
