"""One GPU, and making it the current one of a thread."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from trtdeploy.cuda.api import CudaApi


class Device:
    """A GPU. CUDA keeps a current device per thread: whoever calls CUDA for this one does it inside of ``use``.

    Args:
        api: CUDA.
        ordinal: Its number.
    """

    def __init__(self, api: CudaApi, ordinal: int) -> None:
        self.api = api
        self.ordinal = ordinal
        properties = api.call("cudaGetDeviceProperties", ordinal)
        self.name = _text(properties.name)
        self.capability = f"{properties.major}.{properties.minor}"
        self.total_bytes = int(properties.totalGlobalMem)

    def use(self) -> AbstractContextManager[None]:
        """Have it as the current device of this thread for the length of a ``with`` block.

        The thread is somebody else's: at the end its device is again what it was. Since CUDA 12 that makes a context
        on a device that has none yet, as every ``cudaSetDevice`` does.
        """
        return _Use(self)

    def make_current(self) -> None:
        """Make it the current device of this thread for good: for threads of our own."""
        self.api.call("cudaSetDevice", self.ordinal)

    def free_bytes(self) -> int:
        """Return the memory that is free on it now, for all processes."""
        with self.use():
            free, _ = self.api.call("cudaMemGetInfo")
        return int(free)


class _Use:
    """What ``Device.use`` gives: a class, since every inference enters some, and a generator takes twice as long."""

    __slots__ = ("_before", "_device")

    def __init__(self, device: Device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._before = int(self._device.api.call("cudaGetDevice"))
        if self._before != self._device.ordinal:
            self._device.make_current()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before != self._device.ordinal:
            self._device.api.call("cudaSetDevice", self._before)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else value
