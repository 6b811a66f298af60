"""The same numbers on a processor without VNNI: an emulated one runs the road, and numpy's integers are the judge."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trtdeploy.runtimes.onnxruntime.building.integer_sums import exact_products
from trtdeploy.runtimes.onnxruntime.cpu import instruction_sets

ROOT = Path(__file__).parents[3]
EMULATOR = shutil.which("qemu-x86_64")
NETWORKS = ("for TensorRT", "for ONNX Runtime", "sequence")
HASWELL = pytest.param(
    "Haswell",
    marks=[
        pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)"),
        pytest.mark.skipif(platform.machine() != "x86_64", reason="this Python is not one for x86-64"),
    ],
)


@pytest.fixture(scope="module", params=["this one", HASWELL])
def processor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(processor: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    emulator = [] if processor == "this one" else [str(EMULATOR), "-cpu", processor]
    command = [
        *emulator,
        sys.executable,
        "-m",
        "tests.runtimes.onnxruntime.emulated_processor",
        str(tmp_path_factory.mktemp("road")),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def saturates(found: dict[str, Any]) -> bool:
    return ["uint8", "int8"] not in found["exact_products"]


def test_the_processor_itself_is_questioned(processor: str, found: dict[str, Any]) -> None:
    """Under the emulator /proc/cpuinfo is still that of the host, and so would be what is read there."""
    if processor == "Haswell":
        assert (found["processor"], found["instruction_sets"]) == (
            "Intel Core Processor (Haswell)",
            "x86_64+avx+avx2",
        )
        assert found["exact_products"] == [["int8", "int8"], ["uint8", "uint8"]]
    else:
        assert found["instruction_sets"] == instruction_sets()
        assert found["exact_products"] == [list(types) for types in sorted(exact_products())]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_session_with_all_optimizations_is_wrong_where_the_processor_saturates(
    network: str, found: dict[str, Any]
) -> None:
    """Without this, the emulator might emulate nothing and the networks might have no sums that saturate."""
    error = found["networks"][network]["plain_session_error"]
    assert (error > 0.1) if saturates(found) else (error < 1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_tactic_and_the_plan_compute_what_integers_give(network: str, found: dict[str, Any]) -> None:
    facts = found["networks"][network]
    assert facts["plan_error"] < 1e-6
    assert {"integer-kernels", "integer-products", "float-weights"} <= facts["tactics"].keys()
    assert {name: each["error"] for name, each in facts["tactics"].items() if each["error"] > 1e-6} == {}
    assert "MatMulIntegerToFloat" in facts["tactics"]["integer-products"]["kernels"]
    assert not [reason for reason in facts["rejected"].values() if "changes nothing" not in reason]


@pytest.mark.parametrize("network", NETWORKS[:2])
def test_quantize_prints_the_decibels_of_integer_arithmetic(network: str, found: dict[str, Any]) -> None:
    facts = found["networks"][network]
    assert facts["printed_db"] == pytest.approx(facts["integer_db"], abs=0.1)
    assert facts["printed_db"] > 30


def test_the_plan_agrees_with_its_file(found: dict[str, Any]) -> None:
    facts = found["validate"]
    assert (facts["n"], facts["agreement"], facts["passed"]) == (24, 100.0, True)
    assert facts["top1"]["value"] == facts["baseline"]["top1"]


def test_lint_repairs_to_the_same_values(found: dict[str, Any]) -> None:
    assert "0 left" in found["lint"]
    assert 0 < found["lint_moves"] < 0.02
