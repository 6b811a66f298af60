from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network, save
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for
from trtdeploy.runtimes.onnxruntime.witness import Witness


def optimized(path: Path) -> list[str]:
    """The ops that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimized")), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_codes_shifted_by_128_are_the_same_values() -> None:
    signed = block_network()
    unsigned = with_unsigned_activations(signed)
    samples = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)
    batch = {signed.graph.input[0].name: samples}
    outputs = [value.name for value in signed.graph.output]
    for before, after in zip(Witness(signed, outputs)(batch), Witness(unsigned, outputs)(batch), strict=True):
        assert np.array_equal(before, after)
    assert "activation_zero_point" not in {tensor.name for tensor in signed.graph.initializer}
    changed = {
        node.input[2] == "activation_zero_point" for node in unsigned.graph.node if node.op_type == "QuantizeLinear"
    }
    assert True in changed


def test_quantize_for_onnxruntime_runs_its_convolutions_in_integers(tmp_path: Path) -> None:
    source = save(block_network(quantized=False), tmp_path / "blocks.onnx")
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).standard_normal((16, 3, 12, 12)).astype(np.float32))
    written = tmp_path / "int8.onnx"
    quantize(source, written, str(tmp_path / "samples.npy"), PtqOptions(method="max", target="onnxruntime"))
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(source).graph.node)
    assert optimized(written).count("QLinearConv") == convolutions > 0


def two_readers_of_codes() -> onnx.ModelProto:
    g = GraphMaker()
    codes, parameters, _ = g.quantize("x", 0.03)
    reads = [g.node("DequantizeLinear", codes, *parameters) for _ in range(2)]
    g.node("Mul", *(g.node("Conv", read, g.weight(4, 3, 1, 1)) for read in reads), output="y")
    return g.model({"x": ["n", 3, 6, 6]}, {"y": ["n", 4, 6, 6]})


def test_all_that_read_the_same_codes_are_changed_together() -> None:
    model = two_readers_of_codes()
    unsigned = with_unsigned_activations(model)
    changed = [node.op_type for node in unsigned.graph.node if list(node.input[2:]) == ["activation_zero_point"]]
    assert changed == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]
    given = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    assert np.array_equal(as_exported(model, given)[0], as_exported(unsigned, given)[0])
    for tactic in tactics_for(True):
        tactic.compile(model)


def test_codes_that_something_else_reads_too_stay_as_they_are() -> None:
    model = two_readers_of_codes()
    codes = model.graph.node[0].output[0]
    model.graph.output.append(helper.make_tensor_value_info(codes, TensorProto.INT8, ["n", 3, 6, 6]))
    assert with_unsigned_activations(model) == model
    del model.graph.output[1]
    model.graph.node.append(helper.make_node("Cast", [codes], ["z"], to=TensorProto.FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 3, 6, 6]))
    assert with_unsigned_activations(model) == model
