"""Moving Q/DQ pairs into the blocked layout changes no bit, and leaves alone what it must not touch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, as_exported, block_network
from trtdeploy.runtimes.onnxruntime.building.blocked_layout import (
    known_shapes,
    quantize_in_blocked_layout,
    read_channels_last,
    uses_blocked_layout,
)
from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for

OPTIMIZE = {tactic.name: tactic.compile for tactic in tactics_for(True)}


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes with weights folded and the Q/DQ of activations kept."""
    content = OPTIMIZE["float-weights"](model)
    assert content is not None
    return onnx.load_model_from_string(content)


def image(batch: int, channels: int = 3) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(batch).standard_normal((batch, channels, 12, 12)).astype(np.float32)}


def two_convolutions(
    between: Callable[[GraphMaker, str], str], channels: int = 20, outputs: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """Conv, Relu, what ``between`` adds, Conv -> "y"; more outputs by name."""
    g = GraphMaker()
    first = g.node("Relu", g.conv("input", 3, channels, kernel=3))
    g.node("Relu", g.conv(between(g, first), channels, 9, kernel=3), output="y")
    model = g.model({"input": ["batch", 3, 12, 12]}, {"y": ["batch", 9, 12, 12]})
    for name in outputs:
        kind = TensorProto.INT8 if name == "codes" else TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(name, kind, ["batch", None, 12, 12]))
    return model


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("channels", [8, 16, 17, 20, 27, 33])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_rewritten_network_is_bit_identical(channels: int, batch: int) -> None:
    before = optimized(block_network(channels=channels))
    after, count = quantize_in_blocked_layout(before)
    assert uses_blocked_layout(after)
    assert (count > 0) == (channels % 4 == 0)  # ONNX Runtime itself blocks only channels in multiples of four
    for expected, output in zip(as_exported(before, image(batch)), as_exported(after, image(batch)), strict=True):
        np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("channels", [16, 20])
@pytest.mark.parametrize(("dtype", "zero"), [("int8", 0), ("uint8", 0), ("int8", 3), ("uint8", 128)])
def test_a_pair_between_two_convolutions_loses_its_conversions(channels: int, dtype: str, zero: int) -> None:
    model = two_convolutions(lambda g, x: g.qdq(x, zero=zero, dtype=dtype), channels)
    before = optimized(model)
    after, count = quantize_in_blocked_layout(before)
    assert count == 1
    assert kinds(before)["ReorderInput"] - kinds(after)["ReorderInput"] == 1
    assert kinds(before)["ReorderOutput"] - kinds(after)["ReorderOutput"] == 1
    np.testing.assert_array_equal(as_exported(after, image(3))[0], as_exported(before, image(3))[0])


def test_the_given_model_is_not_changed() -> None:
    before = optimized(two_convolutions(lambda g, x: g.qdq(x)))
    content = before.SerializeToString()
    quantize_in_blocked_layout(before)
    assert before.SerializeToString() == content


def two_readers(g: GraphMaker, x: str) -> str:
    return g.qdq(x, output="values")


def codes_visible(g: GraphMaker, x: str) -> str:
    scale, zero = g.constant(np.float32(0.03)), g.constant(np.int8(0))
    g.node("QuantizeLinear", x, scale, zero, output="codes")
    return g.node("DequantizeLinear", "codes", scale, zero)


def also_read_elsewhere(g: GraphMaker, x: str) -> str:
    values = g.qdq(x)
    g.node("Softmax", values, axis=1, output="elsewhere")
    return values


def per_channel(g: GraphMaker, x: str) -> str:
    return g.qdq(x, np.linspace(0.01, 0.05, 20), axis=1)


@pytest.mark.parametrize(
    ("between", "outputs"),
    [
        pytest.param(per_channel, (), id="per-channel"),
        pytest.param(two_readers, ("values",), id="values-are-an-output"),
        pytest.param(codes_visible, ("codes",), id="codes-are-an-output"),
        pytest.param(also_read_elsewhere, ("elsewhere",), id="another-reader"),
    ],
)
def test_pairs_that_depend_on_the_order_or_are_seen_elsewhere_stay(
    between: Callable[[GraphMaker, str], str], outputs: tuple[str, ...]
) -> None:
    model = two_convolutions(between, outputs=outputs)
    before = optimized(model)
    assert kinds(before)["ReorderOutput"] > 0, "the network must offer something to move"
    after, count = quantize_in_blocked_layout(before)
    assert count == 0
    assert after == before
    for output, expected in zip(as_exported(after, image(2)), as_exported(model, image(2)), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=0.05)


def hand_made(reader_in_subgraph: str | None) -> onnx.ModelProto:
    """ReorderOutput, Q, DQ, ReorderInput as the optimizer leaves them; a subgraph may read one of the tensors."""
    g = GraphMaker()
    blocked = {"domain": "com.microsoft.nchwc"}
    g.node("ReorderInput", "input", output="blocked", **blocked)
    g.node("ReorderOutput", "blocked", output="plain", channels=16, **blocked)
    scale, zero = g.constant(np.float32(0.03)), g.constant(np.int8(0))
    g.node("QuantizeLinear", "plain", scale, zero, output="codes")
    g.node("DequantizeLinear", "codes", scale, zero, output="values")
    g.node("ReorderInput", "values", output="again", **blocked)
    g.node("ReorderOutput", "again", output="y", channels=16, **blocked)
    if reader_in_subgraph is not None:
        g.constants.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        inner = [helper.make_node("Cast", [reader_in_subgraph], ["inner"], to=TensorProto.FLOAT)]
        info = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
        branch = helper.make_graph(inner, "branch", [], [info])
        g.node("If", "yes", output="z", then_branch=branch, else_branch=branch)
    outputs = {"y": ["batch", 16, 12, 12]} | ({"z": ["batch", 16, 12, 12]} if reader_in_subgraph else {})
    model = g.model({"input": ["batch", 16, 12, 12]}, outputs)
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    return model


def test_a_hand_made_pair_is_moved() -> None:
    model = hand_made(None)
    after, count = quantize_in_blocked_layout(model)
    assert count == 1
    assert kinds(after) == {"ReorderInput": 1, "QuantizeLinear": 1, "DequantizeLinear": 1, "ReorderOutput": 1}
    np.testing.assert_array_equal(as_exported(after, image(2, 16))[0], as_exported(model, image(2, 16))[0])


@pytest.mark.parametrize("tensor", ["codes", "values"])
def test_a_pair_that_a_subgraph_reads_stays(tensor: str) -> None:
    model = hand_made(tensor)
    after, count = quantize_in_blocked_layout(model)
    assert count == 0
    for output, expected in zip(as_exported(after, image(2, 16)), as_exported(model, image(2, 16)), strict=True):
        np.testing.assert_array_equal(output, expected)


def test_a_channels_last_conversion_stays() -> None:
    model = hand_made(None)
    next(node for node in model.graph.node if node.op_type == "ReorderOutput").attribute.append(
        helper.make_attribute("channels_last", 1)
    )
    assert quantize_in_blocked_layout(model)[1] == 0


def residual_blocks(*, broadcast: bool = False, channels: int = 20) -> onnx.ModelProto:
    """Two blocks, each with a shortcut through Q/DQ, as TensorRT wants it; or with something broadcast in its place."""
    g = GraphMaker()
    features = g.node("Relu", g.conv("input", 3, channels, kernel=3))
    for _ in range(2):
        shortcut = g.qdq(features)
        branch = g.conv(shortcut, channels, channels, kernel=3)
        other = g.qdq(g.conv(g.node("GlobalAveragePool", shortcut), channels, channels)) if broadcast else shortcut
        features = g.node("Relu", g.node("Add", branch, other))
    g.node("Relu", g.conv(g.qdq(features), channels, 9), output="y")
    return g.model({"input": ["batch", 3, 12, 12]}, {"y": ["batch", 9, 12, 12]})


@pytest.mark.parametrize("channels", [16, 20])
@pytest.mark.parametrize("batch", [1, 3])
def test_additions_of_equal_shapes_are_moved_with_their_pairs(channels: int, batch: int) -> None:
    model = residual_blocks(channels=channels)
    before = optimized(model)
    without_shapes, few = quantize_in_blocked_layout(before)
    after, count = quantize_in_blocked_layout(before, known_shapes(model))
    assert (few, count) == (0, 3)
    # the first convolution's input comes plain, and the last one's result goes out plain
    assert kinds(after)["ReorderOutput"] == 1 < kinds(without_shapes)["ReorderOutput"]
    assert kinds(after)["Add"] == 2
    np.testing.assert_array_equal(as_exported(after, image(batch))[0], as_exported(before, image(batch))[0])


def test_a_model_whose_shapes_cannot_be_inferred_has_none() -> None:
    g = GraphMaker()
    g.node("MatMul", "x", g.constant(np.zeros((5, 3), np.float32)), output="y")
    model = g.model({"x": ["n", 5]}, {"y": ["n", 3]})
    assert known_shapes(model) == {"x": ("n", 5), "y": ("n", 3)}
    del model.opset_import[:]
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(model)
    assert known_shapes(model) == {}


def test_an_addition_that_broadcasts_stays() -> None:
    model = residual_blocks(broadcast=True)
    before = optimized(model)
    after, _ = quantize_in_blocked_layout(before, known_shapes(model))
    np.testing.assert_array_equal(as_exported(after, image(2))[0], as_exported(before, image(2))[0])
    # had it been moved, the answers would be others
    shapes = dict.fromkeys(known_shapes(model), ("batch", 20, 12, 12))
    wrong, _ = quantize_in_blocked_layout(before, shapes)
    assert not np.array_equal(as_exported(wrong, image(2))[0], as_exported(before, image(2))[0])


def from_channels_last(perm: tuple[int, ...]) -> onnx.ModelProto:
    """A Transpose, Q, DQ and a ReorderInput."""
    g = GraphMaker()
    values = g.qdq(g.node("Relu", g.node("Transpose", "input", perm=perm)))
    g.node("ReorderInput", values, output="blocked", domain="com.microsoft.nchwc")
    g.node("ReorderOutput", "blocked", output="y", channels=20, domain="com.microsoft.nchwc")
    shape = ["batch", 12, 12, 20] if perm == (0, 3, 1, 2) else ["batch", 12, 20, 12]
    model = g.model({"input": shape}, {"y": ["batch", 20, 12, 12]})
    model.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    return model


def test_channels_from_the_end_are_read_as_they_come() -> None:
    model = from_channels_last((0, 3, 1, 2))
    after = read_channels_last(model)
    assert kinds(after)["Transpose"] == 0
    inputs = {"input": np.random.default_rng(0).standard_normal((2, 12, 12, 20)).astype(np.float32)}
    np.testing.assert_array_equal(as_exported(after, inputs)[0], as_exported(model, inputs)[0])


def test_another_order_stays() -> None:
    model = from_channels_last((0, 2, 1, 3))
    assert read_channels_last(model) == model


def test_a_model_without_blocked_operators_is_returned_as_it_is() -> None:
    model = block_network()
    after, count = quantize_in_blocked_layout(model)
    assert count == 0
    assert not uses_blocked_layout(after)
