"""Repairs of the linter, on single faults and on what ONNX Runtime's own quantizer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_graphs import as_exported, block_network, save
from test_lint_rules import CASES
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.onnxgraph.lint import lint
from trtdeploy.onnxgraph.lint.fix import fix

REPAIRED = [
    *("opset", "scale-size"),
    *("zero-point", "code-type", "activation-per-channel", "weight-axis", "weight-in-float", "both-residual-inputs"),
    *("before-activation", "concat-scales", "double-pair", "output-pair", "scale-value", "residual-in-float"),
    *("unused-pair", "codes-read", "old-opset"),
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
