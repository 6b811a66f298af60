"""``trtdeploy doctor`` on the machine that runs the tests."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

from tests.cli.commands import cpu_seconds_of, run
from trtdeploy.plan import Plan


def test_it_describes_this_machine(qdq_plan: Plan, tmp_path: Path) -> None:
    environment = {**os.environ, "TRTDEPLOY_CACHE": str(tmp_path)}
    results = []
    used = cpu_seconds_of(lambda: results.append(run("doctor", qdq_plan.path, "--json", env=environment)))
    assert used < 30  # about 3
    [result] = results
    assert result.returncode in (0, 1), result.stderr  # 1 where this very machine has a mismatch
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["healthy"] else 1)
    library = report["machine"]["libraries"]["onnxruntime"]
    assert (library["state"], library["version"]) == ("ok", metadata.version("onnxruntime"))
    assert report["runtimes"]["onnxruntime"] == {
        "build": True,
        "run": True,
        "why_not_build": "",
        "why_not_run": "",
    }
    assert report["machine"]["cache"] == {"path": str(tmp_path), "writable": True, "detail": ""}
    (plan,) = report["plans"]
    assert plan["runs_here"], plan


def test_it_is_readable() -> None:
    result = run("doctor")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith(f"onnxruntime ok {metadata.version('onnxruntime')}") for line in lines)
    assert "build --runtime onnxruntime yes" in lines


def test_a_library_that_crashes_is_a_finding_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)")
    blocked = tmp_path / "file"
    blocked.touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRTDEPLOY_CACHE": str(blocked / "cache")}
    result = run("doctor", env=environment)
    assert result.returncode == 1
    assert "TensorRT is installed but does not work: importing it crashed (SIGSEGV)" in result.stdout
    assert f"The cache folder {blocked / 'cache'} cannot be written" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_plan_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    result = run("doctor", tmp_path / "absent.plan")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "There is no plan at" in result.stderr
