from __future__ import annotations

import builtins

import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

from tests.training.placed_networks import mobile_net
from training.checkpoints.checkpoint import load_checkpoint
from training.onnx_export import export_checkpoint
from training.ptq.calibrate import calibrate
from training.ptq.ranges import fix_ranges, observing_inputs
from training.quantization import QuantizationSpec, make_quantizer, quantize, quantizers
from trtdeploy.errors import RuntimeUnavailableError


@pytest.fixture(scope="module")
def modelopt():
    return pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is not installed")


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_the_same_ranges_both_compute_the_same_bits_and_gradients(modelopt, axis, layout):
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(7, 5, 9, 11, generator=generator).to(memory_format=layout)
    shape = [size if index == axis else 1 for index, size in enumerate(values.shape)]
    amax = torch.tensor(2.7) if axis is None else 0.1 + 4 * torch.rand(shape, generator=generator)
    upstream = torch.randn(values.shape, generator=generator)
    results = []
    for toolkit in ("pytorch-quantization", "modelopt"):
        quantizer = make_quantizer("x", axis=axis, toolkit=toolkit)
        quantizer.set_amax(amax)
        given = values.clone().requires_grad_()
        outputs = quantizer(given)
        outputs.backward(upstream)
        results.append((outputs.detach(), given.grad, quantizer.scale_array))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][2] == results[1][2]).all()
    assert not torch.equal(results[0][0], values)


def test_a_network_has_the_quantizers_of_its_toolkit(modelopt):
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    state = mobile_net(10).eval().state_dict()
    answers, states = [], []
    for toolkit in ("pytorch-quantization", "modelopt"):
        network = mobile_net(10).eval()
        network.load_state_dict(state)
        quantized = quantize(network, QuantizationSpec(toolkit=toolkit), example=noise[:1])
        with observing_inputs(quantized) as histograms:
            quantized(noise)
        fix_ranges(quantized, histograms)
        of_modelopt = [isinstance(each, modelopt.nn.TensorQuantizer) for _, each in quantizers(quantized)]
        assert set(of_modelopt) == {toolkit == "modelopt"}
        answers.append(quantized(noise))
        states.append(quantized.state_dict())
    assert torch.equal(*answers)
    assert states[0].keys() == states[1].keys()


def test_the_checkpoint_says_whose_and_the_exported_graph_is_the_same(modelopt, digits, float_file, ptq_file, tmp_path):
    spec = QuantizationSpec(toolkit="modelopt")
    output = tmp_path / "ptq.safetensors"
    calibrate(digits, load_checkpoint(float_file), output, spec=spec, method="max")
    theirs, ours = load_file(output), load_file(ptq_file)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    checkpoint = load_checkpoint(output)
    assert checkpoint.facts.quantization == spec
    graphs = []
    for number, source in enumerate((checkpoint, load_checkpoint(ptq_file))):
        written = onnx.load(export_checkpoint(source, tmp_path / f"{number}.onnx", digits).path)
        graphs.append((pairs_of(written), [node.op_type for node in written.graph.node if node.op_type != "Constant"]))
    assert graphs[0] == graphs[1]


def pairs_of(model):
    """The scale, exactly, and the axis of every Q and DQ, in order."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return [
        (node.op_type, constants[node.input[1]].tobytes(), [entry.i for entry in node.attribute])
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]


def test_a_toolkit_that_is_not_installed_is_named(monkeypatch):
    real = builtins.__import__

    def without_modelopt(name, *arguments, **options):
        if name.startswith(("modelopt", "training.quantization.toolkits.modelopt")):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_modelopt)
    with pytest.raises(RuntimeUnavailableError, match="modelopt cannot be imported"):
        make_quantizer("x", axis=None, toolkit="modelopt")
