"""The quantizers that the torch pass puts in are, once exported, where the rules for ONNX graphs want them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import onnx
import pytest
import torch
from torch import nn

from benchmarks.accuracy.small_networks import thin_densenet, thin_resnet
from tests.training.placed_networks import (
    HARD_GATES,
    HardGate,
    SmallMlp,
    SmallUNet,
    TwoConvolutionBranches,
    mobile_net,
    squeeze_net,
)
from training.models.efficientnet import efficientnet_b0
from training.onnx_export import trace_to_onnx
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, quantize
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.qdq.dynamic_ranges import parse_calibration_cache
from trtdeploy.onnxgraph.qdq.pairs import take_out
from trtdeploy.onnxgraph.qdq.placement import Target, wanted_sites
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import canonical_qdq, quantize_with_ranges, ranges_of, without_qdq

SIZE = 32
NETWORKS = {
    "efficientnet_b0": efficientnet_b0,
    "thin_resnet": thin_resnet,
    "thin_densenet": thin_densenet,
    "mobile_net": mobile_net,
    "squeeze_net": squeeze_net,
    "unet": SmallUNet,
    "two_branches": TwoConvolutionBranches,
}


@pytest.fixture(scope="module", params=NETWORKS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def exported(name) -> onnx.ModelProto:
    return calibrated_and_exported(NETWORKS[name], "tensorrt")


def calibrated_and_exported(make: Callable[[int], nn.Module], target: Target) -> onnx.ModelProto:
    """A network with random weights, calibrated on noise."""
    torch.manual_seed(0)
    network, noise = make(10), torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        network.train()(noise)  # batch norm has seen something
    quantized = quantize(network.eval(), QuantizationSpec(target=target), example=noise[:1])
    with observing_inputs(quantized) as histograms:
        quantized(noise)
    fix_ranges(quantized, histograms)
    return onnx.load_from_string(trace_to_onnx(quantized, torch.zeros(1, 3, SIZE, SIZE), opset=17))


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("form", HARD_GATES)
def test_a_gate_that_is_written_by_hand_is_one_for_both(form, target):
    exported = calibrated_and_exported(partial(HardGate, form=form), target)
    float_model, found = take_out(exported, lambda pair: True)
    wanted = wanted_sites(float_model, target=target)
    assert set(found) == {each.site for each in wanted}
    if target == "tensorrt":
        assert [each.reason for each in wanted].count("gate") == 2
        assert lint(exported) == []


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_parameters_are_no_activations_for_either(target):
    float_model, found = take_out(calibrated_and_exported(SmallMlp, target), lambda pair: True)
    assert set(found) == {each.site for each in wanted_sites(float_model, target=target)}


def test_both_placements_are_the_same(exported):
    float_model, found = take_out(exported, lambda pair: True)
    wanted = wanted_sites(float_model)
    assert set(found) == {each.site for each in wanted}
    groups = defaultdict(set)
    for each in wanted:
        if each.group is not None:
            groups[each.group].add(found[each.site].scale.tobytes())
    assert all(len(scales) == 1 for scales in groups.values())


def test_the_linter_is_content(exported):
    assert lint(exported) == []


def test_the_tensorrt_rtx_parser_takes_it_in_int8(name, exported, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    source = tmp_path / "model.onnx"
    onnx.save(exported, source)
    precision = build(source, tmp_path / "model.plan", BuildConfig(runtime="tensorrt-rtx")).manifest.precision
    assert (precision.asked_for, precision.unknown_percent) == ({"int8": 100.0}, 0.0)
    # TensorRT-RTX dequantizes before a ConvTranspose and computes it in float
    transposed = {node.name for node in exported.graph.node if node.op_type == "ConvTranspose"}
    assert set(precision.fallbacks) == transposed


def test_ranges_in_a_calibration_cache_lead_back_to_every_pair(exported):
    ranges = ranges_of(exported)
    assert not ranges.weight_scales
    again = quantize_with_ranges(without_qdq(exported), parse_calibration_cache(ranges.to_calibration_cache()))
    assert again == canonical_qdq(exported)
    assert lint(again) == []
