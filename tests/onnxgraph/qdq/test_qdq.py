"""Folding Q/DQ of constants: exactly the numbers that ONNX Runtime's own operators give."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network
from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.graph import fold_weights, remove_unused
from trtdeploy.onnxgraph.qdq.layers import count_quantized

SETTINGS = settings(max_examples=80, deadline=None)
FLOATS = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(2.0**-10, 16.0, width=32)


@st.composite
def quantized_constants(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int | None]:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    weights = draw(hnp.arrays(np.float32, shape, elements=FLOATS))
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1))
    parameters = () if axis is None else (shape[axis],)
    scale = draw(hnp.arrays(np.float32, parameters, elements=SCALES))
    dtype = draw(st.sampled_from([np.int8, np.uint8]))
    zero = draw(hnp.arrays(dtype, parameters))
    if draw(st.booleans()):  # ties between two codes
        weights = np.rint(weights * 2) / 2 * (scale if axis is None else 1)
    return weights.astype(np.float32), scale, zero, axis


def folded_equals_runtime(model: onnx.ModelProto, folds: int, inputs: dict[str, Any] | None = None) -> onnx.ModelProto:
    folded, count = fold_weights(model)
    assert count == folds
    for output, expected in zip(as_exported(folded, inputs or {}), as_exported(model, inputs or {}), strict=True):
        np.testing.assert_array_equal(output, expected)
        assert output.dtype == expected.dtype
    return folded


@SETTINGS
@given(quantized_constants())
@example((np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5], np.float32), np.float32(1), np.int8(0), None))
@example((np.array([0.5, 1.5, 254.5, 255.5, -3.0], np.float32), np.float32(1), np.uint8(1), None))
@example((np.array([[1e30, -1e30], [np.inf, -np.inf]], np.float32), np.ones(2, np.float32), np.int8([3, -3]), 0))
def test_folded_weights_are_those_of_the_runtime(case: tuple[np.ndarray, np.ndarray, np.ndarray, int | None]) -> None:
    weights, scale, zero, axis = case
    g = GraphMaker()
    parameters = [g.constant(scale), g.constant(zero)]
    attributes = {} if axis is None else {"axis": axis}
    codes = g.node("QuantizeLinear", g.constant(weights), *parameters, **attributes)
    g.node("DequantizeLinear", codes, *parameters, output="y", **attributes)
    folded = folded_equals_runtime(g.model({}, {"y": weights.shape}), 1)
    assert not folded.graph.node
    assert [tensor.name for tensor in folded.graph.initializer] == ["y"]


@SETTINGS
@given(
    codes=hnp.arrays(st.sampled_from([np.int8, np.uint8]), hnp.array_shapes(min_dims=2, max_dims=3, max_side=4)),
    axis=st.none() | st.integers(0, 1),
    data=st.data(),
)
def test_folded_codes_are_those_of_the_runtime(codes: np.ndarray, axis: int | None, data: st.DataObject) -> None:
    parameters = () if axis is None else (codes.shape[axis],)
    g = GraphMaker()
    scale = g.constant(data.draw(hnp.arrays(np.float32, parameters, elements=SCALES)))
    zero = g.constant(data.draw(hnp.arrays(codes.dtype, parameters)))
    attributes = {} if axis is None else {"axis": axis}
    g.node("DequantizeLinear", g.constant(codes), scale, zero, output="y", **attributes)
    folded_equals_runtime(g.model({}, {"y": codes.shape}), 1)


@given(hnp.arrays(np.int32, 5, elements=st.integers(-(2**31), 2**31 - 1)), SCALES)
@SETTINGS
def test_a_bias_of_int32_codes_is_folded(codes: np.ndarray, scale: float) -> None:
    g = GraphMaker()
    g.node("DequantizeLinear", g.constant(codes), g.constant(np.float32(scale)), output="y")
    folded_equals_runtime(g.model({}, {"y": [5]}), 1)


def test_without_a_zero_point_the_codes_are_unsigned() -> None:
    g = GraphMaker()
    scale = g.constant(np.float32(0.5))
    codes = g.node("QuantizeLinear", g.constant(np.array([-3, 0.25, 0.75, 200], np.float32)), scale)
    g.node("DequantizeLinear", codes, scale, output="y")
    folded = folded_equals_runtime(g.model({}, {"y": [4]}), 1)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(folded.graph.initializer[0]), [0, 0, 1, 127.5])


def test_the_two_scales_of_a_pair_may_differ() -> None:
    g = GraphMaker()
    zero = g.constant(np.int8(2))
    codes = g.node("QuantizeLinear", g.constant(np.array([1, 2, 3], np.float32)), g.constant(np.float32(0.5)), zero)
    g.node("DequantizeLinear", codes, g.constant(np.float32(0.25)), zero, output="y")
    folded_equals_runtime(g.model({}, {"y": [3]}), 1)


def test_a_scale_of_zero_gives_what_the_runtime_gives() -> None:
    """A pruned channel: all its weights and its scale are zero."""
    g = GraphMaker()
    parameters = [g.constant(np.array([0, 1], np.float32)), g.constant(np.zeros(2, np.int8))]
    codes = g.node("QuantizeLinear", g.constant(np.array([[0, 0], [1, 2]], np.float32)), *parameters, axis=0)
    g.node("DequantizeLinear", codes, *parameters, axis=0, output="y")
    folded_equals_runtime(g.model({}, {"y": [2, 2]}), 0)


@pytest.mark.parametrize("opset", [10, 13, 17, 19, 21])
def test_every_opset_that_exporters_write(opset: int) -> None:
    g = GraphMaker()
    if opset < 13:  # per tensor only
        g.qdq(g.constant(np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)), 0.02, output="y")
    else:
        weights = g.constant(np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4))
        g.qdq(weights, np.array([0.01, 0.02, 0.03]), axis=0, output="y")
    folded_equals_runtime(g.model({}, {"y": [3, 4]}, opset=opset), 1)


def test_blocks_of_newer_opsets_are_left_to_the_runtime() -> None:
    g = GraphMaker()
    parameters = [g.constant(np.full((2, 4), 0.1, np.float32)), g.constant(np.zeros((2, 4), np.int8))]
    codes = g.node("QuantizeLinear", g.constant(np.ones((4, 4), np.float32)), *parameters, axis=0, block_size=2)
    g.node("DequantizeLinear", codes, *parameters, axis=0, block_size=2, output="y")
    folded_equals_runtime(g.model({}, {"y": [4, 4]}, opset=21), 0)


def test_a_type_that_only_an_attribute_names_is_left_to_the_runtime() -> None:
    g = GraphMaker()
    scale = g.constant(np.float32(0.5))
    weights = g.constant(np.array([-3, 0.25, 200], np.float32))
    codes = g.node("QuantizeLinear", weights, scale, output_dtype=TensorProto.INT8)
    g.node("DequantizeLinear", codes, scale, output="y")
    folded_equals_runtime(g.model({}, {"y": [3]}, opset=21), 0)


def test_constant_nodes_count_as_constants() -> None:
    g = GraphMaker()
    weights = onnx.numpy_helper.from_array(np.array([1, -2, 3], np.float32))
    tensor = g.node("Constant", value=weights)
    scale = g.node("Constant", value=onnx.numpy_helper.from_array(np.float32(0.02).reshape(())))
    zero = g.node("Constant", value=onnx.numpy_helper.from_array(np.int8(0).reshape(())))
    g.node("DequantizeLinear", g.node("QuantizeLinear", tensor, scale, zero), scale, zero, output="y")
    assert not folded_equals_runtime(g.model({}, {"y": [3]}), 1).graph.node


def test_activations_keep_their_pairs_and_the_answers_stay() -> None:
    model = block_network()
    inputs = {"input": np.random.default_rng(0).standard_normal((7, 3, 12, 12)).astype(np.float32)}
    folded = folded_equals_runtime(model, 8, inputs)
    pairs = sum(node.op_type == "DequantizeLinear" for node in model.graph.node)
    left = [node for node in folded.graph.node if node.op_type == "DequantizeLinear"]
    assert len(left) == pairs - 8
    names = {tensor.name for tensor in folded.graph.initializer}
    makers = {node.output[0]: node for node in folded.graph.node}
    assert all(makers[node.input[0]].op_type == "QuantizeLinear" for node in left)
    assert not any(makers[node.input[0]].input[0] in names for node in left)


def test_the_given_model_is_not_changed() -> None:
    model = block_network()
    content = model.SerializeToString()
    fold_weights(model)
    assert model.SerializeToString() == content


def test_a_dynamic_scale_is_not_folded() -> None:
    g = GraphMaker()
    zero = g.constant(np.int8(0))
    codes = g.node("QuantizeLinear", g.constant(np.ones(3, np.float32)), "scale", zero)
    g.node("DequantizeLinear", codes, "scale", zero, output="y")
    folded_equals_runtime(g.model({"scale": []}, {"y": [3]}), 0, {"scale": np.array(0.5, np.float32)})


def test_codes_that_are_also_an_output_stay() -> None:
    g = GraphMaker()
    scale, zero = g.constant(np.float32(0.5)), g.constant(np.int8(0))
    g.node("QuantizeLinear", g.constant(np.array([1, 2, 3], np.float32)), scale, zero, output="codes")
    g.node("DequantizeLinear", "codes", scale, zero, output="y")
    model = g.model({}, {"y": [3]})
    model.graph.output.append(helper.make_tensor_value_info("codes", TensorProto.INT8, [3]))
    folded_equals_runtime(model, 1)


def model_with_subgraph(read: list[str]) -> onnx.ModelProto:
    """A folded weight, and an If two levels deep whose inner branch reads ``read`` of the enclosing graph."""
    g = GraphMaker()
    g.constant(np.array([1, -2, 3], np.float32), "w")
    g.constant(np.float32(0.02), "scale")
    g.constant(np.int8(0), "zero")
    g.constant(np.float32(7), "unused")
    g.constants.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    g.node("QuantizeLinear", "w", "scale", "zero", output="codes")
    g.node("DequantizeLinear", "codes", "scale", "zero", output="values")
    info = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    inner = helper.make_graph([helper.make_node("Sum", read, ["inner"])], "inner_graph", [], [info])
    middle_info = helper.make_tensor_value_info("middle", TensorProto.FLOAT, None)
    middle = helper.make_graph(
        [helper.make_node("If", ["yes"], ["middle"], then_branch=inner, else_branch=inner)],
        "middle_graph",
        [],
        [middle_info],
    )
    g.node("If", "yes", output="z", then_branch=middle, else_branch=middle)
    g.node("Add", "x", "values", output="y")
    return g.model({"x": [3]}, {"y": [3], "z": None})


@pytest.mark.parametrize("read", [["w"], ["values"], ["w", "scale"]])
def test_what_only_subgraphs_read_is_left_in_place(read: list[str]) -> None:
    model = model_with_subgraph(read)
    folded = folded_equals_runtime(model, 1, {"x": np.ones(3, np.float32)})
    names = {tensor.name for tensor in folded.graph.initializer}
    assert names >= set(read) - {"values"}
    assert "unused" not in names
    assert "zero" not in names


def test_remove_unused_drops_chains_and_keeps_what_outputs_need() -> None:
    g = GraphMaker()
    g.constant(np.ones(3, np.float32), "needed")
    g.constant(np.ones(3, np.float32), "dead")
    g.node("Add", "x", "needed", output="y")
    g.node("Relu", g.node("Add", "x", "dead"))
    model = g.model({"x": [3]}, {"y": [3]})
    remove_unused(model.graph)
    assert [node.output[0] for node in model.graph.node] == ["y"]
    assert [tensor.name for tensor in model.graph.initializer] == ["needed"]


def test_a_scale_that_does_not_fit_its_axis_is_a_model_error() -> None:
    g = GraphMaker()
    parameters = [g.constant(np.ones(3, np.float32)), g.constant(np.zeros(3, np.int8))]
    g.node("DequantizeLinear", g.constant(np.ones((2, 4), np.int8)), *parameters, axis=1, output="y")
    with pytest.raises(ModelError, match=r"shape \[3\] does not fit axis 1 of \[2, 4\]"):
        fold_weights(g.model({}, {"y": [2, 4]}))


def test_layers_count_as_quantized_only_with_both_sides_through_q_dq() -> None:
    g = GraphMaker()
    weight = g.weight(4, 4)
    plain = g.constant(np.ones((4, 4), np.float32))
    both = g.node("MatMul", g.qdq("x"), weight)
    weight_only = g.node("MatMul", both, weight)
    neither = g.node("MatMul", weight_only, plain)
    g.node("MatMul", neither, neither, output="y")
    count = count_quantized(g.model({"x": [4, 4]}, {"y": [4, 4]}))
    assert (count.weighted_layers, count.quantized_layers, count.pairs) == (3, 1, 2)
