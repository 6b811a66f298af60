from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file

import training.onnx_export as export_module
from training.checkpoints.checkpoint import load_checkpoint
from training.onnx_export import export_checkpoint, onnx_predictor
from training.parity import Parity, require_parity
from training.predict import predictor
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ModelError, QuantizationError, UsageError
from trtdeploy.files import sha256_file
from trtdeploy.onnxgraph.graph import Graph


@pytest.fixture(scope="module")
def exported(digits, ptq_file, tmp_path_factory):
    return export_checkpoint(load_checkpoint(ptq_file), tmp_path_factory.mktemp("onnx") / "ptq.onnx", digits)


def count(model, kind):
    return sum(node.op_type == kind for node in model.graph.node)


def test_every_quantizer_is_one_pair_with_its_scale_and_an_int8_zero_point(exported, ptq_file):
    model = onnx.load(exported.path)
    assert exported.quantize_nodes == exported.dequantize_nodes == 7
    assert count(model, "QuantizeLinear") == count(model, "DequantizeLinear") == 7
    assert exported.sha256 == sha256_file(exported.path)
    ranges = {key: value.flatten() / 127 for key, value in load_file(ptq_file).items() if key.endswith("_amax")}
    graph = Graph(model.graph)
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        nodes = [node for node in model.graph.node if node.op_type == kind]
        found = sorted(tuple(graph.constant(node.input[1]).ravel()) for node in nodes)
        for scale, known in zip(found, sorted(tuple(scale.tolist()) for scale in ranges.values()), strict=True):
            assert scale == pytest.approx(known, rel=1e-6)
        for node in nodes:
            zero_point = graph.constant(node.input[2])
            assert zero_point.dtype == np.int8
            assert not zero_point.any()


def test_names_types_and_the_dynamic_batch_axis(exported):
    model = onnx.load(exported.path)
    [given], [answered] = model.graph.input, model.graph.output
    assert (given.name, answered.name) == ("input", "logits")
    shape = given.type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch"
    assert [size.dim_value for size in shape[1:]] == [3, 16, 16]
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert model.opset_import[0].version == 17
    predict = onnx_predictor(exported.path.read_bytes())
    for batch in (1, 5):
        assert predict(np.zeros((batch, 3, 16, 16), np.float32)).shape == (batch, 10)


def test_metadata_carries_what_serving_needs(exported, digits, ptq_file):
    properties = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    checkpoint = load_checkpoint(ptq_file)
    assert Preprocessing.from_json(properties["trtdeploy.preprocessing"]) == checkpoint.facts.preprocessing
    assert json.loads(properties["trtdeploy.labels"]) == list(digits.classes)
    assert json.loads(properties["trtdeploy.calibration"]) == checkpoint.facts.calibration.model_dump(mode="json")
    assert json.loads(properties["trtdeploy.checkpoint"]) == {
        "kind": "ptq",
        "sha256": sha256_file(ptq_file),
        "model": "tiny_model:tiny",
    }


def test_it_answers_as_torch_does(exported, digits, ptq_file):
    checkpoint = load_checkpoint(ptq_file)
    split = digits.split("test")
    inputs = checkpoint.facts.preprocessing.normalise(split.pixels(checkpoint.facts.preprocessing, range(200)))
    expected = predictor(checkpoint.model)(inputs)
    answered = onnx_predictor(exported.path.read_bytes())(inputs)
    assert (answered.argmax(1) == expected.argmax(1)).mean() > 0.99
    assert np.abs(answered - expected).mean() < 0.02 * expected.std()
    assert exported.parity.images == 64
    assert exported.parity.relative_error < 0.02
    assert exported.float_parity.relative_error < 1e-5


@pytest.mark.parametrize("opset", [17, 20])
def test_a_float_checkpoint_has_no_pairs(digits, float_file, tmp_path, opset):
    result = export_checkpoint(load_checkpoint(float_file), tmp_path / "f.onnx", digits, opset=opset)
    assert result.quantize_nodes == result.dequantize_nodes == 0
    assert result.parity.relative_error < 1e-5
    assert onnx.load(result.path).opset_import[0].version == opset
    properties = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
    assert json.loads(properties["trtdeploy.calibration"]) is None


def test_a_closed_quantizer_is_not_counted(digits, ptq_file, tmp_path):
    checkpoint = load_checkpoint(ptq_file)
    checkpoint.model.head._input_quantizer.disable()
    assert export_checkpoint(checkpoint, tmp_path / "x.onnx", digits).quantize_nodes == 6


@pytest.mark.parametrize("opset", [12, 16, 21])
def test_other_opsets_are_refused(digits, ptq_file, tmp_path, opset):
    with pytest.raises(UsageError, match="17 to 20"):
        export_checkpoint(load_checkpoint(ptq_file), tmp_path / "x.onnx", digits, opset=opset)


def tamper(monkeypatch, change):
    """Let something change the traced graph before it is checked."""
    trace = export_module.trace_to_onnx

    def traced(*arguments, **options):
        model = onnx.load_from_string(trace(*arguments, **options))
        change(model)
        return model.SerializeToString()

    monkeypatch.setattr(export_module, "trace_to_onnx", traced)


def replace_initializer(model, name, change):
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))


def set_constant(model, name, value):
    for node in model.graph.node:
        if name in node.output:
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(value(numpy_helper.to_array(node.attribute[0].t))))
            return
    replace_initializer(model, name, value)


def quantize_nodes(model):
    return [node for node in model.graph.node if node.op_type == "QuantizeLinear"]


def reverse_weights(model):
    replace_initializer(model, "head.weight", lambda weight: weight[:, ::-1].copy())


def widen_a_scale(model):
    set_constant(model, quantize_nodes(model)[0].input[1], lambda scale: np.asarray(scale * 4, np.float32))


@pytest.mark.parametrize("fixture", ["float_file", "ptq_file"])
def test_a_graph_that_computes_something_else_is_refused(digits, request, tmp_path, monkeypatch, fixture):
    tamper(monkeypatch, reverse_weights)
    checkpoint = load_checkpoint(request.getfixturevalue(fixture))
    with pytest.raises(QuantizationError, match="does not compute what the network does"):
        export_checkpoint(checkpoint, tmp_path / "x.onnx", digits)
    assert list(tmp_path.iterdir()) == []


def swap_two_scales(model):
    inputs = [node.input[1] for node in quantize_nodes(model) if "_input_quantizer" in node.name]
    stem, head = inputs[0], inputs[-1]  # in the order of the graph
    graph = Graph(model.graph)
    scales = {name: graph.constant(name) for name in (stem, head)}
    set_constant(model, stem, lambda _: scales[head])
    set_constant(model, head, lambda _: scales[stem])


def test_scales_at_the_wrong_tensors_are_refused(digits, ptq_file, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(ptq_file)
    with torch.no_grad():  # ranges far apart, as in larger networks
        checkpoint.model.head._input_quantizer._amax *= 100
    tamper(monkeypatch, swap_two_scales)
    with pytest.raises(QuantizationError, match="exported graph does not compute"):
        export_checkpoint(checkpoint, tmp_path / "x.onnx", digits)
    assert list(tmp_path.iterdir()) == []


def drop_a_pair(model):
    node = quantize_nodes(model)[0]
    [dequantize] = [other for other in model.graph.node if node.output[0] in other.input]
    for other in model.graph.node:
        for position, name in enumerate(other.input):
            if name == dequantize.output[0]:
                other.input[position] = node.input[0]
    model.graph.node.remove(node)
    model.graph.node.remove(dequantize)


def zero_a_scale(model):
    set_constant(model, quantize_nodes(model)[1].input[1], np.zeros_like)


def unsigned_zero_point(model):
    set_constant(model, quantize_nodes(model)[0].input[2], lambda value: value.astype(np.uint8))


def shifted_zero_point(model):
    set_constant(model, quantize_nodes(model)[0].input[2], lambda value: value + np.int8(3))


def computed_scale(model):
    node = quantize_nodes(model)[0]
    model.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop_a_pair, "quantizes 7 tensors, but the exported graph has 6"),
        (zero_a_scale, "not finite, positive"),
        (unsigned_zero_point, "not INT8 and 0"),
        (shifted_zero_point, "not INT8 and 0"),
        (widen_a_scale, "no quantizer has its scale"),
        (computed_scale, "not a constant"),
    ],
)
def test_pairs_that_tensorrt_would_not_take_are_refused(digits, ptq_file, tmp_path, monkeypatch, change, expected):
    tamper(monkeypatch, change)
    with pytest.raises(QuantizationError, match=expected):
        export_checkpoint(load_checkpoint(ptq_file), tmp_path / "x.onnx", digits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parity", "quantized"),
    [
        (Parity(images=64, relative_error=float("nan"), disagreements=0), True),
        (Parity(images=64, relative_error=0.6, disagreements=0), True),
        (Parity(images=64, relative_error=0.01, disagreements=4), True),
        (Parity(images=64, relative_error=0.01, disagreements=0), False),
        (Parity(images=64, relative_error=1e-6, disagreements=1), False),
    ],
)
def test_parity_beyond_the_bounds_is_refused(parity, quantized):
    with pytest.raises(QuantizationError):
        require_parity(parity, quantized=quantized)


def test_a_few_flipped_answers_of_a_quantized_graph_is_let_through():
    require_parity(Parity(images=64, relative_error=0.3, disagreements=3), quantized=True)
    require_parity(Parity(images=64, relative_error=1e-6, disagreements=0), quantized=False)


def test_what_onnxruntime_does_not_read_is_a_model_error():
    with pytest.raises(ModelError, match="does not accept"):
        onnx_predictor(b"not onnx")


def test_a_dead_channel_survives_export(digits, ptq_file, tmp_path):
    checkpoint = load_checkpoint(ptq_file)
    depthwise: Any = checkpoint.model.depthwise
    with torch.no_grad():
        depthwise._weight_quantizer._amax[3] = 1e-8  # a dead channel
        depthwise.weight[3] = 0
    model = onnx.load(export_checkpoint(checkpoint, tmp_path / "x.onnx", digits).path)
    scales = [Graph(model.graph).constant(node.input[1]) for node in quantize_nodes(model)]
    smallest = min(scale.min() for scale in scales)
    bias = abs(depthwise.bias[3].item())
    # the weights are all 0, so the scale is free: it leaves the bias room in INT32
    assert bias / (smallest * depthwise.input_quantizer.scale_array[0]) == pytest.approx(2**29)
