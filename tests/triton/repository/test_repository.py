from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.engine import Engine
from trtdeploy.errors import ModelError, PlanCorruptError, RepositoryError
from trtdeploy.plan import Plan, manifest_path
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.repository.layout import model_names, read_config, versions
from trtdeploy.triton.repository.package import PackagedModel, package

VERSION_FILES = ["engine.plan", "engine.plan.json", "model.py"]
COMMAND = [sys.executable, "-m", "trtdeploy", "package"]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with its bytes; lock files say nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith(".lock")
    }


def copy_plan(plan: Plan, target: Path) -> Path:
    shutil.copy(plan.path, target)
    shutil.copy(manifest_path(plan.path), manifest_path(target))
    return target


def change_model(source: Path, target: Path, **metadata: str) -> Path:
    """Build the plan of a model with other metadata."""
    model = onnx.load(source)
    properties = {entry.key: entry.value for entry in model.metadata_props} | metadata
    helper.set_model_props(model, properties)
    onnx.save(model, target.with_suffix(".onnx"))
    return build(target.with_suffix(".onnx"), target, BuildConfig(timing_rounds=1)).path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_a_packaged_model_is_complete_and_loads(qdq_plan: Plan, models: Path) -> None:
    packaged = package(qdq_plan.path, models, "digits")
    assert packaged == PackagedModel("digits", 1, models / "digits")
    assert sorted(path.name for path in packaged.folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert sorted(path.name for path in (packaged.folder / "1").iterdir()) == VERSION_FILES
    assert (packaged.folder / "labels.txt").read_text().split() == [str(digit) for digit in range(10)]
    assert read_config(packaged.folder).name == "digits"
    with Engine.load(packaged.folder / "1" / "engine.plan") as engine:
        assert engine.infer({"input": np.zeros((1, 3, 32, 32), np.float32)})["logits"].shape == (1, 10)
    assert [path.name for path in models.parent.iterdir()] == ["models"]


def test_versions_count_up_and_may_be_chosen(qdq_plan: Plan, models: Path) -> None:
    assert [package(qdq_plan.path, models, "m").version for _ in range(2)] == [1, 2]
    assert package(qdq_plan.path, models, "m", version=10).version == 10
    assert package(qdq_plan.path, models, "m").version == 11
    assert package(qdq_plan.path, models, "m", version=3).version == 3
    assert versions(models / "m") == [1, 2, 3, 10, 11]
    assert model_names(models) == ["m"]


def test_an_existing_version_is_refused_and_untouched(qdq_plan: Plan, models: Path) -> None:
    package(qdq_plan.path, models, "m")
    before = contents(models)
    with pytest.raises(RepositoryError, match="already has a version 1") as caught:
        package(qdq_plan.path, models, "m", version=1, options=PackageOptions(instances=4))
    assert "version 2" in str(caught.value)
    assert contents(models) == before


@pytest.mark.parametrize("version", [0, -1, 2**63])
def test_versions_that_triton_does_not_count_are_refused(version: int, qdq_plan: Plan, models: Path) -> None:
    with pytest.raises(RepositoryError, match=r"Version -?\d+ is not possible"):
        package(qdq_plan.path, models, "m", version=version)
    assert not models.exists()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../a", "/a", "-x", ".hidden", "a..b", "a b", "a\n", "ä", "a\0", "x" * 129, "x" * 5000],
    ids=lambda name: ascii(name[:10]),
)
def test_impossible_names_are_refused_with_nothing_written(name: str, qdq_plan: Plan, models: Path) -> None:
    with pytest.raises(RepositoryError, match="cannot be a model's name") as caught:
        package(qdq_plan.path, models, name)
    assert len(str(caught.value)) < 400
    assert not models.exists()


def test_the_longest_name_works(qdq_plan: Plan, models: Path) -> None:
    assert package(qdq_plan.path, models, "x" * 128).folder.is_dir()


def test_a_corrupt_plan_is_refused_with_nothing_written(qdq_plan: Plan, models: Path, tmp_path: Path) -> None:
    plan = copy_plan(qdq_plan, tmp_path / "bad.plan")
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(PlanCorruptError):
        package(plan, models, "m")
    assert not models.exists()


def test_a_model_with_other_inputs_is_refused(qdq_plan: Plan, qdq_onnx: Path, models: Path, tmp_path: Path) -> None:
    package(qdq_plan.path, models, "m")
    before = contents(models)
    model = onnx.load(qdq_onnx)
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "input" else name for name in node.input]
    onnx.save(model, tmp_path / "renamed.onnx")
    plan = build(tmp_path / "renamed.onnx", tmp_path / "renamed.plan", BuildConfig(timing_rounds=1))
    with pytest.raises(RepositoryError, match=r"image TYPE_FP32.*input TYPE_FP32"):
        package(plan.path, models, "m")
    assert contents(models) == before


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("trtdeploy.labels", '["9","8","7","6","5","4","3","2","1","0"]', "labels"),
        ("trtdeploy.preprocessing", '{"resize": 32, "crop": [32, 32], "mean": [0, 0, 0]}', "preprocessing"),
    ],
)
def test_a_version_that_clients_would_misread_is_refused(
    key: str, value: str, what: str, qdq_plan: Plan, qdq_onnx: Path, models: Path, tmp_path: Path
) -> None:
    package(qdq_plan.path, models, "m")
    before = contents(models)
    other = change_model(qdq_onnx, tmp_path / "other.plan", **{key: value})
    with pytest.raises(RepositoryError, match=f"The {what} of this plan differ"):
        package(other, models, "m")
    assert contents(models) == before


def test_the_version_policy_of_the_operator_survives_a_new_version(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    with (folder / "config.pbtxt").open("a") as config:
        config.write("version_policy { specific { versions: [ 1 ] } }\n")
    package(qdq_plan.path, models, "m", options=PackageOptions(instances=2))
    config = read_config(folder)
    assert list(config.version_policy.specific.versions) == [1]
    assert config.instance_group[0].count == 2


def test_a_folder_that_is_no_model_is_left_alone(qdq_plan: Plan, models: Path) -> None:
    (models / "m").mkdir(parents=True)
    (models / "m" / "notes.txt").write_text("mine")
    with pytest.raises(RepositoryError, match="not a model of Triton's"):
        package(qdq_plan.path, models, "m")
    assert contents(models) == {"m": None, "m/notes.txt": b"mine"}


def test_a_damaged_config_is_reported(qdq_plan: Plan, models: Path) -> None:
    folder = package(qdq_plan.path, models, "m").folder
    (folder / "config.pbtxt").write_text("name: {")
    with pytest.raises(RepositoryError, match=r"config\.pbtxt is not a Triton model configuration"):
        package(qdq_plan.path, models, "m")


def test_options_that_the_plan_cannot_meet_write_nothing(qdq_plan: Plan, models: Path) -> None:
    with pytest.raises(ModelError, match="larger than what the plan's profiles cover"):
        package(qdq_plan.path, models, "m", options=PackageOptions(max_batch_size=33))
    assert not models.exists()


def test_an_empty_or_missing_repository_has_no_models(models: Path) -> None:
    with pytest.raises(RepositoryError, match="There is no model repository"):
        model_names(models)
    models.mkdir()
    (models / "not-a-model").mkdir()
    with pytest.raises(RepositoryError, match="holds no model"):
        model_names(models)


def test_a_repository_that_cannot_be_written_ends_with_exit_code_2(qdq_plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [*COMMAND, str(qdq_plan.path), "--name", "m", "--repository", str(tmp_path / "file" / "models")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_repository_as_it_was(qdq_plan: Plan, models: Path) -> None:
    package(qdq_plan.path, models, "m")
    before = contents(models)

    def limit_file_size() -> None:  # as a quota does: writes beyond it fail
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    for name in ("m", "new"):
        done = subprocess.run(
            [*COMMAND, str(qdq_plan.path), "--name", name, "--repository", str(models)],
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=limit_file_size,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.returncode == 2
        assert "File too large" in done.stderr
        assert contents(models) == before
        assert [path.name for path in models.parent.iterdir()] == ["models"]


@pytest.mark.parametrize("failing", ["mkdir", "rename"])
def test_a_repository_that_is_a_mount_point_is_written_all_the_same(
    failing: str, qdq_plan: Plan, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of a rename from another file system, or of a parent that is not ours."""
    real = getattr(Path, failing)

    def refuse(self: Path, *arguments: object, **options: object) -> object:
        if self.parent == models.parent and self.name.startswith(".models.staging"):
            raise OSError(errno.EXDEV if failing == "rename" else errno.EACCES, "refused")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, failing, refuse)
    package(qdq_plan.path, models, "m")
    if failing == "mkdir":  # a rename of the version folder itself is another path
        package(qdq_plan.path, models, "m")
        assert versions(models / "m") == [1, 2]
    assert sorted(path.name for path in models.iterdir()) == [".m.lock", "m"]
    assert sorted(path.name for path in (models / "m" / "1").iterdir()) == VERSION_FILES


def test_a_real_mount_point_works_as_a_repository(qdq_plan: Plan, models: Path) -> None:
    models.mkdir()
    inside = (
        f'mount -t tmpfs none "{models}" && "{sys.executable}" -m trtdeploy package "{qdq_plan.path}" --name m '
        f'--repository "{models}" && cd "{models}" && find . | sort'
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, timeout=300)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stderr
    assert "./m/1/engine.plan" in done.stdout
    assert "staging" not in done.stdout


def test_a_full_file_system_leaves_nothing_half_written(qdq_plan: Plan, models: Path) -> None:
    models.mkdir()
    inside = (
        f'mount -t tmpfs -o size=24k none "{models}" && "{sys.executable}" -m trtdeploy package "{qdq_plan.path}" '
        f'--name m --repository "{models}"; code=$?; cd "{models}"; find . | sort; exit $code'
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, timeout=300)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert done.stdout.split() == [".", "./.m.lock"]


def _publish(
    plan: str, repository: str, start: multiprocessing.synchronize.Barrier, numbers: multiprocessing.Queue
) -> None:
    start.wait(30)
    for _ in range(3):
        numbers.put(package(plan, repository, "m").version)


def test_publishers_at_the_same_time_get_different_versions(qdq_plan: Plan, models: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, numbers = spawn.Barrier(2), spawn.Queue()
    publishers = [spawn.Process(target=_publish, args=(str(qdq_plan.path), str(models), start, numbers)) for _ in "ab"]
    for publisher in publishers:
        publisher.start()
    given = sorted(numbers.get(timeout=300) for _ in range(6))
    for publisher in publishers:
        publisher.join(30)
        assert publisher.exitcode == 0
    assert given == versions(models / "m") == [1, 2, 3, 4, 5, 6]
    for version in given:
        assert sorted(path.name for path in (models / "m" / str(version)).iterdir()) == VERSION_FILES


KILLED = """
import os, shutil, signal, sys
from pathlib import Path

from trtdeploy.triton.repository.package import package

plan, packaged, base = sys.argv[1:]
package(plan, Path(base).parent / "warm", "m")  # what is imported late is imported now
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "shutil.rmtree"}

def publish(models, deadly):
    count = 0

    def hook(event, arguments):  # before every step that touches files
        nonlocal count
        count += event in EVENTS
        if count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    package(plan, models, "m")
    os._exit(0)

for kind in ("new", "old"):
    for deadly in range(1, 1000, 2):
        models = Path(base) / f"{kind}{deadly:03}" / "models"
        models.mkdir(parents=True)
        if kind == "old":
            shutil.copytree(packaged, models / "m")
        child = os.fork() or publish(models, deadly)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
"""


def test_a_kill_before_any_step_leaves_the_version_out_or_complete(qdq_plan: Plan, tmp_path: Path) -> None:
    """A process for every other step of packaging, killed right before it, for a new model and for a new version."""
    packaged = package(qdq_plan.path, tmp_path / "whole", "m").folder
    complete = contents(packaged / "1")
    base = tmp_path / "killed"
    base.mkdir()
    arguments = [str(qdq_plan.path), str(packaged), str(base)]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, timeout=400)
    outcomes: dict[str, list[str]] = {"new": [], "old": []}
    for trial in sorted(base.iterdir()):
        models, kind = trial / "models", trial.name[:3]
        assert {path.name for path in models.iterdir()} <= {"m", ".m.lock"}, "Triton takes every folder for a model"
        present = versions(models / "m")
        expected = [1] if kind == "old" else []
        if present != expected:
            assert present == [*expected, len(expected) + 1]
        assert all(contents(models / "m" / str(version)) == complete for version in present)
        if present:
            assert read_config(models / "m").name == "m"
            assert (models / "m" / "labels.txt").is_file()
        else:
            assert not (models / "m").exists()
        outcomes[kind].append("complete" if present != expected else "without")
        # what was left beside the repository is in nobody's way, and goes with the next attempt
        if len(outcomes[kind]) % 5 == 0:
            package(qdq_plan.path, models, "m")
            assert [path.name for path in trial.iterdir()] == ["models"]
    for seen in outcomes.values():
        assert len(seen) > 15
        assert set(seen) == {"complete", "without"}
        assert seen == sorted(seen, reverse=True), "once it is there, it stays"
