"""The linter and its repairs on graphs of shapes that exporters really write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.cli.main import app
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.lint.fix import fix
from trtdeploy.runtimes.onnxruntime.witness import Witness

RNG = np.random.default_rng(0)
Shape = list[int | str]


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def shared_scale(g: GraphMaker) -> tuple[Shape, Shape]:
    """Two convolutions share a weight, its scale and its zero-point; one Q feeds three DQ, one DQ two readers."""
    codes, parameters, _ = g.quantize("x", 0.03, zero=120, dtype="uint8")
    reads = [g.node("DequantizeLinear", codes, *parameters) for _ in range(3)]
    kernel = g.constant(values(4, 4, 1, 1))
    scale, zero = g.constant(np.full(4, 0.04, np.float32)), g.constant(np.zeros(4, np.int8))
    weights = [
        g.node("DequantizeLinear", g.node("QuantizeLinear", kernel, scale, zero, axis=0), scale, zero, axis=0)
        for _ in range(2)
    ]
    first, second = (g.node("Relu", g.node("Conv", reads[i], weights[i])) for i in range(2))
    third = g.node("Relu", g.node("Conv", reads[2], weights[0]))
    fourth = g.node("Relu", g.node("Conv", reads[2], weights[1]))
    g.node("Concat", first, second, third, fourth, axis=1, output="y")
    return [1, 4, 6, 6], [1, 16, 6, 6]


def gemm(transposed: int) -> Callable[[GraphMaker], tuple[Shape, Shape]]:
    def build(g: GraphMaker) -> tuple[Shape, Shape]:
        weight = g.qdq(g.constant(values(*((5, 8) if transposed else (8, 5)))), 0.02, zero=3)
        g.node("Gemm", g.qdq("x", zero=5), weight, transB=transposed, output="y")
        return ["n", 8], ["n", 5]

    return build


def behind_transpose(g: GraphMaker) -> tuple[Shape, Shape]:
    weight = g.node("Transpose", g.qdq(g.constant(values(5, 8)), 0.02, zero=3), perm=[1, 0])
    g.node("MatMul", g.qdq("x", zero=5), weight, output="y")
    return ["n", 3, 8], ["n", 3, 5]


def bare_behind_transpose(g: GraphMaker) -> tuple[Shape, Shape]:
    weight = g.node("Transpose", g.constant(values(5, 8)), perm=[1, 0])
    g.node("MatMul", g.qdq("x", zero=5), weight, output="y")
    return ["n", 3, 8], ["n", 3, 5]


def conv1d(g: GraphMaker) -> tuple[Shape, Shape]:
    weight = g.qdq(g.constant(values(6, 4, 3)), np.full(4, 0.04), axis=1)
    g.node("Conv", g.qdq("x", zero=5), weight, output="y")
    return ["n", 4, 9], ["n", 6, 7]


def grouped_transpose(g: GraphMaker) -> tuple[Shape, Shape]:
    weight = g.qdq(g.constant(values(4, 3, 2, 2)), np.full(4, 0.04), axis=0)
    g.node("ConvTranspose", g.qdq("x", zero=5), weight, group=2, strides=[2, 2], output="y")
    return ["n", 4, 5, 5], ["n", 6, 10, 10]


def stored_codes(g: GraphMaker) -> tuple[Shape, Shape]:
    """UINT8 codes of a weight per tensor, and a bias of INT32 codes, as older quantizers store them."""
    codes = g.constant(RNG.integers(0, 256, (6, 4, 3, 3)).astype(np.uint8))
    weight = g.node("DequantizeLinear", codes, g.constant(np.float32(0.01)), g.constant(np.uint8(120)))
    bias = g.node(
        "DequantizeLinear", g.constant(RNG.integers(-999, 999, 6).astype(np.int32)), g.constant(np.float32(1e-3))
    )
    g.node("Conv", g.qdq("x", zero=100, dtype="uint8"), weight, bias, output="y")
    return ["n", 4, 8, 8], ["n", 6, 6, 6]


def no_zero_points(g: GraphMaker) -> tuple[Shape, Shape]:
    scale = g.constant(np.float32(0.03))
    positive = g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale), scale)
    g.node("Conv", positive, g.constant(values(4, 4, 1, 1)), output="y")
    return ["n", 4, 5, 5], ["n", 4, 5, 5]


BUILDS = {
    "shared scale": shared_scale,
    "gemm": gemm(0),
    "gemm transB": gemm(1),
    "matmul behind transpose": behind_transpose,
    "bare matmul behind transpose": bare_behind_transpose,
    "conv1d": conv1d,
    "grouped transposed convolution": grouped_transpose,
    "stored codes": stored_codes,
    "no zero-points": no_zero_points,
}


def model_of(name: str) -> onnx.ModelProto:
    g = GraphMaker()
    given, made = BUILDS[name](g)
    model = g.model({"x": given}, {"y": made})
    onnx.checker.check_model(model, full_check=True)
    return model


def noise(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return {"x": np.random.default_rng(1).standard_normal([dim.dim_value or 3 for dim in dims]).astype(np.float32)}


LEFT = ["transposed-axis"]
"""A repair has to keep the axis of a transposed convolution: which one is right is not known."""


@pytest.mark.parametrize("name", BUILDS)
def test_what_exporters_write_is_repaired_and_answers_the_same(name: str) -> None:
    model = model_of(name)
    assert lint(model)
    fixed = fix(model)
    assert lint(fixed.model, ignore=LEFT) == []
    assert fixed.repairs
    onnx.checker.check_model(fixed.model, full_check=True)
    [old], [new] = as_exported(model, noise(model)), as_exported(fixed.model, noise(model))
    assert np.abs(new - old).max() < 0.1 * np.abs(old).max()


@pytest.mark.parametrize("name", BUILDS)
def test_a_repaired_model_is_left_alone(name: str) -> None:
    fixed = fix(model_of(name)).model
    again = fix(fixed)
    assert again.repairs == ()
    assert again.model == fixed


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("ir_version", [3, 9])
def test_initializers_that_are_inputs_too_change_nothing(name: str, ir_version: int) -> None:
    plain = model_of(name)
    older = onnx.ModelProto()
    older.CopyFrom(plain)
    older.ir_version = ir_version
    for tensor in plain.graph.initializer:
        older.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    assert lint(older) == lint(plain)
    fixed = fix(older).model
    assert lint(fixed, ignore=LEFT) == []
    onnx.checker.check_model(fixed)
    [expected], [answer] = as_exported(fix(plain).model, noise(plain)), as_exported(fixed, noise(plain))
    np.testing.assert_array_equal(answer, expected)


def test_weights_in_another_file_are_repaired_into_one(tmp_path: Path) -> None:
    model = model_of("stored codes")
    apart, repaired = tmp_path / "apart.onnx", tmp_path / "repaired.onnx"
    onnx.save(model, apart, save_as_external_data=True, location="weights", size_threshold=0, convert_attribute=False)
    done = CliRunner().invoke(app, ["lint", str(apart), "--fix", str(repaired)])
    assert done.exit_code == 0, done.output
    onnx.load(repaired)
    assert not any(tensor.external_data for tensor in onnx.load(repaired, load_external_data=False).graph.initializer)


def test_more_weights_than_a_file_holds_are_refused_before_they_are_read(tmp_path: Path) -> None:
    model = model_of("gemm")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**31)
    tensor = onnx.TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[2**29])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "huge"), ("offset", "0"), ("length", str(2**31))):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    arguments = ["lint", str(tmp_path / "model.onnx")]
    with patch("trtdeploy.quantizing.lint_file.load_source", side_effect=AssertionError("was read")):
        for more in ([], ["--fix", str(tmp_path / "out.onnx")]):
            done = CliRunner().invoke(app, [*arguments, *more])
            assert done.exit_code == 2
            assert "2 GB" in done.output
    assert not (tmp_path / "out.onnx").exists()


def test_many_pairs_take_linear_work() -> None:
    """Ten times the layers do not make a hundred times the look-ups."""
    reads = []
    for layers in (20, 200):
        g = GraphMaker()
        tensor = "x"
        for _ in range(layers):
            tensor = g.node(
                "Relu", g.node("Conv", g.qdq(tensor, zero=3), g.qdq(g.constant(values(2, 2, 1, 1)), zero=2))
            )
        g.nodes[-1].output[0] = "y"
        model = g.model({"x": [1, 2, 4, 4]}, {"y": [1, 2, 4, 4]})
        with patch.object(numpy_helper, "to_array", wraps=numpy_helper.to_array) as decoded:
            assert lint(fix(model).model) == []
        reads.append(decoded.call_count)
    assert reads[1] < 15 * reads[0]


def test_the_command_tells_each_repair_and_the_difference(tmp_path: Path) -> None:
    source, repaired = save(model_of("stored codes"), tmp_path / "m.onnx"), tmp_path / "fixed.onnx"
    done = CliRunner().invoke(app, ["lint", str(source), "--fix", str(repaired)])
    assert done.exit_code == 0, done.output
    assert "Q004 repaired" in done.stdout
    assert "answers on random inputs (seed 0): 'y' differs by at most" in done.stdout
    assert "no findings" in done.stdout
    told = CliRunner().invoke(app, ["lint", str(source), "--fix", str(repaired), "--json"]).stdout
    assert '"sqnr_db"' in told


def test_what_onnx_refuses_for_its_quantization_is_named_and_repaired(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Conv", g.qdq("x"), g.qdq(g.constant(values(4, 4, 1, 1)), np.full(4, 0.04), axis=0), output="y")
    old = save(g.model({"x": [1, 4, 4, 4]}, {"y": [1, 4, 4, 4]}, opset=12), tmp_path / "old.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(str(old))
    done = CliRunner().invoke(app, ["lint", str(old)])
    assert done.exit_code == 1
    assert "Q002" in done.stdout
    done = CliRunner().invoke(app, ["lint", str(old), "--fix", str(tmp_path / "new.onnx")])
    assert done.exit_code == 0, done.output
    assert "answers not compared: ONNX Runtime does not accept the original model" in done.stdout
    onnx.checker.check_model(str(tmp_path / "new.onnx"))


def codes_all_the_way(g: GraphMaker) -> onnx.ModelProto:
    """Every op on codes that ONNX Runtime's quantizer writes, one behind the other; weights per channel."""

    def parameters(scale: float, zero: int) -> list[str]:
        return [g.constant(np.float32(scale)), g.constant(np.uint8(zero))]

    def weight(shape: tuple[int, ...], channels: int) -> list[str]:
        codes = g.constant(RNG.integers(-127, 128, shape).astype(np.int8))
        scales = g.constant((0.002 + 0.001 * np.arange(channels)).astype(np.float32))
        return [codes, scales, g.constant(np.zeros(channels, np.int8))]

    def contrib(op: str, *inputs: str, **attributes: object) -> str:
        return g.node(op, *inputs, domain="com.microsoft", **attributes)

    given, middle, gate = parameters(0.03, 120), parameters(0.02, 128), parameters(1 / 256, 0)
    codes = g.node("QuantizeLinear", "x", *given)
    bias = g.constant(RNG.integers(-500, 500, 6).astype(np.int32))
    codes = g.node("QLinearConv", codes, *given, *weight((6, 4, 3, 3), 6), *middle, bias)
    codes = contrib("QLinearLeakyRelu", codes, *middle, *middle, alpha=0.1)
    gates = contrib("QLinearSigmoid", contrib("QLinearGlobalAveragePool", codes, *middle, *middle), *middle, *gate)
    codes = contrib("QLinearMul", codes, *middle, gates, *gate, *middle)
    codes = contrib("QLinearAdd", codes, *middle, codes, *middle, *middle)
    codes = contrib("QLinearConcat", *middle, codes, *middle, codes, *middle, axis=1)
    codes = contrib("QLinearAveragePool", codes, *middle, *middle, kernel_shape=[2, 2], strides=[2, 2])
    codes = g.node("Flatten", g.node("MaxPool", codes, kernel_shape=[3, 3]))
    codes = g.node("QLinearMatMul", codes, *middle, *weight((12, 8), 8), *middle)
    bias = g.constant(RNG.integers(-500, 500, 5).astype(np.int32))
    g.node(
        *("QGemm", codes, *middle, *weight((5, 8), 5), bias, *middle), domain="com.microsoft", output="codes", transB=1
    )
    g.node("DequantizeLinear", "codes", *middle, output="y")
    model = g.model({"x": ["n", 4, 8, 8]}, {"y": ["n", 5]})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def test_ops_on_codes_become_float_ops_with_qdq() -> None:
    model = codes_all_the_way(GraphMaker())
    fixed = fix(model)
    assert {finding.rule for finding in lint(fixed.model)} <= {"pooling-in-float", "gate-in-float"}
    assert {node.domain for node in fixed.model.graph.node} == {""}
    onnx.checker.check_model(fixed.model, full_check=True)
    [old], [new] = Witness(model)(noise(model)), Witness(fixed.model)(noise(model))
    assert np.abs(old).max() > 0.3
    assert np.abs(new - old).max() < 0.1 * np.abs(old).max()


def two_readers(scale: float) -> onnx.ModelProto:
    g = GraphMaker()
    kernel = [g.qdq(g.constant(values(4, 4, 1, 1)), 0.03) for _ in range(2)]
    first = g.node("Relu", g.node("Conv", g.qdq("x", 0.03), kernel[0]))
    second = g.node("Relu", g.node("Conv", g.qdq("x", scale), kernel[1]))
    g.node("Concat", first, second, axis=1, output="y")
    return g.model({"x": [1, 4, 5, 5]}, {"y": [1, 8, 5, 5]})


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_range_that_is_known_elsewhere_replaces_one_that_is_not(scale: float) -> None:
    assert {finding.rule for finding in lint(two_readers(scale))} == {"scale-value"}
    fixed = fix(two_readers(scale)).model
    assert lint(fixed) == []
    assert sum(node.op_type == "QuantizeLinear" for node in fixed.graph.node) <= 4


def test_the_sign_of_a_scale_does_not_matter() -> None:
    model, good = two_readers(-0.03), two_readers(0.03)
    [old], [new] = as_exported(model, noise(good)), as_exported(fix(model).model, noise(good))
    assert np.abs(old - new).max() < 0.1 * np.abs(old).max()


def test_a_range_that_nobody_knows_stays_a_finding() -> None:
    g = GraphMaker()
    g.node("Conv", g.qdq("x", np.nan), g.qdq(g.constant(values(4, 4, 1, 1)), 0.03), output="y")
    fixed = fix(g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]}))
    assert {finding.rule for finding in lint(fixed.model)} == {"scale-value"}


def test_the_largest_scale_is_the_shared_one() -> None:
    """A smaller one would cut the larger branch off."""
    g = GraphMaker()
    small = g.qdq(g.node("Sigmoid", "x"), 0.01)
    result = g.node("Concat", g.qdq("x", 0.04), small, axis=1)
    g.node("Conv", g.qdq(result, 0.03), g.qdq(g.constant(values(4, 8, 1, 1)), 0.03), output="y")
    model = g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]})
    assert {finding.rule for finding in lint(model)} == {"concat-scales"}
    fixed = fix(model).model
    assert lint(fixed) == []
    scales = {
        float(numpy_helper.to_array(tensor))
        for tensor in fixed.graph.initializer
        for node in fixed.graph.node
        if node.op_type == "QuantizeLinear"
        and tensor.name == node.input[1]
        and node.input[0] in (result, "x", "sigmoid1")
    }
    assert scales == {float(np.float32(0.04))}


def test_a_head_in_float_by_choice_is_no_finding() -> None:
    """Pooling, a gate and a layer behind the last quantized one."""
    g = GraphMaker()
    body = g.node("Relu", g.node("Conv", g.qdq("x"), g.qdq(g.constant(values(4, 4, 1, 1)), 0.03)))
    gates = g.node("Sigmoid", g.node("Conv", g.node("GlobalAveragePool", body), g.constant(values(4, 4, 1, 1))))
    pooled = g.node("GlobalAveragePool", g.node("Mul", body, gates))
    g.node("Gemm", g.node("Flatten", pooled), g.constant(values(5, 4)), transB=1, output="y")
    assert lint(g.model({"x": [1, 4, 5, 5]}, {"y": [1, 5]})) == []


def test_a_body_that_reads_dequantized_values_still_can() -> None:
    g = GraphMaker()
    read = g.qdq("x", zero=5)
    bodies = [
        onnx.parser.parse_graph(f"b () => (float[1,4,5,5] {made}) {{ {made} = {op}({read}) }}")
        for made, op in (("o", "Identity"), ("p", "Relu"))
    ]
    chosen = g.node("If", g.constant(np.array(True)), then_branch=bodies[0], else_branch=bodies[1])
    layer = g.node("Conv", read, g.qdq(g.constant(values(4, 4, 1, 1)), 0.03))
    g.node("Add", g.node("Relu", layer), chosen, output="y")
    model = g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]})
    fixed = fix(model)
    assert {finding.rule for finding in lint(fixed.model)} == {"subgraph"}
    [old], [new] = as_exported(model, noise(model)), as_exported(fixed.model, noise(model))
    assert np.abs(old - new).max() < 0.1 * np.abs(old).max()


def test_a_node_without_its_first_output_is_no_obstacle() -> None:
    g = GraphMaker()
    weight, recurrent = g.constant(values(1, 12, 4)), g.constant(values(1, 12, 3))
    reads = [g.qdq("x", zero=5), weight, recurrent]
    g.nodes.append(helper.make_node("LSTM", reads, ["", "y"], hidden_size=3))
    model = g.model({"x": [2, 1, 4]}, {"y": [1, 1, 3]})
    onnx.checker.check_model(model)
    fixed = fix(model)
    assert lint(fixed.model) == []
    [old], [new] = as_exported(model, noise(model)), as_exported(fixed.model, noise(model))
    assert np.abs(old - new).max() < 0.1 * np.abs(old).max()
