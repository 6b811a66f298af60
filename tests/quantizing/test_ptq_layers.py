"""``quantize`` on the forms in which exporters write weights: every layer is quantized, or named with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli.main import app
from trtdeploy.errors import QuantizationError
from trtdeploy.quantizing import PtqOptions, quantize
from trtdeploy.quantizing.lint_file import lint_file
from trtdeploy.statistics import sqnr_db
from trtdeploy.tensors import Array

RNG = np.random.default_rng(0)


def values(*shape: int) -> Array:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def tensorflow_kernels(g: GraphMaker) -> None:
    """Kernels as tf2onnx leaves them: height, width, in, out, behind Transpose and Reshape; NHWC around the network."""
    x = g.node("Transpose", "x", perm=[0, 3, 1, 2])
    kernel = g.node("Transpose", g.constant(values(3, 3, 3, 8)), perm=[3, 2, 0, 1])
    x = g.node("Relu", g.node("Conv", x, kernel, pads=[1] * 4))
    depthwise = g.node("Reshape", g.constant(values(3, 3, 8, 1)), g.constant(np.int64([3, 3, 1, 8])))
    x = g.node("Relu", g.node("Conv", x, g.node("Transpose", depthwise, perm=[3, 2, 0, 1]), group=8, pads=[1] * 4))
    folded = g.node(
        "Mul", g.constant(values(8, 8, 1, 1)), g.constant(np.linspace(0.5, 2, 8).reshape(8, 1, 1, 1).astype("f"))
    )
    x = g.node("Flatten", g.node("GlobalAveragePool", g.node("Relu", g.node("Conv", x, folded))))
    g.node("MatMul", x, g.node("Cast", g.constant(values(8, 5).astype(np.float16)), to=TensorProto.FLOAT), output="y")


def tied(g: GraphMaker) -> None:
    """A language model whose head has the weights of its embedding, and one layer in between."""
    table = g.constant(values(50, 16), "table")
    hidden = g.node("Gather", table, "ids")
    hidden = g.node("Relu", g.node("MatMul", hidden, g.constant(values(16, 16))))
    g.node("MatMul", hidden, g.node("Transpose", table, perm=[1, 0]), output="y")


def quantized(model: onnx.ModelProto, samples: dict[str, Array], folder: Path, *skip: str):
    np.savez(folder / "samples.npz", **samples)
    options = PtqOptions(method="max", skip=skip)
    return quantize(save(model, folder / "f.onnx"), folder / "int8.onnx", str(folder / "samples.npz"), options)


def test_kernels_that_are_transposed_reshaped_scaled_or_cast_are_quantized(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    tensorflow_kernels(g)
    model = g.model({"x": ["n", 8, 8, 3]}, {"y": ["n", 5]})
    samples = {"x": RNG.standard_normal((16, 8, 8, 3)).astype(np.float32)}
    done = quantized(model, samples, tmp_path)
    assert (done.quantized_layers, done.layers) == (4, 4)
    assert lint_file(done.path) == []
    exact, answer = as_exported(model, samples)[0], as_exported(onnx.load(done.path), samples)[0]
    assert sqnr_db(exact, answer) > 25


def test_a_head_that_shares_its_weights_with_an_embedding_is_quantized(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    tied(g)
    model = g.model({"ids": ["n", 7]}, {"y": ["n", 7, 50]}, dtype=TensorProto.INT64)
    samples = {"ids": RNG.integers(0, 50, (16, 7))}
    done = quantized(model, samples, tmp_path)
    assert (done.quantized_layers, done.layers) == (2, 2)
    exact, answer = as_exported(model, samples)[0], as_exported(onnx.load(done.path), samples)[0]
    assert sqnr_db(exact, answer) > 25
    precision = build(done.path, tmp_path / "p", BuildConfig(runtime="onnxruntime", timing_rounds=1)).manifest.precision
    assert (precision.quantized_layers, precision.weighted_layers) == (2, 2)


def test_layers_in_local_functions_are_quantized(tmp_path: Path) -> None:
    body = [helper.make_node("Gemm", ["a", "w"], ["p"], transB=1), helper.make_node("Relu", ["p"], ["r"])]
    function = helper.make_function("own", "Block", ["a", "w"], ["r"], body, [helper.make_opsetid("", 17)])
    g = GraphMaker(quantized=False)
    read = "x"
    for place in range(3):
        g.constant(values(16, 16), f"w{place}")
        g.nodes.append(helper.make_node("Block", [read, f"w{place}"], [f"h{place}"], domain="own"))
        read = f"h{place}"
    g.node("Identity", read, output="y")
    model = g.model({"x": ["n", 16]}, {"y": ["n", 16]})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    done = quantized(model, {"x": RNG.standard_normal((16, 16)).astype(np.float32)}, tmp_path)
    assert (done.quantized_layers, done.layers) == (3, 3)


def mixed(g: GraphMaker) -> onnx.ModelProto:
    """A layer to quantize, one to skip, one in FP16, an Einsum and an LSTM."""
    x = g.node("MatMul", "x", g.constant(values(16, 16)), name="kept")
    x = g.node("MatMul", x, g.constant(values(16, 16)), name="skipped")
    half = g.node("Cast", x, to=TensorProto.FLOAT16)
    half = g.node("MatMul", half, g.constant(values(16, 16).astype(np.float16)), name="half")
    x = g.node("Cast", half, to=TensorProto.FLOAT)
    x = g.node("Einsum", x, g.constant(values(16, 16)), equation="bnk,ko->bno", name="einsum")
    g.nodes.append(
        helper.make_node(
            "LSTM", [x, g.constant(values(1, 12, 16)), g.constant(values(1, 12, 3))], ["y"], hidden_size=3, name="lstm"
        )
    )
    return g.model({"x": ["n", 6, 16]}, {"y": ["n", 1, 6, 3]})


REASONS = {
    "skipped": "--skip names it",
    "half": "its weights are FLOAT16, not float32",
    "einsum": "Einsum has no explicit INT8",
    "lstm": "LSTM has no explicit INT8",
}


def test_what_stays_in_float_is_named_with_its_reason(tmp_path: Path) -> None:
    model = mixed(GraphMaker(quantized=False))
    done = quantized(model, {"x": RNG.standard_normal((16, 6, 16)).astype(np.float32)}, tmp_path, "skip*")
    assert (done.quantized_layers, done.layers) == (1, 5)
    assert done.left_float == REASONS
    command = ["quantize", str(tmp_path / "f.onnx"), "-o", str(tmp_path / "again.onnx"), "--skip", "skip*"]
    result = CliRunner().invoke(app, [*command, "--data", str(tmp_path / "samples.npz"), "--method", "max"])
    assert result.exit_code == 0, result.output
    for name, reason in REASONS.items():
        assert f"{name} stays in float: {reason}" in result.output


def test_a_model_of_which_nothing_can_be_quantized_is_refused_with_every_reason(tmp_path: Path) -> None:
    g = GraphMaker(quantized=False)
    g.node("Einsum", "x", g.constant(values(16, 8)), equation="nk,ko->no", output="y", name="einsum")
    with pytest.raises(QuantizationError, match="einsum stays in float: Einsum has no explicit INT8"):
        quantized(g.model({"x": ["n", 16]}, {"y": ["n", 8]}), {"x": values(8, 16)}, tmp_path)
