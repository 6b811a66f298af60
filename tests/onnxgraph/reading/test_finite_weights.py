"""A model that answers no numbers becomes no plan, and the message says where they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.onnx_graphs import GraphMaker, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.errors import ModelError, QuantizationError
from trtdeploy.tensors import Array

QUICK = BuildConfig(timing_rounds=1)
NAN = np.float32(np.nan)


def broken(value: float, *shape: int) -> Array:
    values = np.ones(shape, np.float32)
    values.flat[0] = value
    return values


def gemm_weight(g: GraphMaker, value: float) -> None:
    g.node("Gemm", "x", g.constant(broken(value, 4, 3), "w"), output="y")


def gemm_bias(g: GraphMaker, value: float) -> None:
    g.node("Gemm", "x", g.constant(broken(1, 4, 3)), g.constant(broken(value, 3), "w"), output="y")


def weight_behind_transpose(g: GraphMaker, value: float) -> None:
    g.node("MatMul", "x", g.node("Transpose", g.constant(broken(value, 3, 4)), output="w"), output="y")


def quantized_weight(g: GraphMaker, value: float) -> None:
    weight = g.constant(broken(value, 4, 3), "w")
    codes, parameters, _ = g.quantize(weight, 0.01)
    g.node("MatMul", g.qdq("x"), g.node("DequantizeLinear", codes, *parameters), output="y")


def scale_of_a_weight(g: GraphMaker, value: float) -> None:
    codes = g.constant(np.ones((4, 3), np.int8))
    parameters = [g.constant(broken(value, 3), "w"), g.constant(np.zeros(3, np.int8))]
    g.node("MatMul", g.qdq("x"), g.node("DequantizeLinear", codes, *parameters, axis=1), output="y")


def norm(g: GraphMaker, value: float) -> None:
    one = g.constant(np.ones(4, np.float32))
    g.node("BatchNormalization", "x", one, one, g.constant(broken(value, 4), "w"), one, output="n")
    g.node("MatMul", "n", g.constant(broken(1, 4, 3)), output="y")


WEIGHTS = [gemm_weight, gemm_bias, weight_behind_transpose, quantized_weight, scale_of_a_weight, norm]


def model_of(make: Callable[[GraphMaker, float], None], value: float) -> onnx.ModelProto:
    g = GraphMaker()
    make(g, value)
    return g.model({"x": ["batch", 4]}, {"y": ["batch", 3]})


@pytest.mark.parametrize(
    ("make", "value"),
    [(make, np.nan) for make in WEIGHTS] + [(make, np.inf) for make in WEIGHTS if make not in (gemm_bias, norm)],
)
def test_a_constant_that_is_no_number_is_named_and_nothing_is_written(
    make: Callable[[GraphMaker, float], None], value: float, tmp_path: Path
) -> None:
    source = save(model_of(make, value), tmp_path / "m.onnx")
    refusal = (
        (QuantizationError, r"The scale 'w' of the DequantizeLinear \S+ is not finite")
        if make is scale_of_a_weight
        else (ModelError, r"w, a constant of the \w+ \S+, is not finite")
    )
    with pytest.raises(refusal[0], match=refusal[1]) as caught:
        build(source, tmp_path / "m.plan", QUICK)
    assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
def test_the_same_models_with_numbers_are_built(make: Callable[[GraphMaker, float], None], tmp_path: Path) -> None:
    build(save(model_of(make, 0.5), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)


def test_a_bias_may_take_a_class_out(tmp_path: Path) -> None:
    build(save(model_of(gemm_bias, -np.inf), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)


def test_the_builder_of_a_gpu_is_not_asked_either(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = save(model_of(gemm_weight, np.nan), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="is not finite"):
        build(source, tmp_path / "m.plan", BuildConfig(runtime="tensorrt-rtx"))


def root_of_negatives(g: GraphMaker) -> None:
    g.node("Sqrt", g.node("Neg", g.node("Abs", "x")), output="y")


def overflow(g: GraphMaker) -> None:
    g.node("Exp", g.node("Add", g.node("Abs", "x"), g.constant(np.float32(1000))), output="y")


def one_nan(g: GraphMaker) -> None:
    row = np.zeros(4, np.float32)
    row[2] = np.nan
    g.node("Add", "x", g.constant(row), output="y")


@pytest.mark.parametrize(
    ("make", "what"),
    [(root_of_negatives, "4 of 4 values are NaN"), (overflow, "all values are infinite"), (one_nan, "1 of 4 values")],
)
def test_answers_that_are_no_numbers_become_no_plan(
    make: Callable[[GraphMaker], None], what: str, tmp_path: Path
) -> None:
    g = GraphMaker()
    make(g)
    source = save(g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=rf"{what}.*in its output 'y'"):
        build(source, tmp_path / "m.plan", QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_some_infinities_are_answers(tmp_path: Path) -> None:
    """The logits of a masked class, for example."""
    g = GraphMaker()
    g.node("Add", "x", g.constant(np.array([0, -np.inf, 0, 0], np.float32)), output="y")
    build(save(g.model({"x": ["batch", 4]}, {"y": ["batch", 4]}), tmp_path / "m.onnx"), tmp_path / "m.plan", QUICK)
