"""Q/DQ from dynamic ranges, its way back, and the one form that both ways of quantizing lead to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network
from trtdeploy.errors import ModelError, QuantizationError
from trtdeploy.onnxgraph.graph import Graph
from trtdeploy.onnxgraph.qdq.dynamic_ranges import DynamicRanges, parse_json
from trtdeploy.onnxgraph.qdq.int8_scales import weight_scale
from trtdeploy.onnxgraph.qdq.layers import count_quantized, quantized_nodes
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import (
    apply_ranges,
    canonical_qdq,
    quantize_with_ranges,
    ranges_of,
    without_qdq,
)
from trtdeploy.tensors import Array

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def equal_answers(first: onnx.ModelProto, second: onnx.ModelProto, inputs: dict[str, Array]) -> None:
    for one, other in zip(as_exported(first, inputs), as_exported(second, inputs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def images(model: onnx.ModelProto, batch: int = 3) -> dict[str, Array]:
    shape = [size.dim_value or batch for size in model.graph.input[0].type.tensor_type.shape.dim]
    return {model.graph.input[0].name: normal(*shape)}


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def classifier(qdq_onnx: Path) -> onnx.ModelProto:
    return onnx.load(qdq_onnx)


def test_ranges_and_explicit_lead_to_the_same_model_and_answers(classifier: onnx.ModelProto) -> None:
    explicit = classifier
    inputs = images(explicit)
    canonical = checked(canonical_qdq(explicit))
    from_ranges = checked(quantize_with_ranges(without_qdq(explicit), ranges_of(explicit)))
    assert from_ranges == canonical
    assert from_ranges != explicit
    equal_answers(canonical, explicit, inputs)
    equal_answers(from_ranges, explicit, inputs)
    assert canonical_qdq(canonical) == canonical
    assert canonical.metadata_props == explicit.metadata_props


def test_another_scale_leads_to_another_model(classifier: onnx.ModelProto) -> None:
    """So that the equality above means something."""
    explicit = classifier
    scales = dict(ranges_of(explicit).scales)
    scales["a1"] = np.nextafter(scales["a1"], np.float32(np.inf))
    assert quantize_with_ranges(without_qdq(explicit), DynamicRanges(scales)) != canonical_qdq(explicit)


def test_the_canonical_form_has_telling_names_before_the_first_reader(classifier: onnx.ModelProto) -> None:
    model = canonical_qdq(classifier)
    first = [(node.op_type, node.name, list(node.input)) for node in model.graph.node[:5]]
    assert first[:4] == [
        ("QuantizeLinear", "input.quantize", ["input", "input.scale", "input.zero_point"]),
        ("DequantizeLinear", "input.dequantize", ["input.quantized", "input.scale", "input.zero_point"]),
        ("QuantizeLinear", "w1.quantize", ["w1", "w1.scale", "w1.zero_point"]),
        ("DequantizeLinear", "w1.dequantize", ["w1.quantized", "w1.scale", "w1.zero_point"]),
    ]
    assert first[4][2] == ["input.dequantized", "w1.dequantized"]


def test_pairs_before_other_layers_stay_and_equal_ones_are_shared() -> None:
    """The block has pairs on both inputs of its addition and on a concatenation."""
    explicit = block_network()
    canonical = checked(canonical_qdq(explicit))
    equal_answers(canonical, explicit, images(explicit))
    before, after = count_quantized(explicit), count_quantized(canonical)
    assert after.quantized_layers == before.quantized_layers == 8
    assert after.pairs == 18  # of 20: two tensors had two pairs of the same scale
    adds = [node for node in canonical.graph.node if node.op_type == "Add"]
    assert all(name.endswith(".dequantized") for name in adds[-1].input)


def test_without_pairs_the_float_model_is_left() -> None:
    stripped = checked(without_qdq(block_network()))
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in stripped.graph.node}
    equal_answers(stripped, block_network(quantized=False), images(stripped))


def float_layer(
    build: Callable[[GraphMaker], str], shape: list[int | str], amax: float = 4.0
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    g = GraphMaker()
    build(g)
    model = onnx.shape_inference.infer_shapes(g.model({"x": shape}, {"y": None}))
    return model, checked(quantize_with_ranges(model, DynamicRanges.from_amax({"x": amax})))


def constant_node(g: GraphMaker, values: Array) -> str:
    return g.node("Constant", value=numpy_helper.from_array(values))


LAYERS: dict[str, tuple[Callable[[GraphMaker], str], list[int | str], int | None]] = {
    "conv": (lambda g: g.node("Conv", "x", g.constant(normal(6, 2, 3, 3)), output="y", group=2), ["n", 4, 5, 5], 0),
    "conv1d": (lambda g: g.node("Conv", "x", g.constant(normal(6, 4, 3)), output="y"), ["n", 4, 5], 0),
    "transposed": (
        lambda g: g.node("ConvTranspose", "x", g.constant(normal(4, 3, 3, 3)), output="y"),
        ["n", 4, 5, 5],
        None,
    ),
    "gemm": (lambda g: g.node("Gemm", "x", g.constant(normal(8, 5)), output="y"), ["n", 8], 1),
    "gemm^T": (lambda g: g.node("Gemm", "x", g.constant(normal(5, 8)), output="y", transB=1), ["n", 8], 0),
    "matmul": (lambda g: g.node("MatMul", "x", g.constant(normal(8, 5)), output="y"), ["n", 3, 8], 1),
    "batched": (lambda g: g.node("MatMul", "x", g.constant(normal(2, 8, 5)), output="y"), ["n", 2, 3, 8], 2),
    "left": (lambda g: g.node("MatMul", g.constant(normal(5, 8)), "x", output="y"), ["n", 8, 3], 0),
    "vector": (lambda g: g.node("MatMul", "x", g.constant(normal(8)), output="y"), ["n", 8], None),
    "Constant": (lambda g: g.node("Gemm", "x", constant_node(g, normal(8, 5)), output="y"), ["n", 8], 1),
    "Identity": (lambda g: g.node("Gemm", "x", g.node("Identity", g.constant(normal(8, 5))), output="y"), ["n", 8], 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_quantized_per_output_channel(name: str) -> None:
    build, shape, axis = LAYERS[name]
    model, quantized = float_layer(build, shape)
    assert list(quantized_nodes(quantized).values()) == [True]
    graph = Graph(quantized.graph)
    by_source = {node.input[0]: node for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    assert graph.constant(by_source.pop("x").input[1]) == np.float32(4 / 127)
    [(weight_name, node)] = by_source.items()
    scale, weight = graph.constant(node.input[1]), graph.constant(weight_name)
    assert scale is not None and weight is not None  # noqa: PT018
    assert {entry.name: entry.i for entry in node.attribute} == ({} if axis is None else {"axis": axis})
    others = tuple(i for i in range(weight.ndim) if i != axis)
    np.testing.assert_array_equal(scale, np.abs(weight).max(others) / np.float32(127))
    inputs = {"x": np.clip(normal(*(2 if size == "n" else int(size) for size in shape)), -4, 4)}
    [expected], [answer] = as_exported(model, inputs), as_exported(quantized, inputs)
    assert 0 < np.abs(answer - expected).max() < 0.1 * np.abs(expected).max()


def test_a_dead_channel_gets_a_small_positive_scale() -> None:
    weight = normal(3, 4)
    weight[1] = 0
    weight[2] = 1e-12
    scale = weight_scale(weight, 0)
    np.testing.assert_array_equal(scale[1:], np.float32(1e-8) / np.float32(127))
    _, quantized = float_layer(lambda g: g.node("Gemm", "x", g.constant(weight), transB=1, output="y"), ["n", 4])
    inputs = {"x": normal(2, 4)}
    assert not as_exported(quantized, inputs)[0][:, 1].any()
    assert np.isfinite(as_exported(quantized, inputs)[0]).all()


def test_an_axis_counted_from_the_end_is_the_same_axis() -> None:
    def build(axis: int) -> onnx.ModelProto:
        g = GraphMaker()
        weight = g.qdq(g.constant(np.ones((4, 4), np.float32)), np.float32([1, 2, 3, 4]), axis=axis)
        g.node("Gemm", g.qdq("x"), weight, transB=1, output="y")
        return g.model({"x": ["n", 4]}, {"y": ["n", 4]})

    assert canonical_qdq(build(-2)) == canonical_qdq(build(0)) != canonical_qdq(build(1))


def test_one_channel_is_quantized_per_tensor() -> None:
    _, quantized = float_layer(lambda g: g.node("Gemm", "x", g.constant(normal(4, 1)), output="y"), ["n", 4])
    assert all(not node.attribute for node in quantized.graph.node if node.op_type == "QuantizeLinear")


def two_layers(opset: int = 17) -> onnx.ModelProto:
    g = GraphMaker()
    first = g.node("Gemm", "x", g.constant(normal(4, 4), "w"), output="h")
    second = g.node("Gemm", g.node("Relu", first, output="r"), "w", output="z")
    g.node("Add", second, "r", output="y")
    return g.model({"x": ["n", 4]}, {"y": ["n", 4]}, opset=opset)


def test_layers_without_a_range_stay_float_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    ranges = DynamicRanges.from_amax({"r": 1.0, "h": 1.0, "elsewhere": 1.0})
    applied = apply_ranges(two_layers(), ranges)
    assert applied.quantized == ("z",)
    assert applied.left_float == {"h": "its input 'x' has no range"}
    assert applied.unknown == ("elsewhere",)
    with caplog.at_level(logging.WARNING):
        quantize_with_ranges(two_layers(), ranges)
    assert "1 of 3 tensors in the ranges are not in the model, for example elsewhere" in caplog.text
    assert "h stays in float: its input 'x' has no range" in caplog.text


def test_only_inputs_of_weighted_layers_are_quantized() -> None:
    model = two_layers()
    quantized = quantize_with_ranges(model, DynamicRanges.from_amax(dict.fromkeys("xhrzy", 2.0)))
    sources = [node.input[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    assert sources == ["x", "w", "r"]  # the shared weight has one pair
    [add] = [node for node in quantized.graph.node if node.op_type == "Add"]
    assert list(add.input) == ["z", "r"]


@pytest.mark.parametrize(
    ("amax", "message"),
    [
        ({"other": 1.0}, r"None of the 1 tensors .* they name 'other', the model has 'x', 'h', 'r', \.\.\."),
        ({"h": 1.0}, "quantize no layer of the model .h: its input 'x' has no range"),
    ],
)
def test_ranges_that_quantize_nothing_are_refused(amax: dict[str, float], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize_with_ranges(two_layers(), DynamicRanges.from_amax(amax))


def test_old_opsets_and_quantized_models_are_refused() -> None:
    ranges = DynamicRanges.from_amax({"x": 1.0, "input": 1.0})
    with pytest.raises(QuantizationError, match="uses opset 12") as caught:
        quantize_with_ranges(two_layers(opset=12), ranges)
    assert "newer opset" in str(caught.value)
    with pytest.raises(QuantizationError, match="quantized already") as caught:
        quantize_with_ranges(block_network(), ranges)
    assert "--precision explicit" in str(caught.value)
    checked(quantize_with_ranges(two_layers(opset=13), ranges))


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="not finite"):
        float_layer(lambda g: g.node("Gemm", "x", g.constant(np.full((4, 2), np.nan, np.float32)), output="y"), [1, 4])


def test_a_layer_of_two_constants_or_none_stays_float() -> None:
    g = GraphMaker()
    constant = g.constant(normal(4, 4))
    product = g.node("MatMul", constant, g.constant(normal(4, 4)), output="folded")
    g.node("Gemm", g.node("MatMul", "x", product), constant, output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    applied = apply_ranges(model, DynamicRanges.from_amax({"x": 1.0, "matmul3": 1.0}))
    assert applied.quantized == ("y",)
    assert applied.left_float == {"folded": "both of its inputs are constants"}


def test_taken_names_are_not_taken_twice() -> None:
    g = GraphMaker()
    g.constant(np.float32(2), "x.scale")
    g.node("Mul", g.node("Gemm", "x", g.constant(normal(4, 4))), "x.scale", output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    quantized = checked(quantize_with_ranges(model, DynamicRanges.from_amax({"x": 1.0})))
    assert quantized.graph.node[0].input[1] == "x.scale_2"


def test_two_scales_of_one_tensor_are_no_dynamic_range() -> None:
    g = GraphMaker()
    g.node("Add", g.qdq("x", 0.1), g.qdq("x", 0.2), output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    with pytest.raises(QuantizationError, match="'x' is quantized with two scales"):
        ranges_of(model)
    equal_answers(checked(canonical_qdq(model)), model, {"x": normal(2, 4)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": np.full(4, 0.1), "axis": 1}, "a scale per channel"),
        ({"zero": 3}, "not INT8 around zero-point 0"),
        ({"zero": 0, "dtype": "uint8"}, "not INT8 around zero-point 0"),
        ({"scale": 0.0}, "not float32, finite and positive"),
    ],
)
def test_other_pairs_are_no_dynamic_ranges_and_stay(arguments: dict[str, object], message: str) -> None:
    g = GraphMaker()
    g.node("Gemm", g.qdq("x", **arguments), g.weight(4, 4), transB=1, output="y")  # type: ignore[arg-type]
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    with pytest.raises(QuantizationError, match=message):
        ranges_of(model)
    canonical = checked(canonical_qdq(model))
    if "float32" not in message:  # what a scale of 0 gives is not defined
        equal_answers(canonical, model, {"x": normal(2, 4)})
    assert count_quantized(canonical).quantized_layers == 1
    checked(without_qdq(model))


def test_a_float_model_has_no_ranges_and_is_canonical() -> None:
    model = block_network(quantized=False)
    with pytest.raises(QuantizationError, match="no Q/DQ on an activation"):
        ranges_of(model)
    assert canonical_qdq(model).graph.node == model.graph.node


def stored_codes(bias: bool = False) -> onnx.ModelProto:
    """Weights as INT8 codes, a bias as INT32 codes: what ONNX Runtime's quantizer writes."""
    g = GraphMaker()
    codes = RNG.integers(-128, 128, (4, 8)).astype(np.int8)
    scale = g.constant(np.float32([0.01, 0.02, 0.03, 0.04]))
    weight = g.node("DequantizeLinear", g.constant(codes), scale, g.constant(np.zeros(4, np.int8)), axis=0)
    inputs = [g.qdq("x"), weight]
    if bias:
        inputs.append(g.node("DequantizeLinear", g.constant(np.int32([9, -9, 1000, 0])), scale, axis=0))
    g.node("Gemm", *inputs, transB=1, output="y")
    return g.model({"x": ["n", 8]}, {"y": ["n", 4]})


@pytest.mark.parametrize("bias", [False, True])
def test_stored_codes_become_floats_with_their_own_scale(bias: bool) -> None:
    model = stored_codes(bias)
    canonical = checked(canonical_qdq(model))
    equal_answers(canonical, model, {"x": normal(5, 8)})
    assert count_quantized(canonical).pairs == 2
    assert [node.op_type for node in canonical.graph.node][-1] == "Gemm"
    stripped = checked(without_qdq(model))
    assert [node.op_type for node in stripped.graph.node] == ["Gemm"]


def test_codes_from_elsewhere_cannot_be_taken_out() -> None:
    g = GraphMaker()
    g.node("DequantizeLinear", "x", g.constant(np.float32(0.1)), output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]}, dtype=TensorProto.INT8)
    with pytest.raises(QuantizationError, match="neither from a QuantizeLinear nor from a constant"):
        without_qdq(model)
    assert canonical_qdq(model) == model

    g = GraphMaker()
    codes, parameters, _ = g.quantize("x", 0.1)
    g.node("DequantizeLinear", codes, *parameters, output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    model.graph.output.append(helper.make_tensor_value_info(codes, TensorProto.INT8, ["n", 4]))
    with pytest.raises(QuantizationError, match="read by something else"):
        without_qdq(model)
    assert canonical_qdq(model) == model


def test_results_of_pairs_that_outputs_and_subgraphs_read() -> None:
    g = GraphMaker()
    g.constants.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    g.qdq("x", 0.1, output="y")
    inner = g.qdq("x", 0.2)
    info = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", [inner], ["r"])], "branch", [], [info])
    g.node("If", "yes", output="z", then_branch=branch, else_branch=branch)
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4], "z": ["n", 4]})
    inputs = {"x": normal(2, 4)}
    equal_answers(checked(canonical_qdq(model)), model, inputs)
    y, z = as_exported(checked(without_qdq(model)), inputs)
    np.testing.assert_array_equal(y, inputs["x"])
    np.testing.assert_array_equal(z, np.maximum(inputs["x"], 0))


def test_pairs_in_a_row() -> None:
    g = GraphMaker()
    g.qdq(g.qdq("x", 0.3), 0.2, output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    inputs = {"x": normal(2, 4)}
    equal_answers(checked(canonical_qdq(model)), model, inputs)
    np.testing.assert_array_equal(as_exported(without_qdq(model), inputs)[0], inputs["x"])


@pytest.mark.parametrize("scale", [np.float32([0.01, 0.02, 0.005, 0.1]), np.float32(0.02)])
def test_weight_scales_that_are_not_amax_are_kept_and_carried(scale: Array) -> None:
    """As after QAT, whose scales stand still while the weights move; and one scale for all of a weight."""
    g = GraphMaker()
    weight = g.qdq(g.constant(normal(4, 8), "w"), scale, axis=0 if scale.ndim else None)
    g.node("Gemm", g.qdq("x"), weight, transB=1, output="y")
    model = g.model({"x": ["n", 8]}, {"y": ["n", 4]})
    canonical = checked(canonical_qdq(model))
    equal_answers(canonical, model, {"x": normal(5, 8)})
    ranges = ranges_of(model)
    np.testing.assert_array_equal(ranges.weight_scales["w"], scale)
    assert quantize_with_ranges(without_qdq(model), parse_json(ranges.to_json())) == canonical
    without = DynamicRanges(ranges.scales)
    assert quantize_with_ranges(without_qdq(model), without) != canonical


def test_recorded_shapes_of_removed_tensors_go(classifier: onnx.ModelProto) -> None:
    stripped = without_qdq(onnx.shape_inference.infer_shapes(classifier))
    made = {name for node in stripped.graph.node for name in node.output}
    assert {value.name for value in stripped.graph.value_info} <= made


def test_usual_weight_scales_need_no_mention(classifier: onnx.ModelProto) -> None:
    assert not ranges_of(classifier).weight_scales


def test_given_weight_scales_must_fit() -> None:
    ranges = DynamicRanges({"x": np.float32(1)}, {"w": np.float32([1, 2, 3])})
    with pytest.raises(QuantizationError, match=r"3 scales for the weights 'w' of h, whose shape is \[4, 4\]"):
        quantize_with_ranges(two_layers(), ranges)


def test_a_weight_of_two_quantizers_is_no_range() -> None:
    g = GraphMaker()
    g.constant(normal(4, 4), "w")
    first = g.node("MatMul", g.qdq("x"), g.qdq("w", 0.1))
    g.node("MatMul", g.qdq(first), g.qdq("w", 0.2), output="y")
    model = g.model({"x": ["n", 4]}, {"y": ["n", 4]})
    with pytest.raises(QuantizationError, match="'w' is quantized in two ways"):
        ranges_of(model)


def test_the_given_model_is_left_as_it_was() -> None:
    model = block_network()
    before = model.SerializeToString(deterministic=True)
    canonical_qdq(model)
    without_qdq(model)
    ranges_of(model)
    assert model.SerializeToString(deterministic=True) == before
    plain = two_layers()
    before = plain.SerializeToString(deterministic=True)
    quantize_with_ranges(plain, DynamicRanges.from_amax({"x": 1.0}))
    assert plain.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("scale", [0.0, np.inf, np.nan, -1.0])
def test_a_scale_that_is_none_matters_only_where_a_layer_needs_it(scale: float) -> None:
    model = two_layers()
    first, second = (node.input[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul"))
    scales = {first: np.float32(0.1), second: np.float32(0.1)}
    unneeded = {"shape": np.float32(scale), model.graph.output[0].name: np.float32(scale)}
    applied = apply_ranges(model, DynamicRanges(scales, unusable=unneeded))
    assert len(applied.quantized) == 2
    with pytest.raises(QuantizationError, match=f"scale of tensor '{second}'.*must be finite and greater than 0"):
        apply_ranges(model, DynamicRanges({first: np.float32(0.1)}, unusable={second: np.float32(scale)}))
