"""What a graph says, computed: by one function, as written, and exactly on every processor."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_graphs import as_exported, block_network
from trtdeploy.errors import InferenceError, ModelError, UsageError
from trtdeploy.onnxgraph.exact_integers import exact_integers
from trtdeploy.onnxgraph.name_patterns import require_matches
from trtdeploy.runtimes.onnxruntime.witness import Witness
from trtdeploy.tensors import Array

ROOT = Path(__file__).parents[3]
SESSIONS = {
    "trtdeploy/runtimes/onnxruntime/session.py": "makes them",
    "trtdeploy/runtimes/onnxruntime/witness.py": "the witness",
    "trtdeploy/runtimes/onnxruntime/runtime.py": "loads plans",
    "trtdeploy/runtimes/onnxruntime/building/builder.py": "runs and times candidates of a plan",
    "trtdeploy/runtimes/onnxruntime/building/integer_sums.py": "finds out which kernels are exact here",
    "trtdeploy/onnxgraph/reading/constant_folding.py": "computes constants, by numpy",
    "benchmarks/plan_latency.py": "times ONNX Runtime beside a plan",
    "benchmarks/pytriton_server.py": "serves for a comparison of speed",
}
"""Where an inference session may be made, and what for."""


def test_numbers_are_judged_by_the_witness_and_by_nothing_else() -> None:
    found = set()
    for package in ("trtdeploy", "training", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
                if name in ("InferenceSession", "make_session", "ReferenceEvaluator"):
                    found.add(path.relative_to(ROOT).as_posix())
    assert found == set(SESSIONS)


def test_the_outputs_by_name_and_errors_that_name_the_model(qdq_onnx: Path) -> None:
    content = qdq_onnx.read_bytes()
    output = onnx.load(qdq_onnx).graph.output[0].name
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    run = Witness(content, [output], name="m.onnx")
    answers = run({"input": images})
    assert len(answers) == 1
    np.testing.assert_array_equal(answers[0], as_exported(qdq_onnx, {"input": images})[0])
    assert [spec.name for spec in run.inputs] == ["input"]
    assert Witness(content).outputs == [output]
    with pytest.raises(InferenceError, match=r"failed on m\.onnx"):
        run({"input": images[:, :1]})
    with pytest.raises(ModelError, match=r"does not accept m\.onnx"):
        Witness(b"no model", [output], name="m.onnx")


def test_the_graph_runs_as_it_is_written() -> None:
    model = block_network()
    inputs = {"input": np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)}
    for ours, plain in zip(Witness(model)(inputs), as_exported(model, inputs), strict=True):
        np.testing.assert_array_equal(ours, plain)
    assert exact_integers(model) is model


def made(
    nodes: list[onnx.NodeProto], inputs: dict[str, Array], constants: dict[str, Array], output: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "integers",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def codes(rng: np.random.Generator, dtype: str, *shape: int) -> Array:
    """Half of them as large as can be, so that sums of two products do not fit 16 bits."""
    limits = np.iinfo(dtype)
    drawn = rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
    return np.where(rng.random(shape) < 0.5, np.array(limits.max, dtype), drawn)


PAIRS = [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")]


@pytest.mark.parametrize("is_constant", [True, False])
@pytest.mark.parametrize("has_zero_points", [True, False])
@pytest.mark.parametrize(("left", "right"), [*PAIRS, ("int8", "uint8")])
def test_a_product_of_integers_is_numpys(left: str, right: str, has_zero_points: bool, is_constant: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = codes(rng, left, 5, 64), codes(rng, right, 64, 16)
    zeros = {"az": np.array(100, left), "bz": codes(rng, right, 16)} if has_zero_points else {}
    expected = (a.astype(np.int64) - zeros.get("az", 0)) @ (b.astype(np.int64) - zeros.get("bz", 0))
    node = helper.make_node("MatMulInteger", ["a", "b", *zeros], ["y"])
    inputs, constants = ({"a": a}, {"b": b}) if is_constant else ({"a": a, "b": b}, {})
    model = made([node], inputs, {**constants, **zeros}, TensorProto.INT32)
    np.testing.assert_array_equal(Witness(model)(inputs)[0], expected)


@pytest.mark.parametrize(("left", "right"), PAIRS)
@pytest.mark.parametrize("group", [1, 8])
def test_a_convolution_of_codes_is_numpys(left: str, right: str, group: int) -> None:
    rng = np.random.default_rng(0)
    x, w = codes(rng, left, 2, 8, 6, 6), codes(rng, right, 16, 8 // group, 3, 3)
    xz, wz = np.array(3, left), np.full(16, 5, right)
    exact = convolved(x.astype(np.int64) - int(xz), w.astype(np.int64) - 5, group)
    constants = {"xz": xz, "w": w, "wz": np.array(5, right)}
    model = made(
        [helper.make_node("ConvInteger", ["x", "w", "xz", "wz"], ["y"], group=group)],
        {"x": x},
        constants,
        TensorProto.INT32,
    )
    np.testing.assert_array_equal(Witness(model)({"x": x})[0], exact)
    scale = np.float32(0.01 * 0.02 * np.abs(exact).max() / 100)
    constants = {"xs": np.float32(0.01), "xz": xz, "w": w, "ws": np.full(16, 0.02, np.float32), "wz": wz}
    constants |= {"ys": scale, "yz": xz}
    node = helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], group=group)
    model = made([node], {"x": x}, constants, helper.np_dtype_to_tensor_dtype(np.dtype(left)))
    limits = np.iinfo(left)
    expected = np.clip(np.rint(exact * (0.01 * 0.02 / float(scale))) + int(xz), limits.min, limits.max)
    # a sum on the boundary of two codes may go either way: its scale is a product of three floats
    assert np.abs(Witness(model)({"x": x})[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_a_linear_layer_of_codes_is_numpys(left: str, right: str) -> None:
    rng = np.random.default_rng(0)
    a, b = codes(rng, left, 5, 64), codes(rng, right, 64, 16)
    exact = (a.astype(np.int64) - 7) @ (b.astype(np.int64) - 5)
    common = {"as": np.float32(0.01), "az": np.array(7, left), "b": b, "bs": np.float32(0.02), "bz": np.array(5, right)}
    scale = np.float32(0.01 * 0.02 * np.abs(exact).max() / 100)
    constants = {**common, "ys": scale, "yz": np.array(7, left)}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(left))
    limits = np.iinfo(left)
    expected = np.clip(np.rint(exact * (0.01 * 0.02 / float(scale))) + 7, limits.min, limits.max)
    product = helper.make_node("QLinearMatMul", ["a", *constants], ["y"])
    gemm = helper.make_node("QGemm", ["a", *common, "", "ys", "yz"], ["y"], domain="com.microsoft")
    for node in (product, gemm):
        answered = Witness(made([node], {"a": a}, constants, kind))({"a": a})[0]
        assert np.abs(answered.astype(int) - expected).max() <= 1
    order = ["a", "b", "as", "bs", "az", "bz"]
    to_float = helper.make_node("MatMulIntegerToFloat", order, ["y"], domain="com.microsoft")
    answered = Witness(made([to_float], {"a": a}, common, TensorProto.FLOAT))({"a": a})[0]
    np.testing.assert_allclose(answered, exact * 0.0002, rtol=1e-5)


def test_what_is_quantized_while_it_runs_is_exact_too() -> None:
    """ONNX Runtime's dynamic quantization: activations in UINT8, weights in INT8."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (5, 64)).astype(np.float32)
    b = codes(rng, "int8", 64, 16)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "b", "bs", "bz"], ["y"], domain="com.microsoft")
    constants = {"b": b, "bs": np.float32(0.02), "bz": np.array(0, np.int8)}
    answered = Witness(made([node], {"x": x}, constants, TensorProto.FLOAT))({"x": x})[0]
    scale = x.max() / 255
    expected = (np.rint(x / scale) @ b.astype(np.float64)) * scale * 0.02
    assert np.abs(answered - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_product_of_integers_inside_a_branch_and_a_function_is_numpys() -> None:
    rng = np.random.default_rng(0)
    a, b = codes(rng, "uint8", 5, 64), codes(rng, "int8", 64, 16)
    expected = a.astype(np.int64) @ b.astype(np.int64)
    product = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    branch = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.INT32, None)],
    )
    chosen = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    in_branch = made([chosen], {"a": a}, {"b": b, "yes": np.array(True)}, TensorProto.INT32)
    np.testing.assert_array_equal(Witness(in_branch)({"a": a})[0], expected)
    unified = exact_integers(in_branch).graph.node[0].attribute
    assert all(entry.g.node[-1].input[1] != "b" for entry in unified)
    in_function = made([helper.make_node("Product", ["a", "b"], ["y"], domain="own")], {"a": a}, {"b": b}, 6)
    opset = helper.make_opsetid("", 17)
    in_function.functions.append(helper.make_function("own", "Product", ["a", "b"], ["y"], [product], [opset]))
    in_function.opset_import.append(helper.make_opsetid("own", 1))
    np.testing.assert_array_equal(Witness(in_function)({"a": a})[0], expected)


@pytest.mark.parametrize("shape", [(64, 16), (3, 64, 16)])
def test_codes_that_fit_give_the_same_before_and_after(shape: tuple[int, ...]) -> None:
    """Small codes saturate nowhere, so here ONNX Runtime's own answer to the file is right on every processor."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 100, (3, 5, 64)).astype(np.uint8), rng.integers(-20, 20, shape).astype(np.int8)
    model = made([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], {"a": a}, {"b": b}, TensorProto.INT32)
    plain = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"a": a})[0]
    np.testing.assert_array_equal(Witness(model)({"a": a})[0], plain)
    assert exact_integers(exact_integers(model)) is not model  # the file itself is left as it is
    assert numpy_helper.to_array(model.graph.initializer[0]).dtype == np.int8


def test_an_lstm_and_attention_on_codes_keep_their_answers() -> None:
    """Of small codes again: what the operators are made of, numpy has no word for."""
    rng = np.random.default_rng(0)

    def both(model: onnx.ModelProto, inputs: dict[str, Array]) -> None:
        changed = exact_integers(model)
        kinds = {tensor.name: tensor.data_type for tensor in changed.graph.initializer}
        assert any(kind == TensorProto.UINT8 for kind in kinds.values())
        plain = onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
        # the state is quantized again at every step: where floats are added in another order, a code may be the next
        np.testing.assert_allclose(Witness(model)(inputs)[0], plain, rtol=0, atol=5e-4)
        assert np.abs(plain).max() > 0.05

    x = rng.standard_normal((3, 2, 8)).astype(np.float32)
    small: Callable[..., Array] = lambda *shape: rng.integers(-20, 20, shape).astype(np.int8)  # noqa: E731
    constants = {"w": small(1, 8, 16), "r": small(1, 4, 16)}
    constants |= {"ws": np.array([0.02], np.float32), "wz": np.array([0], np.int8)}
    constants |= {"rs": np.array([0.02], np.float32), "rz": np.array([0], np.int8)}
    node = helper.make_node(
        "DynamicQuantizeLSTM",
        ["x", "w", "r", "", "", "", "", "", "ws", "wz", "rs", "rz"],
        ["y"],
        domain="com.microsoft",
        hidden_size=4,
    )
    both(made([node], {"x": x}, constants, TensorProto.FLOAT), {"x": x})
    codes_in = rng.integers(0, 100, (2, 3, 8)).astype(np.uint8)
    constants = {"w": small(8, 24), "bias": np.zeros(24, np.float32), "xs": np.float32(0.01), "ws": np.float32(0.02)}
    constants |= {"xz": np.array(50, np.uint8)}
    node = helper.make_node(
        "QAttention", ["x", "w", "bias", "xs", "ws", "", "xz"], ["y"], domain="com.microsoft", num_heads=2
    )
    both(made([node], {"x": codes_in}, constants, TensorProto.FLOAT), {"x": codes_in})


def convolved(x: Array, w: Array, group: int) -> Array:
    """Return a convolution without padding, in whole numbers."""
    n, channels, height, width = x.shape
    out, per_group, rows, columns = w.shape
    result = np.zeros((n, out, height - rows + 1, width - columns + 1), np.int64)
    for i in range(rows):
        for j in range(columns):
            part = x[:, :, i : i + result.shape[2], j : j + result.shape[3]]
            part = part.reshape(n, group, channels // group, *result.shape[2:])
            filters = w[:, :, i, j].reshape(group, out // group, per_group)
            result += np.einsum("ngchw,goc->ngohw", part, filters).reshape(result.shape)
    return result


def test_a_pattern_that_matches_nothing_is_refused_with_near_names() -> None:
    require_matches(["blocks.*", "head"], ["blocks.0.conv", "head"], kind="layer")
    with pytest.raises(UsageError, match=r"--skip hed matches no layer\. Near names: head"):
        require_matches(["hed"], ["blocks.0.conv", "head"], kind="layer")
    with pytest.raises(UsageError, match="Head matches no layer"):  # case counts
        require_matches(["Head"], ["head"], kind="layer")
