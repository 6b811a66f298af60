"""Repairs of the linter, on single faults and on what ONNX Runtime's own quantizer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from tests.onnx_graphs import GraphMaker, as_exported, block_network, save
from tests.onnxgraph.lint.test_lint_rules import CASES
from trtdeploy.cli.main import app
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.lint.fix import fix
from trtdeploy.quantizing.lint_file import Difference, repair_file

REPAIRED = [
    *("opset", "scale-size"),
    *("zero-point", "code-type", "activation-per-channel", "weight-axis", "weight-in-float", "both-residual-inputs"),
    *("before-activation", "concat-scales", "double-pair", "output-pair", "scale-value", "residual-in-float"),
    *("unused-pair", "codes-read", "old-opset", "bias-overflow"),
]


@pytest.mark.parametrize("rule", REPAIRED)
def test_a_single_fault_is_repaired(rule: str) -> None:
    model = CASES[rule][0]
    before = model.SerializeToString()
    fixed = fix(model).model
    onnx.checker.check_model(fixed)
    assert lint(fixed) == []
    assert model.SerializeToString() == before
    assert [value.name for value in fixed.graph.output] == ["y"]


@pytest.mark.parametrize("rule", [rule for rule in CASES if rule not in REPAIRED])
def test_what_cannot_be_repaired_stays_a_finding(rule: str) -> None:
    assert {finding.rule for finding in lint(fix(CASES[rule][0]).model)} == {rule}


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_output_of_onnx_runtimes_quantizer_becomes_clean(per_channel: bool, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((1, 3, 12, 12)).astype(np.float32) for _ in range(6)]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            sample = next(self.left, None)
            return None if sample is None else {"input": sample}

    source = save(block_network(quantized=False), tmp_path / "float.onnx")
    asymmetric, repaired = tmp_path / "ort.onnx", tmp_path / "fixed.onnx"
    quantization.quantize_static(source, asymmetric, Reader(), per_channel=per_channel)
    assert {"zero-point", "code-type"} <= {finding.rule for finding in lint(onnx.load(asymmetric))}
    done = CliRunner().invoke(app, ["lint", str(asymmetric), "--fix", str(repaired)])
    assert [f for f in lint(onnx.load(repaired)) if f.severity == "error"] == []
    assert done.exit_code == (1 if lint(onnx.load(repaired)) else 0)
    inputs = {"input": np.concatenate(samples)}
    for old, new in zip(as_exported(asymmetric, inputs), as_exported(repaired, inputs), strict=True):
        # half the codes for a range on one side of 0; a lost Relu differs by more than the whole range
        assert np.abs(new - old).max() < 0.15 * np.abs(old).max()
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse(repaired.read_bytes())


def calibrated(folder: Path, dtype: type[np.floating]) -> Path:
    """Two convolutions and a linear layer as ONNX Runtime quantizes them: weights of codes, a bias of INT32 codes."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    g = GraphMaker(quantized=False)
    result = g.node("Relu", g.conv(g.node("Relu", g.conv("input", 3, 8, kernel=3)), 8, 8, kernel=3, group=8))
    flat = g.node("Flatten", g.node("GlobalAveragePool", result))
    g.node("Gemm", flat, g.weight(5, 8), transB=1, output="y")
    g.constants = [
        numpy_helper.from_array(numpy_helper.to_array(each).astype(dtype), each.name) for each in g.constants
    ]
    model = g.model({"input": ["n", 3, 8, 8]}, {"y": ["n", 5]}, opset=21)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    rng = np.random.default_rng(0)
    batches = [{"input": rng.standard_normal((4, 3, 8, 8)).astype(dtype)} for _ in range(3)]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return batches.pop() if batches else None

    quantization.quantize_static(save(model, folder / "float.onnx"), folder / "ort.onnx", Reader())
    return folder / "ort.onnx"


def test_a_model_in_fp16_keeps_its_type(tmp_path: Path) -> None:
    source, repaired = calibrated(tmp_path, np.float16), tmp_path / "repaired.onnx"
    assert {"zero-point", "code-type"} <= {finding.rule for finding in lint(onnx.load(source))}
    done = repair_file(source, repaired)
    assert [finding for finding in done.left if finding.severity == "error"] == []
    assert isinstance(done.difference, Difference)
    assert done.difference.sqnr_db["y"] is not None
    assert done.difference.sqnr_db["y"] > 25
    scales = [each for each in onnx.load(repaired).graph.initializer if each.name.endswith("scale")]
    assert {numpy_helper.to_array(scale).dtype.name for scale in scales} == {"float16"}
    assert all((numpy_helper.to_array(scale) > 0).all() for scale in scales)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_weights_and_activations_keep_their_type(kind: int) -> None:
    """ONNX Runtime has no kernels for BF16 on processors, so the types are checked by ONNX's inference."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    if dtype == np.float32:
        pytest.skip("this onnx reads BF16 as float32")
    g = GraphMaker()
    codes = g.constant(np.random.default_rng(0).integers(0, 256, (4, 4, 1, 1)).astype(np.uint8))
    zero = g.constant(np.uint8(100))
    of_input, of_weight = (g.constant(np.array(scale, np.float32).astype(dtype)) for scale in (0.03, 0.01))
    read = g.node("DequantizeLinear", g.node("QuantizeLinear", "x", of_input, zero), of_input, zero)
    g.node("Conv", read, g.node("DequantizeLinear", codes, of_weight, zero), output="y")
    model = g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]}, opset=22, dtype=kind)
    model.graph.output[0].type.tensor_type.elem_type = kind
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    fixed = fix(model).model
    assert lint(fixed) == []
    onnx.checker.check_model(fixed, full_check=True)
    assert {tensor.data_type for tensor in fixed.graph.initializer} == {kind, TensorProto.INT8}


def test_a_dead_channel_in_fp16_gets_the_smallest_scale_that_is_not_zero() -> None:
    g = GraphMaker()
    codes = g.constant(np.concatenate([np.zeros((1, 4, 1, 1)), np.full((3, 4, 1, 1), 90)]).astype(np.uint8))
    weight = g.node("DequantizeLinear", codes, g.constant(np.float16(0.01)), g.constant(np.uint8(0)))
    scale, zero = g.constant(np.float16(0.03)), g.constant(np.int8(0))
    g.node(
        "Conv", g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale, zero), scale, zero), weight, output="y"
    )
    model = g.model({"x": [1, 4, 5, 5]}, {"y": [1, 4, 5, 5]}, opset=21, dtype=TensorProto.FLOAT16)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    fixed = fix(model).model
    assert lint(fixed) == []
    given = {"x": np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float16)}
    [old], [new] = as_exported(model, given), as_exported(fixed, given)
    assert np.abs(old - new).max() < 0.05 * np.abs(old).max()


def test_a_repair_of_ir_version_3_keeps_onnxs_rules(tmp_path: Path) -> None:
    """There every initializer is an input of the graph, too."""
    model = onnx.ModelProto()
    model.CopyFrom(CASES["zero-point"][0])
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    repair_file(save(model, tmp_path / "old.onnx"), tmp_path / "repaired.onnx")
    onnx.checker.check_model(str(tmp_path / "repaired.onnx"))
    assert [value.name for value in onnx.load(tmp_path / "repaired.onnx").graph.input] == ["x"]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_factor_of_a_linear_layer_on_codes_is_one_of_its_bias_too(alpha: float) -> None:
    g = GraphMaker()
    rng = np.random.default_rng(0)
    given = [g.constant(np.float32(0.03)), g.constant(np.uint8(120))]
    weight = [g.constant(np.float32(0.01)), g.constant(np.int8(0))]
    kernel = g.constant(rng.integers(-127, 128, (5, 8)).astype(np.int8))
    bias = g.constant(rng.integers(-9000, 9000, 5).astype(np.int32))
    codes = g.node("QuantizeLinear", "x", *given)
    reads = [codes, *given, kernel, *weight, bias]
    g.node("QGemm", *reads, domain="com.microsoft", output="y", transB=1, alpha=alpha)
    model = g.model({"x": ["n", 8]}, {"y": ["n", 5]})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    values = {"x": rng.standard_normal((6, 8)).astype(np.float32)}
    [old], [new] = as_exported(model, values), as_exported(fix(model).model, values)
    assert np.abs(old - new).max() < 0.03 * np.abs(old).max()


@pytest.mark.parametrize("quantized", [(0,), (1,), (), (0, 1)])
def test_of_two_convolutions_at_one_add_either_may_have_qdq(quantized: tuple[int, ...]) -> None:
    """As RepVGG has them: the one without fuses with the Add, whichever it is."""
    g = GraphMaker()
    given = g.qdq("x")
    branches = [g.node("Conv", given, g.weight(4, 4, size, size), pads=[size // 2] * 4) for size in (3, 1)]
    branches = [g.qdq(branch) if place in quantized else branch for place, branch in enumerate(branches)]
    g.node("Relu", g.node("Add", *branches), output="y")
    model = g.model({"x": [1, 4, 6, 6]}, {"y": [1, 4, 6, 6]})
    expected = {0: ["residual-in-float"], 1: [], 2: ["both-residual-inputs"]}[len(quantized)]
    assert [finding.rule for finding in lint(model)] == expected
    assert [repair.rule for repair in fix(model).repairs] == [rule for rule in expected if rule.startswith("both")]
