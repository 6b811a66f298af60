"""A network made ready for quantization in a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from training.quantization.bias_room import skip_lost
from training.quantization.graph.arguments import Inputs, as_arguments, tensors_in
from training.quantization.insertion import quantize, quantized_layers
from training.quantization.layers import QuantizedLayer
from training.quantization.spec import QuantizationSpec
from trtdeploy.errors import UsageError


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
        UsageError: A pattern of ``spec.skip`` matches no layer, or the network cannot run on the inputs.
    """
    arguments = as_arguments(network, example_inputs)
    _require_it_runs(network, arguments)
    prepared = quantize(network, skip_lost(network, spec or QuantizationSpec()), example=arguments)
    for layer in quantized_layers(prepared):
        layer.follows = True
    prepared._register_load_state_dict_pre_hook(_leave_idle_in_float, with_module=True)  # type: ignore[no-untyped-call]
    return prepared


def _require_it_runs(network: nn.Module, arguments: tuple[Any, ...]) -> None:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            network(*tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments))
    except Exception as error:  # a user's forward may fail in any way
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(arguments))
        raise UsageError(
            f"{type(network).__name__} cannot run on the example inputs ({shapes}): {type(error).__name__}: {error}.",
            hint="Give inputs as the network takes them, on the device where its weights are.",
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _leave_idle_in_float(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Leave those layers in float that had no ranges in the network whose ranges are loaded."""
    if not any(key.endswith("_quantizer._amax") for key in state):
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer) or layer.idle or layer.weight_quantizer.amax is not None:
            continue
        if f"{prefix}{name}._weight_quantizer._amax" not in state:
            layer.leave_in_float()
