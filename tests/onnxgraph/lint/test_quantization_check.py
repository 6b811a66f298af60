"""The gate before a TensorRT build: each rule on the smallest model that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.onnx_graphs import GraphMaker, block_network
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.lint.quantization_check import check_quantization, require_quantization
from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import canonical_qdq, quantize_with_ranges, ranges_of, without_qdq


def test_good_models_have_no_findings(qdq_onnx: Path) -> None:
    explicit = onnx.load(qdq_onnx)
    for model in (
        explicit,
        block_network(),
        block_network(quantized=False),
        canonical_qdq(block_network()),
        quantize_with_ranges(without_qdq(explicit), ranges_of(explicit)),
    ):
        assert check_quantization(model) == []
        require_quantization(model)


def layer(
    activation: Callable[[GraphMaker], str], weight: Callable[[GraphMaker], str], opset: int = 17
) -> onnx.ModelProto:
    g = GraphMaker()
    g.node("Gemm", activation(g), weight(g), transB=1, output="y")
    return g.model({"x": ["n", 4]}, {"y": ["n", 4]}, opset=opset)


def good_input(g: GraphMaker) -> str:
    return g.qdq("x")


def good_weight(g: GraphMaker) -> str:
    return g.weight(4, 4)


def weight(g: GraphMaker, scale: float | np.ndarray = 0.1, axis: int | None = None) -> str:
    return g.qdq(g.constant(np.ones((4, 4), np.float32)), scale, axis=axis)


def scale_from_the_input(g: GraphMaker) -> str:
    scale = g.node("ReduceMax", "x", keepdims=0)
    zero = g.constant(np.int8(0))
    return g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale, zero), scale, zero)


def no_zero_point(g: GraphMaker) -> str:
    scale = g.constant(np.float32(0.1))
    return g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale), scale)


CASES: dict[str, tuple[onnx.ModelProto, set[str], str]] = {
    "zero-point": (layer(lambda g: g.qdq("x", zero=3), good_weight), {"zero-point"}, r"not 0: \[3\]"),
    "uint8": (layer(lambda g: g.qdq("x", dtype="uint8"), good_weight), {"code-type"}, "silently takes as INT8"),
    "uint8 at 128": (
        layer(lambda g: g.qdq("x", zero=128, dtype="uint8"), good_weight),
        {"code-type", "zero-point"},
        "UINT8",
    ),
    "default": (layer(no_zero_point, good_weight), {"code-type"}, "codes are UINT8"),
    "int16": (layer(lambda g: g.qdq("x", dtype="int16"), good_weight, opset=21), {"code-type"}, "INT16"),
    "zero scale": (layer(lambda g: g.qdq("x", 0.0), good_weight), {"scale-value"}, "1 of 1 scales"),
    "negative": (layer(lambda g: g.qdq("x", -0.1), good_weight), {"scale-value"}, "finite and positive"),
    "nan": (layer(lambda g: g.qdq("x", np.nan), good_weight), {"scale-value"}, "nan"),
    "dead channel": (
        layer(good_input, lambda g: weight(g, np.float32([0.1, 0, np.inf, 1]), axis=0)),
        {"scale-value"},
        "2 of 4 scales",
    ),
    "activation": (
        layer(lambda g: g.qdq("x", np.full(4, 0.1), axis=1), good_weight),
        {"activation-per-channel"},
        "'x' is no constant but has 4 scales",
    ),
    "axis": (layer(good_input, lambda g: weight(g, np.full(4, 0.1), axis=1)), {"weight-axis"}, "axis 1.* of Gemm y"),
    "axis of -1": (layer(good_input, lambda g: weight(g, np.full(4, 0.1), axis=-1)), {"weight-axis"}, "axis -1"),
    "size": (layer(good_input, lambda g: weight(g, np.full(3, 0.1), axis=0)), {"scale-size"}, "do not fit axis 0"),
    "run time": (layer(scale_from_the_input, good_weight), {"run-time-scale"}, "not a constant"),
    "opset": (layer(good_input, good_weight, opset=12), {"opset"}, "opset 12 knows no axis"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_breaks_a_rule_is_found_at_its_node(name: str) -> None:
    model, rules, reason = CASES[name]
    findings = check_quantization(model)
    assert {finding.rule for finding in findings} == rules
    nodes = {output for node in model.graph.node for output in node.output if node.op_type.endswith("Linear")}
    assert {finding.node for finding in findings} <= nodes
    with pytest.raises(QuantizationError, match=reason) as caught:
        require_quantization(model)
    for finding in findings:
        assert f"{finding.node}: {finding.reason} [{finding.rule}]" in caught.value.message
        assert finding.remedy in str(caught.value)


@pytest.mark.parametrize(
    "op", ["QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"]
)
def test_integer_ops_are_findings(op: str) -> None:
    g = GraphMaker()
    g.nodes.append(onnx.helper.make_node(op, ["x"], ["y"], name="culprit"))
    [finding] = check_quantization(g.model({"x": [4]}, {"y": [4]}))
    assert (finding.rule, finding.node) == ("integer-op", "culprit")
    assert op in finding.reason


def test_the_axis_is_followed_through_a_transpose() -> None:
    def build(axis: int) -> onnx.ModelProto:
        g = GraphMaker()
        codes = weight(g, np.full(4, 0.1), axis=axis)
        g.node("MatMul", g.qdq("x"), g.node("Transpose", codes, perm=[1, 0]), output="y")
        return g.model({"x": ["n", 4]}, {"y": ["n", 4]})

    assert check_quantization(build(0)) == []
    assert {finding.rule for finding in check_quantization(build(1))} == {"weight-axis"}


def convolution(op: str, axis: int) -> onnx.ModelProto:
    g = GraphMaker()
    kernel = g.qdq(g.constant(np.ones((4, 4, 4, 4), np.float32)), np.full(4, 0.1), axis=axis)
    g.node(op, g.qdq("x"), kernel, output="y")
    return g.model({"x": ["n", 4, 4, 4]}, {"y": None})


def test_convolutions_have_their_own_axis() -> None:
    assert check_quantization(convolution("Conv", 0)) == []
    assert {finding.rule for finding in check_quantization(convolution("Conv", 1))} == {"weight-axis"}


@pytest.mark.parametrize("axis", [0, 1])
def test_neither_axis_of_a_transposed_convolution_is_refused(axis: int) -> None:
    assert check_quantization(convolution("ConvTranspose", axis)) == []
    assert {finding.rule for finding in check_quantization(convolution("ConvTranspose", 2))} == {"weight-axis"}


def test_one_scale_in_a_vector_is_per_tensor() -> None:
    assert check_quantization(layer(lambda g: g.qdq("x", np.float32([0.1])), good_weight)) == []


def test_the_parser_of_tensorrt_rtx_agrees_where_it_refuses() -> None:
    """What it takes silently is why the gate is there."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)

    def parses(model: onnx.ModelProto) -> bool:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return bool(trt.OnnxParser(network, logger).parse(model.SerializeToString()))

    assert parses(layer(good_input, good_weight))
    for refused in ("zero-point", "zero scale", "negative", "dead channel"):
        assert not parses(CASES[refused][0]), refused
    for silent in ("uint8", "activation", "run time"):
        assert parses(CASES[silent][0]), silent


def test_ranges_never_lead_to_findings() -> None:
    g = GraphMaker()
    g.node("MatMul", "x", g.constant(np.zeros((4, 4), np.float32)), output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    assert check_quantization(quantize_with_ranges(model, DynamicRanges.from_amax({"x": 1e-30}))) == []
