"""Ops that pass codes on: rewritten around floats they do exactly the same, and a whole detector becomes clean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.onnx_graphs import GraphMaker, as_exported, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.lint.fix import fix
from trtdeploy.onnxgraph.lint.integer_ops import integer_ops_to_qdq
from trtdeploy.quantizing.lint_file import Difference, repair_file

ZERO = 37


def numbers(g: GraphMaker, *values: int) -> str:
    return g.constant(np.array(values, np.int64))


def several(g: GraphMaker, op: str, read: list[str], count: int, **attributes: Any) -> list[str]:
    made = [g.name("part") for _ in range(count)]
    g.nodes.append(helper.make_node(op, read, made, **attributes))
    return made


PASSING: dict[str, Callable[[GraphMaker, str], str]] = {
    "Resize": lambda g, x: g.node("Resize", x, "", g.constant(np.float32([1, 1, 2, 2])), mode="nearest"),
    "Split": lambda g, x: several(g, "Split", [x, numbers(g, 1, 3)], 2, axis=1)[1],
    "Split, both": lambda g, x: g.node("Concat", *reversed(several(g, "Split", [x], 2, axis=1)), axis=1),
    "Pad": lambda g, x: g.node("Pad", x, numbers(g, 0, 0, 1, 1, 0, 0, 1, 1)),
    "Pad with a code": lambda g, x: g.node("Pad", x, numbers(g, 0, 0, 1, 1, 0, 0, 1, 1), g.constant(np.uint8(90))),
    "Pad, reflect": lambda g, x: g.node("Pad", x, numbers(g, 0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
    "Gather": lambda g, x: g.node("Gather", x, numbers(g, 3, 0, 3), axis=1),
    "GatherElements": lambda g, x: g.node("GatherElements", x, g.constant(np.zeros((2, 4, 1, 6), np.int64)), axis=2),
    "GatherND": lambda g, x: g.node("GatherND", x, g.constant(np.array([[0, 1], [1, 3]]))),
    "DepthToSpace": lambda g, x: g.node("DepthToSpace", x, blocksize=2),
    "SpaceToDepth": lambda g, x: g.node("SpaceToDepth", x, blocksize=2),
    "Concat": lambda g, x: g.node("Concat", x, x, axis=1),
    "Concat with a constant": lambda g, x: g.node("Concat", x, g.constant(np.full((2, 1, 6, 6), 9, np.uint8)), axis=1),
    "Tile": lambda g, x: g.node("Tile", x, numbers(g, 1, 2, 1, 1)),
    "Expand": lambda g, x: g.node("Expand", g.node("Unsqueeze", x, numbers(g, 0)), numbers(g, 3, 2, 4, 6, 6)),
    "Slice": lambda g, x: g.node("Slice", x, numbers(g, 0), numbers(g, 5), numbers(g, 2), numbers(g, 2)),
    "Where": lambda g, x: g.node("Where", g.constant(np.eye(6, dtype=bool)), x, g.constant(np.uint8(200))),
    "Clip": lambda g, x: g.node("Clip", x, g.constant(np.uint8(40)), g.constant(np.uint8(120))),
    "ReduceMax": lambda g, x: g.node("ReduceMax", x, axes=[2, 3]),
    "Max": lambda g, x: g.node("Max", x, g.constant(np.uint8(60))),
    "MaxPool": lambda g, x: g.node("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "ScatterND": lambda g, x: g.node(
        "ScatterND", x, g.constant(np.array([[1, 2]])), g.constant(np.full((1, 6, 6), 4, np.uint8))
    ),
    "a chain": lambda g, x: g.node(
        "Transpose", g.node("Reshape", g.node("Squeeze", g.node("Unsqueeze", x, numbers(g, 1)), numbers(g, 1)),
                            numbers(g, 2, 4, -1)), perm=[0, 2, 1]
    ),
}  # fmt: skip


def passing(name: str, dtype: str = "uint8", zero: int = ZERO) -> onnx.ModelProto:
    g = GraphMaker()
    codes, parameters, _ = g.quantize("x", 0.05, zero, dtype)
    g.node("DequantizeLinear", PASSING[name](g, codes), *parameters, output="y")
    return g.model({"x": [2, 4, 6, 6]}, {"y": None})


def pixels() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32) * 3}


@pytest.mark.parametrize("name", PASSING)
def test_an_op_that_passes_codes_on_does_exactly_the_same_to_floats(name: str) -> None:
    model = passing(name)
    before = as_exported(model, pixels())
    assert integer_ops_to_qdq(model)
    for node in model.graph.node:
        if node.op_type not in ("DequantizeLinear", "Constant"):
            made = {n.op_type for each in node.input for n in model.graph.node if each in n.output}
            assert "QuantizeLinear" not in made
    for old, new in zip(before, as_exported(model, pixels()), strict=True):
        np.testing.assert_array_equal(old, new)


UNSIGNED = {"Pad with a code", "Concat with a constant", "Where", "Clip", "Max", "ScatterND"}
"""These read constants of unsigned codes."""


@pytest.mark.parametrize("name", [name for name in PASSING if name not in UNSIGNED])
def test_the_repaired_file_is_clean(name: str) -> None:
    fixed = fix(passing(name, "int8", 0)).model
    assert [finding for finding in lint(fixed) if finding.severity == "error" or finding.rule == "codes-read"] == []


@pytest.mark.parametrize("op", ["ArgMax", "Shape"])
def test_what_an_op_counts_is_no_code(op: str) -> None:
    g = GraphMaker()
    codes, parameters, _ = g.quantize("x", 0.05, ZERO, "uint8")
    g.node("DequantizeLinear", codes, *parameters, output="y")
    g.node(op, codes, output="n")
    model = g.model({"x": [2, 4, 6, 6]}, {"y": None, "n": None})
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    before = as_exported(model, pixels())
    integer_ops_to_qdq(model)
    for old, new in zip(before, as_exported(model, pixels()), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_table_of_codes_is_dequantized_before_its_rows_are_chosen() -> None:
    g = GraphMaker()
    table = g.constant(g.rng.integers(0, 255, (30, 4)).astype(np.uint8))
    parameters = [g.constant(np.float32(0.1)), g.constant(np.uint8(ZERO))]
    chosen = g.node("Reshape", g.node("Gather", table, "x"), numbers(g, -1, 4))
    g.node("DequantizeLinear", chosen, *parameters, output="y")
    model = g.model({"x": [5]}, {"y": None}, dtype=TensorProto.INT64)
    inputs = {"x": np.array([0, 29, 7, 7, 3])}
    before = as_exported(model, inputs)
    assert {op for _, op in integer_ops_to_qdq(model)} == {"Gather", "Reshape"}
    np.testing.assert_array_equal(before[0], as_exported(model, inputs)[0])


def test_codes_of_two_meanings_are_left() -> None:
    g = GraphMaker()
    one, parameters, _ = g.quantize("x", 0.05, ZERO, "uint8")
    two, _, _ = g.quantize("x", 0.1, ZERO, "uint8")
    g.node("DequantizeLinear", g.node("Concat", one, two, axis=1), *parameters, output="y")
    model = g.model({"x": [2, 4, 6, 6]}, {"y": None})
    assert integer_ops_to_qdq(model) == []


def pyramid() -> onnx.ModelProto:
    """A detector with what FPN and YOLO are made of: levels, CSP split, shuffle, pooling, chosen channels, a head."""
    g = GraphMaker(quantized=False)

    def relu(tensor: str) -> str:
        return g.node("Relu", tensor)

    low = relu(g.conv("image", 3, 8, kernel=3, stride=2))
    padded = g.node("Pad", low, numbers(g, 0, 0, 0, 0, 0, 0, 1, 1), g.constant(np.float32(0.5)))
    first, second = several(g, "Split", [relu(g.conv(padded, 8, 8, kernel=3, stride=2)), numbers(g, 4, 4)], 2, axis=1)
    csp = g.node("Concat", relu(g.conv(first, 4, 4)), second, axis=1)
    up = g.node("Resize", csp, "", g.constant(np.float32([1, 1, 2, 2])), mode="nearest")
    ends = [numbers(g, 0, 0), numbers(g, 6, 6), numbers(g, 2, 3)]
    joined = g.node("Concat", g.node("Slice", low, *ends), g.node("Slice", up, *ends), axis=1)
    shuffled = g.node("DepthToSpace", relu(g.conv(joined, 16, 16, kernel=3)), blocksize=2)
    pooled = g.node("MaxPool", shuffled, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    chosen = g.node("Gather", g.node("Concat", shuffled, pooled, axis=1), numbers(g, 7, 0, 3, 3, 1, 2), axis=1)
    flat = g.node("Reshape", g.conv(chosen, 6, 5), numbers(g, 0, 5, -1))
    g.node("Transpose", flat, perm=[0, 2, 1], output="boxes")
    return g.model({"image": ["n", 3, 12, 12]}, {"boxes": ["n", "m", 5]})


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_a_detector_of_codes_becomes_clean_and_builds(per_channel: bool, activations: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((1, 3, 12, 12)).astype(np.float32) for _ in range(6)]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.left, None)
            return None if sample is None else {"image": sample}

    quantization.quantize_static(
        save(pyramid(), tmp_path / "float.onnx"),
        tmp_path / "codes.onnx",
        Reader(),
        quant_format=quantization.QuantFormat.QOperator,
        per_channel=per_channel,
        activation_type=quantization.QuantType[activations],
        weight_type=quantization.QuantType.QInt8,
    )
    codes = {node.op_type for node in onnx.load(tmp_path / "codes.onnx").graph.node}
    assert {"QLinearConv", "QLinearConcat", "Resize", "Split", "Pad", "DepthToSpace", "Gather"} <= codes
    repaired = repair_file(tmp_path / "codes.onnx", tmp_path / "fixed.onnx")
    assert repaired.left == []
    assert isinstance(repaired.difference, Difference)
    assert (repaired.difference.sqnr_db["boxes"] or np.inf) > 25  # half the codes for a range on one side of 0
    pytest.importorskip("tensorrt_rtx")
    plan = build(tmp_path / "fixed.onnx", tmp_path / "p.plan", BuildConfig(runtime="tensorrt-rtx"))
    assert plan.manifest.precision.quantized_layers == 5
