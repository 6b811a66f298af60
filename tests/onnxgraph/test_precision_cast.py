"""FP16 and BF16 around Q/DQ: answers in ONNX Runtime, types in TensorRT-RTX's parser and builder."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network, doubling
from trtdeploy.errors import ModelError, RuntimeUnavailableError
from trtdeploy.onnxgraph.graph import Graph, fold_weights, with_named_nodes
from trtdeploy.onnxgraph.lint.quantization_check import check_quantization
from trtdeploy.onnxgraph.macs import macs_by_node
from trtdeploy.onnxgraph.precision_cast import cast_unquantized
from trtdeploy.onnxgraph.qdq.layers import count_quantized, quantized_nodes
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import canonical_qdq
from trtdeploy.tensors import Array

RNG = np.random.default_rng(0)
NAMES = ["classifier", "canonical", "block", "float block"]
HAS_MODELOPT = all(importlib.util.find_spec(name) is not None for name in ("modelopt", "onnx_graphsurgeon"))
bf16 = pytest.param("bf16", marks=pytest.mark.skipif(not HAS_MODELOPT, reason="needs nvidia-modelopt[onnx]"))


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, qdq_onnx: Path) -> onnx.ModelProto:
    if request.param in ("classifier", "canonical"):
        explicit = onnx.load(qdq_onnx)
        return explicit if request.param == "classifier" else canonical_qdq(explicit)
    return block_network(quantized=request.param == "block")


def images(model: onnx.ModelProto) -> dict[str, Array]:
    shape = [size.dim_value or 4 for size in model.graph.input[0].type.tensor_type.shape.dim]
    return {"input": RNG.standard_normal(shape).astype(np.float32)}


def test_answers_stay_close_and_types_of_inputs_and_outputs_the_same(model: onnx.ModelProto) -> None:
    cast = cast_unquantized(model, "fp16")
    onnx.checker.check_model(cast, full_check=True)
    assert cast.graph.input == model.graph.input
    assert cast.graph.output == model.graph.output
    assert cast.metadata_props == model.metadata_props
    inputs = images(model)
    for answer, expected in zip(as_exported(cast, inputs), as_exported(model, inputs), strict=True):
        assert answer.dtype == np.float32
        error = np.sqrt(np.mean((answer - expected) ** 2)) / expected.std()
        assert 0 < error < (0.03 if count_quantized(model).pairs else 0.003)


@pytest.mark.parametrize("precision", ["fp16", bf16])
def test_everything_but_codes_is_cast(model: onnx.ModelProto, precision: Any) -> None:
    cast = onnx.shape_inference.infer_shapes(cast_unquantized(model, precision), strict_mode=True, check_type=True)
    wanted = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    outside = {value.name for value in [*cast.graph.input, *cast.graph.output]}
    inner = {value.type.tensor_type.elem_type for value in cast.graph.value_info if value.name not in outside}
    assert inner <= {wanted, TensorProto.INT8}
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in cast.graph.initializer}
    assert count_quantized(cast) == count_quantized(model)
    assert check_quantization(cast) == []


@pytest.mark.parametrize("precision", ["fp16", bf16])
def test_codes_of_the_weights_are_those_of_the_float_model(qdq_onnx: Path, precision: Any) -> None:
    """From weights and scales in a narrower type they would be others."""
    model = onnx.load(qdq_onnx)
    folded, _ = fold_weights(model)
    float_graph, graph = Graph(folded.graph), Graph(cast_unquantized(model, precision).graph)
    for name in ("w1", "w2", "w3"):
        values, codes = float_graph.constant(f"{name}.dq"), graph.constant(f"{name}.q")
        scale = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == f"{name}.scale")
        assert values is not None and codes is not None  # noqa: PT018
        assert codes.dtype == np.int8
        np.testing.assert_array_equal(codes, np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))))


@pytest.mark.parametrize("quantized", [True, False])
def test_names_of_layers_stay_those_that_other_parts_use(quantized: bool) -> None:
    """The pass renames graph outputs, after which nodes without a name are called."""
    model = block_network(quantized=quantized)
    cast = cast_unquantized(model, "fp16")
    assert quantized_nodes(cast) == quantized_nodes(with_named_nodes(model))
    shape = {"input": (2, 3, 12, 12)}
    assert macs_by_node(cast, shape) == macs_by_node(model, shape)


def test_opsets_are_raised_only_where_scales_need_it() -> None:
    assert cast_unquantized(block_network(), "fp16").opset_import[0].version == 19
    assert cast_unquantized(block_network(quantized=False), "fp16").opset_import[0].version == 17


def test_the_given_model_is_left_as_it_was() -> None:
    model = block_network()
    before = model.SerializeToString(deterministic=True)
    cast_unquantized(model, "fp16")
    assert model.SerializeToString(deterministic=True) == before


def test_scales_too_small_for_fp16_are_warned_of_and_stay_positive(caplog: pytest.LogCaptureFixture) -> None:
    g = GraphMaker()
    weight = g.qdq(g.constant(np.zeros((2, 4), np.float32)), np.float32([1e-10, 0.1]), axis=0)
    g.node("Gemm", g.qdq("x"), weight, transB=1, output="y")
    with caplog.at_level(logging.WARNING):
        cast = cast_unquantized(g.model({"x": ["n", 4]}, {"y": ["n", 2]}), "fp16")
    assert "1 scales are too small for FP16" in caplog.text
    assert check_quantization(cast) == []


def test_an_op_that_fp16_does_not_suit_gets_casts_of_its_own() -> None:
    g = GraphMaker()
    g.node("CumSum", g.node("Mul", "x", "x"), g.constant(np.int64(1)), output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    cast = cast_unquantized(model, "fp16")
    onnx.checker.check_model(cast, full_check=True)
    inputs = {"x": np.float32([[1, 2, 3, 4]])}
    np.testing.assert_array_equal(as_exported(cast, inputs)[0], [[1, 5, 14, 30]])


def test_a_model_without_floats_has_nothing_to_cast() -> None:
    with pytest.raises(ModelError, match="found nothing to cast"):
        cast_unquantized(doubling(dtype=TensorProto.INT32), "fp16")


def test_what_the_pass_or_the_converter_refuses_is_a_model_error() -> None:
    g = GraphMaker()
    g.node("Mystery", g.qdq("x"), output="y", domain="elsewhere")
    model = g.model({"x": [4]}, {"y": [4]})
    with pytest.raises(ModelError, match="opset 17 and cannot be converted to 19"):
        cast_unquantized(model, "fp16")


@pytest.mark.parametrize(
    ("precision", "module", "install"),
    [
        ("bf16", "modelopt.onnx.autocast", "pip install 'nvidia-modelopt.onnx.'"),
        ("fp16", "onnxruntime.transformers.float16", "pip install onnxruntime"),
    ],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, precision: Any, module: str, install: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailableError, match=install):
        cast_unquantized(block_network(), precision)


@pytest.mark.parametrize("precision", ["fp16", bf16])
def test_tensorrt_rtx_takes_the_types_from_the_model(model: onnx.ModelProto, precision: Any) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = cast_unquantized(model, precision)
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    wanted = {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}[precision]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    weighted = (trt.LayerType.CONVOLUTION, trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.DEQUANTIZE)
    types = {layer.get_output(0).dtype for layer in layers if layer.type in weighted}
    assert types == {wanted}
    assert network.get_input(0).dtype == network.get_output(0).dtype == trt.DataType.FLOAT
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    sample = tuple(network.get_input(0).shape)[1:]
    profile.set_shape("input", (1, *sample), (2, *sample), (4, *sample))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
