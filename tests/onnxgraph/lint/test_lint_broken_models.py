"""The linter and its repairs on models that are broken beyond their quantization, and repairs that would break one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, save
from trtdeploy.cli.main import app
from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.lint.fix import Fixed, fix
from trtdeploy.quantizing.lint_file import lint_file, repair_file


def faulty() -> onnx.ModelProto:
    """A negative scale, which the linter explains; the weight goes through a Transpose."""
    g = GraphMaker()
    kernel = g.constant(np.ones((4, 4, 1, 1), np.float32), "kernel")
    weight = g.node("Transpose", g.qdq(kernel, np.full(4, 0.03), axis=0), perm=[0, 1, 2, 3])
    g.node("Clip", g.node("Conv", g.qdq("x", -0.03), weight), output="y")
    return g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]})


def node_of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def inputs_cut(op: str, kept: int) -> Callable[[onnx.ModelProto], None]:
    def cut(model: onnx.ModelProto) -> None:
        del node_of(model, op).input[kept:]

    return cut


def no_output(op: str) -> Callable[[onnx.ModelProto], None]:
    def cut(model: onnx.ModelProto) -> None:
        del node_of(model, op).output[:]

    return cut


def strings(position: int) -> Callable[[onnx.ModelProto], None]:
    def put(model: onnx.ModelProto) -> None:
        name = node_of(model, "QuantizeLinear").input[position]
        tensor = next(each for each in model.graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.array(["a"] * max(1, *tensor.dims), dtype=object), name))

    return put


BREAKS = {
    "quantize without inputs": inputs_cut("QuantizeLinear", 0),
    "quantize without scale": inputs_cut("QuantizeLinear", 1),
    "dequantize without inputs": inputs_cut("DequantizeLinear", 0),
    "dequantize without scale": inputs_cut("DequantizeLinear", 1),
    "transpose without inputs": inputs_cut("Transpose", 0),
    "convolution without weight": inputs_cut("Conv", 1),
    "clip without inputs": inputs_cut("Clip", 0),
    "quantize without output": no_output("QuantizeLinear"),
    "dequantize without output": no_output("DequantizeLinear"),
    "scale of strings": strings(1),
    "zero-point of strings": strings(2),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_otherwise_too_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    model = faulty()
    assert {finding.rule for finding in lint(model)} == {"scale-value"}
    BREAKS[name](model)
    path, repaired = save(model, tmp_path / "broken.onnx"), tmp_path / "repaired.onnx"
    with pytest.raises(ModelError):
        lint_file(path)
    with pytest.raises(ModelError):
        repair_file(path, repaired)
    assert not repaired.exists()


def test_an_order_that_is_no_permutation_is_looked_over() -> None:
    model = faulty()
    transpose = node_of(model, "Transpose")
    transpose.attribute[0].CopyFrom(helper.make_attribute("perm", [1, 1, 2, 3]))
    assert {finding.rule for finding in lint(model)} == {"scale-value"}
    transpose.input[0] = "kernel"
    fix(model)


@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearSigmoid", "QGemm"])
def test_an_op_on_codes_without_all_its_inputs_stays(op: str, tmp_path: Path) -> None:
    g = GraphMaker()
    codes, parameters, _ = g.quantize("x", 0.03)
    result = g.node(op, codes, *parameters[:1], *parameters[:1], codes, domain="com.microsoft")
    g.node("DequantizeLinear", result, *parameters, output="y")
    model = g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    done = repair_file(save(model, tmp_path / "m.onnx"), tmp_path / "out.onnx")
    assert isinstance(done.difference, str)


def test_a_repair_that_onnx_runtime_does_not_take_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX's checker does not look at types."""
    g = GraphMaker()
    g.node("Conv", g.qdq("x", zero=5), g.qdq(g.constant(np.ones((4, 4, 1, 1), np.float32))), output="y")
    path = save(g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]}), tmp_path / "m.onnx")

    def of_another_type(model: onnx.ModelProto) -> Fixed:
        fixed = fix(model)
        scale = node_of(fixed.model, "QuantizeLinear").input[1]
        tensor = next(each for each in fixed.model.graph.initializer if each.name == scale)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), scale))
        return fixed

    monkeypatch.setattr("trtdeploy.quantizing.lint_file.fix", of_another_type)
    done = CliRunner().invoke(app, ["lint", str(path), "--fix", str(tmp_path / "out.onnx")])
    assert done.exit_code == 2
    assert "not the result" in done.output
    assert not (tmp_path / "out.onnx").exists()
