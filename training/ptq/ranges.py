"""The ranges of a quantized network: watch what passes its quantizers, then fix each range by a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from training.predict import device_of, in_float32
from training.quantization import (
    SMALLEST_AMAX,
    Quantizer,
    largest_per_channel,
    quantized_layers,
    quantizers,
    quantizers_off,
)
from trtdeploy.calibration import AbsHistogram, AbsMaximum, Method, amax_of
from trtdeploy.errors import QuantizationError

Collector = TypeVar("Collector", bound=AbsMaximum)


@contextmanager
def observing_inputs(
    model: nn.Module,
    collector: type[Collector] = AbsHistogram,  # type: ignore[assignment]
) -> Iterator[dict[Quantizer, Collector]]:
    """Run the network in float while what passes the quantizers of activations is collected.

    A quantizer that several readers share, such as that of concatenated tensors, has one collector of all it sees.

    Args:
        model: A quantized network.
        collector: ``AbsMaximum`` is faster, and enough for the method ``max``.

    Yields:
        A collector for each quantizer of an activation; they fill while the network runs inside the context.

    Raises:
        QuantizationError: While it runs: a value is not finite; the message names the tensor.
    """
    collectors = {
        quantizer: collector() for _, quantizer in quantizers(model) if quantizer.of_activation and quantizer.enabled
    }
    hooks = [
        quantizer.register_forward_pre_hook(_adding_to(values, quantizer.label))
        for quantizer, values in collectors.items()
    ]
    try:
        with quantizers_off(model), torch.no_grad(), in_float32():
            yield collectors
    finally:
        for hook in hooks:
            hook.remove()


def fix_ranges(
    model: nn.Module,
    collected: Mapping[Quantizer, AbsMaximum],
    *,
    method: Method = "max",
    percentile: float = 99.99,
) -> int:
    """Give every quantizer its range: activations by ``method``, weights the largest |w| of each output channel.

    The ranges lie where the weights do.

    Args:
        model: A quantized network.
        collected: What ``observing_inputs`` yielded, after the network ran.
        method: See ``trtdeploy.calibration.amax_of``.
        percentile: Of the method of that name.

    A layer that never ran, such as an auxiliary head, stays in float for good (``QuantizedLayer.idle``), unless it has
    a range from before.

    Returns:
        How many ranges were 0, because a tensor never varied or a channel is dead, and are tiny now.

    Raises:
        QuantizationError: No layer ran, or a range is not finite.
    """
    for layer in quantized_layers(model):
        values = collected.get(layer.input_quantizer)
        if values is not None and not values.n and layer.input_quantizer.amax is None:
            layer.leave_in_float()
    layers = [layer for layer in quantized_layers(model) if not layer.idle]
    if not layers:
        raise QuantizationError(
            "No layer that could be quantized was computed during calibration.",
            hint="Let the network's forward, in evaluation, call its layers as modules.",
        )
    found = [
        (quantizer, torch.tensor(amax_of(values, method, percentile=percentile)))
        for quantizer, values in collected.items()
        if values.n
    ]
    found += [(layer.weight_quantizer, largest_per_channel(layer)) for layer in layers]
    clamped, device = 0, device_of(model)
    for quantizer, amax in found:
        if not bool(torch.isfinite(amax).all()):
            raise QuantizationError(f"The range of {quantizer.label} is not finite.")
        clamped += int((amax < SMALLEST_AMAX).sum())
        quantizer.set_amax(amax.clamp(min=SMALLEST_AMAX).to(device))
    return clamped


def _adding_to(values: AbsMaximum, label: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        try:
            # In any layout: numpy walks a channels-last tensor in the order of its memory, without a copy.
            values.add(inputs[0].detach().float().cpu().numpy())
        except QuantizationError as error:
            raise QuantizationError(f"Calibration of {label}: {error.message}", hint=error.hint) from error

    return add
