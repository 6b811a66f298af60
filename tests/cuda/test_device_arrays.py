"""Arrays on a GPU, in and out, through ``__cuda_array_interface__`` and DLPack."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.cuda.fake_machine import Machine
from tests.fakes.fake_cudart import DEFAULT_STREAMS, FakeViolation
from trtdeploy.cuda.arrays import DeviceArray, import_device_array, read_capsule, tensor_of
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.exported_array import ExportedArray
from trtdeploy.cuda.memory import DeviceBuffer
from trtdeploy.cuda.streams import Stream
from trtdeploy.errors import DtypeError

SHAPE = (2, 3)
DTYPES = ["float32", "float16", "int8", "uint8", "int32", "int64", "bool"]


class Interface:
    """An array of a library that speaks ``__cuda_array_interface__``."""

    def __init__(self, address: int, **changes: Any) -> None:
        facts = {"shape": SHAPE, "typestr": "<f4", "data": (address, False), "strides": None, "version": 3}
        self.__cuda_array_interface__ = facts | changes


class OnHost(ExportedArray):
    """An exported array that says it lies on the host, which the fake's memory does; so that others can read it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Producer:
    """An array of a library that speaks DLPack: its capsules are numpy's, with another device in them."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (2, 0)) -> None:
        self.array, self.device = array, device
        self.streams: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        self.streams.append(stream)
        return self.array.__dlpack__()


class Owner:
    """Memory that somebody owns."""


def exported(m: Machine, values: np.ndarray, *, kind: type[ExportedArray] = ExportedArray) -> ExportedArray:
    buffer = m.filled(values)
    array = kind(buffer.address, values.shape, values.dtype, Owner(), device=m.device, producer=m.stream.handle)
    weakref.finalize(array.owner, give_back, buffer, m.stream)
    return array


def give_back(buffer: DeviceBuffer, stream: Stream) -> None:
    buffer.free(stream)


def values_of(dtype: str) -> np.ndarray:
    return np.arange(6).reshape(SHAPE).astype(dtype)


class TestImportOfTheInterface:
    @pytest.fixture
    def m(self) -> Machine:
        return Machine(devices=2)

    def given(self, m: Machine, **changes: Any) -> DeviceArray | None:
        buffer = m.pool.allocate(24, m.stream)
        return import_device_array("x", Interface(buffer.address, **changes), m.device, m.stream)

    def test_what_it_says_is_taken_over_and_its_owner_is_kept(self, m: Machine) -> None:
        buffer = m.pool.allocate(24, m.stream)
        theirs = Interface(buffer.address)
        array = import_device_array("x", theirs, m.device, m.stream)
        assert array is not None
        assert (array.address, array.shape, array.dtype) == (buffer.address, SHAPE, np.dtype(np.float32))
        assert (array.nbytes, array.ndim) == (24, 2)
        assert array.owner is theirs
        assert array.producer is None

    @pytest.mark.parametrize("stream", [1, 2])
    def test_the_stream_that_writes_it_is_waited_for_at_once(self, m: Machine, stream: int) -> None:
        # its number may mean another stream in another thread, or none any more a moment later
        before = m.cudart.calls["cudaStreamWaitEvent"]
        array = self.given(m, stream=stream)
        assert array is not None
        assert array.producer not in (None, stream)
        assert m.cudart.calls["cudaStreamWaitEvent"] == before + 1

    @pytest.mark.parametrize("stream", [1, 2])
    def test_a_default_stream_is_that_of_the_arrays_device(self, stream: int) -> None:
        m = Machine(devices=2)
        device = Device(m.device.api, 1)
        with device.use():
            _, address = m.cudart.cudaMalloc(24)
        ours = Stream(device)
        import_device_array("x", Interface(address, stream=stream), device, ours)
        assert m.cudart.violations == []
        assert m.cudart.cudaGetDevice() == (0, 0)

    @pytest.mark.parametrize("strides", [(12, 4), None])
    def test_contiguous_strides(self, m: Machine, strides: tuple[int, ...] | None) -> None:
        assert self.given(m, strides=strides) is not None

    def test_strides_of_single_and_empty_dimensions_mean_nothing(self, m: Machine) -> None:
        assert self.given(m, shape=(1, 6), strides=(777, 4)) is not None
        assert self.given(m, shape=(3, 0), strides=(4, 4)) is not None

    @pytest.mark.parametrize("strides", [(4, 8), (24, 4), (-12, 4)])
    def test_other_strides_are_refused(self, m: Machine, strides: tuple[int, ...]) -> None:
        with pytest.raises(DtypeError, match=r"'x' is not contiguous(?s:.)*contiguous"):
            self.given(m, strides=strides)

    def test_a_mask_is_refused(self, m: Machine) -> None:
        with pytest.raises(DtypeError, match="masked"):
            self.given(m, mask=Interface(64))

    def test_another_gpu_is_refused(self, m: Machine) -> None:
        m.cudart.cudaSetDevice(1)
        _, address = m.cudart.cudaMalloc(24)
        with pytest.raises(DtypeError, match="GPU 1; this engine runs on GPU 0"):
            import_device_array("x", Interface(address), m.device, m.stream)

    def test_memory_that_cuda_does_not_know_is_refused(self, m: Machine) -> None:
        with pytest.raises(DtypeError, match="no memory that CUDA knows"):
            import_device_array("x", Interface(np.zeros(6, np.float32).ctypes.data), m.device, m.stream)

    def test_an_empty_array_has_no_address(self, m: Machine) -> None:
        array = import_device_array("x", Interface(0, shape=(0, 3)), m.device, m.stream)
        assert array is not None
        assert array.nbytes == 0


class TestImportOfDLPack:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_array_is_read_where_it_lies(self, dtype: str) -> None:
        m, values = Machine(), values_of(dtype)
        producer = Producer(values)
        array = import_device_array("x", producer, m.device, m.stream)
        assert array is not None
        assert (array.address, array.shape, array.dtype) == (values.ctypes.data, SHAPE, values.dtype)
        assert producer.streams == [m.stream.handle]

    def test_its_owner_lives_as_long_as_it(self) -> None:
        m = Machine()
        values = np.zeros(SHAPE, np.float32)
        alive = weakref.ref(values)
        array = import_device_array("x", Producer(values), m.device, m.stream)
        del values
        gc.collect()
        assert alive() is not None
        del array
        gc.collect()
        assert alive() is None

    @pytest.mark.parametrize("device", [(1, 0), (3, 0), (10, 0)])
    def test_what_lies_on_no_cuda_device_is_left_to_others(self, device: tuple[int, int]) -> None:
        m = Machine()
        assert import_device_array("x", Producer(values_of("int8"), device), m.device, m.stream) is None

    @pytest.mark.parametrize("value", [[1, 2], None, object(), 3.0])
    def test_what_is_no_array_is_left_to_others(self, value: object) -> None:
        m = Machine()
        assert import_device_array("x", value, m.device, m.stream) is None

    def test_another_gpu_is_refused(self) -> None:
        m = Machine(devices=2)
        with pytest.raises(DtypeError, match="GPU 1; this engine runs on GPU 0"):
            import_device_array("x", Producer(values_of("int8"), (2, 1)), m.device, m.stream)

    @pytest.mark.parametrize(
        "strided", [lambda a: a.T, lambda a: a[:, ::2], lambda a: np.broadcast_to(a[:1], SHAPE).copy()[::-1]]
    )
    def test_what_is_not_contiguous_is_refused(self, strided: Callable[[np.ndarray], np.ndarray]) -> None:
        m = Machine()
        with pytest.raises(DtypeError, match="not contiguous"):
            import_device_array("x", Producer(strided(values_of("float32"))), m.device, m.stream)

    def test_types_that_numpy_has_not_are_refused(self) -> None:
        torch = pytest.importorskip("torch")
        m = Machine()
        for dtype in (torch.bfloat16, torch.complex64):
            with pytest.raises(DtypeError, match="DLPack type that numpy has not"):
                import_device_array("x", Producer(torch.zeros(SHAPE, dtype=dtype)), m.device, m.stream)

    def test_it_comes_before_the_other_protocol_which_may_not_say_who_still_writes(self) -> None:
        """PyTorch's tensors have both, and their ``__cuda_array_interface__`` names no stream."""
        m, values = Machine(), values_of("float32")
        producer = Producer(values)
        producer.__cuda_array_interface__ = Interface(values.ctypes.data).__cuda_array_interface__  # type: ignore[attr-defined]
        array = import_device_array("x", producer, m.device, m.stream)
        assert producer.streams == [m.stream.handle]
        assert array is not None
        assert array.producer == m.stream.handle  # whoever reads it on another stream waits for this one

    def test_its_device_is_current_when_the_producer_is_asked(self) -> None:
        m = Machine(devices=2)
        device = Device(m.device.api, 1)
        m.device.make_current()
        current: list[int] = []

        class Asks(Producer):
            def __dlpack__(self, *, stream: int | None = None) -> Any:
                current.append(m.cudart.cudaGetDevice()[1])
                return super().__dlpack__(stream=stream)

        import_device_array("x", Asks(values_of("int8"), (2, 1)), device, m.stream)
        assert current == [1]

    def test_a_producer_that_refuses(self) -> None:
        class Refuses(Producer):
            def __dlpack__(self, *, stream: int | None = None) -> Any:
                raise BufferError("requires grad")

        m = Machine()
        with pytest.raises(DtypeError, match="requires grad"):
            import_device_array("x", Refuses(values_of("int8")), m.device, m.stream)

    def test_an_offset_in_bytes_counts(self) -> None:
        capsule = values_of("float32").__dlpack__()
        before = read_capsule("x", capsule).address
        tensor_of(capsule).byte_offset = 8
        assert read_capsule("x", capsule).address == before + 8

    def test_a_capsule_of_torch(self) -> None:
        torch = pytest.importorskip("torch")
        tensor = torch.arange(12, dtype=torch.int32).reshape(4, 3)[1:]
        array = read_capsule("x", tensor.__dlpack__())
        assert (array.address, array.shape, array.dtype) == (tensor.data_ptr(), (3, 3), np.dtype(np.int32))


class TestExport:
    def test_the_interface_says_where_it_lies_and_who_writes_it(self) -> None:
        m = Machine()
        array = exported(m, values_of("float16"))
        assert array.__cuda_array_interface__ == {
            "shape": SHAPE,
            "typestr": "<f2",
            "data": (array.address, False),
            "strides": None,
            "stream": m.stream.handle,
            "version": 3,
        }

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_given_out_is_what_comes_in(self, dtype: str) -> None:
        m = Machine()
        array = exported(m, values_of(dtype))
        for speaks in ("__cuda_array_interface__", "__dlpack__"):
            other = _only(array, speaks)
            back = import_device_array("x", other, m.device, m.stream)
            assert back is not None
            assert (back.address, back.shape, back.dtype) == (array.address, array.shape, array.dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_numpy_copies_it_after_the_work_that_writes_it(self, dtype: str) -> None:
        m, values = Machine(), values_of(dtype)
        buffer = m.pool.allocate(values.nbytes, m.stream)
        m.kernel(m.stream, writes=buffer, result=values)  # not yet run
        array = ExportedArray(buffer.address, SHAPE, values.dtype, buffer, device=m.device, producer=m.stream.handle)
        copied = array.numpy()
        np.testing.assert_array_equal(copied, values)
        assert copied.dtype == values.dtype
        buffer.free(m.stream)
        m.end()

    def test_an_empty_array(self) -> None:
        m = Machine()
        array = ExportedArray(m.stream.handle, (0, 3), np.dtype(np.float32), None, device=m.device)
        assert array.numpy().shape == (0, 3)
        assert array.__cuda_array_interface__["data"] == (0, False)
        assert read_capsule("x", array.__dlpack__()).shape == (0, 3)
        m.end()

    @pytest.mark.parametrize("reader", ["numpy", "torch"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_numpy_and_torch_read_its_capsule(self, reader: str, dtype: str) -> None:
        library = pytest.importorskip(reader)
        m, values = Machine(), values_of(dtype)
        array = exported(m, values, kind=OnHost)
        # numpy gives the reader no stream of CUDA, and the reader of host memory asks for none
        view = library.from_dlpack(array)
        np.testing.assert_array_equal(np.asarray(view), values)
        assert np.asarray(view).ctypes.data == array.address

    @pytest.mark.parametrize("reader", ["numpy", "torch"])
    def test_its_memory_lives_until_the_last_reader_has_gone(self, reader: str) -> None:
        library = pytest.importorskip(reader)
        m = Machine()
        array = exported(m, values_of("float32"), kind=OnHost)
        view = library.from_dlpack(array)
        del array
        assert m.pool.used_bytes == 24
        del view
        assert m.pool.used_bytes == 0
        m.end()

    def test_a_capsule_that_nobody_takes_keeps_nothing(self) -> None:
        m = Machine()
        array = exported(m, values_of("float32"))
        capsule = array.__dlpack__(stream=-1)
        del array
        assert m.pool.used_bytes == 24
        del capsule
        assert m.pool.used_bytes == 0
        m.end()

    def test_a_reader_that_refuses_keeps_nothing_and_its_reason_arrives(self) -> None:
        m = Machine()
        array = exported(m, values_of("float32"))
        with pytest.raises((RuntimeError, BufferError), match=r"[Uu]nsupported device"):
            np.from_dlpack(array)  # numpy reads no GPU: it drops the capsule with its error on the way
        del array
        assert m.pool.used_bytes == 0
        m.end()

    @pytest.mark.parametrize(("stream", "waits_on"), [(None, DEFAULT_STREAMS[0]), (1, 1), (2, 2)])
    def test_the_stream_of_the_reader_waits(self, stream: int | None, waits_on: int) -> None:
        m = Machine()
        buffer = m.pool.allocate(24, m.stream)
        m.kernel(m.stream, writes=buffer, result=1.0)
        array = ExportedArray(
            buffer.address, SHAPE, np.dtype(np.float32), buffer, device=m.device, producer=m.stream.handle
        )
        array.__dlpack__(stream=stream, max_version=(1, 0), copy=False)
        m.cudart.enqueue_kernel(waits_on, [(buffer.address, 24)], [], lambda: None)
        m.cudart.assert_clean(leaks=False)

    def test_a_reader_that_asks_for_no_order_gets_none(self) -> None:
        m = Machine()
        buffer = m.pool.allocate(24, m.stream)
        m.kernel(m.stream, writes=buffer, result=1.0)
        array = ExportedArray(
            buffer.address, SHAPE, np.dtype(np.float32), buffer, device=m.device, producer=m.stream.handle
        )
        array.__dlpack__(stream=-1)
        m.cudart.enqueue_kernel(DEFAULT_STREAMS[0], [(buffer.address, 24)], [], lambda: None)
        with pytest.raises(FakeViolation, match="race"):
            m.cudart.assert_clean(leaks=False)

    def test_what_dlpack_may_ask_and_does_not_get(self) -> None:
        m = Machine()
        array = exported(m, values_of("float32"))
        assert array.__dlpack__(dl_device=(2, 0)) is not None
        with pytest.raises(BufferError, match=r"numpy\(\) copies"):
            array.__dlpack__(copy=True)
        with pytest.raises(BufferError, match="where it lies"):
            array.__dlpack__(dl_device=(1, 0))
        with pytest.raises(ValueError, match="Stream 0"):
            array.__dlpack__(stream=0)


def _only(array: ExportedArray, protocol: str) -> Any:
    """Return an object that speaks one protocol of an array."""
    names = ("__dlpack__", "__dlpack_device__") if protocol == "__dlpack__" else (protocol,)
    return type("Only", (), {name: getattr(array, name) for name in names})()
