"""One scratch memory for all contexts of an engine, whose computations then follow one another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import DevicePool
from trtdeploy.cuda.streams import Event, Stream


class Arena:
    """Scratch memory with the event of its last use.

    Contexts may share memory only if they never compute at the same time. The GPU itself keeps the order: each
    computation waits for the event of the one before; copies of other contexts go on meanwhile.
    """

    def __init__(self, device: Device, pool: DevicePool, stream: Stream, nbytes: int) -> None:
        self._lock = threading.Lock()
        self._stream = stream
        self._buffer = pool.allocate(max(nbytes, 1), stream)
        self._last_use = Event(device)
        stream.record(self._last_use)

    @property
    def address(self) -> int:
        """Where it begins, on the device."""
        return self._buffer.address

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return self._buffer.nbytes

    @contextmanager
    def in_use(self, stream: Stream) -> Iterator[None]:
        """Enqueue a computation on ``stream`` that uses the memory alone."""
        with self._lock:
            stream.wait(self._last_use)
            try:
                yield
            finally:
                # also if the enqueue failed: a part of it may have been enqueued
                stream.record(self._last_use)

    def close(self) -> None:
        """Give the memory back; all contexts must have been closed."""
        self._stream.wait(self._last_use)
        self._buffer.free(self._stream)
        self._stream.synchronize()
        self._last_use.close()
