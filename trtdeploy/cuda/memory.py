"""Memory: stream-ordered on the device, pinned on the host, and the copies between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from trtdeploy.cuda.device import Device
from trtdeploy.cuda.streams import Event, Stream
from trtdeploy.errors import CudaError
from trtdeploy.tensors import Array

ALIGNMENT = 256
"""What TensorRT demands of every address, and what CUDA's allocators give."""
_PAGE = 4096


class DeviceBuffer:
    """Memory on a GPU that belongs to a pool.

    Attributes:
        address: Where it begins.
        nbytes: How long it is.
    """

    def __init__(self, pool: DevicePool, address: int, nbytes: int) -> None:
        self._pool = pool
        self.address = address
        self.nbytes = nbytes

    def free(self, stream: Stream) -> None:
        """Give it back once the work so far of ``stream`` is done; freeing it twice is an error of the program."""
        self._pool.free(self, stream)


class DevicePool:
    """Stream-ordered device memory of one owner.

    What is freed stays with the pool, up to a threshold, so that a process in steady state asks the driver for nothing.
    Thread-safe.

    Args:
        device: The GPU.
        release_threshold_bytes: What the pool keeps; CUDA's own default, 0, returns all at every synchronization.
    """

    def __init__(self, device: Device, *, release_threshold_bytes: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._live: dict[int, int] = {}
        api, runtime = device.api, device.api.runtime
        properties = runtime.cudaMemPoolProps()
        properties.allocType = runtime.cudaMemAllocationType.cudaMemAllocationTypePinned
        properties.location.type = runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        properties.location.id = device.ordinal
        with device.use():
            self._pool = api.call("cudaMemPoolCreate", properties)
            api.call(
                "cudaMemPoolSetAttribute",
                self._pool,
                runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold,
                _as_cuuint64(release_threshold_bytes),
            )

    @property
    def used_bytes(self) -> int:
        """Bytes of the buffers that have not been freed."""
        with self._lock:
            return sum(self._live.values())

    @property
    def reserved_bytes(self) -> int:
        """Bytes that the pool has taken from the driver."""
        attribute = self._device.api.runtime.cudaMemPoolAttr.cudaMemPoolAttrReservedMemCurrent
        return int(self._device.api.call("cudaMemPoolGetAttribute", self._pool, attribute))

    def allocate(self, nbytes: int, stream: Stream) -> DeviceBuffer:
        """Return memory that may be used by what ``stream`` is given from now on.

        Raises:
            DeviceMemoryError: The device has not got so much.
        """
        address = int(self._device.api.call("cudaMallocFromPoolAsync", nbytes, self._pool, stream.native))
        if address % ALIGNMENT:
            self._device.api.call("cudaFreeAsync", address, stream.native)
            raise CudaError(f"CUDA gave memory at {address:#x}, which is not aligned to {ALIGNMENT} bytes.")
        with self._lock:
            self._live[address] = nbytes
        return DeviceBuffer(self, address, nbytes)

    def free(self, buffer: DeviceBuffer, stream: Stream) -> None:
        """Take a buffer back once the work so far of ``stream`` is done."""
        with self._lock:
            known = self._live.pop(buffer.address, None)
        if known is None:
            raise CudaError(f"The buffer at {buffer.address:#x} has been freed already.")
        self._device.api.call("cudaFreeAsync", buffer.address, stream.native)

    def close(self) -> None:
        """Release the pool.

        Raises:
            CudaError: Buffers of it are still in use.
        """
        if self.used_bytes:
            raise CudaError(f"The memory pool still has {self.used_bytes} bytes in {len(self._live)} buffers in use.")
        self._device.api.call("cudaMemPoolDestroy", self._pool)


class PinnedBuffer:
    """Host memory that the GPU reads and writes by itself."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self.nbytes = max(nbytes, 1)
        with device.use():
            self.address = int(device.api.call("cudaHostAlloc", self.nbytes, 0))
        self._bytes = array_over(self.address, (self.nbytes,), np.dtype(np.uint8), None)

    def view(self, dtype: np.dtype[Any], shape: Sequence[int], *, offset: int = 0) -> Array:
        """Return the bytes from ``offset`` on as an array; it must not outlive the buffer."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset + size > self.nbytes:
            raise CudaError(f"{size} bytes from {offset} on do not fit into a pinned buffer of {self.nbytes}.")
        if not size:
            return np.empty(shape, dtype)
        return self._bytes[offset : offset + size].view(dtype).reshape(tuple(shape))

    def close(self) -> None:
        """Release it; no copy may be on its way."""
        self._device.api.call("cudaFreeHost", self.address)


class _Memory:
    """Memory that numpy only knows by address, as the base of an array over it."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: object) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": tuple(shape),
            "typestr": dtype.str,
            "version": 3,
        }
        self.owner = owner


def array_over(address: int, shape: Sequence[int], dtype: np.dtype[Any], owner: object) -> Array:
    """Return an array over memory at an address, without reading it; the array keeps ``owner`` alive."""
    return np.asarray(_Memory(address, shape, dtype, owner))


class StagingSlot:
    """One place of a staging ring, for one transfer at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffer: PinnedBuffer | None = None
        self._event = Event(device)
        self._pending = False
        self.taken = False

    @property
    def address(self) -> int:
        """Where its memory begins."""
        return 0 if self._buffer is None else self._buffer.address

    @property
    def nbytes(self) -> int:
        """How long its memory is."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def view(self, dtype: np.dtype[Any], shape: Sequence[int], *, offset: int = 0) -> Array:
        """Return the bytes from ``offset`` on as an array."""
        if self._buffer is None:
            raise CudaError("The staging slot has no memory yet.")
        return self._buffer.view(dtype, shape, offset=offset)

    def done_after(self, stream: Stream) -> None:
        """Note that the work so far of ``stream`` uses the slot."""
        stream.record(self._event)
        self._pending = True

    def synchronize(self) -> None:
        """Sleep until the noted work is done."""
        if self._pending:
            self._event.synchronize()
            self._pending = False

    def release(self) -> None:
        """Give it back to the ring; the noted work may still run."""
        self.taken = False

    def fit(self, nbytes: int) -> None:
        """Make it at least so long; what it held is gone. Waits for the noted work first."""
        self.synchronize()
        if self.nbytes < nbytes:
            # whole pages, and room to grow: a sweep over batch sizes must not pin new memory at every step
            grown = PinnedBuffer(self._device, -(-max(nbytes, 2 * self.nbytes) // _PAGE) * _PAGE)
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = grown

    def close(self) -> None:
        """Release its memory; waits for the noted work."""
        self.synchronize()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        self._event.close()


class StagingRing:
    """Pinned memory for transfers, in slots that are used in turn: one is filled while another is copied.

    A slot is used again only when the copy that it was noted for is done. Not thread-safe: it belongs to one context.

    Args:
        device: The GPU.
        slots: How many transfers may be under way.
    """

    def __init__(self, device: Device, *, slots: int) -> None:
        self._slots = [StagingSlot(device) for _ in range(slots)]
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Pinned bytes of all slots."""
        return sum(slot.nbytes for slot in self._slots)

    def take(self, nbytes: int) -> StagingSlot:
        """Return the next slot, with at least so many bytes; ``StagingSlot.release`` gives it back.

        Raises:
            CudaError: All slots are taken.
        """
        slot = self._slots[self._next]
        if slot.taken:
            raise CudaError(f"All {len(self._slots)} staging slots are taken; wait for a result first.")
        slot.fit(nbytes)
        slot.taken = True
        self._next = (self._next + 1) % len(self._slots)
        return slot

    @contextmanager
    def slot(self, nbytes: int, stream: Stream) -> Iterator[StagingSlot]:
        """Have a slot for copies on ``stream``; it may be used again when they are done."""
        slot = self.take(nbytes)
        try:
            yield slot
            slot.done_after(stream)
        except BaseException:
            # some copies may have been given to the stream, and no event says when they are done
            stream.synchronize()
            raise
        finally:
            slot.release()

    def close(self) -> None:
        """Release all memory; waits for the noted work."""
        for slot in self._slots:
            slot.close()


def copy_to_device(device: Device, target: int, source: int, nbytes: int, stream: Stream) -> None:
    """Copy from pinned host memory, on a stream."""
    _copy(device, target, source, nbytes, stream, "cudaMemcpyHostToDevice")


def copy_to_host(device: Device, target: int, source: int, nbytes: int, stream: Stream) -> None:
    """Copy to pinned host memory, on a stream."""
    _copy(device, target, source, nbytes, stream, "cudaMemcpyDeviceToHost")


def copy_on_device(device: Device, target: int, source: int, nbytes: int, stream: Stream) -> None:
    """Copy within the device, on a stream."""
    _copy(device, target, source, nbytes, stream, "cudaMemcpyDeviceToDevice")


def _copy(device: Device, target: int, source: int, nbytes: int, stream: Stream, kind: str) -> None:
    if nbytes:
        direction = getattr(device.api.runtime.cudaMemcpyKind, kind)
        device.api.call("cudaMemcpyAsync", target, source, nbytes, direction, stream.native)


def _as_cuuint64(value: int) -> Any:
    """Return a number as cuda-python takes a 64-bit attribute; it refuses an int."""
    from cuda.bindings import driver

    return driver.cuuint64_t(value)
