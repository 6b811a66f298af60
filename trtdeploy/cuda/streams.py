"""Streams and events."""

from __future__ import annotations

from typing import Any

from trtdeploy.cuda.device import Device

_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream
_BLOCKING_SYNC = 1  # cudaEventBlockingSync: who waits for the event sleeps
_DISABLE_TIMING = 2  # cudaEventDisableTiming


class Event:
    """A point in a stream's work. Waiting for it sleeps; it does not spin.

    Args:
        device: The GPU.
        timing: Whether times between two such events can be measured, which costs a little.
    """

    def __init__(self, device: Device, *, timing: bool = False) -> None:
        self._device = device
        flags = _BLOCKING_SYNC if timing else _BLOCKING_SYNC | _DISABLE_TIMING
        with device.use():
            self._event = device.api.call("cudaEventCreateWithFlags", flags)

    @property
    def handle(self) -> int:
        """The event as a number."""
        return int(self._event)

    def synchronize(self) -> None:
        """Sleep until the work before it is done.

        Raises:
            CudaError: That work failed.
        """
        self._device.api.call("cudaEventSynchronize", self._event)

    def milliseconds_since(self, earlier: Event) -> float:
        """Return the milliseconds between two recorded events that were made with ``timing``."""
        return float(self._device.api.call("cudaEventElapsedTime", earlier._event, self._event))

    def close(self) -> None:
        """Release it."""
        self._device.api.call("cudaEventDestroy", self._event)


class Stream:
    """Work that runs in order, beside that of other streams."""

    def __init__(self, device: Device) -> None:
        self.device = device
        with device.use():
            self._stream = device.api.call("cudaStreamCreateWithFlags", _NON_BLOCKING)

    @property
    def handle(self) -> int:
        """The stream as a number, as TensorRT takes it."""
        return int(self._stream)

    @property
    def native(self) -> Any:
        """The stream as cuda-python takes it."""
        return self._stream

    def record(self, event: Event) -> None:
        """Let the event come when all work so far is done."""
        self.device.api.call("cudaEventRecord", event._event, self._stream)

    def wait(self, event: Event) -> None:
        """Let all later work wait for the event; the host goes on."""
        self.device.api.call("cudaStreamWaitEvent", self._stream, event._event, 0)

    def wait_for_stream(self, handle: int) -> None:
        """Let all later work wait for what another stream, perhaps of another library, has been given so far."""
        event = Event(self.device)
        self.device.api.call("cudaEventRecord", event._event, handle)
        self.wait(event)
        event.close()  # CUDA keeps it until it has come

    def synchronize(self) -> None:
        """Wait until all work is done.

        Raises:
            CudaError: A part of it failed.
        """
        self.device.api.call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Release it."""
        self.device.api.call("cudaStreamDestroy", self._stream)


class ExternalStream(Stream):
    """A stream of somebody else, who also releases it.

    Args:
        device: The GPU.
        handle: The stream as a number; 1 and 2 are CUDA's default streams.
    """

    def __init__(self, device: Device, handle: int) -> None:
        self.device = device
        self._stream = handle

    def close(self) -> None:
        """Leave it as it is."""
