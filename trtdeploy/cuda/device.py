"""One GPU, and making it the current one of a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

    @contextmanager
    def use(self) -> Iterator[None]:
        """Have it as the current device of this thread for the length of a ``with`` block.

        The thread is somebody else's: at the end its device is again what it was. Since CUDA 12 that makes a context
        on a device that has none yet, as every ``cudaSetDevice`` does.
        """
        before = int(self.api.call("cudaGetDevice"))
        if before == self.ordinal:
            yield
            return
        self.make_current()
        try:
            yield
        finally:
            self.api.call("cudaSetDevice", before)

    def make_current(self) -> None:
        """Make it the current device of this thread for good: for threads of our own."""
        self.api.call("cudaSetDevice", self.ordinal)

    def free_bytes(self) -> int:
        """Return the memory that is free on it now, for all processes."""
        with self.use():
            free, _ = self.api.call("cudaMemGetInfo")
        return int(free)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else value
