"""Fake quantization of torch networks: quantizers, and where they sit."""

from training.quantization.quantizer import (
    INT8_BOUND,
    SMALLEST_AMAX,
    ExactHistogramCalibrator,
    Method,
    QuantizedLayer,
    Quantizer,
    quantize,
    quantized_layers,
    quantizers,
    reserve_ranges,
    weight_amax,
)

__all__ = [
    "INT8_BOUND",
    "SMALLEST_AMAX",
    "ExactHistogramCalibrator",
    "Method",
    "QuantizedLayer",
    "Quantizer",
    "quantize",
    "quantized_layers",
    "quantizers",
    "reserve_ranges",
    "weight_amax",
]
