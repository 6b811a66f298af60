"""Multiply-accumulates against counts made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.onnx_graphs import GraphMaker, block_network
from trtdeploy.errors import ModelError
from trtdeploy.onnxgraph.macs import macs_by_node
from trtdeploy.onnxgraph.qdq.layers import quantized_nodes
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import canonical_qdq, without_qdq

Case = tuple[Callable[[GraphMaker], str], tuple[int, ...], int]


def ones(g: GraphMaker, *shape: int) -> str:
    return g.constant(np.ones(shape, np.float32))


CASES: dict[str, Case] = {
    "conv": (lambda g: g.node("Conv", "x", ones(g, 8, 4, 3, 3), output="y"), (2, 4, 6, 7), 2 * 8 * 4 * 5 * (4 * 9)),
    "grouped, strided": (
        lambda g: g.node("Conv", "x", ones(g, 8, 2, 3, 3), output="y", group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
        (1, 4, 6, 6),
        8 * 3 * 3 * (2 * 9),
    ),
    "transposed": (
        lambda g: g.node("ConvTranspose", "x", ones(g, 4, 3, 2, 2), output="y", group=2, strides=[2, 2]),
        (2, 4, 5, 5),
        2 * 4 * 25 * (3 * 4),
    ),
    "gemm": (lambda g: g.node("Gemm", "x", ones(g, 5, 8), output="y", transB=1), (3, 8), 3 * 8 * 5),
    "gemm of a transposed input": (
        lambda g: g.node("Gemm", "x", ones(g, 8, 5), output="y", transA=1),
        (8, 3),
        3 * 8 * 5,
    ),
    "matmul": (lambda g: g.node("MatMul", "x", ones(g, 8, 5), output="y"), (2, 3, 8), 2 * 3 * 8 * 5),
    "matmul from the left": (lambda g: g.node("MatMul", ones(g, 5, 8), "x", output="y"), (2, 8, 3), 2 * 3 * 8 * 5),
    "transposed and quantized weight": (
        lambda g: g.node("MatMul", g.qdq("x"), g.node("Transpose", g.weight(5, 8)), output="y"),
        (2, 3, 8),
        2 * 3 * 8 * 5,
    ),
    "einsum": (
        lambda g: g.node("Einsum", "x", ones(g, 8, 5), output="y", equation="...k,ko->...o"),
        (2, 3, 8),
        2 * 3 * 8 * 5,
    ),
    "lstm": (
        lambda g: g.node(
            "LSTM", "x", ones(g, 2, 12, 8), ones(g, 2, 12, 3), hidden_size=3, direction="bidirectional", output="y"
        ),
        (7, 2, 8),
        7 * 2 * 2 * 4 * 3 * (8 + 3),
    ),
    "behind padding whose widths are computed": (
        lambda g: g.node(
            "Conv",
            g.node("Pad", "x", g.node("Concat", *[g.constant(np.int64([0, 0, 1, 1]))] * 2, axis=0)),
            ones(g, 8, 4, 3, 3),
            output="y",
        ),
        (1, 4, 6, 6),
        8 * 6 * 6 * 4 * 9,
    ),
    "vector": (lambda g: g.node("MatMul", "x", ones(g, 8), output="y"), (3, 8), 3 * 8),
}


@pytest.mark.parametrize("name", CASES)
def test_counts_made_by_hand(name: str) -> None:
    build, shape, expected = CASES[name]
    g = GraphMaker()
    build(g)
    model = g.model({"x": [f"d{i}" for i in range(len(shape))]}, {"y": None})
    assert macs_by_node(model, {"x": shape}) == {"y": expected}


def test_the_classifier_with_and_without_pairs(qdq_onnx: Path) -> None:
    per_image = {"c1": 32 * 32 * 32 * 27, "c2": 32 * 16 * 16 * 32 * 9, "logits": 32 * 10}
    expected = {name: 4 * count for name, count in per_image.items()}
    classifier = onnx.load(qdq_onnx)
    for model in (classifier, without_qdq(classifier), canonical_qdq(classifier)):
        assert macs_by_node(model, {"input": (4, 3, 32, 32)}) == expected
    assert set(expected) == set(quantized_nodes(classifier))


def test_a_negative_size_is_an_open_one() -> None:
    g = GraphMaker()
    g.node("Gemm", "x", ones(g, 8, 5), output="y")
    assert macs_by_node(g.model({"x": [-1, 8]}, {"y": None}), {"x": (3, 8)}) == {"y": 3 * 8 * 5}


def test_recorded_inner_shapes_do_not_get_in_the_way() -> None:
    model = onnx.shape_inference.infer_shapes(block_network())
    assert len(model.graph.value_info) > 10
    counts = macs_by_node(model, {"input": [1, 3, 12, 12]})
    assert len(counts) == 8
    doubled = macs_by_node(model, {"input": [2, 3, 12, 12]})
    assert doubled == {name: 2 * count for name, count in counts.items()}


def test_recorded_shapes_of_another_batch_are_not_believed() -> None:
    model = block_network()
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    wrong.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    inferred = onnx.shape_inference.infer_shapes(wrong)
    inferred.graph.input[0].CopyFrom(model.graph.input[0])
    shape = {"input": (2, 3, 12, 12)}
    assert macs_by_node(inferred, shape) == macs_by_node(model, shape)


def test_shapes_that_are_computed_in_the_graph() -> None:
    g = GraphMaker()
    batch = g.node("Gather", g.node("Shape", "x"), g.constant(np.int64([0])))
    target = g.node("Concat", batch, g.constant(np.int64([-1])), axis=0)
    g.node("Gemm", g.node("Reshape", "x", target), ones(g, 24, 5), output="y")
    assert macs_by_node(g.model({"x": ["n", 4, 6]}, {"y": ["n", 5]}), {"x": (3, 4, 6)}) == {"y": 3 * 24 * 5}


def test_products_of_two_activations_are_not_counted() -> None:
    g = GraphMaker()
    g.node("MatMul", "x", "x", output="y")
    assert macs_by_node(g.model({"x": [4, 4]}, {"y": [4, 4]}), {}) == {}


def test_faults_are_named() -> None:
    model = block_network()
    with pytest.raises(ModelError, match="no input 'image'; its inputs are input"):
        macs_by_node(model, {"image": (1, 3, 12, 12)})
    for shape in ((1, 3, 12), (1, 4, 12, 12), (-1, 3, 12, 12)):
        with pytest.raises(ModelError, match="'input' cannot have the shape"):
            macs_by_node(model, {"input": shape})
    with pytest.raises(ModelError, match=r"of Conv conv.* cannot be counted: the shape of 'dequantizelinear.*'"):
        macs_by_node(model, {})

    g = GraphMaker()
    g.node("MatMul", "x", ones(g, 8, 5), output="y")
    with pytest.raises(ModelError, match="do not fit the model"):
        macs_by_node(g.model({"x": ["n", "k"]}, {"y": None}), {"x": (2, 7)})


def test_an_unknown_op_in_between_is_said() -> None:
    g = GraphMaker()
    middle = g.node("Mystery", "x", domain="elsewhere")
    g.nodes.append(onnx.helper.make_node("MatMul", [middle, ones(g, 8, 5)], ["y"], name="head"))
    model = g.model({"x": ["n", 8]}, {"y": None})
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    with pytest.raises(ModelError, match="MatMul head cannot be counted"):
        macs_by_node(model, {"x": (1, 8)})
