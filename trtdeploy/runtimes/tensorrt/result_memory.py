"""Device memory of outputs that stay on the GPU: each lives for as long as somebody holds its array."""

from __future__ import annotations

import threading

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
        self._live = 0
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of the outputs that somebody still holds."""
        return self._pool.used_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes that wait for the next output."""
        return self._pool.reserved_bytes - self._pool.used_bytes

    def give(self, nbytes: int, stream: Stream) -> ResultBuffer:
        """Return memory that what ``stream`` is given from now on may write.

        Raises:
            DeviceMemoryError: The device has not got so much.
        """
        buffer = self._pool.allocate(max(nbytes, 1), stream)
        with self._lock:
            self._live += 1
        return ResultBuffer(self, buffer)

    def take_back(self, buffer: DeviceBuffer) -> None:
        """Free a buffer that nobody holds any more.

        Work on the default stream that still reads it is waited for; who reads it on another stream has to keep the
        array until that is done, as with every array of CUDA.
        """
        self._device.use()
        with self._lock:
            self._stream.wait_for_stream(_LEGACY_STREAM)
            buffer.free(self._stream)
            self._live -= 1
            if self._closed and not self._live:
                self._release()

    def close(self) -> None:
        """Release the memory now, or when the last array is gone."""
        with self._lock:
            self._closed = True
            if not self._live:
                self._release()

    def _release(self) -> None:
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
        self._memory.take_back(self._buffer)
