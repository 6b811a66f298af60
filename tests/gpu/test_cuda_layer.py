"""The cuda layer on a real GPU. One command: ``pytest -m gpu``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from trtdeploy.cuda.api import load_api
from trtdeploy.cuda.arrays import import_device_array
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.exported_array import ExportedArray
from trtdeploy.cuda.graphs import GraphCache, capture
from trtdeploy.cuda.memory import (
    ALIGNMENT,
    DeviceBuffer,
    DevicePool,
    PinnedBuffer,
    StagingRing,
    copy_on_device,
    copy_to_device,
    copy_to_host,
)
from trtdeploy.cuda.streams import Event, Stream
from trtdeploy.errors import CudaError, DeviceMemoryError, DtypeError, GraphCaptureError, RuntimeUnavailableError

MIB = 1 << 20
BYTES = np.dtype(np.uint8)
FLOAT = np.dtype(np.float32)


def obstacle() -> str:
    try:
        load_api()
    except RuntimeUnavailableError as error:
        return error.message
    return ""


pytestmark = [pytest.mark.gpu]
if reason := obstacle():
    pytestmark.append(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(load_api(), 0)


@pytest.fixture
def stream(device: Device) -> Iterator[Stream]:
    stream = Stream(device)
    yield stream
    stream.synchronize()
    stream.close()


@pytest.fixture
def pool(device: Device, stream: Stream) -> Iterator[DevicePool]:
    pool = DevicePool(device, release_threshold_bytes=1 << 30)
    yield pool
    stream.synchronize()
    pool.close()


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return module


def pattern(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def upload(device: Device, pool: DevicePool, stream: Stream, values: np.ndarray) -> DeviceBuffer:
    """Return device memory with these values, there by now."""
    buffer = pool.allocate(values.nbytes, stream)
    pinned = PinnedBuffer(device, values.nbytes)
    pinned.view(values.dtype, values.shape)[...] = values
    copy_to_device(device, buffer.address, pinned.address, values.nbytes, stream)
    stream.synchronize()
    pinned.close()
    return buffer


def download(device: Device, stream: Stream, address: int, like: np.ndarray) -> np.ndarray:
    """Return what lies at an address after the work so far of a stream."""
    pinned = PinnedBuffer(device, like.nbytes)
    copy_to_host(device, pinned.address, address, like.nbytes, stream)
    stream.synchronize()
    result = pinned.view(like.dtype, like.shape).copy()
    pinned.close()
    return result


def test_facts_of_the_device(device: Device) -> None:
    major, minor = device.capability.split(".")
    assert (int(major), int(minor)) >= (5, 0)
    assert device.name
    assert "\0" not in device.name
    assert 0 < device.free_bytes() <= device.total_bytes
    assert float(device.api.driver_version) >= float(device.api.cuda_version.split(".")[0])


def test_an_error_has_the_name_that_cuda_gives_it(device: Device) -> None:
    with pytest.raises(CudaError, match="cudaErrorInvalidDevice"):
        Device(device.api, 9999)
    device.api.clear_last_error()


@pytest.mark.parametrize("nbytes", [1, 4093, 1 * MIB, 64 * MIB + 5])
def test_bytes_go_there_across_and_back(device: Device, stream: Stream, pool: DevicePool, nbytes: int) -> None:
    values = pattern(nbytes)
    first = upload(device, pool, stream, values)
    second = pool.allocate(nbytes, stream)
    copy_on_device(device, second.address, first.address, nbytes, stream)
    np.testing.assert_array_equal(download(device, stream, second.address, values), values)
    first.free(stream)
    second.free(stream)


class TestPool:
    def test_addresses_are_aligned_as_tensorrt_demands(self, stream: Stream, pool: DevicePool) -> None:
        buffers = [pool.allocate(nbytes, stream) for nbytes in (1, 3, 255, 257, 4097, MIB + 1)]
        assert all(buffer.address % ALIGNMENT == 0 for buffer in buffers)
        for buffer in buffers:
            buffer.free(stream)

    def test_steady_state_takes_nothing_from_the_driver(self, stream: Stream, pool: DevicePool) -> None:
        def once() -> None:
            buffers = [pool.allocate(nbytes, stream) for nbytes in (MIB, 3 * MIB, 4096)]
            for buffer in buffers:
                buffer.free(stream)
            stream.synchronize()  # a pool without a threshold would return all of it here

        for _ in range(3):
            once()
        reserved = pool.reserved_bytes
        assert reserved >= 4 * MIB
        for _ in range(200):
            once()
            assert pool.reserved_bytes == reserved

    def test_more_than_there_is(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        with pytest.raises(DeviceMemoryError, match="cudaErrorMemoryAllocation"):
            pool.allocate(2 * device.total_bytes, stream)
        device.api.clear_last_error()
        pool.allocate(4096, stream).free(stream)

    def test_closing_with_memory_in_use_is_refused(self, stream: Stream, pool: DevicePool) -> None:
        buffer = pool.allocate(4096, stream)
        with pytest.raises(CudaError, match="4096 bytes"):
            pool.close()
        buffer.free(stream)


class TestEvents:
    def test_who_waits_sleeps(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        """The thread that waits uses next to no processor time."""
        source, target = (pool.allocate(256 * MIB, stream) for _ in range(2))
        event = Event(device)
        for _ in range(400):  # 256 MiB read and written each: some 50 ms and more
            copy_on_device(device, target.address, source.address, 256 * MIB, stream)
        stream.record(event)
        wall, busy = time.perf_counter(), time.thread_time()
        event.synchronize()
        wall, busy = time.perf_counter() - wall, time.thread_time() - busy
        event.close()
        source.free(stream)
        target.free(stream)
        assert wall > 0.02
        assert busy < 0.3 * wall

    def test_times_between_events(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        source, target = (pool.allocate(64 * MIB, stream) for _ in range(2))
        start, end = Event(device, timing=True), Event(device, timing=True)
        stream.record(start)
        for _ in range(10):
            copy_on_device(device, target.address, source.address, 64 * MIB, stream)
        stream.record(end)
        end.synchronize()
        assert 0.01 < end.milliseconds_since(start) < 10_000
        for owned in (start, end):
            owned.close()
        source.free(stream)
        target.free(stream)

    def test_one_stream_waits_for_another(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        other = Stream(device)
        values = pattern(16 * MIB)
        buffers = [upload(device, pool, stream, values), *(pool.allocate(values.nbytes, stream) for _ in range(2))]
        stream.synchronize()
        for _ in range(50):  # keeps the first stream busy before what matters
            copy_on_device(device, buffers[2].address, buffers[0].address, values.nbytes, stream)
        copy_on_device(device, buffers[1].address, buffers[0].address, values.nbytes, stream)
        other.wait_for_stream(stream.handle)
        np.testing.assert_array_equal(download(device, other, buffers[1].address, values), values)
        for buffer in buffers:
            buffer.free(stream)
        other.close()


class TestStagingRing:
    def test_no_transfer_overwrites_another(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        ring = StagingRing(device, slots=2)
        nbytes = 2 * MIB
        buffers = [pool.allocate(nbytes, stream) for _ in range(40)]
        for turn, buffer in enumerate(buffers):
            with ring.slot(nbytes, stream) as slot:
                slot.view(BYTES, (nbytes,))[...] = turn
                copy_to_device(device, buffer.address, slot.address, nbytes, stream)
        for turn, buffer in enumerate(buffers):
            assert (download(device, stream, buffer.address, np.empty(nbytes, np.uint8)) == turn).all()
            buffer.free(stream)
        assert ring.nbytes == 2 * nbytes
        ring.close()

    def test_it_grows_while_copies_are_under_way(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        ring = StagingRing(device, slots=1)
        values = [pattern(1000 << exponent, exponent) for exponent in range(12)]
        buffers = [pool.allocate(one.nbytes, stream) for one in values]
        for one, buffer in zip(values, buffers, strict=True):
            with ring.slot(one.nbytes, stream) as slot:
                slot.view(BYTES, one.shape)[...] = one
                copy_to_device(device, buffer.address, slot.address, one.nbytes, stream)
        for one, buffer in zip(values, buffers, strict=True):
            np.testing.assert_array_equal(download(device, stream, buffer.address, one), one)
            buffer.free(stream)
        ring.close()


class TestGraphs:
    def test_replay_reads_what_lies_there_then(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        nbytes = 1 * MIB
        given, back = PinnedBuffer(device, nbytes), PinnedBuffer(device, nbytes)
        first, second = (pool.allocate(nbytes, stream) for _ in range(2))

        def enqueue() -> bool:
            copy_to_device(device, first.address, given.address, nbytes, stream)
            copy_on_device(device, second.address, first.address, nbytes, stream)
            copy_to_host(device, back.address, second.address, nbytes, stream)
            return True

        back.view(BYTES, (nbytes,))[...] = 0
        graph = capture(stream, enqueue)
        stream.synchronize()
        assert not back.view(BYTES, (nbytes,)).any()  # nothing has run
        for seed in range(20):
            values = pattern(nbytes, seed)
            given.view(BYTES, (nbytes,))[...] = values
            graph.launch(stream)
            stream.synchronize()
            np.testing.assert_array_equal(back.view(BYTES, (nbytes,)), values)
        graph.close()
        first.free(stream)
        second.free(stream)
        stream.synchronize()
        given.close()
        back.close()

    @pytest.mark.parametrize(
        ("enqueue", "words"),
        [
            (lambda stream: True, "is empty"),
            (lambda stream: False, "refused during capture"),
            (lambda stream: stream.synchronize() is None, "StreamCapture"),
        ],
    )
    def test_a_failed_capture_says_why_and_leaves_the_stream_usable(
        self, device: Device, stream: Stream, pool: DevicePool, enqueue: Callable[[Stream], bool], words: str
    ) -> None:
        with pytest.raises(GraphCaptureError, match=words):
            capture(stream, lambda: enqueue(stream))
        # an error that stayed would be found by the next library that asks, in this thread
        assert int(device.api.runtime.cudaGetLastError()[0]) == 0
        values = pattern(4096)
        buffer = upload(device, pool, stream, values)
        np.testing.assert_array_equal(download(device, stream, buffer.address, values), values)
        buffer.free(stream)

    def test_another_thread_may_call_anything_meanwhile(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        buffers = [pool.allocate(4096, stream) for _ in range(2)]
        stream.synchronize()
        failures: list[Exception] = []

        def other_thread() -> None:
            try:
                device.make_current()
                PinnedBuffer(device, 4096).close()
                mine = Stream(device)
                pool.allocate(4096, mine).free(mine)
                mine.synchronize()
                mine.close()
            except CudaError as error:
                failures.append(error)

        def enqueue() -> bool:
            copy_on_device(device, buffers[1].address, buffers[0].address, 4096, stream)
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()
            return True

        capture(stream, enqueue).close()
        assert failures == []
        for buffer in buffers:
            buffer.free(stream)

    def test_a_cache_gives_each_key_its_own_graph(self, device: Device, stream: Stream, pool: DevicePool) -> None:
        sources = [upload(device, pool, stream, np.full(4096, value, np.uint8)) for value in range(5)]
        target = pool.allocate(4096, stream)
        cache = GraphCache(device, 3)
        for key in [0, 1, 2, 0, 3, 4, 0, 1, 2, 3, 4] * 5:
            graph = cache.get(key)
            if graph is None:
                source = sources[key].address
                graph = capture(
                    stream, lambda source=source: copy_on_device(device, target.address, source, 4096, stream) is None
                )
                cache.put(key, graph)
            cache.launch(graph, stream)
            assert (download(device, stream, target.address, np.empty(4096, np.uint8)) == key).all()
        assert cache.counts()["kept"] == 3
        cache.clear()
        for buffer in (*sources, target):
            buffer.free(stream)


class TestArrays:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "int64", "bool"])
    def test_a_tensor_of_torch_is_read_where_it_lies(
        self, device: Device, stream: Stream, torch: Any, dtype: str
    ) -> None:
        values = (np.arange(60) % 2).reshape(3, 4, 5).astype(dtype)
        tensor = torch.from_numpy(values).cuda()
        array = import_device_array("x", tensor, device, stream)
        assert array is not None
        assert (array.address, array.shape, array.dtype) == (tensor.data_ptr(), values.shape, values.dtype)
        np.testing.assert_array_equal(download(device, stream, array.address, values), values)

    def test_work_of_torch_that_still_writes_it_is_waited_for(self, device: Device, stream: Stream, torch: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            tensor = torch.zeros(1 << 22, device="cuda")
            torch.cuda._sleep(200_000_000)  # cycles: some 100 ms
            tensor += 1
            array = import_device_array("x", tensor, device, stream)
        assert array is not None
        assert (download(device, stream, array.address, np.empty(tensor.shape, np.float32)) == 1).all()

    def test_what_is_not_contiguous_or_has_a_foreign_type_is_refused(
        self, device: Device, stream: Stream, torch: Any
    ) -> None:
        with pytest.raises(DtypeError, match="not contiguous"):
            import_device_array("x", torch.zeros(3, 4, device="cuda").T, device, stream)
        with pytest.raises(DtypeError, match="numpy has not"):
            import_device_array("x", torch.zeros(3, dtype=torch.bfloat16, device="cuda"), device, stream)
        assert import_device_array("x", torch.zeros(3), device, stream) is None

    def test_another_gpu_is_refused(self, device: Device, stream: Stream, torch: Any) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one GPU only")
        with pytest.raises(DtypeError, match="GPU 1"):
            import_device_array("x", torch.zeros(3, device="cuda:1"), device, stream)

    @pytest.mark.parametrize("protocol", ["dlpack", "interface"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64"])
    def test_torch_reads_what_is_given_out(
        self, device: Device, stream: Stream, pool: DevicePool, torch: Any, protocol: str, dtype: str
    ) -> None:
        values = np.arange(24).reshape(2, 3, 4).astype(dtype)
        buffer = upload(device, pool, stream, values)
        array = ExportedArray(buffer.address, values.shape, values.dtype, None, device=device, producer=stream.handle)
        tensor = torch.from_dlpack(array) if protocol == "dlpack" else torch.as_tensor(array, device="cuda")
        assert tensor.data_ptr() == buffer.address
        np.testing.assert_array_equal(tensor.cpu().numpy(), values)
        np.testing.assert_array_equal(array.numpy(), values)
        del tensor
        buffer.free(stream)

    def test_torch_waits_for_the_work_that_still_writes_it(
        self, device: Device, stream: Stream, pool: DevicePool, torch: Any
    ) -> None:
        nbytes = 64 * MIB
        old = upload(device, pool, stream, np.zeros(nbytes, np.uint8))
        new = upload(device, pool, stream, np.ones(nbytes, np.uint8))
        target, busy = (pool.allocate(nbytes, stream) for _ in range(2))
        copy_on_device(device, target.address, old.address, nbytes, stream)
        for _ in range(200):
            copy_on_device(device, busy.address, old.address, nbytes, stream)
        copy_on_device(device, target.address, new.address, nbytes, stream)
        array = ExportedArray(target.address, (nbytes,), BYTES, None, device=device, producer=stream.handle)
        tensor = torch.from_dlpack(array)
        assert bool((tensor == 1).all())
        del tensor
        for buffer in (old, new, target, busy):
            buffer.free(stream)

    def test_the_owner_lives_until_torch_has_let_go(
        self, device: Device, stream: Stream, pool: DevicePool, torch: Any
    ) -> None:
        gone: list[bool] = []

        class Owner:
            def __del__(self) -> None:
                gone.append(True)

        buffer = upload(device, pool, stream, np.zeros(16, np.float32))
        tensor = torch.from_dlpack(ExportedArray(buffer.address, (16,), FLOAT, Owner(), device=device))
        assert gone == []
        del tensor
        assert gone == [True]
        buffer.free(stream)


@pytest.mark.parametrize("direction", ["to device", "to host"])
def test_copies_are_as_fast_as_those_of_pinned_memory(
    device: Device, stream: Stream, pool: DevicePool, direction: str
) -> None:
    """At least 90 % of cudaMemcpy between the same kinds of memory, measured in turn in the same run."""
    nbytes, rounds = 256 * MIB, 8
    buffer = pool.allocate(nbytes, stream)
    stream.synchronize()
    api, kinds = device.api, device.api.runtime.cudaMemcpyKind
    plain = PinnedBuffer(device, nbytes)
    ring = StagingRing(device, slots=2)

    def bare() -> float:
        started = time.perf_counter()
        if direction == "to device":
            api.call("cudaMemcpy", buffer.address, plain.address, nbytes, kinds.cudaMemcpyHostToDevice)
        else:
            api.call("cudaMemcpy", plain.address, buffer.address, nbytes, kinds.cudaMemcpyDeviceToHost)
        device_done()
        return time.perf_counter() - started

    def device_done() -> None:
        # cudaMemcpy may return while the last bytes of a copy to the device are still under way
        api.call("cudaDeviceSynchronize")

    def ours() -> float:
        slot = ring.take(nbytes)
        started = time.perf_counter()
        if direction == "to device":
            copy_to_device(device, buffer.address, slot.address, nbytes, stream)
        else:
            copy_to_host(device, slot.address, buffer.address, nbytes, stream)
        slot.done_after(stream)
        slot.synchronize()
        seconds = time.perf_counter() - started
        slot.release()
        return seconds

    for warm_up in (bare, ours, ours):
        warm_up()
    pairs = [(bare(), ours()) for _ in range(rounds)]
    best_bare, best_ours = (min(times) for times in zip(*pairs, strict=True))
    print(f"{direction}: cudaMemcpy {nbytes / best_bare / 1e9:.1f} GB/s, ours {nbytes / best_ours / 1e9:.1f} GB/s")  # noqa: T201
    buffer.free(stream)
    stream.synchronize()
    ring.close()
    plain.close()
    assert best_ours <= best_bare / 0.9


def test_eight_threads_on_streams_of_their_own_mix_nothing_up(device: Device, pool: DevicePool) -> None:
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            device.make_current()
            stream = Stream(device)
            there, back = StagingRing(device, slots=2), StagingRing(device, slots=2)
            for turn in range(1000):
                count = 1 + (number * 37 + turn) % 3000
                value = number * 1000 + turn
                buffer = pool.allocate(4 * count, stream)
                with there.slot(4 * count, stream) as slot:
                    slot.view(FLOAT, (count,))[...] = value
                    copy_to_device(device, buffer.address, slot.address, 4 * count, stream)
                result = back.take(4 * count)
                copy_to_host(device, result.address, buffer.address, 4 * count, stream)
                result.done_after(stream)
                buffer.free(stream)
                result.synchronize()
                if not (result.view(FLOAT, (count,)) == value).all():
                    wrong.append(f"thread {number}, turn {turn}")
                result.release()
            stream.synchronize()
            there.close()
            back.close()
            stream.close()
        except Exception as error:  # shown below: a thread has nobody to raise it to
            wrong.append(f"thread {number}: {error!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.used_bytes == 0


def test_what_is_closed_is_given_back(device: Device) -> None:
    def once() -> None:
        stream = Stream(device)
        pool = DevicePool(device, release_threshold_bytes=1 << 30)
        ring = StagingRing(device, slots=2)
        first, second = (pool.allocate(32 * MIB, stream) for _ in range(2))
        with ring.slot(4 * MIB, stream) as slot:
            copy_to_device(device, first.address, slot.address, 4 * MIB, stream)
        graph = capture(stream, lambda: copy_on_device(device, second.address, first.address, 32 * MIB, stream) is None)
        graph.launch(stream)
        graph.close()
        ExportedArray(first.address, (MIB,), BYTES, None, device=device, producer=stream.handle).numpy()
        first.free(stream)
        second.free(stream)
        stream.synchronize()
        ring.close()
        pool.close()
        stream.close()

    for _ in range(3):  # what CUDA makes once and keeps
        once()
    before = device.free_bytes()
    for _ in range(50):
        once()
    assert before - device.free_bytes() < 8 * MIB
