"""The calls of ``trtdeploy/cuda`` exist in the real cuda-python, and in the fake that stands in for it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trtdeploy.cuda.memory
from tests.cuda.cuda_calls import Call, calls_in, defects, sources
from tests.fakes.fake_cudart import FakeCudart

runtime: Any = pytest.importorskip("cuda.bindings.runtime")


def all_calls() -> list[Call]:
    return [call for name, source in sources().items() for call in calls_in(name, source)]


def test_every_call_exists_in_cuda_python_with_that_many_arguments() -> None:
    calls = all_calls()
    assert len({call.name for call in calls}) > 30
    assert defects(calls, runtime) == []


def test_so_does_what_the_tests_on_a_gpu_call_themselves() -> None:
    path = Path(__file__).parents[1] / "gpu" / "test_cuda_layer.py"
    calls = list(calls_in(path.name, path.read_text()))
    assert "cudaMemcpy" in {call.name for call in calls}
    assert defects(calls, runtime) == []


@pytest.mark.parametrize(
    ("given", "broken", "words"),
    [
        ('"cudaMallocFromPoolAsync", nbytes', '"cudaMallocOfPoolAsync", nbytes', "no cudaMallocOfPoolAsync"),
        ('"cudaHostAlloc", self.nbytes, 0', '"cudaHostAlloc", self.nbytes', "given 1 arguments"),
        ("cudaMemPoolAttrReleaseThreshold", "cudaMemPoolAttrThreshold", "no cudaMemPoolAttr.cudaMemPoolAttrThreshold"),
        ("runtime.cudaMemPoolProps()", "runtime.cudaMemPoolProperties()", "no cudaMemPoolProperties"),
        ("runtime.cudaMemcpyKind,", "runtime.cudaMemcpyKinds,", "no cudaMemcpyKinds"),
    ],
)
def test_a_call_with_another_name_or_length_is_found(given: str, broken: str, words: str) -> None:
    source = sources()["memory.py"]
    assert given in source
    found = defects(list(calls_in("memory.py", source.replace(given, broken))), runtime)
    assert len(found) == 1
    assert words in found[0]


def test_the_kinds_of_copies_exist() -> None:
    # given by name to one function that copies
    for kind in ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"):
        assert f'"{kind}"' in sources()["memory.py"]
        assert hasattr(runtime.cudaMemcpyKind, kind)


def test_flags_have_the_numbers_that_the_code_gives_them() -> None:
    from trtdeploy.cuda import streams

    assert runtime.cudaStreamNonBlocking == streams._NON_BLOCKING
    assert runtime.cudaEventBlockingSync == streams._BLOCKING_SYNC
    assert runtime.cudaEventDisableTiming == streams._DISABLE_TIMING


def test_the_pool_properties_and_threshold_are_what_cuda_python_takes() -> None:
    properties = runtime.cudaMemPoolProps()
    properties.allocType = runtime.cudaMemAllocationType.cudaMemAllocationTypePinned
    properties.location.type = runtime.cudaMemLocationType.cudaMemLocationTypeDevice
    properties.location.id = 3
    assert properties.location.id == 3
    threshold = trtdeploy.cuda.memory._as_cuuint64(1 << 40)
    assert int(threshold) == 1 << 40
    assert threshold.getPtr()  # what cudaMemPoolSetAttribute reads it through


def test_the_fake_has_every_call_with_the_signature_of_cuda_python() -> None:
    fake = FakeCudart()
    assert defects(all_calls(), fake) == []
    for name in dir(FakeCudart):
        if name.startswith("cuda"):
            ours = [p for p in inspect.signature(getattr(FakeCudart, name)).parameters.values() if p.name != "self"]
            theirs = inspect.signature(getattr(runtime, name)).parameters.values()
            assert [p.default for p in ours] == [p.default for p in theirs], name


def test_the_fake_names_its_errors_as_cuda_does() -> None:
    from tests.fakes import fake_cudart

    for code, name in fake_cudart._NAMES.items():
        assert getattr(runtime.cudaError_t, name).value == code


def test_importing_the_layer_imports_no_cuda() -> None:
    modules = [f"trtdeploy.cuda.{name.removesuffix('.py')}" for name in sources()]
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        "print([name for name in sys.modules if name.split('.')[0] in ('cuda', 'torch', 'tensorrt')])"
    )
    modules_text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert modules_text.strip() == "[]"
