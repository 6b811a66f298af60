from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.errors import ModelError, PlanCorruptError, RepositoryError, UsageError
from trtdeploy.plan import DeviceFacts, Plan, RuntimeFacts, write_plan
from trtdeploy.triton.config import PackageOptions, check_config
from trtdeploy.triton.config.options import VersionPolicy
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.repository.differences.deployed import compare
from trtdeploy.triton.repository.layout import active_version, read_config, versions
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.repository.sample import difference, read_sample
from trtdeploy.triton.repository.versions import list_versions, promote, prune, publish, rollback

pytest.importorskip("tritonclient.grpc")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def no_errors(folder: Path) -> bool:
    text = (folder / "config.pbtxt").read_text()
    return not [finding for finding in check_config(text, folder) if finding.severity == "error"]


def test_a_new_version_waits_until_it_is_promoted(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    assert active_version(folder) == 1  # the first one: there is nothing else to serve
    assert publish(qdq_plan.path, models, "m").version == 2
    assert (versions(folder), active_version(folder)) == ([1, 2], 1)
    assert promote(models, "m").before == 1
    assert active_version(folder) == 2
    assert rollback(models, "m").version == 1
    assert rollback(models, "m").version == 2  # back to where we were
    steps = [event["step"] for event in json.loads((folder / "versions.json").read_text())["events"]]
    assert steps == ["publish", "publish", "promote", "rollback", "rollback"]
    assert no_errors(folder)


def test_a_packaged_model_can_be_published_to(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    publish(qdq_plan.path, models, "m")
    assert active_version(folder) == 1
    promote(models, "m")
    assert rollback(models, "m").version == 1
    assert [entry.facts is None for entry in list_versions(models, "m")] == [True, False]


def served_with(folder: Path) -> tuple[int, int]:
    config = read_config(folder)
    return config.max_batch_size, config.instance_group[0].count


def test_a_rollback_to_a_packaged_version_serves_it_as_it_was_packaged(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m", options=PackageOptions(instances=3, max_batch_size=8)).folder
    with (folder / "config.pbtxt").open("a") as config:
        config.write("response_cache { enable: true }\n")  # by hand, which is in order before anything is published
    publish(qdq_plan.path, models, "m")
    assert served_with(folder) == (8, 3)
    promote(models, "m")
    assert served_with(folder) == (32, 1)
    assert rollback(models, "m").version == 1
    assert served_with(folder) == (8, 3)
    assert read_config(folder).response_cache.enable
    assert active_version(folder) == 1
    promote(models, "m")
    assert (served_with(folder), read_config(folder).response_cache.enable) == ((32, 1), False)


def test_a_copied_version_keeps_the_config_that_it_was_served_with(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=8)).folder
    publish(qdq_plan.path, models, "m")
    (folder / "1" / "config.pbtxt").unlink()  # as older releases of other tools have left it
    promote(models, "m")
    rollback(models, "m")
    assert served_with(folder) == (8, 1)


def test_packaging_onto_a_published_model_changes_nothing_that_is_served(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    before = (folder / "config.pbtxt").read_bytes()
    of_model = ["--name", "m", "--repository", str(models), "--max-batch-size", "4"]
    done = CliRunner().invoke(app, ["package", str(qdq_plan.path), *of_model])
    assert done.stdout.startswith(f"{folder}: version 2, active is 1\n")
    assert (folder / "config.pbtxt").read_bytes() == before
    check = ["package", str(qdq_plan.path), *of_model, "--check", "--json"]
    compared = CliRunner().invoke(app, check)
    facts = json.loads(compared.stdout)
    assert (compared.exit_code, facts["deployed_as"], facts["active"]) == (1, [1, 2], 1)
    assert "-max_batch_size: 32\n+max_batch_size: 4" in facts["config_diff"]
    promote(models, "m")
    assert served_with(folder) == (4, 1)
    assert CliRunner().invoke(app, check).exit_code == 0
    rollback(models, "m")
    assert served_with(folder) == (32, 1)


def test_packaging_onto_published_versions_is_no_edit_by_hand(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    package(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=4))
    assert (versions(folder), active_version(folder)) == ([1, 2], 1)
    assert promote(models, "m", 2).before == 1
    history = json.loads((folder / "versions.json").read_text())
    assert [event["step"] for event in history["events"]] == ["publish", "package", "promote"]
    assert set(history["versions"]) == {"1", "2"}

    (folder / "config.pbtxt").write_text((folder / "config.pbtxt").read_text() + "# mine\n")
    with pytest.raises(RepositoryError, match="was edited"):
        promote(models, "m", 1)


def test_a_label_with_a_line_break_is_refused(qdq_plan: Plan, models: Path, tmp_path: Path) -> None:
    labels = ("two\nlines", *(str(number) for number in range(1, 10)))
    manifest = qdq_plan.manifest.model_copy(update={"labels": labels})
    broken = write_plan(tmp_path / "broken.plan", qdq_plan.path.read_bytes(), manifest)
    with pytest.raises(ModelError, match="line break"):
        package(broken.path, models, "m")
    assert not (models / "m").exists()


def test_the_manifest_says_what_a_version_is(qdq_plan: Plan, models: Path) -> None:
    publish(qdq_plan.path, models, "m")
    (entry,) = list_versions(models, "m")
    assert entry.active
    assert entry.facts is not None
    facts = qdq_plan.manifest
    assert (entry.facts.plan_sha256, entry.facts.onnx_sha256) == (facts.plan_sha256, facts.onnx.sha256)
    assert entry.facts.runtime == {"name": "onnxruntime", "version": facts.runtime.version}
    assert facts.tactic is not None
    assert entry.facts.latency_ms == min(facts.tactic.milliseconds.values()) > 0


def test_a_known_sample_lies_beside_the_version(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    pair = read_sample(folder / "1")
    assert pair is not None
    inputs, outputs = pair
    assert inputs["input"].shape == (1, 3, 32, 32)
    assert difference(outputs, outputs) == ""
    assert "off by" in difference(outputs, {"logits": outputs["logits"] + 1})
    assert "off by nan" in difference(outputs, {"logits": outputs["logits"] * float("nan")})
    assert "shape" in difference(outputs, {"logits": outputs["logits"][:, 1:]})


def test_pruning_keeps_what_is_served_and_what_was(qdq_plan: Plan, models: Path) -> None:
    for _ in range(5):
        publish(qdq_plan.path, models, "m")
    promote(models, "m", 2)
    assert prune(models, "m", keep=1) == [3, 4]
    assert versions(models / "m") == [1, 2, 5]
    assert no_errors(models / "m")
    assert prune(models, "m", keep=1) == []


@pytest.mark.parametrize(
    ("policy", "left"), [("specific { versions: [ 1, 3 ] }", [1, 3, 4]), ("all { }", [1, 2, 3, 4])]
)
def test_pruning_keeps_every_version_that_is_served(policy: str, left: list[int], qdq_plan: Plan, models: Path) -> None:
    for _ in range(4):
        folder = package(qdq_plan.path, models, "m").folder
    with (folder / "config.pbtxt").open("a") as config:
        config.write(f"version_policy {{ {policy} }}\n")
    assert prune(models, "m", keep=1) == [number for number in range(1, 5) if number not in left]
    assert versions(folder) == left
    assert no_errors(folder)


def test_a_number_that_is_given_anew_after_a_killed_pruning_can_be_pruned(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    for _ in range(2):
        publish(qdq_plan.path, models, "m")
    (folder / "2").rename(folder / ".pruned-2")  # and there it was killed
    publish(qdq_plan.path, models, "m", version=2)
    assert prune(models, "m", keep=1) == [2]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "3"]


def test_a_damaged_plan_is_not_promoted(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    publish(qdq_plan.path, models, "m")
    (folder / "2" / "engine.plan").write_bytes(b"x")
    with pytest.raises(PlanCorruptError):
        promote(models, "m")
    assert active_version(folder) == 1


def test_an_edit_by_hand_is_not_lost(qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    publish(qdq_plan.path, models, "m")
    edited = (folder / "config.pbtxt").read_text() + "response_cache { enable: true }\n"
    (folder / "config.pbtxt").write_text(edited)
    with pytest.raises(RepositoryError, match="was edited"):
        promote(models, "m")
    assert (folder / "config.pbtxt").read_text() == edited
    assert promote(models, "m", force=True).version == 2


@pytest.mark.parametrize("name", ["../m", "a/b", "", ".."])
def test_names_that_lead_elsewhere_are_refused(name: str, models: Path, qdq_plan: Plan) -> None:
    for call in (
        lambda: publish(qdq_plan.path, models, name),
        lambda: promote(models, name),
        lambda: rollback(models, name),
        lambda: prune(models, name, keep=1),
        lambda: list_versions(models, name),
    ):
        with pytest.raises(RepositoryError, match="cannot be a model's name"):
            call()
    assert not models.exists()


def test_a_link_out_of_the_repository_is_refused(qdq_plan: Plan, models: Path, tmp_path: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    shutil.move(folder / "1", tmp_path / "outside")
    (folder / "1").symlink_to(tmp_path / "outside")
    for call in (lambda: publish(qdq_plan.path, models, "m"), lambda: promote(models, "m", 1)):
        with pytest.raises(RepositoryError, match="leads out of the repository"):
            call()


def test_packaging_writes_nothing_through_a_link_out_of_the_repository(
    qdq_plan: Plan, models: Path, tmp_path: Path
) -> None:
    models.mkdir()
    outside = package(qdq_plan.path, tmp_path / "elsewhere", "m").folder
    (models / "m").symlink_to(outside)
    package_pipeline(qdq_plan.path, tmp_path / "elsewhere", "p")
    (models / "n_pipeline").symlink_to(tmp_path / "elsewhere" / "p_pipeline")
    before = {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()}
    for call in (
        lambda: package(qdq_plan.path, models, "m"),
        lambda: package_pipeline(qdq_plan.path, models, "m"),
        lambda: package_pipeline(qdq_plan.path, models, "n"),
    ):
        with pytest.raises(RepositoryError, match="leads out of the repository"):
            call()
    assert {path: path.read_bytes() for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()} == before
    assert not (models / "n").exists()


def test_a_model_without_a_version_is_named(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    shutil.rmtree(folder / "1")
    for live in ([], ["--url", "http://127.0.0.1:9"]):
        done = CliRunner().invoke(app, ["promote", "--name", "m", "--repository", str(models), *live])
        assert done.exit_code == 2
        assert f"{folder} has no version" in done.stderr


@pytest.mark.parametrize("content", [b'name: "\xff\xfe"', b"name: {", b"unheard_of: 1"])
def test_a_damaged_config_of_a_version_is_named_and_never_served(content: bytes, qdq_plan: Plan, models: Path) -> None:
    folder = publish(qdq_plan.path, models, "m").folder
    publish(qdq_plan.path, models, "m")
    (folder / "2" / "config.pbtxt").write_bytes(content)
    before = (folder / "config.pbtxt").read_bytes()
    for more in ([], ["--force"], ["--url", "http://127.0.0.1:9"]):
        done = CliRunner().invoke(app, ["promote", "--name", "m", "--repository", str(models), *more])
        assert done.exit_code == 2
        assert f"error: {folder / '2' / 'config.pbtxt'}" in done.stderr
    assert (folder / "config.pbtxt").read_bytes() == before


def test_a_version_policy_is_refused_where_promotion_says_what_is_served(qdq_plan: Plan, models: Path) -> None:
    options = PackageOptions(version_policy=VersionPolicy(all=True))
    with pytest.raises(UsageError, match="version_policy was given for m, which is published"):
        publish(qdq_plan.path, models, "m", options=options)
    assert not models.exists()
    folder = publish(qdq_plan.path, models, "m").folder
    with pytest.raises(UsageError, match="Leave version_policy out"):
        package(qdq_plan.path, models, "m", options=options)
    assert versions(folder) == [1]


def test_a_version_policy_is_applied_to_a_packaged_model(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    for policy, kind in ((VersionPolicy(all=True), "all"), (VersionPolicy(latest=2), "latest")):
        options = PackageOptions(version_policy=policy)
        package(qdq_plan.path, models, "m", options=options)
        assert read_config(folder).version_policy.WhichOneof("policy_choice") == kind
        assert compare(qdq_plan.path, models, "m", options).same
    before = versions(folder)
    with pytest.raises(RepositoryError, match=r"names version 9; there would be \[1, 2, 3, 4\]"):
        package(qdq_plan.path, models, "m", options=PackageOptions(version_policy=VersionPolicy(specific=(1, 9))))
    assert versions(folder) == before
    package(qdq_plan.path, models, "m")  # which says nothing about it
    assert read_config(folder).version_policy.latest.num_versions == 2


def test_a_taken_version_is_refused_and_nothing_has_changed(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    before = (folder / "config.pbtxt").read_bytes()
    with pytest.raises(RepositoryError, match="already has a version 1"):
        publish(qdq_plan.path, models, "m", version=1)
    assert (folder / "config.pbtxt").read_bytes() == before
    assert not (folder / "1" / "config.pbtxt").exists()


def test_versions_that_are_not_there(qdq_plan: Plan, models: Path) -> None:
    with pytest.raises(RepositoryError, match="There is no model 'm'"):
        promote(models, "m")
    publish(qdq_plan.path, models, "m")
    with pytest.raises(RepositoryError, match="has no version 7"):
        promote(models, "m", 7)
    with pytest.raises(RepositoryError, match="no version to roll back to"):
        rollback(models, "m")


def test_a_plan_is_compared_with_what_is_deployed(qdq_plan: Plan, models: Path) -> None:
    first = compare(qdq_plan.path, models, "m")
    assert not first.same
    assert '+name: "m"' in first.config_diff
    folder = publish(qdq_plan.path, models, "m").folder
    assert compare(qdq_plan.path, models, "m").same
    text = (folder / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(text.replace("count: 1", "count: 2"))
    changed = compare(qdq_plan.path, models, "m")
    assert not changed.same
    assert "-  count: 2\n+  count: 1" in changed.config_diff


def for_gpu(plan: Plan, target: Path, capability: str, **changes: Any) -> Path:
    facts = {
        "runtime": RuntimeFacts(name="tensorrt", version="10.16.1.11"),
        "device": DeviceFacts(kind="gpu", name="a GPU", capability=capability),
        **changes,
    }
    return write_plan(target, plan.path.read_bytes(), plan.manifest.model_copy(update=facts)).path


def test_each_gpu_loads_its_own_plan(qdq_plan: Plan, models: Path, tmp_path: Path) -> None:
    plan, other = (for_gpu(qdq_plan, tmp_path / f"{name}.plan", name) for name in ("8.9", "9.0"))
    folder = publish(plan, models, "m", other_gpus=[other]).folder
    assert dict(read_config(folder).cc_model_filenames) == {"9.0": "sm9.0.plan"}
    files = {path.name for path in (folder / "1").iterdir()}
    assert {"model.plan", "model.plan.json", "sm9.0.plan", "sm9.0.plan.json"} <= files
    text = (folder / "config.pbtxt").read_text()
    assert not [finding for finding in check_config(text, folder, gpus=2) if finding.severity == "error"]
    (folder / "1" / "sm9.0.plan").unlink()
    assert any("sm9.0.plan" in str(finding) for finding in check_config(text, folder, gpus=2))
    for bad in (plan, qdq_plan.path, for_gpu(qdq_plan, tmp_path / "x.plan", "9.0", inputs=())):
        with pytest.raises(ModelError):
            publish(plan, models, "m", other_gpus=[bad])
    assert versions(folder) == [1]


def test_publishing_leaves_all_served_versions_served(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    package(qdq_plan.path, models, "m")
    with (folder / "config.pbtxt").open("a") as config:
        config.write("version_policy { all { } }\n")
    publish(qdq_plan.path, models, "m")
    assert list(read_config(folder).version_policy.specific.versions) == [1, 2]
