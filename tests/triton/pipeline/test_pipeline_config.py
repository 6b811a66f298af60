"""The ensemble's builder, and what packaging with a pipeline writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.errors import ModelError, RepositoryError
from trtdeploy.plan import Manifest, Plan
from trtdeploy.triton.config import PackageOptions, make_config, schema
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.pipeline.ensemble import Ensemble
from trtdeploy.triton.pipeline.package import make_pipeline
from trtdeploy.triton.repository.layout import read_config

pytest.importorskip("tritonclient.grpc")


def model(name: str, takes: tuple[str, list[int]], gives: tuple[str, list[int]], *, largest: int = 4) -> Any:
    pb = schema()
    config = pb.ModelConfig(name=name, backend="python", max_batch_size=largest)
    config.input.add(name="in", data_type=pb.DataType.Value(f"TYPE_{takes[0]}"), dims=takes[1])
    config.output.add(name="out", data_type=pb.DataType.Value(f"TYPE_{gives[0]}"), dims=gives[1])
    return config


def begun(first: Any) -> Ensemble:
    ensemble = Ensemble("whole", max_batch_size=4)
    ensemble.input("start", first.input[0])
    ensemble.step(first, takes={"in": "start"}, gives={"out": "middle"})
    return ensemble


FIRST = (("STRING", [1]), ("FP32", [3, 8, 8]))


def test_an_ensemble_of_models_that_fit() -> None:
    ensemble = begun(model("a", *FIRST))
    ensemble.step(model("b", ("FP32", [3, -1, -1]), ("FP32", [10])), takes={"in": "middle"}, gives={"out": "end"})
    ensemble.output("end")
    config = ensemble.config()
    assert (config.platform, config.max_batch_size) == ("ensemble", 4)
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["a", "b"]
    assert dict(config.ensemble_scheduling.step[1].input_map) == {"in": "middle"}
    assert list(config.output[0].dims) == [10]


@pytest.mark.parametrize(
    ("second", "takes", "words"),
    [
        (model("b", ("FP16", [3, 8, 8]), ("FP32", [1])), {"in": "middle"}, r"a\.out -> b\.in joins FP32 .* to FP16"),
        (model("b", ("FP32", [3, 8, 9]), ("FP32", [1])), {"in": "middle"}, r"a\.out -> b\.in .*\[3, 8, 8\].*other sha"),
        (model("b", ("FP32", [3, 8]), ("FP32", [1])), {"in": "middle"}, r"a\.out -> b\.in .*other shapes"),
        (model("b", ("FP32", [3, 8, 8]), ("FP32", [1])), {"in": "absent"}, r"absent -> b\.in begins nowhere"),
        (model("b", ("FP32", [3, 8, 8]), ("FP32", [1])), {}, r"Nothing feeds b\.in"),
        (
            model("b", ("FP32", [3, 8, 8]), ("FP32", [1])),
            {"in": "middle", "other": "start"},
            r"whole\.start -> b\.other ends nowhere",
        ),
        (model("b", ("FP32", [3, 8, 8]), ("FP32", [1]), largest=2), {"in": "middle"}, "batches of up to 2"),
    ],
)
def test_a_bad_edge_is_named(second: Any, takes: dict[str, str], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        begun(model("a", *FIRST)).step(second, takes=takes, gives={"out": "end"})


def test_outputs_are_checked_too() -> None:
    ensemble = begun(model("a", *FIRST))
    with pytest.raises(ModelError, match="begins nowhere"):
        ensemble.output("end")
    second = model("b", ("FP32", [3, 8, 8]), ("FP32", [1]))
    with pytest.raises(ModelError, match="no output 'absent'"):
        ensemble.step(second, takes={"in": "middle"}, gives={"absent": "end"})
    with pytest.raises(ModelError, match="made twice"):
        ensemble.step(second, takes={"in": "middle"}, gives={"out": "start"})


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    return manifest.model_copy(update=changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preprocessing": None}, "no preprocessing specification"),
        ({"preprocessing": Preprocessing.square(16)}, r"m_preprocess\.tensor -> m\.input joins FP32 \[3, 16, 16\]"),
        ({"labels": ("a", "b")}, r"m\.logits -> m_postprocess\.scores joins FP32 \[10\] to FP32 \[2\]"),
    ],
)
def test_a_plan_that_does_not_fit_its_facts_is_refused(changes: dict[str, Any], words: str, qdq_plan: Plan) -> None:
    manifest = changed(qdq_plan.manifest, **changes)
    config = make_config(qdq_plan.manifest, "m", PackageOptions())
    with pytest.raises(ModelError, match=words):
        make_pipeline(manifest, "m", config, 5)


def test_the_command_writes_four_models_and_can_be_repeated(qdq_plan: Plan, tmp_path: Path) -> None:
    arguments = ["package", str(qdq_plan.path), "--name", "m", "--repository", str(tmp_path / "models")]
    first = CliRunner().invoke(app, [*arguments, "--ensemble", "--top-k", "99", "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["pipeline"] == "m_pipeline"
    second = CliRunner().invoke(app, [*arguments, "--ensemble", "--top-k", "2"])
    assert second.exit_code == 0, second.output
    assert "m_pipeline takes image files" in second.stdout
    folders = {path.name for path in (tmp_path / "models").iterdir() if not path.name.startswith(".")}
    assert folders == {"m", "m_preprocess", "m_postprocess", "m_pipeline"}
    assert {path.name for path in tmp_path.iterdir()} == {"models"}
    assert (tmp_path / "models" / "m" / "2").is_dir()
    pipeline = read_config(tmp_path / "models" / "m_pipeline")
    assert [list(output.dims) for output in pipeline.output] == [[2], [2]]


def test_how_many_labels_is_asked_of_a_pipeline_only_and_is_five_by_default(qdq_plan: Plan, tmp_path: Path) -> None:
    arguments = ["package", str(qdq_plan.path), "--name", "m", "--repository", str(tmp_path / "models")]
    refused = CliRunner().invoke(app, [*arguments, "--top-k", "5"])
    assert refused.exit_code == 2
    assert "Add --ensemble" in refused.stderr
    assert not (tmp_path / "models").exists()
    assert CliRunner().invoke(app, [*arguments, "--ensemble"]).exit_code == 0
    assert [list(output.dims) for output in read_config(tmp_path / "models" / "m_pipeline").output] == [[5], [5]]


def test_somebody_elses_model_is_not_replaced_and_nothing_is_written(qdq_plan: Plan, tmp_path: Path) -> None:
    other = tmp_path / "models" / "m_pipeline"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text('backend: "python"\n')
    with pytest.raises(RepositoryError, match="m_pipeline is there already"):
        package_pipeline(qdq_plan.path, tmp_path / "models", "m")
    assert not (tmp_path / "models" / "m").exists()
