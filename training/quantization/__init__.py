"""Fake quantization of torch networks: quantizers, and where they sit."""

from training.quantization.insertion import quantize, quantized_layers, reserve_ranges, times_run
from training.quantization.layers import QuantizedLayer, largest_per_channel
from training.quantization.quantizer import (
    INT8_BOUND,
    SMALLEST_AMAX,
    Quantizer,
    quantizers,
)
from training.quantization.spec import QuantizationSpec

__all__ = [
    "INT8_BOUND",
    "SMALLEST_AMAX",
    "QuantizationSpec",
    "QuantizedLayer",
    "Quantizer",
    "largest_per_channel",
    "quantize",
    "quantized_layers",
    "quantizers",
    "reserve_ranges",
    "times_run",
]
