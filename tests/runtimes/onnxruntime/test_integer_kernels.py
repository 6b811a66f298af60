"""Integer kernels whose sums a processor saturates: they are found, and their weights become unsigned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_graphs import as_exported, batch_profile, block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.runtimes.onnxruntime.building import builder, integer_kernels, integer_sums
from trtdeploy.runtimes.onnxruntime.building.integer_kernels import inexact_kernels, with_exact_sums
from trtdeploy.runtimes.onnxruntime.building.integer_sums import LARGEST_SAFE_CODE, exact_products, multiplies_exactly
from trtdeploy.runtimes.onnxruntime.building.measure import relative_error
from trtdeploy.runtimes.onnxruntime.building.tactics import Tactic, tactics_for
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets
from trtdeploy.tensors import Array

WITHOUT_VNNI = frozenset({("uint8", "uint8"), ("int8", "int8")})
ROWS, DEPTH, CHANNELS = 5, 32, 6
SCALE = np.float32(2.0**-7)
Made = tuple[onnx.ModelProto, dict[str, Array], Array]


def codes(seed: int, kind: str, *shape: int, largest: int = 127) -> Array:
    low = 0 if kind == "uint8" else -largest
    return np.random.default_rng(seed).integers(low, (255 if kind == "uint8" else largest) + 1, shape).astype(kind)


def graph_of(
    nodes: list[onnx.NodeProto], given: dict[str, Array], kind: int, constants: dict[str, Array]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape)
            for name, each in given.items()
        ],
        [helper.make_tensor_value_info("y", kind, [None] * next(iter(given.values())).ndim)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def sums(a: Array, a_zero: int, b: Array, b_zero: int = 0) -> Array:
    return (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)


def requantized(products: Array, scale: float) -> Array:
    return np.clip(np.rint(products * scale), 0, 255).astype(np.uint8)


A = codes(0, "uint8", ROWS, DEPTH)
B = codes(1, "int8", DEPTH, CHANNELS)
B[:, 0] = 127
A_ZERO = 3


def matmul_integer() -> Made:
    node = helper.make_node("MatMulInteger", ["a", "b", "az"], ["y"])
    model = graph_of([node], {"a": A}, TensorProto.INT32, {"b": B, "az": np.uint8(A_ZERO)})
    return model, {"a": A}, sums(A, A_ZERO, B)


def matmul_integer_with_zero_point() -> Made:
    node = helper.make_node("MatMulInteger", ["a", "b", "az", "bz"], ["y"])
    constants = {"b": B, "az": np.uint8(A_ZERO), "bz": np.int8(-7)}
    return graph_of([node], {"a": A}, TensorProto.INT32, constants), {"a": A}, sums(A, A_ZERO, B, -7)


def constant_node() -> Made:
    constant = helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(B))
    nodes = [constant, helper.make_node("MatMulInteger", ["a", "b"], ["y"])]
    return graph_of(nodes, {"a": A}, TensorProto.INT32, {}), {"a": A}, sums(A, 0, B)


def two_readers() -> Made:
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], [name]) for name in ("y1", "y2")]
    nodes.append(helper.make_node("Add", ["y1", "y2"], ["y"]))
    return graph_of(nodes, {"a": A}, TensorProto.INT32, {"b": B}), {"a": A}, 2 * sums(A, 0, B)


def inside_a_branch() -> Made:
    node = helper.make_node("MatMulInteger", ["a", "b"], ["inner"])
    inner = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("inner", TensorProto.INT32, None)])
    branch = helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)
    model = graph_of([branch], {"a": A}, TensorProto.INT32, {"b": B, "yes": np.array(True)})
    return model, {"a": A}, sums(A, 0, B)


def conv_integer() -> Made:
    kernels = np.ascontiguousarray(B.T[:, :, None, None])
    image = np.ascontiguousarray(A.T[None, :, :, None])
    node = helper.make_node("ConvInteger", ["a", "b", "az"], ["y"])
    model = graph_of([node], {"a": image}, TensorProto.INT32, {"b": kernels, "az": np.uint8(A_ZERO)})
    return model, {"a": image}, sums(A, A_ZERO, B).T[None, :, :, None]


def qlinear_conv() -> Made:
    kernels = np.ascontiguousarray(B.T[:, :, None, None])
    image = np.ascontiguousarray(A.T[None, :, :, None])
    node = helper.make_node("QLinearConv", ["a", "s", "az", "b", "bs", "bz", "ys", "yz"], ["y"])
    constants = {
        "s": SCALE,
        "az": np.uint8(A_ZERO),
        "b": kernels,
        "bs": np.full(CHANNELS, SCALE),
        "bz": np.zeros(CHANNELS, np.int8),
        "ys": np.float32(2**-3),
        "yz": np.uint8(0),
    }
    wanted = requantized(sums(A, A_ZERO, B), float(SCALE) ** 2 * 8)
    return graph_of([node], {"a": image}, TensorProto.UINT8, constants), {"a": image}, wanted.T[None, :, :, None]


def qlinear_matmul() -> Made:
    node = helper.make_node("QLinearMatMul", ["a", "s", "az", "b", "s", "bz", "ys", "yz"], ["y"])
    constants = {
        "s": SCALE,
        "az": np.uint8(A_ZERO),
        "b": B,
        "bz": np.int8(0),
        "ys": np.float32(2**-3),
        "yz": np.uint8(0),
    }
    wanted = requantized(sums(A, A_ZERO, B), float(SCALE) ** 2 * 8)
    return graph_of([node], {"a": A}, TensorProto.UINT8, constants), {"a": A}, wanted


def qgemm() -> Made:
    node = helper.make_node("QGemm", ["a", "s", "az", "b", "bs", "bz", ""], ["y"], domain="com.microsoft", transB=1)
    constants = {
        "s": SCALE,
        "az": np.uint8(A_ZERO),
        "b": np.ascontiguousarray(B.T),
        "bs": np.full(CHANNELS, SCALE),
        "bz": np.zeros(CHANNELS, np.int8),
    }
    model = graph_of([node], {"a": A}, TensorProto.FLOAT, constants)
    return model, {"a": A}, sums(A, A_ZERO, B) * float(SCALE) ** 2


def matmul_integer_to_float() -> Made:
    node = helper.make_node("MatMulIntegerToFloat", ["a", "b", "s", "bs", "az"], ["y"], domain="com.microsoft")
    constants = {"b": B, "s": SCALE, "bs": np.full(CHANNELS, SCALE), "az": np.uint8(A_ZERO)}
    model = graph_of([node], {"a": A}, TensorProto.FLOAT, constants)
    return model, {"a": A}, sums(A, A_ZERO, B) * float(SCALE) ** 2


def dynamic_quantize_matmul() -> Made:
    # the range 0 ... 255 makes the float activations their own codes
    given = A.astype(np.float32)
    given[0, :2] = [0, 255]
    node = helper.make_node("DynamicQuantizeMatMul", ["a", "b", "s"], ["y"], domain="com.microsoft")
    model = graph_of([node], {"a": given}, TensorProto.FLOAT, {"b": B, "s": SCALE})
    return model, {"a": given}, sums(given, 0, B) * float(SCALE)


KERNELS: list[Callable[[], Made]] = [
    matmul_integer,
    matmul_integer_with_zero_point,
    constant_node,
    two_readers,
    inside_a_branch,
    conv_integer,
    qlinear_conv,
    qlinear_matmul,
    qgemm,
    matmul_integer_to_float,
    dynamic_quantize_matmul,
]


@pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)
def test_unsigned_weights_give_the_sums_that_integers_have(make: Callable[[], Made]) -> None:
    model, inputs, expected = make()
    before = model.SerializeToString()
    assert inexact_kernels(model, WITHOUT_VNNI)
    changed = with_exact_sums(model, WITHOUT_VNNI)
    assert model.SerializeToString() == before
    assert inexact_kernels(changed, WITHOUT_VNNI) == []
    [answered] = as_exported(changed, inputs)
    np.testing.assert_allclose(answered, expected, rtol=1e-6, atol=0 if answered.dtype.kind != "f" else 1e-4)


@pytest.mark.parametrize("make", KERNELS, ids=lambda make: make.__name__)
def test_this_processor_computes_what_it_is_said_to(make: Callable[[], Made]) -> None:
    """A kernel that passes for exact is; every network of this file has sums that saturate where kernels do."""
    model, inputs, expected = make()
    [answered] = as_exported(model, inputs)
    right = np.allclose(answered, expected, rtol=1e-6, atol=0 if answered.dtype.kind != "f" else 1e-4)
    assert (inexact_kernels(model) == []) is multiplies_exactly()
    # ConvInteger multiplies the other way round and is exact everywhere; that is not relied on
    assert right is (multiplies_exactly() or make is conv_integer)


@pytest.mark.parametrize("largest", [LARGEST_SAFE_CODE, LARGEST_SAFE_CODE + 1])
def test_weights_whose_products_fit_16_bits_stay(largest: int) -> None:
    weights = np.full((DEPTH, CHANNELS), largest, np.int8)
    a = np.full((ROWS, DEPTH), 255, np.uint8)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    model = graph_of([node], {"a": a}, TensorProto.INT32, {"b": weights})
    safe = largest == LARGEST_SAFE_CODE
    assert (inexact_kernels(model, WITHOUT_VNNI) == []) is safe
    assert (with_exact_sums(model, WITHOUT_VNNI) == model) is safe
    assert np.array_equal(as_exported(model, {"a": a})[0], sums(a, 0, weights)) is (safe or multiplies_exactly())


def test_weights_that_the_graph_computes_are_moved_as_it_runs() -> None:
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    model = graph_of([node], {"a": A, "b": B}, TensorProto.INT32, {})
    assert inexact_kernels(model, WITHOUT_VNNI) == ["MatMulInteger of uint8 by int8"]
    changed = with_exact_sums(model, WITHOUT_VNNI)
    assert "MatMulInteger of uint8 by int8" not in inexact_kernels(changed, WITHOUT_VNNI)
    np.testing.assert_array_equal(as_exported(changed, {"a": A, "b": B})[0], sums(A, 0, B))


def test_signed_by_signed_is_measured_too() -> None:
    assert ("uint8", "uint8") in exact_products()
    assert multiplies_exactly() is (("uint8", "int8") in exact_products())


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has nothing but the exact sums of unsigned codes; where it is one, nothing changes."""
    for module in (integer_kernels, integer_sums):
        monkeypatch.setattr(module, "exact_products", lambda: WITHOUT_VNNI)


@pytest.mark.usefixtures("saturating")
@pytest.mark.parametrize("tactic", tactics_for(True), ids=lambda tactic: tactic.name)
def test_every_tactic_has_exact_sums_where_the_processor_saturates(tactic: Tactic) -> None:
    model = block_network(channels=16)
    content = tactic.compile(model)
    assert content is not None
    optimized = onnx.load_model_from_string(content)
    assert inexact_kernels(optimized, WITHOUT_VNNI) == []
    inputs = {"input": 3 * np.random.default_rng(0).standard_normal((4, 3, 12, 12)).astype(np.float32)}
    assert relative_error(as_exported(optimized, inputs), as_exported(model, inputs)) < 0.02


@pytest.mark.usefixtures("saturating")
def test_a_kernel_that_saturates_is_in_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = matmul_integer_to_float()
    candidates = [Tactic("as-it-is", lambda given: given.SerializeToString()), *tactics_for(False)]
    monkeypatch.setattr(builder, "tactics_for", lambda quantized: candidates)
    manifest = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.plan", BuildConfig(timing_rounds=1)).manifest
    assert manifest.tactic is not None
    reason = "this processor does not sum up exactly: 1 MatMulIntegerToFloat of uint8 by int8"
    assert manifest.tactic.rejected == {"as-it-is": reason}
    assert manifest.device.capability == instruction_sets().split("+")[0]


def test_a_plan_whose_sums_are_exact_on_this_processor_only_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_kernels, "exact_products", lambda: WITHOUT_VNNI | {("uint8", "int8")})
    weights = B.copy()
    weights[1::2] = 0  # every second product is none, so that no pair of them saturates here, whatever is pretended
    assert np.abs(weights.astype(int)).max() > LARGEST_SAFE_CODE
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    model = graph_of([node], {"a": A}, TensorProto.INT32, {"b": weights})
    manifest = build(save(model, tmp_path / "m.onnx"), tmp_path / "m.plan", BuildConfig(timing_rounds=1)).manifest
    assert manifest.device.capability == instruction_sets()


def test_the_plan_of_a_file_with_integer_kernels_computes_what_the_file_says(tmp_path: Path) -> None:
    """Even where this processor's kernels would not: the plan then has others."""
    model, inputs, expected = qlinear_conv()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    source = save(model, tmp_path / "m.onnx")
    config = BuildConfig(profiles=(batch_profile("a", 4, DEPTH, ROWS, 1),), timing_rounds=1)
    with Engine.load(build(source, tmp_path / "m.plan", config).path) as engine:
        [answered] = engine.infer(inputs).values()
    assert np.array_equal(answered, expected)
