"""A network made ready for quantization in a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from training.quantization.arguments import Inputs, as_arguments
from training.quantization.insertion import quantize, quantized_layers
from training.quantization.layers import QuantizedLayer
from training.quantization.spec import QuantizationSpec


def prepare(network: nn.Module, example_inputs: Inputs, spec: QuantizationSpec | None = None) -> nn.Module:
    """Place quantizers in a network: any number of inputs and outputs, any task.

    The result is a module like any other, with the parameters of ``network``, which is used up: train it in any loop,
    with any optimizer, under ``torch.compile`` and ``DistributedDataParallel``, save its ``state_dict()``, and load
    that into a network that was prepared alike. It cannot run before ``calibrate`` gave it ranges. The ranges of its
    weights follow the weights in every forward.

    Args:
        network: Float.
        example_inputs: One tensor, a tuple by position, or a dictionary by name, to learn the shapes of all tensors
            from. What they do not give keeps its default.
        spec: What is quantized, and for which runtime; the defaults if None.

    Returns:
        A ``torch.fx.GraphModule``; of a network that ``torch.fx`` cannot trace, the network with its layers quantized,
        and a warning says so.

    Raises:
        QuantizationError: There is nothing to quantize.
        UsageError: A pattern of ``spec.skip`` matches no layer, or the forward does not take the inputs.
    """
    prepared = quantize(network, spec, example=as_arguments(network, example_inputs))
    for layer in quantized_layers(prepared):
        layer.follows = True
    prepared._register_load_state_dict_pre_hook(_leave_idle_in_float, with_module=True)  # type: ignore[no-untyped-call]
    return prepared


def _leave_idle_in_float(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Leave those layers in float that had no ranges in the network whose ranges are loaded."""
    if not any(key.endswith("_quantizer._amax") for key in state):
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer) or layer.idle or layer.weight_quantizer.amax is not None:
            continue
        if f"{prefix}{name}._weight_quantizer._amax" not in state:
            layer.leave_in_float()
