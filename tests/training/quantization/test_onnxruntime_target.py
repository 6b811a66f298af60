from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from benchmarks.accuracy.small_networks import thin_densenet, thin_resnet
from tests.training.placed_networks import SmallUNet, TwoConvolutionBranches, mobile_net, squeeze_net
from training.checkpoints.checkpoint import load_checkpoint
from training.models.efficientnet import efficientnet_b0
from training.onnx_export import export_checkpoint, onnx_predictor, trace_to_onnx
from training.predict import predictor
from training.ptq.calibrate import calibrate
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, quantize, quantizers, quantizers_off
from trtdeploy.onnxgraph.qdq.pairs import take_out
from trtdeploy.onnxgraph.qdq.placement import wanted_sites
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations

SPEC = QuantizationSpec(target="onnxruntime")
SIZE = 32


def calibrated(make):
    torch.manual_seed(0)
    network, noise = make(10), torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        network.train()(noise)
        expected = network.eval()(noise)
    quantized = quantize(network, SPEC, example=noise[:1])
    with observing_inputs(quantized) as histograms:
        quantized(noise)
    fix_ranges(quantized, histograms)
    return quantized, noise, expected


def optimized(model, folder):
    """The ops that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("make", [thin_resnet, efficientnet_b0])
def test_every_convolution_and_sum_runs_in_integers(make, tmp_path):
    quantized, noise, expected = calibrated(make)
    with quantizers_off(quantized), torch.no_grad():
        assert torch.allclose(quantized(noise), expected, rtol=1e-3, atol=1e-4)  # batch norm is folded
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in quantized.modules())
    signed = onnx.load_from_string(trace_to_onnx(quantized, torch.zeros(1, 3, SIZE, SIZE), opset=17))
    unsigned = with_unsigned_activations(signed)
    answers = [onnx_predictor(model.SerializeToString())(noise.numpy()) for model in (signed, unsigned)]
    assert np.array_equal(*answers)
    before, after = optimized(signed, tmp_path), optimized(unsigned, tmp_path)
    convolutions = sum(node.op_type == "Conv" for node in signed.graph.node)
    additions = sum(node.op_type == "Add" for node in signed.graph.node)
    assert (after["QLinearConv"], after["QLinearAdd"]) == (convolutions, additions)
    assert after["Conv"] == after["FusedConv"] == after["BatchNormalization"] == 0
    assert before["QLinearConv"] < convolutions


def test_h_swish_and_gates_leave_no_convolution_in_float(tmp_path):
    quantized, _, _ = calibrated(mobile_net)
    model = with_unsigned_activations(
        onnx.load_from_string(trace_to_onnx(quantized, torch.zeros(1, 3, SIZE, SIZE), opset=17))
    )
    ops = optimized(model, tmp_path)
    assert ops["QLinearConv"] == sum(node.op_type == "Conv" for node in model.graph.node)


@pytest.mark.parametrize(
    "make", [thin_resnet, thin_densenet, mobile_net, squeeze_net, SmallUNet, TwoConvolutionBranches]
)
def test_both_placements_are_the_same(make):
    quantized, _, _ = calibrated(make)
    exported = onnx.load_from_string(trace_to_onnx(quantized, torch.zeros(1, 3, SIZE, SIZE), opset=17))
    float_model, found = take_out(exported, lambda pair: True)
    assert set(found) == {each.site for each in wanted_sites(float_model, target="onnxruntime")}


def test_a_checkpoint_is_rebuilt_with_folded_layers_and_exported(digits, float_file, tmp_path):
    output = tmp_path / "ptq.safetensors"
    saved = calibrate(digits, load_checkpoint(float_file), output, spec=SPEC, method="max")
    assert saved.facts.dev.top1 > load_checkpoint(float_file).facts.dev.top1 - 5
    checkpoint = load_checkpoint(output)
    assert checkpoint.facts.quantization == SPEC
    assert not any("norm" in key for key in checkpoint.model.state_dict())
    exported = export_checkpoint(checkpoint, tmp_path / "ptq.onnx", digits)
    assert exported.quantize_nodes == sum(1 for _ in quantizers(checkpoint.model))
    inputs = torch.randn(3, 3, 16, 16).numpy()
    written = onnx.load(exported.path)
    types = Counter(tensor.data_type for tensor in written.graph.initializer if tensor.name == "activation_zero_point")
    assert types == {onnx.TensorProto.UINT8: 1}
    answered = onnx_predictor(exported.path.read_bytes())(inputs)
    assert (answered.argmax(1) == predictor(checkpoint.model)(inputs).argmax(1)).all()
