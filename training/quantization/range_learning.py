"""All ranges of a network while they are learned together with the weights.

Activations: each by its gradient, see ``learned_range``. Weights: the largest |w| of each output channel, taken anew
after every step, so that no weight that grows is clipped, with room for the bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.quantization.graph.arguments import unwrapped
from training.quantization.layers import refresh_ranges
from training.quantization.learned_range import LearnedRange
from training.quantization.quantizer import quantizers
from trtdeploy.errors import CheckpointError, UsageError


def learn_ranges(model: nn.Module) -> list[nn.Parameter]:
    """Let the ranges of a calibrated network's activations move with the weights, in a loop of one's own.

    Args:
        model: As ``prepare`` returned it, with ranges.

    Returns:
        The logarithms of the ranges, for a group of the optimizer's without weight decay. They are no parameters of
        ``model``; every forward uses them as they are then, and ``state_dict()`` and ``export`` have the ranges.

    Raises:
        UsageError: A quantizer has no range.
    """
    for _, quantizer in quantizers(unwrapped(model)):
        if quantizer.enabled and quantizer.amax is None:
            raise UsageError(f"{quantizer.label} has no range to learn from.", hint="Call calibrate first.")
    return LearnedRanges(unwrapped(model)).parameters()


class LearnedRanges:
    """Let the ranges of a calibrated network move; its state dict keeps its keys.

    Args:
        model: A quantized network with ranges. Its quantizers use what is learned here while gradients are on, and the
            range that was last written back otherwise.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._by_name: dict[str, LearnedRange] = {}
        for name, quantizer in quantizers(model):
            if quantizer.of_activation and quantizer.enabled:
                quantizer.learned_range = self._by_name[name] = LearnedRange(quantizer.amax, quantizer.label)
        self._model = model

    def parameters(self) -> list[nn.Parameter]:
        """Return what an optimizer moves, in a fixed order."""
        return [learned.log_amax for learned in self._by_name.values()]

    @torch.no_grad()
    def write_back(self) -> None:
        """Give every quantizer its range; call it after every step of the optimizer."""
        for learned in self._by_name.values():
            learned.write_back()
        refresh_ranges(self._model)

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
