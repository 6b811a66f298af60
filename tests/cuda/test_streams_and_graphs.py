"""Streams, events and graphs, under the fake driver."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda.fake_machine import Machine
from tests.fakes.fake_cudart import DEFAULT_STREAMS, INVALID_VALUE, FakeViolation
from trtdeploy.cuda.graphs import Graph, GraphCache, capture
from trtdeploy.cuda.memory import DeviceBuffer, PinnedBuffer, copy_to_device, copy_to_host
from trtdeploy.cuda.streams import Event, ExternalStream, Stream
from trtdeploy.errors import CudaError, GraphCaptureError, InferenceError


class TestStreams:
    def test_work_runs_when_it_is_waited_for_and_in_order(self) -> None:
        m = Machine()
        buffer = m.pool.allocate(64, m.stream)
        for value in range(3):
            m.kernel(m.stream, writes=buffer, result=float(value))
        assert (m.read(buffer) != 2).all()
        m.stream.synchronize()
        assert (m.read(buffer) == 2).all()
        buffer.free(m.stream)
        m.end()

    def test_a_stream_waits_for_what_an_event_stands_for(self) -> None:
        m = Machine()
        other, event = Stream(m.device), Event(m.device)
        buffer = m.pool.allocate(64, m.stream)
        m.kernel(m.stream, writes=buffer, result=1.0)
        m.stream.record(event)
        other.wait(event)
        m.kernel(other, reads=buffer, writes=buffer, result=2.0)
        other.synchronize()
        assert (m.read(buffer) == 2).all()
        buffer.free(other)
        other.synchronize()
        event.close()
        other.close()
        m.end()

    @pytest.mark.parametrize("foreign", ["default", "made"])
    def test_a_stream_waits_for_one_of_another_library(self, foreign: str) -> None:
        m = Machine()
        other = ExternalStream(m.device, DEFAULT_STREAMS[0]) if foreign == "default" else Stream(m.device)
        buffer = m.filled(np.zeros(16, np.float32))
        m.kernel(other, writes=buffer, result=1.0)
        m.stream.wait_for_stream(other.handle)
        m.kernel(m.stream, reads=buffer)
        m.stream.synchronize()
        assert (m.read(buffer) == 1).all()
        buffer.free(m.stream)
        other.close()
        m.end()

    def test_closing_a_stream_of_somebody_else_leaves_it(self) -> None:
        m = Machine()
        theirs = Stream(m.device)
        ExternalStream(m.device, theirs.handle).close()
        assert m.cudart.calls["cudaStreamDestroy"] == 0
        theirs.close()
        m.end()

    def test_the_host_waits_for_an_event_and_for_nothing_later(self) -> None:
        m = Machine()
        event = Event(m.device)
        first, second = (m.pool.allocate(64, m.stream) for _ in range(2))
        m.kernel(m.stream, writes=first, result=1.0)
        m.stream.record(event)
        m.kernel(m.stream, writes=second, result=1.0)
        event.synchronize()
        assert (m.read(first) == 1).all()
        assert (m.read(second) != 1).all()
        for buffer in (first, second):
            buffer.free(m.stream)
        event.close()
        m.end()

    def test_events_sleep_and_have_no_clock_unless_asked(self) -> None:
        m = Machine()
        flags: list[int] = []
        create = m.cudart.cudaEventCreateWithFlags
        m.cudart.cudaEventCreateWithFlags = lambda f: (flags.append(f), create(f))[1]  # type: ignore[assignment, method-assign]
        events = [Event(m.device), Event(m.device, timing=True), Event(m.device, timing=True)]
        assert flags == [3, 1, 1]  # cudaEventBlockingSync = 1, cudaEventDisableTiming = 2
        m.stream.record(events[1])
        m.stream.record(events[2])
        assert events[2].milliseconds_since(events[1]) == 1.0
        for event in events:
            event.close()
        m.end()


def one_kernel(m: Machine, buffer: DeviceBuffer, value: float) -> Callable[[], bool]:
    def enqueue() -> bool:
        m.kernel(m.stream, writes=buffer, result=value)
        return True

    return enqueue


class TestCapture:
    def test_nothing_runs_until_it_is_launched_and_then_as_often_as_wanted(self) -> None:
        m = Machine()
        buffer = m.filled(np.zeros(16, np.float32))
        graph = capture(m.stream, one_kernel(m, buffer, 1.0))
        m.stream.synchronize()
        assert (m.read(buffer) == 0).all()
        for _ in range(2):
            m.kernel(m.stream, writes=buffer, result=0.0)
            graph.launch(m.stream)
            m.stream.synchronize()
            assert (m.read(buffer) == 1).all()
        graph.close()
        buffer.free(m.stream)
        m.end()

    def test_the_device_of_the_stream_is_current_or_the_graph_would_be_empty(self) -> None:
        m = Machine(devices=2)
        m.cudart.cudaSetDevice(1)

        def enqueue() -> bool:
            assert m.cudart.cudaGetDevice() == (0, 0)
            m.cudart.enqueue_kernel(m.stream.handle, [], [], lambda: None)
            return True

        capture(m.stream, enqueue).close()
        assert m.cudart.cudaGetDevice() == (0, 1)  # and that of the caller is so again
        m.end()

    def test_captured_copies_take_what_lies_there_at_each_launch(self) -> None:
        m = Machine()
        given, back = PinnedBuffer(m.device, 64), PinnedBuffer(m.device, 64)
        there, result = (pinned.view(np.dtype(np.float32), (16,)) for pinned in (given, back))
        result[...] = 0
        buffer = m.pool.allocate(64, m.stream)

        def enqueue() -> bool:
            copy_to_device(m.device, buffer.address, given.address, 64, m.stream)
            copy_to_host(m.device, back.address, buffer.address, 64, m.stream)
            return True

        graph = capture(m.stream, enqueue)
        assert (result == 0).all()
        for value in range(3):
            there[...] = value
            graph.launch(m.stream)
            assert (result.view(np.uint8) == 0xCD).all()  # not yet
            m.stream.synchronize()
            assert (result == value).all()
        graph.close()
        buffer.free(m.stream)
        m.stream.synchronize()
        given.close()
        back.close()
        m.end()

    @pytest.mark.parametrize(
        ("what", "words"),
        [
            ("refuses", "refused during capture"),
            ("raises", "could not"),
            ("breaks", "KeyError: 'x'"),
            ("waits", "StreamCaptureUnsupported"),
            ("pins", "StreamCaptureUnsupported"),
            ("swallows", "StreamCaptureInvalidated"),
            ("leaves", "StreamCaptureIsolation"),
            ("nothing", "is empty"),
        ],
    )
    def test_what_cannot_be_captured_says_why_and_leaves_the_stream_usable(self, what: str, words: str) -> None:
        m = Machine()
        buffer = m.filled(np.zeros(16, np.float32))
        other, outside = Stream(m.device), Event(m.device)
        other.record(outside)

        def enqueue() -> bool:
            if what != "nothing":
                m.kernel(m.stream, writes=buffer, result=1.0)
            if what == "raises":
                raise InferenceError("could not")
            if what == "breaks":
                raise KeyError("x")
            if what == "waits":
                m.stream.synchronize()
            if what == "pins":
                PinnedBuffer(m.device, 16)
            if what == "leaves":
                m.stream.wait(outside)
            if what == "swallows":
                with pytest.raises(CudaError):
                    m.stream.synchronize()
            return what != "refuses"

        with pytest.raises(GraphCaptureError, match=words):
            capture(m.stream, enqueue)
        if what in ("waits", "swallows"):
            assert m.cudart.last_error == 0  # or another library of this thread would find it
        m.kernel(m.stream, writes=buffer, result=7.0)
        m.stream.synchronize()
        assert (m.read(buffer) == 7).all()
        buffer.free(m.stream)
        other.synchronize()
        outside.close()
        other.close()
        m.end()

    def test_ctrl_c_ends_the_capture_and_stays_ctrl_c(self) -> None:
        m = Machine()

        def enqueue() -> bool:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            capture(m.stream, enqueue)
        m.stream.synchronize()
        m.end()

    @pytest.mark.parametrize("function", ["cudaGraphInstantiate", "cudaStreamEndCapture"])
    def test_a_failure_of_cuda_leaves_nothing_behind(self, function: str) -> None:
        m = Machine()
        buffer = m.pool.allocate(64, m.stream)
        m.cudart.fail_next(function, INVALID_VALUE)
        with pytest.raises(GraphCaptureError, match=function):
            capture(m.stream, one_kernel(m, buffer, 1.0))
        assert not m.cudart._graphs
        assert not m.cudart._executables

    def test_a_graph_destroyed_while_it_is_to_run_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Event, "synchronize", lambda _: None)
        m = Machine()
        buffer = m.pool.allocate(64, m.stream)
        graph = capture(m.stream, one_kernel(m, buffer, 1.0))
        graph.launch(m.stream)
        graph.close()
        with pytest.raises(FakeViolation, match="graph was destroyed while"):
            m.cudart.assert_clean(leaks=False)


class TestCache:
    def graphs(self, m: Machine, buffer: DeviceBuffer, count: int) -> list[Graph]:
        return [capture(m.stream, one_kernel(m, buffer, float(index))) for index in range(count)]

    def test_the_least_recently_used_goes_and_only_when_it_is_done(self) -> None:
        m = Machine()
        buffer = m.pool.allocate(64, m.stream)
        cache = GraphCache(m.device, 2)
        first, second, third = self.graphs(m, buffer, 3)
        cache.put("a", first)
        cache.put("b", second)
        cache.launch(second, m.stream)
        assert cache.get("a") is first
        cache.put("c", third)
        assert (m.read(buffer) == 1).all()  # the launch of b was waited for
        assert cache.get("b") is None
        assert cache.get("a") is first
        assert cache.counts() == {"captured": 3, "launched": 1, "evicted": 1, "kept": 2}
        cache.clear()
        assert cache.counts()["kept"] == 0
        buffer.free(m.stream)
        m.end()

    def test_a_cache_keeps_what_it_may(self) -> None:
        m = Machine()
        buffer = m.pool.allocate(64, m.stream)
        cache = GraphCache(m.device, 1)
        for key, graph in enumerate(self.graphs(m, buffer, 4)):
            cache.put(key, graph)
            assert cache.get(key) is graph
        assert cache.counts()["evicted"] == 3
        cache.clear()
        buffer.free(m.stream)
        m.end()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    eagerness=st.sampled_from([0.0, 0.3, 0.8]),
    capacity=st.integers(1, 3),
    keys=st.lists(st.integers(0, 4), min_size=1, max_size=15),
)
def test_a_graph_gives_its_own_result_on_any_schedule(
    seed: int, eagerness: float, capacity: int, keys: list[int]
) -> None:
    m = Machine(seed, eagerness=eagerness)
    buffer = m.pool.allocate(64, m.stream)
    cache = GraphCache(m.device, capacity)
    for key in keys:
        graph = cache.get(key)
        if graph is None:
            graph = capture(m.stream, one_kernel(m, buffer, float(key)))
            cache.put(key, graph)
        cache.launch(graph, m.stream)
        if key % 2:
            m.stream.synchronize()
            assert (m.read(buffer) == key).all()
    counts = cache.counts()
    assert counts["kept"] <= capacity
    assert counts["captured"] - counts["evicted"] == counts["kept"]
    m.stream.synchronize()
    cache.clear()
    buffer.free(m.stream)
    m.end()
