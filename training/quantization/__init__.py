"""Fake quantization of torch networks: quantizers, and where they sit."""

from training.quantization.bias_room import give_room, skip_lost
from training.quantization.exported_pairs import exported_pairs
from training.quantization.graph.arguments import Inputs, as_arguments, input_names, tensors_in, unwrapped
from training.quantization.graph.layer_count import FloatLayer, LayerCount, count_layers
from training.quantization.insertion import quantize, quantized_layers, reserve_ranges
from training.quantization.layers import QuantizedLayer, largest_per_channel, refresh_ranges
from training.quantization.preparation import prepare
from training.quantization.quantizer import (
    INT8_BOUND,
    SMALLEST_AMAX,
    Quantizer,
    quantizers,
    quantizers_off,
)
from training.quantization.spec import QuantizationSpec
from training.quantization.toolkits.choice import Toolkit, make_quantizer

__all__ = [
    "INT8_BOUND",
    "SMALLEST_AMAX",
    "FloatLayer",
    "Inputs",
    "LayerCount",
    "QuantizationSpec",
    "QuantizedLayer",
    "Quantizer",
    "Toolkit",
    "as_arguments",
    "count_layers",
    "exported_pairs",
    "give_room",
    "input_names",
    "largest_per_channel",
    "make_quantizer",
    "prepare",
    "quantize",
    "quantized_layers",
    "quantizers",
    "quantizers_off",
    "refresh_ranges",
    "reserve_ranges",
    "skip_lost",
    "tensors_in",
    "unwrapped",
]
