"""The whole road with a small network: all six stages, every file, and the errors on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
STAGES = ["float", "ptq", "qat", "onnx", "plan", "served"]


def quickstart(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "training")}
    return subprocess.run(
        [sys.executable, "-m", "trtdeploy", "quickstart", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1000,
    )


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("quickstart")
    # a file of the user's own, which is not what trains
    (folder / "training.py").write_text("raise SystemExit('the file of the user was run')\n")
    small = ["--model", "tiny_model:tiny", "--epochs", "2", "--qat-steps", "20"]
    return folder, quickstart(*small, "--output", "out", folder=folder)


def test_all_stages_of_the_same_samples(digits_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = digits_run
    assert done.returncode == 0, done.stderr
    ledger = json.loads((folder / "out" / "ledger.json").read_text())
    assert list(ledger["stages"]) == STAGES
    assert {stage["n"] for stage in ledger["stages"].values()} == {359}
    for name, stage in ledger["stages"].items():
        assert stage["top1"]["low"] <= stage["top1"]["value"] <= stage["top1"]["high"]
        assert stage["seconds"] > 0
        assert stage["latency_ms"] > 0, name
        with np.load(folder / "out" / stage["outputs"]) as outputs:
            assert outputs["logits"].shape == (359, 10)
    # from the graph on, only arithmetic in another order may differ
    assert ledger["stages"]["plan"]["agreement"] >= 99.7
    assert ledger["stages"]["served"]["agreement"] == 100


def test_table_says_what_the_ledger_says(digits_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = digits_run
    ledger = json.loads((folder / "out" / "ledger.json").read_text())
    for stage in ledger["stages"].values():
        assert f"{stage['top1']['value']:.2f} [{stage['top1']['low']:.2f}, {stage['top1']['high']:.2f}]" in done.stdout
    for name in ("ledger.json", "model.onnx", "model.plan", "model.plan.json", "model_repository", "tritonserver.log"):
        assert (folder / "out" / name).exists()


def test_run_again_on_a_folder_of_images(
    digits_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Another dataset into the same output, from the checkpoint of a float network instead of training."""
    folder, _ = digits_run
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label in map(str, range(10)):
            target = tmp_path / "data" / split / label
            target.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{index}.png")
    kept = tmp_path / "float.safetensors"
    kept.write_bytes((folder / "out" / "float.safetensors").read_bytes())
    done = quickstart(
        "--data",
        str(tmp_path / "data"),
        "--checkpoint",
        str(kept),
        "--qat-steps",
        "5",
        "--output",
        "out",
        "--json",
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["stages"]) == STAGES
    ledger = json.loads((folder / "out" / "ledger.json").read_text())
    assert ledger["stages"]["served"]["n"] == 100
    assert not (folder / "out" / "float.safetensors").exists()


def test_refuses_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years of work")
    done = quickstart("--output", "out", folder=tmp_path)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert (tmp_path / "out" / "thesis.txt").read_text() == "three years of work"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "nowhere"], 2, "no dataset at nowhere"),
        (["--tritonserver", "nowhere"], 3, "not an executable tritonserver"),
        (["--checkpoint", "nowhere.safetensors"], 2, "nowhere.safetensors"),
    ],
)
def test_bad_input_ends_with_a_message(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = quickstart("--output", "out", *arguments, folder=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
