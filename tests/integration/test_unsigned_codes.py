from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx_graphs import block_network, save

from trtdeploy.onnxgraph.unsigned_codes import with_unsigned_activations
from trtdeploy.ptq import PtqOptions, quantize
from trtdeploy.ptq.observe import runner


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
    for before, after in zip(runner(signed, outputs)(batch), runner(unsigned, outputs)(batch), strict=True):
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
