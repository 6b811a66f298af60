"""Convolutions and linear layers whose weights, and where it is asked for inputs, pass through quantizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from training.quantization.quantizer import INT8_BOUND, SMALLEST_AMAX, Quantizer
from training.quantization.spec import QuantizationSpec
from training.quantization.toolkits.choice import make_quantizer
from trtdeploy.onnxgraph.qdq.int8_scales import is_too_small, smallest_scale

WEIGHTED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class QuantizedLayer(nn.Module):
    """Mixed into a layer's class: its forward is that class's, on the quantized weight.

    Attributes:
        quantizes_input: The layer itself calls ``_input_quantizer``. Otherwise the graph around it does, or another
            quantizer already sits on the tensor.
        idle: It has no ranges, because it never ran on calibration data, and computes in float.
        follows: Every forward takes the range of the weight from the weight as it is then.
        spec: How the network was quantized.
    """

    weight: Tensor
    _weight_quantizer: Quantizer
    _input_quantizer: Quantizer
    quantizes_input: bool
    idle: bool = False
    follows: bool = False
    spec: QuantizationSpec

    @property
    def input_quantizer(self) -> Quantizer:
        """The quantizer of the input, which other readers of the same tensor may share."""
        shared: Quantizer | None = self.__dict__.get("shared_input_quantizer")
        return self._input_quantizer if shared is None else shared

    def share_input(self, quantizer: Quantizer) -> None:
        """Leave the input to a quantizer in the graph around this layer."""
        self.quantizes_input = False
        if quantizer is not self._modules["_input_quantizer"]:
            # Not as a submodule: the quantizer has its name, and its key in the state dict, elsewhere.
            del self._modules["_input_quantizer"]
            self.__dict__["shared_input_quantizer"] = quantizer

    def quantized_weight(self) -> Tensor:
        """Return the weight as it is multiplied with; its range is taken from it first, where that follows."""
        weight, quantizer = self.weight, self._weight_quantizer
        if self.follows and quantizer.enabled and quantizer.amax is not None:
            quantizer.amax.copy_(range_of(self, weight))
        quantized: Tensor = quantizer(weight)
        return quantized

    @property
    def weight_quantizer(self) -> Quantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer

    def leave_in_float(self) -> None:
        """Compute in float for good, without ranges."""
        self.idle = True
        self.input_quantizer.disable()
        self.weight_quantizer.disable()


class _QuantizedConv(QuantizedLayer):
    _conv_forward: Any
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - a caller may name it
        values = self._input_quantizer(input) if self.quantizes_input else input
        outputs: Tensor = self._conv_forward(values, self.quantized_weight(), self.bias)
        return outputs


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """A Conv1d with quantizers."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """A Conv2d with quantizers."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """A Conv3d with quantizers."""


class _QuantizedTransposed(QuantizedLayer):
    bias: Tensor | None
    stride: Any
    padding: Any
    output_padding: Any
    kernel_size: Any
    dilation: Any
    groups: int
    _output_padding: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002 - see above
        values = self._input_quantizer(input) if self.quantizes_input else input
        dimensions = self.weight.dim() - 2
        output_padding = self._output_padding(
            values, output_size, self.stride, self.padding, self.kernel_size, dimensions, self.dilation
        )
        weight = self.quantized_weight()
        call = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)
        outputs: Tensor = call[dimensions - 1](
            values, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
        return outputs


class QuantizedConvTranspose1d(_QuantizedTransposed, nn.ConvTranspose1d):
    """A ConvTranspose1d with quantizers."""


class QuantizedConvTranspose2d(_QuantizedTransposed, nn.ConvTranspose2d):
    """A ConvTranspose2d with quantizers."""


class QuantizedConvTranspose3d(_QuantizedTransposed, nn.ConvTranspose3d):
    """A ConvTranspose3d with quantizers."""


class _QuantizedLinear(QuantizedLayer):
    bias: Any

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - see above
        values = self._input_quantizer(input) if self.quantizes_input else input
        return nn.functional.linear(values, self.quantized_weight(), self.bias)


class QuantizedLinear(_QuantizedLinear, nn.Linear):
    """A Linear with quantizers."""


_TWINS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
}
_COMPUTING = ("forward", "_conv_forward", "_output_padding")


def computes_as(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class of torch.nn as which a layer computes; None if it is none, or computes in a way of its own.

    That is its own class, or the base of a subclass that changes how the layer or its weight is made, not what is
    computed with them: a constructor of its own, or a weight that is parametrized (``torch.nn.utils.parametrize``).
    """
    for kind in WEIGHTED:
        if isinstance(layer, kind):
            same = all(getattr(type(layer), name, None) is getattr(kind, name, None) for name in _COMPUTING)
            return kind if same and type(layer) is not NonDynamicallyQuantizableLinear else None
    return None


def is_quantizable(layer: nn.Module) -> bool:
    """Return whether ``quantized_twin`` knows a layer."""
    return computes_as(layer) is not None and why_not_quantizable(layer) is None


def why_not_quantizable(layer: nn.Module) -> str | None:
    """Return why a convolution or linear layer has no quantized twin; None if it has one."""
    if computes_as(layer) is None:
        base = next((kind.__name__ for kind in WEIGHTED if isinstance(layer, kind)), "layer")
        return f"{type(layer).__name__}, a subclass of nn.{base}, computes in a way of its own"
    if isinstance(layer, _TRANSPOSED) and layer.groups != 1:
        return "a transposed convolution with groups spreads its output channels over two axes"
    return None


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a layer is a transposed convolution."""
    return isinstance(layer, _TRANSPOSED)


def quantized_twin(layer: nn.Module, path: str, spec: QuantizationSpec) -> QuantizedLayer | None:
    """Return a layer that shares everything with ``layer``, with quantizers; None if it is of no known class.

    A subclass is known if it computes what its base does, see ``computes_as``. A transposed convolution with groups is
    not taken, because the axis of its output channels is spread over two; of one without, the weight has one range
    or, ``per-channel``, one per output channel: see ``trtdeploy.onnxgraph.qdq.int8_scales.chosen_weight_scale``.
    """
    base = computes_as(layer)
    if base is None or not is_quantizable(layer):
        return None
    kind = _TWINS[base]
    if type(layer) is not base:
        mixin = next(each for each in kind.__bases__ if issubclass(each, QuantizedLayer))
        kind = type(f"Quantized{type(layer).__name__}", (mixin, type(layer)), {})
    axis: int | None = 0
    if is_transposed(layer):
        axis = 1 if spec.transposed_weights == "per-channel" else None
    twin = kind.__new__(kind)
    twin.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in layer.__dict__.items()}
    twin._input_quantizer = make_quantizer(f"{path}.input", axis=None, toolkit=spec.toolkit)
    twin._weight_quantizer = make_quantizer(f"{path}.weight", axis=axis, toolkit=spec.toolkit)
    twin._weight_quantizer.of_activation = False
    twin.quantizes_input, twin.spec = True, spec
    return twin.train(layer.training)


def plain_twin_of(layer: QuantizedLayer) -> type[QuantizedLayer]:
    """Return the class of a quantized layer whose weight is a plain parameter, and which computes the same."""
    return next(twin for base, twin in _TWINS.items() if isinstance(layer, base))


def channel_shape(layer: QuantizedLayer) -> tuple[int, ...]:
    """Return the shape of the ranges of a weight, which broadcasts against it."""
    axis = layer.weight_quantizer.axis
    return tuple(size if index == axis else 1 for index, size in enumerate(layer.weight.shape))


def largest_per_channel(layer: QuantizedLayer) -> Tensor:
    """Return the largest |w| of every range of a weight, in ``channel_shape``."""
    return _largest(layer.weight, layer.weight_quantizer)


def range_of(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Return the ranges of a layer's weight: the largest |w|, never 0, and wide enough for the bias.

    Args:
        layer: The layer.
        weight: Of it, which may be computed from parameters.
    """
    amax = _largest(weight, layer.weight_quantizer).clamp(min=float(SMALLEST_AMAX))
    smallest = smallest_amax(layer)
    return amax if smallest is None else torch.where(is_too_small(amax, smallest), smallest, amax)


@torch.no_grad()
def smallest_amax(layer: QuantizedLayer) -> Tensor | None:
    """Return the smallest ranges of a weight beside which the bias fits into INT32, in ``channel_shape``.

    None without a bias or a quantized input. The rule is ``int8_scales.smallest_scale``'s.
    """
    bias, given = layer.bias, layer.input_quantizer
    if not isinstance(bias, Tensor) or not layer.weight_quantizer.enabled or not given.enabled or given.amax is None:
        return None
    finite = bias.detach().float()
    finite = torch.where(finite.isfinite(), finite, torch.zeros_like(finite))
    if layer.weight_quantizer.axis is None:
        finite = finite.abs().max()
    smallest: Tensor = smallest_scale(finite, given.amax.reshape(()) / INT8_BOUND) * INT8_BOUND
    return smallest.reshape(channel_shape(layer))


@torch.no_grad()
def refresh_ranges(model: nn.Module) -> None:
    """Take the range of every weight from the weight as it is now, and of every activation as it was learned.

    A network that ``prepare`` returned does so in every forward by itself, and ``export`` does. Call it before ranges
    are read in another way after the last step, as ``state_dict()`` reads them.

    Args:
        model: A quantized network with ranges.
    """
    for layer in model.modules():
        if isinstance(layer, Quantizer) and layer.learned_range is not None:
            layer.learned_range.write_back()
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizer.enabled:
            amax = layer.weight_quantizer.amax
            if amax is not None:
                amax.copy_(range_of(layer, layer.weight))


def _largest(weight: Tensor, quantizer: Quantizer) -> Tensor:
    axes = [index for index in range(weight.dim()) if index != quantizer.axis]
    return torch.amax(weight.detach().abs(), dim=axes, keepdim=True)
