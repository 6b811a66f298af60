"""Layers that are matrix products multiply codes: the same answers, to the rounding of float sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.onnx_graphs import GraphMaker, as_exported
from trtdeploy.onnxgraph.qdq.unsigned_codes import with_unsigned_activations
from trtdeploy.runtimes.onnxruntime.building.integer_kernels import with_exact_sums
from trtdeploy.runtimes.onnxruntime.building.integer_products import multiply_codes
from trtdeploy.tensors import Array

RNG = np.random.default_rng(0)
IMAGE = ["n", 8, 5, 5]
ROW = ["n", 8]


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def weight(g: GraphMaker, *shape: int, axis: int | None = 0) -> str:
    values = normal(*shape)
    if axis is None:
        return g.qdq(g.constant(values), np.abs(values).max() / 127)
    others = tuple(index for index in range(len(shape)) if index != axis)
    return g.qdq(g.constant(values), np.abs(values).max(axis=others) / 127, axis=axis)


def norm(g: GraphMaker, tensor: str, channels: int, output: str) -> str:
    constants = [normal(channels), normal(channels), normal(channels), np.abs(normal(channels)) + 0.1]
    names = [g.constant(values.astype(np.float32)) for values in constants]
    return g.node("BatchNormalization", tensor, *names, epsilon=1e-3, output=output)


def stored(g: GraphMaker, *shape: int) -> str:
    codes = g.constant(RNG.integers(-128, 128, shape).astype(np.int8))
    scales = g.constant(np.linspace(0.01, 0.02, shape[0], dtype=np.float32))
    return g.node("DequantizeLinear", codes, scales, g.constant(np.zeros(shape[0], np.int8)), axis=0)


TAKEN: dict[str, tuple[Callable[[GraphMaker, str], str], list[int | str]]] = {
    "conv": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1, 1), output="y"), IMAGE),
    "bias": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1, 1), g.constant(normal(6)), output="y"), IMAGE),
    "norm": (
        lambda g, x: norm(g, g.node("Conv", x, weight(g, 6, 8, 1, 1), g.constant(normal(6))), 6, output="y"),
        IMAGE,
    ),
    "one scale": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1, 1, axis=None), output="y"), IMAGE),
    "stored codes": (lambda g, x: g.node("Conv", x, stored(g, 6, 8, 1, 1), output="y"), IMAGE),
    "conv1d": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1), output="y"), ["n", 8, 5]),
    "gemm": (lambda g, x: g.node("Gemm", x, weight(g, 8, 6, axis=1), g.constant(normal(6)), output="y"), ROW),
    "gemm^T": (lambda g, x: g.node("Gemm", x, weight(g, 6, 8), g.constant(normal(1)), transB=1, output="y"), ROW),
    "matmul": (lambda g, x: g.node("MatMul", x, weight(g, 8, 6, axis=1), output="y"), ["n", 5, 8]),
}
LEFT: dict[str, tuple[Callable[[GraphMaker, str], str], list[int | str]]] = {
    "3x3": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 3, 3), output="y"), IMAGE),
    "stride": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1, 1), strides=[2, 2], output="y"), IMAGE),
    "padding": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1, 1), pads=[1, 1, 1, 1], output="y"), IMAGE),
    "groups": (lambda g, x: g.node("Conv", x, weight(g, 8, 1, 1, 1), group=8, output="y"), IMAGE),
    "float weight": (lambda g, x: g.node("Conv", x, g.constant(normal(6, 8, 1, 1)), output="y"), IMAGE),
    "alpha": (lambda g, x: g.node("Gemm", x, weight(g, 6, 8), transB=1, alpha=0.5, output="y"), ROW),
    "transposed": (lambda g, x: g.node("Gemm", x, weight(g, 8, 6, axis=1), transA=1, output="y"), [8, "n"]),
    "other axis": (lambda g, x: g.node("Conv", x, weight(g, 6, 8, 1, 1, axis=1), output="y"), IMAGE),
    "batched": (lambda g, x: g.node("MatMul", x, weight(g, 2, 8, 6, axis=2), output="y"), ["n", 2, 5, 8]),
    "first": (lambda g, x: g.node("MatMul", weight(g, 5, 8), x, output="y"), ["n", 8, 3]),
}


def network(build: Callable[[GraphMaker, str], str], shape: list[int | str], **pair: object) -> onnx.ModelProto:
    g = GraphMaker()
    build(g, g.qdq("x", **pair))  # type: ignore[arg-type]
    return g.model({"x": shape}, {"y": None})


def inputs(shape: list[int | str]) -> dict[str, Array]:
    return {"x": normal(*(3 if size == "n" else int(size) for size in shape))}


@pytest.mark.parametrize("pair", [{}, {"zero": 128, "dtype": "uint8"}, {"zero": 7}], ids=["int8", "uint8", "offset"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_product_of_codes_gives_the_answers_of_the_float_layer(name: str, pair: dict[str, object]) -> None:
    build, shape = TAKEN[name]
    model = network(build, shape, **pair)
    source = with_unsigned_activations(model)
    changed, count = multiply_codes(source)
    assert count == 1
    left = {node.op_type for node in changed.graph.node}
    assert "MatMulIntegerToFloat" in left
    assert not {"Conv", "Gemm", "MatMul", "BatchNormalization", "DequantizeLinear"} & left
    given = inputs(shape)
    [expected], [answered] = as_exported(model, given), as_exported(with_exact_sums(changed), given)
    np.testing.assert_allclose(answered, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_such_product_stays(name: str) -> None:
    model = network(*LEFT[name])
    changed, count = multiply_codes(model)
    assert count == 0
    assert changed == model


def test_other_readers_keep_their_floats() -> None:
    g = GraphMaker()
    x = g.qdq("x")
    first = g.node("Conv", x, weight(g, 8, 8, 1, 1), output="seen")
    norm(g, first, 8, output="normed")  # its input is an output of the model, so it stays
    g.node("Add", x, "normed", output="y")
    model = g.model({"x": IMAGE}, {"y": IMAGE, "seen": IMAGE})
    changed, count = multiply_codes(with_unsigned_activations(model))
    assert count == 1
    assert "BatchNormalization" in {node.op_type for node in changed.graph.node}
    given = inputs(IMAGE)
    for expected, answered in zip(as_exported(model, given), as_exported(with_exact_sums(changed), given), strict=True):
        np.testing.assert_allclose(answered, expected, rtol=1e-5, atol=1e-4)


def test_names_that_are_taken_are_not_taken_again() -> None:
    g = GraphMaker()
    g.constants.append(numpy_helper.from_array(np.float32(2), "h.scale"))
    g.node("Mul", g.node("Conv", g.qdq("x"), weight(g, 6, 8, 1, 1), output="h"), "h.scale", output="y")
    model = g.model({"x": IMAGE}, {"y": None})
    changed, _ = multiply_codes(with_unsigned_activations(model))
    given = inputs(IMAGE)
    np.testing.assert_allclose(
        as_exported(with_exact_sums(changed), given)[0], as_exported(model, given)[0], rtol=1e-4, atol=1e-4
    )
