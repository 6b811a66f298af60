"""Quantizers of pytorch-quantization whose arithmetic is that of Q/DQ.

Symmetric INT8: inputs per tensor, weights per output channel; ``scale = amax / 127``, zero-point 0, values clamped to
[-128, 127] and rounded half to even. That is what QuantizeLinear and TensorRT's explicit quantization compute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trtdeploy.errors import QuantizationError

_log = logging.getLogger(__name__)

Method = Literal["max", "percentile"]


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
    from pytorch_quantization.calib import HistogramCalibrator, MaxCalibrator
    from pytorch_quantization.tensor_quant import QuantDescriptor

logging.getLogger("absl").addFilter(_FromLibrary())

INT8_BOUND = 127
SMALLEST_AMAX = 1e-8
"""Stands for an amax of 0. A scale of 0 divides by zero and TensorRT refuses it; so small a one still maps 0 to 0."""

_BINS = 1 << 14
_EXACT_IN_FLOAT32 = 1 << 24


class ExactHistogramCalibrator(HistogramCalibrator):  # type: ignore[misc]
    """The library's percentile calibrator over a histogram of |x| that counts exactly and holds any range.

    The library counts in float32, where a bin stops growing at 2^24, and keeps the bin width of the first batch, which
    fails when that batch is all zeros and exhausts the memory when it is nearly so. Here the counts are int64, and the
    width doubles whenever a larger value arrives, so the resolution stays at least 1/8192 of the largest value.
    ``compute_amax`` is the library's; it finds the upper edge of the bin in which the percentile lies.
    """

    def __init__(self) -> None:
        super().__init__(num_bits=8, axis=None, unsigned=False)
        self._counts = torch.zeros(_BINS, dtype=torch.int64)
        self._zeros = 0
        self._width = 0.0

    def collect(self, x: Tensor) -> None:
        values = x.detach().abs().float().flatten()
        largest = float(values.max())
        if self._width == 0.0:
            if largest == 0.0:
                self._zeros += values.numel()
                return
            self._width = largest / _BINS
            self._counts[0] += self._zeros
        while largest > self._width * _BINS:
            merged = self._counts.reshape(-1, 2).sum(dim=1)
            self._counts = torch.cat([merged, torch.zeros_like(merged)])
            self._width *= 2
        for chunk in torch.split(values, _EXACT_IN_FLOAT32 - 1):
            counts = torch.histc(chunk, bins=_BINS, min=0.0, max=self._width * _BINS)
            self._counts += counts.to(torch.int64)

    def compute_amax(self, method: str = "percentile", *, percentile: float = 99.99) -> Tensor | None:
        """Return the amax; 0 if all values were 0, None if there were none."""
        if self._width == 0.0:
            return torch.tensor(0.0) if self._zeros else None
        self._calib_hist = self._counts.numpy()
        # One edge more than there are bins: rounding can put the last quantile just above the sum of all shares.
        self._calib_bin_edges = torch.arange(1, _BINS + 2, dtype=torch.float64).mul(self._width).numpy()
        amax: Tensor = super().compute_amax(method, percentile=percentile)
        return amax


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

    @property
    def of_activation(self) -> bool:
        """Whether it quantizes an activation, with one range; else a weight, with one per output channel."""
        return self.axis is None

    def calibrate_by(self, method: Method) -> None:
        """Forget what the calibrator saw, and find the range by ``method``."""
        self._calibrator = (
            ExactHistogramCalibrator() if method == "percentile" else MaxCalibrator(8, None, unsigned=False)
        )

    @property
    def enabled(self) -> bool:
        """Whether it changes what passes through."""
        return not self._disabled and self._if_quant

    def collect(self, tensor: Tensor) -> None:
        """Show the calibrator one tensor.

        Raises:
            QuantizationError: A value is not finite.
        """
        if not bool(torch.isfinite(tensor).all()):
            raise QuantizationError(
                f"Calibration saw values in {self.label} that are not finite (NaN or infinity).",
                hint="Evaluate the float checkpoint first; its weights or its preprocessing are broken.",
            )
        self._calibrator.collect(tensor.detach())

    def computed_amax(self, *, percentile: float) -> Tensor | None:
        """Return the range that the calibrator found, None if it saw nothing; ``percentile`` where it takes one."""
        if isinstance(self._calibrator, ExactHistogramCalibrator):
            return self._calibrator.compute_amax(percentile=percentile)
        amax: Tensor | None = self._calibrator.compute_amax()
        return amax

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
        if self._if_calib and not self._disabled:
            self.collect(inputs)
        return self._quant_forward(inputs) if self.enabled else inputs

    def _quant_forward(self, inputs: Tensor) -> Tensor:
        if self.amax is None:
            raise QuantizationError(f"{self.label} has no range; calibrate first.")
        outputs: Tensor = self._fb_fake_quant(inputs, self.amax)
        return outputs


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Yield the quantizers of a network with their names in its state dict."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module
