"""The wheel in an empty environment, with what the core declares and nothing else: it imports, builds and runs.

Once with the versions of ``constraints.txt``, once with the newest of everything. Only the extra ``server``
needs numpy 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = ["trtdeploy", "training", "pyproject.toml", "README.md", "LICENSE"]
pytestmark = pytest.mark.slow

# Modules that need an extra say so by the name of what is missing; anything else that fails is a fault.
IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import trtdeploy, training
missing, faults = {}, {}
for package in (trtdeploy, training):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name
        except Exception as error:
            faults[module.name] = repr(error)
print(json.dumps({"missing": missing, "faults": faults}))
"""

BUILD_AND_RUN = """
import json
import numpy, onnx, onnxruntime
from trtdeploy import BuildConfig, Engine, ShapeRange, build, errors

shapes = ShapeRange(min=(1, 3, 32, 32), opt=(1, 3, 32, 32), max=(4, 3, 32, 32))
build("model.onnx", "model.plan", BuildConfig(profiles=({"input": shapes},)))
batch = numpy.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(numpy.float32)
with Engine.load("model.plan", contexts=2) as engine:
    out = engine.infer({"input": batch})["logits"]
    futures = [engine.submit({"input": batch}) for _ in range(4)]
    assert all(future.result()["logits"].shape == (3, 10) for future in futures)
reference = onnxruntime.SessionOptions()
reference.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
session = onnxruntime.InferenceSession("model.onnx", reference, providers=["CPUExecutionProvider"])
expected = session.run(None, {"input": batch})[0]
difference = float(numpy.linalg.norm(out - expected) / numpy.linalg.norm(expected))
versions = {module.__name__: module.__version__ for module in (numpy, onnx, onnxruntime)}
print(json.dumps({"difference": difference, "versions": versions}))
"""


@dataclass(frozen=True)
class Environment:
    """An environment that holds the wheel and what it asks for."""

    folder: Path

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of its programs, with nothing of ours on the path."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=cwd, env=kept, capture_output=True, text=True, timeout=300, check=False
        )


def pip(python: Path, *arguments: str) -> None:
    """Run pip; skip where no package index can be reached."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--retries", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    if done.returncode and re.search(r"connection broken|NewConnectionError|Name or service not known", done.stderr):
        pytest.skip("no package index can be reached from here: what an empty environment would need cannot be had")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what the repository holds, so that nothing is left in it."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("the wheel is built from what version control lists, and this is no checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    folder = tmp_path_factory.mktemp("wheel")
    pip(Path(sys.executable), "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["exact versions", "newest versions"])
def environment(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An empty environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    options = ["--constraint", str(ROOT / "constraints.txt")] if request.param == "exact versions" else ["numpy>=2"]
    pip(folder / "bin" / "python", "install", "--quiet", *options, str(wheel))
    return Environment(folder)


def test_the_wheel_has_its_data_and_nothing_else_than_two_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"trtdeploy/py.typed", "training/py.typed", "trtdeploy/report/report.html.j2"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"trtdeploy", "training"}
    tracked = {
        path.relative_to(ROOT).as_posix() for top in ("trtdeploy", "training") for path in (ROOT / top).rglob("*.py")
    }
    assert tracked <= set(names)


def test_it_brings_what_the_core_declares(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("python", "-m", "pip", "list", "--format=json", cwd=tmp_path)
    installed = {package["name"].lower().replace("_", "-") for package in json.loads(done.stdout)}
    assert {Requirement(text).name for text in PROJECT["dependencies"]} <= installed
    extras = {Requirement(text).name for extra in PROJECT["optional-dependencies"].values() for text in extra}
    assert not installed & (extras - {"trtdeploy"})


def test_every_module_imports_or_names_what_is_missing(environment: Environment, tmp_path: Path) -> None:
    done = environment.run("python", "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["faults"] == {}
    missing = {module: name.split(".")[0] for module, name in outcome["missing"].items()}
    of_torch = {"torch", "modelopt", "pytorch_quantization"}
    assert {
        module for module, name in missing.items() if module.startswith("training") and name not in of_torch
    } == set()
    # what runs inside Triton imports what only Triton has
    others = {"tritonclient", "google", "fsspec", "jinja2", "matplotlib", "triton_python_backend_utils"}
    assert {f"{module}: {name}" for module, name in missing.items() if name not in of_torch | others} == set()


def test_it_builds_and_runs_a_plan(
    environment: Environment, qdq_onnx: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shutil.copy(qdq_onnx, tmp_path / "model.onnx")
    done = environment.run("python", "-c", BUILD_AND_RUN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["difference"] < 0.05
    newest = "newest" in request.node.callspec.params["environment"]
    assert int(outcome["versions"]["numpy"].split(".")[0]) == (2 if newest else 1)


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("trtdeploy --version", 0, "trtdeploy "),
        ("trtdeploy lint model.onnx", 1, "Q021"),
        ("trtdeploy build model.onnx -o m.plan --shape input=1x3x32x32:1x3x32x32:2x3x32x32", 0, ""),
        ("trtdeploy run m.plan --input input=random", 0, "logits"),
        ("trtdeploy inspect m.plan", 0, "onnxruntime"),
        ("trtdeploy package m.plan --name m --repository models", 3, "pip install 'trtdeploy[triton]'"),
        ("trtdeploy train fit -o float.safetensors", 3, "pip install 'trtdeploy[training]'"),
        ("trtdeploy quickstart --output q", 3, "pip install 'trtdeploy[training,triton,server]'"),
    ],
)
def test_commands_work_or_say_what_to_install(
    environment: Environment,
    command: str,
    code: int,
    says: str,
    qdq_onnx: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"commands-{environment.folder.name}"
    if not folder.exists():
        folder.mkdir()
        shutil.copy(qdq_onnx, folder / "model.onnx")
    done = environment.run(*command.split(), cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
