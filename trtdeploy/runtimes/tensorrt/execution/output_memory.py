"""Memory for outputs whose size TensorRT knows only while it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from trtdeploy.cuda.memory import DeviceBuffer, DevicePool
from trtdeploy.cuda.streams import Stream
from trtdeploy.errors import InferenceError, TrtDeployError
from trtdeploy.runtimes.tensorrt.bindings import Bindings

if TYPE_CHECKING:
    import tensorrt


class GrowingOutput(Protocol):
    """What the context asks of an allocator after the enqueue."""

    buffer: DeviceBuffer | None
    shape: tuple[int, ...]
    failure: TrtDeployError | None


def make_output_allocator(
    bindings: Bindings, pool: DevicePool, stream: Stream
) -> tuple[tensorrt.IOutputAllocator, GrowingOutput]:
    """Make an allocator for one output; its memory is kept and grows, so that steady state allocates nothing.

    TensorRT calls it during the enqueue, through C++ frames that no exception may cross: a failure is kept and shown to
    TensorRT as address 0.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings.trt

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc,unused-ignore]  # unknown where TensorRT is missing
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.buffer: DeviceBuffer | None = None
            self.shape: tuple[int, ...] = ()
            self.failure: TrtDeployError | None = None

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream_handle: int
        ) -> int:
            try:
                if self.buffer is None or self.buffer.nbytes < size:
                    if self.buffer is not None:
                        self.buffer.free(stream)
                        self.buffer = None
                    self.buffer = pool.allocate(size, stream)
                return self.buffer.address
            except TrtDeployError as error:
                self.failure = error
                return 0

        def notify_shape(self, tensor_name: str, shape: tensorrt.Dims) -> None:
            self.shape = tuple(int(size) for size in shape)

    allocator = Allocator()
    return allocator, allocator


def shape_of(name: str, output: GrowingOutput) -> tuple[int, ...]:
    """Return the shape that TensorRT has announced.

    Raises:
        InferenceError: The memory for it could not be had.
    """
    if output.failure is not None:
        raise InferenceError(f"Output {name} found no memory: {output.failure.message}") from output.failure
    return output.shape
