from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training.ptq.bias_correction import correct_biases
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import quantize, quantizers
from trtdeploy.errors import QuantizationError


class Block(nn.Module):
    """A convolution with batch norm, one with a bias, a residual add and a classifier over sequences of pixels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        features = torch.relu_(self.norm(self.first(images)))
        features = features + torch.relu(self.second(features))
        return self.head(features.flatten(2).transpose(1, 2))


def half_step_down(weight):
    """Weights of which all but the largest of a channel lie just under a half: rounding moves them all one way."""
    with torch.no_grad():
        flat = weight.view(len(weight), -1)
        step = flat.abs().amax(1, keepdim=True) / 127
        largest = flat.abs().argmax(1, keepdim=True)
        biased = ((flat / step).round() + 0.45) * step
        flat.copy_(biased.scatter(1, largest, 127 * step))


def calibrated(network, images):
    network = quantize(network.eval(), example=images[:1])
    with observing_inputs(network) as histograms:
        network(images)
    fix_ranges(network, histograms)
    return network


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(64, 3, 10, 10)


def planted(images):
    torch.manual_seed(1)
    network = Block()
    network.train()
    network(images)
    for layer in (network.first, network.second, network.head):
        half_step_down(layer.weight)
    return network.eval()


def test_the_mean_of_every_channel_comes_back_and_the_error_falls(images):
    network = planted(images)
    with torch.no_grad():
        expected = copy.deepcopy(network)(images)
        quantized = calibrated(network, images)
        before = quantized(images)
        keys = list(quantized.state_dict())
        found = correct_biases(quantized, list(images.split(16)))
        after = quantized(images)
    assert (found.images, found.corrected, found.left_out) == (64, 3, ())
    assert list(quantized.state_dict()) == keys
    assert quantized.first.bias is None
    shift_before, shift_after = ((answer - expected).mean((0, 1)).abs().max().item() for answer in (before, after))
    assert shift_before > 1e-2
    assert shift_after < 0.1 * shift_before  # rounding of activations has nearly no mean
    assert (after - expected).square().mean() < 0.2 * (before - expected).square().mean()


def test_each_layer_is_corrected_behind_corrected_ones(images):
    """What a slow and simple loop finds, which runs the whole network anew for each layer."""
    network = planted(images)
    reference, fast = calibrated(copy.deepcopy(network), images), calibrated(network, images)
    plain = copy.deepcopy(network)
    names = ("first", "second", "head")
    for _, quantizer in quantizers(reference):
        if quantizer.of_activation:
            quantizer.disable()
    weights = [quantizer for _, quantizer in quantizers(reference) if not quantizer.of_activation]
    with torch.no_grad():
        for name in names:
            outputs = []
            layer = reference.get_submodule(name)
            hook = layer.register_forward_hook(lambda _, __, output, into=outputs: into.append(output.clone()))
            for switch in ("disable", "enable"):
                for quantizer in weights:
                    getattr(quantizer, switch)()
                saved = {key: value.clone() for key, value in reference.state_dict().items()}
                if switch == "disable":
                    reference.load_state_dict({**saved, **plain.state_dict()})
                reference(images)
                reference.load_state_dict(saved)
            hook.remove()
            axes = (0, 1) if name == "head" else (0, 2, 3)
            shift = (outputs[0] - outputs[1]).mean(axes)
            if layer.bias is None:
                reference.norm.running_mean -= shift
            else:
                layer.bias += shift
    correct_biases(fast, list(images.split(16)))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_clipped_outliers_do_not_move_the_bias(images):
    network = calibrated(planted(images), images)
    network.second.input_quantizer.set_amax(torch.tensor(0.01))
    twin = calibrated(planted(images), images)
    for each in (network, twin):
        correct_biases(each, [images])
    assert torch.equal(network.second.bias, twin.second.bias)
    assert network.second.input_quantizer.enabled


def test_layers_that_cannot_take_a_shift_are_named(images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare = nn.Conv2d(3, 3, 1, bias=False)
            self.twice = nn.Conv2d(3, 3, 1)
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, images):
            return self.last(self.twice(self.twice(self.bare(images))))

    network = calibrated(Odd(), images)
    before = network.twice.bias.detach().clone()
    found = correct_biases(network, [images])
    assert (found.corrected, found.left_out) == (1, ("bare", "twice"))
    assert torch.equal(network.twice.bias, before)


def test_memory_bounds_the_images(images, monkeypatch):
    import training.ptq.bias_correction

    network = calibrated(planted(images), images)
    monkeypatch.setattr(training.ptq.bias_correction, "_MEMORY_BYTES", 1)
    assert correct_biases(network, list(images.split(16))).images == 16


def test_a_network_without_a_graph_is_refused(images):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, images):
            return self.layer(images) if images.sum() > 0 else images

    with pytest.raises(QuantizationError, match="cannot be traced"):
        correct_biases(calibrated(Branching(), images), [images])
