"""Fake quantization of torch networks: quantizers, and where they sit."""

from training.quantization.exported_pairs import exported_pairs
from training.quantization.insertion import quantize, quantized_layers, reserve_ranges
from training.quantization.layers import QuantizedLayer, largest_per_channel
from training.quantization.quantizer import (
    INT8_BOUND,
    SMALLEST_AMAX,
    Quantizer,
    quantizers,
)
from training.quantization.spec import QuantizationSpec
from training.quantization.toolkits import Toolkit, make_quantizer

__all__ = [
    "INT8_BOUND",
    "SMALLEST_AMAX",
    "QuantizationSpec",
    "QuantizedLayer",
    "Quantizer",
    "Toolkit",
    "exported_pairs",
    "largest_per_channel",
    "make_quantizer",
    "quantize",
    "quantized_layers",
    "quantizers",
    "reserve_ranges",
]
