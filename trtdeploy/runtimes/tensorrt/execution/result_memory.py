"""Device memory of outputs that stay on the GPU: each lives for as long as somebody holds its array."""

from __future__ import annotations

import threading
from collections import deque

from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import DeviceBuffer, DevicePool
from trtdeploy.cuda.streams import Stream

_KEPT_BYTES = 1 << 28
_LEGACY_STREAM = 1


class ResultMemory:
    """Gives out buffers that come back by themselves, also after the engine was closed.

    Args:
        device: The GPU.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._pool = DevicePool(device, release_threshold_bytes=_KEPT_BYTES)
        self._stream = Stream(device)
        self._returned: deque[DeviceBuffer] = deque()
        self._live = 0
        self._closed = False
        self._released = False

    @property
    def used_bytes(self) -> int:
        """Bytes of the outputs that somebody still holds."""
        with self._lock:
            self._take_back()
            return self._pool.used_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes that wait for the next output."""
        with self._lock:
            self._take_back()
            return self._pool.reserved_bytes - self._pool.used_bytes

    def give(self, nbytes: int, stream: Stream) -> ResultBuffer:
        """Return memory that what ``stream`` is given from now on may write.

        Raises:
            DeviceMemoryError: The device has not got so much.
        """
        with self._lock:
            self._take_back()
            buffer = self._pool.allocate(max(nbytes, 1), stream)
            self._live += 1
        return ResultBuffer(self, buffer)

    def returned(self, buffer: DeviceBuffer) -> None:
        """Note that nobody holds a buffer any more, and free it now if that can be.

        The garbage collector may call this at any moment, in a thread that is just working here and holds the lock: so
        nothing may wait for it. Whoever holds it, or comes next, frees the buffer.

        Work on the default stream that still reads it is waited for; who reads it on another stream has to keep the
        array until that is done, as with every array of CUDA.
        """
        self._returned.append(buffer)
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Release the memory now, or when the last array is gone."""
        with self._lock, self._device.use():
            self._closed = True
            self._take_back()
            if not self._live and not self._released:
                self._release()

    def _take_back(self) -> None:
        """Free what was returned; hold the lock."""
        if not self._returned:
            return
        with self._device.use():
            self._stream.wait_for_stream(_LEGACY_STREAM)
            while self._returned:
                self._returned.popleft().free(self._stream)
                self._live -= 1
            if self._closed and not self._live and not self._released:
                self._release()

    def _release(self) -> None:
        self._released = True
        self._stream.synchronize()
        self._pool.close()
        self._stream.close()


class ResultBuffer:
    """Memory of one output, given back when nothing refers to it."""

    def __init__(self, memory: ResultMemory, buffer: DeviceBuffer) -> None:
        self._memory = memory
        self._buffer = buffer

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._buffer.address

    def __del__(self) -> None:
        self._memory.returned(self._buffer)
