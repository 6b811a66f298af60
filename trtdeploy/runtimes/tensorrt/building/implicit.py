"""INT8 by dynamic ranges, TensorRT's older mode: weakly typed networks up to 10.x, deprecated since 10.1."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from trtdeploy.errors import QuantizationError, UsageError
from trtdeploy.onnxgraph.qdq.dynamic_ranges import read_ranges
from trtdeploy.runtimes.config import BuildConfig
from trtdeploy.runtimes.tensorrt.bindings import Bindings
from trtdeploy.runtimes.tensorrt.precision.weighted_layers import WeightedLayers

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)


def has_dynamic_ranges(bindings: Bindings) -> bool:
    """Say whether this version takes dynamic ranges as such."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    return hasattr(trt.ITensor, "set_dynamic_range") and hasattr(trt.BuilderFlag, "INT8")


def set_dynamic_ranges(
    bindings: Bindings,
    network: tensorrt.INetworkDefinition,
    target: tensorrt.IBuilderConfig,
    config: BuildConfig,
    layers: WeightedLayers,
) -> WeightedLayers:
    """Give every tensor of the network its range and allow INT8.

    Returns:
        The layers with those marked as quantized whose input has a range.

    Raises:
        UsageError: This version has no dynamic ranges.
        QuantizationError: No tensor of the network has a range in the file.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt
    if config.ranges is None or not has_dynamic_ranges(bindings) or not hasattr(trt.BuilderFlag, "INT8"):
        raise UsageError(
            f"{bindings.flavour.title} {bindings.version} takes no dynamic ranges: they went with TensorRT 11.",
            hint="Leave out --implicit: the ranges then become Q/DQ in the model, which every version takes.",
        )
    logger.warning("implicit INT8 is deprecated by TensorRT and gone in TensorRT 11; without --implicit, Q/DQ are used")
    scales = read_ranges(config.ranges)
    known: set[str] = set()
    quantized: set[str] = set()
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors += [layer.get_output(output) for output in range(layer.num_outputs)]
    for tensor in tensors:
        amax = scales.amax.get(tensor.name)
        if amax is not None and hasattr(tensor, "set_dynamic_range"):
            if not tensor.set_dynamic_range(-amax, amax):
                raise QuantizationError(f"TensorRT refuses the range +-{amax:g} of tensor {tensor.name}.")
            known.add(tensor.name)
    if not known:
        raise QuantizationError(
            f"None of the {len(scales.amax)} tensors in {config.ranges} is a tensor of the network.",
            hint="A calibration cache belongs to the model that it was made from; names must match.",
        )
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        source: tensorrt.ITensor | None = layer.get_input(0) if layer.num_inputs else None
        if source is not None and source.name in known:
            quantized |= layers.named_in(layer.metadata)
    target.set_flag(trt.BuilderFlag.INT8)
    return WeightedLayers(layers.macs, frozenset(quantized))
