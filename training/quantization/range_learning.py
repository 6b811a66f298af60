"""All ranges of a network while they are learned together with the weights.

Activations: each by its gradient, see ``learned_range``. Weights: the largest |w| of each output channel, taken anew
after every step, so that no weight that grows is clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.quantization.insertion import quantized_layers
from training.quantization.layers import largest_per_channel
from training.quantization.learned_range import LearnedRange
from training.quantization.quantizer import SMALLEST_AMAX, quantizers
from trtdeploy.errors import CheckpointError


class LearnedRanges:
    """Let the ranges of a calibrated network move; its state dict keeps its keys.

    Args:
        model: A quantized network with ranges. Its quantizers use what is learned here while gradients are on, and the
            range that was last written back otherwise.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_name: dict[str, LearnedRange] = {}
        for name, quantizer in quantizers(model):
            if quantizer.of_activation and quantizer.enabled:
                quantizer.learned_range = self._by_name[name] = LearnedRange(quantizer.amax, quantizer.label)
        self._layers = [layer for layer in quantized_layers(model) if layer.weight_quantizer.enabled]

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer moves, in a fixed order."""
        return [learned.log_amax for learned in self._by_name.values()]

    @torch.no_grad()
    def write_back(self) -> None:
        """Give every quantizer its range; call it after every step of the optimizer."""
        for learned in self._by_name.values():
            learned.write_back()
        for layer in self._layers:
            amax = layer.weight_quantizer.amax
            assert amax is not None  # calibrated before training starts
            amax.copy_(largest_per_channel(layer).clamp(min=SMALLEST_AMAX))

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside the network: a range does not give back its logarithm exactly."""
        return {name: learned.log_amax.detach().clone() for name, learned in self._by_name.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what ``state`` returned.

        Raises:
            CheckpointError: It was for another network.
        """
        if state.keys() != self._by_name.keys():
            raise CheckpointError("The unfinished run learned the ranges of other tensors than this network has.")
        for name, learned in self._by_name.items():
            learned.log_amax.copy_(state[name])
