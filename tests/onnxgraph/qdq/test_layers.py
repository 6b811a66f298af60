"""Every layer with weights is counted, and each that is left in float is named with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.building.inspection import inspect_file
from trtdeploy.cli.main import app
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.macs import macs_by_node
from trtdeploy.onnxgraph.qdq.layers import count_quantized, left_in_float, weighted_layers

Build = Callable[[GraphMaker], str]


def linear(g: GraphMaker, tensor: str, size_in: int, size_out: int, *, output: str | None = None) -> str:
    """A linear layer on three dimensions as torch exports it: weight, Q, DQ, Transpose, MatMul."""
    return g.node("MatMul", g.qdq(tensor), g.node("Transpose", g.weight(size_out, size_in), perm=[1, 0]), output=output)


def test_a_network_of_linear_layers_is_int8(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    g = GraphMaker()
    hidden = g.node("Relu", linear(g, "x", 16, 32))
    added = g.node("Add", linear(g, hidden, 32, 16), "x")
    linear(g, added, 16, 4, output="y")
    model = g.model({"x": [1, 6, 16]}, {"y": [1, 6, 4]})
    count = count_quantized(model)
    assert (count.weighted_layers, count.quantized_layers, count.pairs) == (3, 3, 6)
    assert sum(macs_by_node(model, {}).values()) == 6 * (16 * 32 + 32 * 16 + 16 * 4)
    config = BuildConfig(runtime="tensorrt-rtx", precision="explicit")
    precision = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.plan", config).manifest.precision
    assert (precision.weighted_layers, precision.quantized_layers) == (3, 3)


def own(g: GraphMaker, *shape: int) -> str:
    return g.constant(np.ones(shape, np.float32))


MOVED: dict[str, Build] = {
    "reshape": lambda g: g.node("Reshape", g.weight(8, 16), g.constant(np.int64([16, 8]))),
    "squeeze": lambda g: g.node(
        "Squeeze", g.qdq(g.constant(np.ones((1, 16, 8), np.float32))), g.constant(np.int64([0]))
    ),
    "identity": lambda g: g.node("Identity", g.node("Transpose", g.weight(8, 16))),
    "codes": lambda g: g.node(
        "DequantizeLinear", g.constant(np.ones((16, 8), np.int8)), g.constant(np.float32(1)), g.constant(np.int8(0))
    ),
    "unsqueeze": lambda g: g.node("Unsqueeze", g.weight(8, 16), g.constant(np.int64([0]))),
}


@pytest.mark.parametrize("name", MOVED)
def test_weights_may_be_moved_between_their_pair_and_the_layer(name: str) -> None:
    g = GraphMaker()
    weights = MOVED[name](g)
    if name == "unsqueeze":
        weights = g.node("Transpose", weights, perm=[0, 2, 1])
    g.nodes.append(helper.make_node("MatMul", [g.qdq("x"), weights], ["y"], name="fc"))
    model = g.model({"x": [1, 4, 16]}, {"y": None})
    assert [(layer.name, layer.weights, layer.is_quantized) for layer in weighted_layers(model)] == [("fc", 1, True)]
    assert lint(model) == []


def test_an_input_may_be_moved_between_its_pair_and_the_layer() -> None:
    g = GraphMaker()
    flat = g.node("Flatten", g.qdq("x"))
    g.node("Gemm", flat, g.weight(8, 64), transB=1, output="y")
    model = g.model({"x": [2, 4, 16]}, {"y": [2, 8]})
    assert count_quantized(model).quantized_layers == 1
    assert lint(model) == []


LEFT: dict[str, tuple[Build, str]] = {
    "nothing": (
        lambda g: g.node("MatMul", "x", own(g, 16, 8), name="fc"),
        "neither its input nor its weights have Q/DQ",
    ),
    "weights only": (
        lambda g: g.node("Gemm", "x", g.weight(8, 16), transB=1, name="fc"),
        "its weights have Q/DQ and its input has none",
    ),
    "input only": (
        lambda g: g.node("MatMul", g.qdq("x"), own(g, 16, 8), name="fc"),
        "its input has Q/DQ and its weights have none",
    ),
    "arithmetic": (
        lambda g: g.node("MatMul", g.qdq("x"), g.node("Mul", g.weight(16, 8), own(g, 8), name="scaled"), name="fc"),
        "Mul scaled stands between its weights and their Q/DQ",
    ),
    "parts": (
        lambda g: g.node(
            "MatMul", g.qdq("x"), g.node("Concat", g.weight(16, 8), g.weight(16, 8), axis=1, name="both"), name="fc"
        ),
        "Concat both stands between its weights and their Q/DQ",
    ),
    "weights from constants": (
        lambda g: g.node("MatMul", "x", g.node("Exp", own(g, 16, 8)), name="fc"),
        "neither its input nor its weights have Q/DQ",
    ),
    "einsum": (
        lambda g: g.node("Einsum", g.qdq("x"), g.qdq(own(g, 16, 8)), equation="nk,ko->no", name="fc"),
        "Einsum has no explicit INT8",
    ),
    "from the left": (
        lambda g: g.node("MatMul", own(g, 3, 4), "x", name="fc"),
        "neither its input nor its weights have Q/DQ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_in_float_is_named_with_its_reason(name: str, tmp_path: Path) -> None:
    g = GraphMaker()
    make, reason = LEFT[name]
    result = make(g)
    linear_out = g.node("Relu", result, output="y")
    model = g.model({"x": [4, 16]}, {linear_out: None})
    assert left_in_float(model) == {"fc": reason}
    quantized = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    assert inspect_file(save(model, tmp_path / "m.onnx"))["left_in_float"] == ({"fc": reason} if quantized else {})


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
def test_the_manifest_has_the_reason_of_each_layer_in_float(runtime: str, tmp_path: Path) -> None:
    if runtime == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
    g = GraphMaker()
    g.nodes.append(helper.make_node("MatMul", ["x", own(g, 16, 8)], ["h"], name="first"))
    g.nodes.append(helper.make_node("Gemm", [g.qdq("h"), g.weight(8, 8)], ["y"], name="second", transB=1))
    path = save(g.model({"x": [4, 16]}, {"y": [4, 8]}), tmp_path / "m.onnx")
    config = BuildConfig.model_validate(
        {"runtime": runtime} | ({"timing_rounds": 1} if runtime == "onnxruntime" else {})
    )
    plan = build(path, tmp_path / "m.plan", config)
    reasons = {"first": "neither its input nor its weights have Q/DQ", "second": None}
    assert {name: layer.left_float for name, layer in plan.manifest.precision.layers.items()} == reasons
    assert {
        name: each["left_float"] for name, each in inspect_file(plan.path)["precision"]["layers"].items()
    } == reasons
    table = CliRunner().invoke(app, ["inspect", str(plan.path), "--layers"]).output
    assert "neither its input nor its weights have Q/DQ" in table
    floats = GraphMaker()
    floats.node("MatMul", "x", own(floats, 16, 8), output="y")
    plan = build(save(floats.model({"x": [4, 16]}, {"y": [4, 8]}), tmp_path / "f.onnx"), tmp_path / "f.plan", config)
    assert [layer.left_float for layer in plan.manifest.precision.layers.values()] == [None]


def test_recurrent_layers_are_layers() -> None:
    g = GraphMaker()
    for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4)):
        g.node(op, "x", own(g, 1, gates * 3, 8), own(g, 1, gates * 3, 3), hidden_size=3, name=op)
    model = g.model({"x": [5, 2, 8]}, {g.nodes[-1].output[0]: None})
    assert left_in_float(model) == {op: f"{op} has no explicit INT8" for op in ("RNN", "GRU", "LSTM")}


def test_a_product_of_constants_or_of_activations_is_no_layer() -> None:
    g = GraphMaker()
    g.node("MatMul", own(g, 4, 16), own(g, 16, 16))
    attention = g.node("MatMul", "x", g.node("Transpose", "x"))
    g.node("MatMul", attention, g.node("MatMul", g.node("RandomNormal", shape=[4, 4]), "x"), output="y")
    assert weighted_layers(g.model({"x": [4, 16]}, {"y": None})) == []


def test_every_reader_of_shared_weights_is_a_layer() -> None:
    g = GraphMaker()
    weights = g.weight(16, 16)
    first = g.node("Gemm", g.qdq("x"), weights, transB=1)
    second = g.node("MatMul", g.qdq(first), g.node("Transpose", weights))
    rows = g.node("Gather", weights, g.node("Cast", second, to=TensorProto.INT64))
    g.node("MatMul", rows, g.node("Transpose", weights), output="y")
    layers = weighted_layers(g.model({"x": [2, 16]}, {"y": None}))
    assert [layer.is_quantized for layer in layers] == [True, True, False]
