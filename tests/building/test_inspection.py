"""inspect_file(): the facts about ONNX files and plans, and files that are neither."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.onnx_graphs import block_network, save
from trtdeploy.building.build import BuildConfig, build
from trtdeploy.building.inspection import inspect_file
from trtdeploy.errors import ModelError, PlanCorruptError
from trtdeploy.files import sha256_file
from trtdeploy.plan import Plan, manifest_path


@pytest.fixture
def plan(qdq_plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "copy.plan"
    shutil.copy(qdq_plan.path, path)
    shutil.copy(manifest_path(qdq_plan.path), manifest_path(path))
    return path


def test_an_onnx_file(qdq_onnx: Path) -> None:
    facts = json.loads(json.dumps(inspect_file(qdq_onnx)))
    assert facts["kind"] == "onnx"
    assert facts["sha256"] == sha256_file(qdq_onnx)
    assert facts["opsets"] == {"ai.onnx": 17}
    assert facts["inputs"] == [{"name": "input", "dtype": "float32", "shape": [-1, 3, 32, 32]}]
    assert facts["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [-1, 10]}]
    assert facts["operators"]["Conv"] == 2
    assert (facts["qdq_pairs"], facts["weighted_layers"], facts["quantized_layers"]) == (6, 3, 3)
    assert facts["labels"] == list("0123456789")
    assert facts["preprocessing"]["crop"] == [32, 32]
    assert len(facts["preprocessing"]["digest"]) == 16
    assert facts["calibration"] is None


def test_an_onnx_file_without_metadata_or_q_dq(tmp_path: Path) -> None:
    facts = inspect_file(save(block_network(quantized=False), tmp_path / "m.onnx"))
    assert (facts["qdq_pairs"], facts["weighted_layers"], facts["quantized_layers"]) == (0, 8, 0)
    assert facts["preprocessing"] is facts["labels"] is None


def test_a_plan(plan: Path, qdq_plan: Plan) -> None:
    facts = json.loads(json.dumps(inspect_file(plan)))
    assert facts["kind"] == "plan"
    assert facts["runs_here"] is True
    assert facts["obstacle"] is None
    assert facts["plan_sha256"] == sha256_file(plan)
    assert facts["profiles"] == [{"input": {"min": [1, 3, 32, 32], "opt": [1, 3, 32, 32], "max": [32, 3, 32, 32]}}]
    assert any(name.endswith("Conv") for name in facts["kernels"])
    assert facts["tactic"]["name"] == qdq_plan.manifest.tactic.name  # type: ignore[union-attr]
    assert sum(facts["kernels"].values()) > 5


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("runtime", {"version": "1.2.3"}, "1.2.3"),
        ("device", {"capability": "riscv64"}, "riscv64"),
        ("runtime", {"name": "tensorrt"}, "tensorrt"),
    ],
)
def test_a_plan_that_does_not_run_here_is_shown_with_the_obstacle(
    plan: Path, part: str, change: dict[str, str], words: str
) -> None:
    content = json.loads(manifest_path(plan).read_text())
    content[part] |= change
    manifest_path(plan).write_text(json.dumps(content))
    facts = inspect_file(plan)
    assert facts["runs_here"] is False
    assert words in facts["obstacle"]
    assert (facts["kernels"] is None) == (change.get("name") == "tensorrt")


def test_a_plan_that_does_not_match_its_manifest_is_corrupt(plan: Path) -> None:
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(PlanCorruptError):
        inspect_file(plan)
    plan.unlink()
    with pytest.raises(PlanCorruptError):
        inspect_file(plan)


@pytest.mark.parametrize("garbage", [b"garbage" * 20, b"\xff" * 40])
def test_garbage_with_a_manifest_that_agrees_is_corrupt(plan: Path, garbage: bytes) -> None:
    plan.write_bytes(garbage)
    content = json.loads(manifest_path(plan).read_text())
    content |= {"plan_bytes": len(garbage), "plan_sha256": hashlib.sha256(garbage).hexdigest()}
    manifest_path(plan).write_text(json.dumps(content))
    with pytest.raises(PlanCorruptError, match="not an optimized ONNX graph"):
        inspect_file(plan)


def test_what_is_neither_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path / "notes.txt", tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError):
            inspect_file(path)


def test_integer_kernels_show_in_a_plan_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtdeploy.runtimes.onnxruntime.building import builder
    from trtdeploy.runtimes.onnxruntime.building.tactics import tactics_for

    integer = [tactic for tactic in tactics_for(True) if tactic.name == "integer-kernels"]
    monkeypatch.setattr(builder, "tactics_for", lambda quantized: integer)
    source = save(block_network(), tmp_path / "m.onnx")
    built = build(source, tmp_path / "m.plan", BuildConfig(timing_rounds=1))
    kernels = inspect_file(built.path)["kernels"]
    counted = sum(count for name, count in kernels.items() if "QLinear" in name or "QGemm" in name)
    assert counted == built.manifest.precision.integer_kernels > 0
    assert "QLinear" in built.manifest.precision.note
