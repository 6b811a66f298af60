from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.training.tiny_model import OddConv, nothing_to_quantize, tiny
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import (
    make_quantizer,
    quantize,
    quantized_layers,
    quantizers,
)
from trtdeploy.errors import QuantizationError

IMAGES = torch.zeros(1, 3, 16, 16)


def full_range_fake_quant(values, scale):
    """QuantizeLinear then DequantizeLinear, zero-point 0, as the ONNX specification says."""
    return np.clip(np.rint(values / scale), -128, 127) * scale


def test_layers_share_their_parameters_and_names_with_the_float_network():
    network = tiny(10)
    before = dict(network.named_parameters())
    state = torch.get_rng_state()
    network = quantize(network, example=IMAGES[:1])
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(network.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    layers = {f"{layer}._{kind}_quantizer" for layer in ("stem", "depthwise", "head") for kind in ("input", "weight")}
    assert {name for name, _ in quantizers(network)} == {*layers, "_pooled_quantizer"}


def test_swapped_layers_compute_the_same_while_their_quantizers_are_off():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2, groups=1),
        nn.Conv2d(8, 8, (1, 3), padding="same", groups=8, bias=False),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).eval()
    images = torch.randn(4, 3, 16, 16)
    expected = network(images)
    quantized = quantize(network, example=images[:1])
    for _, quantizer in quantizers(quantized):
        quantizer.disable_quant()
    assert torch.equal(quantized(images), expected)
    assert not quantized.get_submodule("0").training


def test_a_subclass_that_computes_something_else_is_not_swapped():
    network = nn.Sequential(OddConv(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 3, 1))
    quantized = quantize(network, example=IMAGES[:1])
    assert type(quantized.get_submodule("0")) is OddConv
    assert len(list(quantized_layers(quantized))) == 2


def test_a_layer_used_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    network = quantize(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)), example=torch.zeros(1, 4))
    assert network.get_submodule("0") is network.get_submodule("2.0")
    assert len(list(quantized_layers(network))) == 1


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(QuantizationError, match="no layer that could be quantized"):
        quantize(nothing_to_quantize(3), example=IMAGES[:1])


@pytest.mark.parametrize("axis", [None, 0])
def test_the_arithmetic_is_that_of_quantize_linear_over_the_full_range(axis):
    values = torch.linspace(-3, 3, 1200).reshape(2, 600)
    amax = torch.tensor(2.0) if axis is None else torch.tensor([[2.0], [1.0]])
    quantizer = make_quantizer("x", axis=axis)
    quantizer.set_amax(amax)
    scale = np.asarray(amax / 127)
    expected = full_range_fake_quant(values.numpy(), scale)
    difference = np.abs(quantizer(values).numpy() - expected)
    # torch multiplies by the reciprocal of the scale: a value between two codes may take the other one
    assert (difference <= scale * 1.001).all()
    assert (difference > 1e-6).mean() < 0.01
    assert quantizer(torch.tensor([[-9.0], [-9.0]])).flatten().tolist() == pytest.approx(
        (-128 * np.broadcast_to(scale, (2, 1))).ravel().tolist()
    )


def test_gradients_pass_where_values_are_inside_the_range():
    quantizer = make_quantizer("x", axis=None)
    quantizer.set_amax(torch.tensor(1.0))
    values = torch.tensor([-3.0, -0.5, 0.2, 3.0], requires_grad=True)
    quantizer(values).sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_without_a_range_nothing_is_quantized_by_chance():
    with pytest.raises(QuantizationError, match=r"stem\.input has no range"):
        make_quantizer("stem.input", axis=None)(torch.ones(3))


def test_importing_leaves_logging_and_the_library_as_they_were():
    code = (
        "import logging, training.quantization.toolkits.pytorch_quantization\n"
        "from pytorch_quantization.nn import TensorQuantizer\n"
        "print(logging.getLogger().handlers, TensorQuantizer.use_fb_fake_quant)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


class IdentityShortcut(nn.Module):
    """A residual block whose shortcut is a module that does nothing, as in many ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shortcut = nn.Identity()

    def forward(self, inputs):
        return torch.relu(self.conv(inputs) + self.shortcut(inputs))


def test_a_tensor_behind_an_identity_has_the_quantizer_of_the_tensor_before():
    network = quantize(nn.Sequential(IdentityShortcut(), IdentityShortcut()), example=torch.zeros(1, 3, 8, 8))
    assert [name for name, _ in quantizers(network)] == [
        f"{block}.conv._{kind}_quantizer" for block in (0, 1) for kind in ("input", "weight")
    ]


def test_transposed_convolutions_are_quantized_but_for_those_with_groups():
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=4))
    quantized = quantize(network.eval(), example=torch.zeros(1, 3, 8, 8))
    assert [name for name, _ in quantizers(quantized)] == ["0._input_quantizer", "0._weight_quantizer"]


@pytest.mark.parametrize("axis", [None, 0])
def test_inference_computes_what_onnx_defines_to_the_bit(axis):
    from trtdeploy.runtimes.onnxruntime.witness import Witness

    rng = np.random.default_rng(0)
    scale = np.float32(0.0137) if axis is None else rng.uniform(0.01, 0.02, 6).astype(np.float32)
    # values on and beside the boundaries between codes, where a reciprocal takes the other one
    steps = np.repeat(np.arange(-140, 140) + 0.5, 40).astype(np.float32)
    values = np.stack([steps * each for each in np.broadcast_to(scale, 6)]).astype(np.float32)
    values += rng.integers(-1, 2, values.shape) * np.spacing(np.abs(values))
    quantizer = make_quantizer("x", axis=axis, toolkit="pytorch-quantization")
    quantizer.set_amax(torch.tensor(scale * np.float32(127)).reshape(() if axis is None else (6, 1)))
    scales = quantizer.scale_array.reshape(() if axis is None else (6,))
    attributes = {} if axis is None else {"axis": 0}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
            onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
        ],
        "pair",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(values.shape))],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(values.shape))],
        [
            onnx.numpy_helper.from_array(scales, "scale"),
            onnx.numpy_helper.from_array(np.zeros(scales.shape, np.int8), "zero"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    expected = Witness(model, ["y"])({"x": values})[0]
    with torch.inference_mode():
        found = quantizer(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(found, expected)
    assert (quantizer(torch.from_numpy(values)).detach().numpy() != expected).any()  # else this test shows nothing


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 1), (1, 2, 5)),
        (nn.Conv2d(2, 3, 1), (1, 2, 5, 5)),
        (nn.ConvTranspose2d(2, 3, 2), (1, 2, 5, 5)),
        (nn.Linear(5, 3), (1, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_that_is_called_by_keyword_works_as_before(layer, shape):
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.relu = layer, nn.ReLU(inplace=True)

        def forward(self, images):
            return self.layer(input=self.relu(input=images * 1))

    torch.manual_seed(0)
    images = torch.randn(shape)
    network = ByKeyword().eval()
    expected = network(images)
    quantized = quantize(network, example=images)
    with observing_inputs(quantized) as histograms:
        assert torch.equal(quantized(images), expected)
    fix_ranges(quantized, histograms)
    twin = quantized.get_submodule("layer")
    assert torch.allclose(twin(input=images), twin(images))
    assert (quantized(images) - expected).abs().max() < 0.05 * expected.abs().max()
