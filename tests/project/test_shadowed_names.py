"""A user's own files may be called like our packages: ours are found whatever lies in the current folder."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trtdeploy.cli.main import app
from trtdeploy.module_command import module_command

COMMAND = str(Path(sys.executable).with_name("trtdeploy"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of a user's own, which nothing of ours may run."""
    for name in ("training", "trtdeploy", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the user was run')\n")
    return tmp_path


def run(*command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200, check=False
    )


def test_train_is_ours(folder: Path) -> None:
    done = run(COMMAND, "train", "fit", "--help", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "trtdeploy train fit" in done.stdout


def test_train_is_ours_on_the_python_path_too(folder: Path) -> None:
    (folder / "trtdeploy.py").unlink()
    (folder / "onnxruntime.py").unlink()
    for command in ([COMMAND], [sys.executable, "-m", "trtdeploy"]):
        done = run(*command, "train", "--help", folder=folder, PYTHONPATH=str(folder))
        assert done.returncode == 0, done.stderr
        assert "calibrate" in done.stdout


def test_errors_of_train_keep_their_exit_code(folder: Path) -> None:
    done = run(COMMAND, "train", "evaluate", "nowhere.safetensors", folder=folder)
    assert done.returncode == 2, done.stderr
    assert "nowhere.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert run(COMMAND, "train", "fly", folder=folder).returncode == 2


def test_a_build_in_a_child_process_is_ours(folder: Path, qdq_onnx: Path) -> None:
    shape = "input=1x3x32x32:1x3x32x32:2x3x32x32"
    done = run(COMMAND, "build", str(qdq_onnx), "-o", "model.plan", "--shape", shape, "--isolate", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.plan").exists()


def test_doctor_looks_at_what_is_installed(folder: Path) -> None:
    done = run(*module_command("trtdeploy.doctor.probe", "onnxruntime"), folder=folder)
    assert done.returncode == 0, done.stderr
    assert '"version"' in done.stdout


def test_a_module_command_has_its_arguments(folder: Path) -> None:
    assert run(*module_command("trtdeploy", "--version"), folder=folder).stdout.startswith("trtdeploy ")


def test_train_keeps_what_is_imported_already() -> None:
    module = import_module("training.ptq.ranges")
    assert CliRunner().invoke(app, ["train", "--help"]).exit_code == 0
    assert sys.modules["training"].ptq.ranges is module
