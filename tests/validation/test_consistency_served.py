"""Instances and versions on a real tritonserver: those that answer alike, and those that do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from trtdeploy.building.build import BuildConfig, build
from trtdeploy.cli.main import app
from trtdeploy.plan import Plan
from trtdeploy.tensors import ShapeRange
from trtdeploy.triton.config import PackageOptions
from trtdeploy.triton.config.options import VersionPolicy
from trtdeploy.triton.repository.package import package
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

VALIDATE = ("validate", "--data", "digits", "--batch-size", "8", "--json")


@pytest.fixture(scope="module")
def negated(qdq_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same classifier with the opposite scores."""
    model = onnx.load(qdq_onnx)
    model.graph.node[-1].output[0] = "positive"
    model.graph.node.append(helper.make_node("Neg", ["positive"], ["logits"]))
    folder = tmp_path_factory.mktemp("negated")
    onnx.save(model, folder / "negated.onnx")
    size = (3, 32, 32)
    shapes = ShapeRange(min=(1, *size), opt=(1, *size), max=(32, *size))
    config = BuildConfig(profiles=({"input": shapes},), timing_rounds=1)
    return build(folder / "negated.onnx", folder / "negated.plan", config).path


@pytest.fixture(scope="module")
def server(qdq_plan: Plan, negated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Versions 1, 2 (the same) and 3 (the opposite) at a time; and a model one of whose two instances is a bit off."""
    repository = tmp_path_factory.mktemp("consistency") / "models"
    for plan in (qdq_plan.path, qdq_plan.path, negated):
        package(
            plan, repository, "several", options=PackageOptions(instances=2, version_policy=VersionPolicy(all=True))
        )
    folder = package(qdq_plan.path, repository, "uneven", options=PackageOptions(instances=2)).folder
    code = (folder / "1" / "model.py").read_text()
    spoiled = """

_initialize = TritonPythonModel.initialize


def initialize(self, args):
    _initialize(self, args)
    if args["model_instance_name"].endswith("_1"):
        infer = self.engine.infer
        self.engine.infer = lambda inputs: {
            name: np.nextafter(array, np.float32(np.inf)) for name, array in infer(inputs).items()
        }


TritonPythonModel.initialize = initialize
"""
    (folder / "1" / "model.py").write_text(code + spoiled)
    with TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


def validate(server: TritonServer, model: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, [*VALIDATE, "--url", server.grpc_url, "--model", model, *arguments])
    assert done.stdout, done.stderr
    return done.exit_code, json.loads(done.stdout)


def test_instances_answer_bit_for_bit(server: TritonServer) -> None:
    code, facts = validate(server, "several", "--version", "1", "--max-instance-difference", "0")
    assert code == 0
    assert {key: facts["instances"][key] for key in ("instances", "batch_size", "differing", "largest")} == {
        "instances": 2,
        "batch_size": 32,
        "differing": 0,
        "largest": 0,
    }


def test_an_instance_that_is_a_bit_off_is_found(server: TritonServer) -> None:
    code, facts = validate(server, "uneven", "--max-instance-difference", "0")
    assert code == 1
    assert facts["instances"]["differing"] > 0
    assert 0 < facts["instances"]["largest"] < 1e-3
    code, facts = validate(server, "uneven", "--max-instance-difference", "0.01")
    assert code == 0
    assert facts["gates"][0]["name"] == "instances"


def test_versions_are_compared_sample_by_sample(server: TritonServer) -> None:
    arguments = ("--compare-version", "2", "--min-version-agreement", "100")
    code, facts = validate(server, "several", "--version", "1", *arguments)
    assert code == 0
    (same,) = facts["versions"]
    assert (same["version"], same["agreement"], same["difference"]["difference"]["value"]) == ("2", 100, 0)
    assert same["largest"] < 0.01
    code, facts = validate(server, "several", "--version", "1", *arguments, "--compare-version", "3")
    assert code == 1
    assert [(gate["name"], gate["passed"]) for gate in facts["gates"]] == [
        ("agreement with version 2", True),
        ("agreement with version 3", False),
    ]
    opposite = facts["versions"][1]
    assert opposite["agreement"] == 0
    assert opposite["largest"] > 100
    assert facts["answered_by"] == {"1": facts["n"]}
