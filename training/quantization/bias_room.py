"""Ranges of weights that leave the bias of their layer room in INT32; the rule is ``int8_scales``'."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from training.quantization.insertion import quantized_layers
from training.quantization.layers import (
    QuantizedLayer,
    is_quantizable,
    is_transposed,
    largest_per_channel,
    smallest_amax,
)
from training.quantization.quantizer import INT8_BOUND, SMALLEST_AMAX
from training.quantization.spec import QuantizationSpec
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.qdq.int8_scales import FEWEST_CODES, is_too_small, lost_channels, weight_scale

_log = logging.getLogger(__name__)


@torch.no_grad()
def give_room(model: nn.Module) -> int:
    """Widen, in place, the ranges of weights beside which a bias would not fit into INT32.

    After calibration, and after whatever moves biases or ranges: bias correction, training.

    Returns:
        How many layers have wider ranges now.

    Raises:
        QuantizationError: A weight has one range for all output channels, and one wide enough would lose some of them.
    """
    widened = 0
    for layer in quantized_layers(model):
        amax, smallest = layer.weight_quantizer.amax, smallest_amax(layer)
        if amax is None or smallest is None:
            continue
        wider = torch.where(is_too_small(amax, smallest), smallest, amax)
        if layer.weight_quantizer.axis is None and bool(
            (wider > largest_per_channel(layer).clamp(min=float(SMALLEST_AMAX))).any()
        ):
            _require_channels(layer, wider)
        widened += not torch.equal(wider, amax)
        amax.copy_(wider)
    return widened


def skip_lost(model: nn.Module, spec: QuantizationSpec) -> QuantizationSpec:
    """Return what is to be quantized without the transposed convolutions in which one range would lose a channel.

    Args:
        model: The float network.
        spec: What is wanted.
    """
    if spec.transposed_weights != "per-tensor":
        return spec
    lost: dict[str, int] = {}
    one_range: list[str] = []
    for name, layer in model.named_modules():
        if is_transposed(layer) and is_quantizable(layer) and not spec.skips(name):
            weight = layer.weight.detach().float().cpu().numpy()
            count = lost_channels(weight, 1, weight_scale(weight, None))
            if count:
                lost[name] = count
            else:
                one_range.append(name)
    for name, count in lost.items():
        _log.warning(
            "%s stays in float: %d of its output channels would keep fewer than %d of 127 codes if all share one scale "
            "(--transposed-weights per-channel gives each its own)",
            name,
            count,
            FEWEST_CODES,
        )
    if one_range:
        _log.warning(
            "the weights of transposed convolutions have one scale for all output channels, because tools disagree on "
            "the axis (--transposed-weights per-channel gives each its own): %s",
            ", ".join(one_range),
        )
    return spec.model_copy(update={"skip": (*spec.skip, *lost)}) if lost else spec


def _require_channels(layer: QuantizedLayer, amax: Tensor) -> None:
    weight = layer.weight.detach().float().cpu().numpy()
    lost = lost_channels(weight, 1, (amax / INT8_BOUND).cpu().numpy().reshape(()))
    if lost:
        name = layer.weight_quantizer.label.removesuffix(".weight")
        raise QuantizationError(
            f"The bias of {name} fits into INT32 only beside one scale with which {lost} of {weight.shape[1]} output "
            f"channels would keep fewer than {FEWEST_CODES} of 127 codes.",
            hint=f"Leave the layer in float with --skip {name}, or give each channel its own scale with "
            "--transposed-weights per-channel.",
        )
