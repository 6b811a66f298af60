"""Building for TensorRT-RTX on the command line, on a machine without a GPU, and both INT8 modes on every runtime."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.cuda.api import load_api
from trtdeploy.errors import RuntimeUnavailableError
from trtdeploy.onnxgraph.qdq.ranges_to_qdq import ranges_of, without_qdq

pytest.importorskip("tensorrt_rtx")
SHAPE = "input=1x3x32x32:8x3x32x32:32x3x32x32"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def has_gpu() -> bool:
    try:
        return load_api().device_count() > 0
    except RuntimeUnavailableError:
        return False


@pytest.mark.skipif(has_gpu(), reason="says what happens where there is no GPU")
def test_build_inspect_and_what_run_says_without_a_gpu(qdq_onnx: Path, tmp_path: Path) -> None:
    plan = tmp_path / "b.rtx"
    code, text = run("build", qdq_onnx, "--runtime", "tensorrt-rtx", "--shape", SHAPE, "-o", plan)
    assert code == 0, text
    assert "MACs asked for: 100.0% int8; shown by the kernel names: 100.0% int8; unknown: 0.0%" in text
    code, text = run("inspect", plan, "--json")
    assert code == 0
    facts = json.loads(text)
    assert facts["runtime"]["name"] == "tensorrt-rtx"
    assert facts["runs_here"] is False
    assert facts["precision"]["quantized_layers"] == 3
    assert {(layer["asked_for"], layer["runs_in"]) for layer in facts["precision"]["layers"].values()} == {
        ("int8", "int8")
    }
    assert (facts["precision"]["asked_for"], facts["precision"]["runs_in"]) == ({"int8": 100.0}, {"int8": 100.0})
    code, text = run("inspect", plan, "--layers")
    assert code == 0
    assert sum(line.split()[-2:] == ["int8", "int8"] for line in text.splitlines()) == 3
    for command in (["run", plan, "--input", "input=random"], ["bench", plan]):
        code, text = run(*command)
        assert code == 3
        assert "driver" in text or "GPU" in text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--shape", "input=4x3x32x32:2x3x32x32:8x3x32x32"], 2, "min <= opt"),
        (["--shape", "nonsense=1x3x32x32"], 2, "nonsense"),
        (["--version-compatible"], 2, "version compat"),
        (["--compute-capability", "9.0"], 2, "9.0"),
        (["--threads", "2"], 2, "threads"),
        (["--timing-cache", "x.timing"], 2, "timing cache"),
        (["--implicit"], 2, "implicit needs ranges"),
        (["--precision", "sometimes"], 2, "precision"),
    ],
)
def test_wrong_options_are_named(qdq_onnx: Path, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    given, text = run("build", qdq_onnx, "--runtime", "tensorrt-rtx", "-o", tmp_path / "b.rtx", *arguments)
    assert (given, list(tmp_path.iterdir())) == (code, [])
    assert words in text


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
def test_a_calibration_cache_and_explicit_qdq_of_equal_scales_build_equal_models(
    qdq_onnx: Path, tmp_path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    explicit = onnx.load(str(qdq_onnx))
    cache = tmp_path / "calibration.cache"
    cache.write_text(ranges_of(explicit).to_calibration_cache())
    plain = tmp_path / "float.onnx"
    onnx.save(without_qdq(explicit), plain)
    built: list[onnx.ModelProto] = []

    def remember(source: object, config: object, original: object = None) -> object:
        result = with_precision(source, config)
        built.append(result.proto)
        return result

    from trtdeploy.building import build
    from trtdeploy.building.model_precision import with_precision

    monkeypatch.setattr(build, "with_precision", remember)
    common = ["--runtime", runtime, "--shape", SHAPE]
    assert run("build", qdq_onnx, "--precision", "explicit", "-o", tmp_path / "a.plan", *common)[0] == 0
    code, text = run("build", plain, "--ranges", cache, "-o", tmp_path / "b.plan", *common)
    assert code == 0, text
    first, second = (model.graph for model in built)
    assert list(first.node) == list(second.node)
    assert list(first.initializer) == list(second.initializer)
    if runtime == "onnxruntime":
        outputs = []
        for plan in ("a.plan", "b.plan"):
            assert run("run", tmp_path / plan, "-i", "input=random", "-o", tmp_path / "out.npz")[0] == 0
            outputs.append(np.load(tmp_path / "out.npz")["logits"])
        # not to the last bit: each build takes the tactic that is fastest when it measures
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)


def test_ctrl_c_cancels_a_build_and_leaves_nothing(qdq_onnx: Path, tmp_path: Path) -> None:
    # large enough to be under way for seconds
    target = tmp_path / "b.rtx"
    code = (
        "import sys, time; from trtdeploy.runtimes.tensorrt.building import builder; original = builder.make_monitor\n"
        "def slow(module, progress, cancellation):\n"
        "    print('building', flush=True)\n"
        "    return original(module, lambda *step: time.sleep(0.05), cancellation)\n"
        "builder.make_monitor = slow\n"
        "from trtdeploy.cli.main import main; main()"
    )
    arguments = ["build", str(qdq_onnx), "--runtime", "tensorrt-rtx", "-o", str(target)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "building"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
