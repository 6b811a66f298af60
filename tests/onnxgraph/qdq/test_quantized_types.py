"""The type of Q/DQ: INT8 is not FP8, INT4, INT16 or weight-only, for accounting and for --precision explicit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_graphs import save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.building.inspection import inspect_file
from trtdeploy.errors import QuantizationError
from trtdeploy.onnxgraph.qdq.layers import asked_types, count_quantized

QUICK = BuildConfig(runtime="onnxruntime", timing_rounds=1, threads=1)
K, N = 64, 32


def linear(
    kind: int, *, of_input: int | None = None, weight_only: bool = False, codes: bool = False, middle: str = ""
) -> onnx.ModelProto:
    """y = x W + b with Q/DQ of an element type.

    Args:
        kind: Element type of the weights' codes.
        of_input: Element type of the input's codes, if it is another.
        weight_only: Whether the input stays float.
        codes: Whether the weights are stored as codes.
        middle: An op that moves codes between the input's Q and DQ.
    """
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(np.float32(0.02), "s")]
    nodes = []

    def zero(element: int) -> str:
        name = f"zero_{element}"
        if name not in [tensor.name for tensor in constants]:
            constants.append(helper.make_tensor(name, element, [], [0]))
        return name

    source = "x"
    if not weight_only:
        element = of_input or kind
        nodes.append(helper.make_node("QuantizeLinear", ["x", "s", zero(element)], ["x_q"], name="x/Q"))
        moved = "x_q"
        if middle:
            moved = "x_moved"
            nodes.append(helper.make_node(middle, ["x_q"], [moved], name="move"))
        # without a zero-point of its own the type is that of what it reads
        inputs = [moved, "s"] if middle else [moved, "s", zero(element)]
        nodes.append(helper.make_node("DequantizeLinear", inputs, ["x_dq"], name="x/DQ"))
        source = "x_dq"
    values = rng.integers(-3, 4, (K, N))
    if codes:
        constants.append(helper.make_tensor("w_q", kind, [K, N], values.ravel()))
    else:
        constants.append(numpy_helper.from_array((values * 0.02).astype(np.float32), "w"))
        nodes.append(helper.make_node("QuantizeLinear", ["w", "s", zero(kind)], ["w_q"], name="w/Q"))
    nodes.append(helper.make_node("DequantizeLinear", ["w_q", "s", zero(kind)], ["w_dq"], name="w/DQ"))
    nodes.append(helper.make_node("MatMul", [source, "w_dq"], ["y"], name="fc"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["b", K])], [value("y", TensorProto.FLOAT, ["b", N])], constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


CASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "int8": lambda: linear(TensorProto.INT8),
    "int8 weight-only": lambda: linear(TensorProto.INT8, weight_only=True),
    "fp8": lambda: linear(TensorProto.FLOAT8E4M3FN),
    "float8e5m2": lambda: linear(TensorProto.FLOAT8E5M2),
    "fp8 weight-only": lambda: linear(TensorProto.FLOAT8E4M3FN, weight_only=True, codes=True),
    "int4 weight-only": lambda: linear(TensorProto.INT4, weight_only=True, codes=True),
    "int16": lambda: linear(TensorProto.INT16),
    "int4 weights, int8 input": lambda: linear(TensorProto.INT4, of_input=TensorProto.INT8, codes=True),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_type_is_named_as_what_it_is(kind: str) -> None:
    model = CASES[kind]()
    assert asked_types(model) == {"fc": kind}
    count = count_quantized(model)
    assert (count.asked, count.quantized_layers) == ({kind: 1}, 0 if "weight-only" in kind else 1)


def test_signed_and_unsigned_bytes_are_int8() -> None:
    assert asked_types(linear(TensorProto.INT8, of_input=TensorProto.UINT8)) == {"fc": "int8"}
    assert asked_types(linear(TensorProto.UINT8)) == {"fc": "int8"}


def test_codes_that_are_moved_keep_their_type() -> None:
    assert asked_types(linear(TensorProto.INT16, middle="Identity")) == {"fc": "int16"}
    assert asked_types(linear(TensorProto.FLOAT8E4M3FN, middle="Identity")) == {"fc": "fp8"}


def test_the_type_may_stand_in_an_attribute() -> None:
    model = linear(TensorProto.INT8)
    for node in model.graph.node:
        if node.name == "x/Q":
            del node.input[2]
            node.attribute.append(helper.make_attribute("output_dtype", TensorProto.INT16))
        if node.name == "x/DQ":
            del node.input[2]
    assert asked_types(model) == {"fc": "int8 weights, int16 input"}
    del next(node for node in model.graph.node if node.name == "x/Q").attribute[:]
    assert asked_types(model) == {"fc": "int8"}  # ONNX: uint8 where nothing says it


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "int8"])
def test_no_other_type_passes_for_explicit_int8(kind: str, tmp_path: Path) -> None:
    source = save(CASES[kind](), tmp_path / "m.onnx")
    with pytest.raises(QuantizationError, match=f"no layer with INT8 .*{kind} in 1") as caught:
        build(source, tmp_path / "m.plan", QUICK.model_copy(update={"precision": "explicit"}))
    assert "Leave out --precision explicit" in str(caught.value)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4 weight-only", "int8 weight-only", "int16"])
def test_manifest_and_inspect_name_the_type(kind: str, tmp_path: Path) -> None:
    source = save(CASES[kind](), tmp_path / "m.onnx")
    assert inspect_file(source)["layers_asked_for"] == {kind: 1}
    precision = build(source, tmp_path / "m.plan", QUICK).manifest.precision
    assert precision.asked_for == {kind: 100.0}
    assert precision.layers["fc"].asked_for == kind
    assert precision.layers["fc"].macs == K * N
    assert precision.layers["fc"].left_float is None
    assert inspect_file(tmp_path / "m.plan")["precision"]["asked_for"] == {kind: 100.0}
    # what is shown is shown of the kernel that was built, and the rest is unknown
    assert sum(precision.runs_in.values()) + (precision.unknown_percent or 0) == 100.0
    assert ("INT8" in precision.note) <= ("int8" in kind)


def test_an_onnx_runtime_plan_shows_what_it_computes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtdeploy.runtimes.onnxruntime.building import builder
    from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for

    source = save(CASES["int8"](), tmp_path / "m.onnx")
    chosen = [tactic for tactic in tactics_for(True) if tactic.name == "float-weights"]
    monkeypatch.setattr(builder, "tactics_for", lambda quantized: chosen)
    precision = build(source, tmp_path / "m.plan", QUICK).manifest.precision
    assert (precision.asked_for, precision.runs_in) == ({"int8": 100.0}, {"float": 100.0})
    assert precision.unknown_percent == 0.0
