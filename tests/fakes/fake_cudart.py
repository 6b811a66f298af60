"""A driver without a GPU, in place of ``cuda.bindings.runtime``: host memory, lazy streams, and a race detector.

Work sits in its stream until a seeded schedule lets it run, or somebody waits for it: every order that CUDA allows can
happen. Vector clocks say what is ordered before what (streams and host threads are the actors; events, waits and
synchronization are the edges); two accesses to one byte, one of them a write, that are not ordered are a race, whatever
the outcome was this time. Freed memory is never reused, so every later use of it is seen.

What a GPU would punish is collected in ``violations``; ``assert_clean`` raises it.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np

ALIGNMENT = 256
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_DEVICE, INVALID_HANDLE, NOT_READY = 0, 1, 2, 101, 400, 600
NOT_PERMITTED, INVALIDATED, ISOLATION = 900, 901, 905
_NAMES = {
    INVALID_VALUE: "cudaErrorInvalidValue",
    OUT_OF_MEMORY: "cudaErrorMemoryAllocation",
    INVALID_DEVICE: "cudaErrorInvalidDevice",
    INVALID_HANDLE: "cudaErrorInvalidResourceHandle",
    NOT_READY: "cudaErrorNotReady",
    NOT_PERMITTED: "cudaErrorStreamCaptureUnsupported",
    INVALIDATED: "cudaErrorStreamCaptureInvalidated",
    ISOLATION: "cudaErrorStreamCaptureIsolation",
}
DEFAULT_STREAMS = (1, 2)  # cudaStreamLegacy, cudaStreamPerThread
_NEVER_FAIL = ("cudaMemPoolProps", "cudaGetErrorName", "cudaGetErrorString", "cudaGetLastError")
Clock = dict[str, int]
Span = tuple[int, int]


class FakeViolation(AssertionError):
    """Something that a GPU would punish, or could."""


@dataclass
class Region:
    """One allocation; its memory is kept for ever, so that no address comes twice."""

    address: int
    nbytes: int
    kind: str
    memory: np.ndarray[Any, Any]
    device: int = 0
    pool: int | None = None
    freed: bool = False
    free_asked: bool = False
    # last write, and last read of each actor since: (first byte, end) -> (actor, its time)
    accesses: list[tuple[int, int, bool, str, int]] = field(default_factory=list)


@dataclass
class Work:
    """One piece of a stream's work."""

    name: str
    run: Callable[[], None]
    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()
    # called when it is queued, which for captured work is at each launch; what it returns, just before it runs
    promise: Callable[[], Callable[[], None]] = lambda: lambda: None
    check: Callable[[], None] = lambda: None
    known: Clock = field(default_factory=dict)
    waits_for: Work | None = None
    done: bool = False
    clock: Clock = field(default_factory=dict)


class Stream:
    """A queue of work."""

    def __init__(self, name: str, device: int | None = None) -> None:
        self.name = name
        self.device = device  # None: that of the thread, as for CUDA's default streams
        self.queue: deque[Work] = deque()
        self.clock: Clock = {}
        self.captured: list[Work] | None = None
        self.capturing_thread = 0
        self.invalidated = False


class FakeCudart:
    """The functions of the module, each returning an error code first.

    Args:
        seed: Of the schedule.
        memory_bytes: What a device has.
        eagerness: How likely it is that some work runs at each call, from 0 (only when waited for) to 1.
        devices: How many there are.
    """

    def __init__(self, seed: int = 0, *, memory_bytes: int = 1 << 30, eagerness: float = 0.3, devices: int = 1) -> None:
        self.violations: list[str] = []
        self.contexts: set[int] = set()  # devices that something has been done on: each costs some hundred MB
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.allocations = 0
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self._memory_bytes = memory_bytes
        self._devices = devices
        self._lock = threading.RLock()
        self._handles = itertools.count(0x1000)
        self._regions: list[Region] = []
        self._streams: dict[int, Stream] = {handle: Stream(f"default stream {handle}") for handle in DEFAULT_STREAMS}
        self._events: dict[int, Work | None] = {}
        self._device_of_event: dict[int, int] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}
        self._pools: dict[int, int] = {}  # bytes that each has taken from the device
        self._device_of_pool: dict[int, int] = {}
        self._host_clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._thread = threading.local()  # its current device, its last error
        self._failures: dict[str, int] = {}
        self.cudaMemPoolProps = lambda: SimpleNamespace(location=SimpleNamespace())
        self.cudaMemAllocationType = SimpleNamespace(cudaMemAllocationTypePinned=1)
        self.cudaMemLocationType = SimpleNamespace(cudaMemLocationTypeDevice=1)
        self.cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4, cudaMemPoolAttrReservedMemCurrent=5)
        self.cudaMemcpyKind = SimpleNamespace(
            cudaMemcpyHostToDevice="to device", cudaMemcpyDeviceToHost="to host", cudaMemcpyDeviceToDevice="on device"
        )
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    # What tests use

    def fail_next(self, function: str, error: int = OUT_OF_MEMORY) -> None:
        """Let the next call of a function fail."""
        if not hasattr(self, function):
            raise AttributeError(f"there is no {function}")
        self._failures[function] = error

    @property
    def last_error(self) -> int:
        """What this thread's next cudaGetLastError would say, and hand on to whoever asks."""
        return getattr(self._thread, "last_error", SUCCESS)

    def array_at(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
        """Return memory as an array."""
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        region = self._region_of(address, nbytes, "array_at")
        if region is None:
            return np.zeros(shape, kind)
        start = address - region.address
        return region.memory[start : start + nbytes].view(kind).reshape(tuple(shape))

    def enqueue_kernel(
        self, stream: int, reads: Sequence[Span], writes: Sequence[Span], run: Callable[[], None]
    ) -> None:
        """Give a stream work that reads and writes (address, bytes)."""
        with self._lock:
            self._require_device_of(stream, "a kernel was given")
            self._give(stream, Work("kernel", run, reads, writes))

    def run_everything(self) -> None:
        """Let all work run, in the schedule's order."""
        with self._lock:
            while self._run_one():
                pass

    def assert_clean(self, *, leaks: bool = True) -> None:
        """Raise what was violated, and, at the end of a test, what was not released."""
        self.run_everything()
        if self.violations:
            raise FakeViolation("\n".join(dict.fromkeys(self.violations)))
        if leaks:
            live = [f"{region.nbytes} bytes ({region.kind})" for region in self._regions if not region.freed]
            for what, count in (
                ("memory", len(live)),
                ("streams", len(self._streams) - len(DEFAULT_STREAMS)),
                ("events", len(self._events)),
                ("graphs", len(self._graphs) + len(self._executables)),
                ("pools", len(self._pools)),
            ):
                if count:
                    raise FakeViolation(f"{count} {what} were not released: {live if what == 'memory' else ''}")

    # Device

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return SUCCESS, self._devices

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return SUCCESS, 13000

    cudaRuntimeGetVersion = cudaDriverGetVersion

    def cudaGetErrorName(self, error: int) -> tuple[int, bytes]:
        return SUCCESS, _NAMES.get(error, "cudaErrorUnknown").encode()

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return SUCCESS, b"a fake error"

    def cudaGetLastError(self) -> tuple[int]:
        error, self._thread.last_error = self.last_error, SUCCESS
        return (error,)

    def cudaSetDevice(self, ordinal: int) -> tuple[int]:
        if not 0 <= ordinal < self._devices:
            return (INVALID_DEVICE,)
        self._thread.device = ordinal
        self.contexts.add(ordinal)  # since CUDA 12
        return (SUCCESS,)

    def cudaGetDevice(self) -> tuple[int, int]:
        return SUCCESS, self._current

    def cudaGetDeviceProperties(self, ordinal: int) -> tuple[int, Any]:
        if not 0 <= ordinal < self._devices:
            return INVALID_DEVICE, None
        properties = SimpleNamespace(name=b"Fake GPU\0", major=9, minor=0, totalGlobalMem=self._memory_bytes)
        return SUCCESS, properties

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return SUCCESS, self._memory_bytes - self._live_bytes("device"), self._memory_bytes

    def cudaPointerGetAttributes(self, address: int) -> tuple[int, Any]:
        for region in self._regions:
            if region.address <= address < region.address + region.nbytes:
                return SUCCESS, SimpleNamespace(device=region.device, type=2 if region.kind == "device" else 1)
        return SUCCESS, SimpleNamespace(device=-2, type=0)  # host memory that CUDA does not know

    # Memory

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:
        return self._allocate("cudaMalloc", nbytes, "device")

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[int, int]:
        return self._allocate("cudaHostAlloc", nbytes, "pinned")

    def cudaFree(self, address: int) -> tuple[int]:
        return self._free_now("cudaFree", address)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        return self._free_now("cudaFreeHost", address)

    def cudaMemPoolCreate(self, properties: Any) -> tuple[int, int]:
        with self._called("cudaMemPoolCreate") as error:
            handle = next(self._handles)
            self._pools[handle] = 0
            self._device_of_pool[handle] = self._current if properties is None else properties.location.id
            return error, handle

    def cudaMemPoolSetAttribute(self, pool: int, attribute: int, value: int) -> tuple[int]:
        return (SUCCESS,)

    def cudaMemPoolGetAttribute(self, pool: int, attribute: int) -> tuple[int, int]:
        if pool not in self._pools:
            self._violate("a pool is asked that does not exist")
            return INVALID_VALUE, 0
        return SUCCESS, self._pools[pool]

    def cudaMemPoolDestroy(self, pool: int) -> tuple[int]:
        with self._called("cudaMemPoolDestroy") as error:
            if self._pools.pop(pool, None) is None:
                self._violate("a pool was destroyed that does not exist")
                return (INVALID_VALUE,)
            if any(region.pool == pool and not region.free_asked for region in self._regions):
                self._violate("a pool was destroyed while memory of it was in use")
            return (error,)

    def cudaMallocFromPoolAsync(self, nbytes: int, pool: int, stream: int) -> tuple[int, int]:
        error, address = self._allocate("cudaMallocFromPoolAsync", nbytes, "device", pool)
        with self._lock:
            if error == SUCCESS:
                live = sum(r.nbytes for r in self._regions if r.pool == pool and not r.free_asked)
                self._pools[pool] = max(self._pools[pool], live)  # what was freed is used again, as far as it goes
                self._give(stream, Work("allocation", lambda: None, writes=[(address, nbytes)]))
        return error, address

    def cudaFreeAsync(self, address: int, stream: int) -> tuple[int]:
        with self._called("cudaFreeAsync") as error:
            region = self._region_of(address, 1, "cudaFreeAsync")
            if region is None or region.pool is None or region.address != address:
                self._violate("cudaFreeAsync was given an address that no allocation from a pool has")
                return (INVALID_VALUE,)
            if region.free_asked:
                self._violate("memory of a pool was freed twice")
                return (INVALID_VALUE,)
            region.free_asked = True

            def free() -> None:
                region.freed = True
                region.memory[...] = 0xDD

            self._give(stream, Work("free", free, writes=[(address, region.nbytes)]))
            return (error,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: str, stream: int) -> tuple[int]:
        with self._called("cudaMemcpyAsync") as error:
            for address, where in ((target, "to host"), (source, "to device")):
                region = self._region_of(address, nbytes, "cudaMemcpyAsync")
                wanted = "pinned" if kind == where else "device"
                if region is not None and region.kind != wanted:
                    self._violate(f"a copy {kind} has an end in {region.kind} memory")

            def promise() -> Callable[[], None]:
                if kind == "to host":
                    self.array_at(target, (nbytes,), np.uint8)[...] = 0xCD  # whoever reads too early gets this
                if kind != "to device":
                    return lambda: None
                promised = self.array_at(source, (nbytes,), np.uint8).tobytes()

                def check() -> None:
                    if self.array_at(source, (nbytes,), np.uint8).tobytes() != promised:
                        self._violate("pinned memory was changed while a copy from it was under way")

                return check

            def copy() -> None:
                self.array_at(target, (nbytes,), np.uint8)[...] = self.array_at(source, (nbytes,), np.uint8)

            self._give(stream, Work(f"copy {kind}", copy, [(source, nbytes)], [(target, nbytes)], promise))
            return (error,)

    # Streams and events

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        with self._called("cudaStreamCreateWithFlags") as error:
            if flags != 1:
                self._violate("a stream that waits for the default stream was made")
            handle = next(self._handles)
            self._streams[handle] = Stream(f"stream {handle:#x}", self._current)
            return error, handle

    def cudaStreamDestroy(self, handle: int) -> tuple[int]:
        with self._called("cudaStreamDestroy") as error:
            if handle not in self._streams or handle in DEFAULT_STREAMS:
                self._violate("a stream was destroyed that does not exist, or is CUDA's own")
                return (INVALID_HANDLE,)
            if self._streams[handle].queue:
                self._violate("a stream was destroyed with work in it")
            del self._streams[handle]
            return (error,)

    def cudaStreamSynchronize(self, handle: int) -> tuple[int]:
        with self._called("cudaStreamSynchronize") as error:
            if self._forbidden_in_capture():
                return (NOT_PERMITTED,)
            if handle not in self._streams:
                self._violate("the host waits for a stream that does not exist")
                return (INVALID_HANDLE,)
            stream = self._streams[handle]
            while stream.queue:
                self._run_one_towards(stream.queue[-1])
            self._join(self._host_clock(), stream.clock)
            return (error,)

    def cudaStreamWaitEvent(self, handle: int, event: int, flags: int) -> tuple[int]:
        with self._called("cudaStreamWaitEvent") as error:
            if event not in self._events:
                self._violate("a stream waits for an event that does not exist")
                return (INVALID_HANDLE,)
            record = self._events[event]
            if record is None:
                self._violate("a stream waits for an event that was never recorded")
                return (error,)
            stream = self._streams.get(handle)
            if stream is not None and stream.captured is not None and record not in stream.captured:
                stream.invalidated = True
                return (ISOLATION,)
            self._give(handle, Work("wait", lambda: None, waits_for=record))
            return (error,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        with self._called("cudaEventCreateWithFlags") as error:
            if not flags & 1:
                self._violate("an event was made whose waiters spin")
            handle = next(self._handles)
            self._events[handle] = None
            self._device_of_event[handle] = self._current
            return error, handle

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        with self._called("cudaEventDestroy") as error:
            if event not in self._events:
                self._violate("an event was destroyed that does not exist")
                return (INVALID_HANDLE,)
            del self._events[event]
            return (error,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        with self._called("cudaEventRecord") as error:
            if event not in self._events:
                self._violate("an event was recorded that does not exist")
                return (INVALID_HANDLE,)
            if stream in self._streams and self._device_of_event[event] != self._device_of(stream):
                self._violate("an event was recorded in a stream of another device")
                return (INVALID_HANDLE,)
            record = Work("record", lambda: None)
            self._events[event] = record
            self._give(stream, record)
            return (error,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        with self._called("cudaEventSynchronize") as error:
            if self._forbidden_in_capture():
                return (NOT_PERMITTED,)
            if event not in self._events:
                self._violate("the host waits for an event that does not exist")
                return (INVALID_HANDLE,)
            record = self._events[event]
            if record is None:
                self._violate("the host waits for an event that was never recorded")
                return (error,)
            while not record.done:
                self._run_one_towards(record)
            self._join(self._host_clock(), record.clock)
            return (error,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return SUCCESS, 1.0

    # Graphs

    def cudaStreamBeginCapture(self, handle: int, mode: int) -> tuple[int]:
        with self._called("cudaStreamBeginCapture") as error:
            self._require_device_of(handle, "a capture was begun")
            stream = self._streams[handle]
            stream.captured, stream.invalidated = [], False
            stream.capturing_thread = threading.get_ident()
            return (error,)

    def cudaStreamEndCapture(self, handle: int) -> tuple[int, int | None]:
        with self._called("cudaStreamEndCapture") as error:
            stream = self._streams[handle]
            captured, stream.captured = stream.captured, None
            if stream.invalidated or captured is None:
                return INVALIDATED, None
            graph = next(self._handles)
            self._graphs[graph] = captured
            return error, graph

    def cudaGraphGetNodes(self, graph: int, numNodes: int = 0) -> tuple[int, list[Any], int]:
        return SUCCESS, [], len(self._graphs[graph])

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        with self._called("cudaGraphInstantiate") as error:
            if error != SUCCESS:
                return error, 0
            executable = next(self._handles)
            self._executables[executable] = self._graphs[graph]
            return error, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self._graphs[graph]
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[int]:
        with self._called("cudaGraphExecDestroy") as error:
            work = self._executables.pop(executable, None)
            if work is None:
                self._violate("a graph was destroyed that does not exist")
                return (INVALID_VALUE,)
            runs = {id(queued.run) for stream in self._streams.values() for queued in stream.queue}
            if any(id(part.run) in runs for part in work):
                self._violate("a graph was destroyed while it was still to run")
            return (error,)

    def cudaGraphLaunch(self, executable: int, handle: int) -> tuple[int]:
        with self._called("cudaGraphLaunch") as error:
            if executable not in self._executables:
                self._violate("a graph was launched that does not exist")
                return (INVALID_VALUE,)
            self._require_device_of(handle, "a graph was launched")
            for work in self._executables[executable]:
                self._give(handle, Work(f"graph: {work.name}", work.run, work.reads, work.writes, work.promise))
            return (error,)

    # How it works

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or name in _NEVER_FAIL:
            return value

        def function(*arguments: Any) -> Any:
            error = self._failures.pop(name, SUCCESS)
            if error:
                self.calls[name] += 1
                values = len(get_args(get_type_hints(value)["return"])) - 1
                answer = (error, *[0] * values)
            else:
                answer = value(*arguments)
            self._remember(answer[0])
            return answer

        return function

    def _called(self, function: str) -> _Call:
        return _Call(self, function)

    def _enter(self, function: str) -> int:
        self._lock.acquire()
        self.calls[function] += 1
        self.contexts.add(self._current)
        while self._random.random() < self._eagerness and self._run_one():
            pass
        return SUCCESS

    def _leave(self) -> None:
        self._lock.release()

    def _remember(self, error: int) -> None:
        if error not in (SUCCESS, NOT_READY):
            self._thread.last_error = error

    @property
    def _current(self) -> int:
        """The device of this thread; 0 until it chooses one."""
        return getattr(self._thread, "device", 0)

    def _device_of(self, stream: int) -> int:
        device = self._streams[stream].device
        return self._current if device is None else device

    def _require_device_of(self, stream: int, what: str) -> None:
        """A kernel launch fails in a stream of a device that is not current; copies and waits do not.

        https://docs.nvidia.com/cuda/cuda-c-programming-guide/#stream-and-event-behavior
        """
        if stream in self._streams and self._device_of(stream) != self._current:
            self._violate(f"{what} to a stream of a device that is not current in the thread")

    def _violate(self, text: str) -> None:
        self.violations.append(text)

    def _forbidden_in_capture(self) -> bool:
        """Waiting is not allowed in a thread that captures, and spoils the capture."""
        found = False
        for stream in self._streams.values():
            if stream.captured is not None and stream.capturing_thread == threading.get_ident():
                stream.invalidated = found = True
        return found

    def _allocate(self, function: str, nbytes: int, kind: str, pool: int | None = None) -> tuple[int, int]:
        with self._called(function) as error:
            if error != SUCCESS:
                return error, 0
            if pool is None and self._forbidden_in_capture():
                return NOT_PERMITTED, 0
            if self._live_bytes(kind) + nbytes > self._memory_bytes:
                return OUT_OF_MEMORY, 0
            self.allocations += 1
            raw = np.full(nbytes + ALIGNMENT, 0xAA, np.uint8)
            address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
            start = address - raw.ctypes.data
            region = Region(
                address,
                nbytes,
                kind,
                raw[start : start + nbytes],
                self._current if pool is None else self._device_of_pool[pool],
                pool,
            )
            self._regions.append(region)
            return SUCCESS, address

    def _live_bytes(self, kind: str) -> int:
        return sum(region.nbytes for region in self._regions if region.kind == kind and not region.freed)

    def _free_now(self, function: str, address: int) -> tuple[int]:
        # finalizers may call this in any thread
        with self._lock:
            self.calls[function] += 1
            region = self._region_of(address, 1, function)
            if region is None or region.address != address or region.pool is not None:
                self._violate(f"{function} was given an address that it cannot free")
                return (INVALID_VALUE,)
            for stream in self._streams.values():
                for work in stream.queue:
                    if any(_overlap(span, (address, region.nbytes)) for span in [*work.reads, *work.writes]):
                        self._violate(f"{function}: memory was freed while a {work.name} that uses it was under way")
            region.freed = True
            region.memory[...] = 0xDD
            return (SUCCESS,)

    def _region_of(self, address: int, nbytes: int, what: str) -> Region | None:
        for region in self._regions:
            if region.address <= address and address + nbytes <= region.address + region.nbytes:
                if region.freed:
                    self._violate(f"{what} uses memory that has been freed")
                return region
        self._violate(f"{what} uses {nbytes} bytes at {address:#x}, which were never allocated")
        return None

    def _host_clock(self) -> Clock:
        return self._host_clocks[f"thread {threading.get_ident()}"]

    def _give(self, handle: int, work: Work) -> None:
        if handle not in self._streams:
            self._violate(f"a {work.name} was given to a stream that does not exist")
            return
        stream = self._streams[handle]
        if stream.captured is not None:
            stream.captured.append(work)
            return
        name = f"thread {threading.get_ident()}"
        clock = self._host_clocks[name]
        clock[name] = clock.get(name, 0) + 1
        work.known = dict(clock)
        work.check = work.promise()
        stream.queue.append(work)

    def _run_one(self) -> bool:
        ready = [stream for stream in self._streams.values() if stream.queue and _is_ready(stream.queue[0])]
        if not ready:
            return False
        self._run(self._random.choice(ready))
        return True

    def _run_one_towards(self, work: Work) -> None:
        if not self._run_one():
            self._violate(f"a {work.name} waits for work that never comes")
            raise FakeViolation(self.violations[-1])

    def _run(self, stream: Stream) -> None:
        work = stream.queue.popleft()
        self._join(stream.clock, work.known)
        if work.waits_for is not None:
            self._join(stream.clock, work.waits_for.clock)
        stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        for span in work.reads:
            self._access(stream, work, span, writes=False)
        for span in work.writes:
            self._access(stream, work, span, writes=True)
        work.check()
        work.run()
        work.clock = dict(stream.clock)
        work.done = True

    def _access(self, stream: Stream, work: Work, span: Span, *, writes: bool) -> None:
        region = self._region_of(*span, f"a {work.name}")
        if region is None:
            return
        start, end = span[0], span[0] + span[1]
        kept = []
        for first, last, wrote, actor, time in region.accesses:
            overlaps = first < end and start < last
            ordered = stream.clock.get(actor, 0) >= time
            if overlaps and (writes or wrote) and not ordered:
                self._violate(
                    f"race: a {work.name} on {stream.name} and a {'write' if wrote else 'read'} of {actor} use "
                    f"the same {region.kind} memory and are not ordered"
                )
            if not (overlaps and ordered and writes and start <= first and last <= end):
                kept.append((first, last, wrote, actor, time))
        kept.append((start, end, writes, stream.name, stream.clock[stream.name]))
        region.accesses = kept[-64:]

    @staticmethod
    def _join(clock: Clock, other: Clock) -> None:
        for actor, time in other.items():
            clock[actor] = max(clock.get(actor, 0), time)


class _Call:
    """One call: holds the lock, and gives the error that it is to fail with."""

    def __init__(self, cudart: FakeCudart, function: str) -> None:
        self._cudart = cudart
        self._function = function

    def __enter__(self) -> int:
        return self._cudart._enter(self._function)

    def __exit__(self, *exception: object) -> None:
        self._cudart._leave()


def _is_ready(work: Work) -> bool:
    return work.waits_for is None or work.waits_for.done


def _overlap(first: Span, second: Span) -> bool:
    return first[0] < second[0] + second[1] and second[0] < first[0] + first[1]
