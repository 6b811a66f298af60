"""The benchmark on files of other people: its commands run, and the page shows what its JSON says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_files
from benchmarks.accuracy.results import PROJECT
from benchmarks.accuracy.tables import section
from tests.onnx_graphs import GraphMaker, block_network, save
from trtdeploy.tensors import Array


def test_every_command_runs_and_errors_say_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")

    def sample(number: int) -> dict[str, Array]:
        return {"input": np.random.default_rng(number).standard_normal((1, 3, 12, 12)).astype(np.float32)}

    monkeypatch.setattr(real_files, "KINDS", (real_files.Kind("block.onnx", sample),))
    (tmp_path / "models").mkdir()
    save(block_network(quantized=False), tmp_path / "models" / "block.onnx")
    g = GraphMaker(quantized=False)
    g.node("Relu", "x", output="y")
    save(g.model({"x": ["n", "m"]}, {"y": ["n", "m"]}), tmp_path / "models" / "open.onnx")
    given = ["--models", str(tmp_path / "models"), "--results", str(tmp_path), "--output", str(tmp_path / "page.md")]
    monkeypatch.setattr("sys.argv", ["real_files", *given])
    assert real_files.main() == 0
    files = json.loads((tmp_path / "real_files.json").read_text())["files"]
    assert {each["code"] for each in files["models/block.onnx"].values()} <= {0, 1}
    assert set(files["models/block.onnx"]) == set(real_files.COLUMNS)
    assert files["models/open.onnx"]["build tensorrt-rtx"]["code"] == 2
    page = (tmp_path / "page.md").read_text()
    assert "--data SAMPLES" in page
    assert str(tmp_path) not in page
    assert re.search(r"\| models/block.onnx \| not-quantized \| ok \| (\d+) of \1 layers, \d+\.\d dB \| \d", page)


def test_the_page_is_the_result() -> None:
    result = json.loads((real_files.RESULTS / "real_files.json").read_text())
    page = (PROJECT / "docs" / "real-files.md").read_text()
    assert page.endswith("\n".join(section(result, "benchmarks")))
    assert all(each["code"] in (0, 1, 2) for commands in result["files"].values() for each in commands.values())
