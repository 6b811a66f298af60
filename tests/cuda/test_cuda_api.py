"""Errors of CUDA become errors of trtdeploy that say what to do."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.fakes.fake_cudart import INVALID_VALUE, OUT_OF_MEMORY, FakeCudart
from trtdeploy.cuda.api import CudaApi, load_api
from trtdeploy.cuda.arrays import import_device_array
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.exported_array import ExportedArray
from trtdeploy.cuda.memory import DevicePool, PinnedBuffer
from trtdeploy.cuda.streams import Event, Stream
from trtdeploy.errors import CudaError, DeviceMemoryError, InferenceError, RuntimeUnavailableError


@pytest.mark.parametrize(("answer", "result"), [((0,), None), ((0, 5), 5), ((0, 5, "x"), (5, "x")), ((0, None), None)])
def test_a_call_gives_what_follows_the_error_code(answer: tuple[Any, ...], result: object) -> None:
    assert CudaApi(SimpleNamespace(cudaThing=lambda: answer)).call("cudaThing") == result


def test_an_error_names_the_call_and_what_cuda_calls_it() -> None:
    fake = FakeCudart()
    fake.fail_next("cudaStreamCreateWithFlags", INVALID_VALUE)
    with pytest.raises(CudaError, match=r"cudaStreamCreateWithFlags failed: cudaErrorInvalidValue: a fake error") as e:
        CudaApi(fake).call("cudaStreamCreateWithFlags", 1)
    assert isinstance(e.value, InferenceError)
    assert not isinstance(e.value, DeviceMemoryError)
    assert e.value.exit_code == 2


def test_out_of_memory_has_its_own_type_a_hint_and_exit_code_3() -> None:
    fake = FakeCudart()
    fake.fail_next("cudaHostAlloc", OUT_OF_MEMORY)
    with pytest.raises(DeviceMemoryError, match="fewer contexts") as e:
        CudaApi(fake).call("cudaHostAlloc", 10, 0)
    assert e.value.exit_code == 3


def test_the_last_error_can_be_cleared_so_that_other_libraries_do_not_find_it() -> None:
    fake = FakeCudart()
    fake.fail_next("cudaHostAlloc")
    with pytest.raises(DeviceMemoryError):
        CudaApi(fake).call("cudaHostAlloc", 10, 0)
    assert fake.last_error == OUT_OF_MEMORY
    CudaApi(fake).clear_last_error()
    assert fake.last_error == 0


def test_versions_are_written_as_people_write_them() -> None:
    api = CudaApi(SimpleNamespace(cudaDriverGetVersion=lambda: (0, 13040), cudaRuntimeGetVersion=lambda: (0, 12090)))
    assert (api.driver_version, api.cuda_version) == ("13.4", "12.9")


def test_facts_of_a_device() -> None:
    fake = FakeCudart(memory_bytes=1 << 20, devices=2)
    device = Device(CudaApi(fake), 1)
    assert (device.name, device.capability, device.total_bytes) == ("Fake GPU", "9.0", 1 << 20)
    assert device.free_bytes() == 1 << 20
    with pytest.raises(CudaError, match="cudaErrorInvalidDevice"):
        Device(CudaApi(fake), 2)


def test_each_thread_has_a_current_device_of_its_own() -> None:
    fake = FakeCudart(devices=2)
    Device(CudaApi(fake), 1).make_current()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(fake.cudaGetDevice()[1]))
    thread.start()
    thread.join()
    assert (fake.cudaGetDevice()[1], found) == (1, [0])


class TestUse:
    def test_the_device_before_is_current_again_at_the_end(self) -> None:
        fake = FakeCudart(devices=3)
        first, second = (Device(CudaApi(fake), ordinal) for ordinal in (0, 1))
        fake.cudaSetDevice(2)
        with second.use():
            assert fake.cudaGetDevice()[1] == 1
            with first.use():
                assert fake.cudaGetDevice()[1] == 0
            assert fake.cudaGetDevice()[1] == 1
        assert fake.cudaGetDevice()[1] == 2

    def test_also_after_an_error(self) -> None:
        fake = FakeCudart(devices=2)
        with pytest.raises(ZeroDivisionError), Device(CudaApi(fake), 1).use():
            raise ZeroDivisionError
        assert fake.cudaGetDevice()[1] == 0

    def test_nothing_is_set_where_it_is_current_already(self) -> None:
        fake = FakeCudart(devices=2)
        device = Device(CudaApi(fake), 1)
        device.make_current()
        fake.fail_next("cudaSetDevice")
        with device.use():
            assert fake.cudaGetDevice()[1] == 1
        assert fake.cudaSetDevice(0)[0] == OUT_OF_MEMORY  # it had not been called

    def test_whatever_the_layer_makes_leaves_the_device_as_it_was(self) -> None:
        fake = FakeCudart(devices=2)
        device = Device(CudaApi(fake), 1)
        stream, event = Stream(device), Event(device)
        pool = DevicePool(device, release_threshold_bytes=0)
        pinned = PinnedBuffer(device, 64)
        device.free_bytes()
        buffer = pool.allocate(64, stream)
        stream.synchronize()
        ExportedArray(buffer.address, (16,), np.dtype(np.float32), buffer, device=device).numpy()
        exported = ExportedArray(
            buffer.address, (16,), np.dtype(np.float32), buffer, device=device, producer=stream.handle
        )
        exported.__dlpack__()
        import_device_array("x", exported, device, stream)
        assert fake.cudaGetDevice()[1] == 0
        buffer.free(stream)
        stream.synchronize()
        pinned.close()
        pool.close()
        event.close()
        stream.close()
        fake.assert_clean()


class Runtime:
    """A cuda.bindings.runtime on a machine that lacks something."""

    def __init__(self, count: tuple[int, int | None], error: str = "", driver: int = 0) -> None:
        self.count, self.error, self.driver = count, error, driver

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return self.count

    def cudaGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, self.error.encode()

    cudaGetErrorString = cudaGetErrorName

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.driver

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return 0, 13040


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (Runtime((35, None), "cudaErrorInsufficientDriver"), "no NVIDIA driver"),
        (Runtime((35, None), "cudaErrorInsufficientDriver", 12040), r"supports CUDA 12\.4 at most(?s:.)*13\.4"),
        (Runtime((100, None), "cudaErrorNoDevice", 13040), "no GPU(?s:.)*CUDA_VISIBLE_DEVICES"),
        (Runtime((0, 0)), "no GPU(?s:.)*CUDA_VISIBLE_DEVICES"),
        (Runtime((804, None), "cudaErrorCompatNotSupportedOnDevice"), "CompatNotSupported(?s:.)*doctor"),
        (None, r"cuda-python is not installed(?s:.)*pip install"),
    ],
)
def test_what_is_missing_is_said(runtime: Runtime | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    with pytest.raises(RuntimeUnavailableError, match=words) as e:
        load_api()
    assert e.value.exit_code == 3


def test_a_library_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("libcuda.so.1 was not found")

    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", SimpleNamespace(cudaGetDeviceCount=fail))
    with pytest.raises(RuntimeUnavailableError, match=r"libcuda\.so\.1 was not found"):
        load_api()


def test_a_machine_with_a_gpu_gets_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCudart()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    assert load_api().runtime is fake
