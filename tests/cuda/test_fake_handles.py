"""What the fake driver says of handles and addresses that are wrong; its checks of order are in test_fake_driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes.fake_cudart import (
    DEFAULT_STREAMS,
    INVALID_HANDLE,
    INVALID_VALUE,
    OUT_OF_MEMORY,
    FakeCudart,
    FakeViolation,
)

BLOCKING_SYNC = 1


class Bench:
    """One of each kind of handle, made without the layer."""

    def __init__(self) -> None:
        self.c = FakeCudart(eagerness=0.0)
        self.c.cudaSetDevice(0)
        self.stream = self.c.cudaStreamCreateWithFlags(1)[1]
        self.event = self.c.cudaEventCreateWithFlags(BLOCKING_SYNC)[1]
        self.pool = self.c.cudaMemPoolCreate(None)[1]
        self.memory = self.c.cudaMallocFromPoolAsync(512, self.pool, self.stream)[1]
        self.pinned = self.c.cudaHostAlloc(512, 0)[1]
        self.c.cudaStreamBeginCapture(self.stream, 1)
        self.c.cudaMemcpyAsync(self.memory, self.pinned, 512, "to device", self.stream)
        self.graph = self.c.cudaStreamEndCapture(self.stream)[1]
        self.executable = self.c.cudaGraphInstantiate(self.graph, 0)[1]

    def release(self) -> None:
        self.c.cudaFreeAsync(self.memory, self.stream)
        self.c.cudaStreamSynchronize(self.stream)
        self.c.cudaFreeHost(self.pinned)
        self.c.cudaGraphDestroy(self.graph)
        self.c.cudaGraphExecDestroy(self.executable)
        self.c.cudaMemPoolDestroy(self.pool)
        self.c.cudaEventDestroy(self.event)
        self.c.cudaStreamDestroy(self.stream)


def test_one_of_each_is_made_and_released_cleanly() -> None:
    b = Bench()
    b.release()
    b.c.assert_clean()


WRONG = 0x999999


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda b: b.c.cudaStreamDestroy(WRONG), INVALID_HANDLE, "stream was destroyed that does not exist"),
        (lambda b: b.c.cudaStreamDestroy(DEFAULT_STREAMS[0]), INVALID_HANDLE, "or is CUDA's own"),
        (lambda b: b.c.cudaStreamSynchronize(WRONG), INVALID_HANDLE, "waits for a stream that does not"),
        (lambda b: b.c.cudaStreamWaitEvent(b.stream, WRONG, 0), INVALID_HANDLE, "waits for an event that does not"),
        (lambda b: b.c.cudaEventDestroy(WRONG), INVALID_HANDLE, "event was destroyed that does not"),
        (lambda b: b.c.cudaEventRecord(WRONG, b.stream), INVALID_HANDLE, "event was recorded that does not"),
        (lambda b: b.c.cudaEventSynchronize(WRONG), INVALID_HANDLE, "host waits for an event that does not"),
        (lambda b: b.c.cudaEventSynchronize(b.event), 0, "host waits for an event that was never recorded"),
        (lambda b: b.c.cudaEventRecord(b.event, WRONG), 0, "given to a stream that does not exist"),
        (lambda b: b.c.cudaGraphExecDestroy(WRONG), INVALID_VALUE, "graph was destroyed that does not"),
        (lambda b: b.c.cudaGraphLaunch(WRONG, b.stream), INVALID_VALUE, "graph was launched that does not"),
        (lambda b: b.c.cudaMemPoolDestroy(WRONG), INVALID_VALUE, "pool was destroyed that does not"),
        (lambda b: b.c.cudaMemPoolDestroy(b.pool), 0, "destroyed while memory of it was in use"),
        (lambda b: b.c.cudaMemPoolGetAttribute(WRONG, 5), INVALID_VALUE, "pool is asked that does not"),
        (lambda b: b.c.cudaFreeAsync(b.memory + 256, b.stream), INVALID_VALUE, "no allocation from a pool has"),
        (lambda b: b.c.cudaFreeAsync(b.pinned, b.stream), INVALID_VALUE, "no allocation from a pool has"),
        (lambda b: b.c.cudaFreeHost(b.memory), INVALID_VALUE, "cannot free"),
        (lambda b: b.c.cudaFreeHost(b.pinned + 8), INVALID_VALUE, "cannot free"),
        (lambda b: b.c.cudaFree(64), INVALID_VALUE, "never allocated"),
        (lambda b: b.c.cudaStreamCreateWithFlags(0), 0, "waits for the default stream"),
        (lambda b: b.c.cudaEventCreateWithFlags(0), 0, "whose waiters spin"),
        (
            lambda b: b.c.cudaMemcpyAsync(b.memory, b.memory, 8, "to device", b.stream),
            0,
            "to device has an end in device memory",
        ),
        (
            lambda b: b.c.cudaMemcpyAsync(b.pinned, b.memory, 8, "on device", b.stream),
            0,
            "on device has an end in pinned memory",
        ),
    ],
)
def test_what_is_wrong_is_an_error_or_a_violation(
    act: Callable[[Bench], tuple[int, ...]], error: int, words: str
) -> None:
    b = Bench()
    assert b.c.violations == []
    assert act(b)[0] == error
    with pytest.raises(FakeViolation, match=words):
        b.c.assert_clean(leaks=False)


def test_memory_of_a_pool_freed_twice() -> None:
    b = Bench()
    b.c.cudaFreeAsync(b.memory, b.stream)
    assert b.c.cudaFreeAsync(b.memory, b.stream)[0] == INVALID_VALUE
    with pytest.raises(FakeViolation, match="freed twice"):
        b.c.assert_clean(leaks=False)


@pytest.mark.parametrize("kept", ["memory", "streams", "events", "graphs", "pools"])
def test_each_kind_of_leak_is_named(kept: str) -> None:
    b = Bench()
    for kind, release in {
        "memory": lambda: (b.c.cudaFreeAsync(b.memory, b.stream), b.c.cudaStreamSynchronize(b.stream)),
        "graphs": lambda: (b.c.cudaGraphDestroy(b.graph), b.c.cudaGraphExecDestroy(b.executable)),
        "pools": lambda: b.c.cudaMemPoolDestroy(b.pool),
        "events": lambda: b.c.cudaEventDestroy(b.event),
        "streams": lambda: (b.c.cudaStreamSynchronize(b.stream), b.c.cudaStreamDestroy(b.stream)),
    }.items():
        if kind != kept and (kept, kind) != ("memory", "pools"):
            release()
    b.c.cudaFreeHost(b.pinned)
    with pytest.raises(FakeViolation, match=f"{kept} were not released"):
        b.c.assert_clean()


def test_a_failure_is_given_once_and_does_nothing() -> None:
    b = Bench()
    b.c.fail_next("cudaHostAlloc")
    assert b.c.cudaHostAlloc(8, 0) == (OUT_OF_MEMORY, 0)
    assert b.c.cudaGetLastError() == (OUT_OF_MEMORY,)
    assert b.c.cudaGetLastError() == (0,)
    assert b.c.cudaHostAlloc(8, 0)[0] == 0
    with pytest.raises(AttributeError, match="cudaHostAlok"):
        b.c.fail_next("cudaHostAlok")
