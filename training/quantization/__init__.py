"""Fake quantization of torch networks: quantizers, and where they sit."""

from training.quantization.exported_pairs import exported_pairs
from training.quantization.insertion import quantize, quantized_layers, reserve_ranges
from training.quantization.layer_count import FloatLayer, LayerCount, count_layers
from training.quantization.layers import QuantizedLayer, largest_per_channel
from training.quantization.quantizer import (
    INT8_BOUND,
    SMALLEST_AMAX,
    Quantizer,
    quantizers,
    quantizers_off,
)
from training.quantization.spec import QuantizationSpec
from training.quantization.toolkits import Toolkit, make_quantizer

__all__ = [
    "INT8_BOUND",
    "SMALLEST_AMAX",
    "FloatLayer",
    "LayerCount",
    "QuantizationSpec",
    "QuantizedLayer",
    "Quantizer",
    "Toolkit",
    "count_layers",
    "exported_pairs",
    "largest_per_channel",
    "make_quantizer",
    "quantize",
    "quantized_layers",
    "quantizers",
    "quantizers_off",
    "reserve_ranges",
]
