"""``validate`` sends a dataset's image files to a served pipeline and holds its labels against the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.data import open_dataset
from trtdeploy.data.preprocessing import Preprocessing
from trtdeploy.ledger import Ledger
from trtdeploy.plan import Plan, manifest_path
from trtdeploy.triton.pipeline import package_pipeline
from trtdeploy.triton.server.installation import find_tritonserver
from trtdeploy.triton.server.process import TritonServer

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("pytriton")

TOP_K = 3


@pytest.fixture(scope="module")
def server(qdq_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = tmp_path_factory.mktemp("pipeline") / "models"
    package_pipeline(qdq_plan.path, repository, "digits", top_k=TOP_K)
    with TritonServer(repository, find_tritonserver(), http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG and PNG files of several sizes: colours that no preprocessing but the right one keeps."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for digit in range(10):
            folder = root / split / str(digit)
            folder.mkdir(parents=True)
            for number in range(count):
                small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                size = tuple(rng.integers(40, 120, 2))
                image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
                image.save(folder / (f"{number}.png" if number == 2 else f"{number}.jpg"))
    return root


def validate(server: TritonServer, data: object, *arguments: object, scheme: str = "grpc") -> Any:
    url = server.grpc_url if scheme == "grpc" else server.http_url
    common = ["validate", "--url", url, "--model", "digits_pipeline", "--data", data, "--json"]
    return CliRunner().invoke(app, [*map(str, common), *map(str, arguments)])


@pytest.mark.parametrize(
    ("scheme", "how"),
    [("grpc", ()), ("http", ()), ("grpc", ("--stream", "--shared-memory")), ("http", ("--asyncio",))],
    ids=str,
)
def test_image_files_as_they_are(
    scheme: str, how: tuple[str, ...], server: TritonServer, photographs: Path, qdq_onnx: Path, tmp_path: Path
) -> None:
    gates = ("--reference", qdq_onnx, "--min-agreement", 100, "--max-drop", 0, "--max-variation", 2)
    records = ("--ledger", tmp_path / "ledger.json", "--batch-size", 4)
    done = validate(server, photographs, *gates, *records, *how, scheme=scheme)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["n"] == 30
    assert facts["top_k"]["k"] == TOP_K
    assert facts["top_k"]["accuracy"]["value"] >= facts["top1"]["value"]
    assert facts["top_k"]["same_classes"] == 100
    assert facts["top_k"]["largest_difference"] < 0.05
    recorded = Ledger(tmp_path / "ledger.json").outputs("served")
    with open_dataset(photographs) as dataset:
        assert recorded.ids == dataset.split("test").ids


def test_a_dataset_without_files_is_sent_as_png_and_compared_with_the_plan(
    server: TritonServer, qdq_plan: Plan, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    gates = ("--reference", qdq_plan.path, "--min-agreement", 100)
    records = ("--report", report, "--manifest", manifest_path(qdq_plan.path))
    done = validate(server, "digits", "--batch-size", 32, *gates, *records)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["n"] == 359
    assert facts["top_k"]["largest_difference"] < 0.05
    assert qdq_plan.manifest.plan_sha256 in report.read_text()


def test_the_manifest_of_another_plan_is_refused(server: TritonServer, qdq_plan: Plan, tmp_path: Path) -> None:
    facts = json.loads(manifest_path(qdq_plan.path).read_text())
    facts["labels"] = facts["labels"][::-1]
    (tmp_path / "other.json").write_text(json.dumps(facts))
    done = validate(server, "digits", "--manifest", tmp_path / "other.json", "--ledger", tmp_path / "ledger.json")
    assert done.exit_code == 2
    assert "other.json describes another plan than the one that is served as digits: the labels" in done.stderr
    assert not (tmp_path / "ledger.json").exists()


def test_a_pipeline_with_another_preprocessing_fails_the_gate(
    server: TritonServer, photographs: Path, qdq_onnx: Path, tmp_path: Path
) -> None:
    """The reference is run with what the pipeline should have been packaged with."""
    other = Preprocessing(resize=32, crop=(32, 32), colour="BGR", mean=(0, 0, 0), std=(1, 1, 1))
    (tmp_path / "other.json").write_text(other.to_json())
    arguments = ("--reference", qdq_onnx, "--min-agreement", 99, "--preprocessing", tmp_path / "other.json")
    done = validate(server, photographs, *arguments)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["top_k"]["largest_difference"] > 1


def test_a_file_that_the_pipeline_refuses_ends_the_run_with_its_reason(
    server: TritonServer, photographs: Path, tmp_path: Path
) -> None:
    shutil.copytree(photographs, tmp_path / "damaged")
    damaged = tmp_path / "damaged" / "test" / "4" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    done = validate(server, tmp_path / "damaged")
    assert done.exit_code == 3
    assert "requests were answered, then" in done.stderr
    assert "Image 1 of 1" in done.stderr


def test_load_sends_image_files_too(server: TritonServer, photographs: Path) -> None:
    quick = ["--concurrency", "2", "--warm-up", "0", "--window", "0.1", "--max-windows", "3", "--batch-size", "2"]
    common = ["load", "--url", server.grpc_url, "--model", "digits_pipeline", "--json", *quick]
    done = CliRunner().invoke(app, [*common, "--data", str(photographs)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["points"][0]["requests"] > 0
    refused = CliRunner().invoke(app, common)
    assert refused.exit_code == 2
    assert "Give --data" in refused.stderr
