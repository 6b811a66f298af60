"""The ranges of a quantized network: watch what passes its quantizers, then fix each range by a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from training.predict import device_of, in_float32
from training.quantization import (
    SMALLEST_AMAX,
    Inputs,
    LayerCount,
    Quantizer,
    as_arguments,
    count_layers,
    give_room,
    largest_per_channel,
    quantized_layers,
    quantizers,
    quantizers_off,
    unwrapped,
)
from trtdeploy.calibration import AbsHistogram, AbsMaximum, Method, amax_of
from trtdeploy.errors import QuantizationError, UsageError
from trtdeploy.onnxgraph.qdq.int8_scales import DEAD_AMAX

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
    """Give every quantizer its range: activations by ``method``, weights the largest |w|, and room for the bias.

    An activation that was 0 throughout gets the range that ``int8_scales.activation_scale`` gives it.

    The ranges lie where the weights do.

    Args:
        model: A quantized network.
        collected: What ``observing_inputs`` yielded, after the network ran.
        method: See ``trtdeploy.calibration.amax_of``.
        percentile: Of the method of that name.

    A layer that never ran, such as an auxiliary head, stays in float for good (``QuantizedLayer.idle``), unless it has
    a range from before.

    Returns:
        How many ranges were 0, because a tensor never varied or a channel is dead, and are replaced.

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
        stand_in = DEAD_AMAX if quantizer.of_activation and not bool(amax.any()) else SMALLEST_AMAX
        quantizer.set_amax(amax.clamp(min=float(stand_in)).to(device))
    give_room(model)
    return clamped


def observe(
    model: nn.Module,
    batches: Iterable[Inputs],
    collector: type[Collector] = AbsHistogram,  # type: ignore[assignment]
) -> dict[Quantizer, Collector]:
    """Run a network in float over batches, and return what passed its quantizers; see ``observing_inputs``.

    Raises:
        QuantizationError: A value is not finite.
    """
    device = device_of(model)
    with observing_inputs(model, collector) as collected:
        for batch in batches:
            model(*as_arguments(model, batch, device=device))
    return collected


def calibrate(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    method: Method = "relative-mse",
    percentile: float = 99.99,
) -> LayerCount:
    """Find the range of every activation from data, and of every weight from the weight.

    Args:
        model: As ``prepare`` returned it. It runs in evaluation meanwhile, where its weights are, and without labels.
        batches: Its inputs, each one tensor, a tuple by position, or a dictionary by name.
        method: How the ranges of activations are found: ``relative-mse``, ``mse``, ``entropy``, ``percentile`` or
            ``max``; see ``trtdeploy.calibration.amax_of``.
        percentile: Percent of all |x| inside the range, of the method of that name.

    Returns:
        Which layers are in INT8, and why the others are not. One that no batch reached stays in float.

    Raises:
        QuantizationError: There is no batch, no layer ran, or a value is not finite.
        UsageError: ``model`` has no quantizers.
    """
    model = unwrapped(model)
    layers = list(quantized_layers(model))
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no quantizers.", hint="Place them first: training.prepare(network, inputs)."
        )
    first: list[Inputs] = []

    def watched() -> Iterator[Inputs]:
        for batch in batches:
            first[:] = first or [batch]
            yield batch

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        collected = observe(model, watched(), AbsMaximum if method == "max" else AbsHistogram)
        if not first:
            raise QuantizationError("There is no batch to calibrate on.", hint="An iterator gives its batches once.")
        fix_ranges(model, collected, method=method, percentile=percentile)
        return count_layers(model, *as_arguments(model, first[0], device=device_of(model)), spec=layers[0].spec)
    finally:
        for module, training in modes.items():
            module.training = training


def _adding_to(values: AbsMaximum, label: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        try:
            # In any layout: numpy walks a channels-last tensor in the order of its memory, without a copy.
            values.add(inputs[0].detach().float().cpu().numpy())
        except QuantizationError as error:
            raise QuantizationError(f"Calibration of {label}: {error.message}", hint=error.hint) from error

    return add
