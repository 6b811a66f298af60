from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import trtdeploy
from trtdeploy import errors
from trtdeploy.errors import TrtDeployError

REPOSITORY = Path(trtdeploy.__file__).parents[1]


def all_errors() -> list[type[TrtDeployError]]:
    return [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, TrtDeployError)]


def test_the_text_is_message_hint_and_the_runtimes_log_in_this_order() -> None:
    error = errors.BuildError("No tactic for conv1.", hint="Raise the workspace.", log_lines=["[W] first", "[E] last"])
    assert str(error) == "No tactic for conv1.\nRaise the workspace.\n  | [W] first\n  | [E] last"
    assert (error.message, error.hint, error.log_lines) == (
        "No tactic for conv1.",
        "Raise the workspace.",
        ("[W] first", "[E] last"),
    )


def test_a_bare_message_has_no_trailing_lines() -> None:
    assert str(errors.ModelError("Not an ONNX file.")) == "Not an ONNX file."


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_crosses_a_process_boundary_whole(kind: type[TrtDeployError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", hint="do", log_lines=["line"])))
    assert type(error) is kind
    assert (error.message, error.hint, error.log_lines) == ("what", "do", ("line",))


def test_exit_codes_tell_a_failed_gate_from_wrong_input_from_a_machine_that_lacks_something() -> None:
    codes = {kind.__name__: kind.exit_code for kind in all_errors()}
    assert {name for name, code in codes.items() if code == 1} == {"GateError"}
    assert {name for name, code in codes.items() if code == 3} == {
        "PlanIncompatibleError",
        "DeviceMemoryError",
        "EngineBusyError",
        "RuntimeUnavailableError",
        "ServerError",
    }
    assert set(codes.values()) == {1, 2, 3}


def test_a_caller_can_catch_a_family() -> None:
    assert issubclass(errors.PlanCorruptError, errors.PlanError)
    assert issubclass(errors.PlanIncompatibleError, errors.PlanError)
    for kind in (errors.InputNameError, errors.ShapeError, errors.DtypeError):
        assert issubclass(kind, errors.InputError)


def test_the_ground_floor_imports_no_runtime() -> None:
    heavy = ("torch", "tensorrt", "tensorrt_rtx", "onnxruntime", "cuda", "tritonclient", "sklearn", "onnx", "scipy")
    program = (
        "import sys, trtdeploy, trtdeploy.data, trtdeploy.ledger, trtdeploy.plan, trtdeploy.ledger.evaluation\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True
    )
    assert finished.stdout.strip() == "[]"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Enigne'"):
        trtdeploy.Enigne  # noqa: B018
