"""The benchmark of the linter on one small network: our exports are clean, ONNX Runtime's become so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime.quantization as ort_quantization
import pytest

from benchmarks.accuracy import lint as benchmark
from trtdeploy.onnxgraph.lint import lint

PER_CHANNEL = {"quant_format": ort_quantization.QuantFormat.QOperator, "per_channel": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> benchmark.Files:
    return benchmark.export(benchmark.SUBJECTS[0], tmp_path_factory.mktemp("mixed"))


@pytest.fixture(autouse=True)
def _parser_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building takes longer than a test may."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)

    def parse(path: Path, size: int) -> str:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return "parsed" if trt.OnnxParser(network, logger).parse(path.read_bytes()) else "refused"

    monkeypatch.setattr(benchmark, "tensorrt_rtx", parse)


@pytest.mark.parametrize("name", ["training export", "trtdeploy quantize"])
def test_our_exports_are_clean(name: str, files: benchmark.Files) -> None:
    assert lint(onnx.load(files.exports[name])) == []


@pytest.mark.parametrize(
    ("name", "options"),
    [*benchmark.QUANTIZERS.items(), ("QOperator per channel", PER_CHANNEL)],
    ids=lambda each: str(each)[:24],
)
def test_what_onnx_runtime_writes_is_repaired(name: str, options: dict[str, Any], files: benchmark.Files) -> None:
    done = benchmark.repair(benchmark.SUBJECTS[0], files, name, options)
    assert done["findings_before"]
    assert done["findings_after"] == {}
    assert done["tensorrt_rtx"] == "parsed"
    ratios = done["sqnr_db"]
    assert (
        ratios["repaired_against_float"] > ratios["ort_against_float"] - 4
    )  # one bit of range on one side of 0 is 6 dB
