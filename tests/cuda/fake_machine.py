"""A machine with fake GPUs, for the tests of the layer."""

from __future__ import annotations

import numpy as np

from tests.fakes.fake_cudart import FakeCudart
from trtdeploy.cuda.api import CudaApi
from trtdeploy.cuda.device import Device
from trtdeploy.cuda.memory import DeviceBuffer, DevicePool
from trtdeploy.cuda.streams import Stream


class Machine:
    """A device that is current in this thread, a stream and a pool.

    Args:
        seed: Of the schedule.
        eagerness: How likely work runs at each call; 0 lets it run only when it is waited for.
        memory_bytes: What the device has.
        devices: How many GPUs there are; the first is used.
    """

    def __init__(self, seed: int = 0, *, eagerness: float = 0.0, memory_bytes: int = 1 << 24, devices: int = 1) -> None:
        self.cudart = FakeCudart(seed, eagerness=eagerness, memory_bytes=memory_bytes, devices=devices)
        self.device = Device(CudaApi(self.cudart), 0)
        self.device.make_current()
        self.stream = Stream(self.device)
        self.pool = DevicePool(self.device, release_threshold_bytes=1 << 30)

    def filled(self, values: np.ndarray) -> DeviceBuffer:
        """Return device memory with these values, written by now."""
        buffer = self.pool.allocate(values.nbytes, self.stream)
        self.kernel(self.stream, writes=buffer, result=values)
        self.stream.synchronize()
        return buffer

    def kernel(
        self,
        stream: Stream,
        *,
        reads: DeviceBuffer | None = None,
        writes: DeviceBuffer | None = None,
        result: np.ndarray | float = 0.0,
    ) -> None:
        """Enqueue something that reads one buffer and writes ``result`` to another."""

        def run() -> None:
            if writes is not None:
                values = np.asarray(result, np.float32) if np.ndim(result) == 0 else np.asarray(result)
                count = writes.nbytes // values.itemsize
                self.cudart.array_at(writes.address, (count,), values.dtype)[...] = values.ravel()

        read, written = ([(buffer.address, buffer.nbytes)] if buffer is not None else [] for buffer in (reads, writes))
        self.cudart.enqueue_kernel(stream.handle, read, written, run)

    def read(self, buffer: DeviceBuffer, dtype: type = np.float32) -> np.ndarray:
        """Return what lies in a buffer now."""
        return self.cudart.array_at(buffer.address, (buffer.nbytes // np.dtype(dtype).itemsize,), dtype).copy()

    def end(self) -> None:
        """Close what was made here, and check that nothing was violated and nothing is left."""
        self.stream.synchronize()
        self.pool.close()
        self.stream.close()
        self.cudart.assert_clean()
