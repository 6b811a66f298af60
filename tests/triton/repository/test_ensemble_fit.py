"""A model that is part of a pipeline: what publishing, promoting and packaging check, and what ``--check`` compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.errors import RepositoryError
from trtdeploy.plan import Plan, write_plan
from trtdeploy.triton.config import PackageOptions, check_config, config_text
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.layout import active_version, model_names, read_config
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.repository.versions import promote, publish

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def packaged(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packaged") / "models"
    package_pipeline(qdq_plan.path, root, "m")
    return root


@pytest.fixture
def models(packaged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packaged, tmp_path / "models"))


def edit(models: Path, name: str, change: Callable[[Any], None]) -> None:
    config = read_config(models / name)
    change(config)
    (models / name / "config.pbtxt").write_text(config_text(config))


def set_parameter(key: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def apply(config: Any) -> None:
        facts = json.loads(config.parameters[key].string_value)
        config.parameters[key].string_value = json.dumps(change(facts))

    return apply


def state(models: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(models)): path for path in models.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(".lock")}


def test_a_version_of_a_pipeline_is_published_and_promoted(qdq_plan: Plan, models: Path) -> None:
    pipeline = read_config(models / "m_pipeline")
    publish(qdq_plan.path, models, "m")
    assert promote(models, "m").version == 2
    assert read_config(models / "m_pipeline") == pipeline
    for name in model_names(models):
        findings = check_config((models / name / "config.pbtxt").read_text(), models / name)
        assert [finding for finding in findings if finding.severity == "error"] == []


def pin_version(config: Any) -> None:
    config.ensemble_scheduling.step[1].model_version = 1


EDITS = [
    ("m_preprocess", set_parameter("trtdeploy.preprocessing", lambda spec: spec | {"mean": [0, 0, 0]}),
     r"m_preprocess prepares images otherwise .*: mean is \[0, 0, 0\] instead of \[0\.485"),
    ("m_preprocess", set_parameter("trtdeploy.preprocessing", lambda spec: []), "they cannot be read"),
    ("m_postprocess", set_parameter("trtdeploy.labels", lambda labels: [*labels[:3], "III", *labels[4:]]),
     r'm_postprocess has other labels .*: number 3 is "III" instead of "3"'),
    ("m_postprocess", set_parameter("trtdeploy.labels", lambda labels: labels[1:]), "9 instead of 10"),
    ("m_preprocess", lambda config: config.output[0].dims.__setitem__(2, 33), r"tensor.*\[-1, 3, 32, 33\]"),
    ("m_pipeline", lambda config: config.ensemble_scheduling.step[1].input_map.clear(), r"inputs \['input'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), EDITS)
def test_a_version_that_does_not_fit_the_pipeline_is_refused_and_nothing_is_written(
    name: str, change: Callable[[Any], None], words: str, qdq_plan: Plan, models: Path
) -> None:
    publish(qdq_plan.path, models, "m")
    edit(models, name, change)
    before = state(models)
    for step in (
        lambda: publish(qdq_plan.path, models, "m"),
        lambda: promote(models, "m"),
        lambda: package(qdq_plan.path, models, "m"),
    ):
        with pytest.raises(RepositoryError, match=f"An ensemble in .* would no longer fit m: m_pipeline.*{words}"):
            step()
    assert state(models) == before
    # as a whole, the pipeline is written anew
    package_pipeline(qdq_plan.path, models, "m")
    assert publish(qdq_plan.path, models, "m").version == 4


def test_smaller_batches_than_the_pipeline_sends_are_refused(qdq_plan: Plan, models: Path) -> None:
    small = PackageOptions(max_batch_size=8)
    with pytest.raises(RepositoryError, match="max_batch_size: 32 is more than m takes: 8"):
        publish(qdq_plan.path, models, "m", options=small)
    package_pipeline(qdq_plan.path, models, "m", options=small)
    assert read_config(models / "m_pipeline").max_batch_size == 8


def test_the_pipeline_of_a_published_model_fits_what_is_served(qdq_plan: Plan, models: Path) -> None:
    """Packaging it anew leaves the active version: larger batches than that takes would break the pipeline."""
    package_pipeline(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=8))
    publish(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=8))
    before = state(models)
    with pytest.raises(RepositoryError, match="served with batches of up to 8; m_pipeline would send 32"):
        package_pipeline(qdq_plan.path, models, "m")
    assert state(models) == before
    assert package_pipeline(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=4)).model.version == 4
    assert read_config(models / "m").max_batch_size == 8
    for step in (lambda: None, lambda: promote(models, "m", 4)):
        step()
        for name in model_names(models):
            findings = check_config((models / name / "config.pbtxt").read_text(), models / name)
            assert [finding for finding in findings if finding.severity == "error"] == []


def test_a_pipeline_that_runs_one_version_keeps_it(qdq_plan: Plan, models: Path) -> None:
    edit(models, "m_pipeline", pin_version)
    publish(qdq_plan.path, models, "m")
    with pytest.raises(RepositoryError, match="it runs version 1 of m, which would not be served"):
        promote(models, "m")
    assert active_version(models / "m") == 1
    assert promote(models, "m", force=True).version == 2


def test_another_preprocessing_is_named_field_by_field(qdq_plan: Plan, models: Path, tmp_path: Path) -> None:
    spec = qdq_plan.manifest.preprocessing
    assert spec is not None
    other = qdq_plan.manifest.model_copy(
        update={"preprocessing": spec.model_copy(update={"interpolation": "nearest", "std": (0.5, 0.5, 0.5)})}
    )
    plan = write_plan(tmp_path / "other.plan", qdq_plan.path.read_bytes(), other)
    with pytest.raises(RepositoryError, match=r'interpolation is "nearest" instead of "bilinear", std is \[0\.5, 0\.5'):
        publish(plan.path, models, "m")


def test_a_pipeline_behind_a_url_is_kept_too(qdq_plan: Plan, models: Path) -> None:
    edit(models, *EDITS[0][:2])
    arguments = ["publish", str(qdq_plan.path), "--name", "m", "--repository", f"file://{models}"]
    before = state(models)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "m_preprocess prepares images otherwise" in done.stderr
    assert state(models) == before
    package_pipeline(qdq_plan.path, models, "m")
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert set(model_names(models)) == {"m", "m_preprocess", "m_postprocess", "m_pipeline"}


def check(plan: Plan, models: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    of_model = ["--name", "m", "--repository", str(models), "--check", "--json"]
    done = CliRunner().invoke(app, ["package", str(plan.path), *of_model, *arguments])
    return done.exit_code, json.loads(done.stdout)


def test_the_whole_pipeline_is_compared(qdq_plan: Plan, models: Path, tmp_path: Path) -> None:
    code, facts = check(qdq_plan, models, "--ensemble")
    assert (code, facts["same"]) == (0, True)
    assert facts["pipeline_diff"] == {"m_preprocess": "", "m_postprocess": "", "m_pipeline": ""}
    code, facts = check(qdq_plan, models, "--ensemble", "--top-k", "2")
    assert (code, facts["same"], facts["config_diff"], facts["findings"]) == (1, False, "", [])
    changed = {name for name, diff in facts["pipeline_diff"].items() if diff}
    assert changed == {"m_postprocess", "m_pipeline"}
    assert "-  dims: 5\n+  dims: 2" in facts["pipeline_diff"]["m_pipeline"]
    with (models / "m_preprocess" / "1" / "model.py").open("a") as code_file:
        code_file.write("# edited\n")
    code, facts = check(qdq_plan, models, "--ensemble")
    assert code == 1
    assert facts["pipeline_diff"]["m_preprocess"].splitlines()[-1] == "-# edited"
    assert check(qdq_plan, models)[0] == 0  # the model alone is the same
    code, facts = check(qdq_plan, tmp_path / "empty", "--ensemble")
    assert code == 1
    assert all(diff.count("+") > 5 for diff in facts["pipeline_diff"].values())
    assert not (tmp_path / "empty").exists()


def test_the_comparison_of_a_model_says_what_would_break_in_its_pipeline(qdq_plan: Plan, models: Path) -> None:
    code, facts = check(qdq_plan, models, "--max-batch-size", "8")
    assert code == 1
    assert any("m_pipeline.max_batch_size: 32 is more than m takes: 8" in finding for finding in facts["findings"])
    assert check(qdq_plan, models, "--max-batch-size", "8", "--ensemble")[1]["findings"] == []
