"""Every layer with weights is counted, however it is written, and each that stays in float is named with its reason."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from tests.training.odd_networks import attention, flow, functions, only_functions, parametrized, recurrent, subclasses
from tests.training.tiny_model import tiny
from training.checkpoints.checkpoint import load_checkpoint
from training.cli.main import app
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import (
    QuantizationSpec,
    QuantizedLayer,
    count_layers,
    largest_per_channel,
    quantize,
    quantizers_off,
)
from training.quantization.graph.plain_weights import with_plain_weights
from trtdeploy.errors import QuantizationError
from trtdeploy.ledger import Ledger

IMAGES = torch.zeros(1, 3, 16, 16)
IN_ATTENTION = "a matrix product called as a function, inside nn.MultiheadAttention"


def counted(network: nn.Module, **options):
    spec = QuantizationSpec(**options)
    count = count_layers(quantize(network.eval(), spec, example=IMAGES), IMAGES, spec=spec)
    return set(count.quantized), {layer.name: layer.reason for layer in count.in_float}


@pytest.mark.parametrize(
    ("factory", "quantized", "in_float"),
    [
        (
            attention,
            {"patches", "head"},
            {"attention.in_proj_weight": IN_ATTENTION, "attention.out_proj": IN_ATTENTION},
        ),
        (
            functions,
            {"layer"},
            {
                "kernel": "a convolution called as a function, not of a layer",
                "head": "a matrix product called as a function, not of a layer",
            },
        ),
        (subclasses, {"0", "6"}, {"2": "StdConv2d, a subclass of nn.Conv2d, computes in a way of its own"}),
        (parametrized, {"0", "2", "6"}, {}),
        (recurrent, {"head"}, {"rows": "nn.LSTM computes all its products as one"}),
        (flow, {"stem", "bright", "dark", "head"}, {}),
    ],
)
def test_each_layer_is_in_int8_or_named_with_its_reason(factory, quantized, in_float):
    assert counted(factory(10)) == (quantized, in_float)


def test_what_is_skipped_and_transposed_layers_with_groups_are_named():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=4), nn.Conv2d(4, 4, 1))
    quantized, in_float = counted(network, skip=("2",))
    assert quantized == {"0"}
    assert in_float["2"] == "--skip"
    assert "groups" in in_float["1"]


def test_a_float_network_is_counted_too():
    count = count_layers(tiny(10), IMAGES)
    assert (count.quantized, [layer.name for layer in count.in_float]) == ((), ["stem", "depthwise", "head"])


def test_counting_leaves_the_network_as_it_was():
    network = quantize(tiny(10).train(), example=IMAGES)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_layers(network, IMAGES)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_weight_that_two_layers_share_and_one_that_runs_twice_count_as_their_modules():
    shared = nn.Conv2d(3, 3, 1)
    twin = nn.Conv2d(3, 3, 1)
    twin.weight = shared.weight
    assert counted(nn.Sequential(shared, nn.ReLU(), shared, twin)) == ({"0", "3"}, {})


def test_a_weight_that_a_function_multiplies_with_is_one_layer_under_two_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return nn.functional.linear(self.layer(self.words(ids)), self.words.weight)

    ids = torch.zeros(1, 3, dtype=torch.int64)
    count = count_layers(quantize(Tied().eval(), example=ids), ids)
    assert (count.quantized, [layer.name for layer in count.in_float]) == (("layer",), ["words"])


def test_where_nothing_can_be_quantized_the_error_names_each_layer():
    with pytest.raises(QuantizationError, match="no layer that could be quantized") as caught:
        quantize(only_functions(10), example=IMAGES)
    assert "kernel (a convolution called as a function" in caught.value.message


def test_control_flow_on_the_values_of_data_is_told_from_control_flow_on_shapes():
    class OnShapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, images):
            return self.layer(images) if images.shape[-1] > 8 else images

    assert count_layers(flow(10), IMAGES).decides_by_values == ("",)
    assert count_layers(OnShapes(), IMAGES).decides_by_values == ()


def test_in_inference_an_encoder_of_torch_computes_with_its_quantized_layers():
    """Its fast path would read the weights past them."""
    torch.manual_seed(0)
    network = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    tokens = torch.randn(4, 6, 16)
    quantized = quantize(network, example=tokens[:1])
    with observing_inputs(quantized) as collected:
        quantized(tokens)
    fix_ranges(quantized, collected)
    assert set(count_layers(quantized, tokens).quantized) == {"layers.0.linear1", "layers.0.linear2"}
    with_gradients = quantized(tokens).detach()  # where the fast path is never taken
    with torch.inference_mode():
        found = quantized(tokens)
        with quantizers_off(quantized):
            exact = quantized(tokens)
    assert (found - exact).abs().max() > 1e-3
    assert (found - with_gradients).abs().mean() < 0.1 * (with_gradients - exact).abs().mean()


def test_a_parametrized_layer_is_quantized_on_the_weight_that_it_computes():
    torch.manual_seed(0)
    network, images = parametrized(10).eval(), torch.randn(2, 3, 16, 16)
    expected = network(images)
    quantized = quantize(network, example=images[:1])
    assert quantized.state_dict().keys() == parametrized(10).state_dict().keys()
    with observing_inputs(quantized) as collected:
        assert torch.equal(quantized(images), expected)
    fix_ranges(quantized, collected)
    layer = quantized.get_submodule("0")
    assert isinstance(layer, QuantizedLayer)
    assert torch.equal(layer.weight_quantizer.amax, largest_per_channel(layer))
    assert torch.allclose(layer.weight_quantizer.amax.flatten(), layer.weight.abs().amax((1, 2, 3)))
    assert not torch.equal(quantized(images), expected)
    assert (quantized(images) - expected).abs().max() < 0.1 * expected.abs().max()
    with quantizers_off(quantized):
        assert torch.equal(quantized(images), expected)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.stdout


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("attention", f"in float: attention.in_proj_weight, attention.out_proj ({IN_ATTENTION})"),
        ("auxiliary", "in float: auxiliary (it never ran on the calibration data)"),
        ("flow", "in float: bright (it never ran on the calibration data)"),
        ("parametrized", "3 of 3 layers with weights in INT8"),
        ("subclasses", "in float: 2 (StdConv2d, a subclass of nn.Conv2d, computes in a way of its own)"),
        ("functions", "1 of 3 layers with weights in INT8"),
    ],
)
def test_every_command_and_the_facts_name_what_stays_in_float(name, line, tmp_path):
    torch.manual_seed(1)
    model = f"odd_networks:{name}"
    from tests.training import odd_networks

    start, ptq, ledger = tmp_path / "f.safetensors", tmp_path / "p.safetensors", tmp_path / "ledger.json"
    save_file({k: v.contiguous() for k, v in getattr(odd_networks, name)(10).state_dict().items()}, start)
    options = ["--model", model, "--image-size", 16]
    assert line in run("calibrate", start, "-o", ptq, "--images", 32, "--ledger", ledger, *options)
    facts = load_checkpoint(ptq).facts
    assert facts.layers.total == len(facts.layers.quantized) + len(facts.layers.in_float)
    assert Ledger(ledger).stages["ptq"].source["layers"] == facts.layers.summary()
    output = run("export", ptq, "-o", tmp_path / "p.onnx")
    assert line in output
    weights = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in onnx.load(tmp_path / "p.onnx").graph.node)
    assert weights >= len(facts.layers.quantized)
    found = json.loads(run("sensitivity", ptq, "-o", tmp_path / "s.json", "--images", 20, "--json"))
    assert found["in_float"] == [layer.model_dump() for layer in facts.layers.in_float]
    assert {row["name"] for row in found["layers"] if row["kind"] == "layer"} == set(facts.layers.quantized)
    if name not in ("auxiliary",):
        trained = run("qat", ptq, "-o", tmp_path / "q.safetensors", "--max-steps", 2)
        assert line in trained
        load_checkpoint(tmp_path / "q.safetensors")


def test_a_network_that_returns_more_than_scores_in_training_is_one_message(tmp_path):
    result = CliRunner().invoke(
        app, ["fit", "-o", str(tmp_path / "x.safetensors"), "--model", "odd_networks:auxiliary", "--image-size", "16"]
    )
    assert result.exit_code == 2
    assert "In training Auxiliary returns tuple" in " ".join(result.output.split())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_are_exported_as_plain_ones():
    older = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)))
    network = older.eval()
    for module in (network, parametrized(10).eval(), quantize(parametrized(10).eval(), example=IMAGES)):
        images = torch.randn(2, 3, 16, 16)
        with quantizers_off(module), torch.no_grad():
            expected, state = module(images), set(module.state_dict())
            plain = with_plain_weights(module)
            assert torch.equal(plain(images), expected)
            assert torch.equal(module(images), expected)
        assert set(module.state_dict()) == state
        assert all(key.rpartition(".")[2] in ("weight", "bias") for key in plain.state_dict())
    assert with_plain_weights(plain) is plain


def test_an_export_says_that_a_network_decides_by_values(tmp_path, caplog):
    start = tmp_path / "f.safetensors"
    save_file(flow(10).state_dict(), start)
    run("export", start, "-o", tmp_path / "f.onnx", "--model", "odd_networks:flow", "--image-size", 16)
    assert "Flow decides by the values of its input" in caplog.text
