"""What ONNX Runtime and TensorRT take, and what has one meaning, is repaired on reading and said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.building.inspection import inspect_file
from trtdeploy.engine import Engine
from trtdeploy.errors import ModelError
from trtdeploy.files import sha256_bytes
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.qdq.layers import count_quantized, quantized_nodes
from trtdeploy.onnxgraph.reading.source import SourceModel, load_source
from trtdeploy.quantizing.lint_file import lint_file, repair_file
from trtdeploy.tensors import Array

QUICK = BuildConfig(runtime="onnxruntime", timing_rounds=1, threads=1)
RNG = np.random.default_rng(0)
SAMPLES = {"x": RNG.standard_normal((4, 16)).astype(np.float32)}


def read(model: onnx.ModelProto, tmp_path: Path) -> SourceModel:
    """Write and read a model; the digest must be that of the bytes, and the result must keep ONNX's rules."""
    path = save(model, tmp_path / "m.onnx")
    source = load_source(path)
    assert source.sha256 == sha256_bytes(path.read_bytes())
    onnx.checker.check_model(source.proto)
    return source


def shuffled(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = list(reversed(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.parametrize("quantized", [True, False])
def test_a_model_that_needs_no_repair_stays_as_it_is_to_the_byte(quantized: bool, tmp_path: Path) -> None:
    source = read(block_network(quantized=quantized), tmp_path)
    assert source.repairs == ()
    assert source.proto.SerializeToString() == (tmp_path / "m.onnx").read_bytes()


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(shuffled(block_network()), tmp_path / "m.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(str(path))
    with caplog.at_level(logging.WARNING, "trtdeploy"):
        source = load_source(path)
    assert source.repairs == ("nodes that stood before what they read are in order",)
    assert "m.onnx is repaired on reading: nodes that stood before" in caplog.text
    samples = {"input": RNG.standard_normal((2, 3, 12, 12)).astype(np.float32)}
    for answer, exact in zip(as_exported(source.proto, samples), as_exported(block_network(), samples), strict=True):
        np.testing.assert_array_equal(answer, exact)
    assert inspect_file(path)["repaired_on_reading"] == list(source.repairs)
    assert lint_file(path) == lint_file(save(block_network(), tmp_path / "ordered.onnx"))
    with Engine.load(build(path, tmp_path / "m.plan", QUICK).path) as engine:
        assert engine.infer(samples)["logits"].shape == (2, 5)


def test_nodes_of_a_body_are_put_in_order_too(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        nodes = [helper.make_node("Relu", ["h"], [name]), helper.make_node("Neg", ["x"], ["h"])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])])

    g = GraphMaker()
    positive = g.node("Cast", g.node("ReduceMax", "x", keepdims=0), to=TensorProto.BOOL)
    g.node("If", positive, then_branch=branch("then"), else_branch=branch("else"), output="y")
    source = read(g.model({"x": [4]}, {"y": [4]}), tmp_path)
    assert source.repairs == ("nodes that stood before what they read are in order",)
    samples = {"x": np.float32([1, -2, 3, -4])}
    np.testing.assert_array_equal(as_exported(source.proto, samples)[0], [0, 2, 0, 4])


def test_what_the_float16_converter_of_onnx_runtime_writes_is_read(tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted = convert_float_to_float16(block_network(quantized=False), keep_io_types=True)
    assert read(shuffled(converted), tmp_path).repairs


def test_a_cycle_is_a_model_error(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Add", "x", "b", output="a")
    g.node("Relu", "a", output="b")
    g.node("Relu", "b", output="y")
    with pytest.raises(ModelError, match="cycle"):
        load_source(save(g.model({"x": [4]}, {"y": [4]}), tmp_path / "m.onnx"))


@pytest.mark.parametrize("name", ["?", "-1", "None", "unknown"])
def test_open_sizes_that_share_a_name_which_says_nothing_may_differ(name: str, tmp_path: Path) -> None:
    """PaddlePaddle's exporter calls every open size "?"; TensorRT takes equal names for equal sizes."""
    pytest.importorskip("tensorrt_rtx")
    g = GraphMaker()
    g.node("Relu", "x", output="y")
    model = g.model({"x": [name, 3, name, name]}, {"y": [name, 3, name, name]})
    path = save(model, tmp_path / "m.onnx")
    source = load_source(path)
    assert [size.dim_param for size in source.proto.graph.input[0].type.tensor_type.shape.dim] == [
        "x_dim0", "", "x_dim2", "x_dim3"
    ]  # fmt: skip
    assert source.repairs == (f"open sizes that were all called {name!r} are x_dim0, x_dim2, x_dim3",)
    config = BuildConfig.model_validate(
        {
            "runtime": "tensorrt-rtx",
            "profiles": [{"x": {"min": (1, 3, 8, 8), "opt": (2, 3, 16, 32), "max": (4, 3, 32, 64)}}],
        }
    )
    assert build(path, tmp_path / "m.plan", config).manifest.inputs[0].shape == (-1, 3, -1, -1)


def test_names_of_sizes_that_say_something_are_kept(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Add", "a", "b", output="y")
    assert read(g.model({"a": ["batch", "?"], "b": ["batch", 4]}, {"y": ["batch", 4]}), tmp_path).repairs == ()


def test_an_output_without_a_shape_gets_the_one_that_follows(tmp_path: Path) -> None:
    model = block_network()
    shapes = [[5, "batch"], None]
    for value, shape in zip(model.graph.output, shapes, strict=True):
        value.type.tensor_type.ClearField("shape")
        if shape is None:
            value.ClearField("type")
    source = read(model, tmp_path)
    assert [str(spec) for spec in source.outputs] == ["logits float32[?, 5]", "features float32[?, 26, 6, 6]"]
    assert source.repairs == (
        "output 'logits' had no shape and has [batch, 5]",
        "output 'features' had no shape and has [batch, 26, 6, 6]",
    )


def test_an_initializer_that_is_an_input_is_a_constant_and_said(tmp_path: Path) -> None:
    g = GraphMaker()
    g.constant(np.ones(4, np.float32), "offset")
    g.node("Add", "x", "offset", output="y")
    model = g.model({"x": ["batch", 4], "offset": [4]}, {"y": ["batch", 4]})
    assert read(model, tmp_path).repairs == ("initializers that were inputs, too, are constants: offset",)
    model.ir_version = 3  # where every initializer must be one
    assert read(model, tmp_path).repairs == ()


def test_nodes_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    g = GraphMaker()
    x = g.node("MatMul", "x", g.constant(np.ones((16, 16), np.float32)), name="fc")
    g.node("MatMul", x, g.constant(np.ones((16, 16), np.float32)), name="fc", output="y")
    source = read(g.model({"x": ["n", 16]}, {"y": ["n", 16]}), tmp_path)
    assert list(quantized_nodes(source.proto)) == ["fc", "fc_2"]
    assert source.repairs == ("nodes that shared a name have names of their own: fc",)


def linear_function(opset: int, *ops: onnx.NodeProto) -> onnx.FunctionProto:
    nodes = ops or (helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"]))
    return helper.make_function("own", "Linear", ["x", "w", "b"], ["y"], nodes, [helper.make_opsetid("", opset)])


def with_calls(g: GraphMaker, function: onnx.FunctionProto) -> onnx.ModelProto:
    read = "x"
    for place in range(3):
        weights = g.constant(RNG.standard_normal((16, 16)).astype(np.float32) / 4, f"w{place}")
        bias = g.constant(RNG.standard_normal(16).astype(np.float32), f"b{place}")
        last = "y" if place == 2 else f"h{place}"
        g.nodes.append(helper.make_node("Linear", [read, weights, bias], [last], domain="own", name=f"layer{place}"))
        read = last
    model = g.model({"x": ["n", 16]}, {"y": ["n", 16]})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


@pytest.mark.parametrize("opset", [17, 15], ids=["same-opset", "older-opset-where-the-ops-mean-the-same"])
def test_layers_inside_local_functions_are_layers(opset: int, tmp_path: Path) -> None:
    model = with_calls(GraphMaker(), linear_function(opset))
    source = read(model, tmp_path)
    assert not source.proto.functions
    assert source.repairs == ("local functions are inlined: Linear (3)",)
    assert len(quantized_nodes(source.proto)) == 3
    np.testing.assert_array_equal(as_exported(source.proto, SAMPLES)[0], as_exported(model, SAMPLES)[0])


def test_a_function_whose_ops_mean_something_else_in_the_opset_of_the_model_breaks_the_rules(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("ReduceMean", ["s"], ["y"], axes=[0]),  # axes are an input from opset 18 on
    ]
    model = with_calls(GraphMaker(), linear_function(17, *nodes))
    model.opset_import[0].version = 18
    with pytest.raises(ModelError, match="ReduceMean"):
        load_source(save(model, tmp_path / "m.onnx"))


def test_a_function_with_another_version_of_somebody_elses_ops_is_left_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    function = linear_function(17, helper.make_node("Fused", ["x", "w", "b"], ["y"], domain="else"))
    function.opset_import.append(helper.make_opsetid("else", 2))
    model = with_calls(GraphMaker(), function)
    model.opset_import.append(helper.make_opsetid("else", 1))
    path = save(model, tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING, "trtdeploy"):
        assert len(load_source(path).proto.functions) == 1
    assert "Local function Linear uses another opset" in caplog.text


FORMS = ["vf", "vfs", "div", "cast", "castlike", "reshape", "exp", "reciprocal", "zcos", "zcast", "concat", "gather",
         "slice", "sparse", "chain"]  # fmt: skip
WEIGHTS = ["cast16", "reshape", "mul", "transpose", "sparse", "squeeze", "identity-of-cast", "sparse-constant"]


def scale(g: GraphMaker, form: str) -> None:
    """Make the constants "s", about 0.03, and "z", an INT8 zero, in some form."""

    def c(values: object, kind: type = np.float32) -> str:
        return g.constant(np.asarray(values, kind))

    if form == "vf":
        g.node("Constant", output="s", value_float=0.03)
    elif form == "vfs":
        g.node("Reshape", g.node("Constant", value_floats=[0.03]), c([], np.int64), output="s")
    elif form == "div":
        g.node("Div", c(3.81), c(127), output="s")
    elif form == "cast":
        g.node("Cast", c(0.03, np.float16), to=TensorProto.FLOAT, output="s")
    elif form == "castlike":
        g.node("CastLike", c(0.03, np.float64), c(0), output="s")
    elif form == "reshape":
        g.node("Squeeze", c([[0.03]]), output="s")
    elif form == "exp":
        g.node("Exp", c(np.log(0.03)), output="s")
    elif form == "reciprocal":
        g.node("Sqrt", g.node("Reciprocal", g.node("Neg", c(-1111.1))), output="s")
    elif form == "concat":
        g.node("ReduceMax", g.node("Concat", c([0.01]), c([0.03]), axis=0), keepdims=0, output="s")
    elif form == "gather":
        g.node("Gather", c([0.5, 0.03]), c(1, np.int64), output="s")
    elif form == "slice":
        g.node("Squeeze", g.node("Slice", c([0.5, 0.03]), c([1], np.int64), c([2], np.int64)), output="s")
    elif form == "sparse":
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(np.float32([0.03]), "v"), numpy_helper.from_array(np.int64([1]), "i"), [2]
        )
        g.node("Gather", g.node("Constant", sparse_value=sparse), c(1, np.int64), output="s")
    elif form == "chain":
        g.node("Identity", g.node("Identity", g.node("Sub", c(1.03), c(1.0))), output="s")
    else:
        c(0.03)
        g.constants[-1].name = "s"
    if form == "zcos":
        zero = numpy_helper.from_array(np.zeros(1, np.int8))
        g.node("ConstantOfShape", c([], np.int64), value=zero, output="z")
    elif form == "zcast":
        g.node("Cast", c(0, np.int64), to=TensorProto.INT8, output="z")
    else:
        g.constant(np.int8(0), "z")


def weight(g: GraphMaker, values: Array, form: str) -> None:
    """Make the constant "w" in some form."""
    if form in ("cast16", "identity-of-cast"):
        values = values.astype(np.float16)
        output = "w" if form == "cast16" else None
        cast = g.node("Cast", g.constant(values), to=TensorProto.FLOAT, output=output)
        if output is None:
            g.node("Identity", cast, output="w")
    elif form == "reshape":
        g.node("Reshape", g.constant(values.reshape(4, 4, 8)), g.constant(np.int64([16, 8])), output="w")
    elif form == "mul":
        g.node("Mul", g.constant(values / 2), g.constant(np.float32(2)), output="w")
    elif form == "transpose":
        g.node("Transpose", g.constant(np.ascontiguousarray(values.T)), output="w")
    elif form == "squeeze":
        g.node("Squeeze", g.constant(values[None]), g.constant(np.int64([0])), output="w")
    elif form in ("sparse", "sparse-constant"):
        places = np.argwhere(values > 0) if form == "sparse" else np.flatnonzero(values > 0)
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(values[values > 0], "w"), numpy_helper.from_array(places, "places"), values.shape
        )
        g.node("Identity", g.node("Constant", sparse_value=sparse), output="w")


def quantized_layer(scale_form: str = "tensor", weight_form: str = "tensor") -> onnx.ModelProto:
    g = GraphMaker()
    scale(g, scale_form)
    values = RNG.standard_normal((16, 8)).astype(np.float32)
    if weight_form == "tensor":
        g.constant(values, "w")
    else:
        weight(g, values, weight_form)
    x = g.node("DequantizeLinear", g.node("QuantizeLinear", "x", "s", "z"), "s", "z")
    w = g.qdq("w", np.abs(values).max(0) / 127, axis=1)
    g.node("MatMul", x, w, output="y")
    return g.model({"x": [4, 16]}, {"y": [4, 8]})


@pytest.mark.parametrize(
    ("scale_form", "weight_form"), [(form, "tensor") for form in FORMS] + [("tensor", form) for form in WEIGHTS]
)
def test_scales_and_weights_are_constants_in_whatever_form_they_are_written(
    scale_form: str, weight_form: str, tmp_path: Path
) -> None:
    model = quantized_layer(scale_form, weight_form)
    source = read(model, tmp_path)
    assert source.repairs
    assert lint_file(tmp_path / "m.onnx") == []
    count = count_quantized(source.proto)
    assert (count.weighted_layers, count.quantized_layers, count.pairs) == (1, 1, 2)
    graph = Graph(source.proto.graph)
    dequantize = graph.maker(graph.producer["y"].input[0], "DequantizeLinear")
    assert dequantize is not None
    np.testing.assert_allclose(graph.constant(dequantize.input[1]), 0.03, rtol=1e-3)
    if "sparse" not in scale_form + weight_form:  # ONNX Runtime does not read all of these
        np.testing.assert_allclose(as_exported(source.proto, SAMPLES)[0], as_exported(model, SAMPLES)[0], rtol=1e-5)
    # what is left behind is nothing: all that was computed ahead is gone
    assert {node.op_type for node in source.proto.graph.node} <= {
        "QuantizeLinear", "DequantizeLinear", "MatMul", "Constant", "Identity"
    }  # fmt: skip
    precision = build(tmp_path / "m.onnx", tmp_path / "m.plan", QUICK).manifest.precision
    assert (precision.weighted_layers, precision.quantized_layers) == (1, 1)
    repaired = repair_file(tmp_path / "m.onnx", tmp_path / "fixed.onnx")
    assert repaired.left == []
    onnx.checker.check_model(str(tmp_path / "fixed.onnx"))


def test_a_constant_that_is_an_output_stays_one(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Transpose", g.constant(np.arange(12, dtype=np.float32).reshape(3, 4)), output="weights")
    g.node("MatMul", "x", "weights", output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 3], "weights": [4, 3]})
    source = read(model, tmp_path)
    assert list(quantized_nodes(source.proto)) == ["y"]
    samples = {"x": np.ones((2, 4), np.float32)}
    for answer, exact in zip(as_exported(source.proto, samples), as_exported(model, samples), strict=True):
        np.testing.assert_array_equal(answer, exact)


def test_tied_weights_keep_their_other_reader(tmp_path: Path) -> None:
    g = GraphMaker()
    table = g.constant(RNG.standard_normal((16, 5)).astype(np.float32), "table")
    rows = g.node("Gather", table, g.node("Cast", "ids", to=TensorProto.INT64))
    g.node("MatMul", rows, g.node("Transpose", table), output="y")
    model = g.model({"ids": ["n", 3]}, {"y": ["n", 3, 16]})
    source = read(model, tmp_path)
    assert {tensor.name for tensor in source.proto.graph.initializer} >= {"table"}
    samples = {"ids": np.float32([[1, 2, 3]])}
    np.testing.assert_array_equal(as_exported(source.proto, samples)[0], as_exported(model, samples)[0])


def test_what_cannot_be_computed_ahead_stays_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    g = GraphMaker()
    g.node("Reshape", g.constant(np.ones((3, 4), np.float32)), g.constant(np.int64([5, 5])), output="w")
    g.node("MatMul", "x", "w", output="y")
    path = save(g.model({"x": ["n", 5]}, {"y": ["n", 5]}), tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING, "trtdeploy"):
        assert load_source(path).repairs == ()
    assert "Reshape w is not computed ahead" in caplog.text


def test_weights_in_another_file_are_computed_ahead(tmp_path: Path) -> None:
    g = GraphMaker()
    g.node("Cast", g.constant(RNG.standard_normal((16, 8)).astype(np.float16), "half"), to=1, output="w")
    g.node("MatMul", "x", "w", output="y")
    model = g.model({"x": ["n", 16]}, {"y": ["n", 8]})
    exact = as_exported(model, SAMPLES)[0]
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    source = load_source(tmp_path / "m.onnx")
    assert [tensor.name for tensor in source.proto.graph.initializer] == ["w"]
    np.testing.assert_array_equal(as_exported(source.proto, SAMPLES)[0], exact)
