from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from training.quantization import QuantizationSpec, Quantizer, quantize, quantizers, times_run
from trtdeploy.errors import UsageError


class Blocks(nn.Module):
    """A shortcut, a gate, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, images):
        shortcut = functional.silu(self.first(images))
        branch = self.norm(self.second(functional.relu(shortcut)))
        branch += shortcut
        gated = branch * torch.sigmoid(self.squeeze(branch.mean((2, 3), keepdim=True)))
        return self.last(torch.cat([gated, shortcut], 1)).flatten(1)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values):
        return self.layer(values) if values.sum() > -1e9 else values


def names(network):
    return {name for name, _ in quantizers(network) if "weight" not in name}


def test_each_rule_puts_its_quantizer_and_off_they_change_nothing():
    network, images = Blocks().eval(), torch.randn(2, 3, 6, 6)
    expected, keys = network(images), set(network.state_dict())
    quantized = quantize(network, example=images[:1])
    for _, quantizer in quantizers(quantized):
        quantizer.disable()
    assert torch.equal(quantized(images), expected)
    assert keys <= set(quantized.state_dict())
    assert names(quantized) == {
        "first._input_quantizer",
        "second._input_quantizer",
        "_residual_quantizer",  # the shortcut, which the concatenation reads too
        "_pooled_quantizer",  # one tensor: the gate's features and the mean's input
        "squeeze._input_quantizer",
        "_gated_quantizer",
    }


def test_what_is_concatenated_shares_one_range():
    quantized = quantize(Blocks().eval(), example=torch.randn(1, 3, 6, 6))
    runs = {quantizer.label: count for quantizer, count in times_run(quantized).items()}
    assert runs["residual"] == 3  # the shortcut, the gated branch, and their concatenation
    assert runs["last.weight"] == 1


@pytest.mark.parametrize("skip", ["squeeze", "s*d"])
def test_skipped_layers_stay_in_float(skip):
    spec = QuantizationSpec(skip=(skip,))
    quantized = quantize(Blocks().eval(), spec, example=torch.randn(1, 3, 6, 6))
    layer = "squeeze" if skip == "squeeze" else "second"
    assert not any(isinstance(module, Quantizer) for module in quantized.get_submodule(layer).modules())


def test_a_pattern_that_matches_nothing_names_its_neighbours():
    with pytest.raises(UsageError, match="squeeze"):
        quantize(Blocks(), QuantizationSpec(skip=("squeze",)), example=torch.randn(1, 3, 6, 6))


def test_what_cannot_be_traced_is_quantized_in_its_layers(caplog):
    with caplog.at_level(logging.WARNING):
        quantized = quantize(Branching(), example=torch.randn(1, 4))
    assert names(quantized) == {"layer._input_quantizer"}
    assert "Branching cannot be traced" in caplog.text
