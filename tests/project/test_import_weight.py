"""What importing costs: the heavy libraries come only where they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trtdeploy.plan import Plan

HEAVY = ["torch", "tensorrt", "tensorrt_rtx", "cuda", "tritonclient", "pytriton", "sklearn"]
CHECK = "import sys; loaded = sorted(set({names!r}) & set(sys.modules)); assert not loaded, loaded"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import trtdeploy; dir(trtdeploy); trtdeploy.__version__",
            [*HEAVY, "onnxruntime", "onnx", "numpy", "pydantic"],
        ),
        ("from trtdeploy import errors, TrtDeployError", [*HEAVY, "onnxruntime", "onnx", "numpy", "pydantic"]),
        ("from trtdeploy import Engine", [*HEAVY, "onnx"]),
        ("from trtdeploy import Preprocessing, TensorSpec, ShapeRange, Ledger", [*HEAVY, "onnxruntime", "onnx"]),
        ("from trtdeploy import build, BuildConfig", [*HEAVY, "onnxruntime"]),
        ("import trtdeploy.cli.main", [*HEAVY, "onnxruntime", "onnx"]),
    ],
)
def test_importing_brings_only_what_is_needed(code: str, absent: list[str]) -> None:
    done = python(f"{code}\n{CHECK.format(names=absent)}")
    assert done.returncode == 0, done.stderr


def test_the_check_itself_notices_a_heavy_import() -> None:
    assert python("import onnx\n" + CHECK.format(names=["onnx"])).returncode == 1


def test_running_a_plan_needs_neither_onnx_nor_torch(qdq_plan: Plan) -> None:
    code = """
import sys
import numpy as np
from trtdeploy import Engine
with Engine.load(sys.argv[1]) as engine:
    engine.infer({"input": np.zeros((1, 3, 32, 32), np.float32)})
"""
    done = python(code + CHECK.format(names=[*HEAVY, "onnx"]), str(qdq_plan.path))
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    code = "import trtdeploy; [getattr(trtdeploy, n) for n in trtdeploy.__all__]; from trtdeploy import *; Engine.load"
    assert python(code).returncode == 0
    done = python("import trtdeploy; trtdeploy.Engin")
    assert "has no attribute 'Engin'" in done.stderr


def test_build_stays_the_function_whatever_else_is_imported() -> None:
    code = """
import trtdeploy.building.build, trtdeploy.cli.plans, trtdeploy.quickstart
from trtdeploy import build
import trtdeploy
assert callable(build) and callable(trtdeploy.build)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
