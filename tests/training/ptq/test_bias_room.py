"""Weights whose bias would overflow INT32, and transposed convolutions: training chooses scales as PTQ does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from training.checkpoints.checkpoint import METADATA_KEY, CheckpointFacts, load_checkpoint, save_checkpoint
from training.onnx_export import export_checkpoint, trace_to_onnx
from training.ptq.calibrate import calibrate
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, give_room, quantize, quantized_layers, skip_lost
from training.quantization.range_learning import LearnedRanges
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.statistics import sqnr_db


class Tokens(nn.Module):
    """A linear layer on three dimensions: MatMul and Add once it is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(9, 8), nn.Linear(8, 4)

    def forward(self, images):
        return self.last(torch.relu(self.first(images.flatten(2)))).mean(1)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 4))


def transposed() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 4), nn.Flatten())


NETWORKS = {"convolutions": convolutions, "linear": linear, "tokens": Tokens}


def images() -> torch.Tensor:
    return torch.randn(32, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def made(make, factor: float, bias: float = 1.0) -> Any:
    """Return a network whose first layer has a channel with weights ``factor`` times as large as the others'."""
    torch.manual_seed(0)
    network = make().eval()
    layer = next(module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    with torch.no_grad():
        layer.weight[3] *= factor
        layer.bias.fill_(bias)
    return network


def calibrated(network: nn.Module, spec: QuantizationSpec | None = None) -> nn.Module:
    quantized = quantize(network, spec, example=images()[:1])
    with observing_inputs(quantized) as collected:
        quantized(images())
    fix_ranges(quantized, collected)
    return quantized


def exported(network: nn.Module) -> onnx.ModelProto:
    return onnx.load_from_string(trace_to_onnx(network.eval(), torch.zeros(1, 3, 3, 3), opset=17))


def plain(model: onnx.ModelProto) -> np.ndarray:
    """Run with all of ONNX Runtime's optimizations, as everybody does."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": images().numpy()})[0]


def bias_code(layer) -> float:
    bias, scales = layer.bias.detach(), layer.weight_quantizer.scale_array.astype(np.float64)
    return float(np.abs(bias.numpy() / (scales * float(layer.input_quantizer.scale_array[0]))).max())


@pytest.mark.parametrize("factor", [0.0, 1e-7])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_with_a_dead_channel_is_what_the_file_says(name, factor):
    expected = made(NETWORKS[name], factor)(images()).detach().numpy()
    quantized = calibrated(made(NETWORKS[name], factor))
    model = exported(quantized)
    assert bias_code(next(quantized_layers(quantized))) <= 2**30
    as_written = Witness(model, ["logits"])({"input": images().numpy()})[0]
    assert sqnr_db(expected, as_written) > 25
    assert abs(sqnr_db(expected, plain(model)) - sqnr_db(expected, as_written)) < 1
    assert lint(model) == []


def test_a_channel_that_is_alive_keeps_its_range():
    network = made(convolutions, 1e-3)
    largest = network[0].weight.detach().abs().amax((1, 2, 3))
    layer = next(quantized_layers(calibrated(network)))
    torch.testing.assert_close(layer.weight_quantizer.amax.flatten(), largest, rtol=0, atol=0)


def test_an_input_that_was_dead_has_a_range_that_holds_something():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(-1)
    largest = network[2].weight.detach().abs().amax((1, 2, 3))
    _, last = quantized_layers(calibrated(network.eval()))
    assert float(last.input_quantizer.amax) == 1
    torch.testing.assert_close(last.weight_quantizer.amax.flatten(), largest, rtol=0, atol=0)


def test_learned_ranges_keep_the_room():
    network = calibrated(made(convolutions, 0.0, bias=0.0))
    layer = next(quantized_layers(network))
    ranges = LearnedRanges(network)
    with torch.no_grad():
        layer.bias.fill_(1)  # what a step of the optimizer might do, only larger
    assert bias_code(layer) > 2**31
    ranges.write_back()
    assert bias_code(layer) <= 2**30


def test_export_gives_ranges_of_another_tool_room(digits, ptq_file, tmp_path):
    checkpoint = load_checkpoint(ptq_file)
    with torch.no_grad():
        checkpoint.model.depthwise._weight_quantizer._amax[3] = 1e-8
        checkpoint.model.depthwise.weight[3] = 0
        checkpoint.model.depthwise.bias[3] = 1
    assert bias_code(checkpoint.model.depthwise) > 2**31
    model = onnx.load(export_checkpoint(checkpoint, tmp_path / "x.onnx", digits).path)
    assert lint(model) == []


def test_what_has_room_is_left_alone():
    network = calibrated(made(convolutions, 0.0))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert give_room(network) == 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(("weights", "shape"), [("per-tensor", (1, 1, 1, 1)), ("per-channel", (1, 8, 1, 1))])
@pytest.mark.parametrize("toolkit", ["pytorch-quantization", "modelopt"])
def test_a_transposed_convolution_has_one_range_unless_more_are_wanted(weights, shape, toolkit):
    pytest.importorskip("modelopt.torch.quantization" if toolkit == "modelopt" else "pytorch_quantization")
    spec = QuantizationSpec(transposed_weights=weights, toolkit=toolkit)
    quantized = calibrated(transposed().eval(), spec)
    layer = next(quantized_layers(quantized))
    assert layer.weight_quantizer.amax.shape == shape
    assert not layer.weight_quantizer.of_activation
    model = exported(quantized)
    assert [finding.rule for finding in lint(model)] == ([] if weights == "per-tensor" else ["transposed-axis"])
    with torch.no_grad():
        found = quantized(images()).numpy()
    np.testing.assert_allclose(Witness(model, ["logits"])({"input": images().numpy()})[0], found, atol=0.05)


def test_a_channel_that_one_range_would_lose_keeps_the_layer_in_float(caplog):
    network = transposed()
    with torch.no_grad():
        network[0].weight *= 4.0 ** -torch.arange(8).reshape(1, 8, 1, 1)
    assert skip_lost(network, QuantizationSpec()).skip == ("0",)
    assert "0 stays in float" in caplog.text
    caplog.clear()
    spec = QuantizationSpec(transposed_weights="per-channel")
    assert skip_lost(network, spec) == spec
    assert skip_lost(transposed(), QuantizationSpec()) == QuantizationSpec()
    assert "one scale for all output channels" in caplog.text  # it says so


def test_one_range_that_a_bias_would_make_too_wide_is_refused():
    network = transposed().eval()
    with torch.no_grad():
        network[0].bias[2] = 1e9
    with pytest.raises(QuantizationError, match="bias of 0 fits into INT32 only beside") as refused:
        calibrated(network)
    assert "--skip 0" in str(refused.value)


def upsampler(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def amax_of(model: nn.Module, label: str) -> torch.Tensor:
    found = [layer.weight_quantizer for layer in quantized_layers(model)]
    return next(quantizer.amax for quantizer in found if quantizer.label == label)


def test_checkpoints_keep_how_transposed_weights_are_quantized(digits, tmp_path):
    facts = CheckpointFacts(
        kind="float",
        model=f"{__name__}:upsampler",
        labels=tuple(digits.classes),
        preprocessing=Preprocessing.square(16),
    )
    network: Any = upsampler(len(digits.classes))
    with torch.no_grad():
        network[2].weight[:, 5] *= 1e-4
    save_checkpoint(tmp_path / "float.safetensors", network.state_dict(), facts)

    def ptq(name: str, **spec):
        start = load_checkpoint(tmp_path / "float.safetensors")
        calibrate(digits, start, tmp_path / name, spec=QuantizationSpec(**spec), method="max", images=16)
        return load_checkpoint(tmp_path / name)

    lost = ptq("lost.safetensors")
    assert lost.facts.quantization.skip == ("2",)
    assert [layer.weight_quantizer.label for layer in quantized_layers(lost.model)] == ["0.weight", "6.weight"]
    per_channel = ptq("channels.safetensors", transposed_weights="per-channel")
    expected = amax_of(per_channel.model, "2.weight")
    assert expected.shape == (1, 8, 1, 1)
    # a version that knew one way only did not say which
    with safe_open(tmp_path / "channels.safetensors", "pt") as file:
        text, state = file.metadata()[METADATA_KEY], {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert '"transposed_weights":"per-channel"' in text
    older = text.replace(',"transposed_weights":"per-channel"', "")
    save_file(state, tmp_path / "older.safetensors", {METADATA_KEY: older})
    older_model = load_checkpoint(tmp_path / "older.safetensors").model
    torch.testing.assert_close(amax_of(older_model, "2.weight"), expected, rtol=0, atol=0)
