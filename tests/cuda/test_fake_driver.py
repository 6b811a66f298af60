"""The fake driver punishes what a GPU would punish; each of its checks is tripped here, and passed by the right way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fakes.fake_cudart import FakeCudart, FakeViolation
from tests.fakes.fake_gpu import FakeGpu, batch, expected, linear
from tests.fakes.fake_tensorrt import Misuse
from trtdeploy.cuda.api import CudaApi
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import DevicePool, PinnedBuffer, copy_to_device, copy_to_host
from trtdeploy.cuda.streams import Event, Stream

NBYTES = 1024


class Bench:
    """A device with two streams, a pool, a device buffer made on the first stream, and pinned memory."""

    def __init__(self, *, eagerness: float = 0.0, seed: int = 0, devices: int = 1) -> None:
        self.cudart = FakeCudart(seed, eagerness=eagerness, devices=devices)
        self.device = Device(CudaApi(self.cudart), 0)
        self.device.make_current()
        self.first, self.second = Stream(self.device), Stream(self.device)
        self.pool = DevicePool(self.device, release_threshold_bytes=1 << 20)
        self.buffer = self.pool.allocate(NBYTES, self.first)
        self.pinned = PinnedBuffer(self.device, NBYTES)
        self.bytes = self.pinned.view(np.dtype(np.uint8), (NBYTES,))
        self.result = PinnedBuffer(self.device, NBYTES)
        self.read = self.result.view(np.dtype(np.uint8), (NBYTES,))

    def to_device(self, stream: Stream) -> None:
        copy_to_device(self.device, self.buffer.address, self.pinned.address, NBYTES, stream)

    def to_host(self, stream: Stream) -> None:
        copy_to_host(self.device, self.result.address, self.buffer.address, NBYTES, stream)

    def release(self) -> None:
        self.first.synchronize()
        self.second.synchronize()
        self.buffer.free(self.first)
        self.first.synchronize()
        self.pinned.close()
        self.result.close()
        self.pool.close()
        self.first.close()
        self.second.close()

    def check(self, words: str) -> None:
        with pytest.raises(FakeViolation, match=words):
            self.cudart.assert_clean(leaks=False)


def test_the_right_way_is_clean_and_gives_the_bytes_back() -> None:
    b = Bench()
    b.bytes[...] = 7
    b.to_device(b.first)
    b.first.synchronize()
    b.bytes[...] = 0
    b.to_host(b.first)
    b.first.synchronize()
    assert (b.read == 7).all()
    b.release()
    b.cudart.assert_clean()


def test_two_streams_without_an_event_race() -> None:
    b = Bench()
    b.to_device(b.first)
    b.to_host(b.second)
    b.check("race")


def test_an_event_between_two_streams_orders_them() -> None:
    b = Bench()
    event = Event(b.device)
    b.to_device(b.first)
    b.first.record(event)
    b.second.wait(event)
    b.to_host(b.second)
    b.release()
    event.close()
    b.cudart.assert_clean()


def test_a_stream_that_waits_for_an_earlier_record_is_not_ordered_after_later_work() -> None:
    b = Bench()
    event = Event(b.device)
    b.first.record(event)
    b.second.wait(event)
    b.to_device(b.first)
    b.to_host(b.second)
    b.check("race")


def test_memory_used_on_a_stream_that_its_allocation_is_not_ordered_before() -> None:
    b = Bench()
    b.to_device(b.second)
    b.check("race: a")


def test_memory_used_after_it_was_freed() -> None:
    b = Bench()
    b.to_device(b.first)
    b.buffer.free(b.first)
    b.to_host(b.first)
    b.check("freed")


def test_pinned_memory_freed_while_a_copy_is_under_way() -> None:
    b = Bench()
    b.to_device(b.first)
    b.pinned.close()
    b.check("freed while")


def test_pinned_memory_changed_while_a_copy_is_under_way() -> None:
    b = Bench()
    b.to_device(b.first)
    b.bytes[...] = 1
    b.check("changed while")


def test_a_result_read_too_early_is_not_the_result() -> None:
    b = Bench()
    b.bytes[...] = 7
    b.to_device(b.first)
    b.first.synchronize()
    b.to_host(b.first)
    assert (b.read == 0xCD).all()
    b.first.synchronize()
    assert (b.read == 7).all()


def test_waiting_for_an_event_that_was_never_recorded() -> None:
    b = Bench()
    b.second.wait(Event(b.device))
    b.check("never recorded")


def test_a_stream_closed_with_work_in_it() -> None:
    b = Bench()
    b.to_device(b.first)
    b.first.close()
    b.check("destroyed with work")


def on_the_second_device() -> Bench:
    b = Bench(devices=2)
    b.cudart.cudaSetDevice(1)
    return b


def test_a_kernel_in_a_stream_of_a_device_that_is_not_current() -> None:
    b = on_the_second_device()
    b.cudart.enqueue_kernel(b.first.handle, [], [], lambda: None)
    b.check("kernel was given to a stream of a device that is not current")


def test_a_capture_of_a_stream_of_a_device_that_is_not_current() -> None:
    b = on_the_second_device()
    b.cudart.cudaStreamBeginCapture(b.first.handle, 1)
    b.check("capture was begun to a stream of a device that is not current")


def test_an_event_in_a_stream_of_another_device() -> None:
    b = on_the_second_device()
    _, event = b.cudart.cudaEventCreateWithFlags(1)
    b.cudart.cudaEventRecord(event, b.first.handle)
    b.check("event was recorded in a stream of another device")


def test_copies_and_waits_are_allowed_whichever_device_is_current() -> None:
    b = on_the_second_device()
    b.bytes[...] = 7
    b.to_device(b.first)
    b.to_host(b.first)
    b.first.synchronize()
    assert (b.read == 7).all()
    b.release()
    b.cudart.assert_clean()


def test_memory_that_was_never_allocated() -> None:
    b = Bench()
    copy_to_device(b.device, b.buffer.address + NBYTES, b.pinned.address, 16, b.first)
    b.check("never allocated")


def test_what_is_not_released_is_a_leak() -> None:
    b = Bench()
    with pytest.raises(FakeViolation, match="not released"):
        b.cudart.assert_clean()


class TestFakeTensorRT:
    def context(self, gpu: FakeGpu) -> Any:
        engine = gpu.trt.Runtime(gpu.bindings.messages.logger).deserialize_cuda_engine(gpu.plan(linear(), ()))
        return engine.create_execution_context()

    def test_addresses_must_be_set_and_aligned(self) -> None:
        gpu = FakeGpu()
        gpu.device.make_current()
        context = self.context(gpu)
        context.set_input_shape("x", (1, 64))
        with pytest.raises(Misuse, match="address of x"):
            context.execute_async_v3(Stream(gpu.device).handle)
        with pytest.raises(Misuse, match="aligned"):
            context.set_tensor_address("x", 300)

    def test_shapes_must_be_set(self) -> None:
        gpu = FakeGpu()
        gpu.device.make_current()
        with pytest.raises(Misuse, match="shape of x"):
            self.context(gpu).execute_async_v3(Stream(gpu.device).handle)

    def test_the_default_stream_is_refused(self) -> None:
        gpu = FakeGpu()
        gpu.device.make_current()
        with pytest.raises(Misuse, match="default stream"):
            self.context(gpu).execute_async_v3(0)

    def test_a_context_used_by_two_threads_is_seen(self) -> None:
        gpu = FakeGpu()
        gpu.device.make_current()
        context = self.context(gpu)
        with context._alone(), pytest.raises(Misuse, match="two threads"):
            context.set_input_shape("x", (1, 64))


# What the engine does right, undone one by one: each must be seen.


def ask_many(seed: int, **options: object) -> None:
    gpu = FakeGpu(seed, eagerness=0.1)
    with gpu.engine(**options) as engine:
        ones = [batch(2 + index % 3, index) for index in range(12)]
        for future, one in zip([engine.submit(one) for one in ones], ones, strict=True):
            np.testing.assert_allclose(future.result()["y"], expected(one["x"]), atol=1e-4)


def found_out(**options: object) -> None:
    for seed in range(20):
        ask_many(seed, **options)


@pytest.mark.parametrize(
    "broken",
    ["trtdeploy.cuda.memory.StagingSlot.synchronize", "trtdeploy.cuda.streams.Stream.record"],
)
def test_an_engine_that_does_not_wait_is_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken, lambda *_: None)
    with pytest.raises(AssertionError):  # FakeViolation is one, too
        found_out()


def test_shared_activations_without_order_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtdeploy.cuda.streams.Stream.wait", lambda *_: None)
    with pytest.raises(FakeViolation, match="race"):
        found_out(contexts=3, activations="shared")


def test_a_context_that_is_given_to_two_requests_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtdeploy.engine.pool.FairPool.take", lambda self: 0)
    monkeypatch.setattr("trtdeploy.engine.pool.FairPool.release", lambda *_: None)
    with pytest.raises(Exception, match=r"slots are taken|two threads|mismatch|race|changed"):
        found_out()
