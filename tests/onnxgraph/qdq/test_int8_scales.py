"""Scales of weights beside a bias, and of a ConvTranspose: what is written is what a plain ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.cli.main import app
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.lint.fix import fix
from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges
from trtdeploy.onnxgraph.qdq.int8_scales import FEWEST_CODES
from trtdeploy.onnxgraph.qdq.layers import quantized_nodes
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import (
    apply_ranges,
    canonical_qdq,
    quantize_with_ranges,
    ranges_of,
    without_qdq,
)
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.statistics import sqnr_db
from trtdeploy.tensors import Array

Build = Callable[[GraphMaker, Array, Array], None]
"""Makes a network from "x" to "y" out of the weight (out, in) and the bias of its first layer."""
OUT, IN, SAMPLES = 8, 16, 64


def last(g: GraphMaker, tensor: str) -> None:
    """Read a layer's result as a quantized layer does: only there ONNX Runtime computes the first one in integers."""
    rng = np.random.default_rng(3)
    g.node("Gemm", g.node("Relu", tensor), g.constant(rng.standard_normal((OUT, 4)).astype(np.float32)), output="y")


def conv(g: GraphMaker, weight: Array, bias: Array) -> None:
    shaped = g.node("Reshape", "x", g.constant(np.array([-1, IN, 1, 1])))
    result = g.node("Conv", shaped, g.constant(weight[:, :, None, None]), g.constant(bias))
    last(g, g.node("Flatten", result))


def gemm(g: GraphMaker, weight: Array, bias: Array) -> None:
    last(g, g.node("Gemm", "x", g.constant(weight), g.constant(bias), transB=1))


def scaled_gemm(g: GraphMaker, weight: Array, bias: Array) -> None:
    last(g, g.node("Gemm", "x", g.constant(weight * 4), g.constant(bias / 2), transB=1, alpha=0.25, beta=2.0))


def matmul(g: GraphMaker, weight: Array, bias: Array) -> None:
    last(g, g.node("Add", g.constant(bias), g.node("MatMul", "x", g.constant(weight.T.copy()))))


def stored_matmul(g: GraphMaker, weight: Array, bias: Array) -> None:
    """With its bias as a row, and as a Constant node."""
    row = g.node("Constant", value=numpy_helper.from_array(bias[None]))
    last(g, g.node("Add", g.node("MatMul", "x", g.constant(weight.T.copy())), row))


LAYERS: dict[str, Build] = {each.__name__: each for each in (conv, gemm, scaled_gemm, matmul, stored_matmul)}


def network(build: Build, factor: float, *, bias: float = 1.0) -> onnx.ModelProto:
    """A network whose first layer has a channel with weights ``factor`` times as large as the others'."""
    g = GraphMaker()
    weight = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)
    weight[3] *= np.float32(factor)
    build(g, weight, np.full(OUT, bias, np.float32))
    return g.model({"x": ["n", IN]}, {"y": ["n", 4]})


def samples(rows: int = SAMPLES) -> Array:
    return np.random.default_rng(1).standard_normal((rows, IN)).astype(np.float32)


def plain(model: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    """Run a model as everybody does, with all of ONNX Runtime's optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def written(model: onnx.ModelProto, folder: Path, inputs: Array, **options: object) -> onnx.ModelProto:
    """Quantize a model on its inputs with ``trtdeploy quantize``."""
    save(model, folder / "float.onnx")
    np.save(folder / "x.npy", inputs)
    given = PtqOptions.model_validate({"method": "max", **options})
    quantize(folder / "float.onnx", folder / "int8.onnx", str(folder / "x.npy"), given)
    return onnx.load(folder / "int8.onnx")


def largest_bias_code(model: onnx.ModelProto) -> float:
    """Return the largest |bias / (input scale * weight scale)| of a quantized model's first layer, from its nodes."""
    graph = Graph(model.graph)
    layer = next(node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"))
    scales = [graph.constant(graph.producer[name].input[1]) for name in layer.input[:2]]
    bias = graph.constant(layer.input[2]) if len(layer.input) > 2 else None
    if bias is None:
        [adder] = graph.consumers[layer.output[0]]
        bias = next(value for name in adder.input if (value := graph.constant(name)) is not None)
    assert scales[0] is not None and scales[1] is not None  # noqa: PT018
    return float(np.abs(bias / (scales[0].astype(np.float64) * scales[1])).max())


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e-7, 1e-5])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_dead_channel_with_a_bias_is_what_the_file_says(
    layer: str, factor: float, target: str, tmp_path: Path
) -> None:
    model = network(LAYERS[layer], factor)
    quantized = written(model, tmp_path, samples(), target=target)
    inputs = {"x": samples()}
    [expected], [answer] = as_exported(model, inputs), as_exported(quantized, inputs)
    assert sqnr_db(expected, answer) > 30
    if target == "tensorrt":  # with UINT8 activations, this processor's kernels may saturate
        assert abs(sqnr_db(expected, plain(quantized, inputs)) - sqnr_db(expected, answer)) < 1
    assert largest_bias_code(quantized) <= 2**30
    assert lint(quantized, ignore=["code-type", "zero-point"]) == [] or target == "onnxruntime"


def test_a_channel_that_is_alive_keeps_the_scale_of_its_largest_weight(tmp_path: Path) -> None:
    quantized = written(network(conv, 1e-3), tmp_path, samples())
    graph = Graph(quantized.graph)
    layer = next(node for node in quantized.graph.node if node.op_type == "Conv")
    dequantize = graph.producer[layer.input[1]]
    weight = graph.constant(graph.producer[dequantize.input[0]].input[0])
    assert weight is not None
    np.testing.assert_array_equal(graph.constant(dequantize.input[1]), np.abs(weight).max((1, 2, 3)) / np.float32(127))


@pytest.mark.parametrize("layer", LAYERS)
def test_an_input_that_was_dead_leaves_the_weights_alive(layer: str, tmp_path: Path) -> None:
    """Its range is free, too; and what is not 0 later has a value."""

    def build(g: GraphMaker, weight: Array, bias: Array) -> None:
        off = g.node("Relu", g.node("Sub", "x", g.constant(np.float32(100))), output="off")
        inner = GraphMaker()
        inner._count = 100
        LAYERS[layer](inner, weight, bias)
        for node in inner.nodes:
            node.input[:] = [off if name == "x" else name for name in node.input]
        g.nodes += inner.nodes
        g.constants += inner.constants

    quantized = written(network(build, 1.0), tmp_path, samples())
    float_model = network(build, 1.0)
    assert largest_bias_code(quantized) <= 2**30
    inputs = {"x": samples()}
    np.testing.assert_allclose(plain(quantized, inputs), as_exported(float_model, inputs)[0], atol=0.1)
    graph = Graph(quantized.graph)
    pairs = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert graph.constant(pairs[0].input[0]) is None
    assert graph.constant(pairs[0].input[1]) == np.float32(1) / np.float32(127)
    weight = next(pair for pair in pairs if graph.constant(pair.input[0]) is not None)
    values, scale = graph.constant(weight.input[0]), graph.constant(weight.input[1])
    assert values is not None and scale is not None  # noqa: PT018
    assert scale.max() == np.abs(values).max() / np.float32(127)


def test_an_infinite_bias_takes_its_class_out_and_no_other(tmp_path: Path) -> None:
    g = GraphMaker()
    bias = np.zeros(OUT, np.float32)
    bias[2] = -np.inf
    weight = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)
    g.node("Gemm", "x", g.constant(weight), g.constant(bias), transB=1, output="y")
    quantized = written(g.model({"x": ["n", IN]}, {"y": ["n", OUT]}), tmp_path, samples(), method="max")
    answer = as_exported(quantized, {"x": samples()})[0]
    assert np.isneginf(answer[:, 2]).all()
    assert (np.delete(answer, 2, 1).argmax(1) == np.delete(samples() @ weight.T, 2, 1).argmax(1)).mean() > 0.9


def test_ranges_lead_to_the_same_scales(tmp_path: Path) -> None:
    model = network(conv, 0.0)
    quantized = written(model, tmp_path, samples())
    ranges = ranges_of(quantized)
    assert not ranges.weight_scales  # they follow from amax and bias
    assert quantize_with_ranges(without_qdq(quantized), ranges) == canonical_qdq(quantized)


def test_given_scales_of_weights_leave_room_too() -> None:
    g = GraphMaker()
    g.node(
        "Gemm",
        "x",
        g.constant(np.ones((2, 4), np.float32), "w"),
        g.constant(np.ones(2, np.float32)),
        transB=1,
        output="y",
    )
    model = g.model({"x": ["n", 4]}, {"y": ["n", 2]})
    scale = np.array([1e-8 / 127, 1 / 127], np.float32)
    applied = apply_ranges(model, DynamicRanges({"x": np.float32(0.02)}, {"w": scale}))
    assert largest_bias_code(applied.model) == pytest.approx(2**29)
    kept = ranges_of(applied.model).weight_scales["w"]
    assert kept[1] == scale[1]
    again = quantize_with_ranges(without_qdq(applied.model), ranges_of(applied.model))
    assert again == canonical_qdq(applied.model)


def test_one_weight_of_two_layers_keeps_one_scale(tmp_path: Path) -> None:
    g = GraphMaker()
    weight = np.random.default_rng(0).standard_normal((IN, IN)).astype(np.float32)
    weight[5] = 0
    tied = g.constant(weight, "tied")
    first = g.node("Gemm", "x", tied, g.constant(np.full(IN, 0.5, np.float32)), transB=1)
    g.node("Gemm", g.node("Relu", first), tied, g.constant(np.full(IN, 2.0, np.float32)), transB=1, output="y")
    quantized = written(g.model({"x": ["n", IN]}, {"y": ["n", IN]}), tmp_path, samples())
    assert [node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"].count("tied") == 1
    assert lint(quantized) == []


def broken(layer: str, tmp_path: Path) -> onnx.ModelProto:
    """A file as others write it: the dead channel of its first layer has the scale 1e-8 / 127."""
    quantized = written(network(LAYERS[layer], 0.0), tmp_path, samples())
    for tensor in quantized.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name.endswith(".scale") and values.shape == (OUT,):
            values = values.copy()
            values[3] = 1e-8 / 127
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return quantized


@pytest.mark.parametrize("layer", LAYERS)
def test_lint_finds_and_fixes_such_a_file(layer: str, tmp_path: Path) -> None:
    model = broken(layer, tmp_path)
    assert [finding.rule for finding in lint(model)] == ["bias-overflow"]
    fixed = fix(model)
    assert [repair.rule for repair in fixed.repairs] == ["bias-overflow"]
    assert lint(fixed.model) == []
    assert fix(fixed.model).repairs == ()
    inputs = {"x": samples()}
    expected = as_exported(model, inputs)[0]
    np.testing.assert_allclose(as_exported(fixed.model, inputs)[0], expected, atol=1e-4)
    assert sqnr_db(expected, plain(fixed.model, inputs)) > 30


def test_a_bias_of_codes_that_fills_int32_is_found_in_qoperator_models_too() -> None:
    """A quantizer that clips the bias of a dead channel into INT32; ``--fix`` makes floats of it."""
    g = GraphMaker()
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8)
    weight[1] = 0
    scales = np.float32([0.01, 1e-8, 0.01, 0.01])
    codes = np.array([100, 2**31 - 1, -100, 5], np.int32)
    zero, small = g.constant(np.int8(0)), g.constant(np.float32(0.02))
    read = g.node("QuantizeLinear", "x", small, zero)
    made = g.node(
        "QLinearConv", read, small, zero, g.constant(weight), g.constant(scales), g.constant(np.zeros(4, np.int8)),
        small, zero, g.constant(codes),
    )  # fmt: skip
    g.node("DequantizeLinear", made, small, zero, output="y")
    model = g.model({"x": ["n", 3, 2, 2]}, {"y": ["n", 4, 2, 2]})
    fixed = fix(model)
    assert {"integer-op", "bias-overflow"} <= {repair.rule for repair in fixed.repairs}
    assert largest_bias_code(fixed.model) <= 2**30
    assert "bias-overflow" not in {finding.rule for finding in lint(fixed.model)}
    inputs = {"x": np.random.default_rng(2).standard_normal((3, 3, 2, 2)).astype(np.float32)}
    np.testing.assert_allclose(as_exported(fixed.model, inputs)[0], as_exported(model, inputs)[0], atol=0.021)


def upsampling(weight: Array, bias: Array | None = None, *, group: int = 1) -> onnx.ModelProto:
    g = GraphMaker()
    features = g.node("Conv", "x", g.constant(np.eye(weight.shape[0], dtype=np.float32)[:, :, None, None]))
    reads = [g.node("Relu", features, output="read"), g.constant(weight), *([] if bias is None else [g.constant(bias)])]
    up = g.node("ConvTranspose", *reads, strides=[2, 2], group=group, output="up")
    outputs = weight.shape[1] * group
    g.node("Conv", up, g.constant(np.eye(outputs, dtype=np.float32)[:, :, None, None]), output="y")
    size = ["n", outputs, 8, 8]
    return g.model({"x": ["n", weight.shape[0], 4, 4]}, {"y": size, "up": size})


def images(channels: int) -> Array:
    return np.random.default_rng(4).standard_normal((16, channels, 4, 4)).astype(np.float32)


def normal(*shape: int) -> Array:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def worst_channel_db(expected: Array, answer: Array) -> float:
    return min(sqnr_db(expected[:, channel], answer[:, channel]) for channel in range(expected.shape[1]))


@pytest.mark.parametrize(("asked", "axis"), [("per-tensor", None), ("per-channel", 1)])
def test_a_transposed_convolution_has_one_scale_unless_more_are_wanted(
    asked: str, axis: int | None, tmp_path: Path
) -> None:
    save(upsampling(normal(8, 6, 2, 2)), tmp_path / "float.onnx")
    np.save(tmp_path / "x.npy", images(8))
    command = ["quantize", "float.onnx", "-o", "int8.onnx", "--data", "x.npy", "--method", "max"]
    paths = [str(tmp_path / word) if word.endswith((".onnx", ".npy")) else word for word in command]
    done = CliRunner().invoke(app, [*paths, *(["--transposed-weights", asked] if axis else [])])
    assert done.exit_code == 0
    assert ("one scale for all output channels" in done.stdout) == (axis is None)
    quantized = onnx.load(tmp_path / "int8.onnx")
    graph = Graph(quantized.graph)
    dequantize = graph.producer[graph.producer["up"].input[1]]
    assert {entry.name: entry.i for entry in dequantize.attribute} == ({} if axis is None else {"axis": axis})
    assert [finding.rule for finding in lint(quantized)] == ([] if axis is None else ["transposed-axis"])


def test_groups_of_a_transposed_convolution_stay_in_float(tmp_path: Path) -> None:
    weight = normal(8, 4, 2, 2) * np.float32(4.0) ** -np.arange(4).repeat(2).reshape(8, 1, 1, 1).astype(np.float32)
    model = upsampling(weight, group=4)
    quantized = written(model, tmp_path, images(8))
    assert quantized_nodes(quantized)["up"] is False
    assert lint(quantized) == []
    inputs = {"x": images(8)}
    # behind it the smallest channels are lost in the codes of the next layer's input
    assert worst_channel_db(as_exported(model, inputs)[1], as_exported(quantized, inputs)[1]) > 30
    applied = apply_ranges(model, DynamicRanges.from_amax(dict.fromkeys(["x", "read", "up"], 4)))
    assert "groups" in applied.left_float["up"]


@pytest.mark.parametrize("channels", [(1.0, 0.5, 0.1, 0.07), (1.0, 1.0, 1.0, 0.0)])
def test_one_scale_is_taken_where_no_channel_is_lost(channels: tuple[float, ...], tmp_path: Path) -> None:
    weight = np.clip(normal(8, 4, 2, 2), -1, 1) * np.float32(channels).reshape(1, 4, 1, 1)
    weight[0, :, 0, 0] = channels
    assert min(c for c in channels if c) * 127 > FEWEST_CODES
    quantized = written(upsampling(weight), tmp_path, images(8))
    assert quantized_nodes(quantized)["up"] is True
    codes = np.rint(weight / (np.abs(weight).max() / 127))
    assert (np.abs(codes).max((0, 2, 3)) >= FEWEST_CODES)[np.array(channels) > 0].all()


def test_a_channel_that_one_scale_would_lose_keeps_the_layer_in_float(tmp_path: Path) -> None:
    weight = normal(8, 4, 2, 2) * np.float32(4.0) ** -np.arange(4).reshape(1, 4, 1, 1).astype(np.float32)
    model = upsampling(weight)
    save(model, tmp_path / "float.onnx")
    np.save(tmp_path / "x.npy", images(8))
    done = quantize(tmp_path / "float.onnx", tmp_path / "a.onnx", str(tmp_path / "x.npy"), PtqOptions(method="max"))
    assert list(done.left_float) == ["up"]
    assert "1 of its 4 output channels" in done.left_float["up"]
    assert quantized_nodes(onnx.load(tmp_path / "a.onnx"))["up"] is False
    options = PtqOptions(method="max", transposed_weights="per-channel")
    done = quantize(tmp_path / "float.onnx", tmp_path / "b.onnx", str(tmp_path / "x.npy"), options)
    assert done.left_float == {}
    assert quantized_nodes(onnx.load(tmp_path / "b.onnx"))["up"] is True


def test_one_scale_that_a_bias_would_make_too_large_is_not_taken(tmp_path: Path) -> None:
    bias = np.float32([0, 0, 1e9, 0, 0, 0])
    save(upsampling(normal(8, 6, 2, 2), bias), tmp_path / "float.onnx")
    np.save(tmp_path / "x.npy", images(8))
    done = quantize(tmp_path / "float.onnx", tmp_path / "a.onnx", str(tmp_path / "x.npy"), PtqOptions(method="max"))
    assert "bias" in done.left_float["up"]
    assert lint(onnx.load(tmp_path / "a.onnx"), ignore=["layer-in-float"]) == []


def test_a_dead_transposed_convolution_has_room_for_its_bias(tmp_path: Path) -> None:
    quantized = written(upsampling(np.zeros((8, 6, 2, 2), np.float32), np.ones(6, np.float32)), tmp_path, images(8))
    assert quantized_nodes(quantized)["up"] is True
    assert lint(quantized) == []
    inputs = {"x": images(8)}
    np.testing.assert_allclose(plain(quantized, inputs), as_exported(quantized, inputs)[0], atol=1e-5)


def test_where_nothing_is_left_the_reason_is_given(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("ConvTranspose", "x", g.constant(normal(4, 2, 2, 2)), group=2, output="y")
    with pytest.raises(QuantizationError, match="y stays in float: its output channels are spread over the groups"):
        written(g.model({"x": ["n", 4, 4, 4]}, {"y": None}), tmp_path, images(4))


def test_ranges_hold_no_scales_along_the_other_axis() -> None:
    g = GraphMaker()
    kernel = g.qdq(g.constant(normal(4, 4, 2, 2)), np.full(4, 0.1), axis=0)
    g.node("ConvTranspose", g.qdq("x"), kernel, output="y")
    with pytest.raises(QuantizationError, match="along axis 0"):
        ranges_of(g.model({"x": ["n", 4, 4, 4]}, {"y": None}))


def codes_of(kind: int, *, saturate: int | None = None, by_zero_point: bool = False) -> onnx.ModelProto:
    """A convolution on codes of a type that an attribute of opset 21, or a zero-point, says."""
    g = GraphMaker()
    scale = g.constant(np.float32(0.1))
    attributes: dict[str, int] = {} if by_zero_point else {"output_dtype": kind}
    attributes |= {} if saturate is None else {"saturate": saturate}
    reads = [scale]
    if by_zero_point:
        g.constants.append(helper.make_tensor("zero", kind, [], [0]))
        reads.append("zero")
    codes = g.node("QuantizeLinear", "x", *reads, **attributes)
    weight = g.qdq(g.constant(normal(4, 4, 1, 1)), 0.1)
    g.node("Conv", g.node("DequantizeLinear", codes, *reads), weight, output="y")
    model = g.model({"x": ["n", 4, 4, 4]}, {"y": ["n", 4, 4, 4]}, opset=21)
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


KINDS = onnx.TensorProto


@pytest.mark.parametrize("by_zero_point", [False, True])
@pytest.mark.parametrize(
    "name", ["UINT8", "INT16", "UINT16", "UINT4", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ"]
)
def test_codes_that_tensorrt_has_not_are_found(name: str, by_zero_point: bool) -> None:
    model = codes_of(getattr(KINDS, name), by_zero_point=by_zero_point)
    assert {finding.rule for finding in lint(model)} == {"code-type"}


@pytest.mark.parametrize("by_zero_point", [False, True])
@pytest.mark.parametrize("name", ["INT8", "INT4", "FLOAT8E4M3FN"])
def test_codes_that_tensorrt_has_are_not_found(name: str, by_zero_point: bool) -> None:
    assert lint(codes_of(getattr(KINDS, name), by_zero_point=by_zero_point)) == []


def test_codes_that_do_not_saturate_are_found() -> None:
    [finding] = lint(codes_of(KINDS.FLOAT8E4M3FN, saturate=0, by_zero_point=True))
    assert "do not saturate" in finding.reason


@pytest.mark.parametrize(("kind", "rules"), [(KINDS.UINT8, {"code-type"}), (KINDS.INT8, set())])
def test_codes_from_outside_are_looked_at(kind: int, rules: set[str]) -> None:
    g = GraphMaker()
    scale, weight = g.constant(np.float32(0.1)), g.qdq(g.constant(normal(4, 4, 1, 1)), 0.1)
    g.node("Conv", g.node("DequantizeLinear", "x", scale), weight, output="y")
    model = g.model({"x": ["n", 4, 4, 4]}, {"y": ["n", 4, 4, 4]}, dtype=kind)
    assert {finding.rule for finding in lint(model)} == rules


def blocks(size: int, shape: tuple[int, int], *, of_weight: bool) -> onnx.ModelProto:
    g = GraphMaker()
    scale, zero = g.constant(np.full(shape, 0.1, np.float32)), g.constant(np.zeros(shape, np.int8))
    source = g.constant(normal(16, 8), "w") if of_weight else "x"
    codes = g.node("QuantizeLinear", source, scale, zero, axis=0, block_size=size)
    result = g.node("DequantizeLinear", codes, scale, zero, axis=0, block_size=size)
    read = [g.qdq("x"), result] if of_weight else [result, g.qdq(g.constant(normal(16, 8), "w"))]
    g.node("MatMul", *read, output="y")
    model = g.model({"x": [4, 16]}, {"y": [4, 8]}, opset=21)
    model.ir_version = 10
    return model


def test_scales_per_block_are_for_weights_and_fit_them() -> None:
    assert lint(blocks(4, (4, 8), of_weight=True)) == []
    assert {finding.rule for finding in lint(blocks(4, (3, 8), of_weight=True))} == {"scale-size"}
    assert {finding.rule for finding in lint(blocks(2, (2, 16), of_weight=False))} == {"activation-per-channel"}
