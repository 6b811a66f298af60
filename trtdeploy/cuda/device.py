"""One GPU, and making it the current one of a thread."""

from __future__ import annotations

from trtdeploy.cuda.api import CudaApi


class Device:
    """A GPU. CUDA keeps a current device per thread: whoever calls CUDA for this one calls ``use`` before.

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

    def use(self) -> None:
        """Make it the current device of this thread. Others may have changed that meanwhile, so it is always said."""
        self.api.call("cudaSetDevice", self.ordinal)

    def free_bytes(self) -> int:
        """Return the memory that is free on it now, for all processes."""
        self.use()
        free, _ = self.api.call("cudaMemGetInfo")
        return int(free)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else value
