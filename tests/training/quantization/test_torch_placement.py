from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, Quantizer, exported_pairs, quantize, quantizers, reserve_ranges
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
        return self.layer(values) + values if values.sum() > -1e9 else values


class InPlace(nn.Module):
    """One tensor, read by a convolution before and by an addition after it is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, images):
        features = self.first(images) - 1
        branch = self.second(features)
        functional.relu_(features)
        return branch + features


class InPlaceByKeyword(InPlace):
    """The same, by a module whose input is named."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images):
        features = self.first(images) - 1
        branch = self.second(features)
        self.relu(input=features)
        return branch + features


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, values):
        return functional.linear(self.layer(values), self.weight)


class NoisyResidual(nn.Module):
    """Another graph in training than in evaluation, and a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, features):
        if self.training:
            features = features + 0.1 * torch.randn_like(features)
        return features + self.conv(features)


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
    reserve_ranges(quantized)
    labels = [quantizer.label for quantizer in exported_pairs(quantized, torch.randn(1, 3, 6, 6))]
    assert labels.count("residual") == 3  # the shortcut, the gated branch, and their concatenation
    assert labels.count("last.weight") == 1


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


def test_a_block_that_cannot_be_traced_stays_whole_and_the_rest_has_its_rules(caplog):
    network = nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(Branching())
    )
    with caplog.at_level(logging.WARNING):
        quantized = quantize(network.eval(), example=torch.randn(1, 4))
    assert names(quantized) == {"1._pooled_quantizer", "3.0.layer._input_quantizer"}
    [record] = caplog.records
    assert "3.0 (TraceError" in record.getMessage()


def test_a_block_that_changes_with_the_mode_stays_whole_and_goes_on_changing(caplog):
    with caplog.at_level(logging.WARNING):
        quantized = quantize(nn.Sequential(nn.Conv2d(3, 4, 1), NoisyResidual()), example=torch.randn(1, 3, 5, 5))
    [record] = caplog.records
    assert "1 (it computes something else in training)" in record.getMessage()
    for _, quantizer in quantizers(quantized):
        quantizer.disable()
    images = torch.randn(1, 3, 5, 5)
    assert not torch.equal(quantized.train()(images), quantized(images))
    assert torch.equal(quantized.eval()(images), quantized(images))


def test_layers_called_as_functions_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        quantized = quantize(WithParameter().eval(), example=torch.randn(1, 4))
    [record] = caplog.records
    assert "1 in WithParameter" in record.getMessage()
    assert names(quantized) == {"layer._input_quantizer"}


@pytest.mark.parametrize("network", [InPlace, InPlaceByKeyword])
def test_what_is_changed_in_place_is_two_tensors(network):
    torch.manual_seed(0)
    network, images = network().eval(), torch.randn(2, 3, 5, 5)
    state = network.state_dict()
    expected = network(images)
    quantized = quantize(network, example=images[:1])
    labels = {quantizer.label for _, quantizer in quantizers(quantized)}
    assert {"second.input", "residual"} <= labels
    with observing_inputs(quantized) as histograms:
        assert torch.equal(quantized(images), expected)
    fix_ranges(quantized, histograms)
    features = functional.conv2d(images, state["first.weight"], state["first.bias"]) - 1
    amax = {quantizer.label: float(quantizer.amax) for _, quantizer in quantizers(quantized) if quantizer.of_activation}
    assert amax["second.input"] == pytest.approx(float(features.abs().max()))
    assert amax["residual"] == pytest.approx(float(features.relu().max()))
    assert amax["second.input"] != amax["residual"]
    assert (quantized(images) - expected).abs().max() < 0.05 * expected.abs().max()
